//! What keeps certificates going while the control plane runs: root rotations are moved on, proxies
//! and other replicas told of the roots, the control plane's own certificate renewed, and the end of
//! each is warned of long before.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{debug, error, warn};

use super::ca::{self, Authority, CaError, Moving, ROOT_WARNING, unix};
use super::discovery::{Hub, Trusting};
use super::replicas::{Proxies, Record, Replicas, Seen};
use super::tls::{self, Own};
use crate::cluster::{Cluster, Leadership};

/// The leader reads what other replicas say this often while a rotation is under way, and otherwise.
const LOOK_ROTATING: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_secs(30);
/// After a renewal of the own certificate that failed.
const RENEW_AGAIN: Duration = Duration::from_secs(5);
/// What expires is logged again after this long.
const REPEAT_LOG: Duration = Duration::from_secs(3600);
/// Share of a leaf's life below which it should long have been renewed.
const LEAF_WARNING: f64 = 1.0 / 3.0;

/// Life of the control plane's own certificate, seconds since the Unix epoch.
#[derive(Debug, Default)]
pub struct OwnLife {
    not_before: AtomicU64,
    not_after: AtomicU64,
}

impl OwnLife {
    fn set(&self, own: &Own) {
        self.not_before.store(own.not_before, Ordering::Relaxed);
        self.not_after.store(own.not_after, Ordering::Relaxed);
    }

    pub fn not_after(&self) -> u64 {
        self.not_after.load(Ordering::Relaxed)
    }

    /// What will expire soon, as sentences; empty when all is well.
    pub fn warnings(&self, authority: &ca::Status, now: SystemTime) -> Vec<String> {
        let (not_before, not_after) = (self.not_before.load(Ordering::Relaxed), self.not_after());
        warnings(authority, not_before, not_after, unix(now))
    }
}

fn warnings(authority: &ca::Status, not_before: u64, not_after: u64, now: u64) -> Vec<String> {
    let mut warnings = Vec::new();
    for root in &authority.roots {
        let left = root.not_after.saturating_sub(now);
        let short = &root.fingerprint[..root.fingerprint.len().min(16)];
        if left == 0 {
            warnings.push(format!(
                "the root certificate {} ({short}) has expired: nothing it signed is accepted; begin a rotation with `weft identity rotate-root`",
                root.id
            ));
        } else if left < ROOT_WARNING.as_secs() && root.signing {
            warnings.push(format!(
                "the root certificate {} ({short}) expires in {} days; begin a rotation with `weft identity rotate-root`, or renew your own",
                root.id,
                left / 86_400
            ));
        }
    }
    let (life, left) = (
        not_after.saturating_sub(not_before),
        not_after.saturating_sub(now),
    );
    if not_after > 0 && (left as f64) < life as f64 * LEAF_WARNING {
        warnings.push(format!(
            "the control plane's own certificate expires in {left} s and has not been renewed; see the log for why"
        ));
    }
    warnings
}

/// The parts it is made of.
pub struct Keeper {
    pub hub: Arc<Hub>,
    pub authority: Arc<Authority>,
    pub leadership: Leadership,
    pub life: Arc<OwnLife>,
    tls: Arc<ArcSwap<ServerConfig>>,
    renew_at: SystemTime,
    /// What the proxies here have been told.
    told: ca::Status,
    others: Option<(Replicas, Cluster)>,
    seen: Seen,
    looked: Option<Instant>,
    /// Since when every workload with a proxy has a certificate of the newest root.
    moved_since: Option<Instant>,
    warned: Option<(Vec<String>, Instant)>,
}

impl Keeper {
    /// Makes the first certificate and, with replicas, the first record.
    ///
    /// # Errors
    /// Signing fails.
    pub async fn start(
        hub: Arc<Hub>,
        authority: Arc<Authority>,
        leadership: Leadership,
        life: Arc<OwnLife>,
        cluster: Option<Cluster>,
    ) -> Result<Self, tls::TlsError> {
        let own = tls::server_config(&authority, SystemTime::now())?;
        life.set(&own);
        // The status first: were the roots to change in between, the record would name the old ones.
        let told = authority.status();
        hub.set_trust(authority.trust());
        let mut keeper = Self {
            tls: Arc::new(ArcSwap::new(own.config)),
            renew_at: own.renew_at,
            told,
            others: cluster.map(|cluster| (Replicas::new(cluster.clone()), cluster)),
            seen: Seen::default(),
            looked: None,
            moved_since: None,
            warned: None,
            hub,
            authority,
            leadership,
            life,
        };
        keeper.record().await;
        Ok(keeper)
    }

    /// The configuration of the moment.
    pub fn tls(&self) -> Arc<ArcSwap<ServerConfig>> {
        self.tls.clone()
    }

    /// Until it is dropped.
    pub async fn run(mut self) {
        let mut changes = self.authority.changes();
        let mut ticks = interval(Duration::from_secs(1));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let changed = tokio::select! {
                _ = ticks.tick() => false,
                changed = changes.changed() => changed.is_ok(),
            };
            let now = SystemTime::now();
            if changed {
                self.told = self.authority.status();
                self.hub.set_trust(self.authority.trust());
            } else if self.leadership.is_leader() {
                self.rotate(now).await;
            }
            if changed || now >= self.renew_at {
                self.renew(now);
            }
            self.record().await;
            self.warn(now);
        }
    }

    async fn rotate(&mut self, now: SystemTime) {
        let trust = self.hub.trust();
        let mut all_trust = trust.trusting == trust.connected;
        let here = proxies(&self.authority, &trust);
        let signing = |root: &&ca::RootStatus| root.signing;
        let newest = self.told.roots.last().filter(signing);
        let mut moved = newest
            .filter(|newest| here.by_root.keys().all(|root| *root == newest.id))
            .map(|_| here.workloads);
        if let Some((replicas, _)) = &self.others {
            let rotating = self.told.phase != "stable";
            let every = if rotating { LOOK_ROTATING } else { LOOK };
            if self.looked.is_none_or(|at| at.elapsed() >= every) {
                match replicas.look(&mut self.seen).await {
                    Ok(()) => self.looked = Some(Instant::now()),
                    Err(error) => {
                        debug!("{error}");
                        self.looked = None;
                    }
                }
            }
            let known = self.looked.is_some();
            all_trust &= known && self.seen.all_trust(&self.told, Instant::now());
            // This replica is among them.
            let all = self.seen.moved(&self.told, Instant::now());
            moved = moved.and(all).filter(|_| known);
        }
        // Whoever has a proxy and is connected nowhere may still have an old certificate. Where no
        // workloads are known, nobody can say who is missing.
        let all_moved = trust.sidecars > 0 && moved.is_some_and(|moved| moved >= trust.sidecars);
        self.moved_since = match (all_moved, self.moved_since) {
            (false, _) => None,
            (true, None) => Some(Instant::now()),
            (true, since) => since,
        };
        let moving = Moving {
            all_trust,
            all_moved_for: self.moved_since.map(|since| since.elapsed()),
        };
        match self.authority.tick(moving, now).await {
            Ok(()) => {}
            // It has just ended, or somebody was quicker; the next tick sees.
            Err(reason @ (CaError::NotLeader | CaError::Changed)) => debug!("{reason}"),
            Err(error) => error!("root rotation: {error}"),
        }
    }

    fn renew(&mut self, now: SystemTime) {
        match tls::server_config(&self.authority, now) {
            Ok(own) => {
                self.life.set(&own);
                self.tls.store(own.config);
                self.renew_at = own.renew_at;
            }
            Err(error) => {
                error!("renewing the control plane's own certificate: {error}");
                self.renew_at = now + RENEW_AGAIN;
            }
        }
    }

    /// Tells the other replicas what is known here.
    async fn record(&mut self) {
        let Some((replicas, cluster)) = &mut self.others else {
            return;
        };
        let trust = self.hub.trust();
        let record = Record {
            replica: cluster.replica.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            authority: self.told.clone(),
            proxies: proxies(&self.authority, &trust),
            certificate_expires: self.life.not_after(),
        };
        replicas.write(record).await;
    }

    fn warn(&mut self, now: SystemTime) {
        let warnings = self.life.warnings(&self.authority.status(), now);
        // The number of days is part of it: once a day at least, once an hour at most.
        let said = self
            .warned
            .as_ref()
            .is_some_and(|(said, at)| said.len() == warnings.len() && at.elapsed() < REPEAT_LOG);
        if said || warnings.is_empty() {
            return;
        }
        for warning in &warnings {
            warn!("{warning}");
        }
        self.warned = Some((warnings, Instant::now()));
    }
}

/// The proxies connected here, as others are told.
fn proxies(authority: &Authority, trust: &Trusting) -> Proxies {
    let mut by_root = BTreeMap::<String, u64>::new();
    for signer in &trust.signers {
        let root = authority.root_of(signer).unwrap_or_default();
        *by_root.entry(root).or_default() += 1;
    }
    Proxies {
        connected: trust.connected,
        workloads: trust.workloads,
        trusting: trust.trusting,
        by_root,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_warned_of_long_before() {
        const DAY: u64 = 86_400;
        let status = |roots: &[(u64, bool)]| ca::Status {
            trust_domain: "cluster.local".to_owned(),
            phase: "stable".to_owned(),
            old_leaves_expire: None,
            roots: roots
                .iter()
                .map(|(not_after, signing)| ca::RootStatus {
                    id: "r".to_owned(),
                    fingerprint: "aa".to_owned(),
                    not_after: *not_after,
                    signing: *signing,
                })
                .collect(),
        };
        let now = 1_000 * DAY;
        // (roots, own certificate's life, what is said)
        let young = (now, now + DAY);
        for (roots, (from, to), said) in [
            (status(&[(now + 31 * DAY, true)]), young, vec![]),
            (
                status(&[(now + 29 * DAY, true)]),
                young,
                vec!["expires in 29 days"],
            ),
            // The old one of a rotation is on its way out anyhow.
            (
                status(&[(now + DAY, false), (now + 900 * DAY, true)]),
                young,
                vec![],
            ),
            (status(&[(now, true)]), young, vec!["has expired"]),
            (
                status(&[(now + 900 * DAY, true)]),
                (now - 60, now + 31),
                vec![],
            ),
            (
                status(&[(now + 900 * DAY, true)]),
                (now - 60, now + 29),
                vec!["in 29 s"],
            ),
            // Not made yet.
            (status(&[(now + 900 * DAY, true)]), (0, 0), vec![]),
        ] {
            let warnings = warnings(&roots, from, to, now);
            assert_eq!(warnings.len(), said.len(), "{warnings:?}");
            for (warning, said) in warnings.iter().zip(said) {
                assert!(warning.contains(said), "{warning}");
            }
        }
    }
}
