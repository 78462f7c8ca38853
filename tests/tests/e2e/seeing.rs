//! What the mesh says of itself: traces, metrics, the access log.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use weft_tests::mesh::{Mesh, NAMESPACE, Workload};
use weft_tests::wire::{Server, header, ok, serve_http, status};
use weft_tests::{PATIENCE, eventually};

/// A client and a server that keeps the heads of the requests it gets.
fn start(telemetry: &str) -> (Mesh, SocketAddr, Arc<Mutex<Vec<String>>>) {
    prepare(Mesh::new(), telemetry)
}

fn prepare(mut mesh: Mesh, telemetry: &str) -> (Mesh, SocketAddr, Arc<Mutex<Vec<String>>>) {
    mesh.workload(Workload::new("client"));
    mesh.workload(Workload::new("server").port(8080, None));
    let vip = mesh.service("server", 8080, Some("http"));
    mesh.manifest(
        "telemetry",
        &format!(
            "apiVersion: policy.weft.dev/v1alpha1
kind: Telemetry
metadata: {{name: all, namespace: {NAMESPACE}}}
spec: {telemetry}
"
        ),
    );
    mesh.start();
    let heads = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&heads);
    Server::start(mesh.host(1), 8080, move |wire| {
        let heads = Arc::clone(&seen);
        serve_http(wire, move |head| {
            heads.lock().unwrap().push(head.to_owned());
            if head.starts_with("GET /bad ") {
                b"HTTP/1.1 500 Bad\r\nContent-Length: 0\r\n\r\n".to_vec()
            } else {
                ok("x")
            }
        });
    });
    (mesh, vip, heads)
}

fn get(mesh: &Mesh, to: SocketAddr, path: &str, fields: &str) -> u16 {
    let mut client = mesh.sidecar(0).connect(to);
    client.send(format!("GET {path} HTTP/1.1\r\nHost: x\r\n{fields}\r\n"));
    status(&client.read_answer().0)
}

/// Trace id, span id and flags of a traceparent.
fn traceparent(head: &str) -> (String, String, String) {
    let value = header(head, "traceparent").unwrap_or_else(|| panic!("no traceparent: {head}"));
    let parts: Vec<&str> = value.split('-').collect();
    let [version, trace, span, flags] = parts[..] else {
        panic!("{value}")
    };
    assert_eq!(
        (version, trace.len(), span.len()),
        ("00", 32, 16),
        "{value}"
    );
    (trace.to_owned(), span.to_owned(), flags.to_owned())
}

pub fn traces_are_begun_and_carried_on() {
    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const SPAN: &str = "00f067aa0ba902b7";
    let mesh = Mesh::new();
    let collector = mesh.outsider("collector");
    let exported = Arc::new(Mutex::new(Vec::new()));
    let into = Arc::clone(&exported);
    let _collector = Server::start(&collector, 4318, move |mut wire| {
        let head = wire.read_head();
        assert!(head.starts_with("POST /v1/traces "), "{head}");
        let length = header(&head, "content-length").unwrap().parse().unwrap();
        into.lock().unwrap().push(wire.read_exactly(length));
        wire.send("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    });
    let (mesh, vip, heads) = prepare(
        mesh,
        &format!(
            "{{tracing: {{samplingPercent: 100, otlpEndpoint: 'http://{}:4318/v1/traces'}}}}",
            collector.v4()
        ),
    );
    // The exporter comes up beside the first requests.
    eventually("requests are traced", PATIENCE, || {
        heads.lock().unwrap().clear();
        assert_eq!(get(&mesh, vip, "/", ""), 200);
        header(&heads.lock().unwrap()[0], "traceparent").is_some()
    });
    for flags in ["01", "00"] {
        let given = format!("traceparent: 00-{TRACE}-{SPAN}-{flags}\r\ntracestate: a=b\r\n");
        assert_eq!(get(&mesh, vip, "/", &given), 200);
    }
    let heads = heads.lock().unwrap();
    let (begun, _, flags) = traceparent(&heads[0]);
    assert_eq!(flags, "01", "sampled");
    assert_ne!(begun, "0".repeat(32));
    for (head, flags) in [(&heads[1], "01"), (&heads[2], "00")] {
        let (trace, _, carried) = traceparent(head);
        assert_eq!((trace.as_str(), carried.as_str()), (TRACE, flags), "{head}");
        assert_eq!(header(head, "tracestate"), Some("a=b"));
    }
    assert_ne!(
        traceparent(&heads[1]).1,
        SPAN,
        "the proxies' spans are not in between"
    );
}

pub fn nothing_is_added_to_requests_that_are_not_traced() {
    let (mesh, vip, heads) = start("{tracing: {samplingPercent: 0}}");
    assert_eq!(get(&mesh, vip, "/", ""), 200);
    let expected = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    assert_eq!(heads.lock().unwrap().as_slice(), [expected]);
}

pub fn requests_are_counted_on_both_sides() {
    let (mesh, vip, _) = start("{}");
    for _ in 0..7 {
        assert_eq!(get(&mesh, vip, "/", ""), 200);
    }
    for _ in 0..2 {
        assert_eq!(get(&mesh, vip, "/bad", ""), 500);
    }
    for (i, direction) in [(0, "outbound"), (1, "inbound")] {
        let count = |class: &str| {
            mesh.sidecar(i).metric(
                "weft_requests_total",
                &[
                    &format!("direction=\"{direction}\""),
                    "source_workload=\"client\"",
                    "mtls=\"true\"",
                    "protocol=\"http1\"",
                    &format!("response_class=\"{class}\""),
                ],
            )
        };
        let what = format!("the {direction} proxy has counted 7 and 2");
        eventually(&what, PATIENCE, || {
            (count("2xx"), count("5xx")) == (7.0, 2.0)
        });
    }
    let named = [
        "destination_service=\"server\"",
        "destination_namespace=\"shop\"",
    ];
    assert!((mesh.sidecar(0).metric("weft_requests_total", &named) - 9.0).abs() < 0.1);
}

pub fn the_access_log_has_a_line_for_each_request() {
    let (mesh, vip, _) = start("{accessLog: {mode: All}}");
    assert_eq!(get(&mesh, vip, "/seen", ""), 200);
    for i in [0, 1] {
        eventually("the access log names the request", PATIENCE, || {
            mesh.sidecar(i)
                .log()
                .lines()
                .any(|line| line.starts_with('{') && line.contains("/seen"))
        });
    }
}

pub fn the_access_log_can_be_of_errors_only() {
    let (mesh, vip, _) = start("{accessLog: {mode: Errors}}");
    assert_eq!(get(&mesh, vip, "/fine", ""), 200);
    assert_eq!(get(&mesh, vip, "/bad", ""), 500);
    eventually("the access log names the error", PATIENCE, || {
        mesh.sidecar(0).log().contains("/bad")
    });
    assert!(!mesh.sidecar(0).log().contains("/fine"));
}

pub fn the_admin_port_answers() {
    let (mesh, vip, _) = start("{}");
    assert_eq!(get(&mesh, vip, "/", ""), 200);
    for path in ["/healthz", "/readyz", "/metrics"] {
        let (code, body) = mesh.sidecar(0).get(path).unwrap();
        assert_eq!(code, 200, "{path}: {body}");
    }
    for path in ["/config", "/tap", "/log", "/nothing"] {
        assert_eq!(mesh.sidecar(0).get(path).unwrap().0, 403, "{path}");
    }
    let (code, config) = mesh.sidecar(0).get_inside("/config").unwrap();
    assert_eq!(code, 200, "{config}");
    assert!(config.contains(&vip.to_string()), "{config}");
    assert_eq!(mesh.sidecar(0).get_inside("/nothing").unwrap().0, 404);
}
