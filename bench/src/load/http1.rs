//! HTTP/1.1 from prebuilt bytes over an edge-triggered poll: a read and a write per request.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Context;
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Registry, Token};

use super::{Edge, Kind, Load, Outcome, Window};

/// Larger than any answer's head and most of what one read returns.
const BUFFER: usize = 256 * 1024;
/// How often the clock is looked at when nothing happens.
const TICK: Duration = Duration::from_millis(20);

/// Runs the load; see [`super::run`].
pub fn run(load: &Load, edge: &mut dyn FnMut(Edge)) -> anyhow::Result<Outcome> {
    let mut poll = Poll::new().context("a poll for the load generator")?;
    let mut events = Events::with_capacity(1024);
    let close = load.kind == Kind::Http1Close;
    let path = if load.kind == Kind::Http1Large {
        "/1m"
    } else {
        load.path
    };
    let request = request(path, close).into_bytes();
    let mut outcome = Outcome::default();
    let mut connections = Vec::with_capacity(load.connections);
    for i in 0..load.connections {
        connections.push(
            Connection::open(load.target, poll.registry(), Token(i))
                .with_context(|| format!("connecting to {}", load.target))?,
        );
    }
    let mut buffer = vec![0; BUFFER];
    let mut window = Window::new(load, edge);
    loop {
        poll.poll(&mut events, Some(TICK)).or_else(|e| {
            if e.kind() == io::ErrorKind::Interrupted {
                Ok(())
            } else {
                Err(e)
            }
        })?;
        let mut now = Instant::now();
        if window.is_over(now) {
            break;
        }
        for event in &events {
            let counted = window.is_open(now);
            let token = event.token();
            let connection = &mut connections[token.0];
            match connection.advance(&request, &mut buffer, close) {
                Ok(finished) => {
                    now = Instant::now();
                    if let Some(latency) = finished
                        && counted
                    {
                        outcome.latencies.record(latency);
                    }
                    if connection.done {
                        *connection = Connection::open(load.target, poll.registry(), token)?;
                    }
                }
                Err(error) => {
                    if counted {
                        outcome.fail(&error);
                    } else if outcome.first_error.is_none() {
                        outcome.first_error = Some(format!("while warming up: {error}"));
                    }
                    // Not at once again: a refused connection must not become a busy loop.
                    std::thread::sleep(Duration::from_millis(1));
                    *connection = Connection::open(load.target, poll.registry(), token)?;
                }
            }
        }
        window.is_open(now);
    }
    window.close(&mut outcome);
    Ok(outcome)
}

fn request(path: &str, close: bool) -> String {
    let end = if close { "Connection: close\r\n" } else { "" };
    format!(
        "GET {path} HTTP/1.1\r\nHost: server.bench\r\nUser-Agent: weft-bench\r\nAccept: */*\r\n{end}\r\n"
    )
}

/// Opens `count` connections, has each make one request, and keeps them.
pub fn open_idle(target: SocketAddr, count: usize) -> anyhow::Result<Vec<std::net::TcpStream>> {
    let request = request("/", false).into_bytes();
    let mut open = Vec::with_capacity(count);
    for i in 0..count {
        let mut stream = std::net::TcpStream::connect(target)
            .with_context(|| format!("connection {i} to {target}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(&request)?;
        let mut answer = Answer::default();
        let mut buffer = [0; 4096];
        while !answer.complete {
            let n = stream.read(&mut buffer)?;
            anyhow::ensure!(n > 0, "connection {i} was closed before its answer");
            answer.feed(&buffer[..n])?;
        }
        open.push(stream);
    }
    Ok(open)
}

struct Connection {
    stream: TcpStream,
    /// Bytes of the request that are written; none before the connection is up.
    written: usize,
    sent: Option<Instant>,
    answer: Answer,
    /// The connection has served its only request.
    done: bool,
}

impl Connection {
    fn open(target: SocketAddr, registry: &Registry, token: Token) -> io::Result<Self> {
        let mut stream = TcpStream::connect(target)?;
        stream.set_nodelay(true)?;
        registry.register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self {
            stream,
            written: 0,
            sent: None,
            answer: Answer::default(),
            done: false,
        })
    }

    /// Reads and writes what it can; the latency of a request that has ended meanwhile.
    fn advance(
        &mut self,
        request: &[u8],
        buffer: &mut [u8],
        close: bool,
    ) -> io::Result<Option<Duration>> {
        let mut finished = None;
        if self.sent.is_some() && self.written == request.len() {
            finished = self.read(buffer)?;
            if finished.is_some() {
                if close {
                    self.done = true;
                    return Ok(finished);
                }
                self.written = 0;
                self.sent = None;
            }
        }
        if self.written < request.len() {
            self.write(request)?;
        }
        Ok(finished)
    }

    fn write(&mut self, request: &[u8]) -> io::Result<()> {
        if self.sent.is_none() {
            self.sent = Some(Instant::now());
        }
        loop {
            match self.stream.write(&request[self.written..]) {
                Ok(n) => {
                    self.written += n;
                    if self.written == request.len() {
                        return Ok(());
                    }
                }
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::NotConnected
                    ) =>
                {
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Option<Duration>> {
        loop {
            match self.stream.read(buffer) {
                Ok(0) => {
                    return Err(io::Error::other(
                        "connection closed before the answer ended",
                    ));
                }
                Ok(n) => {
                    self.answer.feed(&buffer[..n])?;
                    if self.answer.complete {
                        self.answer = Answer::default();
                        return Ok(self.sent.map(|sent| sent.elapsed()));
                    }
                    // Edge-triggered: a read that did not fill the buffer has emptied the socket.
                    if n < buffer.len() {
                        return Ok(None);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e),
            }
        }
    }
}

/// One answer with a Content-Length, as the origin gives them.
#[derive(Default)]
struct Answer {
    head: Vec<u8>,
    /// Bytes of the body still to come, once the head is known.
    body: Option<usize>,
    complete: bool,
}

impl Answer {
    fn feed(&mut self, bytes: &[u8]) -> io::Result<()> {
        let of_body = match self.body {
            Some(_) => bytes.len(),
            None if self.head.is_empty() => match head_end(bytes) {
                Some(end) => {
                    self.body = Some(content_length(&bytes[..end])?);
                    bytes.len() - end
                }
                None => {
                    self.head.extend_from_slice(bytes);
                    return Ok(());
                }
            },
            None => {
                self.head.extend_from_slice(bytes);
                let Some(end) = head_end(&self.head) else {
                    return Ok(());
                };
                self.body = Some(content_length(&self.head[..end])?);
                self.head.len() - end
            }
        };
        let left = self.body.unwrap_or(0);
        let left = left
            .checked_sub(of_body)
            .ok_or_else(|| io::Error::other("more bytes than the answer's Content-Length"))?;
        self.body = Some(left);
        self.complete = left == 0;
        Ok(())
    }
}

/// Length of a message's head with its empty line.
pub fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .map(|i| i + 4)
}

fn content_length(head: &[u8]) -> io::Result<usize> {
    let wrong = |what: &str| {
        let head = String::from_utf8_lossy(&head[..head.len().min(300)]).into_owned();
        io::Error::other(format!("{what}: {head:?}"))
    };
    if head.get(9..12) != Some(b"200") {
        return Err(wrong("answered with something other than 200"));
    }
    for line in head.split(|b| *b == b'\n') {
        if line.len() > 15 && line[..15].eq_ignore_ascii_case(b"content-length:") {
            return std::str::from_utf8(&line[15..])
                .ok()
                .and_then(|v| v.trim().parse().ok())
                .ok_or_else(|| wrong("a Content-Length that is no number"));
        }
    }
    Err(wrong("answered without a Content-Length"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_may_come_in_any_pieces() {
        let whole = b"HTTP/1.1 200 OK\r\nContent-length: 5\r\nX: y\r\n\r\nhello";
        for cut in 1..whole.len() {
            let mut answer = Answer::default();
            answer.feed(&whole[..cut]).unwrap();
            assert!(!answer.complete, "{cut}");
            answer.feed(&whole[cut..]).unwrap();
            assert!(answer.complete, "{cut}");
        }
    }

    #[test]
    fn errors_are_not_counted_as_answers() {
        for bad in [
            "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nab",
        ] {
            assert!(Answer::default().feed(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
