//! Faults that a policy injects at the caller.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use http::{Request, Response};
use weft_tests::mesh::{Mesh, Workload};
use weft_tests::wire::{Server, header, ok, serve_http, status};

use crate::http2::{connect, local, serve};

fn start(port: u16, policy: &str) -> (Mesh, SocketAddr) {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    mesh.workload(Workload::new("server").port(port, None));
    let vip = mesh.service("server", port, Some("http"));
    mesh.traffic_policy("server", policy);
    mesh.start();
    (mesh, vip)
}

pub fn requests_are_delayed_and_aborted_as_the_policy_says() {
    let (mesh, vip) = start(
        8080,
        "  timeouts: {request: 5s}
  retries: {codes: [418]}
  faultInjection:
    headers: [{name: x-chaos, value: 'on'}]
    delay: {duration: 100ms}
    abort: {percent: 50, status: 418}",
    );
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&asked);
    let _server = Server::start(mesh.host(1), 8080, move |wire| {
        let counter = Arc::clone(&counter);
        serve_http(wire, move |_| {
            counter.fetch_add(1, Ordering::SeqCst);
            ok("well")
        });
    });
    let mut client = mesh.sidecar(0).connect(vip);
    for _ in 0..10 {
        client.send("GET / HTTP/1.1\r\nHost: x\r\nX-Chaos: off\r\n\r\n");
        assert_eq!(status(&client.read_answer().0), 200);
    }
    assert_eq!(asked.swap(0, Ordering::SeqCst), 10);
    // On one connection, which an injected fault does not end.
    let mut aborted = 0;
    for _ in 0..30 {
        let begun = Instant::now();
        client.send("GET / HTTP/1.1\r\nHost: x\r\nX-Chaos: on\r\n\r\n");
        let (head, body) = client.read_answer();
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(99), "{took:?}");
        if status(&head) == 418 {
            aborted += 1;
            let said = header(&head, "proxy-status").unwrap();
            assert!(
                said.contains("proxy_internal_response") && said.contains("injects"),
                "{said}"
            );
            let body = String::from_utf8_lossy(&body);
            assert!(body.contains("Service/shop/server"), "{body}");
        } else {
            assert_eq!((status(&head), body.as_slice()), (200, &b"well"[..]));
        }
    }
    // One in a billion that none or all of them are.
    assert!((1..30).contains(&aborted), "{aborted}");
    assert_eq!(asked.load(Ordering::SeqCst), 30 - aborted, "it was sent on");
    let counted = |fault: &str| {
        let label = format!("fault=\"{fault}\"");
        mesh.sidecar(0)
            .metric("weft_faults_injected_total", &[&label])
    };
    assert_eq!(counted("delay"), 30.0);
    assert_eq!(counted("abort"), aborted as f64);
}

pub fn http2_and_grpc_get_faults_of_their_own_kind() {
    let (mesh, vip) = start(
        9090,
        "  timeouts: {request: 300ms}
  faultInjection:
    headers: [{name: x-chaos, value: 'on'}]
    abort: {grpcStatus: RESOURCE_EXHAUSTED}",
    );
    local(async {
        serve(&mesh, |(_, mut respond)| async move {
            respond.send_response(Response::new(()), true).unwrap();
        });
        let client = connect(&mesh, vip).await;
        let ask = |kind: &'static str| {
            let mut client = client.clone();
            async move {
                let request = Request::builder()
                    .method("POST")
                    .uri("http://server.shop/a.B/C")
                    .header("x-chaos", "on")
                    .header("content-type", kind)
                    .body(())
                    .unwrap();
                let (response, _) = client.send_request(request, true).unwrap();
                response.await.unwrap()
            }
        };
        // Only gRPC calls have a gRPC status.
        let plain = ask("text/plain").await;
        assert!(plain.status() == 200 && plain.headers().get("grpc-status").is_none());
        let call = ask("application/grpc").await;
        assert_eq!(call.status(), 200);
        assert_eq!(call.headers()["grpc-status"], "8");
        let said = call.headers()["proxy-status"].to_str().unwrap();
        assert!(said.contains("proxy_internal_response"), "{said}");
        assert!(call.into_body().is_end_stream(), "trailers only");

        mesh.traffic_policy(
            "server",
            "  timeouts: {request: 300ms}\n  faultInjection: {delay: {duration: 10s}}",
        );
        let begun = Instant::now();
        loop {
            let answer = ask("text/plain").await;
            if answer.status() == 504 {
                let said = answer.headers()["proxy-status"].to_str().unwrap();
                assert!(said.contains("injects"), "{said}");
                break;
            }
            assert!(begun.elapsed() < weft_tests::PATIENCE);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
}
