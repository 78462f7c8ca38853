//! Outlier ejection of one endpoint, shared by the workers through atomics.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::circuit::{Circuit, Fault, Phase};
use super::clock;
use crate::tables::OutlierDetection;

/// Changes whenever any endpoint is ejected, probed, returned or backs off: workers that see a
/// new number look at their endpoints again. One number for all, since changes are rare and it is
/// read for every request: it stays in every core's cache.
static CHANGES: AtomicU64 = AtomicU64::new(0);

/// What a server's `Retry-After` can ask for at most. Longer absences are the control plane's to
/// declare.
const MAX_BACK_OFF: Duration = Duration::from_secs(60);

/// A longer back-off is made known to the workers when it is longer by this, so that an endpoint
/// which refuses every request does not make them look again for each. Milliseconds; `Retry-After`
/// has whole seconds.
const BACK_OFF_STEP: u64 = 1_000;

pub(super) fn changes() -> u64 {
    CHANGES.load(Ordering::Acquire)
}

fn changed() {
    CHANGES.fetch_add(1, Ordering::Release);
}

/// Outlier state of one endpoint address, shared by the workers. Touched only on failures and
/// when the state is not the normal one.
#[derive(Debug, Default)]
pub struct EndpointHealth {
    /// A packed [`Circuit`].
    circuit: AtomicU64,
    /// End of the success-rate window, and what it has counted: requests above, failures below.
    window_end: AtomicU64,
    window: AtomicU64,
    avoid_until: AtomicU64,
    /// Active checks say that it is unwell.
    unwell: AtomicBool,
    ejections: AtomicU64,
    returns: AtomicU64,
}

/// An endpoint's circuit, for people and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HealthState {
    Closed,
    Ejected {
        /// From then on a probe may go.
        until: Instant,
        /// Ejections so far, less those forgiven.
        times: u32,
    },
    /// A probe is on its way.
    HalfOpen,
}

/// How many of a backend's endpoints are out, and may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    pub(super) ejected: usize,
    pub(super) allowed: usize,
}

/// What a judgement on an endpoint needs to know.
pub(super) struct Judge<'a> {
    pub(super) policy: &'a OutlierDetection,
    /// Milliseconds of [`super::clock`].
    pub(super) now: u64,
    /// A factor near 1 for the time of an ejection.
    pub(super) jitter: f64,
    /// Counts this endpoint too.
    pub(super) room: &'a dyn Fn() -> Room,
}

impl EndpointHealth {
    pub fn state(&self) -> HealthState {
        let circuit = self.circuit();
        match circuit.phase {
            Phase::Closed => HealthState::Closed,
            Phase::Ejected => HealthState::Ejected {
                until: clock::instant(circuit.until),
                times: circuit.times,
            },
            Phase::HalfOpen => HealthState::HalfOpen,
        }
    }

    /// Times that the endpoint was ejected, failed probes included.
    pub fn ejections(&self) -> u64 {
        self.ejections.load(Ordering::Relaxed)
    }

    /// Times that the endpoint returned after an ejection.
    pub fn returns(&self) -> u64 {
        self.returns.load(Ordering::Relaxed)
    }

    /// What active checks say of it; well when there are none.
    pub fn set_well(&self, well: bool) {
        if self.unwell.swap(!well, Ordering::Relaxed) == well {
            changed();
        }
    }

    /// Whether active checks say that it is well.
    pub fn is_well(&self) -> bool {
        !self.unwell.load(Ordering::Relaxed)
    }

    /// Out, or with only a probe let through.
    pub(super) fn is_out(&self) -> bool {
        self.circuit().phase != Phase::Closed
    }

    /// When a probe may go, if the endpoint is out.
    pub(super) fn probe_at(&self) -> Option<u64> {
        let circuit = self.circuit();
        (circuit.phase != Phase::Closed).then_some(circuit.until)
    }

    /// Nothing is wrong and nothing is counted: a success needs no more than this one load.
    pub(super) fn is_normal(&self) -> bool {
        self.circuit.load(Ordering::Relaxed) == 0
    }

    /// Avoided until then, at the endpoint's own wish.
    pub(super) fn avoid_until(&self) -> u64 {
        self.avoid_until.load(Ordering::Relaxed)
    }

    pub(super) fn back_off(&self, how_long: Duration, now: u64) {
        let until = now + clock::duration_millis(how_long.min(MAX_BACK_OFF));
        let before = self.avoid_until.fetch_max(until, Ordering::Relaxed);
        if until >= before.max(now) + BACK_OFF_STEP || before <= now {
            changed();
        }
    }

    /// Takes the one probe that may go now, from whichever worker comes first.
    pub(super) fn try_probe(&self, policy: &OutlierDetection, now: u64) -> bool {
        let taken = self.transition(|c| c.probe_due(now).then(|| c.probing(policy, now)));
        if taken.is_some() {
            changed();
        }
        taken.is_some()
    }

    /// The probe came to nothing.
    pub(super) fn release_probe(&self, now: u64) {
        let half_open = |c: Circuit| c.phase == Phase::HalfOpen;
        let released = self.transition(|c| half_open(c).then(|| c.probe_released(now)));
        if released.is_some() {
            changed();
        }
    }

    /// A try succeeded; `probe` if it was one.
    pub(super) fn succeeded(&self, probe: bool, judge: &Judge<'_>) {
        if probe {
            let half_open = |c: Circuit| c.phase == Phase::HalfOpen;
            let back = |c: Circuit| c.returned(judge.policy, judge.now);
            if self.transition(|c| half_open(c).then(|| back(c))).is_some() {
                self.returns.fetch_add(1, Ordering::Relaxed);
                changed();
            }
            return;
        }
        self.count(1 << 32, judge);
        self.transition(|c| {
            let next = c.succeeded(judge.policy, judge.now);
            (c.phase == Phase::Closed && next != c).then_some(next)
        });
    }

    /// A try failed; `probe` if it was one.
    pub(super) fn failed(&self, probe: bool, fault: Fault, judge: &Judge<'_>) {
        if probe {
            let half_open = |c: Circuit| c.phase == Phase::HalfOpen;
            let out = |c: Circuit| c.ejected(judge.policy, judge.now, judge.jitter);
            // It was out already: the others' share does not change.
            if self.transition(|c| half_open(c).then(|| out(c))).is_some() {
                self.ejections.fetch_add(1, Ordering::Relaxed);
                changed();
            }
            return;
        }
        const ONE: u64 = (1 << 32) + 1;
        if !self.count(ONE, judge) {
            self.open_window(judge);
            self.count(ONE, judge);
        }
        let counted = self.transition(|c| {
            (c.phase == Phase::Closed).then(|| c.failed(fault, judge.policy, judge.now))
        });
        if counted.is_some_and(|c| c.is_outlier(judge.policy)) {
            self.eject(judge);
        }
    }

    /// A first failure opens the success-rate window.
    fn open_window(&self, judge: &Judge<'_>) {
        if judge.policy.success_rate_threshold == 0 || self.circuit().phase != Phase::Closed {
            return;
        }
        // Two workers at once may lose a count here; a rate over a hundred requests survives it.
        let interval = clock::duration_millis(judge.policy.interval).max(1);
        self.window.store(0, Ordering::Relaxed);
        self.window_end
            .store(judge.now + interval, Ordering::Relaxed);
        self.transition(|c| {
            let open = Circuit { window: true, ..c };
            (c.phase == Phase::Closed && !c.window).then_some(open)
        });
    }

    /// Counts a try in the window if one is open; closes one that is over and judges by it.
    fn count(&self, add: u64, judge: &Judge<'_>) -> bool {
        if !self.circuit().window {
            return false;
        }
        let end = self.window_end.load(Ordering::Relaxed);
        if judge.now < end {
            self.window.fetch_add(add, Ordering::Relaxed);
            return true;
        }
        let close = |c: Circuit| Circuit { window: false, ..c };
        let counted = self.window.load(Ordering::Relaxed);
        if self.transition(|c| c.window.then(|| close(c))).is_none() {
            return false; // Another worker has judged.
        }
        // A window that ended long ago, before a quiet time, says nothing of the endpoint now.
        let policy = judge.policy;
        if judge.now - end > clock::duration_millis(policy.interval) {
            return false;
        }
        let (total, failures) = (counted >> 32, counted & u64::from(u32::MAX));
        let successes = total.saturating_sub(failures);
        if total >= u64::from(policy.success_rate_min_requests.max(1))
            && successes * 100 < u64::from(policy.success_rate_threshold) * total
        {
            self.eject(judge);
        }
        false
    }

    /// Ejects the endpoint if its backend can spare it.
    fn eject(&self, judge: &Judge<'_>) {
        let room = (judge.room)();
        if room.ejected >= room.allowed {
            return;
        }
        let mut before = Circuit::NORMAL;
        let Some(out) = self.transition(|c| {
            before = c;
            (c.phase == Phase::Closed).then(|| c.ejected(judge.policy, judge.now, judge.jitter))
        }) else {
            return;
        };
        // Another worker may have ejected another endpoint at the same moment: look again, now
        // that this one counts, and step back if it is one too many.
        let room = (judge.room)();
        if room.ejected > room.allowed {
            let undone = self.circuit.compare_exchange(
                out.pack(),
                before.pack(),
                Ordering::SeqCst,
                Ordering::SeqCst,
            );
            if undone.is_ok() {
                changed();
                return;
            }
        }
        self.ejections.fetch_add(1, Ordering::Relaxed);
        changed();
    }

    fn circuit(&self) -> Circuit {
        Circuit::unpack(self.circuit.load(Ordering::SeqCst))
    }

    /// Moves the circuit to where `next` says; gives the new state, or `None` if `next` did.
    fn transition(&self, mut next: impl FnMut(Circuit) -> Option<Circuit>) -> Option<Circuit> {
        let mut reached = None;
        self.circuit
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |word| {
                reached = next(Circuit::unpack(word));
                reached.map(Circuit::pack)
            })
            .ok()
            .and(reached)
    }
}
