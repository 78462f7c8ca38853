//! The connections of proxies to endpoints.

use serde::{Deserialize, Serialize};

use super::duration::Duration;

/// How connections to the endpoints are kept, by the callers' proxies; `max_requests` and `http2`
/// also by the workloads' own proxies towards their applications.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Connection {
    /// Requests that one connection carries; then it takes no more, ends when those under way are
    /// answered, and another is opened. Default 0: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_requests: Option<u32>,
    /// How long a connection stays open without a request, by the second; at least 1s. Default 60s
    /// between proxies, 4s (HTTP/1.1) or 60s (HTTP/2) to an endpoint without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<Duration>,
    /// By which the kernel finds out that a silent peer is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive: Option<KeepAlive>,
    /// What endpoints may send before it has been passed on (RFC 9113 section 5.2).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http2: Option<Http2>,
}

/// TCP keep-alive, of connections of any protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KeepAlive {
    /// Silence before the first probe, whole seconds. Default 60s; 0s sends none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<Duration>,
    /// Between two probes, whole seconds. Default 15s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<Duration>,
    /// Probes without an answer before the connection is given up, 1 to 127. Default 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probes: Option<u32>,
}

/// Flow control windows, bytes; 65535 to 2147483647.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Http2 {
    /// Of each stream (SETTINGS_INITIAL_WINDOW_SIZE). Default 262144 (256 KiB).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream_window: Option<u32>,
    /// Of all streams of a connection together; not less than `stream_window`. Default 16777216
    /// (16 MiB), or as much as `stream_window`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection_window: Option<u32>,
}
