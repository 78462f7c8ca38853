//! Byte streams as the data path sees them: plain TCP or TLS, with what was read already.
//!
//! - [`connect`]: opening them ([`connect_plain`], [`connect_tls`]), TLS on accepted ones
//!   ([`accept_tls`]), and why it did not work ([`ConnectError`], [`TlsError`])
//! - [`mux`]: many streams on one TLS connection between proxies
//! - [`eyeballs`]: connecting to a name of both address families
//! - [`ending`]: resets that come after the data before them ([`Io::abort`]), and noticing a
//!   peer's ([`Hangup`])
//! - [`socket`], [`scratch`]: reading with the worker's buffers, so that an idle connection holds
//!   none
//!
//! How a connection ends is said the same way over all kinds:
//!
//! | | plain | TLS | shared | reader sees |
//! |---|---|---|---|---|
//! | half-close ([`poll_shutdown`](AsyncWrite::poll_shutdown)) | FIN | `close_notify`, FIN | end frame | 0 bytes |
//! | unused ([`Io::leave`]) | FIN | `close_notify`, FIN | end frame | 0 bytes |
//! | reset ([`Io::abort`]) | RST | FIN (then RST) without `close_notify` | reset frame | an error |

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

pub mod connect;
pub mod ending;
pub mod eyeballs;
pub mod mux;
pub mod scratch;
pub mod socket;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use connect::{
    CONNECT_TIMEOUT, ConnectError, HANDSHAKE_TIMEOUT, KeepAlive, Options, TlsError, accept_tls,
    connect_origin, connect_outside, connect_plain, connect_tls, prepare_listener,
};
pub use ending::Hangup;
pub use eyeballs::Siblings;
pub use socket::Socket;

/// A connection: plain, under TLS, or a stream of one that is shared.
#[derive(Debug)]
pub enum Io {
    Plain(TcpStream),
    Client(Box<tokio_rustls::client::TlsStream<Socket>>),
    Server(Box<tokio_rustls::server::TlsStream<Socket>>),
    /// To a server outside the mesh, for an application that speaks in the clear.
    Origin(Box<tokio_rustls::client::TlsStream<Socket>>),
    /// To or from another proxy, on a connection that is not its own.
    Shared(mux::MuxStream),
}

/// A connection, and bytes that were read from it while finding out what it is.
#[derive(Debug)]
pub struct Stream {
    pub io: Io,
    pub prefix: Bytes,
}

impl Io {
    /// The TCP connection below, where it is this one's alone.
    pub fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Io::Plain(io) => Some(io),
            Io::Client(io) | Io::Origin(io) => Some(io.get_ref().0.tcp()),
            Io::Server(io) => Some(io.get_ref().0.tcp()),
            Io::Shared(_) => None,
        }
    }

    /// Whether a proxy of the mesh is at the other end.
    pub fn is_mesh(&self) -> bool {
        matches!(self, Io::Client(_) | Io::Server(_) | Io::Shared(_))
    }
}

impl From<Io> for Stream {
    fn from(io: Io) -> Self {
        Self {
            io,
            prefix: Bytes::new(),
        }
    }
}

impl From<TcpStream> for Stream {
    fn from(tcp: TcpStream) -> Self {
        Io::Plain(tcp).into()
    }
}

impl AsMut<Stream> for Stream {
    fn as_mut(&mut self) -> &mut Stream {
        self
    }
}

impl AsyncRead for Io {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Io::Plain(io) => Pin::new(io).poll_read(cx, buf),
            Io::Client(io) => Pin::new(io).poll_read(cx, buf),
            Io::Server(io) => Pin::new(io).poll_read(cx, buf),
            Io::Origin(io) => Pin::new(io).poll_read(cx, buf),
            Io::Shared(io) => Pin::new(io).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Io::Plain(io) => Pin::new(io).poll_write(cx, buf),
            Io::Client(io) => Pin::new(io).poll_write(cx, buf),
            Io::Server(io) => Pin::new(io).poll_write(cx, buf),
            Io::Origin(io) => Pin::new(io).poll_write(cx, buf),
            Io::Shared(io) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Io::Plain(io) => Pin::new(io).poll_write_vectored(cx, bufs),
            Io::Client(io) => Pin::new(io).poll_write_vectored(cx, bufs),
            Io::Server(io) => Pin::new(io).poll_write_vectored(cx, bufs),
            Io::Origin(io) => Pin::new(io).poll_write_vectored(cx, bufs),
            Io::Shared(io) => Pin::new(io).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Io::Plain(io) => Pin::new(io).poll_flush(cx),
            Io::Client(io) => Pin::new(io).poll_flush(cx),
            Io::Server(io) => Pin::new(io).poll_flush(cx),
            Io::Origin(io) => Pin::new(io).poll_flush(cx),
            Io::Shared(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Io::Plain(io) => Pin::new(io).poll_shutdown(cx),
            Io::Client(io) => Pin::new(io).poll_shutdown(cx),
            Io::Server(io) => Pin::new(io).poll_shutdown(cx),
            Io::Origin(io) => Pin::new(io).poll_shutdown(cx),
            Io::Shared(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.prefix.is_empty() {
            let n = self.prefix.len().min(buf.remaining());
            buf.put_slice(&self.prefix[..n]);
            self.prefix.advance(n);
            if self.prefix.is_empty() {
                self.prefix = Bytes::new();
            }
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
