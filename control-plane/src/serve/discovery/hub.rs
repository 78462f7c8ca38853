//! The model, what is compiled of it, and who asked for what.
//!
//! - [`origin`]: which objects tables come from.

mod origin;

pub use origin::{Arrival, Carried};

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustls_pki_types::CertificateDer;
use serde::Serialize;
use tokio::sync::{Notify, watch};
use tonic::Status;
use tonic::metadata::MetadataValue;
use tracing::{info, warn};
use weft_api::names::MOVE_METADATA;
use weft_api::proto::{DiscoveryResponse, Held, Hello, ResourceKey, Trust};

use super::stream::{Proxy, Stream};
use super::{Key, Kind};
use crate::compile::{
    Compiled, Problem, RouteStatus, Settings, compile, problems, special_clients, status,
};
use crate::model::{Change, Dirty, Name, World};
use crate::serve::ca::{Signer, unix};
use crate::serve::metrics::Metrics;
use crate::serve::tls::{Peer, peer};

/// Resources one proxy may ask for: far above what a workload calls.
const MAX_SUBSCRIPTIONS: usize = 100_000;
/// Longest name of a resource, bytes: a host name of 253 with a port has room.
const MAX_NAME: usize = 512;

/// All of it, behind one lock that is held only while something is compiled or looked up.
pub struct Hub {
    settings: Settings,
    metrics: Arc<Metrics>,
    state: Mutex<State>,
    /// Grows when what is to be said of routes may have changed.
    routes: watch::Sender<u64>,
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

/// A resource as proxies see it: nearly always one thing for all.
#[derive(Clone, PartialEq)]
struct Variants {
    common: Arc<Compiled>,
    /// What proxies of these namespaces see instead.
    special: BTreeMap<String, Arc<Compiled>>,
}

impl Variants {
    fn compile(world: &World, settings: &Settings, key: &Key, trust: &Trust) -> Self {
        let key = key.to_proto();
        let one = |client: &str| Arc::new(compile(world, settings, &key, trust, client));
        Self {
            common: one(""),
            special: special_clients(world, &key)
                .into_iter()
                .map(|namespace| {
                    let compiled = one(&namespace);
                    (namespace, compiled)
                })
                .collect(),
        }
    }

    /// What proxies of a namespace see.
    fn of(&self, namespace: &str) -> &Arc<Compiled> {
        self.special.get(namespace).unwrap_or(&self.common)
    }

    /// Services that any of them is or leads to.
    fn services(&self) -> BTreeSet<Name> {
        let all = std::iter::once(&self.common).chain(self.special.values());
        all.flat_map(|compiled| compiled.services()).collect()
    }
}

/// A connected proxy as `/status` shows it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ProxyStatus {
    /// `<namespace>/<name>`.
    pub workload: String,
    pub identity: String,
    pub address: SocketAddr,
    pub admin_address: String,
    pub version: String,
    pub instance: String,
    /// Seconds since the Unix epoch.
    pub connected: u64,
    pub certificate_expires: u64,
    /// Id of the root it hangs on; none when that one is not known (any more).
    pub certificate_root: Option<String>,
    #[serde(skip)]
    pub signer: Signer,
    /// Everything it was sent is acknowledged and the newest.
    pub up_to_date: bool,
    /// Resources that wait to be sent.
    pub waiting: usize,
    pub resources: Vec<ResourceStatus>,
}

/// A resource as one proxy has it. Versions are hexadecimal; empty for none.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ResourceStatus {
    pub kind: &'static str,
    pub name: String,
    pub newest: String,
    pub acknowledged: String,
    /// Why the proxy refused it, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

fn hex(version: u64) -> String {
    if version == 0 {
        String::new()
    } else {
        format!("{version:016x}")
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
            routes: watch::Sender::new(0),
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
        if !dirty.services.is_empty() {
            self.routes.send_modify(|changes| *changes += 1);
        }
        for key in keys {
            state.recompile(&self.settings, &key, seen);
        }
        for name in &dirty.workloads {
            state.recheck(name);
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

    /// Opens a proxy's stream.
    ///
    /// # Errors
    /// The workload it names is not its certificate's.
    pub(super) fn connect(
        self: &Arc<Self>,
        peer: &Peer,
        address: SocketAddr,
        hello: Hello,
    ) -> Result<Connection, Status> {
        let mut state = self.state();
        let name = authorize(&state.world, peer, &hello.workload).inspect_err(|status| {
            self.metrics.streams_refused.add(1);
            warn!(%address, identity = %peer.identity, "stream refused: {}", status.message());
        })?;
        let id = state.next_stream;
        state.next_stream += 1;
        info!(%address, workload = %name, identity = %peer.identity, version = hello.proxy_version, "proxy connected");
        let stream = Stream::new(Proxy {
            workload: name,
            identity: peer.identity.clone(),
            address,
            connected: SystemTime::now(),
            signer: peer.signer.clone(),
            certificate_expires: peer.not_after,
            hello,
        });
        let wake = stream.wake.clone();
        state.streams.insert(id, stream);
        self.metrics.streams_opened.add(1);
        Ok(Connection {
            hub: self.clone(),
            id,
            wake,
        })
    }

    /// Ends every stream, politely.
    pub fn end_all(&self, reason: &str) {
        for stream in self.state().streams.values_mut() {
            stream.end(moving(reason));
        }
    }

    /// The connected proxies, how many of them have acknowledged the roots of now, and who signed
    /// their certificates.
    pub fn trust(&self) -> Trusting {
        let state = self.state();
        let key = Key::trust();
        let newest = state
            .resources
            .get(&key)
            .map(|entry| entry.variants.common.version());
        let trusts = |stream: &&Stream| {
            let sent = stream.sent.get(&key);
            newest.is_some() && sent.map(|sent| sent.acknowledged) == newest
        };
        let workloads: BTreeSet<&Name> = state
            .streams
            .values()
            .map(|stream| &stream.proxy.workload)
            .filter(|name| {
                let known = state.world.workload(name);
                known.is_some_and(|workload| workload.sidecar)
            })
            .collect();
        Trusting {
            workloads: workloads.len() as u64,
            sidecars: state.world.sidecars() as u64,
            connected: state.streams.len() as u64,
            trusting: state.streams.values().filter(trusts).count() as u64,
            signers: state
                .streams
                .values()
                .map(|stream| stream.proxy.signer.clone())
                .collect(),
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
    pub fn counts(&self) -> std::collections::BTreeMap<&'static str, usize> {
        self.state().world.counts()
    }

    /// Becomes changed when what is to be said of routes may have changed.
    pub fn routes_changed(&self) -> watch::Receiver<u64> {
        self.routes.subscribe()
    }

    /// What is to be said of every route now.
    pub fn route_statuses(&self) -> Vec<RouteStatus> {
        let state = self.state();
        let routes = state.world.routes();
        routes.map(|route| status(&state.world, route)).collect()
    }

    /// What is wrong between the objects.
    pub fn problems(&self) -> Vec<Problem> {
        problems(&self.state().world)
    }

    /// A resource as a proxy that asks now would get it.
    pub fn look_up(&self, key: &ResourceKey, client: &str) -> Compiled {
        let state = self.state();
        compile(&state.world, &self.settings, key, &state.trust, client)
    }

    /// Every connected proxy, by workload.
    pub fn status(&self) -> Vec<ProxyStatus> {
        let state = self.state();
        let mut proxies: Vec<ProxyStatus> = state
            .streams
            .values()
            .map(|stream| state.status_of(stream))
            .collect();
        drop(state);
        proxies.sort_by(|a, b| (&a.workload, a.connected).cmp(&(&b.workload, b.connected)));
        proxies
    }
}

/// The connected proxies and the roots.
#[derive(Clone, Debug, Default)]
pub struct Trusting {
    pub connected: u64,
    /// Workloads that are known to have a proxy; and those of them that are connected here.
    pub sidecars: u64,
    pub workloads: u64,
    /// Of these, those that have acknowledged the roots of now.
    pub trusting: u64,
    /// For each, who signed the certificate it uses.
    pub signers: Vec<Signer>,
}

/// Ends a stream so that its proxy comes back at once, to another replica.
fn moving(reason: &str) -> Status {
    let mut status = Status::unavailable(reason);
    status
        .metadata_mut()
        .insert(MOVE_METADATA, MetadataValue::from_static("1"));
    status
}

/// Who may speak for a workload: the certificate's namespace and service account must be those of
/// the workload. One that is not known (yet) must at least be of the certificate's namespace.
fn authorize(world: &World, peer: &Peer, workload: &str) -> Result<Name, Status> {
    let name = Name::parse(workload).ok_or_else(|| {
        Status::invalid_argument(format!(
            "Hello names the workload '{workload}'; write <namespace>/<name>"
        ))
    })?;
    let identity = &peer.identity;
    let known = world.workload(&name);
    let account = known.map(|workload| workload.service_account.as_str());
    if name.namespace != identity.namespace
        || account.is_some_and(|account| account != identity.service_account)
    {
        return Err(Status::permission_denied(format!(
            "workload {name} runs as service account {}/{}, but the client certificate is {identity}",
            name.namespace,
            account.unwrap_or("?"),
        )));
    }
    Ok(name)
}

impl State {
    /// What somebody asked for and may have changed.
    fn touched(&self, dirty: &Dirty) -> Vec<Key> {
        let mut keys = BTreeSet::new();
        for service in &dirty.endpoints {
            keys.extend(self.with_prefix(Kind::Endpoints, format!("{service}:")));
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
            let compiled = variants.of(self.namespace_of(id)).clone();
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
        let client = self.streams.get(&id);
        let client = client.map_or("", |stream| &stream.proxy.workload.namespace);
        let compiled = match self.resources.get_mut(key) {
            Some(entry) => {
                entry.subscribers.insert(id);
                entry.variants.of(client).clone()
            }
            // Not reached: it has just been put there.
            None => Arc::new(compile(
                &self.world,
                settings,
                &key.to_proto(),
                &self.trust,
                client,
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

    /// The namespace of a connected proxy.
    fn namespace_of(&self, id: u64) -> &str {
        let stream = self.streams.get(&id);
        stream.map_or("", |stream| &stream.proxy.workload.namespace)
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

    /// A workload changed: whoever speaks for it must still be allowed to.
    fn recheck(&mut self, name: &Name) {
        let world = &self.world;
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
        }
    }

    fn status_of(&self, stream: &Stream) -> ProxyStatus {
        let resources: Vec<ResourceStatus> = stream
            .explicit
            .iter()
            .chain(
                stream
                    .implied
                    .keys()
                    .filter(|key| !stream.explicit.contains(key)),
            )
            .map(|key| {
                let sent = stream.sent.get(key).cloned().unwrap_or_default();
                let client = &stream.proxy.workload.namespace;
                let newest = self
                    .resources
                    .get(key)
                    .map_or(0, |entry| entry.variants.of(client).version());
                ResourceStatus {
                    kind: key.kind_name(),
                    name: key.name.to_string(),
                    newest: hex(newest),
                    acknowledged: hex(sent.acknowledged),
                    refused: sent
                        .refused
                        .map(|refused| format!("{}: {}", hex(refused.0), refused.1)),
                }
            })
            .collect();
        let proxy = &stream.proxy;
        ProxyStatus {
            workload: proxy.workload.to_string(),
            identity: proxy.identity.to_string(),
            address: proxy.address,
            admin_address: proxy.hello.admin_address.clone(),
            version: proxy.hello.proxy_version.clone(),
            instance: proxy.hello.instance.clone(),
            connected: unix(proxy.connected),
            certificate_expires: proxy.certificate_expires,
            certificate_root: None,
            signer: proxy.signer.clone(),
            up_to_date: stream.waiting() == 0
                && resources
                    .iter()
                    .all(|resource| resource.newest == resource.acknowledged),
            waiting: stream.waiting(),
            resources,
        }
    }
}

/// A proxy's open stream; dropping it closes it.
pub(super) struct Connection {
    hub: Arc<Hub>,
    id: u64,
    wake: Arc<Notify>,
}

impl Connection {
    /// Waits for what is to be sent next.
    ///
    /// # Errors
    /// The stream is to end.
    pub(super) async fn next(&self) -> Result<DiscoveryResponse, Status> {
        loop {
            {
                let mut state = self.hub.state();
                let Some(stream) = state.streams.get_mut(&self.id) else {
                    return Err(Status::unavailable("the stream was closed"));
                };
                if let Some(status) = stream.ended() {
                    return Err(status);
                }
                if let Some((response, seen)) = stream.take() {
                    self.hub.metrics.pushes.add(response.resources.len() as u64);
                    for seen in seen.into_iter().flatten() {
                        self.hub.metrics.push.observe(seen.elapsed());
                    }
                    return Ok(response);
                }
            }
            self.wake.notified().await;
        }
    }

    /// Everything that waits to be sent, taken.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> Vec<weft_api::proto::Resource> {
        let mut state = self.hub.state();
        let Some(stream) = state.streams.get_mut(&self.id) else {
            return Vec::new();
        };
        let mut resources = Vec::new();
        while let Some((response, _)) = stream.take() {
            resources.extend(response.resources);
        }
        resources
    }

    /// Its requests, as a handle that does not keep it open.
    pub(super) fn requests(&self) -> Requests {
        Requests {
            hub: self.hub.clone(),
            id: self.id,
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut state = self.hub.state();
        let Some(stream) = state.streams.remove(&self.id) else {
            return;
        };
        for key in stream.explicit.iter().chain(stream.implied.keys()) {
            state.unsubscribe(self.id, key);
        }
        drop(state);
        info!(workload = %stream.proxy.workload, address = %stream.proxy.address, "proxy disconnected");
    }
}

/// What a proxy says on its stream.
pub(super) struct Requests {
    hub: Arc<Hub>,
    id: u64,
}

impl Requests {
    /// The proxy asks for resources and says which versions it has.
    ///
    /// # Errors
    /// A resource has no name or kind, or is another workload's.
    pub(super) fn subscribe(&self, resources: Vec<Held>) -> Result<(), Status> {
        let mut wanted = Vec::with_capacity(resources.len());
        for held in resources {
            let key = read_key(held.key)?;
            wanted.push((key, held.version));
        }
        let mut state = self.hub.state();
        let Some(stream) = state.streams.get_mut(&self.id) else {
            return Ok(());
        };
        if stream.explicit.len() + wanted.len() > MAX_SUBSCRIPTIONS {
            return Err(Status::resource_exhausted(format!(
                "a proxy may ask for at most {MAX_SUBSCRIPTIONS} resources"
            )));
        }
        for (key, _) in &wanted {
            if key.rank == Kind::Workload as u8 && *key.name != *stream.proxy.workload.to_string() {
                return Err(Status::permission_denied(format!(
                    "workload {} asked for the table of {}; a proxy may ask only for its own",
                    stream.proxy.workload, key.name
                )));
            }
        }
        // Endpoints come before the destinations that lead to them, so that what the proxy holds
        // of them is known when the destinations are looked at.
        wanted.sort();
        let mut subscribed = Vec::with_capacity(wanted.len());
        for (key, version) in &wanted {
            let (key, compiled) = state.subscribe(&self.hub.settings, self.id, key);
            if let Some(stream) = state.streams.get_mut(&self.id) {
                stream.explicit.insert(key.clone());
                stream.holds(&key, *version);
            }
            subscribed.push((key, compiled));
        }
        for (key, compiled) in &subscribed {
            state.follow(&self.hub.settings, self.id, key, compiled, None);
            if let Some(stream) = state.streams.get_mut(&self.id) {
                stream.offer(key, compiled, None);
            }
        }
        Ok(())
    }

    /// The proxy no longer wants resources.
    ///
    /// # Errors
    /// A resource has no name or kind.
    pub(super) fn unsubscribe(&self, keys: Vec<ResourceKey>) -> Result<(), Status> {
        let mut state = self.hub.state();
        for key in keys {
            let key = read_key(Some(key))?;
            let Some(stream) = state.streams.get_mut(&self.id) else {
                return Ok(());
            };
            stream.explicit.remove(&key);
            if !stream.wants(&key) {
                stream.forget(&key);
                state.unsubscribe(self.id, &key);
            }
            if key.rank == Kind::Destination as u8 {
                state.let_go(self.id, &key, &BTreeSet::new());
            }
        }
        Ok(())
    }

    /// The proxy has taken a version.
    pub(super) fn acknowledge(&self, key: Option<ResourceKey>, version: u64) -> Result<(), Status> {
        let key = read_key(key)?;
        let seen = self
            .hub
            .state()
            .streams
            .get_mut(&self.id)
            .and_then(|stream| stream.acknowledge(&key, version));
        if let Some(seen) = seen {
            self.hub.metrics.acknowledged.observe(seen.elapsed());
        }
        Ok(())
    }

    /// The proxy has refused a version.
    pub(super) fn refuse(
        &self,
        key: Option<ResourceKey>,
        version: u64,
        reason: String,
    ) -> Result<(), Status> {
        let key = read_key(key)?;
        self.hub.metrics.nacks.add(1);
        if let Some(stream) = self.hub.state().streams.get_mut(&self.id) {
            warn!(workload = %stream.proxy.workload, resource = %key.name, "proxy refused a resource: {reason}");
            stream.refuse(&key, version, reason);
        }
        Ok(())
    }

    /// The proxy has a new certificate.
    ///
    /// # Errors
    /// It is somebody else's.
    pub(super) fn certificate(&self, leaf: Vec<u8>) -> Result<(), Status> {
        let leaf = CertificateDer::from(leaf);
        let mut state = self.hub.state();
        let Some(stream) = state.streams.get_mut(&self.id) else {
            return Ok(());
        };
        let proxy = &mut stream.proxy;
        let shown = peer(&leaf, &self.hub.settings.trust_domain)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        if shown.identity != proxy.identity {
            return Err(Status::permission_denied(format!(
                "the proxy of {} says it has a certificate of {}, but came with one of {}",
                proxy.workload, shown.identity, proxy.identity
            )));
        }
        proxy.signer = shown.signer;
        proxy.certificate_expires = shown.not_after;
        Ok(())
    }

    /// Ends the stream.
    pub(super) fn end(&self, status: Status) {
        if let Some(stream) = self.hub.state().streams.get_mut(&self.id) {
            stream.end(status);
        }
    }
}

fn read_key(key: Option<ResourceKey>) -> Result<Key, Status> {
    let key = key.ok_or_else(|| Status::invalid_argument("a resource without a key"))?;
    if key.name.is_empty() || key.name.len() > MAX_NAME {
        return Err(Status::invalid_argument(format!(
            "a resource name has 1 to {MAX_NAME} bytes"
        )));
    }
    let kind = key.kind();
    Key::new(kind, key.name)
        .ok_or_else(|| Status::invalid_argument("a resource of an unknown kind"))
}
