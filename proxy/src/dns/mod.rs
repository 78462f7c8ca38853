//! Names outside the mesh: what they resolve to, kept for as long as DNS says (TTL).
//!
//! A [`Name`] is asked for when a connection first needs it, and from then on before its answer
//! runs out, by a task on the control thread ([`follow`]); workers read the last answer. While DNS
//! cannot be asked the last answer stays ("serve stale", RFC 8767); a name that DNS says is not
//! there (any more) has no addresses.
//!
//! A [`Feed`] writes the addresses of names into the endpoints of a backend, so that they are
//! balanced and ejected as any others.

mod feed;
mod lookup;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout_at};

pub use feed::{Feed, InvalidFeed, is_local, parts};
pub use lookup::{Failure, Found, Lookup, SystemDns};

/// Answers are kept at least this long, whatever their TTL says: a TTL of 0 is asked for once a
/// second, not with every connection.
const MIN_TTL: Duration = Duration::from_secs(1);
/// And at most this long.
const MAX_TTL: Duration = Duration::from_secs(3600);
/// How long it is believed that there is no such name.
const MAX_NEGATIVE_TTL: Duration = Duration::from_secs(60);
/// Wait after a first failure, doubled up to the last.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(30);
/// An application may go on using an address that it was told before, for so long.
const RECENT: Duration = Duration::from_secs(600);
/// Of such addresses of a name, at most so many are remembered.
const MAX_RECENT: usize = 256;
/// Addresses of a name that are taken.
const MAX_ADDRESSES: usize = 256;
/// A name is not asked for again within this, however many connections want to know.
const FRESH: Duration = Duration::from_secs(1);

/// Every name that somebody holds.
pub struct Dns {
    lookup: Arc<dyn Lookup>,
    /// Where names are followed.
    runtime: tokio::runtime::Handle,
    names: Mutex<HashMap<Box<str>, Weak<Name>>>,
}

/// One name, followed while it is held and has been wanted once.
#[derive(Debug)]
pub struct Name {
    /// In lower case, without a dot at its end.
    pub host: Box<str>,
    answer: ArcSwap<Answer>,
    wanted: AtomicBool,
    /// Ask now.
    wake: Arc<Notify>,
    /// DNS has answered, or has failed to.
    changed: Notify,
    feeds: Mutex<Vec<Weak<Feed>>>,
}

/// What is known of a name.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// What it has, or had when DNS could last be asked.
    pub addresses: Vec<IpAddr>,
    /// What else it has had, and until when that is believed.
    recent: Vec<(IpAddr, Instant)>,
    /// When DNS last answered or failed to; `None`: never asked.
    pub asked: Option<Instant>,
    /// Why there are no addresses, or only old ones.
    pub problem: Option<String>,
    /// DNS could not be asked.
    pub failing: bool,
}

impl Answer {
    fn holds(&self, address: IpAddr, now: Instant) -> bool {
        let recent = || {
            let mut recent = self.recent.iter();
            recent.any(|(known, until)| *known == address && *until > now)
        };
        self.addresses.contains(&address) || recent()
    }

    fn is_since(&self, time: Instant) -> bool {
        self.asked.is_some_and(|asked| asked >= time)
    }
}

impl Dns {
    /// Names are followed on the runtime this is called in.
    pub fn new(lookup: Arc<dyn Lookup>) -> Arc<Self> {
        Arc::new(Self {
            lookup,
            runtime: tokio::runtime::Handle::current(),
            names: Mutex::default(),
        })
    }

    /// Whether this is one of the servers that are asked.
    pub fn is_server(&self, address: SocketAddr) -> bool {
        self.lookup.is_server(address)
    }

    /// A name; it is not asked for before somebody wants it.
    pub fn name(&self, host: &str) -> Arc<Name> {
        let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(name) = names.get(host.as_str()).and_then(Weak::upgrade) {
            return name;
        }
        names.retain(|_, name| name.strong_count() > 0);
        let name = Arc::new(Name {
            host: host.into(),
            answer: ArcSwap::default(),
            wanted: AtomicBool::new(false),
            wake: Arc::default(),
            changed: Notify::new(),
            feeds: Mutex::default(),
        });
        names.insert(name.host.clone(), Arc::downgrade(&name));
        self.runtime.spawn(follow(
            self.lookup.clone(),
            Arc::downgrade(&name),
            name.wake.clone(),
        ));
        name
    }
}

impl std::fmt::Debug for Dns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dns").finish_non_exhaustive()
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        // Its task ends.
        self.wake.notify_one();
    }
}

impl Name {
    /// What is known now.
    pub fn answer(&self) -> Arc<Answer> {
        self.answer.load_full()
    }

    /// Somebody needs it: from now on it is asked for.
    pub fn want(&self) {
        if !self.wanted.swap(true, Ordering::AcqRel) {
            self.wake.notify_one();
        }
    }

    /// Once DNS has answered or failed to, or at `deadline`.
    pub async fn asked(&self, deadline: Instant) -> Arc<Answer> {
        self.want();
        self.wait(deadline, |answer| answer.asked.is_some()).await
    }

    /// Whether an address is among those of the name, now or a while ago. One that is not known is
    /// asked for anew: names of many addresses tell others each time.
    pub async fn has(&self, address: IpAddr, deadline: Instant) -> bool {
        let address = address.to_canonical();
        let now = Instant::now();
        let known = self.answer.load();
        if known.holds(address, now) {
            self.want();
            return true;
        }
        let answer = if known.asked.is_some_and(|asked| asked + FRESH > now) {
            Arc::clone(&known)
        } else {
            self.wanted.store(true, Ordering::Release);
            self.wake.notify_one();
            self.wait(deadline, |answer| answer.is_since(now)).await
        };
        answer.holds(address, now)
    }

    async fn wait(&self, deadline: Instant, enough: impl Fn(&Answer) -> bool) -> Arc<Answer> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // From here on no change is missed.
            changed.as_mut().enable();
            let answer = self.answer.load_full();
            if enough(&answer) || timeout_at(deadline, changed).await.is_err() {
                return self.answer.load_full();
            }
        }
    }

    fn fed(&self, feed: &Arc<Feed>) {
        let mut feeds = self.feeds.lock().unwrap_or_else(PoisonError::into_inner);
        feeds.retain(|feed| feed.strong_count() > 0);
        feeds.push(Arc::downgrade(feed));
    }

    /// A new answer: kept, and passed on to endpoints.
    fn set(&self, answer: Answer) {
        let same = self.answer.load().addresses == answer.addresses;
        self.answer.store(Arc::new(answer));
        if !same {
            let feeds = self.feeds.lock().unwrap_or_else(PoisonError::into_inner);
            for feed in feeds.iter().filter_map(Weak::upgrade) {
                feed.fill();
            }
        }
        self.changed.notify_waiters();
    }
}

/// Keeps asking for a name, for as long as somebody holds it.
async fn follow(lookup: Arc<dyn Lookup>, name: Weak<Name>, wake: Arc<Notify>) {
    let mut retry = FIRST_RETRY;
    let mut logged = false;
    loop {
        let (host, wanted) = match name.upgrade() {
            Some(name) => (name.host.clone(), name.wanted.load(Ordering::Acquire)),
            None => return,
        };
        if !wanted {
            wake.notified().await;
            continue;
        }
        let result = lookup.lookup(&host).await;
        let Some(name) = name.upgrade() else { return };
        let now = Instant::now();
        let before = name.answer.load_full();
        let next;
        let mut answer = Answer {
            asked: Some(now),
            ..Answer::default()
        };
        match result {
            Ok(Found { mut addresses, ttl }) => {
                addresses.sort_unstable();
                addresses.dedup();
                addresses.truncate(MAX_ADDRESSES);
                next = ttl.clamp(MIN_TTL, MAX_TTL);
                if before.addresses != addresses {
                    tracing::debug!(%host, ?addresses, ttl = next.as_secs(), "resolved");
                }
                answer.addresses = addresses;
            }
            Err(Failure::NoSuchName { ttl }) => {
                next = ttl.clamp(FIRST_RETRY, MAX_NEGATIVE_TTL);
                answer.problem = Some(format!("DNS has no address for {host}"));
            }
            Err(Failure::Failed(reason)) => {
                next = retry;
                answer.addresses.clone_from(&before.addresses);
                answer.problem = Some(format!("DNS cannot be asked for {host}: {reason}"));
                answer.failing = true;
            }
        }
        retry = match answer.failing {
            true => (retry * 2).min(LAST_RETRY),
            false => FIRST_RETRY,
        };
        match &answer.problem {
            Some(problem) if !logged => {
                tracing::warn!(
                    "{problem}; {}",
                    match answer.addresses.is_empty() {
                        true => "connections to it fail",
                        false => "its last addresses stay in use",
                    }
                );
            }
            None if logged => tracing::info!(%host, "DNS answers again"),
            _ => {}
        }
        logged = answer.problem.is_some();
        answer.recent = recent(&before, &answer, now);
        name.set(answer);
        pause(Arc::downgrade(&name), name, next, &wake).await;
    }
}

/// Until it is time to ask again, or somebody wants to know now. Who wanted to know before the
/// answer of a moment ago has had it.
async fn pause(weak: Weak<Name>, name: Arc<Name>, time: Duration, wake: &Notify) {
    drop(name);
    let began = Instant::now();
    let until = sleep(time);
    tokio::pin!(until);
    loop {
        tokio::select! {
            () = &mut until => return,
            () = wake.notified() => {
                if began.elapsed() >= FRESH || weak.strong_count() == 0 {
                    return;
                }
            }
        }
    }
}

/// Addresses that were the name's a while ago and are not now.
fn recent(before: &Answer, now: &Answer, time: Instant) -> Vec<(IpAddr, Instant)> {
    let left = before.addresses.iter().map(|gone| (*gone, time + RECENT));
    let older = before.recent.iter().copied();
    let mut recent: Vec<(IpAddr, Instant)> = Vec::new();
    for (address, until) in left.chain(older) {
        let known = recent.iter().any(|(known, _)| *known == address);
        if until > time && !known && !now.addresses.contains(&address) {
            recent.push((address, until));
        }
    }
    recent.truncate(MAX_RECENT);
    recent
}

/// One of each in turn, the first of the family of `first`'s opposite.
pub(crate) fn alternate(first: SocketAddr, others: &[SocketAddr]) -> Vec<SocketAddr> {
    let (same, other): (Vec<_>, Vec<_>) = others
        .iter()
        .copied()
        .filter(|address| *address != first)
        .partition(|address| address.is_ipv4() == first.is_ipv4());
    let (mut same, mut other) = (same.into_iter(), other.into_iter());
    let mut all = vec![first];
    loop {
        let (a, b) = (other.next(), same.next());
        if a.is_none() && b.is_none() {
            return all;
        }
        all.extend(a);
        all.extend(b);
    }
}
