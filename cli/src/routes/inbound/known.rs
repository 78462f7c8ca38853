//! What the control plane says of a destination at /explain: the part that is used here.

use serde::{Deserialize, Serialize};

use crate::routes::config::Source;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Explained {
    /// It is of the mesh; what follows is empty otherwise.
    pub known: bool,
    pub namespace: String,
    pub service: String,
    pub port: u16,
    /// "http", "tcp", …
    pub protocol: String,
    /// For callers with a proxy.
    routes: Vec<Route>,
    /// For those without: where they come to, whatever the routes say.
    endpoints: Option<Vec<Endpoint>>,
}

#[derive(Debug, Clone, Deserialize)]
struct Route {
    #[serde(default)]
    backends: Vec<Backend>,
}

#[derive(Debug, Clone, Deserialize)]
struct Backend {
    #[serde(default)]
    endpoints: Option<Vec<Endpoint>>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Endpoint {
    pub address: String,
    #[serde(default)]
    pub workload: String,
    /// "Ready", "Draining", "NotReady".
    #[serde(default)]
    pub health: String,
    /// None: it is no workload that the control plane knows.
    #[serde(default)]
    pub inbound: Option<Inbound>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Inbound {
    #[serde(flatten)]
    pub rules: Rules,
    /// Whether its proxy has them; none when it is not connected to the control plane that was asked.
    #[serde(default)]
    pub acknowledged: Option<bool>,
    /// Why its proxy refused them, if it did.
    #[serde(default)]
    pub refused: Option<String>,
}

/// What a proxy does with what comes to one port of its workload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rules {
    /// Whether there is a proxy; without one nobody keeps any of this.
    pub sidecar: bool,
    pub port: u16,
    pub protocol: String,
    /// "PERMISSIVE", "STRICT", "DISABLE".
    pub mtls: String,
    /// Of every Service that leads to the port; each holds whichever of them is called.
    pub services: Vec<OfService>,
    pub telemetry: Telemetry,
    pub probes: Vec<Probe>,
    /// Of `mtls` and `telemetry`.
    pub sources: Vec<Source>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OfService {
    /// "shop/cart:80".
    pub service: String,
    pub rate_limit: Option<RateLimit>,
    pub request_headers: Option<Heads>,
    pub connection: Option<Connection>,
    pub sources: Vec<Source>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RateLimit {
    pub requests: u32,
    pub per_ms: u64,
    pub burst: u32,
    /// The numbers are for so many replicas together; 0: for each.
    pub replicas: u32,
    /// None: all requests together.
    pub key: Option<Key>,
}

/// What is counted apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Key {
    ClientIdentity(bool),
    Header(String),
    SourceAddress(bool),
}

/// 0 is no limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Heads {
    pub max_bytes: usize,
    pub max_count: usize,
}

/// To the application; 0 is the default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Connection {
    pub max_requests: u32,
    pub stream_window: u32,
    pub connection_window: u32,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Telemetry {
    pub sampling_percent: f64,
    /// "None", "Errors", "All".
    pub access_log: String,
}

/// What is let in as plaintext under STRICT.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Probe {
    /// GET of exactly this path and query.
    Http(String),
    Tcp(bool),
    Grpc(bool),
}

impl Explained {
    fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        let backends = self.routes.iter().flat_map(|route| &route.backends);
        let endpoints = backends.flat_map(|backend| backend.endpoints.iter().flatten());
        endpoints.chain(self.direct())
    }

    fn endpoints_mut(&mut self) -> impl Iterator<Item = &mut Endpoint> {
        let backends = self.routes.iter_mut().flat_map(|route| &mut route.backends);
        let endpoints = backends.flat_map(|backend| backend.endpoints.iter_mut().flatten());
        endpoints.chain(self.endpoints.iter_mut().flatten())
    }

    /// Where callers without a proxy come to.
    pub fn direct(&self) -> impl Iterator<Item = &Endpoint> {
        self.endpoints.iter().flatten()
    }

    /// What is said of the endpoint at an address.
    pub fn endpoint(&self, address: &str) -> Option<&Endpoint> {
        self.endpoints()
            .find(|endpoint| endpoint.address == address)
    }

    /// Whether it says of every proxy what that has acknowledged.
    pub fn is_complete(&self) -> bool {
        let mut inbound = self.endpoints().filter_map(|one| one.inbound.as_ref());
        inbound.all(|inbound| !inbound.rules.sidecar || inbound.acknowledged.is_some())
    }

    /// Takes over what another replica knows of the proxies that are connected there.
    pub fn complete(&mut self, other: &Self) {
        for endpoint in self.endpoints_mut() {
            let theirs = other.endpoint(&endpoint.address);
            let theirs = theirs.and_then(|endpoint| endpoint.inbound.as_ref());
            if let (Some(own), Some(theirs)) = (&mut endpoint.inbound, theirs)
                && own.acknowledged.is_none()
            {
                own.acknowledged = theirs.acknowledged;
                own.refused.clone_from(&theirs.refused);
            }
        }
    }
}
