//! What the visitor's reports add up to.

use serde::Serialize;

use crate::apps::visitor::Report;

/// Every request so far, in the order of their ends.
#[derive(Debug, Default)]
pub struct Reports {
    all: Vec<Report>,
}

/// A stretch of time in figures.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Figures {
    pub requests: usize,
    pub failed: usize,
    /// Percent, 0-100; 100 when there were no requests.
    pub success: f64,
    /// Requests per second.
    pub rate: f64,
    /// Milliseconds.
    pub p50: f64,
    /// Milliseconds.
    pub p99: f64,
    /// Milliseconds.
    pub max: f64,
}

impl Reports {
    pub fn push(&mut self, report: Report) {
        self.all.push(report);
    }

    /// Whether any request has succeeded yet.
    pub fn any_success(&self) -> bool {
        self.all.iter().any(Report::succeeded)
    }

    /// What the latest failure was told.
    pub fn last_words(&self) -> &str {
        let failed = self.all.iter().rev().find(|r| !r.succeeded());
        failed.map_or("nothing was answered", |r| &r.said)
    }

    /// Requests that were due from `from` until before `to`, milliseconds since the Unix epoch.
    pub fn between(&self, from: f64, to: f64) -> impl Iterator<Item = &Report> {
        // Reports arrive out of order by at most the visitor's patience; a scan over everything
        // would be quadratic over a demo, so begin where nothing earlier can lie.
        const SLACK: f64 = 10_000.0;
        let start = self.all.partition_point(|r| r.at < from - SLACK);
        self.all[start..]
            .iter()
            .filter(move |r| (from..to).contains(&r.at))
    }

    /// The figures of that stretch.
    pub fn figures(&self, from: f64, to: f64) -> Figures {
        let mut took = Vec::new();
        let mut failed = 0;
        for report in self.between(from, to) {
            took.push(report.took);
            failed += usize::from(!report.succeeded());
        }
        took.sort_by(f64::total_cmp);
        let requests = took.len();
        Figures {
            requests,
            failed,
            success: percent(requests - failed, requests),
            rate: requests as f64 / ((to - from) / 1e3).max(1e-3),
            p50: quantile(&took, 0.50),
            p99: quantile(&took, 0.99),
            max: took.last().copied().unwrap_or_default(),
        }
    }

    /// The failed requests of that stretch.
    pub fn failures(&self, from: f64, to: f64) -> Vec<&Report> {
        self.between(from, to).filter(|r| !r.succeeded()).collect()
    }
}

/// `part` of `whole` in percent; 100 of nothing.
pub fn percent(part: usize, whole: usize) -> f64 {
    if whole == 0 {
        return 100.0;
    }
    part as f64 * 100.0 / whole as f64
}

/// Nearest-rank quantile of sorted values; 0 of none.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let rank = (sorted.len() as f64 * q).ceil() as usize;
    sorted
        .get(rank.saturating_sub(1))
        .copied()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(at: f64, took: f64, status: u16) -> Report {
        Report {
            at,
            took,
            method: "GET".to_owned(),
            path: "/".to_owned(),
            status,
            said: String::new(),
        }
    }

    #[test]
    fn a_window_counts_what_was_due_in_it() {
        let mut reports = Reports::default();
        for n in 0..1000u32 {
            let status = if n % 100 == 7 { 502 } else { 200 };
            reports.push(report(f64::from(n) * 10.0, f64::from(n % 100), status));
        }
        let figures = reports.figures(1000.0, 3000.0);
        assert_eq!(figures.requests, 200);
        assert_eq!(figures.failed, 2);
        assert_eq!(figures.success, 99.0);
        assert_eq!(figures.rate, 100.0);
        assert_eq!((figures.p50, figures.p99, figures.max), (49.0, 98.0, 99.0));
        assert_eq!(reports.failures(1000.0, 3000.0).len(), 2);
    }

    #[test]
    fn late_reports_are_found() {
        let mut reports = Reports::default();
        for n in 0..100u32 {
            reports.push(report(f64::from(n) * 100.0, 1.0, 200));
        }
        // Was due at the beginning, gave up after five seconds.
        reports.push(report(5_000.0, 5_000.0, 0));
        assert_eq!(reports.figures(4_950.0, 5_050.0).requests, 2);
        assert_eq!(reports.figures(4_950.0, 5_050.0).failed, 1);
    }

    #[test]
    fn nothing_is_no_failure() {
        let figures = Reports::default().figures(0.0, 1.0);
        assert_eq!((figures.success, figures.p99), (100.0, 0.0));
    }
}
