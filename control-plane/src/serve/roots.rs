//! The trusted roots in every namespace: ConfigMap `weft-trust`, from which a pod's proxy knows its
//! control plane the first time. The leader keeps them; what somebody changes or deletes is put
//! right, and a namespace on its way out is left alone. So is what another mesh in the same cluster
//! keeps: its ConfigMaps say which namespace their control plane is in.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, BoxStream, StreamExt};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::{Patch, PatchParams};
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, ResourceExt};
use tokio::time::sleep;
use tracing::{debug, info, warn};
use weft_api::names::{KEEPER_ANNOTATION, MANAGED_BY, TRUST_CONFIG_MAP, TRUST_KEY};

use super::ca::Authority;
use crate::cluster::{Cluster, ClusterError, Leadership, answer};

/// Writes at once.
const WRITES: usize = 8;
/// After a write or a watch that failed.
const AGAIN: Duration = Duration::from_secs(2);
const AGAIN_AT_MOST: Duration = Duration::from_secs(60);

/// What the cluster has.
#[derive(Debug, Default)]
struct Have {
    namespaces: Listed<()>,
    maps: Listed<Map>,
}

/// A namespace's ConfigMap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Map {
    roots: Option<String>,
    /// Namespace of the control plane that keeps it.
    keeper: Option<String>,
}

/// Objects by namespace, once they have all been listed.
#[derive(Debug)]
struct Listed<T> {
    all: BTreeMap<String, T>,
    /// While they are listed anew.
    listing: BTreeMap<String, T>,
    complete: bool,
}

impl<T> Default for Listed<T> {
    fn default() -> Self {
        Self {
            all: BTreeMap::new(),
            listing: BTreeMap::new(),
            complete: false,
        }
    }
}

impl<T> Listed<T> {
    /// `keep`: the namespace and what matters of an object; none for one that does not count.
    fn take<K>(&mut self, event: watcher::Event<K>, keep: impl Fn(&K) -> (String, Option<T>)) {
        match event {
            watcher::Event::Init => self.listing.clear(),
            watcher::Event::InitApply(object) => {
                if let (name, Some(value)) = keep(&object) {
                    self.listing.insert(name, value);
                }
            }
            watcher::Event::InitDone => {
                self.all = std::mem::take(&mut self.listing);
                self.complete = true;
            }
            watcher::Event::Apply(object) => {
                let (name, value) = keep(&object);
                match value {
                    Some(value) => drop(self.all.insert(name, value)),
                    None => drop(self.all.remove(&name)),
                }
            }
            watcher::Event::Delete(object) => drop(self.all.remove(&keep(&object).0)),
        }
    }
}

impl Have {
    /// Namespaces whose ConfigMap is missing or says something else, and is ours to write.
    fn wanting(&self, bundle: &str, us: &str) -> BTreeSet<String> {
        if !self.namespaces.complete || !self.maps.complete {
            return BTreeSet::new();
        }
        let wants = |map: &Map| map.roots.as_deref() != Some(bundle) && !map.is_of_others(us);
        self.namespaces
            .all
            .keys()
            .filter(|name| self.maps.all.get(*name).is_none_or(wants))
            .cloned()
            .collect()
    }

    /// Namespaces whose ConfigMap another control plane keeps, with its namespace.
    fn of_others(&self, us: &str) -> Vec<(&str, &str)> {
        self.maps
            .all
            .iter()
            .filter(|(_, map)| map.is_of_others(us))
            .map(|(name, map)| (name.as_str(), map.keeper.as_deref().unwrap_or_default()))
            .collect()
    }
}

impl Map {
    fn is_of_others(&self, us: &str) -> bool {
        self.keeper.as_deref().is_some_and(|keeper| keeper != us)
    }
}

enum Seen {
    Namespace(watcher::Event<PartialObjectMeta<Namespace>>),
    Map(watcher::Event<ConfigMap>),
    /// Something else to look at: the roots changed, or a write failed a while ago.
    Again,
}

/// Keeps the ConfigMaps while this replica is the leader. Until it is dropped.
pub async fn publish(cluster: Cluster, authority: Arc<Authority>, leadership: Leadership) {
    loop {
        leadership.acquired().await;
        tokio::select! {
            () = keep(&cluster, &authority, &leadership) => {}
            () = leadership.lost() => {}
        }
    }
}

async fn keep(cluster: &Cluster, authority: &Arc<Authority>, leadership: &Leadership) {
    let mut have = Have::default();
    let mut events = watch(cluster);
    let mut roots = authority.changes();
    let mut again: Option<Duration> = None;
    let mut of_others = 0;
    let us = cluster.namespace.as_str();
    loop {
        let seen = tokio::select! {
            seen = events.next() => match seen {
                Some(seen) => seen,
                None => return,
            },
            changed = roots.changed() => match changed {
                Ok(()) => Seen::Again,
                Err(_) => return,
            },
            () = sleep(again.unwrap_or(AGAIN)), if again.is_some() => Seen::Again,
        };
        match seen {
            Seen::Namespace(event) => have.namespaces.take(event, |namespace| {
                let going = namespace.metadata.deletion_timestamp.is_some();
                (namespace.name_any(), (!going).then_some(()))
            }),
            Seen::Map(event) => have.maps.take(event, |map| {
                let roots = map.data.as_ref().and_then(|data| data.get(TRUST_KEY));
                let keeper = map.annotations().get(KEEPER_ANNOTATION);
                let kept = Map {
                    roots: roots.cloned(),
                    keeper: keeper.cloned(),
                };
                (map.namespace().unwrap_or_default(), Some(kept))
            }),
            Seen::Again => {}
        }
        let bundle = authority.bundle();
        let wanting = have.wanting(&bundle, us);
        let others = have.of_others(us);
        if others.len() > of_others {
            for (namespace, keeper) in &others {
                warn!(
                    "the ConfigMap {namespace}/{TRUST_CONFIG_MAP} is kept by the control plane in {keeper}, not by this one; remove it if that one is gone"
                );
            }
        }
        of_others = others.len();
        let number = wanting.len();
        if wanting.iter().any(|name| !have.maps.all.contains_key(name)) {
            // Perhaps they went with their owner; what stands in the way is said by the write.
            let _ = cluster.look_up_owner().await;
        }
        let written = stream::iter(wanting)
            .map(|namespace| {
                let bundle = &bundle;
                async move {
                    if !leadership.is_leader() {
                        return (namespace, Ok(()));
                    }
                    let written = write(cluster, &namespace, bundle).await;
                    (namespace, written)
                }
            })
            .buffer_unordered(WRITES)
            .collect::<Vec<_>>()
            .await;
        let mut failed = None;
        for (namespace, written) in written {
            match written {
                Ok(()) => {
                    // The watch says the same a little later.
                    let map = Map {
                        roots: Some(bundle.clone()),
                        keeper: Some(us.to_owned()),
                    };
                    have.maps.all.insert(namespace, map);
                }
                Err(error) if is_ending(&error) => {
                    debug!("namespace {namespace} is on its way out");
                    have.namespaces.all.remove(&namespace);
                }
                Err(error) => {
                    failed.get_or_insert(error);
                }
            }
        }
        if let Some(error) = &failed {
            warn!("{error}; trying again");
        }
        let waited = again.map_or(AGAIN, |waited| (waited * 2).min(AGAIN_AT_MOST));
        again = failed.is_some().then_some(waited);
        if number > 0 && failed.is_none() {
            info!(namespaces = number, "the trusted roots have been published");
        }
    }
}

fn watch(cluster: &Cluster) -> BoxStream<'static, Seen> {
    let client = &cluster.client;
    let namespaces = Api::<PartialObjectMeta<Namespace>>::all(client.clone());
    let namespaces = watcher(namespaces, watcher::Config::default())
        .filter_map(|event| async move { good(event).await.map(Seen::Namespace) })
        .boxed();
    let named = watcher::Config::default().fields(&format!("metadata.name={TRUST_CONFIG_MAP}"));
    let maps = watcher(Api::<ConfigMap>::all(client.clone()), named)
        .filter_map(|event| async move { good(event).await.map(Seen::Map) })
        .boxed();
    stream::select(namespaces, maps).boxed()
}

/// The watcher mends itself when it is asked again, a little later.
async fn good<T>(event: Result<T, watcher::Error>) -> Option<T> {
    match event {
        Ok(event) => Some(event),
        Err(error) => {
            debug!("watching for the trusted roots: {error}");
            sleep(AGAIN).await;
            None
        }
    }
}

async fn write(cluster: &Cluster, namespace: &str, bundle: &str) -> Result<(), ClusterError> {
    let mut metadata = cluster.meta(TRUST_CONFIG_MAP);
    metadata.annotations = Some([(KEEPER_ANNOTATION.to_owned(), cluster.namespace.clone())].into());
    let map = ConfigMap {
        metadata,
        data: Some([(TRUST_KEY.to_owned(), bundle.to_owned())].into()),
        ..ConfigMap::default()
    };
    let maps = Api::<ConfigMap>::namespaced(cluster.client.clone(), namespace);
    let parameters = PatchParams::apply(MANAGED_BY).force();
    let patch = Patch::Apply(&map);
    let patched = maps.patch(TRUST_CONFIG_MAP, &parameters, &patch);
    let doing = format!("write the ConfigMap {namespace}/{TRUST_CONFIG_MAP}");
    answer(doing, patched).await.map(drop)
}

/// The namespace is being deleted, or has been.
fn is_ending(error: &ClusterError) -> bool {
    error.is_not_found()
        || error.status().is_some_and(|status| {
            status.code == 403 && status.message.contains("because it is being terminated")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn have(namespaces: &[&str], maps: &[(&str, Option<&str>, Option<&str>)]) -> Have {
        let mut have = Have::default();
        have.namespaces.take(watcher::Event::Init, keep_name);
        for name in namespaces {
            have.namespaces
                .take(watcher::Event::InitApply((*name).to_owned()), keep_name);
        }
        assert!(
            have.wanting("roots", "us").is_empty(),
            "not before all is known"
        );
        have.namespaces.take(watcher::Event::InitDone, keep_name);
        have.maps.complete = true;
        for (name, roots, keeper) in maps {
            let map = Map {
                roots: roots.map(str::to_owned),
                keeper: keeper.map(str::to_owned),
            };
            have.maps.all.insert((*name).to_owned(), map);
        }
        have
    }

    // By the shape of what a watcher's objects are given to.
    #[allow(clippy::ptr_arg)]
    fn keep_name(name: &String) -> (String, Option<()>) {
        (name.clone(), Some(()))
    }

    #[test]
    fn what_is_missing_or_wrong_is_written() {
        let mut have = have(
            &["a", "b", "c", "d", "theirs"],
            &[
                ("a", Some("roots"), Some("us")),
                ("b", Some("old"), Some("us")),
                ("c", None, None),
                ("gone", Some("old"), Some("us")),
                ("theirs", Some("other"), Some("them")),
            ],
        );
        let wanting = |have: &Have| have.wanting("roots", "us").into_iter().collect::<Vec<_>>();
        assert_eq!(wanting(&have), ["b", "c", "d"]);
        assert_eq!(have.of_others("us"), [("theirs", "them")]);
        have.namespaces
            .take(watcher::Event::Delete("b".to_owned()), keep_name);
        // On its way out.
        have.namespaces
            .take(watcher::Event::Apply("c".to_owned()), |name| {
                (name.clone(), None)
            });
        assert_eq!(wanting(&have), ["d"]);
        // Listed anew: what is not in the list is gone.
        have.namespaces.take(watcher::Event::Init, keep_name);
        have.namespaces
            .take(watcher::Event::InitApply("a".to_owned()), keep_name);
        assert_eq!(wanting(&have), ["d"], "until the list is complete");
        have.namespaces.take(watcher::Event::InitDone, keep_name);
        assert!(wanting(&have).is_empty());
    }
}
