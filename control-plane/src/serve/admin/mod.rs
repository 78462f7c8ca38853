//! The admin port: health, metrics, who is connected and what they have, what a destination is.
//! Plain HTTP, on loopback unless told otherwise. Where it is open to the network (for kubelet and
//! Prometheus), health, readiness and metrics are for everybody; the rest is for callers of the same
//! host, which is how `kubectl port-forward` (`weft status`) arrives.
//!
//! | path | |
//! |---|---|
//! | `GET /healthz` | the process runs |
//! | `GET /readyz` | the source has been read, the port is served, certificates can be signed |
//! | `GET /metrics` | Prometheus text |
//! | `GET /status` | connected proxies and what they acknowledged, certificates, findings; JSON |
//! | `GET /arrival?object=trafficpolicy/cart&namespace=shop` | which tables come from that object, and which proxies have them; JSON |
//! | `GET /explain?destination=10.96.0.15:80` | that destination's table (`&namespace=` for clients of a namespace; `&proxy=none`: what those without a proxy come to), and what the proxies behind it do with what comes to them; JSON |
//! | `POST /rotate-root` | begins a root rotation; `?finish` ends it now |

mod explain;
mod inbound;

use std::convert::Infallible;
use std::net::SocketAddr;
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
use super::certificates::OwnLife;
use super::discovery::{Hub, ProxyStatus};
use super::metrics::{Gauges, Metrics, resident_memory};
use crate::check::located;
use crate::cluster::Leadership;
use crate::finding::{Finding, Severity};
use crate::model::ObjectRef;
use crate::sources::Locate;

/// A client that has not sent its request's head by then is given up.
const HEAD: Duration = Duration::from_secs(10);

/// What the admin port shows.
pub struct Admin {
    pub hub: Arc<Hub>,
    pub authority: Arc<Authority>,
    pub metrics: Arc<Metrics>,
    pub locator: Arc<dyn Locate>,
    /// Of the control plane's own certificate.
    pub life: Arc<OwnLife>,
    pub leadership: Leadership,
    /// What the source cannot read now.
    pub findings: std::sync::Mutex<Vec<Finding>>,
    pub ready: AtomicBool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    version: &'static str,
    ready: bool,
    /// Whether this replica writes in the cluster.
    leader: bool,
    /// End of the control plane's own certificate, seconds since the Unix epoch.
    certificate_expires: u64,
    /// What will expire soon.
    warnings: Vec<String>,
    proxies: Vec<ProxyStatus>,
    /// Objects known, by kind.
    objects: std::collections::BTreeMap<&'static str, usize>,
    certificate_authority: ca::Status,
    /// Files that are not used, and what in the objects cannot work.
    findings: Vec<Finding>,
}

/// Serves until it is dropped.
pub async fn serve(listener: TcpListener, admin: Arc<Admin>) {
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!("admin port: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let admin = admin.clone();
        let near = is_near(peer, stream.local_addr().ok());
        tokio::spawn(async move {
            let answer = service_fn(|request| {
                let admin = admin.clone();
                async move { Ok::<_, Infallible>(admin.answer(&request, near).await) }
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
    /// `near`: the caller is on this host.
    async fn answer(&self, request: &Request<Incoming>, near: bool) -> Answer {
        let query = request.uri().query().unwrap_or_default();
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/healthz") => text(StatusCode::OK, "ok\n"),
            (&Method::GET, "/readyz") => match self.unready() {
                None => text(StatusCode::OK, "ready\n"),
                Some(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
            },
            (&Method::GET, "/metrics") => self.metrics(),
            (_, "/healthz" | "/readyz" | "/metrics") => {
                text(StatusCode::METHOD_NOT_ALLOWED, "wrong method\n")
            }
            _ if !near => text(
                StatusCode::FORBIDDEN,
                "only health, readiness and metrics are for other hosts; the rest is for callers on this one, which kubectl port-forward and weft reach\n",
            ),
            (&Method::GET, "/status") => json(&self.status()),
            (&Method::GET, "/arrival") => self.arrival(query),
            (&Method::GET, "/explain") => self.explain(query),
            (&Method::POST, "/rotate-root") => self.rotate(query).await,
            (_, "/status" | "/arrival" | "/explain" | "/rotate-root") => {
                text(StatusCode::METHOD_NOT_ALLOWED, "wrong method\n")
            }
            _ => text(
                StatusCode::NOT_FOUND,
                "paths: /healthz /readyz /metrics /status /arrival?object=KIND/NAME&namespace=NAMESPACE /explain?destination=ADDRESS:PORT, POST /rotate-root\n",
            ),
        }
    }

    /// Why proxies should not come here; none when they may.
    fn unready(&self) -> Option<&'static str> {
        let now = unix(SystemTime::now());
        if !self.ready.load(Ordering::Relaxed) {
            return Some("the source has not been read yet, or the control plane is ending");
        }
        let signs = self.authority.status();
        if !signs
            .roots
            .iter()
            .any(|root| root.signing && root.not_after > now)
        {
            return Some("the root certificate has expired: nothing can be signed");
        }
        (self.life.not_after() <= now).then_some("the control plane's own certificate has expired")
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
        let now = unix(SystemTime::now());
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
            root_expires_in: expires.saturating_sub(now),
            certificate_expires_in: self.life.not_after().saturating_sub(now),
            trusted_roots: ca.roots.len() as u64,
            leader: u64::from(self.leadership.is_leader()),
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
        let certificate_authority = self.authority.status();
        let mut proxies = self.hub.status();
        for proxy in &mut proxies {
            proxy.certificate_root = self.authority.root_of(&proxy.signer);
        }
        Status {
            version: env!("CARGO_PKG_VERSION"),
            ready: self.ready.load(Ordering::Relaxed),
            leader: self.leadership.is_leader(),
            certificate_expires: self.life.not_after(),
            warnings: self
                .life
                .warnings(&certificate_authority, SystemTime::now()),
            proxies,
            objects: self.hub.counts(),
            certificate_authority,
            findings,
        }
    }

    fn arrival(&self, query: &str) -> Answer {
        let namespace = parameter(query, "namespace").unwrap_or_else(|| "default".to_owned());
        let object = parameter(query, "object");
        match object.and_then(|object| ObjectRef::parse(&object, &namespace)) {
            Some(object) => json(&self.hub.arrival(&object)),
            None => text(
                StatusCode::BAD_REQUEST,
                "write /arrival?object=trafficpolicy/cart&namespace=shop; kinds are those of routes and policies, service, endpointslice, pod\n",
            ),
        }
    }

    fn explain(&self, query: &str) -> Answer {
        let client = parameter(query, "namespace").unwrap_or_default();
        let bare = parameter(query, "proxy").is_some_and(|proxy| proxy == "none");
        match parameter(query, "destination") {
            Some(destination) if bare => json(&explain::without_routes(&self.hub, &destination)),
            Some(destination) => json(&explain::explain(&self.hub, &destination, &client)),
            None => text(
                StatusCode::BAD_REQUEST,
                "write /explain?destination=10.96.0.15:80 or /explain?destination=cart.shop:80\n",
            ),
        }
    }

    async fn rotate(&self, query: &str) -> Answer {
        let request = if query == "finish" {
            ca::Request::Finish
        } else {
            ca::Request::Rotate
        };
        match self.authority.step(request, SystemTime::now()).await {
            Ok(()) => json(&self.authority.status()),
            Err(error @ (CaError::Rotating(_) | CaError::NotOurs(_) | CaError::NotLeader)) => {
                text(StatusCode::CONFLICT, format!("{error}\n"))
            }
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }
}

/// A parameter of a query, decoded; none when it is empty.
fn parameter(query: &str, name: &str) -> Option<String> {
    query
        .split('&')
        .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
        .map(percent_decode)
        .filter(|value| !value.is_empty())
}

/// Whether a caller is on this host: it has a loopback address, or the very address it called.
fn is_near(peer: SocketAddr, local: Option<SocketAddr>) -> bool {
    let peer = peer.ip().to_canonical();
    peer.is_loopback() || local.is_some_and(|local| local.ip().to_canonical() == peer)
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
    use super::{is_near, parameter, percent_decode};

    #[test]
    fn only_callers_of_this_host_are_near() {
        let near =
            |peer: &str, local: &str| is_near(peer.parse().unwrap(), Some(local.parse().unwrap()));
        assert!(near("127.0.0.1:9", "127.0.0.1:15014"));
        assert!(near("[::ffff:127.0.0.1]:9", "[::]:15014"));
        assert!(near("10.77.0.1:9", "10.77.0.1:15014"));
        assert!(!near("10.77.0.2:9", "10.77.0.1:15014"));
        assert!(!near("[fd00::2]:9", "[fd00::1]:15014"));
        assert!(!is_near("10.77.0.2:9".parse().unwrap(), None));
    }

    #[test]
    fn parameters_are_found_by_their_whole_name() {
        let query = "objects=x&object=svc%2Fa&namespace=";
        assert_eq!(parameter(query, "object").as_deref(), Some("svc/a"));
        assert_eq!(parameter(query, "namespace"), None);
    }

    #[test]
    fn destinations_are_decoded() {
        assert_eq!(percent_decode("%5Bfd00::1%5D:80"), "[fd00::1]:80");
        assert_eq!(percent_decode("cart.shop%3a80"), "cart.shop:80");
        for odd in ["%", "%4", "%zz", "100%é"] {
            assert_eq!(percent_decode(odd), odd);
        }
    }
}
