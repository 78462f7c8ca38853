//! What breaks, and what the applications notice of it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use weft_tests::mesh::{Mesh, Workload};
use weft_tests::traffic::{Traffic, all_well};
use weft_tests::wire::{Server, header, ok, serve_http, status};
use weft_tests::{PATIENCE, eventually};

/// A client (0) and `servers` servers (1..), each answering with its number.
fn start(servers: usize, policy: Option<&str>) -> (Mesh, SocketAddr) {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    for i in 1..=servers {
        mesh.workload(Workload::new(&format!("server-{i}")).port(8080, None));
    }
    let vip = mesh.service("server", 8080, Some("http"));
    if let Some(policy) = policy {
        mesh.traffic_policy("server", policy);
    }
    mesh.start();
    (mesh, vip)
}

fn serve(mesh: &Mesh, servers: usize) -> Vec<Server> {
    (1..=servers)
        .map(|i| Server::answering(mesh.host(i), 8080, ok(&i.to_string())))
        .collect()
}

fn get(mesh: &Mesh, to: SocketAddr) -> u16 {
    let mut client = mesh.sidecar(0).connect(to);
    client.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    status(&client.read_answer().0)
}

pub fn traffic_goes_on_without_a_control_plane() {
    let (mut mesh, vip) = start(2, None);
    let _servers = serve(&mesh, 2);
    let traffic = Traffic::start(mesh.host(0), vip, 4, Duration::from_millis(2));
    traffic.wait_for(100);
    mesh.kill_control_plane();
    traffic.wait_for(300);
    // New connections too, and what is not known yet passes through to where it was meant to go.
    for _ in 0..10 {
        assert_eq!(get(&mesh, vip), 200);
    }
    let outsider = mesh.outsider("outside");
    let _outside = Server::answering(&outsider, 8080, ok("outside"));
    assert_eq!(get(&mesh, SocketAddr::new(outsider.v4().into(), 8080)), 200);
    mesh.start_control_plane();
    traffic.wait_for(100);
    all_well(&traffic.finish());
}

pub fn a_killed_endpoint_costs_no_request() {
    let (mut mesh, vip) = start(3, None);
    let _servers = serve(&mesh, 3);
    let traffic = Traffic::start(mesh.host(0), vip, 4, Duration::from_millis(2));
    traffic.wait_for(200);
    // Its machine is gone: nothing answers, and the control plane knows nothing of it. GETs that it
    // was answering may be tried again; the others were never sent.
    mesh.kill_proxy(2);
    traffic.wait_for(600);
    let outcomes = traffic.finish();
    let failed: u64 = outcomes
        .iter()
        .filter(|(outcome, _)| !outcome.starts_with("200 "))
        .map(|(_, n)| n)
        .sum();
    // Those in flight on it at that very moment, one for each client at the most.
    assert!(failed <= 4, "{outcomes:?}");
}

pub fn a_machine_that_is_gone_costs_time_and_no_request() {
    let (mesh, vip) = start(2, None);
    let servers = serve(&mesh, 2);
    eventually("both are asked", PATIENCE, || {
        get(&mesh, vip);
        servers.iter().all(|server| server.accepted() > 0)
    });
    // Nothing says so: no end, no reset, and the control plane knows nothing of it.
    mesh.host(2).unplug().unwrap();
    let mut asked: Vec<_> = (0..8)
        .map(|_| {
            let mut client = mesh.sidecar(0).connect(vip);
            client.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
            client
        })
        .collect();
    // Those on their way to it are asked of the other when its connection is given up.
    for client in &mut asked {
        let patience = Some(4 * PATIENCE);
        client.stream().set_read_timeout(patience).unwrap();
        let (head, body) = client.read_answer();
        assert_eq!((status(&head), &*body), (200, &b"1"[..]));
    }
    let never = mesh
        .sidecar(0)
        .metric("weft_retries_total", &["never_processed"]);
    assert!(never > 0.0, "none was on its way to it");
}

pub fn an_application_that_stops_listening_costs_no_request() {
    let (mesh, vip) = start(3, None);
    let mut servers = serve(&mesh, 3);
    let traffic = Traffic::start(mesh.host(0), vip, 4, Duration::from_millis(2));
    traffic.wait_for(100);
    // As in a rollout: the application has gone, its proxy is there, and the control plane has not
    // heard of it. What its proxy could not hand over was not processed; another endpoint takes it.
    drop(servers.remove(0));
    traffic.wait_for(300);
    for _ in 0..30 {
        let mut client = mesh.sidecar(0).connect(vip);
        client.send("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\norder");
        assert_eq!(status(&client.read_answer().0), 200);
    }
    // Those in flight at that very moment are cut off with their connections.
    let outcomes = traffic.finish();
    let refused = outcomes.keys().any(|outcome| outcome.contains("503"));
    assert!(!refused, "{outcomes:?}");
}

pub fn an_endpoint_that_fails_is_ejected_and_comes_back() {
    let (mesh, vip) = start(
        2,
        // By turns: peak EWMA may ask an endpoint that was slow once too seldom to see it ill.
        Some(
            "  loadBalancer: {algorithm: RoundRobin}
  circuitBreaker:
    outlierDetection: {consecutive5xxErrors: 3, baseEjectionTime: 2s, maxEjectionTime: 4s}",
        ),
    );
    let ill = Arc::new(AtomicBool::new(false));
    let _one = Server::answering(mesh.host(1), 8080, ok("1"));
    let state = Arc::clone(&ill);
    let _two = Server::start(mesh.host(2), 8080, move |wire| {
        let ill = Arc::clone(&state);
        serve_http(wire, move |_| {
            if ill.load(Ordering::SeqCst) {
                b"HTTP/1.1 500 Ill\r\nContent-Length: 0\r\n\r\n".to_vec()
            } else {
                ok("2")
            }
        });
    });
    let traffic = Traffic::start(mesh.host(0), vip, 2, Duration::from_millis(2));
    traffic.wait_for(100);
    ill.store(true, Ordering::SeqCst);
    eventually("the endpoint is ejected", PATIENCE, || {
        mesh.sidecar(0)
            .metric("weft_endpoints", &["state=\"ejected\""])
            >= 1.0
    });
    traffic.wait_for(100);
    ill.store(false, Ordering::SeqCst);
    let first = traffic.finish();
    let failures: u64 = first
        .iter()
        .filter(|(o, _)| o.starts_with("500"))
        .map(|(_, n)| n)
        .sum();
    assert!(
        (1..=20).contains(&failures),
        "ejected late or never: {first:?}"
    );

    // It comes back when its time is over.
    eventually("the endpoint takes requests again", PATIENCE, || {
        let traffic = Traffic::start(mesh.host(0), vip, 2, Duration::from_millis(2));
        traffic.wait_for(50);
        traffic.finish().contains_key("200 2")
    });
}

pub fn a_new_endpoint_gets_its_share_little_by_little() {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    mesh.workload(Workload::new("server-1").port(8080, None));
    mesh.workload(
        Workload::new("server-2")
            .port(8080, None)
            .extra("  health: NotReady\n"),
    );
    let vip = mesh.service("server", 8080, Some("http"));
    mesh.traffic_policy(
        "server",
        "  loadBalancer: {algorithm: RoundRobin, slowStart: {window: 10s}}",
    );
    mesh.start();
    let _servers = serve(&mesh, 2);
    let mut client = mesh.sidecar(0).connect(vip);
    let mut ask = |requests: u32| {
        let answers = (0..requests).map(|_| {
            client.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
            client.read_answer().1
        });
        answers.filter(|body| body == b"2").count()
    };
    assert_eq!(ask(20), 0);
    mesh.manifest(
        "workload-server-2",
        &format!(
            "apiVersion: policy.weft.dev/v1alpha1
kind: Workload
metadata: {{name: server-2, namespace: shop, labels: {{app: server}}}}
spec: {{addresses: [{}], serviceAccount: server, ports: [{{port: 8080}}]}}
",
            mesh.host(2).v4()
        ),
    );
    let begun = Instant::now();
    eventually("the new endpoint is asked", PATIENCE, || ask(5) > 0);
    let early = ask(200);
    // Its weight grows from a tenth to one within the window; at the end of these requests it had
    // at most this much of it.
    let weight = f64::max(begun.elapsed().as_secs_f64() / 10.0, 0.1);
    let share = weight / (1.0 + weight);
    assert!(
        early >= 8 && (early as f64) <= 200.0 * share + 10.0,
        "{early} of 200, with at most {share:.2} due"
    );
    eventually("it gets its whole share", PATIENCE, || {
        (90..=110).contains(&ask(200))
    });
}

pub fn another_endpoint_is_asked_when_one_takes_long() {
    let (mesh, vip) = start(
        2,
        Some(
            "  loadBalancer: {algorithm: RoundRobin}
  retries: {hedging: {delay: 100ms}, budget: {percent: 0, minPerSecond: 1}}",
        ),
    );
    let _slow = Server::start(mesh.host(1), 8080, |wire| {
        serve_http(wire, |_| {
            std::thread::sleep(Duration::from_secs(2));
            ok("slow")
        });
    });
    let _fast = Server::answering(mesh.host(2), 8080, ok("fast"));
    let hedges = || mesh.sidecar(0).metric("weft_hedges_total", &[]);
    let mut client = mesh.sidecar(0).connect(vip);
    let mut ask = |method: &str| {
        let begun = Instant::now();
        client.send(format!(
            "{method} / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
        ));
        (client.read_answer().1, begun.elapsed())
    };
    for _ in 0..8 {
        let (body, took) = ask("GET");
        assert_eq!(body, b"fast");
        assert!(took < Duration::from_millis(1500), "{took:?}");
    }
    let first = hedges();
    assert!((1.0..=8.0).contains(&first), "{first}");
    // What may not be repeated waits.
    let posted: Vec<Vec<u8>> = (0..2).map(|_| ask("POST").0).collect();
    assert!(posted.contains(&b"slow".to_vec()), "{posted:?}");
    assert_eq!(hedges(), first);
    // The budget is ten in ten seconds; with it spent, the slow one is waited for.
    let waited = (0..24).any(|_| ask("GET").0 == b"slow");
    assert!(waited && hedges() <= 10.0, "{waited} {}", hedges());
    let spent = mesh
        .sidecar(0)
        .metric("weft_retry_budget_exhausted_total", &[]);
    assert!(spent >= 1.0);
}

pub fn a_body_is_sent_to_another_endpoint_too() {
    let (mesh, vip) = start(
        2,
        Some(
            "  loadBalancer: {algorithm: RoundRobin}
  retries: {methods: [POST], maxBodyBytes: 20000, hedging: {delay: 200ms}, budget: {percent: 100}}",
        ),
    );
    // More than comes with the head.
    let body = "x".repeat(18_000);
    let echo = |i: usize, slow: bool| {
        Server::start(mesh.host(i), 8080, move |mut wire| {
            loop {
                wire.stream().set_read_timeout(None).unwrap();
                let Ok(1..) = wire.stream().peek(&mut [0]) else {
                    return;
                };
                let head = wire.read_head();
                let length = header(&head, "content-length").unwrap().parse().unwrap();
                let sent = wire.read_exactly(length).len();
                if slow {
                    // Until the proxy has given it up.
                    let _ = wire.stream().peek(&mut [0]);
                    return;
                }
                wire.send(ok(&sent.to_string()));
            }
        })
    };
    let _servers = [echo(1, true), echo(2, false)];
    let mut client = mesh.sidecar(0).connect(vip);
    for _ in 0..4 {
        client.send(format!(
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ));
        let (head, answer) = client.read_answer();
        assert_eq!((status(&head), &*answer), (200, &b"18000"[..]), "{head}");
    }
    // Every other request began at the one that does not answer.
    assert!(mesh.sidecar(0).metric("weft_hedges_total", &[]) >= 2.0);
}

pub fn a_polite_restart_of_the_servers_proxy_loses_no_request() {
    let (mut mesh, vip) = start(2, None);
    let _servers = serve(&mesh, 2);
    let traffic = Traffic::start(mesh.host(0), vip, 8, Duration::from_millis(1));
    traffic.wait_for(200);
    for _ in 0..3 {
        assert_eq!(mesh.stop_proxy(1), Some(0));
        traffic.wait_for(100);
        mesh.start_proxy(1);
        mesh.wait_ready(1);
        traffic.wait_for(200);
    }
    let outcomes = traffic.finish();
    all_well(&outcomes);
    assert_eq!(outcomes.len(), 2, "both servers were used: {outcomes:?}");
}

pub fn a_polite_restart_of_the_clients_proxy_loses_no_request() {
    let (mut mesh, vip) = start(1, None);
    let _servers = serve(&mesh, 1);
    // While there is no proxy, new connections cannot be taken: requests that run are what counts.
    let slow = Server::start(mesh.host(1), 9000, |wire| {
        serve_http(wire, |_| {
            std::thread::sleep(Duration::from_secs(2));
            ok("finished")
        });
    });
    let mut running = mesh.sidecar(0).connect(mesh.sidecar(1).address(9000));
    running.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    let mut idle = mesh.sidecar(0).connect(vip);
    idle.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!(idle.read_answer().1, b"1");
    eventually("the request has come", PATIENCE, || slow.accepted() == 1);
    let reader = std::thread::spawn(move || running.read_answer());
    assert_eq!(mesh.stop_proxy(0), Some(0));
    assert_eq!(reader.join().unwrap().1, b"finished");
    idle.expect_end();
    mesh.start_proxy(0);
    mesh.wait_ready(0);
    assert_eq!(get(&mesh, vip), 200);
}

pub fn a_killed_proxy_comes_back() {
    let (mut mesh, vip) = start(1, None);
    let _servers = serve(&mesh, 1);
    assert_eq!(get(&mesh, vip), 200);
    for i in [0, 1] {
        mesh.kill_proxy(i);
        mesh.start_proxy(i);
        mesh.wait_ready(i);
        eventually("requests pass again", PATIENCE, || get(&mesh, vip) == 200);
    }
}

pub fn roots_are_rotated_under_load() {
    let (mesh, vip) = start(2, None);
    let _servers = serve(&mesh, 2);
    let traffic = Traffic::start(mesh.host(0), vip, 4, Duration::from_millis(2));
    traffic.wait_for(100);
    for finish in [&["rotate-root"][..], &["rotate-root", "--finish"]] {
        mesh.control(finish);
        traffic.wait_for(500);
        // New connections between the proxies as well, not only those that stand.
        for i in [1, 2] {
            let to = mesh.sidecar(i).address(8080);
            assert_eq!(get(&mesh, to), 200, "after {finish:?}");
        }
    }
    all_well(&traffic.finish());
}
