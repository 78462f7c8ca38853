//! Services, workloads, endpoints and policies as the mesh sees them: plain data, the same whether
//! it came from a folder or from Kubernetes.
//!
//! [`Object`] is what a source reports; [`World`] is all of them, with the indexes the compiler
//! needs; [`World::apply`] takes one change and says what it may have changed for proxies.

mod backend_traffic;
mod index;
mod route;
mod session;
mod slice;
mod validate;
mod world;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use weft_api::policy::{
    EgressPolicySpec, ExternalServiceSpec, PeerAuthenticationSpec, TelemetrySpec, TrafficPolicySpec,
};
use weft_api::proto::{Health, Protocol};

pub use backend_traffic::{BackendTraffic, RetryConstraint};
pub use route::{
    BackendRef, Cors, Filter, HeaderEdits, Mirror, ParentRef, PathEdit, PathMatch, Redirect,
    Refused, RefusedReason, Rewrite, Route, RouteKind, RouteMatch, RouteRetry, Rule, TextMatch,
    ValueMatch,
};
pub use session::SessionPersistence;
pub use slice::{EndpointSlice, Hints, SliceEndpoint, SlicePort, WorkloadRef};
pub use validate::{Invalid, validate};
pub(crate) use world::in_namespace;
pub use world::{Dirty, World};

/// Namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    pub namespace: String,
    pub name: String,
}

impl Name {
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }

    /// Reads "namespace/name".
    pub fn parse(given: &str) -> Option<Self> {
        let (namespace, name) = given.split_once('/')?;
        (!namespace.is_empty() && !name.is_empty() && !name.contains('/'))
            .then(|| Self::new(namespace, name))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Service,
    EndpointSlice,
    Workload,
    Node,
    TrafficPolicy,
    PeerAuthentication,
    Telemetry,
    ExternalService,
    EgressPolicy,
    HTTPRoute,
    GRPCRoute,
    TLSRoute,
    TCPRoute,
    XBackendTrafficPolicy,
}

/// Which object: unique among all that a source reports.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectRef {
    pub kind: Kind,
    pub name: Name,
}

impl ObjectRef {
    /// Reads "trafficpolicy/cart" (kinds in any case, in the plural, or short as in kubectl) in a
    /// namespace.
    pub fn parse(given: &str, namespace: &str) -> Option<Self> {
        let (kind, name) = given.split_once('/')?;
        let kind = match &*kind.to_ascii_lowercase() {
            "service" | "services" | "svc" => Kind::Service,
            "endpointslice" | "endpointslices" => Kind::EndpointSlice,
            "workload" | "workloads" | "pod" | "pods" | "po" => Kind::Workload,
            "trafficpolicy" | "trafficpolicies" => Kind::TrafficPolicy,
            "peerauthentication" | "peerauthentications" => Kind::PeerAuthentication,
            "telemetry" | "telemetries" => Kind::Telemetry,
            "egresspolicy" | "egresspolicies" => Kind::EgressPolicy,
            "externalservice" | "externalservices" => Kind::ExternalService,
            "httproute" | "httproutes" => Kind::HTTPRoute,
            "grpcroute" | "grpcroutes" => Kind::GRPCRoute,
            "tlsroute" | "tlsroutes" => Kind::TLSRoute,
            "tcproute" | "tcproutes" => Kind::TCPRoute,
            "xbackendtrafficpolicy" | "xbackendtrafficpolicies" | "xbtrafficpolicy" => {
                Kind::XBackendTrafficPolicy
            }
            _ => return None,
        };
        (!name.is_empty() && !name.contains('/')).then(|| Self {
            kind,
            name: Name::new(namespace, name),
        })
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.kind, self.name)
    }
}

/// Anything a source can report.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    Service(Service),
    EndpointSlice(EndpointSlice),
    Workload(Workload),
    Node(Node),
    TrafficPolicy(Box<Policy<TrafficPolicySpec>>),
    PeerAuthentication(Policy<PeerAuthenticationSpec>),
    Telemetry(Policy<TelemetrySpec>),
    ExternalService(Box<Policy<ExternalServiceSpec>>),
    EgressPolicy(Policy<EgressPolicySpec>),
    Route(Box<Route>),
    BackendTraffic(Box<BackendTraffic>),
}

impl Object {
    pub fn reference(&self) -> ObjectRef {
        let (kind, name) = match self {
            Self::Service(service) => (Kind::Service, &service.name),
            Self::EndpointSlice(slice) => (Kind::EndpointSlice, &slice.name),
            Self::Workload(workload) => (Kind::Workload, &workload.name),
            Self::Node(node) => (Kind::Node, &node.name),
            Self::TrafficPolicy(policy) => (Kind::TrafficPolicy, &policy.name),
            Self::PeerAuthentication(policy) => (Kind::PeerAuthentication, &policy.name),
            Self::Telemetry(policy) => (Kind::Telemetry, &policy.name),
            Self::EgressPolicy(policy) => (Kind::EgressPolicy, &policy.name),
            Self::ExternalService(service) => (Kind::ExternalService, &service.name),
            Self::Route(route) => (route.kind.kind(), &route.name),
            Self::BackendTraffic(policy) => (Kind::XBackendTrafficPolicy, &policy.name),
        };
        ObjectRef {
            kind,
            name: name.clone(),
        }
    }
}

/// One change to the world.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// The object is there, or is now this.
    Set(Box<Object>),
    Remove(ObjectRef),
    /// The object as it was set last has this `metadata.generation`. Nothing compiled depends on
    /// it; it answers "has my change arrived?".
    Generation {
        object: ObjectRef,
        generation: i64,
    },
    /// The object is there, but cannot be read now; what it said before stands. That it is so is
    /// forgotten when it is set or removed.
    Unreadable {
        object: ObjectRef,
        unreadable: Box<Unreadable>,
    },
}

/// An object that says what cannot be honoured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unreadable {
    /// `metadata.generation` of what cannot be read.
    pub generation: i64,
    /// RFC 3339; empty when not known.
    pub created: String,
    /// What is wrong: sentences without a full stop, separated by semicolons.
    pub why: String,
    /// What it names in `spec.targetRefs` or `spec.parentRefs`, as far as that can be read.
    pub targets: Vec<ParentRef>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    pub name: Name,
    /// Labels of the workloads behind it; empty: none are chosen, EndpointSlices name them.
    pub selector: BTreeMap<String, String>,
    /// Virtual addresses: cluster IPs, external IPs, a load balancer's; none when headless.
    pub vips: Vec<IpAddr>,
    /// Those of `vips` that are for clients outside the cluster: external IPs, a load balancer's.
    pub outer_vips: Vec<IpAddr>,
    pub headless: bool,
    /// Endpoints that are not ready count as ready.
    pub publish_not_ready: bool,
    /// Its endpoints are those of its EndpointSlices and nothing else, as in Kubernetes; else the
    /// workloads that the selector chooses count while there is no slice.
    pub sliced: bool,
    /// Without a policy that says otherwise, a client always gets the same endpoint.
    pub client_affinity: bool,
    /// Who calls it at a cluster address gets endpoints on the own node only
    /// (`internalTrafficPolicy: Local`).
    pub node_local: bool,
    /// Whom its workloads are nearest to is preferred, where no EndpointSlice says by hints who is
    /// to use which endpoint.
    pub distribution: Option<Distribution>,
    /// It is an ExternalService, as policies see it.
    pub external: bool,
    /// TCP ports.
    pub ports: Vec<ServicePort>,
}

impl Default for Name {
    fn default() -> Self {
        Self::new("default", "")
    }
}

/// Which endpoints are preferred (`trafficDistribution`, KEP-4444 and KEP-3015).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distribution {
    SameZone,
    /// Then those of the zone.
    SameNode,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// May be empty when it is the only port.
    pub name: String,
    pub port: u16,
    pub target: TargetPort,
    pub protocol: Protocol,
    /// The port of every node that leads here too.
    pub node_port: Option<u16>,
}

/// Where a Service port leads on a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    Number(u16),
    /// A port name of the workload.
    Name(String),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    pub name: Name,
    pub labels: BTreeMap<String, String>,
    pub service_account: String,
    pub zone: String,
    /// At least one; the first is used in endpoints.
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<WorkloadPort>,
    pub weight: u32,
    pub health: Health,
    /// A proxy that takes mutual TLS stands before it.
    pub sidecar: bool,
    /// Tells it from another of the same name; empty when not known.
    pub uid: String,
    /// Name of the node it runs on; empty when not known.
    pub node: String,
    /// Its addresses are its node's, which it shares with others: it is not reached by address.
    pub host_network: bool,
    /// How its health is asked for from outside the mesh.
    pub probes: Vec<Probe>,
    /// Its application has ended for good, and its proxy is to end too.
    pub ended: bool,
}

/// A health check that comes from outside the mesh, in plaintext.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Probe {
    /// The workload's own port.
    pub port: u16,
    pub check: Check,
}

/// How a probe asks.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Check {
    /// GET of exactly this path and query.
    Http { path: String },
    /// Connects and says nothing.
    Tcp,
    /// `grpc.health.v1.Health/Check`.
    Grpc,
    /// Inside TLS, where it cannot be told from anything else: not let in.
    Https,
}

/// A machine of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Without a namespace.
    pub name: Name,
    pub zone: String,
    pub addresses: Vec<IpAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadPort {
    pub name: String,
    pub port: u16,
    pub protocol: Protocol,
}

/// A policy object.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy<T> {
    pub name: Name,
    /// RFC 3339; empty when not known.
    pub created: String,
    pub spec: T,
}

impl<T> Policy<T> {
    /// Orders policies for the same target: the one to use first (GEP-713: the oldest, then by
    /// name; those without a time last).
    pub fn precedence(&self) -> (bool, &str, &Name) {
        (self.created.is_empty(), &self.created, &self.name)
    }
}

/// What is spoken on a port, from `appProtocol` or else the port name's prefix; AUTO when neither
/// says.
pub fn protocol(app_protocol: Option<&str>, port_name: &str) -> Protocol {
    match app_protocol {
        Some(given) => known_protocol(given).unwrap_or(Protocol::Auto),
        None => port_name
            .split('-')
            .next()
            .and_then(known_protocol)
            .unwrap_or(Protocol::Auto),
    }
}

fn known_protocol(given: &str) -> Option<Protocol> {
    Some(match given.to_ascii_lowercase().as_str() {
        "http" | "http1" | "kubernetes.io/ws" => Protocol::Http,
        "http2" | "h2c" | "kubernetes.io/h2c" => Protocol::Http2,
        "grpc" => Protocol::Grpc,
        "tcp" => Protocol::Tcp,
        "tls" | "https" | "kubernetes.io/wss" => Protocol::Tls,
        _ => return None,
    })
}

/// Whether `appProtocol` is one we know.
pub fn is_known_protocol(given: &str) -> bool {
    known_protocol(given).is_some()
}
