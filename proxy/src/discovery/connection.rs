//! How connections to endpoints are kept.

use std::time::Duration;

use weft_api::proto;

use super::compile::{Result, duration, refuse};
use crate::tables::ConnectionPolicy;
use crate::transport::KeepAlive;

/// What every HTTP/2 connection begins with, and the most there is (RFC 9113 sections 6.5.2, 6.9.1).
const WINDOWS: std::ops::RangeInclusive<u32> = 65_535..=0x7fff_ffff;
/// What the kernel takes.
const MAX_KEEPALIVE: Duration = Duration::from_secs(32_767);
const MAX_PROBES: u32 = 127;

pub(super) fn settings(given: Option<&proto::ConnectionSettings>) -> Result<ConnectionPolicy> {
    let defaults = ConnectionPolicy::default();
    let Some(given) = given else {
        return Ok(defaults);
    };
    let stream_window = window(given.stream_window)?.unwrap_or(defaults.stream_window);
    let at_least = defaults.connection_window.max(stream_window);
    let connection_window = window(given.connection_window)?.unwrap_or(at_least);
    if connection_window < stream_window {
        refuse!("a stream's window is larger than its connection's");
    }
    Ok(ConnectionPolicy {
        max_requests: given.max_requests,
        idle_timeout: duration(given.idle_timeout_ms, "the idle timeout of connections")?,
        keepalive: keepalive(given)?,
        stream_window,
        connection_window,
    })
}

fn window(given: u32) -> Result<Option<u32>> {
    if given == 0 {
        return Ok(None);
    }
    if !WINDOWS.contains(&given) {
        refuse!("{given} is not a window of HTTP/2 (65535 to 2147483647 bytes)");
    }
    Ok(Some(given))
}

/// `None`: no probes.
fn keepalive(given: &proto::ConnectionSettings) -> Result<Option<KeepAlive>> {
    let defaults = KeepAlive::default();
    let after = match given.keepalive_time_ms {
        None => Some(defaults.after),
        Some(ms) => duration(ms, "the keep-alive time")?,
    };
    let interval = duration(given.keepalive_interval_ms, "the keep-alive interval")?;
    let interval = interval.unwrap_or(defaults.interval);
    let probes = match given.keepalive_probes {
        0 => defaults.probes,
        probes => probes,
    };
    let Some(after) = after else { return Ok(None) };
    let range = Duration::from_secs(1)..=MAX_KEEPALIVE;
    if !range.contains(&after) || !range.contains(&interval) || probes > MAX_PROBES {
        refuse!("keep-alive is asked for in a way that the kernel does not take");
    }
    Ok(Some(KeepAlive {
        after,
        interval,
        probes,
    }))
}

#[cfg(test)]
mod tests {
    use weft_api::proto::ConnectionSettings;

    use super::*;

    #[test]
    fn what_is_not_said_is_the_default() {
        let defaults = ConnectionPolicy::default();
        assert_eq!(settings(None), Ok(defaults));
        assert_eq!(settings(Some(&ConnectionSettings::default())), Ok(defaults));
        let given = ConnectionSettings {
            max_requests: 3,
            idle_timeout_ms: 1_500,
            keepalive_time_ms: Some(0),
            stream_window: 64 << 20,
            ..ConnectionSettings::default()
        };
        let expected = ConnectionPolicy {
            max_requests: 3,
            idle_timeout: Some(Duration::from_millis(1_500)),
            keepalive: None,
            stream_window: 64 << 20,
            // A stream could not use its window otherwise.
            connection_window: 64 << 20,
        };
        assert_eq!(settings(Some(&given)), Ok(expected));
    }

    #[test]
    fn nonsense_is_refused() {
        let refused = |given: ConnectionSettings| settings(Some(&given)).unwrap_err().0;
        for (stream, connection) in [(65_534, 0), (0, 65_534), (0, 1 << 31), (1 << 20, 65_535)] {
            let why = refused(ConnectionSettings {
                stream_window: stream,
                connection_window: connection,
                ..ConnectionSettings::default()
            });
            assert!(why.contains("window"), "{stream} {connection}: {why}");
        }
        for (time, interval, probes) in [
            (999, 0, 0),
            (40_000_000, 0, 0),
            (1_000, 500, 0),
            (1_000, 0, 128),
        ] {
            let why = refused(ConnectionSettings {
                keepalive_time_ms: Some(time),
                keepalive_interval_ms: interval,
                keepalive_probes: probes,
                ..ConnectionSettings::default()
            });
            assert!(
                why.contains("keep-alive"),
                "{time} {interval} {probes}: {why}"
            );
        }
    }
}
