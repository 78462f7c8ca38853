//! Active health checks.

use std::time::Duration;

use weft_api::proto;

use super::compile::{Result, duration, refuse};
use crate::tables::{HealthCheck, HealthProbe};

const DEFAULT_INTERVAL: Duration = Duration::from_secs(10);
const MIN_INTERVAL: Duration = Duration::from_millis(100);
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1);

pub(super) fn check(given: &proto::HealthCheck) -> Result<HealthCheck> {
    use proto::health_check::Probe;
    let visible = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
    let probe = match &given.probe {
        Some(Probe::Http(http)) => {
            if !http.path.starts_with('/') || !visible(&http.path) || !visible(&http.host) {
                refuse!(
                    "a health check cannot GET '{}' of '{}'",
                    http.path,
                    http.host
                );
            }
            let mut statuses = Vec::with_capacity(http.statuses.len());
            for status in &http.statuses {
                match u16::try_from(*status) {
                    Ok(status @ 200..=599) => statuses.push(status),
                    _ => refuse!("{status} is not a status of a final response (200 to 599)"),
                }
            }
            HealthProbe::Http {
                path: http.path.as_str().into(),
                host: (!http.host.is_empty()).then(|| http.host.as_str().into()),
                statuses: statuses.into(),
            }
        }
        Some(Probe::GrpcService(service)) => HealthProbe::Grpc {
            service: service.as_str().into(),
        },
        Some(Probe::Tcp(_)) => HealthProbe::Tcp,
        None => refuse!("a health check is not known to this version of the proxy"),
    };
    let interval = duration(given.interval_ms, "the health check interval")?;
    Ok(HealthCheck {
        probe,
        interval: interval.unwrap_or(DEFAULT_INTERVAL).max(MIN_INTERVAL),
        timeout: duration(given.timeout_ms, "the health check timeout")?.unwrap_or(DEFAULT_TIMEOUT),
        unhealthy_threshold: given.unhealthy_threshold.max(1),
        healthy_threshold: given.healthy_threshold.max(1),
    })
}
