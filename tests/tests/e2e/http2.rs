//! HTTP/2 with prior knowledge, and gRPC: trailers, streams both ways, resets, flow control.

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Request, Response};
use tokio::sync::mpsc;
use weft_tests::PATIENCE;
use weft_tests::mesh::{Mesh, Workload};
use weft_tests::netns::Host;

fn start() -> (Mesh, SocketAddr) {
    prepared(|_| {})
}

fn prepared(prepare: impl FnOnce(&mut Mesh)) -> (Mesh, SocketAddr) {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    mesh.workload(Workload::new("server").port(9090, None));
    let vip = mesh.service("server", 9090, None);
    prepare(&mut mesh);
    mesh.start();
    (mesh, vip)
}

pub(crate) fn run<T>(body: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        tokio::time::timeout(PATIENCE * 2, body)
            .await
            .expect("it takes too long")
    })
}

/// What a handler gets: the request, its body, and the way to answer.
pub(crate) type Call = (Request<RecvStream>, h2::server::SendResponse<Bytes>);

/// An HTTP/2 server on the second host; each request is handed to `handle`.
pub(crate) fn serve<F: Future<Output = ()> + 'static>(
    mesh: &Mesh,
    handle: impl Fn(Call) -> F + 'static,
) {
    serve_on(mesh.host(1), handle);
}

/// An HTTP/2 server on port 9090 of a host.
pub(crate) fn serve_on<F: Future<Output = ()> + 'static>(
    host: &Host,
    handle: impl Fn(Call) -> F + 'static,
) {
    let listener = host
        .within(|| std::net::TcpListener::bind(("0.0.0.0", 9090)))
        .unwrap();
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let handle = std::rc::Rc::new(handle);
    tokio::task::spawn_local(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let handle = std::rc::Rc::clone(&handle);
            tokio::task::spawn_local(async move {
                let Ok(mut connection) = h2::server::handshake(stream).await else {
                    return;
                };
                while let Some(Ok(call)) = connection.accept().await {
                    tokio::task::spawn_local(handle(call));
                }
            });
        }
    });
}

pub(crate) async fn connect(mesh: &Mesh, to: SocketAddr) -> h2::client::SendRequest<Bytes> {
    let stream = mesh
        .host(0)
        .within(|| std::net::TcpStream::connect(to))
        .unwrap();
    stream.set_nonblocking(true).unwrap();
    let stream = tokio::net::TcpStream::from_std(stream).unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::task::spawn_local(async move {
        let _ = connection.await;
    });
    sender.ready().await.unwrap()
}

async fn next(body: &mut RecvStream) -> Option<Bytes> {
    let data = body.data().await?.unwrap();
    body.flow_control().release_capacity(data.len()).unwrap();
    Some(data)
}

async fn whole(body: &mut RecvStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(data) = next(body).await {
        bytes.extend_from_slice(&data);
    }
    bytes
}

pub(crate) fn local<T>(body: impl Future<Output = T>) -> T {
    run(async { tokio::task::LocalSet::new().run_until(body).await })
}

pub fn requests_with_prior_knowledge() {
    let (mesh, vip) = start();
    local(async {
        serve(&mesh, |(request, mut respond)| async move {
            assert_eq!(request.uri().path_and_query().unwrap(), "/a/../b%2F?q");
            assert_eq!(request.uri().authority().unwrap(), "server.shop");
            assert_eq!(request.headers()["x-two"], "1");
            assert_eq!(request.headers().get_all("x-two").iter().count(), 2);
            let mut body = request.into_body();
            let bytes = whole(&mut body).await;
            let response = Response::builder()
                .status(299)
                .header("x-y", "z")
                .body(())
                .unwrap();
            let mut send = respond.send_response(response, false).unwrap();
            send.send_data(bytes.into(), true).unwrap();
        });
        let mut client = connect(&mesh, vip).await;
        for _ in 0..3 {
            let request = Request::builder()
                .method("QUERY")
                .uri("http://server.shop/a/../b%2F?q")
                .header("x-two", "1")
                .header("x-two", "2")
                .body(())
                .unwrap();
            let (response, mut send) = client.send_request(request, false).unwrap();
            send.send_data(Bytes::from_static(b"body"), true).unwrap();
            let response = response.await.unwrap();
            assert_eq!(response.status(), 299);
            assert_eq!(response.headers()["x-y"], "z");
            assert_eq!(whole(&mut response.into_body()).await, b"body");
        }
    });
}

pub fn a_session_is_kept() {
    let (mesh, vip) = prepared(|mesh| {
        mesh.manifest(
            "route",
            "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: server, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: server}]
  rules:
  - sessionPersistence: {cookieConfig: {lifetimeType: Permanent}, absoluteTimeout: 5m}
    backendRefs: [{name: server, port: 80}]
",
        );
    });
    local(async {
        serve(&mesh, |(_, mut respond)| async move {
            let own = Response::builder().header("set-cookie", "own=1");
            respond.send_response(own.body(()).unwrap(), true).unwrap();
        });
        let mut client = connect(&mesh, vip).await;
        let mut ask = async |cookies: &[&str]| {
            let mut request = Request::get("http://server.shop/x");
            for cookie in cookies {
                request = request.header("cookie", *cookie);
            }
            let (response, _) = client
                .send_request(request.body(()).unwrap(), true)
                .unwrap();
            let set = response.await.unwrap();
            let set = set.headers().get_all("set-cookie");
            set.iter()
                .map(|value| value.to_str().unwrap().to_owned())
                .collect::<Vec<_>>()
        };
        let set = ask(&[]).await;
        let [own, session] = &set[..] else {
            panic!("{set:?}");
        };
        assert_eq!(own, "own=1");
        assert!(
            session.starts_with("weft-session-") && session.ends_with("; Path=/; Max-Age=300"),
            "{session}"
        );
        // Cookies may come in fields of their own (RFC 9113 section 8.2.3).
        let pair = session.split(';').next().unwrap();
        assert_eq!(ask(&["a=b", pair]).await, ["own=1"]);
    });
}

pub fn grpc_trailers_and_streams_both_ways() {
    let (mesh, vip) = start();
    local(async {
        serve(&mesh, |(request, mut respond)| async move {
            assert_eq!(request.headers()["te"], "trailers");
            let response = Response::builder()
                .header("content-type", "application/grpc")
                .body(())
                .unwrap();
            let mut send = respond.send_response(response, false).unwrap();
            // Each message is answered when it has come.
            let mut body = request.into_body();
            while let Some(message) = next(&mut body).await {
                send.send_data(message, false).unwrap();
            }
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", "5".parse().unwrap());
            trailers.insert("grpc-message", "not here".parse().unwrap());
            send.send_trailers(trailers).unwrap();
        });
        let mut client = connect(&mesh, vip).await;
        let request = Request::post("http://server.shop/a.B/C")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .unwrap();
        let (response, mut send) = client.send_request(request, false).unwrap();
        // The answer's head comes before the request has ended.
        let mut body = response.await.unwrap().into_body();
        for i in 0..5u8 {
            let message = Bytes::from(vec![0, 0, 0, 0, 1, i]);
            send.send_data(message.clone(), false).unwrap();
            assert_eq!(next(&mut body).await.unwrap(), message);
        }
        send.send_data(Bytes::new(), true).unwrap();
        assert!(next(&mut body).await.is_none());
        let trailers = body.trailers().await.unwrap().expect("trailers");
        assert_eq!(trailers["grpc-status"], "5");
        assert_eq!(trailers["grpc-message"], "not here");
    });
}

pub fn a_reset_stream_is_reset_at_the_far_end() {
    let (mesh, vip) = start();
    local(async {
        let (tell, mut told) = mpsc::unbounded_channel();
        serve(&mesh, move |(request, mut respond)| {
            let tell = tell.clone();
            async move {
                if request.uri().path() == "/server" {
                    respond.send_reset(Reason::ENHANCE_YOUR_CALM);
                    return;
                }
                let mut send: SendStream<Bytes> =
                    respond.send_response(Response::new(()), false).unwrap();
                let reason = std::future::poll_fn(|cx| send.poll_reset(cx))
                    .await
                    .unwrap();
                send.send_reset(Reason::CANCEL);
                tell.send(reason).unwrap();
            }
        });
        let mut client = connect(&mesh, vip).await;
        let get = |path| {
            Request::get(format!("http://server.shop{path}"))
                .body(())
                .unwrap()
        };

        let (response, _) = client.send_request(get("/server"), true).unwrap();
        let error = response.await.expect_err("the stream was not reset");
        assert_eq!(error.reason(), Some(Reason::ENHANCE_YOUR_CALM));

        let (response, mut send) = client.send_request(get("/client"), false).unwrap();
        let _body = response.await.unwrap();
        send.send_reset(Reason::CANCEL);
        let reason = told.recv().await.unwrap();
        assert_eq!(reason, Reason::CANCEL);

        // The connection goes on.
        let (response, _) = client.send_request(get("/server"), true).unwrap();
        assert!(response.await.is_err_and(|e| e.is_reset()));
    });
}

pub fn a_slow_reader_holds_the_sender_back() {
    const MOST: usize = 8 << 20;
    let (mesh, vip) = start();
    local(async {
        let sent = std::rc::Rc::new(std::cell::Cell::new(0));
        let counter = std::rc::Rc::clone(&sent);
        serve(&mesh, move |(_, mut respond)| {
            let sent = std::rc::Rc::clone(&counter);
            async move {
                let mut send = respond.send_response(Response::new(()), false).unwrap();
                while sent.get() < 4 * MOST {
                    send.reserve_capacity(16 * 1024);
                    let Some(Ok(room)) = std::future::poll_fn(|cx| send.poll_capacity(cx)).await
                    else {
                        return;
                    };
                    send.send_data(vec![0; room].into(), false).unwrap();
                    sent.set(sent.get() + room);
                }
                send.send_data(Bytes::new(), true).unwrap();
            }
        });
        let mut client = connect(&mesh, vip).await;
        let request = Request::get("http://server.shop/").body(()).unwrap();
        let (response, _) = client.send_request(request, true).unwrap();
        let mut body = response.await.unwrap().into_body();
        // Nothing is read for a while: what is on its way fills some windows and buffers, no more.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let held = sent.get();
        assert!(held < MOST, "{held} bytes were taken with nobody reading");
        // And all of it comes when it is read.
        assert_eq!(whole(&mut body).await.len(), sent.get());
        assert!(sent.get() >= 4 * MOST);
    });
}

/// What is left of a call's time, as its server is told.
fn time_left<B>(request: &Request<B>) -> Duration {
    let value = request.headers()["grpc-timeout"].to_str().unwrap();
    let (number, unit) = value.split_at(value.len() - 1);
    let number: u64 = number.parse().unwrap();
    match unit {
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        other => panic!("{other}"),
    }
}

pub fn deadlines_of_calls_are_kept_and_passed_on() {
    let (mesh, vip) = prepared(|mesh| {
        mesh.traffic_policy(
            "server",
            "  timeouts: {request: 2s}\n  retries: {attempts: 3, grpcCodes: [UNAVAILABLE]}",
        );
    });
    local(async {
        let (tell, mut told) = mpsc::unbounded_channel();
        serve(&mesh, move |(request, mut respond)| {
            let tell = tell.clone();
            async move {
                let left = time_left(&request);
                tell.send(left).unwrap();
                if request.uri().path() == "/silent/m" {
                    return std::future::pending().await;
                }
                // The proxy waits for that long before the next try, which has less time.
                let pause = request.uri().path().rsplit('/').next().unwrap();
                let response = Response::builder()
                    .header("grpc-status", "14")
                    .header("grpc-retry-pushback-ms", pause);
                let response = response.body(()).unwrap();
                let _ = respond.send_response(response, true);
            }
        });
        let client = connect(&mesh, vip).await;
        let ask = async |path: &str, timeout: Option<&str>| {
            let mut request = Request::post(format!("http://server.shop{path}"))
                .header("content-type", "application/grpc");
            if let Some(timeout) = timeout {
                request = request.header("grpc-timeout", timeout);
            }
            let mut client = client.clone().ready().await.unwrap();
            let began = std::time::Instant::now();
            let request = request.body(()).unwrap();
            let (response, _) = client.send_request(request, true).unwrap();
            let response = response.await.unwrap();
            let code = response.headers()["grpc-status"].to_str().unwrap();
            (code.to_owned(), began.elapsed())
        };
        // The client's own, and the route's where that is earlier.
        for (timeout, at_least, at_most) in [
            (Some("300m"), 300, 300),
            (Some("9S"), 2_000, 2_000),
            (None, 2_000, 2_000),
        ] {
            let (code, took) = ask("/silent/m", timeout).await;
            assert_eq!(code, "4", "{timeout:?}");
            assert!(took >= Duration::from_millis(at_least), "{took:?}");
            // In time, and not when the test's patience ends.
            assert!(took < PATIENCE / 2, "{took:?}");
            let left = told.recv().await.unwrap();
            assert!(left <= Duration::from_millis(at_most), "{left:?}");
        }
        // Tries share the time.
        let (code, _) = ask("/failing/20", Some("9S")).await;
        assert_eq!(code, "14");
        let mut before = Duration::from_secs(2);
        let mut tries = 0;
        while let Ok(left) = told.try_recv() {
            assert!(left <= before, "{left:?} after {before:?}");
            before = left.saturating_sub(Duration::from_millis(20));
            tries += 1;
        }
        assert!(tries >= 2, "{tries}");
        // And none begins when it is over: the three pauses between four take longer than that.
        let (code, _) = ask("/failing/50", Some("120m")).await;
        assert!(["4", "14"].contains(&&*code), "{code}");
        let mut tries = 0;
        while told.try_recv().is_ok() {
            tries += 1;
        }
        assert!(tries < 4, "{tries}");
    });
}
