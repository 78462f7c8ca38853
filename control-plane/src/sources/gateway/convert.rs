//! From routes as they are written to the model.

use super::filters::{self, Allowed, regex};
use super::types::{
    BackendRef, GrpcMatch, GrpcMethod, GrpcRoute, GrpcRule, HttpMatch, HttpRoute, HttpRule, Meta,
    NamedMatch, Object, ParentRef, Retry, StreamRule, TlsRoute, TypedValue, Unknown,
};
use crate::model::{
    self, Name, PathMatch, Refused, RefusedReason, Route, RouteKind, RouteMatch, RouteRetry, Rule,
    TextMatch, ValueMatch,
};

/// Most tries after the first that a rule may ask for.
const MAX_ATTEMPTS: u32 = 10;

/// What a rule says that cannot be honoured.
#[derive(Default)]
pub(super) struct Refusals(pub(super) Vec<Refused>);

impl Refusals {
    pub(super) fn unsupported(&mut self, message: impl Into<String>) {
        self.0.push(Refused {
            reason: RefusedReason::UnsupportedValue,
            message: message.into(),
        });
    }

    pub(super) fn incompatible(&mut self, message: impl Into<String>) {
        self.0.push(Refused {
            reason: RefusedReason::IncompatibleFilters,
            message: message.into(),
        });
    }

    pub(super) fn unknown(&mut self, fields: &Unknown, place: &str) {
        for field in fields.keys() {
            self.unsupported(format!("{place}field '{field}' is not known"));
        }
    }
}

impl HttpRoute {
    pub fn into_model(self) -> model::Object {
        route(RouteKind::Http, self, http_rule)
    }
}

impl GrpcRoute {
    pub fn into_model(self) -> model::Object {
        route(RouteKind::Grpc, self, grpc_rule)
    }
}

impl TlsRoute {
    /// A TLSRoute or a TCPRoute: they are written alike.
    pub fn into_stream_model(self, kind: RouteKind) -> model::Object {
        route(kind, self, stream_rule)
    }
}

fn route<R>(
    kind: RouteKind,
    given: Object<R>,
    mut rule: impl FnMut(&str, R) -> Rule,
) -> model::Object {
    let Meta {
        name,
        namespace,
        creation_timestamp,
        generation,
    } = given.metadata;
    let rules = given
        .spec
        .rules
        .into_iter()
        .map(|given| rule(&namespace, given))
        .collect();
    model::Object::Route(Box::new(Route {
        kind,
        name: Name::new(namespace, name),
        created: creation_timestamp.unwrap_or_default(),
        generation,
        parents: given.spec.parent_refs.into_iter().map(parent).collect(),
        hostnames: given.spec.hostnames,
        rules,
    }))
}

fn parent(given: ParentRef) -> model::ParentRef {
    model::ParentRef {
        group: given.group,
        kind: given.kind,
        namespace: given.namespace,
        name: given.name,
        section_name: given.section_name,
        port: given.port,
    }
}

fn http_rule(namespace: &str, given: HttpRule) -> Rule {
    let mut refusals = Refusals::default();
    refusals.unknown(&given.unknown, "");
    let session = given
        .session_persistence
        .map(|given| given.into_model(&mut refusals));
    let mut dropped = false;
    let mut matches = Vec::with_capacity(given.matches.len().max(1));
    for (index, one) in given.matches.into_iter().enumerate() {
        let before = refusals.0.len();
        let read = http_match(one, &mut refusals);
        dropped |= at(&mut refusals, before, index);
        matches.push(read);
    }
    if matches.is_empty() {
        matches.push(RouteMatch::default());
    }
    let by_prefix = matches
        .iter()
        .all(|one| matches!(one.path, PathMatch::Prefix(_)));
    let allowed = Allowed::Http { by_prefix };
    let filters = filters::filters(namespace, given.filters, allowed, "", &mut refusals);
    let retry = given.retry.and_then(|given| retry(given, &mut refusals));
    if let (Some(request), Some(backend)) = (given.timeouts.request, given.timeouts.backend_request)
        && !request.is_zero()
        && backend > request
    {
        refusals.unsupported(format!(
            "timeouts.backendRequest {backend} is longer than timeouts.request {request}"
        ));
    }
    Rule {
        name: given.name,
        matches,
        filters,
        backends: backends(namespace, given.backend_refs, allowed, &mut refusals),
        request_timeout: given.timeouts.request,
        backend_timeout: given.timeouts.backend_request,
        retry,
        session,
        refused: refusals.0,
        dropped,
    }
}

/// Says which match the newest refusals are of; whether there are any.
fn at(refusals: &mut Refusals, before: usize, index: usize) -> bool {
    for refused in &mut refusals.0[before..] {
        refused.message = format!("matches[{index}]: {}", refused.message);
    }
    refusals.0.len() > before
}

fn http_match(given: HttpMatch, refusals: &mut Refusals) -> RouteMatch {
    refusals.unknown(&given.unknown, "");
    if let Some(method) = &given.method
        && !filters::is_token(method)
    {
        refusals.unsupported(format!("'{method}' is not a method"));
    }
    RouteMatch {
        method: given.method,
        path: given
            .path
            .map_or_else(PathMatch::default, |path| path_match(path, refusals)),
        headers: values(given.headers, true, refusals),
        query: values(given.query_params, false, refusals),
        grpc: (0, 0),
    }
}

fn path_match(given: TypedValue, refusals: &mut Refusals) -> PathMatch {
    let value = given.value.unwrap_or_else(|| "/".to_owned());
    let kind = given.kind.as_deref().unwrap_or("PathPrefix");
    if matches!(kind, "Exact" | "PathPrefix")
        && (!value.starts_with('/') || value.contains(['?', '#']) || !value.is_ascii())
    {
        refusals.unsupported(format!(
            "'{value}' is not a path (ASCII, begins with /, no query)"
        ));
    }
    match kind {
        "Exact" => PathMatch::Exact(value),
        "PathPrefix" => {
            let trimmed = value.trim_end_matches('/');
            PathMatch::Prefix(if trimmed.is_empty() { "/" } else { trimmed }.to_owned())
        }
        "RegularExpression" => {
            regex(&value, refusals);
            PathMatch::Regex(value)
        }
        other => {
            refusals.unsupported(format!("path type '{other}' is not known"));
            PathMatch::Exact(value)
        }
    }
}

/// Of several conditions for one name the first counts (HTTPHeaderMatch, HTTPQueryParamMatch).
fn values(given: Vec<NamedMatch>, header: bool, refusals: &mut Refusals) -> Vec<ValueMatch> {
    let mut found: Vec<ValueMatch> = Vec::with_capacity(given.len());
    for one in given {
        let name = if header {
            if !filters::is_token(&one.name) {
                refusals.unsupported(format!("'{}' is not a header's name", one.name));
            }
            one.name.to_ascii_lowercase()
        } else {
            one.name
        };
        if found.iter().any(|known| known.name == name) {
            continue;
        }
        let value = match one.kind.as_deref().unwrap_or("Exact") {
            "Exact" => TextMatch::Exact(one.value),
            "RegularExpression" => {
                regex(&one.value, refusals);
                TextMatch::Regex(one.value)
            }
            other => {
                refusals.unsupported(format!("match type '{other}' is not known"));
                TextMatch::Exact(one.value)
            }
        };
        found.push(ValueMatch { name, value });
    }
    found
}

fn retry(given: Retry, refusals: &mut Refusals) -> Option<RouteRetry> {
    if let Some(attempts) = given.attempts.filter(|attempts| *attempts > MAX_ATTEMPTS) {
        refusals.unsupported(format!(
            "retry.attempts of {attempts} would multiply an overload; at most {MAX_ATTEMPTS} are taken"
        ));
        return None;
    }
    if let Some(code) = given.codes.iter().find(|code| !(400..=599).contains(*code)) {
        refusals.unsupported(format!("retry.codes: {code} is not an error status"));
        return None;
    }
    Some(RouteRetry {
        codes: given.codes,
        attempts: given.attempts,
        backoff: given.backoff,
    })
}

pub(super) fn backends(
    namespace: &str,
    given: Vec<BackendRef>,
    allowed: Allowed,
    refusals: &mut Refusals,
) -> Vec<model::BackendRef> {
    given
        .into_iter()
        .enumerate()
        .map(|(index, given)| {
            let place = format!("backendRefs[{index}].");
            backend(namespace, given, allowed, &place, refusals)
        })
        .collect()
}

pub(super) fn backend(
    namespace: &str,
    given: BackendRef,
    allowed: Allowed,
    place: &str,
    refusals: &mut Refusals,
) -> model::BackendRef {
    let weight = given.weight.unwrap_or(1);
    if weight > 1_000_000 {
        refusals.unsupported(format!("{place}weight: {weight} is above 1000000"));
    }
    model::BackendRef {
        group: given.group.unwrap_or_default(),
        kind: given.kind.unwrap_or_else(|| "Service".to_owned()),
        name: Name::new(
            given.namespace.unwrap_or_else(|| namespace.to_owned()),
            given.name,
        ),
        port: given.port,
        weight,
        filters: filters::filters(namespace, given.filters, allowed, place, refusals),
    }
}

fn grpc_rule(namespace: &str, given: GrpcRule) -> Rule {
    let mut refusals = Refusals::default();
    refusals.unknown(&given.unknown, "");
    let session = given
        .session_persistence
        .map(|given| given.into_model(&mut refusals));
    let mut dropped = false;
    let mut matches = Vec::with_capacity(given.matches.len().max(1));
    for (index, one) in given.matches.into_iter().enumerate() {
        let before = refusals.0.len();
        let read = grpc_match(one, &mut refusals);
        dropped |= at(&mut refusals, before, index);
        matches.push(read);
    }
    if matches.is_empty() {
        matches.push(RouteMatch::default());
    }
    let filters = filters::filters(namespace, given.filters, Allowed::Grpc, "", &mut refusals);
    Rule {
        name: given.name,
        matches,
        filters,
        backends: backends(namespace, given.backend_refs, Allowed::Grpc, &mut refusals),
        session,
        refused: refusals.0,
        dropped,
        ..Rule::default()
    }
}

fn grpc_match(given: GrpcMatch, refusals: &mut Refusals) -> RouteMatch {
    refusals.unknown(&given.unknown, "");
    let (path, grpc) = match given.method {
        None => (PathMatch::default(), (0, 0)),
        Some(method) => grpc_method(method, refusals),
    };
    RouteMatch {
        method: None,
        path,
        headers: values(given.headers, true, refusals),
        query: Vec::new(),
        grpc,
    }
}

/// A gRPC call's path is `/<service>/<method>`.
fn grpc_method(given: GrpcMethod, refusals: &mut Refusals) -> (PathMatch, (usize, usize)) {
    let some = |text: Option<String>| text.filter(|text| !text.is_empty());
    let (service, method) = (some(given.service), some(given.method));
    let length = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    let grpc = (length(&service), length(&method));
    match given.kind.as_deref().unwrap_or("Exact") {
        "Exact" => {
            for part in [&service, &method].into_iter().flatten() {
                if part.contains(['/', '?', '#']) || !part.is_ascii() {
                    refusals.unsupported(format!("'{part}' is not a gRPC service or method"));
                }
            }
            let path = match (service, method) {
                (Some(service), Some(method)) => PathMatch::Exact(format!("/{service}/{method}")),
                (Some(service), None) => PathMatch::Prefix(format!("/{service}")),
                (None, Some(method)) => {
                    PathMatch::Regex(format!("/[^/]+/{}", regex::escape(&method)))
                }
                (None, None) => {
                    refusals.unsupported("method names neither a service nor a method");
                    PathMatch::default()
                }
            };
            (path, grpc)
        }
        "RegularExpression" => {
            let service = service.map_or_else(|| "[^/]+".to_owned(), |s| format!("(?:{s})"));
            let method = method.map_or_else(|| "[^/]+".to_owned(), |m| format!("(?:{m})"));
            let pattern = format!("/{service}/{method}");
            regex(&pattern, refusals);
            (PathMatch::Regex(pattern), grpc)
        }
        other => {
            refusals.unsupported(format!("method match type '{other}' is not known"));
            (PathMatch::default(), grpc)
        }
    }
}

fn stream_rule(namespace: &str, given: StreamRule) -> Rule {
    let mut refusals = Refusals::default();
    refusals.unknown(&given.unknown, "");
    Rule {
        name: given.name,
        backends: backends(namespace, given.backend_refs, Allowed::None, &mut refusals),
        refused: refusals.0,
        ..Rule::default()
    }
}
