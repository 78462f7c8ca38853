//! What is the same for all injected pods: `settings.yaml` of the ConfigMap `weft-injector`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use weft_api::names::{CONTROL_PLANE_NAMESPACE, CONTROL_PORT, DEFAULT_TRUST_DOMAIN};

/// The key of the ConfigMap.
pub const KEY: &str = "settings.yaml";

/// What is the same for all injected pods.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Settings {
    pub proxy: Proxy,
    /// host:port of discovery and identity.
    #[serde(default = "default_control_plane")]
    pub control_plane: String,
    #[serde(default = "default_trust_domain")]
    pub trust_domain: String,
    /// Namespace of the control plane, which is never injected.
    #[serde(default = "default_namespace")]
    pub system_namespace: String,
    #[serde(default)]
    pub capture: Capture,
    #[serde(default)]
    pub tracing: Tracing,
    #[serde(default)]
    pub prometheus: Prometheus,
}

/// The proxy's container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Proxy {
    pub image: String,
    /// Default: what Kubernetes makes of the image's tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_pull_policy: Option<String>,
    #[serde(default = "default_log_level")]
    pub log_level: String,
    /// How long the proxy waits for what runs when it is told to end, seconds.
    #[serde(default = "default_drain_seconds")]
    pub drain_seconds: u64,
    #[serde(default)]
    pub resources: Resources,
}

/// Quantities as Kubernetes writes them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resources {
    #[serde(default = "default_requests")]
    pub requests: BTreeMap<String, String>,
    /// Default: none.
    #[serde(default)]
    pub limits: BTreeMap<String, String>,
}

impl Default for Resources {
    fn default() -> Self {
        Self {
            requests: default_requests(),
            limits: BTreeMap::new(),
        }
    }
}

/// What is not captured in any pod; pods can add to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Capture {
    /// Ports and ranges, "3306" or "9000-9100".
    pub exclude_inbound_ports: Vec<String>,
    /// Networks, "10.0.5.0/24".
    pub exclude_inbound_cidrs: Vec<String>,
    pub exclude_outbound_ports: Vec<String>,
    pub exclude_outbound_cidrs: Vec<String>,
}

/// Traces.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Tracing {
    /// Where spans go unless a Telemetry says otherwise; empty: nowhere.
    pub otlp_endpoint: String,
}

/// Prometheus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Prometheus {
    /// Annotates pods that have no `prometheus.io/` annotation of their own, so that the proxy is
    /// scraped.
    pub annotations: bool,
}

impl Default for Prometheus {
    fn default() -> Self {
        Self { annotations: true }
    }
}

fn default_control_plane() -> String {
    format!("weft-control-plane.{CONTROL_PLANE_NAMESPACE}.svc:{CONTROL_PORT}")
}

fn default_trust_domain() -> String {
    DEFAULT_TRUST_DOMAIN.to_owned()
}

fn default_namespace() -> String {
    CONTROL_PLANE_NAMESPACE.to_owned()
}

fn default_log_level() -> String {
    "info".to_owned()
}

fn default_drain_seconds() -> u64 {
    25
}

fn default_requests() -> BTreeMap<String, String> {
    [("cpu", "10m"), ("memory", "32Mi")]
        .map(|(what, much)| (what.to_owned(), much.to_owned()))
        .into()
}

/// Text that is not a set of settings.
#[derive(Debug, thiserror::Error)]
#[error("the injection settings cannot be read: {0}")]
pub struct InvalidSettings(String);

impl Settings {
    /// Reads YAML.
    ///
    /// # Errors
    /// It is not YAML, a field is unknown or missing, or a value is not what it should be.
    pub fn parse(text: &str) -> Result<Self, InvalidSettings> {
        let invalid = |error: String| InvalidSettings(error);
        let settings: Self = serde_saphyr::from_str(text).map_err(|e| invalid(e.to_string()))?;
        if settings.proxy.image.trim().is_empty() {
            return Err(invalid("proxy.image is empty".to_owned()));
        }
        super::annotations::check_settings(&settings).map_err(|refused| invalid(refused.0))?;
        Ok(settings)
    }
}
