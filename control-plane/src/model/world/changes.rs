//! What follows from a change to one object: which tables are to be made again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use weft_api::names::CONTROL_PLANE_NAMESPACE;
use weft_api::policy::traffic::TargetKind;
use weft_api::policy::{
    EgressPolicySpec, ExternalServiceSpec, MtlsMode, PeerAuthenticationSpec, TelemetrySpec,
    TrafficPolicySpec,
};

use super::super::{
    BackendTraffic, Change, EndpointSlice, Kind, Name, Node, Object, ObjectRef, Policy, Route,
    Service, Workload,
};
use super::said::names_in;
use super::{
    Dirty, World, in_namespace, labels, own_addresses, selector_label, slice_addresses,
    slice_workloads,
};

impl World {
    /// Takes one change and adds what it may have changed to `dirty`. A change that changes
    /// nothing adds nothing.
    pub fn apply(&mut self, change: Change, dirty: &mut Dirty) {
        match change {
            Change::Set(object) => {
                let reference = object.reference();
                self.readable(&reference, dirty);
                let name = reference.name;
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
                    Object::EgressPolicy(new) => self.set_egress(name, Some(new), dirty),
                    Object::Telemetry(new) => self.set_telemetry(name, Some(new), dirty),
                }
            }
            Change::Generation { object, generation } => {
                if self.generations.insert(object.clone(), generation) != Some(generation) {
                    dirty.said.insert(object);
                }
            }
            Change::Unreadable { object, unreadable } => {
                let before = self.unreadable.get(&object);
                if before != Some(&*unreadable) {
                    self.unreadable.insert(object.clone(), *unreadable);
                    dirty.said.insert(object);
                }
            }
            Change::Remove(object) => {
                self.readable(&object, dirty);
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
            Kind::EgressPolicy => self.set_egress(name, None, dirty),
            Kind::Telemetry => self.set_telemetry(name, None, dirty),
        }
    }

    /// An object can be read again, or is gone.
    fn readable(&mut self, object: &ObjectRef, dirty: &mut Dirty) {
        if self.unreadable.remove(object).is_some() {
            dirty.said.insert(object.clone());
        }
    }

    fn set_egress(&mut self, name: Name, new: Option<Policy<EgressPolicySpec>>, dirty: &mut Dirty) {
        if put(&mut self.egress, name.clone(), new) {
            dirty.said_of(Kind::EgressPolicy, [&name]);
            dirty.said_of(Kind::EgressPolicy, names_in(&self.egress, &name.namespace));
            dirty.policy(name.namespace);
        }
    }

    fn set_telemetry(&mut self, name: Name, new: Option<Policy<TelemetrySpec>>, dirty: &mut Dirty) {
        if put(&mut self.telemetry, name.clone(), new) {
            dirty.said_of(Kind::Telemetry, [&name]);
            dirty.said_of(Kind::Telemetry, names_in(&self.telemetry, &name.namespace));
            dirty.policy(name.namespace);
        }
    }

    fn set_route(&mut self, reference: ObjectRef, new: Option<Route>, dirty: &mut Dirty) {
        let old = self.routes.remove(&reference);
        if old != new {
            dirty.said.insert(reference.clone());
            for route in old.iter().chain(&new) {
                dirty.services.extend(route.services());
                self.said_beside_route(route, dirty);
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
        put(&mut self.peer_authentication, name.clone(), new);
        let beside = names_in(&self.peer_authentication, &name.namespace);
        dirty.said_of(Kind::PeerAuthentication, beside.chain([&name]));
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
        for external in old.iter().chain(&new) {
            self.said_beside_external(external, dirty);
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
        self.said_of_service(&name, both().flat_map(|service| &service.vips), dirty);
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
        for policy in old.into_iter().chain(&new) {
            self.said_beside_traffic(policy, dirty);
        }
        let limits = |policy: &Policy<TrafficPolicySpec>| {
            let spec = &policy.spec;
            spec.rate_limit.is_some() || spec.request_headers.is_some() || spec.connection.is_some()
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
        let kind = Kind::XBackendTrafficPolicy;
        dirty.said_of(kind, [&name]);
        for service in old
            .into_iter()
            .chain(&new)
            .flat_map(BackendTraffic::services)
        {
            self.said_of_backends(&service, dirty);
        }
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
        self.said_of_workload(old.as_ref(), new.as_ref(), dirty);
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
