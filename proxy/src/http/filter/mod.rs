//! What routes change in requests and responses (Gateway API, HTTPRouteFilter).
//!
//! The plan is made once a table ([`crate::tables::Plan`]); here it is applied to one message. Only
//! what a filter names is touched: the rest of a head stays as it came.
//!
//! - [`fields`]: header edits on an HTTP/1.1 head and on an HTTP/2 header map
//! - [`cors`]: preflights, and what is added to responses
//! - here: paths, and the place a redirect leads to

pub mod cors;
pub mod fields;

use super::RequestView;
use super::route::path_only;
use crate::tables::{PathEdit, Redirect};

/// An answer of the proxy's own that is no error: a redirect, or the answer to a preflight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub fields: Fields,
}

/// Names, lower-case, and values.
pub type Fields = Vec<(&'static str, String)>;

impl PathEdit {
    /// The target with its path changed; `prefix` bytes of it were matched. The query stays.
    pub fn apply(&self, target: &[u8], prefix: usize) -> Vec<u8> {
        let path = path_only(target);
        let query = &target[path.len()..];
        let mut out = Vec::with_capacity(target.len() + 32);
        match self {
            Self::Full(path) => {
                if !path.starts_with('/') {
                    out.push(b'/');
                }
                out.extend_from_slice(path.as_bytes());
            }
            Self::Prefix(replacement) => {
                let rest = &path[prefix.min(path.len())..];
                out.extend_from_slice(replacement.trim_end_matches('/').as_bytes());
                // "/foo/" with "/foo" replaced by "" or "/" is "/", not "//".
                out.extend_from_slice(rest);
                if !out.starts_with(b"/") {
                    out.insert(0, b'/');
                }
            }
        }
        out.extend_from_slice(query);
        out
    }
}

impl Redirect {
    /// The answer to a request for port `called` of a Service; the application spoke `scheme`.
    pub fn answer<R: RequestView + ?Sized>(
        &self,
        request: &R,
        prefix: usize,
        called: u16,
    ) -> Answer {
        let host = self.hostname.as_deref().map(str::as_bytes);
        let host = match host {
            Some(host) => host,
            None => without_port(request.host().unwrap_or_default()),
        };
        // What reaches the proxy is not TLS.
        let scheme = self.scheme.as_deref().unwrap_or("http");
        let known = if scheme == "https" { 443 } else { 80 };
        let port = match (self.port, &self.scheme) {
            (Some(port), _) => port,
            (None, Some(_)) => known,
            (None, None) => called,
        };
        let path = match &self.path {
            Some(edit) => edit.apply(request.path(), prefix),
            None => request.path().to_vec(),
        };
        let mut location = format!("{scheme}://{}", String::from_utf8_lossy(host));
        if port != known {
            location.push_str(&format!(":{port}"));
        }
        location.push_str(&String::from_utf8_lossy(&path));
        Answer {
            status: self.status,
            fields: vec![("location", location)],
        }
    }
}

/// A host without its port; an IPv6 address stays in its brackets.
fn without_port(host: &[u8]) -> &[u8] {
    match host.iter().rposition(|&byte| byte == b':') {
        Some(colon) if !host[colon..].contains(&b']') => &host[..colon],
        _ => host,
    }
}
