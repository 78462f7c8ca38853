//! How requests to a Service are balanced, limited, retried and timed out.

use serde::{Deserialize, Serialize};

use super::connection::Connection;
use super::duration::Duration;
use super::health::HealthCheck;
use super::meta::{Ignored, Metadata};
use super::percent::Percent;
use super::resilience::{FaultInjection, Hedging, RateLimit, RequestHeaders, SlowStart};
use super::zone::ZonePreference;

/// How requests to Services are sent. For a request, the policies that name the rule of the route
/// that it takes come before those that name the route, then those that name the Service port that
/// was called, its Service, and the namespace (or nothing); the most specific one that sets a field
/// wins, field by field. Of two policies with the same target, the older is used and the other
/// refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrafficPolicy {
    pub api_version: String,
    pub kind: String,
    pub metadata: Metadata,
    #[serde(default)]
    pub spec: TrafficPolicySpec,
    #[serde(default, skip_serializing)]
    #[doc(hidden)]
    pub status: Ignored,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrafficPolicySpec {
    /// The Services, ExternalServices, routes or namespace meant, of the policy's own namespace.
    /// Empty: the namespace.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub target_refs: Vec<TargetRef>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_balancer: Option<LoadBalancer>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub circuit_breaker: Option<CircuitBreaker>,
    /// Default: only what was certainly never processed is tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retries: Option<Retries>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeouts: Option<Timeouts>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault_injection: Option<FaultInjection>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit: Option<RateLimit>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_headers: Option<RequestHeaders>,
    /// Default: nobody is asked; endpoints are judged by their answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection: Option<Connection>,
}

impl TrafficPolicySpec {
    /// Whether it is the default of its namespace.
    pub fn is_default(&self) -> bool {
        let namespace = |target: &TargetRef| target.kind == TargetKind::Namespace;
        self.target_refs.is_empty() || self.target_refs.iter().any(namespace)
    }
}

/// A Service, one of its ports, a route, one of its rules, or the namespace (Gateway API
/// `LocalPolicyTargetReferenceWithSectionName`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TargetRef {
    /// API group: "" for a Service or the namespace, "gateway.networking.k8s.io" for a route,
    /// "policy.weft.dev" for an ExternalService. Default "", which goes for each of them.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub group: String,
    pub kind: TargetKind,
    /// Its name; of the namespace the policy's own.
    pub name: String,
    /// Name or number of one port of the Service, or the name of one rule of the route. Default:
    /// all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub section_name: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum TargetKind {
    Service,
    ExternalService,
    HTTPRoute,
    GRPCRoute,
    /// The policy's own.
    Namespace,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LoadBalancer {
    /// Default `PeakEWMA`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<Algorithm>,
    /// What is hashed for `RingHash` and `Maglev`. Default: the source address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash_key: Option<HashKey>,
    /// When fewer than this share of the endpoints is well, all are used: percent. Default 50; 0
    /// never does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub panic_threshold: Option<Percent>,
    /// Default: new endpoints take their full share at once. Not with `RingHash` and `Maglev`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slow_start: Option<SlowStart>,
    /// Default: every zone alike. Not with `RingHash` and `Maglev`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone_preference: Option<ZonePreference>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Algorithm {
    /// Two endpoints at random, the one with the lower recent latency times load.
    #[serde(rename = "PeakEWMA")]
    PeakEwma,
    /// Two endpoints at random, the one with fewer requests under way.
    LeastRequest,
    /// One after the other.
    RoundRobin,
    /// Any.
    Random,
    /// The same key to the same endpoint; few keys move when endpoints change.
    RingHash,
    /// As `RingHash`, spread more evenly, with more keys moving.
    Maglev,
}

/// What is hashed; exactly one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum HashKey {
    /// The value of this request header.
    Header(String),
    /// The value of this cookie.
    Cookie(String),
    /// The client's address. Only `true` makes sense.
    SourceAddress(bool),
}

/// What protects a destination from too much, and its callers from a broken one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CircuitBreaker {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outlier_detection: Option<OutlierDetection>,
    /// What callers get while the circuit is open (limits reached, or no endpoint left). Default:
    /// 503 with the reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<Fallback>,
}

/// Limits of one proxy towards one Service port. What is over a limit fails at once with 503.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Limits {
    /// Connections open at once. Default 0: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u32>,
    /// Requests under way at once. Default 0: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_requests: Option<u32>,
    /// Requests that wait for a connection. Default 0: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_pending_requests: Option<u32>,
}

/// Takes endpoints that fail out of the choice for a while, and tries them again with one request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OutlierDetection {
    /// Gateway errors in a row (502, 503, 504, connect failure, reset). Default 5; 0 is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consecutive_gateway_errors: Option<u32>,
    /// 5xx answers of any kind in a row. Default 0: off.
    #[serde(
        default,
        rename = "consecutive5xxErrors",
        skip_serializing_if = "Option::is_none"
    )]
    pub consecutive_5xx_errors: Option<u32>,
    /// Share of good answers over `interval` below which an endpoint is taken out. Default: off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub success_rate: Option<SuccessRate>,
    /// Window of the success rate. Default 10s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<Duration>,
    /// Length of the first ejection; each further one is longer by as much, with jitter. Default
    /// 30s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_ejection_time: Option<Duration>,
    /// Longest ejection. Default 5m.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_ejection_time: Option<Duration>,
    /// At most this share of the endpoints is out at once, percent; one may always be. Default 50.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_ejection_percent: Option<Percent>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SuccessRate {
    /// Percent.
    pub threshold: Percent,
    /// Requests an endpoint must have had in the window to be judged. Default 100.
    #[serde(default = "default_min_requests")]
    pub min_requests: u32,
}

fn default_min_requests() -> u32 {
    100
}

/// What callers get while a circuit is open; exactly one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Fallback {
    /// This answer.
    Response(FallbackResponse),
    /// The answer of another Service.
    Backend(FallbackBackend),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FallbackResponse {
    /// HTTP status, 200 to 599.
    pub status: u16,
    /// Header fields, in order. Default none; `content-length` is added.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<HeaderField>,
    /// Body, UTF-8. Default empty; at most 64 KiB.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub body: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HeaderField {
    pub name: String,
    pub value: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FallbackBackend {
    /// Name of a Service.
    pub name: String,
    /// Its namespace. Default: the policy's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Its port number.
    pub port: u16,
}

/// When a failed request is sent again. Writing `retries` at all turns on retries for the
/// `conditions`; without it only what was never processed is tried again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Retries {
    /// Tries after the first. Default 2, at most 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempts: Option<u32>,
    /// HTTP status codes that are tried again, 400 to 599. Default none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub codes: Option<Vec<u16>>,
    /// gRPC status codes that are tried again, by name ("UNAVAILABLE"). Default none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grpc_codes: Option<Vec<GrpcCode>>,
    /// Other conditions. Default `ConnectFailure`, `RefusedStream` and `Reset`. (A key `on` would be
    /// `true` in the YAML 1.1 that kubectl reads.)
    #[serde(
        default,
        rename = "conditions",
        skip_serializing_if = "Option::is_none"
    )]
    pub on: Option<Vec<RetryCondition>>,
    /// Methods tried again when the request may have been processed. Default: the idempotent ones
    /// of RFC 9110 section 9.2.2 (GET, HEAD, OPTIONS, TRACE, PUT, DELETE); gRPC calls are POST.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub methods: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backoff: Option<Backoff>,
    /// Request bodies up to this many bytes are kept for another try. Default 65536, at most
    /// 16777216 (16 MiB).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_body_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<RetryBudget>,
    /// Default: no second try while the first one runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hedging: Option<Hedging>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum RetryCondition {
    /// No connection could be made.
    ConnectFailure,
    /// HTTP/2 REFUSED_STREAM, or GOAWAY below the stream.
    RefusedStream,
    /// The connection was lost before any byte of the response.
    Reset,
    /// The `perTry` timeout ran out.
    Timeout,
}

/// gRPC status codes that can be worth another try.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum GrpcCode {
    Cancelled = 1,
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    OutOfRange = 11,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    DataLoss = 15,
    Unauthenticated = 16,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Backoff {
    /// Wait before the first retry; doubled for each further one, half of it random. Default 25ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Duration>,
    /// Longest wait. Default 250ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<Duration>,
}

/// How many retries are allowed beside the live requests, so that they cannot become the load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RetryBudget {
    /// This share of the live requests, percent. Default 20.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<Percent>,
    /// And this many a second in any case. Default 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_per_second: Option<u32>,
}

/// "0s" is no timeout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Timeouts {
    /// To a connection, with its TLS handshake. Default 5s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connect: Option<Duration>,
    /// From the request's head to the end of the response, all tries together. Default none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<Duration>,
    /// Each try, to the head of its response. Default none; not longer than `request`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_try: Option<Duration>,
    /// No byte either way, of a request or of a connection that is not HTTP. Default none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle: Option<Duration>,
    /// The same of a request (a stream of HTTP/2) alone, what it upgrades to included: 504 before the
    /// head of the response, a reset after it. Default: `idle`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<Duration>,
}
