//! Resets, retries, timeouts and the proxy's own answers.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use h2::Reason;
use tokio::sync::Notify;

use super::*;
use crate::tables::{Fallback, RetryPolicy};

fn retries() -> RetryPolicy {
    RetryPolicy {
        attempts: 2,
        status_codes: vec![503],
        grpc_codes: vec![14],
        connect_failure: true,
        refused_stream: true,
        reset: true,
        timeout: true,
        methods: vec![],
        backoff_base: Duration::from_millis(1),
        backoff_max: Duration::from_millis(2),
        max_body: 1024,
        budget_percent: 100,
        budget_min_per_second: 100,
    }
}

fn retrying() -> RoutePolicy {
    RoutePolicy {
        retry: Some(Arc::new(retries())),
        ..RoutePolicy::default()
    }
}

/// An address that refuses connections.
async fn refusing() -> SocketAddr {
    listen().await.1
}

#[tokio::test]
async fn a_clients_reset_reaches_the_server_with_its_reason() {
    local(async {
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        let (address, _) = server(move |request, mut respond| {
            let tell = tell.clone();
            async move {
                let mut sink = match request.uri().path() {
                    "/streaming" => Some(respond.send_response(Response::new(()), false).unwrap()),
                    _ => None,
                };
                tell.send(None).unwrap();
                let reason = match &mut sink {
                    Some(sink) => poll_fn(|cx| sink.poll_reset(cx)).await,
                    None => poll_fn(|cx| respond.poll_reset(cx)).await,
                };
                tell.send(Some(reason.unwrap())).unwrap();
            }
        })
        .await;
        let mut client = client(to(address)).await;
        for path in ["/waiting", "/streaming"] {
            for reason in [Reason::CANCEL, Reason::ENHANCE_YOUR_CALM] {
                let (_response, mut sink) = client.send_request(post(path), false).unwrap();
                assert_eq!(told.recv().await.unwrap(), None);
                sink.send_reset(reason);
                assert_eq!(told.recv().await.unwrap(), Some(reason), "{path}");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_servers_reset_reaches_the_client_with_its_reason() {
    local(async {
        // A reset throws away what is not on its way yet: the client says when it has the part.
        let arrived = Rc::new(Notify::new());
        let part = arrived.clone();
        let (address, _) = server(move |request, mut respond| {
            let part = part.clone();
            async move {
                if request.uri().path() == "/early" {
                    return respond.send_reset(Reason::INADEQUATE_SECURITY);
                }
                let mut sink = respond.send_response(Response::new(()), false).unwrap();
                sink.send_data("part".into(), false).unwrap();
                part.notified().await;
                sink.send_reset(Reason::ENHANCE_YOUR_CALM);
            }
        })
        .await;
        let mut client = client(to(address)).await;
        let error = ask(&mut client, get("/early")).await.unwrap_err();
        assert!(error.is_reset() && error.is_remote());
        assert_eq!(error.reason(), Some(Reason::INADEQUATE_SECURITY));
        let (response, _) = client.send_request(get("/late"), true).unwrap();
        let mut body = response.await.unwrap().into_body();
        assert_eq!(body.data().await.unwrap().unwrap(), "part");
        arrived.notify_one();
        let error = body.data().await.unwrap().unwrap_err();
        assert_eq!(error.reason(), Some(Reason::ENHANCE_YOUR_CALM));
    })
    .await;
}

#[tokio::test]
async fn a_refused_stream_is_tried_again_even_for_a_post() {
    local(async {
        let tries = Rc::new(RefCell::new(Vec::new()));
        let seen = tries.clone();
        let (address, _) = server(move |request, mut respond| {
            let seen = seen.clone();
            async move {
                let (bytes, trailers) = read(&mut request.into_body()).await.unwrap();
                seen.borrow_mut().push((bytes, trailers.is_some()));
                if seen.borrow().len() == 1 {
                    return respond.send_reset(Reason::REFUSED_STREAM);
                }
                ok(respond, "second");
            }
        })
        .await;
        let mut client = client(to(address)).await;
        let (response, mut sink) = client.send_request(post("/"), false).unwrap();
        for part in ["a", "b", "c"] {
            sink.send_data(part.into(), false).unwrap();
            rounds().await;
        }
        let mut trailers = HeaderMap::new();
        trailers.insert("x", "y".parse().unwrap());
        sink.send_trailers(trailers).unwrap();
        let mut body = response.await.unwrap().into_body();
        assert_eq!(read(&mut body).await.unwrap().0, "second");
        let expected = vec![("abc".into(), true), ("abc".into(), true)];
        assert_eq!(*tries.borrow(), expected);
    })
    .await;
}

/// Without a policy a POST that may have been processed is not sent again; nor is a body that was
/// too large to be kept.
#[tokio::test]
async fn what_may_have_been_processed_is_not_tried_again() {
    local(async {
        let tries = Rc::new(Cell::new(0));
        let seen = tries.clone();
        let (address, _) = server(move |request, mut respond| {
            seen.set(seen.get() + 1);
            async move {
                let refuse = request.uri().path() == "/large";
                let _ = read(&mut request.into_body()).await;
                respond.send_reset(match refuse {
                    true => Reason::REFUSED_STREAM,
                    false => Reason::INTERNAL_ERROR,
                });
            }
        })
        .await;
        let mut client = client(to(address)).await;
        let error = ask(&mut client, post("/")).await.unwrap_err();
        assert_eq!(error.reason(), Some(Reason::INTERNAL_ERROR));
        assert_eq!(tries.get(), 1);
        let (response, mut sink) = client.send_request(post("/large"), false).unwrap();
        let large = Bytes::from(vec![0; 1 << 20]);
        send(&mut sink, large, true).await.unwrap();
        let error = response.await.unwrap_err();
        assert_eq!(error.reason(), Some(Reason::REFUSED_STREAM));
        assert_eq!(tries.get(), 2);
    })
    .await;
}

#[tokio::test]
async fn policies_name_what_is_tried_again() {
    local(async {
        let tries = Rc::new(RefCell::new(Vec::new()));
        let seen = tries.clone();
        let answering = move |request: Asked, mut respond: Answer| {
            let seen = seen.clone();
            async move {
                let path = request.uri().path().to_owned();
                let again = seen.borrow().contains(&path);
                seen.borrow_mut().push(path.clone());
                if again {
                    return ok(respond, "well");
                }
                let mut response = Response::new(());
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", "14".parse().unwrap());
                match &*path {
                    "/503" => *response.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE,
                    "/reset" => return respond.send_reset(Reason::INTERNAL_ERROR),
                    "/timeout" => return std::future::pending().await,
                    "/trailers-only" => *response.headers_mut() = trailers,
                    "/trailers" => {
                        let mut sink = respond.send_response(response, false).unwrap();
                        return sink.send_trailers(trailers).unwrap();
                    }
                    other => panic!("{other}"),
                }
                respond.send_response(response, true).unwrap();
            }
        };
        let (first, _) = server(answering.clone()).await;
        let (second, _) = server(answering).await;
        let policy = RoutePolicy {
            per_try_timeout: Some(Duration::from_millis(200)),
            ..retrying()
        };
        let mut client = client(with_policy(&[first, second], policy)).await;
        for request in [
            get("/503"),
            get("/reset"),
            get("/timeout"),
            grpc("/trailers-only"),
            grpc("/trailers"),
        ] {
            let path = request.uri().path().to_owned();
            let (response, _) = ask(&mut client, request).await.unwrap();
            assert_eq!(response.body(), "well", "{path}");
        }
        assert_eq!(tries.borrow().len(), 10);
    })
    .await;
}

#[tokio::test]
async fn a_refused_connection_is_tried_elsewhere_or_answered() {
    local(async {
        let (well, _) = server(|_, respond| async move { ok(respond, "well") }).await;
        let gone = refusing().await;
        let mut both = client(with_policy(&[gone, well], RoutePolicy::default())).await;
        for _ in 0..10 {
            let (response, _) = ask(&mut both, post("/")).await.unwrap();
            assert_eq!(response.body(), "well");
        }
        let mut none = client(to(gone)).await;
        let (response, _) = ask(&mut none, get("/")).await.unwrap();
        assert_eq!(response.status(), 503);
        let status = response.headers()["proxy-status"].to_str().unwrap();
        assert!(
            status.starts_with("weft; error=connection_refused;"),
            "{status}"
        );
        let body = std::str::from_utf8(response.body()).unwrap();
        assert!(body.contains("route cart: backend shop/cart:80"), "{body}");

        let (response, _) = none.send_request(grpc("/s/m"), true).unwrap();
        let response = response.await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "application/grpc");
        assert_eq!(response.headers()["grpc-status"], "14");
        assert!(response.headers().contains_key("grpc-message"));
        assert!(response.headers().contains_key("proxy-status"));
        assert!(response.body().is_end_stream(), "trailers only");
    })
    .await;
}

#[tokio::test]
async fn timeouts_are_answered_and_cancel_the_server() {
    local(async {
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        let (address, _) = server(move |request, mut respond| {
            let tell = tell.clone();
            async move {
                if request.uri().path() == "/late" {
                    let mut sink = respond.send_response(Response::new(()), false).unwrap();
                    sink.send_data("part".into(), false).unwrap();
                    tell.send(poll_fn(|cx| sink.poll_reset(cx)).await.unwrap())
                        .unwrap();
                } else {
                    tell.send(poll_fn(|cx| respond.poll_reset(cx)).await.unwrap())
                        .unwrap();
                }
            }
        })
        .await;
        let policy = RoutePolicy {
            request_timeout: Some(Duration::from_millis(50)),
            ..RoutePolicy::default()
        };
        let mut client = client(with_policy(&[address], policy)).await;
        let (response, _) = ask(&mut client, get("/")).await.unwrap();
        assert_eq!(response.status(), 504);
        assert_eq!(told.recv().await, Some(Reason::CANCEL));
        let (response, _) = ask(&mut client, grpc("/")).await.unwrap();
        assert_eq!(response.headers()["grpc-status"], "4");
        assert_eq!(told.recv().await, Some(Reason::CANCEL));
        let (response, trailers) = ask(&mut client, grpc("/late")).await.unwrap();
        assert_eq!(response.body(), "part");
        assert_eq!(trailers.unwrap()["grpc-status"], "4");
        assert_eq!(told.recv().await, Some(Reason::CANCEL));
        let error = ask(&mut client, get("/late")).await.unwrap_err();
        assert_eq!(error.reason(), Some(Reason::INTERNAL_ERROR));
        assert_eq!(told.recv().await, Some(Reason::CANCEL));
    })
    .await;
}

#[tokio::test]
async fn a_calls_own_deadline_is_kept_when_nobody_else_has() {
    local(async {
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        let (address, _) = server(move |request, mut respond| {
            let tell = tell.clone();
            async move {
                if request.uri().path() == "/knows" {
                    let answer = Response::builder().header("grpc-status", "4");
                    let answer = answer
                        .header("grpc-message", "the server's")
                        .body(())
                        .unwrap();
                    respond.send_response(answer, true).unwrap();
                } else {
                    tell.send(poll_fn(|cx| respond.poll_reset(cx)).await.unwrap())
                        .unwrap();
                }
            }
        })
        .await;
        let mut client = client(to(address)).await;
        let call = |path, timeout: &str| {
            let mut request = grpc(path);
            let timeout = timeout.parse().unwrap();
            request.headers_mut().insert("grpc-timeout", timeout);
            request
        };
        let (response, _) = ask(&mut client, call("/knows", "15S")).await.unwrap();
        assert_eq!(response.headers()["grpc-message"], "the server's");
        let (response, _) = ask(&mut client, call("/hangs", "20m")).await.unwrap();
        assert_eq!(response.headers()["grpc-status"], "4");
        assert_eq!(told.recv().await, Some(Reason::CANCEL));
    })
    .await;
}

#[tokio::test]
async fn an_idle_stream_is_ended_and_a_busy_one_is_not() {
    local(async {
        // A tick for each tock, and no end.
        let (address, _) = server(|request, mut respond| async move {
            let mut sink = respond.send_response(Response::new(()), false).unwrap();
            let mut body = request.into_body();
            while let Some(Ok(tock)) = body.data().await {
                let flow = body.flow_control();
                flow.release_capacity(tock.len()).unwrap();
                sink.send_data("tick".into(), false).unwrap();
            }
            std::future::pending::<()>().await;
        })
        .await;
        let policy = RoutePolicy {
            stream_idle_timeout: Some(Duration::from_secs(1)),
            ..RoutePolicy::default()
        };
        let mut client = client(with_policy(&[address], policy)).await;
        let (busy, mut tocks) = client.send_request(post("/"), false).unwrap();
        let (idle, _) = client.send_request(get("/"), true).unwrap();
        let mut body = busy.await.unwrap().into_body();
        let ended = Cell::new(false);
        let neighbour = async {
            let mut body = idle.await.unwrap().into_body();
            assert!(body.data().await.unwrap().is_err());
            ended.set(true);
        };
        // It goes on for longer than its idle neighbour, and then is idle as well.
        let busy = async {
            while !ended.get() {
                tocks.send_data("tock".into(), false).unwrap();
                let tick = body.data().await.unwrap().unwrap();
                assert_eq!(tick, "tick");
                body.flow_control().release_capacity(tick.len()).unwrap();
            }
            assert!(body.data().await.unwrap().is_err());
        };
        tokio::join!(neighbour, busy);
    })
    .await;
}

#[tokio::test]
async fn a_fallback_answers_for_a_backend_without_endpoints() {
    local(async {
        let policy = RoutePolicy {
            fallback: Some(Arc::new(Fallback::Response {
                status: 200,
                headers: vec![("x-fallback".into(), "yes".into())],
                body: Bytes::from_static(b"cached"),
            })),
            ..RoutePolicy::default()
        };
        let mut client = client(with_policy(&[], policy)).await;
        let (response, _) = ask(&mut client, get("/")).await.unwrap();
        assert_eq!(response.headers()["x-fallback"], "yes");
        assert_eq!(response.body(), "cached");
        assert!(response.headers().contains_key("proxy-status"));
    })
    .await;
}

#[tokio::test]
async fn a_client_that_is_gone_cancels_its_streams() {
    local(async {
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        let (address, connections) = server(move |_, mut respond| {
            let tell = tell.clone();
            async move {
                tell.send(None).unwrap();
                let reason = poll_fn(|cx| respond.poll_reset(cx)).await;
                tell.send(Some(reason.unwrap())).unwrap();
            }
        })
        .await;
        let worker = worker(None);
        let destination = to(address);
        for _ in 0..2 {
            let tcp = connect(&worker, destination.clone()).await;
            let (mut client, connection) = h2::client::handshake(tcp).await.unwrap();
            let driving = spawn_local(connection);
            let (response, _sink) = client.send_request(post("/"), false).unwrap();
            assert_eq!(told.recv().await.unwrap(), None);
            driving.abort();
            assert_eq!(told.recv().await.unwrap(), Some(Reason::CANCEL));
            drop(response);
        }
        assert_eq!(connections.get(), 1, "the connection to the server stays");
    })
    .await;
}

/// A proxy cannot know of another endpoint behind it: it passes "never processed" on to the one
/// that can.
#[tokio::test]
async fn never_processed_passes_on_to_the_other_proxy() {
    use super::frames::{GOAWAY, HEADERS, PREFACE, SETTINGS, frame, next};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    local(async {
        let (listener, address) = listen().await;
        spawn_local(async move {
            while let Ok((mut tcp, _)) = listener.accept().await {
                let mut preface = [0; PREFACE.len()];
                tcp.read_exact(&mut preface).await.unwrap();
                tcp.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
                while next(&mut tcp)
                    .await
                    .is_some_and(|frame| frame.kind != HEADERS)
                {}
                tcp.write_all(&frame(GOAWAY, 0, 0, &[0; 8])).await.unwrap();
            }
        });
        let (ours, theirs) = tcp_pair().await;
        let flow = crate::http::flow::Flow::new(
            crate::telemetry::Direction::Inbound,
            crate::http::flow::Target::Fixed,
            to(address),
            address,
            Default::default(),
            true,
        );
        spawn_local(serve(worker(None), Stream::from(theirs), Rc::new(flow)));
        let (mut client, connection) = h2::client::handshake(ours).await.unwrap();
        spawn_local(connection);
        let error = ask(&mut client, post("/")).await.unwrap_err();
        assert_eq!(error.reason(), Some(Reason::REFUSED_STREAM));
    })
    .await;
}

#[tokio::test]
async fn the_slower_of_two_endpoints_is_cancelled() {
    local(async {
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        let (slow, asked) = server(move |_request, mut respond| {
            let tell = tell.clone();
            async move {
                let reset = poll_fn(|cx| respond.poll_reset(cx)).await;
                tell.send(reset.unwrap()).unwrap();
            }
        })
        .await;
        let (fast, _) = server(|_, respond| async move { ok(respond, "fast") }).await;
        let policy = RoutePolicy {
            hedge_after: Some(Duration::from_millis(30)),
            ..retrying()
        };
        let mut client = client(with_policy(&[slow, fast], policy)).await;
        // An endpoint without a measurement comes before one with: the slow one is asked.
        for _ in 0..6 {
            let (response, _) = ask(&mut client, get("/")).await.unwrap();
            assert_eq!(response.body(), "fast");
        }
        assert_eq!(told.recv().await, Some(Reason::CANCEL));
        assert!(asked.get() >= 1);
        assert!(
            told.try_recv().is_err(),
            "its slowness counts: once was enough"
        );
    })
    .await;
}

#[tokio::test]
async fn the_other_endpoints_answer_counts_when_one_breaks() {
    local(async {
        // The one breaks when the other has been asked, and the other answers after that.
        let (both_asked, broken) = (Rc::new(Notify::new()), Rc::new(Notify::new()));
        let (when, tell) = (Rc::clone(&both_asked), Rc::clone(&broken));
        let (breaks, _) = server(move |_, mut respond| {
            let (when, tell) = (Rc::clone(&when), Rc::clone(&tell));
            async move {
                when.notified().await;
                respond.send_reset(Reason::INTERNAL_ERROR);
                tell.notify_one();
            }
        })
        .await;
        let (slow, asked) = server(move |_, respond| {
            let (tell, when) = (Rc::clone(&both_asked), Rc::clone(&broken));
            async move {
                tell.notify_one();
                when.notified().await;
                ok(respond, "slow");
            }
        })
        .await;
        let policy = RoutePolicy {
            hedge_after: Some(Duration::from_millis(30)),
            ..retrying()
        };
        let mut client = client(with_policy(&[breaks, slow], policy)).await;
        let (response, _) = ask(&mut client, get("/")).await.unwrap();
        assert_eq!(response.body(), "slow");
        assert_eq!(asked.get(), 1);
    })
    .await;
}
