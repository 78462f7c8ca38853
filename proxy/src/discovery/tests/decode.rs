use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use prost::Message;
use weft_api::proto::*;

use super::samples::*;
use crate::discovery::compile::{self, Invalid};
use crate::discovery::{Discard, decode, endpoints};
use crate::tables::{self, EndpointSet, PathMatch};

fn compiled(given: &Destination) -> Result<tables::Destination, String> {
    compile::destination(given, &mut Discard).map_err(|Invalid(why)| why)
}

#[test]
fn a_destination_becomes_a_table() {
    let table = compiled(&destination()).unwrap();
    assert_eq!((&*table.service, table.port), ("cart", 80));
    let route = &table.routes[0];
    assert_eq!(route.total_weight, 3);
    assert_eq!(route.matches[0].method.as_deref(), Some("GET"));
    assert!(matches!(&route.matches[0].path, Some(PathMatch::Prefix(path)) if **path == *"/api"));
    assert_eq!(route.matches[0].headers, [("x-version".into(), "2".into())]);
    let policy = &route.policy;
    assert_eq!(policy.request_timeout.unwrap().as_millis(), 1500);
    assert_eq!(policy.idle_timeout, None);
    let retry = policy.retry.as_ref().unwrap();
    assert_eq!((retry.attempts, retry.max_body), (2, 64 * 1024));
    let backend = route.backends[0].backend.as_ref().unwrap();
    let outlier = backend.policy.outlier.as_ref().unwrap();
    assert_eq!(outlier.consecutive_gateway_errors, 5);
    assert_eq!(outlier.interval.as_secs(), 10);
    assert_eq!(
        compile::endpoint_names(&table)
            .iter()
            .map(|n| &**n)
            .collect::<Vec<_>>(),
        [ENDPOINTS]
    );
}

#[test]
fn routes_with_the_same_backend_share_it() {
    let mut given = destination();
    given.routes.push(route());
    let mut other = route();
    other.backends[0].backend.as_mut().unwrap().policy = None;
    given.routes.push(other);
    let table = compiled(&given).unwrap();
    let id = |route: usize| table.routes[route].backends[0].backend.as_ref().unwrap().id;
    assert_eq!(id(0), id(1));
    assert_ne!(id(0), id(2));
}

type Change = fn(&mut Destination);

#[test]
fn what_is_wrong_is_said() {
    fn policy(d: &mut Destination) -> &mut RoutePolicy {
        d.routes[0].policy.as_mut().unwrap()
    }
    fn inner(d: &mut Destination) -> &mut Backend {
        d.routes[0].backends[0].backend.as_mut().unwrap()
    }
    fn retry(d: &mut Destination) -> &mut RetryPolicy {
        policy(d).retry.as_mut().unwrap()
    }
    fn answer(d: &mut Destination, status: u32, name: &str, value: &str) {
        policy(d).fallback = Some(Fallback {
            action: Some(fallback::Action::Response(FallbackResponse {
                status,
                headers: vec![Header {
                    name: name.into(),
                    value: value.into(),
                }],
                body: Default::default(),
            })),
        });
    }
    let cases: &[(&str, Change)] = &[
        ("port 0", |d| d.port = 0),
        ("port 70000", |d| inner(d).port = 70_000),
        ("names no namespace", |d| d.service.clear()),
        ("protocol 99 is not known", |d| d.protocol = 99),
        ("weight of 4000000000", |d| {
            d.routes[0].backends[0].weight = 4_000_000_000
        }),
        ("names no backend", |d| {
            d.routes[0].backends[0].backend = None
        }),
        ("names no endpoints", |d| inner(d).endpoints.clear()),
        ("'GE T' is not a method", |d| {
            d.routes[0].matches[0].method = "GE T".into()
        }),
        ("not a path to match", |d| {
            d.routes[0].matches[0].path = Some(route_match::Path::PathExact("api".into()));
        }),
        ("'a b' is not a header's name", |d| {
            d.routes[0].matches[0].headers = [("a b".into(), "1".into())].into();
        }),
        ("above 31 days", |d| policy(d).request_timeout_ms = u64::MAX),
        ("above 31 days", |d| {
            inner(d).policy.as_mut().unwrap().connect_timeout_ms = u64::MAX
        }),
        ("99 is not a status", |d| retry(d).status_codes = vec![99]),
        ("17 is not a gRPC", |d| retry(d).grpc_codes = vec![17]),
        ("at most 25", |d| retry(d).attempts = 1000),
        ("less than the first", |d| {
            retry(d).backoff_base_ms = 1000;
            retry(d).backoff_max_ms = 10;
        }),
        ("101 percent", |d| retry(d).budget_percent = 101),
        ("status 101", |d| answer(d, 101, "a", "b")),
        ("may not set the header 'content-length'", |d| {
            answer(d, 200, "Content-Length", "1")
        }),
        ("holds what a header cannot", |d| {
            answer(d, 200, "a", "b\r\nc: d")
        }),
        ("needs a hash key", |d| {
            inner(d).policy.as_mut().unwrap().load_balancer = Some(LoadBalancer {
                algorithm: Algorithm::Maglev.into(),
                ..Default::default()
            });
        }),
    ];
    for (expected, change) in cases {
        let mut given = destination();
        change(&mut given);
        let said = compiled(&given).unwrap_err();
        assert!(said.contains(expected), "{expected}: {said}");
    }
}

#[test]
fn rate_limits_are_checked_and_keep_their_buckets() {
    use crate::inbound::limits::{LimitKey, Rate};

    let limit = |requests: u32, replicas: u32| RateLimit {
        namespace: "shop".into(),
        service: "web".into(),
        port: 80,
        requests,
        per_ms: 1000,
        burst: 5,
        replicas,
        key: Some(rate_limit::Key::Header("X-User".into())),
    };
    let with = |limits: Vec<RateLimit>, before: &tables::Workload| {
        let mut given = workload();
        given.ports[0].rate_limits = limits;
        compile::workload(&given, "shop/web", before).map_err(|Invalid(why)| why)
    };
    let none = tables::Workload::default();
    assert!(with(vec![], &none).unwrap().limits(8080).is_none());
    let first = with(vec![limit(10, 0)], &none).unwrap();
    let of = |table: &tables::Workload| table.limits(8080).unwrap().rates[0].clone();
    assert_eq!(of(&first).key, LimitKey::Header("x-user".into()));
    let second = Duration::from_secs(1);
    assert_eq!(of(&first).rate, Rate::new(10, second, 5));
    // Other numbers, the same callers.
    let shared = with(vec![limit(20, 4)], &first).unwrap();
    assert_eq!(of(&shared).rate, Rate::new(20, 4 * second, 2));
    assert!(Arc::ptr_eq(&of(&shared).buckets, &of(&first).buckets));
    let mut other = limit(10, 0);
    other.key = None;
    let other = with(vec![other], &first).unwrap();
    assert!(!Arc::ptr_eq(&of(&other).buckets, &of(&first).buckets));

    type Change = fn(&mut RateLimit);
    let cases: &[(&str, Change)] = &[
        ("port 8080: a rate limit lets nothing", |l| l.requests = 0),
        ("lets nothing through", |l| l.burst = 0),
        ("of no time", |l| l.per_ms = 0),
        ("above 31 days", |l| l.per_ms = u64::MAX),
        ("not a header's name", |l| {
            l.key = Some(rate_limit::Key::Header("a b".into()));
        }),
        ("names nothing to count by", |l| {
            l.key = Some(rate_limit::Key::ClientIdentity(false));
        }),
    ];
    for (expected, change) in cases {
        let mut wrong = limit(1, 0);
        change(&mut wrong);
        let said = with(vec![wrong], &none).unwrap_err();
        assert!(said.contains(expected), "{expected}: {said}");
    }
}

#[test]
fn faults_are_checked() {
    let with = |delay: (u32, u64), abort: (u32, u32, u32)| {
        let mut given = destination();
        let fault = FaultInjection {
            headers: vec![Header {
                name: "X-Chaos".into(),
                value: "on".into(),
            }],
            delay: Some(FaultDelay {
                percent: delay.0,
                duration_ms: delay.1,
            }),
            abort: Some(FaultAbort {
                percent: abort.0,
                status: abort.1,
                grpc_status: abort.2,
            }),
        };
        given.routes[0].policy.as_mut().unwrap().fault_injection = Some(fault);
        compiled(&given)
    };
    let table = with((10, 2000), (5, 404, 0)).unwrap();
    let fault = table.routes[0].policy.fault.clone().unwrap();
    assert_eq!(fault.headers, [("x-chaos".into(), "on".into())]);
    assert_eq!(fault.delay.unwrap().duration, Duration::from_secs(2));
    let abort = fault.abort.unwrap();
    assert_eq!(
        (abort.share, abort.status, abort.grpc_status),
        (0.05, Some(404), 12)
    );
    for (expected, delay, abort) in [
        ("101 percent", (101, 1), (0, 503, 0)),
        ("101 percent", (0, 1), (101, 503, 0)),
        ("above 31 days", (0, u64::MAX), (0, 503, 0)),
        ("status 101", (0, 1), (0, 101, 0)),
        ("0 is not the code", (0, 1), (0, 0, 0)),
        ("17 is not the code", (0, 1), (0, 503, 17)),
    ] {
        let said = with(delay, abort).unwrap_err();
        assert!(said.contains(expected), "{expected}: {said}");
    }
}

#[test]
fn endpoints_are_checked() {
    let with = |change: fn(&mut Endpoint)| {
        let mut given = endpoints(&["10.1.0.1:80"]);
        change(&mut given.endpoints[0]);
        endpoints::endpoints(&given, &EndpointSet::default())
            .map(|_| ())
            .map_err(|e| e.0)
    };
    assert_eq!(with(|_| {}), Ok(()));
    assert_eq!(with(|e| e.identity.clear()), Ok(()));
    for (expected, change) in [
        (
            "not address:port",
            (|e| e.address = "cart:80".into()) as fn(&mut Endpoint),
        ),
        ("no address to connect to", |e| {
            e.address = "10.1.0.1:0".into()
        }),
        ("no address to connect to", |e| e.address = "[::]:80".into()),
        ("not a workload identity", |e| e.identity = "cart".into()),
        ("not known to this version", |e| e.health = 9),
        ("weight", |e| e.weight = u32::MAX),
    ] {
        let said = with(change).unwrap_err();
        assert!(said.contains(expected), "{expected}: {said}");
    }
    let twice = endpoints(&["10.1.0.1:80", "10.1.0.1:80"]);
    let set = endpoints::endpoints(&twice, &EndpointSet::default()).unwrap();
    assert_eq!(set.endpoints.len(), 1);
}

#[test]
fn a_workload_is_checked() {
    let table = compile::workload(&workload(), "shop/web", &Default::default()).unwrap();
    assert_eq!(table.port(8080), (MtlsMode::Permissive, Protocol::Http));
    assert_eq!(table.port(9090), (MtlsMode::Strict, Protocol::Auto));
    assert_eq!(&*table.display_name, "web");
    assert!(compile::workload(&workload(), "shop/other", &Default::default()).is_err());
    assert!(!table.application_ended);
    let mut ended = workload();
    ended.application_ended = true;
    let table = compile::workload(&ended, "shop/web", &Default::default()).unwrap();
    assert!(table.application_ended);
    let with = |change: fn(&mut Workload)| {
        let mut given = workload();
        change(&mut given);
        compile::workload(&given, "shop/web", &Default::default())
            .unwrap_err()
            .0
    };
    assert!(with(|w| w.mtls = 7).contains("not known"));
    assert!(with(|w| w.ports.push(w.ports[0].clone())).contains("twice"));
    assert!(with(|w| w.telemetry.as_mut().unwrap().sampling_per_myriad = 10_001).contains("all"));
    assert!(
        with(|w| w.telemetry.as_mut().unwrap().otlp_endpoint = "collector".into()).contains("URL")
    );
}

fn sample() -> DiscoveryResponse {
    DiscoveryResponse {
        resources: vec![
            of_destination(1, destination()),
            of_endpoints(2, &["10.1.0.1:80", "[fd00::1]:80"]),
            of_workload(3),
        ],
    }
}

#[test]
fn the_sample_is_good() {
    let results = decode(&sample().encode_to_vec()).unwrap();
    assert_eq!(results, [Ok(()), Ok(()), Ok(())]);
}

proptest! {
    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
        let _ = decode(&bytes);
    }

    #[test]
    fn a_damaged_message_is_survived(
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..24),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = sample().encode_to_vec();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let _ = decode(&bytes);
        bytes.truncate(cut.index(bytes.len()));
        let _ = decode(&bytes);
    }

    #[test]
    fn any_numbers_are_survived(
        numbers in proptest::collection::vec(prop_oneof![any::<u32>(), 0u32..200], 12),
        times in proptest::collection::vec(any::<u64>(), 6),
    ) {
        let mut given = destination();
        given.port = numbers[0];
        given.protocol = numbers[1] as i32;
        let route = &mut given.routes[0];
        route.backends[0].weight = numbers[2];
        let policy = route.policy.as_mut().unwrap();
        policy.request_timeout_ms = times[0];
        policy.per_try_timeout_ms = times[1];
        let retry = policy.retry.as_mut().unwrap();
        retry.attempts = numbers[3];
        retry.backoff_base_ms = times[2];
        retry.backoff_max_ms = times[3];
        retry.max_body_bytes = times[4];
        retry.budget_percent = numbers[4];
        let backend = route.backends[0].backend.as_mut().unwrap();
        backend.port = numbers[5];
        let outlier = backend.policy.as_mut().unwrap().outlier_detection.as_mut().unwrap();
        outlier.interval_ms = times[5];
        outlier.max_ejection_percent = numbers[6];
        // What is taken keeps its promises.
        if let Ok(table) = compiled(&given) {
            prop_assert_eq!(u32::from(table.port), given.port);
            let retry = table.routes[0].policy.retry.as_ref().unwrap();
            prop_assert!(retry.backoff_base <= retry.backoff_max);
            prop_assert!(retry.budget_percent <= 100 && retry.attempts <= 25);
        }
    }
}
