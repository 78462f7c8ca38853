//! The trusted roots in every namespace: ConfigMap `weft-trust`, from which a pod's proxy knows its
//! control plane the first time. The leader keeps them; what somebody changes or deletes is put
//! right, and a namespace on its way out is left alone.

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
use weft_api::names::{MANAGED_BY, TRUST_CONFIG_MAP, TRUST_KEY};

use super::ca::Authority;
use crate::cluster::{Cluster, ClusterError, Leadership, answer};

/// Writes at once.
const WRITES: usize = 8;
/// After a write or a watch that failed.
const AGAIN: Duration = Duration::from_secs(2);

/// What the cluster has.
#[derive(Debug, Default)]
struct Have {
    namespaces: Listed<()>,
    /// The roots in a namespace's ConfigMap.
    maps: Listed<Option<String>>,
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
    /// Namespaces whose ConfigMap is missing or says something else.
    fn wanting(&self, bundle: &str) -> BTreeSet<String> {
        if !self.namespaces.complete || !self.maps.complete {
            return BTreeSet::new();
        }
        self.namespaces
            .all
            .keys()
            .filter(|name| {
                let has = self.maps.all.get(*name).and_then(Option::as_deref);
                has != Some(bundle)
            })
            .cloned()
            .collect()
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
    let mut again = false;
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
            () = sleep(AGAIN), if again => Seen::Again,
        };
        match seen {
            Seen::Namespace(event) => have.namespaces.take(event, |namespace| {
                let going = namespace.metadata.deletion_timestamp.is_some();
                (namespace.name_any(), (!going).then_some(()))
            }),
            Seen::Map(event) => have.maps.take(event, |map| {
                let roots = map.data.as_ref().and_then(|data| data.get(TRUST_KEY));
                (map.namespace().unwrap_or_default(), Some(roots.cloned()))
            }),
            Seen::Again => {}
        }
        let bundle = authority.bundle();
        let wanting = have.wanting(&bundle);
        let number = wanting.len();
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
        again = false;
        for (namespace, written) in written {
            match written {
                Ok(()) => {
                    // The watch says the same a little later.
                    have.maps.all.insert(namespace, Some(bundle.clone()));
                }
                Err(error) if is_ending(&error) => {
                    debug!("namespace {namespace} is on its way out");
                    have.namespaces.all.remove(&namespace);
                }
                Err(error) => {
                    if !again {
                        warn!("{error}; trying again");
                    }
                    again = true;
                }
            }
        }
        if number > 0 && !again {
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
    let map = ConfigMap {
        metadata: cluster.meta(TRUST_CONFIG_MAP),
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

    fn have(namespaces: &[&str], maps: &[(&str, Option<&str>)]) -> Have {
        let mut have = Have::default();
        have.namespaces.take(watcher::Event::Init, keep_name);
        for name in namespaces {
            have.namespaces
                .take(watcher::Event::InitApply((*name).to_owned()), keep_name);
        }
        assert!(have.wanting("roots").is_empty(), "not before all is known");
        have.namespaces.take(watcher::Event::InitDone, keep_name);
        have.maps.complete = true;
        for (name, roots) in maps {
            have.maps
                .all
                .insert((*name).to_owned(), roots.map(str::to_owned));
        }
        have
    }

    fn keep_name(name: &String) -> (String, Option<()>) {
        (name.clone(), Some(()))
    }

    #[test]
    fn what_is_missing_or_wrong_is_written() {
        let mut have = have(
            &["a", "b", "c", "d"],
            &[
                ("a", Some("roots")),
                ("b", Some("old")),
                ("c", None),
                ("gone", Some("old")),
            ],
        );
        let wanting = |have: &Have| have.wanting("roots").into_iter().collect::<Vec<_>>();
        assert_eq!(wanting(&have), ["b", "c", "d"]);
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
