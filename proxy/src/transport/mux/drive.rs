//! The task behind a shared connection.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::timeout;

use super::frame::{Decoder, Frame, FrameError};
use super::stream::Incoming;
use super::{Inner, Inside, LARGE, MAX_STREAMS, MuxStream, Session, Side};
use crate::transport::ending::DELIVERY_LIMIT;
use crate::transport::{Io, scratch};

/// Bytes read in a turn, before the streams that have got something pass it on: as much as stays in
/// the cache.
const TURN: usize = 64 * 1024;
/// Bytes that wait for a peer that begins streams and does not read.
const MAX_UNREAD: usize = 1024 * 1024;
/// Room for what one read of TLS gives at most.
const RECORD: usize = 16 * 1024;

/// Reads and writes a shared connection.
pub struct Driver {
    session: Session,
    decoder: Decoder,
    /// Where reads go while much is read; what streams get are parts of it.
    chunk: BytesMut,
    /// The last read was large.
    bulk: bool,
    /// Nothing can be written any more; what has come is still read.
    failed: Option<io::Error>,
}

/// Why a shared connection ended while it had streams.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("the connection was lost: {0}")]
    Lost(#[from] io::Error),
    #[error("the peer closed the connection")]
    Closed,
    #[error("the peer does not keep to the protocol: {0}")]
    Frame(#[from] FrameError),
    #[error("the peer does not keep to the protocol: {0}")]
    Protocol(&'static str),
}

impl Driver {
    /// For the side that has connected, and begins streams.
    pub fn client(io: Io) -> (Session, Self) {
        Self::new(io, Side::Client)
    }

    /// For the side that has accepted the connection.
    pub fn server(io: Io) -> (Session, Self) {
        Self::new(io, Side::Server)
    }

    fn new(io: Io, side: Side) -> (Session, Self) {
        let session = Session::new(side, io);
        let driver = Self {
            session: session.clone(),
            decoder: Decoder::default(),
            chunk: BytesMut::new(),
            bulk: false,
            failed: None,
        };
        (session, driver)
    }

    /// Runs until the connection has ended; `accept` gets each stream that the peer begins.
    ///
    /// # Errors
    /// The connection ended before its streams had: they were reset.
    pub async fn run(
        mut self,
        mut accept: impl FnMut(Inside, MuxStream),
    ) -> Result<(), SessionError> {
        let ended = poll_fn(|cx| self.poll(cx, &mut accept)).await;
        let wire = self.session.0.wire.take();
        self.session.0.lose();
        if let (Ok(()), Some(wire)) = (&ended, wire) {
            let _ = timeout(DELIVERY_LIMIT, close(wire.io)).await;
        }
        ended
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        accept: &mut impl FnMut(Inside, MuxStream),
    ) -> Poll<Result<(), SessionError>> {
        let session = self.session.0.clone();
        session.driver.wait(cx);
        session.woken.set(false);
        if session.given_up.get() {
            let gone = io::Error::new(io::ErrorKind::TimedOut, "nothing is acknowledged");
            return Poll::Ready(Err(gone.into()));
        }
        let mut turn = 0;
        while turn < TURN {
            match self.poll_read(cx, &session, accept) {
                Poll::Ready(Ok(0)) if session.streams.borrow().is_empty() => {
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(Ok(0)) => {
                    let lost = self.failed.take().map(SessionError::Lost);
                    return Poll::Ready(Err(lost.unwrap_or(SessionError::Closed)));
                }
                Poll::Ready(Ok(n)) => turn += n,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    if let Some(error) = self.failed.take() {
                        return Poll::Ready(Err(error.into()));
                    }
                    match send(cx, &session) {
                        Ok(sent) => return self.poll_end(&session, sent),
                        Err(error) => self.failed = Some(error),
                    }
                }
            }
        }
        if self.failed.is_none() {
            self.failed = send(cx, &session).err();
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// One read, and what the frames in it say; 0 bytes are the end.
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        session: &Rc<Inner>,
        accept: &mut impl FnMut(Inside, MuxStream),
    ) -> Poll<Result<usize, SessionError>> {
        if self.bulk {
            if self.chunk.capacity() < RECORD {
                self.chunk.reserve(scratch::SIZE);
            }
            let read = match &mut *session.wire.borrow_mut() {
                Some(wire) => pin!(wire.io.read_buf(&mut self.chunk)).poll(cx),
                None => Poll::Ready(Ok(0)),
            };
            if read.is_pending() {
                // A connection that waits holds no memory.
                self.chunk = BytesMut::new();
            }
            let n = ready!(read)?;
            let bytes = self.chunk.split().freeze();
            let keep = |incoming: &mut Incoming, data: &[u8]| match data.len() {
                LARGE.. => incoming.push_part(bytes.slice_ref(data)),
                // Not worth keeping the whole for.
                _ => incoming.push(data),
            };
            hear(&mut self.decoder, session, &bytes, keep, accept)?;
            self.bulk = n >= LARGE;
            if !self.bulk {
                self.chunk = BytesMut::new();
            }
            return Poll::Ready(Ok(n));
        }
        scratch::PLAINTEXT.with(|scratch| {
            let mut scratch = scratch.borrow_mut();
            let mut read = ReadBuf::new(&mut scratch);
            match &mut *session.wire.borrow_mut() {
                Some(wire) => ready!(Pin::new(&mut wire.io).poll_read(cx, &mut read))?,
                None => return Poll::Ready(Ok(0)),
            }
            let input = read.filled();
            hear(&mut self.decoder, session, input, Incoming::push, accept)?;
            self.bulk = input.len() >= LARGE;
            Poll::Ready(Ok(input.len()))
        })
    }

    /// Ready when the connection has done its work.
    fn poll_end(&self, session: &Inner, sent: bool) -> Poll<Result<(), SessionError>> {
        // The accepting side waits until the peer knows.
        let known = session.side == Side::Client || session.left.get();
        let over = session.closing.get() && known && session.streams.borrow().is_empty();
        if over && sent {
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    }
}

/// Writes what there is to be sent: whether the kernel has all of it.
fn send(cx: &mut Context<'_>, session: &Inner) -> io::Result<bool> {
    match &mut *session.wire.borrow_mut() {
        Some(wire) => wire.poll_send(cx, session),
        None => Ok(true),
    }
}

/// Ends the connection, and reads until the peer has ended it, too: closed with something unread or
/// to come, it would be reset, and what the kernel has not delivered be lost.
async fn close(mut io: Io) {
    if poll_fn(|cx| Pin::new(&mut io).poll_shutdown(cx))
        .await
        .is_err()
    {
        return;
    }
    let mut unread = [0; 1024];
    while io.read(&mut unread).await.is_ok_and(|n| n > 0) {}
}

/// Does what the frames in `input` say; `keep` makes data stay.
fn hear(
    decoder: &mut Decoder,
    session: &Rc<Inner>,
    mut input: &[u8],
    keep: impl Fn(&mut Incoming, &[u8]),
    accept: &mut impl FnMut(Inside, MuxStream),
) -> Result<(), SessionError> {
    while !input.is_empty()
        && let Some(frame) = decoder.next(&mut input)?
    {
        heard(session, frame, &keep, accept)?;
    }
    Ok(())
}

/// Does what a frame says.
fn heard(
    session: &Rc<Inner>,
    frame: Frame<&[u8]>,
    keep: &impl Fn(&mut Incoming, &[u8]),
    accept: &mut impl FnMut(Inside, MuxStream),
) -> Result<(), SessionError> {
    // One that is not known was given up here, and the peer has not heard of that yet.
    let find = |id| session.streams.borrow().get(&id).cloned();
    match frame {
        Frame::Data(id, data) => {
            let Some(stream) = find(id) else {
                return Ok(());
            };
            let granted = stream.granted.get();
            let left = granted
                .checked_sub(data.len() as u32)
                .ok_or(SessionError::Protocol("more data than there is room for"))?;
            if stream.ended.get() {
                return Err(SessionError::Protocol("data after the end of its stream"));
            }
            stream.granted.set(left);
            keep(&mut stream.incoming.borrow_mut(), data);
            stream.reader.wake();
        }
        Frame::Open(id, inside) => {
            if session.side == Side::Client || id <= session.newest.get() {
                return Err(SessionError::Protocol("a stream that may not begin"));
            }
            if session.out.borrow().len() >= MAX_UNREAD {
                return Err(SessionError::Protocol(
                    "streams without end, and nothing is read",
                ));
            }
            session.newest.set(id);
            if session.living.get() >= MAX_STREAMS {
                session.send(Frame::Reset(id));
            } else {
                accept(inside, session.begin(id));
            }
        }
        Frame::End(id) => {
            let Some(stream) = find(id) else {
                return Ok(());
            };
            stream.ended.set(true);
            if stream.finished.get() {
                session.forget(id);
            }
            stream.reader.wake();
        }
        Frame::Reset(id) => {
            let Some(stream) = find(id) else {
                return Ok(());
            };
            session.forget(id);
            stream.cut();
        }
        Frame::Credit(id, bytes) => {
            let Some(stream) = find(id) else {
                return Ok(());
            };
            let credit = stream.credit.get().saturating_add(bytes);
            stream.credit.set(credit);
            stream.writer.wake();
        }
        Frame::Leaving => {
            session.left.set(true);
            if session.side == Side::Client {
                // The peer waits to hear that this is known.
                if !session.leaving.replace(true) {
                    session.send(Frame::Leaving);
                }
                session.closing.set(true);
            }
        }
    }
    Ok(())
}
