//! The memory that is written on a request's way, and the handles that write it.
//!
//! Every cell has one writer, the worker it belongs to, so that adding is a relaxed load and a
//! relaxed store: no locked instruction, no cache line that another core writes. The handles are
//! not `Send`; that is what keeps the promise. Cells begin on a cache line of their own, apart from
//! another worker's and from the reference counts that a scrape touches.

use std::marker::PhantomData;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A number with one writer and any readers.
#[derive(Debug, Default)]
pub struct Cell64(AtomicU64);

impl Cell64 {
    /// Only from the one writer.
    #[inline]
    pub(super) fn add(&self, n: u64) {
        let v = self.0.load(Ordering::Relaxed);
        self.0.store(v.wrapping_add(n), Ordering::Relaxed);
    }

    #[inline]
    fn sub(&self, n: u64) {
        let v = self.0.load(Ordering::Relaxed);
        self.0.store(v.wrapping_sub(n), Ordering::Relaxed);
    }

    /// From anywhere, for cells that belong to no worker.
    pub(super) fn add_shared(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of the duration buckets, nanoseconds; beyond the last is "+Inf".
///
/// Two and a half steps a decade from what a hop costs on one machine to what people wait for.
pub const BUCKETS: [u64; 17] = [
    100_000,
    200_000,
    500_000,
    1_000_000,
    2_000_000,
    5_000_000,
    10_000_000,
    20_000_000,
    50_000_000,
    100_000_000,
    200_000_000,
    500_000_000,
    1_000_000_000,
    2_000_000_000,
    5_000_000_000,
    10_000_000_000,
    30_000_000_000,
];

/// [`BUCKETS`] in seconds, as Prometheus spells them.
pub const BUCKET_LABELS: [&str; 17] = [
    "0.0001", "0.0002", "0.0005", "0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.1", "0.2",
    "0.5", "1", "2", "5", "10", "30",
];

/// Durations by bucket (not cumulative) and their sum.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct HistogramCells {
    buckets: [Cell64; BUCKETS.len() + 1],
    sum_ns: Cell64,
}

impl HistogramCells {
    #[inline]
    fn record(&self, duration: Duration) {
        // 584 years; the cast cannot lose what anybody waits for.
        let ns = duration.as_nanos() as u64;
        let bucket = BUCKETS.iter().take_while(|bound| ns > **bound).count();
        self.buckets[bucket].add(1);
        self.sum_ns.add(ns);
    }
}

/// Classes of responses; a status of no class counts as "none".
pub const CLASSES: [&str; 6] = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];
/// gRPC status codes 0-16; what is above counts as 2 (UNKNOWN), as gRPC's clients read it.
pub const GRPC_CODES: usize = 17;
const GRPC_UNKNOWN: usize = 2;

#[inline]
fn class_of(status: u16) -> usize {
    match status / 100 {
        class @ 1..=5 => usize::from(class),
        _ => 0,
    }
}

/// What is counted of requests between two parties by one worker.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct RequestCells {
    pub(super) by_class: [Cell64; CLASSES.len()],
    pub(super) by_grpc: [Cell64; GRPC_CODES],
    pub(super) duration: HistogramCells,
    pub(super) in_flight: Cell64,
}

/// What is counted of connections between two parties by one worker.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct ConnectionCells {
    pub(super) opened: Cell64,
    pub(super) closed: Cell64,
    pub(super) to_destination: Cell64,
    pub(super) to_source: Cell64,
}

/// One event of one worker.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct CounterCells {
    pub(super) count: Cell64,
}

macro_rules! handle {
    ($(#[$doc:meta])* $name:ident, $cells:ty) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name {
            cells: Arc<$cells>,
            /// One writer: stays on its worker's thread.
            _here: PhantomData<*const ()>,
        }

        impl From<Arc<$cells>> for $name {
            fn from(cells: Arc<$cells>) -> Self {
                Self { cells, _here: PhantomData }
            }
        }
    };
}

handle!(
    /// Requests between two parties.
    RequestSeries,
    RequestCells
);
handle!(
    /// Connections between two parties.
    ConnectionSeries,
    ConnectionCells
);
handle!(
    /// A named event.
    CounterSeries,
    CounterCells
);
handle!(
    /// A named duration.
    HistogramSeries,
    HistogramCells
);

impl RequestSeries {
    /// A request has ended. `status` 0 says that there was no response; `grpc_status` counts with
    /// a 2xx response only, as gRPC has it.
    #[inline]
    pub fn record(&self, status: u16, grpc_status: Option<u32>, duration: Duration) {
        let class = class_of(status);
        match grpc_status {
            Some(code) if class == 2 => {
                let code = usize::try_from(code).unwrap_or(GRPC_UNKNOWN);
                let code = if code < GRPC_CODES {
                    code
                } else {
                    GRPC_UNKNOWN
                };
                self.cells.by_grpc[code].add(1);
            }
            _ => self.cells.by_class[class].add(1),
        }
        self.cells.duration.record(duration);
    }

    /// A request has begun; in flight until the guard is dropped.
    #[inline]
    #[must_use]
    pub fn enter(self: &Rc<Self>) -> InFlight {
        self.cells.in_flight.add(1);
        InFlight(self.clone())
    }
}

/// Counts one request as in flight while it lives.
#[derive(Debug)]
pub struct InFlight(Rc<RequestSeries>);

impl InFlight {
    /// The series the request is counted with.
    pub fn series(&self) -> &Rc<RequestSeries> {
        &self.0
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.cells.in_flight.sub(1);
    }
}

impl ConnectionSeries {
    /// A connection was opened; active until the guard is dropped.
    #[must_use]
    pub fn open(self: &Rc<Self>) -> OpenConnection {
        self.cells.opened.add(1);
        OpenConnection(self.clone())
    }

    /// Bytes of the application passed on from the source to the destination.
    #[inline]
    pub fn to_destination(&self, bytes: u64) {
        self.cells.to_destination.add(bytes);
    }

    /// Bytes of the application passed on from the destination to the source.
    #[inline]
    pub fn to_source(&self, bytes: u64) {
        self.cells.to_source.add(bytes);
    }
}

/// Counts one connection as active while it lives, as closed then.
#[derive(Debug)]
pub struct OpenConnection(Rc<ConnectionSeries>);

impl OpenConnection {
    /// The series the connection is counted with.
    pub fn series(&self) -> &Rc<ConnectionSeries> {
        &self.0
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.cells.closed.add(1);
    }
}

impl CounterSeries {
    #[inline]
    pub fn inc(&self) {
        self.add(1);
    }

    #[inline]
    pub fn add(&self, n: u64) {
        self.cells.count.add(n);
    }
}

impl HistogramSeries {
    #[inline]
    pub fn record(&self, duration: Duration) {
        self.cells.record(duration);
    }
}

/// A histogram summed over the workers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HistogramSum {
    /// Not cumulative.
    pub buckets: [u64; BUCKETS.len() + 1],
    pub sum_ns: u64,
}

impl HistogramSum {
    pub(super) fn add(&mut self, cells: &HistogramCells) {
        for (sum, cell) in self.buckets.iter_mut().zip(&cells.buckets) {
            *sum += cell.get();
        }
        self.sum_ns = self.sum_ns.wrapping_add(cells.sum_ns.get());
    }

    pub(super) fn merge(&mut self, other: &Self) {
        for (sum, more) in self.buckets.iter_mut().zip(other.buckets) {
            *sum += more;
        }
        self.sum_ns = self.sum_ns.wrapping_add(other.sum_ns);
    }

    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The duration that a share `q` (0-1) of the records does not exceed, by linear interpolation
    /// inside its bucket; `None` without records. What lies beyond the last bound counts as it.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let rank = q.clamp(0.0, 1.0) * count as f64;
        let mut below = 0u64;
        for (i, n) in self.buckets.iter().copied().enumerate() {
            if n > 0 && (below + n) as f64 >= rank {
                let low = if i == 0 { 0 } else { BUCKETS[i - 1] };
                let high = BUCKETS.get(i).copied().unwrap_or(low);
                let share = ((rank - below as f64) / n as f64).clamp(0.0, 1.0);
                let ns = low as f64 + (high - low) as f64 * share;
                return Some(Duration::from_nanos(ns as u64));
            }
            below += n;
        }
        Some(Duration::from_nanos(BUCKETS[BUCKETS.len() - 1]))
    }
}

/// Requests between two parties, summed over the workers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RequestSum {
    pub by_class: [u64; CLASSES.len()],
    pub by_grpc: [u64; GRPC_CODES],
    pub duration: HistogramSum,
    pub in_flight: u64,
}

impl RequestSum {
    pub(super) fn of(cells: &[Arc<RequestCells>]) -> Self {
        let mut sum = Self::default();
        for cells in cells {
            for (sum, cell) in sum.by_class.iter_mut().zip(&cells.by_class) {
                *sum += cell.get();
            }
            for (sum, cell) in sum.by_grpc.iter_mut().zip(&cells.by_grpc) {
                *sum += cell.get();
            }
            sum.duration.add(&cells.duration);
            sum.in_flight = sum.in_flight.wrapping_add(cells.in_flight.get());
        }
        sum
    }
}

/// Connections between two parties, summed over the workers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConnectionSum {
    pub opened: u64,
    pub closed: u64,
    pub to_destination: u64,
    pub to_source: u64,
}

impl ConnectionSum {
    pub(super) fn of(cells: &[Arc<ConnectionCells>]) -> Self {
        let mut sum = Self::default();
        for cells in cells {
            // Closed first: read the other way round, more could be closed than opened.
            sum.closed += cells.closed.get();
            sum.opened += cells.opened.get();
            sum.to_destination += cells.to_destination.get();
            sum.to_source += cells.to_source.get();
        }
        sum
    }

    pub fn active(&self) -> u64 {
        self.opened.saturating_sub(self.closed)
    }
}
