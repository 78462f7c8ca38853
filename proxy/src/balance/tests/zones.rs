//! Endpoints near by, and when the others help.

use std::collections::BTreeSet;
use std::time::Instant;

use super::*;

/// Endpoints of weight 1 in these zones.
fn zoned(zones: &[&str]) -> Vec<Arc<EndpointInfo>> {
    (0..)
        .zip(zones)
        .map(|(n, zone)| {
            Arc::new(EndpointInfo {
                address: address(n),
                identity: None,
                workload: format!("shop/cart-{n}").into(),
                zone: (*zone).into(),
                weight: 1,
                state: Health::Ready,
                health: Arc::default(),
                siblings: None,
            })
        })
        .collect()
}

fn preferring(algorithm: Algorithm, threshold: u32) -> BackendPolicy {
    BackendPolicy {
        zone_threshold: Some(threshold),
        ..with(algorithm)
    }
}

/// Who gets requests.
fn used(balancer: &Balancer<()>, now: Instant) -> BTreeSet<usize> {
    (0..300)
        .filter_map(|_| balancer.pick(None, &[], now).ok())
        .map(|picked| number(picked.endpoint.info.address))
        .collect()
}

#[test]
fn requests_stay_in_the_zone_while_it_can_take_them() {
    let now = Instant::now();
    for (zones, unwell, threshold, expected) in [
        // An equal part: everything stays.
        (&["a", "a", "b", "b"][..], &[][..], 70, &[0, 1][..]),
        (&["a", "a", "b", "b"], &[], 100, &[0, 1]),
        // Half of it is not enough, unless that is what was asked for.
        (&["a", "a", "b", "b"], &[0], 70, &[1, 2, 3]),
        (&["a", "a", "b", "b"], &[0], 50, &[1]),
        (&["a", "a", "b", "b"], &[0, 1], 0, &[2, 3]),
        // Too small a zone; one that has more than its part.
        (&["a", "b", "b", "b"], &[], 70, &[0, 1, 2, 3]),
        (&["a", "b", "b", "b"], &[], 50, &[0]),
        (&["a", "a", "a", "b"], &[0], 100, &[1, 2]),
        // Nobody is near.
        (&["b", "b", "c"], &[], 0, &[0, 1, 2]),
        (&["", ""], &[], 0, &[0, 1]),
        // When so few are well that all are used, all are.
        (&["a", "b", "b", "b"], &[1, 2, 3], 0, &[0, 1, 2, 3]),
    ] {
        for algorithm in [
            Algorithm::Random,
            Algorithm::RoundRobin,
            Algorithm::PeakEwma,
        ] {
            let cell = cell(zoned(zones));
            for n in unwell {
                cell.current.load().endpoints[*n].health.set_well(false);
            }
            let balancer = Balancer::seeded(backend(&cell, preferring(algorithm, threshold)), 1);
            let balancer = balancer.replace_in(balancer.backend().clone(), "a".into());
            let expected: BTreeSet<usize> = expected.iter().copied().collect();
            // Peak EWMA compares two at random, and may like one of them better.
            let seen = used(&balancer, now);
            if algorithm == Algorithm::PeakEwma {
                assert!(
                    seen.is_subset(&expected),
                    "{zones:?} {unwell:?} {threshold}"
                );
            } else {
                assert_eq!(
                    seen, expected,
                    "{zones:?} {unwell:?} {threshold} {algorithm:?}"
                );
            }
            // Without a preference, or without a zone, everybody is used.
            let anywhere = balancer.replace_in(balancer.backend().clone(), "".into());
            assert!(used(&anywhere, now).len() >= expected.len());
        }
    }
}

#[test]
fn a_second_try_leaves_the_zone_when_it_must() {
    let now = Instant::now();
    let cell = cell(zoned(&["a", "b"]));
    let balancer = Balancer::seeded(backend(&cell, preferring(Algorithm::Random, 70)), 1);
    let balancer = balancer.replace_in(balancer.backend().clone(), "a".into());
    assert_eq!(used(&balancer, now), BTreeSet::from([0]));
    let picked = balancer.pick(None, &[address(0)], now).unwrap();
    assert_eq!(number(picked.endpoint.info.address), 1);
}
