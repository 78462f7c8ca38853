//! A second try beside the first (hedging): when no answer has begun after a while, another endpoint
//! is asked too, and the one that answers first goes on as if it had been the only one.
//!
//! Only for requests that are here as a whole, head and body, within what is kept for another try:
//! the bytes are written to both as they are, and neither needs the client until there is an answer.
//! Who is still sending when the second try would begin gets none.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use super::conn::Conn;
use super::exchange::READ_AHEAD;
use super::kept;
use super::request::{Exchange, Lease};
use super::serve::Scratch;
use crate::balance::{ConnectionPermit, Outcome, Picked};
use crate::http::call::Call;
use crate::transport::Io;
use crate::worker::Pools;

/// A try that has been sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Raced {
    /// To the head of its response; counted from when it was sent.
    pub(super) deadline: Option<Instant>,
    /// Bytes of the request that have been sent.
    pub(super) sent: usize,
}

/// One of two tries.
pub(super) struct Lane {
    pub(super) server: Conn,
    pub(super) permit: ConnectionPermit,
    pub(super) picked: Picked<Pools>,
    /// Its connection has carried a request before.
    pub(super) reused: bool,
    /// Bytes of the request that have been written, and whether all of them are on their way.
    pub(super) sent: usize,
    pub(super) flushed: bool,
}

/// The client has gone.
pub(super) struct Gone;

/// What of an answer is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    Answer,
    /// The connection has ended, or the proxy at its other end says that there is no answer.
    Failure,
}

impl Lane {
    /// Ready when an answer has begun, or will not. What was read stays in the buffer.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Heard> {
        let mesh = !matches!(self.server.io, Io::Plain(_));
        loop {
            match self.server.buf[..] {
                [] => {}
                [kept::CLOSED..=kept::UNREACHABLE] if mesh => return Poll::Ready(Heard::Failure),
                _ => return Poll::Ready(Heard::Answer),
            }
            if self.server.eof {
                return Poll::Ready(Heard::Failure);
            }
            if ready!(self.server.poll_fill(cx, 0)).is_err() {
                return Poll::Ready(Heard::Failure);
            }
        }
    }

    /// Sends what there is of the request.
    fn poll_send(&mut self, cx: &mut Context<'_>, request: &[u8]) -> Poll<io::Result<()>> {
        while self.sent < request.len() {
            self.flushed = false;
            self.sent += ready!(self.server.poll_write(cx, &request[self.sent..]))?;
        }
        if !self.flushed {
            ready!(self.server.poll_flush(cx))?;
            self.flushed = true;
        }
        Poll::Ready(Ok(()))
    }

    /// Sends what there is of the request; ready when an answer has begun, or will not. A server may
    /// answer before it has read everything.
    fn poll_all(&mut self, cx: &mut Context<'_>, request: &[u8]) -> Poll<Heard> {
        match self.poll_send(cx, request) {
            // What the server said before it closed may stand in the kernel's buffer.
            Poll::Ready(Err(_)) => match self.poll(cx) {
                Poll::Pending => Poll::Ready(Heard::Failure),
                heard => heard,
            },
            Poll::Ready(Ok(())) | Poll::Pending => self.poll(cx),
        }
    }

    /// Gives the try up: another one has answered.
    fn cancel(mut self) {
        self.picked.overtaken(Instant::now());
        self.server.io.abort();
    }
}

/// The client's end, if it comes by a reset; pipelined bytes are read ahead.
fn poll_gone(client: &mut Conn, cx: &mut Context<'_>) -> Poll<Gone> {
    while !client.eof && client.buf.len() < READ_AHEAD {
        if ready!(client.poll_fill(cx, 1)).is_err() {
            return Poll::Ready(Gone);
        }
    }
    Poll::Pending
}

/// How much of the request is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Here {
    Whole,
    /// More is to come than is kept, or it makes no sense: whoever drives the only try sees to it.
    No,
    Gone,
}

impl Exchange<'_> {
    /// When another endpoint is asked too; `None`: not for this request. `replay` is how much of it
    /// is kept.
    pub(super) fn hedge_after(&self, call: &Call, replay: Option<usize>) -> Option<Duration> {
        let delay = call.hedge_after(&self.method)?;
        let usual = !self.framing.upgrade && !self.framing.odd && &*self.method != b"CONNECT";
        (usual && replay.is_some()).then_some(delay)
    }

    /// Reads the request's body behind its head, as far as it is here; ready when that is decided.
    fn poll_request(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Conn,
        out: &mut Vec<u8>,
        limit: usize,
    ) -> Poll<Here> {
        loop {
            if self.ready > 0 {
                if out.len() + self.ready > limit {
                    return Poll::Ready(Here::No);
                }
                let bytes = client.buf.split_to(self.ready);
                if let Some(tees) = &self.tees {
                    tees.push(&bytes);
                }
                out.extend_from_slice(&bytes);
                self.ending.bytes_in += bytes.len() as u64;
                self.ready = 0;
            }
            if self.body.is_done() {
                return Poll::Ready(Here::Whole);
            }
            if client.buf.is_empty() {
                if client.eof {
                    return Poll::Ready(Here::No);
                }
                if ready!(client.poll_fill(cx, self.body.expected())).is_err() {
                    return Poll::Ready(Here::Gone);
                }
                continue;
            }
            let mut body = self.body;
            match body.advance(&client.buf) {
                Ok(n) => (self.body, self.ready) = (body, n),
                Err(_) => return Poll::Ready(Here::No),
            }
        }
    }

    /// Sends the request on `first`, and beside it to another endpoint if no answer has begun after
    /// `delay`. `first` is then the try that has answered, or the only one there is.
    pub(super) async fn race(
        &mut self,
        call: &mut Call,
        client: &mut Conn,
        first: &mut Lane,
        scratch: &mut Scratch,
        delay: Duration,
        limit: usize,
    ) -> Result<(), Gone> {
        let Scratch { out, timer, .. } = scratch;
        let now = Instant::now();
        let deadline = call.try_deadline(now);
        let until = deadline.map_or(now + delay, |deadline| deadline.min(now + delay));
        let mut whole = None;
        let waited = poll_fn(|cx| {
            if whole.is_none() {
                match self.poll_request(cx, client, out, limit) {
                    Poll::Ready(Here::Whole) => whole = Some(Instant::now()),
                    Poll::Ready(Here::No) => return Poll::Ready(Ok(true)),
                    Poll::Ready(Here::Gone) => return Poll::Ready(Err(Gone)),
                    Poll::Pending => {}
                }
            }
            if first.poll_all(cx, out).is_ready() {
                return Poll::Ready(Ok(true));
            }
            if whole.is_some()
                && let Poll::Ready(gone) = poll_gone(client, cx)
            {
                return Poll::Ready(Err(gone));
            }
            timer.poll(cx, Some(until)).map(|()| Ok(false))
        });
        let answered = waited.await?;
        self.raced = Some(Raced {
            deadline,
            sent: first.sent,
        });
        let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
        let Some(whole) = whole.filter(|_| !answered && !late) else {
            return Ok(());
        };
        // Nothing moves from then on until there is an answer.
        let quiet = call.route.policy.stream_idle_timeout;
        let quiet = quiet.map(|idle| whole + idle);
        let end = deadline.into_iter().chain(quiet).min();
        let now = Instant::now();
        let address = first.picked.endpoint.info.address;
        let Some(mut picked) = call.hedge(self.worker, address, now) else {
            return Ok(());
        };
        let leased = {
            let mut none = None;
            let mut leasing = pin!(self.lease(call, &picked, false, &mut none, now));
            poll_fn(|cx| {
                if first.poll_all(cx, out).is_ready() {
                    return Poll::Ready(Ok(None));
                }
                if let Poll::Ready(gone) = poll_gone(client, cx) {
                    return Poll::Ready(Err(gone));
                }
                if let Poll::Ready(()) = timer.poll(cx, end) {
                    return Poll::Ready(Ok(None));
                }
                leasing.as_mut().poll(cx).map(|leased| Ok(Some(leased)))
            })
            .await?
        };
        self.raced = Some(Raced {
            deadline,
            sent: first.sent,
        });
        let mut second = match leased {
            None => return Ok(()),
            Some(Ok((server, permit, reused))) => {
                if !reused {
                    picked.sent(Instant::now());
                }
                Lane {
                    server,
                    permit,
                    picked,
                    reused,
                    sent: 0,
                    flushed: false,
                }
            }
            Some(Err(Lease::Failed(error))) => {
                if error.is_endpoints() {
                    picked.observe(Outcome::ConnectFailure, Instant::now());
                }
                return Ok(());
            }
            Some(Err(Lease::Limit(_))) => return Ok(()),
        };
        let second_wins = poll_fn(|cx| {
            if let Poll::Ready(gone) = poll_gone(client, cx) {
                return Poll::Ready(Err(gone));
            }
            match (first.poll_all(cx, out), second.poll_all(cx, out)) {
                (Poll::Ready(Heard::Answer), _) => Poll::Ready(Ok(false)),
                (_, Poll::Ready(Heard::Answer)) => Poll::Ready(Ok(true)),
                // Both have failed: what the first one says decides.
                (Poll::Ready(Heard::Failure), Poll::Ready(Heard::Failure)) => {
                    Poll::Ready(Ok(false))
                }
                _ => timer.poll(cx, end).map(|()| Ok(false)),
            }
        })
        .await;
        let second_wins = match second_wins {
            Ok(wins) => wins,
            Err(gone) => {
                second.server.io.abort();
                return Err(gone);
            }
        };
        if second_wins {
            std::mem::swap(first, &mut second);
            if let Some(observation) = &mut self.observation {
                observation.endpoint(self.worker, self.flow, &first.picked.endpoint.info);
            }
        }
        let over = end.filter(|end| Instant::now() >= *end);
        self.raced = Some(Raced {
            deadline: over.or(deadline),
            sent: first.sent,
        });
        let failed = matches!(
            second.poll(&mut Context::from_waker(std::task::Waker::noop())),
            Poll::Ready(Heard::Failure)
        );
        if failed && !second.reused {
            second.picked.observe(Outcome::Reset, Instant::now());
        }
        tracing::debug!(
            loser = %second.picked.endpoint.info.address,
            failed,
            "hedging: {} answered first",
            first.picked.endpoint.info.address
        );
        second.cancel();
        Ok(())
    }
}
