//! Connections to addresses that are not of the mesh.
//!
//! The original destination rules. A connection is to a host outside the mesh when the address it
//! was made to is one that the host's name resolves to, as this proxy finds out by itself; what is
//! said on it (SNI, Host) only tells hosts apart that share the address. So no connection and no
//! request is sent where its words alone would lead it: this is no open proxy, and who can make an
//! application send a Host of their choice wins nothing by it.
//!
//! ```text
//! hosts on this port? ─ none ──────────────────────────────┐
//!  │ whose address is it?                                  │
//!  ├ one host's, no TLS ───────────────── that host        │
//!  ├ several hosts', or TLS ─ read on ┬ SNI or Host: that  │
//!  └ nobody's, but wildcards ─ read on┴ SNI resolves here  │
//!                                       └ neither ─────────┴─ pass through, or refuse
//! ```

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::BytesMut;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::serve;
use crate::detect::{self, Detected, Timings};
use crate::discovery::{Host, LinkState, Outside};
use crate::http::ErrorCode;
use crate::http::flow::{Flow, Target};
use crate::tables::{
    Backend, Destination, EndpointInfo, EndpointSet, EndpointsCell, Health, Known, ORIGINAL,
    Protocol, Route, Share, fresh_id,
};
use crate::telemetry::{Counter, Direction};
use crate::transport::{ConnectError, Io, Stream, connect_plain};
use crate::worker::Worker;
use crate::{http1, http2, tcp};

/// How long a connection waits for DNS, the first time that its name is asked for.
const DNS_WAIT: Duration = Duration::from_secs(5);
/// How long it waits to know whether its address is that of one of the hosts.
const MATCH_WAIT: Duration = Duration::from_secs(1);
/// How long a client may be silent before it is refused, where a name that it says could be that of
/// one of the hosts.
const REFUSAL_WAIT: Duration = Duration::from_secs(5);
/// The same where nothing that it says could: only for HTTP to be refused in HTTP. Those who wait for
/// the server to speak first shall not wait long; a busy machine sends a request within this.
const HOPELESS_WAIT: Duration = Duration::from_millis(500);
/// Service label of what is refused.
const REFUSED: &str = "refused";

/// Waits until every name that a destination leads to has been asked for once.
pub(super) async fn settled(destination: &Destination) {
    let deadline = Instant::now() + DNS_WAIT;
    for backend in destination
        .all_routes()
        .flat_map(|route| route.all_backends())
    {
        if let Some(feed) = &backend.endpoints.feed {
            feed.settled(deadline).await;
        }
    }
}

/// What was read of a connection while finding out whose it is.
type Read = Result<Detected<Stream>, Refusal>;

/// Why there is no connection to the original destination.
enum Refusal {
    /// Only what is known may be called.
    NotKnown,
    Connect(ConnectError),
}

/// Takes a connection to an address that is not of the mesh, or not known in time, to its end.
pub(super) async fn handle(
    worker: Rc<Worker>,
    mut client: TcpStream,
    peer: SocketAddr,
    to: SocketAddr,
) {
    let outside = worker.directory.outside();
    let mut hosts = Vec::new();
    let mut wildcards = false;
    if let Some(known) = outside.port(to.port()) {
        hosts = known.at(to.ip(), Instant::now() + MATCH_WAIT).await;
        wildcards = known.has_wildcards();
    }
    let is_tls = |host: &Host| match host.cell.known() {
        Known::Present(destination) => destination.protocol == Protocol::Tls,
        _ => false,
    };
    match &hosts[..] {
        [] if !wildcards => return beyond(&worker, client, peer, to, &outside).await,
        [only] if !is_tls(only) => {
            return to_host(worker, client, BytesMut::new(), peer, to, hosts).await;
        }
        _ => {}
    }
    let open = || open_original(&worker, to, &outside);
    let timings = patience(may_pass(&worker, &outside, to));
    let read = Box::pin(detect::detect(&mut client, BytesMut::new(), &timings, open));
    let read: Read = read.await;
    let name = match &read {
        Ok(Detected::Tls { hello, .. }) => hello.sni.as_deref(),
        // Which of the hosts is told by each request, or cannot be told.
        Ok(Detected::Http1 { .. } | Detected::Http2 { .. }) if !hosts.is_empty() => {
            let (buf, _) = parts(read);
            return to_host(worker, client, buf, peer, to, hosts).await;
        }
        Ok(Detected::Opaque { upstream: None, .. }) | Err(Refusal::NotKnown)
            if !hosts.is_empty() =>
        {
            let (buf, _) = parts(read);
            hosts.truncate(1);
            return to_host(worker, client, buf, peer, to, hosts).await;
        }
        _ => None,
    };
    let name = name.map(str::to_ascii_lowercase);
    let chosen = match &name {
        None => None,
        Some(name) => match hosts.iter().find(|host| *host.name.host == **name) {
            Some(host) => Some(host.cell.clone()),
            None => match (outside.port(to.port()), worker.directory.dns()) {
                (Some(known), Some(dns)) => {
                    let deadline = Instant::now() + MATCH_WAIT;
                    known.below(dns, name, to, deadline).await
                }
                _ => None,
            },
        },
    };
    if let Some(cell) = chosen
        && let Known::Present(destination) = cell.known()
    {
        let (buf, _) = parts(read);
        let (target, destination) = match aimed(&destination, to) {
            Some(aimed) => (Target::Fixed, aimed),
            None => (Target::Cell(cell), destination),
        };
        return serve(worker, client, buf, peer, target, destination).await;
    }
    after(&worker, client, peer, to, &outside, read, name.as_deref()).await;
}

/// A connection whose address is that of these hosts; not none.
async fn to_host(
    worker: Rc<Worker>,
    client: TcpStream,
    buf: BytesMut,
    peer: SocketAddr,
    to: SocketAddr,
    hosts: Vec<Host>,
) {
    let Some((first, Known::Present(destination))) = hosts
        .first()
        .map(|host| (host.cell.clone(), host.cell.known()))
    else {
        return Io::Plain(client).abort();
    };
    let (target, destination) = match aimed(&destination, to) {
        Some(aimed) => (Target::Fixed, aimed),
        None if hosts.len() > 1 => (Target::Hosts(hosts), destination),
        None => (Target::Cell(first), destination),
    };
    serve(worker, client, buf, peer, target, destination).await;
}

/// A destination whose connections go where they were made to, for one of them; `None` when it is
/// another kind of destination.
fn aimed(destination: &Destination, to: SocketAddr) -> Option<Arc<Destination>> {
    let is_original = |share: &Share| match &share.backend {
        Ok(backend) => *backend.endpoints.name == *ORIGINAL,
        Err(_) => false,
    };
    let route = destination.routes.first()?;
    let share = route.backends.iter().find(|share| is_original(share))?;
    let backend = share.backend.as_ref().ok()?;
    let endpoint = EndpointInfo {
        address: to,
        identity: None,
        workload: Arc::default(),
        zone: Arc::default(),
        weight: 1,
        state: Health::Ready,
        health: Arc::default(),
        siblings: None,
    };
    let endpoints = EndpointsCell {
        name: backend.endpoints.name.clone(),
        current: ArcSwap::from_pointee(EndpointSet {
            generation: 1,
            endpoints: vec![Arc::new(endpoint)],
            ..EndpointSet::default()
        }),
        feed: None,
    };
    let backend = Arc::new(Backend {
        id: fresh_id(),
        namespace: backend.namespace.clone(),
        service: backend.service.clone(),
        port: backend.port,
        endpoints: Arc::new(endpoints),
        policy: backend.policy.clone(),
        limits: backend.limits.clone(),
    });
    Some(Arc::new(Destination::simple(
        destination.namespace.clone(),
        destination.service.clone(),
        destination.port,
        destination.protocol,
        Route::simple(&route.name, backend, route.policy.clone()),
    )))
}

/// How long the client may take. Where there is no server to ask, one that is only slow to speak is
/// not to be refused for it.
fn patience(may_pass: bool) -> Timings {
    match may_pass {
        true => Timings::default(),
        false => Timings {
            silence: REFUSAL_WAIT,
            ..Timings::default()
        },
    }
}

/// What was read of the client, and the server's connection if it was opened.
fn parts(read: Read) -> (BytesMut, Option<Stream>) {
    match read {
        Ok(Detected::Http1 { buf } | Detected::Http2 { buf }) => (buf, None),
        Ok(
            Detected::Opaque { buf, upstream }
            | Detected::Reset { buf, upstream }
            | Detected::Tls { buf, upstream, .. },
        ) => (buf, upstream),
        Err(_) => (BytesMut::new(), None),
    }
}

/// Whether a connection may go to its original destination without being known: always, unless
/// only what is known may be called; then the resolvers that this proxy asks itself.
fn may_pass(worker: &Worker, outside: &Outside, to: SocketAddr) -> bool {
    !outside.registry_only || worker.directory.dns().is_some_and(|dns| dns.is_server(to))
}

async fn open_original(
    worker: &Worker,
    to: SocketAddr,
    outside: &Outside,
) -> Result<Stream, Refusal> {
    if !may_pass(worker, outside, to) {
        return Err(Refusal::NotKnown);
    }
    let connected = connect_plain(to, &worker.connect_options).await;
    connected.map_err(Refusal::Connect)
}

/// To an address that is nobody's: untouched, bytes for bytes; or refused.
async fn beyond(
    worker: &Rc<Worker>,
    mut client: TcpStream,
    peer: SocketAddr,
    to: SocketAddr,
    outside: &Outside,
) {
    if may_pass(worker, outside, to) {
        let opened = open_original(worker, to, outside).await;
        return pass(worker, client, BytesMut::new(), peer, to, opened).await;
    }
    // What is spoken decides how it is said.
    let open = || async { Err(Refusal::NotKnown) };
    let timings = Timings {
        silence: HOPELESS_WAIT,
        ..Timings::default()
    };
    let read = Box::pin(detect::detect(&mut client, BytesMut::new(), &timings, open));
    let read: Read = read.await;
    let name = match &read {
        Ok(Detected::Tls { hello, .. }) => hello.sni.clone(),
        _ => None,
    };
    after(worker, client, peer, to, outside, read, name.as_deref()).await;
}

/// The same, once it has been looked at what is said.
async fn after(
    worker: &Rc<Worker>,
    client: TcpStream,
    peer: SocketAddr,
    to: SocketAddr,
    outside: &Outside,
    read: Read,
    name: Option<&str>,
) {
    if may_pass(worker, outside, to) {
        return match read {
            Err(refusal) => pass(worker, client, BytesMut::new(), peer, to, Err(refusal)).await,
            Ok(Detected::Reset { buf, upstream }) => {
                drop(client);
                tcp::pass_early_reset(buf, upstream, open_original(worker, to, outside)).await;
            }
            read => {
                let (buf, upstream) = parts(read);
                let opened = tcp::opened_or(upstream, open_original(worker, to, outside)).await;
                pass(worker, client, buf, peer, to, opened).await;
            }
        };
    }
    let why = prohibited(worker, to, name);
    tracing::info!(client = %peer, %to, sni = name, "connection refused: {why}");
    let http = matches!(read, Ok(Detected::Http1 { .. } | Detected::Http2 { .. }));
    if !http {
        // Each request is counted by itself.
        let labels = [
            ErrorCode::EgressRefused.name(),
            Direction::Outbound.as_str(),
            REFUSED,
            "",
        ];
        worker.metrics.count(Counter::Errors, &labels);
        return Io::Plain(client).abort();
    }
    let h2 = matches!(read, Ok(Detected::Http2 { .. }));
    let (buf, _) = parts(read);
    let stream = Stream {
        io: Io::Plain(client),
        prefix: buf.freeze(),
    };
    let source = worker.workload().source();
    let destination = refusing(to, &why);
    let flow = Flow::new(
        Direction::Outbound,
        Target::Fixed,
        destination,
        peer,
        source,
        false,
    );
    match h2 {
        true => http2::serve(worker.clone(), stream, Rc::new(flow)).await,
        false => http1::serve(worker.clone(), stream, Rc::new(flow)).await,
    }
}

/// Why a connection is refused, and what to do about it.
fn prohibited(worker: &Worker, to: SocketAddr, name: Option<&str>) -> String {
    let name = name.map_or(String::new(), |name| format!(" (SNI {name})"));
    let doubt = match worker.directory.link() {
        LinkState::Connected => "",
        LinkState::Connecting | LinkState::Down => {
            ", as far as this proxy knows without its control plane"
        }
    };
    format!(
        "{to}{name} is no Service, workload or ExternalService{doubt}, and namespace {} may call \
         nothing else (EgressPolicy RegistryOnly); declare it with an ExternalService",
        worker.workload().namespace,
    )
}

/// A destination that answers every request with an error.
fn refusing(to: SocketAddr, why: &str) -> Arc<Destination> {
    let mut destination = Destination::simple(
        Arc::default(),
        REFUSED.into(),
        to.port(),
        Protocol::Auto,
        Route::refusing(REFUSED, why),
    );
    destination.prohibited = true;
    Arc::new(destination)
}

/// Copies a connection to its original destination.
async fn pass(
    worker: &Worker,
    client: TcpStream,
    buf: BytesMut,
    peer: SocketAddr,
    to: SocketAddr,
    opened: Result<Stream, Refusal>,
) {
    let client = Stream {
        io: Io::Plain(client),
        prefix: buf.freeze(),
    };
    match opened {
        Ok(server) => {
            let labels = worker.unknown_destination(to);
            tcp::relay(worker, &labels, client, server, &tcp::Options::default()).await;
        }
        Err(Refusal::Connect(error)) => {
            tracing::debug!(%peer, "passing through to {to}: {error}");
            client.io.abort();
        }
        Err(Refusal::NotKnown) => client.io.abort(),
    }
}
