//! A worker's balancer of one backend, and the endpoint that it gives to a try.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use super::choose::Avoid;
use super::circuit::Fault;
use super::ewma::PeakEwma;
use super::health::{EndpointHealth, HealthState, Judge, Room};
use super::limits::{ConnectionPermit, RequestPermit};
use super::view::View;
use super::{LimitReached, Outcome, Unavailable, clock};
use crate::tables::{Backend, EndpointInfo, EndpointSet, Health, OutlierDetection};

/// A worker's view of one backend. `P` is what the transport keeps with an endpoint (its pools).
#[derive(Debug)]
pub struct Balancer<P> {
    local: Rc<Local>,
    view: RefCell<View<P>>,
}

/// What the balancer and its tries hold together: worker-local, so that a pick touches no counter
/// that other workers write.
#[derive(Debug)]
struct Local {
    backend: Arc<Backend>,
}

/// An endpoint as one worker sees it.
#[derive(Debug)]
pub struct Endpoint<P> {
    /// As told when the worker first saw the endpoint: address, identity and workload hold for its
    /// life; weight and readiness may have changed since (see [`Balancer::snapshot`]).
    pub info: Arc<EndpointInfo>,
    /// Idle connections and the like.
    pub pool: P,
    health: RefCell<Arc<EndpointHealth>>,
    in_flight: Cell<u32>,
    ewma: PeakEwma,
}

/// An endpoint chosen for one try. Dropped without `observe`, the try counts as `Neutral`.
#[derive(Debug)]
pub struct Picked<P> {
    pub endpoint: Rc<Endpoint<P>>,
    local: Rc<Local>,
    started: Instant,
    /// The latency is in the average.
    measured: bool,
    /// This try decides whether an ejected endpoint returns, and has not yet.
    probe: bool,
}

/// An endpoint as one worker sees it, for people.
#[derive(Debug, Clone, PartialEq)]
pub struct EndpointStatus {
    pub address: SocketAddr,
    /// `<namespace>/<name>`.
    pub workload: Arc<str>,
    pub weight: u32,
    /// As the control plane sees it.
    pub health: Health,
    /// Of this worker.
    pub in_flight: u32,
    /// Peak-EWMA latency of this worker; zero before the first answer.
    pub ewma: Duration,
    /// Outlier ejection, over all workers.
    pub state: HealthState,
    /// What active checks say.
    pub well: bool,
    /// Ejections and returns so far, over all workers.
    pub ejections: u64,
    pub returns: u64,
}

impl<P: Default> Balancer<P> {
    pub fn new(backend: Arc<Backend>) -> Self {
        Self::with_view(backend, View::new(SmallRng::from_rng(&mut rand::rng())))
    }

    #[cfg(test)]
    pub(super) fn seeded(backend: Arc<Backend>, seed: u64) -> Self {
        Self::with_view(backend, View::new(SmallRng::seed_from_u64(seed)))
    }

    fn with_view(backend: Arc<Backend>, view: View<P>) -> Self {
        backend.limits.set_max_requests(backend.policy.max_requests);
        Self {
            local: Rc::new(Local { backend }),
            view: RefCell::new(view),
        }
    }

    /// A recompiled backend takes the place of the old one: endpoints that stay (same address and
    /// identity) keep their measurements and pools.
    pub fn replace(&self, backend: Arc<Backend>) -> Self {
        Self::with_view(backend, self.view.borrow_mut().successor())
    }

    /// The same for a proxy in a zone; empty when it is not known.
    pub fn replace_in(&self, backend: Arc<Backend>, zone: Arc<str>) -> Self {
        let next = self.replace(backend);
        next.view.borrow_mut().zone = zone;
        next
    }

    /// The zone that it prefers, where the policy says so.
    pub fn is_in(&self, zone: &Arc<str>) -> bool {
        self.view.borrow().zone == *zone
    }

    pub fn backend(&self) -> &Arc<Backend> {
        &self.local.backend
    }

    /// Chooses an endpoint. `key` is the hash of the policy's hash key, if there is one; `tried`
    /// are the addresses of earlier tries of the same request, avoided if others are there.
    pub fn pick(
        &self,
        key: Option<u64>,
        tried: &[SocketAddr],
        now: Instant,
    ) -> Result<Picked<P>, Unavailable> {
        let policy = &self.local.backend.policy;
        let mut view = self.view.borrow_mut();
        view.refresh(&self.local.backend.endpoints.current.load(), policy, now);
        if !view.any_ready {
            let set = self.local.backend.endpoints.current.load();
            return Err(match (view.slots.is_empty(), set.node_local) {
                (true, true) => Unavailable::NoneOnNode,
                (true, false) => Unavailable::NoEndpoints,
                (false, _) => Unavailable::NoneReady,
            });
        }
        let key = key.filter(|_| view.table.is_some());
        // In quiet times nobody is to be probed or avoided, and the clock is not needed.
        let millis = if view.probe_at < u64::MAX || view.avoid_until > 0 {
            clock::millis(now)
        } else {
            0
        };
        // A second try looks for safety first.
        let probe = if tried.is_empty() {
            self.probe(&view, key, millis)
        } else {
            None
        };
        let avoid = Avoid {
            tried,
            backing_off_at: (view.avoid_until > millis).then_some(millis),
        };
        let chosen = probe.map(|slot| (slot, true)).or_else(|| {
            let narrowed = policy.zone_threshold.is_some() || view.hinted;
            let far = narrowed && !tried.is_empty() && view.are_all_tried(tried);
            let slot = match key {
                None if far => {
                    let other = view.elsewhere(tried);
                    other.or_else(|| view.choose(policy.algorithm, avoid, now))
                }
                Some(key) => view.choose_by_key(key, avoid),
                None => view.choose(policy.algorithm, avoid, now),
            };
            slot.map(|slot| (slot, false))
        });
        let (slot, probe) = chosen
            .or_else(|| self.probe(&view, None, millis).map(|slot| (slot, true)))
            .ok_or(Unavailable::AllEjected)?;
        Ok(self.picked(&view, slot, probe, now))
    }

    /// The endpoint that a session is with, unless it is gone, unwell or has been tried.
    pub fn pick_session(
        &self,
        session: u64,
        tried: &[SocketAddr],
        now: Instant,
    ) -> Option<Picked<P>> {
        let policy = &self.local.backend.policy;
        let mut view = self.view.borrow_mut();
        view.refresh(&self.local.backend.endpoints.current.load(), policy, now);
        let slot = view.of_session(session)?;
        let address = view.slots[slot as usize].info.address;
        (!tried.contains(&address)).then(|| self.picked(&view, slot, false, now))
    }

    /// Whether somebody that may be chosen is not among `tried`, and has not asked to be left alone.
    pub fn has_others<'a>(
        &self,
        tried: impl Iterator<Item = &'a SocketAddr> + Clone,
        now: Instant,
    ) -> bool {
        let policy = &self.local.backend.policy;
        let mut view = self.view.borrow_mut();
        view.refresh(&self.local.backend.endpoints.current.load(), policy, now);
        let now = clock::millis(now);
        let slots = view.candidates.iter().map(|i| &view.slots[*i as usize]);
        let mut willing = slots.filter(|slot| slot.info.health.avoid_until() <= now);
        willing.any(|slot| tried.clone().all(|tried| *tried != slot.info.address))
    }

    fn picked(&self, view: &View<P>, slot: u32, probe: bool, now: Instant) -> Picked<P> {
        let endpoint = view.slots[slot as usize].endpoint.clone();
        endpoint.in_flight.set(endpoint.in_flight.get() + 1);
        Picked {
            endpoint,
            local: self.local.clone(),
            started: now,
            measured: false,
            probe,
        }
    }

    /// An ejected endpoint whose time has come, if no other worker has taken its probe. A request
    /// with a key probes only where it belongs.
    fn probe(&self, view: &View<P>, key: Option<u64>, now: u64) -> Option<u32> {
        let policy = self.local.backend.policy.outlier.as_ref()?;
        if view.probe_at > now {
            return None;
        }
        let due = |i: &u32| {
            let slot = &view.slots[*i as usize];
            let health = &slot.info.health;
            slot.out && health.is_well() && health.try_probe(policy, now)
        };
        match key {
            Some(key) => view.walk(key).next().filter(due),
            None => (0u32..)
                .zip(&view.slots)
                .filter(|(_, slot)| slot.ready)
                .map(|(i, _)| i)
                .find(due),
        }
    }

    /// A permit for one more request in flight; waits in the queue of pending requests when the
    /// limit is reached and the queue has room. Ready at once without a limit.
    pub async fn request_permit(&self) -> Result<RequestPermit, LimitReached> {
        let policy = &self.local.backend.policy;
        self.local
            .backend
            .limits
            .request(policy.max_requests, policy.max_pending_requests)
            .await
    }

    /// A permit for one more connection; fails at once.
    pub fn connection_permit(&self) -> Result<ConnectionPermit, LimitReached> {
        self.local
            .backend
            .limits
            .connection(self.local.backend.policy.max_connections)
    }

    /// Calls `each` with every endpoint that is there now; those that have left are let go.
    pub fn for_each(&self, now: Instant, mut each: impl FnMut(&Endpoint<P>)) {
        let mut view = self.view.borrow_mut();
        let backend = &self.local.backend;
        view.refresh(&backend.endpoints.current.load(), &backend.policy, now);
        for slot in &view.slots {
            each(&slot.endpoint);
        }
    }

    /// The endpoints as this worker sees them, as last told by the control plane.
    pub fn snapshot(&self, now: Instant) -> Vec<EndpointStatus> {
        let mut view = self.view.borrow_mut();
        let set = self.local.backend.endpoints.current.load();
        view.refresh(&set, &self.local.backend.policy, now);
        view.slots
            .iter()
            .map(|slot| EndpointStatus {
                address: slot.info.address,
                workload: slot.info.workload.clone(),
                weight: slot.info.weight,
                health: slot.info.state,
                in_flight: slot.endpoint.in_flight(),
                ewma: slot.endpoint.ewma(now),
                state: slot.info.health.state(),
                well: slot.info.health.is_well(),
                ejections: slot.info.health.ejections(),
                returns: slot.info.health.returns(),
            })
            .collect()
    }
}

impl<P> Endpoint<P> {
    /// Requests of this worker that have the endpoint.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.get()
    }

    /// Peak-EWMA latency as this worker has measured it; zero before the first answer.
    pub fn ewma(&self, now: Instant) -> Duration {
        Duration::from_nanos(self.ewma.nanos(now) as u64)
    }

    /// Outlier state, shared by the workers.
    pub fn health(&self) -> Arc<EndpointHealth> {
        self.health.borrow().clone()
    }

    pub(super) fn set_health(&self, health: Arc<EndpointHealth>) {
        *self.health.borrow_mut() = health;
    }

    pub(super) fn cost(&self, share: f64, now: Instant) -> f64 {
        self.ewma.cost(f64::from(self.in_flight.get()) / share, now)
    }
}

impl<P: Default> Endpoint<P> {
    pub(super) fn new(info: Arc<EndpointInfo>, now: Instant) -> Self {
        Self {
            health: RefCell::new(info.health.clone()),
            info,
            pool: P::default(),
            in_flight: Cell::new(0),
            ewma: PeakEwma::new(now),
        }
    }
}

impl<P> Picked<P> {
    /// The head of the response is here, or the try has failed: feeds latency (peak EWMA) and the
    /// outlier detection. The endpoint stays loaded until `self` is dropped.
    ///
    /// May be called again for what happens after the head (a reset): that counts for the outlier
    /// detection, not for the latency.
    pub fn observe(&mut self, outcome: Outcome, now: Instant) {
        let outlier = self.local.backend.policy.outlier.as_ref();
        if outcome != Outcome::Neutral && !self.measured {
            self.measured = true;
            self.measure(outcome, outlier.is_some(), now);
        }
        let Some(policy) = outlier else { return };
        let health = self.endpoint.health.borrow();
        let fault = match outcome {
            Outcome::Neutral => return,
            Outcome::Success if health.is_normal() => return,
            Outcome::Success => None,
            Outcome::ServerError => Some(Fault::Server),
            Outcome::GatewayError | Outcome::ConnectFailure | Outcome::Reset | Outcome::Timeout => {
                Some(Fault::Gateway)
            }
        };
        let judge = Judge {
            policy,
            now: clock::millis(now),
            jitter: rand::rng().random_range(0.9..1.1),
            room: &|| room(&self.local.backend.endpoints.current.load(), policy),
        };
        match fault {
            None => health.succeeded(self.probe, &judge),
            Some(fault) => health.failed(self.probe, fault, &judge),
        }
        self.probe = false;
    }

    /// The request goes out now, on a connection that had to be opened: the handshake is no part of
    /// the endpoint's latency.
    pub fn sent(&mut self, now: Instant) {
        self.started = now;
    }

    /// The head of the response is here, but not yet what the call came to (gRPC says that in its
    /// trailers): feeds the latency alone.
    pub fn answered(&mut self, now: Instant) {
        if !self.measured {
            self.measured = true;
            self.measure(Outcome::Success, false, now);
        }
    }

    fn measure(&self, outcome: Outcome, ejecting: bool, now: Instant) {
        let latency = now.saturating_duration_since(self.started);
        let ewma = &self.endpoint.ewma;
        match outcome {
            Outcome::Success => ewma.observe(latency, now),
            Outcome::ServerError | Outcome::Neutral => ewma.observe_failure(latency, now),
            // With outlier detection it is the ejection that steers away, and it must see the
            // failures to come to that. Without, the cost has to.
            _ if ejecting => ewma.observe_failure(latency, now),
            _ => ewma.penalize(latency, now),
        }
    }

    /// Another endpoint has answered first: this one takes as long as it has taken, at least.
    pub fn overtaken(&mut self, now: Instant) {
        if !self.measured {
            self.measured = true;
            let latency = now.saturating_duration_since(self.started);
            self.endpoint.ewma.observe_failure(latency, now);
        }
    }

    /// The endpoint says when it can be asked again (a `Retry-After` with 429 or 503, or their
    /// equivalents in gRPC): it is alive and spares itself. That is no failure, but a reason to
    /// steer away for that long, in all workers, while other endpoints are there.
    pub fn pushed_back(&mut self, how_long: Duration, now: Instant) {
        if !self.measured {
            self.measured = true;
            // A refusal is fast: it must not look like a fast answer.
            let latency = now.saturating_duration_since(self.started);
            self.endpoint.ewma.observe_failure(latency, now);
        }
        if self.probe {
            self.observe(Outcome::Success, now);
        }
        self.back_off_from(how_long, now);
    }

    /// Steer away for this long (60 s at most), in all workers, while other endpoints are there.
    pub fn back_off(&self, how_long: Duration) {
        self.back_off_from(how_long, Instant::now());
    }

    /// [`Self::back_off`] for those who have the time at hand.
    pub fn back_off_from(&self, how_long: Duration, now: Instant) {
        self.endpoint
            .health
            .borrow()
            .back_off(how_long, clock::millis(now));
    }

    /// This try is the one that decides whether an ejected endpoint returns.
    pub fn is_probe(&self) -> bool {
        self.probe
    }
}

impl<P> Drop for Picked<P> {
    fn drop(&mut self) {
        let n = &self.endpoint.in_flight;
        n.set(n.get().saturating_sub(1));
        if self.probe {
            let health = self.endpoint.health.borrow();
            health.release_probe(clock::millis(self.started));
        }
    }
}

/// How many of the ready endpoints are out, and how many may be: the policy's share, and one at
/// least where there is another to take its place.
fn room(set: &EndpointSet, policy: &OutlierDetection) -> Room {
    let ready = set
        .endpoints
        .iter()
        .filter(|e| e.state == Health::Ready && e.weight > 0);
    let (mut count, mut ejected) = (0, 0);
    for endpoint in ready {
        count += 1;
        ejected += usize::from(endpoint.health.is_out());
    }
    let percent = policy.max_ejection_percent.min(100) as usize;
    let least = usize::from(percent > 0 && count >= 2);
    Room {
        ejected,
        allowed: (count * percent / 100).max(least),
    }
}
