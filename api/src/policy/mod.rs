//! The kinds of `policy.weft.dev/v1alpha1` as people write them in YAML.
//!
//! The same types are read from a folder of manifests and from Kubernetes. Unknown fields are
//! refused everywhere but in `metadata` and `status`, whose Kubernetes-only fields are ignored.
//! What a field means when it is left out is written beside it; filling defaults in and checking
//! ranges is the compiler's work, except for what a type can refuse while it is read (durations,
//! enumerations, percentages).
//!
//! - [`workload`]: a process at an address (outside Kubernetes: what a Pod is inside).
//! - [`traffic`]: how requests to a Service are balanced, limited, retried and timed out.
//! - [`egress`]: whether what is not known may be called.
//! - [`external`]: services outside the mesh.
//! - [`resilience`]: its faults and its limits at the destination.
//! - [`security`]: which connections a workload takes (mutual TLS or not).
//! - [`telemetry`]: traces and access logs.
//! - [`connection`]: how connections to its endpoints are kept.
//! - [`health`]: how the endpoints of a Service are asked whether they are well.
//! - [`zone`]: endpoints near by.
//! - [`duration`], [`percent`], [`meta`]: the parts they share.

pub mod connection;
pub mod duration;
pub mod egress;
pub mod external;
pub mod health;
pub mod meta;
pub mod percent;
pub mod resilience;
pub mod security;
pub mod telemetry;
pub mod traffic;
pub mod workload;
pub mod zone;

pub use duration::Duration;
pub use egress::{EgressPolicy, EgressPolicySpec};
pub use external::{ExternalService, ExternalServiceSpec};
pub use meta::{LabelSelector, Metadata};
pub use percent::Percent;
pub use security::{MtlsMode, PeerAuthentication, PeerAuthenticationSpec};
pub use telemetry::{AccessLogMode, Telemetry, TelemetrySpec};
pub use traffic::{TrafficPolicy, TrafficPolicySpec};
pub use workload::{Workload, WorkloadSpec};

/// The API group of every kind here.
pub const GROUP: &str = "policy.weft.dev";
/// `apiVersion` of every kind here.
pub const API_VERSION: &str = "policy.weft.dev/v1alpha1";

#[cfg(test)]
mod tests;
