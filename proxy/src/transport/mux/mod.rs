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
use std::rc::Rc;
use std::task::Context;
use std::time::Instant;

use super::Io;
use super::scratch::{self, Spare};
use crate::hashing::TableMap;

mod drive;
pub mod frame;
mod stream;
#[cfg(test)]
mod tests;
mod wire;

pub use drive::{Driver, SessionError};
pub use frame::Inside;
use frame::{Frame, HEADER};
pub use stream::MuxStream;
use stream::{Slot, State};
use wire::Wire;

/// Bytes that a stream may send before its receiver has taken any.
pub const WINDOW: u32 = 128 * 1024;
/// What a window may grow to: 50 MB/s over 10 ms of round trip, and what a reader that stalls
/// costs at most.
pub const MAX_WINDOW: u32 = 512 * 1024;
/// Bytes that wait for the network at most before streams wait for room.
const MAX_OUT: usize = scratch::SIZE;
/// From so many bytes on, data is written by the stream itself when nothing waits before it, and
/// kept as it was read: a copy costs more.
const LARGE: usize = 8 * 1024;
/// Streams of a session at most; for another, a second session is opened.
pub const FULL: usize = 128;
/// Streams of a peer that may be served at once.
const MAX_STREAMS: usize = 4096;

/// A connection that streams share. Cloned handles are of the same one.
#[derive(Clone)]
pub struct Session(Rc<Inner>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Server,
}

struct Inner {
    side: Side,
    /// Until the connection has ended.
    wire: RefCell<Option<Wire>>,
    /// Frames to be sent.
    out: RefCell<Spare>,
    /// How often `out` was taken to be written, from 1 on.
    writes: Cell<u64>,
    /// Those that can still hear from the peer, or it from them.
    streams: RefCell<TableMap<u32, Rc<State>>>,
    /// Streams that somebody holds.
    living: Cell<usize>,
    driver: Slot,
    /// The driver has been woken and has not run yet.
    woken: Cell<bool>,
    /// Streams that wait for room in `out`: those that got none before the last write, and those
    /// that did.
    blocked: [RefCell<Vec<Rc<State>>>; 2],
    /// Of the newest stream.
    newest: Cell<u32>,
    /// We have said that no stream begins any more.
    leaving: Cell<bool>,
    /// The peer has.
    left: Cell<bool>,
    /// The connection ends with its last stream.
    closing: Cell<bool>,
    /// It is to end as lost.
    given_up: Cell<bool>,
    lost: Cell<bool>,
    /// Since when there has been no stream.
    idle: Cell<Option<Instant>>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("side", &self.0.side)
            .field("streams", &self.0.streams.borrow().len())
            .finish_non_exhaustive()
    }
}

impl Session {
    fn new(side: Side, io: Io) -> Self {
        Self(Rc::new(Inner {
            side,
            wire: RefCell::new(Some(Wire::new(io))),
            out: RefCell::default(),
            writes: Cell::new(1),
            streams: RefCell::default(),
            living: Cell::new(0),
            driver: Slot::default(),
            woken: Cell::new(false),
            blocked: Default::default(),
            newest: Cell::new(0),
            leaving: Cell::new(false),
            left: Cell::new(false),
            closing: Cell::new(false),
            given_up: Cell::new(false),
            lost: Cell::new(false),
            idle: Cell::new(None),
        }))
    }

    /// Begins a stream. `None` when the session takes no more: another is to be opened.
    pub fn open(&self, inside: Inside) -> Option<MuxStream> {
        let session = &self.0;
        let over = session.lost.get() || session.left.get() || session.leaving.get();
        if over || session.streams.borrow().len() >= FULL || self.is_stalled() {
            return None;
        }
        let id = session.newest.get().checked_add(1)?;
        session.newest.set(id);
        session.send(Frame::Open(id, inside));
        Some(session.begin(id))
    }

    /// Whether the peer's host acknowledges nothing of what was sent. Asks the kernel.
    pub fn is_stalled(&self) -> bool {
        let wire = self.0.wire.borrow();
        wire.as_ref().is_none_or(Wire::is_stalled)
    }

    /// Ends the connection as lost.
    pub fn give_up(&self) {
        self.0.given_up.set(true);
        self.0.wake();
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
}

impl Inner {
    fn send(&self, frame: Frame<usize>) {
        if !self.lost.get() {
            let frame = frame.header();
            self.out.borrow_mut().fill().extend_from_slice(&frame);
            self.wake();
        }
    }

    /// Writes a frame at once if nothing waits before it.
    fn write_now(&self, cx: &mut Context<'_>, header: &[u8; HEADER], data: &[u8]) -> bool {
        match &mut *self.wire.borrow_mut() {
            Some(wire) => wire.write_now(cx, header, data),
            None => false,
        }
    }

    fn wake(&self) {
        if !self.woken.replace(true) {
            self.driver.wake_by_ref();
        }
    }

    fn begin(self: &Rc<Self>, id: u32) -> MuxStream {
        let state = Rc::new(State::new(id));
        self.idle.set(None);
        self.streams.borrow_mut().insert(id, state.clone());
        MuxStream::new(state, self.clone())
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
        self.wire.take();
        self.out.borrow_mut().clear();
        for (_, stream) in self.streams.take() {
            stream.cut();
        }
        self.unblock();
    }

    /// There is room in `out`.
    fn unblock(&self) {
        self.writes.set(self.writes.get() + 1);
        for queue in &self.blocked {
            for stream in queue.take() {
                stream.blocked.set(false);
                stream.writer.wake();
            }
        }
    }
}
