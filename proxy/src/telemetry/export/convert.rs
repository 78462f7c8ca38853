//! A [`SpanRecord`] as OpenTelemetry says it, by the semantic conventions for HTTP and RPC
//! (1.37: <https://opentelemetry.io/docs/specs/semconv/>). What is ours alone is named `weft.*`.

use std::borrow::Cow;

use opentelemetry::trace::{
    SpanContext, SpanId, SpanKind as OtelKind, Status, TraceFlags, TraceId, TraceState,
};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::resource::EnvResourceDetector;
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

use super::ExportConfig;
use crate::telemetry::labels::FlowProtocol;
use crate::telemetry::stats::GRPC_SERVER_FAULTS;
use crate::telemetry::trace::{SpanKind, SpanRecord};

/// Methods that `http.request.method` may hold as they are; others are "_OTHER".
const KNOWN_METHODS: [&str; 10] = [
    "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY",
];

/// Whose spans these are. Where the proxy runs is told by `OTEL_RESOURCE_ATTRIBUTES` (OpenTelemetry
/// specification, resource SDK), which injected pods have: `k8s.pod.name` and so on. What the control
/// plane says of the workload comes before it.
pub(super) fn resource(config: &ExportConfig) -> Resource {
    let attributes = [
        ("service.name", &config.service_name),
        ("service.namespace", &config.service_namespace),
        ("service.instance.id", &config.instance_id),
    ];
    Resource::builder_empty()
        .with_detector(Box::new(EnvResourceDetector::new()))
        .with_attributes(
            attributes
                .into_iter()
                .filter(|(_, value)| !value.is_empty())
                .map(|(key, value)| KeyValue::new(key, value.clone())),
        )
        .build()
}

pub(super) fn span(record: SpanRecord) -> SpanData {
    let grpc = record.protocol == FlowProtocol::Grpc;
    let error = error_type(&record);
    let mut attributes = Attributes::default();
    let name = if grpc {
        rpc(&mut attributes, &record)
    } else {
        http(&mut attributes, &record)
    };
    common(&mut attributes, &record, error.as_deref());
    let status = match error {
        Some(error) => Status::error(error),
        None => Status::Unset,
    };
    SpanData {
        span_context: SpanContext::new(
            TraceId::from_bytes(record.ids.trace_id.to_be_bytes()),
            SpanId::from_bytes(record.ids.span_id.to_be_bytes()),
            TraceFlags::SAMPLED,
            false,
            TraceState::NONE,
        ),
        parent_span_id: record
            .parent
            .map_or(SpanId::INVALID, |id| SpanId::from_bytes(id.to_be_bytes())),
        parent_span_is_remote: record.parent.is_some(),
        span_kind: match record.kind {
            SpanKind::Client => OtelKind::Client,
            SpanKind::Server => OtelKind::Server,
        },
        name,
        start_time: record.start,
        end_time: record.start + record.duration,
        attributes: attributes.0,
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status,
        instrumentation_scope: InstrumentationScope::builder("weft-proxy")
            .with_version(env!("CARGO_PKG_VERSION"))
            .build(),
    }
}

/// A code the proxy gave, else the status where it says failure: from 500 for a server span, from
/// 400 for a client span; gRPC codes that are the server's fault, any but OK for a client span.
fn error_type(record: &SpanRecord) -> Option<String> {
    if let Some(error) = &record.error {
        return Some(error.to_string());
    }
    let client = record.kind == SpanKind::Client;
    if let Some(code) = record.grpc_status {
        let server_fault =
            usize::try_from(code).is_ok_and(|code| GRPC_SERVER_FAULTS.contains(&code));
        return (code != 0 && (client || server_fault)).then(|| code.to_string());
    }
    let failed = record.status >= if client { 400 } else { 500 };
    failed.then(|| record.status.to_string())
}

#[derive(Default)]
struct Attributes(Vec<KeyValue>);

impl Attributes {
    fn text(&mut self, key: &'static str, value: &str) {
        if !value.is_empty() {
            self.0.push(KeyValue::new(key, value.to_owned()));
        }
    }

    fn number(&mut self, key: &'static str, value: impl Into<i64>) {
        self.0.push(KeyValue::new(key, value.into()));
    }
}

/// The name of an HTTP span is its method: the path may have any number of values, and there is
/// no template to name it by (semantic conventions, "HTTP span name").
fn http(attributes: &mut Attributes, record: &SpanRecord) -> Cow<'static, str> {
    let known = KNOWN_METHODS.contains(&&*record.method);
    if known {
        attributes.text("http.request.method", &record.method);
    } else {
        attributes.text("http.request.method", "_OTHER");
        attributes.text("http.request.method_original", &record.method);
    }
    if record.status != 0 {
        attributes.number("http.response.status_code", record.status);
    }
    if known {
        record.method.to_string().into()
    } else {
        "HTTP".into()
    }
}

/// The name of an RPC span is "package.Service/Method": the path without its slash.
fn rpc(attributes: &mut Attributes, record: &SpanRecord) -> Cow<'static, str> {
    let full = record.path.strip_prefix('/').unwrap_or(&record.path);
    attributes.text("rpc.system", "grpc");
    if let Some((service, method)) = full.rsplit_once('/') {
        attributes.text("rpc.service", service);
        attributes.text("rpc.method", method);
    }
    if let Some(code) = record.grpc_status {
        attributes.number("rpc.grpc.status_code", code);
    }
    attributes.text("http.request.method", &record.method);
    if record.status != 0 {
        attributes.number("http.response.status_code", record.status);
    }
    if full.is_empty() {
        "grpc".into()
    } else {
        full.to_owned().into()
    }
}

fn common(attributes: &mut Attributes, record: &SpanRecord, error: Option<&str>) {
    attributes.text("url.path", &record.path);
    attributes.text("url.scheme", "http");
    let (host, port) = split_authority(&record.authority);
    attributes.text("server.address", host);
    if let Some(port) = port {
        attributes.number("server.port", port);
    }
    attributes.text("network.protocol.name", "http");
    let version = match record.protocol {
        FlowProtocol::H2 | FlowProtocol::Grpc => "2",
        _ => "1.1",
    };
    attributes.text("network.protocol.version", version);
    if let Some(endpoint) = record.endpoint {
        attributes.text("network.peer.address", &endpoint.ip().to_string());
        attributes.number("network.peer.port", endpoint.port());
        attributes.text("weft.endpoint", &endpoint.to_string());
    }
    if record.kind == SpanKind::Client {
        attributes.text("peer.service", &record.destination_service);
        if record.retries > 0 {
            attributes.number("http.request.resend_count", record.retries);
        }
    }
    attributes.text("error.type", error.unwrap_or_default());
    attributes.text("weft.destination.service", &record.destination_service);
    attributes.text("weft.destination.namespace", &record.destination_namespace);
    attributes.text("weft.peer.workload", &record.peer_workload);
    attributes.text("weft.route", &record.route);
    attributes.text("weft.backend", &record.backend);
    attributes.number("weft.retries", record.retries);
    attributes.0.push(KeyValue::new("weft.mtls", record.mtls));
}

/// Host without brackets, and port if one is said.
fn split_authority(authority: &str) -> (&str, Option<u16>) {
    if let Some(rest) = authority.strip_prefix('[') {
        return match rest.split_once(']') {
            Some((host, port)) => (host, port.strip_prefix(':').and_then(|p| p.parse().ok())),
            None => (authority, None),
        };
    }
    match authority.rsplit_once(':') {
        Some((host, port)) => match port.parse() {
            Ok(port) => (host, Some(port)),
            Err(_) => (authority, None),
        },
        None => (authority, None),
    }
}
