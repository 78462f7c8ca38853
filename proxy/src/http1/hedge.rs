//! A second try beside the first (hedging): when no answer has begun after a while, another endpoint
//! is asked too, and the one that answers first goes on as if it had been the only one.
//!
//! Only for requests without a body: the head is written to both as it is, and neither needs the
//! client until there is an answer.

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
    /// Bytes of the head that have been sent.
    pub(super) sent: usize,
}

/// One of two tries.
pub(super) struct Lane {
    pub(super) server: Conn,
    pub(super) permit: ConnectionPermit,
    pub(super) picked: Picked<Pools>,
    /// Its connection has carried a request before.
    pub(super) reused: bool,
    /// Bytes of the head that have been written, and whether all of them are on their way.
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

    /// Sends the head.
    fn poll_send(&mut self, cx: &mut Context<'_>, head: &[u8]) -> Poll<io::Result<()>> {
        while self.sent < head.len() {
            self.sent += ready!(self.server.poll_write(cx, &head[self.sent..]))?;
        }
        if !self.flushed {
            ready!(self.server.poll_flush(cx))?;
            self.flushed = true;
        }
        Poll::Ready(Ok(()))
    }

    /// Sends the head, then waits for the answer.
    fn poll_all(&mut self, cx: &mut Context<'_>, head: &[u8]) -> Poll<Heard> {
        match ready!(self.poll_send(cx, head)) {
            Ok(()) => self.poll(cx),
            // What the server said before it closed may stand in the kernel's buffer.
            Err(_) => match self.poll(cx) {
                Poll::Pending => Poll::Ready(Heard::Failure),
                heard => heard,
            },
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

impl Exchange<'_> {
    /// When another endpoint is asked too; `None`: not for this request.
    pub(super) fn hedge_after(&self, call: &Call) -> Option<Duration> {
        let delay = call.hedge_after(&self.method)?;
        let bare = self.body.is_done() && self.ready == 0 && self.ending.bytes_in == 0;
        let usual = !self.framing.upgrade && !self.framing.odd && &*self.method != b"CONNECT";
        (bare && usual).then_some(delay)
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
    ) -> Result<(), Gone> {
        let Scratch { out, timer, .. } = scratch;
        let now = Instant::now();
        // Nothing moves while the answer is waited for.
        let quiet = call.route.policy.stream_idle_timeout.map(|idle| now + idle);
        let deadline = call.try_deadline(now).into_iter().chain(quiet).min();
        let until = deadline.map_or(now + delay, |deadline| deadline.min(now + delay));
        let waited = poll_fn(|cx| {
            if first.poll_all(cx, out).is_ready() {
                return Poll::Ready(Ok(true));
            }
            if let Poll::Ready(gone) = poll_gone(client, cx) {
                return Poll::Ready(Err(gone));
            }
            timer.poll(cx, Some(until)).map(|()| Ok(false))
        });
        let answered = waited.await?;
        self.raced = Some(Raced {
            deadline,
            sent: first.sent,
        });
        if answered || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Ok(());
        }
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
                if let Poll::Ready(()) = timer.poll(cx, deadline) {
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
                _ => timer.poll(cx, deadline).map(|()| Ok(false)),
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
        self.raced = Some(Raced {
            deadline,
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
