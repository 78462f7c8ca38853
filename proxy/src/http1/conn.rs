//! A connection with the bytes that were read from it and not used yet, and a timer that costs
//! nothing while it does not run out.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::time::Sleep;

use crate::transport::scratch::poll_read_buf;
use crate::transport::{Io, Stream};

/// A body with more bytes than this to come is read straight into the connection's buffer.
const LARGE_BODY: u64 = 16 * 1024;
/// Bytes read at once while a large body passes.
pub const LARGE_READ: usize = 64 * 1024;

/// A connection and the bytes read from it that are not used yet.
#[derive(Debug)]
pub struct Conn {
    pub io: Io,
    pub buf: BytesMut,
    /// The peer has finished its direction.
    pub eof: bool,
    /// Requests that it has carried to a server.
    pub requests: u32,
}

impl Conn {
    pub fn new(stream: Stream) -> Self {
        Self {
            io: stream.io,
            buf: BytesMut::from(&stream.prefix[..]),
            eof: false,
            requests: 0,
        }
    }

    /// The connection as a byte stream again, unused bytes first.
    pub fn into_stream(self) -> Stream {
        Stream {
            io: self.io,
            prefix: self.buf.freeze(),
        }
    }

    /// Reads more; 0 is the end. `want` is how many bytes are known to come.
    pub fn poll_fill(&mut self, cx: &mut Context<'_>, want: u64) -> Poll<io::Result<usize>> {
        let n = if want > LARGE_BODY {
            if self.buf.capacity() - self.buf.len() < LARGE_READ / 4 {
                self.buf.reserve(LARGE_READ);
            }
            let mut read = std::pin::pin!(self.io.read_buf(&mut self.buf));
            ready!(std::future::Future::poll(read.as_mut(), cx))?
        } else {
            // By way of the worker's buffer: a connection that waits holds no memory.
            ready!(poll_read_buf(&mut self.io, cx, &mut self.buf))?
        };
        self.eof |= n == 0;
        Poll::Ready(Ok(n))
    }

    pub fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match ready!(Pin::new(&mut self.io).poll_write(cx, bytes)) {
            Ok(0) => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            other => Poll::Ready(other),
        }
    }

    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    pub fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    /// Gives the buffer back if nothing stands in it.
    pub fn release(&mut self) {
        if self.buf.is_empty() {
            self.buf = BytesMut::new();
        }
    }
}

/// A timer that is moved by writing down a new deadline: the runtime's timer behind it is touched
/// only when it fires or must fire earlier than it would.
#[derive(Debug, Default)]
pub struct LazyTimer {
    sleep: Option<Pin<Box<Sleep>>>,
    armed: Option<Instant>,
}

impl LazyTimer {
    /// Ready when `deadline` has passed; never without one.
    pub fn poll(&mut self, cx: &mut Context<'_>, deadline: Option<Instant>) -> Poll<()> {
        let Some(deadline) = deadline else {
            return Poll::Pending;
        };
        loop {
            let sleep = match (&mut self.sleep, self.armed) {
                (Some(sleep), Some(armed)) if armed <= deadline => sleep,
                (Some(sleep), _) => {
                    sleep.as_mut().reset(deadline.into());
                    self.armed = Some(deadline);
                    sleep
                }
                (slot @ None, _) => {
                    self.armed = Some(deadline);
                    slot.insert(Box::pin(tokio::time::sleep_until(deadline.into())))
                }
            };
            ready!(std::future::Future::poll(sleep.as_mut(), cx));
            self.armed = None;
            if tokio::time::Instant::now() >= deadline.into() {
                return Poll::Ready(());
            }
        }
    }

    /// Sleeps.
    pub async fn sleep(&mut self, how_long: Duration) {
        let deadline = Instant::now() + how_long;
        std::future::poll_fn(|cx| self.poll(cx, Some(deadline))).await;
    }
}
