//! What policies do, and that they can be changed while everything runs.

use std::io::Read;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use weft_tests::binaries::binaries;
use weft_tests::mesh::{ADMIN_PORT, Mesh, Workload};
use weft_tests::wire::{Server, Wire, header, ok, serve_http, status};
use weft_tests::{PATIENCE, eventually};

fn prepare() -> (Mesh, SocketAddr) {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    mesh.workload(Workload::new("server").port(8080, None));
    let vip = mesh.service("server", 8080, Some("http"));
    (mesh, vip)
}

fn get(mesh: &Mesh, to: SocketAddr) -> (String, Vec<u8>) {
    ask(mesh, to, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
}

fn ask(mesh: &Mesh, to: SocketAddr, request: &str) -> (String, Vec<u8>) {
    let mut client = mesh.sidecar(0).connect(to);
    client.send(request);
    client.read_answer()
}

/// A server whose first `failures` answers are 503, and a count of its requests.
fn failing_first(mesh: &Mesh, failures: usize) -> Arc<AtomicUsize> {
    let count = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&count);
    Server::start(mesh.host(1), 8080, move |wire| {
        let count = Arc::clone(&counter);
        serve_http(wire, move |_| {
            if count.fetch_add(1, Ordering::SeqCst) < failures {
                b"HTTP/1.1 503 Not Now\r\nContent-Length: 0\r\n\r\n".to_vec()
            } else {
                ok("well")
            }
        });
    });
    count
}

/// A server (on host 1) that answers only when it is told to.
struct Held {
    _server: Server,
    state: Arc<(AtomicUsize, AtomicBool)>,
}

impl Held {
    fn start(mesh: &Mesh) -> Self {
        let state = Arc::new((AtomicUsize::new(0), AtomicBool::new(false)));
        let shared = Arc::clone(&state);
        let server = Server::start(mesh.host(1), 8080, move |wire| {
            let state = Arc::clone(&shared);
            serve_http(wire, move |_| {
                state.0.fetch_add(1, Ordering::SeqCst);
                eventually("the answer may go", PATIENCE, || {
                    state.1.load(Ordering::SeqCst)
                });
                ok("held")
            });
        });
        Self {
            _server: server,
            state,
        }
    }

    /// Waits until `requests` have come.
    fn wait_for(&self, requests: usize) {
        eventually("the requests come", PATIENCE, || {
            self.state.0.load(Ordering::SeqCst) >= requests
        });
    }

    fn release(&self) {
        self.state.1.store(true, Ordering::SeqCst);
    }
}

pub fn a_changed_policy_takes_effect_without_a_restart() {
    let (mut mesh, vip) = prepare();
    mesh.traffic_policy("server", "  timeouts: {request: 10s}");
    mesh.start();
    let _server = Server::start(mesh.host(1), 8080, |wire| {
        serve_http(wire, |_| {
            std::thread::sleep(Duration::from_millis(300));
            ok("slow")
        });
    });
    assert_eq!(status(&get(&mesh, vip).0), 200);
    mesh.traffic_policy("server", "  timeouts: {request: 100ms}");
    eventually("requests time out", PATIENCE, || {
        status(&get(&mesh, vip).0) == 504
    });
    mesh.traffic_policy("server", "  timeouts: {request: 10s}");
    eventually("requests have time", PATIENCE, || {
        status(&get(&mesh, vip).0) == 200
    });
}

pub fn a_bad_policy_changes_nothing() {
    let (mut mesh, vip) = prepare();
    mesh.traffic_policy("server", "  timeouts: {request: 100ms}");
    mesh.start();
    let _server = Server::start(mesh.host(1), 8080, |wire| {
        serve_http(wire, |_| {
            std::thread::sleep(Duration::from_millis(300));
            ok("slow")
        });
    });
    assert_eq!(status(&get(&mesh, vip).0), 504);
    mesh.traffic_policy("server", "  timeouts: {request: soon}");
    mesh.manifest("broken", "this: [is not: a manifest");
    eventually("both files are known to be bad", PATIENCE, || {
        mesh.control_get("/metrics")
            .is_some_and(|(_, text)| text.contains("weft_control_plane_bad_files 2\n"))
    });
    assert_eq!(
        status(&get(&mesh, vip).0),
        504,
        "the last good state does not stand"
    );
}

pub fn requests_over_the_limit_get_503() {
    let (mut mesh, vip) = prepare();
    mesh.traffic_policy("server", "  circuitBreaker: {limits: {maxRequests: 2}}");
    mesh.start();
    let server = Held::start(&mesh);
    let mut within: Vec<Wire> = (0..2).map(|_| mesh.sidecar(0).connect(vip)).collect();
    for wire in &mut within {
        wire.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    }
    server.wait_for(2);
    // At once: nothing was answered yet.
    let (head, body) = get(&mesh, vip);
    assert_eq!(status(&head), 503);
    let text = format!("{head}{}", String::from_utf8_lossy(&body));
    assert!(
        header(&head, "proxy-status").is_some() && text.contains("limit"),
        "{text}"
    );
    server.release();
    for wire in &mut within {
        assert_eq!(wire.read_answer().1, b"held");
    }
    assert_eq!(
        status(&get(&mesh, vip).0),
        200,
        "the permits were not given back"
    );
}

pub fn an_open_circuit_is_answered_by_the_fallback() {
    let (mut mesh, vip) = prepare();
    mesh.traffic_policy(
        "server",
        "  circuitBreaker:
    limits: {maxRequests: 1}
    fallback: {response: {status: 200, headers: [{name: x-from, value: fallback}], body: cached}}",
    );
    mesh.start();
    let server = Held::start(&mesh);
    let mut within = mesh.sidecar(0).connect(vip);
    within.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    server.wait_for(1);
    let (head, body) = get(&mesh, vip);
    assert_eq!((status(&head), body.as_slice()), (200, &b"cached"[..]));
    assert_eq!(header(&head, "x-from"), Some("fallback"));
    server.release();
    assert_eq!(within.read_answer().1, b"held");
}

pub fn failed_requests_are_tried_again_when_a_policy_says_so() {
    let (mut mesh, vip) = prepare();
    mesh.traffic_policy(
        "server",
        "  retries: {attempts: 2, codes: [503], backoff: {base: 1ms}}",
    );
    mesh.start();
    let count = failing_first(&mesh, 2);
    assert_eq!(get(&mesh, vip).1, b"well");
    assert_eq!(count.load(Ordering::SeqCst), 3);
}

/// XBackendTrafficPolicy: two retries an hour, and no share of the requests.
pub fn a_backend_gets_no_more_retries_than_its_policy_allows() {
    let (mut mesh, vip) = prepare();
    mesh.traffic_policy(
        "server",
        "  retries: {attempts: 2, codes: [500], backoff: {base: 1ms}}",
    );
    mesh.manifest(
        "backend",
        "apiVersion: gateway.networking.x-k8s.io/v1alpha1
kind: XBackendTrafficPolicy
metadata: {name: server, namespace: shop}
spec:
  targetRefs: [{group: '', kind: Service, name: server}]
  retryConstraint:
    budget: {percent: 0, interval: 1h}
    minRetryRate: {count: 2, interval: 1h}
",
    );
    mesh.start();
    let count = Arc::new(AtomicUsize::new(0));
    let counter = count.clone();
    let _server = Server::start(mesh.host(1), 8080, move |wire| {
        let count = counter.clone();
        serve_http(wire, move |_| {
            count.fetch_add(1, Ordering::SeqCst);
            b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n".to_vec()
        });
    });
    // The first uses up both retries, and is answered what the last of them was.
    let answers: Vec<u16> = (0..4).map(|_| status(&get(&mesh, vip).0)).collect();
    assert_eq!(answers, [500, 503, 503, 503]);
    let (head, body) = get(&mesh, vip);
    let text = format!("{head}{}", String::from_utf8_lossy(&body));
    assert!(text.contains("XBackendTrafficPolicy"), "{text}");
    assert_eq!(count.load(Ordering::SeqCst), 5 + 2);
}

/// TrafficPolicy for a route, and for one of its rules.
pub fn a_policy_for_a_rule_goes_before_its_routes_and_its_services() {
    let (mut mesh, vip) = prepare();
    mesh.manifest(
        "route",
        "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: server, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: server}]
  rules:
  - name: slow
    matches: [{path: {value: /slow}}]
    backendRefs: [{name: server, port: 80}]
  - backendRefs: [{name: server, port: 80}]
",
    );
    let policy = |name: &str, target: &str, timeout: &str| {
        format!(
            "apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {{name: {name}, namespace: shop}}
spec:
  targetRefs: [{{{target}}}]
  timeouts: {{request: {timeout}}}
"
        )
    };
    mesh.manifest(
        "1",
        &policy("service", "kind: Service, name: server", "50ms"),
    );
    mesh.manifest(
        "2",
        &policy("route", "kind: HTTPRoute, name: server", "100ms"),
    );
    let rule = "kind: HTTPRoute, name: server, sectionName: slow";
    mesh.manifest("3", &policy("rule", rule, "10s"));
    mesh.start();
    let _server = Server::start(mesh.host(1), 8080, |wire| {
        serve_http(wire, |_| {
            std::thread::sleep(Duration::from_millis(300));
            ok("slow")
        });
    });
    let of = |path: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
        status(&ask(&mesh, vip, &request).0)
    };
    assert_eq!((of("/slow"), of("/")), (200, 504));
    mesh.remove_manifest("3");
    eventually("the route's policy holds for the rule", PATIENCE, || {
        of("/slow") == 504
    });
}

/// What `weft routes` says of a request to `to`, asking the proxy of the first workload.
fn weft_routes(mesh: &Mesh, to: SocketAddr, request: &str, output: &str) -> String {
    // From the proxy's own host, as for others the admin port has little to say.
    let mut program = mesh.host(0).command(&binaries().unwrap().cli).unwrap();
    let output = program
        .args(["routes", &to.to_string(), "--request", request])
        .args(["--proxy", &format!("http://127.0.0.1:{ADMIN_PORT}")])
        .args(["--output", output])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let wrong = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{wrong}");
    said
}

pub fn routes_says_which_policy_each_field_comes_from() {
    let (mut mesh, vip) = prepare();
    mesh.manifest(
        "route",
        "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: server, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: server}]
  rules:
  - name: slow
    matches: [{path: {value: /slow}}]
    timeouts: {backendRequest: 2s}
    backendRefs: [{name: server, port: 80}]
  - backendRefs: [{name: server, port: 80}]
",
    );
    let policy = |name: &str, target: &str, spec: &str| {
        mesh.manifest(
            name,
            &format!(
                "apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {{name: {name}, namespace: shop}}
spec:
  targetRefs: [{target}]
{spec}
"
            ),
        );
    };
    let service = "{kind: Service, name: server, sectionName: '80'}";
    let spec = "  timeouts: {request: 20s, connect: 1s}\n  retries: {attempts: 1}";
    policy("port", service, spec);
    let rule = "{kind: HTTPRoute, name: server, sectionName: slow}";
    policy("rule", rule, "  timeouts: {request: 10s, perTry: 5s}");
    let spec = "  timeouts: {request: 30s, idle: 1m}\n  loadBalancer: {algorithm: Random}";
    policy("default", "", spec);
    mesh.start();
    let _server = Server::start(mesh.host(1), 8080, |wire| {
        serve_http(wire, |_| ok("well"));
    });
    assert_eq!(status(&get(&mesh, vip).0), 200);

    let said = weft_routes(&mesh, vip, "GET /slow", "table");
    for line in [
        "policies  timeouts.perTry   HTTPRoute shop/server (its rule slow); overrides TrafficPolicy shop/rule (HTTPRoute server, rule slow)\n",
        "          timeouts.request  TrafficPolicy shop/rule (HTTPRoute server, rule slow); overrides TrafficPolicy shop/port (Service server, port 80), TrafficPolicy shop/default (namespace shop)\n",
        "          retries.attempts  TrafficPolicy shop/port (Service server, port 80)\n",
        "          timeouts.idle     TrafficPolicy shop/default (namespace shop)\n",
        // Of the backend.
        "policies  timeouts.connect        TrafficPolicy shop/port (Service server, port 80)\n",
        "          loadBalancer.algorithm  TrafficPolicy shop/default (namespace shop)\n",
        // The control plane's admin port is not where it is looked for.
        "inbound   not known: nothing answers at http://127.0.0.1:15014/explain",
        "(--control-plane names the control plane's admin port)\n",
    ] {
        assert!(said.contains(line), "{line} is not in\n{said}");
    }
    let said = weft_routes(&mesh, vip, "GET /", "json");
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    let sources = said["route"]["sources"].as_array().unwrap();
    let of = |field: &str| sources.iter().find(|source| source["field"] == field);
    let request = of("timeouts.request").unwrap();
    assert_eq!(request["from"]["name"], "TrafficPolicy shop/port");
    assert_eq!(
        request["overridden"],
        serde_json::json!([{"name": "TrafficPolicy shop/default", "target": "namespace shop"}])
    );
    assert!(of("timeouts.perTry").is_none(), "{sources:?}");

    // It is gone: what it overrode holds.
    mesh.remove_manifest("port");
    eventually("the default holds", PATIENCE, || {
        weft_routes(&mesh, vip, "GET /", "table")
            .contains("timeouts.request  TrafficPolicy shop/default (namespace shop)\n")
    });
}

pub fn a_post_is_never_sent_twice_by_default() {
    let (mut mesh, vip) = prepare();
    mesh.start();
    let count = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&count);
    // It takes the request and dies.
    let _server = Server::start(mesh.host(1), 8080, move |mut wire| {
        wire.read_head();
        wire.expect("order");
        counter.fetch_add(1, Ordering::SeqCst);
    });
    let mut client = mesh.sidecar(0).connect(vip);
    client.send(
        "POST /orders HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 5\r\n\r\norder",
    );
    // An error that says so, or the connection cut off as the server cut it off.
    let mut answer = Vec::new();
    let _ = client.stream().read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer);
    assert!(
        answer.is_empty() || matches!(status(&answer), 502 | 503),
        "{answer}"
    );
    assert_eq!(count.load(Ordering::SeqCst), 1);
}

pub fn a_request_timeout_is_504() {
    let (mut mesh, vip) = prepare();
    mesh.traffic_policy("server", "  timeouts: {request: 200ms}");
    mesh.start();
    let _server = Server::start(mesh.host(1), 8080, |mut wire| {
        wire.read_head();
        std::thread::sleep(PATIENCE);
    });
    let start = Instant::now();
    let (head, _) = get(&mesh, vip);
    assert_eq!(status(&head), 504, "{head}");
    assert!(header(&head, "proxy-status").is_some(), "{head}");
    let took = start.elapsed();
    assert!(
        (Duration::from_millis(190)..Duration::from_millis(1500)).contains(&took),
        "{took:?}"
    );
}
