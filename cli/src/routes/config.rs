//! What a proxy says at /config that it knows: the part that is used here.

use serde::{Deserialize, Serialize};

#[derive(Debug, Deserialize)]
pub struct Config {
    pub workload: Workload,
    /// None while it has no certificate.
    #[serde(default)]
    pub identity: Option<Identity>,
    pub destinations: Vec<Destination>,
    #[serde(default)]
    pub outside: Outside,
}

#[derive(Debug, Deserialize)]
pub struct Identity {
    /// SPIFFE id.
    pub id: String,
}

/// What is known by name, outside the mesh.
#[derive(Debug, Default, Deserialize)]
pub struct Outside {
    /// What is not known is refused.
    pub registry_only: bool,
    pub hosts: Vec<Host>,
}

#[derive(Debug, Deserialize)]
pub struct Host {
    pub host: String,
    pub destination: Destination,
}

#[derive(Debug, Deserialize)]
pub struct Workload {
    pub namespace: String,
    pub name: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Destination {
    pub address: String,
    pub namespace: String,
    pub service: String,
    pub port: u16,
    pub protocol: String,
    pub routes: Vec<Route>,
    /// For connections that are not HTTP; empty: they take the first of `routes`.
    #[serde(default)]
    pub opaque: Vec<Opaque>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Opaque {
    /// SNI; none: every connection.
    pub server_names: Vec<String>,
    pub route: Route,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Route {
    pub name: String,
    pub matches: Vec<Match>,
    pub backends: Vec<Backend>,
    pub request_timeout_ms: Option<u64>,
    pub per_try_timeout_ms: Option<u64>,
    pub idle_timeout_ms: Option<u64>,
    /// Of requests; the other one is of connections that are not HTTP.
    #[serde(default)]
    pub stream_idle_timeout_ms: Option<u64>,
    pub retry: Option<Retry>,
    pub fallback: Option<serde_json::Value>,
    #[serde(default)]
    pub fault: Option<Fault>,
    /// When another endpoint is asked too.
    #[serde(default)]
    pub hedge_after_ms: Option<u64>,
    /// Why its requests are answered 500.
    #[serde(default)]
    pub refused: Option<String>,
    #[serde(default)]
    pub redirect: Option<serde_json::Value>,
    #[serde(default)]
    pub refused_backends: Vec<RefusedBackend>,
    #[serde(default)]
    pub sources: Vec<Source>,
}

/// Where a field of a policy comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// As it is written: "timeouts.request".
    pub field: String,
    pub from: Policy,
    /// Those that set it too, and that `from` goes before.
    pub overridden: Vec<Policy>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// "TrafficPolicy shop/cart".
    pub name: String,
    /// What it is for: "Service cart, port http".
    pub target: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RefusedBackend {
    pub weight: u32,
    pub why: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Match {
    pub method: Option<String>,
    pub path: Option<Path>,
    pub headers: Vec<Header>,
    #[serde(default)]
    pub header_patterns: Vec<Pattern>,
    #[serde(default)]
    pub query: Vec<Parameter>,
    /// Which match comes first of those that hold; none: the order of the routes.
    #[serde(default)]
    pub order: Option<u32>,
    /// Only gRPC, or only what is none.
    #[serde(default)]
    pub grpc: Option<bool>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Pattern {
    pub name: String,
    pub regex: String,
}

/// A condition on a query's parameter.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Parameter {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exact: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub regex: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Path {
    Exact(String),
    Prefix(String),
    Regex(String),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Header {
    pub name: String,
    pub value: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Retry {
    pub attempts: u32,
    pub status_codes: Vec<u16>,
    pub grpc_codes: Vec<u32>,
    pub connect_failure: bool,
    pub refused_stream: bool,
    pub reset: bool,
    pub timeout: bool,
    pub methods: Vec<String>,
    pub budget_percent: u32,
    pub budget_min_per_second: u32,
}

/// Faults that are injected on purpose.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fault {
    pub headers: Vec<Header>,
    pub delay: Option<Delay>,
    pub abort: Option<Abort>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Delay {
    pub percent: f64,
    pub duration_ms: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Abort {
    pub percent: f64,
    pub status: Option<u16>,
    pub grpc_status: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Backend {
    pub weight: u32,
    pub namespace: String,
    pub service: String,
    pub port: u16,
    pub algorithm: String,
    /// Until a new endpoint has its full weight.
    #[serde(default)]
    pub slow_start_ms: Option<u64>,
    /// Requests stay in the proxy's own zone while it can take so much of its part.
    #[serde(default)]
    pub zone_threshold_percent: Option<u32>,
    pub connect_timeout_ms: u64,
    pub limits: Limits,
    pub outlier_detection: Option<Outlier>,
    /// How clients stay with their endpoints; none: they do not.
    #[serde(default)]
    pub session: Option<Session>,
    /// In place of the route's retry budget.
    #[serde(default)]
    pub retry_constraint: Option<RetryConstraint>,
    #[serde(default)]
    pub health_check: Option<HealthCheck>,
    /// How its connections are kept; none: as usual.
    #[serde(default)]
    pub connection: Option<Connection>,
    /// Only endpoints on the proxy's own node are used.
    #[serde(default)]
    pub node_local: bool,
    #[serde(default)]
    pub sources: Vec<Source>,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Connection {
    /// Requests that one carries; 0 is no limit.
    pub max_requests: u32,
    pub idle_timeout_ms: Option<u64>,
    /// None: no probes.
    pub keepalive: Option<KeepAlive>,
    /// HTTP/2, bytes.
    pub stream_window: u32,
    pub connection_window: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeepAlive {
    pub time_ms: u64,
    pub interval_ms: u64,
    pub probes: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HealthCheck {
    /// What is asked, in words.
    pub probe: String,
    pub interval_ms: u64,
    pub timeout_ms: u64,
    pub unhealthy_threshold: u32,
    pub healthy_threshold: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RetryConstraint {
    pub percent: u32,
    pub interval_ms: u64,
    pub floor: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Session {
    pub name: String,
    /// "cookie" or "header".
    #[serde(rename = "in")]
    pub place: String,
    pub absolute_timeout_ms: Option<u64>,
    pub idle_timeout_ms: Option<u64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Limits {
    pub max_connections: u32,
    pub max_requests: u32,
    pub max_pending_requests: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outlier {
    pub consecutive_gateway_errors: u32,
    pub consecutive_5xx: u32,
    pub base_ejection_ms: u64,
    pub max_ejection_percent: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Endpoint {
    pub address: String,
    pub workload: String,
    pub identity: Option<String>,
    pub weight: u32,
    pub state: String,
    /// Preferred because it is meant for the proxy's own node or zone.
    #[serde(default)]
    pub near: bool,
}
