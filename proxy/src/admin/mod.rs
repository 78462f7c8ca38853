//! The admin port: health, readiness, metrics, what the proxy knows, drain, log level.
//!
//! Served on the control thread. The port is open on all addresses for kubelet and Prometheus, so
//! only health, readiness and metrics are for whoever reaches it ([`OPEN`]); everything else is for
//! callers on the loopback address. In a pod that is the pod itself, and `kubectl port-forward`
//! (`weft tap`, `weft routes`), for which the apiserver asks whether the user may. Outside of
//! Kubernetes `--admin-trust` names the addresses of those who look after the proxy.
//!
//! | Path | |
//! |---|---|
//! | `GET /healthz` | 200 while the process runs |
//! | `GET /readyz` | 200 when tables and certificate are in place and it is not draining; else 503 and why |
//! | `GET /metrics` | Prometheus text |
//! | `GET /stats.json` | metrics again: the golden signals by destination ([`crate::telemetry::stats`]) |
//! | `GET /probe/…` | what a probe of the application says ([`probe`]); those of `--probe` |
//! | `GET /config` | what the proxy knows now ([`Introspect`]); loopback only, as is all below |
//! | `GET /tap` | requests as they end, a line of JSON each ([`crate::telemetry::tap`]) |
//! | `POST /drain` | begins draining |
//! | `GET /log`, `PUT /log?level=FILTER` | shows, changes the log filter |

mod probe;

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{Either, Full, StreamBody};
use hyper::body::Frame;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use weft_api::names::PROBE_PATH;

use crate::telemetry::log::LogControl;
use crate::telemetry::metrics::Registry;
use crate::telemetry::stats::EndpointView;
use crate::telemetry::tap::{Filter, Taps};
use crate::telemetry::{exposition, process, stats};

/// What is for whoever reaches the port.
const OPEN: [&str; 4] = ["/healthz", "/readyz", "/metrics", "/stats.json"];
/// Connections served at once; the others wait in the listen queue.
const MAX_CONNECTIONS: usize = 64;
/// For a request's head to arrive, also the first.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection lives no longer, unless it taps: nobody holds a place for ever by asking slowly.
const MAX_LIFETIME: Duration = Duration::from_secs(300);
/// A peer that takes none of the answer for this long is given up (TCP_USER_TIMEOUT).
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// Buffer for the head, in bytes; a longer one is answered 431.
const MAX_HEAD: usize = 16 * 1024;
/// After a failed accept (no descriptors left), before the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the rest of the proxy tells of itself.
pub trait Introspect: Send + Sync {
    /// Whether traffic is welcome: tables and certificate are in place and it is not draining.
    ///
    /// # Errors
    /// A sentence saying what is missing.
    fn ready(&self) -> Result<(), String>;
    /// Everything known now: workload, destinations, routes, versions. Without secrets.
    fn config(&self) -> BoxFuture<'_, serde_json::Value>;
    /// All endpoints of all known backends, with their states.
    fn endpoints(&self) -> Vec<EndpointView>;
    /// Begins draining; nothing happens the second time.
    fn drain(&self);
}

/// The parts the admin port shows and moves.
#[derive(Clone)]
pub struct AdminState {
    pub registry: Arc<Registry>,
    pub introspect: Arc<dyn Introspect>,
    pub taps: Arc<Taps>,
    /// Other addresses that may do what the loopback address may.
    pub trusted: Vec<IpAddr>,
    /// What may be asked of the application, see [`probe`].
    pub probes: Vec<String>,
    /// `None`: the log cannot be changed.
    pub log: Option<LogControl>,
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
    // Where the kubelet would have asked the application.
    let Ok(own) = stream.local_addr() else {
        return;
    };
    let tapping = Arc::new(AtomicBool::new(false));
    let service = service_fn({
        let tapping = tapping.clone();
        move |request| {
            let (state, tapping) = (state.clone(), tapping.clone());
            async move {
                let response = match asked(&state, &request) {
                    Some(asked) => text_of(probe::ask(own.ip(), asked, &request).await),
                    None => respond(&state, peer, &request).await,
                };
                tapping.store(
                    matches!(response.body(), Either::Right(_)),
                    Ordering::Relaxed,
                );
                Ok::<_, Infallible>(response)
            }
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service);
    // How a client's connection ended is the client's concern.
    let mut connection = pin!(connection);
    while tokio::time::timeout(MAX_LIFETIME, connection.as_mut())
        .await
        .is_err()
        && tapping.load(Ordering::Relaxed)
    {}
}

/// A text, or lines for as long as the client listens.
type Body = Either<Full<Bytes>, StreamBody<BoxStream<'static, Result<Frame<Bytes>, Infallible>>>>;

/// The probe that a request asks for, if it is one that may be asked.
fn asked<'a, B>(state: &'a AdminState, request: &Request<B>) -> Option<&'a str> {
    let target = request.uri().path_and_query()?.as_str();
    let asked = target.strip_prefix(PROBE_PATH)?;
    let mut known = state.probes.iter().map(String::as_str);
    known.find(|probe| *probe == asked && request.method() == Method::GET)
}

fn text_of((status, said): (StatusCode, String)) -> Response<Body> {
    text(status, &said)
}

/// Bodies of requests are not read: nothing here takes one.
async fn respond<B>(state: &AdminState, peer: SocketAddr, request: &Request<B>) -> Response<Body> {
    let reading = matches!(*request.method(), Method::GET | Method::HEAD);
    let writing = matches!(*request.method(), Method::POST | Method::PUT);
    let path = request.uri().path();
    if !OPEN.contains(&path) && !is_trusted(state, peer) {
        return text(
            StatusCode::FORBIDDEN,
            "only health, readiness and metrics are for other hosts; the rest is for the proxy's \
             own loopback address, which kubectl port-forward and weft reach",
        );
    }
    match path {
        "/healthz" | "/readyz" | "/metrics" | "/stats.json" | "/config" if !reading => {
            not_allowed("GET, HEAD")
        }
        "/drain" if !writing => not_allowed("POST, PUT"),
        "/log" if !reading && !writing => not_allowed("GET, HEAD, POST, PUT"),
        "/tap" if *request.method() != Method::GET => not_allowed("GET"),
        "/healthz" => text(StatusCode::OK, "ok"),
        "/readyz" => match state.introspect.ready() {
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
        "/config" => json(&state.introspect.config().await),
        "/tap" => tap(state, request.uri().query().unwrap_or_default()),
        "/drain" => {
            state.introspect.drain();
            text(StatusCode::OK, "draining")
        }
        "/log" if reading => show_log(state),
        "/log" => set_log(state, request.uri().query().unwrap_or_default()),
        _ => text(
            StatusCode::NOT_FOUND,
            "there are /healthz, /readyz, /metrics, /stats.json, /config, /tap, /log and POST /drain",
        ),
    }
}

fn is_trusted(state: &AdminState, peer: SocketAddr) -> bool {
    let peer = peer.ip().to_canonical();
    peer.is_loopback() || state.trusted.contains(&peer)
}

/// Streams what the query asks for until the client goes.
fn tap(state: &AdminState, query: &str) -> Response<Body> {
    let parameters = query.split('&').filter(|pair| !pair.is_empty());
    let parameters = parameters.map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (name, decode(value))
    });
    let (filter, per_second) = match Filter::read(parameters) {
        Ok(read) => read,
        Err(error) => return text(StatusCode::BAD_REQUEST, &error.to_string()),
    };
    match state.taps.listen(filter, per_second) {
        Ok(lines) => {
            let body = Either::Right(StreamBody::new(lines.boxed()));
            respond_with(StatusCode::OK, "application/x-ndjson", body)
        }
        Err(error) => text(StatusCode::TOO_MANY_REQUESTS, &error.to_string()),
    }
}

fn show_log(state: &AdminState) -> Response<Body> {
    match state.log.as_ref().map(LogControl::filter) {
        Some(Ok(filter)) => text(StatusCode::OK, &filter),
        Some(Err(error)) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        None => no_log(),
    }
}

fn set_log(state: &AdminState, query: &str) -> Response<Body> {
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

fn no_log() -> Response<Body> {
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

fn not_allowed(allow: &'static str) -> Response<Body> {
    let mut response = text(
        StatusCode::METHOD_NOT_ALLOWED,
        &format!("only {allow} here"),
    );
    let allow = HeaderValue::from_static(allow);
    response.headers_mut().insert(header::ALLOW, allow);
    response
}

fn text(status: StatusCode, body: &str) -> Response<Body> {
    answer(status, "text/plain; charset=utf-8", format!("{body}\n"))
}

fn json(value: &impl serde::Serialize) -> Response<Body> {
    match serde_json::to_string_pretty(value) {
        Ok(body) => answer(StatusCode::OK, "application/json", body + "\n"),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn answer(status: StatusCode, content_type: &'static str, body: String) -> Response<Body> {
    let body = Either::Left(Full::new(Bytes::from(body)));
    respond_with(status, content_type, body)
}

fn respond_with(status: StatusCode, content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let content_type = HeaderValue::from_static(content_type);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, content_type);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests;
