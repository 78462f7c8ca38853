//! Active health checks: the endpoints that the application calls are asked whether they are well.
//!
//! One worker asks, on the transport that requests take ([`probe`]), once for each endpoint of the
//! destinations held, whatever the number of routes that lead there. What comes of it is in the
//! endpoint's [`crate::balance::EndpointHealth`], which all workers see. An endpoint counts as well
//! until checks have failed, and again as soon as nobody asks any more.

mod probe;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use weft_api::identity::SpiffeId;

use crate::balance::EndpointHealth;
use crate::tables::{Backend, EndpointInfo, Health, HealthCheck, Known};
use crate::worker::Worker;

/// How often it is looked who is to be asked.
const LOOK: Duration = Duration::from_secs(1);
/// The first checks of endpoints that came together are spread over this.
const SPREAD: Duration = Duration::from_secs(1);

/// Which endpoint of which backend.
type Key = (Arc<str>, SocketAddr, Option<Arc<SpiffeId>>);

/// Checks for as long as the worker lives.
pub async fn run(worker: Rc<Worker>) {
    let mut running: HashMap<Key, Running> = HashMap::new();
    loop {
        let wanted = wanted(&worker);
        running.retain(|key, running| wanted.get(key).is_some_and(|target| running.is_of(target)));
        for (key, target) in wanted {
            running
                .entry(key)
                .or_insert_with(|| Running::start(&worker, target));
        }
        sleep(LOOK).await;
    }
}

/// An endpoint that is to be asked.
struct Target {
    backend: Arc<Backend>,
    endpoint: Arc<EndpointInfo>,
    check: Arc<HealthCheck>,
}

/// Every endpoint that takes requests, of every backend with a check that a destination leads to.
fn wanted(worker: &Worker) -> HashMap<Key, Target> {
    let mut wanted = HashMap::new();
    for cell in worker.directory.destinations() {
        let Known::Present(destination) = cell.known() else {
            continue;
        };
        for backend in destination
            .all_routes()
            .flat_map(|route| route.all_backends())
        {
            let Some(check) = &backend.policy.health_check else {
                continue;
            };
            for endpoint in &backend.endpoints.current.load().endpoints {
                if endpoint.state != Health::Ready {
                    continue;
                }
                let key = (
                    backend.endpoints.name.clone(),
                    endpoint.address,
                    endpoint.identity.clone(),
                );
                wanted.entry(key).or_insert_with(|| Target {
                    backend: backend.clone(),
                    endpoint: endpoint.clone(),
                    check: check.clone(),
                });
            }
        }
    }
    wanted
}

/// The checks of one endpoint; they end with it.
struct Running {
    check: Arc<HealthCheck>,
    health: Arc<EndpointHealth>,
    task: AbortHandle,
}

impl Running {
    fn start(worker: &Rc<Worker>, target: Target) -> Self {
        let (check, health) = (target.check.clone(), target.endpoint.health.clone());
        let task = tokio::task::spawn_local(keep_asking(worker.clone(), target));
        Self {
            check,
            health,
            task: task.abort_handle(),
        }
    }

    /// Whether they are what is wanted now.
    fn is_of(&self, target: &Target) -> bool {
        self.check == target.check && Arc::ptr_eq(&self.health, &target.endpoint.health)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
        self.health.set_well(true);
    }
}

async fn keep_asking(worker: Rc<Worker>, target: Target) {
    let Target {
        backend,
        endpoint,
        check,
    } = target;
    sleep(SPREAD.min(check.interval).mul_f64(worker.random())).await;
    let mut streak = Streak::new();
    loop {
        let asked = probe::ask(&worker, &endpoint, &backend.policy, &check);
        let answer = match timeout(check.timeout, asked).await {
            Ok(answer) => answer,
            Err(_) => Err(probe::Unwell::Late(check.timeout)),
        };
        if let Err(probe::Unwell::Silent) = answer {
            // Nothing is known of it.
        } else if streak.count(answer.is_ok(), &check) {
            endpoint.health.set_well(streak.well);
            let (address, workload) = (endpoint.address, &endpoint.workload);
            let service = &backend.service;
            match &answer {
                Ok(()) => {
                    tracing::info!(%service, endpoint = %address, %workload, "endpoint is well again")
                }
                Err(why) => {
                    tracing::warn!(%service, endpoint = %address, %workload, "endpoint is unwell: {why}")
                }
            }
        }
        sleep(check.interval.mul_f64(0.9 + 0.2 * worker.random())).await;
    }
}

/// What the checks so far say of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Streak {
    well: bool,
    /// Checks in a row that say otherwise.
    against: u32,
}

impl Streak {
    fn new() -> Self {
        Self {
            well: true,
            against: 0,
        }
    }

    /// Counts a check; whether the endpoint is now otherwise than before.
    fn count(&mut self, good: bool, check: &HealthCheck) -> bool {
        if good == self.well {
            self.against = 0;
            return false;
        }
        self.against += 1;
        let needed = match good {
            true => check.healthy_threshold,
            false => check.unhealthy_threshold,
        };
        if self.against < needed {
            return false;
        }
        *self = Self {
            well: good,
            against: 0,
        };
        true
    }
}

#[cfg(test)]
mod tests;
