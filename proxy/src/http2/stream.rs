//! One request, from its HEADERS to the end of its response.
//!
//! The way: [`serve`] chooses route, backend and permit ([`Call`]); [`Exchange::tries`] takes an
//! endpoint and a connection for each try; [`Exchange::one_try`] sends the request and waits for
//! the response's head while the body flows; [`Exchange::respond`] passes the response on.
//! Nothing of a response has passed to the client while a try can still be repeated.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::ResponseFuture;
use h2::ext::Protocol;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version};

use super::answer::{self, Asked};
use super::body::{Pump, Stop, grpc_status};
use super::failure::{self, Fault};
use super::pool::{Lease, Unleased};
use crate::balance::{Outcome, Picked};
use crate::http::call::{self, Call, Refusal};
use crate::http::flow::Flow;
use crate::http::observe::{Ending, Observation};
use crate::http::retry::{DEFAULT_REPLAY_BYTES, Failure, is_idempotent};
use crate::http::{ErrorCode, ProxyError, RequestView};
use crate::http1::conn::LazyTimer;
use crate::outbound::connect;
use crate::tables::Fallback;
use crate::telemetry::FlowProtocol;
use crate::telemetry::trace::context::ContextHeaders;
use crate::worker::{Pools, Worker};

/// How long the rest of a request may take after its response has ended, without progress.
const REST_IDLE: Duration = Duration::from_secs(30);

/// A request's head as routing and policy see it.
struct View<'h>(&'h Parts);

impl RequestView for View<'_> {
    fn method(&self) -> &[u8] {
        self.0.method.as_str().as_bytes()
    }

    fn path(&self) -> &[u8] {
        self.0
            .uri
            .path_and_query()
            .map_or(&[][..], |path| path.as_str().as_bytes())
    }

    fn header(&self, name: &str) -> Option<&[u8]> {
        self.0.headers.get(name).map(HeaderValue::as_bytes)
    }

    fn host(&self) -> Option<&[u8]> {
        match self.0.uri.authority() {
            Some(authority) => Some(authority.as_str().as_bytes()),
            None => self.header("host"),
        }
    }
}

/// Serves one stream of a client's connection to its end.
pub(super) async fn serve(
    worker: Rc<Worker>,
    flow: Rc<Flow>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let started = Instant::now();
    let destination = flow.destination();
    let (mut head, body) = request.into_parts();
    let grpc = is_grpc(&head.headers);
    let protocol = if grpc {
        FlowProtocol::Grpc
    } else {
        FlowProtocol::H2
    };
    let view = View(&head);
    let context = || context_headers(&head.headers);
    let (observation, propagate) =
        Observation::begin(&worker, &flow, &view, context, protocol, started);
    let mut timer = LazyTimer::default();
    let begin = Call::begin(&worker, &destination, &view, flow.peer, started);
    let begun = patiently(&mut respond, &mut timer, None, begin).await;
    if let Some(traceparent) = propagate
        && let Ok(value) = HeaderValue::from_bytes(&traceparent.to_bytes())
    {
        head.headers.insert("traceparent", value);
    }
    let mut exchange = Exchange {
        worker: &worker,
        flow: &flow,
        asked: Asked {
            grpc,
            head: head.method == Method::HEAD,
        },
        head,
        upload: Pump::new(body, None),
        respond,
        timer,
        ending: Ending::default(),
        observation,
    };
    let mut call = match begun {
        Ok(Ok(call)) => call,
        Ok(Err(refusal)) => {
            exchange.refused(&refusal);
            return exchange.conclude(None);
        }
        Err(_) => return exchange.conclude(None),
    };
    exchange.tries(&mut call).await;
    exchange.ending.tries = call.tries;
    exchange.conclude(Some(&call.route));
}

/// Whether a message is gRPC, by its content type ("application/grpc", "application/grpc+proto").
fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|value| {
        value
            .as_bytes()
            .strip_prefix(b"application/grpc")
            .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
    })
}

/// The headers that may carry a trace context.
fn context_headers(headers: &HeaderMap) -> ContextHeaders<'_> {
    let mut context = ContextHeaders::default();
    for (name, value) in headers {
        context.take(name.as_str().as_bytes(), value.as_bytes());
    }
    context
}

/// What ended waiting for something before it came.
enum Interrupted {
    /// The client has given the request up.
    Client,
    Deadline,
}

/// Waits for `work` for as long as the client does, and until `deadline`.
async fn patiently<F: Future>(
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

/// A request while it is being served.
struct Exchange<'w> {
    worker: &'w Rc<Worker>,
    flow: &'w Flow,
    asked: Asked,
    head: Parts,
    /// Where the request's body has got to.
    upload: Pump,
    respond: SendResponse<Bytes>,
    timer: LazyTimer,
    ending: Ending<'static>,
    observation: Observation,
}

/// One try: the two halves of its stream.
struct Try {
    lease: Lease,
    sink: SendStream<Bytes>,
    /// The server takes no more of the request; a response may still come.
    broken: bool,
}

/// How a try ended.
enum Tried {
    Again(Duration),
    /// Nothing has passed to the client: it is told.
    Answer(ProxyError),
    /// The client's stream is reset as the server's was.
    Reset(Reason),
    /// The client has reset its stream, or its connection is gone.
    Abandoned,
    Done,
}

/// What has to be decided while a try waits for its response.
enum Event {
    Interim(Response<()>),
    Head(Response<RecvStream>),
    Failed(h2::Error),
    Client(Reason),
    Timeout,
}

/// How passing a response on ended.
enum Passed {
    Done,
    Failed(h2::Error),
    Client(Reason),
    Timeout,
}

impl Exchange<'_> {
    /// Tells telemetry how the request ended.
    fn conclude(mut self, route: Option<&std::sync::Arc<crate::tables::Route>>) {
        self.ending.bytes_in = self.upload.bytes;
        let ending = Ending {
            route,
            ..self.ending
        };
        self.observation
            .finish(self.worker, self.flow, &ending, Instant::now());
    }

    /// Answers with an error of our own.
    fn fail(&mut self, error: &ProxyError) {
        tracing::debug!(code = error.code.name(), "{error}");
        self.ending.error = Some(error.code);
        if self.asked.grpc {
            self.ending.status = 200;
            self.ending.grpc_status = Some(error.code.grpc_status());
        } else {
            self.ending.status = error.code.status();
        }
        answer::error(&mut self.respond, self.asked, error);
    }

    /// There is no call: a route, a permit or an endpoint is missing.
    fn refused(&mut self, refusal: &Refusal) {
        match refusal {
            Refusal::Error(error) => self.fail(error),
            Refusal::Fallback(fallback, error) => match &**fallback {
                Fallback::Response {
                    status,
                    headers,
                    body,
                } => {
                    self.ending.status = *status;
                    self.ending.error = Some(ErrorCode::Fallback);
                    answer::fallback(&mut self.respond, self.asked, *status, headers, body, error);
                }
                // A call goes to another backend by itself.
                Fallback::Backend(_) => self.fail(error),
            },
        }
    }

    /// Tries until there is a response, or no more try.
    async fn tries(&mut self, call: &mut Call) {
        self.upload.keep_up_to(match &call.route.policy.retry {
            Some(policy) => policy.max_body,
            None => DEFAULT_REPLAY_BYTES,
        });
        loop {
            let mut picked = match call.pick(self.worker, Instant::now()) {
                Ok(picked) => picked,
                Err(refusal) => return self.refused(&refusal),
            };
            let info = &picked.endpoint.info;
            self.observation.endpoint(self.worker, self.flow, info);
            let leasing = picked
                .endpoint
                .pool
                .http2
                .lease(self.worker, info, &call.balancer);
            let leased =
                patiently(&mut self.respond, &mut self.timer, call.deadline, leasing).await;
            let tried = match leased {
                Ok(Ok(lease)) => self.one_try(call, &mut picked, lease).await,
                Ok(Err(Unleased::Limit(limit))) => {
                    let error = call.limit_reached(self.worker, limit);
                    match call.fall_back(self.worker, error) {
                        Ok(()) => continue,
                        Err(refusal) => return self.refused(&refusal),
                    }
                }
                Ok(Err(Unleased::Failed(error))) => {
                    if error.is_endpoints() {
                        picked.observe(Outcome::ConnectFailure, Instant::now());
                    }
                    match self.verdict(call, &picked, Failure::Connect, true, None) {
                        Some(pause) => Tried::Again(pause),
                        None => Tried::Answer(connect::to_proxy_error(&error, &call.place())),
                    }
                }
                Err(Interrupted::Client) => Tried::Abandoned,
                Err(Interrupted::Deadline) => Tried::Answer(self.timed_out(call, &picked)),
            };
            match tried {
                Tried::Again(pause) => {
                    drop(picked);
                    self.upload.rewind();
                    if !pause.is_zero() {
                        let sleep = tokio::time::sleep(pause);
                        let slept = patiently(&mut self.respond, &mut self.timer, None, sleep);
                        if slept.await.is_err() {
                            return;
                        }
                    }
                }
                Tried::Answer(error) => return self.fail(&error),
                Tried::Reset(reason) => {
                    self.ending.error = Some(ErrorCode::ConnectionTerminated);
                    // What has passed already is written before the reset takes it away.
                    tokio::task::yield_now().await;
                    return self.respond.send_reset(reason);
                }
                Tried::Abandoned | Tried::Done => return,
            }
        }
    }

    /// Whether a failed try is repeated, and after which pause.
    fn verdict(
        &self,
        call: &mut Call,
        picked: &Picked<Pools>,
        failure: Failure,
        replayable: bool,
        retry_after: Option<Duration>,
    ) -> Option<Duration> {
        call.failed(
            self.worker,
            picked.endpoint.info.address,
            self.head.method.as_str().as_bytes(),
            self.asked.grpc,
            failure,
            replayable,
            retry_after,
            Instant::now(),
        )
    }

    fn timed_out(&self, call: &Call, picked: &Picked<Pools>) -> ProxyError {
        let text = format!(
            "{}: {} did not answer within the timeout of {} ms",
            call.place(),
            picked.endpoint.info.address,
            call.started.elapsed().as_millis()
        );
        ProxyError::new(ErrorCode::ResponseTimeout, text)
    }

    /// The request's head for one try. It is kept as long as there may be another.
    fn head_to_send(&mut self) -> Request<()> {
        let mut request = Request::new(());
        *request.method_mut() = self.head.method.clone();
        *request.uri_mut() = self.head.uri.clone();
        *request.headers_mut() = self.head.headers.clone();
        // Without an authority h2 takes the request for one that was HTTP/1 once, and the host
        // field stands for it (RFC 9113 section 8.3.1).
        *request.version_mut() = match self.head.uri.authority() {
            Some(_) => Version::HTTP_2,
            None => Version::HTTP_11,
        };
        if let Some(protocol) = self.head.extensions.get::<Protocol>() {
            request.extensions_mut().insert(protocol.clone());
        }
        request
    }

    /// One try on one connection.
    async fn one_try(
        &mut self,
        call: &mut Call,
        picked: &mut Picked<Pools>,
        mut lease: Lease,
    ) -> Tried {
        if self.head.extensions.get::<Protocol>().is_some() && !lease.takes_extended_connect().await
        {
            let text = format!(
                "{}: {} does not take extended CONNECT (RFC 8441)",
                call.place(),
                picked.endpoint.info.address
            );
            return Tried::Answer(ProxyError::new(ErrorCode::BadResponse, text));
        }
        let began = Instant::now();
        let request = self.head_to_send();
        let (mut response, sink) = match lease.send(request, self.upload.is_empty()) {
            Ok(sent) => sent,
            // It was not sent: the connection has said goodbye since it was chosen.
            Err(error) => {
                return match self.verdict(call, picked, Failure::NeverProcessed, true, None) {
                    Some(pause) => Tried::Again(pause),
                    None => {
                        let text = format!("{}: {error}", call.place());
                        Tried::Answer(ProxyError::new(ErrorCode::ConnectionTerminated, text))
                    }
                };
            }
        };
        let mut one = Try {
            lease,
            sink,
            broken: false,
        };
        let deadline = call.try_deadline(began);
        let idle = call.route.policy.idle_timeout;
        let mut passed = false;
        loop {
            let event = self
                .until_head(&mut one, &mut response, deadline, idle)
                .await;
            let replayable = !passed && self.upload.is_replayable();
            match event {
                Event::Interim(interim) => {
                    if interim.status() == StatusCode::SWITCHING_PROTOCOLS {
                        picked.observe(Outcome::ServerError, Instant::now());
                        let text = format!("{}: 101 is not of HTTP/2", call.place());
                        let error = ProxyError::new(ErrorCode::BadResponse, text);
                        return self.answer_or_reset(error, passed);
                    }
                    passed = true;
                    if self.respond.send_informational(interim).is_err() {
                        return Tried::Abandoned;
                    }
                }
                Event::Head(response) => {
                    return self.on_head(call, picked, one, response, replayable).await;
                }
                Event::Failed(error) => {
                    return self.failed(call, picked, &one, &error, replayable, passed);
                }
                Event::Client(reason) => {
                    picked.observe(Outcome::Neutral, Instant::now());
                    one.sink.send_reset(reason);
                    return Tried::Abandoned;
                }
                Event::Timeout => {
                    one.sink.send_reset(Reason::CANCEL);
                    one.lease.suspect();
                    picked.observe(Outcome::Timeout, Instant::now());
                    let verdict = self.verdict(call, picked, Failure::Timeout, replayable, None);
                    return match verdict {
                        Some(pause) => Tried::Again(pause),
                        None => {
                            let error = self.timed_out(call, picked);
                            self.answer_or_reset(error, passed)
                        }
                    };
                }
            }
        }
    }

    /// An answer of our own, if nothing has passed to the client yet.
    fn answer_or_reset(&mut self, error: ProxyError, passed: bool) -> Tried {
        if passed {
            Tried::Reset(Reason::INTERNAL_ERROR)
        } else {
            Tried::Answer(error)
        }
    }

    /// Sends the request until its response begins, or the try has failed.
    async fn until_head(
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

    /// A try has failed before the head of its response.
    fn failed(
        &mut self,
        call: &mut Call,
        picked: &mut Picked<Pools>,
        one: &Try,
        error: &h2::Error,
        replayable: bool,
        passed: bool,
    ) -> Tried {
        let fault = failure::fault(
            error,
            one.lease.mesh() && self.head.method != Method::CONNECT,
        );
        let idempotent = is_idempotent(self.head.method.as_str().as_bytes());
        // An idle connection that was closed under the request: it was most likely not read.
        // Only a request that may be repeated takes the chance.
        let dead = fault == Fault::Lost && one.lease.is_reused();
        let failure = match fault {
            Fault::NeverProcessed | Fault::Refused => Failure::NeverProcessed,
            Fault::Lost if dead && idempotent => Failure::NeverProcessed,
            _ => Failure::Reset,
        };
        picked.observe(
            match fault {
                Fault::NeverProcessed => Outcome::Neutral,
                Fault::Malformed => Outcome::ServerError,
                _ if dead => Outcome::Neutral,
                _ => Outcome::Reset,
            },
            Instant::now(),
        );
        if let Some(pause) = self.verdict(call, picked, failure, replayable, None) {
            return Tried::Again(pause);
        }
        let (place, address) = (call.place(), picked.endpoint.info.address);
        let error = match fault {
            // As a reset is passed on in HTTP/1.
            Fault::Reset(reason) => return Tried::Reset(reason),
            Fault::Refused => return Tried::Reset(Reason::REFUSED_STREAM),
            Fault::Malformed => ProxyError::new(
                ErrorCode::BadResponse,
                format!("{place}: the response of {address} was refused: {error}"),
            ),
            Fault::NeverProcessed => ProxyError::new(
                ErrorCode::ConnectionTerminated,
                format!("{place}: the server at {address} went away before it took the request"),
            ),
            // The other proxy knows what it means, and may try again.
            Fault::Lost if self.flow.from_mesh => {
                return Tried::Reset(Reason::CONNECT_ERROR);
            }
            Fault::Lost => ProxyError::new(
                ErrorCode::ConnectionTerminated,
                format!("{place}: the connection to {address} was lost before it answered"),
            ),
        };
        self.answer_or_reset(error, passed)
    }

    /// The head of a response is here: it is passed on, or the try is repeated.
    async fn on_head(
        &mut self,
        call: &mut Call,
        picked: &mut Picked<Pools>,
        one: Try,
        response: Response<RecvStream>,
        replayable: bool,
    ) -> Tried {
        let now = Instant::now();
        one.lease.heard(now);
        let (head, body) = response.into_parts();
        let mut download = Pump::new(body, None);
        let status = head.status.as_u16();
        let policy = call.route.policy.retry.as_deref();
        let grpc = self.asked.grpc && head.status == StatusCode::OK;
        let code = if !grpc {
            None
        } else if download.is_empty() {
            grpc_status(&head.headers)
        } else if replayable && policy.is_some_and(|policy| !policy.grpc_codes.is_empty()) {
            poll_fn(|cx| Poll::Ready(download.early_trailers(cx).and_then(grpc_status))).await
        } else {
            None
        };
        match (grpc, code) {
            (true, Some(code)) => picked.observe(call::outcome_of_grpc(code), now),
            // How the call went is said by its trailers.
            (true, None) => picked.answered(now),
            (false, _) => picked.observe(call::outcome_of_status(status), now),
        }
        let failure = match code {
            Some(0) | None if status < 400 => None,
            Some(code) => Some(Failure::Grpc(code)),
            None => Some(Failure::Status(status)),
        };
        if let Some(failure) = failure {
            let field = head.headers.get(RETRY_AFTER).map(HeaderValue::as_bytes);
            let after = call::retry_after(field);
            if let Some(after) = after
                && matches!(status, 429 | 503)
            {
                picked.back_off(after);
            }
            if let Some(pause) = self.verdict(call, picked, failure, replayable, after) {
                return Tried::Again(pause);
            }
        }
        self.ending.status = status;
        self.ending.grpc_status = code;
        self.upload.forget();
        self.observation.head(now);
        let last = download.is_empty();
        let Ok(client) = self
            .respond
            .send_response(Response::from_parts(head, ()), last)
        else {
            return Tried::Abandoned;
        };
        self.respond(call, picked, one, download, client, code.is_some())
            .await
    }

    /// Passes a response on to its end. `observed`: how the call went is known already.
    async fn respond(
        &mut self,
        call: &Call,
        picked: &mut Picked<Pools>,
        mut one: Try,
        mut download: Pump,
        mut client: SendStream<Bytes>,
        observed: bool,
    ) -> Tried {
        let idle = call.route.policy.idle_timeout;
        let passed = self
            .until_end(&mut one, &mut download, &mut client, call.deadline, idle)
            .await;
        self.ending.bytes_out = download.bytes;
        if let Some(code) = download.grpc_status
            && self.asked.grpc
        {
            self.ending.grpc_status = Some(code);
            if !observed {
                picked.observe(call::outcome_of_grpc(code), Instant::now());
            }
        }
        match passed {
            Passed::Done => {
                if !self.upload.is_done() && !one.broken {
                    self.rest_of_request(&mut one).await;
                }
                // What is not finished is dropped: h2 tells the client with NO_ERROR (RFC 9113
                // section 8.1), and the server with CANCEL.
                Tried::Done
            }
            Passed::Client(reason) => {
                one.sink.send_reset(reason);
                Tried::Abandoned
            }
            Passed::Failed(error) => {
                picked.observe(Outcome::Reset, Instant::now());
                match failure::fault(&error, one.lease.mesh()) {
                    Fault::Reset(reason) => Tried::Reset(reason),
                    _ => Tried::Reset(Reason::INTERNAL_ERROR),
                }
            }
            Passed::Timeout => {
                one.sink.send_reset(Reason::CANCEL);
                picked.observe(Outcome::Timeout, Instant::now());
                self.ending.error = Some(ErrorCode::ResponseTimeout);
                let error = self.timed_out(call, picked);
                let code = error.code.grpc_status();
                let trailers = answer::grpc_trailers(code, &error.detail);
                if self.asked.grpc && client.send_trailers(trailers).is_ok() {
                    self.ending.grpc_status = Some(code);
                } else {
                    client.send_reset(Reason::INTERNAL_ERROR);
                }
                Tried::Done
            }
        }
    }

    async fn until_end(
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
    async fn rest_of_request(&mut self, one: &mut Try) {
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
