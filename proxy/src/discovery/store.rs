//! The resources held, and what each message of the control plane does to them. No I/O.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::Instant;
use weft_api::proto::resource::Body;
use weft_api::proto::{self, Ack, EgressMode, Held, Nack, Resource, ResourceKey, ResourceKind};

use super::compile::{self, BackendKey, Invalid, Links};
use super::directory::{DestinationCell, Directory};
use super::endpoints;
use super::outside::Outside;
use super::status::{NackStatus, ResourceState, ResourceStatus, version_text};
use crate::balance::SharedLimits;
use crate::dns::{self, Dns, Feed};
use crate::identity::TrustBundle;
use crate::tables::{Destination, EndpointsCell, Known, Workload};

/// Name of the Trust resource.
const TRUST: &str = "trust";
/// Endpoints that no destination reads are kept this long: their destination may be on its way.
const ORPHAN_ENDPOINTS: Duration = Duration::from_secs(60);

/// What to tell the control plane about a message.
#[derive(Debug, Default)]
pub(super) struct Reply {
    pub acks: Vec<Ack>,
    pub nacks: Vec<Nack>,
    /// Subscriptions of the proxy's own that a refusal makes necessary.
    pub subscribe: Vec<Held>,
    /// No longer wanted.
    pub unsubscribe: Vec<ResourceKey>,
}

/// Everything held, with versions.
pub(super) struct Store {
    directory: Arc<Directory>,
    trust_domain: String,
    workload: (String, Version),
    outside: HeldOutside,
    trust: Version,
    destinations: BTreeMap<SocketAddr, HeldDestination>,
    shared: Shared,
}

/// Version held and version refused.
#[derive(Debug, Default)]
struct Version {
    /// 0 for none.
    held: u64,
    nack: Option<NackStatus>,
}

impl Version {
    fn good(&mut self, version: u64) {
        self.held = version;
        self.nack = None;
    }

    fn bad(&mut self, version: u64, reason: &str) {
        self.nack = Some(NackStatus {
            version: version_text(version),
            reason: reason.to_owned(),
        });
    }
}

#[derive(Debug, Default)]
struct HeldDestination {
    version: Version,
    /// Names of the endpoints that the compiled table reads.
    endpoints: Vec<Arc<str>>,
}

/// Hosts outside the mesh, by name and port.
#[derive(Debug, Default)]
struct HeldOutside {
    hosts: HashMap<(Box<str>, u16), Arc<DestinationCell>>,
    /// Names of the endpoints that their tables read.
    endpoints: Vec<Arc<str>>,
}

#[derive(Debug)]
struct HeldEndpoints {
    cell: Arc<EndpointsCell>,
    version: Version,
    absent: bool,
    /// Destinations that read it.
    users: usize,
    /// Subscribed to by ourselves, not only on our behalf.
    explicit: bool,
    since: Instant,
}

/// What destinations share.
#[derive(Default)]
struct Shared {
    endpoints: HashMap<Arc<str>, HeldEndpoints>,
    /// Those that this proxy finds out itself.
    local: HashMap<Arc<str>, Weak<EndpointsCell>>,
    dns: Option<Arc<Dns>>,
    limits: HashMap<BackendKey, Weak<SharedLimits>>,
}

impl Shared {
    fn held(&mut self, name: &str) -> &mut HeldEndpoints {
        if !self.endpoints.contains_key(name) {
            let name: Arc<str> = name.into();
            let held = HeldEndpoints {
                cell: Arc::new(EndpointsCell {
                    name: name.clone(),
                    ..EndpointsCell::default()
                }),
                version: Version::default(),
                absent: false,
                users: 0,
                explicit: false,
                since: Instant::now(),
            };
            return self.endpoints.entry(name).or_insert(held);
        }
        match self.endpoints.get_mut(name) {
            Some(held) => held,
            None => unreachable!("inserted above"),
        }
    }
}

impl Links for Shared {
    fn endpoints(&mut self, name: &str) -> Arc<EndpointsCell> {
        if !dns::is_local(name) {
            return self.held(name).cell.clone();
        }
        if let Some(cell) = self.local.get(name).and_then(Weak::upgrade) {
            return cell;
        }
        let fed = self.dns.as_ref().and_then(|dns| Feed::cell(dns, name).ok());
        let cell = fed.unwrap_or_else(|| {
            Arc::new(EndpointsCell {
                name: name.into(),
                ..EndpointsCell::default()
            })
        });
        self.local.insert(cell.name.clone(), Arc::downgrade(&cell));
        cell
    }

    fn limits(&mut self, key: BackendKey) -> Arc<SharedLimits> {
        if let Some(limits) = self.limits.get(&key).and_then(Weak::upgrade) {
            return limits;
        }
        let limits = Arc::new(SharedLimits::default());
        self.limits.insert(key, Arc::downgrade(&limits));
        limits
    }
}

pub(super) fn key(kind: ResourceKind, name: impl Into<String>) -> ResourceKey {
    ResourceKey {
        kind: kind.into(),
        name: name.into(),
    }
}

impl Store {
    /// `workload` is "namespace/name".
    pub(super) fn new(directory: Arc<Directory>, trust_domain: &str, workload: &str) -> Self {
        Self {
            trust_domain: trust_domain.to_owned(),
            workload: (workload.to_owned(), Version::default()),
            outside: HeldOutside::default(),
            trust: Version::default(),
            destinations: BTreeMap::new(),
            shared: Shared {
                dns: directory.dns().cloned(),
                ..Shared::default()
            },
            directory,
        }
    }

    /// A worker wants a destination. What to subscribe to; nothing when it is held already, or
    /// forgotten again.
    pub(super) fn want(&mut self, address: SocketAddr) -> Option<Held> {
        if self.destinations.contains_key(&address) || self.directory.cell(&address).is_none() {
            return None;
        }
        self.destinations
            .insert(address, HeldDestination::default());
        Some(held(key(ResourceKind::Destination, address.to_string()), 0))
    }

    /// Everything that is wanted, with the versions held: the first subscription of a stream.
    pub(super) fn resume(&mut self) -> Vec<Held> {
        let mut all = vec![
            held(key(ResourceKind::Trust, TRUST), self.trust.held),
            held(
                key(ResourceKind::Workload, self.workload.0.clone()),
                self.workload.1.held,
            ),
        ];
        all.extend(self.destinations.iter().map(|(address, destination)| {
            held(
                key(ResourceKind::Destination, address.to_string()),
                destination.version.held,
            )
        }));
        for (name, endpoints) in &mut self.shared.endpoints {
            endpoints.explicit = endpoints.users > 0;
            if endpoints.explicit {
                all.push(held(
                    key(ResourceKind::Endpoints, &**name),
                    endpoints.version.held,
                ));
            }
        }
        all
    }

    /// Takes in a message.
    pub(super) fn apply(&mut self, resources: Vec<Resource>) -> Reply {
        let mut reply = Reply::default();
        for resource in resources {
            let Some(key) = resource.key else {
                tracing::warn!("the control plane sent a resource without a key; it is ignored");
                continue;
            };
            let version = resource.version;
            let result = match resource.body {
                _ if version == 0 => Err(Invalid("its version is 0".into())),
                None => Err(Invalid(
                    "it has no body known to this version of the proxy".into(),
                )),
                Some(body) => self.take(&key, version, &body, &mut reply),
            };
            match result {
                Ok(true) => reply.acks.push(Ack {
                    key: Some(key),
                    version,
                }),
                // Unsubscribed in the meantime.
                Ok(false) => {}
                Err(Invalid(reason)) => {
                    tracing::warn!(
                        kind = kind_text(&key),
                        name = key.name,
                        version = version_text(version),
                        "refused, the last good one stays: {reason}"
                    );
                    self.refused(&key, version, &reason, &mut reply);
                    reply.nacks.push(Nack {
                        key: Some(key),
                        version,
                        reason,
                    });
                }
            }
        }
        self.shared
            .limits
            .retain(|_, limits| limits.strong_count() > 0);
        self.shared.local.retain(|_, cell| cell.strong_count() > 0);
        reply
    }

    /// `Ok(false)`: nobody wants it any longer.
    fn take(
        &mut self,
        key: &ResourceKey,
        version: u64,
        body: &Body,
        reply: &mut Reply,
    ) -> Result<bool, Invalid> {
        match (key.kind(), body) {
            (ResourceKind::Destination, Body::Destination(_) | Body::Absent(_)) => {
                let address: SocketAddr = key.name.parse().map_err(|_| {
                    Invalid(format!("'{}' is not a destination asked for", key.name))
                })?;
                let (Some(destination), Some(cell)) = (
                    self.destinations.get_mut(&address),
                    self.directory.cell(&address),
                ) else {
                    return Ok(false);
                };
                // The same version is the same content; the table stays, with what was learnt.
                if destination.version.held == version {
                    destination.version.good(version);
                    return Ok(true);
                }
                let compiled = match body {
                    Body::Destination(given) => {
                        Some(compile::destination(given, &mut self.shared)?)
                    }
                    _ => None,
                };
                destination.version.good(version);
                let names = compiled.as_ref().map(compile::endpoint_names);
                let before =
                    std::mem::replace(&mut destination.endpoints, names.unwrap_or_default());
                for name in &destination.endpoints {
                    self.shared.held(name).users += 1;
                }
                cell.set(compiled.map_or(Known::Absent, |table: Destination| {
                    Known::Present(Arc::new(table))
                }));
                self.release(before, reply);
                Ok(true)
            }
            (ResourceKind::Endpoints, Body::Endpoints(_) | Body::Absent(_)) => {
                let held = self.shared.held(&key.name);
                if held.version.held == version {
                    held.version.good(version);
                    return Ok(true);
                }
                let none = proto::Endpoints::default();
                let given = match body {
                    Body::Endpoints(given) => given,
                    _ => &none,
                };
                let next = endpoints::endpoints(given, &held.cell.current.load())?;
                let next = next.seen_from(&self.directory.workload());
                held.cell.current.store(Arc::new(next));
                held.absent = matches!(body, Body::Absent(_));
                held.version.good(version);
                Ok(true)
            }
            (ResourceKind::Workload, Body::Workload(given)) if key.name == self.workload.0 => {
                if self.workload.1.held != version {
                    let compiled =
                        compile::workload(given, &self.workload.0, &self.directory.workload())?;
                    self.take_outside(given, reply)?;
                    self.look_around(&compiled);
                    self.directory.set_workload(compiled);
                }
                self.workload.1.good(version);
                Ok(true)
            }
            (ResourceKind::Workload, Body::Absent(_)) if key.name == self.workload.0 => {
                tracing::warn!(
                    workload = self.workload.0,
                    "the control plane knows no such workload (now); what was known of it stays"
                );
                self.workload.1.good(version);
                Ok(true)
            }
            (ResourceKind::Trust, Body::Trust(given)) => {
                self.take_trust(given)?;
                self.trust.good(version);
                Ok(true)
            }
            (ResourceKind::Trust, Body::Absent(_)) => Err(Invalid(
                "roots cannot be absent; the ones trusted now stay".into(),
            )),
            _ => Err(Invalid(
                "it was not asked for, or its body is of another kind than its key".into(),
            )),
        }
    }

    /// What is near is another matter when our own place is another one: rarely, and at the start.
    fn look_around(&self, workload: &Workload) {
        for held in self.shared.endpoints.values() {
            let now = held.cell.current.load();
            if let Some(next) = now.moved_to(workload) {
                held.cell.current.store(Arc::new(next));
            }
        }
    }

    /// The hosts that the workload may call outside the mesh. Those that stay keep their cells, so
    /// that open connections see what changes.
    fn take_outside(&mut self, given: &proto::Workload, reply: &mut Reply) -> Result<(), Invalid> {
        let registry_only = match compile::known(given.egress, "egress mode")? {
            EgressMode::AllowAny => false,
            EgressMode::RegistryOnly => true,
        };
        let mut tables: Vec<(Box<str>, Destination)> = Vec::new();
        for external in &given.external_hosts {
            let within = |Invalid(why)| Invalid(format!("host '{}': {why}", external.host));
            let Some(destination) = &external.destination else {
                return Err(within(Invalid("it leads nowhere".into())));
            };
            let table = compile::destination(destination, &mut self.shared).map_err(within)?;
            tables.push((external.host.to_ascii_lowercase().into(), table));
        }
        let Some(dns) = self.directory.dns().cloned() else {
            return Ok(());
        };
        let names = tables
            .iter()
            .flat_map(|(_, table)| compile::endpoint_names(table));
        let before = std::mem::replace(&mut self.outside.endpoints, names.collect());
        for name in &self.outside.endpoints {
            self.shared.held(name).users += 1;
        }
        let mut known = std::mem::take(&mut self.outside.hosts);
        let mut hosts = Vec::new();
        for (host, table) in tables {
            let key = (host, table.port);
            // Another one of the same name and port comes before it.
            if self.outside.hosts.contains_key(&key) {
                continue;
            }
            let port = table.port;
            let now = Known::Present(Arc::new(table));
            let cell = match known.remove(&key) {
                Some(cell) => {
                    cell.set(now);
                    cell
                }
                None => self.directory.apart(port, now),
            };
            hosts.push((key.0.clone(), cell.clone()));
            self.outside.hosts.insert(key, cell);
        }
        let outside = Outside::new(registry_only, &dns, hosts);
        self.directory.set_outside(outside);
        self.release(before, reply);
        Ok(())
    }

    fn take_trust(&mut self, given: &proto::Trust) -> Result<(), Invalid> {
        if given.trust_domain != self.trust_domain {
            return Err(Invalid(format!(
                "it is for the trust domain '{}', this proxy is of '{}'",
                given.trust_domain, self.trust_domain
            )));
        }
        let roots = given.roots.iter().map(|root| root.to_vec().into());
        let bundle = TrustBundle::new(&self.trust_domain, roots)
            .map_err(|e| Invalid(format!("the roots cannot be used: {e}")))?;
        self.directory
            .identity()
            .set_trust(bundle)
            .map_err(|e| Invalid(e.to_string()))?;
        self.directory.set_session_key(&given.session_key);
        Ok(())
    }

    /// Bookkeeping of a NACK.
    fn refused(&mut self, key: &ResourceKey, version: u64, reason: &str, reply: &mut Reply) {
        match key.kind() {
            ResourceKind::Destination => {
                let Ok(address) = key.name.parse::<SocketAddr>() else {
                    return;
                };
                let Some(destination) = self.destinations.get_mut(&address) else {
                    return;
                };
                destination.version.bad(version, reason);
                // The control plane follows the endpoints of what it sent last; ours are those of
                // the table before.
                for name in &destination.endpoints {
                    let endpoints = self.shared.held(name);
                    endpoints.explicit = true;
                    let key = crate::discovery::store::key(ResourceKind::Endpoints, &**name);
                    reply.subscribe.push(held(key, endpoints.version.held));
                }
                // Nothing good was ever known: connections need not wait for it.
                if let Some(cell) = self.directory.cell(&address)
                    && matches!(cell.known(), Known::Pending)
                {
                    cell.set(Known::Absent);
                }
            }
            ResourceKind::Endpoints => {
                if let Some(endpoints) = self.shared.endpoints.get_mut(key.name.as_str()) {
                    endpoints.version.bad(version, reason);
                }
            }
            ResourceKind::Workload if key.name == self.workload.0 => {
                self.workload.1.bad(version, reason);
            }
            ResourceKind::Trust => self.trust.bad(version, reason),
            _ => {}
        }
    }

    /// Destinations that nobody used for long are gone from the directory: what to unsubscribe.
    pub(super) fn forget_idle(&mut self, idle: Duration) -> Vec<ResourceKey> {
        let mut reply = Reply::default();
        for address in self.directory.forget_idle(idle) {
            let Some(destination) = self.destinations.remove(&address) else {
                continue;
            };
            reply
                .unsubscribe
                .push(key(ResourceKind::Destination, address.to_string()));
            self.release(destination.endpoints, &mut reply);
        }
        self.shared
            .endpoints
            .retain(|_, held| held.users > 0 || held.since.elapsed() < ORPHAN_ENDPOINTS);
        reply.unsubscribe
    }

    /// A table that read these endpoints is gone.
    fn release(&mut self, names: Vec<Arc<str>>, reply: &mut Reply) {
        for name in names {
            let Some(held) = self.shared.endpoints.get_mut(&name) else {
                continue;
            };
            held.users = held.users.saturating_sub(1);
            if held.users == 0 {
                if held.explicit {
                    reply.unsubscribe.push(key(ResourceKind::Endpoints, &*name));
                }
                self.shared.endpoints.remove(&name);
            }
        }
    }

    /// All resources, for people.
    pub(super) fn status(&self) -> Vec<ResourceStatus> {
        let one = |kind, name: String, state, version: &Version| ResourceStatus {
            kind,
            name,
            state,
            version: (version.held != 0).then(|| version_text(version.held)),
            nack: version.nack.clone(),
        };
        let state = |version: &Version| match version.held {
            0 => ResourceState::Pending,
            _ => ResourceState::Present,
        };
        let mut all = vec![
            one("trust", TRUST.into(), state(&self.trust), &self.trust),
            one(
                "workload",
                self.workload.0.clone(),
                match self.directory.ready().workload {
                    // Told of, and never known.
                    false if self.workload.1.held != 0 => ResourceState::Absent,
                    _ => state(&self.workload.1),
                },
                &self.workload.1,
            ),
        ];
        for (address, destination) in &self.destinations {
            let state = match self.directory.cell(address).map(|cell| cell.known()) {
                Some(Known::Present(_)) => ResourceState::Present,
                Some(Known::Absent) => ResourceState::Absent,
                Some(Known::Pending) | None => ResourceState::Pending,
            };
            let name = address.to_string();
            all.push(one("destination", name, state, &destination.version));
        }
        let mut endpoints: Vec<_> = self.shared.endpoints.iter().collect();
        endpoints.sort_by_key(|(name, _)| *name);
        for (name, held) in endpoints {
            let state = match held.absent {
                true => ResourceState::Absent,
                false => state(&held.version),
            };
            all.push(one("endpoints", name.to_string(), state, &held.version));
        }
        all
    }
}

fn held(key: ResourceKey, version: u64) -> Held {
    Held {
        key: Some(key),
        version,
    }
}

fn kind_text(key: &ResourceKey) -> &'static str {
    match key.kind() {
        ResourceKind::Destination => "destination",
        ResourceKind::Endpoints => "endpoints",
        ResourceKind::Workload => "workload",
        ResourceKind::Trust => "trust",
        ResourceKind::Unspecified => "unknown",
    }
}
