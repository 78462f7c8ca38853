use std::time::Duration;

use super::*;
use crate::telemetry::labels::FlowProtocol;
use crate::telemetry::metrics::Registry;

fn flow(direction: Direction, service: &str, workload: &str, mtls: bool) -> FlowLabels {
    FlowLabels {
        direction,
        source_workload: "front".into(),
        source_namespace: "shop".into(),
        destination_service: service.into(),
        destination_namespace: "shop".into(),
        destination_workload: workload.into(),
        port: 80,
        protocol: FlowProtocol::Http1,
        mtls,
    }
}

#[test]
fn one_row_a_destination() {
    let registry = Registry::new();
    let worker = registry.worker();
    let a = worker.requests(&flow(Direction::Outbound, "cart", "cart-1", true));
    let b = worker.requests(&flow(Direction::Outbound, "cart", "cart-2", false));
    for _ in 0..30 {
        a.record(200, None, Duration::from_micros(1_500));
    }
    for _ in 0..8 {
        b.record(503, None, Duration::from_millis(70));
    }
    b.record(200, Some(14), Duration::from_millis(70));
    b.record(200, Some(5), Duration::from_millis(70));
    let own = worker.requests(&flow(Direction::Inbound, "front", "front", true));
    own.record(404, None, Duration::from_millis(1));
    let db = worker.connections(&flow(Direction::Outbound, "db", "db-1", true));
    let _open = db.open();
    db.to_destination(10);
    worker.count(Counter::Retries, &["connect-failure", "cart", "shop"]);
    worker.count(
        Counter::Errors,
        &["no-endpoint", "outbound", "gone", "shop"],
    );
    worker.count(Counter::TlsHandshakes, &["outbound", "ok"]);
    registry.set(Gauge::DiscoveryConnected, 1.0);
    let endpoint = EndpointView {
        service: "cart".to_owned(),
        namespace: "shop".to_owned(),
        port: 80,
        address: "10.0.0.1:8080".to_owned(),
        workload: "shop/cart-1".to_owned(),
        zone: String::new(),
        state: EndpointState::NotReady,
    };

    let stats = stats(&registry.snapshot(), std::slice::from_ref(&endpoint));
    let rows: Vec<_> = stats
        .destinations
        .iter()
        .map(|row| (row.direction, &*row.service, row.requests))
        .collect();
    assert_eq!(
        rows,
        [
            ("outbound", "cart", 40),
            ("outbound", "db", 0),
            ("outbound", "gone", 0),
            ("inbound", "front", 1),
        ]
    );
    let cart = &stats.destinations[0];
    assert_eq!(cart.failures, 9, "503 and UNAVAILABLE, not NOT_FOUND");
    assert_eq!(cart.classes, BTreeMap::from([("2xx", 32), ("5xx", 8)]));
    assert_eq!(cart.grpc, BTreeMap::from([(5, 1), (14, 1)]));
    assert_eq!(cart.mtls, Some(0.75));
    assert_eq!(cart.retries, 1);
    assert_eq!(cart.endpoints, [endpoint]);
    assert_eq!(cart.workloads.len(), 2);
    assert!((1.0..=2.0).contains(&cart.p50_ms.unwrap()));
    assert!((50.0..=100.0).contains(&cart.p99_ms.unwrap()));
    let db = &stats.destinations[1];
    assert_eq!(
        (db.mtls, db.connections_active, db.bytes_to_destination),
        (Some(1.0), 1, 10)
    );
    assert_eq!(stats.destinations[2].errors["no-endpoint"], 1);
    assert_eq!(stats.tls_handshakes["ok"], 1);
    assert_eq!(stats.discovery_connected, Some(true));

    let json = serde_json::to_value(&stats).unwrap();
    assert_eq!(
        json["destinations"][0]["endpoints"][0]["state"],
        "not_ready"
    );
}
