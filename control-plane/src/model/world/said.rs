//! Of whom something else may be said in return after a change: the object itself, and those that
//! share with it what only one of them can have. So writing statuses costs what the change touches,
//! not what there is.

use std::collections::BTreeMap;
use std::net::IpAddr;

use weft_api::policy::meta::LabelSelector;
use weft_api::policy::traffic::{TargetKind, TargetRef};
use weft_api::policy::{ExternalServiceSpec, TrafficPolicySpec};

use super::super::{Kind, Name, ObjectRef, Policy, Route, Workload};
use super::{Dirty, World, own_addresses};

impl Dirty {
    pub(super) fn said_of<'a>(&mut self, kind: Kind, names: impl IntoIterator<Item = &'a Name>) {
        self.said.extend(names.into_iter().map(|name| ObjectRef {
            kind,
            name: name.clone(),
        }));
    }
}

/// The names of a namespace's objects.
pub(super) fn names_in<'a, T>(
    objects: &'a BTreeMap<Name, T>,
    namespace: &str,
) -> impl Iterator<Item = &'a Name> + use<'a, T> {
    let first = Name::new(namespace, "");
    objects
        .range(first.clone()..)
        .take_while(move |(name, _)| name.namespace == first.namespace)
        .map(|(name, _)| name)
}

impl World {
    /// A Service came, went or is another one.
    pub(super) fn said_of_service<'a>(
        &self,
        name: &Name,
        vips: impl Iterator<Item = &'a IpAddr>,
        dirty: &mut Dirty,
    ) {
        let routes = self.routes_of.get(name).into_iter().flatten();
        dirty.said.extend(routes.cloned());
        self.said_of_targeting(TargetKind::Service, name, dirty);
        self.said_of_backends(name, dirty);
        for vip in vips {
            let external = self.external_at(*vip).map(|external| &external.name);
            dirty.said_of(Kind::ExternalService, external);
        }
    }

    /// A route came, went or is another one: of the routes of a Service only one kind is used.
    pub(super) fn said_beside_route(&self, route: &Route, dirty: &mut Dirty) {
        for service in route.services() {
            let routes = self.routes_of.get(&service).into_iter().flatten();
            dirty.said.extend(routes.cloned());
        }
        let kind = match route.kind.kind() {
            Kind::HTTPRoute => TargetKind::HTTPRoute,
            Kind::GRPCRoute => TargetKind::GRPCRoute,
            _ => return,
        };
        self.said_of_targeting(kind, &route.name, dirty);
    }

    /// TrafficPolicies that name an object.
    fn said_of_targeting(&self, kind: TargetKind, name: &Name, dirty: &mut Dirty) {
        let names = |target: &TargetRef| target.kind == kind && target.name == name.name;
        let found = self.traffic_in(&name.namespace, |spec| spec.target_refs.iter().any(names));
        dirty.said_of(Kind::TrafficPolicy, found);
    }

    fn traffic_in<'a>(
        &'a self,
        namespace: &str,
        wanted: impl Fn(&TrafficPolicySpec) -> bool,
    ) -> impl Iterator<Item = &'a Name> {
        names_in(&self.traffic, namespace)
            .filter(move |name| self.traffic.get(name).is_some_and(|p| wanted(&p.spec)))
    }

    /// XBackendTrafficPolicies for a Service.
    pub(super) fn said_of_backends(&self, service: &Name, dirty: &mut Dirty) {
        let found = names_in(&self.backend_traffic, &service.namespace).filter(|name| {
            let policy = self.backend_traffic.get(name);
            policy.is_some_and(|policy| policy.services().any(|name| name == *service))
        });
        dirty.said_of(Kind::XBackendTrafficPolicy, found);
    }

    /// A TrafficPolicy came, went or is another one: of those for a target one is used, and what
    /// it says of retries may go before an XBackendTrafficPolicy.
    pub(super) fn said_beside_traffic(
        &self,
        policy: &Policy<TrafficPolicySpec>,
        dirty: &mut Dirty,
    ) {
        let namespace = &policy.name.namespace;
        dirty.said_of(Kind::TrafficPolicy, [&policy.name]);
        let is_default = policy.spec.is_default();
        let targets = &policy.spec.target_refs;
        let beside = self.traffic_in(namespace, |spec| {
            let shared = |target: &TargetRef| {
                let mut own = targets.iter();
                own.any(|own| own.kind == target.kind && own.name == target.name)
            };
            (is_default && spec.is_default()) || spec.target_refs.iter().any(shared)
        });
        dirty.said_of(Kind::TrafficPolicy, beside);
        for target in targets.iter().filter(|t| t.kind == TargetKind::Service) {
            let service = Name::new(namespace.as_str(), target.name.as_str());
            self.said_of_backends(&service, dirty);
        }
    }

    /// An ExternalService came, went or is another one: a host or an address is one's only.
    pub(super) fn said_beside_external(
        &self,
        external: &Policy<ExternalServiceSpec>,
        dirty: &mut Dirty,
    ) {
        let name = &external.name;
        let networks = external.spec.networks();
        dirty.said_of(Kind::ExternalService, [name]);
        let beside = names_in(&self.external, &name.namespace).filter(|other| {
            self.external.get(other).is_some_and(|other| {
                let theirs = other.spec.networks();
                let mut hosts = other.spec.hosts.iter();
                hosts.any(|host| external.spec.hosts.contains(host))
                    || theirs.iter().any(|network| networks.contains(network))
            })
        });
        dirty.said_of(Kind::ExternalService, beside);
        self.said_of_targeting(TargetKind::ExternalService, name, dirty);
    }

    /// A workload came, went or is another one: policies with a selector may have found, or lost,
    /// somebody that they are for.
    pub(super) fn said_of_workload(
        &self,
        old: Option<&Workload>,
        new: Option<&Workload>,
        dirty: &mut Dirty,
    ) {
        let either = || old.into_iter().chain(new);
        if old.map(|workload| &workload.labels) != new.map(|workload| &workload.labels) {
            for workload in either() {
                let chooses = |selector: &Option<LabelSelector>| {
                    let selector = selector.as_ref();
                    selector.is_some_and(|selector| selector.matches(&workload.labels))
                };
                let namespace = &workload.name.namespace;
                let peers = names_in(&self.peer_authentication, namespace).filter(|name| {
                    let policy = self.peer_authentication.get(name);
                    policy.is_some_and(|policy| chooses(&policy.spec.selector))
                });
                dirty.said_of(Kind::PeerAuthentication, peers);
                let telemetry = names_in(&self.telemetry, namespace).filter(|name| {
                    let policy = self.telemetry.get(name);
                    policy.is_some_and(|policy| chooses(&policy.spec.selector))
                });
                dirty.said_of(Kind::Telemetry, telemetry);
            }
        }
        let reached = |workload: Option<&Workload>| -> Vec<IpAddr> {
            workload.into_iter().flat_map(own_addresses).collect()
        };
        let (before, after) = (reached(old), reached(new));
        if before != after {
            for address in before.into_iter().chain(after) {
                let external = self.external_at(address).map(|external| &external.name);
                dirty.said_of(Kind::ExternalService, external);
            }
        }
    }
}
