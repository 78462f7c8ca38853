//! The route kinds of the Gateway API as people write them (`gateway.networking.k8s.io`, v1.6).
//!
//! Only what is used; what is not known is kept by name, so that a rule that says something we do
//! not understand is refused instead of being half obeyed.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;
use weft_api::policy::Duration;

use super::session::SessionPersistence;

/// Fields that are not known, by name.
pub(super) type Unknown = BTreeMap<String, IgnoredAny>;

fn default_namespace() -> String {
    "default".to_owned()
}

/// The part of an object's metadata that is used.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Meta {
    pub name: String,
    #[serde(default = "default_namespace")]
    pub namespace: String,
    #[serde(default)]
    pub creation_timestamp: Option<String>,
    #[serde(default)]
    pub generation: i64,
}

/// A route of any kind; the rules tell the kinds apart.
#[derive(Debug, Deserialize)]
pub struct Object<R> {
    pub metadata: Meta,
    #[serde(default = "Spec::empty")]
    pub spec: Spec<R>,
}

pub type HttpRoute = Object<HttpRule>;
pub type GrpcRoute = Object<GrpcRule>;
pub type TlsRoute = Object<StreamRule>;
pub type TcpRoute = Object<StreamRule>;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec<R> {
    #[serde(default = "Vec::new")]
    pub(super) parent_refs: Vec<ParentRef>,
    #[serde(default)]
    pub(super) hostnames: Vec<String>,
    #[serde(default = "Vec::new")]
    pub(super) rules: Vec<R>,
}

impl<R> Spec<R> {
    fn empty() -> Self {
        Self {
            parent_refs: Vec::new(),
            hostnames: Vec::new(),
            rules: Vec::new(),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ParentRef {
    pub(super) group: Option<String>,
    pub(super) kind: Option<String>,
    pub(super) namespace: Option<String>,
    pub(super) name: String,
    pub(super) section_name: Option<String>,
    pub(super) port: Option<u16>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpRule {
    pub(super) name: Option<String>,
    #[serde(default)]
    pub(super) matches: Vec<HttpMatch>,
    #[serde(default)]
    pub(super) filters: Vec<Filter>,
    #[serde(default)]
    pub(super) backend_refs: Vec<BackendRef>,
    #[serde(default)]
    pub(super) timeouts: Timeouts,
    pub(super) retry: Option<Retry>,
    pub(super) session_persistence: Option<SessionPersistence>,
    #[serde(flatten)]
    pub(super) unknown: Unknown,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GrpcRule {
    pub(super) name: Option<String>,
    #[serde(default)]
    pub(super) matches: Vec<GrpcMatch>,
    #[serde(default)]
    pub(super) filters: Vec<Filter>,
    #[serde(default)]
    pub(super) backend_refs: Vec<BackendRef>,
    pub(super) session_persistence: Option<SessionPersistence>,
    #[serde(flatten)]
    pub(super) unknown: Unknown,
}

/// A rule of a TLSRoute or TCPRoute.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StreamRule {
    pub(super) name: Option<String>,
    #[serde(default)]
    pub(super) backend_refs: Vec<BackendRef>,
    #[serde(flatten)]
    pub(super) unknown: Unknown,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct HttpMatch {
    pub(super) path: Option<TypedValue>,
    pub(super) method: Option<String>,
    #[serde(default)]
    pub(super) headers: Vec<NamedMatch>,
    #[serde(default)]
    pub(super) query_params: Vec<NamedMatch>,
    #[serde(flatten)]
    pub(super) unknown: Unknown,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct GrpcMatch {
    pub(super) method: Option<GrpcMethod>,
    #[serde(default)]
    pub(super) headers: Vec<NamedMatch>,
    #[serde(flatten)]
    pub(super) unknown: Unknown,
}

#[derive(Debug, Deserialize)]
pub(super) struct GrpcMethod {
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) service: Option<String>,
    pub(super) method: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct TypedValue {
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) value: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct NamedMatch {
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) name: String,
    pub(super) value: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Filter {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) request_header_modifier: Option<HeaderModifier>,
    pub(super) response_header_modifier: Option<HeaderModifier>,
    pub(super) request_mirror: Option<Mirror>,
    pub(super) request_redirect: Option<Redirect>,
    pub(super) url_rewrite: Option<Rewrite>,
    pub(super) cors: Option<Cors>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct HeaderModifier {
    pub(super) set: Vec<Header>,
    pub(super) add: Vec<Header>,
    pub(super) remove: Vec<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Header {
    pub(super) name: String,
    pub(super) value: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Mirror {
    pub(super) backend_ref: BackendRef,
    pub(super) percent: Option<u32>,
    pub(super) fraction: Option<Fraction>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Fraction {
    pub(super) numerator: u32,
    pub(super) denominator: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Redirect {
    pub(super) scheme: Option<String>,
    pub(super) hostname: Option<String>,
    pub(super) path: Option<PathModifier>,
    pub(super) port: Option<u16>,
    pub(super) status_code: Option<u16>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Rewrite {
    pub(super) hostname: Option<String>,
    pub(super) path: Option<PathModifier>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PathModifier {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) replace_full_path: Option<String>,
    pub(super) replace_prefix_match: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Cors {
    pub(super) allow_origins: Vec<String>,
    pub(super) allow_credentials: Option<bool>,
    pub(super) allow_methods: Vec<String>,
    pub(super) allow_headers: Vec<String>,
    pub(super) expose_headers: Vec<String>,
    pub(super) max_age: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct BackendRef {
    pub(super) group: Option<String>,
    pub(super) kind: Option<String>,
    pub(super) name: String,
    pub(super) namespace: Option<String>,
    pub(super) port: Option<u16>,
    pub(super) weight: Option<u32>,
    #[serde(default)]
    pub(super) filters: Vec<Filter>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Timeouts {
    pub(super) request: Option<Duration>,
    pub(super) backend_request: Option<Duration>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Retry {
    #[serde(default)]
    pub(super) codes: Vec<u16>,
    pub(super) attempts: Option<u32>,
    pub(super) backoff: Option<Duration>,
}
