//! A destination's table as JSON, with what decides how its endpoints are reached, for
//! `weft explain`.

use serde_json::{Value, json};
use weft_api::proto::load_balancer::HashKey;
use weft_api::proto::resource::Body;
use weft_api::proto::{
    Algorithm, Backend, BackendPolicy, Endpoint, Health, Protocol, ResourceKey, ResourceKind,
    RetryPolicy, Route, RoutePolicy, ValueMatch, fallback, route_match, value_match,
};

use super::inbound;
use crate::compile::EVERYWHERE;
use crate::model::{Kind, Name, ObjectRef};
use crate::serve::discovery::Hub;

/// What a proxy of a namespace that asked for this destination would be told.
pub(super) fn explain(hub: &Hub, name: &str, client: &str) -> Value {
    let compiled = hub.look_up(&key(ResourceKind::Destination, name), client);
    let Some(Body::Destination(destination)) = &compiled.resource.body else {
        return unknown(name);
    };
    json!({
        "destination": name,
        "known": true,
        "version": format!("{:016x}", compiled.version()),
        "namespace": destination.namespace,
        "service": destination.service,
        "port": destination.port,
        "portName": destination.port_name,
        "protocol": protocol(destination.protocol()),
        "policies": names(hub.policies_in(&key(ResourceKind::Destination, name), |policy| {
            !matches!(policy.kind, Kind::PeerAuthentication | Kind::Telemetry)
        })),
        "routes": destination.routes.iter().map(|route| self::route(hub, route)).collect::<Vec<_>>(),
    })
}

fn unknown(name: &str) -> Value {
    json!({
        "destination": name,
        "known": false,
        "explanation": "no Service and no Workload has this address or name and port: proxies pass such connections through untouched, to their original address",
    })
}

/// What whoever has no proxy comes to: routes are kept by callers' proxies.
pub(super) fn without_routes(hub: &Hub, name: &str) -> Value {
    let compiled = hub.look_up(&key(ResourceKind::Destination, name), "");
    let (Some(Body::Destination(destination)), Some(of)) =
        (&compiled.resource.body, hub.without_routes(name))
    else {
        return unknown(name);
    };
    json!({
        "destination": name,
        "known": true,
        "namespace": destination.namespace,
        "service": destination.service,
        "port": destination.port,
        "protocol": protocol(destination.protocol()),
        "endpoints": endpoints(hub, &of).1,
    })
}

fn key(kind: ResourceKind, name: &str) -> ResourceKey {
    ResourceKey {
        kind: kind.into(),
        name: name.to_owned(),
    }
}

pub(super) fn protocol(given: Protocol) -> &'static str {
    match given {
        Protocol::Auto => "auto",
        Protocol::Http => "http",
        Protocol::Http2 => "http2",
        Protocol::Grpc => "grpc",
        Protocol::Tcp => "tcp",
        Protocol::Tls => "tls",
    }
}

fn route(hub: &Hub, route: &Route) -> Value {
    let matches: Vec<Value> = route
        .matches
        .iter()
        .map(|matched| {
            let (exact, prefix, regex) = match &matched.path {
                Some(route_match::Path::PathExact(path)) => (Some(path), None, None),
                Some(route_match::Path::PathPrefix(path)) => (None, Some(path), None),
                Some(route_match::Path::PathRegex(pattern)) => (None, None, Some(pattern)),
                None => (None, None, None),
            };
            json!({
                "method": matched.method,
                "pathExact": exact,
                "pathPrefix": prefix,
                "pathRegex": regex,
                "headers": matched.headers,
                "headerPatterns": matched.header_patterns.iter().map(value_match).collect::<Vec<_>>(),
                "query": matched.query.iter().map(value_match).collect::<Vec<_>>(),
                "order": matched.order,
            })
        })
        .collect();
    let backends: Vec<Value> = route
        .backends
        .iter()
        .map(|weighted| {
            let mut value = match &weighted.backend {
                Some(given) => backend(hub, given),
                None => json!({ "refused": weighted.refused }),
            };
            value["weight"] = weighted.weight.into();
            value
        })
        .collect();
    json!({
        "name": route.name,
        "matches": matches,
        "policy": route.policy.as_ref().map(|policy| route_policy(hub, policy)),
        "backends": backends,
        "refused": route.refused,
    })
}

fn value_match(given: &ValueMatch) -> Value {
    match &given.value {
        Some(value_match::Value::Exact(value)) => json!({ "name": given.name, "exact": value }),
        Some(value_match::Value::Regex(value)) => json!({ "name": given.name, "regex": value }),
        None => json!({ "name": given.name }),
    }
}

fn route_policy(hub: &Hub, policy: &RoutePolicy) -> Value {
    let fallback = policy
        .fallback
        .as_ref()
        .and_then(|fallback| fallback.action.as_ref())
        .map(|action| match action {
            fallback::Action::Response(response) => json!({
                "response": {
                    "status": response.status,
                    "headers": response.headers.iter().map(|header| json!({
                        "name": header.name,
                        "value": header.value,
                    })).collect::<Vec<_>>(),
                    "body": String::from_utf8_lossy(&response.body),
                }
            }),
            fallback::Action::Backend(target) => json!({ "backend": backend(hub, target) }),
        });
    json!({
        "requestTimeoutMs": policy.request_timeout_ms,
        "perTryTimeoutMs": policy.per_try_timeout_ms,
        "idleTimeoutMs": policy.idle_timeout_ms,
        "streamIdleTimeoutMs": policy.stream_idle_timeout_ms.unwrap_or(policy.idle_timeout_ms),
        "retries": policy.retry.as_ref().map(retry),
        "fallback": fallback,
    })
}

fn retry(retry: &RetryPolicy) -> Value {
    json!({
        "attempts": retry.attempts,
        "codes": retry.status_codes,
        "grpcCodes": retry.grpc_codes,
        "connectFailure": retry.connect_failure,
        "refusedStream": retry.refused_stream,
        "reset": retry.reset,
        "timeout": retry.timeout,
        "methods": retry.methods,
        "backoffBaseMs": retry.backoff_base_ms,
        "backoffMaxMs": retry.backoff_max_ms,
        "maxBodyBytes": retry.max_body_bytes,
        "budgetPercent": retry.budget_percent,
        "budgetMinPerSecond": retry.budget_min_per_second,
    })
}

fn backend(hub: &Hub, backend: &Backend) -> Value {
    let (node_local, endpoints) = endpoints(hub, &backend.endpoints);
    json!({
        "namespace": backend.namespace,
        "service": backend.service,
        "port": backend.port,
        "policy": backend.policy.as_ref().map(backend_policy),
        "nodeLocal": node_local,
        "endpoints": endpoints,
    })
}

/// Whether they are for clients on the same node, and the endpoints; none when they are no resource.
fn endpoints(hub: &Hub, name: &str) -> (bool, Option<Vec<Value>>) {
    let mut compiled = hub.look_up(&key(ResourceKind::Endpoints, name), "");
    // Of one that is for clients on the same node, those on every node, with the nodes.
    let node_local =
        matches!(&compiled.resource.body, Some(Body::Endpoints(found)) if found.node_local);
    if node_local {
        let everywhere = format!("{EVERYWHERE}{name}");
        compiled = hub.look_up(&key(ResourceKind::Endpoints, &everywhere), "");
    }
    let found = match &compiled.resource.body {
        Some(Body::Endpoints(endpoints)) => {
            let shown = endpoints.endpoints.iter().map(|each| endpoint(hub, each));
            Some(shown.collect())
        }
        _ => None,
    };
    (node_local, found)
}

fn backend_policy(policy: &BackendPolicy) -> Value {
    let balancer = policy.load_balancer.clone().unwrap_or_default();
    let algorithm = match balancer.algorithm() {
        Algorithm::PeakEwma => "PeakEWMA",
        Algorithm::LeastRequest => "LeastRequest",
        Algorithm::RoundRobin => "RoundRobin",
        Algorithm::Random => "Random",
        Algorithm::RingHash => "RingHash",
        Algorithm::Maglev => "Maglev",
    };
    let hash_key = balancer.hash_key.as_ref().map(|key| match key {
        HashKey::Header(name) => json!({ "header": name }),
        HashKey::Cookie(name) => json!({ "cookie": name }),
        HashKey::SourceAddress(_) => json!({ "sourceAddress": true }),
    });
    let limits = policy.limits.unwrap_or_default();
    json!({
        "connectTimeoutMs": policy.connect_timeout_ms,
        "connection": policy.connection.as_ref().map(|connection| json!({
            "maxRequests": connection.max_requests,
            "idleTimeoutMs": connection.idle_timeout_ms,
            "keepAliveTimeMs": connection.keepalive_time_ms,
            "keepAliveIntervalMs": connection.keepalive_interval_ms,
            "keepAliveProbes": connection.keepalive_probes,
            "streamWindow": connection.stream_window,
            "connectionWindow": connection.connection_window,
        })),
        "loadBalancer": {
            "algorithm": algorithm,
            "hashKey": hash_key,
            "panicThreshold": balancer.panic_threshold_percent,
        },
        "limits": {
            "maxConnections": limits.max_connections,
            "maxRequests": limits.max_requests,
            "maxPendingRequests": limits.max_pending_requests,
        },
        "outlierDetection": policy.outlier_detection.as_ref().map(|outlier| json!({
            "consecutiveGatewayErrors": outlier.consecutive_gateway_errors,
            "consecutive5xxErrors": outlier.consecutive_5xx,
            "successRateThreshold": outlier.success_rate_threshold_percent,
            "successRateMinRequests": outlier.success_rate_min_requests,
            "intervalMs": outlier.interval_ms,
            "baseEjectionMs": outlier.base_ejection_ms,
            "maxEjectionMs": outlier.max_ejection_ms,
            "maxEjectionPercent": outlier.max_ejection_percent,
        })),
    })
}

/// "Kind namespace/name".
fn names(objects: Vec<ObjectRef>) -> Vec<String> {
    objects.iter().map(ToString::to_string).collect()
}

/// What the workload's own proxy does with what comes to the endpoint's port.
fn of_endpoint(hub: &Hub, endpoint: &Endpoint) -> Value {
    let port = endpoint.address.rsplit_once(':');
    let port = port.and_then(|(_, port)| port.parse().ok());
    match (Name::parse(&endpoint.workload), port) {
        (Some(workload), Some(port)) => inbound::show(hub, &workload, port),
        _ => Value::Null,
    }
}

fn endpoint(hub: &Hub, endpoint: &Endpoint) -> Value {
    let health = match endpoint.health() {
        Health::Ready => "Ready",
        Health::Draining => "Draining",
        Health::NotReady => "NotReady",
    };
    json!({
        "address": endpoint.address,
        "workload": endpoint.workload,
        "identity": endpoint.identity,
        "zone": endpoint.zone,
        "weight": endpoint.weight,
        "health": health,
        "inbound": of_endpoint(hub, endpoint),
    })
}
