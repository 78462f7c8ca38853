//! Which endpoint gets a request: balancing, outlier ejection, concurrency limits, retry budgets.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::tables::{Backend, EndpointInfo};

/// Outlier state of one endpoint address, shared by the workers. Touched only on failures and
/// when the state is not the normal one.
#[derive(Debug, Default)]
pub struct EndpointHealth {}

/// Counters of a backend's concurrency limits, shared by the workers.
#[derive(Debug, Default)]
pub struct SharedLimits {}

/// How a try ended, as far as the endpoint is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A response that is the endpoint's success (below 500; gRPC codes that are not its fault).
    Success,
    /// 500, 501 and other 5xx that are not gateway errors; gRPC UNKNOWN, INTERNAL, DATA_LOSS.
    ServerError,
    /// 502, 503, 504; gRPC UNAVAILABLE.
    GatewayError,
    ConnectFailure,
    /// Lost before the end of the response.
    Reset,
    Timeout,
    /// Says nothing of the endpoint (the client went away).
    Neutral,
}

/// Why there is no endpoint to send to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unavailable {
    /// The backend has no endpoint at all.
    NoEndpoints,
    /// None is ready (not ready, draining, or of weight 0).
    NoneReady,
    /// All that are ready are ejected (and the panic threshold does not apply).
    AllEjected,
}

/// Which of a backend's limits is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitReached {
    Connections,
    Requests,
    PendingRequests,
}

/// A worker's view of one backend. `P` is what the transport keeps with an endpoint (its pools).
#[derive(Debug)]
pub struct Balancer<P> {
    backend: Arc<Backend>,
    endpoints: RefCell<Vec<Rc<Endpoint<P>>>>,
    generation: Cell<u64>,
    next: Cell<usize>,
}

/// An endpoint as one worker sees it.
#[derive(Debug)]
pub struct Endpoint<P> {
    pub info: Arc<EndpointInfo>,
    /// Idle connections and the like.
    pub pool: P,
    in_flight: Cell<u32>,
}

/// An endpoint chosen for one try. Dropped without `finish`, the try counts as `Neutral`.
#[derive(Debug)]
pub struct Picked<P> {
    pub endpoint: Rc<Endpoint<P>>,
    started: Instant,
}

/// Held while a request is in flight (limit `max_requests`).
#[derive(Debug)]
pub struct RequestPermit {}

/// Held while a connection is open (limit `max_connections`).
#[derive(Debug)]
pub struct ConnectionPermit {}

impl<P: Default> Balancer<P> {
    pub fn new(backend: Arc<Backend>) -> Self {
        Self {
            backend,
            endpoints: RefCell::default(),
            generation: Cell::new(u64::MAX),
            next: Cell::new(0),
        }
    }

    /// A recompiled backend takes the place of the old one: endpoints that stay (same address and
    /// identity) keep their measurements and pools.
    pub fn replace(&self, backend: Arc<Backend>) -> Self {
        Self::new(backend)
    }

    pub fn backend(&self) -> &Arc<Backend> {
        &self.backend
    }

    /// Chooses an endpoint. `key` is the hash of the policy's hash key, if there is one; `tried`
    /// are the addresses of earlier tries of the same request, avoided if others are there.
    pub fn pick(
        &self,
        key: Option<u64>,
        tried: &[std::net::SocketAddr],
        now: Instant,
    ) -> Result<Picked<P>, Unavailable> {
        let _ = (key, tried);
        let set = self.backend.endpoints.current.load();
        if set.generation != self.generation.get() {
            *self.endpoints.borrow_mut() = set
                .endpoints
                .iter()
                .map(|info| {
                    Rc::new(Endpoint {
                        info: info.clone(),
                        pool: P::default(),
                        in_flight: Cell::new(0),
                    })
                })
                .collect();
            self.generation.set(set.generation);
        }
        let endpoints = self.endpoints.borrow();
        if endpoints.is_empty() {
            return Err(Unavailable::NoEndpoints);
        }
        let n = self.next.get();
        self.next.set(n.wrapping_add(1));
        let endpoint = endpoints[n % endpoints.len()].clone();
        endpoint.in_flight.set(endpoint.in_flight.get() + 1);
        Ok(Picked {
            endpoint,
            started: now,
        })
    }

    /// A permit for one more request in flight; waits in the queue of pending requests when the
    /// limit is reached and the queue has room. Ready at once without a limit.
    pub async fn request_permit(&self) -> Result<RequestPermit, LimitReached> {
        Ok(RequestPermit {})
    }

    /// A permit for one more connection; fails at once.
    pub fn connection_permit(&self) -> Result<ConnectionPermit, LimitReached> {
        Ok(ConnectionPermit {})
    }
}

impl<P> Picked<P> {
    /// The head of the response is here, or the try has failed: feeds latency (peak EWMA) and the
    /// outlier detection. The endpoint stays loaded until `self` is dropped.
    pub fn observe(&mut self, outcome: Outcome, now: Instant) {
        let _ = (outcome, now, self.started);
    }

    /// A `Retry-After` on 429/503 (or RESOURCE_EXHAUSTED): steer away for this long.
    pub fn back_off(&self, how_long: Duration) {
        let _ = how_long;
    }
}

impl<P> Drop for Picked<P> {
    fn drop(&mut self) {
        let n = &self.endpoint.in_flight;
        n.set(n.get().saturating_sub(1));
    }
}

/// Share of live traffic that may be retries, plus a floor; one per worker and route.
#[derive(Debug)]
pub struct RetryBudget {}

impl RetryBudget {
    /// `percent` 0-100 of live requests plus `min_per_second`.
    pub fn new(percent: u32, min_per_second: u32) -> Self {
        let _ = (percent, min_per_second);
        Self {}
    }

    /// A request (not a retry) has begun.
    pub fn deposit(&self, now: Instant) {
        let _ = now;
    }

    /// Takes a retry out of the budget; false when it is spent.
    pub fn withdraw(&self, now: Instant) -> bool {
        let _ = now;
        true
    }
}
