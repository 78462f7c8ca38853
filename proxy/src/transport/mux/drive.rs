//! The task behind a shared connection.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::frame::{Decoder, Frame, FrameError};
use super::{Inner, Inside, LARGE, MAX_STREAMS, MuxStream, Session, Side, USER_TIMEOUT};
use crate::transport::{Io, scratch};

/// Bytes read in a turn, before the streams that have got something pass it on: as much as stays in
/// the cache.
const TURN: usize = 64 * 1024;
/// Bytes that the kernel takes beyond what is under way.
const NOT_SENT: u32 = 128 * 1024;
/// Room for what one read of TLS gives at most.
const RECORD: usize = 16 * 1024;
/// Bytes that wait for a peer that begins streams which cannot be taken, and does not read.
const MAX_REFUSALS: usize = 1024 * 1024;

/// Reads and writes a shared connection.
#[derive(Debug)]
pub struct Driver {
    session: Session,
    decoder: Decoder,
    /// Where reads go while much is read; what streams get are parts of it.
    chunk: BytesMut,
    /// The last read was large.
    bulk: bool,
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
        if let Some(tcp) = io.tcp() {
            let socket = socket2::SockRef::from(tcp);
            // Without it, a host that is gone is noticed by keep-alive alone.
            let _ = socket.set_tcp_user_timeout(Some(USER_TIMEOUT));
            // What a stream says does not wait behind megabytes of another's.
            let _ = socket.set_tcp_notsent_lowat(NOT_SENT);
        }
        let session = Session::new(side, io);
        let driver = Self {
            session: session.clone(),
            decoder: Decoder::default(),
            chunk: BytesMut::new(),
            bulk: false,
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
        self.session.0.lose();
        if ended.is_ok() {
            let _ =
                poll_fn(|cx| Pin::new(&mut self.session.0.wire.borrow_mut().io).poll_shutdown(cx))
                    .await;
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
        let mut turn = 0;
        while turn < TURN {
            match self.poll_read(cx, &session, accept) {
                Poll::Ready(Ok(n)) if n > 0 => turn += n,
                Poll::Ready(Ok(_)) if session.streams.borrow().is_empty() => {
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(Ok(_)) => return Poll::Ready(Err(SessionError::Closed)),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    session.wire.borrow_mut().poll_send(cx, &session)?;
                    return self.poll_end(&session);
                }
            }
        }
        session.wire.borrow_mut().poll_send(cx, &session)?;
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
            let n = {
                let mut wire = session.wire.borrow_mut();
                let mut read = pin!(wire.io.read_buf(&mut self.chunk));
                ready!(read.as_mut().poll(cx))?
            };
            let bytes = self.chunk.split().freeze();
            let take = |data: &[u8]| match data.len() {
                LARGE.. => bytes.slice_ref(data),
                // Not worth keeping the whole for.
                _ => Bytes::copy_from_slice(data),
            };
            hear(&mut self.decoder, session, &bytes, take, accept)?;
            self.bulk = n >= LARGE;
            if !self.bulk {
                self.chunk = BytesMut::new();
            }
            return Poll::Ready(Ok(n));
        }
        scratch::PLAINTEXT.with(|scratch| {
            let mut scratch = scratch.borrow_mut();
            let mut read = ReadBuf::new(&mut scratch);
            ready!(Pin::new(&mut session.wire.borrow_mut().io).poll_read(cx, &mut read))?;
            let input = read.filled();
            let n = input.len();
            hear(
                &mut self.decoder,
                session,
                input,
                Bytes::copy_from_slice,
                accept,
            )?;
            self.bulk = n >= LARGE;
            Poll::Ready(Ok(n))
        })
    }

    /// Ready when the connection has done its work.
    fn poll_end(&self, session: &Inner) -> Poll<Result<(), SessionError>> {
        // The accepting side waits until the peer knows.
        let known = session.side == Side::Client || session.left.get();
        let over = session.closing.get() && known && session.streams.borrow().is_empty();
        if over && session.sent.get() && session.out.borrow().is_empty() {
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    }
}

/// Does what the frames in `input` say.
fn hear(
    decoder: &mut Decoder,
    session: &Rc<Inner>,
    mut input: &[u8],
    take: impl Fn(&[u8]) -> Bytes,
    accept: &mut impl FnMut(Inside, MuxStream),
) -> Result<(), SessionError> {
    while !input.is_empty()
        && let Some(frame) = decoder.next(&mut input)?
    {
        heard(session, frame, &take, accept)?;
    }
    Ok(())
}

/// Does what a frame says; `take` makes data that stays.
fn heard(
    session: &Rc<Inner>,
    frame: Frame<&[u8]>,
    take: &impl Fn(&[u8]) -> Bytes,
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
            if !data.is_empty() {
                stream.incoming.borrow_mut().push_back(take(data));
            }
            stream.reader.wake();
        }
        Frame::Open(id, inside) => {
            if session.side == Side::Client || id <= session.newest.get() {
                return Err(SessionError::Protocol("a stream that may not begin"));
            }
            session.newest.set(id);
            if session.streams.borrow().len() >= MAX_STREAMS {
                if session.out.borrow().len() >= MAX_REFUSALS {
                    return Err(SessionError::Protocol("streams without end"));
                }
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
