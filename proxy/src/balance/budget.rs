//! Retry budgets: retries are a share of live traffic, so that they cannot multiply an overload.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// Requests and retries of the last ten seconds count, as in Finagle, unless a policy says another
/// interval; it is counted in this many slots.
const SLOTS: usize = 10;
const INTERVAL: Duration = Duration::from_secs(10);

/// Share of live traffic that may be retries, plus a floor; one per worker and route, or backend.
///
/// The floor holds for each budget: with several workers, the process has as many floors.
/// Over the last 10 s there are never more retries than `percent` of the requests begun plus 10
/// times `min_per_second`.
#[derive(Debug)]
pub struct RetryBudget {
    percent: u64,
    floor: u64,
    /// Length of a slot.
    slot: Duration,
    /// Requests and retries of each slot.
    slots: [Cell<(u32, u32)>; SLOTS],
    /// Sums over `slots`.
    requests: Cell<u64>,
    retries: Cell<u64>,
    current: Cell<usize>,
    /// When the current slot began; `None` before the first use.
    began: Cell<Option<Instant>>,
}

impl RetryBudget {
    /// `percent` 0-100 of live requests plus `min_per_second`.
    pub fn new(percent: u32, min_per_second: u32) -> Self {
        let floor = u64::from(min_per_second) * INTERVAL.as_secs();
        Self::within(INTERVAL, percent, floor)
    }

    /// `percent` 0-100 of the requests of the last `interval`, plus `floor` in each.
    pub fn within(interval: Duration, percent: u32, floor: u64) -> Self {
        Self {
            percent: u64::from(percent),
            floor,
            slot: (interval / SLOTS as u32).max(Duration::from_millis(1)),
            slots: Default::default(),
            requests: Cell::new(0),
            retries: Cell::new(0),
            current: Cell::new(0),
            began: Cell::new(None),
        }
    }

    /// A request (not a retry) has begun.
    pub fn deposit(&self, now: Instant) {
        let slot = self.slot(now);
        let (requests, retries) = slot.get();
        slot.set((requests + 1, retries));
        self.requests.set(self.requests.get() + 1);
    }

    /// Takes a retry out of the budget; false when it is spent.
    pub fn withdraw(&self, now: Instant) -> bool {
        let slot = self.slot(now);
        if self.retries.get() >= self.allowed() {
            return false;
        }
        let (requests, retries) = slot.get();
        slot.set((requests, retries + 1));
        self.retries.set(self.retries.get() + 1);
        true
    }

    /// Retries that could be taken at `now`.
    pub fn balance(&self, now: Instant) -> u64 {
        self.slot(now);
        self.allowed().saturating_sub(self.retries.get())
    }

    fn allowed(&self) -> u64 {
        (self.requests.get() * self.percent / 100).saturating_add(self.floor)
    }

    /// The slot of `now`, after what is older than the interval has been forgotten.
    fn slot(&self, now: Instant) -> &Cell<(u32, u32)> {
        let began = self.began.get().unwrap_or(now);
        let since = now.saturating_duration_since(began);
        let passed = u32::try_from(since.as_nanos() / self.slot.as_nanos()).unwrap_or(u32::MAX);
        for _ in 0..passed.min(SLOTS as u32) {
            let next = (self.current.get() + 1) % SLOTS;
            let (requests, retries) = self.slots[next].take();
            self.requests.set(self.requests.get() - u64::from(requests));
            self.retries.set(self.retries.get() - u64::from(retries));
            self.current.set(next);
        }
        if passed > 0 || self.began.get().is_none() {
            self.began
                .set(Some(began + self.slot.saturating_mul(passed)));
        }
        &self.slots[self.current.get()]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_share_of_the_requests_and_a_floor() {
        let t = Instant::now();
        let budget = RetryBudget::new(20, 1);
        for _ in 0..100 {
            budget.deposit(t);
        }
        let taken = (0..1000).filter(|_| budget.withdraw(t)).count();
        assert_eq!(taken, 20 + 10);
        assert_eq!(budget.balance(t), 0);
        // Ten seconds later, the requests and the retries are forgotten; the floor is there again.
        let later = t + Duration::from_secs(10);
        assert_eq!((0..100).filter(|_| budget.withdraw(later)).count(), 10);
    }

    #[test]
    fn an_interval_of_its_own() {
        let t = Instant::now();
        let budget = RetryBudget::within(Duration::from_secs(60), 10, 3);
        for _ in 0..100 {
            budget.deposit(t);
        }
        let later = t + Duration::from_secs(59);
        assert_eq!((0..100).filter(|_| budget.withdraw(later)).count(), 13);
        // The requests are forgotten, these retries are not yet.
        assert_eq!(budget.balance(t + Duration::from_secs(61)), 0);
        assert_eq!(budget.balance(t + Duration::from_secs(120)), 3);
    }

    #[test]
    fn nothing_allowed_is_nothing() {
        let t = Instant::now();
        let budget = RetryBudget::new(0, 0);
        budget.deposit(t);
        assert!(!budget.withdraw(t));
    }

    proptest! {
        /// Against a list of everything that happened: what is allowed is exactly the share of
        /// the requests in the last ten (whole) seconds plus the floor.
        #[test]
        fn never_more_than_the_share(
            percent in 0u32..100,
            floor in 0u32..3,
            steps in prop::collection::vec((0u64..3_000, any::<bool>(), 1u32..20), 1..80),
        ) {
            let t = Instant::now();
            let budget = RetryBudget::new(percent, floor);
            let mut at = 0u64;
            let mut first = None;
            let (mut requests, mut retries): (Vec<u64>, Vec<u64>) = Default::default();
            for (pause, retry, times) in steps {
                at += pause;
                let zero = *first.get_or_insert(at);
                let now = t + Duration::from_millis(at);
                let second = (at - zero) / 1000;
                for _ in 0..times {
                    let live = |list: &[u64]| list.iter().filter(|s| second - **s < 10).count() as u64;
                    if retry {
                        let allowed = live(&requests) * u64::from(percent) / 100 + u64::from(floor) * 10;
                        let granted = budget.withdraw(now);
                        prop_assert_eq!(granted, live(&retries) < allowed);
                        if granted {
                            retries.push(second);
                        }
                    } else {
                        budget.deposit(now);
                        requests.push(second);
                    }
                }
            }
        }
    }
}
