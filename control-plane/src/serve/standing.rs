//! How this control plane stands among others: alone with its data directory, or one of several
//! replicas in a cluster, one of which leads.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::timeout;
use tracing::warn;
use weft_api::names::LEADER_LEASE;

use super::authenticate::Authenticator;
use super::ca::{self, Authority, CaError};
use super::replicas::Replicas;
use super::{Config, IdentityConfig, roots};
use crate::cluster::election::{Election, Timing};
use crate::cluster::{Cluster, Leadership};

/// How long giving up the Lease may take at the end.
const LEAVE: Duration = Duration::from_secs(5);

/// The authority, and what comes with where it is kept.
pub struct Standing {
    pub authority: Arc<Authority>,
    pub leadership: Leadership,
    /// Of the replicas; none when alone.
    pub cluster: Option<Cluster>,
    election: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
    tasks: Vec<AbortHandle>,
    /// Keeps another control plane off the data directory.
    _lock: Option<std::fs::File>,
}

impl Standing {
    /// Opens the authority; in a cluster, waits until there is one.
    ///
    /// # Errors
    /// The data directory or the options cannot be used.
    pub async fn take(config: &Config, cluster: Option<&Cluster>) -> Result<Self, CaError> {
        let (ca_secret, cluster) = match (&config.identity, cluster) {
            (IdentityConfig::Kubernetes { ca_secret }, Some(cluster)) => {
                (ca_secret.clone(), cluster.clone())
            }
            _ => {
                let authority = Authority::open(&config.data_dir, config.ca.clone())?;
                return Ok(Self {
                    _lock: Some(ca::lock(&config.data_dir)?),
                    authority: Arc::new(authority),
                    leadership: Leadership::always(),
                    cluster: None,
                    election: None,
                    tasks: Vec::new(),
                });
            }
        };
        let timing = Timing::default();
        let (election, leadership) = Election::new(cluster.clone(), LEADER_LEASE, timing);
        let (stop, stopped) = oneshot::channel::<()>();
        let election = tokio::spawn(election.run(async {
            let _ = stopped.await;
        }));
        let options = config.ca.clone();
        let brought = ca_secret.as_deref();
        let authority = Authority::in_cluster(&cluster, &leadership, options, brought).await?;
        let authority = Arc::new(authority);
        let follow = authority.clone().follow(cluster.clone(), ca_secret);
        let publish = roots::publish(cluster.clone(), authority.clone(), leadership.clone());
        Ok(Self {
            tasks: vec![
                tokio::spawn(follow).abort_handle(),
                tokio::spawn(publish).abort_handle(),
            ],
            authority,
            leadership,
            cluster: Some(cluster),
            election: Some((stop, election)),
            _lock: None,
        })
    }

    /// Who says whose a token is.
    pub fn authenticator(&self) -> Authenticator {
        match &self.cluster {
            Some(cluster) => Authenticator::Kubernetes(cluster.clone()),
            None => Authenticator::Own(self.authority.clone()),
        }
    }

    /// Gives up what this replica has, so that another takes it over at once.
    pub async fn leave(&mut self) {
        for task in self.tasks.drain(..) {
            task.abort();
        }
        let Some((stop, election)) = self.election.take() else {
            return;
        };
        drop(stop);
        if timeout(LEAVE, election).await.is_err() {
            warn!("the lease was not given up within {LEAVE:?}; it ends by itself");
        }
    }

    /// Removes this replica's record: its proxies have gone elsewhere.
    pub async fn leave_record(&self) {
        if let Some(cluster) = &self.cluster {
            Replicas::new(cluster.clone()).leave().await;
        }
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}
