//! The Kubernetes cluster the control plane stands in: one client, shared by all that speak to the
//! apiserver, and who of the replicas may write.
//!
//! - [`Cluster`]: the client, the names of this replica, and the owner of all it makes.
//! - [`Leadership`]: whether this replica is the leader; the leader alone writes.
//! - [`election`]: how it becomes that, by a Lease; [`lease`] is the state machine of it.
//! - [`version`]: which Kubernetes sidecars have to suit.

pub mod election;
mod leadership;
mod lease;
pub mod version;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use k8s_openapi::api::rbac::v1::ClusterRole;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::core::PartialObjectMeta;
use kube::{Api, Client, ResourceExt};
use tracing::debug;
use weft_api::names::{
    CONTROL_PLANE_NAMESPACE, CONTROL_PLANE_SERVICE_ACCOUNT, MANAGED_BY, MANAGED_BY_LABEL,
};

pub use leadership::Leadership;

/// Annotation with which Helm says where the release of an object is.
const RELEASE_NAMESPACE: &str = "meta.helm.sh/release-namespace";
/// How long the apiserver may take to answer a request that is not a watch.
pub const ANSWER: Duration = Duration::from_secs(5);

/// Why the cluster cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error(
        "no way to the apiserver is known: {0}; run in a pod, or set KUBECONFIG to a file that says where it is"
    )]
    Config(String),
    #[error("the apiserver cannot be used to {doing}: {}", reason(.source))]
    Api {
        /// "read the Secret weft-system/weft-ca".
        doing: String,
        #[source]
        source: Box<kube::Error>,
    },
    #[error("the apiserver did not answer within {} s when asked to {doing}", ANSWER.as_secs())]
    Timeout { doing: String },
}

impl ClusterError {
    /// Whether the apiserver answered, and this is what it said.
    pub fn status(&self) -> Option<&kube::core::Status> {
        match self {
            Self::Api { source, .. } => match source.as_ref() {
                kube::Error::Api(status) => Some(status),
                _ => None,
            },
            Self::Config(_) | Self::Timeout { .. } => None,
        }
    }

    /// Somebody else changed or made the object meanwhile.
    pub fn is_conflict(&self) -> bool {
        self.status().is_some_and(|status| status.code == 409)
    }

    pub fn is_not_found(&self) -> bool {
        self.status().is_some_and(|status| status.code == 404)
    }
}

/// What went wrong, without the layers it came through.
fn reason(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if status.code == 403 => {
            format!(
                "it is not allowed ({}); give the right to this service account",
                status.message
            )
        }
        kube::Error::Api(status) => status.message.clone(),
        other => {
            let mut said = other.to_string();
            let mut source = std::error::Error::source(other);
            while let Some(error) = source {
                let text = error.to_string();
                if !said.contains(&text) {
                    said = format!("{said}: {text}");
                }
                source = error.source();
            }
            said
        }
    }
}

/// The cluster, and who this replica is in it. Cheap to clone.
#[derive(Clone)]
pub struct Cluster {
    pub client: Client,
    /// Namespace of the control plane, and of what it keeps: `POD_NAMESPACE`.
    pub namespace: String,
    /// Name of this replica, unique among them: `POD_NAME`; outside a pod host and process.
    pub replica: String,
    /// All that is made here goes when this goes: the ClusterRole of the chart.
    owner: Arc<ArcSwapOption<OwnerReference>>,
}

impl Cluster {
    /// By the service account of the pod, or by `KUBECONFIG`.
    ///
    /// # Errors
    /// There is neither, or the apiserver does not answer.
    pub async fn connect() -> Result<Self, ClusterError> {
        let config = |error: &dyn std::fmt::Display| ClusterError::Config(error.to_string());
        let client = Client::try_default()
            .await
            .map_err(|error| config(&reason(&error)))?;
        let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let namespace = set("POD_NAMESPACE").unwrap_or_else(|| CONTROL_PLANE_NAMESPACE.to_owned());
        let replica = set("POD_NAME").unwrap_or_else(|| {
            let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            let host = host.trim().to_lowercase().replace('_', "-");
            format!("{host}-{}", std::process::id())
        });
        Self::new(client, namespace, replica).await
    }

    /// With a client made elsewhere; looks up the owner.
    ///
    /// # Errors
    /// The apiserver does not answer.
    pub async fn new(
        client: Client,
        namespace: String,
        replica: String,
    ) -> Result<Self, ClusterError> {
        let cluster = Self {
            client,
            namespace,
            replica,
            owner: Arc::default(),
        };
        cluster.look_up_owner().await?;
        if cluster.owner.load().is_none() {
            debug!(
                "there is no ClusterRole {CONTROL_PLANE_SERVICE_ACCOUNT} of this installation: what is made in the cluster has no owner and stays when the control plane is removed"
            );
        }
        Ok(cluster)
    }

    /// Reads who owns what is made here. Again when something of ours was deleted: perhaps because
    /// its owner was, and there is a new one (the chart was removed and installed anew).
    ///
    /// # Errors
    /// The apiserver does not answer.
    pub async fn look_up_owner(&self) -> Result<(), ClusterError> {
        let name = CONTROL_PLANE_SERVICE_ACCOUNT;
        let roles = Api::<ClusterRole>::all(self.client.clone());
        let doing = || format!("read the ClusterRole {name}");
        let role = match answer(doing(), roles.get_metadata_opt(name)).await {
            Ok(role) => role,
            // Installed by hand with fewer rights: what is made has no owner.
            Err(error) if error.status().is_some_and(|status| status.code == 403) => None,
            Err(error) => return Err(error),
        };
        // Of a chart in another namespace: not ours, and what it owns goes when it goes.
        let ours = |role: &PartialObjectMeta<ClusterRole>| {
            let release = role.annotations().get(RELEASE_NAMESPACE);
            release.is_none_or(|release| *release == self.namespace)
        };
        let owner = role.filter(ours).and_then(|role| {
            Some(Arc::new(OwnerReference {
                api_version: "rbac.authorization.k8s.io/v1".to_owned(),
                kind: "ClusterRole".to_owned(),
                name: name.to_owned(),
                uid: role.metadata.uid?,
                ..OwnerReference::default()
            }))
        });
        self.owner.store(owner);
        Ok(())
    }

    /// Metadata of an object this control plane makes: its label and its owner, so that removing
    /// the chart removes it.
    pub fn meta(&self, name: &str) -> ObjectMeta {
        ObjectMeta {
            name: Some(name.to_owned()),
            labels: Some([(MANAGED_BY_LABEL.to_owned(), MANAGED_BY.to_owned())].into()),
            owner_references: self
                .owner
                .load_full()
                .map(|owner| vec![OwnerReference::clone(&owner)]),
            ..ObjectMeta::default()
        }
    }

    /// Objects of the control plane's own namespace.
    pub fn own<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }
}

/// Waits for the apiserver, for a bounded time.
///
/// # Errors
/// It does not answer, or answers with an error.
pub async fn answer<T>(
    doing: String,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, ClusterError> {
    match tokio::time::timeout(ANSWER, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(source)) => Err(ClusterError::Api {
            doing,
            source: Box::new(source),
        }),
        Err(_) => Err(ClusterError::Timeout { doing }),
    }
}
