//! How new endpoints come to their share.

use std::time::Instant;

use super::*;

/// All that weigh; those that hash are the others.
const WEIGHING: [Algorithm; 4] = [
    Algorithm::PeakEwma,
    Algorithm::LeastRequest,
    Algorithm::RoundRobin,
    Algorithm::Random,
];

fn slow(algorithm: Algorithm) -> BackendPolicy {
    BackendPolicy {
        slow_start: Some(30 * SECOND),
        ..with(algorithm)
    }
}

/// The share of each endpoint in `requests` requests, one each 100 us from `now` on, each answered
/// after 1 ms.
fn shares(balancer: &Balancer<()>, requests: u32, now: Instant) -> Vec<f64> {
    let mut hits = vec![0u32; balancer.snapshot(now).len()];
    for n in 0..requests {
        let at = now + n * MS / 10;
        let mut picked = balancer.pick(None, &[], at).unwrap();
        hits[number(picked.endpoint.info.address)] += 1;
        picked.observe(Outcome::Success, at + MS);
    }
    hits.iter()
        .map(|n| f64::from(*n) / f64::from(requests))
        .collect()
}

#[test]
fn a_new_endpoints_share_grows_in_a_straight_line() {
    for algorithm in WEIGHING {
        let endpoints = infos(&[1; 4]);
        let cell = cell(endpoints[..3].to_vec());
        let balancer = Balancer::<()>::seeded(backend(&cell, slow(algorithm)), 11);
        let start = Instant::now();
        // Those that were there first are not new.
        for share in shares(&balancer, 3_000, start) {
            assert!((share - 1.0 / 3.0).abs() < 0.05, "{algorithm:?}: {share}");
        }
        set(&cell, endpoints.clone());
        let begun = start + SECOND;
        assert!(balancer.pick(None, &[], begun).is_ok());
        for (seconds, weight) in [
            (1, 0.1),
            (6, 0.2),
            (15, 0.5),
            (24, 0.8),
            (31, 1.0),
            (300, 1.0),
        ] {
            let want = weight / (3.0 + weight);
            let share = shares(&balancer, 5_000, begun + seconds * SECOND)[3];
            // Two are drawn where load decides, and the new one is less loaded.
            let room = if weight < 1.0 { 0.06 } else { 0.04 };
            assert!(
                (share - want).abs() < room,
                "{algorithm:?} after {seconds} s: {share}, not {want}"
            );
        }
    }
}

#[test]
fn who_becomes_ready_is_new_and_who_stays_is_not() {
    let state = |n, state, health: &Arc<EndpointHealth>| info(n, 1, state, health.clone());
    let health: Vec<Arc<EndpointHealth>> = (0..3).map(|_| Arc::default()).collect();
    let all = |third| {
        vec![
            state(0, Health::Ready, &health[0]),
            state(1, Health::Ready, &health[1]),
            state(2, third, &health[2]),
        ]
    };
    let cell = cell(all(Health::NotReady));
    let balancer = Balancer::<()>::seeded(backend(&cell, slow(Algorithm::RoundRobin)), 3);
    let start = Instant::now();
    assert_eq!(shares(&balancer, 1_000, start)[2], 0.0);
    set(&cell, all(Health::Ready));
    let share = shares(&balancer, 2_100, start + SECOND)[2];
    assert!((share - 1.0 / 21.0).abs() < 0.01, "{share}");
    // Another change takes nothing from it, nor does another policy.
    set(&cell, all(Health::Ready));
    let later = start + 16 * SECOND;
    let share = shares(&balancer, 2_500, later)[2];
    assert!((share - 0.2).abs() < 0.02, "{share}");
    let balancer = balancer.replace(backend(&cell, slow(Algorithm::RoundRobin)));
    let share = shares(&balancer, 2_500, later)[2];
    assert!((share - 0.2).abs() < 0.02, "{share}");
    // It leaves and returns.
    set(&cell, all(Health::NotReady));
    assert_eq!(shares(&balancer, 100, start + 60 * SECOND)[2], 0.0);
    set(&cell, all(Health::Ready));
    let share = shares(&balancer, 2_100, start + 61 * SECOND)[2];
    assert!((share - 1.0 / 21.0).abs() < 0.01, "{share}");
}

#[test]
fn weights_hold_beside_it() {
    for algorithm in [Algorithm::RoundRobin, Algorithm::Random] {
        let endpoints = infos(&[1, 2, 3]);
        let cell = cell(endpoints[..2].to_vec());
        let balancer = Balancer::<()>::seeded(backend(&cell, slow(algorithm)), 5);
        let now = Instant::now();
        shares(&balancer, 10, now);
        set(&cell, endpoints.clone());
        assert!(balancer.pick(None, &[], now + SECOND).is_ok());
        // Half of its weight: 1, 2, 1.5.
        let found = shares(&balancer, 9_000, now + 16 * SECOND);
        for (share, want) in found.iter().zip([1.0 / 4.5, 2.0 / 4.5, 1.5 / 4.5]) {
            assert!((share - want).abs() < 0.03, "{algorithm:?}: {found:?}");
        }
    }
}

#[test]
fn nobody_is_spared_where_nobody_else_is() {
    let cell = cell(Vec::new());
    let balancer = Balancer::<()>::seeded(backend(&cell, slow(Algorithm::RoundRobin)), 5);
    let now = Instant::now();
    assert!(balancer.pick(None, &[], now).is_err());
    set(&cell, infos(&[1, 1]));
    for share in shares(&balancer, 1_000, now + SECOND) {
        assert!((share - 0.5).abs() < 0.01, "{share}");
    }
}

#[test]
fn keys_stay_where_they_are() {
    for algorithm in [Algorithm::RingHash, Algorithm::Maglev] {
        let endpoints = infos(&[1; 4]);
        let cell = cell(endpoints[..3].to_vec());
        let one = Balancer::<()>::new(backend(&cell, slow(algorithm)));
        let now = Instant::now();
        assert!(one.pick(Some(1), &[], now).is_ok());
        set(&cell, endpoints.clone());
        let two = Balancer::<()>::new(backend(&cell, with(algorithm)));
        for n in 0..200u32 {
            let key = Some(hash_bytes(&n.to_le_bytes()));
            let at = |b: &Balancer<()>| b.pick(key, &[], now).unwrap().endpoint.info.address;
            assert_eq!(at(&one), at(&two), "{algorithm:?}");
        }
    }
}
