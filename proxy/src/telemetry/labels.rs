//! Labels: what a series is about.

use std::sync::Arc;

use super::names::{Counter, Definition, Histogram};

/// Which way through the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// From the workload into the mesh.
    Outbound,
    /// From the mesh to the workload.
    Inbound,
}

impl Direction {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

/// What was spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FlowProtocol {
    Http1,
    H2,
    Grpc,
    Tcp,
    /// The application's own TLS, passed through.
    Tls,
}

impl FlowProtocol {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Http1 => "http1",
            Self::H2 => "h2",
            Self::Grpc => "grpc",
            Self::Tcp => "tcp",
            Self::Tls => "tls",
        }
    }
}

/// Who talks to whom and how: the labels of every series about requests and connections.
///
/// Unknown names are empty strings, an unknown port is 0. The strings are shared with the tables
/// they come from, so that making one copies no text.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowLabels {
    pub direction: Direction,
    /// Name people know, without the namespace.
    pub source_workload: Arc<str>,
    pub source_namespace: Arc<str>,
    pub destination_service: Arc<str>,
    pub destination_namespace: Arc<str>,
    pub destination_workload: Arc<str>,
    /// Port of the service (outbound) or of the workload (inbound).
    pub port: u16,
    pub protocol: FlowProtocol,
    /// Between the proxies; not the application's own TLS.
    pub mtls: bool,
}

/// Text of labels that had no room any more.
pub const OTHER: &str = "other";

/// Labels with a form for when there is no room for more series.
pub trait Labels: Clone + Eq + std::hash::Hash {
    /// The same with everything unbounded replaced by [`OTHER`].
    fn overflow(&self) -> Self;

    /// Whether a series that nobody uses any more may be forgotten: those that name a destination.
    fn forgettable(&self) -> bool;
}

impl Labels for FlowLabels {
    fn overflow(&self) -> Self {
        let other: Arc<str> = OTHER.into();
        Self {
            direction: self.direction,
            source_workload: other.clone(),
            source_namespace: other.clone(),
            destination_service: other.clone(),
            destination_namespace: other.clone(),
            destination_workload: other,
            port: 0,
            protocol: self.protocol,
            mtls: self.mtls,
        }
    }

    fn forgettable(&self) -> bool {
        true
    }
}

impl FlowLabels {
    /// Names of the labels, in the order of [`FlowLabels::values`].
    pub const NAMES: [&'static str; 9] = [
        "direction",
        "source_workload",
        "source_namespace",
        "destination_service",
        "destination_namespace",
        "destination_workload",
        "destination_port",
        "protocol",
        "mtls",
    ];

    /// Calls `each` with the name and value of every label.
    pub fn values(&self, mut each: impl FnMut(&'static str, &str)) {
        let port = self.port.to_string();
        let values: [&str; 9] = [
            self.direction.as_str(),
            &self.source_workload,
            &self.source_namespace,
            &self.destination_service,
            &self.destination_namespace,
            &self.destination_workload,
            &port,
            self.protocol.as_str(),
            if self.mtls { "true" } else { "false" },
        ];
        for (name, value) in Self::NAMES.into_iter().zip(values) {
            each(name, value);
        }
    }
}

/// Values of a named event's labels, in the order its definition names them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventLabels<E> {
    pub event: E,
    pub values: Box<[Box<str>]>,
}

/// What has a definition in the table of names.
pub trait Event: Copy + Eq + std::hash::Hash {
    fn definition(self) -> &'static Definition;
}

impl<E: Event> Labels for EventLabels<E> {
    fn overflow(&self) -> Self {
        Self {
            event: self.event,
            values: self.values.iter().map(|_| OTHER.into()).collect(),
        }
    }

    fn forgettable(&self) -> bool {
        let labels = self.event.definition().labels;
        labels.contains(&"destination_service")
    }
}

impl Event for Counter {
    fn definition(self) -> &'static Definition {
        self.definition()
    }
}

impl Event for Histogram {
    fn definition(self) -> &'static Definition {
        self.definition()
    }
}
