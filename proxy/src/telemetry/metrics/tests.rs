use proptest::prelude::*;

use super::super::cells::{BUCKET_LABELS, BUCKETS};
use super::super::labels::{Direction, FlowProtocol, OTHER};
use super::*;

fn flow(workload: &str) -> FlowLabels {
    FlowLabels {
        direction: Direction::Inbound,
        source_workload: "front".into(),
        source_namespace: "shop".into(),
        destination_service: "cart".into(),
        destination_namespace: "shop".into(),
        destination_workload: workload.into(),
        port: 8080,
        protocol: FlowProtocol::Http1,
        mtls: false,
    }
}

#[test]
fn workers_are_summed() {
    let registry = Registry::new();
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let registry = registry.clone();
            std::thread::spawn(move || {
                let worker = registry.worker();
                let series = worker.requests(&flow("a"));
                for i in 0..10_000 {
                    series.record(200 + i % 400, None, Duration::from_micros(u64::from(i)));
                }
                worker.count(Counter::Errors, &["x", "inbound", "cart", "shop"]);
                registry.count(Counter::DiscoveryUpdates, &["ack"], 2);
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());

    let snapshot = registry.snapshot();
    let (labels, sum) = &snapshot.requests[0];
    assert_eq!((snapshot.requests.len(), &**labels), (1, &flow("a")));
    assert_eq!(sum.by_class, [0, 0, 10_000, 10_000, 10_000, 10_000]);
    assert_eq!(sum.duration.count(), 40_000);
    assert_eq!(sum.duration.sum_ns, 4 * (0..10_000u64).sum::<u64>() * 1_000);
    let counted: Vec<u64> = snapshot.counters.iter().map(|(_, n)| *n).collect();
    assert_eq!(counted, [4, 8]);
}

#[test]
fn the_same_labels_are_the_same_handle() {
    let registry = Registry::new();
    let (one, two) = (registry.worker(), registry.worker());
    let handle = one.requests(&flow("a"));
    assert!(Rc::ptr_eq(&handle, &one.requests(&flow("a"))));
    drop(handle);
    one.requests(&flow("a")).record(200, None, Duration::ZERO);
    one.requests(&flow("a")).record(200, None, Duration::ZERO);
    two.requests(&flow("a")).record(404, None, Duration::ZERO);
    let snapshot = registry.snapshot();
    assert_eq!(snapshot.requests.len(), 1);
    assert_eq!(snapshot.requests[0].1.by_class, [0, 0, 2, 0, 1, 0]);
}

#[test]
fn what_is_never_forgotten_is_resolved_once() {
    let worker = Registry::new().worker();
    worker.count(Counter::TlsHandshakes, &["inbound", "ok"]);
    let handle = worker.counter(Counter::TlsHandshakes, &["inbound", "ok"]);
    assert_eq!(Rc::strong_count(&handle), 2, "the worker keeps one");
    let labels = ["cart", "shop"];
    worker.count(Counter::RetryBudgetExhausted, &labels);
    let handle = worker.counter(Counter::RetryBudgetExhausted, &labels);
    assert_eq!(Rc::strong_count(&handle), 1);
}

#[test]
fn in_flight_and_grpc() {
    let registry = Registry::new();
    let worker = registry.worker();
    let series = worker.requests(&flow("a"));
    let running = series.enter();
    series.record(200, Some(0), Duration::ZERO);
    series.record(200, Some(99), Duration::ZERO);
    // gRPC's status counts with a 2xx response only.
    series.record(503, Some(14), Duration::ZERO);
    series.record(0, None, Duration::ZERO);
    series.record(999, None, Duration::ZERO);
    let sum = |registry: &Registry| registry.snapshot().requests[0].1.clone();
    let now = sum(&registry);
    assert_eq!(now.in_flight, 1);
    assert_eq!(now.by_class, [2, 0, 0, 0, 0, 1]);
    assert_eq!((now.by_grpc[0], now.by_grpc[2], now.by_grpc[14]), (1, 1, 0));
    drop(running);
    assert_eq!(sum(&registry).in_flight, 0);
}

#[test]
fn a_full_family_says_other() {
    let registry = Arc::new(Registry::with_max_series(3));
    let worker = registry.worker();
    let handles: Vec<_> = (0..10)
        .map(|i| {
            let series = worker.requests(&flow(&format!("w{i}")));
            series.record(200, None, Duration::ZERO);
            series
        })
        .collect();
    assert!(Rc::ptr_eq(&handles[3], &handles[9]));
    let snapshot = registry.snapshot();
    assert_eq!(snapshot.requests.len(), 4);
    let (_, other) = snapshot
        .requests
        .iter()
        .find(|(labels, _)| &*labels.destination_workload == OTHER)
        .unwrap();
    assert_eq!(other.by_class[2], 7);
    assert_eq!(snapshot.overflow[0], ("requests", 7));
    // Those that have their place keep it.
    worker
        .requests(&flow("w1"))
        .record(200, None, Duration::ZERO);
    assert_eq!(registry.snapshot().overflow[0].1, 7);
}

#[test]
fn a_series_nobody_holds_is_forgotten_in_time() {
    let registry = Registry::new();
    let worker = registry.worker();
    let kept = worker.requests(&flow("kept"));
    let left = worker.requests(&flow("left"));
    worker.count(Counter::SpansExported, &[]);
    let names = |at| -> Vec<String> {
        let snapshot = registry.snapshot_at(at);
        assert_eq!(
            snapshot.counters.len(),
            1,
            "no destination: never forgotten"
        );
        let labels = snapshot.requests.iter();
        labels
            .map(|(l, _)| l.destination_workload.to_string())
            .collect()
    };
    let start = Instant::now();
    drop(left);
    assert_eq!(names(start), ["kept", "left"]);
    assert_eq!(names(start + FORGET_AFTER / 2), ["kept", "left"]);
    assert_eq!(names(start + FORGET_AFTER), ["kept"]);
    // It may come back, from nothing.
    worker
        .requests(&flow("left"))
        .record(200, None, Duration::ZERO);
    assert_eq!(names(start + FORGET_AFTER), ["kept", "left"]);
    drop(kept);
}

#[test]
fn a_bound_belongs_to_its_bucket_and_has_its_label() {
    let registry = Registry::new();
    let worker = registry.worker();
    let series = worker.histogram(Histogram::TlsHandshake, &["inbound"]);
    for (bound, label) in BUCKETS.into_iter().zip(BUCKET_LABELS) {
        series.record(Duration::from_nanos(bound));
        assert_eq!(bound as f64 / 1e9, label.parse::<f64>().unwrap());
    }
    series.record(Duration::from_nanos(BUCKETS[BUCKETS.len() - 1] + 1));
    let sum = registry.snapshot().histograms[0].1.clone();
    assert_eq!(sum.buckets, [1; BUCKETS.len() + 1]);
}

proptest! {
    #[test]
    fn a_quantile_lies_in_its_bucket(mut ns in prop::collection::vec(0u64..60_000_000_000, 1..200), q in 0.0f64..=1.0) {
        let registry = Registry::new();
        let worker = registry.worker();
        let series = worker.histogram(Histogram::TlsHandshake, &["inbound"]);
        ns.iter().for_each(|ns| series.record(Duration::from_nanos(*ns)));
        let sum = registry.snapshot().histograms[0].1.clone();
        prop_assert_eq!(sum.count(), ns.len() as u64);
        prop_assert_eq!(sum.sum_ns, ns.iter().sum::<u64>());

        ns.sort_unstable();
        let rank = (q * ns.len() as f64).ceil().max(1.0) as usize;
        let exact = ns[rank - 1];
        let estimate = sum.quantile(q).unwrap().as_nanos() as u64;
        let bucket = BUCKETS.iter().take_while(|bound| exact > **bound).count();
        let low = if bucket == 0 { 0 } else { BUCKETS[bucket - 1] };
        let high = BUCKETS.get(bucket).copied().unwrap_or(low);
        prop_assert!((low..=high).contains(&estimate), "{estimate} not in {low}..={high}");
    }
}
