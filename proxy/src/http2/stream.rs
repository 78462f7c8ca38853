//! One request, from its HEADERS to the end of its response.
//!
//! The way: [`serve`] chooses route, backend and permit ([`Call`]); [`Exchange::tries`] takes an
//! endpoint and a connection for each try; [`Exchange::one_try`] sends the request and waits for
//! the response's head while the body flows; [`Exchange::pass_on`] passes the response on.
//! Nothing of a response has passed to the client while a try can still be repeated.

use std::rc::Rc;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::ext::Protocol;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::header::RETRY_AFTER;
use http::request::Parts;
use http::{HeaderValue, Method, Request, Response, StatusCode};

use super::answer::{self, Asked};
use super::body::{CallStatus, Pump};
use super::deadline::Deadline;
use super::drive::{Event, Interrupted, Passed, Try, patiently};
use super::failure::{self, Fault};
use super::head;
use super::mirror;
use super::pool::{Lease, Unleased};
use crate::balance::{Outcome, Picked};
use crate::http::call::{self, Call, Refusal};
use crate::http::filter::fields;
use crate::http::flow::Flow;
use crate::http::observe::{Ending, Observation};
use crate::http::pushback::Again;
use crate::http::retry::{DEFAULT_REPLAY_BYTES, Failure, is_idempotent};
use crate::http::{ErrorCode, ProxyError};
use crate::http1::conn::LazyTimer;
use crate::outbound::connect;
use crate::tables::Fallback;
use crate::telemetry::{Direction, FlowProtocol};
use crate::worker::{Pools, Worker};

/// Serves one stream of a client's connection to its end.
pub(super) async fn serve(
    worker: Rc<Worker>,
    flow: Rc<Flow>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let started = Instant::now();
    let (mut parts, body) = request.into_parts();
    let grpc = head::is_grpc(&parts.headers);
    // The proxy beside the client keeps its deadline; that beside the server need not, too.
    let timed = grpc && flow.direction == Direction::Outbound;
    let asked_for = timed.then(|| Deadline::of_client(&parts.headers, started));
    let asked_for = asked_for.flatten();
    let limit = asked_for.and_then(Deadline::end);
    let protocol = if grpc {
        FlowProtocol::Grpc
    } else {
        FlowProtocol::H2
    };
    let view = head::View(&parts);
    let destination = flow.destination_of(&view);
    let context = || head::context_headers(&parts.headers);
    let (observation, propagate) =
        Observation::begin(&worker, &flow, &view, context, protocol, started);
    let mut timer = LazyTimer::default();
    let begin = async {
        flow.admit(&worker, &view, started)?;
        Call::begin(&worker, &destination, &view, flow.peer, started).await
    };
    let begun = patiently(&mut respond, &mut timer, limit, begin).await;
    if let Ok(Ok(call)) = &begun
        && let Some(plan) = &call.plan
    {
        head::edit(&mut parts, plan, call.prefix);
    }
    if let Some(traceparent) = propagate
        && let Ok(mut value) = HeaderValue::from_bytes(&traceparent.to_bytes())
    {
        // No other request has this one: it stays out of HPACK's tables (RFC 7541 section 6.2.3),
        // where each would push out a field that comes again, and the next would be compared to
        // all that stand there.
        value.set_sensitive(true);
        parts.headers.insert(&head::TRACEPARENT, value);
    }
    let mut exchange = Exchange {
        worker: &worker,
        flow: &flow,
        asked: Asked {
            grpc,
            head: parts.method == Method::HEAD,
        },
        head: parts,
        upload: Pump::new(body, None),
        respond,
        timer,
        ending: Ending::default(),
        observation,
        deadline: None,
    };
    let mut call = match begun {
        Ok(Ok(call)) => call,
        Ok(Err(refusal)) => {
            exchange.refused(&refusal);
            return exchange.conclude(None);
        }
        Err(Interrupted::Deadline) => {
            let text = "the call's own deadline ran out before it could be sent";
            exchange.fail(&ProxyError::new(ErrorCode::ResponseTimeout, text));
            return exchange.conclude(None);
        }
        Err(Interrupted::Client) => return exchange.conclude(None),
    };
    if timed {
        exchange.deadline = Deadline::earlier(asked_for, call.deadline);
        call.last_try = exchange.deadline.map(Deadline::at);
        call.deadline = call.deadline.into_iter().chain(limit).min();
    }
    if let Some(plan) = &call.plan
        && exchange.head.method != Method::CONNECT
    {
        let end = exchange.upload.is_empty();
        exchange.upload.tees = mirror::start(&worker, plan, &exchange.head, end);
    }
    exchange.tries(&mut call).await;
    exchange.ending.tries = call.tries;
    exchange.conclude(Some(&call.route));
}

/// A request while it is being served.
pub(super) struct Exchange<'w> {
    pub(super) worker: &'w Rc<Worker>,
    pub(super) flow: &'w Flow,
    asked: Asked,
    pub(super) head: Parts,
    /// Where the request's body has got to.
    pub(super) upload: Pump,
    pub(super) respond: SendResponse<Bytes>,
    pub(super) timer: LazyTimer,
    ending: Ending<'static>,
    pub(super) observation: Observation,
    /// Of a gRPC call, beside its client.
    pub(super) deadline: Option<Deadline>,
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

/// What a call's status says of its endpoint.
fn observe_call(picked: &mut Picked<Pools>, status: CallStatus, now: Instant) {
    let spared = status
        .again
        .and_then(|again| again.spares_calls(status.code));
    match spared {
        Some(pushback) => picked.pushed_back(pushback, now),
        None => picked.observe(call::outcome_of_grpc(status.code), now),
    }
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
            self.ending.grpc_status = Some(error.grpc_status());
        } else {
            self.ending.status = error.status();
        }
        answer::error(&mut self.respond, self.asked, error);
    }

    /// There is no call: a route, a permit or an endpoint is missing.
    fn refused(&mut self, refusal: &Refusal) {
        match refusal {
            Refusal::Error(error) => self.fail(error),
            Refusal::Answer(given) => {
                self.ending.status = given.status;
                answer::plain(&mut self.respond, given.status, &given.fields);
            }
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
            let pool = &picked.endpoint.pool.http2;
            let leased = match pool.take() {
                Some(lease) => Ok(Ok(lease)),
                None => {
                    let leasing = Box::pin(pool.lease(self.worker, info, &call.balancer));
                    let leased =
                        patiently(&mut self.respond, &mut self.timer, call.deadline, leasing).await;
                    picked.sent(Instant::now());
                    leased
                }
            };
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
                        // The other proxy knows what it means, and may know another endpoint.
                        None if self.flow.from_mesh && self.head.method != Method::CONNECT => {
                            let error = connect::to_proxy_error(&error, &call.place());
                            tracing::debug!(code = error.code.name(), "{error}");
                            self.ending.error = Some(error.code);
                            Tried::Reset(Reason::from(failure::UNREACHABLE))
                        }
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
                        let sleep = Box::pin(tokio::time::sleep(pause));
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
        said: Option<Again>,
    ) -> Option<Duration> {
        call.failed(
            self.worker,
            picked.endpoint.info.address,
            self.head.method.as_str().as_bytes(),
            self.asked.grpc,
            failure,
            replayable,
            said,
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

    /// One try on one connection.
    async fn one_try(
        &mut self,
        call: &mut Call,
        picked: &mut Picked<Pools>,
        mut lease: Lease,
    ) -> Tried {
        if self.head.extensions.get::<Protocol>().is_some()
            && !Box::pin(lease.takes_extended_connect()).await
        {
            let text = format!(
                "{}: {} does not take extended CONNECT (RFC 8441)",
                call.place(),
                picked.endpoint.info.address
            );
            return Tried::Answer(ProxyError::new(ErrorCode::BadResponse, text));
        }
        let began = Instant::now();
        let mut request = head::for_one_try(&self.head);
        if let Some(deadline) = self.deadline
            && deadline.pass_on(request.headers_mut(), began).is_err()
        {
            return Tried::Answer(self.timed_out(call, picked));
        }
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
        let idle = call.route.policy.stream_idle_timeout;
        let mut passed = false;
        let method = self.head.method.as_str().as_bytes();
        let mut raced = match call.hedge_after(method) {
            Some(delay) if self.head.method != Method::CONNECT => {
                let race = self.race(call, picked, &mut one, &mut response, delay, deadline);
                Box::pin(race).await
            }
            _ => None,
        };
        loop {
            let event = match raced.take() {
                Some(event) => event,
                None => {
                    let until = self.until_head(&mut one, &mut response, deadline, idle);
                    until.await
                }
            };
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
                    one.lease.heard(Instant::now());
                    let (head, body) = response.into_parts();
                    let mut download = Pump::new(body, None);
                    match self.on_head(call, picked, head, &mut download, replayable) {
                        Err(tried) => return tried,
                        Ok(mut client) => {
                            return self
                                .pass_on(call, picked, &mut one, &mut download, &mut client)
                                .await;
                        }
                    }
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
            Fault::NeverProcessed | Fault::Refused | Fault::Unreachable => Failure::NeverProcessed,
            Fault::Lost if dead && idempotent => Failure::NeverProcessed,
            _ => Failure::Reset,
        };
        picked.observe(
            match fault {
                Fault::NeverProcessed => Outcome::Neutral,
                Fault::Malformed => Outcome::ServerError,
                Fault::Unreachable => Outcome::ConnectFailure,
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
            // The other proxy may know of another endpoint.
            Fault::NeverProcessed if self.flow.from_mesh => {
                return Tried::Reset(Reason::REFUSED_STREAM);
            }
            Fault::Unreachable => connect::unreachable(address, &place),
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

    /// The head of a response is here: it goes to the client, or the try has failed.
    fn on_head(
        &mut self,
        call: &mut Call,
        picked: &mut Picked<Pools>,
        mut head: http::response::Parts,
        download: &mut Pump,
        replayable: bool,
    ) -> Result<SendStream<Bytes>, Tried> {
        let now = Instant::now();
        let status = head.status.as_u16();
        let policy = call.route.policy.retry.as_deref();
        let grpc = self.asked.grpc && head.status == StatusCode::OK;
        // With the code, when the call may be made again.
        let code = if !grpc {
            None
        } else if download.is_empty() {
            CallStatus::of(&head.headers)
        } else if replayable && policy.is_some_and(|policy| !policy.grpc_codes.is_empty()) {
            // What has not come yet is polled for with the task's own waker afterwards.
            let mut cx = Context::from_waker(Waker::noop());
            download.early_trailers(&mut cx).and_then(CallStatus::of)
        } else {
            None
        };
        let field = head.headers.get(RETRY_AFTER).map(HeaderValue::as_bytes);
        let after = match code {
            Some(code) => code.again,
            None => Again::of_http(field),
        };
        match (grpc, code) {
            (true, Some(code)) => observe_call(picked, code, now),
            // How the call went is said by its trailers.
            (true, None) => picked.answered(now),
            (false, _) => match after.and_then(|after| after.spares(status)) {
                Some(pushback) => picked.pushed_back(pushback, now),
                None => picked.observe(call::outcome_of_status(status), now),
            },
        }
        let code = code.map(|code| code.code);
        let failure = match code {
            Some(0) => None,
            Some(code) => Some(Failure::Grpc(code)),
            None if status < 400 => None,
            None => Some(Failure::Status(status)),
        };
        if let Some(failure) = failure {
            if let Some(pause) = self.verdict(call, picked, failure, replayable, after) {
                return Err(Tried::Again(pause));
            }
            if let Some(error) = call.spent(status) {
                return Err(Tried::Answer(error));
            }
        }
        self.ending.status = status;
        self.ending.grpc_status = code;
        self.upload.forget();
        self.observation.head(now);
        if let Some(plan) = &call.plan {
            fields::of_map(&plan.response, &mut head.headers);
        }
        fields::add_to_map(&call.cors, &mut head.headers);
        if let Some(given) = call.session_field(&picked.endpoint.info) {
            fields::session_to_map(given, &mut head.headers);
        }
        let response = Response::from_parts(head, ());
        // An error says that the client is gone.
        self.respond
            .send_response(response, download.is_empty())
            .map_err(|_| Tried::Abandoned)
    }

    /// Passes a response's body and trailers on to their end.
    async fn pass_on(
        &mut self,
        call: &Call,
        picked: &mut Picked<Pools>,
        one: &mut Try,
        download: &mut Pump,
        client: &mut SendStream<Bytes>,
    ) -> Tried {
        let observed = self.ending.grpc_status.is_some();
        let idle = call.route.policy.stream_idle_timeout;
        let passed = self
            .until_end(one, download, client, call.deadline, idle)
            .await;
        self.ending.bytes_out = download.bytes;
        if let Some(status) = download.grpc_status
            && self.asked.grpc
        {
            self.ending.grpc_status = Some(status.code);
            if !observed {
                observe_call(picked, status, Instant::now());
            }
        }
        match passed {
            Passed::Done => {
                if !self.upload.is_done() && !one.broken {
                    Box::pin(self.rest_of_request(one)).await;
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
                let code = error.grpc_status();
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
}
