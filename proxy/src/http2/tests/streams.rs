//! What passes, and how.

use std::task::Poll;

use http::{StatusCode, Version};

use super::*;

#[tokio::test]
async fn heads_bodies_and_trailers_pass_both_ways() {
    local(async {
        let (address, _) = server(|request, mut respond| async move {
            let (head, mut body) = request.into_parts();
            assert_eq!(head.method, "PATCH");
            assert_eq!(
                head.uri,
                "https://cart.example:81/a%2Fb/../c?q=%20#".trim_end_matches('#')
            );
            assert_eq!(head.version, Version::HTTP_2);
            let cookies: Vec<_> = head.headers.get_all("cookie").iter().collect();
            assert_eq!(cookies, ["a=1", "b=2"]);
            let (bytes, trailers) = read(&mut body).await.unwrap();
            assert_eq!(bytes, "hello");
            assert_eq!(trailers.unwrap()["checksum"], "5");
            let response = Response::builder()
                .status(299)
                .header("x-a", "1")
                .header("x-a", "2");
            let mut sink = respond
                .send_response(response.body(()).unwrap(), false)
                .unwrap();
            send(&mut sink, Bytes::from(vec![7; 1 << 20]), false)
                .await
                .unwrap();
            let mut trailers = HeaderMap::new();
            trailers.insert("after", "all".parse().unwrap());
            sink.send_trailers(trailers).unwrap();
        })
        .await;
        let mut client = client(to(address)).await;
        let request = Request::patch("https://cart.example:81/a%2Fb/../c?q=%20")
            .header("cookie", "a=1")
            .header("cookie", "b=2")
            .body(())
            .unwrap();
        let (response, mut sink) = client.send_request(request, false).unwrap();
        sink.send_data("hello".into(), false).unwrap();
        let mut trailers = HeaderMap::new();
        trailers.insert("checksum", "5".parse().unwrap());
        sink.send_trailers(trailers).unwrap();
        let (head, mut body) = response.await.unwrap().into_parts();
        assert_eq!(head.status, 299);
        let twice: Vec<_> = head.headers.get_all("x-a").iter().collect();
        assert_eq!(twice, ["1", "2"]);
        assert_eq!(
            head.headers.len(),
            2,
            "nothing is added: {:?}",
            head.headers
        );
        let (bytes, trailers) = read(&mut body).await.unwrap();
        assert!(bytes.len() == 1 << 20 && bytes.iter().all(|b| *b == 7));
        assert_eq!(trailers.unwrap()["after"], "all");
    })
    .await;
}

#[tokio::test]
async fn end_of_stream_stays_where_it_was() {
    local(async {
        let (address, _) = server(|request, mut respond| async move {
            assert!(
                request.body().is_end_stream(),
                "END_STREAM stands with the head"
            );
            let mut response = Response::new(());
            let headers = response.headers_mut();
            headers.insert("content-length", "5".parse().unwrap());
            if request.uri().path() == "/304" {
                *response.status_mut() = StatusCode::NOT_MODIFIED;
            }
            let bare = request.method() == Method::HEAD || request.uri().path() == "/304";
            let mut sink = respond.send_response(response, bare).unwrap();
            if !bare {
                sink.send_data("hello".into(), true).unwrap();
            }
        })
        .await;
        let mut client = client(to(address)).await;
        let mut head = get("/");
        *head.method_mut() = Method::HEAD;
        for request in [head, get("/304")] {
            let (response, _) = client.send_request(request, true).unwrap();
            let response = response.await.unwrap();
            assert_eq!(response.headers()["content-length"], "5");
            assert!(response.body().is_end_stream());
        }
        let (response, _) = client.send_request(get("/"), true).unwrap();
        let mut body = response.await.unwrap().into_body();
        assert_eq!(body.data().await.unwrap().unwrap(), "hello");
        assert!(body.is_end_stream(), "END_STREAM came with the data");
    })
    .await;
}

#[tokio::test]
async fn both_directions_stream_at_once() {
    local(async {
        let (address, _) = server(|request, mut respond| async move {
            let mut body = request.into_body();
            let mut sink = respond.send_response(Response::new(()), false).unwrap();
            while let Some(Ok(data)) = body.data().await {
                body.flow_control().release_capacity(data.len()).unwrap();
                send(&mut sink, data, false).await.unwrap();
            }
            sink.send_data(Bytes::new(), true).unwrap();
        })
        .await;
        let mut client = client(to(address)).await;
        let (response, mut sink) = client.send_request(post("/echo"), false).unwrap();
        let mut body = response.await.unwrap().into_body();
        for round in 0..50u8 {
            let data = Bytes::from(vec![round; 1000]);
            sink.send_data(data.clone(), false).unwrap();
            let mut echoed = BytesMut::new();
            while echoed.len() < data.len() {
                let data = body.data().await.unwrap().unwrap();
                body.flow_control().release_capacity(data.len()).unwrap();
                echoed.extend_from_slice(&data);
            }
            assert_eq!(echoed, data);
        }
        sink.send_data(Bytes::new(), true).unwrap();
        assert_eq!(read(&mut body).await.unwrap().0.len(), 0);
    })
    .await;
}

/// A reader that stalls stalls the sender, and not its neighbours.
#[tokio::test]
async fn flow_control_is_end_to_end() {
    const ALL: usize = 8 << 20;
    let sent = Rc::new(Cell::new(0));
    let counting = sent.clone();
    local(async {
        let (address, _) = server(move |request, mut respond| {
            let sent = counting.clone();
            async move {
                if request.uri().path() == "/small" {
                    return ok(respond, "small");
                }
                let mut sink = respond.send_response(Response::new(()), false).unwrap();
                while sent.get() < ALL {
                    let part = Bytes::from(vec![1; 8192]);
                    sent.set(sent.get() + part.len());
                    send(&mut sink, part, sent.get() == ALL).await.unwrap();
                }
            }
        })
        .await;
        let mut client = client(to(address)).await;
        let (response, _) = client.send_request(get("/large"), true).unwrap();
        let mut body = response.await.unwrap().into_body();
        // Until nothing moves any more.
        let mut before = usize::MAX;
        while before != sent.get() {
            before = sent.get();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let held = super::super::STREAM_WINDOW as usize + super::super::SEND_BUFFER + (64 << 10);
        assert!(before <= held + 16384, "{before} bytes are on their way");
        let (small, _) = ask(&mut client, get("/small")).await.unwrap();
        assert_eq!(small.body(), "small");
        assert_eq!(read(&mut body).await.unwrap().0.len(), ALL);
        assert_eq!(sent.get(), ALL);
    })
    .await;
}

/// The beginning of a body goes with its head, whatever the server's window says; what the window
/// does not take waits for it.
#[tokio::test]
async fn a_short_body_waits_for_a_window_that_is_shut() {
    local(async {
        let (listener, address) = crate::transport::testing::listen().await;
        let asked = Rc::new(tokio::sync::Notify::new());
        let (heard, shut) = (asked.clone(), Rc::new(Cell::new(true)));
        let opened = shut.clone();
        spawn_local(async move {
            let (tcp, _) = listener.accept().await.unwrap();
            let mut builder = h2::server::Builder::new();
            let handshake = builder.initial_window_size(0).handshake::<_, Bytes>(tcp);
            let mut connection = handshake.await.unwrap();
            // Whoever is answered knows of the window.
            let (_, respond) = connection.accept().await.unwrap().unwrap();
            ok(respond, "known");
            let (request, respond) = connection.accept().await.unwrap().unwrap();
            spawn_local(async move {
                let mut body = request.into_body();
                let first = body.data().await.unwrap().unwrap();
                assert!(!shut.get(), "{first:?} came before the window was open");
                assert_eq!(first, "hello");
                let (rest, trailers) = read(&mut body).await.unwrap();
                assert_eq!(rest, "");
                assert_eq!(trailers.unwrap()["checksum"], "5");
                ok(respond, "read");
            });
            loop {
                tokio::select! {
                    _ = connection.accept() => return,
                    () = heard.notified() => {
                        opened.set(false);
                        connection.set_initial_window_size(1024).unwrap();
                    }
                }
            }
        });
        let mut client = client(to(address)).await;
        ask(&mut client, get("/")).await.unwrap();
        let (response, mut sink) = client.send_request(post("/"), false).unwrap();
        sink.send_data("hello".into(), false).unwrap();
        let mut trailers = HeaderMap::new();
        trailers.insert("checksum", "5".parse().unwrap());
        sink.send_trailers(trailers).unwrap();
        // As many turns as everything that can move takes.
        for _ in 0..1000 {
            tokio::task::yield_now().await;
        }
        asked.notify_one();
        let mut body = response.await.unwrap().into_body();
        assert_eq!(read(&mut body).await.unwrap().0, "read");
    })
    .await;
}

/// The same for a request: the client is held back, and can go on.
#[tokio::test]
async fn a_server_that_does_not_read_holds_the_client_back() {
    const ALL: usize = 4 << 20;
    local(async {
        let go = Rc::new(tokio::sync::Notify::new());
        let told = go.clone();
        let (address, _) = server(move |request, respond| {
            let told = told.clone();
            async move {
                told.notified().await;
                let (bytes, _) = read(&mut request.into_body()).await.unwrap();
                assert_eq!(bytes.len(), ALL);
                ok(respond, "read");
            }
        })
        .await;
        let mut client = client(to(address)).await;
        let (response, mut sink) = client.send_request(post("/"), false).unwrap();
        let sent = Rc::new(Cell::new(0));
        let counting = sent.clone();
        spawn_local(async move {
            while counting.get() < ALL {
                counting.set(counting.get() + 8192);
                let end = counting.get() == ALL;
                send(&mut sink, Bytes::from(vec![1; 8192]), end)
                    .await
                    .unwrap();
            }
        });
        let mut before = usize::MAX;
        while before != sent.get() {
            before = sent.get();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(before < 1 << 20, "{before} bytes are on their way");
        go.notify_one();
        let (bytes, _) = read(&mut response.await.unwrap().into_body())
            .await
            .unwrap();
        assert_eq!(bytes, "read");
    })
    .await;
}

#[tokio::test]
async fn interim_responses_pass_in_order() {
    local(async {
        let (address, _) = server(|request, mut respond| async move {
            let hints = Response::builder()
                .status(103)
                .header("link", "</a>; rel=preload");
            respond.send_informational(hints.body(()).unwrap()).unwrap();
            let interim = Response::builder().status(100).body(()).unwrap();
            respond.send_informational(interim).unwrap();
            let (bytes, _) = read(&mut request.into_body()).await.unwrap();
            assert_eq!(bytes, "now");
            ok(respond, "done");
        })
        .await;
        let mut client = client(to(address)).await;
        let mut request = post("/");
        let expect = "100-continue".parse().unwrap();
        request.headers_mut().insert("expect", expect);
        let (mut response, mut sink) = client.send_request(request, false).unwrap();
        let mut seen = Vec::new();
        while seen.len() < 2 {
            let interim = poll_fn(|cx| response.poll_informational(cx)).await;
            let interim = interim.unwrap().unwrap();
            seen.push((
                interim.status().as_u16(),
                interim.headers().get("link").cloned(),
            ));
        }
        assert_eq!((seen[0].0, seen[1].0), (103, 100));
        assert_eq!(seen[0].1.as_ref().unwrap(), "</a>; rel=preload");
        sink.send_data("now".into(), true).unwrap();
        assert_eq!(response.await.unwrap().status(), 200);
    })
    .await;
}

#[tokio::test]
async fn an_early_response_ends_a_request_without_error() {
    local(async {
        let (address, _) = server(|_request, respond| async move { ok(respond, "enough") }).await;
        let mut client = client(to(address)).await;
        let (response, mut sink) = client.send_request(post("/"), false).unwrap();
        sink.send_data("first".into(), false).unwrap();
        let mut body = response.await.unwrap().into_body();
        assert_eq!(read(&mut body).await.unwrap().0, "enough");
        let reason = poll_fn(|cx| sink.poll_reset(cx)).await.unwrap();
        assert_eq!(reason, h2::Reason::NO_ERROR);
    })
    .await;
}

#[tokio::test]
async fn extended_connect_passes() {
    local(async {
        let (address, _) = server(|request, mut respond| async move {
            let protocol = request.extensions().get::<h2::ext::Protocol>().unwrap();
            assert_eq!(protocol.as_str(), "websocket");
            assert_eq!(request.method(), Method::CONNECT);
            assert_eq!(request.uri().path(), "/chat");
            let mut sink = respond.send_response(Response::new(()), false).unwrap();
            let mut body = request.into_body();
            let data = body.data().await.unwrap().unwrap();
            sink.send_data(data, true).unwrap();
        })
        .await;
        let mut client = client(to(address)).await;
        while !client.is_extended_connect_protocol_enabled() {
            tokio::task::yield_now().await;
        }
        let mut request = get("/chat");
        *request.method_mut() = Method::CONNECT;
        let protocol = h2::ext::Protocol::from("websocket");
        request.extensions_mut().insert(protocol);
        let (response, mut sink) = client.send_request(request, false).unwrap();
        let mut body = response.await.unwrap().into_body();
        sink.send_data("ping".into(), false).unwrap();
        assert_eq!(body.data().await.unwrap().unwrap(), "ping");
    })
    .await;
}

#[tokio::test]
async fn a_request_without_authority_passes_with_its_host() {
    local(async {
        let (address, _) = server(|request, respond| async move {
            assert_eq!(request.uri().authority(), None);
            assert_eq!(request.uri().path(), "/x");
            assert_eq!(request.headers()["host"], "cart");
            ok(respond, "yes");
        })
        .await;
        let mut client = client(to(address)).await;
        let request = Request::get("/x")
            .version(Version::HTTP_11)
            .header("host", "cart");
        let (response, _) = ask(&mut client, request.body(()).unwrap()).await.unwrap();
        assert_eq!(response.body(), "yes");
    })
    .await;
}

/// DATA arrives as it is sent, not when it is convenient.
#[tokio::test]
async fn nothing_waits_for_more() {
    local(async {
        let (address, _) = server(|_request, mut respond| async move {
            let mut sink = respond.send_response(Response::new(()), false).unwrap();
            sink.send_data("event".into(), false).unwrap();
            std::future::pending::<()>().await;
        })
        .await;
        let mut client = client(to(address)).await;
        let (response, _) = client.send_request(get("/events"), true).unwrap();
        let mut body = response.await.unwrap().into_body();
        assert_eq!(body.data().await.unwrap().unwrap(), "event");
        let more = poll_fn(|cx| Poll::Ready(body.poll_data(cx))).await;
        assert!(more.is_pending());
    })
    .await;
}
