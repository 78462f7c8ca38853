//! DATA and trailers of one direction of a stream.

use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use http::header::{HeaderName, RETRY_AFTER};
use http::{HeaderMap, HeaderValue};

use crate::http::mirror::Tees;
use crate::http::pushback::Again;

/// The first bytes of a body up to this many go with its head, whether the peer's window is known
/// yet or not: a window is assigned to a stream when its head is written, so waiting for it would
/// write a short body by a second system call. `h2` holds back what the window does not take.
const WITH_HEAD: usize = 16 * 1024;

// As names, so that no call parses them.
static GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
static GRPC_PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");
static GRPC_DETAILS: HeaderName = HeaderName::from_static("grpc-status-details-bin");

/// What a kept chunk costs beside its bytes.
const CHUNK_COST: usize = 64;

/// Moves what one peer sends to the other, and keeps it for another try if asked to.
#[derive(Debug)]
pub(super) struct Pump {
    recv: RecvStream,
    /// What is being sent now.
    chunk: Bytes,
    /// `chunk` comes from `recv`, not from `kept`: its window is given back as it is sent.
    fresh: bool,
    source: Source,
    /// Chunks to send again in another try, and how many of them this try has sent.
    kept: Vec<Bytes>,
    again: usize,
    /// How much may be kept, how much is; `None`: nothing is kept (any more).
    room: Option<usize>,
    /// Nothing has been sent in this try.
    first: bool,
    /// END_STREAM has been given to the sink.
    done: bool,
    /// Where it goes beside its way.
    pub tees: Option<Rc<Tees>>,
    /// Bytes received.
    pub bytes: u64,
    /// Grows with everything that moves, for the idle timeout.
    pub progress: u64,
    /// What the trailers say of a call.
    pub grpc_status: Option<CallStatus>,
}

#[derive(Debug)]
enum Source {
    Open,
    Trailers(HeaderMap),
    Ended,
}

/// Why a direction stopped.
#[derive(Debug)]
pub(super) enum Stop {
    /// Who sends has reset the stream, or its connection is gone.
    Source(h2::Error),
    /// Who receives takes no more.
    Sink,
}

impl Pump {
    /// `keep`: bytes that may be kept for another try.
    pub(super) fn new(recv: RecvStream, keep: Option<usize>) -> Self {
        let done = recv.is_end_stream();
        Self {
            recv,
            chunk: Bytes::new(),
            fresh: false,
            source: if done { Source::Ended } else { Source::Open },
            kept: Vec::new(),
            again: 0,
            room: keep,
            first: true,
            done,
            tees: None,
            bytes: 0,
            progress: 0,
            grpc_status: None,
        }
    }

    /// There was no DATA and there are no trailers: END_STREAM stands with the head.
    pub(super) fn is_empty(&self) -> bool {
        matches!(self.source, Source::Ended) && self.bytes == 0
    }

    pub(super) fn is_done(&self) -> bool {
        self.done
    }

    /// All that was taken from the sender is still there.
    pub(super) fn is_replayable(&self) -> bool {
        self.room.is_some()
    }

    /// There will be no other try.
    pub(super) fn forget(&mut self) {
        self.room = None;
        if self.again == self.kept.len() {
            self.kept = Vec::new();
            self.again = 0;
        }
    }

    /// Sets how many bytes may be kept; before the first poll.
    pub(super) fn keep_up_to(&mut self, bytes: usize) {
        self.room = Some(bytes);
    }

    /// Begins again, for another try.
    pub(super) fn rewind(&mut self) {
        if self.fresh && !self.chunk.is_empty() {
            self.release(self.chunk.len());
        }
        self.chunk = Bytes::new();
        self.again = 0;
        self.first = true;
        self.done = self.is_empty();
    }

    /// Sends what is kept, which must be everything ([`Self::is_done`]), to another sink; ready when
    /// END_STREAM has been given to it.
    pub(super) fn poll_beside(
        &self,
        beside: &mut Beside,
        cx: &mut Context<'_>,
        sink: &mut SendStream<Bytes>,
    ) -> Poll<Result<(), Stop>> {
        loop {
            if beside.done {
                return Poll::Ready(Ok(()));
            }
            if beside.chunk.is_empty() {
                if let Some(chunk) = self.kept.get(beside.sent) {
                    beside.chunk = chunk.clone();
                    beside.sent += 1;
                    continue;
                }
                match &self.source {
                    Source::Trailers(trailers) => sink.send_trailers(trailers.clone()),
                    _ => sink.send_data(Bytes::new(), true),
                }
                .map_err(|_| Stop::Sink)?;
                beside.done = true;
                continue;
            }
            let last = beside.sent == self.kept.len() && matches!(self.source, Source::Ended);
            ready!(poll_part(cx, sink, &mut beside.chunk, !beside.begun, last))?;
            beside.begun = true;
            beside.done = last && beside.chunk.is_empty();
        }
    }

    /// Goes on where another sink has got to, which takes the place of the first.
    pub(super) fn go_on(&mut self, beside: Beside) {
        self.chunk = beside.chunk;
        self.again = beside.sent;
        self.fresh = false;
        self.first = !beside.begun;
        self.done = beside.done;
    }

    /// Trailers that have come already, right behind the head: nothing else of the body will
    /// come. What else has come is kept for [`Pump::poll`].
    pub(super) fn early_trailers(&mut self, cx: &mut Context<'_>) -> Option<&HeaderMap> {
        if !self.chunk.is_empty() || !matches!(self.source, Source::Open) {
            return None;
        }
        match self.recv.poll_data(cx) {
            Poll::Ready(Some(Ok(data))) => self.received(data),
            Poll::Ready(None) => {
                if let Poll::Ready(Ok(Some(trailers))) = self.recv.poll_trailers(cx) {
                    self.source = Source::Trailers(trailers);
                }
            }
            // An error stays for the next poll.
            _ => {}
        }
        match &self.source {
            Source::Trailers(trailers) => Some(trailers),
            _ => None,
        }
    }

    /// Moves what can be moved; ready when END_STREAM has been given to `sink`, or no more can
    /// come to that.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut SendStream<Bytes>,
    ) -> Poll<Result<(), Stop>> {
        loop {
            if self.done {
                return Poll::Ready(Ok(()));
            }
            if !self.chunk.is_empty() {
                ready!(self.poll_chunk(cx, sink))?;
                continue;
            }
            if self.again < self.kept.len() {
                self.chunk = self.kept[self.again].clone();
                self.again += 1;
                self.fresh = false;
                continue;
            }
            match &mut self.source {
                Source::Open => match ready!(self.recv.poll_data(cx)) {
                    Some(Ok(data)) => self.received(data),
                    Some(Err(error)) => return Poll::Ready(Err(Stop::Source(error))),
                    None => {
                        let trailers = ready!(self.recv.poll_trailers(cx)).map_err(Stop::Source)?;
                        if let Some(tees) = self.tees.take() {
                            tees.end();
                        }
                        self.source = trailers.map_or(Source::Ended, Source::Trailers);
                    }
                },
                Source::Trailers(trailers) => {
                    self.grpc_status = CallStatus::of(trailers);
                    let trailers = match self.room {
                        Some(_) => trailers.clone(),
                        None => std::mem::take(trailers),
                    };
                    sink.send_trailers(trailers).map_err(|_| Stop::Sink)?;
                    self.progress += 1;
                    self.done = true;
                }
                Source::Ended => {
                    sink.send_data(Bytes::new(), true).map_err(|_| Stop::Sink)?;
                    self.progress += 1;
                    self.done = true;
                }
            }
        }
    }

    /// DATA has come. END_STREAM stays with it; empty frames say nothing else and are left out.
    fn received(&mut self, data: Bytes) {
        self.progress += 1;
        if let Some(tees) = &self.tees
            && !data.is_empty()
        {
            tees.push_bytes(&data);
        }
        if self.recv.is_end_stream() {
            self.source = Source::Ended;
            if let Some(tees) = self.tees.take() {
                tees.end();
            }
        }
        if data.is_empty() {
            return;
        }
        self.bytes += data.len() as u64;
        if let Some(room) = &mut self.room {
            match room.checked_sub(data.len() + CHUNK_COST) {
                Some(left) => {
                    *room = left;
                    self.kept.push(data.clone());
                    self.again = self.kept.len();
                }
                None => {
                    self.again = self.kept.len();
                    self.forget();
                }
            }
        }
        self.chunk = data;
        self.fresh = true;
    }

    /// Sends as much of the chunk as the sink's window takes.
    fn poll_chunk(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut SendStream<Bytes>,
    ) -> Poll<Result<(), Stop>> {
        let last = self.again == self.kept.len() && matches!(self.source, Source::Ended);
        let n = ready!(poll_part(cx, sink, &mut self.chunk, self.first, last))?;
        self.first = false;
        if self.fresh {
            self.release(n);
        }
        self.progress += 1;
        self.done = last && self.chunk.is_empty();
        Poll::Ready(Ok(()))
    }

    fn release(&mut self, n: usize) {
        // Fails only for more than was received.
        let released = self.recv.flow_control().release_capacity(n);
        debug_assert!(released.is_ok());
    }
}

/// How far what a [`Pump`] has kept has been sent to another sink.
#[derive(Debug, Default)]
pub(super) struct Beside {
    /// Of the chunks, begun ones included; and what is left of the last of these.
    sent: usize,
    chunk: Bytes,
    /// Something has been given to the sink.
    begun: bool,
    done: bool,
}

/// Sends as much of a chunk as the sink's window takes, a short `first` one whole; END_STREAM goes
/// behind the `last`.
fn poll_part(
    cx: &mut Context<'_>,
    sink: &mut SendStream<Bytes>,
    chunk: &mut Bytes,
    first: bool,
    last: bool,
) -> Poll<Result<usize, Stop>> {
    let n = match chunk.len() {
        short @ ..=WITH_HEAD if first => short,
        wanted => {
            sink.reserve_capacity(wanted);
            let window = match sink.capacity() {
                0 => match ready!(sink.poll_capacity(cx)) {
                    Some(Ok(window)) => window,
                    Some(Err(_)) | None => return Poll::Ready(Err(Stop::Sink)),
                },
                window => window,
            };
            window.min(wanted)
        }
    };
    let part = chunk.split_to(n);
    let end = last && chunk.is_empty();
    sink.send_data(part, end).map_err(|_| Stop::Sink)?;
    Poll::Ready(Ok(n))
}

/// How a gRPC call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CallStatus {
    pub code: u32,
    /// What the server says of another try.
    pub again: Option<Again>,
}

impl CallStatus {
    /// As the trailers, or a head that is all there is, say it.
    pub(super) fn of(fields: &HeaderMap) -> Option<Self> {
        let field = |name: &HeaderName| fields.get(name).map(HeaderValue::as_bytes);
        let code = std::str::from_utf8(field(&GRPC_STATUS)?).ok()?;
        let code = code.trim().parse().ok()?;
        Some(Self {
            code,
            again: match code {
                0 => None,
                _ => Again::of_grpc(
                    field(&GRPC_PUSHBACK),
                    field(&GRPC_DETAILS),
                    field(&RETRY_AFTER),
                ),
            },
        })
    }
}
