//! Active health checks: who is unwell gets no requests, until it is well again.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use weft_tests::mesh::{Mesh, Workload};
use weft_tests::wire::{Server, ok, serve_http};
use weft_tests::{PATIENCE, eventually};

/// A client and two servers that are asked for "/live" ten times a second.
fn start(spec: &str) -> (Mesh, SocketAddr) {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    for i in 1..=2 {
        mesh.workload(Workload::new(&format!("server-{i}")).port(8080, Some("http")));
    }
    let vip = mesh.service("server", 8080, Some("http"));
    mesh.traffic_policy(
        "server",
        &format!(
            "  loadBalancer: {{algorithm: RoundRobin}}
  circuitBreaker: {{outlierDetection: {{consecutiveGatewayErrors: 0}}}}
  healthCheck: {{interval: 100ms, unhealthyThreshold: 2, healthyThreshold: 1, {spec}}}"
        ),
    );
    mesh.start();
    (mesh, vip)
}

/// Who answers twenty requests.
fn answering(mesh: &Mesh, vip: SocketAddr) -> BTreeSet<String> {
    let mut wire = mesh.sidecar(0).connect(vip);
    (0..20)
        .map(|_| {
            wire.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
            String::from_utf8(wire.read_answer().1).unwrap()
        })
        .collect()
}

pub fn an_endpoint_that_says_it_is_unwell_gets_no_requests() {
    let (mesh, vip) = start("probe: {http: {path: /live}}");
    let well = Arc::new(AtomicBool::new(true));
    let asked = Arc::new(AtomicUsize::new(0));
    let servers: Vec<Server> = (1..=2)
        .map(|i| {
            let (well, asked) = (well.clone(), asked.clone());
            Server::start(mesh.host(i), 8080, move |wire| {
                let (well, asked) = (well.clone(), asked.clone());
                serve_http(wire, move |head| {
                    if !head.starts_with("GET /live ") {
                        return ok(&i.to_string());
                    }
                    asked.fetch_add(1, Ordering::SeqCst);
                    match i == 1 || well.load(Ordering::SeqCst) {
                        true => ok("live"),
                        false => b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n".to_vec(),
                    }
                });
            })
        })
        .collect();
    // Nobody is asked before the application calls the Service.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    assert_eq!(answering(&mesh, vip).len(), 2);
    eventually("both are asked", PATIENCE, || {
        asked.load(Ordering::SeqCst) > 10
    });
    assert_eq!(answering(&mesh, vip).len(), 2);
    well.store(false, Ordering::SeqCst);
    eventually("the unwell one gets nothing", PATIENCE, || {
        answering(&mesh, vip) == BTreeSet::from(["1".to_owned()])
    });
    let (_, endpoints) = mesh.sidecar(0).get_inside("/config").unwrap();
    assert!(endpoints.contains("unhealthy"), "{endpoints}");
    well.store(true, Ordering::SeqCst);
    eventually("it is back", PATIENCE, || answering(&mesh, vip).len() == 2);
    // Checks end with the policy, and with them what they said.
    well.store(false, Ordering::SeqCst);
    eventually("the unwell one gets nothing", PATIENCE, || {
        answering(&mesh, vip).len() == 1
    });
    mesh.traffic_policy("server", "  loadBalancer: {algorithm: RoundRobin}");
    eventually("nobody asks any more", PATIENCE, || {
        answering(&mesh, vip).len() == 2
    });
    drop(servers);
}

pub fn an_application_that_takes_no_connection_is_unwell() {
    let (mesh, vip) = start("probe: {tcp: {}}");
    let _one = Server::answering(mesh.host(1), 8080, ok("1"));
    eventually("the checks notice", PATIENCE, || {
        answering(&mesh, vip);
        let (_, config) = mesh.sidecar(0).get_inside("/config").unwrap();
        config.contains("unhealthy")
    });
    let _two = Server::answering(mesh.host(2), 8080, ok("2"));
    eventually("it is back", PATIENCE, || answering(&mesh, vip).len() == 2);
}

/// Zone preference: requests stay near, and go farther when the zone is unwell.
pub fn requests_stay_in_the_clients_zone_while_it_is_well() {
    let mut mesh = Mesh::new();
    let zone = |zone: &str| format!("  zone: {zone}\n");
    mesh.workload(Workload::new("client").extra(&zone("a")));
    for (i, of) in (1..).zip(["a", "b"]) {
        let server = Workload::new(&format!("server-{i}")).extra(&zone(of));
        mesh.workload(server.port(8080, Some("http")));
    }
    let vip = mesh.service("server", 8080, Some("http"));
    mesh.traffic_policy(
        "server",
        "  loadBalancer: {algorithm: RoundRobin, zonePreference: {}}
  healthCheck: {interval: 100ms, healthyThreshold: 1, probe: {http: {path: /live}}}",
    );
    mesh.start();
    let well = Arc::new(AtomicBool::new(true));
    let _servers: Vec<Server> = (1..=2)
        .map(|i| {
            let well = well.clone();
            Server::start(mesh.host(i), 8080, move |wire| {
                let well = well.clone();
                serve_http(wire, move |head| {
                    match head.starts_with("GET /live ") && i == 1 && !well.load(Ordering::SeqCst) {
                        true => b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n".to_vec(),
                        false => ok(&i.to_string()),
                    }
                });
            })
        })
        .collect();
    let only = |name: &str| BTreeSet::from([name.to_owned()]);
    eventually("requests stay near", PATIENCE, || {
        answering(&mesh, vip) == only("1")
    });
    well.store(false, Ordering::SeqCst);
    eventually("they go farther", PATIENCE, || {
        answering(&mesh, vip) == only("2")
    });
    well.store(true, Ordering::SeqCst);
    eventually("they come back", PATIENCE, || {
        answering(&mesh, vip) == only("1")
    });
}
