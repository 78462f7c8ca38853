//! Token buckets, shared by the workers without a lock.
//!
//! A bucket is one number: the time at which it will be full again (the generic cell rate
//! algorithm, "virtual scheduling" of ITU-T I.371, whose theoretical arrival time this is). A
//! bucket that is full says nothing, so its place may be another key's: what is kept is bounded
//! without anybody who cleans up.

use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Places for buckets of one limit that are not full: 256 KiB, once the first key has come. A key that
/// finds none shares one bucket with others; until half of the places are taken that is rare.
const PLACES: usize = 1 << 14;
/// Places that a key may have.
const REACH: usize = 16;

/// How fast tokens come, and how many there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Nanoseconds a token takes.
    token: u64,
    /// Nanoseconds that an empty bucket takes until it is full, less one token.
    tolerance: u64,
}

impl Rate {
    /// `requests` tokens every `per`, at most `burst` at once. All are at least one of their
    /// smallest units.
    pub fn new(requests: u64, per: Duration, burst: u64) -> Self {
        let token = per.as_nanos() / u128::from(requests.max(1));
        // Sums of an instant and a tolerance must not overflow.
        let token = u64::try_from(token).unwrap_or(u64::MAX).clamp(1, 1 << 60);
        Self {
            token,
            tolerance: token.saturating_mul(burst.max(1) - 1).min(1 << 61),
        }
    }
}

/// The buckets of one limit.
#[derive(Debug)]
pub struct Buckets {
    epoch: Instant,
    hasher: RandomState,
    /// Where there are no keys, and of those that have found no place.
    shared: AtomicU64,
    places: OnceLock<Box<[Place]>>,
}

/// The bucket of one key.
#[derive(Debug, Default)]
struct Place {
    /// Hash of the key; 0 is nobody's.
    key: AtomicU64,
    /// When it is full again, nanoseconds of the epoch.
    full: AtomicU64,
}

impl Default for Buckets {
    fn default() -> Self {
        Self {
            epoch: Instant::now(),
            hasher: RandomState::new(),
            shared: AtomicU64::new(0),
            places: OnceLock::new(),
        }
    }
}

impl Buckets {
    /// Takes a token from the bucket of `key`; `None` is one bucket for all.
    ///
    /// # Errors
    /// It is empty; there is a token again after this time.
    pub fn take(
        &self,
        key: Option<&(impl Hash + ?Sized)>,
        rate: Rate,
        now: Instant,
    ) -> Result<Taken<'_>, Duration> {
        let now = now.saturating_duration_since(self.epoch).as_nanos();
        let now = u64::try_from(now).unwrap_or(u64::MAX >> 1);
        let bucket = match key {
            None => &self.shared,
            Some(key) => self.place(self.hasher.hash_one(key).max(1), now),
        };
        let mut full = bucket.load(Ordering::Relaxed);
        loop {
            let base = full.max(now);
            let ahead = base - now;
            if ahead > rate.tolerance {
                return Err(Duration::from_nanos(ahead - rate.tolerance));
            }
            let taken = bucket.compare_exchange_weak(
                full,
                base + rate.token,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
            match taken {
                Ok(_) => {
                    return Ok(Taken {
                        bucket,
                        token: rate.token,
                    });
                }
                Err(other) => full = other,
            }
        }
    }

    /// The bucket of a key; a place that nobody needs becomes its own.
    fn place(&self, key: u64, now: u64) -> &AtomicU64 {
        let places = self.places.get_or_init(|| {
            let places = std::iter::repeat_with(Place::default).take(PLACES);
            places.collect()
        });
        let first = key as usize % PLACES;
        let reach = || (first..first + REACH).map(|at| &places[at % PLACES]);
        if let Some(own) = reach().find(|place| place.key.load(Ordering::Relaxed) == key) {
            return &own.full;
        }
        for place in reach() {
            let other = place.key.load(Ordering::Relaxed);
            // Another worker may have come first, with the same key or with another.
            if other != key {
                if place.full.load(Ordering::Relaxed) > now {
                    continue;
                }
                let claimed =
                    place
                        .key
                        .compare_exchange(other, key, Ordering::Relaxed, Ordering::Relaxed);
                if claimed.is_err_and(|winner| winner != key) {
                    continue;
                }
            }
            return &place.full;
        }
        &self.shared
    }
}

/// A token that was taken.
#[derive(Debug)]
pub struct Taken<'b> {
    bucket: &'b AtomicU64,
    token: u64,
}

impl Taken<'_> {
    /// Puts it back.
    pub fn give_back(self) {
        self.bucket.fetch_sub(self.token, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn take(buckets: &Buckets, key: Option<&str>, rate: Rate, now: Instant) -> bool {
        buckets.take(key, rate, now).is_ok()
    }

    #[test]
    fn a_burst_and_then_as_many_as_come() {
        let buckets = Buckets::default();
        let rate = Rate::new(10, 1000 * MS, 5);
        let start = Instant::now();
        let taken = (0..8).filter(|_| take(&buckets, None, rate, start));
        assert_eq!(taken.count(), 5);
        let wait = buckets.take(None::<&str>, rate, start).unwrap_err();
        assert!(wait > 99 * MS && wait <= 100 * MS, "{wait:?}");
        // One every tenth of a second, however often it is asked for.
        let mut taken = 0;
        for n in 1..=2000 {
            taken += u32::from(take(&buckets, None, rate, start + n * MS));
        }
        assert_eq!(taken, 20);
        // It fills up to the burst and no further.
        let later = start + 60_000 * MS;
        let taken = (0..8).filter(|_| take(&buckets, None, rate, later));
        assert_eq!(taken.count(), 5);
    }

    #[test]
    fn keys_have_buckets_of_their_own() {
        let buckets = Buckets::default();
        let rate = Rate::new(1, 1000 * MS, 1);
        let now = Instant::now();
        for key in ["a", "b", "c"] {
            assert!(take(&buckets, Some(key), rate, now), "{key}");
        }
        for key in ["a", "b", "c"] {
            assert!(!take(&buckets, Some(key), rate, now), "{key}");
        }
        assert!(take(&buckets, None, rate, now));
    }

    #[test]
    fn what_is_given_back_can_be_taken_again() {
        let buckets = Buckets::default();
        let rate = Rate::new(1, 1000 * MS, 1);
        let now = Instant::now();
        let taken = buckets.take(Some("a"), rate, now).unwrap();
        taken.give_back();
        assert!(take(&buckets, Some("a"), rate, now));
        assert!(!take(&buckets, Some("a"), rate, now));
    }

    #[test]
    fn however_many_keys_there_are_there_is_a_bound() {
        let buckets = Buckets::default();
        let rate = Rate::new(1, 1000 * MS, 1);
        let now = Instant::now();
        let keys = (0..4 * PLACES as u64).filter(|key| buckets.take(Some(key), rate, now).is_ok());
        let taken = keys.count();
        // Those without a place share one bucket, which is empty at once.
        assert!(taken <= PLACES + 1, "{taken}");
        assert!(taken > PLACES * 9 / 10, "{taken}");
        // When the buckets are full again, the places are others'.
        let later = now + 1001 * MS;
        let others = (0..PLACES as u64 / 8).map(|key| key + 1_000_000_000);
        for key in others {
            assert!(buckets.take(Some(&key), rate, later).is_ok(), "{key}");
        }
    }

    #[test]
    fn workers_share_them() {
        let buckets = Buckets::default();
        let rate = Rate::new(1, 3_600_000 * MS, 1000);
        let now = Instant::now();
        let taken = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for n in 0..4000 {
                        let key = ["a", "b"][n % 2];
                        if take(&buckets, Some(key), rate, now) {
                            taken.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!(taken.into_inner(), 2000);
    }

    proptest! {
        #[test]
        fn never_more_than_the_rate_allows(requests in 1u64..1000, per in 1u64..10_000,
                burst in 1u64..100, gaps in prop::collection::vec(0u64..500, 1..200)) {
            let buckets = Buckets::default();
            let rate = Rate::new(requests, Duration::from_millis(per), burst);
            let start = Instant::now();
            let (mut now, mut taken) = (start, 0u128);
            for gap in gaps {
                now += Duration::from_millis(gap);
                taken += u128::from(take(&buckets, None, rate, now));
                let token = (u128::from(per) * 1_000_000 / u128::from(requests)).max(1);
                let allowed = u128::from(burst) + (now - start).as_nanos() / token;
                prop_assert!(taken <= allowed, "{} of {}", taken, allowed);
            }
        }

        #[test]
        fn after_the_time_it_says_there_is_a_token(requests in 1u64..1000, per in 1u64..10_000, burst in 1u64..20) {
            let buckets = Buckets::default();
            let rate = Rate::new(requests, Duration::from_millis(per), burst);
            let now = Instant::now();
            let mut asked = 0;
            let wait = loop {
                match buckets.take(None::<&str>, rate, now) {
                    Ok(_) => asked += 1,
                    Err(wait) => break wait,
                }
            };
            prop_assert_eq!(asked, burst);
            prop_assert!(!take(&buckets, None, rate, now + wait - Duration::from_nanos(1)));
            prop_assert!(take(&buckets, None, rate, now + wait));
        }
    }
}
