//! The states of outlier ejection and the ways between them, as pure functions on one word.
//!
//! ```text
//!            too many errors, and there is room to eject
//!   CLOSED ------------------------------------------------> EJECTED(until)
//!     ^  ^ \ a success ends a streak; quiet time               |   ^     ^
//!     |  |_/ takes ejections off the count                     |   |     | the probe came to nothing:
//!     |                                     `until` has passed |   |     | due again at once
//!     |                                     and a try is there |   | the probe failed:
//!     | the probe succeeded                                    v   | longer
//!     +--------------------------------------------------- HALF-OPEN(deadline)
//!                                                  past the deadline the probe
//!                                                  is given up: another may go
//! ```
//!
//! Answers to tries that are not the probe change nothing while the circuit is not closed: they
//! were sent before it opened, or in panic.

use std::time::Duration;

use super::clock::duration_millis;
use crate::tables::OutlierDetection;

/// Streaks are counted up to here; a threshold above it is taken as this.
pub(super) const MAX_STREAK: u32 = (1 << 10) - 1;
/// Ejections are counted up to here.
pub(super) const MAX_TIMES: u32 = (1 << 5) - 1;
/// About two years in milliseconds. A process older than that ejects for no time at all.
const MAX_UNTIL: u64 = (1 << 36) - 1;
/// A probe without an answer is given up after the base ejection, but not sooner than this.
const MIN_PROBE: u64 = 1_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Closed = 0,
    Ejected = 1,
    HalfOpen = 2,
}

/// What is known of an endpoint, small enough for one atomic. All zero is the normal state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Circuit {
    pub(super) phase: Phase,
    /// A success-rate window is open. It opens with the first failure, so that an endpoint
    /// without failures is never counted.
    pub(super) window: bool,
    /// Ejections so far, less those forgiven.
    pub(super) times: u32,
    /// Gateway errors in a row.
    pub(super) gateway: u32,
    /// 5xx of any kind (gateway errors too) in a row.
    pub(super) server: u32,
    /// Milliseconds of [`super::clock`]. Closed: when the next ejection is forgiven. Ejected: when
    /// a probe may go. Half-open: when the probe is given up.
    pub(super) until: u64,
}

/// Whose fault a failed try was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// A 5xx of the application's own.
    Server,
    /// 502, 503, 504, no connection, reset, timeout.
    Gateway,
}

impl Circuit {
    pub(super) const NORMAL: Self = Self {
        phase: Phase::Closed,
        window: false,
        times: 0,
        gateway: 0,
        server: 0,
        until: 0,
    };

    pub(super) fn pack(self) -> u64 {
        self.phase as u64
            | u64::from(self.window) << 2
            | u64::from(self.times.min(MAX_TIMES)) << 3
            | u64::from(self.gateway.min(MAX_STREAK)) << 8
            | u64::from(self.server.min(MAX_STREAK)) << 18
            | self.until.min(MAX_UNTIL) << 28
    }

    pub(super) fn unpack(word: u64) -> Self {
        Self {
            phase: match word & 3 {
                0 => Phase::Closed,
                1 => Phase::Ejected,
                _ => Phase::HalfOpen,
            },
            window: word & 4 != 0,
            times: (word >> 3) as u32 & MAX_TIMES,
            gateway: (word >> 8) as u32 & MAX_STREAK,
            server: (word >> 18) as u32 & MAX_STREAK,
            until: word >> 28,
        }
    }

    /// Closed, and quiet for one or more intervals: as many ejections are forgiven.
    pub(super) fn forgiven(mut self, policy: &OutlierDetection, now: u64) -> Self {
        if self.times > 0 && now >= self.until {
            let interval = quiet(policy);
            let passed = 1 + (now - self.until) / interval;
            self.times = self
                .times
                .saturating_sub(u32::try_from(passed).unwrap_or(u32::MAX));
            self.until = if self.times > 0 {
                self.until + passed * interval
            } else {
                0
            };
        }
        self
    }

    /// Closed, and a try succeeded.
    pub(super) fn succeeded(mut self, policy: &OutlierDetection, now: u64) -> Self {
        self.gateway = 0;
        self.server = 0;
        self.forgiven(policy, now)
    }

    /// Closed, and a try failed. Whether that is enough says [`Self::is_outlier`].
    pub(super) fn failed(mut self, fault: Fault, policy: &OutlierDetection, now: u64) -> Self {
        self.server = (self.server + 1).min(MAX_STREAK);
        self.gateway = match fault {
            Fault::Gateway => (self.gateway + 1).min(MAX_STREAK),
            Fault::Server => 0,
        };
        self.forgiven(policy, now)
    }

    /// Has one of the streaks become too long?
    pub(super) fn is_outlier(self, policy: &OutlierDetection) -> bool {
        let reached =
            |streak: u32, threshold: u32| threshold > 0 && streak >= threshold.min(MAX_STREAK);
        reached(self.gateway, policy.consecutive_gateway_errors)
            || reached(self.server, policy.consecutive_5xx)
    }

    /// Out, for the base time as often as it has been ejected, at most the maximum. `jitter` is a
    /// factor near 1.
    pub(super) fn ejected(self, policy: &OutlierDetection, now: u64, jitter: f64) -> Self {
        let times = (self.times + 1).min(MAX_TIMES);
        let base = policy.base_ejection;
        let max = duration_millis(policy.max_ejection.max(base));
        let time = duration_millis(base.saturating_mul(times)).min(max);
        let time = ((time as f64 * jitter) as u64).clamp(1, max.max(1));
        Self {
            phase: Phase::Ejected,
            times,
            until: now.saturating_add(time),
            ..Self::NORMAL
        }
    }

    /// A probe may go: the ejection is over, or the last probe has been given up.
    pub(super) fn probe_due(self, now: u64) -> bool {
        self.phase != Phase::Closed && now >= self.until
    }

    /// A probe goes.
    pub(super) fn probing(self, policy: &OutlierDetection, now: u64) -> Self {
        let patience = duration_millis(policy.base_ejection).max(MIN_PROBE);
        Self {
            phase: Phase::HalfOpen,
            until: now.saturating_add(patience),
            ..self
        }
    }

    /// The probe came to nothing (the client went away): the next try may be one.
    pub(super) fn probe_released(self, now: u64) -> Self {
        Self {
            phase: Phase::Ejected,
            until: now,
            ..self
        }
    }

    /// The probe succeeded. The ejections are remembered for a while.
    pub(super) fn returned(self, policy: &OutlierDetection, now: u64) -> Self {
        Self {
            times: self.times,
            until: now.saturating_add(quiet(policy)),
            ..Self::NORMAL
        }
    }
}

/// Good behaviour of this length, in milliseconds, takes one ejection off the count.
fn quiet(policy: &OutlierDetection) -> u64 {
    let interval = if policy.interval.is_zero() {
        policy.base_ejection
    } else {
        policy.interval
    };
    duration_millis(interval.max(Duration::from_millis(1)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(super) fn policy() -> OutlierDetection {
        OutlierDetection {
            consecutive_gateway_errors: 3,
            consecutive_5xx: 5,
            success_rate_threshold: 0,
            success_rate_min_requests: 0,
            interval: Duration::from_secs(10),
            base_ejection: Duration::from_secs(30),
            max_ejection: Duration::from_secs(100),
            max_ejection_percent: 100,
        }
    }

    #[test]
    fn streaks_are_of_their_own_kind() {
        let p = policy();
        let mut c = Circuit::NORMAL;
        for fault in [Fault::Gateway, Fault::Gateway, Fault::Server] {
            c = c.failed(fault, &p, 0);
            assert!(!c.is_outlier(&p));
        }
        // The 500 ended the streak of gateway errors, not that of 5xx.
        c = c.failed(Fault::Gateway, &p, 0);
        assert_eq!((c.gateway, c.server), (1, 4));
        assert!(c.failed(Fault::Server, &p, 0).is_outlier(&p));
        assert!(
            !c.succeeded(&p, 0)
                .failed(Fault::Server, &p, 0)
                .is_outlier(&p)
        );
    }

    #[test]
    fn each_ejection_is_longer_up_to_the_maximum_and_forgiven_one_by_one() {
        let p = policy();
        let mut c = Circuit::NORMAL;
        for seconds in [30, 60, 90, 100, 100] {
            c = c.ejected(&p, 1_000, 1.0);
            assert_eq!(c.until, 1_000 + seconds * 1_000);
        }
        let back = c.probing(&p, c.until).returned(&p, 200_000);
        assert_eq!((back.phase, back.times), (Phase::Closed, 5));
        assert_eq!(back.succeeded(&p, 209_999).times, 5);
        assert_eq!(back.succeeded(&p, 210_000).times, 4);
        assert_eq!(back.succeeded(&p, 225_000).times, 3);
        assert_eq!(back.succeeded(&p, 900_000), Circuit::NORMAL);
    }

    proptest! {
        #[test]
        fn packs_without_loss(phase in 0u64..3, window: bool, times in 0..=MAX_TIMES,
                gateway in 0..=MAX_STREAK, server in 0..=MAX_STREAK, until in 0..=MAX_UNTIL) {
            let phase = [Phase::Closed, Phase::Ejected, Phase::HalfOpen][phase as usize];
            let c = Circuit { phase, window, times, gateway, server, until };
            prop_assert_eq!(Circuit::unpack(c.pack()), c);
        }

        #[test]
        fn an_ejection_lies_within_base_and_maximum(times in 0..=MAX_TIMES, jitter in 0.9f64..1.1, now in 0u64..1_000_000) {
            let p = policy();
            let c = Circuit { times, ..Circuit::NORMAL }.ejected(&p, now, jitter);
            prop_assert!(c.until - now >= 27_000 && c.until - now <= 100_000);
            prop_assert!(!c.probe_due(c.until - 1) && c.probe_due(c.until));
        }
    }
}
