//! Cross-origin requests (HTTPCORSFilter; Fetch standard, "CORS protocol").
//!
//! A preflight (OPTIONS with an origin and Access-Control-Request-Method) is answered here, allowed
//! or not: what is not allowed lacks the fields, and the browser refuses it. Other requests pass,
//! and their responses say whether their origin may read them.

use super::{Answer, Fields};
use crate::http::RequestView;
use crate::tables::Cors;

impl Cors {
    /// The answer to a preflight; `None` for every other request.
    pub fn preflight<R: RequestView + ?Sized>(&self, request: &R) -> Option<Answer> {
        if request.method() != b"OPTIONS" {
            return None;
        }
        let origin = request.header("origin")?;
        let method = request.header("access-control-request-method")?;
        let mut fields = self.common(origin);
        if !fields.is_empty() {
            let asked = request.header("access-control-request-headers");
            let methods = self.listed(&self.methods, Some(method));
            let headers = self.listed(&self.headers, asked);
            let named = [
                ("access-control-allow-methods", methods),
                ("access-control-allow-headers", headers),
            ];
            fields.extend(named.into_iter().filter_map(|(n, v)| Some((n, v?))));
            fields.push(("access-control-max-age", self.max_age.to_string()));
        }
        fields.push((
            "vary",
            "Origin, Access-Control-Request-Method, Access-Control-Request-Headers".to_owned(),
        ));
        Some(Answer {
            status: 204,
            fields,
        })
    }

    /// What is added to the response of a request that is no preflight; nothing when its origin is
    /// not allowed, or it has none.
    pub fn response_fields<R: RequestView + ?Sized>(&self, request: &R) -> Fields {
        let Some(origin) = request.header("origin") else {
            return Fields::new();
        };
        let mut fields = self.common(origin);
        if !fields.is_empty()
            && let Some(exposed) = self.listed(&self.expose, None)
        {
            fields.push(("access-control-expose-headers", exposed));
        }
        fields
    }

    fn common(&self, origin: &[u8]) -> Fields {
        let Ok(origin) = std::str::from_utf8(origin) else {
            return Fields::new();
        };
        if !self.origins.iter().any(|allowed| covers(allowed, origin)) {
            return Fields::new();
        }
        let mut fields = vec![("access-control-allow-origin", origin.to_owned())];
        if self.credentials {
            fields.push(("access-control-allow-credentials", "true".to_owned()));
        }
        fields
    }

    /// A list of names. "*" with credentials would be taken literally by browsers: what was asked
    /// for stands in its place.
    fn listed(&self, names: &[Box<str>], asked: Option<&[u8]>) -> Option<String> {
        if names.is_empty() {
            return None;
        }
        if !names.iter().any(|name| **name == *"*") {
            return Some(names.join(", "));
        }
        if !self.credentials {
            return Some("*".to_owned());
        }
        asked.map(|asked| String::from_utf8_lossy(asked).into_owned())
    }
}

/// Whether an allowed origin covers an origin: both with the port of the scheme when they name
/// none; "*" in the allowed host is any text, "." included.
fn covers(allowed: &str, origin: &str) -> bool {
    if allowed == "*" {
        return true;
    }
    let (Some(allowed), Some(origin)) = (parts(allowed), parts(origin)) else {
        return false;
    };
    if allowed.0 != origin.0 || allowed.2 != origin.2 {
        return false;
    }
    let (pattern, host) = (
        allowed.1.to_ascii_lowercase(),
        origin.1.to_ascii_lowercase(),
    );
    match pattern.split_once('*') {
        None => pattern == host,
        Some((before, after)) => {
            host.len() >= before.len() + after.len()
                && host.starts_with(before)
                && host.ends_with(after)
        }
    }
}

/// Scheme, host and port of an origin.
fn parts(origin: &str) -> Option<(&str, &str, u16)> {
    let (scheme, rest) = origin.split_once("://")?;
    let known = match scheme {
        "http" => 80,
        "https" => 443,
        _ => 0,
    };
    match rest.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => Some((scheme, host, port.parse().ok()?)),
        _ => Some((scheme, rest, known)),
    }
}
