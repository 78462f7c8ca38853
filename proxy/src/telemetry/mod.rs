//! What people see of the mesh: metrics, spans and the access log.
//!
//! - [`metrics`]: counters and histograms. A worker resolves a handle once (when it learns of an
//!   endpoint, or accepts a connection) and then only writes memory of its own; the sums are made
//!   when somebody asks ([`exposition`] for Prometheus, [`stats`] as JSON).
//! - [`trace`]: trace context in and out, sampling, and the compact record of a span that a worker
//!   sends away; [`export`] turns records into OTLP on the control thread.
//! - [`access_log`]: one JSON line a request, written by the control thread.
//! - [`tap`]: requests shown live to whoever asks.
//! - [`log`]: the proxy's own log and its level, which can be changed while it runs.
//!
//! Nothing here blocks a worker: what the control thread cannot take in time is dropped and
//! counted.

pub mod access_log;
pub mod cells;
pub mod export;
pub mod exposition;
pub mod labels;
pub mod log;
pub mod metrics;
pub mod names;
pub mod process;
pub mod stats;
pub mod tap;
pub mod trace;

pub use access_log::{AccessLogSink, AccessRecord};
pub use cells::{ConnectionSeries, CounterSeries, HistogramSeries, InFlight, RequestSeries};
pub use labels::{Direction, FlowLabels, FlowProtocol};
pub use metrics::{Registry, WorkerMetrics};
pub use names::{Counter, Gauge, Histogram};
pub use tap::Taps;
pub use trace::{ActiveSpan, Sampler, SpanKind, SpanRecord, Started, TraceContext, Tracer};
