//! Connections: shared, replaced, drained, and the hop between two proxies.

use std::time::Instant;

use h2::Reason;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::frames::{GOAWAY, HEADERS, PREFACE, SETTINGS, frame, next};
use super::*;
use crate::identity::testing::{Authority, shop};
use crate::inbound;
use crate::tables::BackendPolicy;

#[tokio::test]
async fn streams_share_connections() {
    local(async {
        let server = Held::start().await;
        let mut client = client(to(server.address)).await;
        let mut asked = Vec::new();
        for n in [100, 150] {
            while asked.len() < n {
                client = client.ready().await.unwrap();
                asked.push(client.send_request(get("/"), true).unwrap().0);
            }
            server.has(n).await;
            assert_eq!(server.connections.get(), n.div_ceil(100), "{n} streams");
        }
        server.go.add_permits(asked.len());
        for response in asked {
            assert_eq!(response.await.unwrap().status(), 200);
        }
        assert_eq!(server.connections.get(), 2);
    })
    .await;
}

/// One connection is allowed: what does not fit waits for room.
#[tokio::test]
async fn a_limit_of_connections_makes_streams_wait() {
    local(async {
        let server = Held::start().await;
        let limited = BackendPolicy {
            max_connections: 1,
            ..BackendPolicy::default()
        };
        let backend = backend(vec![endpoint(server.address, None)], limited);
        let mut client = client(destination(backend, RoutePolicy::default())).await;
        let mut asked = Vec::new();
        for _ in 0..250 {
            client = client.ready().await.unwrap();
            asked.push(client.send_request(get("/"), true).unwrap().0);
        }
        server.has(100).await;
        rounds().await;
        assert_eq!(*server.asked.borrow(), 100, "no more fit on one connection");
        server.go.add_permits(asked.len());
        for response in asked {
            assert_eq!(response.await.unwrap().status(), 200);
        }
        assert_eq!(server.connections.get(), 1);
    })
    .await;
}

/// The first connection says goodbye when it has the request; the second takes it.
#[tokio::test]
async fn a_goaway_below_the_stream_leads_to_another_connection() {
    local(async {
        let (listener, address) = listen().await;
        spawn_local(async move {
            let (mut tcp, _) = listener.accept().await.unwrap();
            let mut preface = [0; PREFACE.len()];
            tcp.read_exact(&mut preface).await.unwrap();
            tcp.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
            while next(&mut tcp).await.unwrap().kind != HEADERS {}
            let goaway = frame(GOAWAY, 0, 0, &[0; 8]);
            tcp.write_all(&goaway).await.unwrap();
            let (second, _) = listener.accept().await.unwrap();
            let mut connection = h2::server::handshake(second).await.unwrap();
            while let Some(Ok((request, respond))) = connection.accept().await {
                spawn_local(async move {
                    let (bytes, _) = read(&mut request.into_body()).await.unwrap();
                    assert_eq!(bytes, "once");
                    ok(respond, "second");
                });
            }
        });
        let mut client = client(to(address)).await;
        let (response, mut sink) = client.send_request(grpc("/s/m"), false).unwrap();
        sink.send_data("once".into(), true).unwrap();
        let mut body = response.await.unwrap().into_body();
        assert_eq!(read(&mut body).await.unwrap().0, "second");
    })
    .await;
}

#[tokio::test]
async fn draining_says_goaway_and_finishes_what_runs() {
    local(async {
        let server = Held::start().await;
        let worker = worker(None);
        let (ours, theirs) = tcp_pair().await;
        let flow = outbound(to(server.address));
        let serving = spawn_local(serve(worker.clone(), Stream::from(theirs), flow));
        let (mut client, connection) = h2::client::handshake(ours).await.unwrap();
        let connection = spawn_local(connection);
        let (response, _) = client.send_request(get("/"), true).unwrap();
        server.has(1).await;
        worker.drain.begin();
        let refused = loop {
            match poll_fn(|cx| client.poll_ready(cx)).await {
                Ok(()) => tokio::task::yield_now().await,
                Err(error) => break error,
            }
        };
        assert!(refused.is_go_away());
        assert_eq!(refused.reason(), Some(Reason::NO_ERROR));
        assert!(!serving.is_finished());
        server.go.add_permits(1);
        let mut body = response.await.unwrap().into_body();
        assert_eq!(read(&mut body).await.unwrap().0, "yes");
        serving.await.unwrap();
        connection.await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test]
async fn the_end_of_draining_cuts_what_still_runs() {
    local(async {
        let server = Held::start().await;
        let worker = worker(None);
        let mut client = client_of(&worker, to(server.address)).await;
        let (response, _) = client.send_request(get("/"), true).unwrap();
        server.has(1).await;
        worker.drain.begin();
        worker.drain.end();
        assert!(response.await.is_err());
    })
    .await;
}

/// The server is gone in the middle: its streams are reset, those of others go on.
#[tokio::test]
async fn a_lost_connection_ends_its_streams_alone() {
    local(async {
        let (listener, dying) = listen().await;
        let kill = Rc::new(tokio::sync::Notify::new());
        let killed = kill.clone();
        spawn_local(async move {
            let (tcp, _) = listener.accept().await.unwrap();
            let mut connection = h2::server::handshake(tcp).await.unwrap();
            let (_, mut respond) = connection.accept().await.unwrap().unwrap();
            let mut sink = respond.send_response(Response::new(()), false).unwrap();
            sink.send_data("part".into(), false).unwrap();
            let _ = tokio::select! {
                _ = connection.accept() => true,
                () = killed.notified() => false,
            };
        });
        let go = Rc::new(tokio::sync::Notify::new());
        let told = go.clone();
        let (well, _) = server(move |_, mut respond| {
            let told = told.clone();
            async move {
                let mut sink = respond.send_response(Response::new(()), false).unwrap();
                told.notified().await;
                sink.send_data("well".into(), true).unwrap();
            }
        })
        .await;
        // One client, two routes.
        let route = |address, path: Option<&str>| {
            let one = to(address);
            let route = &one.routes[0];
            let matches = path.map(|path| crate::tables::RouteMatch {
                path: Some(crate::tables::PathMatch::Exact(path.into())),
                ..crate::tables::RouteMatch::default()
            });
            let backend = route.backends[0].backend.clone().unwrap();
            std::sync::Arc::new(crate::tables::Route {
                matches: matches.into_iter().collect(),
                ..crate::tables::Route::simple("cart", backend, RoutePolicy::default())
            })
        };
        let routes = vec![route(dying, Some("/dying")), route(well, None)];
        let destination = std::sync::Arc::new(Destination {
            id: 1,
            namespace: "shop".into(),
            service: "cart".into(),
            port: 80,
            protocol: crate::tables::Protocol::Auto,
            index: crate::http::route::Index::new(&routes),
            routes,
            opaque: Vec::new(),
            fed: false,
            prohibited: false,
            provenance: None,
        });
        let mut client = client(destination).await;
        let (dying, _) = client.send_request(get("/dying"), true).unwrap();
        let (well, _) = client.send_request(get("/"), true).unwrap();
        let mut dying = dying.await.unwrap().into_body();
        let mut well = well.await.unwrap().into_body();
        assert_eq!(dying.data().await.unwrap().unwrap(), "part");
        kill.notify_one();
        let error = dying.data().await.unwrap().unwrap_err();
        assert_eq!(error.reason(), Some(Reason::INTERNAL_ERROR));
        go.notify_one();
        assert_eq!(read(&mut well).await.unwrap().0, "well");
    })
    .await;
}

/// Lost before it answered: told as an error of the proxy's, or as gRPC has it.
#[tokio::test]
async fn a_connection_lost_before_the_answer_is_unavailable() {
    local(async {
        let (listener, address) = listen().await;
        spawn_local(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let mut connection = h2::server::handshake(tcp).await.unwrap();
                let _ = connection.accept().await;
            }
        });
        let mut client = client(to(address)).await;
        let (response, _) = ask(&mut client, post("/")).await.unwrap();
        assert_eq!(response.status(), 503);
        let status = response.headers()["proxy-status"].to_str().unwrap();
        assert!(status.contains("connection_terminated"), "{status}");
        let (response, _) = ask(&mut client, grpc("/")).await.unwrap();
        assert_eq!(response.headers()["grpc-status"], "14");
    })
    .await;
}

/// Client → proxy → mutual TLS → proxy → application.
#[tokio::test]
async fn two_proxies_carry_streams_over_mutual_tls() {
    local(async {
        let authority = Authority::new("root", 1);
        let web = worker(Some(authority.credentials(&shop("web"), &[&authority])));
        let cart = worker(Some(authority.credentials(&shop("cart"), &[&authority])));
        let hangs = Rc::new(tokio::sync::Notify::new());
        let hanging = hangs.clone();
        let (app, connections) = server(move |request, mut respond| {
            let hanging = hanging.clone();
            async move {
                match request.uri().path() {
                    "/reset" => return respond.send_reset(Reason::ENHANCE_YOUR_CALM),
                    "/hang" => {
                        hanging.notify_one();
                        return std::future::pending().await;
                    }
                    _ => {}
                }
                let (bytes, trailers) = read(&mut request.into_body()).await.unwrap();
                let mut sink = respond.send_response(Response::new(()), false).unwrap();
                send(&mut sink, bytes, false).await.unwrap();
                sink.send_trailers(trailers.unwrap_or_default()).unwrap();
            }
        })
        .await;
        let (listener, address) = listen().await;
        let inbound_worker = cart.clone();
        let accepted = Rc::new(Cell::new(0));
        let count = accepted.clone();
        spawn_local(async move {
            while let Ok((tcp, peer)) = listener.accept().await {
                count.set(count.get() + 1);
                spawn_local(inbound::handle(inbound_worker.clone(), tcp, peer, app));
            }
        });
        let meshed = backend(
            vec![endpoint(address, Some(&shop("cart")))],
            BackendPolicy::default(),
        );
        let mut client = client_of(&web, destination(meshed, RoutePolicy::default())).await;
        let data = Bytes::from(vec![5; 3 << 20]);
        let (response, mut sink) = client.send_request(post("/"), false).unwrap();
        let sent = data.clone();
        spawn_local(async move {
            send(&mut sink, sent, false).await.unwrap();
            let mut trailers = HeaderMap::new();
            trailers.insert("x", "y".parse().unwrap());
            sink.send_trailers(trailers).unwrap();
        });
        let mut body = response.await.unwrap().into_body();
        let (echoed, trailers) = read(&mut body).await.unwrap();
        assert!(echoed == data);
        assert_eq!(trailers.unwrap()["x"], "y");
        let error = ask(&mut client, get("/reset")).await.unwrap_err();
        assert_eq!(error.reason(), Some(Reason::ENHANCE_YOUR_CALM));
        assert_eq!(connections.get(), 1);

        // The proxy behind goes away politely: what runs goes on, what comes finds no proxy.
        let (hanging, _) = client.send_request(get("/hang"), true).unwrap();
        hangs.notified().await;
        assert_eq!(accepted.get(), 1);
        cart.drain.begin();
        // A new connection is taken in this test, because its listener is still there.
        while accepted.get() < 2 {
            let (again, _) = ask(&mut client, post("/")).await.unwrap();
            assert_eq!(again.status(), 200);
        }
        cart.drain.end();
        let answered = hanging.await.unwrap();
        assert_eq!(answered.status(), 503);
    })
    .await;
}

#[tokio::test]
async fn an_application_that_is_lost_behind_the_other_proxy_is_unavailable() {
    local(async {
        let authority = Authority::new("root", 1);
        let web = worker(Some(authority.credentials(&shop("web"), &[&authority])));
        let cart = worker(Some(authority.credentials(&shop("cart"), &[&authority])));
        let (application, app) = listen().await;
        spawn_local(async move {
            while let Ok((tcp, _)) = application.accept().await {
                let mut connection = h2::server::handshake(tcp).await.unwrap();
                let _ = connection.accept().await;
            }
        });
        let (listener, address) = listen().await;
        spawn_local(async move {
            while let Ok((tcp, peer)) = listener.accept().await {
                spawn_local(inbound::handle(cart.clone(), tcp, peer, app));
            }
        });
        let meshed = backend(
            vec![endpoint(address, Some(&shop("cart")))],
            BackendPolicy::default(),
        );
        let mut client = client_of(&web, destination(meshed, RoutePolicy::default())).await;
        let (response, _) = ask(&mut client, post("/")).await.unwrap();
        assert_eq!(response.status(), 503);
        let status = response.headers()["proxy-status"].to_str().unwrap();
        assert!(status.contains("connection_terminated"), "{status}");
    })
    .await;
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_a_busy_one_is_not() {
    local(async {
        let go = Rc::new(Semaphore::new(0));
        let (asked, opened, closed) = (
            watch::Sender::new(0),
            Rc::new(Cell::new(0)),
            Rc::new(Cell::new(0)),
        );
        let (listener, address) = listen().await;
        let (going, asking, opening, closing) =
            (go.clone(), asked.clone(), opened.clone(), closed.clone());
        spawn_local(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                opening.set(opening.get() + 1);
                let (going, asking, closing) = (going.clone(), asking.clone(), closing.clone());
                spawn_local(async move {
                    let mut connection = h2::server::handshake(tcp).await.unwrap();
                    while let Some(Ok((_, respond))) = connection.accept().await {
                        asking.send_modify(|asked| *asked += 1);
                        let going = going.clone();
                        spawn_local(async move {
                            going.acquire().await.unwrap().forget();
                            ok(respond, "yes");
                        });
                    }
                    closing.set(closing.get() + 1);
                });
            }
        });
        let worker = worker(None);
        let backend = backend(vec![endpoint(address, None)], BackendPolicy::default());
        let balancer = worker.balancer(&backend);
        let mut client = client_of(&worker, destination(backend, RoutePolicy::default())).await;
        let sweep = |after| {
            let now = Instant::now();
            balancer.for_each(now, |endpoint| endpoint.pool.http2.sweep(now + after));
        };
        let (response, _) = client.send_request(get("/"), true).unwrap();
        let mut first = asked.subscribe();
        first.wait_for(|asked| *asked > 0).await.unwrap();
        sweep(Duration::from_secs(3600));
        // From here on answers come at once.
        go.add_permits(3);
        assert_eq!(response.await.unwrap().status(), 200);
        ask(&mut client, get("/")).await.unwrap();
        assert_eq!(opened.get(), 1, "a stream was on it");
        rounds().await;
        sweep(Duration::from_secs(59));
        ask(&mut client, get("/")).await.unwrap();
        assert_eq!(opened.get(), 1, "it was not idle for long enough");
        assert_eq!(closed.get(), 0);
        while closed.get() == 0 {
            sweep(Duration::from_secs(61));
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// A path that swallows everything: the ping is not answered, and the streams learn of it.
#[tokio::test]
async fn a_connection_to_a_proxy_that_leads_nowhere_is_cut() {
    local(async {
        let authority = Authority::new("root", 1);
        let web = worker(Some(authority.credentials(&shop("web"), &[&authority])));
        let cart = worker(Some(authority.credentials(&shop("cart"), &[&authority])));
        let server = Held::start().await;
        let app = server.address;
        let (listener, proxy) = listen().await;
        spawn_local(async move {
            while let Ok((tcp, peer)) = listener.accept().await {
                spawn_local(inbound::handle(cart.clone(), tcp, peer, app));
            }
        });
        let (relay, address) = listen().await;
        let swallow = Rc::new(tokio::sync::Notify::new());
        let told = swallow.clone();
        spawn_local(async move {
            let (mut from, _) = relay.accept().await.unwrap();
            let mut to = TcpStream::connect(proxy).await.unwrap();
            tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut from, &mut to) => {}
                () = told.notified() => std::future::pending().await,
            }
        });
        let meshed = backend(
            vec![endpoint(address, Some(&shop("cart")))],
            BackendPolicy::default(),
        );
        let balancer = web.balancer(&meshed);
        let mut client = client_of(&web, destination(meshed, RoutePolicy::default())).await;
        let (mut response, _) = client.send_request(post("/"), true).unwrap();
        server.has(1).await;
        let sweep = || {
            let now = Instant::now();
            let later = now + Duration::from_secs(16);
            balancer.for_each(now, |endpoint| endpoint.pool.http2.sweep(later));
        };
        // The ping is answered: nothing happens.
        sweep();
        let waits = tokio::select! {
            biased;
            _ = &mut response => false,
            () = rounds() => true,
        };
        assert!(waits);
        swallow.notify_one();
        rounds().await;
        sweep();
        rounds().await;
        tokio::time::pause();
        assert_eq!(response.await.unwrap().status(), 503);
    })
    .await;
}
