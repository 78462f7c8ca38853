//! The tables a data worker reads: plain data, compiled once when a resource arrives.
//!
//! A worker takes an `Arc` of a cell when it accepts a connection and reads the current value of
//! the cell with one atomic load per request; a change builds a new value off to the side and
//! swaps it in. Nothing here takes a lock on a request's way.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use http::{HeaderName, HeaderValue};
use regex::bytes::Regex;
use weft_api::identity::SpiffeId;
pub use weft_api::proto::{AccessLog, Algorithm, Health, MtlsMode, Protocol};

use crate::balance::{EndpointHealth, SharedLimits};
use crate::discovery::provenance::Provenance;
use crate::dns::Feed;
use crate::http::route::Index;
use crate::http::session::ShareSession;
use crate::http2;
use crate::identity::Origin;
use crate::inbound::limits::PortLimits;
use crate::transport::{KeepAlive, Siblings};

/// A new process-wide number, never used twice.
pub fn fresh_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// What connections to one original destination are.
#[derive(Debug)]
pub struct Destination {
    /// Unique to this compiled value; worker-local state hangs on it.
    pub id: u64,
    pub namespace: Arc<str>,
    /// Service, or workload when it is addressed directly.
    pub service: Arc<str>,
    pub port: u16,
    pub protocol: Protocol,
    pub routes: Vec<Arc<Route>>,
    /// Which route a request takes; `None`: the first one, whatever the request.
    pub index: Option<Box<Index>>,
    /// For connections that are not HTTP; empty: they take the first of `routes`.
    pub opaque: Vec<OpaqueRoute>,
    /// Endpoints that this proxy finds out itself are among its backends'.
    pub fed: bool,
    /// Nothing may be sent there: its only route says why.
    pub prohibited: bool,
    /// Which policies its fields come from, for people; `None`: no policy says anything.
    pub provenance: Option<Box<Provenance>>,
}

impl Destination {
    /// A destination with one route for everything.
    pub fn simple(
        namespace: Arc<str>,
        service: Arc<str>,
        port: u16,
        protocol: Protocol,
        route: Route,
    ) -> Self {
        Self {
            id: fresh_id(),
            namespace,
            service,
            port,
            protocol,
            routes: vec![Arc::new(route)],
            index: None,
            opaque: Vec::new(),
            fed: false,
            prohibited: false,
            provenance: None,
        }
    }

    /// Whether the SNI decides which route a connection takes.
    pub fn needs_server_name(&self) -> bool {
        self.opaque
            .iter()
            .any(|opaque| !opaque.server_names.is_empty())
    }

    /// Every route, of HTTP and of other connections.
    pub fn all_routes(&self) -> impl Iterator<Item = &Arc<Route>> {
        self.routes
            .iter()
            .chain(self.opaque.iter().map(|opaque| &opaque.route))
    }
}

/// A route of connections that are not HTTP.
#[derive(Debug)]
pub struct OpaqueRoute {
    /// Server names (SNI), lower-case; "*.example.org" is any name below it. None: every
    /// connection.
    pub server_names: Vec<Box<str>>,
    pub route: Arc<Route>,
}

impl OpaqueRoute {
    /// Whether a connection takes this route; `name` is its SNI, if it has one.
    pub fn takes(&self, name: Option<&str>) -> bool {
        if self.server_names.is_empty() {
            return true;
        }
        let Some(name) = name else { return false };
        let name = name.to_ascii_lowercase();
        self.server_names
            .iter()
            .any(|known| match known.strip_prefix('*') {
                Some(suffix) => name.len() > suffix.len() && name.ends_with(suffix),
                None => **known == name,
            })
    }
}

#[derive(Debug)]
pub struct Route {
    pub id: u64,
    /// `<kind>/<namespace>/<name>[/<rule>]`, for people.
    pub name: Arc<str>,
    /// Any of them; none means every request.
    pub matches: Vec<RouteMatch>,
    pub backends: Vec<Share>,
    /// Sum of the weights.
    pub total_weight: u32,
    pub policy: RoutePolicy,
    /// Why its requests are answered 500.
    pub refused: Option<Box<str>>,
    pub redirect: Option<Box<Redirect>>,
    pub cors: Option<Box<Cors>>,
    /// Clients of some of its backends stay with their endpoints.
    pub sessions: bool,
}

impl Route {
    /// A route that takes everything to one backend.
    pub fn simple(name: &str, backend: Arc<Backend>, policy: RoutePolicy) -> Self {
        Self {
            id: fresh_id(),
            name: name.into(),
            matches: Vec::new(),
            backends: vec![Share {
                weight: 1,
                backend: Ok(backend),
                plan: None,
                session: None,
            }],
            total_weight: 1,
            policy,
            refused: None,
            redirect: None,
            cors: None,
            sessions: false,
        }
    }

    /// A route that answers everything with an error.
    pub fn refusing(name: &str, why: &str) -> Self {
        Self {
            id: fresh_id(),
            name: name.into(),
            matches: Vec::new(),
            backends: Vec::new(),
            total_weight: 0,
            policy: RoutePolicy::default(),
            refused: Some(why.into()),
            redirect: None,
            cors: None,
            sessions: false,
        }
    }

    /// Every backend that its requests may reach: by weight, as a fallback or as a mirror.
    pub fn all_backends(&self) -> impl Iterator<Item = &Arc<Backend>> {
        let fallback = match self.policy.fallback.as_deref() {
            Some(Fallback::Backend(backend)) => Some(backend),
            _ => None,
        };
        let plans = self.backends.iter().filter_map(|share| share.plan.as_ref());
        let mirrors = plans.flat_map(|plan| plan.mirrors.iter().map(|mirror| &mirror.backend));
        self.backends
            .iter()
            .filter_map(|share| share.backend.as_ref().ok())
            .chain(fallback)
            .chain(mirrors)
    }
}

/// A backend's share of a route's requests.
#[derive(Debug, Clone)]
pub struct Share {
    /// 0 takes no share.
    pub weight: u32,
    /// Or why its share is answered 500.
    pub backend: Result<Arc<Backend>, Box<str>>,
    /// What is changed on the way there and back; `None`: nothing.
    pub plan: Option<Arc<Plan>>,
    /// Clients stay with the endpoint they have.
    pub session: Option<ShareSession>,
}

#[derive(Debug, Clone, Default)]
pub struct RouteMatch {
    pub method: Option<Box<str>>,
    pub path: Option<PathMatch>,
    /// Lower-case name and exact value.
    pub headers: Vec<(Box<str>, Box<str>)>,
    /// Lower-case name; the pattern is of the whole value.
    pub header_patterns: Vec<(Box<str>, Regex)>,
    /// Of decoded values.
    pub query: Vec<(Box<str>, ValueMatch)>,
    /// Among the matches that hold the lowest wins.
    pub order: u32,
    /// Only gRPC calls, or everything but them.
    pub grpc: Option<bool>,
}

#[derive(Debug, Clone)]
pub enum ValueMatch {
    Exact(Box<str>),
    Regex(Regex),
}

#[derive(Debug, Clone)]
pub enum PathMatch {
    Exact(Box<str>),
    /// By whole path elements; without a trailing slash, except for "/" itself.
    Prefix(Box<str>),
    /// Of the whole path.
    Regex(Regex),
}

/// What is changed in a request and its response: the filters of a route and of one of its
/// backends, put together once.
#[derive(Debug, Default)]
pub struct Plan {
    pub request: Vec<FieldEdit>,
    pub response: Vec<FieldEdit>,
    /// In place of the host that was asked for.
    pub host: Option<Box<str>>,
    pub path: Option<PathEdit>,
    pub mirrors: Vec<Mirror>,
    /// Of the backend alone: its share is answered so. The route's are [`Route::redirect`] and
    /// [`Route::cors`].
    pub redirect: Option<Box<Redirect>>,
    /// In place of the route's.
    pub cors: Option<Box<Cors>>,
}

/// What becomes of the fields of one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldEdit {
    pub name: HeaderName,
    /// As the policy writes it.
    pub spelling: Box<str>,
    /// Those that came stay.
    pub keep: bool,
    /// Those that are added; when nothing is kept, the first takes the place of what came.
    pub values: Vec<HeaderValue>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathEdit {
    Full(Box<str>),
    /// In place of the prefix that was matched; without a trailing slash.
    Prefix(Box<str>),
}

/// Answers instead of sending the request.
#[derive(Debug, Clone)]
pub struct Redirect {
    pub scheme: Option<Box<str>>,
    pub hostname: Option<Box<str>>,
    pub path: Option<PathEdit>,
    pub port: Option<u16>,
    pub status: u16,
}

/// Where copies of requests go.
#[derive(Debug)]
pub struct Mirror {
    pub backend: Arc<Backend>,
    /// 0 to 1.
    pub share: f64,
}

/// Cross-origin requests (Fetch standard, "CORS protocol").
#[derive(Debug, Clone, Default)]
pub struct Cors {
    pub origins: Vec<Box<str>>,
    pub credentials: bool,
    pub methods: Vec<Box<str>>,
    pub headers: Vec<Box<str>>,
    pub expose: Vec<Box<str>>,
    /// Seconds.
    pub max_age: u32,
}

/// Where requests are sent.
#[derive(Debug)]
pub struct Backend {
    /// Unique to this compiled value; worker-local balancers hang on it.
    pub id: u64,
    pub namespace: Arc<str>,
    pub service: Arc<str>,
    pub port: u16,
    pub endpoints: Arc<EndpointsCell>,
    pub policy: BackendPolicy,
    /// Counters of the concurrency limits, shared by the workers; kept across recompilations of
    /// the same backend.
    pub limits: Arc<SharedLimits>,
}

#[derive(Debug, Clone, Default)]
pub struct RoutePolicy {
    /// From the request's head to the end of the response.
    pub request_timeout: Option<Duration>,
    /// Each try, to the head of its response.
    pub per_try_timeout: Option<Duration>,
    /// No byte either way: of connections that are not HTTP, and of requests with what they upgrade
    /// to.
    pub idle_timeout: Option<Duration>,
    pub stream_idle_timeout: Option<Duration>,
    /// `None`: only what was never processed is tried again.
    pub retry: Option<Arc<RetryPolicy>>,
    pub fallback: Option<Arc<Fallback>>,
    pub fault: Option<Box<FaultInjection>>,
    /// When another endpoint is asked too; only with `retry`.
    pub hedge_after: Option<Duration>,
}

/// Faults that are made on purpose; the ways of it are in `http::fault`.
#[derive(Debug, Clone, PartialEq)]
pub struct FaultInjection {
    /// Lower-case name and exact value; all of them.
    pub headers: Vec<(Box<str>, Box<str>)>,
    pub delay: Option<FaultDelay>,
    pub abort: Option<FaultAbort>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FaultDelay {
    /// 0 to 1.
    pub share: f64,
    pub duration: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FaultAbort {
    /// 0 to 1.
    pub share: f64,
    /// HTTP status; `None`: only gRPC calls are aborted.
    pub status: Option<u16>,
    /// gRPC status code of calls.
    pub grpc_status: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Tries after the first.
    pub attempts: u32,
    pub status_codes: Vec<u16>,
    pub grpc_codes: Vec<u32>,
    pub connect_failure: bool,
    pub refused_stream: bool,
    pub reset: bool,
    pub timeout: bool,
    /// Empty: the idempotent methods of RFC 9110 section 9.2.2.
    pub methods: Vec<Box<str>>,
    pub backoff_base: Duration,
    pub backoff_max: Duration,
    /// Bytes of a request's body kept for another try.
    pub max_body: usize,
    pub budget_percent: u32,
    pub budget_min_per_second: u32,
}

#[derive(Debug)]
pub enum Fallback {
    Response {
        status: u16,
        headers: Vec<(Box<str>, Box<str>)>,
        body: bytes::Bytes,
    },
    Backend(Arc<Backend>),
}

#[derive(Debug, Clone, PartialEq)]
pub struct BackendPolicy {
    pub algorithm: Algorithm,
    pub hash_key: Option<HashKey>,
    /// Percent 0-100: with fewer well endpoints than this, all are used.
    pub panic_threshold: u32,
    /// Until a new endpoint has its full weight.
    pub slow_start: Option<Duration>,
    /// Percent 0-100 of an equal part that the proxy's own zone must be able to take, for requests
    /// to stay there.
    pub zone_threshold: Option<u32>,
    /// 0 is no limit.
    pub max_connections: u32,
    pub max_requests: u32,
    pub max_pending_requests: u32,
    pub outlier: Option<OutlierDetection>,
    pub connect_timeout: Duration,
    /// In place of the budgets of the routes that lead here.
    pub retry_constraint: Option<RetryConstraint>,
    /// TLS with endpoints outside the mesh; `None`: what the endpoint's identity says.
    pub origin: Option<Arc<Origin>>,
    pub health_check: Option<Arc<HealthCheck>>,
    pub connection: ConnectionPolicy,
}

/// How connections to endpoints are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionPolicy {
    /// Requests that one carries; 0 is no limit.
    pub max_requests: u32,
    /// Without a request; `None`: what is usual for who is at the other end.
    pub idle_timeout: Option<Duration>,
    /// `None`: no probes.
    pub keepalive: Option<KeepAlive>,
    /// What the endpoint may send before it has been passed on (HTTP/2), bytes.
    pub stream_window: u32,
    pub connection_window: u32,
}

impl ConnectionPolicy {
    /// Whether a connection that has carried so many requests carries no more.
    pub fn is_worn(&self, requests: u32) -> bool {
        self.max_requests != 0 && requests >= self.max_requests
    }
}

impl Default for ConnectionPolicy {
    fn default() -> Self {
        Self {
            max_requests: 0,
            idle_timeout: None,
            keepalive: Some(KeepAlive::default()),
            stream_window: http2::STREAM_WINDOW,
            connection_window: http2::CONNECTION_WINDOW,
        }
    }
}

/// How endpoints are asked whether they are well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    pub probe: HealthProbe,
    pub interval: Duration,
    pub timeout: Duration,
    /// Checks in a row.
    pub unhealthy_threshold: u32,
    pub healthy_threshold: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HealthProbe {
    Http {
        /// With its query.
        path: Box<str>,
        /// `None`: the endpoint's address.
        host: Option<Box<str>>,
        /// Empty: 200 to 299.
        statuses: Box<[u16]>,
    },
    Grpc {
        service: Box<str>,
    },
    Tcp,
}

/// Retries that a backend gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryConstraint {
    /// Percent 0-100 of the requests of the last interval.
    pub percent: u32,
    pub interval: Duration,
    /// And this many in each interval.
    pub floor: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashKey {
    /// Lower-case name.
    Header(Box<str>),
    Cookie(Box<str>),
    SourceAddress,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutlierDetection {
    /// 0 is off, here and below.
    pub consecutive_gateway_errors: u32,
    pub consecutive_5xx: u32,
    /// Percent 0-100.
    pub success_rate_threshold: u32,
    pub success_rate_min_requests: u32,
    pub interval: Duration,
    pub base_ejection: Duration,
    pub max_ejection: Duration,
    /// Percent 0-100.
    pub max_ejection_percent: u32,
}

/// The endpoints of one backend, as last told.
#[derive(Debug, Default)]
pub struct EndpointSet {
    /// Grows with every change; worker-local state compares it.
    pub generation: u64,
    pub endpoints: Vec<Arc<EndpointInfo>>,
    /// They are those on the proxy's own node, and nobody else is to be asked.
    pub node_local: bool,
    /// By whom each endpoint is preferred, in the same order; empty where nobody is.
    pub hints: Arc<[Hints]>,
    /// Which of them this proxy prefers, in order; empty: all alike.
    pub near: Box<[u32]>,
}

/// Zones and nodes whose proxies prefer an endpoint.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Hints {
    pub zones: Box<[Arc<str>]>,
    pub nodes: Box<[Arc<str>]>,
}

impl Hints {
    pub fn is_empty(&self) -> bool {
        self.zones.is_empty() && self.nodes.is_empty()
    }
}

impl EndpointSet {
    /// The same for the proxy of a workload, which prefers those that are meant for its node, else
    /// those for its zone, if there are any.
    pub fn seen_from(mut self, workload: &Workload) -> Self {
        self.near = self.near_to(workload);
        self
    }

    /// The next set, when the workload's place makes another one of it.
    pub fn moved_to(&self, workload: &Workload) -> Option<Self> {
        let near = self.near_to(workload);
        (near != self.near).then(|| Self {
            generation: self.generation + 1,
            endpoints: self.endpoints.clone(),
            node_local: self.node_local,
            hints: self.hints.clone(),
            near,
        })
    }

    fn near_to(&self, workload: &Workload) -> Box<[u32]> {
        let meant_for = |place: &Arc<str>, of: fn(&Hints) -> &[Arc<str>]| -> Box<[u32]> {
            if place.is_empty() {
                return Box::default();
            }
            (0u32..)
                .zip(self.endpoints.iter().zip(&*self.hints))
                .filter(|(_, (info, hints))| {
                    info.state == Health::Ready && of(hints).contains(place)
                })
                .map(|(index, _)| index)
                .collect()
        };
        let near = meant_for(&workload.node, |hints| &hints.nodes);
        match near.is_empty() {
            true => meant_for(&workload.zone, |hints| &hints.zones),
            false => near,
        }
    }
}

#[derive(Debug)]
pub struct EndpointInfo {
    pub address: SocketAddr,
    /// The SPIFFE id that the peer must show; `None`: plaintext.
    pub identity: Option<Arc<SpiffeId>>,
    /// `<namespace>/<name>`.
    pub workload: Arc<str>,
    pub zone: Arc<str>,
    pub weight: u32,
    /// As the control plane sees it.
    pub state: Health,
    /// Outlier state, shared by the workers and kept across updates of the same address.
    pub health: Arc<EndpointHealth>,
    /// The addresses of the same name, when they are of both families.
    pub siblings: Option<Arc<Siblings>>,
}

/// Endpoints that change under those who hold the cell.
#[derive(Debug, Default)]
pub struct EndpointsCell {
    pub name: Arc<str>,
    pub current: ArcSwap<EndpointSet>,
    /// Where they come from, when this proxy finds them out itself.
    pub feed: Option<Arc<Feed>>,
}

/// Name of the endpoints that are the address the application connected to.
pub const ORIGINAL: &str = "original";

/// What is known of an original destination.
#[derive(Debug, Clone)]
pub enum Known {
    /// Asked for, not answered yet.
    Pending,
    /// Not part of the mesh: pass through to the original address.
    Absent,
    Present(Arc<Destination>),
}

/// The proxy's own workload.
#[derive(Debug, Default)]
pub struct Workload {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub display_name: Arc<str>,
    pub service_account: Arc<str>,
    pub zone: Arc<str>,
    /// Name of the node it runs on; empty when not known.
    pub node: Arc<str>,
    pub mtls: MtlsMode,
    pub ports: Vec<WorkloadPort>,
    /// 1/10000 of the requests that carry no decision.
    pub sampling_per_myriad: u32,
    pub access_log: AccessLog,
    pub otlp_endpoint: Option<String>,
    /// What may be asked in plaintext even where mutual TLS is required.
    pub probes: Vec<Probe>,
    /// The application has ended for good: the proxy is to end too.
    pub application_ended: bool,
}

/// A health check from outside the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    pub port: u16,
    pub check: Check,
}

/// How a probe asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// GET of exactly this path and query.
    Http(Box<str>),
    /// A connection on which the client says nothing.
    Tcp,
    /// `grpc.health.v1.Health/Check`.
    Grpc,
}

#[derive(Debug, Clone)]
pub struct WorkloadPort {
    pub port: u16,
    pub protocol: Protocol,
    pub mtls: Option<MtlsMode>,
    /// What it takes no more of; `None`: there is no limit.
    pub limits: Option<Arc<PortLimits>>,
    /// Of the proxy's connections to the application.
    pub connection: ConnectionPolicy,
}

impl Workload {
    /// Mode and declared protocol of one of the workload's ports.
    pub fn port(&self, port: u16) -> (MtlsMode, Protocol) {
        match self.ports.iter().find(|p| p.port == port) {
            Some(p) => (p.mtls.unwrap_or(self.mtls), p.protocol),
            None => (self.mtls, Protocol::Auto),
        }
    }

    /// How the proxy's connections to one of the workload's ports are kept.
    pub fn connection(&self, port: u16) -> ConnectionPolicy {
        let declared = self.ports.iter().find(|p| p.port == port);
        declared.map_or_else(ConnectionPolicy::default, |declared| declared.connection)
    }

    /// What one of the workload's ports takes no more of.
    pub fn limits(&self, port: u16) -> Option<Arc<PortLimits>> {
        self.ports.iter().find(|p| p.port == port)?.limits.clone()
    }
}

impl Default for BackendPolicy {
    fn default() -> Self {
        Self {
            algorithm: Algorithm::PeakEwma,
            hash_key: None,
            panic_threshold: 50,
            slow_start: None,
            zone_threshold: None,
            max_connections: 0,
            max_requests: 0,
            max_pending_requests: 0,
            outlier: None,
            connect_timeout: Duration::from_secs(5),
            retry_constraint: None,
            origin: None,
            health_check: None,
            connection: ConnectionPolicy::default(),
        }
    }
}
