//! Pods of the mesh.

use futures_util::{StreamExt, stream};
use k8s_openapi::api::core::v1::{Container, Pod};
use kube::api::{Api, ListParams};
use weft_api::names::{self, PROXY_CONTAINER};

use super::{Cluster, Error};

/// Pods asked at once.
const AT_ONCE: usize = 16;

/// A pod with a proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meshed {
    pub namespace: String,
    pub name: String,
    /// "deploy/cart": what owns it, as people name it.
    pub owner: String,
    pub admin_port: u16,
    /// Whether its proxy says that it is ready.
    pub ready: bool,
    pub node: String,
}

impl Meshed {
    /// "namespace/name", as the control plane calls it.
    pub fn workload(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// The container of a pod's proxy, if it has one.
pub fn proxy_container(pod: &Pod) -> Option<&Container> {
    let spec = pod.spec.as_ref()?;
    let init = spec.init_containers.iter().flatten();
    init.chain(&spec.containers)
        .find(|container| container.name == PROXY_CONTAINER)
        .filter(|_| spec.host_network != Some(true))
}

/// Whether the pod's containers run (or may; it has not ended).
pub fn is_running(pod: &Pod) -> bool {
    pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running")
}

/// The pod as one of the mesh; `None` when it has no proxy.
pub fn meshed(pod: &Pod) -> Option<Meshed> {
    let container = proxy_container(pod)?;
    let environment = container.env.iter().flatten();
    let admin_port = environment
        .filter(|var| var.name == "WEFT_ADMIN")
        .find_map(|var| var.value.as_ref()?.rsplit_once(':')?.1.parse().ok())
        .unwrap_or(names::ADMIN_PORT);
    let status = pod.status.as_ref();
    let statuses = status.into_iter().flat_map(|status| {
        let init = status.init_container_statuses.iter().flatten();
        init.chain(status.container_statuses.iter().flatten())
    });
    Some(Meshed {
        namespace: pod.metadata.namespace.clone().unwrap_or_default(),
        name: pod.metadata.name.clone()?,
        owner: owner(pod),
        admin_port,
        ready: statuses
            .filter(|status| status.name == PROXY_CONTAINER)
            .any(|status| status.ready),
        node: pod
            .spec
            .as_ref()
            .and_then(|spec| spec.node_name.clone())
            .unwrap_or_default(),
    })
}

/// "deploy/cart" for a pod that a Deployment's ReplicaSet owns; "pod/x" for one that nobody owns.
pub fn owner(pod: &Pod) -> String {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let owners = pod.metadata.owner_references.iter().flatten();
    let Some(owner) = owners
        .clone()
        .find(|o| o.controller == Some(true))
        .or_else(|| {
            let mut owners = owners;
            owners.next()
        })
    else {
        return format!("pod/{name}");
    };
    let labels = pod.metadata.labels.as_ref();
    let hash = labels.and_then(|labels| labels.get("pod-template-hash"));
    match (&*owner.kind, hash) {
        ("ReplicaSet", Some(hash)) => {
            let deployment = owner.name.strip_suffix(hash.as_str());
            let deployment = deployment.and_then(|name| name.strip_suffix('-'));
            match deployment {
                Some(deployment) => format!("deploy/{deployment}"),
                None => format!("rs/{}", owner.name),
            }
        }
        ("ReplicaSet", None) => format!("rs/{}", owner.name),
        ("StatefulSet", _) => format!("sts/{}", owner.name),
        ("DaemonSet", _) => format!("ds/{}", owner.name),
        (kind, _) => format!("{}/{}", kind.to_lowercase(), owner.name),
    }
}

impl Cluster {
    /// All pods of a namespace, or of all.
    pub async fn pods(&self, namespace: Option<&str>) -> Result<Vec<Pod>, Error> {
        let (api, what): (Api<Pod>, _) = match namespace {
            Some(namespace) => (
                Api::namespaced(self.client.clone(), namespace),
                format!("list pods in {namespace}"),
            ),
            None => (
                Api::all(self.client.clone()),
                "list pods of all namespaces (name one with -n)".to_owned(),
            ),
        };
        let list = api.list(&ListParams::default()).await;
        Ok(list.map_err(Error::api(what))?.items)
    }

    /// The pods of the mesh that run, in order.
    pub async fn meshed(&self, namespace: Option<&str>) -> Result<Vec<Meshed>, Error> {
        let pods = self.pods(namespace).await?;
        let mut meshed: Vec<Meshed> = pods
            .iter()
            .filter(|pod| is_running(pod))
            .filter_map(meshed)
            .collect();
        meshed.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        Ok(meshed)
    }
}

/// Asks several at once; the answers are in the order of the questions.
pub async fn ask_all<T, R, F: Future<Output = R>>(
    of: impl IntoIterator<Item = T>,
    ask: impl Fn(T) -> F,
) -> Vec<R> {
    stream::iter(of).map(ask).buffered(AT_ONCE).collect().await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(value: serde_json::Value) -> Pod {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn pods_with_a_proxy_and_whose_they_are() {
        let owned = |kind: &str, name: &str, hash: &str| {
            pod(serde_json::json!({
                "metadata": {
                    "name": "cart-abc-x1", "namespace": "shop",
                    "labels": {"pod-template-hash": hash},
                    "ownerReferences": [{
                        "apiVersion": "v1", "kind": kind, "name": name, "uid": "1", "controller": true,
                    }],
                },
                "spec": {
                    "containers": [{"name": "app"}],
                    "initContainers": [{
                        "name": "weft-proxy", "env": [{"name": "WEFT_ADMIN", "value": "[::]:15099"}],
                    }],
                },
                "status": {
                    "phase": "Running",
                    "initContainerStatuses": [{
                        "name": "weft-proxy", "ready": true, "image": "", "imageID": "", "restartCount": 0,
                    }],
                },
            }))
        };
        let one = meshed(&owned("ReplicaSet", "cart-abc", "abc")).unwrap();
        assert_eq!(one.workload(), "shop/cart-abc-x1");
        assert_eq!((one.owner.as_str(), one.admin_port), ("deploy/cart", 15099));
        assert!(one.ready);
        for (kind, name, expected) in [
            ("StatefulSet", "db", "sts/db"),
            ("DaemonSet", "logs", "ds/logs"),
            ("Job", "once", "job/once"),
            ("ReplicaSet", "odd", "rs/odd"),
        ] {
            assert_eq!(owner(&owned(kind, name, "abc")), expected);
        }
    }

    #[test]
    fn others_have_none() {
        let plain = serde_json::json!({
            "metadata": {"name": "a", "namespace": "shop"},
            "spec": {"containers": [{"name": "app"}]},
        });
        assert!(meshed(&pod(plain)).is_none());
        let host = serde_json::json!({
            "metadata": {"name": "a", "namespace": "shop"},
            "spec": {"hostNetwork": true, "containers": [{"name": "weft-proxy"}]},
        });
        assert!(meshed(&pod(host.clone())).is_none());
        assert_eq!(owner(&pod(host)), "pod/a");
    }
}
