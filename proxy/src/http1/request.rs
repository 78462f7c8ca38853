//! One request, from its head to the end of its response: route, backend and permit ([`Call`]),
//! edits, then tries ([`super::attempt`]), each with an endpoint and a connection. Nothing of a
//! response has passed to the client while a try can still be repeated.

use std::borrow::Cow;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Buf;

use super::answer::{
    LINGER, answer, answer_plainly, context_headers, finish, trace_edit, write_all,
};
use super::attempt::{Cut, Tried};
use super::conn::Conn;
use super::framing::{self, BodyReader};
use super::head::RequestHead;
use super::hedge::{Lane, Raced};
use super::kept::{self, Kept};
use super::mirror;
use super::pool;
use super::serve::{After, Scratch};
use crate::balance::{ConnectionPermit, LimitReached, Outcome, Picked};
use crate::http::RequestView;
use crate::http::call::{Call, Refusal};
use crate::http::error::reason;
use crate::http::filter::fields;
use crate::http::flow::Flow;
use crate::http::mirror::Tees;
use crate::http::observe::{Ending, Observation};
use crate::http::pushback::Again;
use crate::http::retry::{DEFAULT_REPLAY_BYTES, Failure};
use crate::http::{ErrorCode, ProxyError};
use crate::outbound::connect::{self, connect};
use crate::tables::Fallback;
use crate::telemetry::FlowProtocol;
use crate::worker::{Pools, Worker};

/// A request while it is being served.
pub(super) struct Exchange<'w> {
    pub(super) worker: &'w Rc<Worker>,
    pub(super) flow: &'w Flow,
    pub(super) method: Cow<'static, [u8]>,
    pub(super) framing: framing::Framing,
    /// Where the request's body ends.
    pub(super) body: BodyReader,
    /// Bytes of it at the front of the client's buffer.
    pub(super) ready: usize,
    /// The client wants to go on after this request.
    pub(super) persistent: bool,
    pub(super) ending: Ending<'static>,
    pub(super) observation: Option<Observation>,
    /// Where the request's body goes beside its way.
    pub(super) tees: Option<Rc<Tees>>,
    /// The try has begun already, beside another one.
    pub(super) raced: Option<Raced>,
}

/// What a failed try leads to.
pub(super) enum Verdict {
    Again(Duration),
    Over,
}

/// Why there is no connection for a try.
pub(super) enum Lease {
    Limit(LimitReached),
    Failed(crate::transport::ConnectError),
}

/// Whether there is one endpoint, so that nothing is balanced, and no limit that idle connections
/// would use up: then a client keeps its server's connection.
pub(super) fn is_alone(call: &Call) -> bool {
    let backend = call.balancer.backend();
    backend.policy.max_connections == 0 && backend.endpoints.current.load().endpoints.len() == 1
}

/// A method for longer than its buffer; those that are usual cost nothing.
fn kept_method(method: &[u8]) -> Cow<'static, [u8]> {
    const USUAL: [&[u8]; 7] = [
        b"GET", b"POST", b"PUT", b"HEAD", b"DELETE", b"PATCH", b"OPTIONS",
    ];
    match USUAL.into_iter().find(|usual| *usual == method) {
        Some(usual) => usual.into(),
        None => method.to_vec().into(),
    }
}

/// One request from its head to the end of its response.
pub(super) async fn request(
    worker: &Rc<Worker>,
    flow: &Flow,
    client: &mut Conn,
    scratch: &mut Scratch,
) -> After {
    let started = Instant::now();
    let framing = scratch.head.framing;
    let view = RequestHead {
        head: &scratch.head,
        buf: &client.buf,
    };
    let destination = flow.destination_of(&view);
    let (observation, propagate) = Observation::begin(
        worker,
        flow,
        &view,
        || context_headers(&scratch.head, &client.buf),
        FlowProtocol::Http1,
        started,
    );
    let begun = match flow.admit(worker, &view, started) {
        Ok(()) => Call::begin(worker, &destination, &view, flow.peer, started).await,
        Err(error) => Err(error.into()),
    };

    scratch.edits.clear();
    if framing.strip {
        framing::hop_by_hop(&client.buf, &scratch.head, &mut scratch.edits);
    }
    if let Ok(call) = &begun
        && let Some(plan) = &call.plan
    {
        let path = plan
            .path
            .as_ref()
            .map(|edit| edit.apply(view.path(), call.prefix));
        let (head, buf, edits) = (&scratch.head, &client.buf, &mut scratch.edits);
        fields::target(head, buf, path, plan.host.as_deref(), edits);
        fields::of_head(&plan.request, head, buf, edits);
        fields::sort(edits);
    }
    if let Some(traceparent) = propagate {
        trace_edit(
            &scratch.head,
            &client.buf,
            &traceparent.to_bytes(),
            &mut scratch.edits,
        );
    }
    scratch.out.clear();
    scratch.to_client.clear();
    scratch
        .head
        .write(&client.buf, &scratch.edits, &mut scratch.out);
    let method = kept_method(scratch.head.method.get(&client.buf));
    client.buf.advance(scratch.head.end);

    let mut exchange = Exchange {
        worker,
        flow,
        method,
        body: BodyReader::new(framing.body),
        ready: 0,
        persistent: match scratch.head.minor {
            0 => framing.keep_alive,
            _ => !framing.close,
        },
        framing,
        ending: Ending::default(),
        observation: Some(observation),
        tees: None,
        raced: None,
    };
    let after = match exchange.body.advance(&client.buf) {
        Ok(n) => {
            let copied = n.min(WITH_HEAD);
            scratch.out.extend_from_slice(&client.buf[..copied]);
            client.buf.advance(copied);
            exchange.ready = n - copied;
            exchange.ending.bytes_in = copied as u64;
            match begun {
                Ok(mut call) => {
                    if let Some(plan) = &call.plan
                        && !framing.upgrade
                        && &*exchange.method != b"CONNECT"
                    {
                        let (method, out) = (&exchange.method, &scratch.out);
                        let more = !exchange.body.is_done() || exchange.ready > 0;
                        exchange.tees = mirror::start(worker, plan, method, out, more);
                    }
                    let after = exchange.tries(&mut call, client, scratch).await;
                    let route = call.route;
                    exchange.ending.tries = call.tries;
                    exchange.conclude(Some(&route));
                    return after;
                }
                Err(refusal) => exchange.refused(refusal, client).await,
            }
        }
        Err(error) => {
            let text = format!("the request was refused: {error}");
            let error = ProxyError::new(ErrorCode::BadRequest, text);
            exchange.fail(&error, client, false).await
        }
    };
    exchange.conclude(None);
    after
}

/// Body bytes that are copied behind a head so that both leave in one write.
pub(super) const WITH_HEAD: usize = 16 * 1024;

impl Exchange<'_> {
    /// Tells telemetry how the request ended.
    pub(super) fn conclude(&mut self, route: Option<&std::sync::Arc<crate::tables::Route>>) {
        if let Some(observation) = self.observation.take() {
            let ending = Ending {
                route,
                ..self.ending
            };
            observation.finish(self.worker, self.flow, &ending, Instant::now());
        }
    }

    /// Answers with an error of our own.
    pub(super) async fn fail(
        &mut self,
        error: &ProxyError,
        client: &mut Conn,
        keep: bool,
    ) -> After {
        self.ending.status = error.status();
        self.ending.error = Some(error.code);
        tracing::debug!(code = error.code.name(), "{error}");
        let keep = self.may_keep(keep);
        match answer(client, error, &self.method, keep).await {
            Ok(()) if keep => After::KeepAlive,
            Ok(()) => After::Close,
            Err(_) => After::Abort,
        }
    }

    /// Whether the client's connection can go on after an answer of our own.
    pub(super) fn may_keep(&self, keep: bool) -> bool {
        keep && self.body.is_done()
            && self.ready == 0
            && (self.flow.from_mesh || (self.persistent && !self.worker.drain.is_draining()))
    }

    /// There is no call: a route, a permit or an endpoint is missing.
    pub(super) async fn refused(&mut self, refusal: Refusal, client: &mut Conn) -> After {
        match refusal {
            Refusal::Error(error) => self.fail(&error, client, true).await,
            Refusal::Answer(given) => {
                self.ending.status = given.status;
                let keep = self.may_keep(true);
                match answer_plainly(client, given.status, &given.fields, keep).await {
                    Ok(()) if keep => After::KeepAlive,
                    Ok(()) => After::Close,
                    Err(_) => After::Abort,
                }
            }
            Refusal::Fallback(fallback, error) => match &*fallback {
                Fallback::Response {
                    status,
                    headers,
                    body,
                } => {
                    self.ending.status = *status;
                    self.ending.error = Some(ErrorCode::Fallback);
                    let keep = self.may_keep(true);
                    let mut text =
                        format!("HTTP/1.1 {status} {}\r\n", reason(*status)).into_bytes();
                    for (name, value) in headers {
                        text.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
                    }
                    let tail = format!(
                        "content-length: {}\r\nproxy-status: {}\r\n{}\r\n",
                        body.len(),
                        error.proxy_status(),
                        if keep { "" } else { "connection: close\r\n" }
                    );
                    text.extend_from_slice(tail.as_bytes());
                    if &*self.method != b"HEAD" {
                        text.extend_from_slice(body);
                    }
                    match write_all(client, &text).await {
                        Ok(()) if keep => After::KeepAlive,
                        Ok(()) => After::Close,
                        Err(_) => After::Abort,
                    }
                }
                // A call goes to another backend by itself.
                Fallback::Backend(_) => self.fail(&error, client, true).await,
            },
        }
    }

    /// Tries until there is a response, or no more try.
    pub(super) async fn tries(
        &mut self,
        call: &mut Call,
        client: &mut Conn,
        scratch: &mut Scratch,
    ) -> After {
        let mut fresh = self.framing.odd;
        let mut replay = Some(match &call.route.policy.retry {
            Some(policy) => policy.max_body,
            None => DEFAULT_REPLAY_BYTES,
        });
        loop {
            let now = Instant::now();
            let mut picked = match call.pick(self.worker, now) {
                Ok(picked) => picked,
                Err(refusal) => return self.refused(refusal, client).await,
            };
            if let Some(observation) = &mut self.observation {
                observation.endpoint(self.worker, self.flow, &picked.endpoint.info);
            }
            let leased = self
                .lease(call, &picked, fresh, &mut scratch.kept, now)
                .await;
            let (mut server, permit, reused) = match leased {
                Ok(leased) => leased,
                Err(Lease::Limit(limit)) => {
                    let error = call.limit_reached(self.worker, limit);
                    match call.fall_back(self.worker, error) {
                        Ok(()) => continue,
                        Err(refusal) => return self.refused(refusal, client).await,
                    }
                }
                Err(Lease::Failed(error)) => {
                    if error.is_endpoints() {
                        picked.observe(Outcome::ConnectFailure, Instant::now());
                    }
                    let failure = Failure::Connect;
                    match self.verdict(call, &picked, failure, true, None) {
                        Verdict::Again(pause) => {
                            drop(picked);
                            scratch.timer.sleep(pause).await;
                            continue;
                        }
                        // The other proxy knows what it means, and may know another endpoint.
                        Verdict::Over if self.flow.from_mesh => {
                            let error = connect::to_proxy_error(&error, &call.place());
                            tracing::debug!(code = error.code.name(), "{error}");
                            self.ending.error = Some(error.code);
                            return match write_all(client, &[kept::UNREACHABLE]).await {
                                Ok(()) => After::Close,
                                Err(_) => After::Abort,
                            };
                        }
                        Verdict::Over => {
                            let error = connect::to_proxy_error(&error, &call.place());
                            return self.fail(&error, client, true).await;
                        }
                    }
                }
            };
            if !reused {
                picked.sent(Instant::now());
            }
            let (permit, reused) = match self.hedge_after(call, replay).zip(replay) {
                None => (permit, reused),
                Some((delay, limit)) => {
                    let mut lane = Lane {
                        server,
                        permit,
                        picked,
                        reused,
                        sent: 0,
                        flushed: false,
                    };
                    let race = self.race(call, client, &mut lane, scratch, delay, limit);
                    let gone = Box::pin(race).await.is_err();
                    (server, picked) = (lane.server, lane.picked);
                    if gone {
                        server.io.abort();
                        return After::Abort;
                    }
                    (lane.permit, lane.reused)
                }
            };
            let tried = self
                .one_try(
                    call,
                    client,
                    &mut server,
                    &mut picked,
                    scratch,
                    &mut replay,
                    reused,
                )
                .await;
            match tried {
                Tried::Again { pause, dead } => {
                    // A dead pooled connection says that its neighbours may be dead too.
                    fresh |= dead;
                    drop((picked, permit));
                    server.io.abort();
                    if !pause.is_zero() {
                        scratch.timer.sleep(pause).await;
                    }
                }
                Tried::Answer(error) => {
                    server.io.abort();
                    return self.fail(&error, client, true).await;
                }
                Tried::Cut(cut) => {
                    let said = match cut {
                        Cut::Reset => {
                            server.io.abort();
                            return After::Abort;
                        }
                        Cut::Truncated => Ok(()),
                        Cut::Unanswered if self.flow.from_mesh => {
                            write_all(client, &[kept::UNANSWERED]).await
                        }
                        Cut::Unanswered => Ok(()),
                        Cut::WithinHead | Cut::ResetWithinHead => {
                            write_all(client, &server.buf).await
                        }
                    };
                    if matches!(cut, Cut::ResetWithinHead) {
                        server.io.abort();
                        return After::Abort;
                    }
                    // The server sees what it would see of a client that hears of its end.
                    let _ = tokio::time::timeout(LINGER, finish(server)).await;
                    return match said {
                        Ok(()) => After::Close,
                        Err(_) => After::Abort,
                    };
                }
                Tried::Done {
                    reuse,
                    odd,
                    after_close,
                } => {
                    server.requests += 1;
                    let connection = &call.balancer.backend().policy.connection;
                    let reuse = reuse && !fresh && !connection.is_worn(server.requests);
                    if reuse && !after_close && is_alone(call) {
                        server.release();
                        let idle = connection.idle_timeout;
                        scratch.kept = Some(Kept {
                            conn: server,
                            permit,
                            endpoint: picked.endpoint.clone(),
                            until: idle.map(|idle| Instant::now() + idle),
                        });
                    } else if reuse && !odd {
                        let how_long = pool::how_long(&server, connection);
                        let pool = &picked.endpoint.pool.http1;
                        pool.put(server, permit, Instant::now(), how_long);
                    }
                    return if after_close {
                        After::Close
                    } else {
                        After::KeepAlive
                    };
                }
                Tried::Tunnel => {
                    let idle = call.route.policy.stream_idle_timeout;
                    return After::Tunnel(Box::new((server, picked, permit, idle)));
                }
            }
        }
    }

    /// Whether a failed try is repeated.
    pub(super) fn verdict(
        &self,
        call: &mut Call,
        picked: &Picked<Pools>,
        failure: Failure,
        replayable: bool,
        said: Option<Again>,
    ) -> Verdict {
        let again = call.failed(
            self.worker,
            picked.endpoint.info.address,
            &self.method,
            false,
            failure,
            replayable,
            said,
            Instant::now(),
        );
        match again {
            Some(pause) => Verdict::Again(pause),
            None => Verdict::Over,
        }
    }

    /// A connection to the endpoint: an idle one, or a new one.
    pub(super) async fn lease(
        &self,
        call: &Call,
        picked: &Picked<Pools>,
        fresh: bool,
        kept: &mut Option<Kept>,
        now: Instant,
    ) -> Result<(Conn, ConnectionPermit, bool), Lease> {
        let careful = !crate::http::retry::is_idempotent(&self.method);
        if !fresh {
            if let Some(mut kept) = kept.take() {
                if kept.fits(&picked.endpoint, careful) {
                    return Ok((kept.conn, kept.permit, true));
                }
                kept.release(now);
            }
            while let Some((conn, permit)) = picked.endpoint.pool.http1.take(now) {
                if !careful || pool::is_alive(&conn) {
                    return Ok((conn, permit, true));
                }
            }
        }
        let permit = call.balancer.connection_permit().map_err(Lease::Limit)?;
        let policy = &call.balancer.backend().policy;
        let alpn = crate::identity::Alpn::Http1;
        let connecting = connect(self.worker, &picked.endpoint.info, policy, alpn);
        match Box::pin(connecting).await {
            Ok(stream) => Ok((Conn::new(stream), permit, false)),
            Err(error) => Err(Lease::Failed(error)),
        }
    }
}
