//! Becoming and staying the leader, by a Lease (coordination.k8s.io/v1).

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::PostParams;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{debug, info, warn};

use super::leadership::Sender;
use super::lease::{Candidate, Held, Step};
use super::{Cluster, ClusterError, Leadership, answer};

pub use super::lease::Timing;

/// One replica's part in the election.
pub struct Election {
    cluster: Cluster,
    leases: Api<Lease>,
    name: String,
    timing: Timing,
    candidate: Candidate,
    sender: Sender,
}

impl Election {
    /// For the Lease of this name in the control plane's namespace.
    pub fn new(cluster: Cluster, name: &str, timing: Timing) -> (Self, Leadership) {
        let (sender, leadership) = Leadership::channel();
        let election = Self {
            leases: cluster.own(),
            name: name.to_owned(),
            timing,
            candidate: Candidate::new(&cluster.replica, timing),
            cluster,
            sender,
        };
        (election, leadership)
    }

    /// Takes part until `shutdown`; then gives the Lease away, so that nobody has to wait for its
    /// end.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) {
        tokio::pin!(shutdown);
        loop {
            // Not dropped half-way: a write whose answer nobody heard would be held by nobody.
            self.round().await;
            let wait = match self.candidate.until(Instant::now()) {
                Some(until) => self
                    .timing
                    .retry
                    .min(until.saturating_duration_since(Instant::now())),
                None => jittered(self.timing.retry),
            };
            tokio::select! {
                () = sleep(wait) => {}
                () = &mut shutdown => break,
            }
        }
        self.sender.let_go();
        if self.candidate.resign(Instant::now()) {
            match self.release().await {
                Ok(()) => info!(
                    lease = self.name,
                    "no longer the leader: the lease is released"
                ),
                Err(error) => debug!("releasing the lease: {error}; it ends by itself"),
            }
        }
    }

    /// One try; leadership ends in the middle of it when its time is over.
    async fn round(&mut self) {
        let led = self.candidate.until(Instant::now());
        let tried = match led {
            None => self.try_once().await,
            Some(until) => match timeout_at(until, self.try_once()).await {
                Ok(tried) => tried,
                Err(_) => Err(ClusterError::Timeout {
                    doing: format!("renew the Lease {}", self.name),
                }),
            },
        };
        if let Err(error) = tried {
            match led {
                Some(_) => warn!("renewing the lease {}: {error}", self.name),
                None => debug!("asking for the lease {}: {error}", self.name),
            }
        }
        match (led.is_some(), self.candidate.until(Instant::now())) {
            (false, Some(until)) => {
                info!(
                    lease = self.name,
                    replica = self.cluster.replica,
                    "this replica is the leader now"
                );
                self.sender.hold(until);
            }
            (true, Some(until)) => self.sender.hold(until),
            (true, None) => {
                warn!(lease = self.name, "this replica is no longer the leader");
                self.sender.let_go();
            }
            (false, None) => self.sender.let_go(),
        }
    }

    async fn try_once(&mut self) -> Result<(), ClusterError> {
        let name = self.name.clone();
        let read = self.leases.get_opt(&name);
        let lease = answer(format!("read the Lease {name}"), read).await?;
        let held = lease.as_ref().map(held);
        let sent = Instant::now();
        let parameters = PostParams::default();
        match (self.candidate.look(held.as_ref(), sent), lease) {
            (Step::Wait, _) => return Ok(()),
            (Step::Create, _) | (_, None) => {
                self.cluster.look_up_owner().await?;
                let lease = Lease {
                    metadata: self.cluster.meta(&name),
                    spec: Some(self.spec(None)),
                };
                let made = self.leases.create(&parameters, &lease);
                answer(format!("make the Lease {name}"), made).await?;
            }
            (Step::Renew | Step::Take, Some(mut lease)) => {
                lease.spec = Some(self.spec(lease.spec.take()));
                // Carries the resource version it was read with: whoever wrote meanwhile has won.
                let replaced = self.leases.replace(&name, &parameters, &lease);
                answer(format!("renew the Lease {name}"), replaced).await?;
            }
        }
        self.candidate.wrote(sent);
        Ok(())
    }

    fn spec(&self, before: Option<LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let before = before.unwrap_or_default();
        let ours = before.holder_identity.as_deref() == Some(self.cluster.replica.as_str());
        LeaseSpec {
            holder_identity: Some(self.cluster.replica.clone()),
            lease_duration_seconds: i32::try_from(self.timing.duration.as_secs()).ok(),
            acquire_time: if ours {
                before.acquire_time
            } else {
                Some(now.clone())
            },
            lease_transitions: Some(before.lease_transitions.unwrap_or(0) + i32::from(!ours)),
            renew_time: Some(now),
            ..LeaseSpec::default()
        }
    }

    async fn release(&self) -> Result<(), ClusterError> {
        let name = &self.name;
        let mut lease = answer(format!("read the Lease {name}"), self.leases.get(name)).await?;
        if held(&lease).holder != self.cluster.replica {
            return Ok(());
        }
        let spec = lease.spec.get_or_insert_default();
        spec.holder_identity = None;
        let parameters = PostParams::default();
        let replaced = self.leases.replace(name, &parameters, &lease);
        answer(format!("release the Lease {name}"), replaced)
            .await
            .map(drop)
    }
}

fn held(lease: &Lease) -> Held {
    let spec = lease.spec.clone().unwrap_or_default();
    Held {
        holder: spec.holder_identity.unwrap_or_default(),
        version: lease.metadata.resource_version.clone().unwrap_or_default(),
        duration: spec
            .lease_duration_seconds
            .and_then(|seconds| u64::try_from(seconds).ok())
            .filter(|seconds| *seconds > 0)
            .map(Duration::from_secs),
    }
}

/// Others who wait do not try in step.
fn jittered(wait: Duration) -> Duration {
    let mut random = [0u8; 1];
    // Without random numbers they do.
    let _ = aws_lc_rs::rand::fill(&mut random);
    wait + wait.mul_f64(f64::from(random[0]) / 1024.0)
}
