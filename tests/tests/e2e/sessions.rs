//! Sessions (Gateway API, GEP-1619): a client stays with the endpoint that its token names, until
//! that endpoint is gone.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, mpsc};

use weft_tests::mesh::{Mesh, Workload};
use weft_tests::wire::{Server, header, ok, serve_http, status};
use weft_tests::{PATIENCE, eventually};

const SERVERS: [&str; 3] = ["server-1", "server-2", "server-3"];

/// A client and a Service in front of three workloads, each of which answers with its name.
struct Shop {
    mesh: Mesh,
    vip: SocketAddr,
    _servers: Vec<Server>,
}

impl Shop {
    fn new(prepare: impl FnOnce(&mut Mesh)) -> Self {
        let mut mesh = Mesh::new();
        mesh.workload(Workload::new("client"));
        for name in SERVERS {
            mesh.workload(Workload::new(name).port(8080, Some("http")));
        }
        let vip = mesh.service("server", 8080, Some("http"));
        prepare(&mut mesh);
        mesh.start();
        let servers = (0u8..)
            .zip(SERVERS)
            .map(|(i, name)| {
                Server::start(mesh.host(usize::from(i) + 1), 8080, move |wire| {
                    serve_http(wire, move |_| ok(name));
                })
            })
            .collect();
        Self {
            mesh,
            vip,
            _servers: servers,
        }
    }

    /// Who answers, and the head of the answer.
    fn get(&self, path: &str, headers: &str) -> (String, String) {
        let mut wire = self.mesh.sidecar(0).connect(self.vip);
        wire.send(format!("GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n"));
        let (head, body) = wire.read_answer();
        assert_eq!(status(&head), 200, "{head}");
        (String::from_utf8(body).unwrap(), head)
    }

    /// Begins a session: who answers, and the Cookie field that goes on with it.
    fn begin(&self, path: &str) -> (String, String) {
        let (server, head) = self.get(path, "");
        let cookie = cookie(&head).unwrap_or_else(|| panic!("{head}"));
        (server, cookie)
    }

    /// Who answers twenty requests of a session; none of them begins another.
    fn stays(&self, path: &str, cookie: &str) -> String {
        let all: Vec<String> = (0..20)
            .map(|_| {
                let (server, head) = self.get(path, cookie);
                assert_eq!(header(&head, "set-cookie"), None);
                server
            })
            .collect();
        assert!(all.iter().all(|server| *server == all[0]), "{all:?}");
        all[0].clone()
    }
}

/// The Cookie field for the cookie that an answer sets.
fn cookie(head: &str) -> Option<String> {
    let pair = header(head, "set-cookie")?.split(';').next()?;
    Some(format!("Cookie: a=b; {pair}\r\n"))
}

fn route(rules: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: server, namespace: shop}}
spec:
  parentRefs: [{{group: '', kind: Service, name: server}}]
  rules:
{rules}"
    )
}

const RULES: &str = "  - matches: [{path: {value: /a}}]
    sessionPersistence: {sessionName: stay}
    backendRefs: [{name: server, port: 80}]
  - matches: [{path: {value: /b}}]
    sessionPersistence: {type: Header, sessionName: X-Session, absoluteTimeout: 1h}
    backendRefs: [{name: server, port: 80}]
";

pub fn a_client_stays_with_its_endpoint_through_restarts_and_a_rollout() {
    let mut shop = Shop::new(|mesh| {
        mesh.manifest("route", &route(RULES));
        // So that every endpoint gets some of the new sessions.
        mesh.traffic_policy("server", "  loadBalancer: {algorithm: RoundRobin}");
    });
    let (_, head) = shop.get("/a", "");
    let set = header(&head, "set-cookie").unwrap();
    assert!(
        set.starts_with("stay=") && set.ends_with("; HttpOnly; SameSite=Strict; Path=/a"),
        "{set}"
    );
    let (server, cookie) = shop.begin("/a");
    assert_eq!(shop.stays("/a", &cookie), server);
    // Sessions are spread: not every client has the same endpoint.
    let begun: std::collections::BTreeSet<String> = (0..40).map(|_| shop.begin("/a").0).collect();
    assert_eq!(begun.len(), SERVERS.len(), "{begun:?}");
    // What nobody gave out, and another route's, begins a new one.
    for other in [
        "Cookie: stay=10.0.0.1:8080\r\n",
        &cookie.replace("stay=", "stay=A"),
    ] {
        assert!(self::cookie(&shop.get("/a", other).1).is_some(), "{other}");
    }
    let token = cookie.split("stay=").nth(1).unwrap();
    let (_, head) = shop.get("/b", &format!("X-Session: {token}"));
    assert!(header(&head, "x-session").is_some_and(|new| new != token.trim()));

    shop.mesh.stop_proxy(0);
    shop.mesh.start_proxy(0);
    shop.mesh.wait_ready(0);
    assert_eq!(
        shop.stays("/a", &cookie),
        server,
        "after the proxy's restart"
    );
    shop.mesh.kill_control_plane();
    shop.mesh.start_control_plane();
    assert_eq!(
        shop.stays("/a", &cookie),
        server,
        "after the control plane's"
    );

    // Its endpoint leaves: the client is served by another, without an error, and stays there.
    shop.mesh.remove_manifest(&format!("workload-{server}"));
    let mut next = None;
    eventually("the session moves", PATIENCE, || {
        let (now, head) = shop.get("/a", &cookie);
        next = self::cookie(&head).map(|cookie| (now, cookie));
        next.is_some()
    });
    let (second, cookie) = next.unwrap();
    assert_ne!(second, server);
    assert_eq!(shop.stays("/a", &cookie), second);
}

/// XBackendTrafficPolicy.
pub fn a_backends_policy_keeps_sessions_without_a_route() {
    let shop = Shop::new(|mesh| {
        mesh.manifest(
            "backend",
            "apiVersion: gateway.networking.x-k8s.io/v1alpha1
kind: XBackendTrafficPolicy
metadata: {name: server, namespace: shop}
spec:
  targetRefs: [{group: '', kind: Service, name: server}]
  sessionPersistence: {sessionName: stay, idleTimeout: 1h}
",
        );
    });
    let (server, cookie) = shop.begin("/any");
    assert_eq!(shop.stays("/any", &cookie), server);
    let (_, head) = shop.get("/any", "");
    let set = header(&head, "set-cookie").unwrap();
    assert!(!set.contains("Path"), "{set}");
}

pub fn a_header_keeps_a_session_too() {
    let shop = Shop::new(|mesh| mesh.manifest("route", &route(RULES)));
    let (server, head) = shop.get("/b/c", "");
    assert_eq!(header(&head, "set-cookie"), None);
    let token = header(&head, "x-session").unwrap();
    for _ in 0..20 {
        let (now, head) = shop.get("/b/c", &format!("x-session: {token}\r\n"));
        assert_eq!((now, header(&head, "x-session")), (server.clone(), None));
    }
}

/// Hedging asks another endpoint for a session that begins, and never for one that has an endpoint.
pub fn a_slow_endpoint_keeps_its_sessions_and_gets_no_new_ones() {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    for name in &SERVERS[..2] {
        mesh.workload(Workload::new(name).port(8080, Some("http")));
    }
    let vip = mesh.service("server", 8080, Some("http"));
    mesh.manifest("route", &route(RULES));
    mesh.traffic_policy(
        "server",
        "  loadBalancer: {algorithm: RoundRobin}
  retries: {hedging: {delay: 200ms}, budget: {percent: 100}}",
    );
    mesh.start();
    // The first one answers when it has got this.
    let gate = Arc::new(Mutex::new(()));
    let (tell, asked) = mpsc::channel();
    let _servers: Vec<Server> = (1..=2)
        .map(|i| {
            let (gate, tell) = (gate.clone(), tell.clone());
            Server::start(mesh.host(i), 8080, move |wire| {
                let (gate, tell) = (gate.clone(), tell.clone());
                serve_http(wire, move |_| {
                    if i == 1 {
                        let _ = tell.send(());
                        drop(gate.lock());
                    }
                    ok(SERVERS[i - 1])
                });
            })
        })
        .collect();
    let shop = Shop {
        mesh,
        vip,
        _servers: Vec::new(),
    };
    let mut began = None;
    eventually("a session with the first", PATIENCE, || {
        let (server, cookie) = shop.begin("/a");
        began = (server == SERVERS[0]).then_some(cookie);
        began.is_some()
    });
    let began = began.unwrap();
    while asked.try_recv().is_ok() {}
    let hedges = || shop.mesh.sidecar(0).metric("weft_hedges_total", &[]);
    let before = hedges();
    std::thread::scope(|scope| {
        let held = gate.lock().unwrap();
        let session = scope.spawn(|| shop.get("/a", &began).0);
        asked.recv_timeout(PATIENCE).unwrap();
        // Whoever answers a first request has the session.
        eventually("the slow one is asked first, too", PATIENCE, || {
            let (server, cookie) = shop.begin("/a");
            assert_eq!(server, SERVERS[1]);
            assert_eq!(shop.get("/a", &cookie).0, server);
            asked.try_recv().is_ok()
        });
        assert!(hedges() > before);
        // The session's own request came before, and would have been hedged by now.
        assert!(!session.is_finished());
        drop(held);
        assert_eq!(session.join().unwrap(), SERVERS[0]);
    });
}
