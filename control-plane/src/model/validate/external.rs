//! External services that make no sense.

use std::net::IpAddr;

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, DnsName};
use weft_api::policy::ExternalServiceSpec;
use weft_api::policy::external::{ExternalPort, Resolution, network};
use weft_api::proto::Protocol;

use super::{Findings, MAX_WEIGHT};
use crate::model::protocol;

pub(super) fn check(spec: &ExternalServiceSpec, findings: &mut Findings) {
    if spec.hosts.is_empty() && spec.networks().is_empty() {
        findings.add(
            "spec",
            "it has neither hosts nor addresses, so no connection is known to be its",
            "write hosts: [api.example.org], or the addresses that applications connect to",
        );
    }
    for (index, host) in spec.hosts.iter().enumerate() {
        let name = host.strip_prefix("*.").unwrap_or(host);
        if !is_name(name) || !name.contains('.') || name.bytes().any(|b| b.is_ascii_uppercase()) {
            findings.add(
                &format!("spec.hosts.{index}"),
                format!("'{host}' is not a host"),
                "write a whole DNS name in lower case, such as api.example.org or *.example.org",
            );
        } else if spec.hosts[..index].contains(host) {
            findings.add(
                &format!("spec.hosts.{index}"),
                format!("'{host}' is there twice"),
                "write it once",
            );
        }
    }
    for (index, address) in spec.addresses.iter().enumerate() {
        if network(address).is_none() {
            findings.add(
                &format!("spec.addresses.{index}"),
                format!("'{address}' is neither an address nor a network"),
                "write 203.0.113.7, 203.0.113.0/24 or their like in IPv6",
            );
        }
    }
    ports(spec, findings);
    endpoints(spec, findings);
    wildcards(spec, findings);
}

/// A name that can be asked for, and not an address.
fn is_name(given: &str) -> bool {
    given.parse::<IpAddr>().is_err() && DnsName::try_from(given).is_ok() && !given.contains('_')
}

fn ports(spec: &ExternalServiceSpec, findings: &mut Findings) {
    if spec.ports.is_empty() {
        findings.add(
            "spec.ports",
            "it has no port, so no connection is known to be its",
            "write the ports that applications connect to",
        );
    }
    for (index, port) in spec.ports.iter().enumerate() {
        let at = format!("spec.ports.{index}");
        let duplicate = |other: &ExternalPort| {
            other.port == port.port || (!port.name.is_empty() && other.name == port.name)
        };
        if port.port == 0 || port.target_port == Some(0) {
            findings.add(&at, "0 is not a port", "write a number from 1 to 65535");
        }
        if spec.ports[..index].iter().any(duplicate) {
            findings.add(
                &at,
                format!("port {} '{}' is there twice", port.port, port.name),
                "give every port a number and a name of its own",
            );
        }
        if port.target_port.is_some() && spec.resolution == Resolution::Passthrough {
            findings.add(
                &format!("{at}.targetPort"),
                "with resolution Passthrough a connection goes to the port it was made to",
                "leave targetPort out, or use resolution Static or DNS",
            );
        }
        let Some(tls) = &port.tls else { continue };
        let spoken = protocol(port.app_protocol.as_deref(), &port.name);
        if spoken == Protocol::Tls {
            findings.add(
                &format!("{at}.tls"),
                "applications speak TLS on this port already",
                "leave tls out, or say what they speak in the clear with appProtocol",
            );
        }
        match &tls.sni {
            Some(sni) if !is_name(sni) && sni.parse::<IpAddr>().is_err() => findings.add(
                &format!("{at}.tls.sni"),
                format!("'{sni}' is neither a DNS name nor an address"),
                "write the name that the server's certificate has",
            ),
            None if spec.hosts.iter().all(|host| host.starts_with('*')) => findings.add(
                &format!("{at}.tls"),
                "there is no name to look for in the server's certificate",
                "write tls.sni, or a host without a wildcard",
            ),
            _ => {}
        }
        if let Some(pem) = &tls.ca_certificates {
            let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
            if read.map_or(true, |certificates| certificates.is_empty()) {
                findings.add(
                    &format!("{at}.tls.caCertificates"),
                    "it holds no certificate that can be read",
                    "write certificates in PEM, each between BEGIN CERTIFICATE and END CERTIFICATE",
                );
            }
        }
    }
}

fn endpoints(spec: &ExternalServiceSpec, findings: &mut Findings) {
    let nothing_to_ask = spec.hosts.iter().all(|host| host.starts_with('*'));
    match spec.resolution {
        Resolution::Static if spec.endpoints.is_empty() => findings.add(
            "spec.endpoints",
            "resolution Static needs endpoints",
            "write the addresses it is reached at, such as endpoints: [{address: 203.0.113.7}]",
        ),
        Resolution::Dns if spec.endpoints.is_empty() && nothing_to_ask => findings.add(
            "spec.resolution",
            "there is no name to ask DNS for",
            "write a host without a wildcard, endpoints, or resolution: Passthrough",
        ),
        Resolution::Passthrough if !spec.endpoints.is_empty() => findings.add(
            "spec.endpoints",
            "with resolution Passthrough connections go where the application sent them",
            "leave endpoints out, or use resolution Static or DNS",
        ),
        _ => {}
    }
    for (index, endpoint) in spec.endpoints.iter().enumerate() {
        let at = format!("spec.endpoints.{index}");
        let address = &endpoint.address;
        let is_address = address.parse::<IpAddr>().is_ok();
        if !is_address && (spec.resolution == Resolution::Static || !is_name(address)) {
            findings.add(
                &format!("{at}.address"),
                format!("'{address}' is not an address"),
                "write an IPv4 or IPv6 address; with resolution DNS it may be a name",
            );
        }
        match endpoint.weight {
            Some(weight) if weight > MAX_WEIGHT => findings.add(
                &format!("{at}.weight"),
                format!("weight {weight} is out of range"),
                format!("write a number from 0 to {MAX_WEIGHT}"),
            ),
            Some(_) if spec.resolution == Resolution::Dns => findings.add(
                &format!("{at}.weight"),
                "endpoints that DNS names have no weight",
                "leave weight out, or use resolution Static",
            ),
            _ => {}
        }
    }
}

fn wildcards(spec: &ExternalServiceSpec, findings: &mut Findings) {
    if !spec.hosts.iter().any(|host| host.starts_with('*')) || !spec.addresses.is_empty() {
        return;
    }
    if spec.resolution != Resolution::Passthrough {
        findings.add(
            "spec.resolution",
            "what a wildcard stands for cannot be asked for in advance",
            "use resolution: Passthrough, or name the hosts",
        );
    }
    for (index, port) in spec.ports.iter().enumerate() {
        if protocol(port.app_protocol.as_deref(), &port.name) != Protocol::Tls {
            findings.add(
                &format!("spec.ports.{index}.appProtocol"),
                "which host of a wildcard is meant can be seen in TLS only, by its SNI",
                "write appProtocol: tls, or name the hosts",
            );
        }
    }
}
