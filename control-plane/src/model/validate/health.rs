//! Active health checks.

use weft_api::policy::Duration;
use weft_api::policy::health::{HealthCheck, HealthProbe};

use super::Findings;

/// Shortest interval, milliseconds: every caller of a Service asks each of its endpoints.
const MIN_INTERVAL_MS: u64 = 100;
const MAX_THRESHOLD: u32 = 100;

pub(super) fn check(given: &HealthCheck, findings: &mut Findings) {
    let at = "spec.healthCheck";
    if let Some(HealthProbe::Http(http)) = &given.probe {
        let path = http.path.as_deref().unwrap_or("/");
        let visible = path.bytes().all(|byte| byte.is_ascii_graphic());
        if !path.starts_with('/') || path.contains('#') || !visible {
            findings.add(
                &format!("{at}.probe.http.path"),
                format!("'{path}' is not a path"),
                "write a path that begins with /, in ASCII",
            );
        }
        let host = http.host.as_deref().unwrap_or("x");
        if host.is_empty() || !host.bytes().all(|byte| byte.is_ascii_graphic()) {
            findings.add(
                &format!("{at}.probe.http.host"),
                format!("'{host}' is not a host"),
                "write a host name, or leave host out",
            );
        }
        if let Some(status) = http
            .statuses
            .iter()
            .flatten()
            .find(|s| !(200..=599).contains(*s))
        {
            findings.add(
                &format!("{at}.probe.http.statuses"),
                format!("{status} is not a final HTTP status"),
                "write numbers from 200 to 599",
            );
        }
    }
    if given
        .interval
        .is_some_and(|interval| interval.as_millis() < MIN_INTERVAL_MS)
    {
        findings.add(
            &format!("{at}.interval"),
            "every caller would ask each endpoint more than ten times a second",
            "write at least 100ms",
        );
    }
    if given.timeout.is_some_and(Duration::is_zero) {
        findings.add(
            &format!("{at}.timeout"),
            "no answer comes within 0s",
            "write a duration above zero, such as 1s",
        );
    }
    findings.timeout(&format!("{at}.interval"), given.interval);
    findings.timeout(&format!("{at}.timeout"), given.timeout);
    for (field, threshold) in [
        ("unhealthyThreshold", given.unhealthy_threshold),
        ("healthyThreshold", given.healthy_threshold),
    ] {
        if threshold.is_some_and(|threshold| !(1..=MAX_THRESHOLD).contains(&threshold)) {
            findings.add(
                &format!("{at}.{field}"),
                format!("{field} is not a number of checks"),
                "write a number from 1 to 100",
            );
        }
    }
}
