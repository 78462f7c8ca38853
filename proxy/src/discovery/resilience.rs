//! Faults, and what a destination takes no more of.

use weft_api::proto;

use super::compile::{Result, duration, header_name, header_value, percent, refuse};
use crate::http::fault::grpc_of_status;
use crate::tables::{FaultAbort, FaultDelay, FaultInjection};

/// Conditions of a fault.
const MAX_HEADERS: usize = 64;

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
