//! What `/config` shows of discovery.

use serde::Serialize;

use super::directory::LinkState;

/// The stream, and every resource with its version.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// "host:port" as configured.
    pub control_plane: String,
    pub stream: LinkState,
    /// Seconds since the stream came to this state.
    pub since_seconds: u64,
    /// Why the last stream ended or the last try failed.
    pub last_error: Option<String>,
    pub resources: Vec<ResourceStatus>,
}

#[derive(Debug, Clone, Serialize)]
pub struct ResourceStatus {
    /// "destination", "endpoints", "workload" or "trust".
    pub kind: &'static str,
    pub name: String,
    pub state: ResourceState,
    /// As `weft status` prints it: 16 hexadecimal digits; none before the first good one.
    pub version: Option<String>,
    /// The last version that was refused, while none after it was good.
    pub nack: Option<NackStatus>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ResourceState {
    Pending,
    Absent,
    Present,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NackStatus {
    pub version: String,
    pub reason: String,
}

/// A version as people see it.
pub(super) fn version_text(version: u64) -> String {
    format!("{version:016x}")
}
