//! The source on a scripted apiserver: what objects become, and what a watch survives.

#[path = "../../../../tests/support/apiserver.rs"]
mod apiserver;
mod convert;
mod semantics;
mod watching;

use serde_json::{Value, json};

use super::watch::Watched;
use crate::model::{Change, Dirty, Object, World};

/// What an object is in the model.
fn convert<K: Watched>(object: Value) -> Option<Object> {
    let object: K = serde_json::from_value(object).unwrap();
    object.into_model().unwrap()
}

/// Puts objects into a world as the source would.
fn apply<K: Watched>(world: &mut World, objects: impl IntoIterator<Item = Value>) -> Dirty {
    let mut dirty = Dirty::default();
    for object in objects {
        let object: K = serde_json::from_value(object).unwrap();
        let reference = super::watch::reference::<K>(super::meta::name(object.meta()));
        let change = match object.into_model().unwrap() {
            Some(object) => Change::Set(Box::new(object)),
            None => Change::Remove(reference),
        };
        world.apply(change, &mut dirty);
    }
    dirty
}

fn service(name: &str, spec: Value) -> Value {
    json!({"metadata": {"name": name, "namespace": "shop", "resourceVersion": "1"}, "spec": spec})
}

fn slice(name: &str, service: &str, ports: Value, endpoints: Value) -> Value {
    json!({"metadata": {"name": name, "namespace": "shop", "resourceVersion": "1",
            "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "ports": ports, "endpoints": endpoints})
}

/// A pod of service account "cart" with a sidecar.
fn pod(name: &str, ip: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}"),
            "resourceVersion": "1", "labels": {"app": "cart"}},
        "spec": {"serviceAccountName": "cart", "nodeName": "node-1",
            "initContainers": [{"name": "weft-proxy", "restartPolicy": "Always"}],
            "containers": [{"name": "app", "ports": [{"name": "web", "containerPort": 8080}]}]},
        "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]}})
}

/// An endpoint of a slice, of a pod.
fn endpoint(pod: &str, ip: &str) -> Value {
    json!({"addresses": [ip], "conditions": {"ready": true},
        "targetRef": {"kind": "Pod", "namespace": "shop", "name": pod, "uid": format!("uid-{pod}")}})
}
