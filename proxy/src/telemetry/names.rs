//! Names, meanings and labels of all metrics. `docs/reference/metrics.md` says the same to people;
//! a test compares the two.

use super::labels::FlowLabels;

/// Kind of a metric, as Prometheus names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

impl Kind {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// What one metric is.
#[derive(Debug, PartialEq, Eq)]
pub struct Definition {
    pub name: &'static str,
    pub kind: Kind,
    pub help: &'static str,
    /// The flow labels come before these.
    pub flow: bool,
    pub labels: &'static [&'static str],
}

const fn define(
    name: &'static str,
    kind: Kind,
    help: &'static str,
    labels: &'static [&'static str],
) -> Definition {
    Definition {
        name,
        kind,
        help,
        flow: false,
        labels,
    }
}

const fn define_flow(
    name: &'static str,
    kind: Kind,
    help: &'static str,
    labels: &'static [&'static str],
) -> Definition {
    Definition {
        name,
        kind,
        help,
        flow: true,
        labels,
    }
}

pub static REQUESTS: Definition = define_flow(
    "weft_requests_total",
    Kind::Counter,
    "Requests that have ended, by class of the response and gRPC status.",
    &["response_class", "grpc_status"],
);
pub static REQUEST_DURATION: Definition = define_flow(
    "weft_request_duration_seconds",
    Kind::Histogram,
    "Time from the head of the request to the end of the response.",
    &[],
);
pub static REQUESTS_IN_FLIGHT: Definition = define_flow(
    "weft_requests_in_flight",
    Kind::Gauge,
    "Requests that are running now.",
    &[],
);
pub static CONNECTIONS_OPENED: Definition = define_flow(
    "weft_tcp_connections_opened_total",
    Kind::Counter,
    "Connections opened.",
    &[],
);
pub static CONNECTIONS_CLOSED: Definition = define_flow(
    "weft_tcp_connections_closed_total",
    Kind::Counter,
    "Connections closed.",
    &[],
);
pub static CONNECTIONS_ACTIVE: Definition = define_flow(
    "weft_tcp_connections_active",
    Kind::Gauge,
    "Connections open now.",
    &[],
);
pub static BYTES: Definition = define_flow(
    "weft_tcp_bytes_total",
    Kind::Counter,
    "Bytes of the application passed on, by the way they went.",
    &["way"],
);
pub static ENDPOINTS: Definition = define(
    "weft_endpoints",
    Kind::Gauge,
    "Endpoints known, by state (ready, draining, not_ready, ejected, unhealthy).",
    &[
        "destination_service",
        "destination_namespace",
        "destination_port",
        "state",
    ],
);
pub static OVERFLOW: Definition = define(
    "weft_metrics_overflow_total",
    Kind::Counter,
    "Times that labels became \"other\" because a family of series was full.",
    &["family"],
);
pub static BUILD_INFO: Definition = define(
    "weft_build_info",
    Kind::Gauge,
    "Always 1; the version stands in the label.",
    &["version"],
);
pub static PROCESS_CPU: Definition = define(
    "process_cpu_seconds_total",
    Kind::Counter,
    "User and system CPU time spent, in seconds.",
    &[],
);
pub static PROCESS_RSS: Definition = define(
    "process_resident_memory_bytes",
    Kind::Gauge,
    "Resident memory size in bytes.",
    &[],
);
pub static PROCESS_VIRTUAL: Definition = define(
    "process_virtual_memory_bytes",
    Kind::Gauge,
    "Virtual memory size in bytes.",
    &[],
);
pub static PROCESS_FDS: Definition = define(
    "process_open_fds",
    Kind::Gauge,
    "Number of open file descriptors.",
    &[],
);
pub static PROCESS_MAX_FDS: Definition = define(
    "process_max_fds",
    Kind::Gauge,
    "Maximum number of open file descriptors.",
    &[],
);
pub static PROCESS_THREADS: Definition =
    define("process_threads", Kind::Gauge, "Number of threads.", &[]);
pub static PROCESS_START: Definition = define(
    "process_start_time_seconds",
    Kind::Gauge,
    "Start time of the process since the Unix epoch, in seconds.",
    &[],
);

/// Events that are counted by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Counter {
    /// Labels: direction, result ("ok", "timeout", "identity", "failed").
    TlsHandshakes,
    /// Labels: destination_port.
    PlaintextRefused,
    /// Labels: reason, destination_service, destination_namespace.
    Retries,
    /// Labels: destination_service, destination_namespace.
    RetryBudgetExhausted,
    /// Errors the proxy made itself. Labels: code, direction, destination_service,
    /// destination_namespace.
    Errors,
    /// Labels: limit, destination_service, destination_namespace.
    LimitsRejected,
    /// Labels: destination_service, destination_namespace.
    OutlierEjections,
    /// Labels: fault ("delay", "abort"), destination_service, destination_namespace.
    FaultsInjected,
    /// Labels: destination_service, destination_namespace.
    RateLimited,
    /// Labels: destination_service, destination_namespace.
    Hedges,
    /// Labels: result ("ack", "nack").
    DiscoveryUpdates,
    /// Labels: reason ("queue_full", "export_failed", "no_endpoint").
    SpansDropped,
    SpansExported,
    AccessLogDropped,
}

impl Counter {
    pub const ALL: [Self; 14] = [
        Self::TlsHandshakes,
        Self::PlaintextRefused,
        Self::Retries,
        Self::RetryBudgetExhausted,
        Self::Errors,
        Self::LimitsRejected,
        Self::OutlierEjections,
        Self::FaultsInjected,
        Self::RateLimited,
        Self::Hedges,
        Self::DiscoveryUpdates,
        Self::SpansDropped,
        Self::SpansExported,
        Self::AccessLogDropped,
    ];

    pub const fn definition(self) -> &'static Definition {
        const SERVICE: &[&str] = &["destination_service", "destination_namespace"];
        macro_rules! counter {
            ($name:literal, $help:literal, $labels:expr) => {{
                static D: Definition = define($name, Kind::Counter, $help, $labels);
                &D
            }};
        }
        match self {
            Self::TlsHandshakes => counter!(
                "weft_tls_handshakes_total",
                "Mutual-TLS handshakes between proxies, by result.",
                &["direction", "result"]
            ),
            Self::PlaintextRefused => counter!(
                "weft_plaintext_refused_total",
                "Connections refused because they were not mutual TLS where it is required.",
                &["destination_port"]
            ),
            Self::Retries => counter!(
                "weft_retries_total",
                "Requests sent again, by what was wrong with the try before.",
                &["reason", "destination_service", "destination_namespace"]
            ),
            Self::RetryBudgetExhausted => counter!(
                "weft_retry_budget_exhausted_total",
                "Retries not made because the retry budget was spent.",
                SERVICE
            ),
            Self::Errors => counter!(
                "weft_errors_total",
                "Errors that the proxy made itself, by the code that stands in Proxy-Status.",
                &[
                    "code",
                    "direction",
                    "destination_service",
                    "destination_namespace"
                ]
            ),
            Self::LimitsRejected => counter!(
                "weft_limits_rejected_total",
                "Requests and connections refused because a concurrency limit was reached.",
                &["limit", "destination_service", "destination_namespace"]
            ),
            Self::OutlierEjections => counter!(
                "weft_outlier_ejections_total",
                "Endpoints taken out by outlier detection.",
                SERVICE
            ),
            Self::FaultsInjected => counter!(
                "weft_faults_injected_total",
                "Requests delayed or aborted because a policy injects faults.",
                &["fault", "destination_service", "destination_namespace"]
            ),
            Self::RateLimited => counter!(
                "weft_rate_limited_total",
                "Requests that this workload's proxy refused because a rate limit was reached.",
                SERVICE
            ),
            Self::Hedges => counter!(
                "weft_hedges_total",
                "Requests sent to a second endpoint beside the first, which had not answered yet.",
                SERVICE
            ),
            Self::DiscoveryUpdates => counter!(
                "weft_discovery_updates_total",
                "Resources received from the control plane, by what was answered.",
                &["result"]
            ),
            Self::SpansDropped => counter!(
                "weft_spans_dropped_total",
                "Spans that were not exported, by reason.",
                &["reason"]
            ),
            Self::SpansExported => {
                counter!("weft_spans_exported_total", "Spans exported.", &[])
            }
            Self::AccessLogDropped => counter!(
                "weft_access_log_dropped_total",
                "Access log lines dropped because the writer was behind.",
                &[]
            ),
        }
    }
}

/// Durations that are measured by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Histogram {
    /// Labels: direction.
    TlsHandshake,
}

impl Histogram {
    pub const ALL: [Self; 1] = [Self::TlsHandshake];

    pub const fn definition(self) -> &'static Definition {
        match self {
            Self::TlsHandshake => {
                static D: Definition = define(
                    "weft_tls_handshake_duration_seconds",
                    Kind::Histogram,
                    "Duration of successful mutual-TLS handshakes between proxies.",
                    &["direction"],
                );
                &D
            }
        }
    }
}

/// Values that are set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Gauge {
    /// 1 while the stream to the control plane is open.
    DiscoveryConnected,
    /// Seconds since the Unix epoch.
    CertificateExpiry,
}

impl Gauge {
    pub const ALL: [Self; 2] = [Self::DiscoveryConnected, Self::CertificateExpiry];

    pub const fn definition(self) -> &'static Definition {
        macro_rules! gauge {
            ($name:literal, $help:literal) => {{
                static D: Definition = define($name, Kind::Gauge, $help, &[]);
                &D
            }};
        }
        match self {
            Self::DiscoveryConnected => gauge!(
                "weft_discovery_connected",
                "1 while the stream to the control plane is open, else 0."
            ),
            Self::CertificateExpiry => gauge!(
                "weft_certificate_expiry_seconds",
                "When the certificate in use expires, seconds since the Unix epoch."
            ),
        }
    }
}

/// Every metric there is.
pub fn definitions() -> impl Iterator<Item = &'static Definition> {
    [
        &REQUESTS,
        &REQUEST_DURATION,
        &REQUESTS_IN_FLIGHT,
        &CONNECTIONS_OPENED,
        &CONNECTIONS_CLOSED,
        &CONNECTIONS_ACTIVE,
        &BYTES,
        &ENDPOINTS,
        &OVERFLOW,
        &BUILD_INFO,
        &PROCESS_CPU,
        &PROCESS_RSS,
        &PROCESS_VIRTUAL,
        &PROCESS_FDS,
        &PROCESS_MAX_FDS,
        &PROCESS_THREADS,
        &PROCESS_START,
    ]
    .into_iter()
    .chain(Counter::ALL.map(Counter::definition))
    .chain(Histogram::ALL.map(Histogram::definition))
    .chain(Gauge::ALL.map(Gauge::definition))
}

impl Definition {
    /// All names of labels, the flow's first.
    pub fn label_names(&self) -> impl Iterator<Item = &'static str> {
        let flow: &[&'static str] = if self.flow { &FlowLabels::NAMES } else { &[] };
        flow.iter().chain(self.labels).copied()
    }
}
