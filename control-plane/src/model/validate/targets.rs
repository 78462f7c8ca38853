//! What a TrafficPolicy's targets can be, and what can be said of each.

use weft_api::policy::traffic::{TargetKind, TargetRef};
use weft_api::policy::{GROUP, TrafficPolicySpec};

use super::Findings;

const ROUTES: &str = "gateway.networking.k8s.io";

pub(super) fn check(spec: &TrafficPolicySpec, namespace: &str, findings: &mut Findings) {
    for (index, target) in spec.target_refs.iter().enumerate() {
        check_target(target, index, namespace, findings);
    }
    let external = |target: &TargetRef| target.kind == TargetKind::ExternalService;
    if spec.target_refs.iter().any(external) {
        for (set, field) in [
            (spec.rate_limit.is_some(), "rateLimit"),
            (spec.request_headers.is_some(), "requestHeaders"),
        ] {
            if set {
                findings.add(
                    &format!("spec.{field}"),
                    format!("{field} is kept by the proxies beside a Service's workloads, and an ExternalService has none"),
                    "remove it; circuitBreaker.limits holds for each caller's proxy",
                );
            }
        }
    }
    let is_route =
        |target: &TargetRef| matches!(target.kind, TargetKind::HTTPRoute | TargetKind::GRPCRoute);
    if !spec.target_refs.iter().any(is_route) {
        return;
    }
    for field in of_backends(spec) {
        findings.add(
            &format!("spec.{field}"),
            format!("{field} is about a Service's endpoints, whichever route leads there"),
            "move it to a policy for the Service",
        );
    }
}

fn check_target(target: &TargetRef, index: usize, namespace: &str, findings: &mut Findings) {
    let at = format!("spec.targetRefs.{index}");
    let group = target.group.as_str();
    let fits = match target.kind {
        TargetKind::Service | TargetKind::Namespace => matches!(group, "" | "core"),
        TargetKind::HTTPRoute | TargetKind::GRPCRoute => matches!(group, "" | ROUTES),
        TargetKind::ExternalService => matches!(group, "" | GROUP),
    };
    if !fits {
        findings.add(
            &format!("{at}.group"),
            format!("group '{group}' has no {:?}", target.kind),
            "leave group out, or write that of the kind",
        );
    }
    if target.kind != TargetKind::Namespace {
        return;
    }
    if target.name != namespace {
        findings.add(
            &format!("{at}.name"),
            format!(
                "namespace '{}' is not the policy's own, '{namespace}'",
                target.name
            ),
            "write the policy in the namespace that it is for",
        );
    }
    if target.section_name.is_some() {
        findings.add(
            &format!("{at}.sectionName"),
            "a namespace has no sections",
            "remove sectionName, or name a Service or a route",
        );
    }
}

/// The fields that a policy sets and that are a backend's, not a request's.
fn of_backends(spec: &TrafficPolicySpec) -> Vec<&'static str> {
    let breaker = spec.circuit_breaker.as_ref();
    let timeouts = spec.timeouts.as_ref();
    [
        (spec.load_balancer.is_some(), "loadBalancer"),
        (
            breaker.is_some_and(|breaker| breaker.limits.is_some()),
            "circuitBreaker.limits",
        ),
        (
            breaker.is_some_and(|breaker| breaker.outlier_detection.is_some()),
            "circuitBreaker.outlierDetection",
        ),
        (spec.rate_limit.is_some(), "rateLimit"),
        (spec.request_headers.is_some(), "requestHeaders"),
        (spec.health_check.is_some(), "healthCheck"),
        (spec.connection.is_some(), "connection"),
        (
            timeouts.is_some_and(|timeouts| timeouts.connect.is_some()),
            "timeouts.connect",
        ),
    ]
    .into_iter()
    .filter_map(|(set, field)| set.then_some(field))
    .collect()
}
