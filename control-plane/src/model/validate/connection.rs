//! Settings of connections.

use weft_api::policy::Duration;
use weft_api::policy::connection::Connection;

use super::Findings;

/// What the kernel takes (`MAX_TCP_KEEPIDLE`, `MAX_TCP_KEEPINTVL`, `MAX_TCP_KEEPCNT`).
const MAX_KEEPALIVE_SECONDS: u64 = 32_767;
const MAX_PROBES: u32 = 127;
/// What every HTTP/2 connection begins with, and the most there is (RFC 9113 sections 6.5.2, 6.9.1).
const WINDOWS: std::ops::RangeInclusive<u32> = 65_535..=0x7fff_ffff;

pub(super) fn check(given: &Connection, findings: &mut Findings) {
    let at = "spec.connection";
    if given
        .idle_timeout
        .is_some_and(|idle| idle < Duration::from_secs(1))
    {
        findings.add(
            &format!("{at}.idleTimeout"),
            "connections are looked through once a second",
            "write at least 1s",
        );
    }
    findings.timeout(&format!("{at}.idleTimeout"), given.idle_timeout);
    let keep_alive = given.keep_alive.unwrap_or_default();
    for (field, least, value) in [
        ("time", 0, keep_alive.time),
        ("interval", 1, keep_alive.interval),
    ] {
        let Some(value) = value else { continue };
        let seconds = value.as_millis() / 1000;
        let whole = value.as_millis().is_multiple_of(1000);
        if !whole || !(least..=MAX_KEEPALIVE_SECONDS).contains(&seconds) {
            findings.add(
                &format!("{at}.keepAlive.{field}"),
                format!("{value} is not what the kernel takes"),
                format!("write whole seconds, from {least}s to {MAX_KEEPALIVE_SECONDS}s"),
            );
        }
    }
    if keep_alive
        .probes
        .is_some_and(|probes| !(1..=MAX_PROBES).contains(&probes))
    {
        findings.add(
            &format!("{at}.keepAlive.probes"),
            "this is not what the kernel takes",
            "write a number from 1 to 127; time: 0s sends no probes",
        );
    }
    let http2 = given.http2.unwrap_or_default();
    for (field, value) in [
        ("streamWindow", http2.stream_window),
        ("connectionWindow", http2.connection_window),
    ] {
        if let Some(value) = value.filter(|value| !WINDOWS.contains(value)) {
            findings.add(
                &format!("{at}.http2.{field}"),
                format!("{value} is not a window of HTTP/2"),
                "write a number of bytes from 65535 to 2147483647",
            );
        }
    }
    if let (Some(stream), Some(connection)) = (http2.stream_window, http2.connection_window)
        && stream > connection
    {
        findings.add(
            &format!("{at}.http2.streamWindow"),
            format!("a stream cannot have {stream} bytes of a connection that has {connection}"),
            "make connectionWindow at least as large as streamWindow",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::resilience::tests::refused;

    #[test]
    fn nonsense_is_refused() {
        for (connection, said) in [
            ("{idleTimeout: 500ms}", "once a second"),
            ("{idleTimeout: 25h}", "longer than a day"),
            ("{keepAlive: {time: 1500ms}}", "what the kernel takes"),
            ("{keepAlive: {interval: 0s}}", "what the kernel takes"),
            ("{keepAlive: {time: 10h}}", "what the kernel takes"),
            ("{keepAlive: {probes: 0}}", "what the kernel takes"),
            ("{keepAlive: {probes: 128}}", "what the kernel takes"),
            ("{http2: {streamWindow: 65534}}", "not a window of HTTP/2"),
            (
                "{http2: {connectionWindow: 2147483648}}",
                "not a window of HTTP/2",
            ),
            (
                "{http2: {streamWindow: 131072, connectionWindow: 65535}}",
                "cannot have",
            ),
            ("{http2: {maxStreams: 5}}", "maxStreams"),
        ] {
            let found = refused(&format!("{{connection: {connection}}}"));
            assert!(
                found.iter().any(|found| found.contains(said)),
                "{connection}: {found:?}"
            );
        }
        let good = "{connection: {maxRequests: 0, idleTimeout: 1s, keepAlive: {time: 0s, interval: 1s, probes: 127}, http2: {streamWindow: 65535, connectionWindow: 2147483647}}}";
        assert_eq!(refused(good), Vec::<String>::new());
        // It is about endpoints, whichever route leads there.
        let route = "{targetRefs: [{kind: HTTPRoute, name: r}], connection: {maxRequests: 1}}";
        assert!(refused(route)[0].contains("connection is about"));
    }
}
