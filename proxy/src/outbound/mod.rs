//! Application → mesh: the way of a connection that the application opened.
//!
//! ```text
//! accept ─ original destination ─ look up ┬ not of the mesh (or not known in time) ─ external: one of
//!                                         │   the hosts outside, passed through, or refused
//!                                         └ known ─ what is spoken? ┬ HTTP/1  ─ http1::serve
//!                                                                   ├ HTTP/2  ─ http2::serve
//!                                                                   └ opaque, TLS ─ choose once, copy
//! ```
//!
//! Whoever speaks first decides what is spoken ([`crate::detect`]), unless the port's protocol is
//! declared.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::net::TcpStream;

use crate::balance::Outcome;
use crate::detect::{self, Detected, Timings};
use crate::http::ErrorCode;
use crate::http::flow::{Flow, Target};
use crate::identity::Alpn;
use crate::tables::{Destination, Known, Protocol};
use crate::tcp;
use crate::telemetry::{Counter, Direction, FlowProtocol};
use crate::transport::{ConnectError, Io, Stream};
use crate::worker::Worker;
use crate::{http1, http2};

pub mod connect;
mod external;
mod opaque;
mod sessions;

use opaque::Upstream;
pub use sessions::Sessions;

/// A port that is declared HTTP has no server that speaks first: its clients may take their time.
const DECLARED_HTTP: Duration = Duration::from_secs(3600);

/// Takes a captured connection to its end.
pub async fn handle(worker: Rc<Worker>, client: TcpStream, peer: SocketAddr, to: SocketAddr) {
    let cell = worker.directory.lookup(to);
    let mut known = Known::clone(&cell.current.load());
    if matches!(known, Known::Pending) {
        let wait = Duration::from_millis(worker.config.discovery_wait_ms);
        known = cell.resolved(Instant::now() + wait).await;
    }
    let Known::Present(destination) = known else {
        return Box::pin(external::handle(worker, client, peer, to)).await;
    };
    let target = Target::Cell(cell);
    serve(worker, client, BytesMut::new(), peer, target, destination).await;
}

/// Takes a connection to a destination that is known to its end; `buf` was read from it already.
async fn serve(
    worker: Rc<Worker>,
    mut client: TcpStream,
    buf: BytesMut,
    peer: SocketAddr,
    target: Target,
    destination: Arc<Destination>,
) {
    if destination.fed {
        external::settled(&destination).await;
    }
    let source = worker.workload().source();
    let flow = Flow::new(
        Direction::Outbound,
        target,
        destination.clone(),
        peer,
        source,
        false,
    );

    let timings = match destination.protocol {
        // Where the server's name decides, the ClientHello has to be read first.
        Protocol::Tcp | Protocol::Tls if !destination.needs_server_name() => {
            let protocol = match destination.protocol {
                Protocol::Tls => FlowProtocol::Tls,
                _ => FlowProtocol::Tcp,
            };
            let opened = Upstream::open(&worker, &flow, &destination, None).await;
            let io = Io::Plain(client);
            let prefix = buf.freeze();
            return copy(&worker, &flow, Stream { io, prefix }, opened, protocol).await;
        }
        Protocol::Http | Protocol::Http2 | Protocol::Grpc => Timings {
            silence: DECLARED_HTTP,
            undecided: http1::HEAD_TIMEOUT,
            ..Timings::default()
        },
        Protocol::Auto | Protocol::Tcp | Protocol::Tls => Timings::default(),
    };
    let open = || Upstream::open(&worker, &flow, &destination, None);
    let detected = Box::pin(detect::detect(&mut client, buf, &timings, open)).await;
    let io = Io::Plain(client);
    match detected {
        Ok(Detected::Http1 { buf }) => {
            let prefix = buf.freeze();
            http1::serve(worker.clone(), Stream { io, prefix }, Rc::new(flow)).await;
        }
        Ok(Detected::Http2 { buf }) => {
            let prefix = buf.freeze();
            http2::serve(worker.clone(), Stream { io, prefix }, Rc::new(flow)).await;
        }
        Ok(Detected::Tls {
            buf,
            hello,
            mut upstream,
        }) => {
            tracing::debug!(sni = hello.sni.as_deref(), "application's own TLS");
            let prefix = buf.freeze();
            let name = hello.sni.as_deref();
            // What was opened before the name was known may lead elsewhere.
            if destination.needs_server_name()
                && let Some(other) = upstream.take()
            {
                other.stream.io.leave();
            }
            let open = Upstream::open(&worker, &flow, &destination, name);
            let opened = tcp::opened_or(upstream, open).await;
            copy(
                &worker,
                &flow,
                Stream { io, prefix },
                opened,
                FlowProtocol::Tls,
            )
            .await;
        }
        Ok(Detected::Opaque { buf, upstream }) => {
            let prefix = buf.freeze();
            let opened =
                tcp::opened_or(upstream, Upstream::open(&worker, &flow, &destination, None)).await;
            copy(
                &worker,
                &flow,
                Stream { io, prefix },
                opened,
                FlowProtocol::Tcp,
            )
            .await;
        }
        Ok(Detected::Reset { buf, upstream }) => {
            drop(io);
            let open = Upstream::open(&worker, &flow, &destination, None);
            tcp::pass_early_reset(buf, upstream, open).await;
        }
        Err(error) => refuse(&worker, &flow, io, &error),
    }
}

/// Copies an opaque connection, or passes on that there is none.
async fn copy(
    worker: &Worker,
    flow: &Flow,
    client: Stream,
    opened: Result<Upstream, opaque::Unopened>,
    protocol: FlowProtocol,
) {
    match opened {
        Ok(Upstream {
            stream: server,
            mut picked,
            idle_timeout,
            permit: _permit,
        }) => {
            let labels = flow.labels(Some(&picked.endpoint.info), protocol);
            let options = tcp::Options { idle_timeout };
            let relayed = tcp::relay(worker, &labels, client, server, &options).await;
            if relayed.ended == tcp::Ended::ResetByServer && relayed.to_client == 0 {
                picked.observe(Outcome::Reset, Instant::now());
            }
        }
        Err(error) => refuse(worker, flow, client.io, &error),
    }
}

/// The application sees a reset where, without a proxy, it would have seen a refusal.
fn refuse(worker: &Worker, flow: &Flow, client: Io, error: &opaque::Unopened) {
    let destination: Arc<Destination> = flow.destination();
    tracing::info!(
        destination = %format_args!("{}/{}:{}", destination.namespace, destination.service, destination.port),
        client = %flow.peer,
        "connection refused: {error}",
    );
    worker.metrics.count(
        Counter::Errors,
        &[
            error.code().name(),
            flow.direction.as_str(),
            &destination.service,
            &destination.namespace,
        ],
    );
    client.abort();
}

/// What `Proxy-Status` calls a connection that did not come about.
fn code_of(error: &ConnectError) -> ErrorCode {
    connect::to_proxy_error(error, "").code
}

/// ALPN of opaque bytes between proxies.
const OPAQUE: Alpn = Alpn::Tcp;
