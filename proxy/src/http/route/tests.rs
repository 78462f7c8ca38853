use std::sync::Arc;

use proptest::prelude::*;
use regex::bytes::Regex;

use super::*;
use crate::tables::{RoutePolicy, fresh_id};

#[derive(Debug, Clone)]
struct Request {
    method: &'static str,
    path: String,
    headers: Vec<(&'static str, String)>,
}

fn get(path: &str, headers: &[(&'static str, &str)]) -> Request {
    Request {
        method: "GET",
        path: path.to_owned(),
        headers: headers
            .iter()
            .map(|(name, value)| (*name, (*value).to_owned()))
            .collect(),
    }
}

impl RequestView for Request {
    fn size(&self) -> crate::http::HeadSize {
        crate::http::HeadSize::default()
    }

    fn method(&self) -> &[u8] {
        self.method.as_bytes()
    }
    fn path(&self) -> &[u8] {
        self.path.as_bytes()
    }
    fn header(&self, name: &str) -> Option<&[u8]> {
        let found = self.headers.iter().find(|(n, _)| *n == name);
        found.map(|(_, v)| v.as_bytes())
    }
}

fn by_path(path: PathMatch) -> RouteMatch {
    RouteMatch {
        path: Some(path),
        ..RouteMatch::default()
    }
}

fn route(matches: Vec<RouteMatch>) -> Arc<Route> {
    Arc::new(Route {
        id: fresh_id(),
        name: "r".into(),
        matches,
        backends: Vec::new(),
        total_weight: 0,
        policy: RoutePolicy::default(),
        refused: None,
        redirect: None,
        cors: None,
        sessions: false,
    })
}

fn pattern(text: &str) -> Regex {
    Regex::new(&format!("^(?:{text})$")).unwrap()
}

/// The specification, written down: of all matches that hold, the lowest order, then the first.
fn naive(routes: &[Arc<Route>], request: &Request) -> Option<usize> {
    let mut best: Option<(u32, usize)> = None;
    for (place, route) in routes.iter().enumerate() {
        let found = if route.matches.is_empty() {
            Some(0)
        } else {
            let holding = route.matches.iter().filter(|m| holds(m, request));
            holding.map(|m| m.order).min()
        };
        if let Some(order) = found
            && best.is_none_or(|(known, _)| order < known)
        {
            best = Some((order, place));
        }
    }
    best.map(|(_, place)| place)
}

fn indexed(routes: &[Arc<Route>], request: &Request) -> Option<usize> {
    match Index::new(routes) {
        None => (!routes.is_empty()).then_some(0),
        Some(index) => index.find(request).map(|entry| entry.route as usize),
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
        ("/a", "/a//", true),
        ("/a", "//a", false),
        ("/v2", "/foo/v2/example", false),
        ("/v2", "/v2example", false),
    ] {
        let m = by_path(PathMatch::Prefix(prefix.into()));
        let request = get(path, &[]);
        assert_eq!(holds(&m, &request), expected, "{prefix} {path}");
        let found = indexed(&[route(vec![m])], &request).is_some();
        assert_eq!(found, expected, "{prefix} {path}");
    }
}

#[test]
fn all_conditions_of_a_match_must_hold() {
    let m = RouteMatch {
        method: Some("GET".into()),
        path: Some(PathMatch::Exact("/x".into())),
        headers: vec![("env".into(), "canary".into())],
        header_patterns: vec![("agent".into(), pattern("curl/[0-9]+"))],
        query: vec![("q".into(), ValueMatch::Exact("a b".into()))],
        ..RouteMatch::default()
    };
    let well = [("env", "canary"), ("agent", "curl/8")];
    for (request, expected) in [
        (get("/x?q=a%20b", &well), true),
        (get("/x?r=1&%71=a%20b&q=other", &well), true),
        (get("/x?q=other&q=a%20b", &well), false),
        (get("/x?q=a+b", &well), false),
        (get("/x", &well), false),
        (get("/x/?q=a%20b", &well), false),
        (
            get("/x?q=a%20b", &[("env", "prod"), ("agent", "curl/8")]),
            false,
        ),
        (
            get("/x?q=a%20b", &[("env", "canary"), ("agent", "xcurl/8")]),
            false,
        ),
        (get("/x?q=a%20b", &[("env", "canary")]), false),
    ] {
        assert_eq!(holds(&m, &request), expected, "{request:?}");
        let found = indexed(&[route(vec![m.clone()])], &request).is_some();
        assert_eq!(found, expected, "{request:?}");
    }
}

#[test]
fn a_match_may_be_for_grpc_calls_only() {
    let m = |grpc| RouteMatch {
        grpc: Some(grpc),
        ..RouteMatch::default()
    };
    let routes = [route(vec![m(true)]), route(vec![m(false)])];
    for (kind, expected) in [
        ("application/grpc", 0),
        ("application/grpc+proto", 0),
        ("application/grpc-web", 1),
        ("text/plain", 1),
    ] {
        let request = get("/a.B/C", &[("content-type", kind)]);
        assert_eq!(indexed(&routes, &request), Some(expected), "{kind}");
    }
}

#[test]
fn a_target_without_a_path_meets_only_what_takes_every_path() {
    let under = |prefix: &str| route(vec![by_path(PathMatch::Prefix(prefix.into()))]);
    let request = get("*", &[]);
    assert_eq!(indexed(&[under("/a"), under("/")], &request), Some(1));
    assert_eq!(indexed(&[under("/a")], &request), None);
}

#[test]
fn the_prefix_that_was_matched_is_told() {
    let m = |path: &str| by_path(PathMatch::Prefix(path.into()));
    let routes = [route(vec![m("/a/b")]), route(vec![m("/")])];
    let index = Index::new(&routes).unwrap();
    assert_eq!(index.find(&get("/a/b/c", &[])).unwrap().prefix, 4);
    assert_eq!(index.find(&get("/x", &[])).unwrap().prefix, 0);
}

fn words() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["", "a", "b", "ab", "a%2F"]).prop_map(str::to_owned)
}

fn paths() -> impl Strategy<Value = String> {
    prop::collection::vec(words(), 0..4).prop_map(|parts| format!("/{}", parts.join("/")))
}

fn values() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["1", "2", "3"])
}

fn named() -> impl Strategy<Value = Vec<(&'static str, &'static str)>> {
    prop::collection::vec((prop::sample::select(vec!["x", "y", "z"]), values()), 0..3)
}

fn path_matches() -> impl Strategy<Value = Option<PathMatch>> {
    prop_oneof![
        Just(None),
        paths().prop_map(|path| Some(PathMatch::Exact(path.into()))),
        paths().prop_map(|path| {
            let trimmed = path.trim_end_matches('/');
            let path = if trimmed.is_empty() { "/" } else { trimmed };
            Some(PathMatch::Prefix(path.into()))
        }),
        prop::sample::select(vec!["/a.*", "/[ab]+(/.*)?", ".*b"])
            .prop_map(|text| Some(PathMatch::Regex(pattern(text)))),
    ]
}

fn matches() -> impl Strategy<Value = RouteMatch> {
    (
        path_matches(),
        prop::option::of(prop::sample::select(vec!["GET", "POST"])),
        named(),
        named(),
        prop::option::of(values()),
        0u32..4,
    )
        .prop_map(|(path, method, headers, query, agent, order)| RouteMatch {
            method: method.map(Into::into),
            path,
            headers: headers
                .into_iter()
                .map(|(name, value)| (name.into(), value.into()))
                .collect(),
            header_patterns: agent
                .map(|value| ("agent".into(), pattern(&format!("[{value}0]+"))))
                .into_iter()
                .collect(),
            query: query
                .into_iter()
                .map(|(name, value)| (name.into(), ValueMatch::Exact(value.into())))
                .collect(),
            order,
            grpc: None,
        })
}

prop_compose! {
    fn requests()(
        method in prop::sample::select(vec!["GET", "POST", "PUT"]),
        path in paths(),
        headers in named(),
        agent in values(),
        query in named(),
    ) -> Request {
        let query: Vec<String> = query.iter().map(|(n, v)| format!("{n}={v}")).collect();
        let mut headers: Vec<(&'static str, String)> =
            headers.into_iter().map(|(n, v)| (n, v.to_owned())).collect();
        headers.push(("agent", agent.to_owned()));
        Request {
            method,
            path: if query.is_empty() { path } else { format!("{path}?{}", query.join("&")) },
            headers,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// However the matches are arranged, what they say is what they say one by one.
    #[test]
    fn the_index_finds_what_the_specification_says(
        table in prop::collection::vec(prop::collection::vec(matches(), 1..4), 1..12),
        last in any::<bool>(),
        requests in prop::collection::vec(requests(), 1..8),
    ) {
        let mut routes: Vec<Arc<Route>> = table.into_iter().map(route).collect();
        if last {
            routes.push(route(vec![RouteMatch { order: 9, ..RouteMatch::default() }]));
        }
        for request in &requests {
            prop_assert_eq!(indexed(&routes, request), naive(&routes, request), "{:?}", request);
        }
    }
}
