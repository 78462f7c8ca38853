//! A client's connection, request after request.
//!
//! The way of one request, [`request`]: route, backend and permit ([`Call`]); edits; then tries,
//! each with an endpoint, a connection and a [`Duplex`] that runs until the response has ended or
//! the try has failed. Nothing of a response has passed to the client while a try can still be
//! repeated.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Buf;

use super::conn::{Conn, LazyTimer};
use super::exchange::{Duplex, Event, Upload};
use super::framing::{self, Body, BodyReader};
use super::head::{self, Edit, Head, HeadError, MAX_HEAD, Parsed, RequestHead};
use super::kept::{self, Happened, Kept};
use super::pool::{self, APP_IDLE, MESH_IDLE};
use crate::balance::{ConnectionPermit, LimitReached, Outcome, Picked};
use crate::http::call::{self, Call, Refusal};
use crate::http::error::reason;
use crate::http::flow::Flow;
use crate::http::observe::{Ending, Observation};
use crate::http::retry::{DEFAULT_REPLAY_BYTES, Failure};
use crate::http::{ErrorCode, ProxyError};
use crate::outbound::connect::{self, connect};
use crate::tables::Fallback;
use crate::tcp;
use crate::telemetry::FlowProtocol;
use crate::telemetry::trace::context::ContextHeaders;
use crate::transport::{Io, Stream};
use crate::worker::{Pools, Worker};

/// How long a head that has begun may take to be complete; then 408.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a client's connection may stay without a request. The application's own server would
/// mostly close much earlier; closing late harms nobody.
pub const CLIENT_IDLE: Duration = Duration::from_secs(3600);
/// Idle for this long, a connection gives its buffers back and begins to listen for draining.
const SETTLED: Duration = Duration::from_secs(1);
/// When the proxy drains, a client's connection is closed once it has been idle for this long: one
/// in use hears `Connection: close` with its next response instead.
const DRAIN_IDLE: Duration = Duration::from_secs(3);
/// Body bytes that are copied behind a head so that both leave in one write.
const WITH_HEAD: usize = 16 * 1024;
/// How long a client that is answered early may go on sending before its connection is closed: a
/// reset would destroy the answer on its way.
const LINGER: Duration = Duration::from_secs(2);
/// How long the rest of a request may take after its response has ended, without progress.
const REST_IDLE: Duration = Duration::from_secs(30);

/// What a connection keeps from request to request.
#[derive(Debug, Default)]
struct Scratch {
    head: Head,
    response: Head,
    out: Vec<u8>,
    to_client: Vec<u8>,
    edits: Vec<Edit>,
    timer: LazyTimer,
    /// The server's connection, where it is the client's alone.
    kept: Option<Kept>,
}

/// What becomes of the client's connection after a request.
#[derive(Debug)]
enum After {
    KeepAlive,
    /// In order: what was written arrives.
    Close,
    /// As a reset.
    Abort,
    /// The two connections belong to each other from now on.
    Tunnel(Box<(Conn, Picked<Pools>, ConnectionPermit)>),
}

/// What came instead of, or as, the next request.
enum Next {
    Request,
    Closed,
    /// The application has ended the idle connection.
    Ended(Happened),
    Gone,
    Refused(ProxyError),
}

/// Serves one client's connection to its end.
pub async fn serve(worker: Rc<Worker>, stream: Stream, flow: Rc<Flow>) {
    let mut client = Conn::new(stream);
    let mut scratch = Scratch::default();
    loop {
        match next_head(&worker, &flow, &mut client, &mut scratch).await {
            Next::Request => {}
            Next::Ended(how) => return pass_end(&flow, client, scratch.kept.take(), how).await,
            // A proxy may just be sending a request: unread, it must not turn the orderly end,
            // which says that it was not processed, into a reset.
            Next::Closed if flow.from_mesh => {
                release(&mut scratch);
                return linger(client).await;
            }
            Next::Closed => {
                release(&mut scratch);
                return finish(client).await;
            }
            Next::Gone => return release(&mut scratch),
            Next::Refused(error) => {
                let observation = Observation::begin(
                    &worker,
                    &flow,
                    &Unreadable,
                    ContextHeaders::default,
                    FlowProtocol::Http1,
                    Instant::now(),
                )
                .0;
                let ending = Ending {
                    status: error.code.status(),
                    error: Some(error.code),
                    ..Ending::default()
                };
                observation.finish(&worker, &flow, &ending, Instant::now());
                if answer(&mut client, &error, b"", false).await.is_ok() {
                    linger(client).await;
                }
                return;
            }
        }
        match request(&worker, &flow, &mut client, &mut scratch).await {
            After::KeepAlive => {}
            After::Close => return linger(client).await,
            After::Abort => return client.io.abort(),
            After::Tunnel(server) => {
                let (server, picked, permit) = *server;
                let held = (picked, permit);
                let (client, server) = (client.into_stream(), server.into_stream());
                let (options, counters) = (tcp::Options::default(), tcp::Counters::default());
                tcp::copy(client, server, &options, &counters, worker.cut()).await;
                drop(held);
                return;
            }
        }
    }
}

/// A request that could not be read, for telemetry.
struct Unreadable;

impl crate::http::RequestView for Unreadable {
    fn method(&self) -> &[u8] {
        b""
    }
    fn path(&self) -> &[u8] {
        b""
    }
    fn header(&self, _: &str) -> Option<&[u8]> {
        None
    }
}

/// Waits for the next request's head.
async fn next_head(worker: &Worker, flow: &Flow, client: &mut Conn, scratch: &mut Scratch) -> Next {
    let since = Instant::now();
    let mut begun = None;
    let mut settled = false;
    loop {
        if flow.from_mesh && client.buf.first() == Some(&kept::LEFT) {
            client.buf.advance(1);
            scratch.kept = None;
        }
        if !client.buf.is_empty() {
            match head::parse_request(&client.buf, &mut scratch.head) {
                Ok(Parsed::Complete) => return Next::Request,
                Ok(Parsed::Partial) if client.buf.len() > MAX_HEAD => {
                    let text = format!("the head of the request is larger than {MAX_HEAD} bytes");
                    return Next::Refused(ProxyError::new(ErrorCode::HeadTooLarge, text));
                }
                Ok(Parsed::Partial) => {}
                Err(error @ HeadError::TooManyFields) => {
                    return Next::Refused(ProxyError::new(
                        ErrorCode::HeadTooLarge,
                        error.to_string(),
                    ));
                }
                Err(error) => {
                    let text = format!("the request was refused: {error}");
                    return Next::Refused(ProxyError::new(ErrorCode::BadRequest, text));
                }
            }
        }
        if client.eof {
            return Next::Closed;
        }
        let waiting = client.buf.is_empty();
        let deadline = if !waiting {
            *begun.get_or_insert_with(Instant::now) + HEAD_TIMEOUT
        } else if worker.drain.is_draining() && flow.from_mesh && !settled {
            // In use, it would never be idle: it goes between two requests. One that is on its way
            // is sent again by the proxy that hears this end instead of an answer.
            Instant::now()
        } else if !settled {
            since + SETTLED
        } else if worker.drain.is_draining() && !flow.from_mesh {
            Instant::now() + DRAIN_IDLE
        } else if worker.drain.is_draining() {
            return Next::Closed;
        } else {
            since + CLIENT_IDLE
        };
        let read = poll_fn(|cx| {
            if let Poll::Ready(read) = client.poll_fill(cx, 0) {
                return Poll::Ready(Woke::Read(read));
            }
            if waiting
                && let Some(kept) = &mut scratch.kept
                && let Poll::Ready(happened) = kept.poll(cx)
            {
                return Poll::Ready(Woke::Server(happened));
            }
            scratch.timer.poll(cx, Some(deadline)).map(|()| Woke::Late)
        });
        let event = if waiting && settled && !worker.drain.is_draining() {
            tokio::select! {
                biased;
                read = read => read,
                () = worker.drain.begun() => continue,
            }
        } else {
            read.await
        };
        match event {
            Woke::Read(Ok(_)) => {}
            Woke::Read(Err(_)) => return Next::Gone,
            Woke::Server(Happened::Gone) => scratch.kept = None,
            Woke::Server(happened) => return Next::Ended(happened),
            Woke::Late if !waiting => {
                let text = format!(
                    "the head of the request was not complete after {} s",
                    HEAD_TIMEOUT.as_secs()
                );
                return Next::Refused(ProxyError::new(ErrorCode::RequestTimeout, text));
            }
            Woke::Late if !settled => {
                settled = true;
                client.release();
                scratch.out = Vec::new();
                scratch.to_client = Vec::new();
            }
            Woke::Late => return Next::Closed,
        }
    }
}

/// What an idle connection was woken by.
enum Woke {
    Read(std::io::Result<usize>),
    Server(Happened),
    Late,
}

/// The client goes, or has gone.
fn release(scratch: &mut Scratch) {
    if let Some(kept) = scratch.kept.take() {
        kept.release(Instant::now());
    }
}

/// Ends an idle client's connection as the application has ended its own.
async fn pass_end(flow: &Flow, mut client: Conn, kept: Option<Kept>, how: Happened) {
    match how {
        Happened::Reset if !flow.from_mesh => return client.io.abort(),
        Happened::Closed if !flow.from_mesh => return finish(client).await,
        Happened::Spoke => {
            if let Some(kept) = kept {
                last_words(&mut client, kept.conn).await;
            }
        }
        happened => {
            let byte = match happened {
                Happened::Reset => kept::CLOSED_BY_RESET,
                _ => kept::CLOSED,
            };
            let _ = write_all(&mut client, &[byte]).await;
        }
    }
    linger(client).await;
}

/// What a server says to an idle client before it closes (408, for example) is passed on.
async fn last_words(client: &mut Conn, mut server: Conn) {
    let pass = async {
        loop {
            if write_all(client, &server.buf).await.is_err() {
                return;
            }
            server.buf.clear();
            match poll_fn(|cx| server.poll_fill(cx, 0)).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
    };
    let _ = tokio::time::timeout(LINGER, pass).await;
}

/// How a try ended for the one who drives it.
enum Driven {
    Event(Event),
    Deadline,
    Idle,
}

/// Runs a try until something has to be decided.
async fn drive(
    duplex: &mut Duplex<'_>,
    response: &mut Head,
    method: &[u8],
    timer: &mut LazyTimer,
    deadline: Option<Instant>,
    idle: Option<Duration>,
) -> Driven {
    let mut seen = duplex.progress;
    let mut quiet = idle.map(|idle| Instant::now() + idle);
    poll_fn(|cx| {
        if let Poll::Ready(event) = duplex.poll(cx, response, method) {
            return Poll::Ready(Driven::Event(event));
        }
        if let Some(idle) = idle
            && duplex.progress != seen
        {
            seen = duplex.progress;
            quiet = Some(Instant::now() + idle);
        }
        let next = match (deadline, quiet) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        timer.poll(cx, next).map(|()| {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                Driven::Deadline
            } else {
                Driven::Idle
            }
        })
    })
    .await
}

/// The headers that may carry a trace context.
fn context_headers<'b>(head: &Head, buf: &'b [u8]) -> ContextHeaders<'b> {
    let mut headers = ContextHeaders::default();
    for field in &head.fields {
        headers.take(field.name.get(buf), field.value.get(buf));
    }
    headers
}

/// One request from its head to the end of its response.
async fn request(
    worker: &Rc<Worker>,
    flow: &Flow,
    client: &mut Conn,
    scratch: &mut Scratch,
) -> After {
    let started = Instant::now();
    let destination = flow.destination();
    let framing = scratch.head.framing;
    let view = RequestHead {
        head: &scratch.head,
        buf: &client.buf,
    };
    let (observation, propagate) = Observation::begin(
        worker,
        flow,
        &view,
        || context_headers(&scratch.head, &client.buf),
        FlowProtocol::Http1,
        started,
    );
    let begun = Call::begin(worker, &destination, &view, flow.peer, started).await;

    scratch.edits.clear();
    if framing.strip {
        framing::hop_by_hop(&client.buf, &scratch.head, &mut scratch.edits);
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
    let method: Box<[u8]> = scratch.head.method.get(&client.buf).into();
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

/// Replaces the request's `traceparent` lines by ours, in their place; without one, ours comes
/// last.
fn trace_edit(head: &Head, buf: &[u8], value: &[u8], edits: &mut Vec<Edit>) {
    let mut line = Vec::with_capacity(value.len() + 15);
    let mut placed = false;
    for field in head.all(buf, "traceparent") {
        let place = head.line(buf, field);
        if placed {
            edits.push(Edit::remove(place));
        } else {
            placed = true;
            edits.push(Edit {
                place: field.value,
                put: value.to_vec(),
            });
        }
    }
    if !placed {
        line.extend_from_slice(b"traceparent: ");
        line.extend_from_slice(value);
        line.extend_from_slice(b"\r\n");
        edits.push(Edit::insert(head.tail(buf), line));
    }
    edits.sort_by_key(|edit| edit.place.start);
}

/// A request while it is being served.
struct Exchange<'w> {
    worker: &'w Rc<Worker>,
    flow: &'w Flow,
    method: Box<[u8]>,
    framing: framing::Framing,
    /// Where the request's body ends.
    body: BodyReader,
    /// Bytes of it at the front of the client's buffer.
    ready: usize,
    /// The client wants to go on after this request.
    persistent: bool,
    ending: Ending<'static>,
    observation: Option<Observation>,
}

/// What a failed try leads to.
enum Verdict {
    Again(Duration),
    Over,
}

impl Exchange<'_> {
    /// Tells telemetry how the request ended.
    fn conclude(&mut self, route: Option<&std::sync::Arc<crate::tables::Route>>) {
        if let Some(observation) = self.observation.take() {
            let ending = Ending {
                route,
                ..self.ending
            };
            observation.finish(self.worker, self.flow, &ending, Instant::now());
        }
    }

    /// Answers with an error of our own.
    async fn fail(&mut self, error: &ProxyError, client: &mut Conn, keep: bool) -> After {
        self.ending.status = error.code.status();
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
    fn may_keep(&self, keep: bool) -> bool {
        keep && self.body.is_done()
            && self.ready == 0
            && (self.flow.from_mesh || (self.persistent && !self.worker.drain.is_draining()))
    }

    /// There is no call: a route, a permit or an endpoint is missing.
    async fn refused(&mut self, refusal: Refusal, client: &mut Conn) -> After {
        match refusal {
            Refusal::Error(error) => self.fail(&error, client, true).await,
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
    async fn tries(&mut self, call: &mut Call, client: &mut Conn, scratch: &mut Scratch) -> After {
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
                        Cut::WithinHead => write_all(client, &server.buf).await,
                    };
                    server.io.abort();
                    return match said {
                        Ok(()) => After::Close,
                        Err(_) => After::Abort,
                    };
                }
                Tried::Done { reuse, after_close } => {
                    if reuse && !fresh && !after_close && is_alone(call) {
                        server.release();
                        scratch.kept = Some(Kept {
                            conn: server,
                            permit,
                            endpoint: picked.endpoint.clone(),
                        });
                    } else if reuse && !fresh {
                        let now = Instant::now();
                        let how_long = if matches!(server.io, Io::Plain(_)) {
                            APP_IDLE
                        } else {
                            MESH_IDLE
                        };
                        picked
                            .endpoint
                            .pool
                            .http1
                            .put(server, permit, now, how_long);
                    }
                    return if after_close {
                        After::Close
                    } else {
                        After::KeepAlive
                    };
                }
                Tried::Tunnel => return After::Tunnel(Box::new((server, picked, permit))),
            }
        }
    }

    /// Whether a failed try is repeated.
    fn verdict(
        &self,
        call: &mut Call,
        picked: &Picked<Pools>,
        failure: Failure,
        replayable: bool,
        retry_after: Option<Duration>,
    ) -> Verdict {
        let again = call.failed(
            self.worker,
            picked.endpoint.info.address,
            &self.method,
            false,
            failure,
            replayable,
            retry_after,
            Instant::now(),
        );
        match again {
            Some(pause) => Verdict::Again(pause),
            None => Verdict::Over,
        }
    }

    /// A connection to the endpoint: an idle one, or a new one.
    async fn lease(
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

    /// One try on one connection.
    #[allow(clippy::too_many_arguments)]
    async fn one_try(
        &mut self,
        call: &mut Call,
        client: &mut Conn,
        server: &mut Conn,
        picked: &mut Picked<Pools>,
        scratch: &mut Scratch,
        replay: &mut Option<usize>,
        reused: bool,
    ) -> Tried {
        let mesh = !matches!(server.io, Io::Plain(_));
        let Scratch {
            response,
            out,
            to_client,
            timer,
            ..
        } = scratch;
        let mut body = self.body;
        let mut duplex = Duplex::new(client, server, out, to_client, &mut body, *replay);
        duplex.ready = self.ready;
        let deadline = call.try_deadline(Instant::now());
        let idle = call.route.policy.idle_timeout;
        let mut passed = false;
        // Until the final head.
        let framing = loop {
            let driven = drive(&mut duplex, response, &self.method, timer, deadline, idle).await;
            let untouched = duplex.sent == 0 && duplex.body_sent == 0;
            let replayable = !passed && (duplex.replay.is_some() || untouched);
            let heard = duplex.heard || duplex.server.buf[..] == [kept::UNANSWERED];
            let failed = match driven {
                Driven::Event(Event::Head) => {
                    match self.on_head(&mut duplex, response, call, picked, replayable, &mut passed)
                    {
                        OnHead::Interim => continue,
                        OnHead::Final => break response.framing,
                        OnHead::Tunnel => {
                            // The head goes out first; what follows is the tunnel's.
                            let given = poll_fn(|cx| duplex.poll_give(cx)).await;
                            return match given {
                                Ok(()) => Tried::Tunnel,
                                Err(_) => Tried::Cut(Cut::Reset),
                            };
                        }
                        OnHead::Again(pause) => {
                            let kept = duplex.replay;
                            self.carry(&duplex.ready, body);
                            *replay = kept;
                            return Tried::Again { pause, dead: false };
                        }
                        OnHead::Bad(error) => {
                            picked.observe(Outcome::ServerError, Instant::now());
                            return self.answer_or_cut(error, passed);
                        }
                    }
                }
                Driven::Event(Event::NotHttp) => {
                    // Neither sense nor end of it can be told: it passes until the end.
                    picked.observe(Outcome::Success, Instant::now());
                    let framing = framing::Framing {
                        body: Body::UntilClose,
                        close: true,
                        ..framing::Framing::default()
                    };
                    match duplex.respond(0, BodyReader::UntilClose) {
                        Ok(()) => break framing,
                        Err(_) => return Tried::Cut(Cut::Reset),
                    }
                }
                Driven::Event(Event::BadResponse(error)) => {
                    picked.observe(Outcome::ServerError, Instant::now());
                    let text = format!(
                        "{}: the response of {} was refused: {error}",
                        call.place(),
                        picked.endpoint.info.address
                    );
                    let error = ProxyError::new(ErrorCode::BadResponse, text);
                    return self.answer_or_cut(error, passed);
                }
                Driven::Event(Event::BadRequest(error)) => {
                    let text = format!("the request was refused: {error}");
                    let error = ProxyError::new(ErrorCode::BadRequest, text);
                    return self.answer_or_cut(error, passed);
                }
                Driven::Event(Event::ClientGone(_)) => return Tried::Cut(Cut::Reset),
                Driven::Event(Event::ServerClosed) if mesh && not_processed(&duplex.server.buf) => {
                    Failed::new(Failure::NeverProcessed, true)
                }
                Driven::Event(Event::ServerClosed) => Failed::new(Failure::Reset, true),
                Driven::Event(Event::ServerReset(_)) => Failed::new(Failure::Reset, false),
                Driven::Deadline => Failed::new(Failure::Timeout, false),
                Driven::Idle => Failed::new(Failure::Timeout, false),
                Driven::Event(
                    Event::Done | Event::Truncated | Event::Cut(_) | Event::BadBody(_),
                ) => Failed::new(Failure::Reset, false),
            };
            // An idle connection that was closed under the request: it was most likely not read.
            // Only a request that may be repeated takes the chance.
            let idempotent = crate::http::retry::is_idempotent(&self.method);
            let dead = reused && !heard && failed.failure != Failure::Timeout;
            let failure = match failed.failure {
                Failure::Reset if dead && idempotent => Failure::NeverProcessed,
                other => other,
            };
            if !dead {
                picked.observe(
                    match failure {
                        Failure::Timeout => Outcome::Timeout,
                        _ => Outcome::Reset,
                    },
                    Instant::now(),
                );
            }
            let cut = match &duplex.server.buf[..] {
                _ if !failed.gracefully => Cut::Reset,
                [] => Cut::Unanswered,
                [kept::UNANSWERED] if mesh => Cut::Unanswered,
                _ => Cut::WithinHead,
            };
            let kept = duplex.replay;
            self.carry(&duplex.ready, body);
            *replay = kept;
            return match self.verdict(call, picked, failure, replayable, None) {
                Verdict::Again(pause) => Tried::Again { pause, dead },
                Verdict::Over if failure == Failure::Timeout => {
                    let text = format!(
                        "{}: {} did not answer within the timeout of {} ms",
                        call.place(),
                        picked.endpoint.info.address,
                        call.started.elapsed().as_millis()
                    );
                    let error = ProxyError::new(ErrorCode::ResponseTimeout, text);
                    self.answer_or_cut(error, passed)
                }
                Verdict::Over if failure == Failure::NeverProcessed && mesh => {
                    let text = format!(
                        "{}: the proxy at {} went away before it took the request",
                        call.place(),
                        picked.endpoint.info.address
                    );
                    let error = ProxyError::new(ErrorCode::ConnectionTerminated, text);
                    self.answer_or_cut(error, passed)
                }
                // The application cut the connection: so do we.
                Verdict::Over => {
                    self.ending.error = Some(ErrorCode::ConnectionTerminated);
                    Tried::Cut(cut)
                }
            };
        };
        if let Some(observation) = &mut self.observation {
            observation.head(Instant::now());
        }
        let driven = loop {
            match drive(
                &mut duplex,
                response,
                &self.method,
                timer,
                call.deadline,
                idle,
            )
            .await
            {
                Driven::Event(Event::Head) => continue,
                other => break other,
            }
        };
        if let Driven::Event(Event::Done) = driven {
            let open = duplex.upload == Upload::Open;
            let server_ends = !mesh && (framing.close || self.framing.close);
            if open && !server_ends {
                rest_of_request(&mut duplex, timer).await;
            }
        }
        self.ending.bytes_in += duplex.body_sent;
        self.ending.bytes_out = duplex.body_received;
        let complete = duplex.upload == Upload::Finished;
        let server_open = duplex.server_open();
        match driven {
            Driven::Event(Event::Done) => {
                let delimited = framing.body != Body::UntilClose && !framing.odd;
                let old = response.minor == 0 && !framing.keep_alive;
                let server_stays =
                    mesh || !(framing.close || old || self.framing.close || !self.persistent);
                let client_stays = delimited
                    && complete
                    && (self.flow.from_mesh
                        || (self.persistent
                            && !framing.close
                            && !old
                            && !self.worker.drain.is_draining()));
                Tried::Done {
                    reuse: delimited && server_open && server_stays && server.buf.is_empty(),
                    after_close: !client_stays,
                }
            }
            Driven::Event(Event::Truncated) => {
                picked.observe(Outcome::Reset, Instant::now());
                self.ending.error = Some(ErrorCode::ConnectionTerminated);
                Tried::Cut(Cut::Truncated)
            }
            Driven::Event(Event::ClientGone(_)) => Tried::Cut(Cut::Reset),
            Driven::Deadline | Driven::Idle => {
                picked.observe(Outcome::Timeout, Instant::now());
                self.ending.error = Some(ErrorCode::ResponseTimeout);
                Tried::Cut(Cut::Reset)
            }
            Driven::Event(_) => {
                picked.observe(Outcome::Reset, Instant::now());
                self.ending.error = Some(ErrorCode::ConnectionTerminated);
                Tried::Cut(Cut::Reset)
            }
        }
    }

    /// What a try consumed of the request's body stays consumed.
    fn carry(&mut self, ready: &usize, body: BodyReader) {
        self.ready = *ready;
        self.body = body;
    }

    /// An answer of our own, if nothing has passed to the client yet.
    fn answer_or_cut(&mut self, error: ProxyError, passed: bool) -> Tried {
        if passed {
            self.ending.error = Some(error.code);
            Tried::Cut(Cut::Reset)
        } else {
            Tried::Answer(error)
        }
    }

    /// A response's head is here.
    fn on_head(
        &mut self,
        duplex: &mut Duplex<'_>,
        response: &mut Head,
        call: &mut Call,
        picked: &mut Picked<Pools>,
        replayable: bool,
        passed: &mut bool,
    ) -> OnHead {
        let status = response.status;
        // SOURCE is Icecast's: what follows the answer is a stream without a length.
        let tunnel = (status == 101 && self.framing.upgrade)
            || (&*self.method == b"SOURCE"
                && (200..300).contains(&status)
                && self.framing.body == Body::None)
            || (&*self.method == b"CONNECT" && (200..300).contains(&status));
        if (100..200).contains(&status) && status != 101 {
            *passed = true;
            response.write(&duplex.server.buf, &[], duplex.to_client);
            duplex.server.buf.advance(response.end);
            return OnHead::Interim;
        }
        if status == 101 && !tunnel {
            let text = format!(
                "{}: {} switched protocols without being asked to",
                call.place(),
                picked.endpoint.info.address
            );
            return OnHead::Bad(ProxyError::new(ErrorCode::BadResponse, text));
        }
        let now = Instant::now();
        picked.observe(call::outcome_of_status(status), now);
        if status >= 400 {
            let after = call::retry_after(response.value(&duplex.server.buf, "retry-after"));
            if let Some(after) = after
                && matches!(status, 429 | 503)
            {
                picked.back_off(after);
            }
            let failure = Failure::Status(status);
            if let Verdict::Again(pause) = self.verdict(call, picked, failure, replayable, after) {
                return OnHead::Again(pause);
            }
        }
        self.ending.status = status;
        *passed = true;
        let mut edits = Vec::new();
        if response.framing.strip {
            framing::hop_by_hop(&duplex.server.buf, response, &mut edits);
        }
        let draining = self.worker.drain.is_draining() && !self.flow.from_mesh && !tunnel;
        if draining && !response.framing.close && self.persistent {
            say_close(response, &duplex.server.buf, &mut edits);
        }
        response.write(&duplex.server.buf, &edits, duplex.to_client);
        if tunnel {
            duplex.server.buf.advance(response.end);
            return OnHead::Tunnel;
        }
        match duplex.respond(response.end, BodyReader::new(response.framing.body)) {
            Ok(()) => OnHead::Final,
            Err(error) => {
                duplex.to_client.clear();
                *passed = false;
                let text = format!("{}: the response was refused: {error}", call.place());
                OnHead::Bad(ProxyError::new(ErrorCode::BadResponse, text))
            }
        }
    }
}

/// Whether a proxy that ended the connection in order had not taken the request: it said nothing,
/// or that the connection had ended before.
fn not_processed(said: &[u8]) -> bool {
    matches!(said, [] | [kept::CLOSED | kept::CLOSED_BY_RESET])
}

/// Whether there is one endpoint, so that nothing is balanced, and no limit that idle connections
/// would use up: then a client keeps its server's connection.
fn is_alone(call: &Call) -> bool {
    let backend = call.balancer.backend();
    backend.policy.max_connections == 0 && backend.endpoints.current.load().endpoints.len() == 1
}

/// After its response, a request may still be on its way.
async fn rest_of_request(duplex: &mut Duplex<'_>, timer: &mut LazyTimer) {
    let mut seen = duplex.progress;
    let mut quiet = Instant::now() + REST_IDLE;
    poll_fn(|cx| {
        if let Poll::Ready(_event) = duplex.poll_rest(cx) {
            return Poll::Ready(());
        }
        if duplex.progress != seen {
            seen = duplex.progress;
            quiet = Instant::now() + REST_IDLE;
        }
        timer.poll(cx, Some(quiet))
    })
    .await;
}

/// Says `Connection: close` in a response that does not.
fn say_close(response: &Head, buf: &[u8], edits: &mut Vec<Edit>) {
    for field in response.all(buf, "connection") {
        let place = response.line(buf, field);
        edits.retain(|edit| edit.place.start < place.start || edit.place.start >= place.end);
        edits.push(Edit::remove(place));
    }
    let at = response.tail(buf);
    edits.push(Edit::insert(at, b"Connection: close\r\n".to_vec()));
    edits.sort_by_key(|edit| edit.place.start);
}

/// Why there is no connection for a try.
enum Lease {
    Limit(LimitReached),
    Failed(crate::transport::ConnectError),
}

/// How a try ended.
enum Tried {
    Again {
        pause: Duration,
        /// It was a pooled connection that turned out dead.
        dead: bool,
    },
    /// Nothing has passed to the client: it is told.
    Answer(ProxyError),
    /// The client's connection is cut as the server's was: in order, or by a reset.
    Cut(Cut),
    Done {
        reuse: bool,
        after_close: bool,
    },
    Tunnel,
}

/// How the server cut a try off, and the client is.
enum Cut {
    Reset,
    /// In order, within the response's body.
    Truncated,
    /// In order, without a byte of the final response.
    Unanswered,
    /// In order, within the response's head: what there is of it stands in the buffer.
    WithinHead,
}

/// What a response's head leads to.
enum OnHead {
    Interim,
    Final,
    Tunnel,
    Again(Duration),
    Bad(ProxyError),
}

/// How a try failed before a response, and whether the server ended in order.
struct Failed {
    failure: Failure,
    gracefully: bool,
}

impl Failed {
    fn new(failure: Failure, gracefully: bool) -> Self {
        Self {
            failure,
            gracefully,
        }
    }
}

async fn write_all(client: &mut Conn, bytes: &[u8]) -> std::io::Result<()> {
    let mut at = 0;
    poll_fn(|cx| {
        while at < bytes.len() {
            match std::task::ready!(client.poll_write(cx, &bytes[at..])) {
                Ok(n) => at += n,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        client.poll_flush(cx)
    })
    .await
}

/// An error of our own as a response.
async fn answer(
    client: &mut Conn,
    error: &ProxyError,
    method: &[u8],
    keep: bool,
) -> std::io::Result<()> {
    let status = error.code.status();
    let body = format!("weft: {}\n", error.detail);
    let mut text = format!(
        "HTTP/1.1 {status} {}\r\ncontent-type: text/plain; charset=utf-8\r\n\
         content-length: {}\r\nproxy-status: {}\r\n{}\r\n",
        reason(status),
        body.len(),
        error.proxy_status(),
        if keep { "" } else { "connection: close\r\n" },
    );
    if method != b"HEAD" {
        text.push_str(&body);
    }
    write_all(client, text.as_bytes()).await
}

/// Ends our direction and waits a little for the client's, so that what was written arrives.
async fn linger(mut client: Conn) {
    if poll_fn(|cx| client.poll_shutdown(cx)).await.is_err() {
        return;
    }
    client.buf.clear();
    let drain = async {
        while !client.eof {
            match poll_fn(|cx| client.poll_fill(cx, 0)).await {
                Ok(0) | Err(_) => break,
                Ok(_) => client.buf.clear(),
            }
        }
    };
    let _ = tokio::time::timeout(LINGER, drain).await;
}

/// The client has finished and nothing is owed to it.
async fn finish(mut client: Conn) {
    let _ = poll_fn(|cx| client.poll_shutdown(cx)).await;
}
