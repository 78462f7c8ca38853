//! Moving a stream's bytes until something has to be decided.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::ResponseFuture;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::Response;

use super::body::{Pump, Stop};
use super::failure;
use super::pool::Lease;
use super::stream::Exchange;
use crate::http1::conn::LazyTimer;

/// How long the rest of a request may take after its response has ended, without progress.
const REST_IDLE: Duration = Duration::from_secs(30);

/// What ended waiting for something before it came.
pub(super) enum Interrupted {
    /// The client has given the request up.
    Client,
    Deadline,
}

/// Waits for `work` for as long as the client does, and until `deadline`.
pub(super) async fn patiently<F: Future>(
    respond: &mut SendResponse<Bytes>,
    timer: &mut LazyTimer,
    deadline: Option<Instant>,
    work: F,
) -> Result<F::Output, Interrupted> {
    let mut work = pin!(work);
    poll_fn(|cx| {
        if let Poll::Ready(output) = work.as_mut().poll(cx) {
            return Poll::Ready(Ok(output));
        }
        if respond.poll_reset(cx).is_ready() {
            return Poll::Ready(Err(Interrupted::Client));
        }
        timer
            .poll(cx, deadline)
            .map(|()| Err(Interrupted::Deadline))
    })
    .await
}

/// One try: the two halves of its stream.
pub(super) struct Try {
    pub(super) lease: Lease,
    pub(super) sink: SendStream<Bytes>,
    /// The server takes no more of the request; a response may still come.
    pub(super) broken: bool,
}

/// What has to be decided while a try waits for its response.
pub(super) enum Event {
    Interim(Response<()>),
    Head(Response<RecvStream>),
    Failed(h2::Error),
    Client(Reason),
    Timeout,
}

/// How passing a response on ended.
pub(super) enum Passed {
    Done,
    Failed(h2::Error),
    Client(Reason),
    Timeout,
}

impl Exchange<'_> {
    /// Sends the request until its response begins, or the try has failed.
    pub(super) async fn until_head(
        &mut self,
        one: &mut Try,
        response: &mut ResponseFuture,
        deadline: Option<Instant>,
        idle: Option<Duration>,
    ) -> Event {
        let mut quiet = Quiet::new(idle, self.upload.progress);
        poll_fn(|cx| {
            if let Poll::Ready(reset) = self.respond.poll_reset(cx) {
                return Poll::Ready(Event::Client(failure::client_reason(reset)));
            }
            if let Some(reason) = one.poll_upload(cx, &mut self.upload) {
                return Poll::Ready(Event::Client(reason));
            }
            match response.poll_informational(cx) {
                Poll::Ready(Some(Ok(interim))) => return Poll::Ready(Event::Interim(interim)),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Event::Failed(error)),
                Poll::Ready(None) | Poll::Pending => {}
            }
            match Pin::new(&mut *response).poll(cx) {
                Poll::Ready(Ok(response)) => return Poll::Ready(Event::Head(response)),
                Poll::Ready(Err(error)) => return Poll::Ready(Event::Failed(error)),
                Poll::Pending => {}
            }
            let next = quiet.next(self.upload.progress, deadline);
            self.timer.poll(cx, next).map(|()| Event::Timeout)
        })
        .await
    }

    pub(super) async fn until_end(
        &mut self,
        one: &mut Try,
        download: &mut Pump,
        client: &mut SendStream<Bytes>,
        deadline: Option<Instant>,
        idle: Option<Duration>,
    ) -> Passed {
        let mut quiet = Quiet::new(idle, self.upload.progress + download.progress);
        poll_fn(|cx| {
            if let Poll::Ready(reset) = client.poll_reset(cx) {
                return Poll::Ready(Passed::Client(failure::client_reason(reset)));
            }
            if let Some(reason) = one.poll_upload(cx, &mut self.upload) {
                return Poll::Ready(Passed::Client(reason));
            }
            match download.poll(cx, client) {
                Poll::Ready(Ok(())) => return Poll::Ready(Passed::Done),
                Poll::Ready(Err(Stop::Source(error))) => return Poll::Ready(Passed::Failed(error)),
                Poll::Ready(Err(Stop::Sink)) => {
                    return Poll::Ready(Passed::Client(Reason::CANCEL));
                }
                Poll::Pending => {}
            }
            let next = quiet.next(self.upload.progress + download.progress, deadline);
            self.timer.poll(cx, next).map(|()| Passed::Timeout)
        })
        .await
    }

    /// After its response, a request may still be on its way; a server that wants no more of it
    /// says so by a reset.
    pub(super) async fn rest_of_request(&mut self, one: &mut Try) {
        let mut quiet = Quiet::new(Some(REST_IDLE), self.upload.progress);
        poll_fn(|cx| {
            let gone = one.poll_upload(cx, &mut self.upload).is_some();
            if gone || one.broken || self.upload.is_done() || one.sink.poll_reset(cx).is_ready() {
                return Poll::Ready(());
            }
            let next = quiet.next(self.upload.progress, None);
            self.timer.poll(cx, next)
        })
        .await;
    }
}

impl Try {
    /// Moves the request's body. The reason is the client's, if it has reset its stream.
    fn poll_upload(&mut self, cx: &mut Context<'_>, upload: &mut Pump) -> Option<Reason> {
        if self.broken {
            return None;
        }
        match upload.poll(cx, &mut self.sink) {
            Poll::Ready(Err(Stop::Source(error))) => Some(failure::client_reason(Err(error))),
            Poll::Ready(Err(Stop::Sink)) => {
                self.broken = true;
                None
            }
            Poll::Ready(Ok(())) | Poll::Pending => None,
        }
    }
}

/// The idle timeout.
struct Quiet {
    idle: Option<Duration>,
    seen: u64,
    until: Option<Instant>,
}

impl Quiet {
    fn new(idle: Option<Duration>, progress: u64) -> Self {
        Self {
            idle,
            seen: progress,
            until: idle.map(|idle| Instant::now() + idle),
        }
    }

    /// The next moment at which time is up.
    fn next(&mut self, progress: u64, deadline: Option<Instant>) -> Option<Instant> {
        if let Some(idle) = self.idle
            && progress != self.seen
        {
            self.seen = progress;
            self.until = Some(Instant::now() + idle);
        }
        match (self.until, deadline) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }
}
