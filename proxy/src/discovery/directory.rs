//! What the workers read: destinations by original address, and the proxy's own workload.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use serde::Serialize;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use super::outside::Outside;
use super::status::Status;
use crate::dns::Dns;
use crate::http::session::SessionKey;
use crate::identity::Handle;
use crate::tables::{Known, Workload};

/// Parts of the index, each copied on its own when a destination is added.
const SHARDS: usize = 32;
/// Destinations known at once; what comes on top passes through unasked. An application that scans
/// addresses does not fill the proxy's memory or the control plane's.
const MAX_DESTINATIONS: u64 = 65_536;
/// How long a new destination waits while the control plane is known to be away.
const WAIT_WHILE_DOWN: Duration = Duration::from_millis(20);

/// Everything known of the mesh, shared by the workers. Reading takes no lock.
#[derive(Debug)]
pub struct Directory {
    shards: Box<[Shard]>,
    hasher: RandomState,
    count: AtomicU64,
    link: Arc<Link>,
    workload: ArcSwap<Workload>,
    outside: ArcSwap<Outside>,
    has_workload: AtomicBool,
    session_key: ArcSwapOption<SessionKey>,
    identity: Handle,
    dns: OnceLock<Arc<Dns>>,
    commands: mpsc::UnboundedSender<Command>,
}

#[derive(Debug, Default)]
struct Shard {
    index: ArcSwap<HashMap<SocketAddr, Arc<DestinationCell>>>,
    /// Held while the index is replaced; never by a lookup that finds its key.
    writing: Mutex<()>,
}

/// What workers ask of the control thread.
#[derive(Debug)]
pub(super) enum Command {
    Want(SocketAddr),
    Status(oneshot::Sender<Status>),
}

/// How the stream to the control plane is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkState {
    /// Not tried yet, or lost a moment ago: an answer may well come in time.
    Connecting,
    Connected,
    /// The last try failed.
    Down,
}

/// State that cells and the control thread share.
#[derive(Debug)]
struct Link {
    state: AtomicU8,
    started: Instant,
    /// Coarse clock: milliseconds since `started`, moved by the control thread.
    now: AtomicU64,
}

impl Link {
    fn state(&self) -> LinkState {
        match self.state.load(Ordering::Acquire) {
            0 => LinkState::Connecting,
            1 => LinkState::Connected,
            _ => LinkState::Down,
        }
    }
}

/// One original destination. Who holds it keeps it subscribed and sees every update.
#[derive(Debug)]
pub struct DestinationCell {
    pub address: SocketAddr,
    /// One atomic load per request.
    pub current: ArcSwap<Known>,
    changed: Notify,
    link: Arc<Link>,
    /// By the coarse clock.
    last_used: AtomicU64,
}

impl DestinationCell {
    fn new(address: SocketAddr, known: Known, link: Arc<Link>) -> Self {
        Self {
            address,
            current: ArcSwap::from_pointee(known),
            changed: Notify::new(),
            last_used: AtomicU64::new(link.now.load(Ordering::Relaxed)),
            link,
        }
    }

    /// What is known now.
    pub fn known(&self) -> Known {
        Known::clone(&self.current.load())
    }

    /// What is known once the control plane has answered; `Pending` when it has not by `deadline`:
    /// then the connection passes through. While the control plane is known to be away the wait is
    /// a short one.
    pub async fn resolved(&self, deadline: impl Into<Instant>) -> Known {
        let mut deadline = deadline.into();
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // From here on no change is missed.
            changed.as_mut().enable();
            let known = self.known();
            if !matches!(known, Known::Pending) {
                return known;
            }
            if self.link.state() == LinkState::Down {
                deadline = deadline.min(Instant::now() + WAIT_WHILE_DOWN);
            }
            if timeout_at(deadline, changed).await.is_err() {
                return self.known();
            }
        }
    }

    /// A new value; those who wait for one see it. No use of the destination.
    pub(super) fn set(&self, known: Known) {
        self.current.store(Arc::new(known));
        self.changed.notify_waiters();
    }

    fn touch(&self) {
        let now = self.link.now.load(Ordering::Relaxed);
        // Written only when it changes: the line stays shared between the workers.
        if self.last_used.load(Ordering::Relaxed) != now {
            self.last_used.store(now, Ordering::Relaxed);
        }
    }
}

/// What a proxy needs before it takes traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Readiness {
    /// There is a certificate and it has not expired.
    pub certificate: bool,
    /// Our own certificate hangs on a root that is trusted now.
    pub trust: bool,
    /// The control plane has said what our workload is.
    pub workload: bool,
}

impl Readiness {
    pub fn all(self) -> bool {
        self.certificate && self.trust && self.workload
    }
}

impl Directory {
    pub(super) fn new(identity: Handle) -> (Arc<Self>, mpsc::UnboundedReceiver<Command>) {
        let (commands, receiver) = mpsc::unbounded_channel();
        let directory = Self {
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            hasher: RandomState::new(),
            count: AtomicU64::new(0),
            link: Arc::new(Link {
                state: AtomicU8::new(0),
                started: Instant::now(),
                now: AtomicU64::new(0),
            }),
            workload: ArcSwap::default(),
            outside: ArcSwap::default(),
            has_workload: AtomicBool::new(false),
            session_key: ArcSwapOption::empty(),
            identity,
            dns: OnceLock::new(),
            commands,
        };
        (Arc::new(directory), receiver)
    }

    /// Gives it the names outside the mesh, before anything else is done with it.
    pub(super) fn set_dns(&self, dns: Arc<Dns>) {
        // There is nothing to do for a second time.
        let _ = self.dns.set(dns);
    }

    /// A directory nobody feeds but [`Directory::put`] and [`Directory::set_workload`]: for tests
    /// and tools. What is not put in counts as a control plane that is away.
    pub fn detached(identity: Handle) -> Arc<Self> {
        let (directory, _) = Self::new(identity);
        directory.set_link(LinkState::Down);
        directory
    }

    /// The key of session tokens; none while the control plane has told none.
    pub fn session_key(&self) -> Option<Arc<SessionKey>> {
        self.session_key.load_full()
    }

    /// Takes the key of session tokens, 32 bytes; others are no key.
    pub fn set_session_key(&self, bytes: &[u8]) {
        let key = SessionKey::new(bytes).map(Arc::new);
        self.session_key.store(key);
    }

    fn shard(&self, address: &SocketAddr) -> &Shard {
        // The upper bits: the maps inside use the lower ones of their own hash.
        let hash = self.hasher.hash_one(address);
        &self.shards[(hash >> 59) as usize % SHARDS]
    }

    /// The cell of an original destination. The first time it is `Pending` and the control plane
    /// is asked; wait with [`DestinationCell::resolved`].
    pub fn lookup(&self, address: SocketAddr) -> Arc<DestinationCell> {
        let address = canonical(address);
        match self.find(&address) {
            Some(cell) => cell,
            None => self.insert(address, true),
        }
    }

    fn find(&self, address: &SocketAddr) -> Option<Arc<DestinationCell>> {
        let index = self.shard(address).index.load();
        let cell = index.get(address)?;
        cell.touch();
        Some(cell.clone())
    }

    fn insert(&self, address: SocketAddr, ask: bool) -> Arc<DestinationCell> {
        let shard = self.shard(&address);
        let _writing = shard.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let index = shard.index.load_full();
        if let Some(cell) = index.get(&address) {
            cell.touch();
            return cell.clone();
        }
        if self.count.load(Ordering::Relaxed) >= MAX_DESTINATIONS {
            return Arc::new(DestinationCell::new(
                address,
                Known::Absent,
                self.link.clone(),
            ));
        }
        let cell = Arc::new(DestinationCell::new(
            address,
            Known::Pending,
            self.link.clone(),
        ));
        let mut next = HashMap::clone(&index);
        next.insert(address, cell.clone());
        shard.index.store(Arc::new(next));
        self.count.fetch_add(1, Ordering::Relaxed);
        if ask {
            // The receiver is gone only when the proxy ends.
            let _ = self.commands.send(Command::Want(address));
        }
        cell
    }

    /// Says what a destination is.
    pub fn put(&self, address: SocketAddr, known: Known) {
        self.insert(canonical(address), false).set(known);
    }

    /// A cell that is there, without counting as a use. For the thread that forgets: on another one
    /// a cell may be missing for a moment.
    pub(super) fn cell(&self, address: &SocketAddr) -> Option<Arc<DestinationCell>> {
        self.shard(address).index.load().get(address).cloned()
    }

    /// All destinations known, for `/config` and metrics.
    pub fn destinations(&self) -> Vec<Arc<DestinationCell>> {
        self.shards
            .iter()
            .flat_map(|shard| shard.index.load().values().cloned().collect::<Vec<_>>())
            .collect()
    }

    /// How many destinations are known.
    pub fn destination_count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Forgets destinations that nobody holds and nobody asked for within `idle`; they are
    /// returned, to be unsubscribed.
    pub(super) fn forget_idle(&self, idle: Duration) -> Vec<SocketAddr> {
        let now = self.link.now.load(Ordering::Relaxed);
        let idle = u64::try_from(idle.as_millis()).unwrap_or(u64::MAX);
        let mut gone = Vec::new();
        for shard in &self.shards {
            let _writing = shard.writing.lock().unwrap_or_else(PoisonError::into_inner);
            let index = shard.index.load_full();
            let is_idle = |cell: &Arc<DestinationCell>| {
                Arc::strong_count(cell) == 1
                    && now.saturating_sub(cell.last_used.load(Ordering::Relaxed)) > idle
            };
            if !index.values().any(is_idle) {
                continue;
            }
            let kept: HashMap<_, _> = index
                .iter()
                .filter(|(_, cell)| !is_idle(cell))
                .map(|(address, cell)| (*address, cell.clone()))
                .collect();
            drop(index);
            let kept = Arc::new(kept);
            let old = shard.index.swap(kept.clone());
            // A worker may be reading the old index this moment and take a cell out of it. If so,
            // put everything back and look again later.
            let old = match Arc::try_unwrap(old) {
                Ok(old) => old,
                Err(old) => {
                    shard.index.store(old);
                    continue;
                }
            };
            let mut back = Vec::new();
            let before = gone.len();
            for (address, cell) in old {
                if kept.contains_key(&address) {
                    continue;
                }
                if Arc::strong_count(&cell) == 1 {
                    gone.push(address);
                } else {
                    back.push((address, cell));
                }
            }
            if !back.is_empty() {
                let mut again = HashMap::clone(&kept);
                again.extend(back);
                shard.index.store(Arc::new(again));
            }
            let forgotten = (gone.len() - before) as u64;
            self.count.fetch_sub(forgotten, Ordering::Relaxed);
        }
        gone
    }

    /// Moves the coarse clock.
    pub(super) fn tick(&self) {
        let now = u64::try_from(self.link.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.link.now.store(now, Ordering::Relaxed);
    }

    pub(super) fn set_link(&self, state: LinkState) {
        let value = match state {
            LinkState::Connecting => 0,
            LinkState::Connected => 1,
            LinkState::Down => 2,
        };
        if self.link.state.swap(value, Ordering::AcqRel) != value && state == LinkState::Down {
            // Those who wait for an answer need not wait to their deadline.
            for cell in self.destinations() {
                if matches!(**cell.current.load(), Known::Pending) {
                    cell.changed.notify_waiters();
                }
            }
        }
    }

    /// How the stream to the control plane is.
    pub fn link(&self) -> LinkState {
        self.link.state()
    }

    /// The proxy's own workload; the defaults (PERMISSIVE, no declared ports) before the control
    /// plane has told.
    pub fn workload(&self) -> Arc<Workload> {
        self.workload.load_full()
    }

    /// What this workload may call outside the mesh: anything, by address only, before the control
    /// plane has told.
    pub fn outside(&self) -> Arc<Outside> {
        self.outside.load_full()
    }

    pub(super) fn set_outside(&self, outside: Outside) {
        self.outside.store(Arc::new(outside));
    }

    /// A destination that is not found by its address.
    pub(super) fn apart(&self, port: u16, known: Known) -> Arc<DestinationCell> {
        let address = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
        Arc::new(DestinationCell::new(address, known, self.link.clone()))
    }

    /// The proxy's own workload, unless it is the one that is known: that costs one atomic load.
    pub fn workload_unless(&self, known: Option<&Arc<Workload>>) -> Option<Arc<Workload>> {
        let now = self.workload.load();
        let same = known.is_some_and(|known| Arc::ptr_eq(known, &now));
        (!same).then(|| Arc::clone(&now))
    }

    pub fn set_workload(&self, workload: Workload) {
        self.workload.store(Arc::new(workload));
        self.has_workload.store(true, Ordering::Release);
    }

    /// Names outside the mesh; `None` when this directory is for tests and tools.
    pub fn dns(&self) -> Option<&Arc<Dns>> {
        self.dns.get()
    }

    /// Where the certificate and the roots are found.
    pub fn identity(&self) -> &Handle {
        &self.identity
    }

    /// What is in place and what is not.
    pub fn ready(&self) -> Readiness {
        let credentials = self.identity.load();
        let credentials = credentials.as_ref();
        Readiness {
            certificate: credentials.is_some_and(|c| !c.remaining().is_zero()),
            trust: credentials.is_some_and(|c| c.is_trusted()),
            workload: self.has_workload.load(Ordering::Acquire),
        }
    }

    /// What the proxy holds and in which version, for `/config`. `None` when discovery has ended.
    pub async fn status(&self) -> Option<Status> {
        let (answer, status) = oneshot::channel();
        self.commands.send(Command::Status(answer)).ok()?;
        status.await.ok()
    }
}

/// An IPv4 address has one spelling, also when a dual-stack socket tells it as IPv6.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
