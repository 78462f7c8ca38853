//! What could be read in two ways is refused; what is only old passes.

use super::*;

engine_test!(
    framing_conflicts_are_refused_with_400_and_reach_nobody,
    async {
        for bad in [
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
            "GET / HTTP/1.1\r\nHost : x\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        ] {
            let server = server(vec![]).await;
            let mut client = client(&server).await;
            say(&mut client, bad).await;
            let text = rest(&mut client).await.unwrap();
            assert!(
                text.starts_with("HTTP/1.1 400 Bad Request\r\n"),
                "{bad:?}: {text}"
            );
            assert!(server.heard.borrow().is_empty());
        }
    }
);

engine_test!(a_response_that_could_be_read_in_two_ways_is_a_502, async {
    let bad = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    let server = server(vec![vec![Until("\r\n\r\n"), Say(bad)]]).await;
    let mut client = client(&server).await;
    say(
        &mut client,
        "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    )
    .await;
    let text = rest(&mut client).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 502 Bad Gateway\r\n"), "{text}");
});

engine_test!(
    a_byte_of_the_proxies_means_nothing_from_an_application,
    async {
        let server = server(vec![vec![Until("\r\n\r\n"), Say(OK)]]).await;
        let mut client = client(&server).await;
        say(&mut client, &format!("\0{GET}")).await;
        assert!(rest(&mut client).await.unwrap().starts_with("HTTP/1.1 400"));
    }
);

engine_test!(
    old_ways_of_servers_pass_and_keep_the_connections_together,
    async {
        for response in [
            "HTTP/1.1 200 OK\r\nX: a\r\n  folded\r\nContent-Length: 2\r\n\r\nok",
            "HTTP/1.1 200 OK\r\nX : a\r\nContent-Length: 2\r\n\r\nok",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\nContent-Length: 2\r\n\r\nok",
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\ncontent-length: 2\r\n\r\nok",
            "HTTP/1.1 200 OK\r\nno field\r\nX[1]: 2\r\nContent-Length: 2\r\n\r\nok",
            "HTTP/1.1 200 OK\r\nX: \u{1}\u{7f}\r\nContent-Length: 2\r\n\r\nok",
            "HTTP/1.1  200  OK\r\nContent-Length: 2\r\n\r\nok",
            "\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\nok\n0\nT: 1\n\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
             00000000000000000002\r\nok\r\n0\r\n\r\n",
        ] {
            let server = server(vec![vec![
                Until("\r\n\r\n"),
                Say(response),
                Until("\r\n\r\n"),
                Say(response),
                Gone,
            ]])
            .await;
            let mut client = client(&server).await;
            for _ in 0..2 {
                say(&mut client, GET).await;
                hear(&mut client, response).await;
            }
            drop(client);
            gone(&server).await;
        }
    }
);

engine_test!(
    a_response_that_could_be_read_in_two_ways_shares_no_connection,
    async {
        let response = "HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 2\r\n\r\nok";
        let script = vec![Until("\r\n\r\n"), Say(response), Gone];
        let server = server(vec![script]).await;
        let (mut client, to_proxy) = tcp_pair().await;
        // Two endpoints: connections are pooled.
        let endpoints = (0..2).map(|_| endpoint(server.address, None)).collect();
        let backend = backend(endpoints, BackendPolicy::default());
        let flow = outbound(destination(backend, RoutePolicy::default()));
        spawn_local(serve(worker(None), Stream::from(to_proxy), flow));
        say(&mut client, GET).await;
        hear(&mut client, response).await;
        gone(&server).await;
    }
);

engine_test!(
    a_response_with_bare_line_feeds_keeps_its_connection,
    async {
        let response = "HTTP/1.1 200 OK\nContent-Length: 2\n\nok";
        let server = server(vec![vec![
            Until("\r\n\r\n"),
            Say(response),
            Until("\r\n\r\n"),
            Say(response),
        ]])
        .await;
        let mut client = client(&server).await;
        for _ in 0..2 {
            say(&mut client, GET).await;
            hear(&mut client, response).await;
        }
    }
);
