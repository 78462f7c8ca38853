//! Faults, and what a destination takes no more of.

use std::time::Duration;

use weft_api::proto;

use super::compile::{Result, duration, header_name, header_value, percent, refuse};
use crate::http::fault::grpc_of_status;
use crate::inbound::limits::{HeadLimit, LimitKey, PortLimits, Rate, RateLimit};
use crate::tables::{FaultAbort, FaultDelay, FaultInjection};

/// Conditions of a fault.
const MAX_HEADERS: usize = 64;
/// Rate limits of a port: Services that lead to it.
const MAX_RATES: usize = 64;

pub(super) fn fault(given: &proto::FaultInjection) -> Result<FaultInjection> {
    if given.headers.len() > MAX_HEADERS {
        refuse!("a fault has more than {MAX_HEADERS} conditions");
    }
    let headers = given.headers.iter().map(|header| {
        let name = header_name(&header.name)?;
        Ok((name, header_value(&header.name, &header.value)?))
    });
    Ok(FaultInjection {
        headers: headers.collect::<Result<_>>()?,
        delay: match &given.delay {
            None => None,
            Some(delay) => duration(delay.duration_ms, "an injected delay")?
                .map(|duration| {
                    Ok(FaultDelay {
                        share: share(delay.percent, "the share of delayed requests")?,
                        duration,
                    })
                })
                .transpose()?,
        },
        abort: given.abort.as_ref().map(abort).transpose()?,
    })
}

fn abort(given: &proto::FaultAbort) -> Result<FaultAbort> {
    let status = match u16::try_from(given.status) {
        Ok(0) => None,
        Ok(status @ 200..=599) => Some(status),
        _ => refuse!(
            "the status {} of an injected fault is not between 200 and 599",
            given.status
        ),
    };
    let grpc_status = match (given.grpc_status, status) {
        (0, Some(status)) => grpc_of_status(status),
        (code @ 1..=16, _) => code,
        (code, _) => refuse!("{code} is not the code of a gRPC error (1 to 16)"),
    };
    Ok(FaultAbort {
        share: share(given.percent, "the share of aborted requests")?,
        status,
        grpc_status,
    })
}

fn share(given: u32, what: &str) -> Result<f64> {
    Ok(f64::from(percent(given, what)?) / 100.0)
}

/// What a port takes no more of; `None`: there is no limit. Limits that were there `before` keep
/// their buckets.
pub(super) fn port_limits(
    given: &proto::WorkloadPort,
    before: Option<&PortLimits>,
) -> Result<Option<PortLimits>> {
    if given.rate_limits.len() > MAX_RATES {
        refuse!("it has more than {MAX_RATES} rate limits");
    }
    let mut rates = Vec::with_capacity(given.rate_limits.len());
    for limit in &given.rate_limits {
        let mut limit = rate_limit(limit)?;
        let before = before.iter().flat_map(|before| &before.rates);
        if let Some(known) = before.into_iter().find(|known| limit.succeeds(known)) {
            limit.buckets = known.buckets.clone();
        }
        rates.push(limit);
    }
    if given.header_limits.len() > MAX_RATES {
        refuse!("it has more than {MAX_RATES} limits of headers");
    }
    let heads = given.header_limits.iter().map(|limit| HeadLimit {
        namespace: limit.namespace.as_str().into(),
        service: limit.service.as_str().into(),
        port: u16::try_from(limit.port).unwrap_or(0),
        max_bytes: usize::try_from(limit.max_bytes).unwrap_or(usize::MAX),
        max_fields: usize::try_from(limit.max_count).unwrap_or(usize::MAX),
    });
    let heads: Vec<HeadLimit> = heads.collect();
    Ok((!rates.is_empty() || !heads.is_empty()).then_some(PortLimits { rates, heads }))
}

fn rate_limit(given: &proto::RateLimit) -> Result<RateLimit> {
    use proto::rate_limit::Key;
    if given.requests == 0 || given.burst == 0 {
        refuse!("a rate limit lets nothing through");
    }
    let Some(per) = duration(given.per_ms, "the time of a rate limit")? else {
        refuse!("a rate limit is of no time");
    };
    let key = match &given.key {
        None => LimitKey::Nobody,
        Some(Key::ClientIdentity(true)) => LimitKey::ClientIdentity,
        Some(Key::SourceAddress(true)) => LimitKey::SourceAddress,
        Some(Key::Header(name)) => LimitKey::Header(header_name(name)?),
        Some(Key::ClientIdentity(false) | Key::SourceAddress(false)) => {
            refuse!("a rate limit names nothing to count by")
        }
    };
    let replicas = given.replicas.max(1);
    Ok(RateLimit {
        namespace: given.namespace.as_str().into(),
        service: given.service.as_str().into(),
        port: u16::try_from(given.port).unwrap_or(0),
        key,
        requests: given.requests,
        per,
        burst: given.burst,
        replicas,
        rate: share_of(given.requests, per, given.burst, replicas),
        buckets: Default::default(),
    })
}

/// What of a limit is one replica's: never less than one request at once.
fn share_of(requests: u32, per: Duration, burst: u32, replicas: u32) -> Rate {
    let per = per.saturating_mul(replicas);
    Rate::new(requests.into(), per, burst.div_ceil(replicas).into())
}
