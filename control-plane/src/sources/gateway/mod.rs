//! Routes of the Gateway API as manifests: read the same from a folder and from Kubernetes.
//!
//! [`types`] is how they are written, [`convert`] makes [`crate::model::Route`]s of them. What a
//! rule says that cannot be honoured is kept in the model as a refusal of that rule; a route is
//! never half obeyed in silence.

mod backend_traffic;
mod convert;
mod filters;
mod session;
mod types;

pub use backend_traffic::{BackendTrafficPolicy, BackendTrafficSpec, X_API_VERSION};
pub use types::{GrpcRoute, HttpRoute, Meta, Object, Spec, TcpRoute, TlsRoute};

/// The API group of routes.
pub const GROUP: &str = "gateway.networking.k8s.io";

/// Whether an `apiVersion` is one whose routes are read. The versions of a kind have the same fields.
pub fn is_version(api_version: &str) -> bool {
    let version = api_version
        .strip_prefix(GROUP)
        .and_then(|rest| rest.strip_prefix('/'));
    matches!(version, Some("v1" | "v1beta1" | "v1alpha2" | "v1alpha3"))
}
