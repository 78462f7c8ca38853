//! "deploy/cart": what a command is about, and which pods that is.

use std::fmt;

use k8s_openapi::api::core::v1::Service;
use kube::api::Api;

use super::pods::{self, Meshed};
use super::{Cluster, Error};

/// Kinds that pods belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Pod,
    Service,
    /// Owns pods: its short name as in kubectl.
    Owner(&'static str),
}

/// A kind and a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub kind: Kind,
    pub name: String,
}

/// What cannot be read as a target.
#[derive(Debug, thiserror::Error)]
#[error(
    "'{0}' is not a workload: write deploy/NAME, sts/NAME, ds/NAME, job/NAME, svc/NAME or pod/NAME"
)]
pub struct Invalid(String);

/// What kubectl calls a kind.
pub fn kind(given: &str) -> Option<Kind> {
    Some(match &*given.to_ascii_lowercase() {
        "pod" | "pods" | "po" => Kind::Pod,
        "service" | "services" | "svc" => Kind::Service,
        "deployment" | "deployments" | "deploy" => Kind::Owner("deploy"),
        "statefulset" | "statefulsets" | "sts" => Kind::Owner("sts"),
        "daemonset" | "daemonsets" | "ds" => Kind::Owner("ds"),
        "replicaset" | "replicasets" | "rs" => Kind::Owner("rs"),
        "job" | "jobs" => Kind::Owner("job"),
        _ => return None,
    })
}

impl std::str::FromStr for Target {
    type Err = Invalid;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        let invalid = || Invalid(given.to_owned());
        let (kind, name) = given.split_once('/').ok_or_else(invalid)?;
        let kind = self::kind(kind).ok_or_else(invalid)?;
        if name.is_empty() || name.contains('/') {
            return Err(invalid());
        }
        Ok(Self {
            kind,
            name: name.to_owned(),
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Pod => "pod",
            Kind::Service => "svc",
            Kind::Owner(kind) => kind,
        };
        write!(f, "{kind}/{}", self.name)
    }
}

/// Why a target has no pods to speak to.
#[derive(Debug, thiserror::Error)]
pub enum NoPods {
    #[error(transparent)]
    Cluster(#[from] Error),
    #[error("there is no {target} with a running pod in namespace {namespace}")]
    None { target: Target, namespace: String },
    #[error(
        "{target} in namespace {namespace} is not in the mesh: its pods have no proxy. Label the \
         namespace or the pods (weft.dev/inject=enabled) and restart it"
    )]
    NotMeshed { target: Target, namespace: String },
}

impl Cluster {
    /// The pods of a target that run and have a proxy; at least one.
    pub async fn pods_of(&self, target: &Target) -> Result<Vec<Meshed>, NoPods> {
        let namespace = &self.namespace;
        let selector = match target.kind {
            Kind::Service => Some(self.selector_of(&target.name).await?),
            _ => None,
        };
        let pods = self.pods(Some(namespace)).await?;
        let mut running = 0;
        let mut found = Vec::new();
        for pod in pods.iter().filter(|pod| pods::is_running(pod)) {
            let is = match (&selector, target.kind) {
                (Some(selector), _) => selector.iter().all(|(key, value)| {
                    let labels = pod.metadata.labels.as_ref();
                    labels.and_then(|labels| labels.get(key)) == Some(value)
                }),
                (None, Kind::Pod) => pod.metadata.name.as_ref() == Some(&target.name),
                (None, _) => pods::owner(pod) == target.to_string(),
            };
            if is {
                running += 1;
                found.extend(pods::meshed(pod));
            }
        }
        let (target, namespace) = (target.clone(), namespace.clone());
        match (running, found.is_empty()) {
            (0, _) => Err(NoPods::None { target, namespace }),
            (_, true) => Err(NoPods::NotMeshed { target, namespace }),
            _ => {
                found.sort_by(|a, b| a.name.cmp(&b.name));
                Ok(found)
            }
        }
    }

    async fn selector_of(&self, name: &str) -> Result<Vec<(String, String)>, Error> {
        let api: Api<Service> = Api::namespaced(self.client.clone(), &self.namespace);
        let service = api
            .get(name)
            .await
            .map_err(Error::api(format!("read Service {name}")))?;
        let selector = service.spec.unwrap_or_default().selector;
        Ok(selector.unwrap_or_default().into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_written_as_for_kubectl() {
        for (given, expected) in [
            ("deploy/cart", "deploy/cart"),
            ("Deployments/cart", "deploy/cart"),
            ("statefulset/db", "sts/db"),
            ("po/cart-1", "pod/cart-1"),
            ("service/cart", "svc/cart"),
        ] {
            let target: Target = given.parse().unwrap();
            assert_eq!(target.to_string(), expected);
        }
        for bad in ["cart", "deploy/", "deploy/a/b", "node/x", "/x"] {
            assert!(bad.parse::<Target>().is_err(), "{bad}");
        }
    }
}
