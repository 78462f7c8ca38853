//! Routes of the Gateway API as the apiserver serves them: read as loosely as our own kinds, then as
//! in a folder. Those that have no Service as a parent are not the mesh's and are not kept.

use kube::core::ObjectMeta;
use serde::Deserialize;
use serde_json::Value;

use super::meta;
use super::objects::resource;
use super::watch::{Watched, Wrong};
use crate::model::{Kind, Object, ParentRef, RouteKind};
use crate::sources::gateway;

macro_rules! route {
    ($type:ident, $plural:literal, $read:ty, $object:expr) => {
        #[derive(Clone, Debug, Deserialize)]
        pub(super) struct $type {
            #[serde(deserialize_with = "meta::read")]
            metadata: ObjectMeta,
            #[serde(default)]
            spec: Value,
        }
        resource!(
            $type,
            "gateway.networking.k8s.io",
            "v1",
            stringify!($type),
            $plural
        );

        impl Watched for $type {
            const KIND: Kind = Kind::$type;
            const PLURAL: &'static str = $plural;
            const OPTIONAL: bool = true;
            const GENERATIONS: bool = true;

            fn into_model(self) -> Result<Option<Object>, Vec<Wrong>> {
                let spec = serde_json::from_value(self.spec).map_err(|error| wrong(&error))?;
                let route: $read = gateway::Object {
                    metadata: metadata(&self.metadata),
                    spec,
                };
                Ok(ours($object(route)))
            }

            fn names(&self) -> Vec<ParentRef> {
                meta::references(&self.spec, "parentRefs")
            }
        }
    };
}

route!(
    HTTPRoute,
    "httproutes",
    gateway::HttpRoute,
    gateway::HttpRoute::into_model
);
route!(
    GRPCRoute,
    "grpcroutes",
    gateway::GrpcRoute,
    gateway::GrpcRoute::into_model
);
route!(TLSRoute, "tlsroutes", gateway::TlsRoute, |route| {
    gateway::TlsRoute::into_stream_model(route, RouteKind::Tls)
});
route!(TCPRoute, "tcproutes", gateway::TcpRoute, |route| {
    gateway::TcpRoute::into_stream_model(route, RouteKind::Tcp)
});

fn metadata(given: &ObjectMeta) -> gateway::Meta {
    let name = meta::name(given);
    gateway::Meta {
        name: name.name,
        namespace: name.namespace,
        creation_timestamp: Some(meta::created(given)),
        generation: given.generation.unwrap_or(0),
    }
}

fn wrong(error: &serde_json::Error) -> Vec<Wrong> {
    vec![Wrong {
        message: format!("spec: {error}"),
        help: "correct it; docs/reference/routes.md has an example of every kind; what it said before stands".to_owned(),
    }]
}

fn ours(object: Object) -> Option<Object> {
    match &object {
        Object::Route(route) if route.services().is_empty() => None,
        _ => Some(object),
    }
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct XBackendTrafficPolicy {
    #[serde(deserialize_with = "meta::read")]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Value,
}
resource!(
    XBackendTrafficPolicy,
    "gateway.networking.x-k8s.io",
    "v1alpha1",
    "XBackendTrafficPolicy",
    "xbackendtrafficpolicies"
);

impl Watched for XBackendTrafficPolicy {
    const KIND: Kind = Kind::XBackendTrafficPolicy;
    const PLURAL: &'static str = "xbackendtrafficpolicies";
    const OPTIONAL: bool = true;
    const GENERATIONS: bool = true;

    fn into_model(self) -> Result<Option<Object>, Vec<Wrong>> {
        let spec: gateway::BackendTrafficSpec =
            serde_json::from_value(self.spec).map_err(|error| wrong(&error))?;
        let policy = gateway::BackendTrafficPolicy {
            metadata: metadata(&self.metadata),
            spec,
        };
        Ok(Some(policy.into_model()))
    }

    fn names(&self) -> Vec<ParentRef> {
        meta::references(&self.spec, "targetRefs")
    }
}
