//! What a workload's own proxy does with what comes to a port, as JSON, for `weft routes` and
//! `weft explain`.

use serde_json::{Value, json};
use weft_api::proto::rate_limit::Key;
use weft_api::proto::{
    AccessLog, ConnectionSettings, HeaderLimits, MtlsMode, Probe, Provenance, RateLimit, Telemetry,
    probe,
};
use weft_api::provenance::{Field, fields};

use super::explain::protocol;
use crate::compile::OfService;
use crate::model::Name;
use crate::serve::discovery::Hub;

/// Nothing when there is no such workload.
pub(super) fn show(hub: &Hub, workload: &Name, port: u16) -> Value {
    let Some((inbound, held)) = hub.inbound(workload, port) else {
        return Value::Null;
    };
    let said = [&inbound.mtls_from, &inbound.telemetry_from].into_iter();
    let said: Vec<Field<'_>> = said.flat_map(|from| fields(from.as_ref())).collect();
    json!({
        "sidecar": inbound.sidecar,
        "port": port,
        "protocol": protocol(inbound.protocol),
        "mtls": match inbound.mtls {
            MtlsMode::Permissive => "PERMISSIVE",
            MtlsMode::Strict => "STRICT",
            MtlsMode::Disable => "DISABLE",
        },
        "policies": used(inbound.mtls_from.as_ref()),
        "serviceAccount": inbound.service_account,
        "node": inbound.node,
        "services": inbound.services.iter().map(of_service).collect::<Vec<_>>(),
        "telemetry": telemetry(&inbound.telemetry),
        "probes": inbound.probes.iter().filter_map(self::probe).collect::<Vec<_>>(),
        "sources": said,
        // Of the proxies that are connected to this control plane.
        "acknowledged": held.first().map(|_| held.iter().all(|held| held.acknowledged)),
        "refused": held.iter().find_map(|held| held.refused.as_ref()),
    })
}

fn of_service(given: &OfService) -> Value {
    json!({
        "service": format!("{}:{}", given.service, given.port),
        "rateLimit": given.rate.as_ref().map(rate),
        "requestHeaders": given.heads.as_ref().map(heads),
        "connection": given.connection.as_ref().map(connection),
        "sources": fields(given.from.as_ref()),
    })
}

fn rate(given: &RateLimit) -> Value {
    json!({
        "requests": given.requests,
        "perMs": given.per_ms,
        "burst": given.burst,
        // 0: the numbers are for one.
        "replicas": given.replicas,
        "key": given.key.as_ref().map(|key| match key {
            Key::ClientIdentity(_) => json!({ "clientIdentity": true }),
            Key::Header(name) => json!({ "header": name }),
            Key::SourceAddress(_) => json!({ "sourceAddress": true }),
        }),
    })
}

/// 0 is no limit.
fn heads(given: &HeaderLimits) -> Value {
    json!({ "maxBytes": given.max_bytes, "maxCount": given.max_count })
}

fn connection(given: &ConnectionSettings) -> Value {
    json!({
        "maxRequests": given.max_requests,
        "streamWindow": given.stream_window,
        "connectionWindow": given.connection_window,
    })
}

fn telemetry(given: &Telemetry) -> Value {
    json!({
        "samplingPercent": f64::from(given.sampling_per_myriad) / 100.0,
        "accessLog": match given.access_log() {
            AccessLog::Off => "None",
            AccessLog::Errors => "Errors",
            AccessLog::All => "All",
        },
        "otlpEndpoint": given.otlp_endpoint,
    })
}

fn probe(given: &Probe) -> Option<Value> {
    Some(match given.check.as_ref()? {
        probe::Check::HttpPath(path) => json!({ "http": path }),
        probe::Check::Tcp(_) => json!({ "tcp": true }),
        probe::Check::Grpc(_) => json!({ "grpc": true }),
    })
}

/// "Kind namespace/name" of those whose value is used.
fn used(given: Option<&Provenance>) -> Vec<&str> {
    let fields = fields(given).into_iter();
    fields.filter_map(|field| Some(field.from?.name)).collect()
}
