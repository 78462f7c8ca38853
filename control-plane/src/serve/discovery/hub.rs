//! The model, what is compiled of it, and who asked for what.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use serde::Serialize;
use tokio::sync::Notify;
use tonic::Status;
use tracing::{info, warn};
use weft_api::proto::{DiscoveryResponse, Held, Hello, ResourceKey, Trust};

use super::stream::{Proxy, Stream};
use super::{Key, Kind};
use crate::compile::{Compiled, Problem, Settings, compile, problems, special_clients};
use crate::model::{Change, Dirty, Name, World};
use crate::serve::ca::unix;
use crate::serve::metrics::Metrics;
use crate::serve::tls::Peer;

/// Resources one proxy may ask for: far above what a workload calls.
const MAX_SUBSCRIPTIONS: usize = 100_000;
/// Longest name of a resource, bytes: a host name of 253 with a port has room.
const MAX_NAME: usize = 512;

/// All of it, behind one lock that is held only while something is compiled or looked up.
pub struct Hub {
    settings: Settings,
    metrics: Arc<Metrics>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    world: World,
    trust: Trust,
    /// What somebody asked for.
    resources: BTreeMap<Key, Entry>,
    streams: BTreeMap<u64, Stream>,
    next_stream: u64,
}

struct Entry {
    variants: Variants,
    subscribers: BTreeSet<u64>,
}

/// A resource as proxies see it: nearly always one thing for all.
#[derive(PartialEq)]
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
    pub certificate_expires: i64,
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
            stream.end(Status::unavailable(reason));
        }
    }

    /// Whether every connected proxy has acknowledged the roots of now.
    pub fn all_trust(&self) -> bool {
        let state = self.state();
        let key = Key::trust();
        let Some(newest) = state
            .resources
            .get(&key)
            .map(|entry| entry.variants.common.version())
        else {
            return state.streams.is_empty();
        };
        state.streams.values().all(|stream| {
            stream
                .sent
                .get(&key)
                .is_some_and(|sent| sent.acknowledged == newest)
        })
    }

    /// Proxies with an open stream.
    pub fn connected(&self) -> usize {
        self.state().streams.len()
    }

    /// Resources that somebody asked for.
    pub fn subscribed(&self) -> usize {
        self.state().resources.len()
    }

    /// What is wrong between the objects.
    pub fn problems(&self) -> Vec<Problem> {
        problems(&self.state().world)
    }

    /// A resource as a proxy of a namespace that asks now would get it.
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
        if dirty.destinations {
            keys.extend(self.with_prefix(Kind::Destination, String::new()));
        } else {
            for service in &dirty.services {
                keys.extend(self.destinations_of(service));
            }
        }
        if dirty.all_workloads {
            keys.extend(self.with_prefix(Kind::Workload, String::new()));
        }
        keys.into_iter().collect()
    }

    /// Destinations that lead to a Service: at its virtual addresses, and by its name.
    fn destinations_of(&self, service: &Name) -> Vec<Key> {
        let host = format!("{}.{}", service.name, service.namespace);
        let mut prefixes = vec![format!("{host}:"), format!("{host}.")];
        for vip in self.world.service(service).iter().flat_map(|s| &s.vips) {
            let mut prefix = SocketAddr::new(*vip, 0).to_string();
            prefix.pop();
            prefixes.push(prefix);
        }
        prefixes
            .into_iter()
            .flat_map(|prefix| self.with_prefix(Kind::Destination, prefix))
            .collect()
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
        entry.variants = variants;
        let subscribers: Vec<u64> = entry.subscribers.iter().copied().collect();
        for id in subscribers {
            let Some(compiled) = self.seen_by(id, key) else {
                continue;
            };
            self.follow(settings, id, key, &compiled, Some(seen));
            if let Some(stream) = self.streams.get_mut(&id) {
                stream.offer(key, &compiled, Some(seen));
            }
        }
    }

    /// The compiled resource, kept from now on for this subscriber, and the key that all its
    /// subscribers share.
    fn subscribe(&mut self, settings: &Settings, id: u64, key: &Key) -> (Key, Arc<Compiled>) {
        let (world, trust) = (&self.world, &self.trust);
        let entry = self.resources.entry(key.clone()).or_insert_with(|| Entry {
            variants: Variants::compile(world, settings, key, trust),
            subscribers: BTreeSet::new(),
        });
        entry.subscribers.insert(id);
        let client = self
            .streams
            .get(&id)
            .map_or("", |stream| &stream.proxy.workload.namespace);
        let compiled = entry.variants.of(client).clone();
        let shared = self.resources.get_key_value(key).map(|(key, _)| key);
        (shared.unwrap_or(key).clone(), compiled)
    }

    /// A resource as a connected proxy sees it.
    fn seen_by(&self, id: u64, key: &Key) -> Option<Arc<Compiled>> {
        let client = &self.streams.get(&id)?.proxy.workload.namespace;
        Some(self.resources.get(key)?.variants.of(client).clone())
    }

    fn unsubscribe(&mut self, id: u64, key: &Key) {
        if let Some(entry) = self.resources.get_mut(key) {
            entry.subscribers.remove(&id);
            if entry.subscribers.is_empty() {
                self.resources.remove(key);
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
                let newest = self.resources.get(key).map_or(0, |entry| {
                    let client = &stream.proxy.workload.namespace;
                    entry.variants.of(client).version()
                });
                ResourceStatus {
                    kind: match key.kind() {
                        weft_api::proto::ResourceKind::Destination => "Destination",
                        weft_api::proto::ResourceKind::Endpoints => "Endpoints",
                        weft_api::proto::ResourceKind::Workload => "Workload",
                        weft_api::proto::ResourceKind::Trust => "Trust",
                        weft_api::proto::ResourceKind::Unspecified => "",
                    },
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
            certificate_expires: proxy.hello.certificate_expires,
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
