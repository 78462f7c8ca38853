//! Many streams on one connection between two proxies: what the mesh sends to one endpoint shares a
//! handshake, and what is ready at the same moment shares a TLS record and a system call.
//!
//! - [`Session`]: the shared connection; [`Session::open`] begins a stream
//! - [`MuxStream`]: a stream; ends, half-closes and resets are its own
//! - [`Driver`]: the task that reads and writes the connection
//! - [`frame`]: what is on the wire
//!
//! A stream's writer appends frames to what the session is to send, and the driver, which runs when
//! everything that was ready has run, writes them at once. A receiver that does not read stops its
//! own stream's writer only: each has a window of [`WINDOW`] bytes, which grows to [`MAX_WINDOW`]
//! for a reader that keeps up.
//!
//! A connection that is lost is a reset of all its streams, after the data before it.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Io;
use super::scratch::{self, Spare};
use crate::hashing::TableMap;

mod drive;
pub mod frame;
#[cfg(test)]
mod tests;
mod wire;

pub use drive::{Driver, SessionError};
use frame::Frame;
pub use frame::Inside;
use wire::Wire;

/// Bytes that a stream may send before its receiver has taken any.
pub const WINDOW: u32 = 128 * 1024;
/// What a window may grow to: 50 MB/s over 10 ms of round trip, and what a reader that stalls
/// costs at most.
pub const MAX_WINDOW: u32 = 512 * 1024;
/// Bytes that wait for the network at most before streams wait for room.
const MAX_OUT: usize = scratch::SIZE;
/// Written by the stream itself when nothing waits before it, and handed on without a copy.
const LARGE: usize = 8 * 1024;
/// Streams of a session at most when it is chosen for another; then a second one is opened.
pub const FULL: usize = 128;
/// Streams that a peer may have open at once.
const MAX_STREAMS: usize = 4096;
/// How long what was sent may stay without an acknowledgement before the peer's host is taken for
/// gone (RFC 5482): its streams cannot tell themselves from a slow answer.
const USER_TIMEOUT: Duration = Duration::from_secs(15);

/// A connection that streams share. Cloned handles are of the same one.
#[derive(Debug, Clone)]
pub struct Session(Rc<Inner>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Server,
}

#[derive(Debug)]
struct Inner {
    side: Side,
    wire: RefCell<Wire>,
    /// Frames to be sent.
    out: RefCell<Spare>,
    streams: RefCell<TableMap<u32, Rc<State>>>,
    driver: Slot,
    /// The driver has been woken and has not run yet.
    woken: Cell<bool>,
    /// Streams that wait for room in `out`.
    blocked: RefCell<Vec<Waker>>,
    /// Of the newest stream.
    newest: Cell<u32>,
    /// We have said that no stream begins any more.
    leaving: Cell<bool>,
    /// The peer has.
    left: Cell<bool>,
    /// The connection ends with its last stream.
    closing: Cell<bool>,
    lost: Cell<bool>,
    /// The driver has handed everything it had to the kernel.
    sent: Cell<bool>,
    /// Since when there has been no stream.
    idle: Cell<Option<Instant>>,
}

/// What both halves know of a stream.
#[derive(Debug)]
struct State {
    id: u32,
    incoming: RefCell<VecDeque<Bytes>>,
    /// The peer has said everything.
    ended: Cell<bool>,
    /// We have.
    finished: Cell<bool>,
    /// Cut off, by either side.
    reset: Cell<bool>,
    /// Bytes that may be sent.
    credit: Cell<u32>,
    /// Bytes that the peer may have under way.
    window: Cell<u32>,
    /// Bytes of it that are not under way.
    granted: Cell<u32>,
    /// Bytes read since the peer was last told.
    taken: Cell<u32>,
    reader: Slot,
    writer: Slot,
    hangup: Slot,
}

/// Somebody who waits.
#[derive(Debug, Default)]
struct Slot(RefCell<Option<Waker>>);

impl Slot {
    fn wait(&self, cx: &Context<'_>) {
        match &mut *self.0.borrow_mut() {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
    }

    fn wake(&self) {
        let waker = self.0.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Session {
    fn new(side: Side, io: Io) -> Self {
        Self(Rc::new(Inner {
            side,
            wire: RefCell::new(Wire::new(io)),
            out: RefCell::default(),
            streams: RefCell::default(),
            driver: Slot::default(),
            woken: Cell::new(false),
            blocked: RefCell::default(),
            newest: Cell::new(0),
            leaving: Cell::new(false),
            left: Cell::new(false),
            closing: Cell::new(false),
            lost: Cell::new(false),
            sent: Cell::new(true),
            idle: Cell::new(None),
        }))
    }

    /// Begins a stream, of which the peer hears with its first data. `None` when the session takes
    /// no more: another is to be opened.
    pub fn open(&self, inside: Inside) -> Option<MuxStream> {
        let session = &self.0;
        if !self.is_usable() || session.streams.borrow().len() >= FULL {
            return None;
        }
        let id = session.newest.get().checked_add(1)?;
        session.newest.set(id);
        session.send(Frame::Open(id, inside));
        Some(session.begin(id))
    }

    /// Whether streams may still begin.
    pub fn is_usable(&self) -> bool {
        let session = &self.0;
        !(session.lost.get() || session.left.get() || session.leaving.get())
    }

    /// Streams that are open.
    pub fn streams(&self) -> usize {
        self.0.streams.borrow().len()
    }

    /// Since when it has had no stream.
    pub fn idle_since(&self) -> Option<Instant> {
        self.0.idle.get()
    }

    /// No stream begins any more, and the connection ends with its last one. The accepting side
    /// waits for its peer, whose newest stream may be on its way.
    pub fn leave(&self) {
        let session = &self.0;
        if !session.leaving.replace(true) {
            session.send(Frame::Leaving);
        }
        session.closing.set(true);
        session.wake();
    }

    /// Whether the kernel has all that was to be sent, or it cannot be sent any more.
    pub fn is_flushed(&self) -> bool {
        let session = &self.0;
        session.lost.get() || (session.sent.get() && session.out.borrow().is_empty())
    }
}

impl Inner {
    fn send(&self, frame: Frame<usize>) {
        if !self.lost.get() {
            let frame = frame.header();
            self.out.borrow_mut().fill().extend_from_slice(&frame);
            self.wake();
        }
    }

    fn wake(&self) {
        if !self.woken.replace(true)
            && let Some(driver) = &*self.driver.0.borrow()
        {
            driver.wake_by_ref();
        }
    }

    fn begin(self: &Rc<Self>, id: u32) -> MuxStream {
        let state = Rc::new(State {
            id,
            incoming: RefCell::default(),
            ended: Cell::new(false),
            finished: Cell::new(false),
            reset: Cell::new(false),
            credit: Cell::new(WINDOW),
            window: Cell::new(WINDOW),
            granted: Cell::new(WINDOW),
            taken: Cell::new(0),
            reader: Slot::default(),
            writer: Slot::default(),
            hangup: Slot::default(),
        });
        self.idle.set(None);
        self.streams.borrow_mut().insert(id, state.clone());
        MuxStream {
            state,
            session: self.clone(),
        }
    }

    /// Nothing more is said on the stream, by either side.
    fn forget(&self, id: u32) {
        let mut streams = self.streams.borrow_mut();
        if streams.remove(&id).is_some() && streams.is_empty() {
            self.idle.set(Some(Instant::now()));
            if self.closing.get() {
                self.wake();
            }
        }
    }

    /// The connection is gone, and all streams with it.
    fn lose(&self) {
        self.lost.set(true);
        self.out.borrow_mut().clear();
        for (_, stream) in self.streams.take() {
            stream.cut();
        }
        for waker in self.blocked.take() {
            waker.wake();
        }
    }
}

impl State {
    fn cut(&self) {
        self.reset.set(true);
        self.reader.wake();
        self.writer.wake();
        self.hangup.wake();
    }
}

/// One stream of a [`Session`]: as a TCP connection under TLS is, to those who use it.
///
/// Dropped before both directions have ended, it is reset, as a socket is that is closed with
/// something unread.
pub struct MuxStream {
    state: Rc<State>,
    session: Rc<Inner>,
}

impl std::fmt::Debug for MuxStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MuxStream")
            .field("id", &self.state.id)
            .finish_non_exhaustive()
    }
}

impl MuxStream {
    /// Whether the peer has neither ended nor cut it, as far as is known here.
    pub fn is_open(&self) -> bool {
        !self.state.ended.get() && !self.state.reset.get()
    }

    /// Cuts the stream off; the peer sees that after all that was written.
    pub fn reset(self) {
        drop(self);
    }

    /// Ready when the peer has cut the stream off, or the connection is lost.
    pub fn hangup(&self) -> impl Future<Output = ()> + use<> {
        let state = self.state.clone();
        std::future::poll_fn(move |cx| {
            if state.reset.get() {
                return Poll::Ready(());
            }
            state.hangup.wait(cx);
            Poll::Pending
        })
    }

    /// Counts `n` bytes as read, and tells the peer when it may send more.
    fn took(&self, n: usize, all: bool) {
        let state = &*self.state;
        let mut taken = state.taken.get() + n as u32;
        let window = state.window.get();
        if taken >= window / 2 && self.is_open() {
            // A reader that keeps up may have more under way, and has to say so less often.
            if all && window < MAX_WINDOW {
                state.window.set(window * 2);
                taken += window;
            }
            state.granted.set(state.granted.get() + taken);
            self.session.send(Frame::Credit(state.id, taken));
            taken = 0;
        }
        state.taken.set(taken);
    }
}

impl Drop for MuxStream {
    fn drop(&mut self) {
        let over = self.state.finished.get() && self.state.ended.get();
        if !self.state.reset.replace(true) && !over {
            self.session.send(Frame::Reset(self.state.id));
        }
        self.session.forget(self.state.id);
    }
}

impl AsyncRead for MuxStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let state = &*self.state;
        let mut incoming = state.incoming.borrow_mut();
        if !incoming.is_empty() {
            let room = buf.remaining();
            while let Some(bytes) = incoming.front_mut()
                && buf.remaining() > 0
            {
                let n = bytes.len().min(buf.remaining());
                buf.put_slice(&bytes[..n]);
                bytes.advance(n);
                if bytes.is_empty() {
                    incoming.pop_front();
                }
            }
            let (n, all) = (room - buf.remaining(), incoming.is_empty());
            drop(incoming);
            self.took(n, all);
            return Poll::Ready(Ok(()));
        }
        if state.reset.get() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if state.ended.get() {
            return Poll::Ready(Ok(()));
        }
        state.reader.wait(cx);
        Poll::Pending
    }
}

impl AsyncWrite for MuxStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let (state, session) = (&*self.state, &*self.session);
        if state.reset.get() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if state.finished.get() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let credit = state.credit.get();
        if credit == 0 {
            state.writer.wait(cx);
            return Poll::Pending;
        }
        let mut out = session.out.borrow_mut();
        let room = MAX_OUT.saturating_sub(out.len());
        if room == 0 {
            session.blocked.borrow_mut().push(cx.waker().clone());
            return Poll::Pending;
        }
        let n = buf.len().min(credit as usize).min(room);
        let header = Frame::Data(state.id, n).header();
        if n >= LARGE && out.is_empty() {
            match session.wire.borrow_mut().poll_write(cx, &header, &buf[..n]) {
                Poll::Ready(Ok(())) => {
                    state.credit.set(credit - n as u32);
                    session.sent.set(false);
                    session.wake();
                    return Poll::Ready(Ok(n));
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {}
            }
        }
        let out = out.fill();
        out.extend_from_slice(&header);
        out.extend_from_slice(&buf[..n]);
        state.credit.set(credit - n as u32);
        session.wake();
        Poll::Ready(Ok(n))
    }

    /// What was written goes out by itself, as from a socket's buffer.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (state, session) = (&*self.state, &*self.session);
        if state.reset.get() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if !state.finished.replace(true) {
            session.send(Frame::End(state.id));
            if state.ended.get() {
                session.forget(state.id);
            }
        }
        Poll::Ready(Ok(()))
    }
}
