//! What others reach the control plane by.
//!
//! - [`discovery`] and [`identity`]: gRPC over TLS on one port ([`listener`], [`tls`]).
//! - [`authenticate`]: who a workload is, before it has a certificate.
//! - [`ca`]: the certificate authority behind it; [`certificates`] keeps it going.
//! - [`standing`]: alone, or one of several replicas, which tell each other by [`replicas`]; the
//!   leader publishes [`roots`] and writes what became of routes and policies ([`statuses`]).
//! - [`admin`]: health, metrics, status on another port.
//! - [`webhook`]: puts sidecars into pods; on Kubernetes, on a port of its own.
//!
//! [`Server::bind`] opens the ports, so that a caller knows them; [`Server::run`] serves.

pub mod admin;
pub mod authenticate;
pub mod ca;
pub mod certificates;
pub mod discovery;
pub mod identity;
pub mod listener;
pub mod metrics;
pub mod replicas;
mod roots;
mod services;
mod standing;
mod statuses;
pub mod tls;
pub mod webhook;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tracing::{info, warn};
use weft_api::proto::discovery_server::DiscoveryServer;
use weft_api::proto::identity_server::IdentityServer;

use self::admin::Admin;
use self::ca::{Authority, CaError};
use self::certificates::{Keeper, OwnLife};
use self::discovery::{DiscoveryService, Hub};
use self::identity::IdentityService;
use self::metrics::Metrics;
use self::services::Services;
use self::standing::Standing;
use self::tls::TlsError;
use self::webhook::Webhook;
use crate::cluster::{Cluster, ClusterError};
use crate::compile::Settings;
use crate::sources::folder::{Folder, FolderError};
use crate::sources::kubernetes::{self, Kubernetes, KubernetesError};
use crate::sources::{Source, Update};

/// Updates that wait to be applied; the source waits when there are more.
const UPDATES: usize = 64;
/// Connections through their handshake that wait for the gRPC server.
const CONNECTIONS: usize = 64;
/// A silent proxy is asked whether it is still there, and let go when it does not answer.
const KEEPALIVE: Duration = Duration::from_secs(15);
const KEEPALIVE_ANSWER: Duration = Duration::from_secs(10);
/// Streams end within this at shutdown.
const SHUTDOWN: Duration = Duration::from_secs(5);
/// A replica that ends goes on serving for this long: until kube-proxy everywhere has heard that it
/// takes nobody new.
const SETTLE: Duration = Duration::from_secs(3);
/// Then its streams are ended one after another, within this and at this many a second or more.
const SPREAD: Duration = Duration::from_secs(10);
const SPREAD_RATE: u32 = 100;

/// How a control plane runs.
#[derive(Clone, Debug)]
pub struct Config {
    pub source: SourceConfig,
    pub data_dir: PathBuf,
    /// Discovery and identity.
    pub listen: SocketAddr,
    pub admin: SocketAddr,
    pub ca: ca::Options,
    pub identity: IdentityConfig,
    /// Percent of the requests that are traced when no Telemetry says otherwise.
    pub sampling_percent: f64,
    /// Sidecars are put into pods; none: they are not.
    pub webhook: Option<webhook::Config>,
}

/// Where the certificate authority is kept, and by what a workload shows who it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum IdentityConfig {
    /// Files of the data directory; tokens of our own.
    #[default]
    Folder,
    /// A Secret; service account tokens, which the apiserver reviews.
    Kubernetes {
        /// Secret with a certificate authority of the user's (tls.crt, tls.key, ca.crt); without
        /// it, our own is made.
        ca_secret: Option<String>,
    },
}

/// Where the world comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceConfig {
    /// A folder of manifests.
    Folder(PathBuf),
    /// A cluster.
    Kubernetes(kubernetes::Options),
}

/// Why a control plane does not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Folder(#[from] FolderError),
    #[error(transparent)]
    Kubernetes(#[from] KubernetesError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("cannot listen on {0}: {1}; is another program using it?")]
    Listen(SocketAddr, #[source] io::Error),
    #[error("serving: {0}")]
    Serve(#[from] tonic::transport::Error),
    #[error("the source has ended")]
    SourceEnded,
}

/// A control plane with its ports open.
pub struct Server {
    listener: TcpListener,
    admin_listener: TcpListener,
    source: Source,
    standing: Standing,
    webhook: Option<Webhook>,
    sampling_percent: f64,
}

impl Server {
    /// Opens everything that can fail.
    ///
    /// # Errors
    /// The source or the data directory cannot be used, or a port is taken.
    pub async fn bind(config: Config) -> Result<Self, ServeError> {
        // The one client of the cluster, shared by all that speak to it.
        let in_cluster = matches!(config.identity, IdentityConfig::Kubernetes { .. });
        let cluster = if in_cluster {
            Some(Cluster::connect().await?)
        } else {
            None
        };
        let standing = Standing::take(&config, cluster.as_ref()).await?;
        let source = match &config.source {
            SourceConfig::Folder(path) => Source::Folder(Folder::open(path)?),
            SourceConfig::Kubernetes(options) => {
                Source::Kubernetes(Kubernetes::open(options).await?)
            }
        };
        let bind = async |address| {
            TcpListener::bind(address)
                .await
                .map_err(|error| ServeError::Listen(address, error))
        };
        Ok(Self {
            listener: bind(config.listen).await?,
            admin_listener: bind(config.admin).await?,
            source,
            standing,
            webhook: match config.webhook {
                Some(config) => Some(Webhook::bind(config, cluster.as_ref()).await?),
                None => None,
            },
            sampling_percent: config.sampling_percent,
        })
    }

    /// Where discovery and identity are served.
    ///
    /// # Errors
    /// The operating system does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Where the admin port is.
    ///
    /// # Errors
    /// The operating system does not say.
    pub fn admin_address(&self) -> io::Result<SocketAddr> {
        self.admin_listener.local_addr()
    }

    /// Where the webhook is; none when there is none.
    ///
    /// # Errors
    /// The operating system does not say.
    pub fn webhook_address(&self) -> io::Result<Option<SocketAddr>> {
        self.webhook.as_ref().map(Webhook::address).transpose()
    }

    pub fn authority(&self) -> Arc<Authority> {
        self.standing.authority.clone()
    }

    /// Serves until `shutdown`; then ends streams politely.
    ///
    /// # Errors
    /// The source ends, or serving fails.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
        let Self {
            listener,
            admin_listener,
            source,
            mut standing,
            webhook,
            sampling_percent,
        } = self;
        let authority = standing.authority.clone();
        let life = Arc::new(OwnLife::default());
        let metrics = Arc::new(Metrics::default());
        let settings = Settings {
            trust_domain: authority.trust_domain().to_owned(),
            sampling_percent,
        };
        let hub = Arc::new(Hub::new(settings, authority.trust(), metrics.clone()));
        let admin = Arc::new(Admin {
            hub: hub.clone(),
            authority: authority.clone(),
            metrics: metrics.clone(),
            locator: source.locator(),
            life: life.clone(),
            leadership: standing.leadership.clone(),
            findings: std::sync::Mutex::default(),
            ready: AtomicBool::new(false),
        });
        let tasks = Tasks(vec![
            tokio::spawn(admin::serve(admin_listener, admin.clone())).abort_handle(),
        ]);
        let (sink, mut updates) = mpsc::channel(UPDATES);
        let cluster = match &source {
            Source::Kubernetes(cluster) => Some(cluster.client()),
            Source::Folder(_) => None,
        };
        let mut source = tokio::spawn(source.run(sink));
        // Nothing is served before everything is known: a proxy that comes back after a restart
        // must not be told that what it uses is gone.
        tokio::pin!(shutdown);
        loop {
            let update = tokio::select! {
                update = updates.recv() => update.ok_or(ServeError::SourceEnded)?,
                () = &mut shutdown => return Ok(()),
            };
            if take(&hub, &admin, update) {
                break;
            }
        }
        let keeper = Keeper::start(
            hub.clone(),
            authority.clone(),
            standing.leadership.clone(),
            life,
            standing.cluster.clone(),
        )
        .await?;
        let tls = keeper.tls();
        let (accepted, connections) = mpsc::channel(CONNECTIONS);
        let trust_domain: Arc<str> = authority.trust_domain().into();
        let _tasks = tasks
            .and(tokio::spawn(listener::accept(
                listener,
                tls,
                trust_domain,
                accepted,
            )))
            .and(tokio::spawn(keeper.run()))
            .and(tokio::spawn({
                let (hub, admin) = (hub.clone(), admin.clone());
                async move {
                    while let Some(update) = updates.recv().await {
                        take(&hub, &admin, update);
                    }
                }
            }));
        let _statuses = cluster.map(|client| {
            let keep = statuses::keep(client, hub.clone(), standing.leadership.clone());
            Tasks(vec![tokio::spawn(keep).abort_handle()])
        });
        let webhook = match webhook {
            None => None,
            Some(webhook) => {
                let (tasks, injector) = webhook.start(&standing, metrics.clone())?;
                Some((Tasks(tasks), injector))
            }
        };
        admin.ready.store(true, Ordering::Relaxed);
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let serving = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE_ANSWER))
            .serve_with_incoming_shutdown(
                Services {
                    discovery: DiscoveryServer::new(DiscoveryService { hub: hub.clone() }),
                    identity: IdentityServer::new(IdentityService {
                        authenticator: standing.authenticator(),
                        authority,
                        metrics,
                    }),
                },
                ReceiverStream::new(connections),
                async {
                    // Dropped or sent, both mean the end.
                    let _ = stopped.await;
                },
            );
        tokio::pin!(serving);
        tokio::select! {
            done = &mut serving => return Ok(done?),
            _ = &mut source => return Err(ServeError::SourceEnded),
            () = &mut shutdown => info!("ending"),
        }
        admin.ready.store(false, Ordering::Relaxed);
        if let Some((_, injector)) = &webhook {
            injector.end();
        }
        let reason = "the control plane is ending; connect again";
        // Others can lead from now on.
        standing.leave().await;
        if standing.cluster.is_some() {
            // Served until it is known everywhere that this replica takes nobody new; then its
            // proxies are sent elsewhere, not all at once.
            let moving = async {
                sleep(SETTLE).await;
                hub.end_spread(SPREAD, SPREAD_RATE, reason).await;
            };
            tokio::select! {
                done = &mut serving => return Ok(done?),
                () = moving => {}
            }
            standing.leave_record().await;
        }
        hub.end_all(reason);
        drop(stop);
        if timeout(SHUTDOWN, serving).await.is_err() {
            warn!("some streams did not end within {SHUTDOWN:?}");
        }
        source.abort();
        Ok(())
    }
}

/// Tasks that end with their owner.
struct Tasks(Vec<tokio::task::AbortHandle>);

impl Tasks {
    fn and(mut self, task: tokio::task::JoinHandle<()>) -> Self {
        self.0.push(task.abort_handle());
        self
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

/// Takes an update; true when the source has reported everything.
fn take(hub: &Hub, admin: &Admin, update: Update) -> bool {
    match update {
        Update::Changes { changes, seen } => hub.apply(changes, seen),
        Update::Findings(findings) => {
            *admin
                .findings
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = findings;
        }
        Update::Synced => return true,
    }
    false
}
