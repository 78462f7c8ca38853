//! Services outside the mesh.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::meta::{Ignored, Metadata};

/// A service that is not of the mesh, known to it by the addresses or the names it has. It holds for
/// the clients of its own namespace; one in `weft-system` for those of every namespace. Policies
/// (`TrafficPolicy` with `kind: ExternalService`) apply as to a Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ExternalService {
    pub api_version: String,
    pub kind: String,
    pub metadata: Metadata,
    pub spec: ExternalServiceSpec,
    #[serde(default, skip_serializing)]
    #[doc(hidden)]
    pub status: Ignored,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ExternalServiceSpec {
    /// Its DNS names: "api.example.org", or "*.example.org" for every name below that one (TLS
    /// ports only, found by SNI). Needed unless there are `addresses`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
    /// What applications connect to: addresses and networks ("203.0.113.0/24"). Connections to
    /// them are this service's whatever is said on them. Default: what the hosts resolve to; with
    /// `resolution: Static` the endpoints' addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
    /// Ports applications connect to; at least one.
    pub ports: Vec<ExternalPort>,
    /// Where its endpoints come from. Default `DNS`.
    #[serde(default)]
    pub resolution: Resolution,
    /// Where it is reached: addresses with `Static`, addresses or names with `DNS`. Default with
    /// `DNS`: its hosts, each for itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub endpoints: Vec<ExternalEndpoint>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ExternalPort {
    /// Name, unique in the service; needed when there are several.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// The port applications connect to, 1 to 65535.
    pub port: u16,
    /// The endpoints' port. Default: `port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_port: Option<u16>,
    /// What applications speak there; as in a Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app_protocol: Option<String>,
    /// Applications speak in the clear, the proxy speaks TLS with the endpoint. Default: what the
    /// application says passes as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<ClientTls>,
}

/// How the proxy speaks TLS with an endpoint outside the mesh: TLS 1.2 or 1.3; the certificate must
/// hold and name the server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClientTls {
    /// Default `Simple`.
    #[serde(default)]
    pub mode: ClientTlsMode,
    /// The server's name: sent (SNI), and looked for in its certificate. Default: the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sni: Option<String>,
    /// Certificates, PEM, of those who may have signed the server's. Default: those that the
    /// proxy's system trusts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_certificates: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ClientTlsMode {
    /// The server shows a certificate, the proxy none.
    #[default]
    Simple,
    /// The proxy shows the certificate of its workload, a SPIFFE X.509-SVID: for servers that
    /// trust the mesh's roots.
    Mutual,
}

/// Where the endpoints of an external service come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Resolution {
    /// The proxy asks DNS, as long as an answer may be kept (TTL).
    #[default]
    #[serde(rename = "DNS")]
    Dns,
    /// They are written down.
    Static,
    /// Connections go where the application sent them.
    Passthrough,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ExternalEndpoint {
    /// An address; with `resolution: DNS` also a name.
    pub address: String,
    /// Share of the traffic relative to the others, with `resolution: Static`; 0 takes none.
    /// Default 1, at most 10000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
}

impl ExternalServiceSpec {
    /// What connections are known by, if it is not by the hosts: `addresses`, or with `Static` the
    /// endpoints' own. What cannot be read is left out.
    pub fn networks(&self) -> Vec<IpNet> {
        let endpoints = (self.resolution == Resolution::Static && self.addresses.is_empty())
            .then_some(&self.endpoints)
            .into_iter()
            .flatten()
            .map(|endpoint| &endpoint.address);
        let given = self.addresses.iter().chain(endpoints);
        given.filter_map(|given| network(given)).collect()
    }
}

/// Reads "203.0.113.7" or "203.0.113.0/24".
pub fn network(given: &str) -> Option<IpNet> {
    if let Ok(address) = given.parse::<IpAddr>() {
        return Some(IpNet::from(address));
    }
    given.parse::<IpNet>().ok().map(|net| net.trunc())
}

/// Whether a server name is one of a host's: the same, or below it when the host begins with "*.".
/// Both in lower case.
pub fn host_matches(host: &str, name: &str) -> bool {
    match host.strip_prefix('*') {
        Some(suffix) => name.len() > suffix.len() && name.ends_with(suffix),
        None => host == name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_are_of_whole_labels() {
        for (host, name, matches) in [
            ("api.example.org", "api.example.org", true),
            ("api.example.org", "xapi.example.org", false),
            ("*.example.org", "api.example.org", true),
            ("*.example.org", "a.b.example.org", true),
            ("*.example.org", "example.org", false),
            ("*.example.org", ".example.org", false),
            ("*.example.org", "badexample.org", false),
        ] {
            assert_eq!(host_matches(host, name), matches, "{host} {name}");
        }
    }

    #[test]
    fn addresses_and_networks() {
        let text = |given| network(given).map(|net| net.to_string());
        assert_eq!(text("10.0.0.7").as_deref(), Some("10.0.0.7/32"));
        assert_eq!(text("10.0.0.7/8").as_deref(), Some("10.0.0.0/8"));
        assert_eq!(text("fd00::1").as_deref(), Some("fd00::1/128"));
        assert_eq!(text("fd00::/33").as_deref(), Some("fd00::/33"));
        assert_eq!(text("10.0.0/8"), None);
        assert_eq!(text("10.0.0.0/33"), None);
    }
}
