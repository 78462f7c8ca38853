//! All objects, and what follows from a change to one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use weft_api::names::CONTROL_PLANE_NAMESPACE;
use weft_api::policy::meta::selects;
use weft_api::policy::traffic::TargetKind;
use weft_api::policy::{
    EgressPolicySpec, ExternalServiceSpec, MtlsMode, PeerAuthenticationSpec, TelemetrySpec,
    TrafficPolicySpec,
};

use super::index::Index;
use super::{
    BackendTraffic, Change, EndpointSlice, Kind, Name, Node, Object, ObjectRef, Policy, Route,
    Service, Workload,
};

/// Everything the sources have reported, indexed for the compiler: a change costs what it touches,
/// not what there is.
#[derive(Debug, Default)]
pub struct World {
    pub(crate) services: BTreeMap<Name, Service>,
    pub(crate) slices: BTreeMap<Name, EndpointSlice>,
    pub(crate) workloads: BTreeMap<Name, Workload>,
    pub(crate) nodes: BTreeMap<Name, Node>,
    pub(crate) traffic: BTreeMap<Name, Policy<TrafficPolicySpec>>,
    pub(crate) peer_authentication: BTreeMap<Name, Policy<PeerAuthenticationSpec>>,
    pub(crate) telemetry: BTreeMap<Name, Policy<TelemetrySpec>>,
    pub(crate) external: BTreeMap<Name, Policy<ExternalServiceSpec>>,
    pub(crate) egress: BTreeMap<Name, Policy<EgressPolicySpec>>,
    pub(crate) routes: BTreeMap<ObjectRef, Route>,
    pub(crate) backend_traffic: BTreeMap<Name, BackendTraffic>,
    /// TrafficPolicies that say something to the workloads behind a Service, beside its callers.
    limiting: BTreeSet<Name>,
    /// Routes by a Service that they name as their parent or a backend.
    routes_of: BTreeMap<Name, BTreeSet<ObjectRef>>,
    /// `metadata.generation` of objects whose source tells it.
    generations: HashMap<ObjectRef, i64>,
    /// Services by virtual address.
    pub(crate) vips: Index<IpAddr>,
    /// Services by the port they have on every node.
    pub(crate) node_ports: Index<u16>,
    /// Nodes by address.
    pub(crate) node_addresses: Index<IpAddr>,
    /// Workloads by address; those that share their node's are not here.
    pub(crate) addresses: Index<IpAddr>,
    /// ExternalServices by the networks they are known by.
    networks: Index<IpNet>,
    /// EndpointSlices by the Service they name.
    pub(crate) slices_of: Index<Name>,
    /// Services by an address in their EndpointSlices that is given without a workload.
    slice_addresses: Index<IpAddr>,
    /// Services by a workload that their EndpointSlices name.
    slice_workloads: Index<Name>,
    /// Services by one label of their selector.
    selectors: Index<Label>,
    /// Workloads by each of their labels.
    labels: Index<Label>,
}

/// Namespace, key and value.
type Label = (String, String, String);

/// What a change may have changed for proxies. Too much is allowed, too little is not: what is
/// compiled again and turns out the same is not sent.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Dirty {
    /// Services: every destination that leads to one of them, or would by its host name.
    pub services: BTreeSet<Name>,
    /// Destinations `<address>:<port>`, whatever they lead to.
    pub addresses: BTreeSet<IpAddr>,
    /// Every destination with an address in one of these, whatever it leads to.
    pub networks: BTreeSet<IpNet>,
    /// ExternalServices whose endpoints changed.
    pub external: BTreeSet<Name>,
    /// Services whose endpoints changed.
    pub endpoints: BTreeSet<Name>,
    /// Workloads: their own table and their endpoints when they are addressed directly.
    pub workloads: BTreeSet<Name>,
    /// Namespaces: every workload's own table.
    pub workloads_of: BTreeSet<String>,
    /// Every workload's own table.
    pub all_workloads: bool,
    /// What is said of policies in return.
    pub statuses: bool,
}

impl Dirty {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// A policy of a namespace changed that says something about workloads.
    fn policy(&mut self, namespace: String) {
        // There, one without a selector holds for the whole mesh.
        self.all_workloads |= namespace == CONTROL_PLANE_NAMESPACE;
        self.workloads_of.insert(namespace);
    }
}

impl World {
    /// Takes one change and adds what it may have changed to `dirty`. A change that changes
    /// nothing adds nothing.
    pub fn apply(&mut self, change: Change, dirty: &mut Dirty) {
        match change {
            Change::Set(object) => {
                let name = object.reference().name;
                match *object {
                    Object::Service(new) => self.set_service(name, Some(new), dirty),
                    Object::EndpointSlice(new) => self.set_slice(name, Some(new), dirty),
                    Object::Workload(new) => self.set_workload(name, Some(new), dirty),
                    Object::Node(new) => self.set_node(name, Some(new), dirty),
                    Object::TrafficPolicy(new) => self.set_traffic(name, Some(*new), dirty),
                    Object::ExternalService(new) => self.set_external(name, Some(*new), dirty),
                    Object::Route(new) => self.set_route(new.reference(), Some(*new), dirty),
                    Object::BackendTraffic(new) => {
                        self.set_backend_traffic(name, Some(*new), dirty);
                    }
                    Object::PeerAuthentication(new) => {
                        self.set_peer_authentication(name, Some(new), dirty);
                    }
                    Object::EgressPolicy(new) => {
                        if put(&mut self.egress, name.clone(), Some(new)) {
                            dirty.policy(name.namespace);
                        }
                    }
                    Object::Telemetry(new) => {
                        if put(&mut self.telemetry, name.clone(), Some(new)) {
                            dirty.policy(name.namespace);
                        }
                    }
                }
            }
            Change::Generation { object, generation } => {
                dirty.statuses = true;
                self.generations.insert(object, generation);
            }
            Change::Remove(object) => {
                self.generations.remove(&object);
                self.remove(object, dirty);
            }
        }
    }

    fn remove(&mut self, ObjectRef { kind, name }: ObjectRef, dirty: &mut Dirty) {
        match kind {
            Kind::Service => self.set_service(name, None, dirty),
            Kind::EndpointSlice => self.set_slice(name, None, dirty),
            Kind::Workload => self.set_workload(name, None, dirty),
            Kind::Node => self.set_node(name, None, dirty),
            Kind::TrafficPolicy => self.set_traffic(name, None, dirty),
            Kind::ExternalService => self.set_external(name, None, dirty),
            Kind::HTTPRoute | Kind::GRPCRoute | Kind::TLSRoute | Kind::TCPRoute => {
                self.set_route(ObjectRef { kind, name }, None, dirty);
            }
            Kind::XBackendTrafficPolicy => self.set_backend_traffic(name, None, dirty),
            Kind::PeerAuthentication => {
                self.set_peer_authentication(name, None, dirty);
            }
            Kind::EgressPolicy => {
                if put(&mut self.egress, name.clone(), None) {
                    dirty.policy(name.namespace);
                }
            }
            Kind::Telemetry => {
                if put(&mut self.telemetry, name.clone(), None) {
                    dirty.policy(name.namespace);
                }
            }
        }
    }

    /// An object as it was set last.
    pub fn object(&self, of: &ObjectRef) -> Option<Object> {
        let name = &of.name;
        Some(match of.kind {
            Kind::Service => Object::Service(self.services.get(name)?.clone()),
            Kind::EndpointSlice => Object::EndpointSlice(self.slices.get(name)?.clone()),
            Kind::Workload => Object::Workload(self.workloads.get(name)?.clone()),
            Kind::Node => Object::Node(self.nodes.get(name)?.clone()),
            Kind::TrafficPolicy => Object::TrafficPolicy(Box::new(self.traffic.get(name)?.clone())),
            Kind::PeerAuthentication => {
                Object::PeerAuthentication(self.peer_authentication.get(name)?.clone())
            }
            Kind::Telemetry => Object::Telemetry(self.telemetry.get(name)?.clone()),
            Kind::EgressPolicy => Object::EgressPolicy(self.egress.get(name)?.clone()),
            Kind::ExternalService => {
                Object::ExternalService(Box::new(self.external.get(name)?.clone()))
            }
            Kind::HTTPRoute | Kind::GRPCRoute | Kind::TLSRoute | Kind::TCPRoute => {
                Object::Route(Box::new(self.routes.get(of)?.clone()))
            }
            Kind::XBackendTrafficPolicy => {
                Object::BackendTraffic(Box::new(self.backend_traffic.get(name)?.clone()))
            }
        })
    }

    /// `metadata.generation` of an object, when its source has told it.
    pub fn generation(&self, of: &ObjectRef) -> Option<i64> {
        self.generations.get(of).copied()
    }

    /// Every object that says what is to be done, rather than what there is.
    pub fn policies(&self) -> Vec<ObjectRef> {
        let of = |kind| {
            move |name: &Name| ObjectRef {
                kind,
                name: name.clone(),
            }
        };
        let traffic = self.traffic.keys().map(of(Kind::TrafficPolicy));
        let security = self
            .peer_authentication
            .keys()
            .map(of(Kind::PeerAuthentication));
        let telemetry = self.telemetry.keys().map(of(Kind::Telemetry));
        let external = self.external.keys().map(of(Kind::ExternalService));
        let egress = self.egress.keys().map(of(Kind::EgressPolicy));
        let routes = self.routes.keys().cloned();
        let backends = self.backend_traffic.keys();
        let backends = backends.map(of(Kind::XBackendTrafficPolicy));
        let policies = traffic
            .chain(security)
            .chain(telemetry)
            .chain(external)
            .chain(egress)
            .chain(backends);
        policies.chain(routes).collect()
    }

    /// How many objects there are, by kind.
    pub fn counts(&self) -> BTreeMap<&'static str, usize> {
        BTreeMap::from([
            ("services", self.services.len()),
            ("endpointSlices", self.slices.len()),
            ("workloads", self.workloads.len()),
            ("policies", self.policies().len()),
        ])
    }

    /// Services of a namespace, by name.
    pub fn services_in<'a>(
        &'a self,
        namespace: &str,
    ) -> impl Iterator<Item = &'a Service> + use<'a> {
        in_namespace(&self.services, namespace)
    }

    /// How many workloads have a proxy.
    pub fn sidecars(&self) -> usize {
        self.workloads
            .values()
            .filter(|workload| workload.sidecar)
            .count()
    }

    /// Workloads of a namespace, by name.
    pub fn workloads_in<'a>(
        &'a self,
        namespace: &str,
    ) -> impl Iterator<Item = &'a Workload> + use<'a> {
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

    /// The zone of a workload: its own, else its node's.
    pub fn zone_of<'a>(&'a self, workload: &'a Workload) -> &'a str {
        if !workload.zone.is_empty() || workload.node.is_empty() {
            return &workload.zone;
        }
        self.nodes
            .get(&Name::new("", &workload.node))
            .map_or("", |node| &node.zone)
    }

    /// Workloads that a Service selects, by name; none when it has no selector.
    pub fn selected<'a>(&'a self, service: &'a Service) -> impl Iterator<Item = &'a Workload> {
        selector_label(service)
            .into_iter()
            .flat_map(|label| self.labels.get(&label).collect::<Vec<_>>())
            .filter_map(|name| self.workloads.get(name))
            .filter(|workload| is_selected(service, workload))
    }

    /// Services whose selector chooses a workload, by name.
    pub(crate) fn services_of(&self, workload: &Workload) -> Vec<&Service> {
        let mut found: Vec<&Service> = labels(workload)
            .flat_map(|label| self.selectors.get(&label).collect::<Vec<_>>())
            .filter_map(|name| self.services.get(name))
            .filter(|service| is_selected(service, workload))
            .collect();
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found
    }

    /// Services whose EndpointSlices name a workload, or one of its addresses without saying
    /// whose it is; by name.
    pub(crate) fn sliced_services_of(&self, workload: &Workload) -> BTreeSet<&Name> {
        let by_address = (!workload.host_network)
            .then_some(&workload.addresses)
            .into_iter()
            .flatten()
            .flat_map(|address| self.slice_addresses.get(address));
        self.slice_workloads
            .get(&workload.name)
            .chain(by_address)
            .collect()
    }

    /// Routes that name a Service as their parent.
    pub fn routes_of(&self, service: &Name) -> impl Iterator<Item = &Route> {
        self.routes_of
            .get(service)
            .into_iter()
            .flatten()
            .filter_map(|route| self.routes.get(route))
            .filter(|route| route.services().contains(service))
    }

    /// Every route.
    pub fn routes(&self) -> impl Iterator<Item = &Route> {
        self.routes.values()
    }

    fn set_route(&mut self, reference: ObjectRef, new: Option<Route>, dirty: &mut Dirty) {
        let old = self.routes.remove(&reference);
        if old != new {
            for route in old.iter().chain(&new) {
                dirty.services.extend(route.services());
            }
            for service in old.iter().flat_map(Route::mentions) {
                if let Some(routes) = self.routes_of.get_mut(&service) {
                    routes.remove(&reference);
                    if routes.is_empty() {
                        self.routes_of.remove(&service);
                    }
                }
            }
            for service in new.iter().flat_map(Route::mentions) {
                let routes = self.routes_of.entry(service).or_default();
                routes.insert(reference.clone());
            }
        }
        if let Some(new) = new {
            self.routes.insert(reference, new);
        }
    }

    /// ExternalServices that an address is known to be, the narrowest network first, then by name.
    pub(crate) fn external_at(
        &self,
        address: IpAddr,
    ) -> impl Iterator<Item = &Policy<ExternalServiceSpec>> {
        let whole = IpNet::from(address);
        let lengths = (0..=whole.max_prefix_len()).rev();
        lengths
            .take_while(|_| !self.networks.is_empty())
            .filter_map(move |length| Some(IpNet::new(address, length).ok()?.trunc()))
            .flat_map(|network| self.networks.get(&network).collect::<Vec<_>>())
            .filter_map(|name| self.external.get(name))
    }

    /// ExternalServices that clients of a namespace know: its own, then the whole mesh's.
    pub(crate) fn external_for<'a>(
        &'a self,
        namespace: &str,
    ) -> impl Iterator<Item = &'a Policy<ExternalServiceSpec>> + use<'a> {
        let mesh = (namespace != CONTROL_PLANE_NAMESPACE)
            .then(|| in_namespace(&self.external, CONTROL_PLANE_NAMESPACE));
        in_namespace(&self.external, namespace).chain(mesh.into_iter().flatten())
    }

    fn set_peer_authentication(
        &mut self,
        name: Name,
        new: Option<Policy<PeerAuthenticationSpec>>,
        dirty: &mut Dirty,
    ) {
        let old = self.peer_authentication.get(&name);
        if old == new.as_ref() {
            return;
        }
        // Who calls a port that takes no mutual TLS has to know.
        let disables = |policy: &Policy<PeerAuthenticationSpec>| {
            let ports = policy.spec.port_level_mtls.values();
            let mut modes = ports.chain(&policy.spec.mtls);
            modes.any(|mtls| mtls.mode == MtlsMode::Disable)
        };
        if old.into_iter().chain(&new).any(disables) {
            let mesh = name.namespace == CONTROL_PLANE_NAMESPACE;
            let meant = self.workloads.values();
            for workload in meant.filter(|w| mesh || w.name.namespace == name.namespace) {
                dirty.workloads.insert(workload.name.clone());
                self.touch_endpoints_of(workload, dirty);
            }
        }
        dirty.policy(name.namespace.clone());
        put(&mut self.peer_authentication, name, new);
    }

    fn set_external(
        &mut self,
        name: Name,
        new: Option<Policy<ExternalServiceSpec>>,
        dirty: &mut Dirty,
    ) {
        let old = self.external.remove(&name);
        if old == new {
            put(&mut self.external, name, new);
            return;
        }
        let networks = |service: &Option<Policy<ExternalServiceSpec>>| -> BTreeSet<IpNet> {
            let networks = service.iter().flat_map(|service| service.spec.networks());
            networks.collect()
        };
        let (before, after) = (networks(&old), networks(&new));
        for network in &before {
            self.networks.remove(network, &name);
        }
        for network in &after {
            self.networks.insert(*network, &name);
        }
        let by_name = |service: &Option<_>, networks: &BTreeSet<IpNet>| {
            service.is_some() && networks.is_empty()
        };
        if by_name(&old, &before) || by_name(&new, &after) {
            dirty.policy(name.namespace.clone());
        }
        dirty.networks.extend(before.into_iter().chain(after));
        dirty.services.insert(name.clone());
        dirty.external.insert(name.clone());
        put(&mut self.external, name, new);
    }

    fn set_service(&mut self, name: Name, new: Option<Service>, dirty: &mut Dirty) {
        let old = self.services.remove(&name);
        if old == new {
            put(&mut self.services, name, new);
            return;
        }
        let same_workloads = matches!((&old, &new), (Some(old), Some(new))
            if old.selector == new.selector && old.ports == new.ports);
        let both = || old.iter().chain(new.as_ref());
        if !same_workloads {
            // Which protocol a workload's port speaks may be said by the Service.
            for service in both() {
                for workload in self.selected(service) {
                    dirty.workloads.insert(workload.name.clone());
                    dirty.addresses.extend(own_addresses(workload));
                }
            }
        }
        let node_ports = |service: &Option<Service>| -> BTreeSet<(u16, u16)> {
            let ports = service.iter().flat_map(|service| &service.ports);
            ports
                .filter_map(|port| Some((port.node_port?, port.port)))
                .collect()
        };
        let (old_ports, new_ports) = (node_ports(&old), node_ports(&new));
        if old_ports != new_ports {
            dirty
                .addresses
                .extend(self.node_addresses.iter().map(|(address, _)| *address));
        }
        // The same address may now be, or no longer be, a workload's own.
        dirty
            .addresses
            .extend(both().flat_map(|service| &service.vips));
        if let Some(old) = &old {
            for vip in &old.vips {
                self.vips.remove(vip, &name);
            }
            if let Some(label) = selector_label(old) {
                self.selectors.remove(&label, &name);
            }
        }
        for (node_port, _) in &old_ports {
            self.node_ports.remove(node_port, &name);
        }
        if let Some(new) = &new {
            for vip in &new.vips {
                self.vips.insert(*vip, &name);
            }
            if let Some(label) = selector_label(new) {
                self.selectors.insert(label, &name);
            }
        }
        for (node_port, _) in &new_ports {
            self.node_ports.insert(*node_port, &name);
        }
        self.touch_endpoints(name.clone(), dirty);
        if both().any(|service| service.headless) {
            dirty.addresses.extend(self.addresses_behind(&name));
        }
        dirty.services.insert(name.clone());
        // A backend that a route names may be there now, or no longer.
        let mentioned = self.routes_of.get(&name).into_iter().flatten();
        for route in mentioned.filter_map(|route| self.routes.get(route)) {
            dirty.services.extend(route.services());
        }
        put(&mut self.services, name, new);
    }

    /// By which addresses the workloads of a Service's EndpointSlices are reached directly.
    fn addresses_behind(&self, service: &Name) -> BTreeSet<IpAddr> {
        self.slices_of
            .get(service)
            .filter_map(|slice| self.slices.get(slice))
            .flat_map(|slice| self.addresses_in(slice))
            .collect()
    }

    fn addresses_in<'a>(&'a self, slice: &'a EndpointSlice) -> impl Iterator<Item = IpAddr> {
        let at = slice_addresses(slice)
            .flat_map(|address| self.addresses.get(&address).collect::<Vec<_>>());
        slice_workloads(slice)
            .chain(at)
            .filter_map(|name| self.workloads.get(name))
            .flat_map(own_addresses)
    }

    /// Whether a policy of a namespace says something to the workloads behind its Services.
    fn is_limiting(&self, namespace: &str) -> bool {
        let first = Name::new(namespace, "");
        let next = self.limiting.range(first..).next();
        next.is_some_and(|name| name.namespace == namespace)
    }

    /// The own tables of the workloads behind a Service, in whatever way it leads to them.
    fn touch_workloads_behind(&self, name: &Name, dirty: &mut Dirty) {
        if let Some(service) = self.services.get(name) {
            let selected = self.selected(service);
            dirty.workloads.extend(selected.map(|w| w.name.clone()));
        }
        let slices = self.slices_of.get(name);
        for slice in slices.filter_map(|slice| self.slices.get(slice)) {
            self.touch_workloads_in(slice, dirty);
        }
    }

    fn touch_workloads_in(&self, slice: &EndpointSlice, dirty: &mut Dirty) {
        let at = slice_addresses(slice)
            .flat_map(|address| self.addresses.get(&address).collect::<Vec<_>>());
        dirty
            .workloads
            .extend(slice_workloads(slice).chain(at).cloned());
    }

    /// What a policy says about a Service changed.
    fn touch_service(&self, name: Name, dirty: &mut Dirty) {
        if self
            .services
            .get(&name)
            .is_some_and(|service| service.headless)
        {
            dirty.addresses.extend(self.addresses_behind(&name));
        }
        if self.is_limiting(&name.namespace) {
            self.touch_workloads_behind(&name, dirty);
        }
        dirty.services.insert(name);
    }

    fn set_traffic(
        &mut self,
        name: Name,
        new: Option<Policy<TrafficPolicySpec>>,
        dirty: &mut Dirty,
    ) {
        let old = self.traffic.get(&name);
        if old == new.as_ref() {
            return;
        }
        dirty.statuses = true;
        let limits = |policy: &Policy<TrafficPolicySpec>| {
            policy.spec.rate_limit.is_some() || policy.spec.request_headers.is_some()
        };
        let (before, after) = (old.is_some_and(limits), new.as_ref().is_some_and(limits));
        // Until the tables of those that it no longer limits are made.
        if before || after {
            self.limiting.insert(name.clone());
        }
        for policy in old.into_iter().chain(&new) {
            let targets = &policy.spec.target_refs;
            let own = |name_of: &str| Name::new(name.namespace.clone(), name_of);
            for target in targets {
                let kind = match target.kind {
                    TargetKind::Service => {
                        self.touch_service(own(&target.name), dirty);
                        continue;
                    }
                    TargetKind::ExternalService => {
                        dirty.services.insert(own(&target.name));
                        continue;
                    }
                    TargetKind::Namespace => continue,
                    TargetKind::HTTPRoute => Kind::HTTPRoute,
                    TargetKind::GRPCRoute => Kind::GRPCRoute,
                };
                let name = own(&target.name);
                let route = self.routes.get(&ObjectRef { kind, name });
                let services = route.into_iter().flat_map(Route::services);
                dirty.services.extend(services);
            }
            if policy.spec.is_default() {
                for service in self.services_in(&name.namespace) {
                    self.touch_service(service.name.clone(), dirty);
                }
                for service in in_namespace(&self.external, &name.namespace) {
                    dirty.services.insert(service.name.clone());
                }
            }
        }
        if !after {
            self.limiting.remove(&name);
        }
        put(&mut self.traffic, name, new);
    }

    fn set_backend_traffic(&mut self, name: Name, new: Option<BackendTraffic>, dirty: &mut Dirty) {
        let old = self.backend_traffic.get(&name);
        if old == new.as_ref() {
            return;
        }
        dirty.statuses = true;
        for service in old
            .into_iter()
            .chain(&new)
            .flat_map(BackendTraffic::services)
        {
            self.touch_service(service, dirty);
        }
        put(&mut self.backend_traffic, name, new);
    }

    fn set_slice(&mut self, name: Name, new: Option<EndpointSlice>, dirty: &mut Dirty) {
        let old = self.slices.remove(&name);
        if old == new {
            put(&mut self.slices, name, new);
            return;
        }
        if let Some(old) = old {
            let service = Name::new(name.namespace.clone(), old.service.clone());
            self.slices_of.remove(&service, &name);
            // The Service's other slices may name the same ones: nearly always there are none.
            let others: Vec<&EndpointSlice> = self
                .slices_of
                .get(&service)
                .filter_map(|slice| self.slices.get(slice))
                .collect();
            let kept: BTreeSet<IpAddr> = others
                .iter()
                .flat_map(|slice| slice_addresses(slice))
                .collect();
            let named: BTreeSet<&Name> = others
                .iter()
                .flat_map(|slice| slice_workloads(slice))
                .collect();
            for address in slice_addresses(&old).filter(|address| !kept.contains(address)) {
                self.slice_addresses.remove(&address, &service);
            }
            for workload in slice_workloads(&old).filter(|name| !named.contains(name)) {
                self.slice_workloads.remove(workload, &service);
            }
            self.touch_slice(&old, &service, dirty);
            self.touch_endpoints(service, dirty);
        }
        if let Some(new) = &new {
            let service = Name::new(name.namespace.clone(), new.service.clone());
            self.slices_of.insert(service.clone(), &name);
            for address in slice_addresses(new) {
                self.slice_addresses.insert(address, &service);
            }
            for workload in slice_workloads(new) {
                self.slice_workloads.insert(workload.clone(), &service);
            }
            self.touch_slice(new, &service, dirty);
            self.touch_endpoints(service, dirty);
        }
        put(&mut self.slices, name, new);
    }

    /// The policies of a headless Service hold for its workloads addressed directly.
    fn touch_slice(&self, slice: &EndpointSlice, service: &Name, dirty: &mut Dirty) {
        if self.is_limiting(&service.namespace) {
            self.touch_workloads_in(slice, dirty);
        }
        if self
            .services
            .get(service)
            .is_some_and(|service| service.headless)
        {
            dirty.addresses.extend(self.addresses_in(slice));
        }
    }

    /// The endpoints of a Service changed: a limit that they share is another one for each when
    /// there are more of them.
    fn touch_endpoints(&self, service: Name, dirty: &mut Dirty) {
        if self.is_limiting(&service.namespace) {
            self.touch_workloads_behind(&service, dirty);
        }
        dirty.endpoints.insert(service);
    }

    /// The endpoints of every Service that a workload is behind.
    fn touch_endpoints_of(&self, workload: &Workload, dirty: &mut Dirty) {
        let selecting = self.services_of(workload).into_iter();
        let selecting = selecting.filter(|service| !service.sliced);
        let sliced = self.sliced_services_of(workload).into_iter();
        for service in selecting.map(|service| &service.name).chain(sliced) {
            self.touch_endpoints(service.clone(), dirty);
        }
    }

    fn set_workload(&mut self, name: Name, new: Option<Workload>, dirty: &mut Dirty) {
        let old = self.workloads.remove(&name);
        if old == new {
            put(&mut self.workloads, name, new);
            return;
        }
        for workload in old.iter().chain(&new) {
            self.touch_endpoints_of(workload, dirty);
            dirty.addresses.extend(own_addresses(workload));
        }
        if let Some(old) = &old {
            for address in own_addresses(old) {
                self.addresses.remove(&address, &name);
            }
            for label in labels(old) {
                self.labels.remove(&label, &name);
            }
        }
        if let Some(new) = &new {
            for address in own_addresses(new) {
                self.addresses.insert(address, &name);
            }
            for label in labels(new) {
                self.labels.insert(label, &name);
            }
        }
        dirty.workloads.insert(name.clone());
        put(&mut self.workloads, name, new);
    }

    fn set_node(&mut self, name: Name, new: Option<Node>, dirty: &mut Dirty) {
        let old = self.nodes.get(&name);
        if old == new.as_ref() {
            return;
        }
        let zone = |node: Option<&Node>| node.map_or(String::new(), |node| node.zone.clone());
        if zone(old) != zone(new.as_ref()) {
            // Rare: a node's zone is given to it when it joins.
            let on_it = |workload: &&Workload| workload.node == name.name;
            for workload in self.workloads.values().filter(on_it) {
                dirty.workloads.insert(workload.name.clone());
                self.touch_endpoints_of(workload, dirty);
            }
        }
        let addresses = |node: Option<&Node>| -> BTreeSet<IpAddr> {
            node.into_iter()
                .flat_map(|node| node.addresses.iter().copied())
                .collect()
        };
        let (before, after) = (addresses(old), addresses(new.as_ref()));
        for address in before.difference(&after) {
            self.node_addresses.remove(address, &name);
            dirty.addresses.insert(*address);
        }
        for address in after.difference(&before) {
            self.node_addresses.insert(*address, &name);
            dirty.addresses.insert(*address);
        }
        put(&mut self.nodes, name, new);
    }
}

/// The label by which a Service with a selector is found: its first.
fn selector_label(service: &Service) -> Option<Label> {
    let (key, value) = service.selector.iter().next()?;
    Some((service.name.namespace.clone(), key.clone(), value.clone()))
}

fn labels(workload: &Workload) -> impl Iterator<Item = Label> {
    workload.labels.iter().map(|(key, value)| {
        let namespace = workload.name.namespace.clone();
        (namespace, key.clone(), value.clone())
    })
}

/// The addresses by which a workload, and nobody else, is reached.
fn own_addresses(workload: &Workload) -> impl Iterator<Item = IpAddr> {
    let own = (!workload.host_network).then_some(&workload.addresses);
    own.into_iter().flatten().copied()
}

fn slice_workloads(slice: &EndpointSlice) -> impl Iterator<Item = &Name> {
    slice
        .endpoints
        .iter()
        .filter_map(|endpoint| Some(&endpoint.workload.as_ref()?.name))
}

/// Whether a Service's selector chooses a workload of the same namespace.
fn is_selected(service: &Service, workload: &Workload) -> bool {
    !service.selector.is_empty() && selects(&service.selector, &workload.labels)
}

/// Addresses of endpoints that name no workload.
fn slice_addresses(slice: &EndpointSlice) -> impl Iterator<Item = IpAddr> {
    slice
        .endpoints
        .iter()
        .filter(|endpoint| endpoint.workload.is_none())
        .flat_map(|endpoint| endpoint.addresses.iter().copied())
}

/// The objects of one namespace.
pub(crate) fn in_namespace<'a, T>(
    objects: &'a BTreeMap<Name, T>,
    namespace: &str,
) -> impl Iterator<Item = &'a T> + use<'a, T> {
    let first = Name::new(namespace, "");
    objects
        .range(first.clone()..)
        .take_while(move |(name, _)| name.namespace == first.namespace)
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
