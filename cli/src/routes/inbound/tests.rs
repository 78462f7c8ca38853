//! What the proxies of endpoints do, and how it is told.

use serde_json::{Value, json};

use super::judge::{Bucket, Late};
use super::known::Explained;
use super::*;
use crate::explain::connection::Way;
use crate::output::Paint;
use crate::routes::config::Route;
use crate::routes::judge::Verdict;
use crate::routes::request::Request;

const FRONT: &str = "spiffe://cluster.local/ns/shop/sa/front";

/// A route to cart; for each endpoint whether mutual TLS is spoken with it.
fn route(endpoints: &[(&str, bool)]) -> Route {
    let endpoints = endpoints.iter().enumerate().map(|(i, (workload, mtls))| {
        json!({
            "address": format!("10.0.0.{}:8080", i + 1), "workload": workload, "weight": 1,
            "identity": mtls.then_some("spiffe://cluster.local/ns/shop/sa/cart"), "state": "ready",
        })
    });
    serde_json::from_value(json!({
        "name": "Service/shop/cart", "matches": [],
        "backends": [{
            "weight": 1, "namespace": "shop", "service": "cart", "port": 80,
            "algorithm": "ALGORITHM_PEAK_EWMA", "connect_timeout_ms": 1000,
            "limits": {"max_connections": 0, "max_requests": 0, "max_pending_requests": 0},
            "endpoints": endpoints.collect::<Vec<_>>(),
        }],
    }))
    .unwrap()
}

/// What the control plane says of a port of cart.
fn inbound(mtls: &str) -> Value {
    json!({
        "sidecar": true, "port": 8080, "protocol": "http", "mtls": mtls,
        "policies": ["PeerAuthentication shop/strict"], "serviceAccount": "cart", "node": "",
        "services": [{
            "service": "shop/cart:80",
            "rateLimit": {
                "requests": 100, "perMs": 60_000, "burst": 20, "replicas": 3,
                "key": {"header": "x-user"},
            },
            "requestHeaders": {"maxBytes": 64, "maxCount": 0},
            "connection": {"maxRequests": 9, "streamWindow": 0, "connectionWindow": 2_097_152},
            "sources": [{
                "field": "rateLimit",
                "from": {"name": "TrafficPolicy shop/cart", "target": "Service cart"},
                "overridden": [{"name": "TrafficPolicy shop/all", "target": "namespace shop"}],
            }],
        }],
        "telemetry": {"samplingPercent": 1.0, "accessLog": "Errors", "otlpEndpoint": ""},
        "probes": [{"http": "/healthz"}],
        "sources": [{
            "field": "mtls.mode",
            "from": {"name": "PeerAuthentication shop/strict", "target": "namespace shop"},
            "overridden": [],
        }],
        "acknowledged": true, "refused": null,
    })
}

fn explained(endpoints: &[Value]) -> Explained {
    let endpoints = endpoints.iter().enumerate().map(
        |(i, inbound)| json!({ "address": format!("10.0.0.{}:8080", i + 1), "inbound": inbound }),
    );
    serde_json::from_value(json!({
        "destination": "10.96.0.15:80", "known": true,
        "routes": [{
            "name": "Service/shop/cart",
            "backends": [{ "endpoints": endpoints.collect::<Vec<_>>() }, { "refused": "gone" }],
        }],
    }))
    .unwrap()
}

fn caller(request: Option<&Request>) -> Caller<'_> {
    Caller {
        identity: Some(FRONT),
        request,
        opaque: false,
    }
}

#[test]
fn a_request_is_let_in_or_refused_for_a_reason() {
    let bare = Caller::default();
    for (mode, mtls, request, from, way, refused) in [
        ("STRICT", true, "GET /", caller(None), Way::MutualTls, None),
        (
            "STRICT",
            true,
            "GET /",
            bare,
            Way::Refused,
            Some("the caller's proxy has no certificate yet"),
        ),
        (
            "STRICT",
            false,
            "GET /",
            caller(None),
            Way::Refused,
            Some("the caller comes in plaintext, and mutual TLS is required (STRICT)"),
        ),
        ("STRICT", false, "GET /healthz", bare, Way::Plaintext, None),
        ("PERMISSIVE", false, "GET /", bare, Way::Plaintext, None),
        (
            "DISABLE",
            true,
            "GET /",
            caller(None),
            Way::Refused,
            Some(
                "the caller's proxy speaks mutual TLS still, which is switched off there (DISABLE)",
            ),
        ),
        // "GET ", 48 bytes, " HTTP/1.1" and two ends of line; then one byte less.
        (
            "PERMISSIVE",
            true,
            "GET /01234567890123456789012345678901234567890123456",
            caller(None),
            Way::MutualTls,
            Some("431, its head has 65 bytes and shop/cart:80 takes 64 (requestHeaders.maxBytes)"),
        ),
        (
            "PERMISSIVE",
            true,
            "GET /0123456789012345678901234567890123456789012345",
            caller(None),
            Way::MutualTls,
            None,
        ),
    ] {
        let read: Request = request.parse().unwrap();
        let from = Caller {
            request: Some(&read),
            ..from
        };
        let said = judge(
            &route(&[("shop/cart-1", mtls)]),
            &explained(&[inbound(mode)]),
            from,
        );
        let [one] = &said.proxies[..] else {
            panic!("{said:?}")
        };
        let what = format!("{mode} {mtls} {request}");
        assert_eq!((one.way, one.refused.as_deref()), (way, refused), "{what}");
    }
    // Connections that are no HTTP are not limited, and need no request.
    let opaque = Caller {
        opaque: true,
        ..caller(None)
    };
    let said = judge(
        &route(&[("shop/cart-1", true)]),
        &explained(&[inbound("STRICT")]),
        opaque,
    );
    assert!(said.proxies[0].buckets.is_empty());
    assert!(show(&said, Paint::NEVER).contains("limits are of HTTP requests"));
}

#[test]
fn requests_are_counted_among_others() {
    let with: Request = "GET / X-User: ann".parse().unwrap();
    let without: Request = "GET /".parse().unwrap();
    for (key, mtls, request, of) in [
        (Value::Null, true, Some(&with), "all requests"),
        (
            json!({"header": "x-user"}),
            true,
            Some(&with),
            "those with x-user: ann",
        ),
        (
            json!({"header": "x-user"}),
            true,
            Some(&without),
            "those without x-user, together",
        ),
        (
            json!({"header": "x-user"}),
            true,
            None,
            "those with the same x-user",
        ),
        (
            json!({"clientIdentity": true}),
            true,
            None,
            "those of spiffe://cluster.local/ns/shop/sa/front",
        ),
        (
            json!({"clientIdentity": true}),
            false,
            None,
            "those without an identity, together",
        ),
        (
            json!({"sourceAddress": true}),
            true,
            None,
            "those of the caller's address",
        ),
    ] {
        let mut inbound = inbound("PERMISSIVE");
        inbound["services"][0]["rateLimit"]["key"] = key;
        let said = judge(
            &route(&[("shop/cart-1", mtls)]),
            &explained(&[inbound]),
            caller(request),
        );
        let bucket = Bucket {
            service: "shop/cart:80".to_owned(),
            of: of.to_owned(),
        };
        assert_eq!(said.proxies[0].buckets, [bucket]);
    }
}

#[test]
fn proxies_that_do_the_same_are_told_together() {
    let mut late = inbound("STRICT");
    late["acknowledged"] = false.into();
    let mut bare = inbound("STRICT");
    bare["sidecar"] = false.into();
    let endpoints = [
        ("shop/cart-1", true),
        ("shop/cart-2", true),
        ("shop/old-1", false),
        ("shop/gone-1", true),
        // Outside the mesh.
        ("", false),
    ];
    let explained = explained(&[inbound("STRICT"), late, bare, Value::Null]);
    let request: Request = "GET / x-user: ann".parse().unwrap();
    let said = judge(&route(&endpoints), &explained, caller(Some(&request)));
    assert_eq!(
        said.proxies[0].late,
        [Late {
            workload: "shop/cart-2".to_owned(),
            why: "its proxy has not confirmed this yet".to_owned(),
        }]
    );
    assert_eq!(said.refusals(), (3, vec![]));
    assert_eq!(
        show(&said, Paint::NEVER),
        "
inbound   shop/cart-1, shop/cart-2, port 8080
          shop/cart-2: its proxy has not confirmed this yet
mtls      STRICT, nothing else is taken; this caller comes as spiffe://cluster.local/ns/shop/sa/front
rate      shop/cart:80: 100 requests of each value of x-user in 1 min 0 s, 20 at once; shared by 3 ready replicas: 33.3 here, 7 at once
          this one counts among those with x-user: ann
heads     shop/cart:80: at most 64 bytes; this one as written here: 31 bytes and 1 field
connects  shop/cart:80: to the application, 9 requests each, 2097152 bytes HTTP/2 window
records   errors in the access log, 1 % traced
policies  mtls.mode  PeerAuthentication shop/strict (namespace shop)
          rateLimit  TrafficPolicy shop/cart (Service cart); overrides TrafficPolicy shop/all (namespace shop)

inbound   shop/old-1, port 8080
          no proxy stands before it: what comes is not checked and not limited

inbound   the control plane does not know 10.0.0.4:8080 (shop/gone-1)
"
    );
}

#[test]
fn what_is_not_known_is_said() {
    let side = Side::unknown("nobody answers".to_owned());
    let text = show(&side, Paint::NEVER);
    assert_eq!(text, "\ninbound   not known: nobody answers\n");
    assert_eq!(side.refusals(), (0, vec![]));
}

#[test]
fn replicas_know_of_different_proxies() {
    let one = |acknowledged: [Value; 2]| {
        let of = |acknowledged: &Value| {
            let mut inbound = inbound("STRICT");
            inbound["acknowledged"] = acknowledged.clone();
            inbound
        };
        explained(&[of(&acknowledged[0]), of(&acknowledged[1])])
    };
    let mut first = one([true.into(), Value::Null]);
    assert!(!first.is_complete());
    first.complete(&one([Value::Null, false.into()]));
    assert!(first.is_complete());
    let of = |address: &str| {
        let inbound = first.endpoint(address).unwrap().inbound.as_ref();
        inbound.unwrap().acknowledged
    };
    assert_eq!(of("10.0.0.1:8080"), Some(true));
    assert_eq!(of("10.0.0.2:8080"), Some(false));
}

#[test]
fn a_caller_without_a_proxy_comes_to_those_that_are_ready() {
    let endpoints = [("shop/cart-1", "Ready"), ("shop/cart-2", "NotReady")];
    let endpoints = endpoints.map(|(workload, health)| {
        json!({
            "address": format!("{workload}:8080"), "workload": workload, "health": health,
            "inbound": inbound("STRICT"),
        })
    });
    let of = |endpoints: &[Value]| -> Explained {
        serde_json::from_value(json!({
            "destination": "cart.shop:80", "known": true, "namespace": "shop", "service": "cart",
            "port": 80, "protocol": "http", "endpoints": endpoints,
        }))
        .unwrap()
    };
    let explained = of(&endpoints);
    let request: Request = "GET /".parse().unwrap();
    let side = judge_direct(&explained, Some(&request));
    assert_eq!(side.proxies[0].workloads, ["shop/cart-1"]);
    let refused = Verdict::bare(&explained).with(side);
    assert!(
        !refused.served
            && refused
                .why
                .contains("the one ready endpoint of shop/cart:80"),
        "{}",
        refused.why
    );
    let probe: Request = "GET /healthz".parse().unwrap();
    let side = judge_direct(&explained, Some(&probe));
    let text = show(&side, Paint::NEVER);
    assert!(Verdict::bare(&explained).with(side).served);
    assert!(
        text.contains("do not hold for the kubelet's probes"),
        "{text}"
    );
    let none = Verdict::bare(&of(&endpoints[1..]));
    assert!(
        !none.served && none.why.ends_with("nothing answers"),
        "{}",
        none.why
    );
}
