//! Finished spans as OTLP, on the control thread.
//!
//! Spans leave in batches. While the collector cannot be reached they wait in their queue, and
//! what does not fit is dropped and counted (`weft_spans_dropped_total`); the log says so once
//! when it begins, at most once a minute while it lasts, and once when it is over. The data
//! workers notice nothing of it.
//!
//! - [`convert`]: our spans as OTLP's
//! - [`connect`]: the way to the collector

mod connect;
mod convert;

use std::sync::atomic::Ordering;
use std::time::Duration;

use http::Uri;
use opentelemetry_otlp::{
    ExporterBuildError, Protocol, RetryPolicy, SpanExporter, WithExportConfig, WithHttpConfig,
    WithTonicConfig,
};
use opentelemetry_sdk::trace::SpanExporter as _;
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::transport::Endpoint;

use super::names::Counter;
use super::trace::{SpanRecord, SpanSource};
pub use connect::{Connect, Connector, marked};

/// Spans sent at once at most; the SDK's own default.
const BATCH: usize = 512;
/// How long a span waits for others.
const LINGER: Duration = Duration::from_secs(1);
/// For one export, with connecting.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after a failed export; doubles up to the maximum.
const BACKOFF: Duration = Duration::from_secs(1);
const MAX_BACKOFF: Duration = Duration::from_secs(30);
/// Between two lines of the log about the same trouble.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Port of OTLP over HTTP, which needs no path then.
const OTLP_HTTP_PORT: u16 = 4318;

/// Where spans go and in whose name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExportConfig {
    /// "http://host:4317" (gRPC), "http://host:4318" or "http://host:port/path" (HTTP). `None`:
    /// tracing is off.
    pub endpoint: Option<String>,
    /// `service.name`: what people call the workload.
    pub service_name: String,
    /// `service.namespace`.
    pub service_namespace: String,
    /// `service.instance.id`: the workload's own name, `namespace/name`.
    pub instance_id: String,
}

/// Why an endpoint cannot be used.
#[derive(Debug, Error)]
pub enum EndpointError {
    #[error("'{0}' is not an OTLP endpoint such as http://host:4317 or http://host:4318/v1/traces")]
    Invalid(String),
    #[error(
        "'{0}': OTLP is sent over plain http:// only; let the mesh or a local collector encrypt"
    )]
    Scheme(String),
    #[error("no exporter for '{endpoint}': {source}")]
    Build {
        endpoint: String,
        source: ExporterBuildError,
    },
}

/// What an endpoint says: its address, and whether HTTP (else gRPC) is spoken there.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    uri: Uri,
    http: bool,
}

fn target(given: &str) -> Result<Target, EndpointError> {
    let invalid = || EndpointError::Invalid(given.to_owned());
    let uri: Uri = given.parse().map_err(|_| invalid())?;
    match uri.scheme_str() {
        Some("http") => {}
        Some("https") => return Err(EndpointError::Scheme(given.to_owned())),
        _ => return Err(invalid()),
    }
    let authority = uri.authority().ok_or_else(invalid)?.clone();
    let bare = matches!(uri.path(), "" | "/");
    let http = !bare || authority.port_u16() == Some(OTLP_HTTP_PORT);
    let path = match (http, bare) {
        (true, true) => "/v1/traces",
        (true, false) => uri.path(),
        (false, _) => "/",
    };
    let uri = Uri::builder()
        .scheme("http")
        .authority(authority)
        .path_and_query(path)
        .build()
        .map_err(|_| invalid())?;
    Ok(Target { uri, http })
}

/// Builds the exporter; nothing is connected yet. Needs a runtime to be in.
fn exporter(
    config: &ExportConfig,
    connect: &Connect,
) -> Result<Option<SpanExporter>, EndpointError> {
    let Some(endpoint) = config.endpoint.as_deref().filter(|e| !e.is_empty()) else {
        return Ok(None);
    };
    let target = target(endpoint)?;
    let connector = Connector::new(connect.clone());
    let built = if target.http {
        let client = opentelemetry_http::hyper::HyperClient::new(connector, EXPORT_TIMEOUT, None);
        SpanExporter::builder()
            .with_http()
            .with_http_client(client)
            .with_endpoint(target.uri.to_string())
            .with_protocol(Protocol::HttpBinary)
            .with_timeout(EXPORT_TIMEOUT)
            .with_retry_policy(RetryPolicy::disabled())
            .build()
    } else {
        let channel = Endpoint::from(target.uri)
            .connect_timeout(EXPORT_TIMEOUT)
            .timeout(EXPORT_TIMEOUT)
            .connect_with_connector_lazy(connector);
        SpanExporter::builder()
            .with_tonic()
            .with_channel(channel)
            .with_protocol(Protocol::Grpc)
            .with_timeout(EXPORT_TIMEOUT)
            .with_retry_policy(RetryPolicy::disabled())
            .build()
    };
    let mut exporter = built.map_err(|source| EndpointError::Build {
        endpoint: endpoint.to_owned(),
        source,
    })?;
    exporter.set_resource(&convert::resource(config));
    Ok(Some(exporter))
}

/// Exports until all sinks are gone (what is queued then is still sent, one try). `config` may
/// change at any time. `connect` makes the connections: with [`marked`], they carry the proxy's
/// mark; the proxy's user is exempt from capture anyhow.
pub async fn run(source: SpanSource, mut config: watch::Receiver<ExportConfig>, connect: Connect) {
    let mut run = Run {
        source,
        trouble: Trouble::default(),
        batch: Vec::with_capacity(BATCH),
        sending: 0,
    };
    let mut changes = true;
    loop {
        let current = config.borrow_and_update().clone();
        let exporter = exporter(&current, &connect).unwrap_or_else(|error| {
            tracing::warn!(%error, "no spans are exported");
            None
        });
        run.source.on.store(exporter.is_some(), Ordering::Relaxed);
        let exporting = run.export(exporter.as_ref());
        tokio::select! {
            () = exporting => return,
            changed = config.changed(), if changes => changes = changed.is_ok(),
        }
        // Whether a batch on its way has arrived is not known any more.
        let lost = std::mem::take(&mut run.sending);
        run.count_dropped("export_failed", lost);
        run.trouble = Trouble::default();
    }
}

struct Run {
    source: SpanSource,
    trouble: Trouble,
    /// Taken from the queue and not sent yet; outlives a change of the endpoint.
    batch: Vec<SpanRecord>,
    /// Spans of the batch on its way.
    sending: usize,
}

impl Run {
    /// Returns when the sinks are gone. Cancelled, it loses the batch on its way, `sending` spans.
    async fn export(&mut self, exporter: Option<&SpanExporter>) {
        loop {
            if self.batch.is_empty()
                && self.source.queue.recv_many(&mut self.batch, BATCH).await == 0
            {
                return;
            }
            let Some(exporter) = exporter else {
                // Left from before tracing was turned off.
                self.count_dropped("no_endpoint", self.batch.len());
                self.batch.clear();
                continue;
            };
            let open = self.linger().await;
            let spans: Vec<_> = self.batch.drain(..).map(convert::span).collect();
            let sent = spans.len();
            self.sending = sent;
            let result = match tokio::time::timeout(EXPORT_TIMEOUT, exporter.export(spans)).await {
                Ok(result) => result.map_err(|error| error.to_string()),
                Err(_) => Err(format!("no answer within {EXPORT_TIMEOUT:?}")),
            };
            self.sending = 0;
            match result {
                Ok(()) => {
                    let registry = &self.source.registry;
                    registry.count(Counter::SpansExported, &[], sent as u64);
                    self.trouble.over();
                }
                Err(error) => {
                    self.count_dropped("export_failed", sent);
                    let pause = self.trouble.seen(&error);
                    if open {
                        tokio::time::sleep(pause).await;
                    }
                }
            }
        }
    }

    /// Fills the batch for [`LINGER`]; false when no more will come.
    async fn linger(&mut self) -> bool {
        let until = Instant::now() + LINGER;
        while self.batch.len() < BATCH {
            let room = BATCH - self.batch.len();
            let more = self.source.queue.recv_many(&mut self.batch, room);
            match tokio::time::timeout_at(until, more).await {
                Ok(0) => return false,
                Ok(_) => {}
                Err(_) => break,
            }
        }
        true
    }

    fn count_dropped(&self, reason: &str, n: usize) {
        if n > 0 {
            let registry = &self.source.registry;
            registry.count(Counter::SpansDropped, &[reason], n as u64);
        }
    }
}

/// A collector that does not take spans: how long to pause, and when to speak of it.
#[derive(Debug, Default)]
struct Trouble {
    pause: Duration,
    /// When the log last spoke of trouble.
    said: Option<Instant>,
    /// The log has spoken of the trouble there is now.
    announced: bool,
}

impl Trouble {
    fn seen(&mut self, error: &str) -> Duration {
        let now = Instant::now();
        if self.said.is_none_or(|said| now - said >= LOG_INTERVAL) {
            tracing::warn!(
                error,
                "spans cannot be exported and are dropped; traffic is not affected"
            );
            self.said = Some(now);
            self.announced = true;
        }
        self.pause = (self.pause * 2).clamp(BACKOFF, MAX_BACKOFF);
        self.pause
    }

    fn over(&mut self) {
        if std::mem::take(&mut self.announced) {
            tracing::info!("spans are exported again");
        }
        self.pause = Duration::ZERO;
    }
}

#[cfg(test)]
mod tests;
