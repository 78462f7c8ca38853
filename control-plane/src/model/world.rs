//! All objects, and what they are asked for. [`changes`]: what follows from a change to one;
//! [`said`]: whose status it may change.

mod changes;
mod said;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use weft_api::names::CONTROL_PLANE_NAMESPACE;
use weft_api::policy::meta::{LabelSelector, selects};
use weft_api::policy::{
    EgressPolicySpec, ExternalServiceSpec, PeerAuthenticationSpec, TelemetrySpec, TrafficPolicySpec,
};

use super::index::Index;
use super::{
    BackendTraffic, EndpointSlice, Kind, Name, Node, Object, ObjectRef, Policy, Route, Service,
    Unreadable, Workload,
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
    /// Objects of which what they say now cannot be honoured.
    pub(crate) unreadable: BTreeMap<ObjectRef, Unreadable>,
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
    /// Routes and policies of which something else may be said in return.
    pub said: BTreeSet<ObjectRef>,
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

    /// Why what an object says now cannot be honoured.
    pub fn unreadable(&self, of: &ObjectRef) -> Option<&Unreadable> {
        self.unreadable.get(of)
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

    /// Workloads of a namespace that a selector of a policy chooses, by name.
    pub(crate) fn chosen<'a>(
        &'a self,
        namespace: &str,
        selector: &'a LabelSelector,
    ) -> impl Iterator<Item = &'a Workload> {
        let first = selector.match_labels.iter().next();
        let label = first.map(|(key, value)| (namespace.to_owned(), key.clone(), value.clone()));
        let labelled = label.iter().flat_map(|label| self.labels.get(label));
        let labelled = labelled.filter_map(|name| self.workloads.get(name));
        let all = first.is_none().then(|| self.workloads_in(namespace));
        let found: Vec<_> = labelled.chain(all.into_iter().flatten()).collect();
        found
            .into_iter()
            .filter(|workload| selector.matches(&workload.labels))
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
