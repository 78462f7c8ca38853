//! One try of a request on one connection to a server: both directions at once, until the response
//! has ended or the try has failed, and what that means.

use std::future::poll_fn;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Buf;

use super::answer::say_close;
use super::conn::{Conn, LazyTimer};
use super::exchange::{Duplex, Event, Upload};
use super::framing::{self, Body, BodyReader};
use super::head::Head;
use super::kept;
use super::request::{Exchange, Verdict};
use super::serve::Scratch;
use crate::balance::{Outcome, Picked};
use crate::http::call::{self, Call};
use crate::http::filter::fields;
use crate::http::pushback::Again;
use crate::http::retry::Failure;
use crate::http::{ErrorCode, ProxyError};
use crate::outbound::connect;
use crate::transport::Io;
use crate::worker::Pools;

/// How a try ended for the one who drives it.
pub(super) enum Driven {
    Event(Event),
    Deadline,
    Idle,
}

/// Runs a try until something has to be decided.
pub(super) async fn drive(
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

/// After its response, a request may still be on its way.
pub(super) async fn rest_of_request(duplex: &mut Duplex<'_>, timer: &mut LazyTimer) {
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

/// Hands both connections over to be copied: what stands ready for the client goes out first.
async fn tunnel(duplex: &mut Duplex<'_>) -> Tried {
    duplex.give_back_unsent();
    match poll_fn(|cx| duplex.poll_give(cx)).await {
        Ok(()) => Tried::Tunnel,
        Err(_) => Tried::Cut(Cut::Reset),
    }
}

/// How a try ended.
pub(super) enum Tried {
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
        /// The server's connection can carry another request.
        reuse: bool,
        /// … though of this client only: the response can be read in two ways.
        odd: bool,
        after_close: bool,
    },
    Tunnel,
}

/// How the server cut a try off, and the client is.
pub(super) enum Cut {
    Reset,
    /// In order, within the response's body.
    Truncated,
    /// In order, without a byte of the final response.
    Unanswered,
    /// In order, within the response's head: what there is of it stands in the buffer.
    WithinHead,
    /// The same, by a reset.
    ResetWithinHead,
}

/// What a response's head leads to.
pub(super) enum OnHead {
    Interim,
    Final,
    Tunnel,
    Again(Duration),
    Bad(ProxyError),
    /// Ours goes in its place.
    Answer(ProxyError),
}

/// How a try failed before a response, and whether the server ended in order.
pub(super) struct Failed {
    pub(super) failure: Failure,
    pub(super) gracefully: bool,
}

impl Failed {
    pub(super) fn new(failure: Failure, gracefully: bool) -> Self {
        Self {
            failure,
            gracefully,
        }
    }
}

/// Whether a proxy that ended the connection in order had not taken the request: it said nothing,
/// that the connection had ended before, or that its application takes none.
pub(super) fn not_processed(said: &[u8]) -> bool {
    matches!(
        said,
        [] | [kept::CLOSED | kept::CLOSED_BY_RESET | kept::UNREACHABLE]
    )
}

/// How long the rest of a request may take after its response has ended, without progress.
pub(super) const REST_IDLE: Duration = Duration::from_secs(30);

impl Exchange<'_> {
    /// One try on one connection.
    #[allow(clippy::too_many_arguments)]
    pub(super) async fn one_try(
        &mut self,
        call: &mut Call,
        client: &mut Conn,
        server: &mut Conn,
        picked: &mut Picked<Pools>,
        scratch: &mut Scratch,
        replay: &mut Option<usize>,
        reused: bool,
    ) -> Tried {
        let mesh = server.io.is_mesh();
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
        duplex.tees = self.tees.clone();
        let deadline = match self.raced.take() {
            None => call.try_deadline(Instant::now()),
            Some(raced) => {
                duplex.resume(raced.sent);
                raced.deadline
            }
        };
        let idle = call.route.policy.stream_idle_timeout;
        let mut passed = false;
        // Until the final head.
        let framing = loop {
            let driven = drive(&mut duplex, response, &self.method, timer, deadline, idle).await;
            let untouched = duplex.sent == 0 && duplex.body_sent == 0;
            let replayable = !passed && (duplex.replay.is_some() || untouched);
            let unreachable = mesh && duplex.server.buf[..] == [kept::UNREACHABLE];
            let heard = duplex.heard || unreachable || duplex.server.buf[..] == [kept::UNANSWERED];
            let failed = match driven {
                Driven::Event(Event::Head) => {
                    match self.on_head(&mut duplex, response, call, picked, replayable, &mut passed)
                    {
                        OnHead::Interim => continue,
                        OnHead::Final => break response.framing,
                        OnHead::Tunnel => {
                            return tunnel(&mut duplex).await;
                        }
                        OnHead::Again(pause) => {
                            let kept = duplex.replay;
                            self.carry(&duplex.ready, body);
                            *replay = kept;
                            return Tried::Again { pause, dead: false };
                        }
                        OnHead::Answer(error) => return self.answer_or_cut(error, passed),
                        OnHead::Bad(error) => {
                            picked.observe(Outcome::ServerError, Instant::now());
                            return self.answer_or_cut(error, passed);
                        }
                    }
                }
                Driven::Event(Event::NotHttp) => {
                    // Neither sense nor end of it can be told, nor what the client will say to it
                    // (ICY and RTSP servers, HTTP/0.9): from here on it is theirs. Only what the
                    // server said has led here, so no client comes around a route by it.
                    picked.observe(Outcome::Success, Instant::now());
                    return tunnel(&mut duplex).await;
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
            let lost = match &duplex.server.io {
                Io::Shared(stream) => stream.is_lost_with_older_connection(),
                _ => false,
            };
            let dead = (reused || lost) && !heard && failed.failure != Failure::Timeout;
            let failure = match failed.failure {
                Failure::Reset if dead && idempotent => Failure::NeverProcessed,
                other => other,
            };
            if !dead {
                picked.observe(
                    match failure {
                        Failure::Timeout => Outcome::Timeout,
                        _ if unreachable => Outcome::ConnectFailure,
                        _ => Outcome::Reset,
                    },
                    Instant::now(),
                );
            }
            let cut = match &duplex.server.buf[..] {
                [] if !failed.gracefully => Cut::Reset,
                [kept::CLOSED..=kept::UNREACHABLE] if mesh && !failed.gracefully => Cut::Reset,
                _ if !failed.gracefully => Cut::ResetWithinHead,
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
                Verdict::Over if unreachable => {
                    let error = connect::unreachable(picked.endpoint.info.address, &call.place());
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
        let loose = duplex.response == Some(BodyReader::DoneLoosely);
        match driven {
            Driven::Event(Event::Done) => {
                let delimited = framing.body != Body::UntilClose;
                let odd = framing.odd || loose;
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
                // That it was closed after the response is the client's to hear.
                let nothing_more = server.buf.is_empty() || kept::said(server).is_some();
                Tried::Done {
                    reuse: delimited && server_open && server_stays && nothing_more,
                    odd,
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
    pub(super) fn carry(&mut self, ready: &usize, body: BodyReader) {
        self.ready = *ready;
        self.body = body;
    }

    /// An answer of our own, if nothing has passed to the client yet.
    pub(super) fn answer_or_cut(&mut self, error: ProxyError, passed: bool) -> Tried {
        if passed {
            self.ending.error = Some(error.code);
            Tried::Cut(Cut::Reset)
        } else {
            Tried::Answer(error)
        }
    }

    /// A response's head is here.
    pub(super) fn on_head(
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
        let after = match status {
            400.. => Again::of_http(response.value(&duplex.server.buf, "retry-after")),
            _ => None,
        };
        match after.and_then(|after| after.spares(status)) {
            Some(pushback) => picked.pushed_back(pushback, now),
            None => picked.observe(call::outcome_of_status(status), now),
        }
        if status >= 400 {
            let failure = Failure::Status(status);
            if let Verdict::Again(pause) = self.verdict(call, picked, failure, replayable, after) {
                return OnHead::Again(pause);
            }
            if let Some(error) = call.spent(status) {
                return OnHead::Answer(error);
            }
        }
        self.ending.status = status;
        *passed = true;
        let mut edits = Vec::new();
        if response.framing.strip {
            framing::hop_by_hop(&duplex.server.buf, response, &mut edits);
        }
        if let Some(plan) = &call.plan {
            fields::of_head(&plan.response, response, &duplex.server.buf, &mut edits);
            fields::sort(&mut edits);
        }
        if !call.cors.is_empty() {
            fields::add_to_head(&call.cors, response, &duplex.server.buf, &mut edits);
            fields::sort(&mut edits);
        }
        if let Some(given) = call.session_field(&picked.endpoint.info) {
            fields::session_to_head(&given, response, &duplex.server.buf, &mut edits);
            fields::sort(&mut edits);
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
        match duplex.respond(response.end, BodyReader::of_response(response.framing.body)) {
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
