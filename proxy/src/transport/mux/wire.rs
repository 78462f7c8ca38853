//! The connection below the streams, and what is being written to it.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::AsyncWrite;

use super::Inner;
use super::frame::HEADER;
use crate::transport::Io;
use crate::transport::scratch::{self, Spare};

#[derive(Debug)]
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

    /// Writes a frame past those that wait: ready when it is taken whole, pending when none of it
    /// is. The driver has to run after it.
    pub fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        header: &[u8; HEADER],
        data: &[u8],
    ) -> Poll<io::Result<()>> {
        if !self.writing.is_empty() {
            return Poll::Pending;
        }
        let frame = [IoSlice::new(header), IoSlice::new(data)];
        let n = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, &frame))?;
        if n == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.unflushed = true;
        if n < HEADER + data.len() {
            let rest = self.writing.fill();
            rest.extend_from_slice(header.get(n..).unwrap_or_default());
            rest.extend_from_slice(&data[n.saturating_sub(HEADER)..]);
        }
        Poll::Ready(Ok(()))
    }

    /// Writes what there is to be sent, as far as the connection takes it.
    pub fn poll_send(&mut self, cx: &mut Context<'_>, session: &Inner) -> io::Result<()> {
        session.sent.set(false);
        loop {
            if self.written == self.writing.len() {
                self.writing.clear();
                self.written = 0;
                std::mem::swap(&mut self.writing, &mut *session.out.borrow_mut());
                for waker in session.blocked.take() {
                    waker.wake();
                }
                if self.writing.is_empty() {
                    break;
                }
            }
            match Pin::new(&mut self.io).poll_write(cx, &self.writing[self.written..]) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(n)) => {
                    self.written += n;
                    self.unflushed = true;
                }
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => return Ok(()),
            }
        }
        if self.unflushed {
            match Pin::new(&mut self.io).poll_flush(cx) {
                Poll::Ready(flushed) => {
                    flushed?;
                    self.unflushed = false;
                }
                Poll::Pending => return Ok(()),
            }
        }
        session.sent.set(true);
        Ok(())
    }
}
