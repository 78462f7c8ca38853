//! Frames by hand: what RFC 9113 forbids, and peers that say goodbye.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
pub(super) const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

pub(super) const END_STREAM: u8 = 1;
const ACK: u8 = 1;
pub(super) const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;

const PROTOCOL_ERROR: u32 = 1;
const FLOW_CONTROL_ERROR: u32 = 3;
const FRAME_SIZE_ERROR: u32 = 6;
const COMPRESSION_ERROR: u32 = 9;
const ENHANCE_YOUR_CALM: u32 = 11;

#[derive(Debug)]
pub(super) struct Frame {
    pub kind: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

/// The next frame; `None` when the connection has ended.
pub(super) async fn next(tcp: &mut TcpStream) -> Option<Frame> {
    let mut head = [0; 9];
    tcp.read_exact(&mut head).await.ok()?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
    let mut payload = vec![0; length];
    tcp.read_exact(&mut payload).await.ok()?;
    Some(Frame {
        kind: head[3],
        stream: u32::from_be_bytes(head[5..].try_into().unwrap()),
        payload,
    })
}

/// A field as a literal without indexing, by name and value.
fn field(name: &str, value: &str) -> Vec<u8> {
    let mut out = vec![0, name.len() as u8];
    out.extend(name.as_bytes());
    out.push(value.len() as u8);
    out.extend(value.as_bytes());
    out
}

fn fields(fields: &[(&str, &str)]) -> Vec<u8> {
    fields.iter().flat_map(|(n, v)| field(n, v)).collect()
}

const ASK: [(&str, &str); 4] = [
    (":method", "GET"),
    (":scheme", "http"),
    (":authority", "cart"),
    (":path", "/"),
];

/// A GET with more fields.
fn ask_with(more: &[(&str, &str)]) -> Vec<u8> {
    let mut all = fields(&ASK);
    all.extend(fields(more));
    all
}

/// What a peer that breaks the rules gets.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    /// RST_STREAM of stream 1.
    Reset(u32),
    /// GOAWAY, and the end of the connection.
    Goaway(u32),
    /// A response on stream 1.
    Answered,
    Closed,
}

async fn told(sent: &[Vec<u8>]) -> Told {
    let (address, _) = server(|request, respond| async move {
        let _ = read(&mut request.into_body()).await;
        ok(respond, "yes");
    })
    .await;
    let mut tcp = connect(&worker(None), to(address)).await;
    tcp.write_all(PREFACE).await.unwrap();
    tcp.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
    // The proxy may end the connection before it has read everything.
    let _ = tcp.write_all(&sent.concat()).await;
    let code = |payload: &[u8]| u32::from_be_bytes(payload.try_into().unwrap());
    while let Some(frame) = next(&mut tcp).await {
        match frame.kind {
            RST_STREAM if frame.stream == 1 => return Told::Reset(code(&frame.payload)),
            GOAWAY => return Told::Goaway(code(&frame.payload[4..8])),
            HEADERS => return Told::Answered,
            _ => {}
        }
    }
    Told::Closed
}

/// After the cases of h2spec, those that matter most to a proxy. h2 says PROTOCOL_ERROR in places
/// where the RFC has a code that tells more.
#[tokio::test]
async fn malformed_frames_are_refused() {
    let head = || frame(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&ASK));
    let open = || frame(HEADERS, END_HEADERS, 1, &fields(&ASK));
    let with =
        |more: &[(&str, &str)]| vec![frame(HEADERS, END_HEADERS | END_STREAM, 1, &ask_with(more))];
    let only =
        |all: &[(&str, &str)]| vec![frame(HEADERS, END_HEADERS | END_STREAM, 1, &fields(all))];
    let malformed = Told::Reset(PROTOCOL_ERROR);
    let cases: Vec<(&str, Vec<Vec<u8>>, Told)> = vec![
        ("a valid request", vec![head()], Told::Answered),
        // Section 8.2: fields.
        (
            "connection field",
            with(&[("connection", "close")]),
            malformed,
        ),
        (
            "transfer-encoding",
            with(&[("transfer-encoding", "chunked")]),
            Told::Reset(PROTOCOL_ERROR),
        ),
        (
            "te: gzip",
            with(&[("te", "gzip")]),
            Told::Reset(PROTOCOL_ERROR),
        ),
        ("te: trailers", with(&[("te", "trailers")]), Told::Answered),
        (
            "upper-case name",
            with(&[("X-A", "1")]),
            Told::Goaway(PROTOCOL_ERROR),
        ),
        (
            "late pseudo field",
            with(&[("x", "y"), (":path", "/")]),
            Told::Reset(PROTOCOL_ERROR),
        ),
        (
            "twice :path",
            with(&[(":path", "/a")]),
            Told::Reset(PROTOCOL_ERROR),
        ),
        (
            "unknown pseudo field",
            with(&[(":x", "y")]),
            Told::Goaway(PROTOCOL_ERROR),
        ),
        (
            "response pseudo field",
            with(&[(":status", "200")]),
            Told::Reset(PROTOCOL_ERROR),
        ),
        ("no :method", only(&ASK[1..]), Told::Reset(PROTOCOL_ERROR)),
        (
            "no :scheme",
            only(&[ASK[0], ASK[3]]),
            Told::Reset(PROTOCOL_ERROR),
        ),
        (
            "empty :path",
            only(&[ASK[0], ASK[1], (":path", "")]),
            Told::Reset(PROTOCOL_ERROR),
        ),
        // Section 8.1.1: content-length.
        (
            "length without data",
            with(&[("content-length", "3")]),
            Told::Reset(PROTOCOL_ERROR),
        ),
        (
            "more data than its length",
            vec![
                frame(
                    HEADERS,
                    END_HEADERS,
                    1,
                    &ask_with(&[("content-length", "1")]),
                ),
                frame(DATA, END_STREAM, 1, b"abc"),
            ],
            Told::Reset(PROTOCOL_ERROR),
        ),
        (
            "two lengths",
            with(&[("content-length", "0"), ("content-length", "1")]),
            Told::Reset(PROTOCOL_ERROR),
        ),
        // Section 5.1: states.
        (
            "data on an idle stream",
            vec![frame(DATA, 0, 1, b"x")],
            Told::Goaway(PROTOCOL_ERROR),
        ),
        (
            "reset of an idle stream",
            vec![frame(RST_STREAM, 0, 1, &[0; 4])],
            Told::Goaway(PROTOCOL_ERROR),
        ),
        (
            "trailers without END_STREAM",
            vec![open(), frame(HEADERS, END_HEADERS, 1, &field("a", "b"))],
            Told::Reset(PROTOCOL_ERROR),
        ),
        (
            "an even stream",
            vec![frame(HEADERS, 5, 2, &fields(&ASK))],
            Told::Goaway(PROTOCOL_ERROR),
        ),
        (
            "PUSH_PROMISE",
            vec![open(), frame(PUSH_PROMISE, 4, 1, &[0; 4])],
            Told::Goaway(PROTOCOL_ERROR),
        ),
        (
            "data after END_STREAM",
            vec![head(), frame(DATA, 0, 1, b"late")],
            Told::Goaway(PROTOCOL_ERROR),
        ),
        // Section 4.3, 6.10: header blocks are whole.
        (
            "another frame within a header block",
            vec![frame(HEADERS, 0, 1, &fields(&ASK)), frame(DATA, 0, 1, b"x")],
            Told::Goaway(PROTOCOL_ERROR),
        ),
        (
            "CONTINUATION alone",
            vec![frame(CONTINUATION, 4, 1, &[])],
            Told::Goaway(PROTOCOL_ERROR),
        ),
        (
            "broken HPACK",
            vec![frame(HEADERS, 5, 1, &[0x80])],
            Told::Goaway(PROTOCOL_ERROR),
        ),
        // Section 6: sizes and padding.
        (
            "a PING of 7 bytes",
            vec![frame(PING, 0, 0, &[0; 7])],
            Told::Goaway(PROTOCOL_ERROR),
        ),
        (
            "a PRIORITY of 4 bytes",
            vec![frame(PRIORITY, 0, 1, &[0; 4])],
            Told::Goaway(PROTOCOL_ERROR),
        ),
        (
            "SETTINGS of 5 bytes",
            vec![frame(SETTINGS, 0, 0, &[0; 5])],
            Told::Goaway(PROTOCOL_ERROR),
        ),
        (
            "SETTINGS ACK with text",
            vec![frame(SETTINGS, ACK, 0, &[0; 6])],
            Told::Goaway(PROTOCOL_ERROR),
        ),
        (
            "SETTINGS of a stream",
            vec![frame(SETTINGS, 0, 1, &[])],
            Told::Goaway(PROTOCOL_ERROR),
        ),
        (
            "padding longer than the frame",
            vec![open(), frame(DATA, PADDED, 1, &[9, 0])],
            Told::Goaway(PROTOCOL_ERROR),
        ),
        (
            "a frame of 16385 bytes",
            vec![open(), frame(DATA, 0, 1, &[0; 16385])],
            Told::Goaway(FRAME_SIZE_ERROR),
        ),
        // Section 6.9: windows.
        (
            "a window above 2^31-1",
            vec![frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff])],
            Told::Goaway(FLOW_CONTROL_ERROR),
        ),
        (
            "SETTINGS with a window above 2^31-1",
            vec![frame(SETTINGS, 0, 0, &[0, 4, 0x80, 0, 0, 0])],
            Told::Goaway(PROTOCOL_ERROR),
        ),
        // Unknown frames and settings are ignored.
        (
            "an unknown frame",
            vec![frame(0x16, 0xff, 0, b"?"), head()],
            Told::Answered,
        ),
        (
            "an unknown setting",
            vec![frame(SETTINGS, 0, 0, &[9, 9, 0, 0, 0, 1]), head()],
            Told::Answered,
        ),
    ];
    let mut wrong = Vec::new();
    for (what, sent, expected) in cases {
        let got = local(told(&sent)).await;
        if got != expected {
            wrong.push(format!("{what}: {got:?}, not {expected:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test]
async fn floods_end_the_connection() {
    // Streams that are opened and reset at once (CVE-2023-44487), before they can be accepted.
    let mut rapid = Vec::new();
    for stream in (1..2001).step_by(2) {
        rapid.push(frame(
            HEADERS,
            END_HEADERS | END_STREAM,
            stream,
            &fields(&ASK),
        ));
        rapid.push(frame(RST_STREAM, 0, stream, &[0, 0, 0, 8]));
    }
    // A header block that goes on and on (CVE-2024-27316).
    let mut endless = vec![frame(HEADERS, 0, 1, &fields(&ASK))];
    endless.extend((0..2000).map(|_| frame(CONTINUATION, 0, 1, &fields(&[("a", "b"); 100]))));
    let mut empty = vec![frame(HEADERS, END_HEADERS, 1, &fields(&ASK))];
    empty.extend((0..500).map(|_| frame(DATA, 0, 1, &[])));
    for (what, sent) in [
        ("resets", rapid),
        ("continuations", endless),
        ("empty data", empty),
    ] {
        let got = local(async {
            // Small streams may be answered before the flood is seen.
            loop {
                match told(&sent).await {
                    Told::Answered => tokio::task::yield_now().await,
                    other => return other,
                }
            }
        })
        .await;
        let ended = matches!(
            got,
            Told::Goaway(ENHANCE_YOUR_CALM | PROTOCOL_ERROR | COMPRESSION_ERROR)
        );
        assert!(ended || got == Told::Closed, "{what}: {got:?}");
    }
}

#[tokio::test]
async fn a_header_list_that_is_too_large_is_answered_431() {
    local(async {
        let (address, _) = server(|_, respond| async move { ok(respond, "yes") }).await;
        let mut client = client(to(address)).await;
        let mut request = get("/");
        let value = "v".repeat(1 << 10);
        for n in 0..80 {
            let name = format!("x-{n}").parse::<http::HeaderName>().unwrap();
            request.headers_mut().insert(name, value.parse().unwrap());
        }
        let (response, _) = client.send_request(request, true).unwrap();
        assert_eq!(response.await.unwrap().status(), 431);
        // The connection goes on.
        assert_eq!(ask(&mut client, get("/")).await.unwrap().0.body(), "yes");
    })
    .await;
}
