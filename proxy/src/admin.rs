//! The admin port: health, readiness, metrics, what the proxy knows, drain, log level.
//!
//! Served on the control thread. Reading is open to whoever reaches the port (kubelet, Prometheus);
//! changing anything is for callers on the loopback address only.
//!
//! | Path | |
//! |---|---|
//! | `GET /healthz` | 200 while the process runs |
//! | `GET /readyz` | 200 when tables and certificate are in place and it is not draining; else 503 and why |
//! | `GET /metrics` | Prometheus text |
//! | `GET /stats.json` | the golden signals by destination ([`crate::telemetry::stats`]) |
//! | `GET /config` | what the proxy knows now ([`Introspect`]) |
//! | `POST /drain` | begins draining |
//! | `GET /log`, `PUT /log?level=FILTER` | shows, changes the log filter |

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::telemetry::log::LogControl;
use crate::telemetry::metrics::Registry;
use crate::telemetry::stats::EndpointView;
use crate::telemetry::{exposition, process, stats};

/// Connections served at once; the others wait in the listen queue.
const MAX_CONNECTIONS: usize = 64;
/// For a request's head to arrive, also the first.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection lives no longer: nobody holds a place for ever by asking slowly.
const MAX_LIFETIME: Duration = Duration::from_secs(300);
/// A peer that takes none of the answer for this long is given up (TCP_USER_TIMEOUT).
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// Buffer for the head, in bytes; a longer one is answered 431.
const MAX_HEAD: usize = 16 * 1024;
/// After a failed accept (no descriptors left), before the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the rest of the proxy tells of itself.
pub trait Introspect: Send + Sync {
    /// Everything known now: workload, destinations, routes, versions. Without secrets.
    fn config(&self) -> serde_json::Value;
    /// All endpoints of all known backends, with their states.
    fn endpoints(&self) -> Vec<EndpointView>;
}

/// What has to be in place before traffic is welcome. Set by those who put it in place.
#[derive(Debug, Default)]
pub struct Readiness {
    pub workload: AtomicBool,
    pub trust: AtomicBool,
    pub certificate: AtomicBool,
    pub draining: AtomicBool,
}

impl Readiness {
    /// `Err`: a sentence saying what is missing.
    ///
    /// # Errors
    /// When traffic is not welcome.
    pub fn check(&self) -> Result<(), String> {
        if self.draining.load(Ordering::Relaxed) {
            return Err("draining: no new work is taken".to_owned());
        }
        let missing: Vec<&str> = [
            (&self.workload, "the workload's table"),
            (&self.trust, "the trusted roots"),
            (&self.certificate, "a certificate"),
        ]
        .into_iter()
        .filter(|(there, _)| !there.load(Ordering::Relaxed))
        .map(|(_, what)| what)
        .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let missing = missing.join(", ");
        Err(format!("waiting for the control plane to send {missing}"))
    }
}

/// The parts the admin port shows and moves.
#[derive(Clone)]
pub struct AdminState {
    pub registry: Arc<Registry>,
    pub readiness: Arc<Readiness>,
    pub introspect: Arc<dyn Introspect>,
    /// `None`: the log cannot be changed.
    pub log: Option<LogControl>,
    /// Begins draining; called once, after [`Readiness::draining`] is set.
    pub drain: Arc<dyn Fn() + Send + Sync>,
}

/// Serves until dropped. Runs on a runtime with time and I/O.
pub async fn serve(listener: TcpListener, state: AdminState) {
    let state = Arc::new(state);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, peer)) => {
                let state = state.clone();
                tokio::spawn(async move {
                    connection(stream, peer, state).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the admin port cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, peer: SocketAddr, state: Arc<AdminState>) {
    // Where it is not supported, the lifetime still ends the connection.
    let _ = socket2::SockRef::from(&stream).set_tcp_user_timeout(Some(WRITE_TIMEOUT));
    let service = service_fn(move |request| {
        let response = respond(&state, peer, &request);
        async move { Ok::<_, std::convert::Infallible>(response) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service);
    // How a client's connection ended is the client's concern.
    let _ = tokio::time::timeout(MAX_LIFETIME, connection).await;
}

/// Bodies of requests are not read: nothing here takes one.
fn respond<B>(state: &AdminState, peer: SocketAddr, request: &Request<B>) -> Response<Full<Bytes>> {
    let reading = matches!(*request.method(), Method::GET | Method::HEAD);
    let writing = matches!(*request.method(), Method::POST | Method::PUT);
    match request.uri().path() {
        "/healthz" | "/readyz" | "/metrics" | "/stats.json" | "/config" if !reading => {
            not_allowed("GET, HEAD")
        }
        "/drain" if !writing => not_allowed("POST, PUT"),
        "/log" if !reading && !writing => not_allowed("GET, HEAD, POST, PUT"),
        "/drain" | "/log" if writing && !is_loopback(peer) => text(
            StatusCode::FORBIDDEN,
            "this can only be done from the proxy's own loopback address",
        ),
        "/healthz" => text(StatusCode::OK, "ok"),
        "/readyz" => match state.readiness.check() {
            Ok(()) => text(StatusCode::OK, "ready"),
            Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, &why),
        },
        "/metrics" => {
            let endpoints = state.introspect.endpoints();
            let process = process::read();
            let body = exposition::render(&state.registry.snapshot(), &endpoints, process.as_ref());
            answer(StatusCode::OK, exposition::CONTENT_TYPE, body)
        }
        "/stats.json" => {
            let endpoints = state.introspect.endpoints();
            json(&stats::stats(&state.registry.snapshot(), &endpoints))
        }
        "/config" => json(&state.introspect.config()),
        "/drain" => {
            if !state.readiness.draining.swap(true, Ordering::Relaxed) {
                (state.drain)();
            }
            text(StatusCode::OK, "draining")
        }
        "/log" if reading => show_log(state),
        "/log" => set_log(state, request.uri().query().unwrap_or_default()),
        _ => text(
            StatusCode::NOT_FOUND,
            "there are /healthz, /readyz, /metrics, /stats.json, /config, /log and POST /drain",
        ),
    }
}

fn is_loopback(peer: SocketAddr) -> bool {
    peer.ip().to_canonical().is_loopback()
}

fn show_log(state: &AdminState) -> Response<Full<Bytes>> {
    match state.log.as_ref().map(LogControl::filter) {
        Some(Ok(filter)) => text(StatusCode::OK, &filter),
        Some(Err(error)) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        None => no_log(),
    }
}

fn set_log(state: &AdminState, query: &str) -> Response<Full<Bytes>> {
    let Some(log) = &state.log else {
        return no_log();
    };
    let level = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("level="))
        .map(decode);
    let Some(level) = level.filter(|level| !level.trim().is_empty()) else {
        return text(
            StatusCode::BAD_REQUEST,
            "say which: /log?level=debug, or /log?level=weft_proxy=debug,h2=warn",
        );
    };
    match log.set(&level) {
        Ok(()) => {
            tracing::info!(filter = level, "the log filter was changed");
            show_log(state)
        }
        Err(error) => text(StatusCode::BAD_REQUEST, &error.to_string()),
    }
}

fn no_log() -> Response<Full<Bytes>> {
    text(
        StatusCode::NOT_FOUND,
        "the log of this process cannot be changed",
    )
}

/// Percent-decoding of a query's value (RFC 3986 section 2.1); what is no escape stays.
fn decode(value: &str) -> String {
    let bytes = value.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let digit = |i: usize| char::from(*bytes.get(at + i)?).to_digit(16);
        match (byte, digit(1), digit(2)) {
            (b'%', Some(high), Some(low)) => {
                out.push((high << 4 | low) as u8);
                at += 3;
            }
            _ => {
                out.push(*byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn not_allowed(allow: &'static str) -> Response<Full<Bytes>> {
    let mut response = text(
        StatusCode::METHOD_NOT_ALLOWED,
        &format!("only {allow} here"),
    );
    let allow = HeaderValue::from_static(allow);
    response.headers_mut().insert(header::ALLOW, allow);
    response
}

fn text(status: StatusCode, body: &str) -> Response<Full<Bytes>> {
    answer(status, "text/plain; charset=utf-8", format!("{body}\n"))
}

fn json(value: &impl serde::Serialize) -> Response<Full<Bytes>> {
    match serde_json::to_string_pretty(value) {
        Ok(body) => answer(StatusCode::OK, "application/json", body + "\n"),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn answer(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let content_type = HeaderValue::from_static(content_type);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, content_type);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests;
