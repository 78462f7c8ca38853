//! One stream of a session, as those see it who use it.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::frame::Frame;
use super::{Inner, LARGE, MAX_OUT, MAX_WINDOW, WINDOW};

/// What both halves know of a stream.
pub(super) struct State {
    pub id: u32,
    pub incoming: RefCell<Incoming>,
    /// The peer has said everything.
    pub ended: Cell<bool>,
    /// We have.
    pub finished: Cell<bool>,
    /// Cut off, by either side.
    pub reset: Cell<bool>,
    /// Bytes that may be sent.
    pub credit: Cell<u32>,
    /// Bytes that the peer may have under way.
    pub window: Cell<u32>,
    /// Bytes of it that are not under way.
    pub granted: Cell<u32>,
    /// Bytes read since the peer was last told.
    taken: Cell<u32>,
    /// It waits for room in what the session is to send.
    pub blocked: Cell<bool>,
    /// The last write of the session that had something of this stream.
    wrote: Cell<u64>,
    pub reader: Slot,
    pub writer: Slot,
    hangup: Slot,
}

/// Somebody who waits.
#[derive(Default)]
pub(super) struct Slot(RefCell<Option<Waker>>);

impl Slot {
    pub fn wait(&self, cx: &Context<'_>) {
        match &mut *self.0.borrow_mut() {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
    }

    pub fn wake(&self) {
        let waker = self.0.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    pub fn wake_by_ref(&self) {
        if let Some(waker) = &*self.0.borrow() {
            waker.wake_by_ref();
        }
    }
}

/// What has come and has not been read: large parts as they came, small ones put together.
#[derive(Default)]
pub(super) struct Incoming {
    parts: VecDeque<Bytes>,
    last: BytesMut,
}

impl Incoming {
    pub fn push(&mut self, data: &[u8]) {
        self.last.extend_from_slice(data);
    }

    pub fn push_part(&mut self, data: Bytes) {
        if !self.last.is_empty() {
            self.parts.push_back(self.last.split().freeze());
        }
        self.parts.push_back(data);
    }

    fn is_empty(&self) -> bool {
        self.parts.is_empty() && self.last.is_empty()
    }

    /// Moves as much as there is room for.
    fn read(&mut self, buf: &mut ReadBuf<'_>) -> usize {
        let room = buf.remaining();
        let mut take = |bytes: &[u8]| {
            let n = bytes.len().min(buf.remaining());
            buf.put_slice(&bytes[..n]);
            n
        };
        let mut read = 0;
        while read < room
            && let Some(part) = self.parts.front_mut()
        {
            let n = take(part);
            read += n;
            part.advance(n);
            if part.is_empty() {
                self.parts.pop_front();
            }
        }
        let n = take(&self.last);
        self.last.advance(n);
        if self.last.is_empty() {
            self.last = BytesMut::new();
        }
        read + n
    }
}

impl State {
    pub fn new(id: u32) -> Self {
        Self {
            id,
            incoming: RefCell::default(),
            ended: Cell::new(false),
            finished: Cell::new(false),
            reset: Cell::new(false),
            credit: Cell::new(WINDOW),
            window: Cell::new(WINDOW),
            granted: Cell::new(WINDOW),
            taken: Cell::new(0),
            blocked: Cell::new(false),
            wrote: Cell::new(0),
            reader: Slot::default(),
            writer: Slot::default(),
            hangup: Slot::default(),
        }
    }

    /// Nothing passes any more, but what has come can still be read.
    pub fn cut(&self) {
        self.reset.set(true);
        self.reader.wake();
        self.writer.wake();
        self.hangup.wake();
    }

    /// Both have said everything.
    fn is_over(&self) -> bool {
        self.finished.get() && self.ended.get()
    }
}

/// One stream of a [`Session`](super::Session): as a TCP connection under TLS is, to those who use
/// it.
///
/// Dropped before both directions have ended, it is reset, as a socket is that is closed with
/// something unread.
pub struct MuxStream {
    pub(super) state: Rc<State>,
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
    pub(super) fn new(state: Rc<State>, session: Rc<Inner>) -> Self {
        session.living.set(session.living.get() + 1);
        Self { state, session }
    }

    /// Whether it has ended with a connection that was there before it: one that may have been
    /// lost already, unnoticed, when the stream began.
    pub fn is_lost_with_older_connection(&self) -> bool {
        self.state.id > 1 && self.session.lost.get()
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
        if taken >= window / 2 && !state.ended.get() && !state.reset.get() {
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

    /// Waits for room in what the session is to send: who has had some since the last write comes
    /// after those who have had none.
    fn block(&self, cx: &Context<'_>) {
        let (state, session) = (&self.state, &self.session);
        state.writer.wait(cx);
        if !state.blocked.replace(true) {
            let served = state.wrote.get() == session.writes.get();
            let queue = &session.blocked[usize::from(served)];
            queue.borrow_mut().push(state.clone());
        }
    }
}

impl Drop for MuxStream {
    fn drop(&mut self) {
        let (state, session) = (&self.state, &self.session);
        if !state.reset.replace(true) && !state.is_over() {
            session.send(Frame::Reset(state.id));
        }
        session.forget(state.id);
        session.living.set(session.living.get() - 1);
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
            let n = incoming.read(buf);
            let all = incoming.is_empty();
            drop(incoming);
            self.took(n, all);
            return Poll::Ready(Ok(()));
        }
        // First: a stream that is closed after its end has said everything.
        if state.ended.get() {
            return Poll::Ready(Ok(()));
        }
        if state.reset.get() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
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
            self.block(cx);
            return Poll::Pending;
        }
        let n = buf.len().min(credit as usize).min(room);
        let header = Frame::Data(state.id, n).header();
        let direct = n >= LARGE && out.is_empty();
        if !(direct && session.write_now(cx, &header, &buf[..n])) {
            let out = out.fill();
            out.extend_from_slice(&header);
            out.extend_from_slice(&buf[..n]);
        }
        state.credit.set(credit - n as u32);
        state.wrote.set(session.writes.get());
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
