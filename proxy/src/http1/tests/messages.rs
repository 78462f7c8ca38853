//! What a message says passes as it is, and at once.

use super::*;

engine_test!(messages_pass_byte_for_byte, async {
    let request = "GET /a/../b%2f?q=%zz HTTP/1.1\r\nhOST: x\r\nX-A:  1\r\nx-a: 2 \r\n\r\n";
    let response = "HTTP/1.1 200 Fine By Me\r\nX-B: 1\r\nx-b:2\r\nContent-Length: 5\r\n\r\nhello";
    let server = server(vec![vec![
        Until("\r\n\r\n"),
        Say(response),
        Until("\r\n\r\n"),
        Say(response),
    ]])
    .await;
    let mut client = client(&server).await;
    for _ in 0..2 {
        say(&mut client, request).await;
        hear(&mut client, response).await;
    }
    assert_eq!(*server.heard.borrow(), [[request, request].concat()]);
});

engine_test!(pipelined_requests_are_answered_in_order, async {
    let one = "GET /1 HTTP/1.1\r\nHost: x\r\n\r\n";
    let two = "POST /2 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc";
    let three = "GET /3 HTTP/1.1\r\nHost: x\r\n\r\n";
    let server = server(vec![vec![
        Until("/1 HTTP/1.1\r\nHost: x\r\n\r\n"),
        Say("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1"),
        Until("abc"),
        Say("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n2"),
        Until("/3 HTTP/1.1\r\nHost: x\r\n\r\n"),
        Say("HTTP/1.1 204 No\r\n\r\n"),
    ]])
    .await;
    let mut client = client(&server).await;
    say(&mut client, &[one, two, three].concat()).await;
    hear(
        &mut client,
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n2HTTP/1.1 204 No\r\n\r\n",
    )
    .await;
});

engine_test!(chunks_and_trailers_pass_both_ways, async {
    let request = "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3;e=1\r\nabc\r\n0\r\nT: 1\r\n\r\n";
    let response = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: S\r\n\r\n2\r\nhi\r\n0\r\nS: ok\r\n\r\n";
    let server = server(vec![vec![Until("T: 1\r\n\r\n"), Say(response)]]).await;
    let mut client = client(&server).await;
    say(&mut client, request).await;
    hear(&mut client, response).await;
    assert_eq!(server.heard.borrow()[0], request);
});

engine_test!(
    interim_responses_pass_and_the_server_itself_says_continue,
    async {
        let head =
            "POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n";
        let server = server(vec![vec![
            Until("\r\n\r\n"),
            Say("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"),
            Say("HTTP/1.1 100 Continue\r\n\r\n"),
            Until("ok"),
            Say("HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n"),
        ]])
        .await;
        let mut client = client(&server).await;
        say(&mut client, head).await;
        hear(
            &mut client,
            "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n",
        )
        .await;
        say(&mut client, "ok").await;
        hear(
            &mut client,
            "HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n",
        )
        .await;
    }
);

engine_test!(
    a_head_response_has_no_body_whatever_its_length_says,
    async {
        let server = server(vec![vec![
            Until("\r\n\r\n"),
            Say("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"),
            Until("\r\n\r\n"),
            Say("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx"),
        ]])
        .await;
        let mut client = client(&server).await;
        say(&mut client, "HEAD / HTTP/1.1\r\nHost: x\r\n\r\n").await;
        hear(
            &mut client,
            "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n",
        )
        .await;
        say(&mut client, "GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
        hear(&mut client, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx").await;
    }
);

engine_test!(
    an_early_response_is_passed_while_the_request_goes_on,
    async {
        let server = server(vec![vec![
            Until("\r\n\r\n"),
            Say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"),
            Say("ok"),
            Until("0123456789"),
        ]])
        .await;
        let mut client = client(&server).await;
        say(
            &mut client,
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n",
        )
        .await;
        hear(
            &mut client,
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        )
        .await;
        say(&mut client, "0123456789").await;
        server.hears("0123456789").await;
    }
);

engine_test!(events_pass_at_once, async {
    let server = server(vec![vec![
        Until("\r\n\r\n"),
        Say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        Say("3\r\none\r\n"),
        // The second only after the client has the first.
        Until("more"),
        Say("3\r\ntwo\r\n0\r\n\r\n"),
    ]])
    .await;
    let mut client = client(&server).await;
    say(
        &mut client,
        "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
    )
    .await;
    hear(
        &mut client,
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n",
    )
    .await;
    say(&mut client, "4\r\nmore").await;
    hear(&mut client, "3\r\ntwo\r\n0\r\n\r\n").await;
});

engine_test!(folded_lines_of_requests_arrive_unfolded, async {
    let request = "GET / HTTP/1.1\r\nHost: x\r\nA: 1\r\n 2\r\n\t3\r\nB: 4\n 5\r\n\r\n";
    let unfolded = "GET / HTTP/1.1\r\nHost: x\r\nA: 1   2  \t3\r\nB: 4  5\r\n\r\n";
    for cut in [request.len(), 34, 37, 50] {
        let server = server(vec![vec![Until("\r\n\r\n"), Say(OK)]]).await;
        let mut client = client(&server).await;
        say(&mut client, &request[..cut]).await;
        rounds().await;
        say(&mut client, &request[cut..]).await;
        hear(&mut client, OK).await;
        assert_eq!(*server.heard.borrow(), [unfolded]);
    }
});

engine_test!(heads_of_a_megabyte_and_thousands_of_fields_pass, async {
    let long = "x".repeat(crate::http1::head::MAX_HEAD - 100);
    let many: String = (0..8000).map(|n| format!("X-{n}: {n}\r\n")).collect();
    for fields in [format!("X: {long}\r\n"), many] {
        let request = format!("GET / HTTP/1.1\r\nHost: x\r\n{fields}\r\n");
        let response: &'static str =
            format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n{fields}\r\nok").leak();
        let server = server(vec![vec![Until("\r\n\r\n"), Say(response)]]).await;
        let (mut read, mut write) = client(&server).await.into_split();
        let writing = spawn_local(async move {
            write.write_all(request.as_bytes()).await.unwrap();
            (write, request)
        });
        let mut got = vec![0; response.len()];
        read.read_exact(&mut got).await.unwrap();
        assert!(got == response.as_bytes());
        let (_write, request) = writing.await.unwrap();
        assert!(server.heard.borrow()[0] == request);
    }
});
