//! A second try beside the first (hedging): when no answer has begun after a while, another endpoint
//! is asked too, and the one that answers first goes on as if it had been the only one. Only for
//! requests without a body.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use h2::Reason;
use h2::client::ResponseFuture;

use super::drive::{Event, Try};
use super::failure;
use super::head;
use super::pool::{Lease, Unleased};
use super::stream::Exchange;
use crate::balance::{Outcome, Picked};
use crate::http::call::Call;
use crate::worker::Pools;

/// Ready when an answer has begun, or will not.
fn poll_answer(cx: &mut Context<'_>, response: &mut ResponseFuture) -> Poll<Event> {
    match response.poll_informational(cx) {
        Poll::Ready(Some(Ok(interim))) => return Poll::Ready(Event::Interim(interim)),
        Poll::Ready(Some(Err(error))) => return Poll::Ready(Event::Failed(error)),
        Poll::Ready(None) | Poll::Pending => {}
    }
    Pin::new(response).poll(cx).map(|answer| match answer {
        Ok(response) => Event::Head(response),
        Err(error) => Event::Failed(error),
    })
}

impl Exchange<'_> {
    /// Waits for the answer to `one`, and asks another endpoint too if none has begun after `delay`.
    /// `one` is then the try that the event is of, or the only one there is; without an event it is
    /// still to be waited for.
    pub(super) async fn race(
        &mut self,
        call: &mut Call,
        picked: &mut Picked<Pools>,
        one: &mut Try,
        response: &mut ResponseFuture,
        delay: Duration,
        deadline: Option<Instant>,
    ) -> Option<Event> {
        let now = Instant::now();
        let hedge_at = now + delay;
        // Nothing moves while the answer is waited for.
        let quiet = call.route.policy.stream_idle_timeout.map(|idle| now + idle);
        let deadline = deadline.into_iter().chain(quiet).min();
        let until = deadline.map_or(hedge_at, |deadline| deadline.min(hedge_at));
        match self.until_head(one, response, Some(until), None).await {
            Event::Timeout if deadline.is_none_or(|deadline| Instant::now() < deadline) => {}
            event => return Some(event),
        }
        let first = picked.endpoint.info.address;
        let mut other = call.hedge(self.worker, first, Instant::now())?;
        let lease = match self
            .lease_beside(call, &mut other, one, response, deadline)
            .await
        {
            Ok(lease) => lease?,
            Err(event) => return Some(event),
        };
        let mut lease = lease;
        let mut request = head::for_one_try(&self.head);
        if let Some(deadline) = self.deadline {
            let now = Instant::now();
            deadline.pass_on(request.headers_mut(), now).ok()?;
        }
        let (mut response2, sink) = lease.send(request, true).ok()?;
        let mut two = Try {
            lease,
            sink,
            broken: false,
        };
        let mut first_failed = false;
        let (event, second) = poll_fn(|cx| {
            if let Poll::Ready(reset) = self.respond.poll_reset(cx) {
                let event = Event::Client(failure::client_reason(reset));
                return Poll::Ready((event, false));
            }
            let answers = match first_failed {
                true => Poll::Pending,
                false => poll_answer(cx, response),
            };
            let others = poll_answer(cx, &mut response2);
            match (answers, others) {
                // A failure is an answer only when there can be no other.
                (Poll::Ready(Event::Failed(_)), Poll::Pending) => first_failed = true,
                (Poll::Ready(Event::Failed(_)), Poll::Ready(event)) => {
                    return Poll::Ready((event, true));
                }
                (Poll::Ready(event), _) => return Poll::Ready((event, false)),
                (Poll::Pending, Poll::Ready(event @ Event::Failed(_))) if !first_failed => {
                    // The first one is waited for alone.
                    return Poll::Ready((event, true));
                }
                (Poll::Pending, Poll::Ready(event)) => return Poll::Ready((event, true)),
                (Poll::Pending, Poll::Pending) => {}
            }
            let over = self.timer.poll(cx, deadline);
            over.map(|()| (Event::Timeout, false))
        })
        .await;
        let now = Instant::now();
        if second && matches!(event, Event::Failed(_)) && !first_failed {
            other.observe(Outcome::Reset, now);
            return None;
        }
        if second {
            std::mem::swap(picked, &mut other);
            std::mem::swap(one, &mut two);
            *response = response2;
            let info = &picked.endpoint.info;
            self.observation.endpoint(self.worker, self.flow, info);
        }
        match first_failed {
            true => other.observe(Outcome::Reset, now),
            false => other.overtaken(now),
        }
        tracing::debug!(
            loser = %other.endpoint.info.address,
            "hedging: {} answered first",
            picked.endpoint.info.address
        );
        two.sink.send_reset(Reason::CANCEL);
        Some(event)
    }

    /// A connection for the second try, while the first one runs. `Ok(None)`: there is none.
    async fn lease_beside(
        &mut self,
        call: &Call,
        other: &mut Picked<Pools>,
        one: &mut Try,
        response: &mut ResponseFuture,
        deadline: Option<Instant>,
    ) -> Result<Option<Lease>, Event> {
        let pool = &other.endpoint.pool.http2;
        if let Some(lease) = pool.take() {
            return Ok(Some(lease));
        }
        let leasing = pool.lease(self.worker, &other.endpoint.info, &call.balancer);
        let leased = tokio::select! {
            biased;
            event = self.until_head(one, response, deadline, None) => return Err(event),
            leased = leasing => leased,
        };
        let now = Instant::now();
        other.sent(now);
        match leased {
            Ok(lease) => Ok(Some(lease)),
            Err(Unleased::Failed(error)) => {
                if error.is_endpoints() {
                    other.observe(Outcome::ConnectFailure, now);
                }
                Ok(None)
            }
            Err(Unleased::Limit(_)) => Ok(None),
        }
    }
}
