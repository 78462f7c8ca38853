//! What is said of policies in return: for each of their targets, whether it is used there (Gateway
//! API, PolicyStatus; GEP-713).

use std::borrow::Cow;

use weft_api::policy::TrafficPolicySpec;
use weft_api::policy::traffic::{TargetKind, TargetRef};

use super::external::as_service;
use super::policy::{Level, default_winner, is_port, of_service, route_winner, winner};
use super::status::{Condition, ParentStatus};
use crate::model::{
    BackendTraffic, Kind, Name, ObjectRef, ParentRef, Policy, Route, ServicePort, World,
};

/// Why a policy is not used for one of its targets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Unused {
    /// There is no such thing; a sentence.
    NotFound(String),
    /// This policy says what holds there.
    Conflicted(Name),
}

/// Whether a policy is used for one of its targets.
pub(super) fn used(
    world: &World,
    policy: &Policy<TrafficPolicySpec>,
    target: &TargetRef,
) -> Result<(), Unused> {
    let own = Name::new(policy.name.namespace.as_str(), target.name.as_str());
    let mut winners: Vec<&Name> = match target.kind {
        TargetKind::Namespace => default_winner(world, &policy.name.namespace)
            .map(|winner| &winner.name)
            .into_iter()
            .collect(),
        TargetKind::Service | TargetKind::ExternalService => {
            let kind = target.kind;
            let service = match kind {
                TargetKind::Service => world.service(&own).map(Cow::Borrowed),
                _ => world
                    .external
                    .get(&own)
                    .map(|external| Cow::Owned(as_service(external))),
            };
            let service =
                service.ok_or_else(|| Unused::NotFound(format!("there is no {kind:?} {own}")))?;
            let (level, ports): (_, Vec<&ServicePort>) = match &target.section_name {
                None => (Level::Service, service.ports.iter().collect()),
                Some(section) => {
                    let ports = service.ports.iter();
                    let ports: Vec<_> = ports.filter(|port| is_port(section, port)).collect();
                    if ports.is_empty() {
                        return Err(Unused::NotFound(format!(
                            "{kind:?} {own} has no port '{section}'"
                        )));
                    }
                    (Level::Port, ports)
                }
            };
            ports
                .into_iter()
                .filter_map(|port| Some(&winner(world, &service, port, level)?.name))
                .collect()
        }
        TargetKind::HTTPRoute | TargetKind::GRPCRoute => {
            let route = route_of(world, policy, target)
                .ok_or_else(|| Unused::NotFound(format!("there is no {:?} {own}", target.kind)))?;
            let section = target.section_name.as_deref();
            if let Some(section) = section
                && !route
                    .rules
                    .iter()
                    .any(|rule| rule.name.as_deref() == Some(section))
            {
                return Err(Unused::NotFound(format!(
                    "{:?} {own} has no rule named '{section}'",
                    target.kind
                )));
            }
            let winner = route_winner(world, route, section);
            winner.map(|winner| &winner.name).into_iter().collect()
        }
    };
    winners.retain(|winner| **winner != policy.name);
    match winners.first() {
        None => Ok(()),
        Some(winner) => Err(Unused::Conflicted((*winner).clone())),
    }
}

/// The route that a policy names.
pub(super) fn route_of<'a>(
    world: &'a World,
    policy: &Policy<TrafficPolicySpec>,
    target: &TargetRef,
) -> Option<&'a Route> {
    let kind = match target.kind {
        TargetKind::HTTPRoute => Kind::HTTPRoute,
        TargetKind::GRPCRoute => Kind::GRPCRoute,
        TargetKind::Service | TargetKind::ExternalService | TargetKind::Namespace => return None,
    };
    let name = Name::new(policy.name.namespace.as_str(), target.name.as_str());
    world.routes.get(&ObjectRef { kind, name })
}

fn condition(used: Result<(), Unused>) -> Condition {
    match used {
        Ok(()) => Condition::new("Accepted", true, "Accepted", ""),
        Err(Unused::NotFound(why)) => Condition::new("Accepted", false, "TargetNotFound", why),
        Err(Unused::Conflicted(winner)) => Condition::new(
            "Accepted",
            false,
            "Conflicted",
            format!(
                "{winner} already says what holds for this target, and is used: it is older, or comes first by name"
            ),
        ),
    }
}

/// What is to be said of a TrafficPolicy.
pub(super) fn of_traffic(world: &World, policy: &Policy<TrafficPolicySpec>) -> Vec<ParentStatus> {
    let namespace = [TargetRef {
        group: String::new(),
        kind: TargetKind::Namespace,
        name: policy.name.namespace.clone(),
        section_name: None,
    }];
    let targets = match &policy.spec.target_refs[..] {
        [] => &namespace[..],
        targets => targets,
    };
    targets
        .iter()
        .map(|target| ParentStatus {
            parent: reference(target),
            conditions: vec![condition(used(world, policy, target))],
        })
        .collect()
}

/// What is to be said of an XBackendTrafficPolicy.
pub(super) fn of_backend_traffic(world: &World, policy: &BackendTraffic) -> Vec<ParentStatus> {
    let targets = policy.targets.iter();
    targets
        .map(|target| ParentStatus {
            parent: target.clone(),
            conditions: of_backend(world, policy, target),
        })
        .collect()
}

fn reference(target: &TargetRef) -> ParentRef {
    let group = group_of(&format!("{:?}", target.kind));
    ParentRef {
        group: Some(group.to_owned()),
        kind: Some(format!("{:?}", target.kind)),
        name: target.name.clone(),
        section_name: target.section_name.clone(),
        ..ParentRef::default()
    }
}

/// The API group of a kind that a TrafficPolicy may name.
pub(super) fn group_of(kind: &str) -> &'static str {
    match kind {
        "HTTPRoute" | "GRPCRoute" => "gateway.networking.k8s.io",
        "ExternalService" => weft_api::policy::GROUP,
        _ => "",
    }
}

/// Of an XBackendTrafficPolicy for one of its targets.
pub(super) fn of_backend(
    world: &World,
    policy: &BackendTraffic,
    target: &ParentRef,
) -> Vec<Condition> {
    let no = |reason, why: String| vec![Condition::new("Accepted", false, reason, why)];
    if let Some(why) = policy.refused.first() {
        return no("Invalid", why.clone());
    }
    let (group, kind) = (target.group.as_deref(), target.kind.as_deref());
    if !target.is_service() {
        let (group, kind) = (group.unwrap_or_default(), kind.unwrap_or_default());
        return no(
            "Invalid",
            format!("a '{kind}' of group '{group}' is no backend; only Services are"),
        );
    }
    let name = Name::new(policy.name.namespace.as_str(), target.name.as_str());
    let Some(service) = world.service(&name) else {
        return no("TargetNotFound", format!("there is no Service {name}"));
    };
    if let Some(winner) = of_service(world, &name).filter(|winner| winner.name != policy.name) {
        return vec![condition(Err(Unused::Conflicted(winner.name.clone())))];
    }
    if policy.session.is_some() && service.client_affinity {
        return no(
            "Invalid",
            format!(
                "sessionPersistence and the sessionAffinity ClientIP of Service {name} exclude each other"
            ),
        );
    }
    let mut overridden = Vec::new();
    let over = service.ports.iter().find_map(|port| {
        let above = super::policy::budget_of(world, service, port)?;
        policy.retry.as_ref().map(|_| (above, port))
    });
    if let Some((above, port)) = over {
        overridden.push(format!(
            "retries.budget of TrafficPolicy {above} goes before retryConstraint for port {}",
            port.port
        ));
    }
    let mut conditions = vec![condition(Ok(()))];
    if !overridden.is_empty() {
        let why = overridden.join("; ");
        conditions.push(Condition::new("Overridden", true, "Overridden", why));
    }
    conditions
}
