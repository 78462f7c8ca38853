//! Whether what the mesh does not know may be called.

use serde::{Deserialize, Serialize};

use super::meta::{Ignored, Metadata};

/// What becomes of connections of a namespace's workloads to what is no Service, workload or
/// `ExternalService`. One in `weft-system` holds for every namespace that has none of its own; of
/// several in a namespace the oldest is used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EgressPolicy {
    pub api_version: String,
    pub kind: String,
    pub metadata: Metadata,
    pub spec: EgressPolicySpec,
    #[serde(default, skip_serializing)]
    #[doc(hidden)]
    pub status: Ignored,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EgressPolicySpec {
    /// Without any EgressPolicy it is `AllowAny`.
    pub mode: EgressMode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum EgressMode {
    /// They pass through, untouched.
    AllowAny,
    /// They are refused by the caller's own proxy.
    RegistryOnly,
}
