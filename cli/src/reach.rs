//! Whom a command asks: an admin port that is named, or those of a cluster.

use clap::Args;
use weft_api::names;

use crate::admin::{self, Admin};
use crate::kube::{self, Cluster, KubeArgs};

/// The flag that names a control plane.
#[derive(Debug, Clone, Default, Args)]
pub struct ControlPlaneUrl {
    /// Admin address of a control plane, without a cluster [default: the cluster of the kubeconfig;
    /// without one http://127.0.0.1:15014]
    #[arg(
        long,
        alias = "control-plane-admin",
        value_name = "URL",
        env = "WEFT_CONTROL_PLANE_ADMIN"
    )]
    control_plane: Option<String>,
}

impl ControlPlaneUrl {
    /// The control plane, if the user names it.
    ///
    /// # Errors
    /// It is no address.
    pub fn admin(&self) -> Result<Option<Admin>, admin::Error> {
        self.control_plane.as_deref().map(Admin::new).transpose()
    }
}

/// Flags of commands about the control plane.
#[derive(Debug, Clone, Default, Args)]
pub struct ControlPlaneArgs {
    #[command(flatten)]
    named: ControlPlaneUrl,
    #[command(flatten)]
    pub kube: KubeArgs,
}

/// Flags of commands about one proxy or several.
#[derive(Debug, Clone, Default, Args)]
pub struct ProxyArgs {
    /// Admin address of a proxy, without a cluster [default: the cluster of the kubeconfig; without
    /// one http://127.0.0.1:15020]
    #[arg(
        long,
        alias = "proxy-admin",
        value_name = "URL",
        env = "WEFT_PROXY_ADMIN"
    )]
    proxy: Option<String>,
    #[command(flatten)]
    pub kube: KubeArgs,
}

/// Where the answers come from.
pub enum Reach {
    Direct(Admin),
    Cluster(Cluster),
}

/// Why nobody can be asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Admin(#[from] admin::Error),
    #[error(transparent)]
    Cluster(#[from] kube::Error),
}

impl ControlPlaneArgs {
    pub async fn reach(&self) -> Result<Reach, Error> {
        reach(
            self.named.control_plane.as_deref(),
            &self.kube,
            names::CONTROL_ADMIN_PORT,
        )
        .await
    }
}

impl ProxyArgs {
    pub async fn reach(&self) -> Result<Reach, Error> {
        reach(self.proxy.as_deref(), &self.kube, names::ADMIN_PORT).await
    }
}

async fn reach(url: Option<&str>, kube: &KubeArgs, port: u16) -> Result<Reach, Error> {
    match url {
        Some(url) => Ok(Reach::Direct(Admin::new(url)?)),
        None if kube.is_there() => Ok(Reach::Cluster(kube.connect().await?)),
        None => Ok(Reach::Direct(Admin::new(&format!("127.0.0.1:{port}"))?)),
    }
}
