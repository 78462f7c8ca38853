//! Values that the types let through but that make no sense. A source refuses such an object and
//! keeps the last good one.

use weft_api::policy::traffic::{
    Algorithm, Fallback, HashKey, OutlierDetection, Retries, Timeouts, TrafficPolicySpec,
};
use weft_api::policy::{Duration, TelemetrySpec};

mod connection;
mod external;

use super::{Object, Service, Workload};

mod health;
mod resilience;
mod targets;

/// Largest weight of a workload.
const MAX_WEIGHT: u32 = 10_000;
/// Most tries after the first.
const MAX_ATTEMPTS: u32 = 10;
/// Largest request body kept for another try, bytes.
const MAX_RETRY_BODY: u64 = 16 << 20;
/// Largest body of a fallback response, bytes.
const MAX_FALLBACK_BODY: usize = 64 << 10;
/// Longest timeout: a day. Longer is most likely a slip.
const MAX_TIMEOUT_MS: u64 = 24 * 3600 * 1000;
/// Longest name: a DNS subdomain (RFC 1123).
const MAX_NAME: usize = 253;

/// A value that is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// Field names from the object's root; list items by their index.
    pub path: Vec<String>,
    /// What is wrong, as a sentence without a full stop.
    pub message: String,
    /// What to do about it.
    pub help: String,
}

struct Findings(Vec<Invalid>);

impl Findings {
    fn add(&mut self, path: &str, message: impl Into<String>, help: impl Into<String>) {
        self.0.push(Invalid {
            path: path.split('.').map(str::to_owned).collect(),
            message: message.into(),
            help: help.into(),
        });
    }

    fn timeout(&mut self, path: &str, given: Option<Duration>) {
        if let Some(given) = given
            && given.as_millis() > MAX_TIMEOUT_MS
        {
            self.add(
                path,
                format!("{given} is longer than a day"),
                "write at most 24h, or 0s for no timeout",
            );
        }
    }
}

/// Everything about an object that cannot be honoured.
pub fn validate(object: &Object) -> Vec<Invalid> {
    let mut findings = Findings(Vec::new());
    let name = object.reference().name;
    for (field, value) in [("name", &name.name), ("namespace", &name.namespace)] {
        let ok = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
        let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        if value.len() > MAX_NAME
            || !value.chars().all(ok)
            || !edge(value.chars().next())
            || !edge(value.chars().next_back())
        {
            findings.add(
                &format!("metadata.{field}"),
                format!("'{value}' is not a valid {field}"),
                "use lower-case letters, digits, dashes and dots, beginning and ending with a letter or a digit",
            );
        }
    }
    match object {
        Object::Service(service) => check_service(service, &mut findings),
        Object::Workload(workload) => check_workload(workload, &mut findings),
        Object::TrafficPolicy(policy) => {
            targets::check(&policy.spec, &policy.name.namespace, &mut findings);
            check_traffic(&policy.spec, &mut findings);
        }
        Object::Telemetry(policy) => check_telemetry(&policy.spec, &mut findings),
        Object::ExternalService(service) => external::check(&service.spec, &mut findings),
        Object::PeerAuthentication(policy) => {
            if policy.spec.selector.is_none() && !policy.spec.port_level_mtls.is_empty() {
                findings.add(
                    "spec.portLevelMtls",
                    "portLevelMtls needs a selector: port numbers mean something only for certain workloads",
                    "add selector.matchLabels, or move the mode to mtls",
                );
            }
        }
        // What a rule of a route, or such a policy, says wrong is said by its conditions.
        Object::EndpointSlice(_)
        | Object::Node(_)
        | Object::Route(_)
        | Object::EgressPolicy(_)
        | Object::BackendTraffic(_) => {}
    }
    findings.0
}

fn check_service(service: &Service, findings: &mut Findings) {
    for (index, port) in service.ports.iter().enumerate() {
        let duplicate = |other: &super::ServicePort| {
            other.port == port.port || (!port.name.is_empty() && other.name == port.name)
        };
        if service.ports[..index].iter().any(duplicate) {
            findings.add(
                &format!("spec.ports.{index}"),
                format!("port {} '{}' is there twice", port.port, port.name),
                "give every port of a Service a number and a name of its own",
            );
        }
        if port.port == 0 {
            findings.add(
                &format!("spec.ports.{index}.port"),
                "0 is not a port",
                "write a number from 1 to 65535",
            );
        }
    }
}

fn check_workload(workload: &Workload, findings: &mut Findings) {
    if workload.addresses.is_empty() {
        findings.add(
            "spec.addresses",
            "a Workload needs an address",
            "write the address other machines reach it at, such as addresses: [10.0.0.7]",
        );
    }
    if workload.weight > MAX_WEIGHT {
        findings.add(
            "spec.weight",
            format!("weight {} is out of range", workload.weight),
            format!("write a number from 0 to {MAX_WEIGHT}"),
        );
    }
    if workload.service_account.is_empty()
        || weft_api::identity::SpiffeId::new(
            "example.org",
            &workload.name.namespace,
            &workload.service_account,
        )
        .is_err()
    {
        findings.add(
            "spec.serviceAccount",
            format!(
                "'{}' is not a service account name",
                workload.service_account
            ),
            "use letters, digits, dashes, dots and underscores",
        );
    }
    for (index, port) in workload.ports.iter().enumerate() {
        let duplicate = |other: &super::WorkloadPort| {
            other.port == port.port || (!port.name.is_empty() && other.name == port.name)
        };
        if port.port == 0 || workload.ports[..index].iter().any(duplicate) {
            findings.add(
                &format!("spec.ports.{index}"),
                format!("port {} '{}' is 0 or there twice", port.port, port.name),
                "give every port a number from 1 to 65535 and a name of its own",
            );
        }
    }
}

fn check_traffic(spec: &TrafficPolicySpec, findings: &mut Findings) {
    if let Some(load_balancer) = &spec.load_balancer {
        if let (Some(_), Some(algorithm @ (Algorithm::RingHash | Algorithm::Maglev))) =
            (load_balancer.zone_preference, load_balancer.algorithm)
        {
            findings.add(
                "spec.loadBalancer.zonePreference",
                format!("{algorithm:?} gives each key its endpoint, in whatever zone that is"),
                "leave zonePreference out, or choose another algorithm",
            );
        }
        match &load_balancer.hash_key {
            Some(HashKey::SourceAddress(false)) => findings.add(
                "spec.loadBalancer.hashKey",
                "sourceAddress: false names nothing to hash",
                "write sourceAddress: true, or a header or a cookie",
            ),
            Some(HashKey::Header(name) | HashKey::Cookie(name)) if !is_token(name) => findings.add(
                "spec.loadBalancer.hashKey",
                format!("'{name}' is not a header or cookie name"),
                "use letters, digits and dashes",
            ),
            _ => {}
        }
    }
    if let Some(breaker) = &spec.circuit_breaker {
        if let Some(outlier) = &breaker.outlier_detection {
            check_outlier(outlier, findings);
        }
        match &breaker.fallback {
            Some(Fallback::Response(response)) => {
                let at = "spec.circuitBreaker.fallback.response";
                if !(200..=599).contains(&response.status) {
                    findings.add(
                        &format!("{at}.status"),
                        format!("{} is not a final HTTP status", response.status),
                        "write a number from 200 to 599",
                    );
                }
                for (index, header) in response.headers.iter().enumerate() {
                    let framing = ["content-length", "transfer-encoding", "connection"];
                    if !is_token(&header.name)
                        || framing.contains(&header.name.to_ascii_lowercase().as_str())
                        || header
                            .value
                            .bytes()
                            .any(|byte| byte < b' ' && byte != b'\t')
                    {
                        findings.add(
                            &format!("{at}.headers.{index}"),
                            format!("header '{}' cannot be sent", header.name),
                            "use a valid name and value; content-length, transfer-encoding and connection are the proxy's own",
                        );
                    }
                }
                if response.body.len() > MAX_FALLBACK_BODY {
                    findings.add(
                        &format!("{at}.body"),
                        "the body is longer than 64 KiB",
                        "shorten it, or send callers to a fallback backend",
                    );
                }
            }
            Some(Fallback::Backend(backend)) if backend.port == 0 => findings.add(
                "spec.circuitBreaker.fallback.backend.port",
                "0 is not a port",
                "write the Service's port number",
            ),
            _ => {}
        }
    }
    if let Some(check) = &spec.health_check {
        health::check(check, findings);
    }
    if let Some(retries) = &spec.retries {
        check_retries(retries, findings);
    }
    if let Some(timeouts) = &spec.timeouts {
        check_timeouts(timeouts, findings);
    }
    if let Some(connection) = &spec.connection {
        connection::check(connection, findings);
    }
    resilience::check(spec, findings);
}

fn check_outlier(outlier: &OutlierDetection, findings: &mut Findings) {
    let at = "spec.circuitBreaker.outlierDetection";
    for (field, value) in [
        ("interval", outlier.interval),
        ("baseEjectionTime", outlier.base_ejection_time),
        ("maxEjectionTime", outlier.max_ejection_time),
    ] {
        if value.is_some_and(Duration::is_zero) {
            findings.add(
                &format!("{at}.{field}"),
                format!("{field} of 0s makes no sense"),
                "write a duration above zero, such as 10s",
            );
        }
        findings.timeout(&format!("{at}.{field}"), value);
    }
    if let (Some(base), Some(max)) = (outlier.base_ejection_time, outlier.max_ejection_time)
        && base > max
    {
        findings.add(
            &format!("{at}.baseEjectionTime"),
            format!("baseEjectionTime {base} is longer than maxEjectionTime {max}"),
            "make baseEjectionTime the shorter one",
        );
    }
}

fn check_retries(retries: &Retries, findings: &mut Findings) {
    let at = "spec.retries";
    if retries
        .attempts
        .is_some_and(|attempts| attempts > MAX_ATTEMPTS)
    {
        findings.add(
            &format!("{at}.attempts"),
            "more than 10 retries multiply an overload",
            "write a number from 0 to 10",
        );
    }
    for code in retries.codes.iter().flatten() {
        if !(400..=599).contains(code) {
            findings.add(
                &format!("{at}.codes"),
                format!("{code} is not an error status"),
                "write status codes from 400 to 599",
            );
        }
    }
    for method in retries.methods.iter().flatten() {
        if !is_token(method) {
            findings.add(
                &format!("{at}.methods"),
                format!("'{method}' is not a method"),
                "write methods such as GET or PUT",
            );
        }
    }
    if retries
        .max_body_bytes
        .is_some_and(|bytes| bytes > MAX_RETRY_BODY)
    {
        findings.add(
            &format!("{at}.maxBodyBytes"),
            "more than 16 MiB would be kept for each request",
            "write at most 16777216",
        );
    }
    if let Some(backoff) = retries.backoff {
        findings.timeout(&format!("{at}.backoff.base"), backoff.base);
        findings.timeout(&format!("{at}.backoff.max"), backoff.max);
        if let (Some(base), Some(max)) = (backoff.base, backoff.max)
            && base > max
        {
            findings.add(
                &format!("{at}.backoff.base"),
                format!("base {base} is longer than max {max}"),
                "make base the shorter one",
            );
        }
    }
}

fn check_timeouts(timeouts: &Timeouts, findings: &mut Findings) {
    let at = "spec.timeouts";
    for (field, value) in [
        ("connect", timeouts.connect),
        ("request", timeouts.request),
        ("perTry", timeouts.per_try),
        ("idle", timeouts.idle),
        ("stream", timeouts.stream),
    ] {
        findings.timeout(&format!("{at}.{field}"), value);
    }
    if let (Some(per_try), Some(request)) = (timeouts.per_try, timeouts.request)
        && !request.is_zero()
        && per_try > request
    {
        findings.add(
            &format!("{at}.perTry"),
            format!("perTry {per_try} is longer than request {request} and would never run out"),
            "make perTry the shorter one",
        );
    }
}

fn check_telemetry(spec: &TelemetrySpec, findings: &mut Findings) {
    if let Some(percent) = spec.tracing.sampling_percent
        && !(0.0..=100.0).contains(&percent)
    {
        findings.add(
            "spec.tracing.samplingPercent",
            format!("{percent} is not a percentage"),
            "write a number from 0 to 100",
        );
    }
    if let Some(endpoint) = &spec.tracing.otlp_endpoint
        && !endpoint.starts_with("http://")
        && !endpoint.starts_with("https://")
    {
        findings.add(
            "spec.tracing.otlpEndpoint",
            format!("'{endpoint}' is not a URL"),
            "write http://host:4317 (OTLP over gRPC) or http://host:4318/v1/traces (OTLP over HTTP)",
        );
    }
}

/// RFC 9110 section 5.6.2.
fn is_token(given: &str) -> bool {
    !given.is_empty()
        && given
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}
