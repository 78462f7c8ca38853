//! Policies of backends.

use std::sync::Arc;
use std::time::Duration;

use http::HeaderName;
use weft_api::proto;

use super::compile::{Result, duration, header_name, known, percent, refuse};
use super::{connection, health};
use crate::identity::Origin;
use crate::tables::{BackendPolicy, HashKey, OutlierDetection, RetryConstraint};

const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Of the kind's own schema (BudgetDetails, RequestRate).
const DEFAULT_CONSTRAINT_INTERVAL: Duration = Duration::from_secs(10);
const DEFAULT_MIN_INTERVAL: Duration = Duration::from_secs(1);
const DEFAULT_OUTLIER_INTERVAL: Duration = Duration::from_secs(10);
const DEFAULT_BASE_EJECTION: Duration = Duration::from_secs(30);
const DEFAULT_MAX_EJECTION: Duration = Duration::from_secs(300);

pub(super) fn backend_policy(given: &proto::BackendPolicy) -> Result<BackendPolicy> {
    let defaults = BackendPolicy::default();
    let (algorithm, hash_key, panic_threshold) = match &given.load_balancer {
        None => (defaults.algorithm, None, defaults.panic_threshold),
        Some(balancer) => load_balancer(balancer)?,
    };
    let limits = given.limits.unwrap_or_default();
    Ok(BackendPolicy {
        algorithm,
        hash_key,
        panic_threshold,
        slow_start: match &given.load_balancer {
            None => None,
            Some(balancer) => duration(balancer.slow_start_ms, "the slow start")?,
        },
        zone_threshold: given
            .load_balancer
            .as_ref()
            .and_then(|balancer| balancer.zone_preference.as_ref())
            .map(|zone| percent(zone.threshold_percent, "the threshold of a zone"))
            .transpose()?,
        max_connections: limits.max_connections,
        max_requests: limits.max_requests,
        max_pending_requests: limits.max_pending_requests,
        outlier: given
            .outlier_detection
            .as_ref()
            .map(outlier)
            .transpose()?
            .flatten(),
        connect_timeout: duration(given.connect_timeout_ms, "the connect timeout")?
            .unwrap_or(DEFAULT_CONNECT_TIMEOUT),
        retry_constraint: given
            .retry_constraint
            .as_ref()
            .map(retry_constraint)
            .transpose()?,
        origin: given.originate_tls.as_ref().map(origin).transpose()?,
        health_check: given
            .health_check
            .as_ref()
            .map(health::check)
            .transpose()?
            .map(Arc::new),
        connection: connection::settings(given.connection.as_ref())?,
    })
}

fn retry_constraint(given: &proto::RetryConstraint) -> Result<RetryConstraint> {
    let interval = duration(given.interval_ms, "the interval of a retry constraint")?
        .unwrap_or(DEFAULT_CONSTRAINT_INTERVAL);
    let min_interval = duration(given.min_interval_ms, "the interval of a least retry rate")?
        .unwrap_or(DEFAULT_MIN_INTERVAL);
    let floor = u128::from(given.min_count) * interval.as_millis() / min_interval.as_millis();
    Ok(RetryConstraint {
        percent: percent(given.percent, "the retry constraint")?,
        interval,
        floor: u64::try_from(floor).unwrap_or(u64::MAX),
    })
}

fn origin(given: &proto::OriginateTls) -> Result<Arc<Origin>> {
    match Origin::new(given) {
        Ok(origin) => Ok(Arc::new(origin)),
        Err(error) => refuse!("TLS with the server: {error}"),
    }
}

fn load_balancer(given: &proto::LoadBalancer) -> Result<(proto::Algorithm, Option<HashKey>, u32)> {
    use proto::Algorithm;
    use proto::load_balancer::HashKey as Given;
    let algorithm = known::<Algorithm>(given.algorithm, "load balancing algorithm")?;
    let key = match &given.hash_key {
        Some(Given::Header(name)) => Some(HashKey::Header(header_name(name)?)),
        Some(Given::Cookie(name)) => {
            // A cookie's name is a token (RFC 6265 section 4.1.1), as a header's is.
            if HeaderName::from_bytes(name.as_bytes()).is_err() {
                refuse!("'{name}' is not a cookie's name");
            }
            Some(HashKey::Cookie(name.as_str().into()))
        }
        Some(Given::SourceAddress(true)) => Some(HashKey::SourceAddress),
        Some(Given::SourceAddress(false)) | None => None,
    };
    if matches!(algorithm, Algorithm::RingHash | Algorithm::Maglev) && key.is_none() {
        refuse!("a load balancer that hashes needs a hash key (header, cookie or source address)");
    }
    let panic = percent(given.panic_threshold_percent, "the panic threshold")?;
    Ok((algorithm, key, panic))
}

/// `None` when every detector is off: then nothing has to be counted.
fn outlier(given: &proto::OutlierDetection) -> Result<Option<OutlierDetection>> {
    let threshold = percent(
        given.success_rate_threshold_percent,
        "the success rate threshold",
    )?;
    let base =
        duration(given.base_ejection_ms, "the ejection time")?.unwrap_or(DEFAULT_BASE_EJECTION);
    let max = duration(given.max_ejection_ms, "the longest ejection time")?
        .unwrap_or(DEFAULT_MAX_EJECTION.max(base));
    if max < base {
        refuse!("the longest ejection time is less than the first");
    }
    let policy = OutlierDetection {
        consecutive_gateway_errors: given.consecutive_gateway_errors,
        consecutive_5xx: given.consecutive_5xx,
        success_rate_threshold: threshold,
        success_rate_min_requests: given.success_rate_min_requests,
        interval: duration(given.interval_ms, "the outlier detection interval")?
            .unwrap_or(DEFAULT_OUTLIER_INTERVAL),
        base_ejection: base,
        max_ejection: max,
        max_ejection_percent: percent(
            given.max_ejection_percent,
            "the share of ejected endpoints",
        )?,
    };
    let off = policy.consecutive_gateway_errors == 0
        && policy.consecutive_5xx == 0
        && policy.success_rate_threshold == 0;
    Ok((!off).then_some(policy))
}
