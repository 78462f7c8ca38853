//! Endpoints near by, and when the others help.

use std::collections::BTreeSet;
use std::time::Instant;

use super::*;
use crate::tables::{Hints, Workload};

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

/// Endpoints with these hints (zone, node), as a proxy in zone "a" on node "n" sees them.
fn hinted(hints: &[(&str, &str)]) -> EndpointSet {
    static GENERATION: AtomicU64 = AtomicU64::new(1);
    let name = |name: &str| {
        let given = Some(name).filter(|name| !name.is_empty());
        given.map(Arc::from).into_iter().collect()
    };
    let set = EndpointSet {
        generation: GENERATION.fetch_add(1, Ordering::Relaxed),
        endpoints: zoned(&vec![""; hints.len()]),
        hints: hints
            .iter()
            .map(|(zone, node)| Hints {
                zones: name(zone),
                nodes: name(node),
            })
            .collect(),
        ..EndpointSet::default()
    };
    let here = Workload {
        zone: "a".into(),
        node: "n".into(),
        ..Workload::default()
    };
    set.seen_from(&here)
}

#[test]
fn hints_say_who_is_near() {
    let now = Instant::now();
    for (hints, unwell, expected) in [
        (&[("a", ""), ("b", "")][..], &[][..], &[0][..]),
        (&[("a", "m"), ("a", "n"), ("b", "o")], &[], &[1]),
        // Nobody is meant for this node: for the zone then; nor for that: everybody.
        (&[("a", "m"), ("a", "o"), ("b", "p")], &[], &[0, 1]),
        (&[("b", "m"), ("c", "o")], &[], &[0, 1]),
        (&[("b", ""), ("c", "")], &[], &[0, 1]),
        // Whoever is well elsewhere helps when nobody near is.
        (&[("a", ""), ("a", ""), ("b", "")], &[0], &[1]),
        (
            &[("a", ""), ("a", ""), ("b", ""), ("b", "")],
            &[0, 1],
            &[2, 3],
        ),
        (&[("a", "n"), ("a", "m"), ("b", "o")], &[0], &[1, 2]),
    ] {
        let cell = cell(Vec::new());
        cell.current.store(Arc::new(hinted(hints)));
        for n in unwell {
            cell.current.load().endpoints[*n].health.set_well(false);
        }
        let policy = with(Algorithm::RoundRobin);
        let balancer = Balancer::seeded(backend(&cell, policy), 1);
        let seen: Vec<usize> = used(&balancer, now).into_iter().collect();
        assert_eq!(seen, expected, "{hints:?} {unwell:?}");
    }
}

/// A preference that a policy asks for goes before what the hints say.
#[test]
fn a_policy_goes_before_hints() {
    let now = Instant::now();
    let mut set = hinted(&[("a", ""), ("b", "")]);
    for (info, zone) in set.endpoints.iter_mut().zip(["b", "a"]) {
        Arc::get_mut(info).unwrap().zone = zone.into();
    }
    let cell = cell(Vec::new());
    cell.current.store(Arc::new(set));
    for (policy, expected) in [
        (with(Algorithm::Random), 0),
        (preferring(Algorithm::Random, 0), 1),
    ] {
        let balancer = Balancer::seeded(backend(&cell, policy), 1);
        let balancer = balancer.replace_in(balancer.backend().clone(), "a".into());
        assert_eq!(used(&balancer, now), BTreeSet::from([expected]));
    }
}

#[test]
fn a_second_try_leaves_those_meant_when_it_must() {
    let now = Instant::now();
    let cell = cell(Vec::new());
    cell.current
        .store(Arc::new(hinted(&[("a", ""), ("b", "")])));
    let balancer: Balancer<()> = Balancer::seeded(backend(&cell, with(Algorithm::PeakEwma)), 1);
    let picked = balancer.pick(None, &[address(0)], now).unwrap();
    assert_eq!(number(picked.endpoint.info.address), 1);
}

/// Only a proxy's own place decides, also when it is known later than the endpoints.
#[test]
fn a_proxy_that_moves_prefers_others() {
    let at = |zone: &str, node: &str| Workload {
        zone: zone.into(),
        node: node.into(),
        ..Workload::default()
    };
    let set = hinted(&[("a", "n"), ("a", "m"), ("b", "o")]);
    assert_eq!(*set.near, [0]);
    assert!(set.moved_to(&at("a", "n")).is_none(), "it is where it was");
    let zone = set.moved_to(&at("a", "")).unwrap();
    assert_eq!(
        (&*zone.near, zone.generation),
        (&[0, 1][..], set.generation + 1)
    );
    assert_eq!(*zone.moved_to(&at("x", "o")).unwrap().near, [2]);
    assert_eq!(*zone.moved_to(&at("x", "y")).unwrap().near, [0; 0]);
    assert_eq!(
        *zone.moved_to(&at("", "")).unwrap().near,
        [0; 0],
        "not known"
    );
}

#[test]
fn nobody_on_this_node_is_said_as_such() {
    let now = Instant::now();
    let cell = cell(Vec::new());
    let balancer: Balancer<()> = Balancer::seeded(backend(&cell, with(Algorithm::PeakEwma)), 1);
    let why = |endpoints: Vec<Arc<EndpointInfo>>, node_local: bool| {
        let generation = cell.current.load().generation + 1;
        cell.current.store(Arc::new(EndpointSet {
            generation,
            endpoints,
            node_local,
            ..EndpointSet::default()
        }));
        balancer.pick(None, &[], now).err()
    };
    assert_eq!(why(Vec::new(), true), Some(Unavailable::NoneOnNode));
    assert_eq!(why(Vec::new(), false), Some(Unavailable::NoEndpoints));
    let one = || vec![info(0, 1, Health::NotReady, Arc::default())];
    assert_eq!(why(one(), true), Some(Unavailable::NoneReady));
    assert_eq!(why(infos(&[1]), true), None);
}
