//! What in the model cannot work, or most likely is not meant, as sentences.
//!
//! - [`mod@unreachable`]: rules that no request comes to; ports that do not say that there are requests
//! - [`mtls`]: mutual TLS asked of those who cannot speak it
//! - [`outside`]: services outside the mesh
//! - [`places`]: Services that prefer what is near, with endpoints of which nobody knows where they are

mod mtls;
mod outside;
mod places;
mod unreachable;

use std::collections::{BTreeMap, BTreeSet};

use weft_api::policy::TrafficPolicySpec;
use weft_api::policy::meta::LabelSelector;
use weft_api::policy::traffic::{Fallback, TargetKind};

use super::endpoints::target_port;
use super::policy::default_winner;
use super::policy_status::{Unused, of_backend, route_of, used};
use super::resilience;
use super::said::{Chosen, chosen};
use super::status::status;
use super::workload::{display_name, is_strict};
use crate::finding::Severity;
use crate::model::{
    Check, EndpointSlice, Kind, Name, ObjectRef, Policy, TargetPort, World, in_namespace,
};

/// Something wrong with an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    pub object: ObjectRef,
    /// Field names from the object's root; list items by their index.
    pub path: Vec<String>,
    pub severity: Severity,
    /// A sentence without a full stop.
    pub message: String,
    /// What to do about it.
    pub help: String,
}

struct Problems(Vec<Problem>);

impl Problems {
    fn add(
        &mut self,
        (kind, name): (Kind, &Name),
        path: &str,
        severity: Severity,
        message: String,
        help: impl Into<String>,
    ) {
        self.0.push(Problem {
            object: ObjectRef {
                kind,
                name: name.clone(),
            },
            path: path.split('.').map(str::to_owned).collect(),
            severity,
            message,
            help: help.into(),
        });
    }
}

/// Everything wrong between the objects, in the objects' order.
pub fn problems(world: &World) -> Vec<Problem> {
    let mut found = Problems(Vec::new());
    services(world, &mut found);
    addresses(world, &mut found);
    slices(world, &mut found);
    traffic(world, &mut found);
    backend_traffic(world, &mut found);
    selectors(world, &mut found);
    routes(world, &mut found);
    probes(world, &mut found);
    outside::find(world, &mut found);
    places::find(world, &mut found);
    unreachable::find(world, &mut found);
    mtls::find(world, &mut found);
    found.0.sort();
    found.0
}

fn services(world: &World, found: &mut Problems) {
    for (name, service) in &world.services {
        let at = (Kind::Service, name);
        for (index, port) in service.ports.iter().enumerate() {
            if port.name.is_empty() && service.ports.len() > 1 {
                found.add(
                    at,
                    &format!("spec.ports.{index}.name"),
                    Severity::Warning,
                    format!("port {} of Service {name} has no name, and there are others: EndpointSlices and policies tell ports by name, and Kubernetes refuses such a Service", port.port),
                    "name each port, by what is spoken there (http, grpc-admin, tcp-db)",
                );
            }
        }
        // Kubernetes keeps their slices, and a Service without pods is nothing unusual there.
        if service.sliced {
            continue;
        }
        let sliced = world.slices_of.get(name).next().is_some();
        if service.selector.is_empty() {
            if !sliced {
                found.add(
                    at,
                    "spec",
                    Severity::Warning,
                    format!("Service {name} has no selector and no EndpointSlice names it, so it has no endpoints"),
                    "add spec.selector, or an EndpointSlice with the label kubernetes.io/service-name",
                );
            }
            continue;
        }
        if sliced {
            continue;
        }
        if world.selected(service).next().is_none() {
            let labels = service
                .selector
                .iter()
                .map(|(key, value)| format!("{key}={value}"))
                .collect::<Vec<_>>()
                .join(",");
            found.add(
                at,
                "spec.selector",
                Severity::Warning,
                format!(
                    "no Workload in namespace {} has the labels {labels}",
                    name.namespace
                ),
                "correct the selector, or the labels in the Workloads' metadata",
            );
            continue;
        }
        for (index, port) in service.ports.iter().enumerate() {
            let serves = world.selected(service).any(|workload| {
                let Some(number) = target_port(workload, port) else {
                    return false;
                };
                workload.ports.is_empty() || workload.ports.iter().any(|known| known.port == number)
            });
            if !serves {
                let target = match &port.target {
                    TargetPort::Number(number) => number.to_string(),
                    TargetPort::Name(name) => format!("'{name}'"),
                };
                found.add(
                    at,
                    &format!("spec.ports.{index}"),
                    Severity::Warning,
                    format!("port {} of Service {name} leads to port {target}, which none of its Workloads has", port.port),
                    "correct targetPort, or add the port to the Workloads",
                );
            }
        }
    }
}

fn addresses(world: &World, found: &mut Problems) {
    for (address, names) in world.vips.iter() {
        let mut first: BTreeMap<u16, &Name> = BTreeMap::new();
        for service in names.filter_map(|name| world.service(name)) {
            for port in &service.ports {
                if let Some(winner) = first.get(&port.port) {
                    found.add(
                        (Kind::Service, &service.name),
                        "spec.clusterIP",
                        Severity::Error,
                        format!("{address}:{} is also Service {winner}, which is used; {} is not reached there", port.port, service.name),
                        "give each Service an address of its own",
                    );
                } else {
                    first.insert(port.port, &service.name);
                }
            }
        }
    }
    for (address, mut names) in world.addresses.iter() {
        let Some(winner) = names.next() else { continue };
        for name in names {
            found.add(
                (Kind::Workload, name),
                "spec.addresses",
                Severity::Error,
                format!("{address} is also Workload {winner}, which is used when it is addressed directly"),
                "give each Workload an address of its own",
            );
        }
    }
}

fn slices(world: &World, found: &mut Problems) {
    for (name, slice) in &world.slices {
        let service = Name::new(name.namespace.clone(), slice.service.clone());
        let at = (Kind::EndpointSlice, name);
        let Some(service) = world.service(&service) else {
            found.add(
                at,
                "metadata.labels",
                Severity::Warning,
                if slice.service.is_empty() {
                    format!("EndpointSlice {name} names no Service")
                } else {
                    format!("there is no Service {service}")
                },
                "set the label kubernetes.io/service-name to the name of a Service of the same namespace",
            );
            continue;
        };
        let named = |slice: &EndpointSlice| !service.sliced || !slice.endpoints.is_empty();
        for port in service.ports.iter().filter(|_| named(slice)) {
            let served = world
                .slices_of
                .get(&service.name)
                .filter_map(|slice| world.slices.get(slice))
                .any(|slice| slice.ports.iter().any(|known| known.name == port.name));
            if !served {
                found.add(
                    (Kind::Service, &service.name),
                    "spec.ports",
                    Severity::Warning,
                    format!(
                        "no EndpointSlice of Service {} has a port named '{}'",
                        service.name, port.name
                    ),
                    "name the port in an EndpointSlice as it is named in the Service",
                );
            }
        }
    }
    // A Service with several slices was looked at once for each.
    found.0.sort();
    found.0.dedup();
}

fn traffic(world: &World, found: &mut Problems) {
    for (name, policy) in &world.traffic {
        let at = (Kind::TrafficPolicy, name);
        let mut seen = BTreeSet::new();
        for (index, target) in policy.spec.target_refs.iter().enumerate() {
            let path = format!("spec.targetRefs.{index}");
            if !seen.insert(target) {
                found.add(
                    at,
                    &path,
                    Severity::Warning,
                    format!("{:?} '{}' is named twice", target.kind, target.name),
                    "remove one of the two targetRefs",
                );
            }
            match used(world, policy, target) {
                Ok(()) => {}
                Err(Unused::NotFound(why)) => {
                    let own = Name::new(name.namespace.clone(), &target.name);
                    let ports = match target.kind {
                        TargetKind::Service => world.service(&own).is_some(),
                        TargetKind::ExternalService => world.external.contains_key(&own),
                        _ => false,
                    };
                    let rules = route_of(world, policy, target).is_some();
                    let section = target.section_name.is_some();
                    let (field, help) = if section && ports {
                        ("sectionName", "write the name or the number of one of its ports")
                    } else if section && rules {
                        ("sectionName", "write the name of one of its rules (rules[].name)")
                    } else {
                        (
                            "name",
                            "correct the name; a policy's targets are of its own namespace",
                        )
                    };
                    found.add(at, &format!("{path}.{field}"), Severity::Warning, why, help);
                }
                Err(Unused::Conflicted(winner)) => found.add(
                    at,
                    &path,
                    Severity::Error,
                    format!("TrafficPolicy {winner} already says what holds for this target and is used; this one is not"),
                    "merge the two policies, or name different targets",
                ),
            }
        }
        let nothing = TrafficPolicySpec {
            target_refs: policy.spec.target_refs.clone(),
            ..TrafficPolicySpec::default()
        };
        if policy.spec == nothing {
            found.add(
                at,
                "spec",
                Severity::Warning,
                "it names whom it is for, and says nothing".to_owned(),
                "write what is to hold (timeouts, retries, …), or remove it",
            );
        }
        let is_for_nobody = policy.spec.is_default()
            && world.services_in(&name.namespace).next().is_none()
            && in_namespace(&world.external, &name.namespace)
                .next()
                .is_none();
        if is_for_nobody {
            found.add(
                at,
                "spec",
                Severity::Warning,
                format!(
                    "it is the default of namespace {0}, and there is no Service or ExternalService in namespace {0}",
                    name.namespace
                ),
                "write it in the namespace of the Services that are called, not of their callers",
            );
        }
        if policy.spec.target_refs.is_empty() {
            let default = default_winner(world, &name.namespace);
            if let Some(winner) = default.filter(|winner| winner.name != *name) {
                found.add(
                    at,
                    "spec",
                    Severity::Error,
                    format!("TrafficPolicy {} is already the default of namespace {} and is used; this one is not", winner.name, name.namespace),
                    "merge the two policies, or add targetRefs to one",
                );
            }
        }
        if let Some((field, service, port)) = resilience::meaningless(world, policy) {
            found.add(
                at,
                &format!("spec.{field}"),
                Severity::Warning,
                format!("{field} is about HTTP requests, and port {} of Service {} is declared not to be HTTP: it says nothing there", port.port, service.name),
                "correct appProtocol or the port's name in the Service, or name its other ports (sectionName)",
            );
        }
        if policy.spec.rate_limit.is_some()
            && let Some(workload) = resilience::unguarded(world, policy)
        {
            found.add(
                at,
                "spec.rateLimit",
                Severity::Warning,
                format!("Workload {workload} has no proxy, which would keep the rate limit: it takes every request"),
                "give the Workload a proxy, or limit its callers (circuitBreaker.limits)",
            );
        }
        let breaker = policy.spec.circuit_breaker.as_ref();
        if let Some(Fallback::Backend(backend)) =
            breaker.and_then(|breaker| breaker.fallback.as_ref())
        {
            let target = Name::new(
                backend.namespace.as_ref().unwrap_or(&name.namespace),
                &backend.name,
            );
            let known = world
                .service(&target)
                .is_some_and(|service| service.ports.iter().any(|port| port.port == backend.port));
            if !known {
                found.add(
                    at,
                    "spec.circuitBreaker.fallback.backend",
                    Severity::Warning,
                    format!("there is no Service {target} with port {}", backend.port),
                    "correct name, namespace or port of the fallback backend",
                );
            }
        }
    }
}

/// What the conditions of XBackendTrafficPolicies say.
fn backend_traffic(world: &World, found: &mut Problems) {
    for (name, policy) in &world.backend_traffic {
        for (index, target) in policy.targets.iter().enumerate() {
            for condition in of_backend(world, policy, target) {
                let (severity, help) = match (condition.kind, condition.reason) {
                    ("Accepted", "TargetNotFound") => (
                        Severity::Warning,
                        "correct the name; a policy's targets are of its own namespace",
                    ),
                    ("Accepted", _) if !condition.status => (
                        Severity::Error,
                        "the policy is not used for this target; correct what is said",
                    ),
                    ("Overridden", _) => (Severity::Warning, "remove one of the two"),
                    _ => continue,
                };
                found.add(
                    (Kind::XBackendTrafficPolicy, name),
                    &format!("spec.targetRefs.{index}"),
                    severity,
                    format!("{}: {}", condition.reason, condition.message),
                    help,
                );
            }
        }
    }
}

/// What the conditions of routes say.
fn routes(world: &World, found: &mut Problems) {
    for route in world.routes() {
        for (index, rule) in route.rules.iter().enumerate() {
            let backends = &rule.backends;
            if !backends.is_empty() && backends.iter().all(|backend| backend.weight == 0) {
                found.add(
                    (route.kind.kind(), &route.name),
                    &format!("spec.rules.{index}.backendRefs"),
                    Severity::Warning,
                    format!("all backendRefs of rules[{index}] have weight 0: its requests are answered 500"),
                    "give one a weight, or remove the rule",
                );
            }
        }
        let status = status(world, route);
        for (index, parent) in route.parents.iter().enumerate() {
            let Some(of_parent) = status.parents.iter().find(|known| known.parent == *parent)
            else {
                continue;
            };
            for condition in &of_parent.conditions {
                let (severity, path, help) = match (condition.kind, condition.status) {
                    ("Accepted", false) => (
                        Severity::Error,
                        format!("spec.parentRefs.{index}"),
                        "the route is not used for this parent; correct what is said",
                    ),
                    ("ResolvedRefs", false) => (
                        Severity::Error,
                        "spec.rules".to_owned(),
                        "its share of the requests is answered 500; correct the backendRef",
                    ),
                    ("PartiallyInvalid", true) => (
                        Severity::Error,
                        "spec.rules".to_owned(),
                        "the other rules are used; correct what is said",
                    ),
                    _ => continue,
                };
                found.add(
                    (route.kind.kind(), &route.name),
                    &path,
                    severity,
                    format!("{}: {}", condition.reason, condition.message),
                    help,
                );
            }
        }
    }
}

/// Probes that are refused where mutual TLS is required; of pods alike the first.
fn probes(world: &World, found: &mut Problems) {
    let mut said = BTreeSet::new();
    for workload in world.workloads.values().filter(|workload| workload.sidecar) {
        for probe in &workload.probes {
            let (name, port) = (&workload.name, probe.port);
            if probe.check == Check::Https
                && is_strict(world, workload, port)
                && said.insert((&name.namespace, display_name(workload), port))
            {
                found.add(
                    (Kind::Workload, name),
                    "spec.containers",
                    Severity::Error,
                    format!("an HTTPS probe of port {port} is refused, because the port takes mutual TLS only (STRICT) and what is inside TLS cannot be seen"),
                    "make it an HTTP or exec probe, or set portLevelMtls of that port to PERMISSIVE",
                );
            }
        }
    }
}

fn selectors(world: &World, found: &mut Problems) {
    let kind = Kind::PeerAuthentication;
    selecting(
        world,
        kind,
        &world.peer_authentication,
        |spec| &spec.selector,
        found,
    );
    selecting(
        world,
        Kind::Telemetry,
        &world.telemetry,
        |spec| &spec.selector,
        found,
    );
}

/// Policies for workloads that are for nobody, or for those for whom another one is used.
fn selecting<T>(
    world: &World,
    kind: Kind,
    policies: &BTreeMap<Name, Policy<T>>,
    selector: impl Fn(&T) -> &Option<LabelSelector>,
    found: &mut Problems,
) {
    for (name, policy) in policies {
        let (path, severity, message, help) = match chosen(world, policies, policy, &selector) {
            Chosen::All => continue,
            Chosen::Nobody => (
                "spec.selector",
                Severity::Warning,
                format!(
                    "the selector matches no Workload in namespace {}",
                    name.namespace
                ),
                "correct matchLabels, or the labels in the Workloads' metadata",
            ),
            Chosen::Conflicted { what, winner } => (
                "spec",
                Severity::Error,
                format!(
                    "{kind:?} {winner} already says what holds for {what} and is used; this one is not"
                ),
                "merge the two, or give each a selector for other workloads",
            ),
            Chosen::Partly {
                winner,
                example,
                lost,
                all,
            } => (
                "spec.selector",
                Severity::Warning,
                format!(
                    "{kind:?} {winner} is used for {lost} of the {all} Workloads that it selects, such as {example}: of two only one holds for a Workload, whole"
                ),
                "merge the two, or make the selectors choose different Workloads",
            ),
        };
        found.add((kind, name), path, severity, message, help);
    }
}
