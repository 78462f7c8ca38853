//! What is said of routes and policies in return: of any object, whatever its kind; and of those kinds
//! that name no target, whether they are used at all.

use std::collections::{BTreeMap, BTreeSet};

use weft_api::names::CONTROL_PLANE_NAMESPACE;
use weft_api::policy::meta::LabelSelector;

use super::external::{External, holder_of_address, holder_of_host};
use super::policy_status::{group_of, of_backend_traffic, of_traffic};
use super::status::{Condition, ObjectStatus, ParentStatus, status};
use crate::model::{
    Kind, Name, ObjectRef, ParentRef, Policy, Unreadable, Workload, World, in_namespace,
};

/// Every object of which something is to be said.
pub fn with_status(world: &World) -> BTreeSet<ObjectRef> {
    let unreadable = world.unreadable.keys().cloned();
    world.policies().into_iter().chain(unreadable).collect()
}

/// What is to be said of an object now; none: it is not there, or of a kind without a status.
pub fn status_of(world: &World, object: &ObjectRef) -> Option<ObjectStatus> {
    if let Some(unreadable) = world.unreadable(object) {
        return Some(of_unreadable(world, object, unreadable));
    }
    let name = &object.name;
    let mut made = ObjectStatus {
        object: object.clone(),
        generation: world.generation(object).unwrap_or_default(),
        created: String::new(),
        parents: Vec::new(),
        conditions: Vec::new(),
    };
    match object.kind {
        Kind::HTTPRoute | Kind::GRPCRoute | Kind::TLSRoute | Kind::TCPRoute => {
            return Some(status(world, world.routes.get(object)?));
        }
        Kind::TrafficPolicy => {
            let policy = world.traffic.get(name)?;
            made.created.clone_from(&policy.created);
            made.parents = of_traffic(world, policy);
        }
        Kind::XBackendTrafficPolicy => {
            let policy = world.backend_traffic.get(name)?;
            made.created.clone_from(&policy.created);
            made.parents = of_backend_traffic(world, policy);
        }
        Kind::PeerAuthentication => {
            let policy = world.peer_authentication.get(name)?;
            made.created.clone_from(&policy.created);
            let policies = &world.peer_authentication;
            made.conditions = of_selecting(world, policies, policy, |spec| &spec.selector);
        }
        Kind::Telemetry => {
            let policy = world.telemetry.get(name)?;
            made.created.clone_from(&policy.created);
            made.conditions = of_selecting(world, &world.telemetry, policy, |spec| &spec.selector);
        }
        Kind::EgressPolicy => {
            let policy = world.egress.get(name)?;
            made.created.clone_from(&policy.created);
            made.conditions = vec![match default_of(&world.egress, name, |_| true) {
                Some(winner) => conflicted(&whole(name), winner),
                None => accepted(),
            }];
        }
        Kind::ExternalService => {
            let external = world.external.get(name)?;
            made.created.clone_from(&external.created);
            made.conditions = of_external(world, external);
        }
        Kind::Service | Kind::EndpointSlice | Kind::Workload | Kind::Node => return None,
    }
    Some(made)
}

fn accepted() -> Condition {
    Condition::new("Accepted", true, "Accepted", "")
}

fn conflicted(what: &str, winner: &Name) -> Condition {
    Condition::new(
        "Accepted",
        false,
        "Conflicted",
        format!(
            "{winner} already says what holds for {what}, and is used: it is older, or comes first by name"
        ),
    )
}

/// What a policy without a selector is for.
fn whole(name: &Name) -> String {
    if name.namespace == CONTROL_PLANE_NAMESPACE {
        return "the whole mesh".to_owned();
    }
    format!("namespace {}", name.namespace)
}

/// What is said where what is written cannot be honoured.
fn of_unreadable(world: &World, object: &ObjectRef, given: &Unreadable) -> ObjectStatus {
    let stands = match world.generation(object) {
        Some(generation) => format!("; what it said before (generation {generation}) stands"),
        None => String::new(),
    };
    let route = matches!(
        object.kind,
        Kind::HTTPRoute | Kind::GRPCRoute | Kind::TLSRoute | Kind::TCPRoute
    );
    // A route's conditions have reasons of their own (Gateway API, RouteConditionReason).
    let reason = if route { "UnsupportedValue" } else { "Invalid" };
    let said = Condition::new("Accepted", false, reason, format!("{}{stands}", given.why));
    let mut parents = given.targets.clone();
    match object.kind {
        Kind::TrafficPolicy => {
            for target in &mut parents {
                let group = group_of(target.kind.as_deref().unwrap_or_default());
                target.group = Some(group.to_owned());
                target.namespace = None;
                target.port = None;
            }
            if parents.is_empty() {
                parents.push(ParentRef {
                    group: Some(String::new()),
                    kind: Some("Namespace".to_owned()),
                    name: object.name.namespace.clone(),
                    ..ParentRef::default()
                });
            }
        }
        Kind::XBackendTrafficPolicy => {}
        _ if route => parents.retain(ParentRef::is_service),
        _ => parents.clear(),
    }
    let own = !route
        && !matches!(
            object.kind,
            Kind::TrafficPolicy | Kind::XBackendTrafficPolicy
        );
    ObjectStatus {
        object: object.clone(),
        generation: given.generation,
        created: given.created.clone(),
        parents: parents
            .into_iter()
            .map(|parent| ParentStatus {
                parent,
                conditions: vec![said.clone()],
            })
            .collect(),
        conditions: own.then_some(said).into_iter().collect(),
    }
}

/// Who is used instead of a policy, of those of its namespace that `is_meant` takes.
fn default_of<'a, T>(
    policies: &'a BTreeMap<Name, Policy<T>>,
    name: &Name,
    is_meant: impl Fn(&T) -> bool,
) -> Option<&'a Name> {
    in_namespace(policies, &name.namespace)
        .filter(|policy| is_meant(&policy.spec))
        .min_by(|a, b| a.precedence().cmp(&b.precedence()))
        .map(|winner| &winner.name)
        .filter(|winner| *winner != name)
}

/// How a policy for workloads fares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Chosen<'a> {
    /// It holds for whomever it is for.
    All,
    /// Another policy holds for all of them.
    Conflicted { what: String, winner: &'a Name },
    /// Another policy holds for some of them: the first such workload, how many there are, how many
    /// it is for.
    Partly {
        winner: &'a Name,
        example: &'a Name,
        lost: usize,
        all: usize,
    },
    /// It is for nobody.
    Nobody,
}

/// How a policy fares that is for the workloads of a selector; without one for its namespace, or,
/// in `weft-system`, for the mesh. Of two with a selector that choose the same workload, one is used
/// there.
pub(super) fn chosen<'a, T>(
    world: &'a World,
    policies: &'a BTreeMap<Name, Policy<T>>,
    policy: &'a Policy<T>,
    selector: impl Fn(&T) -> &Option<LabelSelector>,
) -> Chosen<'a> {
    let name = &policy.name;
    let Some(own) = selector(&policy.spec) else {
        let without = |spec: &T| selector(spec).is_none();
        return match default_of(policies, name, without) {
            None => Chosen::All,
            Some(winner) => Chosen::Conflicted {
                what: whole(name),
                winner,
            },
        };
    };
    let meant: Vec<&Workload> = world.chosen(&name.namespace, own).collect();
    let before: Vec<&Policy<T>> = in_namespace(policies, &name.namespace)
        .filter(|other| selector(&other.spec).is_some() && other.precedence() < policy.precedence())
        .collect();
    let instead = |workload: &Workload| {
        let takes = |other: &&&Policy<T>| {
            let selector = selector(&other.spec).as_ref();
            selector.is_some_and(|selector| selector.matches(&workload.labels))
        };
        let winner = before
            .iter()
            .filter(takes)
            .min_by(|a, b| a.precedence().cmp(&b.precedence()));
        winner.map(|winner| &winner.name)
    };
    let lost: Vec<(&Name, &Name)> = meant
        .iter()
        .filter_map(|workload| Some((&workload.name, instead(workload)?)))
        .collect();
    match lost.first() {
        _ if meant.is_empty() => Chosen::Nobody,
        None => Chosen::All,
        Some((_, winner)) if lost.len() == meant.len() => Chosen::Conflicted {
            what: "the workloads that it selects".to_owned(),
            winner,
        },
        Some((example, winner)) => Chosen::Partly {
            winner,
            example,
            lost: lost.len(),
            all: meant.len(),
        },
    }
}

fn of_selecting<T>(
    world: &World,
    policies: &BTreeMap<Name, Policy<T>>,
    policy: &Policy<T>,
    selector: impl Fn(&T) -> &Option<LabelSelector>,
) -> Vec<Condition> {
    match chosen(world, policies, policy, selector) {
        Chosen::All => vec![accepted()],
        Chosen::Conflicted { what, winner } => vec![conflicted(&what, winner)],
        Chosen::Partly {
            winner,
            example,
            lost,
            all,
        } => {
            let why = format!(
                "{winner} is used for {lost} of the {all} workloads that it selects, such as {example}: it is older, or comes first by name"
            );
            vec![
                accepted(),
                Condition::new("Overridden", true, "Overridden", why),
            ]
        }
        Chosen::Nobody => {
            let namespace = &policy.name.namespace;
            let why = format!("the selector matches no workload in namespace {namespace}");
            vec![Condition::new("Accepted", false, "TargetNotFound", why)]
        }
    }
}

/// Of an ExternalService: whether connections to what it names are its.
fn of_external(world: &World, external: &External) -> Vec<Condition> {
    let networks = external.spec.networks();
    let mut all = 0;
    let mut lost = Vec::new();
    for port in external.spec.ports.iter().map(|port| port.port) {
        for network in &networks {
            all += 1;
            if let Some(holder) = holder_of_address(world, external, *network, port) {
                lost.push(format!("{network} port {port} is {holder}"));
            }
        }
        // Its hosts are names for what is found by address then.
        for host in external.spec.hosts.iter().filter(|_| networks.is_empty()) {
            all += 1;
            if let Some(holder) = holder_of_host(world, external, host, port) {
                lost.push(format!("{host}:{port} is ExternalService {holder}"));
            }
        }
    }
    let used = |what: &[String]| format!("{}, which is used", what.join("; "));
    match lost.len() {
        0 => vec![accepted()],
        n if n == all => {
            let why = used(&lost);
            vec![Condition::new("Accepted", false, "Conflicted", why)]
        }
        _ => {
            let why = used(&lost);
            vec![
                accepted(),
                Condition::new("Overridden", true, "Overridden", why),
            ]
        }
    }
}
