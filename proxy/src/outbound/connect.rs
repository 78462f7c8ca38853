//! A connection to an endpoint: mutual TLS where a proxy stands before it, plaintext elsewhere.

use std::time::Instant;

use crate::http::{ErrorCode, ProxyError};
use crate::identity::{Alpn, Origin};
use crate::tables::{BackendPolicy, EndpointInfo};
use crate::telemetry::{Counter, Direction, Histogram};
use crate::transport::mux::Inside;
use crate::transport::{self, ConnectError, Stream, TlsError};
use crate::worker::Worker;

/// Opens a connection to `endpoint`; `alpn` names what will be inside.
///
/// The workload's own endpoint is reached without TLS: the connection does not leave the host, and
/// the proxy's own connections are not captured.
pub async fn connect(
    worker: &Worker,
    endpoint: &EndpointInfo,
    policy: &BackendPolicy,
    alpn: Alpn,
) -> Result<Stream, ConnectError> {
    let mut options = worker.connect_options.clone();
    options.connect_timeout = policy.connect_timeout;
    options.keepalive = policy.connection.keepalive;
    if policy.origin.is_some() || endpoint.siblings.is_some() {
        return connect_outside(worker, endpoint, &options, policy.origin.as_deref(), alpn).await;
    }
    let Some(identity) = &endpoint.identity else {
        return transport::connect_plain(endpoint.address, &options).await;
    };
    if worker.is_me(&endpoint.workload) {
        return transport::connect_plain(endpoint.address, &options).await;
    }
    let Some(credentials) = worker.identity.get() else {
        return Err(ConnectError::Local {
            addr: endpoint.address,
            source: std::io::Error::other(
                "this proxy has no certificate yet (is the control plane reachable?)",
            ),
        });
    };
    let shared = match alpn {
        Alpn::Http1 => Some(Inside::Http1),
        Alpn::Tcp => Some(Inside::Tcp),
        // HTTP/2 has streams of its own.
        Alpn::H2 | Alpn::Mux => None,
    };
    let shared = shared.filter(|_| !worker.config.own_connections);
    let config = match shared {
        Some(_) => credentials.shared_config(identity, alpn),
        None => credentials.client_config(identity, alpn),
    };
    let connect = async {
        let began = Instant::now();
        let connected = transport::connect_tls(endpoint.address, &options, config).await;
        counted(worker, began, connected)
    };
    match shared {
        Some(inside) => {
            let peer = (endpoint.address, identity.clone());
            let sessions = &worker.sessions;
            let generation = credentials.generation;
            let patience = options.connect_timeout + options.handshake_timeout;
            let shared = sessions.stream(peer, generation, inside, patience, connect);
            shared.await
        }
        None => connect.await,
    }
}

/// A server outside the mesh: TLS when the policy says that the application speaks in the clear.
async fn connect_outside(
    worker: &Worker,
    endpoint: &EndpointInfo,
    options: &transport::Options,
    origin: Option<&Origin>,
    alpn: Alpn,
) -> Result<Stream, ConnectError> {
    let siblings = endpoint.siblings.as_deref();
    let tcp = transport::connect_outside(endpoint.address, siblings, options).await?;
    let Some(origin) = origin else {
        return Ok(Stream::from(tcp));
    };
    let addr = tcp.peer_addr().unwrap_or(endpoint.address);
    let own = worker.identity.get();
    let config = origin
        .config(alpn, own.as_deref())
        .map_err(|error| ConnectError::Local {
            addr,
            source: std::io::Error::other(error),
        })?;
    let name = origin.name().clone();
    let began = Instant::now();
    let connected = transport::connect_origin(tcp, addr, options, name, config).await;
    counted(worker, began, connected)
}

/// Counts a TLS handshake that began at `began`.
fn counted(
    worker: &Worker,
    began: Instant,
    connected: Result<Stream, ConnectError>,
) -> Result<Stream, ConnectError> {
    let result = match &connected {
        Ok(_) => "ok",
        Err(ConnectError::Tls { source, .. }) => match source {
            TlsError::TimedOut(_) => "timeout",
            TlsError::Certificate(_) => "identity",
            _ => "failed",
        },
        // TCP did not come about: that is no handshake.
        Err(_) => return connected,
    };
    let direction = Direction::Outbound.as_str();
    worker
        .metrics
        .count(Counter::TlsHandshakes, &[direction, result]);
    if connected.is_ok() {
        worker
            .metrics
            .histogram(Histogram::TlsHandshake, &[direction])
            .record(began.elapsed());
    }
    connected
}

/// The answer when the proxy at `address` says that its application takes no connection; `place`
/// names route and backend.
pub fn unreachable(address: std::net::SocketAddr, place: &str) -> ProxyError {
    let text = format!("{place}: the application at {address} takes no connection");
    ProxyError::new(ErrorCode::ConnectionRefused, text)
}

/// The answer for a connection that did not come about; `place` names route and backend.
pub fn to_proxy_error(error: &ConnectError, place: &str) -> ProxyError {
    let code = match error {
        ConnectError::Refused { .. } => ErrorCode::ConnectionRefused,
        ConnectError::TimedOut { .. } => ErrorCode::ConnectionTimeout,
        ConnectError::Closed { .. } => ErrorCode::ConnectionTerminated,
        ConnectError::Tls { .. } => ErrorCode::TlsFailed,
        ConnectError::Unreachable { .. } | ConnectError::Local { .. } => {
            ErrorCode::ConnectionFailed
        }
    };
    ProxyError::new(code, format!("{place}: {error}"))
}
