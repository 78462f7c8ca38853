//! Connections that stop being HTTP, or never were.

use super::*;

engine_test!(an_upgrade_becomes_a_tunnel_with_half_close, async {
    let head = "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: foo/2\r\n\r\n";
    let server = server(vec![vec![
        Until("\r\n\r\n"),
        Say("HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: foo/2\r\n\r\nhi"),
        Until("earlybye"),
        Say("last words"),
        Finish,
    ]])
    .await;
    let mut client = client(&server).await;
    say(&mut client, head).await;
    say(&mut client, "early").await;
    hear(
        &mut client,
        "HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: foo/2\r\n\r\nhi",
    )
    .await;
    say(&mut client, "bye").await;
    client.shutdown().await.unwrap();
    assert_eq!(rest(&mut client).await.unwrap(), "last words");
});

engine_test!(connect_becomes_a_tunnel, async {
    let server = server(vec![vec![
        Until("\r\n\r\n"),
        Say("HTTP/1.1 200 Connected\r\n\r\n"),
        Until("ping"),
        Say("pong"),
        Close,
    ]])
    .await;
    let mut client = client(&server).await;
    say(&mut client, "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n").await;
    hear(&mut client, "HTTP/1.1 200 Connected\r\n\r\n").await;
    say(&mut client, "ping").await;
    assert_eq!(rest(&mut client).await.unwrap(), "pong");
});

engine_test!(
    an_upgrade_needs_no_connection_option_and_source_streams_on,
    async {
        for (request, response) in [
            (
                "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: foo\r\n\r\n",
                "HTTP/1.1 101 Switching Protocols\r\nUpgrade: foo\r\n\r\n",
            ),
            ("SOURCE /radio HTTP/1.0\r\n\r\n", "HTTP/1.0 200 OK\r\n\r\n"),
        ] {
            let server = server(vec![vec![
                Until("\r\n\r\n"),
                Say(response),
                Until("audio"),
                Say("more"),
                Gone,
                Say("!"),
                Close,
            ]])
            .await;
            let mut client = client(&server).await;
            say(&mut client, request).await;
            hear(&mut client, response).await;
            say(&mut client, "audio").await;
            hear(&mut client, "more").await;
            client.shutdown().await.unwrap();
            assert_eq!(rest(&mut client).await.unwrap(), "!");
        }
    }
);

engine_test!(
    after_an_answer_that_is_no_http_the_connection_is_theirs,
    async {
        let server = server(vec![vec![
            Until("\r\n\r\n"),
            Say("RTSP/1.0 200 OK\r\n\r\n"),
            Until("PLAY\r\n"),
            Say("audio"),
            Gone,
            Say("!"),
            Close,
        ]])
        .await;
        let mut client = client(&server).await;
        say(&mut client, GET).await;
        hear(&mut client, "RTSP/1.0 200 OK\r\n\r\n").await;
        say(&mut client, "PLAY\r\n").await;
        hear(&mut client, "audio").await;
        client.shutdown().await.unwrap();
        assert_eq!(rest(&mut client).await.unwrap(), "!");
    }
);

engine_test!(what_is_no_http_response_passes_until_the_end, async {
    for response in [
        "ICY 200 OK\r\nicy-name: x\r\n\r\naudio",
        "<html>HTTP/0.9</html>",
        "HTTP/1.2 200 OK\r\nContent-Length: 2\r\n\r\nok",
        "HTTP/1.1 2000 OK\r\n\r\n",
    ] {
        let server = server(vec![vec![Until("\r\n\r\n"), Say(response), Close]]).await;
        let mut client = client(&server).await;
        say(&mut client, "GET / HTTP/1.0\r\n\r\n").await;
        assert_eq!(rest(&mut client).await.unwrap(), response);
    }
});
