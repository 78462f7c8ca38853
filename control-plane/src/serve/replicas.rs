//! What the replicas tell each other and operators: each keeps a Lease of its own, with a record of
//! the roots it knows and of the proxies connected to it. Every replica knows only its own proxies,
//! so a rotation asks all of them.
//!
//! A replica whose record has not been renewed for [`GONE`] counts as gone, and its proxies as
//! connected to another one. The leader then removes the record.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tracing::{debug, warn};
use weft_api::names::{MANAGED_BY, RECORD_ANNOTATION, REPLICA_LABEL};

use super::ca;
use crate::cluster::{Cluster, ClusterError, answer};

/// A record is renewed after this long when nothing in it changes.
pub const RENEW: Duration = Duration::from_secs(10);
/// A replica that has not renewed its record for this long is gone.
pub const GONE: Duration = Duration::from_secs(60);

/// What a replica knows. The annotation `weft.dev/replica-record` of its Lease, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    pub replica: String,
    /// Of the software.
    pub version: String,
    /// The certificate authority as this replica has it.
    pub authority: ca::Status,
    pub proxies: Proxies,
    /// End of the replica's own certificate, seconds since the Unix epoch.
    pub certificate_expires: u64,
}

/// The proxies connected to a replica.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Proxies {
    pub connected: u64,
    /// Workloads that are known to have a proxy and are connected.
    pub workloads: u64,
    /// Of the proxies, those that have acknowledged the roots of the record.
    pub trusting: u64,
    /// Of the proxies, those whose certificate hangs on a root, by its id; "" for one that is not (any
    /// more) known.
    pub by_root: BTreeMap<String, u64>,
}

impl Record {
    /// Whether all proxies here trust the roots that `authority` has.
    fn trusts(&self, authority: &ca::Status) -> bool {
        let ids = |status: &ca::Status| -> Vec<String> {
            status.roots.iter().map(|root| root.id.clone()).collect()
        };
        ids(&self.authority) == ids(authority) && self.proxies.trusting == self.proxies.connected
    }

    /// Whether certificates signed here are signed by the root that `authority` signs with.
    fn signs_with(&self, authority: &ca::Status) -> bool {
        let signing = |status: &ca::Status| -> Option<String> {
            let root = status.roots.iter().find(|root| root.signing)?;
            Some(root.id.clone())
        };
        signing(&self.authority) == signing(authority)
    }
}

/// The other replicas, as the leader has seen them.
#[derive(Debug, Default)]
pub struct Seen {
    /// By the Lease's name: the version seen last, since when, and what it said.
    replicas: HashMap<String, (String, Instant, Option<Record>)>,
}

impl Seen {
    /// Takes note of a list of (Lease, version, record); returns the Leases of those who are gone.
    fn note(&mut self, listed: Vec<(String, String, Option<Record>)>, now: Instant) -> Vec<String> {
        let mut before = std::mem::take(&mut self.replicas);
        let mut gone = Vec::new();
        for (name, version, record) in listed {
            let since = match before.remove(&name) {
                Some((seen, since, _)) if seen == version => since,
                _ => now,
            };
            if now.duration_since(since) >= GONE {
                gone.push(name.clone());
            }
            self.replicas.insert(name, (version, since, record));
        }
        gone
    }

    fn living(&self, now: Instant) -> impl Iterator<Item = Option<&Record>> {
        self.replicas
            .values()
            .filter(move |(_, since, _)| now.duration_since(*since) < GONE)
            .map(|(_, _, record)| record.as_ref())
    }

    /// Whether every proxy of every replica trusts these roots. A record that cannot be read (of a
    /// newer version) does not say so.
    pub fn all_trust(&self, authority: &ca::Status, now: Instant) -> bool {
        self.living(now)
            .all(|record| record.is_some_and(|record| record.trusts(authority)))
    }

    /// How many workloads are connected, to any replica, with a certificate of the newest of these
    /// roots; none when one has another certificate, a replica does not sign with that root yet, or
    /// what one says cannot be read.
    pub fn moved(&self, authority: &ca::Status, now: Instant) -> Option<u64> {
        let newest = authority.roots.last()?;
        let mut moved = 0;
        for record in self.living(now) {
            let record = record.filter(|record| record.signs_with(authority))?;
            let proxies = &record.proxies;
            if proxies.by_root.keys().any(|root| *root != newest.id) {
                return None;
            }
            moved += proxies.workloads;
        }
        Some(moved)
    }
}

/// The Leases of the replicas.
pub struct Replicas {
    cluster: Cluster,
    leases: Api<Lease>,
    written: Option<(Record, Instant)>,
}

impl Replicas {
    pub fn new(cluster: Cluster) -> Self {
        Self {
            leases: cluster.own(),
            cluster,
            written: None,
        }
    }

    fn name(&self) -> String {
        format!("weft-replica-{}", self.cluster.replica)
    }

    /// Writes the record of this replica, when it has changed or is due.
    pub async fn write(&mut self, record: Record) {
        let due = match &self.written {
            Some((written, at)) => *written != record || at.elapsed() >= RENEW,
            None => true,
        };
        if !due {
            return;
        }
        match self.put(&record).await {
            Ok(()) => self.written = Some((record, Instant::now())),
            Err(error) => {
                // Once a second would be too much to say.
                let said = self.written.is_none();
                self.written = None;
                if !said {
                    warn!("the record of this replica: {error}");
                }
            }
        }
    }

    async fn put(&self, record: &Record) -> Result<(), ClusterError> {
        let name = self.name();
        let mut metadata = self.cluster.meta(&name);
        metadata
            .labels
            .get_or_insert_default()
            .insert(REPLICA_LABEL.to_owned(), "true".to_owned());
        let text = serde_json::to_string(record).unwrap_or_default();
        metadata.annotations = Some([(RECORD_ANNOTATION.to_owned(), text)].into());
        let lease = Lease {
            metadata,
            spec: Some(LeaseSpec {
                holder_identity: Some(self.cluster.replica.clone()),
                lease_duration_seconds: i32::try_from(GONE.as_secs()).ok(),
                renew_time: Some(MicroTime(Timestamp::now())),
                ..LeaseSpec::default()
            }),
        };
        // Makes it when it is not there.
        let parameters = PatchParams::apply(MANAGED_BY).force();
        let patch = Patch::Apply(&lease);
        let patched = self.leases.patch(&name, &parameters, &patch);
        answer(format!("write the Lease {name}"), patched)
            .await
            .map(drop)
    }

    /// Reads what all say, and removes the records of those who are gone; for the leader.
    ///
    /// # Errors
    /// The apiserver does not say.
    pub async fn look(&self, seen: &mut Seen) -> Result<(), ClusterError> {
        let parameters = ListParams::default().labels(&format!("{REPLICA_LABEL}=true"));
        let listed = self.leases.list(&parameters);
        let listed = answer("list the Leases of the replicas".to_owned(), listed).await?;
        let listed = listed
            .items
            .into_iter()
            .map(|lease| {
                let annotations = lease.metadata.annotations.unwrap_or_default();
                let record = annotations
                    .get(RECORD_ANNOTATION)
                    .and_then(|text| serde_json::from_str(text).ok());
                (
                    lease.metadata.name.unwrap_or_default(),
                    lease.metadata.resource_version.unwrap_or_default(),
                    record,
                )
            })
            .collect();
        for name in seen.note(listed, Instant::now()) {
            debug!(lease = name, "a replica is gone: its record is removed");
            if let Err(error) = self.remove(&name).await {
                debug!("{error}");
            }
        }
        Ok(())
    }

    /// Removes the record of this replica, which is ending.
    pub async fn leave(&self) {
        if let Err(error) = self.remove(&self.name()).await {
            debug!("{error}; it ends by itself");
        }
    }

    async fn remove(&self, name: &str) -> Result<(), ClusterError> {
        let parameters = DeleteParams::default();
        let deleted = self.leases.delete(name, &parameters);
        match answer(format!("remove the Lease {name}"), deleted).await {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(roots: &[&str], signing: &str) -> ca::Status {
        ca::Status {
            trust_domain: "cluster.local".to_owned(),
            phase: "announcing".to_owned(),
            old_leaves_expire: None,
            roots: roots
                .iter()
                .map(|id| ca::RootStatus {
                    id: (*id).to_owned(),
                    fingerprint: String::new(),
                    not_after: 0,
                    signing: *id == signing,
                })
                .collect(),
        }
    }

    fn record(roots: &[&str], connected: u64, trusting: u64) -> Record {
        Record {
            replica: String::new(),
            version: String::new(),
            authority: status(roots, roots[0]),
            proxies: Proxies {
                connected,
                workloads: connected,
                trusting,
                by_root: BTreeMap::new(),
            },
            certificate_expires: 0,
        }
    }

    #[test]
    fn all_trust_when_every_living_replica_says_so() {
        let now = Instant::now();
        let both = status(&["old", "new"], "old");
        let good = || Some(record(&["old", "new"], 3, 3));
        // (what the second of two replicas says, whether all trust)
        for (second, expected) in [
            (good(), true),
            (Some(record(&["old", "new"], 0, 0)), true),
            (Some(record(&["old", "new"], 3, 2)), false),
            // It has not heard of the new root yet.
            (Some(record(&["old"], 3, 3)), false),
            (None, false),
        ] {
            let mut seen = Seen::default();
            let second = ("b".to_owned(), "1".to_owned(), second);
            seen.note(
                vec![("a".to_owned(), "1".to_owned(), good()), second.clone()],
                now,
            );
            assert_eq!(seen.all_trust(&both, now), expected, "{second:?}");
        }
        assert!(Seen::default().all_trust(&both, now));
    }

    #[test]
    fn those_who_have_moved_are_counted_when_all_have() {
        let now = Instant::now();
        let after = status(&["old", "new"], "new");
        let with = |authority: &ca::Status, by_root: &[(&str, u64)]| {
            let connected = by_root.iter().map(|(_, number)| number).sum();
            let mut record = record(&["old", "new"], connected, connected);
            record.authority = authority.clone();
            record.proxies.by_root = by_root
                .iter()
                .map(|(id, number)| ((*id).to_owned(), *number))
                .collect();
            Some(record)
        };
        for (second, moved) in [
            (with(&after, &[("new", 2)]), Some(5)),
            (with(&after, &[]), Some(3)),
            (with(&after, &[("new", 2), ("old", 1)]), None),
            // Of a root that is not known.
            (with(&after, &[("", 1)]), None),
            // It signs with the old one still.
            (with(&status(&["old", "new"], "old"), &[]), None),
            (None, None),
        ] {
            let mut seen = Seen::default();
            let of = |name: &str, record| (name.to_owned(), "1".to_owned(), record);
            let first = with(&after, &[("new", 3)]);
            seen.note(vec![of("a", first), of("b", second)], now);
            assert_eq!(seen.moved(&after, now), moved);
        }
    }

    #[test]
    fn who_is_silent_for_a_minute_is_gone() {
        let start = Instant::now();
        let both = status(&["old", "new"], "old");
        let behind = |version: &str| {
            vec![(
                "a".to_owned(),
                version.to_owned(),
                Some(record(&["old"], 1, 1)),
            )]
        };
        let mut seen = Seen::default();
        assert!(seen.note(behind("1"), start).is_empty());
        let later = start + GONE - Duration::from_secs(1);
        assert!(seen.note(behind("1"), later).is_empty());
        assert!(!seen.all_trust(&both, later));
        // It speaks again.
        assert!(seen.note(behind("2"), later).is_empty());
        assert!(!seen.all_trust(&both, start + GONE));
        assert_eq!(seen.note(behind("2"), later + GONE), ["a"]);
        assert!(seen.all_trust(&both, later + GONE));
        assert!(seen.note(vec![], later + GONE).is_empty());
        assert!(seen.replicas.is_empty());
    }
}
