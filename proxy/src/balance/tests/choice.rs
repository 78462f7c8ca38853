//! Distribution, affinity and what happens when endpoints come and go.

use std::cell::Cell;
use std::collections::HashSet;
use std::time::Instant;

use proptest::prelude::*;

use super::*;

const ALL: [Algorithm; 6] = [
    Algorithm::PeakEwma,
    Algorithm::LeastRequest,
    Algorithm::RoundRobin,
    Algorithm::Random,
    Algorithm::RingHash,
    Algorithm::Maglev,
];

/// Shares of `requests` that follow one another, each answered after 1 ms.
fn shares(algorithm: Algorithm, weights: &[u32], requests: usize) -> Vec<f64> {
    let balancer = Balancer::<()>::seeded(backend(&cell(infos(weights)), with(algorithm)), 7);
    let mut now = Instant::now();
    let mut hits = vec![0u32; weights.len()];
    for _ in 0..requests {
        let mut picked = balancer.pick(None, &[], now).unwrap();
        hits[number(picked.endpoint.info.address)] += 1;
        now += MS;
        picked.observe(Outcome::Success, now);
    }
    hits.iter()
        .map(|h| f64::from(*h) / requests as f64)
        .collect()
}

#[test]
fn equal_endpoints_get_equal_shares() {
    for algorithm in ALL {
        for share in shares(algorithm, &[1; 5], 10_000) {
            assert!((share - 0.2).abs() < 0.02, "{algorithm:?}: {share}");
        }
    }
}

#[test]
fn weights_are_honoured() {
    for algorithm in ALL {
        let shares = shares(algorithm, &[1, 2, 5, 0], 20_000);
        for (share, want) in shares.into_iter().zip([0.125, 0.25, 0.625, 0.0]) {
            assert!((share - want).abs() < 0.02, "{algorithm:?}: {share} {want}");
        }
    }
}

#[test]
fn weights_are_honoured_under_load() {
    // Forty requests at a time, all equally fast.
    for algorithm in [Algorithm::PeakEwma, Algorithm::LeastRequest] {
        let cell = cell(infos(&[1, 1, 2]));
        let balancer = Balancer::<()>::seeded(backend(&cell, with(algorithm)), 3);
        let mut now = Instant::now();
        let mut hits = [0u32; 3];
        let mut running = std::collections::VecDeque::new();
        for _ in 0..20_000 {
            now += MS / 10;
            if running.len() == 40 {
                let mut first: Picked<()> = running.pop_front().unwrap();
                first.observe(Outcome::Success, now);
            }
            let picked = balancer.pick(None, &[], now).unwrap();
            hits[number(picked.endpoint.info.address)] += 1;
            running.push_back(picked);
        }
        let share = f64::from(hits[2]) / 20_000.0;
        assert!((share - 0.5).abs() < 0.04, "{algorithm:?}: {hits:?}");
    }
}

#[test]
fn a_heavy_endpoints_turns_are_spread_out() {
    let balancer = Balancer::<()>::seeded(
        backend(&cell(infos(&[4, 1, 1])), with(Algorithm::RoundRobin)),
        1,
    );
    let now = Instant::now();
    let order: Vec<usize> = (0..600)
        .map(|_| number(balancer.pick(None, &[], now).unwrap().endpoint.info.address))
        .collect();
    assert_eq!(order.iter().filter(|n| **n == 0).count(), 400);
    // Never more than four of the heavy one in a row, and each six have each.
    let runs = order.split(|n| *n != 0).map(<[usize]>::len).max();
    assert!(runs.is_some_and(|longest| longest <= 4), "{runs:?}");
}

#[test]
fn a_slow_endpoint_gets_much_less() {
    let balancer = Balancer::<()>::seeded(
        backend(&cell(infos(&[1; 4])), with(Algorithm::PeakEwma)),
        11,
    );
    let mut now = Instant::now();
    let mut hits = [0u32; 4];
    // Open load: 1,000/s; endpoint 0 answers in 50 ms, the others in 2 ms.
    let mut running: Vec<(Instant, Picked<()>)> = Vec::new();
    for _ in 0..20_000 {
        now += MS;
        let (done, rest): (Vec<_>, Vec<_>) = running.into_iter().partition(|r| r.0 <= now);
        running = rest;
        for (at, mut picked) in done {
            picked.observe(Outcome::Success, at);
        }
        let picked = balancer.pick(None, &[], now).unwrap();
        let n = number(picked.endpoint.info.address);
        hits[n] += 1;
        running.push((now + if n == 0 { 50 } else { 2 } * MS, picked));
    }
    assert!(hits[0] < 200, "{hits:?}");
    assert!(hits[1..].iter().all(|h| *h > 5_000), "{hits:?}");
    // It recovers when it is fast again: forgiven, asked again, measured again.
    now += 60 * SECOND;
    running.clear();
    hits = [0; 4];
    for _ in 0..20_000 {
        let mut picked = balancer.pick(None, &[], now).unwrap();
        hits[number(picked.endpoint.info.address)] += 1;
        now += 2 * MS;
        picked.observe(Outcome::Success, now);
    }
    assert!(hits[0] > 3_000, "{hits:?}");
}

#[test]
fn least_request_prefers_the_idle() {
    let balancer = Balancer::<()>::seeded(
        backend(&cell(infos(&[1; 2])), with(Algorithm::LeastRequest)),
        5,
    );
    let now = Instant::now();
    let held = balancer.pick(None, &[], now).unwrap();
    for _ in 0..50 {
        let other = balancer.pick(None, &[], now).unwrap();
        assert_ne!(other.endpoint.info.address, held.endpoint.info.address);
    }
}

#[test]
fn a_refusing_endpoint_does_not_look_fast() {
    // No outlier detection: the cost alone steers away.
    let balancer =
        Balancer::<()>::seeded(backend(&cell(infos(&[1; 3])), with(Algorithm::PeakEwma)), 2);
    let mut now = Instant::now();
    let mut hits = [0u32; 3];
    for _ in 0..3_000 {
        let mut picked = balancer.pick(None, &[], now).unwrap();
        let n = number(picked.endpoint.info.address);
        hits[n] += 1;
        let (outcome, took) = if n == 0 {
            (Outcome::ConnectFailure, MS / 20)
        } else {
            (Outcome::Success, 2 * MS)
        };
        now += took;
        picked.observe(outcome, now);
    }
    assert!(hits[0] < 30, "{hits:?}");
}

#[test]
fn a_key_keeps_its_endpoint_and_has_a_second_one() {
    for algorithm in [Algorithm::RingHash, Algorithm::Maglev] {
        let cell = cell(infos(&[1; 5]));
        let one = Balancer::<()>::new(backend(&cell, with(algorithm)));
        let two = Balancer::<()>::new(backend(&cell, with(algorithm)));
        let now = Instant::now();
        let mut second = HashSet::new();
        for n in 0..200u32 {
            let key = Some(hash_bytes(&n.to_le_bytes()));
            let at = |b: &Balancer<()>, tried: &[SocketAddr]| {
                b.pick(key, tried, now).unwrap().endpoint.info.address
            };
            let home = at(&one, &[]);
            assert_eq!(home, at(&one, &[]));
            assert_eq!(home, at(&two, &[]));
            let next = at(&one, &[home]);
            assert_ne!(home, next);
            assert_eq!(next, at(&two, &[home]));
            if number(home) == 0 {
                second.insert(next);
            }
        }
        // Its keys do not all go to one neighbour.
        assert!(second.len() > 1, "{algorithm:?}");
    }
}

#[test]
fn a_second_try_goes_elsewhere_if_it_can() {
    for algorithm in ALL {
        let balancer =
            Balancer::<()>::seeded(backend(&cell(infos(&[1, 3, 1])), with(algorithm)), 9);
        let now = Instant::now();
        for key in [None, Some(99)] {
            let at = |tried: &[SocketAddr]| {
                balancer
                    .pick(key, tried, now)
                    .unwrap()
                    .endpoint
                    .info
                    .address
            };
            for _ in 0..50 {
                assert_eq!(at(&[address(0), address(1)]), address(2), "{algorithm:?}");
            }
            at(&[address(0), address(1), address(2)]);
        }
    }
}

#[test]
fn who_asks_to_be_left_alone_is_while_others_are_there() {
    for algorithm in ALL {
        let balancer = Balancer::<()>::seeded(backend(&cell(infos(&[1; 2])), with(algorithm)), 9);
        let now = Instant::now();
        let first = balancer.pick(None, &[], now).unwrap();
        let busy = first.endpoint.info.address;
        first.back_off_from(5 * SECOND, now);
        drop(first);
        let at = |tried: &[SocketAddr], now| {
            let picked = balancer.pick(None, tried, now).unwrap();
            picked.endpoint.info.address
        };
        let other = at(&[], now);
        for _ in 0..30 {
            assert_ne!(at(&[], now + SECOND), busy, "{algorithm:?}");
        }
        // The other one has been tried: then rather the one that is busy.
        assert_eq!(at(&[other], now), busy);
        let after: HashSet<_> = (0..100).map(|_| at(&[], now + 6 * SECOND)).collect();
        assert!(after.contains(&busy), "{algorithm:?}");
    }
}

#[test]
fn a_pushback_is_no_failure_and_never_leaves_nobody() {
    for algorithm in ALL {
        let policy = BackendPolicy {
            outlier: Some(outlier()),
            ..with(algorithm)
        };
        let balancer = Balancer::<()>::seeded(backend(&cell(infos(&[1; 2])), policy), 9);
        let now = Instant::now();
        // More in a row than failures would be forgiven, from both.
        let mut asked = [0; 2];
        for n in 0..40 {
            let mut picked = balancer.pick(None, &[], now + n * MS).unwrap();
            asked[number(picked.endpoint.info.address)] += 1;
            picked.pushed_back(5 * SECOND, now + n * MS);
        }
        assert!(asked.iter().all(|n| *n > 0), "{algorithm:?}: {asked:?}");
        for status in balancer.snapshot(now) {
            assert_eq!((status.state, status.ejections), (HealthState::Closed, 0));
        }
        // Capped: however long it asks for, it is asked again after a minute.
        let picked = balancer.pick(None, &[], now + 60 * SECOND).unwrap();
        let (address, later) = (picked.endpoint.info.address, now + 60 * SECOND);
        picked.back_off_from(86_400 * SECOND, later);
        drop(picked);
        let hits = |at| {
            let picks = (0..100).map(|_| balancer.pick(None, &[], at).unwrap());
            picks.filter(|p| p.endpoint.info.address == address).count()
        };
        assert_eq!(hits(later + 59 * SECOND), 0, "{algorithm:?}");
        assert!(hits(later + 61 * SECOND) > 0, "{algorithm:?}");
    }
}

#[test]
fn endpoints_that_are_not_ready_are_out_at_once() {
    for algorithm in ALL {
        let cell = cell(infos(&[1; 3]));
        let balancer = Balancer::<()>::seeded(backend(&cell, with(algorithm)), 1);
        let now = Instant::now();
        balancer.pick(Some(5), &[], now).unwrap();
        set(
            &cell,
            vec![
                info(0, 1, Health::NotReady, Arc::default()),
                info(1, 1, Health::Ready, Arc::default()),
                info(2, 1, Health::Draining, Arc::default()),
            ],
        );
        for n in 0..50 {
            let picked = balancer.pick(Some(n), &[], now).unwrap();
            assert_eq!(picked.endpoint.info.address, address(1), "{algorithm:?}");
        }
        set(&cell, vec![info(0, 1, Health::NotReady, Arc::default())]);
        let why = balancer.pick(None, &[], now).err();
        assert_eq!(why, Some(Unavailable::NoneReady));
        set(&cell, infos(&[0, 0]));
        let why = balancer.pick(None, &[], now).err();
        assert_eq!(why, Some(Unavailable::NoneReady));
        set(&cell, vec![]);
        let why = balancer.pick(None, &[], now).err();
        assert_eq!(why, Some(Unavailable::NoEndpoints));
    }
}

#[test]
fn endpoints_that_stay_keep_what_is_known_of_them() {
    let cell = cell(infos(&[1; 2]));
    let balancer = Balancer::<Cell<u32>>::seeded(backend(&cell, BackendPolicy::default()), 1);
    let now = Instant::now();
    let mut held = balancer.pick(None, &[address(1)], now).unwrap();
    held.endpoint.pool.set(42);
    held.observe(Outcome::Success, now + 7 * MS);

    // A change of weight, a newcomer, and a recompiled policy.
    let mut endpoints = infos(&[3, 1, 1]);
    endpoints.remove(1);
    set(&cell, endpoints);
    let balancer = balancer.replace(backend(&cell, with(Algorithm::LeastRequest)));
    let status = balancer.snapshot(now + 7 * MS);
    assert_eq!(status.len(), 2);
    assert_eq!((status[0].address, status[0].weight), (address(0), 3));
    assert_eq!((status[0].in_flight, status[0].ewma), (1, 7 * MS));
    assert_eq!(status[1].ewma, Duration::ZERO);
    let again = balancer.pick(None, &[address(2)], now).unwrap();
    assert_eq!(again.endpoint.pool.get(), 42);
    assert_eq!(again.endpoint.in_flight(), 2);

    // Gone from the choice, alive in what runs.
    set(&cell, infos(&[1; 4])[2..].to_vec());
    for _ in 0..20 {
        let other = balancer.pick(None, &[], now).unwrap();
        assert_ne!(other.endpoint.info.address, address(0));
    }
    assert_eq!(held.endpoint.pool.get(), 42);
    drop(again);
    assert_eq!(held.endpoint.in_flight(), 1);

    // The address comes back as another workload: nothing of the old one is taken for it.
    let mut other = EndpointInfo {
        workload: "shop/other".into(),
        ..Arc::into_inner(info(2, 1, Health::Ready, Arc::default())).unwrap()
    };
    other.zone = "b".into();
    let known = balancer.pick(None, &[address(3)], now).unwrap();
    known.endpoint.pool.set(5);
    set(&cell, vec![Arc::new(other)]);
    assert_eq!(
        balancer.pick(None, &[], now).unwrap().endpoint.pool.get(),
        0
    );
}

proptest! {
    /// Whatever happens, a pick is one of the ready endpoints, the load adds up, and nothing
    /// panics; with a ready endpoint untried, it is not one of those tried.
    #[test]
    fn a_pick_is_always_sound(
        seed: u64,
        algorithm in 0usize..6,
        weights in prop::collection::vec(0u32..4, 1..12),
        steps in prop::collection::vec((0u8..6, any::<u64>(), 0u64..40_000), 1..80),
    ) {
        let mut policy = with(ALL[algorithm]);
        policy.panic_threshold = (seed % 101) as u32;
        policy.outlier = Some(outlier());
        let mut endpoints = infos(&weights);
        let cell = cell(endpoints.clone());
        let balancer = Balancer::<()>::seeded(backend(&cell, policy), seed);
        let mut now = Instant::now();
        let mut held: Vec<Picked<()>> = Vec::new();
        for (kind, random, pause) in steps {
            now += Duration::from_millis(pause);
            match kind {
                0 => {
                    // One changes its mind.
                    let n = random as usize % endpoints.len();
                    let state = [Health::Ready, Health::NotReady, Health::Draining][random as usize % 3];
                    endpoints[n] = info(n, weights[n], state, endpoints[n].health.clone());
                    set(&cell, endpoints.clone());
                }
                1 | 2 if !held.is_empty() => {
                    let mut done = held.swap_remove(random as usize % held.len());
                    let outcome = [Outcome::Success, Outcome::GatewayError, Outcome::ConnectFailure, Outcome::Neutral][random as usize % 4];
                    done.observe(outcome, now);
                    if random % 7 == 0 {
                        done.back_off_from(3 * SECOND, now);
                    }
                }
                _ => {
                    let key = (random % 2 == 0).then_some(random);
                    let tried: Vec<_> = held.iter().rev().take(2).map(|p| p.endpoint.info.address).collect();
                    let ready: Vec<_> = endpoints.iter().filter(|e| e.state == Health::Ready && e.weight > 0).collect();
                    match balancer.pick(key, &tried, now) {
                        Ok(picked) => {
                            let at = picked.endpoint.info.address;
                            prop_assert!(ready.iter().any(|e| e.address == at));
                            let well_untried = ready.iter().any(|e| !tried.contains(&e.address) && e.health.state() == HealthState::Closed);
                            prop_assert!(!well_untried || !tried.contains(&at));
                            held.push(picked);
                        }
                        Err(Unavailable::AllEjected) => {
                            prop_assert!(ready.iter().all(|e| e.health.state() != HealthState::Closed));
                        }
                        Err(_) => prop_assert!(ready.is_empty()),
                    }
                }
            }
            let loads: u32 = balancer.snapshot(now).iter().map(|s| s.in_flight).sum();
            prop_assert_eq!(loads as usize, held.len());
        }
    }
}
