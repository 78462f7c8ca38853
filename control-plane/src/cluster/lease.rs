//! The state machine of an election by Lease, without clock and network.
//!
//! ```text
//!              nobody holds it, or its holder has not renewed it for `duration`
//!   Following ----------------------------------------------------------------> Leading
//!       ^                                                                          |
//!       +--------------------------------------------------------------------------+
//!          not renewed for `renew_within`, or somebody else holds it, or released
//! ```
//!
//! As in client-go, no clocks are compared: whether a holder is gone is judged by how long *we*
//! have seen its Lease unchanged. A leader counts from the moment it *sent* its last renewal, so it
//! stops before anybody can take over: `renew_within` < `duration`.

use std::time::Duration;

use tokio::time::Instant;

/// How long things take in an election.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// A Lease not renewed for this long is free.
    pub duration: Duration,
    /// A leader that could not renew for this long leads no more.
    pub renew_within: Duration,
    /// Between two tries, for leaders and others.
    pub retry: Duration,
}

impl Default for Timing {
    /// client-go's.
    fn default() -> Self {
        Self {
            duration: Duration::from_secs(15),
            renew_within: Duration::from_secs(10),
            retry: Duration::from_secs(2),
        }
    }
}

/// A Lease as the apiserver has it; what matters of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Empty when it was released.
    pub holder: String,
    /// Changes with each renewal: the resource version.
    pub version: String,
    /// As its holder wrote it; ours when it wrote none.
    pub duration: Option<Duration>,
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is none: make it.
    Create,
    /// It is ours: renew it.
    Renew,
    /// It is free: take it over.
    Take,
    /// Somebody holds it.
    Wait,
}

/// One who wants to lead.
#[derive(Clone, Debug)]
pub struct Candidate {
    me: String,
    timing: Timing,
    /// The Lease of somebody else, and since when it has not changed.
    seen: Option<(Held, Instant)>,
    /// Until when we lead.
    until: Option<Instant>,
}

impl Candidate {
    pub fn new(me: impl Into<String>, timing: Timing) -> Self {
        Self {
            me: me.into(),
            timing,
            seen: None,
            until: None,
        }
    }

    /// Looks at the Lease as it is now.
    pub fn look(&mut self, lease: Option<&Held>, now: Instant) -> Step {
        let Some(lease) = lease else {
            // Deleted under a leader: whoever makes it again leads.
            self.until = None;
            return Step::Create;
        };
        if lease.holder == self.me {
            return Step::Renew;
        }
        // Somebody else has it: whatever we had is over.
        self.until = None;
        if lease.holder.is_empty() {
            return Step::Take;
        }
        let since = match &self.seen {
            Some((seen, since)) if seen == lease => *since,
            _ => {
                self.seen = Some((lease.clone(), now));
                now
            }
        };
        let duration = lease.duration.unwrap_or(self.timing.duration);
        if now.saturating_duration_since(since) >= duration {
            Step::Take
        } else {
            Step::Wait
        }
    }

    /// A write of ours, sent at `sent`, was accepted.
    pub fn wrote(&mut self, sent: Instant) {
        self.seen = None;
        self.until = Some(sent + self.timing.renew_within);
    }

    /// Until when we lead, if we do.
    pub fn until(&self, now: Instant) -> Option<Instant> {
        self.until.filter(|until| now < *until)
    }

    /// Gives it up; true when there was something to give up.
    pub fn resign(&mut self, now: Instant) -> bool {
        let led = self.until(now).is_some();
        self.until = None;
        led
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn held(holder: &str, version: &str) -> Held {
        Held {
            holder: holder.to_owned(),
            version: version.to_owned(),
            duration: Some(15 * SECOND),
        }
    }

    #[test]
    fn what_is_done_with_a_lease() {
        let now = Instant::now();
        // (the Lease, seen how many seconds before unchanged, what is done)
        let cases = [
            (None, 0, Step::Create),
            (Some(held("", "1")), 0, Step::Take),
            (Some(held("me", "1")), 0, Step::Renew),
            (Some(held("other", "1")), 0, Step::Wait),
            (Some(held("other", "1")), 14, Step::Wait),
            (Some(held("other", "1")), 15, Step::Take),
        ];
        for (lease, ago, expected) in cases {
            let mut candidate = Candidate::new("me", Timing::default());
            candidate.look(lease.as_ref(), now);
            let step = candidate.look(lease.as_ref(), now + ago * SECOND);
            assert_eq!(step, expected, "{lease:?} for {ago} s");
        }
    }

    #[test]
    fn a_renewed_lease_is_not_taken() {
        let mut candidate = Candidate::new("me", Timing::default());
        let now = Instant::now();
        for second in 0..100u32 {
            let lease = held("other", &(second / 10).to_string());
            assert_eq!(
                candidate.look(Some(&lease), now + second * SECOND),
                Step::Wait
            );
        }
    }

    #[test]
    fn a_holder_that_says_another_duration_is_believed() {
        let mut candidate = Candidate::new("me", Timing::default());
        let now = Instant::now();
        let mut lease = held("other", "1");
        lease.duration = Some(SECOND);
        assert_eq!(candidate.look(Some(&lease), now), Step::Wait);
        assert_eq!(candidate.look(Some(&lease), now + SECOND), Step::Take);
    }

    #[test]
    fn a_leader_counts_from_when_it_sent_its_renewal() {
        let mut candidate = Candidate::new("me", Timing::default());
        let now = Instant::now();
        assert_eq!(candidate.until(now), None);
        candidate.wrote(now);
        assert_eq!(candidate.until(now + 9 * SECOND), Some(now + 10 * SECOND));
        assert_eq!(candidate.until(now + 10 * SECOND), None);
    }

    #[test]
    fn a_leader_that_sees_another_holder_leads_no_more() {
        let mut candidate = Candidate::new("me", Timing::default());
        let now = Instant::now();
        candidate.wrote(now);
        assert_eq!(
            candidate.look(Some(&held("other", "2")), now + SECOND),
            Step::Wait
        );
        assert_eq!(candidate.until(now + SECOND), None);
    }

    /// Two candidates and an apiserver that takes writes only on the version they looked at. In
    /// every order of looks, writes, failures and pauses there is at most one leader.
    #[test]
    fn there_are_never_two_leaders() {
        use proptest::prelude::*;
        use proptest::test_runner::{Config, TestRunner};
        let action = (0..2usize, prop::bool::ANY, 0..8u64, 0..4u64);
        let runs = prop::collection::vec(action, 1..200);
        TestRunner::new(Config::with_cases(256))
            .run(&runs, |actions| {
                let start = Instant::now();
                let mut now = start;
                let mut lease: Option<Held> = None;
                let mut version = 0u64;
                let mut candidates = ["a", "b"].map(|me| Candidate::new(me, Timing::default()));
                for (who, reachable, pause, on_the_way) in actions {
                    now += Duration::from_secs(pause);
                    if reachable {
                        let before = lease.clone();
                        let step = candidates[who].look(before.as_ref(), now);
                        let sent = now;
                        now += Duration::from_secs(on_the_way);
                        if step != Step::Wait && before == lease {
                            version += 1;
                            let me = candidates[who].me.clone();
                            lease = Some(held(&me, &version.to_string()));
                            candidates[who].wrote(sent);
                        }
                    }
                    let leaders = candidates.iter().filter(|c| c.until(now).is_some()).count();
                    prop_assert!(leaders <= 1);
                }
                Ok(())
            })
            .unwrap();
    }
}
