//! Routes of the Gateway API: which of them apply to a Service port, and in which order their
//! matches are tried.
//!
//! - *Producer routes* are of the Service's own namespace and apply to every client. *Consumer
//!   routes* are of another namespace and apply to that namespace's clients only, for whom they
//!   replace the producers' (GEP-1294, "Multiple routes for a Service").
//! - Of several kinds on one port only one applies: GRPCRoute, HTTPRoute, TLSRoute, TCPRoute, in
//!   this order (GEP-1294, "Route types").
//! - A reference to a Service of another namespace needs no ReferenceGrant: routes of a mesh only
//!   steer traffic that its client could send there itself (GEP-1294, "Namespace boundaries").

use std::cmp::Reverse;
use std::collections::BTreeSet;

use weft_api::proto;

use super::destination::{backend, own_route};
use super::{policy, session};
use crate::model::{
    BackendRef, Filter, HeaderEdits, Name, ParentRef, PathEdit, PathMatch, Route, RouteKind,
    RouteMatch, Rule, Service, ServicePort, TextMatch, World,
};

/// What a Service port's traffic does.
pub(super) struct Table {
    pub(super) routes: Vec<proto::Route>,
    pub(super) opaque: Vec<proto::OpaqueRoute>,
}

/// The table of a Service port for clients of a namespace; `None` when no route applies.
pub(super) fn table(
    world: &World,
    service: &Service,
    port: &ServicePort,
    client: &str,
) -> Option<Table> {
    let applied = applied(world, service, port, client);
    let kind = applied.first()?.kind;
    let own = || own_route(world, service, port);
    Some(match kind {
        RouteKind::Http | RouteKind::Grpc => {
            let mut routes = http_routes(world, service, port, kind, &applied);
            if kind == RouteKind::Grpc {
                // What is no gRPC call goes on as if there were no GRPCRoute.
                routes.push(proto::Route {
                    matches: vec![proto::RouteMatch {
                        grpc: proto::GrpcMatch::Never.into(),
                        order: u32::MAX,
                        ..proto::RouteMatch::default()
                    }],
                    ..own()
                });
            }
            Table {
                routes,
                opaque: vec![proto::OpaqueRoute {
                    server_names: Vec::new(),
                    route: Some(own()),
                }],
            }
        }
        RouteKind::Tls => Table {
            routes: vec![own()],
            opaque: tls_routes(world, service, port, &applied),
        },
        RouteKind::Tcp => {
            let first = applied
                .iter()
                .find_map(|route| Some((route, route.rules.first()?)));
            let route = match first {
                Some((route, rule)) => compile_rule(world, service, port, route, 0, rule),
                None => own(),
            };
            Table {
                routes: vec![route.clone()],
                opaque: vec![proto::OpaqueRoute {
                    server_names: Vec::new(),
                    route: Some(route),
                }],
            }
        }
    })
}

/// Namespaces whose clients see other routes of a Service than everybody else.
pub(super) fn consumer_namespaces(world: &World, service: &Name) -> BTreeSet<String> {
    world
        .routes_of(service)
        .filter(|route| route.name.namespace != service.namespace)
        .map(|route| route.name.namespace.clone())
        .collect()
}

/// Routes that apply to a port for clients of a namespace: all of one kind, the oldest first.
fn applied<'a>(
    world: &'a World,
    service: &Service,
    port: &ServicePort,
    client: &str,
) -> Vec<&'a Route> {
    let of = |namespace: &str| -> Vec<&'a Route> {
        world
            .routes_of(&service.name)
            .filter(|route| route.name.namespace == namespace && is_attached(route, service, port))
            .collect()
    };
    let mut routes = if client == service.name.namespace {
        Vec::new()
    } else {
        of(client)
    };
    if routes.is_empty() {
        routes = of(&service.name.namespace);
    }
    if let Some(kind) = routes.iter().map(|route| route.kind).min() {
        routes.retain(|route| route.kind == kind);
    }
    routes.sort_by(|a, b| a.precedence().cmp(&b.precedence()));
    routes
}

/// The kind of route that wins a port among the routes of a namespace.
pub(super) fn winning_kind(
    world: &World,
    service: &Service,
    port: &ServicePort,
    namespace: &str,
) -> Option<RouteKind> {
    world
        .routes_of(&service.name)
        .filter(|route| route.name.namespace == namespace && is_attached(route, service, port))
        .map(|route| route.kind)
        .min()
}

/// Whether a route governs a port: it names it as a parent, and at least one of its rules is
/// understood.
fn is_attached(route: &Route, service: &Service, port: &ServicePort) -> bool {
    let understood = route.rules.is_empty() || route.rules.iter().any(|rule| !rule.dropped);
    understood
        && route.parents.iter().any(|parent| {
            parent.is_service()
                && parent.target(&route.name.namespace) == service.name
                && names_port(parent, port)
        })
        && !session::excluded(service, route)
}

/// Whether a parentRef means this port: by its number, its name (`sectionName`), both, or neither.
pub(super) fn names_port(parent: &ParentRef, port: &ServicePort) -> bool {
    parent.port.is_none_or(|number| number == port.port)
        && parent
            .section_name
            .as_ref()
            .is_none_or(|name| *name == port.name)
}

/// For people: "HTTPRoute/shop/cart/canary"; rules without a name are counted from 0.
pub(super) fn rule_name(route: &Route, index: usize, rule: &Rule) -> String {
    let kind = route.kind.name();
    match &rule.name {
        Some(rule) => format!("{kind}/{}/{rule}", route.name),
        None => format!("{kind}/{}/{index}", route.name),
    }
}

fn http_routes(
    world: &World,
    service: &Service,
    port: &ServicePort,
    kind: RouteKind,
    applied: &[&Route],
) -> Vec<proto::Route> {
    let mut compiled: Vec<proto::Route> = Vec::new();
    // Where each match stands: (route, rule, match).
    let mut matches: Vec<(&RouteMatch, usize, usize, usize, usize)> = Vec::new();
    for (age, route) in applied.iter().enumerate() {
        for (index, rule) in route.rules.iter().enumerate() {
            if rule.dropped {
                continue;
            }
            for (place, one) in rule.matches.iter().enumerate() {
                matches.push((one, age, index, place, compiled.len()));
            }
            compiled.push(compile_rule(world, service, port, route, index, rule));
        }
    }
    matches
        .sort_by_key(|(one, age, index, place, _)| (specificity(kind, one), *age, *index, *place));
    for (order, (one, _, _, _, at)) in matches.into_iter().enumerate() {
        let order = u32::try_from(order).unwrap_or(u32::MAX - 1);
        let mut to = route_match(one, order);
        if kind == RouteKind::Grpc {
            to.grpc = proto::GrpcMatch::Only.into();
        }
        compiled[at].matches.push(to);
    }
    compiled
}

/// What is compared first to last; the lower wins.
type Specificity = (
    u8,
    Reverse<usize>,
    Reverse<usize>,
    bool,
    Reverse<usize>,
    Reverse<usize>,
);

/// How specific a match is (HTTPRouteRule Matches: exact path, then the longest prefix, method,
/// headers, query parameters; GRPCRouteRule Matches: characters of the service, of the method,
/// headers). Regular expressions, whose place is ours to choose, come after exact paths and before
/// prefixes, the longest first.
fn specificity(kind: RouteKind, one: &RouteMatch) -> Specificity {
    let (class, length) = match &one.path {
        PathMatch::Exact(path) => (0, path.len()),
        PathMatch::Regex(pattern) => (1, pattern.len()),
        PathMatch::Prefix(path) => (2, path.len()),
    };
    let (headers, query) = (Reverse(one.headers.len()), Reverse(one.query.len()));
    if kind == RouteKind::Grpc {
        let (service, method) = one.grpc;
        let by_pattern = class == 1;
        return (
            0,
            Reverse(service),
            Reverse(method),
            by_pattern,
            headers,
            query,
        );
    }
    (
        class,
        Reverse(length),
        Reverse(0),
        one.method.is_none(),
        headers,
        query,
    )
}

fn route_match(one: &RouteMatch, order: u32) -> proto::RouteMatch {
    use proto::route_match::Path;
    let mut to = proto::RouteMatch {
        method: one.method.clone().unwrap_or_default(),
        path: Some(match &one.path {
            PathMatch::Exact(path) => Path::PathExact(path.clone()),
            PathMatch::Prefix(path) => Path::PathPrefix(path.clone()),
            PathMatch::Regex(pattern) => Path::PathRegex(pattern.clone()),
        }),
        order,
        ..proto::RouteMatch::default()
    };
    for header in &one.headers {
        match &header.value {
            TextMatch::Exact(value) => {
                to.headers.insert(header.name.clone(), value.clone());
            }
            pattern @ TextMatch::Regex(_) => {
                to.header_patterns.push(value_match(&header.name, pattern))
            }
        }
    }
    to.query = one
        .query
        .iter()
        .map(|query| value_match(&query.name, &query.value))
        .collect();
    to
}

fn value_match(name: &str, value: &TextMatch) -> proto::ValueMatch {
    use proto::value_match::Value;
    proto::ValueMatch {
        name: name.to_owned(),
        value: Some(match value {
            TextMatch::Exact(value) => Value::Exact(value.clone()),
            TextMatch::Regex(pattern) => Value::Regex(pattern.clone()),
        }),
    }
}

/// A rule without its matches.
fn compile_rule(
    world: &World,
    service: &Service,
    port: &ServicePort,
    route: &Route,
    index: usize,
    rule: &Rule,
) -> proto::Route {
    let name = rule_name(route, index, rule);
    let redirects = rule
        .filters
        .iter()
        .any(|filter| matches!(filter, Filter::Redirect(_)));
    let backends: Vec<proto::WeightedBackend> = if redirects {
        Vec::new()
    } else {
        rule.backends
            .iter()
            .map(|given| weighted(world, given))
            .collect()
    };
    let refused = if let Some(refused) = rule.refused.first() {
        refused.message.clone()
    } else if redirects {
        String::new()
    } else if backends.is_empty() {
        "it has no backendRefs".to_owned()
    } else if backends.iter().all(|backend| backend.weight == 0) {
        "all of its backendRefs have weight 0".to_owned()
    } else {
        String::new()
    };
    proto::Route {
        name,
        matches: Vec::new(),
        backends,
        policy: Some(policy::of_rule(world, service, port, route, rule)),
        filters: filters(world, &rule.filters),
        refused,
    }
}

/// Why a backend cannot be used: a reason of the condition ResolvedRefs, and a sentence.
pub(super) struct Unresolved {
    pub(super) reason: &'static str,
    pub(super) message: String,
}

/// The Service port that a backendRef names.
pub(super) fn resolve<'a>(
    world: &'a World,
    given: &BackendRef,
) -> Result<(&'a Service, &'a ServicePort), Unresolved> {
    if !given.is_service() {
        return Err(Unresolved {
            reason: "InvalidKind",
            message: format!(
                "backend {} is a '{}' of group '{}'; only Services can be backends",
                given.name, given.kind, given.group
            ),
        });
    }
    let missing = |message| Unresolved {
        reason: "BackendNotFound",
        message,
    };
    let service = world
        .service(&given.name)
        .ok_or_else(|| missing(format!("there is no Service {}", given.name)))?;
    let number = given
        .port
        .ok_or_else(|| missing(format!("backend {} names no port", given.name)))?;
    let port = service.ports.iter().find(|port| port.port == number);
    let port =
        port.ok_or_else(|| missing(format!("Service {} has no port {number}", given.name)))?;
    Ok((service, port))
}

fn weighted(world: &World, given: &BackendRef) -> proto::WeightedBackend {
    let (backend, refused) = match resolve(world, given) {
        Ok((service, port)) => (Some(backend(world, service, port)), String::new()),
        Err(unresolved) => (None, unresolved.message),
    };
    proto::WeightedBackend {
        weight: given.weight,
        backend,
        filters: filters(world, &given.filters),
        refused,
    }
}

/// Filters; a mirror whose backend is not there is left out (HTTPRequestMirrorFilter BackendRef:
/// it "must be dropped"), and the route's condition says so.
fn filters(world: &World, given: &[Filter]) -> Vec<proto::Filter> {
    use proto::filter::Filter as To;
    let header_edits = |edits: &HeaderEdits| {
        let headers = |pairs: &[(String, String)]| {
            pairs
                .iter()
                .map(|(name, value)| proto::Header {
                    name: name.clone(),
                    value: value.clone(),
                })
                .collect()
        };
        proto::HeaderEdits {
            set: headers(&edits.set),
            add: headers(&edits.add),
            remove: edits.remove.clone(),
        }
    };
    given
        .iter()
        .filter_map(|filter| {
            Some(match filter {
                Filter::RequestHeaders(edits) => To::RequestHeaders(header_edits(edits)),
                Filter::ResponseHeaders(edits) => To::ResponseHeaders(header_edits(edits)),
                Filter::Redirect(redirect) => To::Redirect(proto::Redirect {
                    scheme: redirect.scheme.clone().unwrap_or_default(),
                    hostname: redirect.hostname.clone().unwrap_or_default(),
                    path: redirect.path.as_ref().map(path_edit),
                    port: redirect.port.unwrap_or(0).into(),
                    status: redirect.status.into(),
                }),
                Filter::Rewrite(rewrite) => To::Rewrite(proto::Rewrite {
                    hostname: rewrite.hostname.clone().unwrap_or_default(),
                    path: rewrite.path.as_ref().map(path_edit),
                }),
                Filter::Mirror(mirror) => {
                    let (service, port) = resolve(world, &mirror.backend).ok()?;
                    To::Mirror(proto::Mirror {
                        backend: Some(backend(world, service, port)),
                        numerator: mirror.numerator,
                        denominator: mirror.denominator,
                    })
                }
                Filter::Cors(cors) => To::Cors(proto::Cors {
                    allow_origins: cors.allow_origins.clone(),
                    allow_credentials: cors.allow_credentials,
                    allow_methods: cors.allow_methods.clone(),
                    allow_headers: cors.allow_headers.clone(),
                    expose_headers: cors.expose_headers.clone(),
                    max_age_seconds: cors.max_age,
                }),
            })
        })
        .map(|filter| proto::Filter {
            filter: Some(filter),
        })
        .collect()
}

fn path_edit(edit: &PathEdit) -> proto::PathEdit {
    use proto::path_edit::Edit;
    proto::PathEdit {
        edit: Some(match edit {
            PathEdit::Full(path) => Edit::Full(path.clone()),
            PathEdit::Prefix(path) => Edit::Prefix(path.clone()),
        }),
    }
}

/// By server name: exact ones first, then the longest wildcard, then the oldest.
fn tls_routes(
    world: &World,
    service: &Service,
    port: &ServicePort,
    applied: &[&Route],
) -> Vec<proto::OpaqueRoute> {
    let mut names: Vec<(bool, Reverse<usize>, usize, Option<String>)> = Vec::new();
    for (age, route) in applied.iter().enumerate() {
        if route.hostnames.is_empty() {
            names.push((true, Reverse(0), age, None));
        }
        for name in &route.hostnames {
            let wildcard = name.starts_with("*.");
            let name = name.to_ascii_lowercase();
            names.push((wildcard, Reverse(name.len()), age, Some(name)));
        }
    }
    names.sort();
    names
        .into_iter()
        .filter_map(|(_, _, age, name)| {
            let route = applied[age];
            let rule = route.rules.first()?;
            Some(proto::OpaqueRoute {
                server_names: name.into_iter().collect(),
                route: Some(compile_rule(world, service, port, route, 0, rule)),
            })
        })
        .collect()
}
