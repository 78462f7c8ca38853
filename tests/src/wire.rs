//! Exact bytes over sockets: scripted clients and servers.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::PATIENCE;
use crate::netns::Host;

/// One end of a connection that is read and written step by step. Every step panics when it does
/// not happen, and when it takes longer than [`PATIENCE`].
pub struct Wire {
    stream: TcpStream,
    /// Read and not yet asked for.
    rest: Vec<u8>,
}

impl Wire {
    pub fn new(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            rest: Vec::new(),
        }
    }

    /// Connects from a host.
    #[track_caller]
    pub fn connect(host: &Host, to: SocketAddr) -> Self {
        match Self::try_connect(host, to) {
            Ok(wire) => wire,
            Err(error) => panic!("{} cannot connect to {to}: {error}", host.name()),
        }
    }

    pub fn try_connect(host: &Host, to: SocketAddr) -> io::Result<Self> {
        host.within(|| TcpStream::connect_timeout(&to, PATIENCE))
            .map(Self::new)
    }

    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    #[track_caller]
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    /// Sends, or says that the other end no longer takes it.
    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Reads once; `Ok(0)` at the end.
    fn fill(&mut self) -> io::Result<usize> {
        let mut buffer = [0; 64 * 1024];
        let n = self.stream.read(&mut buffer)?;
        self.rest.extend_from_slice(&buffer[..n]);
        Ok(n)
    }

    /// Reads so many bytes.
    #[track_caller]
    pub fn read_exactly(&mut self, length: usize) -> Vec<u8> {
        while self.rest.len() < length {
            let n = self
                .fill()
                .unwrap_or_else(|e| panic!("{e} after {:?}", self.seen()));
            assert!(n > 0, "the connection ended after {:?}", self.seen());
        }
        self.rest.drain(..length).collect()
    }

    /// Reads as many bytes as are expected, which must be these.
    #[track_caller]
    pub fn expect(&mut self, expected: impl AsRef<[u8]>) {
        let expected = expected.as_ref();
        while self.rest.len() < expected.len() {
            match self.fill() {
                Ok(0) => break,
                Ok(_) => {}
                Err(e) => panic!("{e} after {:?}", self.seen()),
            }
        }
        let got: Vec<u8> = self
            .rest
            .drain(..expected.len().min(self.rest.len()))
            .collect();
        assert_eq!(
            String::from_utf8_lossy(&got),
            String::from_utf8_lossy(expected)
        );
        assert!(got == expected, "the bytes differ where they are not text");
    }

    /// Reads up to and with `end`.
    #[track_caller]
    pub fn read_until(&mut self, end: &[u8]) -> String {
        loop {
            if let Some(at) = self.rest.windows(end.len()).position(|w| w == end) {
                let taken: Vec<u8> = self.rest.drain(..at + end.len()).collect();
                return String::from_utf8(taken).unwrap();
            }
            let n = self
                .fill()
                .unwrap_or_else(|e| panic!("{e} after {:?}", self.seen()));
            assert!(n > 0, "the connection ended after {:?}", self.seen());
        }
    }

    /// Reads a message's head, with its empty line.
    #[track_caller]
    pub fn read_head(&mut self) -> String {
        self.read_until(b"\r\n\r\n")
    }

    /// Reads an answer whose length a Content-Length says: head and body.
    #[track_caller]
    pub fn read_answer(&mut self) -> (String, Vec<u8>) {
        let head = self.read_head();
        let length = header(&head, "content-length").map_or(0, |v| v.parse().unwrap());
        let body = self.read_exactly(length);
        (head, body)
    }

    /// Reads everything to the orderly end.
    #[track_caller]
    pub fn read_to_end(&mut self) -> Vec<u8> {
        while self
            .fill()
            .unwrap_or_else(|e| panic!("{e} after {:?}", self.seen()))
            > 0
        {}
        std::mem::take(&mut self.rest)
    }

    /// Nothing more comes, and the connection ends in order.
    #[track_caller]
    pub fn expect_end(&mut self) {
        let rest = self.read_to_end();
        assert!(rest.is_empty(), "{:?}", String::from_utf8_lossy(&rest));
    }

    /// What comes before the connection is reset; panics when it ends in order.
    #[track_caller]
    pub fn expect_reset(&mut self) -> Vec<u8> {
        loop {
            match self.fill() {
                Ok(0) => panic!("it ended in order after {:?}", self.seen()),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::ConnectionReset => {
                    return std::mem::take(&mut self.rest);
                }
                Err(e) => panic!("{e}"),
            }
        }
    }

    /// Nothing comes for so long.
    #[track_caller]
    pub fn expect_silence(&mut self, time: Duration) {
        self.stream.set_read_timeout(Some(time)).unwrap();
        match self.fill() {
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            other => panic!("not silent: {other:?}, {:?}", self.seen()),
        }
        self.stream.set_read_timeout(Some(PATIENCE)).unwrap();
    }

    /// Ends one direction.
    pub fn finish(&self) {
        self.stream.shutdown(Shutdown::Write).unwrap();
    }

    /// Ends the connection with a reset.
    pub fn reset(self) {
        nix::sys::socket::setsockopt(
            &self.stream,
            nix::sys::socket::sockopt::Linger,
            &libc::linger {
                l_onoff: 1,
                l_linger: 0,
            },
        )
        .unwrap();
    }

    fn seen(&self) -> String {
        String::from_utf8_lossy(&self.rest).into_owned()
    }
}

/// The value of a field in a head, whatever the case of its name.
pub fn header<'h>(head: &'h str, name: &str) -> Option<&'h str> {
    head.lines().skip(1).find_map(|line| {
        let (n, value) = line.split_once(':')?;
        n.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// The status code of an answer's head.
pub fn status(head: &str) -> u16 {
    head.split(' ')
        .nth(1)
        .and_then(|s| s.parse().ok())
        .unwrap_or(0)
}

/// A listener on a host; each connection is handed to a thread of its own. A step that fails there
/// fails the test when the value is dropped.
pub struct Server {
    address: SocketAddr,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    accepted: AtomicUsize,
    handled: AtomicUsize,
    failures: Mutex<Vec<String>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        let failures = self.state.failures.lock().unwrap();
        if !std::thread::panicking() {
            assert!(failures.is_empty(), "at the server: {failures:?}");
        }
    }
}

impl Server {
    /// Listens on a port of all the host's addresses.
    pub fn start(host: &Host, port: u16, handle: impl Fn(Wire) + Send + Sync + 'static) -> Self {
        let any = if host.v6().is_some() { "::" } else { "0.0.0.0" };
        let listener = host
            .within(|| TcpListener::bind((any, port)))
            .unwrap_or_else(|e| panic!("{} cannot listen on {port}: {e}", host.name()));
        let address = SocketAddr::new(host.v4().into(), port);
        let state = Arc::new(State::default());
        let (shared, handle) = (Arc::clone(&state), Arc::new(handle));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                shared.accepted.fetch_add(1, Ordering::Relaxed);
                let (state, handle) = (Arc::clone(&shared), Arc::clone(&handle));
                std::thread::spawn(move || {
                    let run = AssertUnwindSafe(|| handle(Wire::new(stream)));
                    if let Err(panic) = catch_unwind(run) {
                        let text = panic
                            .downcast_ref::<String>()
                            .cloned()
                            .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
                            .unwrap_or_default();
                        state.failures.lock().unwrap().push(text);
                    }
                    state.handled.fetch_add(1, Ordering::Release);
                });
            }
        });
        Self { address, state }
    }

    /// Waits until so many connections have been handled to their end.
    #[track_caller]
    pub fn wait_for(&self, connections: usize) {
        crate::eventually("the server has handled its connections", PATIENCE, || {
            self.state.handled.load(Ordering::Acquire) >= connections
        });
    }

    /// An HTTP/1.1 server that answers every request on every connection with the same bytes.
    pub fn answering(host: &Host, port: u16, answer: impl Into<Vec<u8>>) -> Self {
        let answer = answer.into();
        Self::start(host, port, move |wire| {
            let answer = answer.clone();
            serve_http(wire, move |_| answer.clone());
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections so far.
    pub fn accepted(&self) -> usize {
        self.state.accepted.load(Ordering::Relaxed)
    }
}

/// Answers requests with a Content-Length or without a body, until the client ends.
pub fn serve_http(mut wire: Wire, answer: impl Fn(&str) -> Vec<u8>) {
    loop {
        // Idle for as long as the client likes; a reset is the client's way to end.
        wire.stream.set_read_timeout(None).unwrap();
        while !wire.rest.windows(4).any(|w| w == b"\r\n\r\n") {
            match wire.fill() {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
        let head = wire.read_head();
        let length = header(&head, "content-length").map_or(0, |v| v.parse().unwrap());
        wire.read_exactly(length);
        if wire.try_send(&answer(&head)).is_err() {
            return;
        }
    }
}

/// An answer with a body and its length.
pub fn ok(body: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}
