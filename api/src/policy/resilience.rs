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

fn every() -> Percent {
    Percent::ALL
}
