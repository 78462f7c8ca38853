//! What a route matches by, from what the control plane sends.

use regex::bytes::{Regex, RegexBuilder};
use weft_api::proto;

use super::compile::{Invalid, Result, absolute, header_name, header_value, known, method, refuse};
use crate::tables::{PathMatch, RouteMatch, ValueMatch};

/// Largest compiled size of one regular expression, bytes.
const MAX_REGEX: usize = 256 << 10;
/// Header patterns and query conditions of one match.
const MAX_CONDITIONS: usize = 64;

pub(super) fn route_match(given: &proto::RouteMatch) -> Result<RouteMatch> {
    use proto::route_match::Path;
    if given.header_patterns.len() + given.query.len() + given.headers.len() > MAX_CONDITIONS {
        refuse!("a match has more than {MAX_CONDITIONS} conditions");
    }
    let method = match given.method.as_str() {
        "" => None,
        name => Some(method(name)?),
    };
    let path = match &given.path {
        None => None,
        Some(Path::PathExact(path)) => Some(PathMatch::Exact(absolute(path)?.into())),
        Some(Path::PathPrefix(path)) => {
            let trimmed = absolute(path)?.trim_end_matches('/');
            let prefix = if trimmed.is_empty() { "/" } else { trimmed };
            Some(PathMatch::Prefix(prefix.into()))
        }
        Some(Path::PathRegex(pattern)) => Some(PathMatch::Regex(regex(pattern)?)),
    };
    let mut headers = given
        .headers
        .iter()
        .map(|(name, value)| Ok((header_name(name)?, header_value(name, value)?)))
        .collect::<Result<Vec<_>>>()?;
    headers.sort();
    let mut header_patterns = Vec::with_capacity(given.header_patterns.len());
    for condition in &given.header_patterns {
        let name = header_name(&condition.name)?;
        match value(condition)? {
            ValueMatch::Exact(value) => headers.push((name, value)),
            ValueMatch::Regex(pattern) => header_patterns.push((name, pattern)),
        }
    }
    let query = given
        .query
        .iter()
        .map(|condition| Ok((condition.name.as_str().into(), value(condition)?)))
        .collect::<Result<Vec<_>>>()?;
    Ok(RouteMatch {
        method,
        path,
        headers,
        header_patterns,
        query,
        order: given.order,
        grpc: match known::<proto::GrpcMatch>(given.grpc, "gRPC match")? {
            proto::GrpcMatch::Any => None,
            proto::GrpcMatch::Only => Some(true),
            proto::GrpcMatch::Never => Some(false),
        },
    })
}

fn value(given: &proto::ValueMatch) -> Result<ValueMatch> {
    use proto::value_match::Value;
    match &given.value {
        Some(Value::Exact(value)) => Ok(ValueMatch::Exact(value.as_str().into())),
        Some(Value::Regex(pattern)) => Ok(ValueMatch::Regex(regex(pattern)?)),
        None => refuse!("a condition for '{}' has no value", given.name),
    }
}

/// A pattern of a whole path or value.
fn regex(pattern: &str) -> Result<Regex> {
    RegexBuilder::new(&format!("^(?:{pattern})$"))
        .unicode(false)
        .size_limit(MAX_REGEX)
        .build()
        .map_err(|error| Invalid(format!("'{pattern}' is not a regular expression: {error}")))
}
