//! What stands there at the end, for people and for programs.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use super::board::{Act, Board, Expectation, expect};
use super::figures::{Figures, percent};
use super::trace::{self, Node};
use crate::output::{Paint, Tone, count};

/// The document that `--json` prints.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// Whether everything was as expected.
    pub held: bool,
    /// Length in seconds.
    pub seconds: f64,
    pub overall: Figures,
    pub mtls: Mtls,
    pub retries: u64,
    pub acts: Vec<Act>,
    /// What failed requests were told, and how many of them; the most frequent first.
    pub failures: Vec<(String, usize)>,
    /// What was expected of the whole.
    pub expected: Vec<Expectation>,
    pub spans: usize,
    /// One request's way.
    pub trace: Vec<Node>,
}

/// Requests and opaque connections between services.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Mtls {
    pub sent: u64,
    pub over_mtls: u64,
    pub percent: f64,
}

pub fn summary(board: &Board, trace: Vec<Node>) -> Summary {
    let seconds = board.ended.unwrap_or_else(|| board.now());
    let overall = board.figures(0.0, seconds);
    let (sent, over_mtls) = board.mtls();
    let mtls = Mtls {
        sent,
        over_mtls,
        percent: percent(over_mtls as usize, sent as usize),
    };
    let expected = vec![
        expect(overall.requests > 0, "there is traffic"),
        expect(overall.success >= 99.0, "99 % of all requests succeed"),
        expect(
            sent > 0 && sent == over_mtls,
            "everything between services is mutual TLS",
        ),
        expect(!trace.is_empty(), "there are traces"),
    ];
    let held = expected.iter().chain(board.expectations()).all(|e| e.held);
    Summary {
        held,
        seconds,
        overall,
        mtls,
        retries: board.retries(),
        acts: board.acts.clone(),
        failures: failures(board, seconds),
        expected,
        spans: board.spans,
        trace,
    }
}

/// Kinds of failure that are shown.
const MAX_FAILURES: usize = 5;

fn failures(board: &Board, seconds: f64) -> Vec<(String, usize)> {
    let mut kinds = BTreeMap::<String, usize>::new();
    let (from, to) = (board.epoch(0.0), board.epoch(seconds));
    for report in board.reports.failures(from, to) {
        let kind = match report.status {
            0 => report.said.clone(),
            status => format!("{status}: {}", report.said),
        };
        *kinds.entry(kind).or_default() += 1;
    }
    let mut kinds: Vec<_> = kinds.into_iter().collect();
    kinds.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    kinds.truncate(MAX_FAILURES);
    kinds
}

/// The end of the story for people.
pub fn render(summary: &Summary, paint: Paint) -> String {
    let mut out = String::new();
    if !summary.trace.is_empty() {
        let _ = writeln!(out, "\n{}", paint.paint(Tone::Strong, "One request's way"));
        out.push_str(&trace::render(&summary.trace));
    }
    let all = &summary.overall;
    let _ = writeln!(
        out,
        "\n{} requests in {:.0} s, {} failed ({:.2} % succeeded); p50 {:.1} ms, p99 {:.1} ms; \
         {:.1} % of {} exchanges between services over mutual TLS; {} retries; {} spans.",
        count(all.requests),
        summary.seconds,
        count(all.failed),
        all.success,
        all.p50,
        all.p99,
        summary.mtls.percent,
        count(summary.mtls.sent as usize),
        count(summary.retries as usize),
        count(summary.spans),
    );
    for (said, n) in &summary.failures {
        let _ = writeln!(out, "  {} failed with {said}", count(*n));
    }
    let all_expected = summary
        .acts
        .iter()
        .flat_map(|act| act.expected.iter().map(|e| (act.name, e)))
        .chain(summary.expected.iter().map(|e| ("overall", e)));
    let missed: Vec<_> = all_expected.filter(|(_, e)| !e.held).collect();
    if missed.is_empty() {
        let _ = writeln!(
            out,
            "{}",
            paint.paint(Tone::Good, "Everything was as expected.")
        );
    }
    for (act, expectation) in missed {
        let text = format!("Not as expected: {act}: {}.", expectation.what);
        let _ = writeln!(out, "{}", paint.paint(Tone::Bad, &text));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::board::Shared;
    use super::*;

    #[test]
    fn a_demo_without_traffic_is_not_a_success() {
        let shared = Shared::new();
        let summary = summary(&shared.lock(), vec![]);
        assert!(!summary.held);
        let text = render(&summary, Paint::NEVER);
        assert!(
            text.contains("Not as expected: overall: there is traffic."),
            "{text}"
        );
    }
}
