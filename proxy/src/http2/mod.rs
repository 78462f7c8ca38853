//! HTTP/2 and gRPC, on `h2`: streams are passed on frame by frame, not re-made.
//!
//! The way of a client's connection, [`serve`]: handshake, then a task for each stream. The way of
//! a stream is in `stream`: route, backend and permit, then tries, each on a connection of the
//! endpoint's [`Pool`], until a response has passed.
//!
//! - [`crew`]: the tasks in which streams are served
//! - [`pool`]: connections to one endpoint, each shared by many streams
//! - `stream`: one request from its HEADERS to the end of its response
//! - `drive`: moving its bytes until something has to be decided
//! - `head`: its head, as routing sees it and as it is sent
//! - `body`: DATA and trailers of one direction, and the replay buffer
//! - `deadline`: until when a gRPC call is to be answered
//! - `failure`: what an error of a stream says
//! - `answer`: responses of the proxy's own, as HTTP or as gRPC
//!
//! Flow control is the senders': a byte's window is given back when the other side's window has
//! taken the byte, so that what is held here for a stream is bounded by `STREAM_WINDOW` and
//! `SEND_BUFFER` each way, and by `WITH_HEAD` for the beginning of a body, which does not wait. Resets, GOAWAY and informational responses pass on; a GOAWAY or
//! REFUSED_STREAM that says "never processed" leads to another try.
//!
//! Between two proxies two codes have meanings of their own. A stream reset with CONNECT_ERROR says
//! that the application behind the other proxy lost its connection before it answered. The proxy
//! at the client's side may try again by policy, or answers 503 (UNAVAILABLE). One reset with
//! `failure::UNREACHABLE` says that the application takes no connection: nothing was processed, and
//! another endpoint is tried.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::Reason;
use tokio::time::timeout;

use crew::Job;

use crate::http::flow::Flow;
use crate::http1::conn::LazyTimer;
use crate::transport::{HANDSHAKE_TIMEOUT, Stream};
use crate::worker::Worker;

mod answer;
mod body;
pub mod crew;
mod deadline;
mod drive;
mod failure;
mod head;
mod hedge;
mod mirror;
pub mod pool;
mod stream;
#[cfg(test)]
mod tests;

pub use crew::Crew;
pub use pool::Pool;

/// Bytes a peer may send on one stream before we have passed them on: 256 KiB in a millisecond of
/// round trip are 2 Gbit/s a stream.
pub const STREAM_WINDOW: u32 = 256 * 1024;
/// The same for all streams of a connection. Not less than some dozens of [`STREAM_WINDOW`]:
/// streams whose readers have stalled must not keep the others from being read. Memory is taken
/// only by what such readers leave standing.
pub const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;
/// Bytes of one stream that the peer's window has taken and its socket has not: four frames, so
/// that a writer need not wait for each.
const SEND_BUFFER: usize = 64 * 1024;
/// Size of a request's or response's fields, as RFC 9113 section 6.5.2 counts it; the same limit
/// as an HTTP/1.1 head has.
const MAX_HEADER_LIST: u32 = 64 * 1024;
/// Streams a client may have open at once: more than applications use, and a bound to what one
/// connection can cost.
const MAX_CLIENT_STREAMS: u32 = 1024;
/// Streams we have reset and still know, so that frames on their way are ignored in silence. `h2`
/// counts the others as the peer's errors, and ends a connection that has many.
const REMEMBERED_RESETS: usize = 1024;
/// Streams that a client may have reset before we have looked at them; with more, it is taken for
/// an attacker (CVE-2023-44487) and its connection ended. A proxy carries the cancellations of many
/// clients, and a machine short of CPU hands them over in bursts: `h2`'s 20 would end the
/// connection under everybody's calls.
const PENDING_RESETS: usize = 256;
const PENDING_RESETS_MESH: usize = MAX_CLIENT_STREAMS as usize;
/// How long a client's connection may stay without a stream.
const CLIENT_IDLE: Duration = Duration::from_secs(3600);

/// Serves one client's connection to its end.
pub async fn serve(worker: Rc<Worker>, stream: Stream, flow: Rc<Flow>) {
    let handshake = h2::server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(MAX_CLIENT_STREAMS)
        .max_header_list_size(MAX_HEADER_LIST)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_reset_streams(REMEMBERED_RESETS)
        .max_pending_accept_reset_streams(match flow.from_mesh {
            true => PENDING_RESETS_MESH,
            false => PENDING_RESETS,
        })
        .enable_connect_protocol()
        .handshake::<_, Bytes>(stream);
    let mut connection = match timeout(HANDSHAKE_TIMEOUT, handshake).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            tracing::debug!(client = %flow.peer, "HTTP/2 handshake: {error}");
            return;
        }
        Err(_) => return,
    };
    let mut idle = LazyTimer::default();
    let mut quiet_since = Instant::now();
    let (mut draining, mut cut) = (false, false);
    let mut drain_begun = pin!(worker.drain.begun());
    let mut drain_over = pin!(worker.drain.over());
    loop {
        let accepted = poll_fn(|cx| {
            if !draining && drain_begun.as_mut().poll(cx).is_ready() {
                draining = true;
                connection.graceful_shutdown();
            }
            // Before the connection is polled: it sends what this says.
            if draining && !cut && drain_over.as_mut().poll(cx).is_ready() {
                cut = true;
                connection.abrupt_shutdown(Reason::NO_ERROR);
            }
            if let Poll::Ready(accepted) = connection.poll_accept(cx) {
                return Poll::Ready(accepted);
            }
            if connection.has_streams() {
                quiet_since = Instant::now();
            }
            if idle.poll(cx, Some(quiet_since + CLIENT_IDLE)).is_ready() {
                quiet_since = Instant::now();
                connection.graceful_shutdown();
            }
            Poll::Pending
        })
        .await;
        match accepted {
            Some(Ok((request, respond))) => {
                worker.crew.serve(Job {
                    worker: worker.clone(),
                    flow: flow.clone(),
                    request,
                    respond,
                });
            }
            Some(Err(error)) => {
                tracing::debug!(client = %flow.peer, "HTTP/2 connection: {error}");
                return;
            }
            None => return,
        }
    }
}
