//! The deadline of a gRPC call: its client's (`grpc-timeout`, "gRPC over HTTP2"), the route's
//! timeout, or the earlier of the two. Each try tells the server how much of it is left, so that
//! nobody works for somebody who has stopped waiting.

use std::time::{Duration, Instant};

use http::header::HeaderName;
use http::{HeaderMap, HeaderValue};

/// As a name, so that no call parses it.
static GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// How long after the client's own deadline the proxy ends a call. Server and client know of the
/// deadline, too: what the server says about it passes, if it says something, and an endpoint that
/// keeps to it is not counted as one that hangs.
const GRACE: Duration = Duration::from_millis(100);
/// With no more of it gone, the client's value goes on as it came.
const AS_IT_CAME: Duration = Duration::from_millis(1);

/// Until when a call is to be answered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline {
    at: Instant,
    /// The client has said so itself, then.
    said: Option<Instant>,
}

/// The time of a call is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Expired;

impl Deadline {
    /// As the fields of a call that began at `started` say it.
    pub(super) fn of_client(headers: &HeaderMap, started: Instant) -> Option<Self> {
        let at = started.checked_add(grpc_timeout(headers)?)?;
        Some(Self {
            at,
            said: Some(started),
        })
    }

    /// When the proxy ends the call.
    pub(super) fn end(self) -> Option<Instant> {
        self.at.checked_add(GRACE)
    }

    /// The earlier of the client's deadline and the route's.
    pub(super) fn earlier(client: Option<Self>, route: Option<Instant>) -> Option<Self> {
        let route = route.map(|at| Self { at, said: None });
        match (client, route) {
            (Some(client), Some(route)) if route.at < client.at => Some(route),
            (client, route) => client.or(route),
        }
    }

    /// From then on there is no other try.
    pub(super) fn at(self) -> Instant {
        self.at
    }

    /// Tells the server of a try how much time is left.
    ///
    /// # Errors
    /// When there is none.
    pub(super) fn pass_on(self, headers: &mut HeaderMap, now: Instant) -> Result<(), Expired> {
        let left = self.at.saturating_duration_since(now);
        if left.is_zero() {
            return Err(Expired);
        }
        let as_it_came = |started: Instant| now.saturating_duration_since(started) < AS_IT_CAME;
        if !self.said.is_some_and(as_it_came) {
            let mut left = written(left);
            // As good as no other call has this one: it stays out of HPACK's tables.
            left.set_sensitive(true);
            headers.insert(&GRPC_TIMEOUT, left);
        }
        Ok(())
    }
}

/// How long a call's client waits for it: up to eight digits and a unit.
fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(&GRPC_TIMEOUT)?.to_str().ok()?;
    let digits = value.len().checked_sub(1)?;
    let (number, unit) = value.split_at_checked(digits)?;
    if number.len() > 8 || !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = number.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

/// The finest unit in which it has eight digits; never longer than it is, but not nothing.
fn written(left: Duration) -> HeaderValue {
    const MOST: u128 = 99_999_999;
    let text = match (left.as_micros(), left.as_millis()) {
        (micros, _) if micros <= MOST => format!("{}u", micros.max(1)),
        (_, millis) if millis <= MOST => format!("{millis}m"),
        _ => format!("{}S", u128::from(left.as_secs()).min(MOST)),
    };
    // Digits and a letter.
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static("1S"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn with(timeout: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert("grpc-timeout", timeout.parse().unwrap());
        headers
    }

    #[test]
    fn timeouts_of_calls() {
        for (value, timeout) in [
            ("1S", Some(Duration::from_secs(1))),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3600))),
            ("2M", Some(Duration::from_secs(120))),
            ("250m", Some(Duration::from_millis(250))),
            ("7u", Some(Duration::from_micros(7))),
            ("0n", Some(Duration::ZERO)),
            ("123456789S", None),
            ("1.5S", None),
            ("+1S", None),
            ("S", None),
            ("1s", None),
            ("1", None),
            ("", None),
        ] {
            assert_eq!(grpc_timeout(&with(value)), timeout, "{value:?}");
        }
    }

    #[test]
    fn the_server_is_told_what_is_left() {
        let started = Instant::now();
        let later = |millis| started + Duration::from_millis(millis);
        for (client, route, now, told) in [
            // At once it goes on as it came; a call without one gets none.
            (Some("200m"), None, 0, Ok(Some("200m"))),
            (None, None, 0, Ok(None)),
            (Some("200m"), None, 50, Ok(Some("150000u"))),
            (Some("2H"), None, 1_000, Ok(Some("7199000m"))),
            (Some("99999999H"), None, 1_000, Ok(Some("99999999S"))),
            // The route's is the earlier one, the later one, the only one.
            (Some("200m"), Some(100), 0, Ok(Some("100000u"))),
            (Some("200m"), Some(300), 0, Ok(Some("200m"))),
            (None, Some(100), 40, Ok(Some("60000u"))),
            (Some("200m"), None, 200, Err(Expired)),
            (Some("0n"), None, 0, Err(Expired)),
        ] {
            let mut headers = client.map(with).unwrap_or_default();
            let deadline = Deadline::of_client(&headers, started);
            let deadline = Deadline::earlier(deadline, route.map(later));
            let said = deadline.map_or(Ok(()), |deadline| {
                deadline.pass_on(&mut headers, later(now))
            });
            let said = said.map(|()| headers.get("grpc-timeout").and_then(|v| v.to_str().ok()));
            assert_eq!(said, told, "{client:?} {route:?} {now}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_never_longer(seconds in 0..400_000_000_000u64, nanos in 1..1_000_000_000u32) {
            let left = Duration::new(seconds, nanos);
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", written(left));
            let read = grpc_timeout(&headers).unwrap();
            prop_assert!(read <= left.max(Duration::from_micros(1)) && !read.is_zero());
            // Nor much shorter, within what eight digits of seconds can say.
            let most = Duration::from_secs(99_999_999);
            prop_assert!(left.min(most) - read.min(left.min(most)) <= Duration::from_secs(1));
        }
    }
}
