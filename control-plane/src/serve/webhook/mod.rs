//! The admission webhook that puts sidecars into pods (HTTPS).
//!
//! The apiserver calls it for pods that are created, where the `MutatingWebhookConfiguration`'s
//! selectors say so. Which of its webhooks called is in the path, so that nothing has to be looked
//! up:
//!
//! | path | |
//! |---|---|
//! | `POST /inject/namespace` | the pod's namespace has `weft.dev/inject: enabled` |
//! | `POST /inject/pod` | it has not; the pod itself may ask |
//!
//! - [`certificate`]: its certificate, from the mesh's own authority.
//! - [`ca_bundle`]: tells the apiserver the roots to verify it against.

pub mod ca_bundle;
pub mod certificate;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Body;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info, warn};
use weft_api::names::CONTROL_PLANE_NAMESPACE;

use super::ServeError;
use super::metrics::Metrics;
use super::standing::Standing;
use super::tls::TlsError;
use crate::cluster::{Cluster, version};
use crate::inject::review::{Verdict, review};
use crate::inject::{Settings, Version};

/// A handshake that takes longer is given up.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Connections at once; others wait in the kernel's queue. The apiserver keeps a few open.
const CONNECTIONS: usize = 256;
/// A client that has not sent its request's head by then is given up; also between requests. Longer
/// than the apiserver leaves a connection idle (90 s), so that it closes first: a request on a
/// connection that is being closed here would fail, and with it a pod.
const HEAD: Duration = Duration::from_secs(300);
/// A body that has not come by then is given up: the apiserver waits 10 s at most by our
/// configuration.
const BODY: Duration = Duration::from_secs(10);
/// Longest review, bytes: the apiserver takes objects up to 3 MiB, and a review has one of them.
const MAX_BODY: usize = 8 << 20;
/// Wait after an error of `accept` itself (out of file descriptors).
const ACCEPT_ERROR: Duration = Duration::from_millis(100);

/// How a webhook runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub listen: SocketAddr,
    /// `settings.yaml` of the ConfigMap `weft-injector`, mounted.
    pub settings: PathBuf,
}

/// A webhook with its port open.
pub struct Webhook {
    listener: TcpListener,
    namespace: String,
    settings: PathBuf,
    kubernetes: Version,
}

impl Webhook {
    /// Opens the port, and asks the apiserver which Kubernetes this is.
    ///
    /// # Errors
    /// The port is taken, or the apiserver does not answer.
    pub async fn bind(config: Config, cluster: Option<&Cluster>) -> Result<Self, ServeError> {
        let (namespace, kubernetes) = match cluster {
            Some(cluster) => {
                let version = version::for_sidecars(&cluster.client).await?;
                (cluster.namespace.clone(), version)
            }
            None => (CONTROL_PLANE_NAMESPACE.to_owned(), Version::NATIVE_SIDECARS),
        };
        let listener = TcpListener::bind(config.listen)
            .await
            .map_err(|error| ServeError::Listen(config.listen, error))?;
        Ok(Self {
            listener,
            namespace,
            settings: config.settings,
            kubernetes,
        })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The operating system does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves, and keeps the certificate and what the apiserver knows of it, until the tasks are
    /// aborted. The injector that answers is told of the end by [`Injector::end`].
    ///
    /// # Errors
    /// There is no certificate.
    pub fn start(
        self,
        standing: &Standing,
        metrics: Arc<Metrics>,
    ) -> Result<(Vec<AbortHandle>, Arc<Injector>), TlsError> {
        let authority = &standing.authority;
        let names = certificate::names(&self.namespace);
        let (config, half_life) = certificate::server_config(authority, &names, SystemTime::now())?;
        let tls = Arc::new(ArcSwap::new(config));
        let injector = Arc::new(Injector {
            settings: self.settings,
            kubernetes: self.kubernetes,
            metrics,
            ending: AtomicBool::new(false),
        });
        let mut tasks = vec![
            tokio::spawn(serve(self.listener, tls.clone(), injector.clone())).abort_handle(),
            tokio::spawn(certificate::keep(authority.clone(), names, tls, half_life))
                .abort_handle(),
        ];
        if let Some(cluster) = &standing.cluster {
            let client = cluster.client.clone();
            let keep = ca_bundle::keep(client, authority.clone(), standing.leadership.clone());
            tasks.push(tokio::spawn(keep).abort_handle());
        }
        Ok((tasks, injector))
    }
}

/// What is needed to answer.
#[derive(Debug)]
pub struct Injector {
    /// Read for each pod: the kubelet replaces it.
    pub settings: PathBuf,
    pub kubernetes: Version,
    pub metrics: Arc<Metrics>,
    /// Each connection takes one more request at most.
    pub ending: AtomicBool,
}

/// Serves until it is dropped.
pub async fn serve(
    listener: TcpListener,
    tls: Arc<ArcSwap<ServerConfig>>,
    injector: Arc<Injector>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (tls, injector) = (tls.load_full(), injector.clone());
                tokio::spawn(async move {
                    connection(stream, tls, injector).await;
                    drop(place);
                });
            }
            Err(error) => {
                warn!("webhook port: {error}");
                tokio::time::sleep(ACCEPT_ERROR).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, tls: Arc<ServerConfig>, injector: Arc<Injector>) {
    let stream = match timeout(HANDSHAKE, TlsAcceptor::from(tls).accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            // The apiserver says so to whoever made the pod; here it is told why.
            warn!("webhook: the TLS handshake failed: {error}");
            return;
        }
        Err(_) => {
            debug!("webhook: the TLS handshake was given up");
            return;
        }
    };
    let answer = service_fn(move |request| {
        let injector = injector.clone();
        async move {
            let mut answer = injector.answer(request).await;
            if injector.ending.load(Ordering::Relaxed) {
                let close = header::HeaderValue::from_static("close");
                answer.headers_mut().insert(header::CONNECTION, close);
            }
            Ok::<_, Infallible>(answer)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .serve_connection(TokioIo::new(stream), answer);
    if let Err(error) = connection.await {
        debug!("webhook connection: {error}");
    }
}

type Answer = Response<Full<Bytes>>;

impl Injector {
    /// This replica is ending: the apiserver, which keeps its connections, is sent to another one, which
    /// may have newer settings.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    /// Answers one request; the body is read here.
    pub async fn answer<B>(&self, request: Request<B>) -> Answer
    where
        B: Body,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let namespace_enabled = match (request.method(), request.uri().path()) {
            (&Method::POST, "/inject/namespace") => true,
            (&Method::POST, "/inject/pod") => false,
            (_, "/inject/namespace" | "/inject/pod") => {
                return text(StatusCode::METHOD_NOT_ALLOWED, "POST an AdmissionReview\n");
            }
            _ => {
                return text(
                    StatusCode::NOT_FOUND,
                    "paths: /inject/namespace /inject/pod\n",
                );
            }
        };
        let body = Limited::new(request.into_body(), MAX_BODY).collect();
        let body = match timeout(BODY, body).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) => return text(StatusCode::BAD_REQUEST, &format!("{error}\n")),
            Err(_) => return text(StatusCode::REQUEST_TIMEOUT, "the body did not come\n"),
        };
        self.review(&body, namespace_enabled).await
    }

    async fn review(&self, body: &[u8], namespace_enabled: bool) -> Answer {
        let settings = match self.settings().await {
            Ok(settings) => settings,
            Err(reason) => {
                self.metrics.injections_failed.add(1);
                warn!("no sidecar can be put in: {reason}");
                // The apiserver shows the text to whoever made the pod.
                return text(StatusCode::INTERNAL_SERVER_ERROR, &format!("{reason}\n"));
            }
        };
        match review(body, namespace_enabled, &settings, self.kubernetes) {
            Ok((answer, verdict)) => {
                self.count(&verdict);
                let mut response = text(StatusCode::OK, &answer.to_string());
                let json = header::HeaderValue::from_static("application/json");
                response.headers_mut().insert(header::CONTENT_TYPE, json);
                response
            }
            Err(error) => {
                self.metrics.injections_failed.add(1);
                text(StatusCode::BAD_REQUEST, &format!("{error}\n"))
            }
        }
    }

    async fn settings(&self) -> Result<Settings, String> {
        let path = self.settings.display();
        let text = tokio::fs::read_to_string(&self.settings)
            .await
            .map_err(|error| format!("{path} cannot be read: {error}"))?;
        Settings::parse(&text).map_err(|error| format!("{path}: {error}"))
    }

    fn count(&self, verdict: &Verdict) {
        match verdict {
            Verdict::Injected => self.metrics.injections.add(1),
            Verdict::Skipped(reason) => {
                self.metrics.injections_skipped.add(1);
                debug!("a pod gets no sidecar: {reason}");
            }
            Verdict::Refused(reason) => {
                self.metrics.injections_refused.add(1);
                info!("a pod is refused: {reason}");
            }
        }
    }
}

fn text(status: StatusCode, body: &str) -> Answer {
    let mut response = Response::new(Full::new(Bytes::copy_from_slice(body.as_bytes())));
    *response.status_mut() = status;
    response
}
