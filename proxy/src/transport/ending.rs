//! Ends other than a finished one: resets, sent and noticed.

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use super::mux::MuxStream;
use super::{Io, Socket, Stream, scratch};

/// How long an ending connection waits for a peer that takes nothing of what is left for it. A
/// peer that is slower than this loses the rest with the reset.
pub const DELIVERY_STALL: Duration = Duration::from_secs(1);
/// How long it waits altogether while the peer still takes something.
pub const DELIVERY_LIMIT: Duration = Duration::from_secs(10);

/// How long a connection that is [left](Io::leave) waits for its peer to end it too.
pub const LEAVE: Duration = Duration::from_secs(1);

impl Io {
    /// Ends the connection so that the peer sees it cut off, not finished, after all that was
    /// written. Returns at once; where something has still to be delivered, a task does
    /// [`Io::abort_delivered`].
    pub fn abort(self) {
        let own = match self.into_own() {
            Ok(own) => own,
            Err(shared) => return shared.reset(),
        };
        if own.is_plain() && unsent(own.tcp().as_fd()) == 0 {
            let _ = SockRef::from(own.tcp()).set_linger(Some(Duration::ZERO));
            return;
        }
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(own.abort_delivered());
        }
    }

    /// Ends the connection so that the peer sees it cut off, not finished, once it has all that
    /// was written (within [`DELIVERY_STALL`] and [`DELIVERY_LIMIT`]).
    ///
    /// Plain: a reset. A reset throws away what the kernel has not sent or may have to send again,
    /// so it waits for the peer's kernel to have acknowledged everything.
    ///
    /// TLS: TCP is ended without `close_notify` (RFC 8446 section 6.1), which the reader at the
    /// other side reports as `UnexpectedEof` after all data before it; a reset follows when
    /// everything is acknowledged, for a peer that had `close_notify` before.
    ///
    /// Shared: the frame that says so comes after everything before it, and nothing is waited for.
    pub async fn abort_delivered(self) {
        match self.into_own() {
            Ok(own) => own.abort_delivered().await,
            Err(shared) => shared.reset(),
        }
    }

    /// Ends a connection that was opened, and is not used after all: in order, where dropping it
    /// would say that it is cut off. Returns at once; a shared one is left by a task of the worker
    /// (so this is for its threads), because the peer's end has to be heard of.
    pub fn leave(self) {
        let mut tls = match self {
            // Closing it says so.
            Self::Plain(_) => return,
            Self::Shared(mut stream) => {
                tokio::task::spawn_local(async move {
                    let mut unheard = [0; 1024];
                    let left = async {
                        stream.shutdown().await?;
                        while stream.read(&mut unheard).await? > 0 {}
                        io::Result::Ok(())
                    };
                    let _ = timeout(LEAVE, left).await;
                });
                return;
            }
            tls => tls,
        };
        let mut cx = Context::from_waker(Waker::noop());
        let _ = Pin::new(&mut tls).poll_shutdown(&mut cx);
    }

    fn into_own(self) -> Result<Own, MuxStream> {
        Ok(match self {
            Self::Plain(tcp) => Own::Plain(tcp),
            Self::Client(tls) | Self::Origin(tls) => Own::Client(tls),
            Self::Server(tls) => Own::Server(tls),
            Self::Shared(stream) => return Err(stream),
        })
    }

    /// Notices a reset on a connection that is not read from (any more): a peer that has
    /// half-closed, or that waits for a response. May take a second descriptor of the socket, so it
    /// must be dropped before the connection can close.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn hangup(&self) -> io::Result<Hangup> {
        if let Self::Shared(stream) = self {
            return Ok(Hangup(Box::pin(stream.hangup())));
        }
        let tcp = self.tcp().ok_or(io::ErrorKind::NotConnected)?;
        let fd = tcp.as_fd().try_clone_to_owned()?;
        // SAFETY: the descriptor is owned, open, and stays the same one until it is dropped.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::ERROR) }?;
        Ok(Hangup(Box::pin(async move {
            let _ = fd.ready(Interest::ERROR).await;
        })))
    }
}

/// A connection that has its socket to itself, and is coming to its end.
enum Own {
    Plain(TcpStream),
    Client(Box<tokio_rustls::client::TlsStream<Socket>>),
    Server(Box<tokio_rustls::server::TlsStream<Socket>>),
}

impl Own {
    fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(tcp) => tcp,
            Self::Client(tls) => tls.get_ref().0.tcp(),
            Self::Server(tls) => tls.get_ref().0.tcp(),
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Self::Client(tls) => Pin::new(tls).poll_flush(cx),
            Self::Server(tls) => Pin::new(tls).poll_flush(cx),
        }
    }

    /// See [`Io::abort_delivered`].
    async fn abort_delivered(mut self) {
        let _ = timeout(DELIVERY_LIMIT, poll_fn(|cx| self.poll_flush(cx))).await;
        let plain = self.is_plain();
        if !plain {
            let _ = SockRef::from(self.tcp()).shutdown(std::net::Shutdown::Write);
        }
        let delivered = self.delivered().await;
        // Under TLS the end that was sent is a reset already, and the kernel goes on delivering
        // what comes before it after the descriptor is closed.
        if plain || delivered {
            let _ = SockRef::from(self.tcp()).set_linger(Some(Duration::ZERO));
        }
    }

    /// Whether the peer's kernel has all that was sent; waits for it.
    async fn delivered(&self) -> bool {
        let start = Instant::now();
        let mut progress = (unsent(self.tcp().as_fd()), start);
        let mut pause = Duration::from_millis(1);
        while progress.0 > 0 {
            // There is no event for it. The kernel of a peer that is alive acknowledges within
            // 40 ms.
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
            let now = Instant::now();
            let left = unsent(self.tcp().as_fd());
            if left < progress.0 {
                progress = (left, now);
            }
            if now - progress.1 >= DELIVERY_STALL || now - start >= DELIVERY_LIMIT {
                return left == 0;
            }
        }
        true
    }

    fn is_plain(&self) -> bool {
        matches!(self, Self::Plain(_))
    }
}

/// Ready when the connection was reset; see [`Io::hangup`].
pub struct Hangup(Pin<Box<dyn Future<Output = ()>>>);

impl Future for Hangup {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.0.as_mut().poll(cx)
    }
}

impl std::fmt::Debug for Hangup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hangup")
    }
}

impl Stream {
    /// Waits until the peer has said something, or has ended the connection. Nothing is lost:
    /// what it said is in `prefix` or still unread.
    pub async fn spoken(&mut self) {
        poll_fn(|cx| self.poll_spoken(cx)).await;
    }

    /// See [`Stream::spoken`].
    pub fn poll_spoken(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.prefix.is_empty() {
            return Poll::Ready(());
        }
        // Plain: no read, because a read would take the reset off the socket, and the next reader
        // would see an end instead.
        if let Io::Plain(tcp) = &self.io {
            return tcp.poll_read_ready(cx).map(|_| ());
        }
        // Readable TCP is not yet data here: session tickets come first. Errors and ends of TLS
        // are found again by the next read.
        scratch::PLAINTEXT.with(|scratch| {
            let mut scratch = scratch.borrow_mut();
            let mut read = ReadBuf::new(&mut scratch);
            let done = ready!(tokio::io::AsyncRead::poll_read(
                Pin::new(&mut self.io),
                cx,
                &mut read
            ));
            if done.is_ok() && !read.filled().is_empty() {
                self.prefix = bytes::Bytes::copy_from_slice(read.filled());
            }
            Poll::Ready(())
        })
    }
}

/// Bytes written to the socket that the peer's kernel has not acknowledged (`SIOCOUTQ`).
fn unsent(socket: BorrowedFd<'_>) -> usize {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is open, and SIOCOUTQ (TIOCOUTQ) writes one int.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if done == 0 {
        usize::try_from(bytes).unwrap_or(0)
    } else {
        0
    }
}
