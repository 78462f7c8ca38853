//! Where the fields of a policy come from: of several policies the most specific one that sets a field
//! is used, and the others that set it are overridden. For people (`weft routes`).

use weft_api::proto::resource::Body;
use weft_api::proto::{
    Backend, Destination, FieldSource, Filter, PolicySource, Provenance, Resource, fallback, filter,
};

use super::policy::Level;
use crate::model::{Route, Rule, Service, ServicePort};

/// Everybody who sets something, the most specific first.
#[derive(Clone, Debug, Default)]
pub(super) struct Sources(Vec<Source>);

#[derive(Clone, Debug)]
struct Source {
    policy: PolicySource,
    /// As they are written: "timeouts.request".
    fields: Vec<String>,
}

impl Sources {
    /// One that is less specific than all before it.
    pub(super) fn push(&mut self, name: String, target: String, fields: Vec<String>) {
        self.0.push(Source {
            policy: PolicySource { name, target },
            fields,
        });
    }

    /// Those of whom something is said already, less specific than all before.
    fn extend(&mut self, given: Provenance) {
        for (index, policy) in (0u32..).zip(given.policies) {
            let fields = given.fields.iter();
            let sets = fields.filter(|one| one.used == index || one.overridden.contains(&index));
            let fields = sets.map(|one| one.field.clone()).collect();
            self.push(policy.name, policy.target, fields);
        }
    }

    /// What there is to say of the fields that `wanted` takes; `None` when nobody sets any.
    pub(super) fn of(&self, wanted: impl Fn(&str) -> bool) -> Option<Provenance> {
        let mut made = Provenance::default();
        for source in &self.0 {
            let fields = source.fields.iter().filter(|field| wanted(field));
            add(&mut made, &source.policy, fields);
        }
        (!made.policies.is_empty()).then_some(made)
    }
}

/// One that is less specific than those that are there.
fn add<'a>(
    to: &mut Provenance,
    policy: &PolicySource,
    fields: impl IntoIterator<Item = &'a String>,
) {
    let index = to.policies.len() as u32;
    let mut sets = false;
    for field in fields {
        sets = true;
        match to.fields.iter_mut().find(|known| known.field == *field) {
            Some(known) => known.overridden.push(index),
            None => to.fields.push(FieldSource {
                field: field.clone(),
                used: index,
                overridden: Vec::new(),
            }),
        }
    }
    if sets {
        to.policies.push(policy.clone());
    }
}

/// One that goes before all that are there.
pub(super) fn above(
    there: Option<Provenance>,
    name: String,
    target: String,
    fields: &[&str],
) -> Option<Provenance> {
    if fields.is_empty() {
        return there;
    }
    let mut sources = Sources::default();
    let fields = fields.iter().map(|field| (*field).to_owned());
    sources.push(name, target, fields.collect());
    sources.extend(there.unwrap_or_default());
    sources.of(|_| true)
}

/// One that everybody who is there goes before, for one field of its.
pub(super) fn below(there: &mut Option<Provenance>, name: String, target: String, field: &str) {
    let field = field.to_owned();
    let policy = PolicySource { name, target };
    add(there.get_or_insert_default(), &policy, [&field]);
}

/// Without the fields that `moot` takes; nothing when none is left.
pub(super) fn without(given: Provenance, moot: impl Fn(&str) -> bool) -> Option<Provenance> {
    let mut sources = Sources::default();
    sources.extend(given);
    sources.of(|field| !moot(field))
}

/// What a policy on a level is for, in words.
pub(super) fn target(
    level: Level,
    service: &Service,
    port: &ServicePort,
    of: Option<(&Route, &Rule)>,
) -> String {
    let kind = if service.external {
        "ExternalService"
    } else {
        "Service"
    };
    let name = &service.name.name;
    match (level, of) {
        (Level::Namespace, _) => format!("namespace {}", service.name.namespace),
        (Level::Port, _) if port.name.is_empty() => format!("{kind} {name}, port {}", port.port),
        (Level::Port, _) => format!("{kind} {name}, port {}", port.name),
        (Level::Rule, Some((route, rule))) => of_rule(route, rule),
        (Level::Route, Some((route, _))) => {
            format!("{} {}", route.kind.name(), route.name.name)
        }
        (Level::Service | Level::Route | Level::Rule, _) => format!("{kind} {name}"),
    }
}

fn of_rule(route: &Route, rule: &Rule) -> String {
    let name = rule.name.as_deref().unwrap_or_default();
    format!("{} {}, rule {name}", route.kind.name(), route.name.name)
}

/// Takes it out of a resource, wherever it is.
pub(super) fn strip(resource: &mut Resource) {
    match &mut resource.body {
        Some(Body::Destination(destination)) => strip_destination(destination),
        Some(Body::Workload(workload)) => {
            let hosts = workload.external_hosts.iter_mut();
            hosts
                .filter_map(|host| host.destination.as_mut())
                .for_each(strip_destination);
        }
        _ => {}
    }
}

fn strip_destination(destination: &mut Destination) {
    let opaque = destination.opaque.iter_mut();
    let opaque = opaque.filter_map(|opaque| opaque.route.as_mut());
    for route in destination.routes.iter_mut().chain(opaque) {
        let mut filters: Vec<&mut Filter> = route.filters.iter_mut().collect();
        for weighted in &mut route.backends {
            weighted.backend.iter_mut().for_each(strip_backend);
            filters.extend(&mut weighted.filters);
        }
        for given in filters {
            if let Some(filter::Filter::Mirror(mirror)) = &mut given.filter {
                mirror.backend.iter_mut().for_each(strip_backend);
            }
        }
        let Some(policy) = &mut route.policy else {
            continue;
        };
        policy.provenance = None;
        if let Some(fallback) = &mut policy.fallback
            && let Some(fallback::Action::Backend(backend)) = &mut fallback.action
        {
            strip_backend(backend);
        }
    }
}

fn strip_backend(backend: &mut Backend) {
    if let Some(policy) = &mut backend.policy {
        policy.provenance = None;
    }
}

/// The name of a field in YAML: of "per_try" below "timeouts" it is "timeouts.perTry".
pub(super) fn field(at: &str, name: &str) -> String {
    let mut path = at.to_owned();
    if !path.is_empty() {
        path.push('.');
    }
    // What it is called in YAML and not in Rust: `on` is `true` to some parsers.
    let name = if name == "on" { "conditions" } else { name };
    for (index, word) in name.split('_').enumerate() {
        let (first, rest) = word.split_at(word.len().min(1));
        match index {
            0 => path.push_str(first),
            _ => path.push_str(&first.to_ascii_uppercase()),
        }
        path.push_str(rest);
    }
    path
}

/// Fields of a policy that say something about requests, whichever backend they are sent to.
pub(super) fn is_of_route(field: &str) -> bool {
    !is_of_backend(field) && !is_inbound(field)
}

/// Fields that are about a Service's endpoints, whichever route leads there.
pub(super) fn is_of_backend(field: &str) -> bool {
    let backend = [
        "loadBalancer.",
        "healthCheck.",
        "circuitBreaker.limits.",
        "circuitBreaker.outlierDetection.",
        "connection.",
    ];
    field == "timeouts.connect" || backend.iter().any(|begin| field.starts_with(begin))
}

/// Fields that the destination's own proxies keep.
fn is_inbound(field: &str) -> bool {
    matches!(field, "rateLimit" | "requestHeaders")
}

/// Those, and fields that they keep to towards their application as callers' proxies do towards them.
pub(super) fn is_of_port(field: &str) -> bool {
    is_inbound(field) || field == "connection.maxRequests" || field.starts_with("connection.http2.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_called_as_they_are_written() {
        for (at, name, expected) in [
            ("", "rate_limit", "rateLimit"),
            ("timeouts", "per_try", "timeouts.perTry"),
            ("retries", "on", "retries.conditions"),
            (
                "circuitBreaker.outlierDetection",
                "consecutive_5xx_errors",
                "circuitBreaker.outlierDetection.consecutive5xxErrors",
            ),
        ] {
            assert_eq!(field(at, name), expected);
        }
    }

    /// "field: whose (instead of whose)".
    fn shown(given: &Option<Provenance>) -> Vec<String> {
        let given = given.as_ref().unwrap();
        let name = |index: &u32| given.policies[*index as usize].name.clone();
        let fields = given.fields.iter();
        fields
            .map(|one| {
                let over: Vec<String> = one.overridden.iter().map(name).collect();
                format!("{}: {} ({})", one.field, name(&one.used), over.join(" "))
            })
            .collect()
    }

    #[test]
    fn the_most_specific_is_used_and_the_others_are_overridden() {
        let mut sources = Sources::default();
        let mut push = |name: &str, fields: &[&str]| {
            let fields = fields.iter().map(|field| (*field).to_owned());
            sources.push(name.to_owned(), String::new(), fields.collect());
        };
        push("a", &["timeouts.request", "loadBalancer.algorithm"]);
        push("b", &["rateLimit"]);
        push("c", &["timeouts.request", "timeouts.connect", "retries.on"]);
        let route = sources.of(is_of_route);
        let expected = ["timeouts.request: a (c)", "retries.on: c ()"];
        assert_eq!(shown(&route), expected);
        let expected = ["loadBalancer.algorithm: a ()", "timeouts.connect: c ()"];
        assert_eq!(shown(&sources.of(is_of_backend)), expected);
        assert_eq!(sources.of(|_| false), None);
        // A rule says something of its own; and something less specific than all.
        let own = "own".to_owned();
        let mut route = above(route, own.clone(), String::new(), &["retries.on"]);
        let expected = ["retries.on: own (c)", "timeouts.request: a (c)"];
        assert_eq!(shown(&route), expected);
        below(
            &mut route,
            "z".to_owned(),
            String::new(),
            "timeouts.request",
        );
        let expected = ["retries.on: own (c)", "timeouts.request: a (c z)"];
        assert_eq!(shown(&route), expected);
        let left = without(route.unwrap(), |field| field == "timeouts.request");
        assert_eq!(shown(&left), ["retries.on: own (c)"]);
        assert_eq!(above(None, own, String::new(), &[]), None);
    }
}
