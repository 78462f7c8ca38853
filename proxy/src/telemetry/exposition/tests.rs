use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::*;
use crate::telemetry::labels::{Direction, FlowProtocol};
use crate::telemetry::metrics::Registry;
use crate::telemetry::names::Gauge;
use crate::telemetry::process;
use crate::telemetry::stats::EndpointState;

/// One metric as the strict parser below understands it.
#[derive(Debug, Default)]
struct Parsed {
    kind: String,
    help: String,
    samples: Vec<Sample>,
}

fn is_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes
        .next()
        .is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// Name with suffix, labels in order, value.
type Sample = (String, Vec<(String, String)>, f64);

/// Parses the text format strictly and panics on anything a Prometheus server could dislike:
/// heads repeated, missing or apart from their samples, bad names, labels or escapes, duplicates.
fn parse(text: &str) -> BTreeMap<String, Parsed> {
    let mut metrics = BTreeMap::<String, Parsed>::new();
    let mut current = String::new();
    let mut seen = BTreeSet::new();
    assert!(text.ends_with('\n'));
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(is_name(name) && !help.contains('\\'), "{line}");
            current = name.to_owned();
            let before = metrics.insert(
                current.clone(),
                Parsed {
                    help: help.to_owned(),
                    ..Parsed::default()
                },
            );
            assert!(before.is_none(), "twice: {name}");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert_eq!(name, current, "TYPE follows HELP");
            assert!(matches!(kind, "counter" | "gauge" | "histogram"));
            let metric = metrics.get_mut(name).unwrap();
            assert!(metric.kind.is_empty() && metric.samples.is_empty());
            metric.kind = kind.to_owned();
        } else {
            let (name, labels, value) = sample(line);
            assert!(seen.insert((name.clone(), labels.clone())), "twice: {line}");
            let metric = metrics.get_mut(&current).unwrap();
            let suffix = name.strip_prefix(&current).expect("samples stay together");
            match &*metric.kind {
                "histogram" => assert!(matches!(suffix, "_bucket" | "_sum" | "_count")),
                "counter" => assert!(suffix.is_empty() && name.ends_with("_total")),
                "gauge" => assert!(suffix.is_empty() && !name.ends_with("_total")),
                other => panic!("no TYPE before {line}: {other}"),
            }
            metric.samples.push((name, labels, value));
        }
    }
    metrics
}

fn sample(line: &str) -> Sample {
    let end = line.find(['{', ' ']).unwrap();
    let name = line[..end].to_owned();
    assert!(is_name(&name), "{line}");
    let mut labels = Vec::new();
    let mut rest = &line[end..];
    if let Some(mut inside) = rest.strip_prefix('{') {
        loop {
            let (label, value) = inside.split_once("=\"").unwrap();
            assert!(is_name(label), "{line}");
            let mut text = String::new();
            let mut chars = value.char_indices();
            let after = loop {
                match chars.next().unwrap() {
                    (at, '"') => break at + 1,
                    (_, '\\') => text.push(match chars.next().unwrap().1 {
                        'n' => '\n',
                        c @ ('\\' | '"') => c,
                        c => panic!("escape {c:?} in {line}"),
                    }),
                    (_, c) => text.push(c),
                }
            };
            labels.push((label.to_owned(), text));
            match &value[after..=after] {
                "," => inside = &value[after + 1..],
                "}" => {
                    rest = &value[after + 1..];
                    break;
                }
                other => panic!("{other:?} in {line}"),
            }
        }
    }
    let value = rest.strip_prefix(' ').unwrap();
    assert!(!value.contains(' '), "no timestamps: {line}");
    (name, labels, value.parse().unwrap())
}

fn flow(service: &str, protocol: FlowProtocol) -> FlowLabels {
    FlowLabels {
        direction: Direction::Outbound,
        source_workload: "front".into(),
        source_namespace: "shop".into(),
        destination_service: service.into(),
        destination_namespace: "shop".into(),
        destination_workload: "cart-1".into(),
        port: 80,
        protocol,
        mtls: true,
    }
}

/// A registry in which everything has happened once.
fn full() -> String {
    let registry = Registry::new();
    let worker = registry.worker();
    let series = worker.requests(&flow("cart", FlowProtocol::Http1));
    let _running = series.enter();
    series.record(200, None, Duration::from_millis(3));
    series.record(503, None, Duration::from_secs(100));
    let grpc = worker.requests(&flow("od\"d\\\nname", FlowProtocol::Grpc));
    grpc.record(200, Some(14), Duration::from_micros(10));
    let connections = worker.connections(&flow("db", FlowProtocol::Tcp));
    let _open = connections.open();
    drop(connections.open());
    connections.to_destination(5);
    connections.to_source(7);
    for counter in Counter::ALL {
        let values: Vec<&str> = counter.definition().labels.to_vec();
        worker.count(counter, &values);
        registry.count(counter, &values, 2);
    }
    for histogram in Histogram::ALL {
        let series = worker.histogram(histogram, histogram.definition().labels);
        series.record(Duration::from_millis(1));
    }
    for gauge in Gauge::ALL {
        registry.set(gauge, 1.5);
    }
    let endpoint = |address: &str, state| EndpointView {
        service: "cart".to_owned(),
        namespace: "shop".to_owned(),
        port: 80,
        address: address.to_owned(),
        workload: String::new(),
        zone: String::new(),
        state,
    };
    let endpoints = [
        endpoint("10.0.0.1:80", EndpointState::Ready),
        endpoint("10.0.0.2:80", EndpointState::Ready),
        endpoint("10.0.0.3:80", EndpointState::Ejected),
    ];
    let mut process = process::read().unwrap();
    process.max_fds = Some(1024);
    render(&registry.snapshot(), &endpoints, Some(&process))
}

#[test]
fn the_text_is_what_prometheus_reads() {
    let metrics = parse(&full());
    let value = |name: &str, wanted: &[(&str, &str)]| {
        let samples = metrics.values().flat_map(|metric| &metric.samples);
        let mut found = samples.filter(|(n, labels, _)| {
            n == name
                && wanted
                    .iter()
                    .all(|(k, v)| labels.iter().any(|(lk, lv)| (&**lk, &**lv) == (*k, *v)))
        });
        let one = found
            .next()
            .unwrap_or_else(|| panic!("{name} {wanted:?}"))
            .2;
        assert!(found.next().is_none(), "{name} {wanted:?} is not one");
        one
    };
    let cart = ("destination_service", "cart");
    let odd = ("destination_service", "od\"d\\\nname");
    assert_eq!(
        value("weft_requests_total", &[cart, ("response_class", "2xx")]),
        1.0
    );
    assert_eq!(
        value("weft_requests_total", &[cart, ("response_class", "5xx")]),
        1.0
    );
    assert_eq!(
        value("weft_requests_total", &[odd, ("grpc_status", "14")]),
        1.0
    );
    assert_eq!(value("weft_requests_in_flight", &[cart]), 1.0);
    let bucket = |le| value("weft_request_duration_seconds_bucket", &[cart, ("le", le)]);
    assert_eq!(
        [
            bucket("0.002"),
            bucket("0.005"),
            bucket("30"),
            bucket("+Inf")
        ],
        [0.0, 1.0, 1.0, 2.0]
    );
    assert_eq!(value("weft_request_duration_seconds_count", &[cart]), 2.0);
    assert_eq!(value("weft_request_duration_seconds_sum", &[cart]), 100.003);
    assert_eq!(value("weft_tcp_connections_active", &[]), 1.0);
    assert_eq!(value("weft_tcp_connections_closed_total", &[]), 1.0);
    assert_eq!(value("weft_tcp_bytes_total", &[("way", "to_source")]), 7.0);
    assert_eq!(value("weft_retries_total", &[]), 3.0);
    assert_eq!(value("weft_endpoints", &[("state", "ready")]), 2.0);
    assert_eq!(value("weft_endpoints", &[("state", "ejected")]), 1.0);
    assert_eq!(value("weft_certificate_expiry_seconds", &[]), 1.5);
}

#[test]
fn a_fresh_registry_says_little() {
    let metrics = parse(&render(&Registry::new().snapshot(), &[], None));
    let names: Vec<_> = metrics.into_keys().collect();
    assert_eq!(names, ["weft_build_info", "weft_metrics_overflow_total"]);
}

#[test]
fn every_metric_is_rendered_as_it_is_defined() {
    let rendered = parse(&full());
    let mut defined = BTreeSet::new();
    for definition in names::definitions() {
        assert!(defined.insert(definition.name), "{} twice", definition.name);
        let metric = rendered
            .get(definition.name)
            .unwrap_or_else(|| panic!("{} is never rendered", definition.name));
        assert_eq!(metric.kind, definition.kind.as_str());
        assert_eq!(metric.help, definition.help);
        for (_, labels, _) in &metric.samples {
            let names = labels.iter().map(|(name, _)| &**name);
            let names: Vec<_> = names.filter(|name| *name != "le").collect();
            assert_eq!(names, definition.label_names().collect::<Vec<_>>());
        }
    }
    assert_eq!(rendered.len(), defined.len(), "nothing else is rendered");
}

#[test]
fn the_reference_says_what_is_rendered() {
    let page = include_str!("../../../../docs/reference/metrics.md");
    let mut documented = BTreeMap::new();
    for line in page.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [
            "",
            name,
            kind @ ("counter" | "gauge" | "histogram"),
            labels,
            _,
            "",
        ] = cells[..]
        else {
            continue;
        };
        let labels = labels.split(", ").filter(|label| !label.is_empty());
        let labels: Vec<_> = labels.map(|label| label.trim_matches('`')).collect();
        let before = documented.insert(name.trim_matches('`'), (kind, labels));
        assert!(before.is_none(), "{name} is documented twice");
    }
    let mut defined = BTreeMap::new();
    for definition in names::definitions() {
        let flow = definition.flow.then_some("flow");
        let labels: Vec<_> = flow
            .into_iter()
            .chain(definition.labels.iter().copied())
            .collect();
        defined.insert(definition.name, (definition.kind.as_str(), labels));
    }
    assert_eq!(documented, defined);
    for label in FlowLabels::NAMES {
        assert!(
            page.contains(&format!("`{label}`")),
            "{label} is not explained"
        );
    }
}
