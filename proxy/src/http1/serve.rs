//! A client's connection, request after request: waiting for the next head, and what becomes of the
//! connection after each answer. One request's way is in [`super::request`].

use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Buf;

use super::answer::{LINGER, answer, finish, linger, write_all};
use super::conn::{Conn, LazyTimer};
use super::head::{self, Edit, Head, HeadError, MAX_HEAD, Parsed};
use super::kept::{self, Happened, Kept};
use super::request::request;
use crate::balance::{ConnectionPermit, Picked};
use crate::http::flow::Flow;
use crate::http::observe::{Ending, Observation};
use crate::http::{ErrorCode, HeadSize, ProxyError};
use crate::tcp;
use crate::telemetry::FlowProtocol;
use crate::telemetry::trace::context::ContextHeaders;
use crate::transport::Stream;
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
/// What a connection keeps from request to request.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) head: Head,
    pub(super) response: Head,
    pub(super) out: Vec<u8>,
    pub(super) to_client: Vec<u8>,
    pub(super) edits: Vec<Edit>,
    pub(super) timer: LazyTimer,
    /// The server's connection, where it is the client's alone.
    pub(super) kept: Option<Kept>,
}

/// What becomes of the client's connection after a request.
#[derive(Debug)]
pub(super) enum After {
    KeepAlive,
    /// In order: what was written arrives.
    Close,
    /// As a reset.
    Abort,
    /// The two connections belong to each other from now on, until nothing is said on them for so
    /// long.
    Tunnel(Box<(Conn, Picked<Pools>, ConnectionPermit, Option<Duration>)>),
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
                    status: error.status(),
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
                let (server, picked, permit, idle_timeout) = *server;
                let held = (picked, permit);
                let (client, server) = (client.into_stream(), server.into_stream());
                let (options, counters) = (tcp::Options { idle_timeout }, tcp::Counters::default());
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
    fn size(&self) -> HeadSize {
        HeadSize::default()
    }
}

/// Waits for the next request's head.
async fn next_head(worker: &Worker, flow: &Flow, client: &mut Conn, scratch: &mut Scratch) -> Next {
    let since = Instant::now();
    let mut begun = None;
    let mut settled = false;
    // Bytes of an incomplete head that have been looked at.
    let mut seen = 0;
    loop {
        if flow.from_mesh && client.buf.first() == Some(&kept::LEFT) {
            client.buf.advance(1);
            scratch.kept = None;
        }
        if !client.buf.is_empty() {
            let mut parsed = Ok(Parsed::Partial);
            if head::may_be_complete(&client.buf, seen) {
                parsed = head::parse_request(&client.buf, &mut scratch.head);
                if matches!(parsed, Err(HeadError::Syntax(_))) && head::unfold(&mut client.buf) {
                    parsed = head::parse_request(&client.buf, &mut scratch.head);
                }
            }
            seen = client.buf.len();
            match parsed {
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
        if scratch.kept.as_ref().is_some_and(Kept::is_over) {
            scratch.kept = None;
        }
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
        let kept_until = scratch.kept.as_ref().and_then(|kept| kept.until);
        let wake = kept_until.map_or(deadline, |until| until.min(deadline));
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
            scratch.timer.poll(cx, Some(wake)).map(|()| Woke::Late)
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
            // The server's connection has been idle for long enough; the client's may stay.
            Woke::Late if Instant::now() < deadline => {}
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
                scratch.head.release();
                scratch.response.release();
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
