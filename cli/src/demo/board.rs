//! What is known while the demo runs: the story so far and the latest state of the mesh.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::figures::Reports;
use super::observe::ProxyView;

/// One thing that was done to the shop, and what the mesh did about it.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Act {
    pub name: &'static str,
    /// Seconds since the beginning of the demo.
    pub began: f64,
    /// Nothing while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended: Option<f64>,
    /// What was done.
    pub did: String,
    /// What the mesh did, with the figures.
    pub saw: String,
    /// The same for programs.
    pub figures: serde_json::Value,
    /// What was expected, and whether it came to be.
    pub expected: Vec<Expectation>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Expectation {
    pub what: String,
    pub held: bool,
}

/// Shorthand.
pub fn expect(held: bool, what: impl Into<String>) -> Expectation {
    Expectation {
        what: what.into(),
        held,
    }
}

/// The control plane, as it says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ControlView {
    pub up: bool,
    pub connected: usize,
    /// Proxies that have not acknowledged everything.
    pub behind: usize,
    /// Resources refused by a proxy.
    pub refused: usize,
}

#[derive(Debug)]
pub struct Board {
    began: Instant,
    /// The same moment, milliseconds since the Unix epoch.
    began_at: f64,
    /// Seconds since the beginning, once the load has ended.
    pub ended: Option<f64>,
    pub reports: Reports,
    pub acts: Vec<Act>,
    /// How many of them have been told, where the demo is told by lines.
    pub told: usize,
    /// Latest view by workload.
    pub proxies: BTreeMap<&'static str, ProxyView>,
    /// Views of the front's proxy, by seconds since the beginning: what acts are measured by.
    pub front: Vec<(f64, ProxyView)>,
    pub control: ControlView,
    pub spans: usize,
}

/// Shared by the tasks of the demo's one thread.
#[derive(Debug, Clone)]
pub struct Shared(Arc<Mutex<Board>>);

impl Shared {
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(Board::new())))
    }

    /// The board; what a task that panicked left is still good.
    pub fn lock(&self) -> MutexGuard<'_, Board> {
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Board {
    fn new() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            began: Instant::now(),
            began_at: now.unwrap_or_default().as_secs_f64() * 1e3,
            ended: None,
            reports: Reports::default(),
            acts: Vec::new(),
            told: 0,
            proxies: BTreeMap::new(),
            front: Vec::new(),
            control: ControlView::default(),
            spans: 0,
        }
    }

    /// The demo's clock starts again: the shop stands, the story begins.
    pub fn begin(&mut self) {
        *self = Self {
            control: std::mem::take(&mut self.control),
            proxies: std::mem::take(&mut self.proxies),
            ..Self::new()
        };
    }

    /// Seconds since the beginning.
    pub fn now(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// Milliseconds since the Unix epoch, of a moment in seconds since the beginning.
    pub fn epoch(&self, seconds: f64) -> f64 {
        self.began_at + seconds * 1e3
    }

    /// Figures of a stretch in seconds since the beginning.
    pub fn figures(&self, from: f64, to: f64) -> super::figures::Figures {
        self.reports.figures(self.epoch(from), self.epoch(to))
    }

    /// The last view of the front's proxy before `at`.
    pub fn front_at(&self, at: f64) -> Option<&ProxyView> {
        let n = self.front.partition_point(|(t, _)| *t <= at);
        self.front[..n].last().map(|(_, view)| view)
    }

    /// The first moment from `from` on at which the front's proxy is in a state.
    pub fn first(&self, from: f64, is: impl Fn(&ProxyView) -> bool) -> Option<f64> {
        let n = self.front.partition_point(|(t, _)| *t < from);
        let found = self.front[n..].iter().find(|(_, view)| is(view))?;
        Some(found.0)
    }

    /// Share (percent) of the requests to `service` between two moments that went to `workload`.
    pub fn share(&self, service: &str, workload: &str, from: f64, to: f64) -> Option<f64> {
        // Before the first view there was nothing to count.
        let nothing = ProxyView::default();
        let before = self.front_at(from).unwrap_or(&nothing);
        let after = self.front_at(to)?;
        let (mut all, mut one) = (0, 0);
        for (w, n) in after.by_endpoint.get(service)? {
            let grown = n.saturating_sub(before.sent_to(service, w));
            all += grown;
            if w == workload {
                one += grown;
            }
        }
        (all > 0).then(|| one as f64 * 100.0 / all as f64)
    }

    /// Retries of all proxies so far.
    pub fn retries(&self) -> u64 {
        self.proxies.values().map(|p| p.retries).sum()
    }

    /// Requests and connections between services, and those of them over mutual TLS.
    pub fn mtls(&self) -> (u64, u64) {
        let sum = |f: fn(&ProxyView) -> u64| self.proxies.values().map(f).sum();
        (sum(|p| p.sent), sum(|p| p.sent_mtls))
    }

    pub fn expectations(&self) -> impl Iterator<Item = &Expectation> {
        self.acts.iter().flat_map(|act| &act.expected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(one: u64, two: u64, ejections: u64) -> ProxyView {
        let counts =
            |pairs: &[(&str, u64)]| pairs.iter().map(|(w, n)| ((*w).to_owned(), *n)).collect();
        ProxyView {
            by_endpoint: [
                (
                    "catalog".to_owned(),
                    counts(&[("catalog-1", one), ("catalog-2", two)]),
                ),
                ("pricing".to_owned(), counts(&[("pricing-1", 9 * one)])),
            ]
            .into(),
            ejections,
            ..ProxyView::default()
        }
    }

    #[test]
    fn shares_and_moments() {
        let mut board = Board::new();
        board.front = vec![
            (0.0, view(0, 0, 0)),
            (1.0, view(100, 100, 0)),
            (2.0, view(190, 110, 1)),
            (3.0, view(190, 110, 1)),
        ];
        assert_eq!(board.share("catalog", "catalog-2", 0.0, 1.0), Some(50.0));
        assert_eq!(board.share("catalog", "catalog-2", 1.5, 2.5), Some(10.0));
        assert_eq!(board.share("catalog", "catalog-2", 2.0, 3.0), None);
        let ejected = |v: &ProxyView| v.ejections > 0;
        assert_eq!(board.first(0.5, ejected), Some(2.0));
        assert_eq!(board.first(3.5, ejected), None);
    }
}
