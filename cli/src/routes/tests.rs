//! What `weft routes` says of tables and requests.

use serde_json::json;

use super::config::Match;
use super::*;

fn config() -> Config {
    let endpoint = |address: &str, state: &str| {
        json!({
            "address": address, "workload": "shop/catalog-1", "zone": "", "weight": 1,
            "identity": "spiffe://cluster.local/ns/shop/sa/catalog", "state": state,
        })
    };
    let route = |name: &str, matches: serde_json::Value, endpoints: serde_json::Value| {
        json!({
            "name": name, "matches": matches,
            "backends": [{
                "weight": 1, "namespace": "shop", "service": "catalog", "port": 80,
                "algorithm": "ALGORITHM_PEAK_EWMA", "hash_key": null, "connect_timeout_ms": 1000, "slow_start_ms": 30000, "zone_threshold_percent": 70,
                "limits": {"max_connections": 0, "max_requests": 100, "max_pending_requests": 0},
                "connection": {
                    "max_requests": 1000, "idle_timeout_ms": null,
                    "keepalive": {"time_ms": 60_000, "interval_ms": 15_000, "probes": 4},
                    "stream_window": 262_144, "connection_window": 16_777_216,
                },
                "session": {
                    "name": "stay", "in": "cookie", "permanent": false,
                    "absolute_timeout_ms": null, "idle_timeout_ms": 600_000,
                },
                "health_check": {
                    "probe": "GET /live", "interval_ms": 5000, "timeout_ms": 500,
                    "unhealthy_threshold": 3, "healthy_threshold": 2,
                },
                "retry_constraint": {"percent": 5, "interval_ms": 10_000, "floor": 100},
                "outlier_detection": {
                    "consecutive_gateway_errors": 3, "consecutive_5xx": 5,
                    "success_rate_threshold_percent": 0, "base_ejection_ms": 3000,
                    "max_ejection_percent": 50,
                },
                "endpoints": endpoints,
            }],
            "request_timeout_ms": 3000, "per_try_timeout_ms": null, "idle_timeout_ms": null,
            "stream_idle_timeout_ms": 20_000,
            "retry": {
                "attempts": 2, "status_codes": [503], "grpc_codes": [], "connect_failure": true,
                "refused_stream": false, "reset": false, "timeout": false, "methods": [],
                "budget_percent": 20, "budget_min_per_second": 10,
            },
            "fallback": null,
            "sources": [
                {
                    "field": "timeouts.request",
                    "from": {"name": "TrafficPolicy shop/port", "target": "Service catalog, port http"},
                    "overridden": [{"name": "TrafficPolicy shop/all", "target": "namespace shop"}],
                },
                {
                    "field": "faultInjection",
                    "from": {"name": "TrafficPolicy shop/all", "target": "namespace shop"},
                    "overridden": [],
                },
            ],
            "fault": {
                "headers": [{"name": "x-chaos", "value": "on"}],
                "delay": {"percent": 10.0, "duration_ms": 2000},
                "abort": {"percent": 2.0, "status": 503, "grpc_status": 14},
            },
        })
    };
    let canary = json!([{
        "method": "GET", "path": {"prefix": "/items"},
        "headers": [{"name": "canary", "value": "yes please"}],
    }]);
    serde_json::from_value(json!({
        "version": "0.1.0",
        "workload": {"namespace": "shop", "name": "front-1"},
        "destinations": [
            {
                "address": "10.96.0.20:80", "namespace": "shop", "service": "catalog",
                "port": 80, "protocol": "PROTOCOL_HTTP",
                "routes": [
                    route("HTTPRoute/shop/canary", canary, json!([])),
                    route("Service/shop/catalog", json!([]), json!([
                        endpoint("10.77.0.5:8080", "ready"),
                        endpoint("10.77.0.6:8080", "ejected"),
                    ])),
                ],
            },
            {
                "address": "10.96.0.9:80", "namespace": "other", "service": "catalog",
                "port": 80, "protocol": "PROTOCOL_AUTO",
                "routes": [route("x", json!([{"method": "GET", "path": {"exact": "/only"}, "headers": []}]), json!([]))],
            },
        ],
    }))
    .unwrap()
}

#[test]
fn requests_are_read() {
    let request: Request = "GET /x?q=1 Host: shop canary: yes please".parse().unwrap();
    assert_eq!(request.path, "/x?q=1");
    let headers = [("host", "shop"), ("canary", "yes please")];
    assert_eq!(
        request.headers,
        headers.map(|(n, v)| (n.to_owned(), v.to_owned()))
    );
    assert!(
        "GET / a:b"
            .parse::<Request>()
            .is_ok_and(|r| r.headers[0].1 == "b")
    );
    for bad in ["", "GET", "GET x", "GET / value", "G@T /"] {
        assert!(bad.parse::<Request>().is_err(), "{bad}");
    }
}

#[test]
fn destinations_are_found_as_the_application_names_them() {
    let config = config();
    let address = |given: &str| config.find(given).map(|d| d.address.as_str());
    for (given, expected) in [
        ("10.96.0.20:80", Some("10.96.0.20:80")),
        ("catalog:80", Some("10.96.0.20:80")),
        ("catalog.shop:80", Some("10.96.0.20:80")),
        ("catalog.shop.svc.cluster.local.:80", Some("10.96.0.20:80")),
        ("catalog.other.svc:80", Some("10.96.0.9:80")),
        ("catalog:81", None),
        ("catalog", Some("10.96.0.20:80")),
        ("catalog:http", None),
        ("catalog.shopping:80", None),
    ] {
        assert_eq!(address(given), expected, "{given}");
    }
}

#[test]
fn matches_of_the_gateway_api_are_understood() {
    let mut config = config();
    let destination = &mut config.destinations[0];
    let conditions = json!({
        "method": null, "path": {"regex": "^(?:/v[0-9]+/.*)$"}, "headers": [],
        "header_patterns": [{"name": "user", "regex": "^(?:a.*)$"}],
        "query": [{"name": "q", "exact": "1"}, {"name": "r", "regex": "^(?:[xy])$"}],
        "order": 0, "grpc": false,
    });
    let mut first = destination.routes[1].clone();
    first.name = "HTTPRoute/shop/patterns/0".to_owned();
    first.matches = vec![serde_json::from_value(conditions).unwrap()];
    destination.routes.push(first);
    destination.routes[0].matches[0].order = Some(1);
    let taken = |request: &str| {
        let request: Request = request.parse().unwrap();
        let (route, _) = config.destinations[0].route(&request).unwrap();
        route.name.clone()
    };
    assert_eq!(
        taken("GET /v2/a?r=x&q=1 user: anna"),
        "HTTPRoute/shop/patterns/0"
    );
    for other in [
        "GET /va/a?r=x&q=1 user: anna",
        "GET /v2/a?r=z&q=1 user: anna",
        "GET /v2/a?r=x user: anna",
        "GET /v2/a?r=x&q=1 user: bea",
        "GET /v2/a?r=x&q=1 user: anna content-type: application/grpc",
        "GET /v2/a?r=x&q=1 user: anna content-type: application/grpc+proto",
    ] {
        assert_eq!(taken(other), "Service/shop/catalog", "{other}");
    }
    // As the proxy reads them: parameters are decoded, gRPC-Web is no gRPC.
    for same in [
        "GET /v2/a?%72=%78&q=%31 user: anna",
        "GET /v2/a?r=x&q=1 user: anna content-type: application/grpc-web",
    ] {
        assert_eq!(taken(same), "HTTPRoute/shop/patterns/0", "{same}");
    }
    let everything = json!([{"method": null, "path": {"prefix": "/"}, "headers": []}]);
    let everything: Vec<Match> = serde_json::from_value(everything).unwrap();
    assert!(everything[0].holds(&"OPTIONS *".parse().unwrap()));
    config.destinations[0].routes[1].refused = Some("no such Service".to_owned());
    let verdict = judge(&config, "catalog:80", Some(&"GET /else".parse().unwrap()));
    assert!(!verdict.served && verdict.why.contains("500 (no such Service)"));
}

#[test]
fn the_first_route_that_matches_is_taken_and_explained() {
    let config = config();
    let judge = |given: &str, request: &str| {
        let request = (!request.is_empty()).then(|| request.parse().unwrap());
        judge(&config, given, request.as_ref())
    };
    let plain = judge("catalog:80", "GET /items/3");
    assert!(plain.served);
    assert_eq!(plain.route.unwrap().name, "Service/shop/catalog");
    assert!(plain.why.contains("1 of its 2 endpoints"), "{}", plain.why);
    let text = explain(&plain, Paint::NEVER);
    for part in [
        "10.96.0.20:80 is shop/catalog:80, protocol http\n",
        "timeouts  request 3.0 s, idle streams 20.0 s\n",
        "retries   2 more on connect failure, 503; idempotent methods; budget 20 % and 10/s\n",
        "faults    10 % wait 2.0 s; 2 % fail, with 503, gRPC calls with code 14 (of requests with x-chaos: on)\n",
        "policies  timeouts.request  TrafficPolicy shop/port (Service catalog, port http); overrides TrafficPolicy shop/all (namespace shop)\n\
         \u{20}         faultInjection    TrafficPolicy shop/all (namespace shop)\n",
        "backend   shop/catalog:80 (100 %)\n",
        "balancer  PeakEWMA, connect timeout 1.0 s, own zone while it takes 70 % of its part, slow start 30.0 s\n",
        "session   by the cookie stay, idle 10 min 0 s\n",
        "checks    GET /live every 5.0 s within 500 ms; unwell after 3, well after 2\n",
        "budget    5 % of the requests of the last 10.0 s and 100 retries\n",
        "connects  1000 requests each; keep-alive after 1 min 0 s, 4 times every 15.0 s; HTTP/2 windows 262144 (stream) and 16777216 bytes\n",
        "limits    100 requests at once\n",
        "ejection  after 3 gateway errors in a row or 5 5xx in a row, for 3.0 s at first, at most 50 % at once\n",
        "10.77.0.6:8080  shop/catalog-1  ejected  1       spiffe://cluster.local/ns/shop/sa/catalog\n",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    assert!(
        text.contains("\nnot       HTTPRoute/shop/canary: wants canary: yes please\n"),
        "{text}"
    );
    let canary = judge("catalog:80", "GET /items?x canary: yes please");
    assert_eq!(canary.others[0].route, "Service/shop/catalog");
    assert_eq!(canary.others[0].why, "takes everything, and comes later");
    let nowhere = judge("catalog.other:80", "POST /else");
    assert_eq!(nowhere.others[0].why, "wants method GET and path /only");
    let text = explain(&nowhere, Paint::NEVER);
    assert!(
        text.ends_with("not       x: wants method GET and path /only\n"),
        "{text}"
    );
    assert_eq!(canary.route.unwrap().name, "HTTPRoute/shop/canary");
    assert!(!canary.served);
    assert!(canary.why.contains("has no endpoint"), "{}", canary.why);
    assert!(judge("catalog.other:80", "GET /else").why.contains("404"));
    assert!(judge("10.1.2.3:443", "").why.contains("passes through"));
    assert!(list(&config, Paint::NEVER).contains("10.96.0.9:80   other/catalog:80  auto"));
}

#[test]
fn hosts_outside_the_mesh_are_found_by_name() {
    let mut config = config();
    assert!(judge(&config, "api.example.org:443", None).served);
    let mut host = |host: &str, port: u16| {
        let mut destination = config.destinations[0].clone();
        destination.address = host.to_owned();
        destination.port = port;
        let host = host.to_owned();
        config
            .outside
            .hosts
            .push(super::config::Host { host, destination });
    };
    host("*.example.org", 443);
    host("api.example.org", 443);
    host("api.example.org", 80);
    config.outside.registry_only = true;
    let found = |given: &str| {
        let found = config.find(given).map(|d| (d.address.as_str(), d.port));
        found.unwrap_or(("", 0))
    };
    assert_eq!(found("API.example.org:443"), ("api.example.org", 443));
    assert_eq!(found("api.example.org:80"), ("api.example.org", 80));
    assert_eq!(found("x.example.org"), ("*.example.org", 443));
    let other = judge(&config, "10.1.2.3:443", None);
    assert!(
        !other.served && other.why.contains("RegistryOnly"),
        "{}",
        other.why
    );
}

#[test]
fn what_is_refused_there_fails() {
    let config = config();
    let verdict = || judge(&config, "catalog:80", Some(&"GET /".parse().unwrap()));
    let two = |refused: [Option<&str>; 2]| {
        let proxies = refused.map(|why| {
            let rules = json!({
                "sidecar": true, "port": 8080, "protocol": "http", "mtls": "STRICT", "services": [],
                "telemetry": {"samplingPercent": 1.0, "accessLog": "None"}, "probes": [], "sources": [],
            });
            let inbound = json!({"routes": [{"backends": [{"endpoints": [{
                "address": "10.77.0.5:8080", "inbound": rules,
            }]}]}]});
            let route = verdict().route.unwrap();
            let explained = serde_json::from_value(inbound).unwrap();
            let mut alike = inbound::judge(route, &explained, Caller::default()).proxies.remove(0);
            alike.refused = why.map(str::to_owned);
            alike
        });
        Side {
            proxies: proxies.into(),
            ..Side::default()
        }
    };
    assert!(verdict().with(two([None, None])).served);
    assert!(verdict().with(Side::unknown("why".to_owned())).served);
    let some = verdict().with(two([None, Some("431")]));
    assert!(
        some.served && some.why.ends_with(", and 1 of 2 refuse it: 431"),
        "{}",
        some.why
    );
    let all = verdict().with(two([Some("431"), Some("x")]));
    assert!(
        !all.served && all.why.ends_with(", and it is refused there: 431"),
        "{}",
        all.why
    );
    let text = explain(&all, Paint::NEVER);
    assert!(
        text.contains("\ninbound   shop/catalog-1, port 8080\n          refused: 431\n"),
        "{text}"
    );
    // A redirect goes nowhere.
    let mut config = self::config();
    config.destinations[0].routes[1].redirect = Some(json!({"status": 302}));
    assert!(judge(&config, "catalog:80", None).route.is_some());
    let redirected = judge(&config, "catalog:80", Some(&"GET /".parse().unwrap()));
    assert!(redirected.arrives_by().is_none());
}

#[test]
fn only_a_caller_without_a_proxy_is_told_of_the_other_side_alone() {
    let target: Target = "deploy/plain".parse().unwrap();
    let namespace = "shop".to_owned();
    let none = NoPods::None {
        target: target.clone(),
        namespace: namespace.clone(),
    };
    assert!(!is_bare(&none.into()));
    assert!(is_bare(&NoPods::NotMeshed { target, namespace }.into()));
}
