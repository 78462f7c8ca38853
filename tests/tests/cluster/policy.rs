//! Routes and policies, as applications see them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use weft_tests::kube::{self, Namespace, PATIENCE, eventually};

use crate::apps::{
    self, accepted, all_good, by, load, load_during, metric, metrics, number, of_all,
};

pub fn shares_and_headers_decide() {
    let namespace = Namespace::create("weft-test-split", true);
    let ns = namespace.0.as_str();
    apps::start(
        ns,
        &[
            apps::server("stable", 1),
            apps::server("canary", 1),
            apps::client("client"),
        ],
        &["stable", "canary", "client"],
    );
    kube::apply(
        ns,
        "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: split}
spec:
  parentRefs: [{group: '', kind: Service, name: stable}]
  rules:
    - matches: [{headers: [{name: x-version, value: canary}]}]
      backendRefs: [{name: canary, port: 80}]
    - backendRefs:
        - {name: stable, port: 80, weight: 80}
        - {name: canary, port: 80, weight: 20}
",
    );
    accepted(ns, "httproute/split");
    let many = [
        "http://stable/",
        "--count",
        "500",
        "--rate",
        "100",
        "--seconds",
        "60",
    ];
    let seen = eventually("the route is in place", PATIENCE, || {
        let seen = load(ns, "client", &many);
        match by(&seen, "canary") {
            0 => Err(seen.to_string()),
            _ => Ok(seen),
        }
    });
    all_good(&seen);
    let canary = by(&seen, "canary");
    println!(
        "80 to 20 over {}: {} to {canary}",
        seen["requests"],
        by(&seen, "stable")
    );
    // Four standard deviations.
    assert!((64..=136).contains(&canary), "{seen:#}");
    let mut named = many.to_vec();
    named.extend(["--header", "x-version: canary"]);
    let seen = load(ns, "client", &named);
    all_good(&seen);
    assert_eq!(by(&seen, "stable"), 0, "{seen:#}");
}

pub fn retries_make_success_whole_without_a_storm() {
    let namespace = Namespace::create("weft-test-retries", true);
    let ns = namespace.0.as_str();
    apps::start(
        ns,
        &[apps::server("server", 3), apps::client("client")],
        &["server", "client"],
    );
    let flaky = ["http://server/?fail=20", "--seconds", "10", "--rate", "100"];
    let before = load(ns, "client", &flaky);
    kube::apply(
        ns,
        "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: retries}
spec:
  targetRefs: [{kind: Service, name: server}]
  # The answers are drawn by lot: no endpoint is worse than the others.
  circuitBreaker: {outlierDetection: {consecutiveGatewayErrors: 0, consecutive5xxErrors: 0}}
  retries:
    attempts: 7
    codes: [503]
    backoff: {base: 5ms, max: 50ms}
    budget: {percent: 30, minPerSecond: 10}
",
    );
    let share = |seen: &Value| number(&seen["good"]) / number(&seen["requests"]);
    eventually("requests are tried again", PATIENCE, || {
        let seen = load(ns, "client", &flaky);
        if share(&seen) > 0.95 {
            Ok(())
        } else {
            Err(seen.to_string())
        }
    });
    // That load may have begun before the policy was in force.
    let after = load(ns, "client", &flaky);
    println!(
        "20 % of answers are 503: {:.2} % good without retries, {:.2} % with",
        100.0 * share(&before),
        100.0 * share(&after)
    );
    assert!((0.7..0.9).contains(&share(&before)), "{before:#}");
    // All eight answers of a request are 503 once in 390,000.
    assert!(share(&after) >= 0.999, "{after:#}");
    // Where everything fails, retries are bounded by the budget.
    // The kubelet's probes come to the server's proxy too, in plaintext.
    let labels = ["direction=\"inbound\"", "mtls=\"true\""];
    let asked = |ns: &str| of_all(ns, "server", "weft_requests_total", &labels);
    let tried = asked(ns);
    let broken = load(
        ns,
        "client",
        &[
            "http://server/?status=503",
            "--seconds",
            "10",
            "--rate",
            "100",
        ],
    );
    let tried = asked(ns) - tried;
    let requests = number(&broken["requests"]);
    println!("all answers are 503: {tried} tries of {requests} requests, budget 30 % and 10/s");
    assert_eq!(number(&broken["good"]), 0.0, "{broken:#}");
    assert!(
        tried > requests,
        "something was tried again: {tried} of {requests}"
    );
    // In any ten seconds 30 % of their requests and 100 more; the load takes a little longer than ten.
    let budget = 2.0 * (0.3 * requests + 100.0);
    assert!(
        tried - requests <= budget,
        "{tried} tries of {requests} requests"
    );
}

pub fn faults_are_injected_and_taken_back() {
    let namespace = Namespace::create("weft-test-faults", true);
    let ns = namespace.0.as_str();
    apps::start(
        ns,
        &[apps::server("server", 1), apps::client("client")],
        &["server", "client"],
    );
    kube::apply(
        ns,
        "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: chaos}
spec:
  targetRefs: [{kind: Service, name: server}]
  faultInjection:
    headers: [{name: x-chaos, value: 'on'}]
    delay: {percent: 100, duration: 300ms}
    abort: {percent: 50, status: 418}
",
    );
    let url = [
        "http://server/",
        "--seconds",
        "8",
        "--rate",
        "50",
        "--clients",
        "40",
    ];
    let mut chaos = url.to_vec();
    chaos.extend(["--header", "x-chaos: on"]);
    let seen = eventually("faults are injected", PATIENCE, || {
        let seen = load(ns, "client", &chaos);
        if seen["good"] == seen["requests"] {
            Err(seen.to_string())
        } else {
            Ok(seen)
        }
    });
    let share = number(&seen["good"]) / number(&seen["requests"]);
    println!(
        "faults: {:.0} % aborted, p50 {:.0} ms",
        100.0 - 100.0 * share,
        number(&seen["p50_ms"])
    );
    assert!((0.4..0.6).contains(&share), "{seen:#}");
    assert!(number(&seen["p50_ms"]) >= 300.0, "{seen:#}");
    let said = seen["outcomes"].as_object().unwrap();
    assert!(
        said.keys()
            .all(|said| said == "200" || said.starts_with("418 ")),
        "{seen:#}"
    );
    all_good(&load(ns, "client", &url));
    kube::kubectl(&["delete", "trafficpolicy", "-n", ns, "chaos"]);
    eventually("faults are taken back", PATIENCE, || {
        let seen = load(ns, "client", &chaos);
        if seen["good"] == seen["requests"] {
            Ok(())
        } else {
            Err(seen.to_string())
        }
    });
}

pub fn a_limit_is_kept_for_each_identity() {
    let namespace = Namespace::create("weft-test-limits", true);
    let ns = namespace.0.as_str();
    apps::start(
        ns,
        &[
            apps::server("server", 1),
            apps::client("greedy"),
            apps::client("modest"),
        ],
        &["server", "greedy", "modest"],
    );
    kube::apply(
        ns,
        "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: limit}
spec:
  targetRefs: [{kind: Service, name: server}]
  rateLimit: {requests: 10, per: 1s, burst: 10, key: {clientIdentity: true}}
",
    );
    let greed = ["http://server/", "--seconds", "10", "--rate", "50"];
    eventually("the limit is in place", PATIENCE, || {
        let seen = load(
            ns,
            "greedy",
            &["http://server/", "--seconds", "2", "--rate", "50"],
        );
        if seen["good"] == seen["requests"] {
            Err(seen.to_string())
        } else {
            Ok(())
        }
    });
    let (greedy, modest) = load_during(ns, "greedy", &greed, || {
        load(
            ns,
            "modest",
            &["http://server/", "--seconds", "6", "--rate", "5"],
        )
    });
    println!(
        "10 a second for each identity: {} of {} at 50 a second, {} of {} at 5",
        greedy["good"], greedy["requests"], modest["good"], modest["requests"]
    );
    all_good(&modest);
    let good = number(&greedy["good"]);
    assert!((80.0..=125.0).contains(&good), "{greedy:#}");
    let said = greedy["outcomes"].as_object().unwrap();
    assert!(
        said.keys()
            .all(|said| said == "200" || said.starts_with("429 ")),
        "{greedy:#}"
    );
    let limited = of_all(ns, "server", "weft_rate_limited_total", &[]);
    assert!(
        limited >= number(&greedy["requests"]) - good,
        "{limited} are counted"
    );
}

pub fn sessions_outlive_a_rollout() {
    let namespace = Namespace::create("weft-test-sessions", true);
    let ns = namespace.0.as_str();
    apps::start(
        ns,
        &[apps::server("server", 3), apps::client("client")],
        &["server", "client"],
    );
    kube::apply(
        ns,
        "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: sessions}
spec:
  parentRefs: [{group: '', kind: Service, name: server}]
  rules:
    - sessionPersistence: {type: Header, sessionName: x-session}
      backendRefs: [{name: server, port: 80}]
",
    );
    let alone = [
        "http://server/",
        "--session",
        "x-session",
        "--clients",
        "1",
        "--no-keepalive",
        "--rate",
        "50",
        "--seconds",
    ];
    let with = |seconds: &'static str| {
        let mut words = alone.to_vec();
        words.push(seconds);
        words
    };
    let servers = |seen: &Value| seen["servers"].as_object().unwrap().len();
    eventually(
        "one client stays with one server of three",
        PATIENCE,
        || {
            let seen = load(ns, "client", &with("2"));
            if servers(&seen) == 1 && seen["good"] == seen["requests"] {
                Ok(())
            } else {
                Err(seen.to_string())
            }
        },
    );
    let (seen, ()) = load_during(ns, "client", &with("40"), || {
        kube::kubectl(&["rollout", "restart", "-n", ns, "deployment/server"]);
        kube::rolled_out(ns, "deployment/server");
    });
    println!("a session through a rollout: {seen}");
    all_good(&seen);
    // Its server of before, and then one that is new, or was replaced itself in the meantime.
    assert!((2..=4).contains(&servers(&seen)), "{seen:#}");
}

/// `kubectl proxy`, by which changes cost no process each.
struct Proxy {
    child: Child,
    port: u16,
}

impl Proxy {
    fn start() -> Self {
        let mut child = kube::command("kubectl")
            .args(["proxy", "--port=0"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut said = BufReader::new(child.stdout.take().unwrap());
        said.read_line(&mut line).unwrap();
        let port = line
            .trim()
            .rsplit(':')
            .next()
            .and_then(|port| port.parse().ok());
        let port = port.unwrap_or_else(|| panic!("kubectl proxy says no port: {line}"));
        Self { child, port }
    }

    /// A JSON merge patch, which must be taken.
    fn patch(&self, path: &str, body: &str) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        write!(
            stream,
            "PATCH {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
             Content-Type: application/merge-patch+json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn changes_under_load_cost_nothing() {
    const SECONDS: u64 = 30;
    let namespace = Namespace::create("weft-test-changes", true);
    let ns = namespace.0.as_str();
    apps::start(
        ns,
        &[apps::server("server", 2), apps::client("client")],
        &["server", "client"],
    );
    kube::apply(
        ns,
        "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: changing}
spec:
  targetRefs: [{kind: Service, name: server}]
  timeouts: {request: 10s}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: changing}
spec:
  parentRefs: [{group: '', kind: Service, name: server}]
  rules: [{backendRefs: [{name: server, port: 80}]}]
",
    );
    accepted(ns, "httproute/changing");
    let proxy = Proxy::start();
    let policy = format!("/apis/policy.weft.dev/v1alpha1/namespaces/{ns}/trafficpolicies/changing");
    let route = format!("/apis/gateway.networking.k8s.io/v1/namespaces/{ns}/httproutes/changing");
    let client = kube::pod(ns, "app=client");
    let resident = || metric(&metrics(ns, &client), "process_resident_memory_bytes", &[]);
    let mut change = 0_u64;
    let mut for_a_while = |seconds: u64| {
        let (began, first) = (Instant::now(), change);
        while began.elapsed() < Duration::from_secs(seconds) {
            change += 1;
            let wait = 5_000 + change;
            proxy.patch(
                &policy,
                &format!(
                    r#"{{"spec": {{"timeouts": {{"request": "{wait}ms"}}, "retries": {{"attempts": {}}}}}}}"#,
                    change % 4
                ),
            );
            if change.is_multiple_of(2) {
                proxy.patch(
                    &route,
                    &format!(
                        r#"{{"spec": {{"rules": [{{"matches": [{{"path": {{"value": "/{}"}}}}, {{"path": {{"value": "/"}}}}], "backendRefs": [{{"name": "server", "port": 80}}]}}]}}}}"#,
                        change % 10
                    ),
                );
            }
            let due = began + Duration::from_millis(100 * (change - first));
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        change - first
    };
    let load = ["http://server/", "--rate", "100", "--seconds", "40"];
    let (seen, (changes, grown)) = load_during(ns, "client", &load, || {
        // What the first changes and requests need is not growth.
        let first = for_a_while(5);
        let before = resident();
        (first + for_a_while(SECONDS), resident() - before)
    });
    println!(
        "{changes} changes of a policy in {} s: {seen}; resident memory {:+.0} KiB",
        SECONDS + 5,
        grown / 1024.0
    );
    all_good(&seen);
    assert!(changes > 5 * (SECONDS + 5), "{changes} changes are too few");
    assert!(
        grown < 2.0 * 1024.0 * 1024.0,
        "resident memory has grown by {grown} bytes"
    );
}
