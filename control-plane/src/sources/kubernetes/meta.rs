//! An object's metadata: what is used of it.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use weft_api::names::ANNOTATION_PREFIX;

use crate::model::{Name, ParentRef};

/// Annotations that are ours, and those by which a pod offers its metrics.
const PREFIXES: [&str; 2] = [ANNOTATION_PREFIX, "prometheus.io/"];

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Used {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    generation: Option<i64>,
    resource_version: Option<String>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
}

/// Reads `metadata` without its bulk: managed fields, owners, others' annotations.
pub(super) fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    let used = Used::deserialize(deserializer)?;
    Ok(ObjectMeta {
        name: used.name,
        namespace: used.namespace,
        uid: used.uid,
        generation: used.generation,
        resource_version: used.resource_version,
        creation_timestamp: used.creation_timestamp,
        deletion_timestamp: used.deletion_timestamp,
        labels: used.labels,
        annotations: used.annotations.map(|mut annotations| {
            annotations.retain(|key, _| PREFIXES.iter().any(|prefix| key.starts_with(prefix)));
            annotations
        }),
        ..ObjectMeta::default()
    })
}

/// Namespace (empty for what has none) and name.
pub(super) fn name(meta: &ObjectMeta) -> Name {
    Name::new(
        meta.namespace.clone().unwrap_or_default(),
        meta.name.clone().unwrap_or_default(),
    )
}

/// When it was made, RFC 3339; empty when not known.
pub(super) fn created(meta: &ObjectMeta) -> String {
    meta.creation_timestamp
        .as_ref()
        .map_or(String::new(), |time| time.0.to_string())
}

/// What a spec names in a list of references; what is none is left out.
pub(super) fn references(spec: &Value, list: &str) -> Vec<ParentRef> {
    let given = spec[list].as_array().into_iter().flatten();
    let references = given.filter_map(|given| {
        let text = |field: &str| given[field].as_str().map(str::to_owned);
        Some(ParentRef {
            group: text("group"),
            kind: text("kind"),
            namespace: text("namespace"),
            name: text("name")?,
            section_name: text("sectionName"),
            port: given["port"].as_u64().and_then(|port| port.try_into().ok()),
        })
    });
    references.collect()
}
