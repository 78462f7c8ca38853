//! All objects, and what follows from a change to one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use weft_api::policy::meta::selects;
use weft_api::policy::{PeerAuthenticationSpec, TelemetrySpec, TrafficPolicySpec};

use super::{
    Change, EndpointSlice, Kind, Name, Object, ObjectRef, Policy, Route, Service, Workload,
};

/// Everything the sources have reported, indexed for the compiler.
#[derive(Debug, Default)]
pub struct World {
    pub(crate) services: BTreeMap<Name, Service>,
    pub(crate) slices: BTreeMap<Name, EndpointSlice>,
    pub(crate) workloads: BTreeMap<Name, Workload>,
    pub(crate) traffic: BTreeMap<Name, Policy<TrafficPolicySpec>>,
    pub(crate) peer_authentication: BTreeMap<Name, Policy<PeerAuthenticationSpec>>,
    pub(crate) telemetry: BTreeMap<Name, Policy<TelemetrySpec>>,
    pub(crate) routes: BTreeMap<ObjectRef, Route>,
    /// Routes by a Service that is a parent of theirs.
    pub(crate) routes_of: BTreeMap<Name, BTreeSet<ObjectRef>>,
    /// Services by virtual address.
    pub(crate) vips: Index<IpAddr>,
    /// Workloads by address.
    pub(crate) addresses: Index<IpAddr>,
    /// EndpointSlices by the Service they name.
    pub(crate) slices_of: Index<Name>,
    /// Services by an address in their EndpointSlices.
    slice_addresses: Index<IpAddr>,
}

/// What a change may have changed for proxies. Too much is allowed, too little is not: what is
/// compiled again and turns out the same is not sent.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Dirty {
    /// Every destination that leads to a Service.
    pub destinations: bool,
    /// Services whose destinations changed.
    pub services: BTreeSet<Name>,
    /// Destinations `<address>:<port>` that lead to a workload.
    pub addresses: BTreeSet<IpAddr>,
    /// Services whose endpoints changed.
    pub endpoints: BTreeSet<Name>,
    /// Workloads: their own table and their endpoints when they are addressed directly.
    pub workloads: BTreeSet<Name>,
    /// Every workload's own table.
    pub all_workloads: bool,
}

impl Dirty {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Names by key; a key without names is not kept.
#[derive(Debug)]
pub(crate) struct Index<K>(HashMap<K, BTreeSet<Name>>);

impl<K> Default for Index<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: std::hash::Hash + Eq> Index<K> {
    fn insert(&mut self, key: K, name: &Name) {
        self.0.entry(key).or_default().insert(name.clone());
    }

    fn remove(&mut self, key: &K, name: &Name) {
        if let Some(names) = self.0.get_mut(key) {
            names.remove(name);
            if names.is_empty() {
                self.0.remove(key);
            }
        }
    }

    /// Names at `key`, in order.
    pub(crate) fn get(&self, key: &K) -> impl Iterator<Item = &Name> {
        self.0.get(key).into_iter().flatten()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &BTreeSet<Name>)> {
        self.0.iter()
    }
}

impl World {
    /// Takes one change and adds what it may have changed to `dirty`. A change that changes
    /// nothing adds nothing.
    pub fn apply(&mut self, change: Change, dirty: &mut Dirty) {
        match change {
            Change::Set(object) => match *object {
                Object::Service(service) => {
                    self.set_service(service.name.clone(), Some(service), dirty);
                }
                Object::EndpointSlice(slice) => {
                    self.set_slice(slice.name.clone(), Some(slice), dirty);
                }
                Object::Workload(workload) => {
                    self.set_workload(workload.name.clone(), Some(workload), dirty);
                }
                Object::TrafficPolicy(policy) => {
                    dirty.destinations |=
                        put(&mut self.traffic, policy.name.clone(), Some(*policy));
                }
                Object::PeerAuthentication(policy) => {
                    dirty.all_workloads |= put(
                        &mut self.peer_authentication,
                        policy.name.clone(),
                        Some(policy),
                    );
                }
                Object::Telemetry(policy) => {
                    dirty.all_workloads |=
                        put(&mut self.telemetry, policy.name.clone(), Some(policy));
                }
                Object::Route(route) => {
                    self.set_route(route.reference(), Some(*route), dirty);
                }
            },
            Change::Remove(ObjectRef { kind, name }) => match kind {
                Kind::Service => self.set_service(name, None, dirty),
                Kind::EndpointSlice => self.set_slice(name, None, dirty),
                Kind::Workload => self.set_workload(name, None, dirty),
                Kind::TrafficPolicy => dirty.destinations |= put(&mut self.traffic, name, None),
                Kind::PeerAuthentication => {
                    dirty.all_workloads |= put(&mut self.peer_authentication, name, None);
                }
                Kind::Telemetry => dirty.all_workloads |= put(&mut self.telemetry, name, None),
                Kind::HTTPRoute | Kind::GRPCRoute | Kind::TLSRoute | Kind::TCPRoute => {
                    self.set_route(ObjectRef { kind, name }, None, dirty);
                }
            },
        }
    }

    /// Services of a namespace, by name.
    pub fn services_in<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Service> {
        in_namespace(&self.services, namespace)
    }

    /// Workloads of a namespace, by name.
    pub fn workloads_in<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Workload> {
        in_namespace(&self.workloads, namespace)
    }

    pub fn workload(&self, name: &Name) -> Option<&Workload> {
        self.workloads.get(name)
    }

    pub fn service(&self, name: &Name) -> Option<&Service> {
        self.services.get(name)
    }

    /// The workload at an address; of several the first by name.
    pub fn workload_at(&self, address: IpAddr) -> Option<&Workload> {
        self.addresses
            .get(&address)
            .find_map(|name| self.workloads.get(name))
    }

    /// Workloads that a Service selects, by name; none when it has no selector.
    pub fn selected<'a>(&'a self, service: &'a Service) -> impl Iterator<Item = &'a Workload> {
        self.workloads_in(&service.name.namespace)
            .filter(|workload| is_selected(service, workload))
    }

    /// Routes that name a Service as their parent.
    pub fn routes_of(&self, service: &Name) -> impl Iterator<Item = &Route> {
        self.routes_of
            .get(service)
            .into_iter()
            .flatten()
            .filter_map(|route| self.routes.get(route))
    }

    /// Every route.
    pub fn routes(&self) -> impl Iterator<Item = &Route> {
        self.routes.values()
    }

    fn set_route(&mut self, reference: ObjectRef, new: Option<Route>, dirty: &mut Dirty) {
        let old = self.routes.get(&reference);
        if old == new.as_ref() {
            return;
        }
        for service in old.map(Route::services).into_iter().flatten() {
            if let Some(routes) = self.routes_of.get_mut(&service) {
                routes.remove(&reference);
                if routes.is_empty() {
                    self.routes_of.remove(&service);
                }
            }
            dirty.services.insert(service);
        }
        for service in new.iter().flat_map(Route::services) {
            self.routes_of
                .entry(service.clone())
                .or_default()
                .insert(reference.clone());
            dirty.services.insert(service);
        }
        match new {
            Some(new) => self.routes.insert(reference, new),
            None => self.routes.remove(&reference),
        };
    }

    fn set_service(&mut self, name: Name, new: Option<Service>, dirty: &mut Dirty) {
        let old = self.services.get(&name);
        if old == new.as_ref() {
            return;
        }
        for service in old.into_iter().chain(new.as_ref()) {
            for workload in in_namespace(&self.workloads, &name.namespace) {
                if is_selected(service, workload) {
                    dirty.workloads.insert(workload.name.clone());
                }
            }
        }
        for vip in old.into_iter().flat_map(|service| &service.vips) {
            self.vips.remove(vip, &name);
        }
        for vip in new.iter().flat_map(|service| &service.vips) {
            self.vips.insert(*vip, &name);
        }
        // The same address may now be, or no longer be, a workload's own.
        dirty.destinations = true;
        dirty.endpoints.insert(name.clone());
        put(&mut self.services, name, new);
    }

    fn set_slice(&mut self, name: Name, new: Option<EndpointSlice>, dirty: &mut Dirty) {
        let old = self.slices.get(&name);
        if old == new.as_ref() {
            return;
        }
        if let Some(old) = old {
            let service = Name::new(name.namespace.clone(), old.service.clone());
            self.slices_of.remove(&service, &name);
            let others: BTreeSet<IpAddr> = self
                .slices_of
                .get(&service)
                .filter_map(|slice| self.slices.get(slice))
                .flat_map(slice_addresses)
                .collect();
            for address in slice_addresses(old).filter(|address| !others.contains(address)) {
                self.slice_addresses.remove(&address, &service);
            }
            dirty.endpoints.insert(service);
        }
        if let Some(new) = &new {
            let service = Name::new(name.namespace.clone(), new.service.clone());
            self.slices_of.insert(service.clone(), &name);
            for address in slice_addresses(new) {
                self.slice_addresses.insert(address, &service);
            }
            dirty.endpoints.insert(service);
        }
        put(&mut self.slices, name, new);
    }

    fn set_workload(&mut self, name: Name, new: Option<Workload>, dirty: &mut Dirty) {
        let old = self.workloads.get(&name);
        if old == new.as_ref() {
            return;
        }
        for workload in old.into_iter().chain(new.as_ref()) {
            for service in in_namespace(&self.services, &name.namespace) {
                if is_selected(service, workload) {
                    dirty.endpoints.insert(service.name.clone());
                }
            }
            for address in &workload.addresses {
                dirty.addresses.insert(*address);
                dirty
                    .endpoints
                    .extend(self.slice_addresses.get(address).cloned());
            }
        }
        for address in old.into_iter().flat_map(|workload| &workload.addresses) {
            self.addresses.remove(address, &name);
        }
        for address in new.iter().flat_map(|workload| &workload.addresses) {
            self.addresses.insert(*address, &name);
        }
        dirty.workloads.insert(name.clone());
        put(&mut self.workloads, name, new);
    }
}

/// Whether a Service's selector chooses a workload of the same namespace.
pub(crate) fn is_selected(service: &Service, workload: &Workload) -> bool {
    !service.selector.is_empty() && selects(&service.selector, &workload.labels)
}

fn slice_addresses(slice: &EndpointSlice) -> impl Iterator<Item = IpAddr> {
    slice
        .endpoints
        .iter()
        .flat_map(|endpoint| endpoint.addresses.iter().copied())
}

/// The objects of one namespace.
pub(crate) fn in_namespace<'a, T>(
    objects: &'a BTreeMap<Name, T>,
    namespace: &'a str,
) -> impl Iterator<Item = &'a T> {
    objects
        .range(Name::new(namespace, "")..)
        .take_while(move |(name, _)| name.namespace == namespace)
        .map(|(_, object)| object)
}

/// Sets or removes; whether anything changed.
fn put<T: PartialEq>(objects: &mut BTreeMap<Name, T>, name: Name, new: Option<T>) -> bool {
    if objects.get(&name) == new.as_ref() {
        return false;
    }
    match new {
        Some(new) => objects.insert(name, new),
        None => objects.remove(&name),
    };
    true
}
