use super::*;

#[tokio::test]
async fn a_line_says_what_is_known_and_nothing_else() {
    let (sink, source) = channel(Registry::new());
    let time = UNIX_EPOCH + Duration::from_millis(1_709_210_096_789);
    let mut record = AccessRecord::new(Direction::Outbound, FlowProtocol::Grpc, time);
    record.method = "POST".into();
    record.path = "/a\"b\u{1}".into();
    record.status = 200;
    record.grpc_status = Some(14);
    record.duration = Duration::from_micros(1_250);
    record.trace_id = Some(0xab);
    record.mtls = true;
    sink.send(Box::new(record));
    drop(sink);
    let mut out = Vec::new();
    source.run(&mut out).await.unwrap();

    let text = String::from_utf8(out).unwrap();
    assert!(text.ends_with("}\n") && text.lines().count() == 1);
    let line: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        line,
        serde_json::json!({
            "time": "2024-02-29T12:34:56.789Z",
            "direction": "outbound",
            "protocol": "grpc",
            "method": "POST",
            "path": "/a\"b\u{1}",
            "status": 200,
            "grpc_status": 14,
            "duration_ms": 1.25,
            "bytes_in": 0,
            "bytes_out": 0,
            "mtls": true,
            "trace_id": "000000000000000000000000000000ab",
            "retries": 0,
        })
    );
}

#[test]
fn a_writer_that_is_behind_costs_lines_not_time() {
    let registry = Registry::new();
    let (sink, _source) = channel(registry.clone());
    for _ in 0..QUEUE + 5 {
        let record = AccessRecord::new(Direction::Inbound, FlowProtocol::Http1, UNIX_EPOCH);
        sink.send(Box::new(record));
    }
    let snapshot = registry.snapshot();
    let (labels, dropped) = &snapshot.counters[0];
    assert_eq!((labels.event, *dropped), (Counter::AccessLogDropped, 5));
}

#[test]
fn modes() {
    assert!(!wanted(AccessLog::Off, 500, None, true));
    assert!(wanted(AccessLog::All, 200, None, false));
    for (status, grpc, error, expected) in [
        (200, None, false, false),
        (200, Some(0), false, false),
        (200, Some(5), false, true),
        (404, None, false, true),
        (0, None, false, true),
        (200, None, true, true),
    ] {
        assert_eq!(wanted(AccessLog::Errors, status, grpc, error), expected);
    }
}

#[test]
fn dates() {
    for (seconds, expected) in [
        (0, "1970-01-01T00:00:00.000Z"),
        (951_782_399, "2000-02-28T23:59:59.000Z"),
        (951_782_400, "2000-02-29T00:00:00.000Z"),
        (4_102_444_799, "2099-12-31T23:59:59.000Z"),
    ] {
        assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), expected);
    }
}

#[test]
fn every_field_is_explained() {
    let page = include_str!("../../../../docs/reference/observability.md");
    let address = Some("10.0.0.1:80".parse().unwrap());
    let some: Arc<str> = "shop/x".into();
    let record = AccessRecord {
        method: "GET".into(),
        path: "/".into(),
        authority: "x".into(),
        status: 200,
        grpc_status: Some(0),
        error: Some(some.clone()),
        time_to_head: Some(Duration::ZERO),
        source_address: address,
        source_workload: some.clone(),
        destination_service: some.clone(),
        destination_workload: some.clone(),
        destination_address: address,
        route: some,
        trace_id: Some(1),
        ..AccessRecord::new(Direction::Outbound, FlowProtocol::Http1, UNIX_EPOCH)
    };
    let line = serde_json::to_value(Line::from(&record)).unwrap();
    let fields = line.as_object().unwrap();
    assert_eq!(fields.len(), 22);
    for field in fields.keys() {
        assert!(page.contains(&format!("`{field}`")), "{field}");
    }
}
