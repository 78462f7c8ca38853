//! The golden signals as JSON, by destination: what a live view shows.

use std::collections::BTreeMap;

use serde::Serialize;

use super::cells::{CLASSES, HistogramSum, RequestSum};
use super::labels::{Direction, FlowLabels};
use super::metrics::Snapshot;
use super::names::{Counter, Gauge, Histogram};

/// An endpoint as the proxy knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EndpointView {
    /// Service and namespace of the backend.
    pub service: String,
    pub namespace: String,
    pub port: u16,
    /// "address:port".
    pub address: String,
    /// `namespace/name`.
    pub workload: String,
    pub zone: String,
    pub state: EndpointState,
}

/// Whether an endpoint gets requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EndpointState {
    Ready,
    Draining,
    NotReady,
    /// Taken out by outlier detection.
    Ejected,
    /// Active health checks say so.
    Unhealthy,
}

impl EndpointState {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::NotReady => "not_ready",
            Self::Ejected => "ejected",
            Self::Unhealthy => "unhealthy",
        }
    }
}

/// `GET /stats.json`. Counts are since the start; the reader takes differences for rates.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stats {
    /// Sorted by direction, namespace, service and port.
    pub destinations: Vec<DestinationStats>,
    /// Mutual-TLS handshakes by result, and their durations.
    pub tls_handshakes: BTreeMap<String, u64>,
    pub tls_handshake_p50_ms: Option<f64>,
    pub plaintext_refused: u64,
    pub discovery_connected: Option<bool>,
    pub discovery_updates: BTreeMap<String, u64>,
    /// Seconds since the Unix epoch.
    pub certificate_expiry: Option<u64>,
}

/// One service (outbound), or this workload's own port (inbound).
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct DestinationStats {
    pub direction: &'static str,
    pub namespace: String,
    pub service: String,
    pub port: u16,
    /// All protocols that were spoken.
    pub protocols: Vec<&'static str>,
    pub requests: u64,
    /// Requests by class ("none", "1xx" … "5xx").
    pub classes: BTreeMap<&'static str, u64>,
    /// Requests by gRPC status code.
    pub grpc: BTreeMap<u32, u64>,
    /// Failed requests: no response, 5xx, or a gRPC status that is the server's fault.
    pub failures: u64,
    pub in_flight: u64,
    /// Estimated inside the histogram's buckets.
    pub p50_ms: Option<f64>,
    pub p90_ms: Option<f64>,
    pub p99_ms: Option<f64>,
    /// The histogram itself (not cumulative, bounds in [`super::cells::BUCKETS`]), so that the
    /// reader can take quantiles of an interval.
    pub buckets: Vec<u64>,
    /// Share (0-1) of requests, or of connections if there are no requests, under mutual TLS.
    pub mtls: Option<f64>,
    pub connections_opened: u64,
    pub connections_active: u64,
    pub bytes_to_destination: u64,
    pub bytes_to_source: u64,
    pub retries: u64,
    pub retry_budget_exhausted: u64,
    pub limits_rejected: u64,
    pub outlier_ejections: u64,
    /// Errors the proxy made itself, by code.
    pub errors: BTreeMap<String, u64>,
    /// Requests and connections by destination workload.
    pub workloads: BTreeMap<String, u64>,
    pub endpoints: Vec<EndpointView>,
    #[serde(skip)]
    mtls_counts: MtlsCounts,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct MtlsCounts {
    requests: u64,
    connections: u64,
}

/// gRPC status codes that are the server's fault (the others tell the client something):
/// UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS, as OpenTelemetry's
/// semantic conventions have them for server spans.
pub const GRPC_SERVER_FAULTS: [usize; 6] = [2, 4, 12, 13, 14, 15];

fn failures(sum: &RequestSum) -> u64 {
    let http = sum.by_class[0] + sum.by_class[5];
    http + GRPC_SERVER_FAULTS
        .map(|code| sum.by_grpc[code])
        .iter()
        .sum::<u64>()
}

fn quantile_ms(histogram: &HistogramSum, q: f64) -> Option<f64> {
    Some(histogram.quantile(q)?.as_secs_f64() * 1e3)
}

type Key = (Direction, String, String, u16);

fn key(flow: &FlowLabels) -> Key {
    (
        flow.direction,
        flow.destination_namespace.to_string(),
        flow.destination_service.to_string(),
        flow.port,
    )
}

/// Groups a snapshot by destination.
pub fn stats(snapshot: &Snapshot, endpoints: &[EndpointView]) -> Stats {
    let mut rows = BTreeMap::<Key, DestinationStats>::new();
    let mut durations = BTreeMap::<Key, HistogramSum>::new();
    for (flow, sum) in &snapshot.requests {
        let key = key(flow);
        durations
            .entry(key.clone())
            .or_default()
            .merge(&sum.duration);
        add_requests(rows.entry(key).or_default(), flow, sum);
    }
    for (flow, sum) in &snapshot.connections {
        let row = rows.entry(key(flow)).or_default();
        add_protocol(row, flow);
        row.connections_opened += sum.opened;
        row.connections_active += sum.active();
        row.bytes_to_destination += sum.to_destination;
        row.bytes_to_source += sum.to_source;
        if flow.mtls {
            row.mtls_counts.connections += sum.opened;
        }
    }
    for e in endpoints {
        let key = (
            Direction::Outbound,
            e.namespace.clone(),
            e.service.clone(),
            e.port,
        );
        rows.entry(key).or_default().endpoints.push(e.clone());
    }
    add_events(&mut rows, snapshot);

    let destinations = rows
        .into_iter()
        .map(|(key, row)| finish(&key, row, durations.get(&key)))
        .collect();
    let mut handshake = HistogramSum::default();
    for (labels, sum) in &snapshot.histograms {
        match labels.event {
            Histogram::TlsHandshake => handshake.merge(sum),
        }
    }
    let gauge = |wanted| {
        let found = snapshot.gauges.iter().find(|(gauge, _)| *gauge == wanted);
        found.map(|(_, value)| *value)
    };
    Stats {
        destinations,
        tls_handshakes: by_label(snapshot, Counter::TlsHandshakes, 1),
        tls_handshake_p50_ms: quantile_ms(&handshake, 0.5),
        plaintext_refused: by_label(snapshot, Counter::PlaintextRefused, 0)
            .values()
            .sum(),
        discovery_connected: gauge(Gauge::DiscoveryConnected).map(|v| v > 0.0),
        discovery_updates: by_label(snapshot, Counter::DiscoveryUpdates, 0),
        certificate_expiry: gauge(Gauge::CertificateExpiry).map(|v| v as u64),
    }
}

fn add_protocol(row: &mut DestinationStats, flow: &FlowLabels) {
    let protocol = flow.protocol.as_str();
    if !row.protocols.contains(&protocol) {
        row.protocols.push(protocol);
    }
}

fn add_requests(row: &mut DestinationStats, flow: &FlowLabels, sum: &RequestSum) {
    add_protocol(row, flow);
    let requests = sum.duration.count();
    row.requests += requests;
    row.failures += failures(sum);
    row.in_flight += sum.in_flight;
    for (class, n) in CLASSES.into_iter().zip(sum.by_class) {
        if n > 0 {
            *row.classes.entry(class).or_default() += n;
        }
    }
    for (code, n) in (0u32..).zip(sum.by_grpc) {
        if n > 0 {
            *row.grpc.entry(code).or_default() += n;
            *row.classes.entry("2xx").or_default() += n;
        }
    }
    if flow.mtls {
        row.mtls_counts.requests += requests;
    }
    if !flow.destination_workload.is_empty() {
        *row.workloads
            .entry(flow.destination_workload.to_string())
            .or_default() += requests;
    }
}

/// Events name the service, not its port: they are shown with the service's first row.
fn add_events(rows: &mut BTreeMap<Key, DestinationStats>, snapshot: &Snapshot) {
    for (labels, n) in &snapshot.counters {
        let names = labels.event.definition().labels;
        let value = |wanted: &str| {
            let at = names.iter().position(|name| *name == wanted)?;
            labels.values.get(at).map(|value| &**value)
        };
        let (Some(service), Some(namespace)) =
            (value("destination_service"), value("destination_namespace"))
        else {
            continue;
        };
        let direction = match value("direction") {
            Some("inbound") => Direction::Inbound,
            _ => Direction::Outbound,
        };
        let found = rows
            .iter_mut()
            .find(|((d, ns, svc, _), _)| *d == direction && ns == namespace && svc == service);
        let row = match found {
            Some((_, row)) => row,
            None => rows
                .entry((direction, namespace.to_owned(), service.to_owned(), 0))
                .or_default(),
        };
        match labels.event {
            Counter::Retries => row.retries += n,
            Counter::RetryBudgetExhausted => row.retry_budget_exhausted += n,
            Counter::LimitsRejected => row.limits_rejected += n,
            Counter::OutlierEjections => row.outlier_ejections += n,
            Counter::Errors => {
                let code = value("code").unwrap_or_default().to_owned();
                *row.errors.entry(code).or_default() += n;
            }
            _ => {}
        }
    }
}

fn finish(
    key: &Key,
    mut row: DestinationStats,
    durations: Option<&HistogramSum>,
) -> DestinationStats {
    let (direction, namespace, service, port) = key;
    row.direction = direction.as_str();
    row.namespace.clone_from(namespace);
    row.service.clone_from(service);
    row.port = *port;
    if let Some(durations) = durations {
        row.p50_ms = quantile_ms(durations, 0.5);
        row.p90_ms = quantile_ms(durations, 0.9);
        row.p99_ms = quantile_ms(durations, 0.99);
        row.buckets = durations.buckets.to_vec();
    }
    let share = |part: u64, all: u64| (all > 0).then(|| part as f64 / all as f64);
    row.mtls = share(row.mtls_counts.requests, row.requests)
        .or_else(|| share(row.mtls_counts.connections, row.connections_opened));
    row
}

fn by_label(snapshot: &Snapshot, counter: Counter, label: usize) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::new();
    for (labels, n) in &snapshot.counters {
        if labels.event == counter {
            let value = labels.values.get(label).map_or("", |value| value);
            *sums.entry(value.to_owned()).or_default() += n;
        }
    }
    sums
}

#[cfg(test)]
mod tests;
