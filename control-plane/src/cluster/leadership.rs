//! Whether this replica is the leader.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::Instant;

/// Says whether this replica may write. Cheap to clone; ask before every write, not once.
///
/// Leadership is a promise with an end, renewed long before it: [`Leadership::is_leader`] looks at
/// the clock, so a process that was stopped for a minute does not write on when it goes on.
#[derive(Clone, Debug)]
pub struct Leadership {
    /// When the promise ends; none while somebody else is the leader.
    until: watch::Receiver<Option<Instant>>,
    leading: watch::Receiver<bool>,
    /// Keeps the channels of one that always leads open.
    _always: Option<Arc<Sender>>,
}

/// The election's end of it.
#[derive(Debug)]
pub(super) struct Sender {
    until: watch::Sender<Option<Instant>>,
    leading: watch::Sender<bool>,
}

impl Leadership {
    /// For a control plane that is alone: the folder source.
    pub fn always() -> Self {
        let (sender, mut leadership) = Self::channel();
        // Far, but no overflow: thirty years.
        sender.hold(Instant::now() + std::time::Duration::from_secs(946_728_000));
        leadership._always = Some(Arc::new(sender));
        leadership
    }

    pub(super) fn channel() -> (Sender, Self) {
        let (until, held) = watch::channel(None);
        let (leading, leads) = watch::channel(false);
        let leadership = Self {
            until: held,
            leading: leads,
            _always: None,
        };
        (Sender { until, leading }, leadership)
    }

    /// Whether this replica is the leader at this moment.
    pub fn is_leader(&self) -> bool {
        self.until
            .borrow()
            .is_some_and(|until| Instant::now() < until)
    }

    /// Becomes true when this replica becomes the leader, false when it no longer is.
    pub fn watch(&self) -> watch::Receiver<bool> {
        self.leading.clone()
    }

    /// Returns when this replica is the leader.
    pub async fn acquired(&self) {
        // The sender is gone when the process ends: nobody leads any more.
        if self.watch().wait_for(|leads| *leads).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Returns when this replica is not, or no longer, the leader.
    pub async fn lost(&self) {
        let _ = self.watch().wait_for(|leads| !*leads).await;
    }
}

impl Sender {
    /// The promise holds until then.
    pub(super) fn hold(&self, until: Instant) {
        self.until.send_replace(Some(until));
        self.leading
            .send_if_modified(|leads| !std::mem::replace(leads, true));
    }

    /// Somebody else may be the leader.
    pub(super) fn let_go(&self) {
        self.until.send_replace(None);
        self.leading
            .send_if_modified(|leads| std::mem::replace(leads, false));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_promise_ends_by_itself() {
        let (sender, leadership) = Leadership::channel();
        assert!(!leadership.is_leader());
        let mut watch = leadership.watch();
        sender.hold(Instant::now() + Duration::from_secs(10));
        assert!(leadership.is_leader());
        assert!(*watch.borrow_and_update());
        tokio::time::advance(Duration::from_secs(9)).await;
        sender.hold(Instant::now() + Duration::from_secs(10));
        assert!(!watch.has_changed().unwrap(), "renewals are no news");
        tokio::time::advance(Duration::from_secs(10)).await;
        assert!(!leadership.is_leader(), "nobody has said so, the clock has");
        sender.let_go();
        assert!(!*watch.borrow_and_update());
    }

    #[tokio::test(start_paused = true)]
    async fn alone_is_always_the_leader() {
        let leadership = Leadership::always();
        let clone = leadership.clone();
        drop(leadership);
        tokio::time::advance(Duration::from_secs(86_400 * 365)).await;
        assert!(clone.is_leader());
        clone.acquired().await;
    }
}
