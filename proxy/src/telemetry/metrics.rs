//! The registry all workers share, and a worker's own view of it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::cells::{
    ConnectionCells, ConnectionSeries, ConnectionSum, CounterCells, CounterSeries, HistogramCells,
    HistogramSeries, HistogramSum, RequestCells, RequestSeries, RequestSum,
};
use super::labels::{Event, EventLabels, FlowLabels, Labels};
use super::names::{Counter, Gauge, Histogram};

/// Series a family holds before labels become "other": what a busy gateway talks to, and about
/// 1 MiB of cells a worker.
pub const MAX_SERIES: usize = 2_000;
/// A series nobody holds a handle of is forgotten after this: long enough for several scrapes.
pub const FORGET_AFTER: Duration = Duration::from_secs(15 * 60);
/// Writer of cells that belong to no worker.
const SHARED: u32 = 0;

/// All metrics of the process. Workers take a [`WorkerMetrics`] each; other threads use
/// [`Registry::count`] and [`Registry::set`].
#[derive(Debug)]
pub struct Registry {
    requests: Mutex<Family<FlowLabels, RequestCells>>,
    connections: Mutex<Family<FlowLabels, ConnectionCells>>,
    counters: Mutex<Family<EventLabels<Counter>, CounterCells>>,
    histograms: Mutex<Family<EventLabels<Histogram>, HistogramCells>>,
    gauges: [AtomicU64; Gauge::ALL.len()],
    /// Resolutions answered with "other": requests, connections, counters, histograms.
    overflow: [AtomicU64; FAMILIES.len()],
    workers: AtomicU32,
}

/// Names of the families in `weft_metrics_overflow_total`.
const FAMILIES: [&str; 4] = ["requests", "connections", "events", "durations"];
const REQUESTS: usize = 0;
const CONNECTIONS: usize = 1;
const COUNTERS: usize = 2;
const HISTOGRAMS: usize = 3;

/// Sums of everything at one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Sorted by labels, like all of these.
    pub requests: Vec<(Arc<FlowLabels>, RequestSum)>,
    pub connections: Vec<(Arc<FlowLabels>, ConnectionSum)>,
    pub counters: Vec<(Arc<EventLabels<Counter>>, u64)>,
    pub histograms: Vec<(Arc<EventLabels<Histogram>>, HistogramSum)>,
    /// Those that were set.
    pub gauges: Vec<(Gauge, f64)>,
    pub overflow: Vec<(&'static str, u64)>,
}

impl Default for Registry {
    fn default() -> Self {
        Self::with_max_series(MAX_SERIES)
    }
}

impl Registry {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// With another limit of series a family.
    pub fn with_max_series(max: usize) -> Self {
        // NaN: never set.
        let gauges = [const { AtomicU64::new(f64::NAN.to_bits()) }; Gauge::ALL.len()];
        Self {
            requests: Mutex::new(Family::new(max)),
            connections: Mutex::new(Family::new(max)),
            counters: Mutex::new(Family::new(max)),
            histograms: Mutex::new(Family::new(max)),
            gauges,
            overflow: Default::default(),
            workers: AtomicU32::new(SHARED + 1),
        }
    }

    /// A view for one worker thread, which it keeps as long as it lives.
    pub fn worker(self: &Arc<Self>) -> WorkerMetrics {
        WorkerMetrics {
            registry: self.clone(),
            worker: self.workers.fetch_add(1, Ordering::Relaxed),
            requests: RefCell::default(),
            connections: RefCell::default(),
            counters: RefCell::default(),
            histograms: RefCell::default(),
        }
    }

    /// Counts an event from any thread. `labels` are the values in the order of the definition.
    pub fn count(&self, counter: Counter, labels: &[&str], n: u64) {
        let key = event(counter, labels);
        let (_, cells) = self.resolve(&self.counters, COUNTERS, &key, SHARED);
        cells.count.add_shared(n);
    }

    pub fn set(&self, gauge: Gauge, value: f64) {
        self.gauges[gauge as usize].store(value.to_bits(), Ordering::Relaxed);
    }

    /// Sums up. Forgets what has been idle for [`FORGET_AFTER`].
    pub fn snapshot(&self) -> Snapshot {
        self.snapshot_at(Instant::now())
    }

    pub(super) fn snapshot_at(&self, now: Instant) -> Snapshot {
        let gauge = |g: Gauge| f64::from_bits(self.gauges[g as usize].load(Ordering::Relaxed));
        Snapshot {
            requests: sums(&self.requests, now, RequestSum::of),
            connections: sums(&self.connections, now, ConnectionSum::of),
            counters: sums(&self.counters, now, |cells| {
                cells.iter().map(|c| c.count.get()).sum()
            }),
            histograms: sums(&self.histograms, now, |cells| {
                let mut sum = HistogramSum::default();
                cells.iter().for_each(|c| sum.add(c));
                sum
            }),
            gauges: Gauge::ALL
                .into_iter()
                .map(|g| (g, gauge(g)))
                .filter(|(_, value)| !value.is_nan())
                .collect(),
            overflow: FAMILIES
                .into_iter()
                .zip(&self.overflow)
                .map(|(family, n)| (family, n.load(Ordering::Relaxed)))
                .collect(),
        }
    }

    fn resolve<K: Labels, C: Default>(
        &self,
        family: &Mutex<Family<K, C>>,
        index: usize,
        key: &K,
        worker: u32,
    ) -> (Arc<K>, Arc<C>) {
        let resolved = lock(family).resolve(key, worker, Instant::now());
        if resolved.overflowed {
            self.overflow[index].fetch_add(1, Ordering::Relaxed);
        }
        (resolved.key, resolved.cells)
    }
}

/// One worker's view: resolves handles, which it remembers while somebody holds them.
///
/// Resolving a known handle hashes the labels; resolving a new one takes the registry's lock.
/// Keep the handle where the endpoint or the connection is kept.
#[derive(Debug)]
pub struct WorkerMetrics {
    registry: Arc<Registry>,
    worker: u32,
    requests: RefCell<Cache<FlowLabels, RequestSeries>>,
    connections: RefCell<Cache<FlowLabels, ConnectionSeries>>,
    counters: RefCell<Cache<EventLabels<Counter>, CounterSeries>>,
    histograms: RefCell<Cache<EventLabels<Histogram>, HistogramSeries>>,
}

impl WorkerMetrics {
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Requests between two parties.
    pub fn requests(&self, labels: &FlowLabels) -> Rc<RequestSeries> {
        self.requests.borrow_mut().get(labels, || {
            self.registry
                .resolve(&self.registry.requests, REQUESTS, labels, self.worker)
        })
    }

    /// Connections between two parties.
    pub fn connections(&self, labels: &FlowLabels) -> Rc<ConnectionSeries> {
        self.connections.borrow_mut().get(labels, || {
            self.registry
                .resolve(&self.registry.connections, CONNECTIONS, labels, self.worker)
        })
    }

    /// A named event. `labels` are the values in the order of the definition.
    pub fn counter(&self, counter: Counter, labels: &[&str]) -> Rc<CounterSeries> {
        let key = event(counter, labels);
        self.counters.borrow_mut().get(&key, || {
            self.registry
                .resolve(&self.registry.counters, COUNTERS, &key, self.worker)
        })
    }

    /// Counts a rare event once, without keeping a handle. An event that names a destination takes
    /// the registry's lock (it may have been forgotten); the others take it the first time.
    pub fn count(&self, counter: Counter, labels: &[&str]) {
        self.counter(counter, labels).inc();
    }

    /// A named duration. `labels` are the values in the order of the definition.
    pub fn histogram(&self, histogram: Histogram, labels: &[&str]) -> Rc<HistogramSeries> {
        let key = event(histogram, labels);
        self.histograms.borrow_mut().get(&key, || {
            self.registry
                .resolve(&self.registry.histograms, HISTOGRAMS, &key, self.worker)
        })
    }
}

/// Values missing are empty, those too many are left out: a wrong call must not take traffic down.
fn event<E: Event>(event: E, values: &[&str]) -> EventLabels<E> {
    let names = event.definition().labels;
    debug_assert_eq!(names.len(), values.len(), "labels {names:?}");
    EventLabels {
        event,
        values: (0..names.len())
            .map(|i| values.get(i).copied().unwrap_or_default().into())
            .collect(),
    }
}

/// A panic while the lock was held cannot have left a family half-changed that matters.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Handles a worker has resolved, by labels.
#[derive(Debug)]
struct Cache<K, S> {
    handles: HashMap<Arc<K>, Weak<S>>,
    /// Handles of series that are never forgotten; the family's limit is theirs.
    kept: Vec<Rc<S>>,
    /// Dead entries are swept when there are this many.
    sweep_at: usize,
}

impl<K, S> Default for Cache<K, S> {
    fn default() -> Self {
        Self {
            handles: HashMap::new(),
            kept: Vec::new(),
            sweep_at: 64,
        }
    }
}

impl<K: Labels, S> Cache<K, S> {
    fn get<C>(&mut self, key: &K, resolve: impl FnOnce() -> (Arc<K>, Arc<C>)) -> Rc<S>
    where
        S: From<Arc<C>>,
    {
        if let Some(handle) = self.handles.get(key).and_then(Weak::upgrade) {
            return handle;
        }
        let (resolved, cells) = resolve();
        // What overflowed is remembered by its own labels, or the cache would have no limit.
        if let Some(handle) = self.handles.get(&resolved).and_then(Weak::upgrade) {
            return handle;
        }
        if self.handles.len() >= self.sweep_at {
            self.handles.retain(|_, handle| handle.strong_count() > 0);
            self.sweep_at = (self.handles.len() * 2).max(64);
        }
        let handle = Rc::new(S::from(cells));
        if !resolved.forgettable() {
            self.kept.push(handle.clone());
        }
        self.handles.insert(resolved, Rc::downgrade(&handle));
        handle
    }
}

/// Series with the same kind of labels.
#[derive(Debug)]
struct Family<K, C> {
    series: HashMap<Arc<K>, Series<C>>,
    max: usize,
}

#[derive(Debug)]
struct Series<C> {
    /// By worker.
    cells: Vec<(u32, Arc<C>)>,
    /// When it was first seen that nobody holds a handle.
    idle_since: Option<Instant>,
}

struct Resolved<K, C> {
    key: Arc<K>,
    cells: Arc<C>,
    overflowed: bool,
}

impl<K: Labels, C: Default> Family<K, C> {
    fn new(max: usize) -> Self {
        Self {
            series: HashMap::new(),
            max,
        }
    }

    fn resolve(&mut self, key: &K, worker: u32, now: Instant) -> Resolved<K, C> {
        let mut overflowed = false;
        let key = match self.series.get_key_value(key) {
            Some((key, _)) => key.clone(),
            None => {
                if self.series.len() >= self.max {
                    self.forget(now);
                }
                overflowed = self.series.len() >= self.max;
                Arc::new(if overflowed {
                    key.overflow()
                } else {
                    key.clone()
                })
            }
        };
        let series = self.series.entry(key.clone()).or_insert_with(|| Series {
            cells: Vec::new(),
            idle_since: None,
        });
        series.idle_since = None;
        let cells = match series.cells.iter().find(|(w, _)| *w == worker) {
            Some((_, cells)) => cells.clone(),
            None => {
                let cells = Arc::<C>::default();
                series.cells.push((worker, cells.clone()));
                cells
            }
        };
        Resolved {
            key,
            cells,
            overflowed,
        }
    }

    /// Drops series of destinations that nobody has held a handle of for [`FORGET_AFTER`]. Events
    /// that are counted without a handle are idle from one to the next.
    fn forget(&mut self, now: Instant) {
        self.series.retain(|key, series| {
            if !key.forgettable() {
                return true;
            }
            if series.cells.iter().any(|(_, c)| Arc::strong_count(c) > 1) {
                series.idle_since = None;
                return true;
            }
            let since = *series.idle_since.get_or_insert(now);
            now.saturating_duration_since(since) < FORGET_AFTER
        });
    }

    fn handles(&mut self, now: Instant) -> Vec<(Arc<K>, Vec<Arc<C>>)> {
        self.forget(now);
        self.series
            .iter()
            .map(|(key, series)| {
                let cells = series.cells.iter().map(|(_, c)| c.clone()).collect();
                (key.clone(), cells)
            })
            .collect()
    }
}

/// The lock is held only while the handles are copied.
fn sums<K: Labels + Ord, C: Default, S>(
    family: &Mutex<Family<K, C>>,
    now: Instant,
    sum: impl Fn(&[Arc<C>]) -> S,
) -> Vec<(Arc<K>, S)> {
    let mut handles = lock(family).handles(now);
    handles.sort_by(|(a, _), (b, _)| a.cmp(b));
    handles
        .into_iter()
        .map(|(key, cells)| {
            let sum = sum(&cells);
            (key, sum)
        })
        .collect()
}

#[cfg(test)]
mod tests;
