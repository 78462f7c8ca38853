//! The most specific policy wins, field by field.

use weft_api::policy::connection::{Connection, Http2, KeepAlive};
use weft_api::policy::health::HealthCheck;
use weft_api::policy::traffic::{
    Algorithm, Backoff, CircuitBreaker, Fallback, FallbackBackend, HashKey, Limits, LoadBalancer,
    OutlierDetection, Retries, RetryBudget, RetryCondition, TargetKind, TargetRef, Timeouts,
    TrafficPolicySpec,
};
use weft_api::policy::{Duration, Percent};
use weft_api::proto;

use super::destination::route_policy;
use super::provenance::{self, Sources};
use super::resilience;
use super::{connection, health, session};
use crate::model::{
    BackendTraffic, Name, Policy, Route, RouteKind, Rule, Service, ServicePort, World, in_namespace,
};

/// Fewer well endpoints than this share: all are used. Percent.
const PANIC_THRESHOLD_PERCENT: u32 = 50;
/// Less of its part than this that a zone can take: all zones are used. Percent.
const ZONE_THRESHOLD_PERCENT: u32 = 70;
/// Gateway errors in a row that take an endpoint out.
const CONSECUTIVE_GATEWAY_ERRORS: u32 = 5;
const OUTLIER_INTERVAL_MS: u64 = 10_000;
const BASE_EJECTION_MS: u64 = 30_000;
const MAX_EJECTION_MS: u64 = 300_000;
const MAX_EJECTION_PERCENT: u32 = 50;
const CONNECT_TIMEOUT_MS: u64 = 5_000;
const RETRY_ATTEMPTS: u32 = 2;
const BACKOFF_BASE_MS: u64 = 25;
const BACKOFF_MAX_MS: u64 = 250;
const RETRY_BODY_BYTES: u64 = 64 << 10;
const BUDGET_PERCENT: u32 = 20;
const BUDGET_MIN_PER_SECOND: u32 = 10;

/// What holds for a Service port.
pub(super) struct Effective {
    pub(super) route: proto::RoutePolicy,
    pub(super) backend: proto::BackendPolicy,
    /// A fallback backend, which the caller compiles; `route.fallback` is then unset.
    pub(super) fallback_backend: Option<FallbackTarget>,
}

pub(super) struct FallbackTarget {
    pub(super) service: Name,
    pub(super) port: u16,
}

/// How specific a policy is about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    Namespace,
    Service,
    Port,
    /// The route that it takes.
    Route,
    /// The rule of that route.
    Rule,
}

impl Level {
    /// Most specific first.
    pub(super) const ALL: [Self; 5] = [
        Self::Rule,
        Self::Route,
        Self::Port,
        Self::Service,
        Self::Namespace,
    ];
}

/// Whether a target is this port, and how specifically.
pub(super) fn level(target: &TargetRef, service: &Service, port: &ServicePort) -> Option<Level> {
    let kind = match service.external {
        true => TargetKind::ExternalService,
        false => TargetKind::Service,
    };
    if target.kind != kind || target.name != service.name.name {
        return None;
    }
    match &target.section_name {
        None => Some(Level::Service),
        Some(section) => is_port(section, port).then_some(Level::Port),
    }
}

/// Whether a `sectionName` means this port, by name or number.
pub(super) fn is_port(section: &str, port: &ServicePort) -> bool {
    section == port.name || section.parse() == Ok(port.port)
}

/// Of the policies of a namespace that `is_meant` takes, the oldest, then the first by name.
fn oldest<'a>(
    world: &'a World,
    namespace: &str,
    is_meant: impl Fn(&TrafficPolicySpec) -> bool,
) -> Option<&'a Policy<TrafficPolicySpec>> {
    in_namespace(&world.traffic, namespace)
        .filter(|policy| is_meant(&policy.spec))
        .min_by(|a, b| a.precedence().cmp(&b.precedence()))
}

/// The default of a namespace.
pub(super) fn default_winner<'a>(
    world: &'a World,
    namespace: &str,
) -> Option<&'a Policy<TrafficPolicySpec>> {
    oldest(world, namespace, TrafficPolicySpec::is_default)
}

/// The policy that holds for a route, or for the rule `section` of it.
pub(super) fn route_winner<'a>(
    world: &'a World,
    route: &Route,
    section: Option<&str>,
) -> Option<&'a Policy<TrafficPolicySpec>> {
    let kind = match route.kind {
        RouteKind::Http => TargetKind::HTTPRoute,
        RouteKind::Grpc => TargetKind::GRPCRoute,
        RouteKind::Tls | RouteKind::Tcp => return None,
    };
    let is_meant = |target: &TargetRef| {
        target.kind == kind
            && target.name == route.name.name
            && target.section_name.as_deref() == section
    };
    oldest(world, &route.name.namespace, |spec| {
        spec.target_refs.iter().any(is_meant)
    })
}

/// The policy that holds for a port on the level of a Service or its port.
pub(super) fn winner<'a>(
    world: &'a World,
    service: &Service,
    port: &ServicePort,
    wanted: Level,
) -> Option<&'a Policy<TrafficPolicySpec>> {
    oldest(world, &service.name.namespace, |spec| {
        let mut levels = spec.target_refs.iter();
        levels.any(|target| level(target, service, port) == Some(wanted))
    })
}

/// The policy that holds on one level.
fn on_level<'a>(
    world: &'a World,
    service: &Service,
    port: &ServicePort,
    of: Option<(&Route, &Rule)>,
    wanted: Level,
) -> Option<&'a Policy<TrafficPolicySpec>> {
    match wanted {
        Level::Namespace => default_winner(world, &service.name.namespace),
        Level::Service | Level::Port => winner(world, service, port, wanted),
        Level::Route => route_winner(world, of?.0, None),
        Level::Rule => route_winner(world, of?.0, Some(of?.1.name.as_deref()?)),
    }
}

/// The XBackendTrafficPolicy that holds for a Service.
pub(super) fn of_service<'a>(world: &'a World, service: &Name) -> Option<&'a BackendTraffic> {
    in_namespace(&world.backend_traffic, &service.namespace)
        .filter(|policy| policy.holds_for(service))
        .min_by(|a, b| a.precedence().cmp(&b.precedence()))
}

/// The TrafficPolicy for a Service or its port that sets a retry budget: it goes before an
/// XBackendTrafficPolicy's.
pub(super) fn budget_of<'a>(
    world: &'a World,
    service: &Service,
    port: &ServicePort,
) -> Option<&'a Name> {
    [Level::Port, Level::Service].into_iter().find_map(|level| {
        let policy = winner(world, service, port, level)?;
        let budget = policy.spec.retries.as_ref()?.budget;
        budget.is_some().then_some(&policy.name)
    })
}

/// Merges the policies of a port, or of a rule's requests to it, most specific first; and who says
/// what of it.
pub(super) fn merged(
    world: &World,
    service: &Service,
    port: &ServicePort,
    of: Option<(&Route, &Rule)>,
) -> (TrafficPolicySpec, Sources) {
    let mut merged = TrafficPolicySpec::default();
    let mut sources = Sources::default();
    for level in Level::ALL {
        if let Some(policy) = on_level(world, service, port, of, level) {
            let mut fields = Vec::new();
            policy.spec.fields("", &mut fields);
            let target = provenance::target(level, service, port, of);
            sources.push(format!("TrafficPolicy {}", policy.name), target, fields);
            let mut spec = policy.spec.clone();
            if let Some(breaker) = &mut spec.circuit_breaker
                && let Some(Fallback::Backend(backend)) = &mut breaker.fallback
            {
                // By default the policy's own, which need not be the Service's.
                let namespace = &policy.name.namespace;
                backend.namespace.get_or_insert_with(|| namespace.clone());
            }
            merged.inherit(&spec);
        }
    }
    (merged, sources)
}

/// What holds for the callers of a port, or those of them that take a rule.
pub(super) fn effective(
    world: &World,
    service: &Service,
    port: &ServicePort,
    of: Option<(&Route, &Rule)>,
) -> Effective {
    let (mut merged, mut sources) = merged(world, service, port, of);
    if service.client_affinity {
        // `sessionAffinity: ClientIP`, where no policy says how to choose.
        let fields = vec!["loadBalancer.algorithm".to_owned()];
        let name = format!("Service {}", service.name);
        sources.push(name, "sessionAffinity ClientIP".to_owned(), fields);
        let balancer = merged.load_balancer.get_or_insert_default();
        if balancer.algorithm.is_none() {
            balancer.algorithm = Some(Algorithm::RingHash);
            balancer.hash_key = Some(HashKey::SourceAddress(true));
        }
    }
    let breaker = merged.circuit_breaker.clone().unwrap_or_default();
    let mut route = route(&merged);
    route.provenance = sources.of(provenance::is_of_route);
    let mut fallback_backend = None;
    match breaker.fallback {
        Some(Fallback::Response(response)) => {
            let action = proto::fallback::Action::Response(proto::FallbackResponse {
                status: u32::from(response.status),
                headers: response
                    .headers
                    .into_iter()
                    .map(|header| proto::Header {
                        name: header.name,
                        value: header.value,
                    })
                    .collect(),
                body: response.body.into_bytes(),
            });
            route.fallback = Some(proto::Fallback {
                action: Some(action),
            });
        }
        Some(Fallback::Backend(FallbackBackend {
            name,
            namespace,
            port,
        })) => {
            let namespace = namespace.unwrap_or_else(|| service.name.namespace.clone());
            fallback_backend = Some(FallbackTarget {
                service: Name::new(namespace, name),
                port,
            });
        }
        None => {}
    }
    let mut backend = backend(&merged);
    backend.provenance = sources.of(provenance::is_of_backend);
    let excluded = |policy: &BackendTraffic| service.client_affinity && policy.session.is_some();
    let named = (!service.external).then(|| of_service(world, &service.name));
    if let Some(policy) = named.flatten().filter(|policy| !excluded(policy)) {
        let of = |field: &str, provenance: &mut Option<proto::Provenance>| {
            let name = format!("XBackendTrafficPolicy {}", policy.name);
            let target = format!("Service {}", service.name.name);
            provenance::below(provenance, name, target, field);
        };
        let session = policy.session.as_ref();
        if session.is_some() {
            of("sessionPersistence", &mut backend.provenance);
        }
        backend.session_persistence = session.map(|given| session::compile(given, false));
        let above = budget_of(world, service, port);
        if policy.retry.is_some() {
            if let Some(above) = above {
                // The budget of the TrafficPolicy holds, which is one of requests.
                let name = format!("TrafficPolicy {above}");
                let target = "retries.budget".to_owned();
                let field = "retryConstraint";
                provenance::below(&mut backend.provenance, name, target, field);
            }
            of("retryConstraint", &mut backend.provenance);
        }
        let constraint = policy.retry.filter(|_| above.is_none());
        backend.retry_constraint = constraint.map(|given| proto::RetryConstraint {
            percent: given.percent,
            interval_ms: given.interval.as_millis(),
            min_count: given.min_count,
            min_interval_ms: given.min_interval.as_millis(),
        });
    }
    Effective {
        route,
        backend,
        fallback_backend,
    }
}

/// What holds for the requests of a route's rule: what the policies of the rule, the route and the
/// parent Service say, and above that what the rule itself says.
pub(super) fn of_rule(
    world: &World,
    service: &Service,
    port: &ServicePort,
    route: &Route,
    rule: &Rule,
) -> proto::RoutePolicy {
    let mut policy = route_policy(world, service, port, Some((route, rule)));
    if let Some(timeout) = rule.request_timeout {
        policy.request_timeout_ms = timeout.as_millis();
    }
    if let Some(timeout) = rule.backend_timeout {
        policy.per_try_timeout_ms = timeout.as_millis();
    }
    if let Some(given) = &rule.retry {
        let retry = policy
            .retry
            .get_or_insert_with(|| self::retry(&Retries::default()));
        // GEP-1731: connections that fail are tried again, and so is a backendRequest timeout.
        retry.connect_failure = true;
        retry.reset = true;
        retry.timeout |= rule.backend_timeout.is_some();
        if !given.codes.is_empty() {
            retry.status_codes = given.codes.iter().map(|code| u32::from(*code)).collect();
        }
        if let Some(attempts) = given.attempts {
            retry.attempts = attempts;
        }
        if let Some(backoff) = given.backoff {
            // It is the least pause (GEP-1731); half of ours is random.
            retry.backoff_base_ms = backoff.as_millis().saturating_mul(2).max(1);
            retry.backoff_max_ms = retry.backoff_max_ms.max(retry.backoff_base_ms);
        }
    }
    policy.session_persistence = rule
        .session
        .as_ref()
        .map(|given| session::compile(given, true));
    let retry = rule.retry.as_ref();
    let said = [
        (rule.request_timeout.is_some(), "timeouts.request"),
        (rule.backend_timeout.is_some(), "timeouts.perTry"),
        (retry.is_some(), "retries.conditions"),
        (
            retry.is_some_and(|retry| !retry.codes.is_empty()),
            "retries.codes",
        ),
        (
            retry.is_some_and(|retry| retry.attempts.is_some()),
            "retries.attempts",
        ),
        (
            retry.is_some_and(|retry| retry.backoff.is_some()),
            "retries.backoff.base",
        ),
        (rule.session.is_some(), "sessionPersistence"),
    ];
    let said: Vec<&str> = said
        .into_iter()
        .filter_map(|(set, field)| set.then_some(field))
        .collect();
    let name = format!("{} {}", route.kind.name(), route.name);
    let target = match &rule.name {
        Some(rule) => format!("its rule {rule}"),
        None => "its own rule".to_owned(),
    };
    policy.provenance = provenance::above(policy.provenance.take(), name, target, &said);
    policy
}

/// What holds for requests when no policy says anything.
pub(super) fn default_route() -> proto::RoutePolicy {
    route(&TrafficPolicySpec::default())
}

/// What holds for a backend when no policy says anything.
pub(super) fn default_backend() -> proto::BackendPolicy {
    backend(&TrafficPolicySpec::default())
}

/// What holds for one workload addressed directly when no policy says anything.
pub(super) fn direct_backend() -> proto::BackendPolicy {
    direct(default_backend())
}

/// A Service's policy for one workload addressed directly: there is nothing to choose from, so
/// nothing is ejected, and nobody is asked.
pub(super) fn direct(policy: proto::BackendPolicy) -> proto::BackendPolicy {
    proto::BackendPolicy {
        outlier_detection: None,
        health_check: None,
        provenance: policy.provenance.and_then(|given| {
            let moot = ["circuitBreaker.outlierDetection.", "healthCheck."];
            provenance::without(given, |field| {
                moot.iter().any(|begin| field.starts_with(begin))
            })
        }),
        ..policy
    }
}

fn millis(given: Option<Duration>) -> u64 {
    given.map_or(0, Duration::as_millis)
}

fn route(spec: &TrafficPolicySpec) -> proto::RoutePolicy {
    let timeouts = spec.timeouts.unwrap_or_default();
    proto::RoutePolicy {
        request_timeout_ms: millis(timeouts.request),
        per_try_timeout_ms: millis(timeouts.per_try),
        idle_timeout_ms: millis(timeouts.idle),
        retry: spec.retries.as_ref().map(retry),
        fallback: None,
        fault_injection: spec.fault_injection.as_ref().map(resilience::fault),
        hedge_after_ms: spec
            .retries
            .as_ref()
            .and_then(|retries| retries.hedging)
            .map_or(0, |hedging| hedging.delay.as_millis()),
        stream_idle_timeout_ms: timeouts.stream.map(Duration::as_millis),
        ..proto::RoutePolicy::default()
    }
}

fn retry(retries: &Retries) -> proto::RetryPolicy {
    let default_on = [
        RetryCondition::ConnectFailure,
        RetryCondition::RefusedStream,
        RetryCondition::Reset,
    ];
    let on = retries.on.as_deref().unwrap_or(&default_on);
    let backoff = retries.backoff.unwrap_or_default();
    let budget = retries.budget.unwrap_or_default();
    let base = backoff.base.map_or(BACKOFF_BASE_MS, Duration::as_millis);
    proto::RetryPolicy {
        attempts: retries.attempts.unwrap_or(RETRY_ATTEMPTS),
        status_codes: retries
            .codes
            .iter()
            .flatten()
            .map(|code| u32::from(*code))
            .collect(),
        grpc_codes: retries
            .grpc_codes
            .iter()
            .flatten()
            .map(|code| *code as u32)
            .collect(),
        connect_failure: on.contains(&RetryCondition::ConnectFailure),
        refused_stream: on.contains(&RetryCondition::RefusedStream),
        reset: on.contains(&RetryCondition::Reset),
        timeout: on.contains(&RetryCondition::Timeout),
        methods: retries.methods.clone().unwrap_or_default(),
        backoff_base_ms: base,
        // A base written alone may be above the default maximum.
        backoff_max_ms: backoff
            .max
            .map_or(BACKOFF_MAX_MS, Duration::as_millis)
            .max(base),
        max_body_bytes: retries.max_body_bytes.unwrap_or(RETRY_BODY_BYTES),
        budget_percent: budget.percent.map_or(BUDGET_PERCENT, Percent::get),
        budget_min_per_second: budget.min_per_second.unwrap_or(BUDGET_MIN_PER_SECOND),
    }
}

fn backend(spec: &TrafficPolicySpec) -> proto::BackendPolicy {
    let breaker = spec.circuit_breaker.clone().unwrap_or_default();
    let limits = breaker.limits.unwrap_or_default();
    proto::BackendPolicy {
        load_balancer: Some(load_balancer(
            &spec.load_balancer.clone().unwrap_or_default(),
        )),
        limits: Some(proto::Limits {
            max_connections: limits.max_connections.unwrap_or(0),
            max_requests: limits.max_requests.unwrap_or(0),
            max_pending_requests: limits.max_pending_requests.unwrap_or(0),
        }),
        outlier_detection: Some(outlier(&breaker.outlier_detection.unwrap_or_default())),
        connect_timeout_ms: spec
            .timeouts
            .and_then(|timeouts| timeouts.connect)
            .map_or(CONNECT_TIMEOUT_MS, Duration::as_millis),
        health_check: spec.health_check.as_ref().and_then(health::compile),
        connection: spec.connection.as_ref().map(connection::compile),
        ..proto::BackendPolicy::default()
    }
}

fn load_balancer(given: &LoadBalancer) -> proto::LoadBalancer {
    use proto::load_balancer::HashKey as Key;
    let algorithm = match given.algorithm {
        None | Some(Algorithm::PeakEwma) => proto::Algorithm::PeakEwma,
        Some(Algorithm::LeastRequest) => proto::Algorithm::LeastRequest,
        Some(Algorithm::RoundRobin) => proto::Algorithm::RoundRobin,
        Some(Algorithm::Random) => proto::Algorithm::Random,
        Some(Algorithm::RingHash) => proto::Algorithm::RingHash,
        Some(Algorithm::Maglev) => proto::Algorithm::Maglev,
    };
    let hashed = matches!(
        algorithm,
        proto::Algorithm::RingHash | proto::Algorithm::Maglev
    );
    let key = match &given.hash_key {
        Some(HashKey::Header(name)) => Key::Header(name.clone()),
        Some(HashKey::Cookie(name)) => Key::Cookie(name.clone()),
        Some(HashKey::SourceAddress(_)) | None => Key::SourceAddress(true),
    };
    proto::LoadBalancer {
        algorithm: algorithm.into(),
        hash_key: hashed.then_some(key),
        panic_threshold_percent: given
            .panic_threshold
            .map_or(PANIC_THRESHOLD_PERCENT, Percent::get),
        slow_start_ms: match given.slow_start {
            Some(slow) if !hashed => slow.window.as_millis(),
            _ => 0,
        },
        zone_preference: given.zone_preference.filter(|_| !hashed).map(|zone| {
            proto::ZonePreference {
                threshold_percent: zone.threshold.map_or(ZONE_THRESHOLD_PERCENT, Percent::get),
            }
        }),
    }
}

fn outlier(given: &OutlierDetection) -> proto::OutlierDetection {
    let or = |value: Option<Duration>, default| value.map_or(default, Duration::as_millis);
    let base = or(given.base_ejection_time, BASE_EJECTION_MS);
    proto::OutlierDetection {
        consecutive_gateway_errors: given
            .consecutive_gateway_errors
            .unwrap_or(CONSECUTIVE_GATEWAY_ERRORS),
        consecutive_5xx: given.consecutive_5xx_errors.unwrap_or(0),
        success_rate_threshold_percent: given.success_rate.map_or(0, |rate| rate.threshold.get()),
        success_rate_min_requests: given.success_rate.map_or(0, |rate| rate.min_requests),
        interval_ms: or(given.interval, OUTLIER_INTERVAL_MS),
        base_ejection_ms: base,
        max_ejection_ms: or(given.max_ejection_time, MAX_EJECTION_MS).max(base),
        max_ejection_percent: given
            .max_ejection_percent
            .map_or(MAX_EJECTION_PERCENT, Percent::get),
    }
}

/// Fills what is not set from a less specific one.
trait Inherit {
    fn inherit(&mut self, from: &Self);

    /// The fields that are set, as they are written, below the field `at`.
    fn fields(&self, at: &str, found: &mut Vec<String>);
}

impl<T: Inherit + Clone> Inherit for Option<T> {
    fn inherit(&mut self, from: &Self) {
        match (self.as_mut(), from) {
            (Some(own), Some(from)) => own.inherit(from),
            (None, Some(from)) => *self = Some(from.clone()),
            (_, None) => {}
        }
    }

    fn fields(&self, at: &str, found: &mut Vec<String>) {
        if let Some(own) = self {
            own.fields(at, found);
        }
    }
}

/// Field by field: a field is taken over whole when it is not set, or, for those behind `deep`,
/// field by field in turn.
macro_rules! inherit {
    ($type:ty { $($leaf:ident),* } $(deep { $($deep:ident),* })?) => {
        impl Inherit for $type {
            fn inherit(&mut self, from: &Self) {
                $(if self.$leaf.is_none() { self.$leaf.clone_from(&from.$leaf); })*
                $($(self.$deep.inherit(&from.$deep);)*)?
            }

            fn fields(&self, at: &str, found: &mut Vec<String>) {
                $(if self.$leaf.is_some() {
                    found.push(provenance::field(at, stringify!($leaf)));
                })*
                $($(self.$deep.fields(&provenance::field(at, stringify!($deep)), found);)*)?
            }
        }
    };
}

inherit!(TrafficPolicySpec { fault_injection, rate_limit, request_headers } deep {
    load_balancer,
    health_check, circuit_breaker, retries, timeouts, connection
});
inherit!(Connection { max_requests, idle_timeout } deep { keep_alive, http2 });
inherit!(KeepAlive {
    time,
    interval,
    probes
});
inherit!(Http2 {
    stream_window,
    connection_window
});
inherit!(LoadBalancer {
    algorithm,
    hash_key,
    panic_threshold,
    slow_start,
    zone_preference
});
inherit!(CircuitBreaker { fallback } deep { limits, outlier_detection });
inherit!(Limits {
    max_connections,
    max_requests,
    max_pending_requests
});
inherit!(OutlierDetection {
    consecutive_gateway_errors,
    consecutive_5xx_errors,
    success_rate,
    interval,
    base_ejection_time,
    max_ejection_time,
    max_ejection_percent
});
inherit!(Retries { attempts, codes, grpc_codes, on, methods, max_body_bytes, hedging } deep { backoff, budget });
inherit!(HealthCheck {
    probe,
    interval,
    timeout,
    unhealthy_threshold,
    healthy_threshold
});
inherit!(Backoff { base, max });
inherit!(RetryBudget {
    percent,
    min_per_second
});
inherit!(Timeouts {
    connect,
    request,
    per_try,
    idle,
    stream
});
