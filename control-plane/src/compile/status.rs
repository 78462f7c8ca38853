//! What is said of a route in return: conditions for each of its parents that is a Service
//! (Gateway API, RouteParentStatus). Values; who writes them to Kubernetes is in the server.

use super::routes::{Unresolved, names_port, resolve, winning_kind};
use super::session;
use crate::model::{ObjectRef, ParentRef, RefusedReason, Route, Rule, ServicePort, World};

/// Our name in the statuses of routes.
pub const CONTROLLER: &str = "weft.dev/mesh";

/// The status of a route or a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectStatus {
    pub object: ObjectRef,
    /// The generation of the spec that was looked at.
    pub generation: i64,
    /// When the object was made: tells one from another of the same name.
    pub created: String,
    /// Of a route: parents that are Services (others are other controllers' to look after). Of a
    /// policy: its targets.
    pub parents: Vec<ParentStatus>,
    /// Of a kind that names neither parents nor targets.
    pub conditions: Vec<Condition>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentStatus {
    pub parent: ParentRef,
    pub conditions: Vec<Condition>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    pub kind: &'static str,
    pub status: bool,
    pub reason: &'static str,
    pub message: String,
}

impl Condition {
    pub(super) fn new(
        kind: &'static str,
        status: bool,
        reason: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self {
            kind,
            status,
            reason,
            message: message.into(),
        }
    }
}

/// What is to be said of a route now.
pub fn status(world: &World, route: &Route) -> ObjectStatus {
    let resolved = resolved_refs(world, route);
    let partial = partially_invalid(route);
    let parents = route
        .parents
        .iter()
        .filter(|parent| parent.is_service())
        .map(|parent| {
            let accepted = accepted(world, route, parent);
            // PartiallyInvalid is not set for what is not accepted.
            let partial = partial.clone().filter(|_| accepted.status);
            ParentStatus {
                parent: parent.clone(),
                conditions: [Some(accepted), Some(resolved.clone()), partial]
                    .into_iter()
                    .flatten()
                    .collect(),
            }
        })
        .collect();
    ObjectStatus {
        object: route.reference(),
        generation: route.generation,
        created: route.created.clone(),
        parents,
        conditions: Vec::new(),
    }
}

fn accepted(world: &World, route: &Route, parent: &ParentRef) -> Condition {
    let no = |reason, message: String| Condition::new("Accepted", false, reason, message);
    let name = parent.target(&route.name.namespace);
    let Some(service) = world.service(&name) else {
        return no("NoMatchingParent", format!("there is no Service {name}"));
    };
    let ports: Vec<&ServicePort> = service
        .ports
        .iter()
        .filter(|port| names_port(parent, port))
        .collect();
    if ports.is_empty() {
        let wanted = match (parent.port, &parent.section_name) {
            (Some(number), Some(section)) => format!("{number} named '{section}'"),
            (Some(number), None) => number.to_string(),
            (None, Some(section)) => format!("named '{section}'"),
            (None, None) => "at all".to_owned(),
        };
        return no(
            "NoMatchingParent",
            format!("Service {name} has no port {wanted}"),
        );
    }
    if !route.rules.is_empty() && route.rules.iter().all(is_invalid) {
        let refused = route.rules.iter().flat_map(|rule| &rule.refused).next();
        if let Some(refused) = refused {
            return no(reason(refused.reason), sentence(0, refused.message.clone()));
        }
    }
    if session::excluded(service, route) {
        return no(
            "UnsupportedValue",
            format!(
                "sessionPersistence and the sessionAffinity ClientIP of Service {name} exclude each other"
            ),
        );
    }
    let winner = |port: &&ServicePort| winning_kind(world, service, port, &route.name.namespace);
    let lost = ports
        .iter()
        .all(|port| winner(port).is_some_and(|kind| kind < route.kind));
    if lost && let Some(kind) = winner(&ports[0]) {
        return no(
            "Conflicted",
            format!(
                "a {} applies to the same ports of Service {name}; only one kind of route can",
                kind.name()
            ),
        );
    }
    Condition::new("Accepted", true, "Accepted", "")
}

fn is_invalid(rule: &Rule) -> bool {
    rule.dropped || !rule.refused.is_empty()
}

fn reason(given: RefusedReason) -> &'static str {
    match given {
        RefusedReason::UnsupportedValue => "UnsupportedValue",
        RefusedReason::IncompatibleFilters => "IncompatibleFilters",
    }
}

fn sentence(rule: usize, message: String) -> String {
    format!("rules[{rule}].{message}")
}

fn partially_invalid(route: &Route) -> Option<Condition> {
    if !route.rules.iter().any(is_invalid) || route.rules.iter().all(is_invalid) {
        return None;
    }
    let parts: Vec<String> = route
        .rules
        .iter()
        .enumerate()
        .filter(|(_, rule)| is_invalid(rule))
        .map(|(index, rule)| {
            let why = rule.refused.first().map_or("", |refused| &refused.message);
            let does = if rule.dropped {
                "takes no request"
            } else {
                "answers 500"
            };
            format!("rules[{index}] ({does}): {why}")
        })
        .collect();
    Some(Condition::new(
        "PartiallyInvalid",
        true,
        "UnsupportedValue",
        format!("Dropped Rule {}", parts.join("; ")),
    ))
}

fn resolved_refs(world: &World, route: &Route) -> Condition {
    for (index, rule) in route.rules.iter().enumerate() {
        for backend in rule.references() {
            if let Err(Unresolved { reason, message }) = resolve(world, backend) {
                let message = format!("rules[{index}]: {message}");
                return Condition::new("ResolvedRefs", false, reason, message);
            }
        }
    }
    Condition::new("ResolvedRefs", true, "ResolvedRefs", "")
}
