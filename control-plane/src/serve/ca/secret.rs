//! The store that replicas share: a Secret in the control plane's namespace.
//!
//! The leader makes it on the first start and changes it in a rotation, each time from the version
//! it knows (a merge patch with `resourceVersion`), so that no write is lost and none is made by a
//! leader that no longer is one. All replicas watch it. A watch only says *that* something changed;
//! what is there is then read from the apiserver anew, so nothing old is ever taken for new.
//!
//! An operator asks for a rotation by an annotation whose value is new each time:
//! `weft.dev/rotate` begins one, `weft.dev/finish-rotation` ends the one under way.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::StreamExt;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::PartialObjectMeta;
use kube::runtime::watcher;
use serde_json::{Value, json};
use tokio::time::sleep;
use tracing::{debug, error, info, warn};
use weft_api::names::{CA_SECRET, FINISH_ANNOTATION, ROTATE_ANNOTATION};

use super::brought::{self, Brought};
use super::root::Material;
use super::rotation::{ANNOUNCE_AT_LEAST_REPLICATED, Asked, STATE_FILE};
use super::store::{Change, Files, Snapshot, Store};
use super::{Authority, CaError, Inner, Options};
use crate::cluster::{Cluster, Leadership, answer};

/// Between two looks while the authority is not there, or cannot be read.
const AGAIN: Duration = Duration::from_millis(500);
/// What stands in the way at the start is said again after this long.
const REPEAT_LOG: Duration = Duration::from_secs(30);
/// Even without a word from the watch the Secret is read again after this long: well within the
/// half minute by which a rotation lets old certificates outlive their end, so no replica that can
/// still review tokens signs with the old root for longer.
const AT_LATEST: Duration = Duration::from_secs(10);

/// The Secret.
struct SecretStore {
    cluster: Cluster,
    secrets: Api<Secret>,
    leadership: Leadership,
}

impl SecretStore {
    fn new(cluster: &Cluster, leadership: Leadership) -> Self {
        Self {
            secrets: cluster.own(),
            cluster: cluster.clone(),
            leadership,
        }
    }

    fn doing(&self, verb: &str) -> String {
        format!("{verb} the Secret {}/{CA_SECRET}", self.cluster.namespace)
    }

    fn allowed(&self) -> Result<(), CaError> {
        if self.leadership.is_leader() {
            Ok(())
        } else {
            Err(CaError::NotLeader)
        }
    }
}

#[tonic::async_trait]
impl Store for SecretStore {
    fn place(&self, name: &str) -> String {
        format!(
            "{name} of the Secret {}/{CA_SECRET}",
            self.cluster.namespace
        )
    }

    async fn load(&self) -> Result<Option<Snapshot>, CaError> {
        let read = self.secrets.get_opt(CA_SECRET);
        let secret = answer(self.doing("read"), read).await?;
        if secret.is_none() {
            // Perhaps it went with its owner.
            self.cluster.look_up_owner().await?;
        }
        secret.map(|secret| snapshot(secret, self)).transpose()
    }

    async fn create(&self, files: &Files) -> Result<String, CaError> {
        self.allowed()?;
        let secret = Secret {
            metadata: self.cluster.meta(CA_SECRET),
            data: Some(
                files
                    .iter()
                    .map(|(name, text)| (name.clone(), ByteString(text.clone().into_bytes())))
                    .collect(),
            ),
            ..Secret::default()
        };
        let parameters = PostParams::default();
        let made = self.secrets.create(&parameters, &secret);
        version(answer(self.doing("make"), made).await)
    }

    async fn save(&self, base: &str, change: &Change) -> Result<String, CaError> {
        self.allowed()?;
        let mut data: BTreeMap<&str, Value> = BTreeMap::new();
        for (name, text) in &change.put {
            data.insert(name, json!(ByteString(text.clone().into_bytes())));
        }
        for name in &change.remove {
            data.insert(name, Value::Null);
        }
        // Refused with a conflict when it is not this version any more.
        let patch = json!({ "metadata": { "resourceVersion": base }, "data": data });
        let parameters = PatchParams::default();
        let patch = Patch::Merge(&patch);
        let patched = self.secrets.patch(CA_SECRET, &parameters, &patch);
        version(answer(self.doing("change"), patched).await)
    }
}

fn version(written: Result<Secret, crate::cluster::ClusterError>) -> Result<String, CaError> {
    match written {
        Ok(secret) => Ok(secret.metadata.resource_version.unwrap_or_default()),
        // Deleted, made or changed by somebody else since it was read.
        Err(error) if error.is_conflict() || error.is_not_found() => Err(CaError::Changed),
        Err(error) => Err(error.into()),
    }
}

fn snapshot(secret: Secret, store: &SecretStore) -> Result<Snapshot, CaError> {
    let annotations = secret.metadata.annotations.unwrap_or_default();
    let asked = Asked {
        rotate: annotations.get(ROTATE_ANNOTATION).cloned(),
        finish: annotations.get(FINISH_ANNOTATION).cloned(),
    };
    let mut files = Files::new();
    for (name, bytes) in secret.data.unwrap_or_default() {
        let text = String::from_utf8(bytes.0).map_err(|_| CaError::Damaged {
            place: store.place(&name),
            reason: "it is not text".to_owned(),
        })?;
        files.insert(name, text);
    }
    Ok(Snapshot {
        files,
        version: secret.metadata.resource_version.unwrap_or_default(),
        asked,
    })
}

impl Authority {
    /// The authority that replicas share. Waits until it is there: the leader makes it when it is
    /// not, of its own or from the Secret `brought`.
    ///
    /// # Errors
    /// The options cannot work. What stands in the way in the cluster is logged and waited for.
    pub async fn in_cluster(
        cluster: &Cluster,
        leadership: &Leadership,
        options: Options,
        brought: Option<&str>,
    ) -> Result<Self, CaError> {
        options.check()?;
        let store = SecretStore::new(cluster, leadership.clone());
        let mut said: Option<tokio::time::Instant> = None;
        loop {
            let why = match obtain(&store, &options, brought).await {
                Ok((inner, bring)) => {
                    let store = Box::new(store);
                    let mut authority =
                        Self::with(options, store, inner, ANNOUNCE_AT_LEAST_REPLICATED);
                    authority.brought = bring.map(Mutex::new);
                    return Ok(authority);
                }
                Err(why) => why,
            };
            match why {
                CaError::NotLeader | CaError::Changed => {
                    debug!("waiting for the leader to make the certificate authority");
                }
                why if said.is_none_or(|at| at.elapsed() >= REPEAT_LOG) => {
                    said = Some(tokio::time::Instant::now());
                    error!("there is no certificate authority yet: {why}; trying again");
                }
                why => debug!("there is no certificate authority yet: {why}"),
            }
            sleep(AGAIN).await;
        }
    }

    /// Keeps up with the Secret: takes over what other replicas and operators do with it, and what
    /// the user changes in the Secret brought. Until it is dropped.
    pub async fn follow(self: Arc<Self>, cluster: Cluster, brought: Option<String>) {
        let own = self.clone().follow_own(cluster.clone());
        match brought {
            None => own.await,
            Some(name) => drop(tokio::join!(own, self.follow_brought(cluster, name))),
        }
    }

    async fn follow_own(self: Arc<Self>, cluster: Cluster) {
        let mut changes = watch(&cluster, CA_SECRET);
        loop {
            // The watch reconnects by itself; its errors are no news beside the read's.
            let _ = tokio::time::timeout(AT_LATEST, changes.next()).await;
            while let Err(error) = self.reload().await {
                match error {
                    CaError::Changed => debug!("{error}"),
                    error => warn!("{error}; going on with what is known"),
                }
                sleep(AGAIN * 4).await;
            }
            // Whoever deletes it again and again is not raced with.
            sleep(AGAIN).await;
        }
    }

    async fn follow_brought(&self, cluster: Cluster, name: String) {
        let Some(brought) = &self.brought else {
            return;
        };
        let mut changes = watch(&cluster, &name);
        loop {
            let _ = tokio::time::timeout(AT_LATEST, changes.next()).await;
            match read_brought(&cluster, &name, &self.options).await {
                Ok(material) => {
                    let mut brought = brought.lock().unwrap_or_else(PoisonError::into_inner);
                    brought.set(material);
                }
                Err(error) => {
                    warn!("{error}; going on with the certificate authority known");
                    sleep(AGAIN * 4).await;
                }
            }
        }
    }
}

/// One word for each change of a Secret, and when a lost watch is there again.
fn watch(cluster: &Cluster, name: &str) -> futures_util::stream::BoxStream<'static, ()> {
    let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
    watcher::watcher(cluster.own::<PartialObjectMeta<Secret>>(), config)
        .filter_map(|event| async move {
            match event {
                Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => None,
                Ok(_) => Some(()),
                Err(error) => {
                    debug!("watching a Secret: {error}");
                    // The watcher is polled again at once otherwise.
                    sleep(AGAIN * 4).await;
                    None
                }
            }
        })
        .boxed()
}

async fn obtain(
    store: &SecretStore,
    options: &Options,
    brought: Option<&str>,
) -> Result<(Inner, Option<Brought>), CaError> {
    let bring = match brought {
        None => None,
        Some(name) => Some(read_brought(&store.cluster, name, options).await),
    };
    let place = |name: &str| store.place(name);
    let bring_at = |material: Material| {
        let name = brought.unwrap_or_default();
        Brought::new(format!("{}/{name}", store.cluster.namespace), material)
    };
    if let Some(snapshot) = store.load().await? {
        if !snapshot.files.contains_key(STATE_FILE) {
            return Err(CaError::Damaged {
                place: store.place(STATE_FILE),
                reason: "it is missing".to_owned(),
            });
        }
        let inner = Inner::read(snapshot, &place)?;
        // That the user's is not good now does not stop what is known.
        let bring = match bring {
            None => None,
            Some(Ok(material)) => Some(bring_at(material)),
            Some(Err(error)) => {
                error!("{error}; going on with the certificate authority known");
                Some(Brought::waiting(format!(
                    "{}/{}",
                    store.cluster.namespace,
                    brought.unwrap_or_default()
                )))
            }
        };
        return Ok((inner, bring));
    }
    store.allowed()?;
    let material = match bring {
        None => Material::generate(&options.trust_domain, SystemTime::now())?,
        Some(brought) => brought?,
    };
    let (mut inner, files) = Inner::first(&material, options)?;
    inner.version = store.create(&files).await?;
    info!(
        root = material.id,
        "made a new certificate authority in the Secret {}/{CA_SECRET}", store.cluster.namespace
    );
    Ok((inner, brought.map(|_| bring_at(material))))
}

async fn read_brought(
    cluster: &Cluster,
    name: &str,
    options: &Options,
) -> Result<Material, CaError> {
    let place = format!("{}/{name}", cluster.namespace);
    let secrets: Api<Secret> = cluster.own();
    let doing = format!("read the Secret {place}");
    let secret = answer(doing, secrets.get(name)).await?;
    let data = secret.data.unwrap_or_default();
    let text = |key: &str| {
        data.get(key)
            .and_then(|bytes| std::str::from_utf8(&bytes.0).ok())
    };
    let need = |key: &str| text(key).ok_or_else(|| format!("it has no {key}"));
    let read = || {
        brought::read(
            need("tls.crt")?,
            need("tls.key")?,
            text("ca.crt"),
            &options.trust_domain,
            SystemTime::now(),
        )
    };
    read().map_err(|reason| CaError::Brought { place, reason })
}
