//! What becomes of requests when endpoints are slow, ill or too many ask at once.

use std::time::Instant;

use serde_json::Value;
use weft_tests::kube::{self, Namespace, PATIENCE, eventually};

use crate::apps::{self, accepted, all_good, by, load, number, of_all, outcomes};

/// Tells a server what to answer from now on.
fn become_status(ns: &str, app: &str, status: u16) {
    let pod = kube::pod(ns, &format!("app={app}"));
    let address = kube::get(ns, &["pod", &pod])["status"]["podIP"].clone();
    let address = address.as_str().unwrap();
    let url = format!("http://{address}:8080/become?status={status}");
    all_good(&apps::one(ns, "client", &url));
}

pub fn a_breaker_opens_and_closes() {
    let namespace = Namespace::create("weft-test-breaker", true);
    let ns = namespace.0.as_str();
    apps::start(
        ns,
        &[apps::server("server", 1), apps::client("client")],
        &["server", "client"],
    );
    // Twenty clients, each with a request under way all the time.
    let crowd = [
        "http://server/?ms=500",
        "--clients",
        "20",
        "--rate",
        "40",
        "--seconds",
        "10",
    ];
    all_good(&load(ns, "client", &crowd));
    kube::apply(
        ns,
        "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: breaker}
spec:
  targetRefs: [{kind: Service, name: server}]
  circuitBreaker: {limits: {maxRequests: 5}}
",
    );
    eventually("the limit is in force", PATIENCE, || {
        let seen = load(ns, "client", &crowd[..5]);
        if seen["good"] == seen["requests"] {
            Err(seen.to_string())
        } else {
            Ok(())
        }
    });
    let open = load(ns, "client", &crowd);
    println!(
        "at most 5 requests at once, for 20 clients: {} of {} answered 200, the others 503 at once \
         (p50 {:.1} ms)",
        open["good"],
        open["requests"],
        number(&open["p50_ms"])
    );
    // Five in each half second, and no others are let through.
    let good = number(&open["good"]);
    assert!((25.0..=125.0).contains(&good), "{open:#}");
    assert_eq!(
        open["good"].as_u64().unwrap() + outcomes(&open, "503 "),
        open["requests"],
        "{open:#}"
    );
    assert!(open.to_string().contains("the circuit is open"), "{open:#}");
    // Most are refused, and that takes no time.
    assert!(number(&open["p50_ms"]) < 400.0, "{open:#}");
    // When fewer ask, it is closed.
    let few = ["http://server/?ms=500", "--clients", "4", "--rate", "8"];
    let closed = load(ns, "client", &few);
    println!(
        "for 4 clients: {} of {}",
        closed["good"], closed["requests"]
    );
    all_good(&closed);
}

pub fn an_ill_endpoint_is_ejected_and_returns() {
    let namespace = Namespace::create("weft-test-ejection", true);
    let ns = namespace.0.as_str();
    // Both Deployments are behind the Service of the first.
    let ill = apps::server("ill", 1).replace("labels: {app: ill}", "labels: {app: ill, of: group}");
    let well =
        apps::server("well", 2).replace("labels: {app: well}", "labels: {app: well, of: group}");
    let group = "
apiVersion: v1
kind: Service
metadata: {name: group}
spec:
  selector: {of: group}
  ports: [{name: http, port: 80, targetPort: http}]
---
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: group}
spec:
  targetRefs: [{kind: Service, name: group}]
  # Each has its turn, whatever it costs: one that answered slowly once would not be asked often
  # enough to fail three times.
  loadBalancer: {algorithm: RoundRobin}
  circuitBreaker:
    outlierDetection: {consecutive5xxErrors: 3, baseEjectionTime: 3s, maxEjectionTime: 5s}
";
    apps::start(
        ns,
        &[ill, well, group.to_owned(), apps::client("client")],
        &["ill", "well", "client"],
    );
    let visits = ["http://group/", "--rate", "100", "--seconds", "4"];
    let both = |seen: &Value| by(seen, "ill") > 0 && by(seen, "well") > 0;
    let asked = |state: &str| {
        eventually(state, PATIENCE, || {
            let seen = load(ns, "client", &visits);
            if both(&seen) && seen["good"] == seen["requests"] {
                Ok(seen)
            } else {
                Err(seen.to_string())
            }
        })
    };
    asked("all endpoints are asked");
    become_status(ns, "ill", 500);
    let seen = load(ns, "client", &visits);
    let failed = outcomes(&seen, "500 ");
    println!("an endpoint answers 500: {failed} of {}", seen["requests"]);
    // Three in a row, those under way, and one for each time that it is tried again.
    assert!((3..=20).contains(&failed), "{seen:#}");
    assert_eq!(
        failed + seen["good"].as_u64().unwrap(),
        seen["requests"],
        "{seen:#}"
    );
    let ejections = of_all(ns, "client", "weft_outlier_ejections_total", &[]);
    assert!(ejections >= 1.0, "{ejections} ejections are counted");
    become_status(ns, "ill", 200);
    let since = Instant::now();
    asked("the endpoint takes requests again");
    println!(
        "well again, it was asked within {:.0} s",
        since.elapsed().as_secs_f64()
    );
}

pub fn copies_go_to_the_mirror_and_cost_nothing() {
    let namespace = Namespace::create("weft-test-mirror", true);
    let ns = namespace.0.as_str();
    apps::start(
        ns,
        &[
            apps::server("server", 1),
            apps::server("shadow", 1),
            apps::client("client"),
        ],
        &["server", "shadow", "client"],
    );
    become_status(ns, "shadow", 500);
    kube::apply(
        ns,
        "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: copies}
spec:
  parentRefs: [{group: '', kind: Service, name: server}]
  rules:
    - filters:
        - type: RequestMirror
          requestMirror: {backendRef: {name: shadow, port: 80}, percent: 50}
      backendRefs: [{name: server, port: 80}]
",
    );
    accepted(ns, "httproute/copies");
    // The kubelet's probes come in plaintext.
    let labels = [
        "direction=\"inbound\"",
        "mtls=\"true\"",
        "response_class=\"5xx\"",
    ];
    let copies = || of_all(ns, "shadow", "weft_requests_total", &labels);
    let visits = ["http://server/", "--rate", "100", "--count", "400"];
    let visits = [&visits[..], &["--seconds", "60"]].concat();
    eventually("copies arrive", PATIENCE, || {
        all_good(&load(ns, "client", &visits));
        if copies() > 0.0 {
            Ok(())
        } else {
            Err("no copy".to_owned())
        }
    });
    let before = copies();
    let seen = load(ns, "client", &visits);
    all_good(&seen);
    assert_eq!(by(&seen, "shadow"), 0, "{seen:#}");
    // Five standard deviations of 200. The last of them may still be under way.
    let share = 150.0..=250.0;
    let copied = eventually("half of the requests are copied", PATIENCE, || {
        let copied = copies() - before;
        if share.contains(&copied) {
            Ok(copied)
        } else {
            Err(copied.to_string())
        }
    });
    println!(
        "{copied} of {} requests were copied to a server that answers 500; {} were answered 200",
        seen["requests"], seen["good"]
    );
}

pub fn deadlines_of_grpc_hold() {
    let namespace = Namespace::create("weft-test-deadlines", true);
    let ns = namespace.0.as_str();
    apps::start(
        ns,
        &[apps::server("server", 1), apps::client("client")],
        &["server", "client"],
    );
    let call = |url: &str, deadline: &str| {
        let deadline = format!("grpc-timeout: {deadline}");
        let words = [
            url,
            "--http2",
            "--header",
            "content-type: application/grpc",
            "--header",
            "te: trailers",
            "--header",
            deadline.as_str(),
            "--count",
            "8",
            "--rate",
            "20",
        ];
        load(ns, "client", &words)
    };
    all_good(&call("http://server/shop.Cart/Get", "5S"));
    // Its own deadline: the proxy answers when it is over, not the server.
    let seen = call("http://server/shop.Cart/Get?ms=5000", "400m");
    println!("a deadline of 400 ms, an answer after 5 s: {seen}");
    assert_eq!(outcomes(&seen, "grpc-status 4"), 8, "{seen:#}");
    assert!(
        (400.0..4000.0).contains(&number(&seen["p50_ms"])),
        "{seen:#}"
    );
    // The shorter of the client's and the operator's.
    kube::apply(
        ns,
        "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: deadline}
spec:
  targetRefs: [{kind: Service, name: server}]
  timeouts: {request: 300ms}
",
    );
    let seen = eventually("the policy's timeout is in force", PATIENCE, || {
        let seen = call("http://server/shop.Cart/Get?ms=3000", "20S");
        if outcomes(&seen, "grpc-status 4") == 8 {
            Ok(seen)
        } else {
            Err(seen.to_string())
        }
    });
    println!("a deadline of 20 s, a timeout of 300 ms: {seen}");
    assert!(
        (300.0..2500.0).contains(&number(&seen["p50_ms"])),
        "{seen:#}"
    );
}
