//! Peak EWMA: what an endpoint's answers cost of late, quick to rise and slow to forget.
//!
//! As in Finagle and linkerd: a latency above the average replaces it at once (a peak), one below
//! pulls it down with the weight `1 - exp(-dt / TAU)`, where `dt` is the time since the last
//! measurement. An endpoint that is not asked is forgiven at the same pace.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// How fast a measurement is forgotten: to 1/e in this time. Finagle's and linkerd's default.
const TAU: Duration = Duration::from_secs(10);

/// Cost, per request in flight, of an endpoint that has not answered yet: it gets a first request
/// at once (it may be the best) and no second one before the first has been measured, unless
/// nobody else is there. Nanoseconds; an hour.
const UNMEASURED: f64 = 3.6e12;

/// What a failed try counts for at least where nothing else steers away from the endpoint.
/// Nanoseconds; 10 ms.
const FAILURE_FLOOR: f64 = 1e7;

/// What repeated failures can drive the average to. Nanoseconds; 10 s.
const FAILURE_CAP: f64 = 1e10;

#[derive(Debug)]
pub(super) struct PeakEwma {
    /// Nanoseconds at `stamp`; 0 is "not measured".
    nanos: Cell<f64>,
    stamp: Cell<Instant>,
}

impl PeakEwma {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            nanos: Cell::new(0.0),
            stamp: Cell::new(now),
        }
    }

    /// The average at `now`, in nanoseconds.
    pub(super) fn nanos(&self, now: Instant) -> f64 {
        self.nanos.get() * self.remains(now)
    }

    /// Cost of one more request with `load` in flight (share of a usual endpoint's weight).
    pub(super) fn cost(&self, load: f64, now: Instant) -> f64 {
        let nanos = self.nanos(now);
        if nanos == 0.0 {
            load * UNMEASURED
        } else {
            nanos * (load + 1.0)
        }
    }

    /// A measured latency.
    pub(super) fn observe(&self, latency: Duration, now: Instant) {
        let latency = latency.as_nanos() as f64;
        let remains = self.remains(now);
        let old = self.nanos.get() * remains;
        self.set(
            if latency > old {
                latency
            } else {
                self.nanos.get() * remains + latency * (1.0 - remains)
            },
            now,
        );
    }

    /// A failure's latency: may raise the average, never lowers it. An endpoint that refuses fast
    /// must not look like a fast one.
    pub(super) fn observe_failure(&self, latency: Duration, now: Instant) {
        let old = self.nanos.get();
        self.set(old.max(latency.as_nanos() as f64), now);
    }

    /// A failure where nothing but the cost steers away from the endpoint: doubles it.
    pub(super) fn penalize(&self, latency: Duration, now: Instant) {
        let doubled = (2.0 * self.nanos(now)).clamp(FAILURE_FLOOR, FAILURE_CAP);
        self.set(doubled.max(latency.as_nanos() as f64), now);
    }

    fn set(&self, nanos: f64, now: Instant) {
        // 0 means "not measured"; a latency of less than a nanosecond is a measurement.
        self.nanos.set(nanos.max(1.0));
        self.stamp.set(self.stamp.get().max(now));
    }

    /// The share of the old average that is left at `now`.
    fn remains(&self, now: Instant) -> f64 {
        let x = now
            .saturating_duration_since(self.stamp.get())
            .as_secs_f64()
            / TAU.as_secs_f64();
        // Most requests come within a tenth of a second of the last: the first terms of the
        // series are right to 1/20,000 there and cheaper than `exp`.
        if x < 0.01 { 1.0 - x } else { (-x).exp() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_peak_counts_at_once_and_is_forgotten_slowly() {
        let t = Instant::now();
        let ewma = PeakEwma::new(t);
        ewma.observe(MS, t);
        ewma.observe(100 * MS, t + MS);
        assert_eq!(ewma.nanos(t + MS), 1e8);
        // One fast answer right after it changes next to nothing.
        ewma.observe(MS, t + 2 * MS);
        assert!(ewma.nanos(t + 2 * MS) > 0.99e8);
        // After TAU, about 1/e of it is left.
        let later = t + 2 * MS + TAU;
        let left = ewma.nanos(later) / 1e8;
        assert!((left - 0.3678).abs() < 0.01, "{left}");
    }

    #[test]
    fn an_unmeasured_endpoint_is_tried_once_and_then_awaited() {
        let t = Instant::now();
        let new = PeakEwma::new(t);
        let known = PeakEwma::new(t);
        known.observe(50 * MS, t);
        assert!(new.cost(0.0, t) < known.cost(0.0, t));
        assert!(new.cost(1.0, t) > known.cost(100.0, t));
    }

    #[test]
    fn failures_never_make_an_endpoint_look_fast() {
        let t = Instant::now();
        let ewma = PeakEwma::new(t);
        ewma.observe(20 * MS, t);
        ewma.observe_failure(Duration::from_micros(10), t + MS);
        assert_eq!(ewma.nanos(t + MS), 2e7);
        ewma.penalize(Duration::from_micros(10), t + MS);
        assert_eq!(ewma.nanos(t + MS), 4e7);
        let fresh = PeakEwma::new(t);
        fresh.penalize(Duration::from_micros(10), t);
        assert_eq!(fresh.nanos(t), FAILURE_FLOOR);
    }

    proptest! {
        /// The average stays between 0 and the highest latency ever seen, and a peak is seen.
        #[test]
        fn stays_within_what_was_measured(steps in prop::collection::vec((1u64..5_000_000_000, 0u64..20_000), 1..60)) {
            let mut now = Instant::now();
            let ewma = PeakEwma::new(now);
            let mut highest = 0f64;
            for (latency, pause) in steps {
                now += Duration::from_millis(pause);
                let before = ewma.nanos(now);
                ewma.observe(Duration::from_nanos(latency), now);
                let after = ewma.nanos(now);
                highest = highest.max(latency as f64);
                prop_assert!(after <= highest * 1.000_001);
                if latency as f64 > before {
                    prop_assert_eq!(after, latency as f64);
                } else {
                    prop_assert!(after > 0.0 && after >= before * 0.999_999);
                    // Pulled towards the latency, never below it from above.
                    prop_assert!(ewma.nanos(now + TAU) <= after);
                }
            }
        }
    }
}
