//! Faults, and what a destination takes no more of.

use weft_api::policy::resilience::{FaultInjection, RateLimit, RateLimitKey, RequestHeaders};
use weft_api::policy::traffic::{Algorithm, LoadBalancer, TrafficPolicySpec};

use super::{Findings, is_token};

/// What the proxy itself takes of a head, bytes and fields.
const MAX_HEAD_BYTES: u32 = 1 << 20;
const MAX_HEAD_FIELDS: u32 = 8192;

pub(super) fn check(spec: &TrafficPolicySpec, findings: &mut Findings) {
    if let Some(fault) = &spec.fault_injection {
        check_fault(fault, findings);
    }
    if let Some(limit) = &spec.rate_limit {
        check_rate_limit(limit, findings);
    }
    if let Some(balancer) = &spec.load_balancer {
        check_slow_start(balancer, findings);
    }
    if let Some(hedging) = spec.retries.as_ref().and_then(|retries| retries.hedging) {
        let path = "spec.retries.hedging.delay";
        if hedging.delay.is_zero() {
            findings.add(
                path,
                "delay of 0s would ask two endpoints each time",
                "write about what the slowest tenth of the requests takes, such as 100ms",
            );
        }
        findings.timeout(path, Some(hedging.delay));
    }
    if let Some(headers) = &spec.request_headers {
        check_request_headers(headers, findings);
    }
}

fn check_fault(fault: &FaultInjection, findings: &mut Findings) {
    let at = "spec.faultInjection";
    if fault.delay.is_none() && fault.abort.is_none() {
        findings.add(
            at,
            "faultInjection says neither delay nor abort",
            "write one of the two, or leave faultInjection out",
        );
    }
    for (index, header) in fault.headers.iter().enumerate() {
        let sent = |byte: u8| byte >= b' ' || byte == b'\t';
        if !is_token(&header.name) || !header.value.bytes().all(sent) {
            findings.add(
                &format!("{at}.headers.{index}"),
                format!(
                    "no request can have header '{}' with this value",
                    header.name
                ),
                "use a valid name and value",
            );
        }
    }
    if let Some(delay) = &fault.delay {
        let path = format!("{at}.delay.duration");
        if delay.duration.is_zero() {
            findings.add(
                &path,
                "duration of 0s makes no sense",
                "write a duration above zero, such as 2s",
            );
        }
        findings.timeout(&path, Some(delay.duration));
    }
    if let Some(abort) = &fault.abort {
        if abort.status.is_none() && abort.grpc_status.is_none() {
            findings.add(
                &format!("{at}.abort"),
                "abort names no status",
                "write status: 503, or grpcStatus: UNAVAILABLE for gRPC calls",
            );
        }
        if let Some(status) = abort.status
            && !(200..=599).contains(&status)
        {
            findings.add(
                &format!("{at}.abort.status"),
                format!("{status} is not a final HTTP status"),
                "write a number from 200 to 599",
            );
        }
    }
}

fn check_rate_limit(limit: &RateLimit, findings: &mut Findings) {
    let at = "spec.rateLimit";
    for (field, number) in [("requests", Some(limit.requests)), ("burst", limit.burst)] {
        if number == Some(0) {
            findings.add(
                &format!("{at}.{field}"),
                format!("{field} of 0 lets nothing through"),
                "write a number of at least 1",
            );
        }
    }
    if limit.per.is_zero() {
        findings.add(
            &format!("{at}.per"),
            "per of 0s makes no sense",
            "write a duration above zero, such as 1s or 1m",
        );
    }
    findings.timeout(&format!("{at}.per"), Some(limit.per));
    let wrong = match &limit.key {
        Some(RateLimitKey::ClientIdentity(false)) => {
            "clientIdentity: false names nothing to count by"
        }
        Some(RateLimitKey::SourceAddress(false)) => {
            "sourceAddress: false names nothing to count by"
        }
        Some(RateLimitKey::Header(name)) if !is_token(name) => "this is not a header name",
        _ => return,
    };
    findings.add(
        &format!("{at}.key"),
        wrong,
        "write clientIdentity: true, sourceAddress: true or header: NAME, or leave key out",
    );
}

fn check_slow_start(balancer: &LoadBalancer, findings: &mut Findings) {
    let at = "spec.loadBalancer.slowStart";
    let Some(slow) = balancer.slow_start else {
        return;
    };
    if slow.window.is_zero() {
        findings.add(
            &format!("{at}.window"),
            "window of 0s makes no sense",
            "write a duration above zero, such as 30s, or leave slowStart out",
        );
    }
    findings.timeout(&format!("{at}.window"), Some(slow.window));
    if let Some(algorithm @ (Algorithm::RingHash | Algorithm::Maglev)) = balancer.algorithm {
        findings.add(
            at,
            format!(
                "slowStart has no effect with {algorithm:?}, which gives each key its endpoint"
            ),
            "leave slowStart out, or choose another algorithm",
        );
    }
}

fn check_request_headers(headers: &RequestHeaders, findings: &mut Findings) {
    let at = "spec.requestHeaders";
    if headers.max_bytes.is_none() && headers.max_count.is_none() {
        findings.add(
            at,
            "requestHeaders says neither maxBytes nor maxCount",
            "write one of the two, or leave requestHeaders out",
        );
    }
    for (field, value, most) in [
        ("maxBytes", headers.max_bytes, MAX_HEAD_BYTES),
        ("maxCount", headers.max_count, MAX_HEAD_FIELDS),
    ] {
        if let Some(value) = value
            && !(1..=most).contains(&value)
        {
            findings.add(
                &format!("{at}.{field}"),
                format!("{field} of {value} is out of range"),
                format!("write a number from 1 to {most}: the proxy itself takes no more"),
            );
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;

    use crate::sources::folder::manifest;

    /// What is said of a `spec`.
    pub(in super::super) fn refused(spec: &str) -> Vec<String> {
        let policy = format!(
            "apiVersion: policy.weft.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: p}}\nspec: {spec}\n"
        );
        match manifest::parse(Path::new("p.yaml"), &policy) {
            Ok(_) => Vec::new(),
            Err(findings) => findings.into_iter().map(|f| f.message).collect(),
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for (spec, said) in [
            ("{faultInjection: {}}", "neither delay nor abort"),
            ("{faultInjection: {abort: {percent: 5}}}", "names no status"),
            (
                "{faultInjection: {abort: {status: 100}}}",
                "not a final HTTP status",
            ),
            (
                "{faultInjection: {abort: {status: 503, percent: 101}}}",
                "not a percentage",
            ),
            (
                "{faultInjection: {delay: {duration: 0s}}}",
                "makes no sense",
            ),
            (
                "{faultInjection: {delay: {duration: 25h}}}",
                "longer than a day",
            ),
            (
                "{faultInjection: {delay: {duration: 1s}, headers: [{name: 'a b', value: x}]}}",
                "no request can have",
            ),
            ("{rateLimit: {requests: 0}}", "lets nothing through"),
            (
                "{rateLimit: {requests: 1, burst: 0}}",
                "lets nothing through",
            ),
            ("{rateLimit: {requests: 1, per: 0s}}", "makes no sense"),
            (
                "{rateLimit: {requests: 1, key: {clientIdentity: false}}}",
                "names nothing",
            ),
            (
                "{rateLimit: {requests: 1, key: {header: 'a b'}}}",
                "not a header name",
            ),
            ("{rateLimit: {per: 1s}}", "requests"),
            (
                "{loadBalancer: {slowStart: {window: 0s}}}",
                "makes no sense",
            ),
            (
                "{loadBalancer: {slowStart: {window: 25h}}}",
                "longer than a day",
            ),
            (
                "{loadBalancer: {algorithm: Maglev, slowStart: {window: 5s}}}",
                "no effect with Maglev",
            ),
        ] {
            let found = refused(spec);
            assert!(found.iter().any(|f| f.contains(said)), "{spec}: {found:?}");
        }
        let good = "{faultInjection: {delay: {duration: 1s}, abort: {grpcStatus: ABORTED}, headers: [{name: a, value: x}]}}";
        assert_eq!(refused(good), Vec::<String>::new());
    }
}
