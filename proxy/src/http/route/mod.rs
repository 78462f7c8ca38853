//! Which route a request takes: the one with the match that comes first in the destination's order,
//! of those that hold.
//!
//! The order is the control plane's ([`RouteMatch::order`]); here it only has to be found fast.
//! [`index`] narrows the matches down by path and by exact values, [`holds`] is what one match
//! says, written down.

mod index;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::sync::Arc;

use super::RequestView;
use crate::tables::{Destination, PathMatch, Route, RouteMatch, ValueMatch};

pub use index::Index;

/// A route, and how much of the path its prefix took.
#[derive(Debug, Clone, Copy)]
pub struct Selected<'t> {
    pub route: &'t Arc<Route>,
    /// Bytes of the path that a prefix match took; 0 when it matched in another way.
    pub prefix: usize,
}

/// The route that takes the request; `None` is answered 404.
pub fn select<'t, R: RequestView + ?Sized>(
    destination: &'t Destination,
    request: &R,
) -> Option<Selected<'t>> {
    match &destination.index {
        None => destination
            .routes
            .first()
            .map(|route| Selected { route, prefix: 0 }),
        Some(index) => {
            let found = index.find(request)?;
            Some(Selected {
                route: &destination.routes[found.route as usize],
                prefix: found.prefix as usize,
            })
        }
    }
}

/// Whether all conditions of one match hold.
pub fn holds<R: RequestView + ?Sized>(m: &RouteMatch, request: &R) -> bool {
    let path = path_only(request.path());
    let path_holds = match &m.path {
        None => true,
        Some(PathMatch::Exact(exact)) => path == exact.as_bytes(),
        Some(PathMatch::Prefix(prefix)) => has_path_prefix(path, prefix.as_bytes()),
        Some(PathMatch::Regex(pattern)) => pattern.is_match(path),
    };
    path_holds && rest_holds(m, request)
}

/// Whether all conditions hold but that of the path.
fn rest_holds<R: RequestView + ?Sized>(m: &RouteMatch, request: &R) -> bool {
    m.method
        .as_ref()
        .is_none_or(|method| method.as_bytes() == request.method())
        && m.grpc.is_none_or(|wanted| wanted == is_grpc(request))
        && m.headers
            .iter()
            .all(|(name, value)| request.header(name) == Some(value.as_bytes()))
        && m.header_patterns.iter().all(|(name, pattern)| {
            request
                .header(name)
                .is_some_and(|value| pattern.is_match(value))
        })
        && m.query.iter().all(|(name, wanted)| {
            query_value(request.path(), name.as_bytes()).is_some_and(|value| match wanted {
                ValueMatch::Exact(wanted) => *value == *wanted.as_bytes(),
                ValueMatch::Regex(pattern) => pattern.is_match(&value),
            })
        })
}

/// Whether a request is a gRPC call, by its content type.
pub fn is_grpc<R: RequestView + ?Sized>(request: &R) -> bool {
    request.header("content-type").is_some_and(|value| {
        value
            .strip_prefix(b"application/grpc")
            .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
    })
}

/// The path of a target, without its query.
pub fn path_only(target: &[u8]) -> &[u8] {
    let end = target
        .iter()
        .position(|&b| b == b'?')
        .unwrap_or(target.len());
    &target[..end]
}

/// By whole elements: "/a" is a prefix of "/a" and "/a/b", not of "/ab"
/// (Gateway API, HTTPPathMatch PathPrefix).
fn has_path_prefix(path: &[u8], prefix: &[u8]) -> bool {
    let prefix = prefix.strip_suffix(b"/").unwrap_or(prefix);
    // "/" takes every request, "*" too.
    prefix.is_empty()
        || path
            .strip_prefix(prefix)
            .is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

/// The value of a query parameter, percent-decoded; of one that is repeated the first
/// (HTTPQueryParamMatch leaves that open).
fn query_value<'r>(target: &'r [u8], name: &[u8]) -> Option<Cow<'r, [u8]>> {
    let query = &target[path_only(target).len()..];
    let query = query.strip_prefix(b"?")?;
    // What follows a '#' is not sent by clients; it would be no part of the query.
    query
        .split(|&b| b == b'&')
        .map(|pair| {
            let split = pair.iter().position(|&b| b == b'=');
            let split = split.unwrap_or(pair.len());
            (&pair[..split], pair.get(split + 1..).unwrap_or_default())
        })
        .find(|(key, _)| *decoded(key) == *name)
        .map(|(_, value)| decoded(value))
}

/// Percent-decoded (RFC 3986 section 2.1); what is malformed stays as it is.
fn decoded(text: &[u8]) -> Cow<'_, [u8]> {
    if !text.contains(&b'%') {
        return Cow::Borrowed(text);
    }
    let digit = |byte: Option<&u8>| (*byte? as char).to_digit(16);
    let mut out = Vec::with_capacity(text.len());
    let mut at = 0;
    while let Some(&byte) = text.get(at) {
        match (byte, digit(text.get(at + 1)), digit(text.get(at + 2))) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                at += 3;
            }
            _ => {
                out.push(byte);
                at += 1;
            }
        }
    }
    Cow::Owned(out)
}
