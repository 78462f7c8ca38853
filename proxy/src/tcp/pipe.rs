//! One direction of a copied connection.

use std::cell::Cell;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::urgent::Urgent;
use crate::transport::{Io, Stream, scratch};

/// Reads per turn, before other connections of the worker get theirs: 1 MiB at most.
const TURN: usize = 16;

/// Which side of a pipe the connection was lost at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lost {
    Source,
    Sink,
}

/// Bytes from one stream to the other, then their end.
///
/// What is read into the worker's buffer is written at once; only what the sink does not take is
/// kept, and nothing more is read before that is gone: a slow reader slows its writer, and a
/// connection without data under way holds no buffer.
#[derive(Debug)]
pub(super) struct Pipe {
    waiting: Bytes,
    /// Something was written since the last flush (TLS keeps what the socket did not take).
    unflushed: bool,
    state: State,
    /// Set when bytes have moved; for whoever watches for idleness.
    pub(super) moved: bool,
    /// Of the source, where it is an application's own connection.
    urgent: Option<Urgent>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// The source has ended; the sink is to be told after what is waiting.
    Ending,
    /// The source is gone; what it said before is passed on, but no end.
    Lost,
    Done,
}

impl Pipe {
    /// What was read of `source` already goes first.
    pub(super) fn new(source: &mut Stream) -> Self {
        Self {
            waiting: std::mem::take(&mut source.prefix),
            unflushed: false,
            state: State::Open,
            moved: false,
            urgent: Urgent::watch(&source.io),
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// The source was lost: what arrived before is still passed on, and then nothing, not even an
    /// end (a socket that was reset reads as ended the second time).
    pub(super) fn lose_source(&mut self) {
        if self.state != State::Done {
            self.state = State::Lost;
        }
    }

    /// Whether something has still to be taken by the sink.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty() || self.unflushed
    }

    /// Moves what can be moved. Ready when the end was passed on, or a side was lost.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut Stream,
        sink: &mut Stream,
        count: &Cell<u64>,
    ) -> Poll<Result<(), Lost>> {
        for _ in 0..TURN {
            while !self.waiting.is_empty() {
                let written = ready!(Pin::new(&mut *sink).poll_write(cx, &self.waiting));
                let written = self.wrote(written, count)?;
                self.waiting.advance(written);
            }
            self.waiting = Bytes::new();
            match self.state {
                State::Done => return Poll::Ready(Ok(())),
                State::Ending => {
                    ready!(Pin::new(&mut *sink).poll_shutdown(cx)).map_err(|_| Lost::Sink)?;
                    self.unflushed = false;
                    self.state = State::Done;
                }
                State::Open | State::Lost => match self.poll_move(cx, source, sink, count) {
                    Poll::Ready(done) => done?,
                    Poll::Pending => {
                        if self.unflushed {
                            ready!(Pin::new(&mut *sink).poll_flush(cx)).map_err(|_| Lost::Sink)?;
                            self.unflushed = false;
                        }
                        return Poll::Pending;
                    }
                },
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// One read, and as much of it written as the sink takes.
    fn poll_move(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut Stream,
        sink: &mut Stream,
        count: &Cell<u64>,
    ) -> Poll<Result<(), Lost>> {
        scratch::PLAINTEXT.with(|scratch| {
            let mut scratch = scratch.borrow_mut();
            let mut read = ReadBuf::new(&mut scratch);
            let mut done = Pin::new(&mut *source).poll_read(cx, &mut read);
            if done.is_pending()
                && let (Some(urgent), Io::Plain(tcp)) = (&self.urgent, &source.io)
            {
                done = urgent.poll_read(cx, tcp, &mut read);
            }
            if ready!(done).is_err() {
                return Poll::Ready(Err(Lost::Source));
            }
            let mut rest = read.filled();
            if rest.is_empty() {
                self.state = match self.state {
                    State::Lost => State::Done,
                    _ => State::Ending,
                };
                return Poll::Ready(Ok(()));
            }
            self.moved = true;
            while !rest.is_empty() {
                match Pin::new(&mut *sink).poll_write(cx, rest) {
                    Poll::Ready(written) => rest = &rest[self.wrote(written, count)?..],
                    Poll::Pending => {
                        self.waiting = Bytes::copy_from_slice(rest);
                        break;
                    }
                }
            }
            Poll::Ready(Ok(()))
        })
    }

    fn wrote(&mut self, written: std::io::Result<usize>, count: &Cell<u64>) -> Result<usize, Lost> {
        match written {
            Ok(0) | Err(_) => Err(Lost::Sink),
            Ok(n) => {
                self.moved = true;
                self.unflushed = true;
                count.set(count.get() + n as u64);
                Ok(n)
            }
        }
    }
}
