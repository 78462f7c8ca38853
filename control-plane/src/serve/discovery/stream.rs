//! One proxy's stream: what it asked for, what is to be sent, what it acknowledged.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use tokio::sync::Notify;
use tonic::Status;
use weft_api::identity::SpiffeId;
use weft_api::proto::{DiscoveryResponse, Hello};

use super::Key;
use crate::compile::{Compiled, audience};
use crate::model::Name;
use crate::serve::ca::Signer;

/// A response is closed when it has this much, bytes: it is encoded as a whole, for each stream, and
/// what all of them need at once is what the process grows to.
const RESPONSE_BYTES: usize = 64 << 10;

/// Who opened a stream.
#[derive(Clone, Debug)]
pub(super) struct Proxy {
    pub(super) workload: Name,
    pub(super) identity: SpiffeId,
    pub(super) address: SocketAddr,
    pub(super) connected: SystemTime,
    pub(super) hello: Hello,
    /// Who signed the certificate it uses, and when that one ends, seconds since the Unix epoch.
    pub(super) signer: Signer,
    pub(super) certificate_expires: u64,
}

#[derive(Debug)]
pub(super) struct Stream {
    pub(super) proxy: Proxy,
    /// The node that its workload is on; empty when not known.
    pub(super) node: String,
    /// What the proxy asked for itself.
    pub(super) explicit: BTreeSet<Key>,
    /// Endpoints it is sent because destinations it asked for lead there, with those destinations.
    pub(super) implied: BTreeMap<Key, Vec<Key>>,
    queue: BTreeMap<Key, Queued>,
    /// What it has, or has been sent last.
    pub(super) sent: BTreeMap<Key, Sent>,
    pub(super) wake: Arc<Notify>,
    end: Option<Status>,
}

#[derive(Debug)]
struct Queued {
    compiled: Arc<Compiled>,
    /// When the change was seen; none for what was only asked for.
    seen: Option<Instant>,
}

/// A version on its way to, or held by, a proxy.
#[derive(Clone, Debug, Default)]
pub(super) struct Sent {
    pub(super) version: u64,
    pub(super) acknowledged: u64,
    /// The version refused last, and why.
    pub(super) refused: Option<Box<(u64, String)>>,
    seen: Option<Instant>,
}

impl Stream {
    pub(super) fn new(proxy: Proxy, node: String) -> Self {
        Self {
            proxy,
            node,
            explicit: BTreeSet::new(),
            implied: BTreeMap::new(),
            queue: BTreeMap::new(),
            sent: BTreeMap::new(),
            wake: Arc::new(Notify::new()),
            end: None,
        }
    }

    /// What a resource may depend on of this proxy.
    pub(super) fn audience(&self, key: &Key) -> &str {
        let kind = key.kind();
        audience(kind, &self.proxy.workload.namespace, &self.node)
    }

    /// Whether it is sent this resource.
    pub(super) fn wants(&self, key: &Key) -> bool {
        self.explicit.contains(key) || self.implied.contains_key(key)
    }

    /// Queues a resource unless the proxy has this very version. What waited before under the same
    /// key is replaced.
    pub(super) fn offer(&mut self, key: &Key, compiled: &Arc<Compiled>, seen: Option<Instant>) {
        let has = self.sent.get(key).map(|sent| sent.version);
        if has == Some(compiled.version()) {
            // It went back to what the proxy has before anything was sent.
            self.queue.remove(key);
            return;
        }
        // The age of a change is that of the oldest one that waits.
        let seen = match self.queue.get(key) {
            Some(waiting) => waiting.seen.or(seen),
            None => seen,
        };
        self.queue.insert(
            key.clone(),
            Queued {
                compiled: compiled.clone(),
                seen,
            },
        );
        self.wake.notify_one();
    }

    /// The proxy says which version it has; 0 is none, whatever was sent before.
    pub(super) fn holds(&mut self, key: &Key, version: u64) {
        if version == 0 {
            self.sent.remove(key);
            return;
        }
        let sent = self.sent.entry(key.clone()).or_default();
        sent.version = version;
        sent.acknowledged = version;
    }

    /// Forgets a resource.
    pub(super) fn forget(&mut self, key: &Key) {
        self.queue.remove(key);
        self.sent.remove(key);
    }

    /// Takes what is to be sent next, with when each change was seen; none when nothing is.
    pub(super) fn take(&mut self) -> Option<(DiscoveryResponse, Vec<Option<Instant>>)> {
        let mut resources = Vec::new();
        let mut seen = Vec::new();
        let mut len = 0;
        while let Some(next) = self.queue.first_entry() {
            if !resources.is_empty() && len + next.get().compiled.len > RESPONSE_BYTES {
                break;
            }
            let (key, queued) = next.remove_entry();
            len += queued.compiled.len;
            let sent = self.sent.entry(key).or_default();
            sent.version = queued.compiled.version();
            sent.seen = queued.seen;
            seen.push(queued.seen);
            resources.push(queued.compiled.resource.clone());
        }
        (!resources.is_empty()).then_some((DiscoveryResponse { resources }, seen))
    }

    /// The proxy has taken a version. Returns when the change was seen, for the newest one sent.
    pub(super) fn acknowledge(&mut self, key: &Key, version: u64) -> Option<Instant> {
        let sent = self.sent.get_mut(key)?;
        sent.acknowledged = version;
        sent.refused = None;
        (sent.version == version).then(|| sent.seen.take())?
    }

    /// The proxy has refused a version.
    pub(super) fn refuse(&mut self, key: &Key, version: u64, reason: String) {
        if let Some(sent) = self.sent.get_mut(key) {
            sent.refused = Some(Box::new((version, reason)));
        }
    }

    /// Ends the stream with this status, after what is being sent.
    pub(super) fn end(&mut self, status: Status) {
        self.end.get_or_insert(status);
        self.wake.notify_one();
    }

    /// Why the stream is to end.
    pub(super) fn ended(&self) -> Option<Status> {
        self.end.clone()
    }

    /// Resources that wait to be sent.
    pub(super) fn waiting(&self) -> usize {
        self.queue.len()
    }
}
