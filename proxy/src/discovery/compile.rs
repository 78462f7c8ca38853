//! From what the control plane sends to the tables the workers read. Pure: no I/O, no clock.
//!
//! Everything is checked before anything is built. An error is a sentence that goes back as the
//! reason of the NACK; the last good table stays.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method};
use weft_api::proto;

use super::backend::backend_policy;
use super::connection;
use super::filters::{self, PlanDraft};
use super::matches::route_match;
use super::provenance::Provenance;
use super::resilience;
use super::sessions;
use crate::balance::SharedLimits;
use crate::dns;
use crate::http::route::Index;
use crate::http::session::ShareSession;
use crate::tables::{
    Backend, BackendPolicy, Check, Cors, Destination, EndpointsCell, Fallback, OpaqueRoute, Probe,
    Redirect, RetryPolicy, Route, RouteMatch, RoutePolicy, Share, Workload, WorkloadPort, fresh_id,
};

/// Longest duration taken, milliseconds: 31 days. Longer ones are mistakes, and sums of an instant
/// and a huge duration overflow.
const MAX_MS: u64 = 31 * 24 * 3600 * 1000;
/// Largest weight of a backend or endpoint: sums of them stay far from overflowing.
const MAX_WEIGHT: u32 = 1_000_000;
/// Routes of a destination; matches of a route; backends of a route.
const MAX_ROUTES: usize = 1024;
const MAX_MATCHES: usize = 256;
const MAX_BACKENDS: usize = 256;
/// Tries after the first.
const MAX_ATTEMPTS: u32 = 25;
/// Bytes of a request's body kept for another try.
const DEFAULT_RETRY_BODY: u64 = 64 * 1024;
const MAX_RETRY_BODY: u64 = 16 * 1024 * 1024;
/// Bytes of a fallback's body.
const MAX_FALLBACK_BODY: usize = 1024 * 1024;
const DEFAULT_BACKOFF_BASE: Duration = Duration::from_millis(25);
const DEFAULT_BACKOFF_MAX: Duration = Duration::from_millis(250);

/// Why a resource is refused: a sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(pub String);

macro_rules! refuse {
    ($($text:tt)*) => { return Err($crate::discovery::compile::Invalid(format!($($text)*))) };
}
pub(super) use refuse;

pub(super) type Result<T> = std::result::Result<T, Invalid>;

/// What tells one backend from another across recompilations.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BackendKey {
    pub namespace: Arc<str>,
    pub service: Arc<str>,
    pub port: u16,
    pub endpoints: Arc<str>,
}

/// What compiled destinations share with one another and with their predecessors.
pub trait Links {
    /// The cell of an Endpoints resource, made empty when it is new.
    fn endpoints(&mut self, name: &str) -> Arc<EndpointsCell>;
    /// The counters of a backend, made new when nobody has them.
    fn limits(&mut self, key: BackendKey) -> Arc<SharedLimits>;
}

/// Compiles a destination. `links` is asked only once the whole resource has been found good.
pub fn destination(given: &proto::Destination, links: &mut dyn Links) -> Result<Destination> {
    if given.namespace.is_empty() || given.service.is_empty() {
        refuse!("the destination names no namespace or no service");
    }
    if given.routes.len() > MAX_ROUTES {
        refuse!(
            "the destination has {} routes; at most {MAX_ROUTES} are taken",
            given.routes.len()
        );
    }
    let port = port(given.port, "the destination")?;
    let protocol = known::<proto::Protocol>(given.protocol, "protocol")?;
    let mut drafts = Vec::with_capacity(given.routes.len());
    for (index, route) in given.routes.iter().enumerate() {
        let draft = draft_route(route)
            .map_err(|Invalid(why)| Invalid(format!("route {index} ('{}'): {why}", route.name)))?;
        drafts.push(draft);
    }
    let mut opaque = Vec::with_capacity(given.opaque.len());
    for (index, given) in given.opaque.iter().enumerate() {
        let within = |why: Invalid| Invalid(format!("opaque route {index}: {why}"));
        let Some(route) = &given.route else {
            refuse!("opaque route {index} is empty");
        };
        let names = given.server_names.iter();
        let names: Vec<Box<str>> = names.map(|name| name.to_ascii_lowercase().into()).collect();
        opaque.push((names, draft_route(route).map_err(within)?));
    }
    let mut backends = Backends {
        links,
        built: Vec::new(),
    };
    let routes: Vec<Arc<Route>> = drafts
        .into_iter()
        .map(|draft| Arc::new(draft.build(&mut backends)))
        .collect();
    let opaque = opaque
        .into_iter()
        .map(|(server_names, draft)| OpaqueRoute {
            server_names,
            route: Arc::new(draft.build(&mut backends)),
        })
        .collect();
    Ok(Destination {
        provenance: Provenance::collect(given, &backends.built),
        index: Index::new(&routes),
        opaque,
        fed: backends
            .built
            .iter()
            .any(|(_, b)| b.endpoints.feed.is_some()),
        prohibited: false,
        id: fresh_id(),
        namespace: given.namespace.as_str().into(),
        service: given.service.as_str().into(),
        port,
        protocol,
        routes,
    })
}

/// Names of the Endpoints that a compiled destination reads, each once, without those that the
/// proxy finds out itself.
pub fn endpoint_names(destination: &Destination) -> Vec<Arc<str>> {
    let mut names: Vec<Arc<str>> = destination
        .all_routes()
        .flat_map(|route| route.all_backends())
        .map(|backend| backend.endpoints.name.clone())
        .filter(|name| !dns::is_local(name))
        .collect();
    names.sort();
    names.dedup();
    names
}

/// A route that has been checked; its backends are not linked yet.
struct RouteDraft<'a> {
    given: &'a proto::Route,
    matches: Vec<RouteMatch>,
    backends: Vec<ShareDraft<'a>>,
    sessions: Vec<Option<ShareSession>>,
    total_weight: u32,
    policy: RoutePolicy,
    fallback: Option<FallbackDraft<'a>>,
    redirect: Option<Box<Redirect>>,
    cors: Option<Box<Cors>>,
}

struct ShareDraft<'a> {
    weight: u32,
    /// Or why there is none.
    backend: std::result::Result<BackendDraft<'a>, Box<str>>,
    plan: Option<PlanDraft<'a>>,
}

pub(super) struct BackendDraft<'a> {
    given: &'a proto::Backend,
    port: u16,
    policy: BackendPolicy,
}

enum FallbackDraft<'a> {
    Response(Fallback),
    Backend(Box<BackendDraft<'a>>),
}

/// Backends of one destination: routes that name the same one share it, and what is learnt of it.
pub(super) struct Backends<'a, 'l> {
    links: &'l mut dyn Links,
    built: Vec<(&'a proto::Backend, Arc<Backend>)>,
}

impl<'a> Backends<'a, '_> {
    pub(super) fn get(&mut self, draft: BackendDraft<'a>) -> Arc<Backend> {
        if let Some((_, backend)) = self.built.iter().find(|(given, _)| *given == draft.given) {
            return backend.clone();
        }
        let endpoints = self.links.endpoints(&draft.given.endpoints);
        let key = BackendKey {
            namespace: draft.given.namespace.as_str().into(),
            service: draft.given.service.as_str().into(),
            port: draft.port,
            endpoints: endpoints.name.clone(),
        };
        let backend = Arc::new(Backend {
            id: fresh_id(),
            namespace: key.namespace.clone(),
            service: key.service.clone(),
            port: key.port,
            limits: self.links.limits(key),
            endpoints,
            policy: draft.policy,
        });
        self.built.push((draft.given, backend.clone()));
        backend
    }
}

impl<'a> RouteDraft<'a> {
    fn build(self, backends: &mut Backends<'a, '_>) -> Route {
        let sessions = self.sessions.iter().any(Option::is_some);
        let fallback = self.fallback.map(|draft| {
            Arc::new(match draft {
                FallbackDraft::Response(response) => response,
                FallbackDraft::Backend(backend) => Fallback::Backend(backends.get(*backend)),
            })
        });
        Route {
            id: fresh_id(),
            name: self.given.name.as_str().into(),
            matches: self.matches,
            backends: self
                .backends
                .into_iter()
                .zip(self.sessions)
                .map(|(draft, session)| Share {
                    weight: draft.weight,
                    backend: draft.backend.map(|backend| backends.get(backend)),
                    plan: draft.plan.map(|plan| Arc::new(plan.build(backends))),
                    session,
                })
                .collect(),
            total_weight: self.total_weight,
            policy: RoutePolicy {
                fallback,
                ..self.policy
            },
            refused: (!self.given.refused.is_empty()).then(|| self.given.refused.as_str().into()),
            redirect: self.redirect,
            cors: self.cors,
            sessions,
        }
    }
}

fn draft_route(given: &proto::Route) -> Result<RouteDraft<'_>> {
    if given.matches.len() > MAX_MATCHES {
        refuse!("it has more than {MAX_MATCHES} matches");
    }
    if given.backends.len() > MAX_BACKENDS {
        refuse!("it has more than {MAX_BACKENDS} backends");
    }
    let matches = given
        .matches
        .iter()
        .map(route_match)
        .collect::<Result<_>>()?;
    let mut backends = Vec::with_capacity(given.backends.len());
    for weighted in &given.backends {
        let backend = match (&weighted.backend, weighted.refused.as_str()) {
            (_, why) if !why.is_empty() => Err(why.into()),
            (Some(inner), _) => Ok(draft_backend(inner)?),
            (None, _) => refuse!("a weighted backend names no backend"),
        };
        backends.push(ShareDraft {
            weight: weight(weighted.weight)?,
            backend,
            plan: filters::plan(&given.filters, &weighted.filters)?,
        });
    }
    // At most MAX_BACKENDS * MAX_WEIGHT: fits.
    let total_weight = backends.iter().map(|share| share.weight).sum();
    let (policy, fallback) = match &given.policy {
        None => (RoutePolicy::default(), None),
        Some(policy) => route_policy(policy)?,
    };
    let sessions = sessions::of_shares(given)?;
    Ok(RouteDraft {
        given,
        matches,
        sessions,
        backends,
        total_weight,
        policy,
        fallback,
        redirect: filters::redirect(&given.filters)?,
        cors: filters::cors(&given.filters)?,
    })
}

/// The fallback apart: its backend is not linked yet.
fn route_policy(given: &proto::RoutePolicy) -> Result<(RoutePolicy, Option<FallbackDraft<'_>>)> {
    let fallback = match &given.fallback {
        None => None,
        Some(fallback) => draft_fallback(fallback)?,
    };
    let policy = RoutePolicy {
        request_timeout: duration(given.request_timeout_ms, "the request timeout")?,
        per_try_timeout: duration(given.per_try_timeout_ms, "the per-try timeout")?,
        idle_timeout: duration(given.idle_timeout_ms, "the idle timeout")?,
        stream_idle_timeout: duration(
            given
                .stream_idle_timeout_ms
                .unwrap_or(given.idle_timeout_ms),
            "the idle timeout of streams",
        )?,
        retry: given.retry.as_ref().map(retry).transpose()?.map(Arc::new),
        fallback: None,
        hedge_after: match given.retry {
            Some(_) => duration(given.hedge_after_ms, "the delay of hedging")?,
            None => None,
        },
        fault: match &given.fault_injection {
            None => None,
            Some(fault) => Some(Box::new(resilience::fault(fault)?)),
        },
    };
    Ok((policy, fallback))
}

pub(super) fn draft_backend(given: &proto::Backend) -> Result<BackendDraft<'_>> {
    if given.endpoints.is_empty() {
        refuse!(
            "backend {}/{} names no endpoints",
            given.namespace,
            given.service
        );
    }
    let within = |Invalid(why)| {
        Invalid(format!(
            "backend {}/{}:{}: {why}",
            given.namespace, given.service, given.port
        ))
    };
    dns::parts(&given.endpoints).map_err(|wrong| within(Invalid(wrong.to_string())))?;
    Ok(BackendDraft {
        given,
        port: port(given.port, "it").map_err(within)?,
        policy: given
            .policy
            .as_ref()
            .map_or_else(|| Ok(BackendPolicy::default()), backend_policy)
            .map_err(within)?,
    })
}

fn draft_fallback(given: &proto::Fallback) -> Result<Option<FallbackDraft<'_>>> {
    use proto::fallback::Action;
    Ok(match &given.action {
        None => None,
        Some(Action::Backend(backend)) => {
            Some(FallbackDraft::Backend(Box::new(draft_backend(backend)?)))
        }
        Some(Action::Response(response)) => {
            let status = match u16::try_from(response.status) {
                Ok(status @ 200..=599) => status,
                _ => refuse!(
                    "the fallback's status {} is not between 200 and 599",
                    response.status
                ),
            };
            if response.body.len() > MAX_FALLBACK_BODY {
                refuse!("the fallback's body is larger than 1 MiB");
            }
            let mut headers = Vec::with_capacity(response.headers.len());
            for header in &response.headers {
                let name = header_name(&header.name)?;
                // These say where the message ends; that is the proxy's to say.
                if matches!(
                    &*name,
                    "content-length" | "transfer-encoding" | "connection" | "upgrade" | "trailer"
                ) {
                    refuse!("the fallback may not set the header '{name}'");
                }
                // The spelling stays: it is what the client will see.
                let value = header_value(&header.name, &header.value)?;
                headers.push((header.name.as_str().into(), value));
            }
            Some(FallbackDraft::Response(Fallback::Response {
                status,
                headers,
                body: bytes::Bytes::from(response.body.to_vec()),
            }))
        }
    })
}

fn retry(given: &proto::RetryPolicy) -> Result<RetryPolicy> {
    if given.attempts > MAX_ATTEMPTS {
        refuse!(
            "{} retries are asked for; at most {MAX_ATTEMPTS} are taken",
            given.attempts
        );
    }
    let status_codes = given
        .status_codes
        .iter()
        .map(|&code| match u16::try_from(code) {
            Ok(code @ 200..=599) => Ok(code),
            _ => refuse!("{code} is not a status of a final response (200 to 599)"),
        })
        .collect::<Result<_>>()?;
    if let Some(code) = given.grpc_codes.iter().find(|code| **code > 16) {
        refuse!("{code} is not a gRPC status code (0 to 16)");
    }
    let base =
        duration(given.backoff_base_ms, "the retry backoff")?.unwrap_or(DEFAULT_BACKOFF_BASE);
    let max = duration(given.backoff_max_ms, "the largest retry backoff")?
        .unwrap_or(DEFAULT_BACKOFF_MAX.max(base));
    if max < base {
        refuse!("the largest retry backoff is less than the first");
    }
    let max_body = match given.max_body_bytes {
        0 => DEFAULT_RETRY_BODY,
        bytes if bytes <= MAX_RETRY_BODY => bytes,
        bytes => refuse!("{bytes} bytes of body are to be kept for retries; at most 16 MiB are"),
    };
    Ok(RetryPolicy {
        attempts: given.attempts,
        status_codes,
        grpc_codes: given.grpc_codes.clone(),
        connect_failure: given.connect_failure,
        refused_stream: given.refused_stream,
        reset: given.reset,
        timeout: given.timeout,
        methods: given
            .methods
            .iter()
            .map(|m| method(m))
            .collect::<Result<_>>()?,
        backoff_base: base,
        backoff_max: max,
        max_body: usize::try_from(max_body).unwrap_or(usize::MAX),
        budget_percent: percent(given.budget_percent, "the retry budget")?,
        budget_min_per_second: given.budget_min_per_second,
    })
}

/// Compiles the proxy's own workload, asked for as `<namespace>/<name>`. Rate limits that stay (of
/// the same Service, by the same key) keep the buckets that they have in `before`.
pub fn workload(given: &proto::Workload, asked: &str, before: &Workload) -> Result<Workload> {
    let shown = format!("{}/{}", given.namespace, given.name);
    if shown != asked {
        refuse!("it is workload {shown}, but {asked} was asked for");
    }
    let telemetry = given.telemetry.clone().unwrap_or_default();
    if telemetry.sampling_per_myriad > 10_000 {
        refuse!(
            "a sampling share of {}/10000 is more than all",
            telemetry.sampling_per_myriad
        );
    }
    let otlp = telemetry.otlp_endpoint;
    if !otlp.is_empty() {
        let uri: Option<http::Uri> = otlp.parse().ok();
        if !uri
            .is_some_and(|u| matches!(u.scheme_str(), Some("http" | "https")) && u.host().is_some())
        {
            refuse!("the OTLP endpoint '{otlp}' is not an http:// or https:// URL");
        }
    }
    let mut ports = Vec::with_capacity(given.ports.len());
    for declared in &given.ports {
        let number = port(declared.port, "the workload")?;
        if ports.iter().any(|p: &WorkloadPort| p.port == number) {
            refuse!("port {number} is declared twice");
        }
        ports.push(WorkloadPort {
            port: number,
            protocol: known::<proto::Protocol>(declared.protocol, "protocol")?,
            mtls: declared
                .mtls
                .map(|mode| known::<proto::MtlsMode>(mode, "mTLS mode"))
                .transpose()?,
            limits: resilience::port_limits(declared, before.limits(number).as_deref())
                .map_err(|Invalid(why)| Invalid(format!("port {number}: {why}")))?
                .map(Arc::new),
            connection: connection::settings(declared.connection.as_ref())
                .map_err(|Invalid(why)| Invalid(format!("port {number}: {why}")))?,
        });
    }
    let mut probes = Vec::with_capacity(given.probes.len());
    for probe in &given.probes {
        let check = match &probe.check {
            Some(proto::probe::Check::HttpPath(path)) => Check::Http(path.as_str().into()),
            Some(proto::probe::Check::Tcp(_)) => Check::Tcp,
            Some(proto::probe::Check::Grpc(_)) => Check::Grpc,
            // A newer control plane's: it is refused here as everything else is.
            None => continue,
        };
        probes.push(Probe {
            port: port(probe.port, "a probe")?,
            check,
        });
    }
    Ok(Workload {
        namespace: given.namespace.as_str().into(),
        name: given.name.as_str().into(),
        display_name: match given.display_name.as_str() {
            "" => given.name.as_str().into(),
            name => name.into(),
        },
        service_account: given.service_account.as_str().into(),
        zone: given.zone.as_str().into(),
        node: given.node.as_str().into(),
        mtls: known::<proto::MtlsMode>(given.mtls, "mTLS mode")?,
        ports,
        sampling_per_myriad: telemetry.sampling_per_myriad,
        access_log: known::<proto::AccessLog>(telemetry.access_log, "access log mode")?,
        otlp_endpoint: (!otlp.is_empty()).then_some(otlp),
        probes,
        application_ended: given.application_ended,
    })
}

/// A value of an enumeration this proxy knows. A newer control plane may know more: taking such a
/// value for the default would change traffic silently.
pub(super) fn known<E: TryFrom<i32>>(value: i32, what: &str) -> Result<E> {
    E::try_from(value).map_err(|_| {
        Invalid(format!(
            "{what} {value} is not known to this version of the proxy"
        ))
    })
}

fn port(given: u32, whose: &str) -> Result<u16> {
    match u16::try_from(given) {
        Ok(port) if port != 0 => Ok(port),
        _ => refuse!("{whose} has port {given}, which is not between 1 and 65535"),
    }
}

pub(super) fn weight(given: u32) -> Result<u32> {
    if given > MAX_WEIGHT {
        refuse!("a weight of {given} is above {MAX_WEIGHT}");
    }
    Ok(given)
}

pub(super) fn percent(given: u32, what: &str) -> Result<u32> {
    if given > 100 {
        refuse!("{what} of {given} percent is above 100");
    }
    Ok(given)
}

pub(super) fn duration(ms: u64, what: &str) -> Result<Option<Duration>> {
    if ms > MAX_MS {
        refuse!("{what} of {ms} ms is above 31 days");
    }
    Ok((ms != 0).then(|| Duration::from_millis(ms)))
}

pub(super) fn method(name: &str) -> Result<Box<str>> {
    match Method::from_bytes(name.as_bytes()) {
        Ok(_) => Ok(name.into()),
        Err(_) => refuse!("'{name}' is not a method"),
    }
}

pub(super) fn absolute(path: &str) -> Result<&str> {
    if !path.starts_with('/') || path.contains(['?', '#']) || !path.is_ascii() {
        refuse!("'{path}' is not a path to match (ASCII, begins with /, no query)");
    }
    Ok(path)
}

pub(super) fn header_name(name: &str) -> Result<Box<str>> {
    match HeaderName::from_bytes(name.as_bytes()) {
        Ok(name) => Ok(name.as_str().into()),
        Err(_) => refuse!("'{name}' is not a header's name"),
    }
}

pub(super) fn header_value(name: &str, value: &str) -> Result<Box<str>> {
    match HeaderValue::from_str(value) {
        Ok(_) => Ok(value.into()),
        Err(_) => refuse!("the value of header '{name}' holds what a header cannot"),
    }
}
