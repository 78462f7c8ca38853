//! Kubernetes, watched.
//!
//! One watch per kind ([`watch`]), over our own structs that hold only the fields that are used
//! ([`objects`], [`pod`], [`policies`], [`routes`]); an object becomes its model object at once and is dropped.
//! What stays here of all of them is their names, to see after a new list which are gone.
//!
//! Endpoints are those of EndpointSlices; who an endpoint is (identity, sidecar, weight) is the
//! pod's to say. Kinds arrive in any order: the model holds an endpoint back until its pod is known.
//!
//! To watch another kind: a struct of its fields, `impl Watched` for it (its `Object` in the model
//! included), and a line in [`Kubernetes::run`].
//!
//! The source is synced when every kind has been listed once. A kind whose CRD is missing counts as
//! listed; it is looked for again every [`watch::MISSING`] or so.

mod backoff;
mod meta;
mod objects;
mod pod;
mod policies;
mod routes;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kube::Client;
use kube::config::{KubeConfigOptions, KubeconfigError};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::{Locate, Sink, Update};
use crate::finding::Finding;
use crate::model::{Change, ObjectRef};
use watch::{Report, Watched};

/// Reports that wait to be put together.
const REPORTS: usize = 1024;
/// Changes applied together at most: one hold of the model's lock.
const BATCH: usize = 512;
/// How long connecting to the apiserver may take.
const CONNECT: Duration = Duration::from_secs(5);

/// Which cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// A context of the kubeconfig; without one the current context, and without a kubeconfig the
    /// cluster this runs in.
    pub context: Option<String>,
}

/// Why a cluster cannot be a source.
#[derive(Debug, thiserror::Error)]
pub enum KubernetesError {
    #[error("no way to the cluster: {0}; set KUBECONFIG, or run in a pod with a service account")]
    Infer(#[from] kube::config::InferConfigError),
    #[error("the kubeconfig cannot be used: {0}")]
    Kubeconfig(#[from] KubeconfigError),
    #[error("the client of Kubernetes cannot be made: {0}")]
    Client(#[from] kube::Error),
}

/// A cluster as a source.
pub struct Kubernetes {
    client: Client,
}

/// Objects of a cluster are in no file.
#[derive(Clone, Copy, Debug)]
pub struct NoFiles;

impl Locate for NoFiles {
    fn locate(&self, _: &ObjectRef, _: &[String]) -> Option<(PathBuf, Option<u32>)> {
        None
    }
}

impl Kubernetes {
    /// Finds the cluster; does not talk to it yet.
    ///
    /// # Errors
    /// There is neither a kubeconfig nor a service account, or they make no sense.
    pub async fn open(options: &Options) -> Result<Self, KubernetesError> {
        let mut config = match &options.context {
            Some(context) => {
                let options = KubeConfigOptions {
                    context: Some(context.clone()),
                    ..KubeConfigOptions::default()
                };
                kube::Config::from_kubeconfig(&options).await?
            }
            None => kube::Config::infer().await?,
        };
        config.connect_timeout = Some(CONNECT);
        Ok(Self::with(Client::try_from(config)?))
    }

    /// A source on a client that somebody else made.
    pub fn with(client: Client) -> Self {
        Self { client }
    }

    /// The client, for other uses of the same cluster.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Watches until nobody listens any more.
    pub async fn run(self, sink: Sink) {
        let (reports, received) = mpsc::channel(REPORTS);
        let mut watches = Watches {
            client: self.client,
            reports,
            tasks: JoinSet::new(),
            kinds: BTreeSet::new(),
        };
        watches.start::<objects::Node>();
        watches.start::<objects::Service>();
        watches.start::<objects::EndpointSlice>();
        watches.start::<pod::Pod>();
        watches.start::<policies::TrafficPolicy>();
        watches.start::<policies::PeerAuthentication>();
        watches.start::<policies::Telemetry>();
        watches.start::<policies::ExternalService>();
        watches.start::<policies::EgressPolicy>();
        watches.start::<routes::HTTPRoute>();
        watches.start::<routes::GRPCRoute>();
        watches.start::<routes::TLSRoute>();
        watches.start::<routes::TCPRoute>();
        watches.start::<routes::XBackendTrafficPolicy>();
        let Watches {
            reports,
            kinds,
            tasks: _tasks,
            ..
        } = watches;
        drop(reports);
        assemble(received, kinds, sink).await;
    }
}

/// The watches of a source; they end with it.
struct Watches {
    client: Client,
    reports: mpsc::Sender<Report>,
    tasks: JoinSet<()>,
    kinds: BTreeSet<&'static str>,
}

impl Watches {
    /// Watches a kind: what there is of it is converted and reported.
    fn start<K: Watched>(&mut self) {
        self.kinds.insert(K::PLURAL);
        let watch = watch::run::<K>(self.client.clone(), self.reports.clone());
        self.tasks.spawn(watch);
    }
}

/// Puts together what the watches report.
async fn assemble(
    mut reports: mpsc::Receiver<Report>,
    mut unlisted: BTreeSet<&'static str>,
    sink: Sink,
) {
    let mut findings = Findings::default();
    let mut synced = false;
    let mut batch = Vec::new();
    let mut objects = 0;
    loop {
        let received = tokio::select! {
            received = reports.recv_many(&mut batch, BATCH) => received,
            () = sink.closed() => return,
        };
        if received == 0 {
            return;
        }
        let mut changes = Vec::with_capacity(batch.len());
        let mut first: Option<Instant> = None;
        for report in batch.drain(..) {
            match report {
                Report::Change { change, seen } => {
                    findings.settle(&change);
                    changes.push(change);
                    first = first.or(Some(seen));
                }
                Report::Unreadable {
                    object,
                    unreadable,
                    wrong,
                } => {
                    findings.unreadable(object.clone(), wrong);
                    changes.push(Change::Unreadable { object, unreadable });
                }
                Report::Trouble { kind, finding } => findings.trouble(kind, finding),
                Report::Listed { kind } => {
                    unlisted.remove(kind);
                }
            }
        }
        objects += changes.len();
        let seen = first.unwrap_or_else(Instant::now);
        if !changes.is_empty() && sink.send(Update::Changes { changes, seen }).await.is_err() {
            return;
        }
        if let Some(findings) = findings.changed()
            && sink.send(Update::Findings(findings)).await.is_err()
        {
            return;
        }
        if !synced && unlisted.is_empty() {
            synced = true;
            info!(objects, "the cluster has been read");
            if sink.send(Update::Synced).await.is_err() {
                return;
            }
        }
    }
}

/// What cannot be read now.
#[derive(Default)]
struct Findings {
    objects: BTreeMap<ObjectRef, Vec<Finding>>,
    kinds: BTreeMap<&'static str, Finding>,
    changed: bool,
}

impl Findings {
    /// An object can be read again, or is gone.
    fn settle(&mut self, change: &Change) {
        if self.objects.is_empty() {
            return;
        }
        let reference = match change {
            Change::Set(object) => object.reference(),
            Change::Remove(reference) => reference.clone(),
            Change::Generation { .. } | Change::Unreadable { .. } => return,
        };
        self.changed |= self.objects.remove(&reference).is_some();
    }

    fn unreadable(&mut self, object: ObjectRef, wrong: Vec<Finding>) {
        if self.objects.get(&object) == Some(&wrong) {
            return;
        }
        for finding in &wrong {
            warn!("{finding}");
        }
        self.objects.insert(object, wrong);
        self.changed = true;
    }

    fn trouble(&mut self, kind: &'static str, finding: Option<Finding>) {
        if self.kinds.get(kind) == finding.as_ref() {
            return;
        }
        match finding {
            Some(finding) => {
                warn!("{finding}");
                self.kinds.insert(kind, finding);
            }
            None => {
                self.kinds.remove(kind);
                info!(kind, "watched again");
            }
        }
        self.changed = true;
    }

    /// All of them, if they are not the same as last time.
    fn changed(&mut self) -> Option<Vec<Finding>> {
        std::mem::take(&mut self.changed).then(|| {
            let objects = self.objects.values().flatten();
            let mut all: Vec<Finding> = objects.chain(self.kinds.values()).cloned().collect();
            all.sort();
            all
        })
    }
}

#[cfg(test)]
mod tests;
