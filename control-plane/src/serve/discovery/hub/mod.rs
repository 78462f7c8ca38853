//! The model, what is compiled of it, and who asked for what.
//!
//! - [`connection`]: a proxy's open stream: what it says, and what goes to it.
//! - [`status`]: the connected proxies, and what they have.
//! - [`origin`]: which objects tables come from.

mod connection;
mod origin;
mod status;

pub use origin::{Arrival, Carried};
pub use status::{ProxyStatus, ResourceStatus, Trusting};

pub(super) use connection::{Connection, Requests};

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tonic::Status;
use tonic::metadata::MetadataValue;
use weft_api::names::MOVE_METADATA;
use weft_api::proto::{Resource, ResourceKey, Trust};

use self::connection::authorize;
use super::stream::Stream;
use super::{Key, Kind};
use crate::compile::{
    self, Compiled, EVERYWHERE, ObjectStatus, Problem, Settings, problems, status_of, variants,
    with_status,
};
use crate::model::{Change, Dirty, Name, ObjectRef, World};
use crate::serve::ca::Signer;
use crate::serve::metrics::Metrics;
use crate::serve::tls::Peer;

/// All of it, behind one lock that is held only while something is compiled or looked up.
pub struct Hub {
    settings: Settings,
    metrics: Arc<Metrics>,
    state: Mutex<State>,
    /// Of whom something else may be said since somebody took them; kept while somebody wants to
    /// know.
    said: watch::Sender<BTreeSet<ObjectRef>>,
}

#[derive(Default)]
struct State {
    world: World,
    trust: Trust,
    /// What somebody asked for.
    resources: BTreeMap<Key, Entry>,
    /// Destinations of `resources` by the Services they are or lead to.
    by_service: BTreeMap<Name, BTreeSet<Key>>,
    streams: BTreeMap<u64, Stream>,
    next_stream: u64,
}

struct Entry {
    variants: Variants,
    subscribers: BTreeSet<u64>,
}

/// A resource, shared with those that it is to be sent to.
#[derive(Clone, PartialEq)]
struct Variants(compile::Variants<Arc<Compiled>>);

impl Variants {
    fn compile(world: &World, settings: &Settings, key: &Key, trust: &Trust) -> Self {
        let all = variants(world, settings, &key.to_proto(), trust);
        let special = all.special.into_iter();
        Self(compile::Variants {
            common: Arc::new(all.common),
            special: special
                .map(|(client, compiled)| (client, Arc::new(compiled)))
                .collect(),
        })
    }

    /// What proxies of an audience see.
    fn of(&self, audience: &str) -> &Arc<Compiled> {
        self.0.special.get(audience).unwrap_or(&self.0.common)
    }

    /// What of it decides anything.
    fn effect(&self) -> compile::Variants<Resource> {
        let special = self.0.special.iter();
        compile::Variants {
            common: self.0.common.effect(),
            special: special
                .map(|(client, compiled)| (client.clone(), compiled.effect()))
                .collect(),
        }
    }

    /// Whether it is the same for all.
    fn is_common(&self) -> bool {
        self.0.special.is_empty()
    }

    /// Services that any of them is or leads to.
    fn services(&self) -> BTreeSet<Name> {
        let all = std::iter::once(&self.0.common).chain(self.0.special.values());
        all.flat_map(|compiled| compiled.services()).collect()
    }
}

impl Hub {
    pub fn new(settings: Settings, trust: Trust, metrics: Arc<Metrics>) -> Self {
        Self {
            settings,
            metrics,
            state: Mutex::new(State {
                trust,
                ..State::default()
            }),
            said: watch::Sender::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What a panic may leave behind is a resource not compiled again, which the next change
        // mends; ending the control plane over it would be worse.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes changes together and sends on what they change.
    pub fn apply(&self, changes: Vec<Change>, seen: Instant) {
        let began = Instant::now();
        let mut state = self.state();
        let mut dirty = Dirty::default();
        for change in changes {
            state.world.apply(change, &mut dirty);
        }
        let keys = state.touched(&dirty);
        if !dirty.said.is_empty() && self.said.receiver_count() > 0 {
            let said = std::mem::take(&mut dirty.said);
            self.said.send_modify(|all| all.extend(said));
        }
        for key in keys {
            state.recompile(&self.settings, &key, seen);
        }
        for name in &dirty.workloads {
            state.recheck(name, seen);
        }
        drop(state);
        self.metrics.compile.observe(began.elapsed());
    }

    /// The roots changed.
    pub fn set_trust(&self, trust: Trust) {
        let mut state = self.state();
        state.trust = trust;
        state.recompile(&self.settings, &Key::trust(), Instant::now());
    }

    /// Ends every stream, politely.
    pub fn end_all(&self, reason: &str) {
        for stream in self.state().streams.values_mut() {
            stream.end(moving(reason));
        }
    }

    /// Ends streams one after another, evenly within `within`, so that their proxies do not all
    /// connect elsewhere at once; with no more than `rate` a second when that is quicker.
    pub async fn end_spread(&self, within: Duration, rate: u32, reason: &str) {
        let ids: Vec<u64> = self.state().streams.keys().copied().collect();
        let number = u32::try_from(ids.len()).unwrap_or(u32::MAX).max(1);
        let pause = (within / number).min(Duration::from_secs(1) / rate.max(1));
        let mut next = tokio::time::Instant::now();
        for id in ids {
            tokio::time::sleep_until(next).await;
            next += pause;
            if let Some(stream) = self.state().streams.get_mut(&id) {
                stream.end(moving(reason));
            }
        }
    }

    /// Proxies with an open stream.
    pub fn connected(&self) -> usize {
        self.state().streams.len()
    }

    /// Resources that somebody asked for.
    pub fn subscribed(&self) -> usize {
        self.state().resources.len()
    }

    /// How many objects of each kind are known.
    pub fn counts(&self) -> BTreeMap<&'static str, usize> {
        self.state().world.counts()
    }

    /// Becomes changed when something else may be said of a route or a policy.
    pub fn statuses_changed(&self) -> watch::Receiver<BTreeSet<ObjectRef>> {
        self.said.subscribe()
    }

    /// Of whom something else may be said since this was asked last; to be asked by one only.
    pub fn take_changed_statuses(&self) -> BTreeSet<ObjectRef> {
        let mut taken = BTreeSet::new();
        self.said.send_if_modified(|all| {
            taken = std::mem::take(all);
            false
        });
        taken
    }

    /// Every route and policy of which something is to be said.
    pub fn with_status(&self) -> BTreeSet<ObjectRef> {
        with_status(&self.state().world)
    }

    /// What is to be said of a route or a policy now; none: it is not there.
    pub fn status_of(&self, object: &ObjectRef) -> Option<ObjectStatus> {
        status_of(&self.state().world, object)
    }

    /// What is wrong between the objects.
    pub fn problems(&self) -> Vec<Problem> {
        problems(&self.state().world)
    }

    /// Name of the endpoints that whoever has no proxy comes to by a destination's name.
    pub fn without_routes(&self, name: &str) -> Option<String> {
        compile::without_routes(&self.state().world, name)
    }

    /// A resource as a proxy of an [`audience`](compile::audience) that asks now would get it.
    pub fn look_up(&self, key: &ResourceKey, client: &str) -> Compiled {
        let state = self.state();
        compile::compile(&state.world, &self.settings, key, &state.trust, client)
    }
}

/// Ends a stream so that its proxy comes back at once, to another replica.
fn moving(reason: &str) -> Status {
    let mut status = Status::unavailable(reason);
    status
        .metadata_mut()
        .insert(MOVE_METADATA, MetadataValue::from_static("1"));
    status
}

impl State {
    /// What somebody asked for and may have changed.
    fn touched(&self, dirty: &Dirty) -> Vec<Key> {
        let mut keys = BTreeSet::new();
        for service in &dirty.endpoints {
            keys.extend(self.with_prefix(Kind::Endpoints, format!("{service}:")));
            keys.extend(self.with_prefix(Kind::Endpoints, format!("{EVERYWHERE}{service}:")));
        }
        for workload in &dirty.workloads {
            keys.extend(self.with_prefix(Kind::Endpoints, format!("workload/{workload}:")));
            let own = Key::of(Kind::Workload, workload.to_string());
            if self.resources.contains_key(&own) {
                keys.insert(own);
            }
        }
        for address in &dirty.addresses {
            // "10.0.0.1:" and "[fd00::1]:".
            let mut prefix = SocketAddr::new(*address, 0).to_string();
            prefix.pop();
            keys.extend(self.with_prefix(Kind::Destination, prefix));
        }
        for service in &dirty.external {
            keys.extend(self.with_prefix(Kind::Endpoints, format!("external/{service}:")));
        }
        if !dirty.networks.is_empty() {
            let at = self.with_prefix(Kind::Destination, String::new());
            keys.extend(at.filter(|key| {
                let address = key.name.parse::<SocketAddr>();
                address.is_ok_and(|at| dirty.networks.iter().any(|net| net.contains(&at.ip())))
            }));
        }
        for service in &dirty.services {
            keys.extend(self.by_service.get(service).into_iter().flatten().cloned());
        }
        for namespace in &dirty.workloads_of {
            keys.extend(self.with_prefix(Kind::Workload, format!("{namespace}/")));
        }
        if dirty.all_workloads {
            keys.extend(self.with_prefix(Kind::Workload, String::new()));
        }
        keys.into_iter().collect()
    }

    fn with_prefix(&self, kind: Kind, prefix: String) -> impl Iterator<Item = Key> {
        let first = Key::of(kind, prefix.clone());
        let rank = first.rank;
        self.resources
            .range(first..)
            .take_while(move |(key, _)| key.rank == rank && key.name.starts_with(&prefix))
            .map(|(key, _)| key.clone())
    }

    /// Compiles a resource again and offers it to its subscribers when it is not the same.
    fn recompile(&mut self, settings: &Settings, key: &Key, seen: Instant) {
        let Some(entry) = self.resources.get_mut(key) else {
            return;
        };
        let variants = Variants::compile(&self.world, settings, key, &self.trust);
        if variants == entry.variants {
            return;
        }
        let before = std::mem::replace(&mut entry.variants, variants.clone());
        let subscribers: Vec<u64> = entry.subscribers.iter().copied().collect();
        self.unindex(key, &before);
        self.index(key, &variants);
        for id in subscribers {
            let compiled = variants.of(self.audience(id, key)).clone();
            self.follow(settings, id, key, &compiled, Some(seen));
            if let Some(stream) = self.streams.get_mut(&id) {
                stream.offer(key, &compiled, Some(seen));
            }
        }
    }

    /// The compiled resource, kept from now on for this subscriber, and the key that all its
    /// subscribers share.
    fn subscribe(&mut self, settings: &Settings, id: u64, key: &Key) -> (Key, Arc<Compiled>) {
        if !self.resources.contains_key(key) {
            let variants = Variants::compile(&self.world, settings, key, &self.trust);
            self.index(key, &variants);
            let entry = Entry {
                variants,
                subscribers: BTreeSet::new(),
            };
            self.resources.insert(key.clone(), entry);
        }
        let client = self.audience(id, key).to_owned();
        let compiled = match self.resources.get_mut(key) {
            Some(entry) => {
                entry.subscribers.insert(id);
                entry.variants.of(&client).clone()
            }
            // Not reached: it has just been put there.
            None => Arc::new(compile::compile(
                &self.world,
                settings,
                &key.to_proto(),
                &self.trust,
                &client,
            )),
        };
        let shared = self.resources.get_key_value(key).map(|(key, _)| key);
        (shared.unwrap_or(key).clone(), compiled)
    }

    fn unsubscribe(&mut self, id: u64, key: &Key) {
        if let Some(entry) = self.resources.get_mut(key) {
            entry.subscribers.remove(&id);
            if entry.subscribers.is_empty()
                && let Some(entry) = self.resources.remove(key)
            {
                self.unindex(key, &entry.variants);
            }
        }
    }

    /// What a resource may depend on of a connected proxy.
    fn audience(&self, id: u64, key: &Key) -> &str {
        self.streams
            .get(&id)
            .map_or("", |stream| stream.audience(key))
    }

    fn index(&mut self, key: &Key, variants: &Variants) {
        for service in variants.services() {
            self.by_service
                .entry(service)
                .or_default()
                .insert(key.clone());
        }
    }

    fn unindex(&mut self, key: &Key, variants: &Variants) {
        for service in variants.services() {
            if let Some(keys) = self.by_service.get_mut(&service) {
                keys.remove(key);
                if keys.is_empty() {
                    self.by_service.remove(&service);
                }
            }
        }
    }

    /// Subscribes a stream to the endpoints a destination leads to, and lets go of those it no
    /// longer leads to.
    fn follow(
        &mut self,
        settings: &Settings,
        id: u64,
        destination: &Key,
        compiled: &Compiled,
        seen: Option<Instant>,
    ) {
        if destination.rank != Kind::Destination as u8 {
            return;
        }
        let wanted: BTreeSet<Key> = compiled
            .endpoint_names()
            .into_iter()
            .map(|name| Key::of(Kind::Endpoints, name))
            .collect();
        for key in &wanted {
            let (key, endpoints) = self.subscribe(settings, id, key);
            let Some(stream) = self.streams.get_mut(&id) else {
                return;
            };
            let because = stream.implied.entry(key.clone()).or_default();
            if !because.contains(destination) {
                // Nearly always the only one.
                because.reserve_exact(1);
                because.push(destination.clone());
            }
            stream.offer(&key, &endpoints, seen);
        }
        self.let_go(id, destination, &wanted);
    }

    /// Endpoints that a destination no longer leads to and nobody else asked for.
    fn let_go(&mut self, id: u64, destination: &Key, kept: &BTreeSet<Key>) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        let mut dropped = Vec::new();
        stream.implied.retain(|key, because| {
            if !kept.contains(key) {
                because.retain(|other| other != destination);
            }
            if because.is_empty() {
                dropped.push(key.clone());
            }
            !because.is_empty()
        });
        dropped.retain(|key| !stream.explicit.contains(key));
        for key in &dropped {
            stream.forget(key);
        }
        for key in &dropped {
            self.unsubscribe(id, key);
        }
    }

    /// A workload changed: whoever speaks for it must still be allowed to, and is where the
    /// workload is now.
    fn recheck(&mut self, name: &Name, seen: Instant) {
        let world = &self.world;
        let node = world.workload(name).map(|workload| &workload.node);
        for stream in self.streams.values_mut() {
            if stream.proxy.workload != *name {
                continue;
            }
            let peer = Peer {
                identity: stream.proxy.identity.clone(),
                not_after: 0,
                signer: Signer::default(),
            };
            if let Err(status) = authorize(world, &peer, &name.to_string()) {
                stream.end(status);
            }
            // One that is gone is still where it was.
            let Some(node) = node.filter(|node| **node != stream.node) else {
                continue;
            };
            stream.node.clone_from(node);
            let wanted = stream.explicit.iter().chain(stream.implied.keys());
            let local: Vec<(Key, Arc<Compiled>)> = wanted
                .filter_map(|key| Some((key, &self.resources.get(key)?.variants)))
                .filter(|(key, variants)| {
                    key.rank == Kind::Endpoints as u8 && !variants.is_common()
                })
                .map(|(key, variants)| (key.clone(), variants.of(node).clone()))
                .collect();
            for (key, compiled) in &local {
                stream.offer(key, compiled, Some(seen));
            }
        }
    }
}
