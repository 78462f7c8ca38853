//! The load generator: closed loop (a connection sends its next request when it has the answer to
//! the last), one thread, and a window in which everything is counted.

mod histogram;
pub mod http1;
pub mod http2;

pub use histogram::Histogram;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// HTTP/1.1, kept-alive connections, a tiny answer.
    Http1,
    /// HTTP/1.1, a TCP connection for every request.
    Http1Close,
    /// HTTP/1.1, answers of 1 MiB.
    Http1Large,
    /// HTTP/2 with prior knowledge, a tiny answer.
    Http2,
    /// HTTP/2 as unary gRPC calls have it: a message each way, status in the trailers.
    Grpc,
}

/// One measurement.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub kind: Kind,
    pub target: SocketAddr,
    /// HTTP/1.1 with tiny answers: what is asked for.
    pub path: &'static str,
    pub connections: usize,
    /// HTTP/2: streams open at once on each connection.
    pub streams: usize,
    pub warmup: Duration,
    pub window: Duration,
}

/// What came of it, inside the window only.
#[derive(Clone, Default)]
pub struct Outcome {
    pub latencies: Histogram,
    /// Requests that failed, or were answered with something other than 200.
    pub errors: u64,
    /// The first of them, in words.
    pub first_error: Option<String>,
    pub elapsed: Duration,
}

impl Outcome {
    pub fn requests_per_second(&self) -> f64 {
        self.latencies.count() as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// Copies of requests that did not arrive.
    pub fn missing(&mut self, copies: u64) {
        if copies > 0 {
            self.fail(format_args!("{copies} copies are missing"));
            self.errors += copies - 1;
        }
    }

    fn fail(&mut self, error: impl std::fmt::Display) {
        self.errors += 1;
        if self.first_error.is_none() {
            self.first_error = Some(error.to_string());
        }
    }
}

/// Where a run stands: warming up, inside the window, or done.
struct Window<'a> {
    opens: Instant,
    closes: Instant,
    opened: Option<Instant>,
    edge: &'a mut dyn FnMut(Edge),
}

/// The moments at which counters are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edge {
    Opens,
    Closes,
}

impl<'a> Window<'a> {
    fn new(load: &Load, edge: &'a mut dyn FnMut(Edge)) -> Self {
        let opens = Instant::now() + load.warmup;
        Self {
            opens,
            closes: opens + load.window,
            opened: None,
            edge,
        }
    }

    /// Opens the window when it is time to; true while requests are counted.
    fn is_open(&mut self, now: Instant) -> bool {
        if self.opened.is_none() && now >= self.opens {
            (self.edge)(Edge::Opens);
            self.opened = Some(Instant::now());
        }
        self.opened.is_some()
    }

    fn is_over(&self, now: Instant) -> bool {
        now >= self.closes
    }

    fn close(self, outcome: &mut Outcome) {
        if let Some(opened) = self.opened {
            outcome.elapsed = opened.elapsed();
        }
        (self.edge)(Edge::Closes);
    }
}

/// Runs one measurement on the calling thread; `edge` is called when the window opens and closes.
pub fn run(load: &Load, edge: &mut dyn FnMut(Edge)) -> anyhow::Result<Outcome> {
    match load.kind {
        Kind::Http1 | Kind::Http1Close | Kind::Http1Large => http1::run(load, edge),
        Kind::Http2 | Kind::Grpc => http2::run(load, edge),
    }
}
