//! What a pick costs: `cargo bench -p weft-proxy --bench balance`.
//!
//! Prints nanoseconds per pick, observe and drop, the time of the request itself being given; then
//! what the first pick after a change of the endpoints costs, in microseconds.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use weft_proxy::balance::{Balancer, Outcome, hash_bytes};
use weft_proxy::tables::{
    Algorithm, Backend, BackendPolicy, EndpointInfo, EndpointSet, EndpointsCell, Health,
    OutlierDetection,
};

const PICKS: u32 = 1_000_000;
const ROUNDS: usize = 5;

fn backend(endpoints: u16, algorithm: Algorithm, weighted: bool) -> Arc<Backend> {
    let endpoints = (0..endpoints)
        .map(|n| {
            let [a, b] = n.to_be_bytes();
            Arc::new(EndpointInfo {
                address: SocketAddr::from(([10, 0, a, b], 8080)),
                identity: None,
                workload: "shop/cart".into(),
                zone: "".into(),
                weight: if weighted { 1 + u32::from(n % 3) } else { 1 },
                state: Health::Ready,
                health: Arc::default(),
                siblings: None,
            })
        })
        .collect();
    let cell = EndpointsCell::default();
    cell.current.store(Arc::new(EndpointSet {
        generation: 1,
        endpoints,
        ..EndpointSet::default()
    }));
    Arc::new(Backend {
        id: 1,
        namespace: "shop".into(),
        service: "cart".into(),
        port: 80,
        endpoints: Arc::new(cell),
        policy: BackendPolicy {
            algorithm,
            outlier: Some(OutlierDetection {
                consecutive_gateway_errors: 5,
                consecutive_5xx: 5,
                success_rate_threshold: 80,
                success_rate_min_requests: 100,
                interval: Duration::from_secs(10),
                base_ejection: Duration::from_secs(30),
                max_ejection: Duration::from_secs(300),
                max_ejection_percent: 50,
            }),
            ..BackendPolicy::default()
        },
        limits: Arc::default(),
    })
}

/// What a worker spends on taking over a changed set of endpoints, in microseconds.
fn measure_change(balancer: &Balancer<()>) -> f64 {
    const CHANGES: u64 = 20;
    let cell = &balancer.backend().endpoints.current;
    let now = Instant::now();
    let mut spent = Duration::ZERO;
    for generation in 2..2 + CHANGES {
        let endpoints = cell.load().endpoints.clone();
        cell.store(Arc::new(EndpointSet {
            generation,
            endpoints,
            ..EndpointSet::default()
        }));
        let start = Instant::now();
        std::hint::black_box(balancer.pick(None, &[], now).is_ok());
        spent += start.elapsed();
    }
    spent.as_nanos() as f64 / 1000.0 / CHANGES as f64
}

/// The best of several rounds, in nanoseconds per try.
fn measure(balancer: &Balancer<()>, keyed: bool) -> f64 {
    let mut now = Instant::now();
    let mut best = f64::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for n in 0..PICKS {
            let key = keyed.then(|| hash_bytes(&n.to_le_bytes()));
            let Ok(mut picked) = balancer.pick(key, &[], now) else {
                panic!("all endpoints are ready");
            };
            now += Duration::from_micros(20 + u64::from(n % 7));
            picked.observe(Outcome::Success, now);
            std::hint::black_box(&picked);
        }
        best = best.min(start.elapsed().as_nanos() as f64 / f64::from(PICKS));
    }
    best
}

fn main() {
    println!("{:<28}{:>8}{:>8}   ns per try", "endpoints", 10, 1000);
    for (name, algorithm, weighted, keyed) in [
        ("peak ewma", Algorithm::PeakEwma, false, false),
        ("peak ewma, weighted", Algorithm::PeakEwma, true, false),
        ("least request", Algorithm::LeastRequest, false, false),
        ("round robin", Algorithm::RoundRobin, false, false),
        ("round robin, weighted", Algorithm::RoundRobin, true, false),
        ("random", Algorithm::Random, false, false),
        ("ring hash, with the hash", Algorithm::RingHash, false, true),
        ("maglev, with the hash", Algorithm::Maglev, false, true),
    ] {
        let [few, many] =
            [10, 1000].map(|n| measure(&Balancer::new(backend(n, algorithm, weighted)), keyed));
        println!("{name:<28}{few:>8.0}{many:>8.0}");
    }
    println!("\n{:<28}{:>8}{:>8}   us per change", "endpoints", 10, 1000);
    for (name, algorithm) in [
        ("peak ewma", Algorithm::PeakEwma),
        ("ring hash", Algorithm::RingHash),
        ("maglev", Algorithm::Maglev),
    ] {
        let [few, many] =
            [10, 1000].map(|n| measure_change(&Balancer::new(backend(n, algorithm, false))));
        println!("{name:<28}{few:>8.1}{many:>8.1}");
    }
}
