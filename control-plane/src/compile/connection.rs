//! How connections to endpoints are kept.

use weft_api::policy::Duration;
use weft_api::policy::connection::Connection;
use weft_api::proto::ConnectionSettings;

/// What callers' proxies keep to.
pub(super) fn compile(given: &Connection) -> ConnectionSettings {
    let keep_alive = given.keep_alive.unwrap_or_default();
    let http2 = given.http2.unwrap_or_default();
    let millis = |given: Option<Duration>| given.map_or(0, Duration::as_millis);
    ConnectionSettings {
        max_requests: given.max_requests.unwrap_or(0),
        idle_timeout_ms: millis(given.idle_timeout),
        keepalive_time_ms: keep_alive.time.map(Duration::as_millis),
        keepalive_interval_ms: millis(keep_alive.interval),
        keepalive_probes: keep_alive.probes.unwrap_or(0),
        stream_window: http2.stream_window.unwrap_or(0),
        connection_window: http2.connection_window.unwrap_or(0),
    }
}

/// What a workload's own proxy keeps to towards its application: idleness there is the
/// application's to end, and nothing between them forgets a silent connection.
pub(super) fn of_port(given: &Connection) -> Option<ConnectionSettings> {
    let settings = ConnectionSettings {
        idle_timeout_ms: 0,
        keepalive_time_ms: None,
        keepalive_interval_ms: 0,
        keepalive_probes: 0,
        ..compile(given)
    };
    (settings != ConnectionSettings::default()).then_some(settings)
}

/// Of what the policies of two Services say about the same port: fewer requests, larger windows.
pub(super) fn stricter(one: ConnectionSettings, other: ConnectionSettings) -> ConnectionSettings {
    let limits = [one.max_requests, other.max_requests].into_iter();
    ConnectionSettings {
        max_requests: limits.filter(|limit| *limit != 0).min().unwrap_or(0),
        stream_window: one.stream_window.max(other.stream_window),
        connection_window: one.connection_window.max(other.connection_window),
        ..one
    }
}

#[cfg(test)]
mod tests {
    use weft_api::proto::ConnectionSettings;

    use super::super::tests::{backend_policy, change, route_policy, with, workload};
    use crate::model::{Dirty, Name, World};

    const POLICIES: &str = "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: all, namespace: shop}
spec:
  timeouts: {idle: 1m}
  connection:
    maxRequests: 500
    keepAlive: {time: 0s, probes: 9}
    http2: {streamWindow: 1048576}
---
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: cart-http, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart, sectionName: http}]
  timeouts: {stream: 5s}
  connection:
    maxRequests: 7
    idleTimeout: 20s
    keepAlive: {interval: 5s}
    http2: {connectionWindow: 2097152}
";

    #[test]
    fn the_most_specific_setting_wins_field_by_field() {
        let world = with(POLICIES);
        let http = backend_policy(&world, "cart.shop:80").connection.unwrap();
        let expected = ConnectionSettings {
            max_requests: 7,
            idle_timeout_ms: 20_000,
            keepalive_time_ms: Some(0),
            keepalive_interval_ms: 5_000,
            keepalive_probes: 9,
            stream_window: 1 << 20,
            connection_window: 2 << 20,
        };
        assert_eq!(http, expected);
        let admin = backend_policy(&world, "cart.shop:9000").connection.unwrap();
        assert_eq!((admin.max_requests, admin.idle_timeout_ms), (500, 0));
        assert_eq!(backend_policy(&with(""), "cart.shop:80").connection, None);
        let route = route_policy(&world, "cart.shop:80");
        assert_eq!(route.idle_timeout_ms, 60_000);
        assert_eq!(route.stream_idle_timeout_ms, Some(5_000));
        let admin = route_policy(&world, "cart.shop:9000");
        assert_eq!(admin.stream_idle_timeout_ms, None);
    }

    #[test]
    fn the_workload_is_told_what_concerns_its_application() {
        let mut world = with("");
        let mut dirty = Dirty::default();
        change(&mut world, POLICIES, &mut dirty);
        assert!(dirty.workloads.contains(&Name::new("shop", "cart-1")));
        let of = |world: &World, port| {
            let ports = workload(world, "shop/cart-1").ports;
            ports.into_iter().find(|known| known.port == port).unwrap()
        };
        let expected = ConnectionSettings {
            max_requests: 7,
            stream_window: 1 << 20,
            connection_window: 2 << 20,
            ..ConnectionSettings::default()
        };
        assert_eq!(of(&world, 8080).connection, Some(expected));
        // Another Service that leads there takes part.
        let other = "
apiVersion: v1
kind: Service
metadata: {name: basket, namespace: shop}
spec: {clusterIP: 10.96.0.16, selector: {app: cart}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: basket, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: basket}]
  connection: {maxRequests: 3, http2: {streamWindow: 65535}}
";
        change(&mut world, other, &mut dirty);
        let both = of(&world, 8080).connection.unwrap();
        assert_eq!((both.max_requests, both.stream_window), (3, 1 << 20));
        // What is the callers' alone is not said.
        let callers = with(
            "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: all, namespace: shop}
spec: {connection: {idleTimeout: 20s, keepAlive: {time: 30s}}}
",
        );
        assert_eq!(of(&callers, 8080).connection, None);
    }
}
