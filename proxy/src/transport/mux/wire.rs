//! The connection below the streams, and what is being written to it.

use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::AsyncWrite;
use tokio::net::TcpStream;

use super::Inner;
use super::frame::HEADER;
use crate::transport::Io;
use crate::transport::scratch::{self, Spare};

/// Bytes that the kernel takes beyond what is under way.
const NOT_SENT: u32 = 128 * 1024;
/// Times that the kernel has sent the same bytes again, without an answer, when a connection is
/// stalled: after 600 ms at least (RFC 6298).
const STALLED: u8 = 2;

pub(super) struct Wire {
    pub io: Io,
    /// Frames that are being written, from `written` on.
    writing: Spare,
    written: usize,
    /// TLS may hold what the socket has not taken.
    unflushed: bool,
}

impl Wire {
    pub fn new(mut io: Io) -> Self {
        if let Some(tcp) = io.tcp() {
            // What a stream says does not wait behind megabytes of another's.
            let _ = socket2::SockRef::from(tcp).set_tcp_notsent_lowat(NOT_SENT);
        }
        // A frame of the largest write is to be taken whole.
        let limit = Some(scratch::SIZE + 1024);
        match &mut io {
            Io::Client(tls) => tls.get_mut().1.set_buffer_limit(limit),
            Io::Server(tls) => tls.get_mut().1.set_buffer_limit(limit),
            _ => {}
        }
        Self {
            io,
            writing: Spare::default(),
            written: 0,
            unflushed: false,
        }
    }

    /// Whether the peer's host acknowledges nothing. Asks the kernel.
    pub fn is_stalled(&self) -> bool {
        self.io.tcp().is_some_and(|tcp| resent(tcp) >= STALLED)
    }

    /// Writes a frame at once: whether it was taken, whole. The driver has to run after it, and
    /// finds out why if it was not.
    pub fn write_now(&mut self, cx: &mut Context<'_>, header: &[u8; HEADER], data: &[u8]) -> bool {
        if !self.writing.is_empty() {
            return false;
        }
        let frame = [IoSlice::new(header), IoSlice::new(data)];
        match Pin::new(&mut self.io).poll_write_vectored(cx, &frame) {
            Poll::Ready(Ok(n)) if n > 0 => {
                self.unflushed = true;
                if n < HEADER + data.len() {
                    let rest = self.writing.fill();
                    rest.extend_from_slice(header.get(n..).unwrap_or_default());
                    rest.extend_from_slice(&data[n.saturating_sub(HEADER)..]);
                }
                true
            }
            _ => false,
        }
    }

    /// Writes what there is to be sent: whether the kernel has all of it.
    pub fn poll_send(&mut self, cx: &mut Context<'_>, session: &Inner) -> io::Result<bool> {
        loop {
            if self.written == self.writing.len() {
                self.writing.clear();
                self.written = 0;
                std::mem::swap(&mut self.writing, &mut *session.out.borrow_mut());
                if self.writing.is_empty() {
                    break;
                }
                session.unblock();
            }
            match Pin::new(&mut self.io).poll_write(cx, &self.writing[self.written..]) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(n)) => {
                    self.written += n;
                    self.unflushed = true;
                }
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => return Ok(false),
            }
        }
        if self.unflushed {
            match Pin::new(&mut self.io).poll_flush(cx) {
                Poll::Ready(flushed) => {
                    flushed?;
                    self.unflushed = false;
                }
                Poll::Pending => return Ok(false),
            }
        }
        Ok(true)
    }
}

/// How often the kernel has sent the oldest unacknowledged bytes again (`TCP_INFO`); 0 when it does
/// not say.
fn resent(tcp: &TcpStream) -> u8 {
    // SAFETY: plain numbers, of which all zero is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut size = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the descriptor is open, and the kernel writes no more than `size` bytes.
    let asked = unsafe {
        libc::getsockopt(
            tcp.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut size,
        )
    };
    if asked == 0 { info.tcpi_retransmits } else { 0 }
}
