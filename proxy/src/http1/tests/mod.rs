//! The engine between a scripted client and a scripted server, over real sockets.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{LocalSet, spawn_local};

use super::serve;
use crate::http::flow::Flow;
use crate::tables::{BackendPolicy, Destination, RoutePolicy};
use crate::testing::{backend, destination, endpoint, inbound, outbound, worker};
use crate::transport::Stream;
use crate::transport::testing::tcp_pair;

/// What a server does on one connection, in order.
#[derive(Clone)]
enum Do {
    /// Reads until the bytes seen since the last reply end so, then goes on.
    Until(&'static str),
    Say(&'static str),
    Close,
    Reset,
    /// Half-closes and reads on to the end.
    Finish,
    /// Waits for the client's end.
    Gone,
    /// Until the proxy has done what it can.
    Pause,
}
use Do::*;

/// A server whose n-th connection follows the n-th script; what each read is kept.
struct Server {
    address: std::net::SocketAddr,
    heard: Rc<RefCell<Vec<String>>>,
}

async fn server(scripts: Vec<Vec<Do>>) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let heard = Rc::new(RefCell::new(Vec::new()));
    let all = heard.clone();
    spawn_local(async move {
        for (n, script) in scripts.into_iter().enumerate() {
            let (stream, _) = listener.accept().await.unwrap();
            all.borrow_mut().push(String::new());
            spawn_local(follow(stream, script, all.clone(), n));
        }
    });
    Server { address, heard }
}

async fn follow(mut stream: TcpStream, script: Vec<Do>, heard: Rc<RefCell<Vec<String>>>, n: usize) {
    let mut since = String::new();
    let mut buf = [0; 4096];
    for step in script {
        match step {
            Until(end) => {
                while !since.ends_with(end) {
                    let got = stream.read(&mut buf).await.unwrap();
                    assert!(got > 0, "the proxy closed early; heard {since:?}");
                    let text = std::str::from_utf8(&buf[..got]).unwrap();
                    since.push_str(text);
                    heard.borrow_mut()[n].push_str(text);
                }
                since.clear();
            }
            Say(text) => stream.write_all(text.as_bytes()).await.unwrap(),
            Close => return,
            Reset => {
                socket2::SockRef::from(&stream)
                    .set_linger(Some(Duration::ZERO))
                    .unwrap();
                return;
            }
            Gone => {
                while stream.read(&mut buf).await.unwrap_or(0) > 0 {}
                heard.borrow_mut()[n].push_str("<gone>");
            }
            Pause => tokio::time::sleep(Duration::from_millis(30)).await,
            Finish => {
                stream.shutdown().await.unwrap();
                while stream.read(&mut buf).await.unwrap_or(0) > 0 {}
                return;
            }
        }
    }
    // Keeps the connection open until the proxy closes it.
    while stream.read(&mut buf).await.unwrap_or(0) > 0 {}
}

/// A client connected to the engine, which sends to `server`.
async fn client(server: &Server) -> TcpStream {
    connected(server, outbound).await
}

/// The same for a client that is a proxy of the mesh.
async fn proxy(server: &Server) -> TcpStream {
    connected(server, inbound).await
}

async fn connected(server: &Server, flow: fn(Arc<Destination>) -> Rc<Flow>) -> TcpStream {
    let (client, proxy) = tcp_pair().await;
    let backend = backend(
        vec![endpoint(server.address, None)],
        BackendPolicy::default(),
    );
    let flow = flow(destination(backend, RoutePolicy::default()));
    let worker = worker(None);
    spawn_local(serve(worker, Stream::from(proxy), flow));
    client
}

/// Waits until the server's first connection has been ended by the proxy.
async fn gone(server: &Server) {
    tokio::time::timeout(Duration::from_secs(10), async {
        while !server.heard.borrow()[0].ends_with("<gone>") {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .expect("the server's connection is still open");
}

async fn say(client: &mut TcpStream, text: &str) {
    client.write_all(text.as_bytes()).await.unwrap();
}

async fn hear(client: &mut TcpStream, expected: &str) {
    let mut got = vec![0; expected.len()];
    let read = tokio::time::timeout(Duration::from_secs(10), async {
        let mut at = 0;
        while at < got.len() {
            match client.read(&mut got[at..]).await.unwrap() {
                0 => break,
                n => at += n,
            }
        }
        at
    })
    .await;
    let at = read.expect("the response is not there in time");
    assert_eq!(String::from_utf8_lossy(&got[..at]), expected);
}

/// The rest until the end; a reset is an error.
async fn rest(client: &mut TcpStream) -> std::io::Result<String> {
    let mut text = Vec::new();
    let read = client.read_to_end(&mut text);
    tokio::time::timeout(Duration::from_secs(10), read)
        .await
        .expect("the connection does not end")?;
    Ok(String::from_utf8(text).unwrap())
}

macro_rules! engine_test {
    ($(#[$doc:meta])* $name:ident, $body:expr) => {
        $(#[$doc])*
        #[tokio::test]
        async fn $name() {
            LocalSet::new().run_until($body).await;
        }
    };
}

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
        tokio::time::timeout(Duration::from_secs(5), async {
            while !server.heard.borrow()[0].ends_with("0123456789") {
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("the rest of the request arrives");
    }
);

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
    let nobody = Server {
        address: listener.local_addr().unwrap(),
        heard: Rc::default(),
    };
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

const GET: &str = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

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
        let server = server(vec![vec![
            Until("\r\n\r\n"),
            Say(OK),
            Pause,
            Say(last),
            Close,
        ]])
        .await;
        let mut client = client(&server).await;
        say(&mut client, GET).await;
        hear(&mut client, OK).await;
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
    for (script, expected) in [
        (vec![Until("\r\n\r\n"), Close], "\u{3}".to_owned()),
        (
            vec![Until("\r\n\r\n"), Say(OK), Close],
            format!("{OK}\u{1}"),
        ),
        (
            vec![Until("\r\n\r\n"), Say(OK), Pause, Reset],
            format!("{OK}\u{2}"),
        ),
    ] {
        let server = server(vec![script]).await;
        let mut client = proxy(&server).await;
        say(&mut client, GET).await;
        assert_eq!(rest(&mut client).await.unwrap(), expected);
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
    a_byte_of_the_proxies_means_nothing_from_an_application,
    async {
        let server = server(vec![vec![Until("\r\n\r\n"), Say(OK)]]).await;
        let mut client = client(&server).await;
        say(&mut client, &format!("\0{GET}")).await;
        assert!(rest(&mut client).await.unwrap().starts_with("HTTP/1.1 400"));
    }
);

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
    a_reset_within_a_head_comes_after_what_there_is_of_it,
    async {
        let begun = "HTTP/1.1 200 OK\r\nContent-Le";
        let script = vec![Until("\r\n\r\n"), Say(begun), Pause, Reset];
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
        let server = Server {
            address: listener.local_addr().unwrap(),
            heard: Rc::default(),
        };
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

engine_test!(folded_lines_of_requests_arrive_unfolded, async {
    let request = "GET / HTTP/1.1\r\nHost: x\r\nA: 1\r\n 2\r\n\t3\r\nB: 4\n 5\r\n\r\n";
    let unfolded = "GET / HTTP/1.1\r\nHost: x\r\nA: 1   2  \t3\r\nB: 4  5\r\n\r\n";
    for cut in [request.len(), 34, 37, 50] {
        let server = server(vec![vec![Until("\r\n\r\n"), Say(OK)]]).await;
        let mut client = client(&server).await;
        say(&mut client, &request[..cut]).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
        say(&mut client, &request[cut..]).await;
        hear(&mut client, OK).await;
        assert_eq!(*server.heard.borrow(), [unfolded]);
    }
});

engine_test!(heads_of_a_megabyte_and_thousands_of_fields_pass, async {
    let long = "x".repeat(super::head::MAX_HEAD - 100);
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
