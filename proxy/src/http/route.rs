//! Which route a request takes: the first whose match holds, in the order of the table.

use std::sync::Arc;

use super::RequestView;
use crate::tables::{Destination, PathMatch, Route, RouteMatch};

/// The first route that matches; `None` is answered 404.
pub fn select<'t, R: RequestView + ?Sized>(
    destination: &'t Destination,
    request: &R,
) -> Option<&'t Arc<Route>> {
    destination
        .routes
        .iter()
        .find(|route| route.matches.is_empty() || route.matches.iter().any(|m| holds(m, request)))
}

/// Whether all conditions of one match hold.
fn holds<R: RequestView + ?Sized>(m: &RouteMatch, request: &R) -> bool {
    if let Some(method) = &m.method
        && method.as_bytes() != request.method()
    {
        return false;
    }
    let path = path_only(request.path());
    let path_holds = match &m.path {
        None => true,
        Some(PathMatch::Exact(exact)) => path == exact.as_bytes(),
        Some(PathMatch::Prefix(prefix)) => has_path_prefix(path, prefix.as_bytes()),
    };
    path_holds
        && m.headers
            .iter()
            .all(|(name, value)| request.header(name) == Some(value.as_bytes()))
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
    path.strip_prefix(prefix)
        .is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Get(&'static str, Vec<(&'static str, &'static str)>);

    impl RequestView for Get {
        fn method(&self) -> &[u8] {
            b"GET"
        }
        fn path(&self) -> &[u8] {
            self.0.as_bytes()
        }
        fn header(&self, name: &str) -> Option<&[u8]> {
            let found = self.1.iter().find(|(n, _)| *n == name);
            found.map(|(_, v)| v.as_bytes())
        }
    }

    fn matching(path: Option<PathMatch>) -> RouteMatch {
        RouteMatch {
            method: None,
            path,
            headers: Vec::new(),
        }
    }

    #[test]
    fn prefixes_are_by_element() {
        for (prefix, path, expected) in [
            ("/", "/", true),
            ("/", "/a", true),
            ("/a", "/a", true),
            ("/a", "/a/", true),
            ("/a", "/a/b?c", true),
            ("/a", "/ab", false),
            ("/a/", "/a", true),
            ("/a/b", "/a", false),
            ("/a", "/a?x=/a/b", true),
        ] {
            let m = matching(Some(PathMatch::Prefix(prefix.into())));
            assert_eq!(holds(&m, &Get(path, vec![])), expected, "{prefix} {path}");
        }
    }

    #[test]
    fn all_conditions_of_a_match_must_hold() {
        let m = RouteMatch {
            method: Some("GET".into()),
            path: Some(PathMatch::Exact("/x".into())),
            headers: vec![("env".into(), "canary".into())],
        };
        assert!(holds(&m, &Get("/x?q", vec![("env", "canary")])));
        assert!(!holds(&m, &Get("/x", vec![("env", "prod")])));
        assert!(!holds(&m, &Get("/x", vec![])));
        assert!(!holds(&m, &Get("/x/", vec![("env", "canary")])));
    }
}
