//! One kind, watched for as long as the source lives.
//!
//! kube's watcher lists, watches, and watches on where a connection ended; here is what it leaves
//! to its user: waiting longer and longer between failures, choosing how to list, telling after a
//! new list what is gone, and saying what is wrong in words.

use std::collections::HashSet;
use std::fmt::Debug;
use std::future::Future;
use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt};
use kube::core::{Resource, Status};
use kube::runtime::watcher::{self, Config, Event, watcher};
use kube::{Api, Client};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::{debug, info};

use super::backoff::{Backoff, jitter};
use super::meta;
use crate::finding::{Finding, Severity};
use crate::model::{Change, Kind, Name, Object, ObjectRef, ParentRef, Unreadable};
use crate::sources::gateway;

/// Wait after the first failure, and the longest.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(15);
/// How often a kind that the cluster does not know is looked for.
pub(super) const MISSING: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 10_000 });
/// What a kind said before it became unknown is forgotten after this: an apiserver that starts may
/// not know of its CRDs yet.
const FORGET: Duration = Duration::from_secs(60);
/// The apiserver ends a watch after this, seconds; a connection that is dead without a word is
/// noticed 5 s later.
const WATCH_SECONDS: u32 = 120;
/// A streamed list on which nothing comes for this long is asked for page by page instead.
const STREAMED_LIST: Duration = Duration::from_secs(10);
/// What is said of an object that cannot be read, bytes: it may quote the object, and goes into its
/// status.
const MAX_SENTENCE: usize = 2_000;
/// Objects of a page.
const PAGE: u32 = 500;

/// A kind of object that is watched in all namespaces.
pub(super) trait Watched:
    Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static
{
    /// What it is in the model.
    const KIND: Kind;
    /// Its name in URLs and RBAC.
    const PLURAL: &'static str;
    /// Whether a cluster may do without (a CRD).
    const OPTIONAL: bool = false;
    /// Whether people ask if a change to it has arrived, by its `metadata.generation`.
    const GENERATIONS: bool = false;

    /// The object as the model has it; `None` when for the mesh it is not there.
    ///
    /// # Errors
    /// What in it cannot be honoured; the last good one stands.
    fn into_model(self) -> Result<Option<Object>, Vec<Wrong>>;

    /// What it names as its targets or parents, as far as that can be read.
    fn names(&self) -> Vec<ParentRef> {
        Vec::new()
    }
}

/// What in an object cannot be honoured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wrong {
    pub(super) message: String,
    pub(super) help: String,
}

/// What a watch has to say.
#[derive(Debug)]
pub(super) enum Report {
    Change {
        change: Change,
        /// When it arrived.
        seen: Instant,
    },
    /// An object that cannot be used; what it said before stands.
    Unreadable {
        object: ObjectRef,
        unreadable: Box<Unreadable>,
        wrong: Vec<Finding>,
    },
    /// The kind cannot be watched now, or can again.
    Trouble {
        kind: &'static str,
        finding: Option<Finding>,
    },
    /// Everything there was at the start has been reported.
    Listed { kind: &'static str },
}

/// Nobody listens any more.
struct Closed;

/// Watches a kind until nobody listens.
pub(super) async fn run<K: Watched>(client: Client, reports: mpsc::Sender<Report>) {
    let api = Api::<K>::all(client);
    let mut watch = Watch::<K> {
        reports,
        known: HashSet::new(),
        listing: None,
        in_trouble: false,
        missing_since: None,
        kind: std::marker::PhantomData,
    };
    let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
    let mut streamed = true;
    while let Ok(end) = watch.follow(&api, streamed, &mut backoff).await {
        match end {
            End::List => streamed = false,
            End::Again => {}
        }
    }
}

/// Why a stream is not followed any further.
enum End {
    /// Lists cannot be streamed: ask for them page by page.
    List,
    /// Begin anew with a list.
    Again,
}

struct Watch<K> {
    reports: mpsc::Sender<Report>,
    /// Objects that there are, readable or not.
    known: HashSet<Name>,
    /// Those seen so far of the list under way.
    listing: Option<HashSet<Name>>,
    in_trouble: bool,
    missing_since: Option<Instant>,
    kind: std::marker::PhantomData<fn() -> K>,
}

impl<K: Watched> Watch<K> {
    async fn follow(
        &mut self,
        api: &Api<K>,
        streamed: bool,
        backoff: &mut Backoff,
    ) -> Result<End, Closed> {
        let config = Config::default().timeout(WATCH_SECONDS);
        let config = if streamed {
            config.streaming_lists()
        } else {
            config.page_size(PAGE)
        };
        let mut stream = std::pin::pin!(watcher(api.clone(), config));
        loop {
            let Some(next) = self.next(&mut stream, streamed).await else {
                info!(
                    kind = K::PLURAL,
                    "the apiserver does not stream its list; listing page by page"
                );
                return Ok(End::List);
            };
            match next {
                Ok(event) => {
                    self.take(event).await?;
                    if self.listing.is_none() {
                        backoff.reset();
                    }
                }
                Err(error) => {
                    let status = status(&error);
                    let code = status.map_or(0, |status| status.code);
                    if streamed && matches!(code, 400 | 422) {
                        info!(
                            kind = K::PLURAL,
                            "the apiserver streams no lists; listing page by page"
                        );
                        return Ok(End::List);
                    }
                    let wait = if K::OPTIONAL && code == 404 {
                        self.missing().await?;
                        jitter(MISSING)
                    } else {
                        self.failed(&error, status).await?;
                        backoff.wait()
                    };
                    self.pause(wait).await?;
                    // kube would ask to go on from the same version for ever.
                    if code == 410 {
                        return Ok(End::Again);
                    }
                }
            }
        }
    }

    /// The stream's next event; `None` when a streamed list does not come.
    async fn next<S>(&self, stream: &mut S, streamed: bool) -> Option<S::Item>
    where
        S: Stream + Unpin,
    {
        if streamed && self.listing.is_some() {
            return timeout(STREAMED_LIST, stream.next()).await.ok().flatten();
        }
        // A watcher never ends.
        stream.next().await
    }

    async fn pause(&self, wait: Duration) -> Result<(), Closed> {
        tokio::select! {
            () = tokio::time::sleep(wait) => Ok(()),
            () = self.reports.closed() => Err(Closed),
        }
    }

    fn report(&self, report: Report) -> impl Future<Output = Result<(), Closed>> {
        let sent = self.reports.send(report);
        async { sent.await.map_err(|_| Closed) }
    }

    async fn take(&mut self, event: Event<K>) -> Result<(), Closed> {
        match event {
            Event::Init => self.listing = Some(HashSet::new()),
            Event::InitApply(object) => {
                let name = self.set(object).await?;
                if let Some(listing) = &mut self.listing {
                    listing.insert(name);
                }
            }
            Event::InitDone => {
                let listed = self.listing.take().unwrap_or_default();
                let gone: Vec<Name> = self.known.difference(&listed).cloned().collect();
                for name in gone {
                    self.remove(name).await?;
                }
                self.recovered().await?;
                self.report(Report::Listed { kind: K::PLURAL }).await?;
            }
            Event::Apply(object) => {
                self.recovered().await?;
                self.set(object).await?;
            }
            Event::Delete(object) => {
                self.recovered().await?;
                self.remove(meta::name(object.meta())).await?;
            }
        }
        Ok(())
    }

    async fn set(&mut self, object: K) -> Result<Name, Closed> {
        let seen = Instant::now();
        let name = meta::name(object.meta());
        let generation = object.meta().generation.filter(|_| K::GENERATIONS);
        let mut unreadable = Unreadable {
            generation: generation.unwrap_or_default(),
            created: meta::created(object.meta()),
            targets: object.names(),
            ..Unreadable::default()
        };
        match object.into_model() {
            Ok(Some(object)) => {
                self.known.insert(name.clone());
                let change = Change::Set(Box::new(object));
                self.report(Report::Change { change, seen }).await?;
                if let Some(generation) = generation {
                    let object = reference::<K>(name.clone());
                    let change = Change::Generation { object, generation };
                    self.report(Report::Change { change, seen }).await?;
                }
            }
            Ok(None) => self.remove(name.clone()).await?,
            Err(wrong) => {
                self.known.insert(name.clone());
                let object = reference::<K>(name.clone());
                let shown = object.to_string();
                unreadable.why = sentence(&wrong);
                let wrong = wrong.into_iter().map(|wrong| Finding {
                    file: None,
                    line: None,
                    severity: Severity::Error,
                    object: Some(shown.clone()),
                    message: wrong.message,
                    help: wrong.help,
                });
                let wrong = wrong.collect();
                let report = Report::Unreadable {
                    object,
                    unreadable: Box::new(unreadable),
                    wrong,
                };
                self.report(report).await?;
            }
        }
        Ok(name)
    }

    async fn remove(&mut self, name: Name) -> Result<(), Closed> {
        let seen = Instant::now();
        if self.known.remove(&name) {
            let change = Change::Remove(reference::<K>(name));
            self.report(Report::Change { change, seen }).await?;
        }
        Ok(())
    }

    /// It works (again).
    async fn recovered(&mut self) -> Result<(), Closed> {
        self.missing_since = None;
        if std::mem::take(&mut self.in_trouble) {
            let finding = None;
            self.report(Report::Trouble {
                kind: K::PLURAL,
                finding,
            })
            .await?;
        }
        Ok(())
    }

    /// The cluster does not know the kind.
    async fn missing(&mut self) -> Result<(), Closed> {
        let since = *self.missing_since.get_or_insert_with(Instant::now);
        let finding = Finding {
            file: None,
            line: None,
            severity: Severity::Warning,
            object: None,
            message: format!(
                "the cluster does not know {}.{}, so there are none",
                K::PLURAL,
                K::group(&())
            ),
            help: match &*K::group(&()) {
                gateway::GROUP => {
                    "for such routes install the CRDs of the Gateway API (1.6 or newer); they are \
                     looked for every 10 s"
                }
                _ => "install the CRDs, which are part of the Helm chart; they are looked for every 10 s",
            }
            .to_owned(),
        };
        self.trouble(finding).await?;
        // The first time, nothing can be known; later it may be the apiserver that is starting.
        if since.elapsed() >= FORGET {
            let gone: Vec<Name> = self.known.iter().cloned().collect();
            for name in gone {
                self.remove(name).await?;
            }
        }
        self.report(Report::Listed { kind: K::PLURAL }).await
    }

    async fn failed(
        &mut self,
        error: &watcher::Error,
        status: Option<&Status>,
    ) -> Result<(), Closed> {
        let code = status.map_or(0, |status| status.code);
        // What is no event at all; kube takes it for a status without a code.
        let unreadable = matches!(
            error,
            watcher::Error::WatchFailed(kube::Error::SerdeError(_) | kube::Error::Api(_))
        ) && code == 0;
        // A list that is to be made again, or a connection that has to be opened again, is nothing
        // anybody needs to know of, unless it stays so.
        if code == 410 || (matches!(error, watcher::Error::WatchFailed(_)) && !unreadable) {
            debug!(kind = K::PLURAL, "{error}");
            return Ok(());
        }
        let help = match code {
            401 => {
                "the control plane's token is not accepted: look at its service account".to_owned()
            }
            403 => format!(
                "let the control plane's ClusterRole get, list and watch {} of API group '{}'",
                K::PLURAL,
                K::group(&())
            ),
            _ => "it is tried again; what is known stands meanwhile".to_owned(),
        };
        self.trouble(Finding {
            file: None,
            line: None,
            severity: Severity::Error,
            object: None,
            message: if unreadable {
                format!("one of the {} cannot be read and is left out", K::PLURAL)
            } else {
                format!("cannot watch {}: {}", K::PLURAL, chain(error))
            },
            help,
        })
        .await
    }

    async fn trouble(&mut self, finding: Finding) -> Result<(), Closed> {
        self.in_trouble = true;
        let finding = Some(finding);
        self.report(Report::Trouble {
            kind: K::PLURAL,
            finding,
        })
        .await
    }
}

/// What is wrong, in one sentence.
fn sentence(wrong: &[Wrong]) -> String {
    let all: Vec<&str> = wrong.iter().map(|wrong| wrong.message.as_str()).collect();
    let mut all = all.join("; ");
    if all.len() > MAX_SENTENCE {
        all.truncate(all.floor_char_boundary(MAX_SENTENCE));
        all.push('…');
    }
    all
}

pub(super) fn reference<K: Watched>(name: Name) -> ObjectRef {
    ObjectRef {
        kind: K::KIND,
        name,
    }
}

/// What the apiserver said, when it was the apiserver that refused.
fn status(error: &watcher::Error) -> Option<&Status> {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => Some(status),
        _ => None,
    }
}

/// An error and what caused it, each said once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    text
}
