//! Metrics as Prometheus reads them: the text format, version 0.0.4.
//! <https://prometheus.io/docs/instrumenting/exposition_formats/>

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use super::cells::{BUCKET_LABELS, CLASSES, ConnectionSum, HistogramSum};
use super::labels::{FlowLabels, OTHER};
use super::metrics::{MAX_SERIES, Snapshot};
use super::names::{self, Counter, Definition, Histogram};
use super::process::ProcessStats;
use super::stats::EndpointView;

/// Content type of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Renders everything. A metric without a series is left out, with its `HELP` and `TYPE`.
pub fn render(
    snapshot: &Snapshot,
    endpoints: &[EndpointView],
    process: Option<&ProcessStats>,
) -> String {
    let mut out = Text::default();
    requests(&mut out, snapshot);
    connections(&mut out, snapshot);
    for counter in Counter::ALL {
        let mut family = out.family(counter.definition());
        for (labels, value) in &snapshot.counters {
            if labels.event == counter {
                let values: Vec<&str> = labels.values.iter().map(|v| &**v).collect();
                family.sample(None, &values, *value);
            }
        }
    }
    for histogram in Histogram::ALL {
        let mut family = out.family(histogram.definition());
        for (labels, sum) in &snapshot.histograms {
            if labels.event == histogram {
                let values: Vec<&str> = labels.values.iter().map(|v| &**v).collect();
                family.histogram(None, &values, sum);
            }
        }
    }
    for (gauge, value) in &snapshot.gauges {
        out.family(gauge.definition()).sample(None, &[], *value);
    }
    endpoint_states(&mut out, endpoints);
    let mut family = out.family(&names::OVERFLOW);
    for (name, value) in &snapshot.overflow {
        family.sample(None, &[name], *value);
    }
    out.family(&names::BUILD_INFO)
        .sample(None, &[env!("CARGO_PKG_VERSION")], 1);
    if let Some(process) = process {
        process_stats(&mut out, process);
    }
    out.0
}

fn requests(out: &mut Text, snapshot: &Snapshot) {
    let mut family = out.family(&names::REQUESTS);
    for (flow, sum) in &snapshot.requests {
        for (class, n) in CLASSES.into_iter().zip(sum.by_class) {
            if n > 0 {
                family.sample(Some(flow), &[class, ""], n);
            }
        }
        for (code, n) in sum.by_grpc.into_iter().enumerate() {
            if n > 0 {
                family.sample(Some(flow), &["2xx", &code.to_string()], n);
            }
        }
    }
    let mut family = out.family(&names::REQUEST_DURATION);
    for (flow, sum) in &snapshot.requests {
        family.histogram(Some(flow), &[], &sum.duration);
    }
    let mut family = out.family(&names::REQUESTS_IN_FLIGHT);
    for (flow, sum) in &snapshot.requests {
        family.sample(Some(flow), &[], sum.in_flight);
    }
}

fn connections(out: &mut Text, snapshot: &Snapshot) {
    type Value = fn(&ConnectionSum) -> u64;
    let simple: [(&'static Definition, Value); 3] = [
        (&names::CONNECTIONS_OPENED, |sum| sum.opened),
        (&names::CONNECTIONS_CLOSED, |sum| sum.closed),
        (&names::CONNECTIONS_ACTIVE, ConnectionSum::active),
    ];
    for (definition, value) in simple {
        let mut family = out.family(definition);
        for (flow, sum) in &snapshot.connections {
            family.sample(Some(flow), &[], value(sum));
        }
    }
    let mut family = out.family(&names::BYTES);
    for (flow, sum) in &snapshot.connections {
        family.sample(Some(flow), &["to_destination"], sum.to_destination);
        family.sample(Some(flow), &["to_source"], sum.to_source);
    }
}

fn endpoint_states(out: &mut Text, endpoints: &[EndpointView]) {
    let mut counts = BTreeMap::<_, u64>::new();
    for e in endpoints {
        let state = e.state.as_str();
        let mut key = (&*e.service, &*e.namespace, e.port, state);
        if counts.len() >= MAX_SERIES && !counts.contains_key(&key) {
            key = (OTHER, OTHER, 0, state);
        }
        *counts.entry(key).or_default() += 1;
    }
    let mut family = out.family(&names::ENDPOINTS);
    for ((service, namespace, port, state), n) in counts {
        family.sample(None, &[service, namespace, &port.to_string(), state], n);
    }
}

fn process_stats(out: &mut Text, p: &ProcessStats) {
    let mut gauge = |definition, value: f64| out.family(definition).sample(None, &[], value);
    gauge(&names::PROCESS_CPU, p.cpu_seconds);
    gauge(&names::PROCESS_RSS, p.resident_bytes as f64);
    gauge(&names::PROCESS_VIRTUAL, p.virtual_bytes as f64);
    gauge(&names::PROCESS_FDS, p.open_fds as f64);
    if let Some(max) = p.max_fds {
        gauge(&names::PROCESS_MAX_FDS, max as f64);
    }
    gauge(&names::PROCESS_THREADS, p.threads as f64);
    gauge(&names::PROCESS_START, p.start_seconds);
}

#[derive(Default)]
struct Text(String);

/// The samples of one metric; its head is written with the first of them.
struct FamilyText<'a> {
    out: &'a mut String,
    definition: &'static Definition,
    begun: bool,
}

impl Text {
    fn family(&mut self, definition: &'static Definition) -> FamilyText<'_> {
        FamilyText {
            out: &mut self.0,
            definition,
            begun: false,
        }
    }
}

impl FamilyText<'_> {
    fn sample(
        &mut self,
        flow: Option<&Arc<FlowLabels>>,
        values: &[&str],
        value: impl std::fmt::Display,
    ) {
        self.line("", flow, values, None, value);
    }

    fn histogram(
        &mut self,
        flow: Option<&Arc<FlowLabels>>,
        values: &[&str],
        histogram: &HistogramSum,
    ) {
        let mut cumulative = 0;
        let bounds = BUCKET_LABELS.into_iter().chain(["+Inf"]);
        for (bound, n) in bounds.zip(histogram.buckets) {
            cumulative += n;
            self.line("_bucket", flow, values, Some(bound), cumulative);
        }
        let seconds = histogram.sum_ns as f64 / 1e9;
        self.line("_sum", flow, values, None, seconds);
        self.line("_count", flow, values, None, cumulative);
    }

    fn line(
        &mut self,
        suffix: &str,
        flow: Option<&Arc<FlowLabels>>,
        values: &[&str],
        le: Option<&str>,
        value: impl std::fmt::Display,
    ) {
        let Definition {
            name,
            kind,
            help,
            labels,
            ..
        } = self.definition;
        let out = &mut *self.out;
        if !self.begun {
            self.begun = true;
            let kind = kind.as_str();
            // Writing to a String cannot fail, here and below. Our help texts need no escapes.
            let _ = write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        }
        out.push_str(name);
        out.push_str(suffix);
        let mut separator = '{';
        let mut label = |name: &str, value: &str| {
            out.push(separator);
            separator = ',';
            out.push_str(name);
            out.push_str("=\"");
            escape(out, value);
            out.push('"');
        };
        if let Some(flow) = flow {
            flow.values(&mut label);
        }
        for (name, value) in labels.iter().zip(values) {
            label(name, value);
        }
        if let Some(le) = le {
            label("le", le);
        }
        if separator == ',' {
            out.push('}');
        }
        let _ = writeln!(out, " {value}");
    }
}

/// Backslash, double quote and line feed are all that a label's value escapes.
fn escape(out: &mut String, value: &str) {
    for c in value.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
}

#[cfg(test)]
mod tests;
