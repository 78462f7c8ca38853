//! Plaintext connections to a workload that takes mutual TLS only, over loopback sockets.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{LocalSet, spawn_local};

use super::limits::{LimitKey, PortLimits, Rate, RateLimit};
use super::{CLEAR_SILENCE, DECLARED_HTTP, handle, timings};
use crate::detect::SILENCE;
use crate::tables::{Check, ConnectionPolicy, MtlsMode, Probe, Protocol, Workload, WorkloadPort};
use crate::telemetry::Counter;
use crate::telemetry::labels::EventLabels;
use crate::testing::worker;
use crate::transport::HANDSHAKE_TIMEOUT;
use crate::transport::testing::tcp_pair;
use crate::worker::Worker;

async fn local<F: Future>(test: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(20), LocalSet::new().run_until(test))
        .await
        .expect("the test hangs")
}

#[test]
fn the_mode_and_the_protocol_say_what_is_waited_for() {
    use MtlsMode::{Disable, Permissive, Strict};
    use Protocol::{Auto, Grpc, Http, Http2, Tcp, Tls};
    for (mode, protocols, silence, http) in [
        (Permissive, &[Auto][..], CLEAR_SILENCE, true),
        (Permissive, &[Tcp, Tls], CLEAR_SILENCE, false),
        (Permissive, &[Http, Http2, Grpc], DECLARED_HTTP, true),
        // Probes are HTTP, whatever the port.
        (
            Strict,
            &[Auto, Tcp, Tls, Http, Grpc],
            HANDSHAKE_TIMEOUT,
            true,
        ),
        // There is no proxy that could be late.
        (Disable, &[Auto], SILENCE, true),
        (Disable, &[Http2], DECLARED_HTTP, true),
    ] {
        for protocol in protocols {
            let timings = timings(mode, *protocol);
            assert_eq!(
                (timings.silence, timings.http),
                (silence, http),
                "{mode:?} {protocol:?}"
            );
        }
    }
}

/// An application that answers every HTTP/1.1 request with its request line.
async fn application() -> (SocketAddr, Rc<RefCell<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let asked = Rc::new(RefCell::new(Vec::new()));
    let all = asked.clone();
    spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let all = all.clone();
            spawn_local(async move {
                let mut text = String::new();
                let mut buf = [0; 1024];
                while let Ok(n @ 1..) = stream.read(&mut buf).await {
                    text.push_str(&String::from_utf8_lossy(&buf[..n]));
                    while let Some((head, rest)) = text.split_once("\r\n\r\n") {
                        let line = head.lines().next().unwrap_or_default().to_owned();
                        let answer = format!(
                            "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{line}",
                            line.len()
                        );
                        text = rest.to_owned();
                        all.borrow_mut().push(line);
                        stream.write_all(answer.as_bytes()).await.unwrap();
                    }
                }
            });
        }
    });
    (address, asked)
}

/// A connection to the application through the proxy of a STRICT workload with one probe.
async fn connect(application: SocketAddr, check: Check) -> (TcpStream, Rc<Worker>) {
    let worker = worker(None);
    worker.directory.set_workload(Workload {
        mtls: MtlsMode::Strict,
        probes: vec![Probe {
            port: application.port(),
            check,
        }],
        ..Workload::default()
    });
    let (client, proxy) = tcp_pair().await;
    let peer = client.local_addr().unwrap();
    spawn_local(handle(worker.clone(), proxy, peer, application));
    (client, worker)
}

async fn read_all(client: &mut TcpStream) -> Result<String, std::io::ErrorKind> {
    let mut text = String::new();
    match client.read_to_string(&mut text).await {
        Ok(_) => Ok(text),
        Err(error) => Err(error.kind()),
    }
}

/// Connections refused as plaintext.
fn refused(worker: &Worker) -> u64 {
    let counters = worker.metrics.registry().snapshot().counters;
    let refused = |labels: &EventLabels<Counter>| labels.event == Counter::PlaintextRefused;
    let matching = counters.iter().filter(|(labels, _)| refused(labels));
    matching.map(|(_, n)| n).sum()
}

#[tokio::test]
async fn a_probe_passes_and_nothing_else_on_its_connection() {
    local(async {
        let (address, asked) = application().await;
        let (mut client, _worker) = connect(address, Check::Http("/ready".into())).await;
        client
            .write_all(b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\nGET /admin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .await
            .unwrap();
        let heard = read_all(&mut client).await.unwrap();
        assert!(heard.starts_with("HTTP/1.1 200 OK"), "{heard}");
        assert!(heard.contains("GET /ready HTTP/1.1"), "{heard}");
        assert!(heard.contains("HTTP/1.1 403 Forbidden"), "{heard}");
        assert_eq!(*asked.borrow(), ["GET /ready HTTP/1.1"]);
    })
    .await;
}

#[tokio::test]
async fn another_request_is_refused_as_a_connection_is() {
    local(async {
        let (address, asked) = application().await;
        let (mut client, worker) = connect(address, Check::Http("/ready".into())).await;
        client
            .write_all(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .unwrap();
        let heard = read_all(&mut client).await;
        assert_eq!(heard, Err(std::io::ErrorKind::ConnectionReset));
        assert!(asked.borrow().is_empty());
        assert_eq!(refused(&worker), 1);
    })
    .await;
}

#[tokio::test]
async fn a_connection_without_a_word_is_no_refusal() {
    local(async {
        let (address, _) = application().await;
        let (mut client, worker) = connect(address, Check::Tcp).await;
        client.shutdown().await.unwrap();
        assert_eq!(read_all(&mut client).await, Ok(String::new()));
        assert_eq!(refused(&worker), 0);
    })
    .await;
}

#[tokio::test]
async fn of_grpc_only_the_health_check_passes() {
    local(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        spawn_local(async move {
            let (tcp, _) = listener.accept().await.unwrap();
            let mut connection = h2::server::handshake(tcp).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                let response = http::Response::builder()
                    .header("path", request.uri().path())
                    .body(())
                    .unwrap();
                respond.send_response(response, true).unwrap();
            }
        });
        let (client, _worker) = connect(address, Check::Grpc).await;
        let (mut client, connection) = h2::client::handshake(client).await.unwrap();
        spawn_local(connection);
        for (path, status) in [
            ("/grpc.health.v1.Health/Check", 200),
            ("/grpc.health.v1.Health/Watch", 403),
            ("/shop.Cart/Empty", 403),
        ] {
            let request = http::Request::builder()
                .method("POST")
                .uri(format!("http://x{path}"))
                .body(())
                .unwrap();
            let (response, _) = client.send_request(request, true).unwrap();
            let response: http::Response<h2::RecvStream> = response.await.unwrap();
            assert_eq!(response.status().as_u16(), status, "{path}");
        }
    })
    .await;
}

fn limited(worker: &Worker) -> u64 {
    let counters = worker.metrics.registry().snapshot().counters;
    let limited = |labels: &EventLabels<Counter>| labels.event == Counter::RateLimited;
    let matching = counters.iter().filter(|(labels, _)| limited(labels));
    matching.map(|(_, n)| n).sum()
}

/// So many requests in an hour, of everybody.
fn rate_limit(service: &str, requests: u32) -> RateLimit {
    let per = Duration::from_secs(3600);
    RateLimit {
        namespace: "shop".into(),
        service: service.into(),
        port: 80,
        key: LimitKey::Nobody,
        requests,
        per,
        burst: requests,
        replicas: 1,
        rate: Rate::new(requests.into(), per, requests.into()),
        buckets: Arc::default(),
    }
}

/// A PERMISSIVE workload whose port has these limits, and a probe of it.
fn limiting(port: u16, rates: Vec<RateLimit>) -> Workload {
    Workload {
        probes: vec![Probe {
            port,
            check: Check::Http("/ready".into()),
        }],
        ports: vec![WorkloadPort {
            port,
            protocol: Protocol::Http,
            mtls: None,
            limits: Some(Arc::new(PortLimits {
                rates,
                ..PortLimits::default()
            })),
            connection: ConnectionPolicy::default(),
        }],
        ..Workload::default()
    }
}

#[tokio::test]
async fn over_a_limit_only_probes_pass() {
    local(async {
        let (address, asked) = application().await;
        let (mut client, worker) = connect(address, Check::Tcp).await;
        let rates = vec![rate_limit("web", 3), rate_limit("shop", 2)];
        let table = limiting(address.port(), rates);
        let limits = table.limits(address.port()).unwrap();
        worker.directory.set_workload(table);
        let mut get = async |path: &str| {
            let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
            client.write_all(request.as_bytes()).await.unwrap();
            let mut text = String::new();
            let mut buf = [0; 4096];
            while !text.contains("\r\n\r\n") {
                let n = client.read(&mut buf).await.unwrap();
                text.push_str(&String::from_utf8_lossy(&buf[..n]));
            }
            text
        };
        for path in ["/a", "/b"] {
            assert!(get(path).await.starts_with("HTTP/1.1 200 OK"));
        }
        let refused = get("/c").await;
        for part in [
            "HTTP/1.1 429 Too Many Requests\r\n",
            "\r\nretry-after: 1800\r\n",
            "error=http_request_denied; details=\"shop/shop:80 takes 2 requests in 3600000 ms",
        ] {
            assert!(refused.contains(part), "{part}: {refused}");
        }
        assert!(get("/ready").await.starts_with("HTTP/1.1 200 OK"));
        assert_eq!(limited(&worker), 1);
        assert_eq!(
            *asked.borrow(),
            ["/a", "/b", "/ready"].map(|path| format!("GET {path} HTTP/1.1"))
        );
        // The limit that had room has its token back: it is asked alone, on the same connection.
        let mut rates = limits.rates.clone();
        rates.pop();
        worker
            .directory
            .set_workload(limiting(address.port(), rates));
        assert!(get("/d").await.starts_with("HTTP/1.1 200 OK"));
        assert!(get("/e").await.contains("shop/web:80"));
    })
    .await;
}
