//! How connections to endpoints are kept, and how long anybody may be silent on them.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use weft_tests::mesh::{Mesh, Workload};
use weft_tests::traffic::{Traffic, all_well};
use weft_tests::wire::{Server, ok, serve_http, status};

use crate::http2::{connect, local};

/// A client, a server, and a policy for it.
fn start(port: u16, protocol: &'static str, policy: &str) -> (Mesh, SocketAddr) {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    mesh.workload(Workload::new("server").port(port, Some(protocol)));
    let vip = mesh.service("server", port, Some(protocol));
    mesh.traffic_policy("server", policy);
    mesh.start();
    (mesh, vip)
}

pub fn a_connection_carries_as_many_requests_as_the_policy_says() {
    let (mesh, vip) = start(8080, "http", "  connection: {maxRequests: 5}");
    // The requests of each connection.
    let carried: Arc<Mutex<Vec<usize>>> = Arc::default();
    let of_all = carried.clone();
    let _server = Server::start(mesh.host(1), 8080, move |wire| {
        let nth = {
            let mut all = of_all.lock().unwrap();
            all.push(0);
            all.len() - 1
        };
        let of_all = of_all.clone();
        serve_http(wire, move |_| {
            of_all.lock().unwrap()[nth] += 1;
            ok("yes")
        });
    });
    let mut wire = mesh.sidecar(0).connect(vip);
    for _ in 0..12 {
        wire.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
        assert_eq!(status(&wire.read_answer().0), 200);
    }
    assert_eq!(*carried.lock().unwrap(), [5, 5, 2]);
    // Nor is one lost when many come at once.
    let traffic = Traffic::start(mesh.host(0), vip, 8, Duration::ZERO);
    traffic.wait_for(500);
    all_well(&traffic.finish());
    let carried = carried.lock().unwrap();
    assert!(carried.iter().all(|n| *n <= 5), "{carried:?}");
}

/// An HTTP/2 server on port 9090 that answers at once; the requests of each connection.
fn count(mesh: &Mesh) -> Rc<RefCell<Vec<usize>>> {
    let listener = mesh
        .host(1)
        .within(|| std::net::TcpListener::bind(("0.0.0.0", 9090)))
        .unwrap();
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let carried: Rc<RefCell<Vec<usize>>> = Rc::default();
    let of_all = carried.clone();
    tokio::task::spawn_local(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let nth = of_all.borrow().len();
            of_all.borrow_mut().push(0);
            let of_all = of_all.clone();
            tokio::task::spawn_local(async move {
                let Ok(mut connection) = h2::server::handshake(stream).await else {
                    return;
                };
                while let Some(Ok((_, mut respond))) = connection.accept().await {
                    of_all.borrow_mut()[nth] += 1;
                    let mut sink = respond.send_response(Response::new(()), false).unwrap();
                    sink.send_data(Bytes::from_static(b"yes"), true).unwrap();
                }
            });
        }
    });
    carried
}

pub fn streams_of_a_worn_connection_are_not_lost() {
    let policy = "  connection: {maxRequests: 5}\n  circuitBreaker: {limits: {maxConnections: 2}}";
    let (mesh, vip) = start(9090, "http2", policy);
    local(async {
        let carried = count(&mesh);
        let mut client = connect(&mesh, vip).await;
        for _ in 0..10 {
            let mut asked = Vec::new();
            for _ in 0..20 {
                client = client.ready().await.unwrap();
                let request = Request::get("http://server.shop/").body(()).unwrap();
                asked.push(client.send_request(request, true).unwrap().0);
            }
            for response in asked {
                let mut response = response.await.unwrap();
                assert_eq!(response.status(), 200);
                let body = response.body_mut().data().await.unwrap();
                assert_eq!(body.unwrap(), "yes");
            }
        }
        let carried = carried.borrow();
        assert_eq!(carried.iter().sum::<usize>(), 200);
        // The workload's own proxy has no limit of connections, so it opens one for the next five.
        assert!(carried.iter().all(|n| *n <= 5), "{carried:?}");
    });
}

pub fn silence_is_ended_before_and_within_an_answer() {
    let (mesh, vip) = start(8080, "http", "  timeouts: {idle: 5m, stream: 300ms}");
    const BEGIN: &str = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nbegin";
    let _server = Server::start(mesh.host(1), 8080, |mut wire| {
        let head = wire.read_head();
        if head.starts_with("GET /begin ") {
            wire.send(BEGIN);
        }
        // Until the proxy has given it up.
        let _ = wire.stream().set_read_timeout(None);
        let _ = std::io::Read::read(&mut wire.stream(), &mut [0; 16]);
    });
    let mut wire = mesh.sidecar(0).connect(vip);
    wire.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, _) = wire.read_answer();
    assert!(head.starts_with("HTTP/1.1 504 "), "{head}");
    assert!(head.contains("response_timeout"), "{head}");
    let mut wire = mesh.sidecar(0).connect(vip);
    wire.send("GET /begin HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!(wire.expect_reset(), BEGIN.as_bytes());
}

pub fn silent_streams_are_ended_and_their_neighbours_are_not() {
    let (mesh, vip) = start(9090, "http2", "  timeouts: {stream: 1s}");
    local(async {
        crate::http2::serve(&mesh, |(request, mut respond)| async move {
            if request.uri().path() == "/silent" {
                return std::future::pending().await;
            }
            let mut sink = respond.send_response(Response::new(()), false).unwrap();
            let mut tick = || sink.send_data(Bytes::from_static(b"tick"), false).unwrap();
            tick();
            if request.uri().path() == "/begun" {
                return std::future::pending().await;
            }
            // One for each tock, until a frame of nothing ends them.
            let mut body = request.into_body();
            while let Some(tock) = body.data().await {
                let heard = tock.unwrap().len();
                body.flow_control().release_capacity(heard).unwrap();
                if heard > 0 {
                    tick();
                }
            }
            sink.send_data(Bytes::from_static(b"end"), true).unwrap();
        });
        let mut client = connect(&mesh, vip).await;
        let ask = |path: &str| {
            let uri = format!("http://server.shop{path}");
            Request::get(uri).body(()).unwrap()
        };
        let (ticks, mut tocks) = client.send_request(ask("/ticks"), false).unwrap();
        let (silent, _) = client.send_request(ask("/silent"), true).unwrap();
        let (begun, _) = client.send_request(ask("/begun"), true).unwrap();
        let ended = Cell::new(false);
        let neighbours = async {
            let response = silent.await.unwrap();
            assert_eq!(response.status(), 504);
            let mut body = begun.await.unwrap().into_body();
            assert_eq!(body.data().await.unwrap().unwrap(), "tick");
            assert!(body.data().await.unwrap().is_err());
            ended.set(true);
        };
        // It goes on for longer than they do.
        let busy = async {
            let mut body = ticks.await.unwrap().into_body();
            loop {
                let tick = body.data().await.unwrap().unwrap();
                assert_eq!(tick, "tick");
                body.flow_control().release_capacity(tick.len()).unwrap();
                if ended.get() {
                    break;
                }
                tocks.send_data(Bytes::from_static(b"tock"), false).unwrap();
            }
            tocks.send_data(Bytes::new(), true).unwrap();
            assert_eq!(body.data().await.unwrap().unwrap(), "end");
            assert!(body.data().await.is_none());
        };
        tokio::join!(neighbours, busy);
    });
}
