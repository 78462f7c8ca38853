//! A connection with the bytes that were read from it and not used yet, and a timer that costs
//! nothing while it does not run out.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use crate::transport::{Io, Stream};

/// Bytes read at once while heads and small bodies pass.
const SMALL_READ: usize = 4 * 1024;
/// Bytes read at once while a large body passes.
pub const LARGE_READ: usize = 64 * 1024;
/// Bytes of the worker's scratch buffer, for connections that hold no buffer of their own.
const SCRATCH: usize = 16 * 1024;

thread_local! {
    static SCRATCH_BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH].into());
}

/// A connection and the bytes read from it that are not used yet.
#[derive(Debug)]
pub struct Conn {
    pub io: Io,
    pub buf: BytesMut,
    /// The peer has finished its direction.
    pub eof: bool,
}

impl Conn {
    pub fn new(stream: Stream) -> Self {
        Self {
            io: stream.io,
            buf: BytesMut::from(&stream.prefix[..]),
            eof: false,
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
        if self.buf.is_empty() && want <= SMALL_READ as u64 {
            return self.poll_fill_through_scratch(cx);
        }
        let size = if want > SMALL_READ as u64 { LARGE_READ } else { SMALL_READ };
        if self.buf.capacity() - self.buf.len() < size / 4 {
            self.buf.reserve(size);
        }
        let mut read = std::pin::pin!(self.io.read_buf(&mut self.buf));
        let n = ready!(std::future::Future::poll(read.as_mut(), cx))?;
        self.eof |= n == 0;
        Poll::Ready(Ok(n))
    }

    /// Reads by way of the worker's buffer: a connection that waits holds no memory.
    fn poll_fill_through_scratch(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        SCRATCH_BUFFER.with_borrow_mut(|scratch| {
            let mut read = ReadBuf::new(scratch);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut read))?;
            let bytes = read.filled();
            if bytes.is_empty() {
                self.eof = true;
            } else {
                self.buf.extend_from_slice(bytes);
            }
            Poll::Ready(Ok(bytes.len()))
        })
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
