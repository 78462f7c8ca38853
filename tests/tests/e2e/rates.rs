//! Rate limits, which the destination's proxies keep.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use http::{Request, Response};
use weft_tests::mesh::{Mesh, Workload};
use weft_tests::wire::{Server, header, ok, status};
use weft_tests::{PATIENCE, eventually};

use crate::http2::{connect, local, serve_on};

/// Two clients (0, 1) of different identities, and `servers` servers.
fn start(port: u16, servers: usize, policy: &str) -> (Mesh, SocketAddr) {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("alice"));
    mesh.workload(Workload::new("bob"));
    for i in 1..=servers {
        mesh.workload(Workload::new(&format!("server-{i}")).port(port, None));
    }
    let vip = mesh.service("server", port, Some("http"));
    mesh.traffic_policy("server", policy);
    mesh.start();
    (mesh, vip)
}

/// The statuses of `requests` requests on one connection, each of them counted, and the last head.
fn ask(
    mesh: &Mesh,
    client: usize,
    to: SocketAddr,
    requests: usize,
    more: &str,
) -> (BTreeMap<u16, usize>, String) {
    let mut wire = mesh.sidecar(client).connect(to);
    let (mut counts, mut last) = (BTreeMap::new(), String::new());
    for _ in 0..requests {
        wire.send(format!("GET / HTTP/1.1\r\nHost: x\r\n{more}\r\n"));
        let (head, _) = wire.read_answer();
        *counts.entry(status(&head)).or_default() += 1;
        last = head;
    }
    (counts, last)
}

pub fn each_identity_has_its_own_and_429_says_when_to_come_back() {
    let (mesh, vip) = start(
        8080,
        1,
        "  rateLimit: {requests: 2, per: 1m, burst: 5, key: {clientIdentity: true}}",
    );
    let _server = Server::answering(mesh.host(2), 8080, ok("well"));
    for client in [0, 1] {
        let (counts, last) = ask(&mesh, client, vip, 8, "");
        assert_eq!(
            counts,
            BTreeMap::from([(200, 5), (429, 3)]),
            "client {client}"
        );
        let after: u64 = header(&last, "retry-after").unwrap().parse().unwrap();
        assert!((1..=30).contains(&after), "{last}");
        let said = header(&last, "proxy-status").unwrap();
        assert!(
            said.contains("http_request_denied") && said.contains("each client identity"),
            "{said}"
        );
    }
    // Another connection, and the workload's own address, lead to the same limit.
    let own = mesh.sidecar(2).address(8080);
    assert_eq!(ask(&mesh, 0, own, 2, "").0, BTreeMap::from([(429, 2)]));
    let counted = mesh.sidecar(2).metric(
        "weft_rate_limited_total",
        &["destination_service=\"server\""],
    );
    assert_eq!(counted, 8.0);
    assert_eq!(mesh.sidecar(0).metric("weft_rate_limited_total", &[]), 0.0);
}

pub fn headers_and_addresses_are_keys_and_a_change_takes_effect_on_open_connections() {
    let (mesh, vip) = start(
        8080,
        1,
        "  rateLimit: {requests: 1, per: 1m, burst: 3, key: {header: X-User}}",
    );
    let _server = Server::answering(mesh.host(2), 8080, ok("well"));
    for (user, expected) in [
        ("X-User: ann\r\n", 3),
        ("x-user: bea\r\n", 3),
        ("", 3),
        ("x-other: y\r\n", 0),
    ] {
        let (counts, _) = ask(&mesh, 0, vip, 4, user);
        let well = counts.get(&200).copied().unwrap_or(0);
        assert_eq!(well, expected, "{user:?}");
    }
    let mut open = mesh.sidecar(0).connect(vip);
    let mut get = || {
        open.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
        status(&open.read_answer().0)
    };
    assert_eq!(get(), 429);
    mesh.traffic_policy(
        "server",
        "  rateLimit: {requests: 1, per: 1m, burst: 4, key: {sourceAddress: true}}",
    );
    eventually("the other limit holds", PATIENCE, || get() == 200);
    assert_eq!([get(), get(), get(), get()], [200, 200, 200, 429]);
    assert_eq!(ask(&mesh, 1, vip, 1, "").0, BTreeMap::from([(200, 1)]));
    mesh.traffic_policy("server", "  timeouts: {request: 10s}");
    eventually("there is no limit", PATIENCE, || get() == 200);
    for _ in 0..20 {
        assert_eq!(get(), 200);
    }
}

pub fn a_global_limit_is_divided_by_the_ready_replicas() {
    let (mesh, vip) = start(8080, 2, "  rateLimit: {requests: 6, per: 1h, global: true}");
    let _one = Server::answering(mesh.host(2), 8080, ok("1"));
    let _two = Server::answering(mesh.host(3), 8080, ok("2"));
    let at = |server: usize, requests| {
        let to = mesh.sidecar(server).address(8080);
        let (counts, last) = ask(&mesh, 0, to, requests, "");
        (counts.get(&200).copied().unwrap_or(0), last)
    };
    let (well, last) = at(2, 5);
    assert_eq!(well, 3);
    assert!(last.contains("shared by 2 replicas"), "{last}");
    // The Service as a whole: the other replica's three, and no more.
    let (counts, _) = ask(&mesh, 1, vip, 12, "");
    assert_eq!(counts.get(&200), Some(&3), "{counts:?}");
    // One of them leaves: what there is is the other's.
    mesh.remove_manifest("workload-server-2");
    eventually("the other has all of it", PATIENCE, || {
        !at(2, 1).1.contains("shared by")
    });
}

pub fn grpc_calls_are_told_in_trailers() {
    let (mesh, vip) = start(9090, 1, "  rateLimit: {requests: 2, per: 10s}");
    local(async {
        let host = mesh.host(2);
        serve_on(host, |(_, mut respond)| async move {
            respond.send_response(Response::new(()), true).unwrap();
        });
        let client = connect(&mesh, vip).await;
        for n in 0..4 {
            let request = Request::builder()
                .method("POST")
                .uri("http://server.shop/a.B/C")
                .header("content-type", "application/grpc")
                .body(())
                .unwrap();
            let (response, _) = client.clone().send_request(request, true).unwrap();
            let response = response.await.unwrap();
            assert_eq!(response.status(), 200);
            let code = response.headers().get("grpc-status");
            if n < 2 {
                assert!(code.is_none(), "{response:?}");
                continue;
            }
            assert_eq!(code.unwrap(), "8");
            let pushback = response.headers()["grpc-retry-pushback-ms"].to_str();
            let pushback: u64 = pushback.unwrap().parse().unwrap();
            assert!((1..=5_000).contains(&pushback), "{pushback}");
            assert!(response.into_body().is_end_stream(), "trailers only");
        }
    });
}

pub fn who_asks_for_a_pause_gets_it_and_is_not_ejected() {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    for i in 1..=2 {
        mesh.workload(Workload::new(&format!("server-{i}")).port(8080, None));
    }
    let vip = mesh.service("server", 8080, Some("http"));
    mesh.traffic_policy(
        "server",
        "  loadBalancer: {algorithm: RoundRobin, panicThreshold: 0}
  circuitBreaker: {outlierDetection: {consecutiveGatewayErrors: 1, baseEjectionTime: 60s}}",
    );
    mesh.start();
    let busy = b"HTTP/1.1 503 Busy\r\nRetry-After: 3\r\nContent-Length: 0\r\n\r\n";
    let _busy = Server::answering(mesh.host(1), 8080, busy.to_vec());
    let well = Server::answering(mesh.host(2), 8080, ok("well"));
    let counts = |n| ask(&mesh, 0, vip, n, "").0;
    // Once, and then it is left alone.
    let begun = Instant::now();
    let first = counts(20);
    assert!(begun.elapsed() < Duration::from_secs(2), "too slow to tell");
    assert_eq!(first, BTreeMap::from([(200, 19), (503, 1)]));
    let state = |state: &str| {
        let label = format!("state=\"{state}\"");
        mesh.sidecar(0).metric("weft_endpoints", &[&label])
    };
    assert_eq!((state("ready"), state("ejected")), (2.0, 0.0));
    // It is asked again when its time is over.
    eventually("it is asked again", PATIENCE, || {
        counts(4).contains_key(&503)
    });
    // Alone it is asked all the same: the answer is its own.
    drop(well);
    mesh.remove_manifest("workload-server-2");
    eventually("it is the only one", PATIENCE, || {
        let (counts, head) = ask(&mesh, 0, vip, 3, "");
        counts == BTreeMap::from([(503, 3)]) && header(&head, "retry-after") == Some("3")
    });
}

pub fn grpc_calls_are_steered_away_by_trailers() {
    // google.rpc.Status: code 8, and RetryInfo with a retry_delay of 60 s.
    const RETRY_INFO: &str =
        "CAgaMAoodHlwZS5nb29nbGVhcGlzLmNvbS9nb29nbGUucnBjLlJldHJ5SW5mbxIECgIIPA";
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    for i in 1..=3 {
        mesh.workload(Workload::new(&format!("server-{i}")).port(9090, None));
    }
    let vip = mesh.service("server", 9090, Some("grpc"));
    mesh.traffic_policy("server", "  loadBalancer: {algorithm: RoundRobin}");
    mesh.start();
    local(async {
        // As servers say it that had begun to answer.
        for (host, name, value) in [
            (1, "grpc-retry-pushback-ms", "60000"),
            (2, "grpc-status-details-bin", RETRY_INFO),
        ] {
            serve_on(mesh.host(host), move |(_, mut respond)| async move {
                let mut body = respond.send_response(Response::new(()), false).unwrap();
                let mut trailers = http::HeaderMap::new();
                trailers.insert("grpc-status", "8".parse().unwrap());
                trailers.insert(name, value.parse().unwrap());
                body.send_trailers(trailers).unwrap();
            });
        }
        serve_on(mesh.host(3), |(_, mut respond)| async move {
            let response = Response::builder().header("grpc-status", "0");
            let response = response.body(()).unwrap();
            respond.send_response(response, true).unwrap();
        });
        let client = connect(&mesh, vip).await;
        let mut exhausted = Vec::new();
        for _ in 0..20 {
            let request = Request::builder()
                .method("POST")
                .uri("http://server.shop/a.B/C")
                .header("content-type", "application/grpc")
                .body(())
                .unwrap();
            let (response, _) = client.clone().send_request(request, true).unwrap();
            let mut body = response.await.unwrap().into_body();
            let trailers = body.trailers().await.unwrap().unwrap_or_default();
            for said in ["grpc-retry-pushback-ms", "grpc-status-details-bin"] {
                exhausted.extend(trailers.contains_key(said).then_some(said));
            }
        }
        exhausted.sort_unstable();
        // Each has been asked once.
        assert_eq!(
            exhausted,
            ["grpc-retry-pushback-ms", "grpc-status-details-bin"]
        );
    });
}

pub fn large_heads_are_refused_where_they_arrive() {
    let (mesh, vip) = start(8080, 1, "  requestHeaders: {maxBytes: 1000, maxCount: 5}");
    let _server = Server::answering(mesh.host(2), 8080, ok("well"));
    let mut wire = mesh.sidecar(0).connect(vip);
    let mut get = |fields: &str| {
        wire.send(format!("GET / HTTP/1.1\r\nHost: x\r\n{fields}\r\n"));
        wire.read_answer().0
    };
    let long = format!("x-long: {}\r\n", "a".repeat(1000));
    for (fields, said) in [
        (long.as_str(), "bytes; shop/server:80 takes 1000"),
        (
            "a: 1\r\nb: 1\r\nc: 1\r\nd: 1\r\ne: 1\r\n",
            "6 fields; shop/server:80 takes 5",
        ),
    ] {
        let head = get(fields);
        assert_eq!(status(&head), 431, "{head}");
        let why = header(&head, "proxy-status").unwrap();
        assert!(
            why.contains("http_request_error") && why.contains(said),
            "{why}"
        );
        // The connection goes on.
        assert_eq!(status(&get("a: 1\r\n")), 200);
    }
}
