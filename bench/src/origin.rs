//! The server at the far end: HTTP/1.1 on one port, HTTP/2 on another, copies of requests (HTTP/1.1)
//! on a third, each on a thread of its own. It runs as a process of its own (`weft-bench origin`) so that it can be pinned and is not
//! measured with the load generator.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::SocketAddr;

use anyhow::Context;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response};
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};

use crate::features::{COUNT, ECHO, FLAKY};
use crate::load::http1::head_end;
use crate::load::http2::GRPC_MESSAGE;

const TINY: &str = "hello from upstream\n";
const LARGE: usize = 1 << 20;
/// A gRPC message without a byte.
const EMPTY_MESSAGE: &[u8] = &[0; 5];

/// Serves until its standard input ends, which it does when the parent is gone.
pub fn run(http1: SocketAddr, http2: SocketAddr, mirrored: SocketAddr) -> anyhow::Result<()> {
    let bind = |to: SocketAddr| std::net::TcpListener::bind(to).with_context(|| format!("{to}"));
    let listener = bind(http1)?;
    let h2_listener = bind(http2)?;
    let mirror_listener = bind(mirrored)?;
    std::thread::spawn(move || fail(serve_http1(listener)));
    std::thread::spawn(move || fail(serve_http1(mirror_listener)));
    std::thread::spawn(move || fail(serve_http2(h2_listener)));
    println!("ready");
    io::copy(&mut io::stdin(), &mut io::sink())?;
    Ok(())
}

fn fail(result: anyhow::Result<()>) {
    if let Err(error) = result {
        eprintln!("origin: {error:#}");
        std::process::exit(1);
    }
}

struct Client {
    stream: TcpStream,
    /// Bytes of a request that has not arrived whole.
    partial: Vec<u8>,
    /// Which answer is being written, and how far.
    answering: Option<(Bytes, usize)>,
    close: bool,
}

/// What a port answers.
struct Answers {
    tiny: Bytes,
    large: Bytes,
    /// Requests but those that ask for this.
    requests: u64,
    /// Of those with [`FLAKY`].
    flaky: u64,
}

fn answer(status: &str, body: &[u8]) -> Bytes {
    let mut bytes = format!(
        "HTTP/1.1 {status}\r\nServer: origin\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    bytes.extend_from_slice(body);
    bytes.into()
}

impl Answers {
    fn to(&mut self, head: &[u8]) -> Bytes {
        if path_is(head, COUNT) {
            return answer("200 OK", self.requests.to_string().as_bytes());
        }
        self.requests += 1;
        if path_is(head, "/1m") {
            return self.large.clone();
        }
        if has_field(head, ECHO) {
            return answer("200 OK", head);
        }
        if has_field(head, FLAKY) {
            self.flaky += 1;
            if self.flaky % 2 == 1 {
                return answer("503 Service Unavailable", b"not now");
            }
        }
        self.tiny.clone()
    }
}

fn path_is(head: &[u8], path: &str) -> bool {
    let target = head.strip_prefix(b"GET ").unwrap_or_default();
    target
        .strip_prefix(path.as_bytes())
        .is_some_and(|rest| rest.starts_with(b" "))
}

/// Fields of checks only begin like this, so that a request of the load is looked through once.
fn has_field(head: &[u8], name: &str) -> bool {
    contains_ignore_case(head, b"\r\nx-bench-") && contains_ignore_case(head, name.as_bytes())
}

fn serve_http1(listener: std::net::TcpListener) -> anyhow::Result<()> {
    listener.set_nonblocking(true)?;
    let mut listener = TcpListener::from_std(listener);
    // Not compressible, not all the same: x_{n+1} = x_n * 69069 + 1.
    let mut state = 1u32;
    let large: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(69069).wrapping_add(1);
        (state >> 24) as u8
    })
    .take(LARGE)
    .collect();
    let mut answers = Answers {
        tiny: answer("200 OK", TINY.as_bytes()),
        large: answer("200 OK", &large),
        requests: 0,
        flaky: 0,
    };

    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(1024);
    const LISTENER: Token = Token(usize::MAX - 1);
    poll.registry()
        .register(&mut listener, LISTENER, Interest::READABLE)?;
    let mut clients: HashMap<Token, Client> = HashMap::new();
    let mut next = 0;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        if let Err(error) = poll.poll(&mut events, None) {
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error.into());
        }
        for event in &events {
            if event.token() == LISTENER {
                loop {
                    match listener.accept() {
                        Ok((mut stream, _)) => {
                            let token = Token(next);
                            next += 1;
                            stream.set_nodelay(true)?;
                            poll.registry().register(
                                &mut stream,
                                token,
                                Interest::READABLE | Interest::WRITABLE,
                            )?;
                            clients.insert(
                                token,
                                Client {
                                    stream,
                                    partial: Vec::new(),
                                    answering: None,
                                    close: false,
                                },
                            );
                        }
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                        Err(e) => return Err(e).context("accepting"),
                    }
                }
                continue;
            }
            let Some(client) = clients.get_mut(&event.token()) else {
                continue;
            };
            // A client that went away is not the origin's failure.
            let open = client.advance(&mut buffer, &mut answers).unwrap_or(false);
            if !open {
                clients.remove(&event.token());
            }
        }
    }
}

impl Client {
    /// Answers what it can; false when the connection has ended.
    fn advance(&mut self, buffer: &mut [u8], answers: &mut Answers) -> io::Result<bool> {
        loop {
            if let Some((bytes, mut done)) = self.answering.take() {
                while done < bytes.len() {
                    match self.stream.write(&bytes[done..]) {
                        Ok(n) => done += n,
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                            self.answering = Some((bytes, done));
                            return Ok(true);
                        }
                        Err(e) => return Err(e),
                    }
                }
                if self.close {
                    return Ok(false);
                }
            }
            let n = match self.stream.read(buffer) {
                Ok(0) => return Ok(false),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(e) => return Err(e),
            };
            // The load generator sends one request at a time, without a body.
            let head = if self.partial.is_empty() {
                &buffer[..n]
            } else {
                self.partial.extend_from_slice(&buffer[..n]);
                &self.partial[..]
            };
            if head_end(head).is_none() {
                if self.partial.is_empty() {
                    self.partial.extend_from_slice(&buffer[..n]);
                }
                continue;
            }
            self.close = contains_ignore_case(head, b"\r\nconnection: close\r\n");
            self.answering = Some((answers.to(head), 0));
            self.partial.clear();
        }
    }
}

fn contains_ignore_case(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes
        .windows(wanted.len())
        .any(|w| w.eq_ignore_ascii_case(wanted))
}

fn serve_http2(listener: std::net::TcpListener) -> anyhow::Result<()> {
    listener.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            tokio::spawn(async move {
                // As above: clients come and go.
                let _ = serve_http2_connection(stream).await;
            });
        }
    })
}

async fn serve_http2_connection(stream: tokio::net::TcpStream) -> Result<(), h2::Error> {
    let mut connection = h2::server::Builder::new()
        .initial_window_size(1 << 20)
        .initial_connection_window_size(1 << 24)
        .max_concurrent_streams(1000)
        .handshake::<_, Bytes>(stream)
        .await?;
    while let Some(accepted) = connection.accept().await {
        let (request, respond) = accepted?;
        tokio::spawn(answer_http2(request, respond));
    }
    Ok(())
}

async fn answer_http2(
    request: http::Request<h2::RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
) -> Result<(), h2::Error> {
    let grpc = request
        .headers()
        .get("content-type")
        .is_some_and(|v| v.as_bytes().starts_with(b"application/grpc"));
    // The origin takes the proxies' spans as well; an empty message says that it has them.
    let spans = request.uri().path().starts_with("/opentelemetry.");
    let message = if spans { EMPTY_MESSAGE } else { GRPC_MESSAGE };
    let mut body = request.into_body();
    while let Some(data) = body.data().await {
        body.flow_control().release_capacity(data?.len())?;
    }
    let mut response = Response::new(());
    if grpc {
        response
            .headers_mut()
            .insert("content-type", HeaderValue::from_static("application/grpc"));
        let mut send = respond.send_response(response, false)?;
        send.send_data(Bytes::from_static(message), false)?;
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        send.send_trailers(trailers)
    } else {
        response
            .headers_mut()
            .insert("content-length", HeaderValue::from(TINY.len()));
        let mut send = respond.send_response(response, false)?;
        send.send_data(Bytes::from_static(TINY.as_bytes()), true)
    }
}
