//! Ejection, probes, return and panic, with the time in the test's hand.

use std::time::Instant;

use proptest::prelude::*;

use super::*;
use crate::balance::health::{Judge, Room};
use crate::balance::{circuit::Fault, clock};

/// No panic; random, so that every endpoint in the choice comes up.
fn strict(outlier: OutlierDetection) -> BackendPolicy {
    BackendPolicy {
        panic_threshold: 0,
        outlier: Some(outlier),
        ..with(Algorithm::Random)
    }
}

/// Sends to one endpoint, whatever the algorithm would like.
fn to(balancer: &Balancer<()>, n: usize, now: Instant) -> Option<Picked<()>> {
    (0..500)
        .filter_map(|_| balancer.pick(None, &[], now).ok())
        .find(|picked| picked.endpoint.info.address == address(n))
}

fn fail(balancer: &Balancer<()>, n: usize, outcome: Outcome, times: u32, now: Instant) {
    for _ in 0..times {
        let mut picked = to(balancer, n, now).expect("the endpoint is in the choice");
        picked.observe(outcome, now);
    }
}

fn state(cell: &EndpointsCell, n: usize) -> HealthState {
    cell.current.load().endpoints[n].health.state()
}

fn is_ejected(cell: &EndpointsCell, n: usize) -> bool {
    matches!(state(cell, n), HealthState::Ejected { .. })
}

#[test]
fn whom_active_checks_find_unwell_gets_nothing_not_even_a_probe() {
    let cell = cell(infos(&[1; 3]));
    let policy = strict(outlier());
    let balancer = Balancer::seeded(backend(&cell, policy), 1);
    let mut now = Instant::now();
    let health = cell.current.load().endpoints[1].health.clone();
    let seen = |now| to(&balancer, 1, now).is_some();
    assert!(seen(now));
    health.set_well(false);
    assert!(!seen(now));
    assert!(!balancer.snapshot(now)[1].well);
    health.set_well(true);
    // Ejected as well: its probe waits for the checks.
    fail(&balancer, 1, Outcome::GatewayError, 3, now);
    health.set_well(false);
    now += 60 * SECOND;
    assert!(!seen(now));
    health.set_well(true);
    assert!(seen(now));
    // When too few are well, all are used.
    let panicking = BackendPolicy {
        panic_threshold: 50,
        ..with(Algorithm::Random)
    };
    let balancer = Balancer::seeded(backend(&cell, panicking), 1);
    for endpoint in &cell.current.load().endpoints[..2] {
        endpoint.health.set_well(false);
    }
    assert!(to(&balancer, 0, now).is_some() && to(&balancer, 2, now).is_some());
}

#[test]
fn failures_in_a_row_eject_and_a_success_between_does_not() {
    for (outcome, needed) in [
        (Outcome::GatewayError, 3),
        (Outcome::ConnectFailure, 3),
        (Outcome::Reset, 3),
        (Outcome::Timeout, 3),
        (Outcome::ServerError, 5),
    ] {
        let cell = cell(infos(&[1; 3]));
        let balancer = Balancer::seeded(backend(&cell, strict(outlier())), 1);
        let now = Instant::now();
        fail(&balancer, 1, outcome, needed - 1, now);
        fail(&balancer, 1, Outcome::Success, 1, now);
        fail(&balancer, 1, outcome, needed - 1, now);
        fail(&balancer, 1, Outcome::Neutral, 1, now);
        assert_eq!(state(&cell, 1), HealthState::Closed, "{outcome:?}");
        fail(&balancer, 1, outcome, 1, now);
        assert!(is_ejected(&cell, 1), "{outcome:?}");
        assert!(to(&balancer, 1, now).is_none());
        assert_eq!(cell.current.load().endpoints[1].health.ejections(), 1);
    }
}

#[test]
fn all_workers_see_an_ejection_and_one_of_them_probes() {
    let cell = cell(infos(&[1; 3]));
    let workers: Vec<Balancer<()>> = (0..4)
        .map(|seed| Balancer::seeded(backend(&cell, strict(outlier())), seed))
        .collect();
    let now = Instant::now();
    fail(&workers[0], 0, Outcome::GatewayError, 3, now);
    for worker in &workers {
        assert!(to(worker, 0, now + 26 * SECOND).is_none());
    }
    // Its time is over (30 s, give or take a tenth): one request of one worker.
    let due = now + 34 * SECOND;
    let mut probe = workers[2].pick(None, &[], due).unwrap();
    assert!(probe.is_probe());
    assert_eq!(probe.endpoint.info.address, address(0));
    assert_eq!(state(&cell, 0), HealthState::HalfOpen);
    for worker in &workers {
        assert!(to(worker, 0, due).is_none());
    }
    // It fails: out again, for twice as long.
    probe.observe(Outcome::ServerError, due);
    let HealthState::Ejected { until, times } = state(&cell, 0) else {
        panic!("{:?}", state(&cell, 0))
    };
    assert_eq!(times, 2);
    let time = until - due;
    assert!(time > 53 * SECOND && time < 67 * SECOND, "{time:?}");
    // The next one succeeds: back for everybody.
    let due = until + MS;
    let mut probe = workers[1].pick(None, &[], due).unwrap();
    assert!(probe.is_probe());
    probe.observe(Outcome::Success, due);
    assert_eq!(state(&cell, 0), HealthState::Closed);
    for worker in &workers {
        assert!(to(worker, 0, due).is_some());
    }
    let health = cell.current.load().endpoints[0].health.clone();
    assert_eq!((health.ejections(), health.returns()), (2, 1));
}

#[test]
fn a_probe_that_comes_to_nothing_is_made_again() {
    let cell = cell(infos(&[1; 2]));
    let balancer = Balancer::seeded(backend(&cell, strict(outlier())), 1);
    let now = Instant::now();
    fail(&balancer, 0, Outcome::GatewayError, 3, now);
    let due = now + 40 * SECOND;
    let dropped = balancer.pick(None, &[], due).unwrap();
    assert!(dropped.is_probe());
    drop(dropped);
    // At once; and if it hangs, when the base time has passed.
    let hanging = balancer.pick(None, &[], due).unwrap();
    assert!(hanging.is_probe());
    let wait = |seconds| balancer.pick(None, &[], due + seconds * SECOND).unwrap();
    assert!(!wait(29).is_probe());
    let mut second = wait(30);
    assert!(second.is_probe());
    second.observe(Outcome::Success, due + 30 * SECOND);
    assert_eq!(state(&cell, 0), HealthState::Closed);
    drop(hanging);
    assert_eq!(state(&cell, 0), HealthState::Closed);
}

#[test]
fn a_second_try_is_not_a_probe_if_another_is_well() {
    let cell = cell(infos(&[1; 3]));
    let balancer = Balancer::seeded(backend(&cell, strict(outlier())), 1);
    let now = Instant::now();
    fail(&balancer, 0, Outcome::GatewayError, 3, now);
    let due = now + 40 * SECOND;
    for _ in 0..20 {
        let second = balancer.pick(None, &[address(1)], due).unwrap();
        assert_eq!(second.endpoint.info.address, address(2));
    }
}

#[test]
fn late_answers_change_nothing() {
    let cell = cell(infos(&[1; 2]));
    let balancer = Balancer::seeded(backend(&cell, strict(outlier())), 1);
    let now = Instant::now();
    let mut late: Vec<_> = (0..8).map(|_| to(&balancer, 0, now).unwrap()).collect();
    fail(&balancer, 0, Outcome::GatewayError, 3, now);
    let ejected = state(&cell, 0);
    for (n, picked) in late.iter_mut().enumerate() {
        let outcome = [Outcome::Success, Outcome::GatewayError][n % 2];
        picked.observe(outcome, now + SECOND);
    }
    assert_eq!(state(&cell, 0), ejected);
}

#[test]
fn no_more_than_the_share_is_ejected_but_one_of_two_may_be() {
    for (endpoints, percent, out) in [(10, 30, 3), (10, 5, 1), (2, 10, 1), (1, 50, 0), (4, 0, 0)] {
        let cell = cell(infos(&vec![1; endpoints]));
        let policy = OutlierDetection {
            max_ejection_percent: percent,
            ..outlier()
        };
        let balancer = Balancer::seeded(backend(&cell, strict(policy)), 1);
        let now = Instant::now();
        for n in 0..endpoints {
            fail(&balancer, n, Outcome::GatewayError, 3, now);
        }
        let ejected = (0..endpoints).filter(|n| is_ejected(&cell, *n)).count();
        assert_eq!(ejected, out, "{endpoints} endpoints, {percent} %");
    }
}

#[test]
fn with_too_few_well_all_are_used() {
    let cell = cell(infos(&[1; 4]));
    let policy = BackendPolicy {
        panic_threshold: 50,
        ..strict(OutlierDetection {
            max_ejection_percent: 100,
            ..outlier()
        })
    };
    let balancer = Balancer::seeded(backend(&cell, policy), 1);
    let now = Instant::now();
    for n in 0..2 {
        fail(&balancer, n, Outcome::GatewayError, 3, now);
    }
    // Half of them: not fewer than the threshold.
    assert!(to(&balancer, 0, now).is_none());
    fail(&balancer, 2, Outcome::GatewayError, 3, now);
    for n in 0..4 {
        let picked = to(&balancer, n, now).expect("panic: all are used");
        assert!(!picked.is_probe());
    }
}

#[test]
fn without_panic_all_can_be_ejected_until_a_probe_is_due() {
    let cell = cell(infos(&[1; 2]));
    let policy = OutlierDetection {
        max_ejection_percent: 100,
        ..outlier()
    };
    let balancer = Balancer::seeded(backend(&cell, strict(policy)), 1);
    let now = Instant::now();
    for n in 0..2 {
        fail(&balancer, n, Outcome::GatewayError, 3, now);
    }
    let pick = |tried: &[SocketAddr], at| balancer.pick(None, tried, at);
    assert_eq!(pick(&[], now).err(), Some(Unavailable::AllEjected));
    // Even for a second try, a probe is better than nothing.
    let due = now + 40 * SECOND;
    assert!(pick(&[address(0)], due).unwrap().is_probe());
}

#[test]
fn keys_move_to_their_second_endpoint_while_the_first_is_out() {
    for algorithm in [Algorithm::RingHash, Algorithm::Maglev] {
        let cell = cell(infos(&[1; 4]));
        let policy = BackendPolicy {
            algorithm,
            ..strict(outlier())
        };
        let balancer = Balancer::<()>::seeded(backend(&cell, policy), 1);
        let now = Instant::now();
        let keys: Vec<u64> = (0..100u32).map(|n| hash_bytes(&n.to_le_bytes())).collect();
        let at = |key, now| balancer.pick(Some(key), &[], now).unwrap();
        let homes: Vec<_> = keys
            .iter()
            .map(|k| at(*k, now).endpoint.info.address)
            .collect();
        let key = keys[0];
        for _ in 0..3 {
            at(key, now).observe(Outcome::GatewayError, now);
        }
        for (k, home) in keys.iter().zip(&homes) {
            let moved = at(*k, now).endpoint.info.address;
            assert_eq!(moved != *home, *home == homes[0], "{algorithm:?}");
            assert_eq!(moved, at(*k, now).endpoint.info.address);
        }
        // A key of its own probes it; the others' keys are left where they are.
        let due = now + 40 * SECOND;
        let elsewhere = keys[homes.iter().position(|h| *h != homes[0]).unwrap()];
        assert!(!at(elsewhere, due).is_probe());
        let mut probe = at(key, due);
        assert!(probe.is_probe());
        probe.observe(Outcome::Success, due);
        assert_eq!(at(key, due).endpoint.info.address, homes[0]);
    }
}

#[test]
fn a_low_success_rate_ejects_at_the_end_of_its_window() {
    let rate = OutlierDetection {
        consecutive_gateway_errors: 0,
        consecutive_5xx: 0,
        success_rate_threshold: 80,
        success_rate_min_requests: 100,
        ..outlier()
    };
    // Requests, of which every so many fail, and whether that ejects.
    for (requests, every, ejects) in [(200, 4, true), (200, 6, false), (90, 2, false)] {
        let cell = cell(infos(&[1; 2]));
        let balancer = Balancer::seeded(backend(&cell, strict(rate.clone())), 1);
        let now = Instant::now();
        for n in 0..requests {
            let outcome = if n % every == 0 {
                Outcome::ServerError
            } else {
                Outcome::Success
            };
            fail(&balancer, 0, outcome, 1, now + n * 10 * MS);
        }
        assert_eq!(state(&cell, 0), HealthState::Closed, "the window is open");
        fail(&balancer, 0, Outcome::Success, 1, now + 11 * SECOND);
        assert_eq!(is_ejected(&cell, 0), ejects, "{requests} / {every}");
    }
    // Long ago is not now.
    let cell = cell(infos(&[1; 2]));
    let balancer = Balancer::seeded(backend(&cell, strict(rate)), 1);
    let now = Instant::now();
    fail(&balancer, 0, Outcome::ServerError, 200, now);
    fail(&balancer, 0, Outcome::Success, 1, now + 60 * SECOND);
    assert_eq!(state(&cell, 0), HealthState::Closed);
}

#[test]
fn without_outlier_detection_nothing_is_ejected() {
    let cell = cell(infos(&[1; 2]));
    let mut policy = strict(outlier());
    let detecting = Balancer::seeded(backend(&cell, policy.clone()), 1);
    let now = Instant::now();
    fail(&detecting, 0, Outcome::GatewayError, 3, now);
    assert!(to(&detecting, 0, now).is_none());
    // The policy is taken away: the endpoint is back.
    policy.outlier = None;
    let plain = detecting.replace(backend(&cell, policy));
    assert!(to(&plain, 0, now).is_some());
}

/// What happens to one endpoint's health.
#[derive(Debug, Clone, Copy)]
enum Event {
    Succeed,
    Fail(bool),
    AskForProbe,
    EndProbe(Option<bool>),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => Just(Event::Succeed),
        4 => any::<bool>().prop_map(Event::Fail),
        3 => Just(Event::AskForProbe),
        2 => prop::option::of(any::<bool>()).prop_map(Event::EndProbe),
    ]
}

proptest! {
    /// The circuit as its callers see it, against a plain model of it.
    #[test]
    fn the_circuit_does_what_its_picture_says(
        events in prop::collection::vec((event(), 0u64..45_000), 1..150),
    ) {
        let policy = outlier();
        let health = EndpointHealth::default();
        let mut now = clock::millis(Instant::now());
        // The model: how many probes are out, the streaks, and what the state was before.
        let mut probes = 0u32;
        let (mut gateway, mut server) = (0, 0);
        for (event, pause) in events {
            now += pause;
            let room = || Room { ejected: 0, allowed: 1 };
            let judge = Judge { policy: &policy, now, jitter: 1.0, room: &room };
            let before = health.state();
            match event {
                Event::Succeed => {
                    health.succeeded(false, &judge);
                    (gateway, server) = (0, 0);
                    prop_assert_eq!(health.state(), before);
                }
                Event::Fail(is_gateway) => {
                    let fault = if is_gateway { Fault::Gateway } else { Fault::Server };
                    health.failed(false, fault, &judge);
                    if before == HealthState::Closed {
                        server += 1;
                        gateway = if is_gateway { gateway + 1 } else { 0 };
                        let out = gateway >= 3 || server >= 5;
                        prop_assert_eq!(out, health.is_out());
                    } else {
                        prop_assert_eq!(health.state(), before);
                    }
                }
                Event::AskForProbe => {
                    let due = health.probe_at().is_some_and(|at| at <= now);
                    let taken = health.try_probe(&policy, now);
                    prop_assert_eq!(taken, due);
                    if taken {
                        probes += 1;
                        prop_assert_eq!(health.state(), HealthState::HalfOpen);
                        prop_assert!(!health.try_probe(&policy, now), "one probe only");
                        prop_assert!(!health.try_probe(&policy, now + 29_999), "one probe only");
                    }
                }
                Event::EndProbe(result) if probes > 0 => {
                    probes -= 1;
                    match result {
                        None => health.release_probe(now),
                        Some(true) => health.succeeded(true, &judge),
                        Some(false) => health.failed(true, Fault::Gateway, &judge),
                    }
                    if before == HealthState::HalfOpen {
                        match (result, health.state()) {
                            (Some(true), state) => prop_assert_eq!(state, HealthState::Closed),
                            (None, HealthState::Ejected { until, .. }) => {
                                prop_assert_eq!(clock::millis(until), now);
                            }
                            (Some(false), HealthState::Ejected { until, times }) => {
                                let time = clock::millis(until) - now;
                                prop_assert!(times >= 2);
                                prop_assert_eq!(time, (30_000 * u64::from(times)).min(300_000));
                            }
                            (result, state) => prop_assert!(false, "{result:?} {state:?}"),
                        }
                    } else {
                        prop_assert_eq!(health.state(), before);
                    }
                }
                Event::EndProbe(_) => {}
            }
            if health.is_out() {
                (gateway, server) = (0, 0);
            }
        }
    }
}

/// Another worker ejects another endpoint between the look at the share and the ejection.
#[test]
fn an_ejection_that_is_one_too_many_is_taken_back() {
    let policy = outlier();
    let health = EndpointHealth::default();
    let others = std::cell::Cell::new(0);
    let room = || Room {
        ejected: others.replace(1) + usize::from(health.is_out()),
        allowed: 1,
    };
    let judge = Judge {
        policy: &policy,
        now: clock::millis(Instant::now()),
        jitter: 1.0,
        room: &room,
    };
    for _ in 0..3 {
        health.failed(false, Fault::Gateway, &judge);
    }
    assert_eq!(health.state(), HealthState::Closed);
    assert_eq!(health.ejections(), 0);
    // The other one is back, and this one fails once more: the streak has not been forgotten.
    let room = || Room {
        ejected: usize::from(health.is_out()),
        allowed: 1,
    };
    let judge = Judge {
        room: &room,
        ..judge
    };
    health.failed(false, Fault::Gateway, &judge);
    assert!(health.is_out());
}

/// Many threads fail many endpoints at once: never more out than allowed, once they are done.
#[test]
fn workers_together_keep_to_the_share() {
    for round in 0..50 {
        let cell = cell(infos(&[1; 8]));
        let policy = strict(OutlierDetection {
            max_ejection_percent: 25,
            ..outlier()
        });
        std::thread::scope(|scope| {
            for worker in 0..4u64 {
                let backend = backend(&cell, policy.clone());
                scope.spawn(move || {
                    let balancer = Balancer::<()>::seeded(backend, round * 4 + worker);
                    let now = Instant::now();
                    for _ in 0..200 {
                        if let Ok(mut picked) = balancer.pick(None, &[], now) {
                            picked.observe(Outcome::GatewayError, now);
                        }
                    }
                });
            }
        });
        let ejected = (0..8).filter(|n| is_ejected(&cell, *n)).count();
        assert!((1..=2).contains(&ejected), "{ejected}");
    }
}
