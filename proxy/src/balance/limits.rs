//! Concurrency limits of a backend: connections, requests in flight, requests that wait.
//!
//! A limit of 0 costs nothing. Otherwise a request costs one atomic exchange when it begins and
//! one when it ends; only those that wait in the queue ever meet a lock.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use tokio::sync::Notify;

use super::LimitReached;

/// Counters of a backend's concurrency limits, shared by the workers.
#[derive(Debug, Default)]
pub struct SharedLimits {
    /// As last set by a policy, 0 for none: who waits must see a limit that is raised.
    max_requests: AtomicU32,
    connections: AtomicU32,
    /// In flight, those that a grant is reserved for included.
    requests: AtomicU32,
    /// In the queue; every one of them is registered with `turn`.
    pending: AtomicU32,
    /// Places in flight that were given back while somebody waited: they are handed on, so that
    /// newcomers do not overtake the queue.
    grants: AtomicU32,
    turn: Notify,
    rejected_connections: AtomicU64,
    rejected_requests: AtomicU64,
    rejected_pending: AtomicU64,
}

/// A reading of [`SharedLimits`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LimitsInUse {
    pub connections: u32,
    pub requests: u32,
    pub pending: u32,
    /// Refused so far, by the limit that refused.
    pub rejected_connections: u64,
    pub rejected_requests: u64,
    pub rejected_pending: u64,
}

/// Held while a request is in flight (limit `max_requests`).
#[derive(Debug)]
#[must_use]
pub struct RequestPermit {
    /// `None`: not limited, not counted.
    limits: Option<Arc<SharedLimits>>,
}

/// Held while a connection is open (limit `max_connections`).
#[derive(Debug)]
#[must_use]
pub struct ConnectionPermit {
    limits: Option<Arc<SharedLimits>>,
}

impl SharedLimits {
    /// What is in use now. Requests and connections are counted only under a limit.
    pub fn in_use(&self) -> LimitsInUse {
        LimitsInUse {
            connections: self.connections.load(SeqCst),
            requests: self.requests.load(SeqCst),
            pending: self.pending.load(SeqCst),
            rejected_connections: self.rejected_connections.load(SeqCst),
            rejected_requests: self.rejected_requests.load(SeqCst),
            rejected_pending: self.rejected_pending.load(SeqCst),
        }
    }

    /// A policy's limit takes effect, for those who wait too.
    pub(super) fn set_max_requests(&self, max: u32) {
        if self.max_requests.load(SeqCst) != max && self.max_requests.swap(max, SeqCst) != max {
            self.turn.notify_waiters();
        }
    }

    pub(super) async fn request(
        self: &Arc<Self>,
        max: u32,
        max_pending: u32,
    ) -> Result<RequestPermit, LimitReached> {
        if max == 0 {
            return Ok(RequestPermit { limits: None });
        }
        if !take(&self.requests, max) {
            self.wait(max_pending).await?;
        }
        Ok(RequestPermit {
            limits: Some(self.clone()),
        })
    }

    pub(super) fn connection(self: &Arc<Self>, max: u32) -> Result<ConnectionPermit, LimitReached> {
        if max == 0 {
            return Ok(ConnectionPermit { limits: None });
        }
        if !take(&self.connections, max) {
            self.rejected_connections.fetch_add(1, SeqCst);
            return Err(LimitReached::Connections);
        }
        Ok(ConnectionPermit {
            limits: Some(self.clone()),
        })
    }

    /// Waits in the queue for a place in flight.
    async fn wait(&self, max_pending: u32) -> Result<(), LimitReached> {
        let mut notified = pin!(self.turn.notified());
        // Registered before counted: who gives a place back and sees us counted can wake us.
        let mut woken = notified.as_mut().enable();
        if !take(&self.pending, max_pending) {
            let (counter, reached) = if max_pending == 0 {
                (&self.rejected_requests, LimitReached::Requests)
            } else {
                (&self.rejected_pending, LimitReached::PendingRequests)
            };
            counter.fetch_add(1, SeqCst);
            return Err(reached);
        }
        let queued = Queued { limits: self };
        // What was given back before we were counted was not reserved for us.
        let mut placed = self.take_request();
        while !placed {
            if !woken {
                notified.as_mut().await;
            }
            placed = self.take_grant() || self.take_request();
            if !placed {
                // A raised limit woke everybody, or a newcomer was quicker.
                notified.set(self.turn.notified());
                woken = notified.as_mut().enable();
                placed = self.take_request();
            }
        }
        drop(queued);
        // Wake-ups that came while nobody was registered fold into one: pass it on.
        if self.grants.load(SeqCst) > 0 && self.pending.load(SeqCst) > 0 {
            self.turn.notify_one();
        }
        Ok(())
    }

    fn take_request(&self) -> bool {
        match self.max_requests.load(SeqCst) {
            // The limit is gone.
            0 => {
                self.requests.fetch_add(1, SeqCst);
                true
            }
            max => take(&self.requests, max),
        }
    }

    fn take_grant(&self) -> bool {
        self.grants
            .fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1))
            .is_ok()
    }

    /// A request has ended: its place goes to the first in the queue, or back.
    fn release(&self) {
        let max = self.max_requests.load(SeqCst);
        // Above a limit that was lowered, places are not handed on.
        let within = max == 0 || self.requests.load(SeqCst) <= max;
        if within && self.pending.load(SeqCst) > 0 {
            self.grants.fetch_add(1, SeqCst);
            self.turn.notify_one();
            if self.pending.load(SeqCst) == 0 {
                self.reclaim();
            }
        } else {
            self.requests.fetch_sub(1, SeqCst);
            // Somebody may have joined the queue since.
            if self.pending.load(SeqCst) > 0 {
                self.turn.notify_one();
            }
        }
    }

    /// Nobody waits any more: places kept for the queue are free.
    fn reclaim(&self) {
        let grants = self.grants.swap(0, SeqCst);
        self.requests.fetch_sub(grants, SeqCst);
    }
}

/// Adds one if that stays within `max`.
fn take(counter: &AtomicU32, max: u32) -> bool {
    counter
        .fetch_update(SeqCst, SeqCst, |n| (n < max).then_some(n + 1))
        .is_ok()
}

/// A place in the queue, given up also when the request goes away.
struct Queued<'a> {
    limits: &'a SharedLimits,
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        if self.limits.pending.fetch_sub(1, SeqCst) == 1 {
            self.limits.reclaim();
        }
    }
}

impl Drop for RequestPermit {
    fn drop(&mut self) {
        if let Some(limits) = &self.limits {
            limits.release();
        }
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        if let Some(limits) = &self.limits {
            limits.connections.fetch_sub(1, SeqCst);
        }
    }
}
