//! Who takes part in the demo, and where. `examples/demo/workloads.yaml` says the same to the
//! control plane; a test compares the two.

use std::net::Ipv4Addr;

/// Namespace of the shop's workloads in the manifests.
pub const NAMESPACE: &str = "shop";
/// Where the control plane, the collector and the demo itself are reached by the proxies.
pub const HUB: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// Network of all; the hub has its first address, the members the following ones.
pub const NETWORK: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 0);
/// The collector's port.
pub const OTLP_PORT: u16 = 4317;

/// Names of Services and their virtual addresses, as every workload's hosts file has them.
pub const SERVICES: [(&str, Ipv4Addr); 4] = [
    ("front", Ipv4Addr::new(10, 96, 0, 10)),
    ("catalog", Ipv4Addr::new(10, 96, 0, 20)),
    ("pricing", Ipv4Addr::new(10, 96, 0, 30)),
    ("ledger", Ipv4Addr::new(10, 96, 0, 40)),
];

/// One workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// As in the manifests.
    pub name: &'static str,
    /// Service account and label `app`.
    pub app: &'static str,
    pub address: Ipv4Addr,
    /// What it listens on; the visitor on nothing.
    pub port: Option<u16>,
    pub version: &'static str,
}

const fn member(
    name: &'static str,
    app: &'static str,
    last: u8,
    port: Option<u16>,
    version: &'static str,
) -> Member {
    Member {
        name,
        app,
        address: Ipv4Addr::new(10, 77, 0, last),
        port,
        version,
    }
}

/// All workloads, in the order of their addresses; the visitor comes last, when the others stand.
pub const MEMBERS: [Member; 8] = [
    member("ledger-1", "ledger", 2, Some(7000), ""),
    member("pricing-1", "pricing", 3, Some(9090), ""),
    member("pricing-2", "pricing", 4, Some(9090), ""),
    member("catalog-1", "catalog", 5, Some(8080), "v1"),
    member("catalog-2", "catalog", 6, Some(8080), "v1"),
    member("catalog-3", "catalog", 7, Some(8080), "v2"),
    member("front-1", "front", 8, Some(8080), ""),
    member("visitor", "visitor", 9, None, ""),
];

impl Member {
    /// "namespace/name".
    pub fn workload(&self) -> String {
        format!("{NAMESPACE}/{}", self.name)
    }

    /// Arguments of `weft` that start its application. `control` is the socket for orders.
    pub fn command(&self, control: &str, rate: u32) -> Vec<String> {
        let mut words = vec!["app".to_owned(), self.app.to_owned()];
        let mut flag = |name: &str, value: String| words.extend([format!("--{name}"), value]);
        match self.port {
            Some(port) => {
                flag("listen", format!("0.0.0.0:{port}"));
                flag("name", self.name.to_owned());
                flag("control", control.to_owned());
            }
            None => {
                flag("front", "http://front".to_owned());
                flag("rate", rate.to_string());
            }
        }
        if !self.version.is_empty() {
            flag("version", self.version.to_owned());
        }
        words
    }
}

/// The workload of that name.
pub fn find(name: &str) -> Option<&'static Member> {
    MEMBERS.iter().find(|m| m.name == name)
}
