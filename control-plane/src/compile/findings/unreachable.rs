//! Rules that no request comes to, and rules about requests where nobody has said that there are
//! any.

use std::collections::{BTreeMap, BTreeSet};

use weft_api::policy::traffic::TargetKind;
use weft_api::proto::route_match::Path;
use weft_api::proto::{Protocol, RouteMatch};

use super::Problems;
use crate::compile::policy::is_port;
use crate::compile::routes;
use crate::finding::Severity;
use crate::model::{Kind, Name, RouteKind, Service, World};

pub(super) fn find(world: &World, found: &mut Problems) {
    shadowed(world, found);
    unnamed(world, found);
}

/// Rules whose every match is held by another one that comes before it, on every port that they
/// are for.
fn shadowed(world: &World, found: &mut Problems) {
    // By rule: whether it was reachable somewhere, and which rule was before it.
    let mut rules: BTreeMap<String, Option<String>> = BTreeMap::new();
    for service in world.services.values() {
        for (port, client) in views(world, service) {
            let Some(table) = routes::table(world, service, port, &client) else {
                continue;
            };
            let matches: Vec<(&str, &RouteMatch)> = table
                .routes
                .iter()
                .flat_map(|route| route.matches.iter().map(|one| (route.name.as_str(), one)))
                .collect();
            for route in table
                .routes
                .iter()
                .filter(|route| !route.matches.is_empty())
            {
                let before = |one: &RouteMatch| {
                    matches
                        .iter()
                        .find(|(name, other)| {
                            *name != route.name && other.order < one.order && covers(other, one)
                        })
                        .map(|(name, _)| (*name).to_owned())
                };
                let all: Option<Vec<String>> = route.matches.iter().map(before).collect();
                let first = all.and_then(|all| all.into_iter().next());
                let known = rules
                    .entry(route.name.clone())
                    .or_insert_with(|| first.clone());
                if first.is_none() {
                    *known = None;
                }
            }
        }
    }
    for route in world.routes() {
        for (index, rule) in route.rules.iter().enumerate() {
            let name = routes::rule_name(route, index, rule);
            if let Some(Some(other)) = rules.get(&name) {
                found.add(
                    (route.kind.kind(), &route.name),
                    &format!("spec.rules.{index}"),
                    Severity::Warning,
                    format!("no request comes to rule {name}: {other} takes each of them before"),
                    "remove it, or make its matches more specific",
                );
            }
        }
    }
}

/// The ports of a Service, as each namespace sees them.
fn views<'a>(
    world: &World,
    service: &'a Service,
) -> impl Iterator<Item = (&'a crate::model::ServicePort, String)> {
    let mut clients = routes::consumer_namespaces(world, &service.name);
    clients.insert(service.name.namespace.clone());
    let ports = service.ports.iter();
    ports.flat_map(move |port| {
        let clients: BTreeSet<String> = clients.clone();
        clients.into_iter().map(move |client| (port, client))
    })
}

/// Whether every request that `inner` holds for, `outer` holds for, as far as can be told without
/// looking into regular expressions.
fn covers(outer: &RouteMatch, inner: &RouteMatch) -> bool {
    let method = outer.method.is_empty() || outer.method == inner.method;
    let headers = outer
        .headers
        .iter()
        .all(|(name, value)| inner.headers.get(name) == Some(value));
    let patterns = outer
        .header_patterns
        .iter()
        .all(|pattern| inner.header_patterns.contains(pattern));
    let query = outer.query.iter().all(|one| inner.query.contains(one));
    let path = match (&outer.path, &inner.path) {
        (None, _) => true,
        (Some(Path::PathPrefix(prefix)), Some(Path::PathExact(path) | Path::PathPrefix(path))) => {
            let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
            let rest = path.strip_prefix(prefix);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        }
        (Some(Path::PathPrefix(prefix)), Some(Path::PathRegex(_)) | None) => prefix == "/",
        (outer, inner) => outer == inner,
    };
    method && headers && patterns && query && path && outer.grpc == inner.grpc
}

/// Ports of which something is said that is about requests, when their name and `appProtocol` do
/// not say that there are requests.
fn unnamed(world: &World, found: &mut Problems) {
    for service in world.services.values() {
        for (index, port) in service.ports.iter().enumerate() {
            if port.protocol != Protocol::Auto {
                continue;
            }
            let who =
                route_about(world, service, port).or_else(|| policy_about(world, service, port));
            let Some((kind, name)) = who else { continue };
            found.add(
                (Kind::Service, &service.name),
                &format!("spec.ports.{index}"),
                Severity::Warning,
                format!(
                    "{kind} {name} is about requests to port {} of Service {}, but neither the \
                     port's name nor appProtocol says what is spoken there: it is found out from \
                     the first bytes of each connection",
                    port.port, service.name
                ),
                "name the port http, http2 or grpc (or http-…), or set appProtocol",
            );
        }
    }
}

fn route_about<'a>(
    world: &'a World,
    service: &Service,
    port: &crate::model::ServicePort,
) -> Option<(&'static str, &'a Name)> {
    let about = |kind: RouteKind| matches!(kind, RouteKind::Http | RouteKind::Grpc);
    world
        .routes_of(&service.name)
        .filter(|route| about(route.kind))
        .find(|route| {
            let names = |parent: &&crate::model::ParentRef| {
                parent.target(&route.name.namespace) == service.name
            };
            let mut parents = route.parents.iter().filter(names);
            parents.any(|parent| routes::names_port(parent, port))
        })
        .map(|route| (route.kind.name(), &route.name))
}

fn policy_about<'a>(
    world: &'a World,
    service: &Service,
    port: &crate::model::ServicePort,
) -> Option<(&'static str, &'a Name)> {
    crate::model::in_namespace(&world.traffic, &service.name.namespace)
        .find(|policy| {
            let spec = &policy.spec;
            let timeouts = spec.timeouts.unwrap_or_default();
            let about_requests = spec.retries.is_some()
                || timeouts.request.is_some()
                || timeouts.per_try.is_some()
                || timeouts.stream.is_some();
            let named = spec.target_refs.iter().any(|target| {
                target.kind == TargetKind::Service
                    && target.name == service.name.name
                    && (target.section_name.as_deref()).is_none_or(|section| is_port(section, port))
            });
            about_requests && named
        })
        .map(|policy| ("TrafficPolicy", &policy.name))
}
