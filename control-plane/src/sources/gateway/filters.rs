//! Filters of rules and backends.

use super::convert::{Refusals, backend};
use super::types::{Cors, Filter, HeaderModifier, Mirror, PathModifier, Redirect, Rewrite};
use crate::model;
use crate::model::PathEdit;

/// Seconds a browser may remember the answer to a preflight (HTTPCORSFilter MaxAge).
const CORS_MAX_AGE: u32 = 5;

/// Fields that say where a message ends or how its connection is used, and the one that the
/// rewritten host goes into: not a filter's to change.
pub(super) const NOT_TO_EDIT: [&str; 9] = [
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Largest compiled size of a regular expression, bytes; the proxy has the same limit.
const MAX_REGEX: usize = 256 << 10;

/// Whether a pattern is one that the proxy takes.
pub(super) fn regex(pattern: &str, refusals: &mut Refusals) {
    if let Err(error) = compiled(pattern) {
        refusals.unsupported(format!("'{pattern}' is not a regular expression: {error}"));
    }
}

fn compiled(pattern: &str) -> Result<(), String> {
    regex::bytes::RegexBuilder::new(&format!("^(?:{pattern})$"))
        .unicode(false)
        .size_limit(MAX_REGEX)
        .build()
        .map(drop)
        .map_err(|error| match error {
            regex::Error::CompiledTooBig(_) => "it is too large".to_owned(),
            // The last line says what is wrong; those before point at it.
            error => {
                let text = error.to_string();
                let last = text.lines().last().unwrap_or_default();
                last.trim_start_matches("error: ").to_owned()
            }
        })
}

/// RFC 9110 section 5.6.2.
pub(super) fn is_token(given: &str) -> bool {
    !given.is_empty()
        && given
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

/// Filters of a GRPCRoute: fewer kinds than of an HTTPRoute.
fn grpc_filters(
    namespace: &str,
    given: Vec<Filter>,
    place: &str,
    refusals: &mut Refusals,
) -> Vec<model::Filter> {
    for filter in &given {
        if matches!(
            filter.kind.as_str(),
            "RequestRedirect" | "URLRewrite" | "CORS"
        ) {
            refusals.unsupported(format!(
                "{place}filter type '{}' is not one of a GRPCRoute",
                filter.kind
            ));
        }
    }
    http_filters(namespace, given, false, place, refusals)
}

/// Which filters may stand at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Allowed {
    /// Of an HTTPRoute. `by_prefix`: every match of the rule has a path prefix.
    Http {
        by_prefix: bool,
    },
    Grpc,
    /// None: connections that are not HTTP, and the backend of a mirror.
    None,
}

/// Reads the filters of a rule, or of the backendRef that `place` names.
pub(super) fn filters(
    namespace: &str,
    given: Vec<Filter>,
    allowed: Allowed,
    place: &str,
    refusals: &mut Refusals,
) -> Vec<model::Filter> {
    match allowed {
        Allowed::Http { by_prefix } => http_filters(namespace, given, by_prefix, place, refusals),
        Allowed::Grpc => grpc_filters(namespace, given, place, refusals),
        Allowed::None => {
            if !given.is_empty() {
                refusals.unsupported(format!("{place}filters: there can be none here"));
            }
            Vec::new()
        }
    }
}

fn http_filters(
    namespace: &str,
    given: Vec<Filter>,
    by_prefix: bool,
    place: &str,
    refusals: &mut Refusals,
) -> Vec<model::Filter> {
    let mut seen: Vec<String> = Vec::with_capacity(given.len());
    let mut found = Vec::with_capacity(given.len());
    for (index, filter) in given.into_iter().enumerate() {
        let place = format!("{place}filters[{index}]");
        let kind = filter.kind.clone();
        if kind != "RequestMirror" && seen.contains(&kind) {
            refusals.incompatible(format!("{place}: {kind} is there twice"));
        }
        seen.push(kind);
        found.extend(one(namespace, filter, by_prefix, &place, refusals));
    }
    let has = |kind: &str| seen.iter().any(|known| known == kind);
    if has("RequestRedirect") && has("URLRewrite") {
        refusals.incompatible("RequestRedirect and URLRewrite exclude each other");
    }
    found
}

fn one(
    namespace: &str,
    given: Filter,
    by_prefix: bool,
    place: &str,
    refusals: &mut Refusals,
) -> Option<model::Filter> {
    let missing = |field: &str, refusals: &mut Refusals| {
        refusals.unsupported(format!("{place}: {field} is missing"));
    };
    macro_rules! required {
        ($field:ident, $name:literal) => {
            match given.$field {
                Some(value) => value,
                None => {
                    missing($name, refusals);
                    return None;
                }
            }
        };
    }
    Some(match given.kind.as_str() {
        "RequestHeaderModifier" => {
            let given = required!(request_header_modifier, "requestHeaderModifier");
            model::Filter::RequestHeaders(headers(given, place, refusals))
        }
        "ResponseHeaderModifier" => {
            let given = required!(response_header_modifier, "responseHeaderModifier");
            model::Filter::ResponseHeaders(headers(given, place, refusals))
        }
        "RequestRedirect" => {
            let given = required!(request_redirect, "requestRedirect");
            model::Filter::Redirect(redirect(given, by_prefix, place, refusals))
        }
        "URLRewrite" => {
            let given = required!(url_rewrite, "urlRewrite");
            model::Filter::Rewrite(rewrite(given, by_prefix, place, refusals))
        }
        "RequestMirror" => {
            let given = required!(request_mirror, "requestMirror");
            model::Filter::Mirror(mirror(namespace, given, place, refusals))
        }
        "CORS" => {
            let given = required!(cors, "cors");
            model::Filter::Cors(cors(given, place, refusals))
        }
        other => {
            refusals.unsupported(format!("{place}: filter type '{other}' is not supported"));
            return None;
        }
    })
}

fn headers(given: HeaderModifier, place: &str, refusals: &mut Refusals) -> model::HeaderEdits {
    let mut names: Vec<String> = Vec::new();
    let set_or_added = given.set.iter().chain(&given.add);
    for name in set_or_added
        .clone()
        .map(|header| &header.name)
        .chain(&given.remove)
    {
        let lower = name.to_ascii_lowercase();
        if !is_token(name) {
            refusals.unsupported(format!("{place}: '{name}' is not a header's name"));
        } else if NOT_TO_EDIT.contains(&lower.as_str()) {
            refusals.unsupported(format!(
                "{place}: '{name}' belongs to the message's framing or connection{}",
                if lower == "host" {
                    "; write a URLRewrite with a hostname"
                } else {
                    ""
                }
            ));
        }
        if names.contains(&lower) {
            refusals.incompatible(format!("{place}: more than one action for '{name}'"));
        }
        names.push(lower);
    }
    for header in set_or_added {
        let bad = |byte: u8| (byte < b' ' && byte != b'\t') || byte == 0x7f;
        if header.value.bytes().any(bad) {
            refusals.unsupported(format!(
                "{place}: the value of '{}' holds what a header cannot",
                header.name
            ));
        }
    }
    let pairs = |given: Vec<super::types::Header>| {
        given
            .into_iter()
            .map(|header| (header.name, header.value.trim().to_owned()))
            .collect()
    };
    model::HeaderEdits {
        set: pairs(given.set),
        add: pairs(given.add),
        remove: given.remove,
    }
}

fn hostname(given: Option<String>, place: &str, refusals: &mut Refusals) -> Option<String> {
    if let Some(name) = &given {
        let ok = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        if name.is_empty() || name.len() > 253 || !name.bytes().all(ok) {
            refusals.unsupported(format!("{place}: '{name}' is not a host name"));
        }
    }
    given
}

fn path(
    given: Option<PathModifier>,
    by_prefix: bool,
    place: &str,
    refusals: &mut Refusals,
) -> Option<PathEdit> {
    let given = given?;
    let edit = match given.kind.as_str() {
        "ReplaceFullPath" => PathEdit::Full(given.replace_full_path.unwrap_or_default()),
        "ReplacePrefixMatch" => {
            if !by_prefix {
                refusals.incompatible(format!(
                    "{place}: ReplacePrefixMatch needs a PathPrefix in every match of the rule"
                ));
            }
            PathEdit::Prefix(given.replace_prefix_match.unwrap_or_default())
        }
        other => {
            refusals.unsupported(format!("{place}: path type '{other}' is not known"));
            return None;
        }
    };
    let (PathEdit::Full(text) | PathEdit::Prefix(text)) = &edit;
    let visible = text.bytes().all(|byte| byte.is_ascii_graphic());
    if !visible || text.contains(['?', '#']) || !(text.is_empty() || text.starts_with('/')) {
        refusals.unsupported(format!(
            "{place}: '{text}' is not a path (ASCII, begins with /, no query)"
        ));
    }
    Some(edit)
}

fn redirect(
    given: Redirect,
    by_prefix: bool,
    place: &str,
    refusals: &mut Refusals,
) -> model::Redirect {
    if let Some(scheme) = &given.scheme
        && !matches!(scheme.as_str(), "http" | "https")
    {
        refusals.unsupported(format!("{place}: scheme '{scheme}' is not known"));
    }
    let status = given.status_code.unwrap_or(302);
    if !matches!(status, 301 | 302 | 303 | 307 | 308) {
        refusals.unsupported(format!("{place}: {status} is not a redirect's status code"));
    }
    model::Redirect {
        scheme: given.scheme,
        hostname: hostname(given.hostname, place, refusals),
        path: path(given.path, by_prefix, place, refusals),
        port: given.port,
        status,
    }
}

fn rewrite(
    given: Rewrite,
    by_prefix: bool,
    place: &str,
    refusals: &mut Refusals,
) -> model::Rewrite {
    model::Rewrite {
        hostname: hostname(given.hostname, place, refusals),
        path: path(given.path, by_prefix, place, refusals),
    }
}

fn mirror(namespace: &str, given: Mirror, place: &str, refusals: &mut Refusals) -> model::Mirror {
    let (numerator, denominator) = match (given.percent, given.fraction) {
        (Some(_), Some(_)) => {
            refusals.unsupported(format!("{place}: percent and fraction exclude each other"));
            (0, 1)
        }
        (Some(percent), None) => (percent, 100),
        (None, Some(fraction)) => (fraction.numerator, fraction.denominator.unwrap_or(100)),
        (None, None) => (1, 1),
    };
    if denominator == 0 || numerator > denominator {
        refusals.unsupported(format!(
            "{place}: {numerator}/{denominator} is not a share of the requests"
        ));
    }
    let inner = format!("{place}.backendRef.");
    model::Mirror {
        backend: backend(
            namespace,
            given.backend_ref,
            Allowed::None,
            &inner,
            refusals,
        ),
        numerator,
        denominator,
    }
}

fn cors(given: Cors, place: &str, refusals: &mut Refusals) -> model::Cors {
    for origin in &given.allow_origins {
        let known = origin == "*"
            || ["http://", "https://"].iter().any(|scheme| {
                origin
                    .strip_prefix(scheme)
                    .is_some_and(|host| !host.is_empty() && !host.contains('/'))
            });
        if !known || !origin.bytes().all(|byte| byte.is_ascii_graphic()) {
            refusals.unsupported(format!(
                "{place}: '{origin}' is not an origin (scheme://host[:port], or *)"
            ));
        }
    }
    let names = given.allow_methods.iter().chain(&given.allow_headers);
    for name in names.chain(&given.expose_headers) {
        if !is_token(name) {
            refusals.unsupported(format!("{place}: '{name}' is not a method or header name"));
        }
    }
    model::Cors {
        allow_origins: given.allow_origins,
        allow_credentials: given.allow_credentials.unwrap_or(false),
        allow_methods: given.allow_methods,
        allow_headers: given.allow_headers,
        expose_headers: given.expose_headers,
        max_age: match given.max_age {
            None | Some(0) => CORS_MAX_AGE,
            Some(seconds) => seconds,
        },
    }
}
