//! What the proxy tells of itself: readiness, the tables it knows, its endpoints; and what it
//! notices by looking at them now and then (ejections, the certificate's remaining life).

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use tokio::sync::watch;
use weft_api::proto;
use weft_api::provenance::fields;

use crate::admin::Introspect;
use crate::balance::HealthState;
use crate::config::Config;
use crate::discovery::provenance::Provenance;
use crate::discovery::{Directory, LinkState, Outside};
use crate::http::session::{Place, Session};
use crate::identity;
use crate::inbound::limits::{LimitKey, RateLimit};
use crate::run::Stage;
use crate::tables::{
    Backend, ConnectionPolicy, Destination, EndpointInfo, Fallback, FieldEdit, HashKey, Health,
    HealthCheck, HealthProbe, Known, PathEdit, PathMatch, Plan, Redirect, Route, ValueMatch,
};
use crate::telemetry::export::ExportConfig;
use crate::telemetry::stats::{EndpointState, EndpointView};
use crate::telemetry::{Counter, Gauge, Registry};
use crate::worker::Shared;

/// How often the states are looked at.
const LOOK: Duration = Duration::from_millis(250);

/// See the module.
pub struct Introspection {
    config: Arc<Config>,
    directory: Arc<Directory>,
    identity: identity::Handle,
    registry: Arc<Registry>,
    stage: watch::Sender<Stage>,
}

impl Introspection {
    pub fn new(shared: &Shared, stage: watch::Sender<Stage>) -> Self {
        Self {
            config: shared.config.clone(),
            directory: shared.directory.clone(),
            identity: shared.identity.clone(),
            registry: shared.registry.clone(),
            stage,
        }
    }

    fn destinations(&self) -> Vec<(SocketAddr, Arc<Destination>)> {
        let cells = self.directory.destinations();
        let present = cells.iter().filter_map(|cell| match cell.known() {
            Known::Present(destination) => Some((cell.address, destination)),
            Known::Pending | Known::Absent => None,
        });
        present.collect()
    }

    /// Every backend once.
    fn backends(&self) -> Vec<Arc<Backend>> {
        let mut seen = HashSet::new();
        let mut all = Vec::new();
        for (_, destination) in self.destinations() {
            for route in destination.all_routes() {
                for backend in route.all_backends() {
                    if seen.insert(Arc::as_ptr(&backend.endpoints)) {
                        all.push(backend.clone());
                    }
                }
            }
        }
        all
    }

    /// Looks at the states for as long as the proxy runs.
    pub async fn watch(self: Arc<Self>, export: watch::Sender<ExportConfig>) {
        let mut seen: HashMap<(Arc<str>, SocketAddr), (u64, u64)> = HashMap::new();
        loop {
            self.gauges();
            self.ejections(&mut seen);
            self.end_with_application();
            let wanted = self.export_config();
            export.send_if_modified(|now| {
                let changed = *now != wanted;
                *now = wanted;
                changed
            });
            tokio::time::sleep(LOOK).await;
        }
    }

    fn gauges(&self) {
        let connected = self.directory.link() == LinkState::Connected;
        self.registry
            .set(Gauge::DiscoveryConnected, f64::from(u8::from(connected)));
        if let Some(credentials) = self.identity.get()
            && let Ok(since) = credentials.expires.duration_since(std::time::UNIX_EPOCH)
        {
            self.registry
                .set(Gauge::CertificateExpiry, since.as_secs_f64());
        }
    }

    /// Drains when the control plane says that the application has ended for good: where Kubernetes
    /// has no native sidecars, a Job's pod lasts as long as its proxy.
    fn end_with_application(&self) {
        let running = *self.stage.borrow() == Stage::Running;
        if running && self.directory.workload().application_ended {
            tracing::info!("the application has ended for good: so does its proxy");
            self.drain();
        }
    }

    /// Counts and logs endpoints that were taken out or came back.
    fn ejections(&self, seen: &mut HashMap<(Arc<str>, SocketAddr), (u64, u64)>) {
        let mut now = HashMap::new();
        for backend in self.backends() {
            for info in &backend.endpoints.current.load().endpoints {
                let key = (backend.endpoints.name.clone(), info.address);
                let counts = (info.health.ejections(), info.health.returns());
                let (ejected, returned) = seen.get(&key).copied().unwrap_or_default();
                let service = format!("{}/{}:{}", backend.namespace, backend.service, backend.port);
                if counts.0 > ejected {
                    let labels = [&*backend.service, &*backend.namespace];
                    let n = counts.0 - ejected;
                    self.registry.count(Counter::OutlierEjections, &labels, n);
                    tracing::warn!(service, endpoint = %info.address, workload = %info.workload,
                        "endpoint ejected after failures{}", until(info));
                }
                if counts.1 > returned {
                    tracing::info!(service, endpoint = %info.address, workload = %info.workload,
                        "endpoint is back after a successful probe");
                }
                now.insert(key, counts);
            }
        }
        *seen = now;
    }

    fn export_config(&self) -> ExportConfig {
        let workload = self.directory.workload();
        let (service_name, service_namespace) = workload.source();
        ExportConfig {
            endpoint: self
                .config
                .otlp_endpoint
                .clone()
                .or_else(|| workload.otlp_endpoint.clone()),
            service_name: service_name.to_string(),
            service_namespace: service_namespace.to_string(),
            instance_id: self.config.workload.clone(),
        }
    }
}

fn until(info: &EndpointInfo) -> String {
    match info.health.state() {
        HealthState::Ejected { until, times } => format!(
            ", for {} ms (ejection {times})",
            until.saturating_duration_since(Instant::now()).as_millis()
        ),
        HealthState::Closed | HealthState::HalfOpen => String::new(),
    }
}

impl Introspect for Introspection {
    fn ready(&self) -> Result<(), String> {
        if *self.stage.borrow() != Stage::Running {
            return Err("draining: no new work is taken".to_owned());
        }
        let ready = self.directory.ready();
        let missing: Vec<&str> = [
            (ready.workload, "the workload's table"),
            (ready.trust, "the trusted roots"),
            (ready.certificate, "a certificate"),
        ]
        .into_iter()
        .filter(|(there, _)| !there)
        .map(|(_, what)| what)
        .collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(format!(
            "waiting for the control plane at {} to send {}",
            self.config.control_plane,
            missing.join(", ")
        ))
    }

    fn config(&self) -> BoxFuture<'_, Value> {
        Box::pin(async {
            let discovery = self.directory.status().await;
            let workload = self.directory.workload();
            let identity = self.identity.get().map(|credentials| {
                json!({
                    "id": credentials.id.to_string(),
                    "expires_in_seconds": credentials.remaining().as_secs(),
                    "generation": credentials.generation,
                })
            });
            json!({
                "version": env!("CARGO_PKG_VERSION"),
                "workload": {
                    "namespace": &*workload.namespace,
                    "name": &*workload.name,
                    "display_name": &*workload.display_name,
                    "service_account": &*workload.service_account,
                    "zone": &*workload.zone,
                    "node": &*workload.node,
                    "mtls": workload.mtls.as_str_name(),
                    "ports": workload.ports.iter().map(|port| json!({
                        "port": port.port,
                        "protocol": port.protocol.as_str_name(),
                        "mtls": port.mtls.map(|m| m.as_str_name()),
                        "rate_limits": port.limits.iter().flat_map(|limits| &limits.rates)
                            .map(show_rate_limit).collect::<Vec<_>>(),
                        "header_limits": port.limits.iter().flat_map(|limits| &limits.heads)
                            .map(|limit| json!({
                                "service": format!("{}/{}:{}", limit.namespace, limit.service, limit.port),
                                "max_bytes": limit.max_bytes,
                                "max_count": limit.max_fields,
                            })).collect::<Vec<_>>(),
                    })).collect::<Vec<_>>(),
                    "sampling_percent": f64::from(workload.sampling_per_myriad) / 100.0,
                    "access_log": workload.access_log.as_str_name(),
                },
                "identity": identity,
                "discovery": discovery,
                "outside": show_outside(&self.directory.outside()),
                "destinations": self.destinations().iter()
                    .map(|(address, destination)| show_destination(&address.to_string(), destination))
                    .collect::<Vec<_>>(),
            })
        })
    }

    fn endpoints(&self) -> Vec<EndpointView> {
        let mut all = Vec::new();
        for backend in self.backends() {
            for info in &backend.endpoints.current.load().endpoints {
                all.push(EndpointView {
                    service: backend.service.to_string(),
                    namespace: backend.namespace.to_string(),
                    port: backend.port,
                    address: info.address.to_string(),
                    workload: info.workload.to_string(),
                    zone: info.zone.to_string(),
                    state: state_of(info),
                });
            }
        }
        all
    }

    fn drain(&self) {
        self.stage.send_if_modified(|stage| {
            let first = *stage == Stage::Running;
            *stage = (*stage).max(Stage::Draining);
            first
        });
    }
}

fn state_of(info: &EndpointInfo) -> EndpointState {
    match (info.state, info.health.state()) {
        (Health::Draining, _) => EndpointState::Draining,
        (Health::NotReady, _) => EndpointState::NotReady,
        (Health::Ready, _) if !info.health.is_well() => EndpointState::Unhealthy,
        (Health::Ready, HealthState::Closed) => EndpointState::Ready,
        (Health::Ready, _) => EndpointState::Ejected,
    }
}

fn show_outside(outside: &Outside) -> Value {
    let hosts = outside.hosts().filter_map(|(host, cell)| match cell.known() {
        Known::Present(destination) => Some(json!({
            "host": host,
            "destination": show_destination(&format!("{host}:{}", destination.port), &destination),
        })),
        Known::Pending | Known::Absent => None,
    });
    json!({
        "registry_only": outside.registry_only,
        "hosts": hosts.collect::<Vec<_>>(),
    })
}

fn show_destination(address: &str, destination: &Destination) -> Value {
    let provenance = destination.provenance.as_deref();
    json!({
        "address": address,
        "namespace": &*destination.namespace,
        "service": &*destination.service,
        "port": destination.port,
        "protocol": destination.protocol.as_str_name(),
        "routes": destination.routes.iter().enumerate().map(|(index, route)| {
            let of = provenance.and_then(|known| known.of_route(index));
            show_route(route, provenance, of)
        }).collect::<Vec<_>>(),
        "opaque": destination.opaque.iter().enumerate().map(|(index, opaque)| json!({
            "server_names": opaque.server_names,
            "route": show_route(
                &opaque.route,
                provenance,
                provenance.and_then(|known| known.of_opaque(index)),
            ),
        })).collect::<Vec<_>>(),
    })
}

fn show_rate_limit(limit: &RateLimit) -> Value {
    json!({
        "service": format!("{}/{}:{}", limit.namespace, limit.service, limit.port),
        "requests": limit.requests,
        "per_ms": millis(limit.per),
        "burst": limit.burst,
        "replicas": limit.replicas,
        "key": match &limit.key {
            LimitKey::Nobody => Value::Null,
            LimitKey::ClientIdentity => json!("client_identity"),
            LimitKey::Header(name) => json!({ "header": name }),
            LimitKey::SourceAddress => json!("source_address"),
        },
    })
}

/// A route, and which policies it comes `from`.
fn show_route(
    route: &Route,
    provenance: Option<&Provenance>,
    from: Option<&proto::Provenance>,
) -> Value {
    let policy = &route.policy;
    let show_backend = |backend: &Backend| {
        let from = provenance.and_then(|known| known.of_backend(backend.id));
        let mut shown = show_backend(backend);
        shown["sources"] = json!(fields(from));
        shown
    };
    json!({
        "name": &*route.name,
        "matches": route.matches.iter().map(|m| json!({
            "method": m.method,
            "path": m.path.as_ref().map(|path| match path {
                PathMatch::Exact(path) => json!({ "exact": path }),
                PathMatch::Prefix(path) => json!({ "prefix": path }),
                PathMatch::Regex(pattern) => json!({ "regex": pattern.as_str() }),
            }),
            "headers": m.headers.iter().map(|(n, v)| json!({ "name": n, "value": v })).collect::<Vec<_>>(),
            "header_patterns": m.header_patterns.iter().map(|(n, v)| json!({ "name": n, "regex": v.as_str() })).collect::<Vec<_>>(),
            "query": m.query.iter().map(|(n, v)| match v {
                ValueMatch::Exact(v) => json!({ "name": n, "exact": v }),
                ValueMatch::Regex(v) => json!({ "name": n, "regex": v.as_str() }),
            }).collect::<Vec<_>>(),
            "order": m.order,
            "grpc": m.grpc,
        })).collect::<Vec<_>>(),
        "refused": route.refused,
        "redirect": route.redirect.as_ref().map(|redirect| show_redirect(redirect)),
        "cors": route.cors.as_ref().map(|cors| json!({ "origins": cors.origins })),
        "backends": route.backends.iter().filter_map(|share| {
            let mut shown = show_backend(share.backend.as_ref().ok()?);
            shown["weight"] = json!(share.weight);
            shown["plan"] = json!(share.plan.as_ref().map(|plan| show_plan(plan)));
            shown["session"] = json!(share.session.as_ref().map(|of| show_session(&of.session)));
            Some(shown)
        }).collect::<Vec<_>>(),
        "refused_backends": route.backends.iter().filter_map(|share| {
            let why = share.backend.as_ref().err()?;
            Some(json!({ "weight": share.weight, "why": why }))
        }).collect::<Vec<_>>(),
        "sources": fields(from),
        "request_timeout_ms": policy.request_timeout.map(millis),
        "per_try_timeout_ms": policy.per_try_timeout.map(millis),
        "idle_timeout_ms": policy.idle_timeout.map(millis),
        "stream_idle_timeout_ms": policy.stream_idle_timeout.map(millis),
        "retry": policy.retry.as_ref().map(|retry| json!({
            "attempts": retry.attempts,
            "status_codes": retry.status_codes,
            "grpc_codes": retry.grpc_codes,
            "connect_failure": retry.connect_failure,
            "refused_stream": retry.refused_stream,
            "reset": retry.reset,
            "timeout": retry.timeout,
            "methods": retry.methods,
            "budget_percent": retry.budget_percent,
            "budget_min_per_second": retry.budget_min_per_second,
        })),
        "fallback": policy.fallback.as_deref().map(|fallback| match fallback {
            Fallback::Response { status, .. } => json!({ "response": { "status": status } }),
            Fallback::Backend(backend) => json!({ "backend": show_backend(backend) }),
        }),
        "hedge_after_ms": policy.hedge_after.map(millis),
        "fault": policy.fault.as_deref().map(|fault| json!({
            "headers": fault.headers.iter().map(|(n, v)| json!({ "name": n, "value": v })).collect::<Vec<_>>(),
            "delay": fault.delay.map(|delay| json!({
                "percent": delay.share * 100.0,
                "duration_ms": millis(delay.duration),
            })),
            "abort": fault.abort.map(|abort| json!({
                "percent": abort.share * 100.0,
                "status": abort.status,
                "grpc_status": abort.grpc_status,
            })),
        })),
    })
}

fn show_redirect(redirect: &Redirect) -> Value {
    json!({
        "status": redirect.status,
        "scheme": redirect.scheme,
        "hostname": redirect.hostname,
        "port": redirect.port,
        "path": redirect.path.as_ref().map(show_path_edit),
    })
}

fn show_path_edit(edit: &PathEdit) -> Value {
    match edit {
        PathEdit::Full(path) => json!({ "full": path }),
        PathEdit::Prefix(path) => json!({ "prefix": path }),
    }
}

fn show_plan(plan: &Plan) -> Value {
    let edits = |edits: &[FieldEdit]| {
        edits
            .iter()
            .map(|edit| {
                let values = edit
                    .values
                    .iter()
                    .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
                json!({
                    "name": edit.spelling,
                    "keep": edit.keep,
                    "values": values.collect::<Vec<_>>(),
                })
            })
            .collect::<Vec<_>>()
    };
    json!({
        "request": edits(&plan.request),
        "response": edits(&plan.response),
        "host": plan.host,
        "path": plan.path.as_ref().map(show_path_edit),
        "redirect": plan.redirect.as_ref().map(|redirect| show_redirect(redirect)),
        "cors": plan.cors.as_ref().map(|cors| json!({ "origins": cors.origins })),
        "mirrors": plan.mirrors.iter().map(|mirror| json!({
            "namespace": &*mirror.backend.namespace,
            "service": &*mirror.backend.service,
            "port": mirror.backend.port,
            "share": mirror.share,
        })).collect::<Vec<_>>(),
    })
}

fn show_health_check(check: &HealthCheck) -> Value {
    json!({
        "probe": match &check.probe {
            HealthProbe::Http { path, .. } => format!("GET {path}"),
            HealthProbe::Grpc { service } => format!("gRPC {service}"),
            HealthProbe::Tcp => "TCP".to_owned(),
        },
        "interval_ms": millis(check.interval),
        "timeout_ms": millis(check.timeout),
        "unhealthy_threshold": check.unhealthy_threshold,
        "healthy_threshold": check.healthy_threshold,
    })
}

fn show_connection(connection: &ConnectionPolicy) -> Value {
    json!({
        "max_requests": connection.max_requests,
        "idle_timeout_ms": connection.idle_timeout.map(millis),
        "keepalive": connection.keepalive.map(|keepalive| json!({
            "time_ms": millis(keepalive.after),
            "interval_ms": millis(keepalive.interval),
            "probes": keepalive.probes,
        })),
        "stream_window": connection.stream_window,
        "connection_window": connection.connection_window,
    })
}

fn show_session(session: &Session) -> Value {
    json!({
        "name": session.spelling,
        "in": match session.place {
            Place::Cookie { .. } => "cookie",
            Place::Header => "header",
        },
        "permanent": matches!(session.place, Place::Cookie { permanent: true, .. }),
        "absolute_timeout_ms": session.absolute.map(millis),
        "idle_timeout_ms": session.idle.map(millis),
    })
}

fn show_backend(backend: &Backend) -> Value {
    let policy = &backend.policy;
    let set = backend.endpoints.current.load();
    json!({
        "namespace": &*backend.namespace,
        "service": &*backend.service,
        "port": backend.port,
        "algorithm": policy.algorithm.as_str_name(),
        "hash_key": policy.hash_key.as_ref().map(|key| match key {
            HashKey::Header(name) => json!({ "header": name }),
            HashKey::Cookie(name) => json!({ "cookie": name }),
            HashKey::SourceAddress => json!("source_address"),
        }),
        "slow_start_ms": policy.slow_start.map(millis),
        "zone_threshold_percent": policy.zone_threshold,
        "connect_timeout_ms": millis(policy.connect_timeout),
        "connection": (policy.connection != ConnectionPolicy::default())
            .then(|| show_connection(&policy.connection)),
        "limits": {
            "max_connections": policy.max_connections,
            "max_requests": policy.max_requests,
            "max_pending_requests": policy.max_pending_requests,
        },
        "outlier_detection": policy.outlier.as_ref().map(|outlier| json!({
            "consecutive_gateway_errors": outlier.consecutive_gateway_errors,
            "consecutive_5xx": outlier.consecutive_5xx,
            "success_rate_threshold_percent": outlier.success_rate_threshold,
            "base_ejection_ms": millis(outlier.base_ejection),
            "max_ejection_percent": outlier.max_ejection_percent,
        })),
        "health_check": policy.health_check.as_ref().map(|check| show_health_check(check)),
        "retry_constraint": policy.retry_constraint.as_ref().map(|constraint| json!({
            "percent": constraint.percent,
            "interval_ms": millis(constraint.interval),
            "floor": constraint.floor,
        })),
        "node_local": set.node_local,
        "endpoints": (0u32..).zip(&set.endpoints).map(|(index, info)| json!({
            "address": info.address.to_string(),
            "workload": &*info.workload,
            "identity": info.identity.as_ref().map(|id| id.to_string()),
            "zone": &*info.zone,
            "near": set.near.contains(&index),
            "weight": info.weight,
            "state": state_of(info).as_str(),
        })).collect::<Vec<_>>(),
    })
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::Workload;
    use crate::testing;

    /// What is known is looked at now and then; until the application has ended nothing comes of it.
    #[tokio::test(start_paused = true)]
    async fn the_proxy_ends_with_its_application() {
        let worker = testing::worker(None);
        let (stage, mut told) = watch::channel(Stage::Running);
        let introspection = Arc::new(Introspection {
            config: worker.config.clone(),
            directory: worker.directory.clone(),
            identity: worker.identity.clone(),
            registry: Registry::new(),
            stage: stage.clone(),
        });
        let (export, _exporting) = watch::channel(ExportConfig::default());
        tokio::spawn(introspection.watch(export));
        let of = |application_ended| Workload {
            application_ended,
            ..Workload::default()
        };
        worker.directory.set_workload(of(false));
        tokio::time::sleep(LOOK * 4).await;
        assert_eq!(*told.borrow_and_update(), Stage::Running);
        worker.directory.set_workload(of(true));
        told.changed().await.unwrap();
        assert_eq!(*told.borrow_and_update(), Stage::Draining);
        // It is told once, and nothing takes it back from cutting to draining.
        stage.send_replace(Stage::Cutting);
        told.borrow_and_update();
        tokio::time::sleep(LOOK * 4).await;
        assert_eq!(*told.borrow(), Stage::Cutting);
        assert!(!told.has_changed().unwrap());
    }
}
