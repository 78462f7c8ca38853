//! The admin port: health, metrics, who is connected and what they have, what a destination is.
//! Plain HTTP, on loopback unless told otherwise.
//!
//! | path | |
//! |---|---|
//! | `GET /healthz` | the process runs |
//! | `GET /readyz` | the source has been read and the port is served |
//! | `GET /metrics` | Prometheus text |
//! | `GET /status` | connected proxies and what they acknowledged, certificates, findings; JSON |
//! | `GET /explain?destination=10.96.0.15:80` | that destination's table (`&namespace=` for clients of a namespace); JSON |
//! | `POST /rotate-root` | begins a root rotation; `?finish` ends it now |

mod explain;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::net::TcpListener;
use tracing::{debug, warn};

use super::ca::{self, Authority, CaError, unix};
use super::discovery::{Hub, ProxyStatus};
use super::metrics::{Gauges, Metrics, resident_memory};
use crate::check::located;
use crate::finding::{Finding, Severity};
use crate::sources::Locate;

/// A client that has not sent its request's head by then is given up.
const HEAD: Duration = Duration::from_secs(10);

/// What the admin port shows.
pub struct Admin {
    pub hub: Arc<Hub>,
    pub authority: Arc<Authority>,
    pub metrics: Arc<Metrics>,
    pub locator: Arc<dyn Locate>,
    /// What the source cannot read now.
    pub findings: std::sync::Mutex<Vec<Finding>>,
    pub ready: AtomicBool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    version: &'static str,
    ready: bool,
    proxies: Vec<ProxyStatus>,
    certificate_authority: ca::Status,
    /// Files that are not used, and what in the objects cannot work.
    findings: Vec<Finding>,
}

/// Serves until it is dropped.
pub async fn serve(listener: TcpListener, admin: Arc<Admin>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!("admin port: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let admin = admin.clone();
        tokio::spawn(async move {
            let answer = service_fn(|request| {
                let response = admin.answer(&request);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .serve_connection(TokioIo::new(stream), answer);
            if let Err(error) = connection.await {
                debug!("admin connection: {error}");
            }
        });
    }
}

type Answer = Response<Full<Bytes>>;

impl Admin {
    fn answer(&self, request: &Request<Incoming>) -> Answer {
        let query = request.uri().query().unwrap_or_default();
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/healthz") => text(StatusCode::OK, "ok\n"),
            (&Method::GET, "/readyz") if self.ready.load(Ordering::Relaxed) => {
                text(StatusCode::OK, "ready\n")
            }
            (&Method::GET, "/readyz") => text(
                StatusCode::SERVICE_UNAVAILABLE,
                "the source has not been read yet\n",
            ),
            (&Method::GET, "/metrics") => self.metrics(),
            (&Method::GET, "/status") => json(&self.status()),
            (&Method::GET, "/explain") => self.explain(query),
            (&Method::POST, "/rotate-root") => self.rotate(query),
            (_, "/healthz" | "/readyz" | "/metrics" | "/status" | "/explain" | "/rotate-root") => {
                text(StatusCode::METHOD_NOT_ALLOWED, "wrong method\n")
            }
            _ => text(
                StatusCode::NOT_FOUND,
                "paths: /healthz /readyz /metrics /status /explain?destination=ADDRESS:PORT, POST /rotate-root\n",
            ),
        }
    }

    fn source_findings(&self) -> Vec<Finding> {
        self.findings
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }

    fn metrics(&self) -> Answer {
        let ca = self.authority.status();
        let expires = ca
            .roots
            .iter()
            .find(|root| root.signing)
            .map_or(0, |root| root.not_after);
        let bad: std::collections::BTreeSet<_> = self
            .source_findings()
            .into_iter()
            .filter(|finding| finding.severity == Severity::Error)
            .map(|finding| finding.file)
            .collect();
        let body = self.metrics.render(Gauges {
            connected_proxies: self.hub.connected() as u64,
            subscribed_resources: self.hub.subscribed() as u64,
            bad_files: bad.len() as u64,
            root_expires_in: expires.saturating_sub(unix(SystemTime::now())),
            resident: resident_memory(),
        });
        respond(
            StatusCode::OK,
            "text/plain; version=0.0.4; charset=utf-8",
            body,
        )
    }

    fn status(&self) -> Status {
        let mut findings = self.source_findings();
        findings.extend(
            self.hub
                .problems()
                .into_iter()
                .map(|problem| located(problem, &*self.locator)),
        );
        findings.sort();
        Status {
            version: env!("CARGO_PKG_VERSION"),
            ready: self.ready.load(Ordering::Relaxed),
            proxies: self.hub.status(),
            certificate_authority: self.authority.status(),
            findings,
        }
    }

    fn explain(&self, query: &str) -> Answer {
        let parameter = |name: &str| {
            query
                .split('&')
                .filter_map(|pair| pair.split_once('='))
                .find(|(known, _)| *known == name)
                .map(|(_, value)| percent_decode(value))
                .filter(|value| !value.is_empty())
        };
        let client = parameter("namespace").unwrap_or_default();
        match parameter("destination") {
            Some(destination) => json(&explain::explain(&self.hub, &destination, &client)),
            None => text(
                StatusCode::BAD_REQUEST,
                "write /explain?destination=10.96.0.15:80 or /explain?destination=cart.shop:80\n",
            ),
        }
    }

    fn rotate(&self, query: &str) -> Answer {
        let request = if query == "finish" {
            ca::Request::Finish
        } else {
            ca::Request::Rotate
        };
        match self.authority.step(request, SystemTime::now()) {
            Ok(()) => json(&self.authority.status()),
            Err(error @ CaError::Rotating(_)) => text(StatusCode::CONFLICT, format!("{error}\n")),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }
}

/// Decodes %XX; what is not that stays as it is.
fn percent_decode(given: &str) -> String {
    let bytes = given.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = (bytes[at] == b'%')
            .then(|| given.get(at + 1..at + 3))
            .flatten()
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match hex {
            Some(byte) => {
                decoded.push(byte);
                at += 3;
            }
            None => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    respond(status, "text/plain; charset=utf-8", body)
}

fn json(value: &impl Serialize) -> Answer {
    match serde_json::to_vec_pretty(value) {
        Ok(mut body) => {
            body.push(b'\n');
            respond(StatusCode::OK, "application/json", body)
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn respond(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static(content_type),
    );
    response
}

#[cfg(test)]
mod tests {
    use super::percent_decode;

    #[test]
    fn destinations_are_decoded() {
        assert_eq!(percent_decode("%5Bfd00::1%5D:80"), "[fd00::1]:80");
        assert_eq!(percent_decode("cart.shop%3a80"), "cart.shop:80");
        for odd in ["%", "%4", "%zz", "100%é"] {
            assert_eq!(percent_decode(odd), odd);
        }
    }
}
