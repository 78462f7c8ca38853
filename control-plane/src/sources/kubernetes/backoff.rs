//! Waits between tries: growing, bounded, never in step with other control planes.

use std::time::Duration;

use rand::Rng;

/// Exponential with jitter: the n-th wait lies between half and all of `first * 2^n`, at most
/// `most`.
#[derive(Debug, Clone)]
pub(super) struct Backoff {
    first: Duration,
    most: Duration,
    next: Duration,
}

impl Backoff {
    pub(super) fn new(first: Duration, most: Duration) -> Self {
        Self {
            first,
            most,
            next: first,
        }
    }

    /// How long to wait before the next try.
    pub(super) fn wait(&mut self) -> Duration {
        let ceiling = self.next;
        self.next = self.next.saturating_mul(2).min(self.most);
        jitter(ceiling)
    }

    /// A try has worked: begin anew.
    pub(super) fn reset(&mut self) {
        self.next = self.first;
    }
}

/// Between half and all of `most`.
pub(super) fn jitter(most: Duration) -> Duration {
    most.mul_f64(rand::rng().random_range(0.5..=1.0))
}
