//! What it costs a request to find its rule: `cargo bench -p weft-proxy --bench routes`.
//!
//! Prints nanoseconds per request for tables of 1 to 1,000 rules, and how much more the largest costs
//! than the smallest, which is to stay under 2 µs. The tables are compiled as those of the control
//! plane are; the requests go round all rules.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use weft_api::proto;
use weft_proxy::balance::SharedLimits;
use weft_proxy::discovery::compile::{self, BackendKey, Links};
use weft_proxy::http::{HeadSize, RequestView, route};
use weft_proxy::tables::{Destination, EndpointsCell};

const RULES: [usize; 4] = [1, 10, 100, 1000];
const REQUESTS: usize = 200_000;
const ROUNDS: usize = 5;

struct Fresh;

impl Links for Fresh {
    fn endpoints(&mut self, name: &str) -> Arc<EndpointsCell> {
        Arc::new(EndpointsCell {
            name: name.into(),
            ..EndpointsCell::default()
        })
    }

    fn limits(&mut self, _: BackendKey) -> Arc<SharedLimits> {
        Arc::default()
    }
}

struct Request {
    path: String,
    headers: Vec<(&'static str, String)>,
}

impl RequestView for Request {
    // No rule asks for it.
    fn size(&self) -> HeadSize {
        HeadSize::default()
    }

    fn method(&self) -> &[u8] {
        b"GET"
    }

    fn path(&self) -> &[u8] {
        self.path.as_bytes()
    }

    fn header(&self, name: &str) -> Option<&[u8]> {
        let found = self.headers.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| value.as_bytes())
    }
}

/// One way of writing rules: the match of the rule `n`, and a request that takes it.
struct Kind {
    name: &'static str,
    rule: fn(usize) -> proto::RouteMatch,
    request: fn(usize) -> Request,
}

fn request(path: String) -> Request {
    // As many fields as a browser sends.
    let mut headers: Vec<(&'static str, String)> = [
        "host",
        "user-agent",
        "accept",
        "accept-language",
        "accept-encoding",
        "referer",
        "cookie",
        "connection",
    ]
    .map(|name| (name, "some value of usual length".to_owned()))
    .into();
    headers.push(("x-tenant", "none".to_owned()));
    Request { path, headers }
}

fn path_match(path: proto::route_match::Path) -> proto::RouteMatch {
    proto::RouteMatch {
        path: Some(path),
        ..proto::RouteMatch::default()
    }
}

const KINDS: [Kind; 4] = [
    Kind {
        name: "exact paths",
        rule: |n| {
            path_match(proto::route_match::Path::PathExact(format!(
                "/api/v1/things/{n}"
            )))
        },
        request: |n| request(format!("/api/v1/things/{n}")),
    },
    Kind {
        name: "path prefixes",
        rule: |n| {
            path_match(proto::route_match::Path::PathPrefix(format!(
                "/api/v1/area-{n}"
            )))
        },
        request: |n| request(format!("/api/v1/area-{n}/things/17?page=2")),
    },
    Kind {
        name: "one prefix, a header each",
        rule: |n| proto::RouteMatch {
            headers: [("x-tenant".to_owned(), format!("tenant-{n}"))].into(),
            ..path_match(proto::route_match::Path::PathPrefix("/api".to_owned()))
        },
        request: |n| {
            let mut request = request("/api/v1/things/17".to_owned());
            request.headers.retain(|(name, _)| *name != "x-tenant");
            request.headers.push(("x-tenant", format!("tenant-{n}")));
            request
        },
    },
    Kind {
        name: "no rule matches (404)",
        rule: |n| {
            path_match(proto::route_match::Path::PathPrefix(format!(
                "/api/v1/area-{n}"
            )))
        },
        request: |n| request(format!("/api/v2/area-{n}/things/17")),
    },
];

fn table(kind: &Kind, rules: usize) -> Destination {
    let routes = (0..rules).map(|n| proto::Route {
        name: format!("HTTPRoute/shop/cart/{n}"),
        matches: vec![proto::RouteMatch {
            order: u32::try_from(n).unwrap_or(u32::MAX),
            ..(kind.rule)(n)
        }],
        backends: vec![proto::WeightedBackend {
            weight: 1,
            backend: Some(proto::Backend {
                namespace: "shop".into(),
                service: "cart".into(),
                port: 80,
                endpoints: "shop/cart:80".into(),
                policy: None,
            }),
            ..proto::WeightedBackend::default()
        }],
        ..proto::Route::default()
    });
    let given = proto::Destination {
        namespace: "shop".into(),
        service: "cart".into(),
        port: 80,
        routes: routes.collect(),
        ..proto::Destination::default()
    };
    match compile::destination(&given, &mut Fresh) {
        Ok(table) => table,
        Err(error) => panic!("{error}"),
    }
}

/// The best of several rounds, in nanoseconds per request.
fn measure(kind: &Kind, rules: usize) -> f64 {
    let table = table(kind, rules);
    let requests: Vec<Request> = (0..rules).map(|n| (kind.request)(n)).collect();
    let mut best = f64::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for n in 0..REQUESTS {
            // In an order that is not the table's.
            let request = &requests[n * 7919 % rules];
            black_box(route::select(&table, black_box(request)).map(|found| found.prefix));
        }
        best = best.min(start.elapsed().as_nanos() as f64 / REQUESTS as f64);
    }
    best
}

fn main() {
    let heads: String = RULES.iter().map(|n| format!("{n:>8}")).collect();
    println!("{:<28}{heads}{:>10}   ns per request", "rules", "1000 - 1");
    for kind in &KINDS {
        let costs = RULES.map(|rules| measure(kind, rules));
        let shown: String = costs.iter().map(|cost| format!("{cost:>8.0}")).collect();
        println!("{:<28}{shown}{:>10.0}", kind.name, costs[3] - costs[0]);
    }
}
