//! What `weft` says will become of a request, and that it does.

use std::io::Read;
use std::net::SocketAddr;
use std::process::Command;

use serde_json::json;
use weft_tests::binaries::binaries;
use weft_tests::mesh::{ADMIN_PORT, Mesh, Workload};
use weft_tests::wire::{Server, Wire, header, ok, status};
use weft_tests::{PATIENCE, eventually};

/// What `weft routes` says of a request of the first workload, asking its proxy and the control plane;
/// and whether it would be served.
fn routes(mesh: &Mesh, to: SocketAddr, request: &str, output: &str) -> (String, bool) {
    let proxy = SocketAddr::new(mesh.host(0).v4().into(), ADMIN_PORT);
    let proxy = format!("--proxy=http://{proxy}");
    ask_routes(
        mesh,
        &to.to_string(),
        request,
        &[&proxy, "--output", output],
    )
}

fn ask_routes(mesh: &Mesh, to: &str, request: &str, more: &[&str]) -> (String, bool) {
    let output = Command::new(&binaries().unwrap().cli)
        .args(["routes", to, "--request", request])
        .args(["--control-plane", &mesh.control_admin().to_string()])
        .args(more)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let wrong = String::from_utf8_lossy(&output.stderr);
    assert!(wrong.is_empty(), "{said}{wrong}");
    (said, output.status.success())
}

pub fn routes_says_what_the_destinations_proxies_will_do() {
    let mut mesh = Mesh::new();
    let trust = format!("--admin-trust={}", mesh.control_admin().ip());
    mesh.workload(Workload::new("client").proxy_flag(trust));
    mesh.workload(Workload::new("server").port(8080, None));
    let vip = mesh.service("server", 8080, Some("http"));
    mesh.mtls("STRICT");
    mesh.manifest(
        "default",
        "apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: default, namespace: shop}
spec:
  rateLimit: {requests: 100}
  requestHeaders: {maxCount: 4}
",
    );
    mesh.traffic_policy(
        "server",
        "  rateLimit: {requests: 2, per: 1h, key: {header: X-User}}",
    );
    mesh.start();
    let _server = Server::answering(mesh.host(1), 8080, ok("well"));
    let ask = |fields: &str| {
        let mut wire = mesh.sidecar(0).connect(vip);
        wire.send(format!("GET / HTTP/1.1\r\nHost: x\r\n{fields}\r\n"));
        wire.read_answer().0
    };
    assert_eq!(status(&ask("")), 200);

    // The bucket of ann, in which there is room for two.
    let ann = "GET / host: x x-user: ann";
    eventually("its proxy has confirmed", PATIENCE, || {
        !routes(&mesh, vip, ann, "table").0.contains("confirmed")
    });
    let (said, served) = routes(&mesh, vip, ann, "table");
    assert!(served, "{said}");
    for line in [
        "inbound   shop/server, port 8080\n",
        "mtls      STRICT, nothing else is taken; this caller comes as spiffe://",
        "rate      shop/server:80: 2 requests of each value of x-user in 1 h 0 min, 2 at once\n",
        "          this one counts among those with x-user: ann\n",
        "heads     shop/server:80: at most 4 fields; this one as written here: 40 bytes and 2 fields\n",
        "policies  mtls.mode                PeerAuthentication shop/default (namespace shop)\n",
        "          rateLimit                TrafficPolicy shop/server (Service server); overrides TrafficPolicy shop/default (namespace shop)\n",
        "          requestHeaders           TrafficPolicy shop/default (namespace shop)\n",
    ] {
        assert!(said.contains(line), "{line} is not in\n{said}");
    }
    let answers: Vec<u16> = (0..3).map(|_| status(&ask("x-user: ann\r\n"))).collect();
    assert_eq!(answers, [200, 200, 429]);
    assert_eq!(status(&ask("x-user: bob\r\n")), 200);

    // A head that is too large, in the words of the error.
    let large = "GET / host: x a: 1 b: 1 c: 1 d: 1";
    let (said, served) = routes(&mesh, vip, large, "json");
    assert!(!served, "{said}");
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    let there = &said["inbound"]["proxies"][0];
    let why = there["refused"].as_str().unwrap();
    assert!(
        why.contains("5 fields and shop/server:80 takes 4 (requestHeaders.maxCount)"),
        "{said}"
    );
    assert_eq!(
        (&said["served"], &there["way"]),
        (&json!(false), &json!("mutualTls"))
    );
    let limit = &there["rules"]["services"][0]["rateLimit"];
    assert_eq!(limit["key"], json!({"header": "x-user"}), "{said}");
    let head = ask("a: 1\r\nb: 1\r\nc: 1\r\nd: 1\r\n");
    assert_eq!(status(&head), 431);
    let why = header(&head, "proxy-status").unwrap();
    assert!(why.contains("requestHeaders.maxCount"), "{why}");

    // What is taken away is no longer said; what it overrode holds.
    mesh.remove_manifest("mtls");
    mesh.traffic_policy("server", "  timeouts: {request: 5s}");
    let changed = [
        "mtls      PERMISSIVE, plaintext is taken too; this caller comes as spiffe://",
        "rate      shop/server:80: 100 requests in 1.0 s, 100 at once\n",
        "          this one counts among all requests\n",
        "          rateLimit                TrafficPolicy shop/default (namespace shop)\n",
    ];
    eventually("the change is said", PATIENCE, || {
        let (said, _) = routes(&mesh, vip, ann, "table");
        changed.iter().all(|line| said.contains(line))
    });
}

/// Routes are kept by callers' proxies, limits and mutual TLS by the destination's.
pub fn routes_says_what_a_client_without_a_proxy_gets() {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("server").port(8080, None));
    mesh.workload(Workload::new("other").port(8080, None));
    mesh.service("server", 8080, Some("http"));
    mesh.service("other", 8080, Some("http"));
    mesh.manifest(
        "route",
        "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: server, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: server}]
  rules:
  - backendRefs: [{name: other, port: 80}]
",
    );
    mesh.traffic_policy(
        "server",
        "  rateLimit: {requests: 1, per: 1h, key: {clientIdentity: true}}",
    );
    mesh.mtls("STRICT");
    mesh.start();
    let outsider = mesh.outsider("outside");
    let _server = Server::answering(mesh.host(0), 8080, ok("well"));
    // Nothing where it is refused without a word.
    let ask = || {
        let mut plain = Wire::try_connect(&outsider, mesh.sidecar(0).address(8080)).ok()?;
        let request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        plain.try_send(request).ok()?;
        let mut answer = String::new();
        plain.stream().read_to_string(&mut answer).ok()?;
        answer.starts_with("HTTP/1.1 ").then(|| status(&answer))
    };
    let said = || ask_routes(&mesh, "server.shop:80", "GET /", &["--without-proxy"]);

    let (text, served) = said();
    assert!(!served, "{text}");
    for part in [
        "the one ready endpoint of shop/server:80, in plaintext",
        "inbound   shop/server, port 8080\n",
        "refused: the caller comes in plaintext, and mutual TLS is required (STRICT)\n",
        "PeerAuthentication shop/default (namespace shop)\n",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    assert_eq!(ask(), None);

    mesh.mtls("PERMISSIVE");
    eventually("plaintext is said to be taken", PATIENCE, || said().1);
    let (text, _) = said();
    for part in [
        "mtls      PERMISSIVE, plaintext is taken too; the caller comes in plaintext\n",
        "this one counts among those without an identity, together\n",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    eventually("plaintext is taken", PATIENCE, || ask() == Some(200));
    assert_eq!(ask(), Some(429));
}
