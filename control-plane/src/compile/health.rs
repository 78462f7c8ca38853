//! Active health checks.

use weft_api::policy::Duration;
use weft_api::policy::health::{HealthCheck, HealthProbe};
use weft_api::proto;

const INTERVAL_MS: u64 = 10_000;
const TIMEOUT_MS: u64 = 1_000;
const UNHEALTHY_THRESHOLD: u32 = 3;
const HEALTHY_THRESHOLD: u32 = 2;

/// What is asked of endpoints; none when no policy says how.
pub(super) fn compile(given: &HealthCheck) -> Option<proto::HealthCheck> {
    use proto::health_check::Probe;
    let probe = match given.probe.as_ref()? {
        HealthProbe::Http(http) => Probe::Http(proto::HttpProbe {
            path: http.path.clone().unwrap_or_else(|| "/".to_owned()),
            host: http.host.clone().unwrap_or_default(),
            statuses: http
                .statuses
                .iter()
                .flatten()
                .map(|s| (*s).into())
                .collect(),
        }),
        HealthProbe::Grpc(grpc) => Probe::GrpcService(grpc.service.clone().unwrap_or_default()),
        HealthProbe::Tcp(_) => Probe::Tcp(true),
    };
    Some(proto::HealthCheck {
        probe: Some(probe),
        interval_ms: given.interval.map_or(INTERVAL_MS, Duration::as_millis),
        timeout_ms: given.timeout.map_or(TIMEOUT_MS, Duration::as_millis),
        unhealthy_threshold: given.unhealthy_threshold.unwrap_or(UNHEALTHY_THRESHOLD),
        healthy_threshold: given.healthy_threshold.unwrap_or(HEALTHY_THRESHOLD),
    })
}
