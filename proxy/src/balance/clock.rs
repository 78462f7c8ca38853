//! Points in time as numbers that fit into an atomic.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Lies a day back, so that an `Instant` taken a moment before the first use still has a number.
static EPOCH: LazyLock<Instant> = LazyLock::new(|| {
    let now = Instant::now();
    now.checked_sub(Duration::from_secs(86_400)).unwrap_or(now)
});

/// Milliseconds since a fixed point of this process's life.
pub(super) fn millis(at: Instant) -> u64 {
    duration_millis(at.saturating_duration_since(*EPOCH))
}

/// The point that [`millis`] gave the number for, to the millisecond.
pub(super) fn instant(millis: u64) -> Instant {
    *EPOCH + Duration::from_millis(millis)
}

pub(super) fn duration_millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}
