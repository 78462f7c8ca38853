//! Active health checks: who is unwell gets no requests, until it is well again.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, Request, Response};
use weft_tests::mesh::{Mesh, Workload};
use weft_tests::wire::{Server, ok, serve_http};
use weft_tests::{PATIENCE, eventually};

use crate::http2::{Call, connect, local, serve_on};

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

/// A message of a gRPC stream: not compressed, its length, a field.
fn message(field: &[u8]) -> Bytes {
    let mut message = BytesMut::new();
    message.put_u8(0);
    message.put_u32(field.len() as u32);
    message.put_slice(field);
    message.freeze()
}

/// A server that tells who it is, and speaks `grpc.health.v1.Health` for "shop.v1.Cart" alone.
async fn serve_health(call: Call, name: &'static str, well: Arc<AtomicBool>) {
    let (request, mut respond) = call;
    let checked = request.uri().path() == "/grpc.health.v1.Health/Check";
    let mut asked = BytesMut::new();
    let mut body = request.into_body();
    while let Some(data) = body.data().await {
        asked.extend_from_slice(&data.unwrap());
    }
    let response = Response::builder()
        .header("content-type", "application/grpc")
        .header("x-server", name)
        .body(())
        .unwrap();
    let mut sink = respond.send_response(response, false).unwrap();
    let mut status = "0";
    if checked && asked[..] == message(b"\x0a\x0cshop.v1.Cart") {
        // ServingStatus: SERVING or NOT_SERVING.
        let serving = match well.load(Ordering::SeqCst) {
            true => 1,
            false => 2,
        };
        sink.send_data(message(&[8, serving]), false).unwrap();
    } else if checked {
        status = "5";
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", status.parse().unwrap());
    let _ = sink.send_trailers(trailers);
}

pub fn a_grpc_server_that_is_not_serving_gets_no_calls() {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    for i in 1..=2 {
        mesh.workload(Workload::new(&format!("server-{i}")).port(9090, Some("grpc")));
    }
    let vip = mesh.service("server", 9090, Some("grpc"));
    mesh.traffic_policy(
        "server",
        "  loadBalancer: {algorithm: RoundRobin}
  circuitBreaker: {outlierDetection: {consecutiveGatewayErrors: 0}}
  healthCheck:
    interval: 100ms
    unhealthyThreshold: 2
    healthyThreshold: 1
    probe: {grpc: {service: shop.v1.Cart}}",
    );
    mesh.start();
    local(async {
        let well = Arc::new(AtomicBool::new(true));
        for (host, name) in [(1, "1"), (2, "2")] {
            let of_this = match host {
                1 => Arc::new(AtomicBool::new(true)),
                _ => well.clone(),
            };
            serve_on(mesh.host(host), move |call| {
                serve_health(call, name, of_this.clone())
            });
        }
        let client = connect(&mesh, vip).await;
        let answering = async || {
            let mut names = BTreeSet::new();
            for _ in 0..20 {
                let request = Request::post("http://server.shop/shop.v1.Cart/Get")
                    .header("content-type", "application/grpc")
                    .body(());
                let mut client = client.clone().ready().await.unwrap();
                let (response, _) = client.send_request(request.unwrap(), true).unwrap();
                let response = response.await.unwrap();
                assert_eq!(response.status(), 200);
                let name = &response.headers()["x-server"];
                names.insert(name.to_str().unwrap().to_owned());
            }
            names
        };
        // Each turn ends, or `local` says that it takes too long.
        let until = async |expected: &[&str]| {
            while answering().await.iter().ne(expected) {}
        };
        until(&["1", "2"]).await;
        well.store(false, Ordering::SeqCst);
        until(&["1"]).await;
        well.store(true, Ordering::SeqCst);
        until(&["1", "2"]).await;
        // Of a service that the servers do not know, they say nothing good.
        mesh.traffic_policy(
            "server",
            "  loadBalancer: {algorithm: RoundRobin}
  healthCheck:
    interval: 100ms
    unhealthyThreshold: 1
    probe: {grpc: {service: shop.v1.Other}}",
        );
        loop {
            answering().await;
            let (_, config) = mesh.sidecar(0).get_inside("/config").unwrap();
            if config.matches("unhealthy").count() >= 2 {
                break;
            }
        }
        // When nobody is well, all are asked.
        assert_eq!(answering().await.len(), 2);
    });
}
