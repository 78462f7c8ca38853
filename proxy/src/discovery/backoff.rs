//! Waits between tries: growing, bounded, never in step with other proxies.

use std::time::Duration;

use rand::Rng;

/// Exponential with jitter: the n-th wait lies between half and all of `first * 2^n`, at most
/// `most`.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    next: Duration,
}

impl Backoff {
    pub fn new(first: Duration, most: Duration) -> Self {
        Self {
            first,
            most,
            next: first,
        }
    }

    /// How long to wait before the next try.
    pub fn wait(&mut self) -> Duration {
        let ceiling = self.next;
        self.next = self.next.saturating_mul(2).min(self.most);
        ceiling.mul_f64(rand::rng().random_range(0.5..=1.0))
    }

    /// A try has worked: begin anew.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_within_bounds_and_begins_anew() {
        let (first, most) = (Duration::from_millis(100), Duration::from_secs(15));
        let mut backoff = Backoff::new(first, most);
        let mut ceiling = first;
        for _ in 0..20 {
            let wait = backoff.wait();
            assert!(wait >= ceiling / 2 && wait <= ceiling, "{wait:?}");
            ceiling = (ceiling * 2).min(most);
        }
        assert_eq!(ceiling, most);
        backoff.reset();
        assert!(backoff.wait() <= first);
    }

    #[test]
    fn waits_differ() {
        let waits: std::collections::HashSet<_> = (0..50)
            .map(|_| Backoff::new(Duration::from_secs(1), Duration::from_secs(1)).wait())
            .collect();
        assert!(waits.len() > 10);
    }
}
