//! How a connection ends is passed on, and none is kept that has ended.

use super::*;

engine_test!(
    http_1_0_without_host_and_a_body_that_ends_with_the_connection,
    async {
        let server = server(vec![vec![
            Until("\r\n\r\n"),
            Say("HTTP/1.0 200 OK\r\n\r\nall of it"),
            Close,
        ]])
        .await;
        let mut client = client(&server).await;
        say(&mut client, "GET / HTTP/1.0\r\n\r\n").await;
        assert_eq!(
            rest(&mut client).await.unwrap(),
            "HTTP/1.0 200 OK\r\n\r\nall of it"
        );
    }
);

engine_test!(a_body_cut_off_is_cut_off, async {
    let text = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf";
    let server = server(vec![vec![Until("\r\n\r\n"), Say(text), Close]]).await;
    let mut client = client(&server).await;
    say(&mut client, "GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(rest(&mut client).await.unwrap(), text);
});

engine_test!(a_reset_is_a_reset, async {
    let server = server(vec![vec![Until("\r\n\r\n"), Reset]]).await;
    let mut client = client(&server).await;
    say(&mut client, "POST / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(rest(&mut client).await.is_err());
});

engine_test!(a_refused_connection_is_a_503_that_says_why, async {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let nobody = Server::at(listener.local_addr().unwrap());
    drop(listener);
    let mut client = client(&nobody).await;
    say(
        &mut client,
        "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    )
    .await;
    let text = rest(&mut client).await.unwrap();
    assert!(
        text.starts_with("HTTP/1.1 503 Service Unavailable\r\n"),
        "{text}"
    );
    assert!(
        text.contains("proxy-status: weft; error=connection_refused"),
        "{text}"
    );
    assert!(
        text.contains(&format!("{} refused the connection", nobody.address)),
        "{text}"
    );
});

engine_test!(a_dead_pooled_connection_is_replaced_for_a_get, async {
    let ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    let server = server(vec![
        // Reads the second request and closes: the proxy cannot know before.
        vec![Until("\r\n\r\n"), Say(ok), Until("\r\n\r\n"), Close],
        vec![Until("\r\n\r\n"), Say(ok)],
    ])
    .await;
    let mut client = client(&server).await;
    for _ in 0..2 {
        say(&mut client, "GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
        hear(&mut client, ok).await;
    }
    assert_eq!(server.heard.borrow().len(), 2);
});

engine_test!(a_post_is_not_sent_twice, async {
    let ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    let server = server(vec![
        vec![Until("\r\n\r\n"), Say(ok), Until("abc"), Close],
        vec![Until("abc"), Say(ok)],
    ])
    .await;
    let mut client = client(&server).await;
    say(&mut client, "GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    hear(&mut client, ok).await;
    say(
        &mut client,
        "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
    )
    .await;
    assert_eq!(rest(&mut client).await.unwrap(), "");
    assert_eq!(server.heard.borrow().len(), 1);
});

engine_test!(
    a_server_that_closes_an_idle_connection_closes_the_clients,
    async {
        let server = server(vec![vec![Until("\r\n\r\n"), Say(OK), Close]]).await;
        let mut client = client(&server).await;
        say(&mut client, GET).await;
        hear(&mut client, OK).await;
        assert_eq!(rest(&mut client).await.unwrap(), "");
    }
);

engine_test!(a_client_that_leaves_frees_its_servers_connection, async {
    let server = server(vec![vec![Until("\r\n\r\n"), Say(OK), Gone]]).await;
    let mut client = client(&server).await;
    say(&mut client, GET).await;
    hear(&mut client, OK).await;
    drop(client);
    gone(&server).await;
});

engine_test!(
    what_a_server_says_before_it_closes_an_idle_connection_passes,
    async {
        let last = "HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n\r\n";
        let server = server(vec![vec![Until("\r\n\r\n"), Say(OK), Go, Say(last), Close]]).await;
        let mut client = client(&server).await;
        say(&mut client, GET).await;
        hear(&mut client, OK).await;
        server.go.notify_one();
        assert_eq!(rest(&mut client).await.unwrap(), last);
    }
);

engine_test!(
    a_half_close_behind_pipelined_requests_reaches_one_connection,
    async {
        let server = server(vec![vec![
            Until("\r\n\r\n"),
            Say(OK),
            Until("\r\n\r\n"),
            Say(OK),
            Until("\r\n\r\n"),
            Gone,
            Say(OK),
            Close,
        ]])
        .await;
        let mut client = client(&server).await;
        say(&mut client, &GET.repeat(3)).await;
        client.shutdown().await.unwrap();
        assert_eq!(rest(&mut client).await.unwrap(), OK.repeat(3));
        assert_eq!(*server.heard.borrow(), [format!("{}<gone>", GET.repeat(3))]);
    }
);

engine_test!(
    a_server_that_closes_without_an_answer_is_an_end_and_no_reset,
    async {
        for response in [
            "",
            "HTTP/1.1 103 Early Hints\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Le",
        ] {
            let server = server(vec![vec![Until("\r\n\r\n"), Say(response), Close]]).await;
            let mut client = client(&server).await;
            say(&mut client, GET).await;
            assert_eq!(rest(&mut client).await.unwrap(), response);
        }
    }
);

engine_test!(a_proxy_is_told_how_the_application_ended, async {
    for (script, answer, told) in [
        (vec![Until("\r\n\r\n"), Close], "", "\u{3}"),
        (vec![Until("\r\n\r\n"), Say(OK), Close], OK, "\u{1}"),
        (vec![Until("\r\n\r\n"), Say(OK), Go, Reset], OK, "\u{2}"),
    ] {
        let server = server(vec![script]).await;
        let mut client = proxy(&server).await;
        say(&mut client, GET).await;
        hear(&mut client, answer).await;
        server.go.notify_one();
        assert_eq!(rest(&mut client).await.unwrap(), told);
    }
});

engine_test!(
    a_proxys_client_that_leaves_frees_the_applications_connection,
    async {
        let server = server(vec![
            vec![Until("\r\n\r\n"), Say(OK), Gone],
            vec![Until("\r\n\r\n"), Say(OK)],
        ])
        .await;
        let mut client = proxy(&server).await;
        say(&mut client, GET).await;
        hear(&mut client, OK).await;
        say(&mut client, "\0").await;
        gone(&server).await;
        say(&mut client, GET).await;
        hear(&mut client, OK).await;
        assert_eq!(server.heard.borrow().len(), 2);
    }
);

engine_test!(
    a_reset_within_a_head_comes_after_what_there_is_of_it,
    async {
        let begun = "HTTP/1.1 200 OK\r\nContent-Le";
        let script = vec![Until("\r\n\r\n"), Say(begun), Reset];
        let server = server(vec![script]).await;
        let mut client = client(&server).await;
        say(&mut client, GET).await;
        hear(&mut client, begun).await;
        assert!(rest(&mut client).await.is_err());
    }
);

engine_test!(a_server_that_cuts_its_response_off_sees_an_end, async {
    for response in [
        "HTTP/1.1 200 OK\r\nContent-Le",
        "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Server::at(listener.local_addr().unwrap());
        let mut client = client(&server).await;
        say(&mut client, GET).await;
        let (mut server, _) = listener.accept().await.unwrap();
        server.read_exact(&mut [0; GET.len()]).await.unwrap();
        server.write_all(response.as_bytes()).await.unwrap();
        server.shutdown().await.unwrap();
        // An error would be a reset.
        assert_eq!(server.read(&mut [0; 9]).await.unwrap(), 0);
        assert_eq!(rest(&mut client).await.unwrap(), response);
    }
});
