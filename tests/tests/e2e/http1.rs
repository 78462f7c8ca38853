//! HTTP/1.x arrives as it was sent.

use std::io::Read;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use weft_tests::mesh::{Mesh, Sidecar, Workload};
use weft_tests::wire::{Server, Wire, header, ok, serve_http, status};

/// A client and a server; the server's Service has this virtual address.
struct Pair {
    mesh: Mesh,
    vip: SocketAddr,
}

impl Pair {
    /// No protocol is declared: it is found out.
    fn start() -> Self {
        let mut mesh = Mesh::new();
        mesh.workload(Workload::new("client"));
        mesh.workload(Workload::new("server").port(8080, None));
        let vip = mesh.service("server", 8080, None);
        mesh.start();
        Self { mesh, vip }
    }

    fn client(&self) -> &Sidecar {
        self.mesh.sidecar(0)
    }

    fn server(&self) -> &Sidecar {
        self.mesh.sidecar(1)
    }

    fn connect(&self) -> Wire {
        self.client().connect(self.vip)
    }

    /// A server that goes through `script` with every connection.
    fn serve(&self, script: impl Fn(Wire) + Send + Sync + 'static) -> Server {
        Server::start(&self.server().host, 8080, script)
    }
}

pub fn bytes_pass_unchanged_both_ways() {
    const REQUEST: &str = "M-SEARCH /a/../b//c%2Fd%zz?q=%20+ HTTP/1.1\r\n\
        hOsT: Server.Shop\r\nX-B: 1\r\nx-a:2\r\nX-B:   3  \r\nX-Empty:\r\n\
        ACCEPT-encoding: gzip\r\nContent-Length: 3\r\n\r\nabc";
    const ANSWER: &str = "HTTP/1.1 299 Rather Fine, Thanks\r\nsErVer: x\r\nSet-Cookie: a=1\r\n\
        set-cookie: b=2\r\nX-latin: caf\u{e9}\r\nContent-length: 4\r\n\r\nbody";
    let pair = Pair::start();
    let server = pair.serve(|mut wire| {
        wire.expect(REQUEST);
        wire.send(ANSWER);
        wire.expect_end();
    });
    let mut client = pair.connect();
    client.send(REQUEST);
    client.expect(ANSWER);
    client.finish();
    client.expect_end();
    server.wait_for(1);
}

pub fn a_workload_is_reached_by_its_own_address() {
    let pair = Pair::start();
    let _server = Server::answering(&pair.server().host, 8080, ok("direct"));
    let mut client = pair.client().connect(pair.server().address(8080));
    client.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, body) = client.read_answer();
    assert_eq!((status(&head), body.as_slice()), (200, &b"direct"[..]));
}

pub fn connections_are_kept() {
    let pair = Pair::start();
    let server = Server::answering(&pair.server().host, 8080, ok("x"));
    let mut client = pair.connect();
    for _ in 0..20 {
        client.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
        assert_eq!(status(&client.read_answer().0), 200);
    }
    assert_eq!(server.accepted(), 1, "the server's connection was not kept");
}

pub fn a_server_that_closes_right_after_its_answer_is_heard_of() {
    let pair = Pair::start();
    // It does not say that it will: answer and end are on their way together.
    let server = pair.serve(|mut wire| {
        wire.read_head();
        wire.send(ok("yes"));
    });
    for _ in 0..40 {
        let mut client = pair.connect();
        client.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
        assert_eq!(client.read_answer().1, b"yes");
        client.expect_end();
    }
    server.wait_for(40);
}

pub fn pipelined_requests_are_answered_in_order() {
    let pair = Pair::start();
    let _server = pair.serve(|wire| {
        serve_http(wire, |head| ok(head.split(' ').nth(1).unwrap()));
    });
    let mut client = pair.connect();
    let requests: String = (0..10)
        .map(|i| format!("GET /{i} HTTP/1.1\r\nHost: x\r\n\r\n"))
        .collect();
    client.send(requests);
    for i in 0..10 {
        assert_eq!(client.read_answer().1, format!("/{i}").as_bytes());
    }
}

pub fn chunks_and_trailers_pass_as_they_are() {
    const REQUEST: &str = "POST /in HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n\
        3;note=\"a;b\"\r\nabc\r\n00A\r\n0123456789\r\n0\r\nX-Sum: 1\r\nx-sum: 2\r\n\r\n";
    const ANSWER: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
        2\r\nhi\r\n1\r\n!\r\n0\r\nGrpc-Like: yes\r\n\r\n";
    let pair = Pair::start();
    let _server = pair.serve(|mut wire| {
        for _ in 0..2 {
            wire.expect(REQUEST);
            wire.send(ANSWER);
        }
    });
    let mut client = pair.connect();
    for _ in 0..2 {
        client.send(REQUEST);
        client.expect(ANSWER);
    }
}

pub fn interim_responses_pass() {
    const INTERIM: [&str; 3] = [
        "HTTP/1.1 100 Go On\r\n\r\n",
        "HTTP/1.1 102 Processing\r\n\r\n",
        "HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n",
    ];
    let pair = Pair::start();
    let _server = pair.serve(|mut wire| {
        let head = wire.read_head();
        assert_eq!(header(&head, "expect"), Some("100-continue"));
        for interim in INTERIM {
            wire.send(interim);
        }
        // The body comes only now.
        wire.expect("hello");
        wire.send(ok("done"));
    });
    let mut client = pair.connect();
    client.send("POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n");
    for interim in INTERIM {
        client.expect(interim);
    }
    client.send("hello");
    client.expect(ok("done"));
}

pub fn an_upgrade_becomes_a_byte_copy() {
    for token in ["websocket", "my-protocol/2"] {
        let request = format!(
            "GET /ws HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: {token}\r\n\r\n"
        );
        let answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {token}\r\n\r\n"
        );
        let pair = Pair::start();
        let expected = request.clone();
        let sent = answer.clone();
        let server = pair.serve(move |mut wire| {
            wire.expect(&expected);
            // The first bytes of the new protocol follow at once.
            wire.send(format!("{sent}\x00first"));
            wire.expect(b"\x81\x85client");
            assert_eq!(wire.read_to_end(), b"GET / HTTP/1.1\r\n\r\n");
            wire.send("last words");
        });
        let mut client = pair.connect();
        client.send(&request);
        client.expect(&answer);
        client.expect(b"\x00first");
        client.send(b"\x81\x85client");
        // No longer HTTP, whatever it looks like; and one direction ends before the other.
        client.send("GET / HTTP/1.1\r\n\r\n");
        client.finish();
        assert_eq!(client.read_to_end(), b"last words");
        server.wait_for(1);
    }
}

pub fn connect_becomes_a_byte_copy() {
    let pair = Pair::start();
    let server = pair.serve(|mut wire| {
        assert!(
            wire.read_head()
                .starts_with("CONNECT example.com:443 HTTP/1.1\r\n")
        );
        wire.send("HTTP/1.1 200 Connected\r\n\r\n");
        wire.expect(b"\x16\x03\x01raw");
        wire.send("back");
    });
    let mut client = pair.connect();
    client.send("CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n");
    client.expect("HTTP/1.1 200 Connected\r\n\r\n");
    client.send(b"\x16\x03\x01raw");
    client.expect("back");
    server.wait_for(1);
}

pub fn answers_without_a_body() {
    let pair = Pair::start();
    let _server = pair.serve(|wire| {
        serve_http(wire, |head| {
            match head.split(' ').nth(1).unwrap() {
                // The length is what GET would have had.
                "/head" => "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n".into(),
                "/204" => "HTTP/1.1 204 No Content\r\n\r\n".into(),
                "/304" => "HTTP/1.1 304 Not Modified\r\nContent-Length: 1000\r\n\r\n".into(),
                _ => ok("end"),
            }
        });
    });
    let mut client = pair.connect();
    for (method, path, expected) in [
        ("HEAD", "/head", 200),
        ("GET", "/204", 204),
        ("GET", "/304", 304),
    ] {
        client.send(format!("{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n"));
        assert_eq!(status(&client.read_head()), expected);
    }
    // Nothing was taken for a body: the connection still works.
    client.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!(client.read_answer().1, b"end");
}

pub fn http_1_0_without_a_host() {
    const REQUEST: &str = "GET /old HTTP/1.0\r\nUser-Agent: ancient\r\n\r\n";
    const ANSWER: &str = "HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nto the end";
    let pair = Pair::start();
    let _server = pair.serve(|mut wire| {
        wire.expect(REQUEST);
        wire.send(ANSWER);
    });
    let mut client = pair.connect();
    client.send(REQUEST);
    assert_eq!(String::from_utf8_lossy(&client.read_to_end()), ANSWER);
}

pub fn conflicting_framing_is_refused() {
    let pair = Pair::start();
    let server = Server::answering(&pair.server().host, 8080, ok("x"));
    for fields in [
        "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
        "Content-Length: 3\r\nContent-Length: 4\r\n",
        "Content-Length: +3\r\n",
        "Content-Length : 3\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
        "Transfer-Encoding: xchunked\r\n",
    ] {
        let mut client = pair.connect();
        client.send(format!(
            "POST / HTTP/1.1\r\nHost: x\r\n{fields}\r\n3\r\nabc\r\n0\r\n\r\n"
        ));
        let (head, _) = client.read_answer();
        assert_eq!(status(&head), 400, "{fields:?}: {head}");
        client.expect_end();
    }
    assert_eq!(server.accepted(), 0, "a refused request reached the server");
}

pub fn an_answer_may_come_before_the_request_has_ended() {
    let pair = Pair::start();
    let _server = pair.serve(|mut wire| {
        wire.read_head();
        wire.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        // Full duplex: each chunk is echoed when it has come.
        for _ in 0..3 {
            let chunk = wire.read_exactly(8);
            wire.send(chunk);
        }
        wire.expect("0\r\n\r\n");
        wire.send("0\r\n\r\n");
    });
    let mut client = pair.connect();
    client.send("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
    client.expect("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
    for chunk in ["3\r\none\r\n", "3\r\ntwo\r\n", "3\r\n333\r\n"] {
        client.send(chunk);
        client.expect(chunk);
    }
    client.send("0\r\n\r\n");
    client.expect("0\r\n\r\n");
}

pub fn events_are_streamed_at_once() {
    let pair = Pair::start();
    let _server = pair.serve(|mut wire| {
        wire.read_head();
        wire.send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n");
        for i in 0..5 {
            std::thread::sleep(Duration::from_millis(100));
            wire.send(format!("data: {i}\n\n"));
        }
    });
    let mut client = pair.connect();
    client.send("GET /events HTTP/1.1\r\nHost: x\r\n\r\n");
    client.read_head();
    let mut last = Instant::now();
    for i in 0..5 {
        client.expect(format!("data: {i}\n\n"));
        let gap = last.elapsed();
        // Held-back events would come together at the end.
        assert!(
            i == 0 || gap > Duration::from_millis(50),
            "event {i} after {gap:?}"
        );
        last = Instant::now();
    }
    client.expect_end();
}

pub fn a_body_cut_off_arrives_cut_off() {
    let pair = Pair::start();
    let _server = pair.serve(|mut wire| {
        wire.read_head();
        wire.send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this");
    });
    let mut client = pair.connect();
    client.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    client.read_head();
    client.expect("only this");
    // Ended or reset; never made to look whole, and never left hanging.
    let mut rest = Vec::new();
    let ended = client.stream().read_to_end(&mut rest);
    assert!(rest.is_empty(), "{rest:?}");
    assert!(
        !matches!(&ended, Err(e) if e.kind() != std::io::ErrorKind::ConnectionReset),
        "{ended:?}"
    );
}

pub fn a_reset_instead_of_an_answer_arrives_each_time() {
    let pair = Pair::start();
    let server = pair.serve(|mut wire| {
        wire.read_head();
        wire.reset();
    });
    // Each on a connection of its own, which is new to the application.
    for asked in 1..=3 {
        let mut client = pair.connect();
        client.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
        assert_eq!(client.expect_reset(), b"");
        assert_eq!(server.accepted(), asked, "asked once each time");
    }
}

pub fn a_refused_connection_is_a_clear_502_or_503() {
    let pair = Pair::start();
    let mut client = pair.connect();
    client.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, body) = client.read_answer();
    assert!(matches!(status(&head), 502 | 503), "{head}");
    assert!(header(&head, "proxy-status").is_some(), "{head}");
    let body = String::from_utf8(body).unwrap();
    assert!(
        body.contains("server"),
        "it does not name what failed: {body}"
    );
}

pub fn a_client_that_stalls_in_its_head_holds_up_nobody() {
    let pair = Pair::start();
    let _server = Server::answering(&pair.server().host, 8080, ok("x"));
    let mut stalled: Vec<Wire> = (0..20).map(|_| pair.connect()).collect();
    for wire in &mut stalled {
        wire.send("GET / HTTP/1.1\r\nHo");
    }
    let start = Instant::now();
    let mut client = pair.connect();
    client.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!(client.read_answer().1, b"x");
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
    // And it may go on after all.
    for wire in &mut stalled {
        wire.send("st: x\r\n\r\n");
        assert_eq!(wire.read_answer().1, b"x");
    }
}

pub fn fields_of_the_hop_do_not_pass() {
    let pair = Pair::start();
    let _server = pair.serve(|mut wire| {
        wire.expect("GET / HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\nX-Stays: 2\r\n\r\n");
        wire.send("HTTP/1.1 200 OK\r\nConnection: X-Hop\r\nX-Hop: 1\r\nContent-Length: 0\r\n\r\n");
    });
    let mut client = pair.connect();
    client.send(
        "GET / HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nX-Stays: 2\r\n\r\n",
    );
    client.expect("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
}

/// Both proxies must agree on it, and at the same byte.
pub fn an_answer_that_is_not_http_makes_the_connection_opaque() {
    const GET: &str = "GET /radio HTTP/1.1\r\nHost: x\r\n\r\n";
    const ICY: &str = "ICY 200 OK\r\nicy-name: x\r\n\r\n";
    let pair = Pair::start();
    let server = pair.serve(|mut wire| {
        wire.expect(GET);
        wire.send(ICY);
        wire.expect("\x01more of it\r\n");
        wire.send("audio");
        wire.expect_end();
        wire.send("the rest");
    });
    let mut client = pair.connect();
    client.send(GET);
    client.expect(ICY);
    client.send("\x01more of it\r\n");
    client.expect("audio");
    client.finish();
    client.expect("the rest");
    client.expect_end();
    server.wait_for(1);
}

pub fn old_and_odd_ways_of_servers_keep_the_connection() {
    const GET: &str = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    const ANSWERS: [&str; 5] = [
        "HTTP/1.1 200 OK\r\nX: a\r\n  folded\r\nContent-Length: 2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nno field\r\nX[1]: \x01\r\nContent-Length: 2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\nok\n0\n\n",
        "\r\nHTTP/1.1  200  OK\r\nTransfer-Encoding: identity\r\nContent-Length: 2\r\n\r\nok",
    ];
    let pair = Pair::start();
    let server = pair.serve(|mut wire| {
        for answer in ANSWERS {
            wire.expect(GET);
            wire.send(answer);
        }
        wire.expect_end();
    });
    let mut client = pair.connect();
    for answer in ANSWERS {
        client.send(GET);
        client.expect(answer);
    }
    client.finish();
    server.wait_for(1);
    assert_eq!(server.accepted(), 1, "an answer cost the connection");
}

pub fn a_head_cut_off_by_a_reset_arrives_before_the_reset() {
    const BEGUN: &str = "HTTP/1.1 200 OK\r\nContent-Le";
    let pair = Pair::start();
    let _server = pair.serve(|mut wire| {
        wire.read_head();
        wire.send(BEGUN);
        // It is on its way before the reset could throw it away.
        std::thread::sleep(Duration::from_millis(200));
        wire.reset();
    });
    let mut client = pair.connect();
    client.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!(client.expect_reset(), BEGUN.as_bytes());
}

pub fn large_heads_pass() {
    let field = "x".repeat(900_000);
    let request = format!("GET / HTTP/1.1\r\nHost: x\r\nX: {field}\r\n\r\n");
    let answer = format!("HTTP/1.1 200 OK\r\nX: {field}\r\nContent-Length: 2\r\n\r\nok");
    let pair = Pair::start();
    let (expected, given) = (request.clone(), answer.clone());
    let _server = pair.serve(move |mut wire| {
        wire.expect(&expected);
        wire.send(&given);
    });
    let mut client = pair.connect();
    client.send(&request);
    client.expect(&answer);
}
