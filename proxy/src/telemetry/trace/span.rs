//! The record of a span, and its way to the control thread.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::mpsc;

use super::context::Ids;
use crate::telemetry::labels::FlowProtocol;
use crate::telemetry::metrics::Registry;
use crate::telemetry::names::Counter;

/// Finished spans that may wait for the exporter: a second of 2,000 sampled requests, about 1 MiB.
pub const SPAN_QUEUE: usize = 2_048;

/// Which side of a call this proxy stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpanKind {
    /// Outbound: the proxy calls for its application.
    Client,
    /// Inbound: the proxy is called for its application.
    Server,
}

/// One request's way through one proxy. What is not known stays empty and is not exported.
#[derive(Debug, Clone, PartialEq)]
pub struct SpanRecord {
    pub ids: Ids,
    pub parent: Option<u64>,
    pub kind: SpanKind,
    pub start: SystemTime,
    pub duration: Duration,
    pub protocol: FlowProtocol,
    /// HTTP method.
    pub method: Box<str>,
    /// Path without the query, which may hold secrets.
    pub path: Box<str>,
    /// `Host` or `:authority`.
    pub authority: Box<str>,
    /// 0: no response.
    pub status: u16,
    pub grpc_status: Option<u32>,
    /// Code of an error the proxy made itself (the one in `Proxy-Status`), or "cancelled".
    pub error: Option<Arc<str>>,
    pub destination_service: Arc<str>,
    pub destination_namespace: Arc<str>,
    /// `namespace/name` of the workload at the other end.
    pub peer_workload: Arc<str>,
    pub route: Arc<str>,
    /// `namespace/service:port`.
    pub backend: Arc<str>,
    pub endpoint: Option<SocketAddr>,
    pub retries: u32,
    pub mtls: bool,
}

impl SpanRecord {
    pub(super) fn new(ids: Ids, parent: Option<u64>, kind: SpanKind, start: SystemTime) -> Self {
        let empty: Arc<str> = Arc::default();
        Self {
            ids,
            parent,
            kind,
            start,
            duration: Duration::ZERO,
            protocol: FlowProtocol::Http1,
            method: Box::default(),
            path: Box::default(),
            authority: Box::default(),
            status: 0,
            grpc_status: None,
            error: None,
            destination_service: empty.clone(),
            destination_namespace: empty.clone(),
            peer_workload: empty.clone(),
            route: empty.clone(),
            backend: empty,
            endpoint: None,
            retries: 0,
            mtls: false,
        }
    }

    /// Sets method, path and authority from a request's head; the query is left out.
    pub fn request(&mut self, method: &[u8], target: &[u8], authority: &[u8]) {
        let path = target.split(|b| *b == b'?').next().unwrap_or_default();
        self.method = text(method);
        self.path = text(path);
        self.authority = text(authority);
    }
}

fn text(bytes: &[u8]) -> Box<str> {
    String::from_utf8_lossy(bytes).into()
}

/// A span that runs. [`ActiveSpan::finish`] sends it away; dropped before, it is sent as
/// "cancelled".
#[derive(Debug)]
pub struct ActiveSpan {
    record: Option<SpanRecord>,
    started: Instant,
    sink: SpanSink,
}

impl ActiveSpan {
    pub(super) fn new(record: SpanRecord, started: Instant, sink: SpanSink) -> Self {
        Self {
            record: Some(record),
            started,
            sink,
        }
    }

    /// Changes what is recorded.
    pub fn update(&mut self, change: impl FnOnce(&mut SpanRecord)) {
        if let Some(record) = &mut self.record {
            change(record);
        }
    }

    /// The trace's id, for the access log.
    pub fn trace_id(&self) -> Option<u128> {
        self.record.as_ref().map(|record| record.ids.trace_id)
    }

    /// The response has ended.
    pub fn finish(mut self) {
        self.send();
    }

    fn send(&mut self) {
        if let Some(mut record) = self.record.take() {
            record.duration = self.started.elapsed();
            self.sink.send(record);
        }
    }
}

impl Drop for ActiveSpan {
    fn drop(&mut self) {
        if let Some(record) = &mut self.record {
            record.error.get_or_insert_with(|| "cancelled".into());
        }
        self.send();
    }
}

/// Where finished spans go. Never blocks.
#[derive(Debug, Clone)]
pub struct SpanSink {
    queue: mpsc::Sender<SpanRecord>,
    on: Arc<AtomicBool>,
    registry: Arc<Registry>,
}

/// The exporter's end of the queue.
#[derive(Debug)]
pub struct SpanSource {
    pub(crate) queue: mpsc::Receiver<SpanRecord>,
    pub(crate) on: Arc<AtomicBool>,
    pub(crate) registry: Arc<Registry>,
}

/// A queue of spans; off until an exporter turns it on.
pub fn span_channel(registry: Arc<Registry>) -> (SpanSink, SpanSource) {
    let (send, receive) = mpsc::channel(SPAN_QUEUE);
    let on = Arc::new(AtomicBool::new(false));
    (
        SpanSink {
            queue: send,
            on: on.clone(),
            registry: registry.clone(),
        },
        SpanSource {
            queue: receive,
            on,
            registry,
        },
    )
}

impl SpanSource {
    /// Turns tracing on, as the exporter does when it has an endpoint.
    pub fn turn_on(&self) {
        self.on.store(true, Ordering::Relaxed);
    }

    /// Takes a finished span, if there is one.
    pub fn try_recv(&mut self) -> Option<SpanRecord> {
        self.queue.try_recv().ok()
    }
}

impl SpanSink {
    #[inline]
    pub(super) fn on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    fn send(&self, record: SpanRecord) {
        if self.queue.try_send(record).is_err() {
            self.registry
                .count(Counter::SpansDropped, &["queue_full"], 1);
        }
    }
}
