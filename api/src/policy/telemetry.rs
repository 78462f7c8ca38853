//! Traces and access logs.

use serde::{Deserialize, Serialize};

use super::meta::{Ignored, LabelSelector, Metadata};

/// What the proxies of workloads record. The most specific one wins, field by field: one with a
/// selector before the namespace's (no selector), and that before the whole mesh's (no selector,
/// in namespace `weft-system`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Telemetry {
    pub api_version: String,
    pub kind: String,
    pub metadata: Metadata,
    #[serde(default)]
    pub spec: TelemetrySpec,
    #[serde(default, skip_serializing)]
    #[doc(hidden)]
    pub status: Ignored,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TelemetrySpec {
    /// The workloads meant. Default: all of the namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelSelector>,
    #[serde(default, skip_serializing_if = "Tracing::is_empty")]
    pub tracing: Tracing,
    #[serde(default, skip_serializing_if = "AccessLog::is_empty")]
    pub access_log: AccessLog,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Tracing {
    /// Share of the requests that carry no sampling decision of their own which are traced:
    /// percent, 0 to 100, down to 0.01. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling_percent: Option<f64>,
    /// Where spans go: "http://host:4317" (OTLP over gRPC) or "http://host:4318/v1/traces" (OTLP
    /// over HTTP). Default: where the proxy was told at its start; else nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub otlp_endpoint: Option<String>,
}

impl Tracing {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AccessLog {
    /// Default `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<AccessLogMode>,
}

impl AccessLog {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Which requests the access log has a line for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum AccessLogMode {
    /// None. (`Off` would be `false` in the YAML 1.1 that kubectl reads.)
    #[serde(rename = "None")]
    Off,
    /// Those that failed: 5xx, gRPC errors, resets and what the proxy answered itself.
    Errors,
    /// All.
    All,
}
