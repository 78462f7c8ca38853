//! A cluster, through its apiserver and with the user's own kubeconfig: what the user may do is what
//! these commands can do, and no port is opened to the world.
//!
//! - [`KubeArgs`]: the flags; [`Cluster`]: the client, and the namespaces that are meant.
//! - [`forward`]: a connection to a pod's port (`pods/portforward`); [`crate::admin::Admin`] speaks
//!   HTTP over it.
//! - [`pods`]: which pods have a proxy, and which workload they belong to.
//! - [`target`]: "deploy/x", "pod/x" and the like.

pub mod forward;
pub mod pods;
pub mod target;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use weft_api::names;

use crate::admin::Admin;

/// Name of the control plane's Deployment.
pub const CONTROL_PLANE: &str = names::CONTROL_PLANE;
/// Namespace it is installed in.
pub const SYSTEM: &str = names::CONTROL_PLANE_NAMESPACE;
/// What the apiserver may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// Which cluster, and what of it.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Cluster")]
pub struct KubeArgs {
    /// Kubeconfig file [default: $KUBECONFIG, else ~/.kube/config]
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig [default: its current one]
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
    /// Namespace [default: the context's]
    #[arg(long, short)]
    pub namespace: Option<String>,
    /// All namespaces
    #[arg(long, short = 'A', conflicts_with = "namespace")]
    pub all_namespaces: bool,
}

/// Why the cluster could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    // kube's errors say what is beneath them themselves, so they are no sources here.
    #[error("the kubeconfig cannot be used: {0}")]
    Kubeconfig(Box<kube::config::KubeconfigError>),
    #[error("the cluster's own configuration cannot be used: {0}")]
    InCluster(Box<kube::config::InClusterError>),
    #[error("cannot {what}: {}", explain(.error))]
    Api {
        what: String,
        error: Box<kube::Error>,
    },
    #[error(
        "there is no control plane: Deployment {SYSTEM}/{CONTROL_PLANE} does not exist; \
         `weft install` says how to install it"
    )]
    NotInstalled,
    #[error("the control plane has no pod that runs; see kubectl -n {SYSTEM} get pods")]
    NoReplica,
}

impl Error {
    /// `what`: "list pods in shop".
    pub fn api(what: impl Into<String>) -> impl FnOnce(kube::Error) -> Self {
        let what = what.into();
        |error| Self::Api {
            what,
            error: Box::new(error),
        }
    }

    /// The apiserver said that the user may not.
    pub fn is_forbidden(&self) -> bool {
        matches!(self, Self::Api { error, .. }
            if matches!(&**error, kube::Error::Api(status) if status.code == 403))
    }
}

impl From<kube::config::KubeconfigError> for Error {
    fn from(error: kube::config::KubeconfigError) -> Self {
        Self::Kubeconfig(Box::new(error))
    }
}

impl From<kube::config::InClusterError> for Error {
    fn from(error: kube::config::InClusterError) -> Self {
        Self::InCluster(Box::new(error))
    }
}

/// The apiserver's own sentence, where there is one.
pub fn explain(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        kube::Error::Service(error) => {
            let mut text = error.to_string();
            let mut source = error.source();
            while let Some(error) = source {
                text = error.to_string();
                source = error.source();
            }
            format!("the apiserver cannot be reached: {text}")
        }
        other => other.to_string(),
    }
}

impl KubeArgs {
    /// Whether there is a cluster to speak to: named by a flag, or by a kubeconfig in its usual
    /// place, or because this runs in one.
    pub fn is_there(&self) -> bool {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        self.kubeconfig.is_some()
            || self.context.is_some()
            || set("KUBECONFIG")
            || set("KUBERNETES_SERVICE_HOST")
            || std::env::home_dir().is_some_and(|home| home.join(".kube/config").is_file())
    }

    pub async fn connect(&self) -> Result<Cluster, Error> {
        let options = KubeConfigOptions {
            context: self.context.clone(),
            ..KubeConfigOptions::default()
        };
        let mut config = match &self.kubeconfig {
            Some(path) => {
                let kubeconfig = Kubeconfig::read_from(path)?;
                Config::from_custom_kubeconfig(kubeconfig, &options).await?
            }
            None => match Config::from_kubeconfig(&options).await {
                Ok(config) => config,
                Err(_) if std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() => {
                    Config::incluster()?
                }
                Err(error) => return Err(error.into()),
            },
        };
        config.connect_timeout = Some(ANSWER);
        // A tap listens for as long as the user does.
        config.read_timeout = None;
        let own = config.default_namespace.clone();
        let client = Client::try_from(config).map_err(Error::api("make a client"))?;
        Ok(Cluster {
            client,
            namespace: self.namespace.clone().unwrap_or(own),
            given: self.namespace.is_some(),
            all: self.all_namespaces,
        })
    }
}

/// A cluster, and the namespaces that are meant.
#[derive(Clone)]
pub struct Cluster {
    pub client: Client,
    /// The one that names without one are of.
    pub namespace: String,
    /// Whether the user named it.
    given: bool,
    all: bool,
}

impl Cluster {
    /// The namespace to look in; `None` is all of them.
    pub fn scope(&self) -> Option<&str> {
        (!self.all).then_some(&*self.namespace)
    }

    /// The same for commands about the whole mesh: all namespaces unless one is named.
    pub fn wide_scope(&self) -> Option<&str> {
        (self.given && !self.all).then_some(&*self.namespace)
    }

    /// An admin port of a pod.
    pub fn admin(&self, namespace: &str, pod: &str, port: u16) -> Admin {
        Admin::pod(self.client.clone(), namespace, pod, port)
    }

    /// The admin port of the proxy in a pod.
    pub fn proxy(&self, pod: &pods::Meshed) -> Admin {
        self.admin(&pod.namespace, &pod.name, pod.admin_port)
    }

    /// The control plane's Deployment.
    pub async fn control_plane(&self) -> Result<Deployment, Error> {
        let api: Api<Deployment> = Api::namespaced(self.client.clone(), SYSTEM);
        api.get_opt(CONTROL_PLANE)
            .await
            .map_err(Error::api(format!(
                "read Deployment {SYSTEM}/{CONTROL_PLANE}"
            )))?
            .ok_or(Error::NotInstalled)
    }

    /// The control plane's pods that run, with their admin ports.
    pub async fn replicas(&self) -> Result<Vec<Replica>, Error> {
        let deployment = self.control_plane().await?;
        let labels = deployment.spec.unwrap_or_default().selector.match_labels;
        let labels = labels.unwrap_or_default();
        let selector: Vec<String> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
        let api: Api<Pod> = Api::namespaced(self.client.clone(), SYSTEM);
        let pods = api
            .list(&ListParams::default().labels(&selector.join(",")))
            .await
            .map_err(Error::api(format!("list pods in {SYSTEM}")))?;
        let mut replicas: Vec<Replica> = pods
            .items
            .iter()
            .filter(|pod| pods::is_running(pod) && pod.metadata.deletion_timestamp.is_none())
            .filter_map(|pod| pod.metadata.name.clone())
            .map(|name| Replica {
                admin: self.admin(SYSTEM, &name, names::CONTROL_ADMIN_PORT),
                name,
            })
            .collect();
        replicas.sort_by(|a, b| a.name.cmp(&b.name));
        if replicas.is_empty() {
            return Err(Error::NoReplica);
        }
        Ok(replicas)
    }
}

/// One pod of the control plane.
#[derive(Debug, Clone)]
pub struct Replica {
    pub name: String,
    pub admin: Admin,
}

#[cfg(test)]
mod tests;
