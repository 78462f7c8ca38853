//! What every object carries: its name, and how others are chosen by label.

use std::collections::BTreeMap;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

/// Namespace of an object that names none.
pub const DEFAULT_NAMESPACE: &str = "default";

fn default_namespace() -> String {
    DEFAULT_NAMESPACE.to_owned()
}

/// `metadata` of an object. The fields that only a Kubernetes API server writes are accepted and
/// ignored; anything else is refused, so that a misspelt `labels` does not go unseen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Metadata {
    /// Name, unique for its kind in its namespace: a DNS label or subdomain (RFC 1123).
    pub name: String,
    /// Namespace; "default" when left out.
    #[serde(default = "default_namespace")]
    pub namespace: String,
    /// Labels, which selectors match.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Free-form notes; not interpreted.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// RFC 3339 time of creation. Of two policies that say different things about the same target
    /// the older wins; without times, the first by namespace and name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub creation_timestamp: Option<String>,
    #[serde(default, skip_serializing)]
    #[doc(hidden)]
    pub generate_name: Ignored,
    #[serde(default, skip_serializing)]
    #[doc(hidden)]
    pub uid: Ignored,
    #[serde(default, skip_serializing)]
    #[doc(hidden)]
    pub resource_version: Ignored,
    #[serde(default, skip_serializing)]
    #[doc(hidden)]
    pub generation: Ignored,
    #[serde(default, skip_serializing)]
    #[doc(hidden)]
    pub deletion_timestamp: Ignored,
    #[serde(default, skip_serializing)]
    #[doc(hidden)]
    pub deletion_grace_period_seconds: Ignored,
    #[serde(default, skip_serializing)]
    #[doc(hidden)]
    pub owner_references: Ignored,
    #[serde(default, skip_serializing)]
    #[doc(hidden)]
    pub finalizers: Ignored,
    #[serde(default, skip_serializing)]
    #[doc(hidden)]
    pub managed_fields: Ignored,
    #[serde(default, skip_serializing)]
    #[doc(hidden)]
    pub self_link: Ignored,
}

/// A value that is read and forgotten.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(from = "IgnoredAny")]
pub struct Ignored;

impl From<IgnoredAny> for Ignored {
    fn from(_: IgnoredAny) -> Self {
        Self
    }
}

/// Chooses objects of the same namespace by their labels.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LabelSelector {
    /// Every one of these labels has to be there with this very value. Empty: everything.
    #[serde(default)]
    pub match_labels: BTreeMap<String, String>,
}

impl LabelSelector {
    /// Whether an object with these labels is chosen.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        selects(&self.match_labels, labels)
    }
}

/// Whether every pair of `wanted` stands in `labels`.
pub fn selects(wanted: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    wanted
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}
