//! Mesh → application: the way of a connection to one of the workload's ports.
//!
//! ```text
//! accept ─ original destination ─ first bytes ┬ ClientHello with a Weft ALPN ─ mutual TLS ┐
//!                                             ├ another ClientHello: the application's own │
//!                                             └ plaintext                                  │
//!           mode (PERMISSIVE, STRICT, DISABLE) decides on the last two; probes pass        │
//!     what is inside: named by ALPN, else found out ─ http1 / http2 / copy ─ application ◀─┘
//! ```
//!
//! A mutual-TLS connection may be shared: then each of its streams says what is inside.

use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::net::TcpStream;
use tokio::task::spawn_local;

use crate::detect::{self, Detected, Timings};
use crate::http::flow::{Flow, Target};
use crate::identity::{Alpn, peer_identity};
use crate::tables::{Destination, MtlsMode, Protocol};
use crate::tcp;
use crate::telemetry::{Counter, Direction, FlowProtocol, Histogram};
use crate::transport::mux::{Driver, Inside};
use crate::transport::{self, ConnectError, HANDSHAKE_TIMEOUT, Io, Stream, TlsError};
use crate::worker::Worker;
use crate::{http1, http2};
use probes::{Decision, Probes};

mod buckets;
pub mod limits;
pub mod local;
pub mod probes;

/// Workload and namespace of the source of a connection.
type Source = (Arc<str>, Arc<str>);

/// Takes a captured connection to its end.
pub async fn handle(worker: Rc<Worker>, mut client: TcpStream, peer: SocketAddr, to: SocketAddr) {
    let workload = worker.workload();
    let (mode, protocol) = workload.port(to.port());
    let destination = worker.local(to);
    let strict = mode == MtlsMode::Strict;
    if mode == MtlsMode::Disable && matches!(protocol, Protocol::Tcp | Protocol::Tls) {
        let opened = open(&worker, to).await;
        let source = unknown_source();
        let client = client.into();
        return copy(
            &worker,
            client,
            opened,
            &destination,
            source,
            peer,
            FlowProtocol::Tcp,
        )
        .await;
    }
    let timings = timings(mode, protocol);
    let open_app = async || {
        if strict {
            return Err(Refused::Plaintext);
        }
        open(&worker, to).await.map_err(Refused::Connect)
    };
    let detected = Box::pin(detect::detect(
        &mut client,
        BytesMut::new(),
        &timings,
        open_app,
    ))
    .await;
    let io = Io::Plain(client);
    let source = unknown_source();
    match detected {
        Ok(Detected::Tls {
            buf,
            hello,
            upstream,
        }) => {
            let prefix = buf.freeze();
            let ours = mode != MtlsMode::Disable
                && hello
                    .alpn
                    .iter()
                    .any(|name| Alpn::from_wire(name).is_some());
            if ours {
                drop(upstream);
                return mesh(&worker, Stream { io, prefix }, peer, destination, to).await;
            }
            if strict {
                return refuse_plaintext(&worker, io, peer, to, "the application's own TLS");
            }
            let opened = tcp::opened_or(upstream, open(&worker, to)).await;
            let stream = Stream { io, prefix };
            copy(
                &worker,
                stream,
                opened,
                &destination,
                source,
                peer,
                FlowProtocol::Tls,
            )
            .await;
        }
        Err(Refused::Plaintext) => refuse_plaintext(&worker, io, peer, to, "silence"),
        Ok(detected) if strict => {
            let probes = Probes::of(&workload, to.port());
            match probes.decide(&detected) {
                Decision::Refuse => refuse_plaintext(&worker, io, peer, to, "plaintext"),
                Decision::Ended => {}
                Decision::Serve => {
                    let flow = flow(destination, peer, source, false);
                    let flow = Rc::new(flow.only(probes));
                    match detected {
                        Detected::Http1 { buf } => {
                            let prefix = buf.freeze();
                            http1::serve(worker, Stream { io, prefix }, flow).await;
                        }
                        Detected::Http2 { buf } => {
                            let prefix = buf.freeze();
                            http2::serve(worker, Stream { io, prefix }, flow).await;
                        }
                        _ => io.abort(),
                    }
                }
            }
        }
        Ok(Detected::Http1 { buf }) => {
            let flow = flow(destination, peer, source, false);
            let prefix = buf.freeze();
            http1::serve(worker, Stream { io, prefix }, Rc::new(flow)).await;
        }
        Ok(Detected::Http2 { buf }) => {
            let flow = flow(destination, peer, source, false);
            let prefix = buf.freeze();
            http2::serve(worker, Stream { io, prefix }, Rc::new(flow)).await;
        }
        Ok(Detected::Opaque { buf, upstream }) => {
            let opened = tcp::opened_or(upstream, open(&worker, to)).await;
            let prefix = buf.freeze();
            let stream = Stream { io, prefix };
            copy(
                &worker,
                stream,
                opened,
                &destination,
                source,
                peer,
                FlowProtocol::Tcp,
            )
            .await;
        }
        Ok(Detected::Reset { buf, upstream }) => {
            drop(io);
            tcp::pass_early_reset(buf, upstream, open(&worker, to)).await;
        }
        Err(Refused::Connect(error)) => {
            tracing::debug!(%peer, "the application at {to}: {error}");
            io.abort();
        }
    }
}

/// How long an incoming connection may stay silent before the application is given the first word.
/// Longer than on the way out: a proxy of the mesh always speaks first, and one that is short of
/// CPU must not be taken for a client that waits for a greeting.
const CLEAR_SILENCE: Duration = Duration::from_millis(200);
/// A port that is declared HTTP has no server that speaks first: its clients may take their time.
const DECLARED_HTTP: Duration = Duration::from_secs(3600);

/// How long a connection to a port of this mode and protocol is looked at, and what for.
fn timings(mode: MtlsMode, protocol: Protocol) -> Timings {
    match (mode, protocol) {
        // Nothing is opened for a client that has not shown who it is.
        (MtlsMode::Strict, _) => Timings {
            silence: HANDSHAKE_TIMEOUT,
            ..Timings::default()
        },
        (_, Protocol::Http | Protocol::Http2 | Protocol::Grpc) => Timings {
            silence: DECLARED_HTTP,
            undecided: http1::HEAD_TIMEOUT,
            ..Timings::default()
        },
        (mode, Protocol::Auto | Protocol::Tcp | Protocol::Tls) => Timings {
            silence: match mode {
                MtlsMode::Disable => detect::SILENCE,
                _ => CLEAR_SILENCE,
            },
            // What is declared opaque is copied from a client without a proxy, as from one with.
            http: protocol == Protocol::Auto,
            ..Timings::default()
        },
    }
}

/// Why a connection got none to the application.
enum Refused {
    /// Mutual TLS is required.
    Plaintext,
    Connect(ConnectError),
}

/// A peer that speaks mutual TLS: who it is is checked, what is inside is named by ALPN.
async fn mesh(
    worker: &Rc<Worker>,
    stream: Stream,
    peer: SocketAddr,
    destination: Arc<Destination>,
    to: SocketAddr,
) {
    let Some(credentials) = worker.identity.get() else {
        tracing::info!(%peer, "connection refused: this proxy has no certificate yet");
        return stream.io.abort();
    };
    let began = Instant::now();
    let direction = Direction::Inbound.as_str();
    let accepted = Box::pin(transport::accept_tls(
        stream,
        credentials.server_config(),
        HANDSHAKE_TIMEOUT,
    ))
    .await;
    let result = match &accepted {
        Ok(_) => "ok",
        Err(TlsError::TimedOut(_)) => "timeout",
        Err(TlsError::Certificate(_)) => "identity",
        Err(_) => "failed",
    };
    worker
        .metrics
        .count(Counter::TlsHandshakes, &[direction, result]);
    let stream = match accepted {
        Ok(stream) => stream,
        Err(error) => {
            tracing::info!(%peer, port = to.port(), "mutual TLS failed: {error}");
            return;
        }
    };
    worker
        .metrics
        .histogram(Histogram::TlsHandshake, &[direction])
        .record(began.elapsed());
    let Io::Server(tls) = &stream.io else { return };
    let session = tls.get_ref().1;
    let alpn = session.alpn_protocol().and_then(Alpn::from_wire);
    let source = match peer_identity(session.peer_certificates().unwrap_or_default()) {
        Ok(id) => worker.source_of(&id),
        Err(error) => {
            tracing::info!(%peer, "mutual TLS failed: {error}");
            return stream.io.abort();
        }
    };
    match alpn {
        Some(Alpn::Http1) => {
            let flow = flow(destination, peer, source, true);
            http1::serve(worker.clone(), stream, Rc::new(flow)).await;
        }
        Some(Alpn::H2) => {
            let flow = flow(destination, peer, source, true);
            http2::serve(worker.clone(), stream, Rc::new(flow)).await;
        }
        Some(Alpn::Tcp) => opaque(worker, stream, destination, source, peer, to).await,
        Some(Alpn::Mux) => shared(worker, stream.io, peer, source, to).await,
        // The server's configuration takes no other name.
        None => stream.io.abort(),
    }
}

/// A connection that streams of the peer share; each is served as a connection of its own.
async fn shared(worker: &Rc<Worker>, io: Io, peer: SocketAddr, source: Source, to: SocketAddr) {
    let (session, driver) = Driver::server(io);
    // Streams of one peer to one port differ in nothing but what they carry.
    let mut http: Option<(Arc<Destination>, Rc<Flow>)> = None;
    let mut running = pin!(driver.run(|inside, stream| {
        let destination = worker.local(to);
        let stream = Stream::from(Io::Shared(stream));
        let (open, worker, source) = (worker.opened(), worker.clone(), source.clone());
        match inside {
            Inside::Http1 => {
                let flow = match &http {
                    Some((of, flow)) if Arc::ptr_eq(of, &destination) => flow.clone(),
                    _ => {
                        let new = Rc::new(flow(destination.clone(), peer, source, true));
                        http = Some((destination, new.clone()));
                        new
                    }
                };
                spawn_local(async move {
                    http1::serve(worker, stream, flow).await;
                    drop(open);
                });
            }
            Inside::Tcp => {
                spawn_local(async move {
                    opaque(&worker, stream, destination, source, peer, to).await;
                    drop(open);
                });
            }
        }
    }));
    let ended = tokio::select! {
        biased;
        ended = &mut running => ended,
        () = worker.drain.begun() => {
            session.leave();
            running.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, port = to.port(), "a shared connection ended: {error}");
    }
}

/// Opaque bytes of a peer, for the application.
async fn opaque(
    worker: &Worker,
    stream: Stream,
    destination: Arc<Destination>,
    source: Source,
    peer: SocketAddr,
    to: SocketAddr,
) {
    let opened = open(worker, to).await;
    let tcp = FlowProtocol::Tcp;
    copy(worker, stream, opened, &destination, source, peer, tcp).await;
}

/// What is served on a connection: its one endpoint is the application.
fn flow(destination: Arc<Destination>, peer: SocketAddr, source: Source, mtls: bool) -> Flow {
    Flow::new(
        Direction::Inbound,
        Target::Fixed,
        destination,
        peer,
        source,
        mtls,
    )
}

/// A connection to the application at the address the peer meant.
async fn open(worker: &Worker, to: SocketAddr) -> Result<Stream, ConnectError> {
    transport::connect_plain(to, &worker.connect_options).await
}

/// Copies an opaque connection, or passes on that the application refused it.
async fn copy(
    worker: &Worker,
    client: Stream,
    opened: Result<Stream, ConnectError>,
    destination: &Arc<Destination>,
    source: Source,
    peer: SocketAddr,
    protocol: FlowProtocol,
) {
    match opened {
        Ok(server) => {
            let mtls = !matches!(client.io, Io::Plain(_));
            let flow = flow(destination.clone(), peer, source, mtls);
            let labels = flow.labels(None, protocol);
            tcp::relay(worker, &labels, client, server, &tcp::Options::default()).await;
        }
        Err(error) => {
            tracing::debug!(%peer, "the application refused: {error}");
            client.io.abort();
        }
    }
}

/// Mutual TLS is required and this is not it.
fn refuse_plaintext(worker: &Worker, client: Io, peer: SocketAddr, to: SocketAddr, what: &str) {
    let port = to.port().to_string();
    worker.metrics.count(Counter::PlaintextRefused, &[&port]);
    tracing::warn!(
        client = %peer,
        port = to.port(),
        "connection refused: {what} from {peer} to port {port}, which takes mutual TLS only \
         (PeerAuthentication mode STRICT)",
    );
    client.abort();
}

/// A client without an identity.
fn unknown_source() -> Source {
    (Arc::default(), Arc::default())
}

#[cfg(test)]
mod tests;
