//! The Grafana dashboard (docs/dashboards/weft.json) is made from metrics and labels that exist: those
//! of proxies stand in docs/reference/metrics.md, which a test of the proxy holds against what it
//! renders; those of the control plane are rendered here.

#![allow(clippy::unwrap_used)] // The whole crate is a test.

use std::collections::{BTreeMap, BTreeSet};

use weft_control_plane::serve::metrics::{Gauges, Metrics};

const DASHBOARD: &str = include_str!("../../docs/dashboards/weft.json");
const PAGE: &str = include_str!("../../docs/reference/metrics.md");
/// Labels that scraping adds.
const SCRAPED: [&str; 3] = ["instance", "pod", "job"];

/// What a metric is: its type and labels.
#[derive(Debug)]
struct Known {
    kind: String,
    labels: BTreeSet<String>,
}

/// The words between backticks.
fn ticked(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

fn known() -> BTreeMap<String, Known> {
    let mut known = BTreeMap::new();
    let mut flow = BTreeSet::new();
    for line in PAGE.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let name = ticked(cells[0]).next().unwrap();
        if cells.len() == 2 {
            flow.extend(ticked(cells[0]).map(str::to_owned));
            continue;
        }
        let mut labels: BTreeSet<String> = ticked(cells[2]).map(str::to_owned).collect();
        if cells[2].starts_with("flow") {
            labels.extend(flow.iter().cloned());
        }
        let kind = cells[1].to_owned();
        known.insert(name.to_owned(), Known { kind, labels });
    }
    let rendered = Metrics::default().render(Gauges::default());
    for line in rendered
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
    {
        let (name, kind) = line.split_once(' ').unwrap();
        let (kind, labels) = (kind.to_owned(), BTreeSet::new());
        known.insert(name.to_owned(), Known { kind, labels });
    }
    known
}

/// What an expression of PromQL names: metrics with the labels of their matchers, and labels of
/// `by`, `on` and the like.
#[derive(Debug, Default)]
struct Named {
    metrics: Vec<(String, Vec<String>)>,
    grouping: Vec<String>,
}

fn parse(expression: &str) -> Named {
    const KEYWORDS: [&str; 10] = [
        "by",
        "without",
        "on",
        "ignoring",
        "group_left",
        "group_right",
        "and",
        "or",
        "unless",
        "bool",
    ];
    let mut named = Named::default();
    // Without what is quoted, and without ranges.
    let mut bare = String::new();
    let mut rest = expression;
    while let Some(at) = rest.find(['"', '[']) {
        bare.push_str(&rest[..at]);
        let end = if rest[at..].starts_with('"') {
            '"'
        } else {
            ']'
        };
        let after = rest[at + 1..].find(end).expect("an end of what was opened");
        rest = &rest[at + after + 2..];
    }
    bare.push_str(rest);
    let words = |text: &str| -> Vec<String> {
        let split = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        split
            .filter(|word| !word.is_empty())
            .map(str::to_owned)
            .collect()
    };
    let mut at = 0;
    while at < bare.len() {
        let tail = &bare[at..];
        let length = tail.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let length = length.unwrap_or(tail.len());
        if length == 0 {
            at += tail.chars().next().unwrap().len_utf8();
            continue;
        }
        let (word, after) = tail.split_at(length);
        at += length;
        if word.starts_with(|c: char| c.is_ascii_digit()) {
            continue;
        }
        let next = after.trim_start();
        if KEYWORDS.contains(&word) {
            if let Some(list) = next.strip_prefix('(')
                && !matches!(word, "and" | "or" | "unless" | "bool")
            {
                let list = &list[..list.find(')').unwrap()];
                named.grouping.extend(words(list));
                at += after.find(')').unwrap() + 1;
            }
        } else if let Some(matchers) = next.strip_prefix('{') {
            let matchers = &matchers[..matchers.find('}').unwrap()];
            named.metrics.push((word.to_owned(), words(matchers)));
            at += after.find('}').unwrap() + 1;
        } else if !next.starts_with('(') && !next.starts_with("by ") {
            named.metrics.push((word.to_owned(), Vec::new()));
        }
    }
    named
}

fn expressions() -> Vec<(String, String)> {
    let dashboard: serde_json::Value = serde_json::from_str(DASHBOARD).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    panels
        .iter()
        .flat_map(|panel| {
            let title = panel["title"].as_str().unwrap().to_owned();
            let targets = panel["targets"].as_array().into_iter().flatten();
            targets.map(move |target| (title.clone(), target["expr"].as_str().unwrap().to_owned()))
        })
        .collect()
}

#[test]
fn every_metric_and_label_of_the_dashboard_exists() {
    let known = known();
    let expressions = expressions();
    assert!(expressions.len() > 30, "{}", expressions.len());
    for (panel, expression) in &expressions {
        let named = parse(expression);
        assert!(!named.metrics.is_empty(), "{panel}: {expression}");
        let mut labels: BTreeSet<&str> = SCRAPED.into_iter().collect();
        for (metric, matchers) in &named.metrics {
            let base = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|suffix| known.get(metric.strip_suffix(suffix)?))
                .filter(|found| found.kind == "histogram");
            let of = match (base, known.get(metric)) {
                (Some(histogram), _) => {
                    labels.insert("le");
                    &histogram.labels
                }
                (None, Some(plain)) => {
                    assert_ne!(
                        plain.kind, "histogram",
                        "{panel}: {metric} without a suffix"
                    );
                    &plain.labels
                }
                (None, None) => panic!("{panel}: there is no metric {metric}"),
            };
            for label in matchers {
                assert!(
                    of.contains(label),
                    "{panel}: {metric} has no label {label}: {of:?}"
                );
            }
            labels.extend(of.iter().map(String::as_str));
        }
        for label in &named.grouping {
            assert!(
                labels.contains(label.as_str()),
                "{panel}: no label {label}: {expression}"
            );
        }
    }
}

#[test]
fn rates_are_of_counters() {
    let known = known();
    for (panel, expression) in expressions() {
        for part in expression.split("rate(").skip(1) {
            let metric = part.split(['{', '[', ')']).next().unwrap();
            let base = metric.trim_end_matches("_bucket");
            let kind = known
                .get(base)
                .map_or("counter", |known| known.kind.as_str());
            assert!(
                matches!(kind, "counter" | "histogram"),
                "{panel}: rate of {metric}, a {kind}"
            );
        }
    }
}

#[test]
fn expressions_are_understood() {
    let named = parse(
        r#"histogram_quantile(0.99, sum by (le, a) (rate(m_bucket{x=~"$y",z!="("}[$__rate_interval]))) / (n and on (i) p) or vector(0)"#,
    );
    let metrics: Vec<&str> = named
        .metrics
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(metrics, ["m_bucket", "n", "p"]);
    assert_eq!(named.metrics[0].1, ["x", "z"]);
    assert_eq!(named.grouping, ["le", "a", "i"]);
}
