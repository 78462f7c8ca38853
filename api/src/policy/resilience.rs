//! Further parts of a [`super::TrafficPolicy`]: what is done to requests on purpose, and what a
//! destination takes no more of.

use serde::{Deserialize, Serialize};

use super::duration::Duration;
use super::percent::Percent;
use super::traffic::{GrpcCode, HeaderField};

/// Faults that the caller's proxy makes on purpose, so that it can be seen what callers make of
/// them. Delay and abort are drawn independently of each other; a request that is delayed may be
/// aborted afterwards. The most specific policy that has it says all of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FaultInjection {
    /// Only requests that have all of these fields, with exactly these values. Default: every
    /// request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<HeaderField>,
    /// Requests that wait before they are sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delay: Option<FaultDelay>,
    /// Requests that are answered with an error instead of being sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort: Option<FaultAbort>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FaultDelay {
    /// Share of the requests. Default 100.
    #[serde(default = "every")]
    pub percent: Percent,
    /// How long; a request timeout that runs out meanwhile does so.
    pub duration: Duration,
}

/// At least one of the two codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FaultAbort {
    /// Share of the requests. Default 100.
    #[serde(default = "every")]
    pub percent: Percent,
    /// HTTP status, 200 to 599. Without it only gRPC calls are aborted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// What gRPC calls are answered with, by name. Default: what gRPC makes of `status`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grpc_status: Option<GrpcCode>,
}

/// How many requests the workloads behind a Service take, kept by their own proxies, whoever calls
/// and by whatever address. What is over it is answered 429 (gRPC: RESOURCE_EXHAUSTED) with the time
/// after which to try again. The most specific policy that has it says all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RateLimit {
    /// Requests in `per`, of each replica unless `global`; at least 1.
    pub requests: u32,
    /// Default 1s.
    #[serde(default = "second")]
    pub per: Duration,
    /// Requests that may come at once after a pause. Default: as `requests`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst: Option<u32>,
    /// Whose requests are counted together. Default: everybody's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<RateLimitKey>,
    /// The numbers are for all ready replicas together; each takes an equal share. Default false.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub global: bool,
}

/// What is counted apart; exactly one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RateLimitKey {
    /// Every client identity (SPIFFE); those without one together. Only `true` makes sense.
    ClientIdentity(bool),
    /// Every value of this request header; those without it together.
    Header(String),
    /// Every source address. Only `true` makes sense.
    SourceAddress(bool),
}

/// What the head of a request may hold; the workloads' own proxies answer others 431. The most
/// specific policy that has it says all of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RequestHeaders {
    /// Bytes of the request line and the fields, as HTTP/1.1 writes them; 1 to 1048576 (1 MiB).
    /// HTTP/2 has a limit of 65536 (64 KiB) in any case. Default: no limit but the proxy's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u32>,
    /// Fields; 1 to 8192. Default: no limit but the proxy's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_count: Option<u32>,
}

/// A second try beside the first, for requests that may be repeated and have been sent as a whole by
/// then, their body within `retries.maxBodyBytes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Hedging {
    /// When another endpoint is asked too, if no answer has begun by then. The one that answers
    /// first is used, the other cancelled; it draws on the retry budget.
    pub delay: Duration,
}

/// New endpoints take their share of the requests little by little.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SlowStart {
    /// Until an endpoint that has come, or become ready, has its full weight; from a tenth of it, in
    /// a straight line.
    pub window: Duration,
}

fn second() -> Duration {
    Duration::from_secs(1)
}

fn every() -> Percent {
    Percent::ALL
}
