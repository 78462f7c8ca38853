//! Services outside the mesh: which one a connection is, and where it leads.
//!
//! An ExternalService holds for clients of its own namespace, one of `weft-system` for all others.
//! Those with addresses are found by the original destination, here. The proxy itself knows what
//! the names of their endpoints mean, except for those that are written down (`Static`).

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use weft_api::names::CONTROL_PLANE_NAMESPACE;
use weft_api::policy::ExternalServiceSpec;
use weft_api::policy::egress::EgressMode;
use weft_api::policy::external::{ClientTlsMode, ExternalPort, Resolution, host_matches};
use weft_api::proto::{
    self, Backend, Destination, Endpoint, Endpoints, ExternalHost, OriginateTls, Route,
    WeightedBackend,
};

use super::destination::route_policy;
use super::policy;
use crate::model::{Name, Policy, Service, ServicePort, TargetPort, World, in_namespace, protocol};

pub(super) type External = Policy<ExternalServiceSpec>;

/// What the names of endpoints begin with that the proxy knows by itself.
const BY_DNS: &str = "dns/";
const ORIGINAL: &str = "original";
/// Endpoints that are written down.
const STATIC: &str = "external/";

/// How a connection was found to be an ExternalService's.
#[derive(Clone, Copy, Debug)]
pub(super) enum Found<'a> {
    /// By the address it was made to.
    At(IpAddr),
    /// By one of its hosts.
    Host(&'a str),
}

/// Whether Endpoints of this name are the proxy's own to find out, and no resource.
pub(super) fn is_local(endpoints: &str) -> bool {
    endpoints.starts_with(BY_DNS)
        || endpoints
            .strip_prefix(ORIGINAL)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// As policies see it.
pub(super) fn as_service(external: &External) -> Service {
    let ports = external.spec.ports.iter().map(|port| ServicePort {
        name: port.name.clone(),
        port: port.port,
        target: TargetPort::Number(target(port)),
        protocol: protocol(port.app_protocol.as_deref(), &port.name),
        node_port: None,
    });
    Service {
        name: external.name.clone(),
        external: true,
        ports: ports.collect(),
        ..Service::default()
    }
}

fn target(port: &ExternalPort) -> u16 {
    port.target_port.unwrap_or(port.port)
}

fn port_of(external: &External, number: u16) -> Option<(&External, &ExternalPort)> {
    let port = external
        .spec
        .ports
        .iter()
        .find(|port| port.port == number)?;
    Some((external, port))
}

/// The ExternalService at an address for clients of a namespace: their own before the mesh's, then
/// the one with the narrowest network, then the first by name.
pub(super) fn at<'a>(
    world: &'a World,
    address: SocketAddr,
    client: &str,
) -> Option<(&'a External, &'a ExternalPort)> {
    let of = |namespace: &str| {
        world
            .external_at(address.ip())
            .filter(|external| external.name.namespace == namespace)
            .find_map(|external| port_of(external, address.port()))
    };
    of(client).or_else(|| of(CONTROL_PLANE_NAMESPACE))
}

/// The ExternalService that has a host, for clients of a namespace: one that names it before one
/// with a wildcard, their own before the mesh's, then the first by name.
pub(super) fn of_host<'a>(
    world: &'a World,
    host: &str,
    number: u16,
    client: &str,
) -> Option<(&'a External, &'a ExternalPort)> {
    let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    let find = |wanted: &dyn Fn(&str) -> bool| {
        world
            .external_for(client)
            .filter(|external| external.spec.hosts.iter().any(|known| wanted(known)))
            .find_map(|external| port_of(external, number))
    };
    find(&|known| known == host).or_else(|| find(&|known| host_matches(known, &host)))
}

/// Whose an address and port is instead of an ExternalService's that names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holder<'a> {
    Service(&'a Name),
    Workload(&'a Name),
    /// Another one of the namespace.
    External(&'a Name),
}

impl std::fmt::Display for Holder<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Service(name) => write!(f, "Service {name}"),
            Self::Workload(name) => write!(f, "Workload {name}"),
            Self::External(name) => write!(f, "ExternalService {name}"),
        }
    }
}

/// Whose a port of a network is that an ExternalService names, when it is not its own. Networks
/// within others are the narrower one's, as they are meant to be.
pub(super) fn holder_of_address<'a>(
    world: &'a World,
    external: &External,
    network: IpNet,
    port: u16,
) -> Option<Holder<'a>> {
    let address = network.addr();
    if network.prefix_len() == network.max_prefix_len() {
        let mut services = world.vips.get(&address).filter_map(|of| world.service(of));
        let service = services.find(|service| service.ports.iter().any(|p| p.port == port));
        if let Some(service) = service {
            return Some(Holder::Service(&service.name));
        }
        if let Some(workload) = world.workload_at(address) {
            return Some(Holder::Workload(&workload.name));
        }
    }
    let first = world.external_at(address).find(|other| {
        other.name.namespace == external.name.namespace
            && other.spec.networks().contains(&network)
            && other.spec.ports.iter().any(|other| other.port == port)
    })?;
    (first.name != external.name).then_some(Holder::External(&first.name))
}

/// The other ExternalService of the namespace whose a host and port is that this one names.
pub(super) fn holder_of_host<'a>(
    world: &'a World,
    external: &External,
    host: &str,
    port: u16,
) -> Option<&'a Name> {
    let first = in_namespace(&world.external, &external.name.namespace).find(|other| {
        other.spec.networks().is_empty()
            && other.spec.hosts.iter().any(|known| known == host)
            && other.spec.ports.iter().any(|other| other.port == port)
    })?;
    (first.name != external.name).then_some(&first.name)
}

/// The hosts that clients of a namespace know by name only, their own before the mesh's.
pub(super) fn hosts(world: &World, client: &str) -> Vec<ExternalHost> {
    let named = world
        .external_for(client)
        .filter(|external| external.spec.networks().is_empty());
    named
        .flat_map(|external| {
            external.spec.hosts.iter().flat_map(move |host| {
                external.spec.ports.iter().map(move |port| ExternalHost {
                    host: host.clone(),
                    destination: Some(destination(world, external, port, Found::Host(host))),
                })
            })
        })
        .collect()
}

/// What becomes of connections to what is not known, for clients of a namespace: what its own
/// EgressPolicy says, else the mesh's; of several the oldest, then the first by name.
pub(super) fn egress(world: &World, client: &str) -> proto::EgressMode {
    let of = |namespace: &str| {
        in_namespace(&world.egress, namespace)
            .min_by(|a, b| a.precedence().cmp(&b.precedence()))
            .map(|policy| policy.spec.mode)
    };
    match of(client).or_else(|| of(CONTROL_PLANE_NAMESPACE)) {
        Some(EgressMode::RegistryOnly) => proto::EgressMode::RegistryOnly,
        Some(EgressMode::AllowAny) | None => proto::EgressMode::AllowAny,
    }
}

/// Namespaces for whose clients an address is another ExternalService than for everybody else.
pub(super) fn clients_at(world: &World, address: SocketAddr) -> BTreeSet<String> {
    world
        .external_at(address.ip())
        .filter(|external| port_of(external, address.port()).is_some())
        .map(|external| external.name.namespace.clone())
        .filter(|namespace| namespace != CONTROL_PLANE_NAMESPACE)
        .collect()
}

/// The same for a host.
pub(super) fn clients_of_host(world: &World, host: &str) -> BTreeSet<String> {
    let host = host.to_ascii_lowercase();
    let externals = world.external.values();
    externals
        .filter(|external| {
            let hosts = &external.spec.hosts;
            hosts.iter().any(|known| host_matches(known, &host))
        })
        .map(|external| external.name.namespace.clone())
        .filter(|namespace| namespace != CONTROL_PLANE_NAMESPACE)
        .collect()
}

/// What connections to a port of an ExternalService are.
pub(super) fn destination(
    world: &World,
    external: &External,
    port: &ExternalPort,
    found: Found<'_>,
) -> Destination {
    let service = as_service(external);
    // It is there: the ports are the same.
    let service_port = service.ports.iter().find(|known| known.port == port.port);
    let (route_policy, mut backend_policy) = match service_port {
        Some(service_port) => (
            route_policy(world, &service, service_port, None),
            policy::effective(world, &service, service_port, None).backend,
        ),
        None => (policy::default_route(), policy::default_backend()),
    };
    if external.spec.resolution == Resolution::Passthrough {
        // There is nothing to choose from.
        backend_policy = policy::direct(backend_policy);
    }
    backend_policy.originate_tls = originate(external, port, found);
    let name = &external.name;
    Destination {
        namespace: name.namespace.clone(),
        service: name.name.clone(),
        port: u32::from(port.port),
        port_name: port.name.clone(),
        protocol: protocol(port.app_protocol.as_deref(), &port.name).into(),
        routes: vec![Route {
            name: format!("ExternalService/{name}"),
            backends: vec![WeightedBackend {
                weight: 1,
                backend: Some(Backend {
                    namespace: name.namespace.clone(),
                    service: name.name.clone(),
                    port: u32::from(port.port),
                    endpoints: endpoints_name(external, port, found),
                    policy: Some(backend_policy),
                }),
                ..WeightedBackend::default()
            }],
            policy: Some(route_policy),
            ..Route::default()
        }],
        ..Destination::default()
    }
}

/// Hosts without a wildcard, in lower case.
fn exact_hosts(external: &External) -> impl Iterator<Item = &str> {
    let hosts = external.spec.hosts.iter().map(String::as_str);
    hosts.filter(|host| !host.starts_with('*'))
}

fn endpoints_name(external: &External, port: &ExternalPort, found: Found<'_>) -> String {
    let spec = &external.spec;
    let target = target(port);
    match (spec.resolution, found) {
        (Resolution::Static, _) => format!("{STATIC}{}:{}", external.name, port.port),
        (Resolution::Passthrough, Found::At(address)) => {
            format!("{ORIGINAL}/{}", SocketAddr::new(address, port.port))
        }
        (Resolution::Passthrough, Found::Host(_)) => ORIGINAL.to_owned(),
        (Resolution::Dns, found) => {
            let at = |name: &str| match name.parse::<IpAddr>() {
                Ok(address) => SocketAddr::new(address, target).to_string(),
                Err(_) => format!("{name}:{target}"),
            };
            let names: Vec<String> = match found {
                _ if !spec.endpoints.is_empty() => {
                    let given = spec.endpoints.iter();
                    given.map(|endpoint| at(&endpoint.address)).collect()
                }
                Found::Host(host) => vec![at(host)],
                Found::At(_) => exact_hosts(external).map(at).collect(),
            };
            format!("{BY_DNS}{}", names.join(","))
        }
    }
}

fn originate(external: &External, port: &ExternalPort, found: Found<'_>) -> Option<OriginateTls> {
    let tls = port.tls.as_ref()?;
    let host = match found {
        Found::Host(host) => Some(host),
        Found::At(_) => exact_hosts(external).next(),
    };
    let pem = tls.ca_certificates.as_deref().unwrap_or_default();
    Some(OriginateTls {
        server_name: tls.sni.as_deref().or(host).unwrap_or_default().to_owned(),
        // That they can be read was seen when the object was taken.
        roots: CertificateDer::pem_slice_iter(pem.as_bytes())
            .filter_map(Result::ok)
            .map(|root| root.as_ref().to_vec())
            .collect(),
        mutual: tls.mode == ClientTlsMode::Mutual,
    })
}

/// Compiles the Endpoints `external/<namespace>/<name>:<port>`; `None` for another name, or when
/// there is no such ExternalService with endpoints that are written down.
pub(super) fn endpoints(world: &World, owner: &str, port: u16) -> Option<Endpoints> {
    let name = Name::parse(owner.strip_prefix(STATIC)?)?;
    let (external, port) = port_of(world.external.get(&name)?, port)?;
    if external.spec.resolution != Resolution::Static {
        return None;
    }
    let endpoints = external.spec.endpoints.iter().filter_map(|endpoint| {
        let address: IpAddr = endpoint.address.parse().ok()?;
        Some(Endpoint {
            address: SocketAddr::new(address, target(port)).to_string(),
            weight: endpoint.weight.unwrap_or(1),
            ..Endpoint::default()
        })
    });
    Some(Endpoints {
        endpoints: endpoints.collect(),
        node_local: false,
    })
}
