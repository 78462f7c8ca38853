//! One request on its way: what was decided, and what each try made of it. No I/O.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout_at;

use super::filter::{Answer, Fields};
use super::pushback::Again;
use super::retry::{self, Failure};
use super::session::{self, Sticky};
use super::{ErrorCode, ProxyError, RequestView, route};
use crate::balance::{
    Balancer, LimitReached, Outcome, Picked, RequestPermit, RetryBudget, Unavailable, hash_bytes,
};
use crate::tables::{Backend, Destination, EndpointInfo, Fallback, HashKey, Plan, Route, Share};
use crate::telemetry::Counter;
use crate::worker::{Pools, Worker};

/// A request that has a route, a backend and a permit.
#[derive(Debug)]
pub struct Call {
    pub route: Arc<Route>,
    pub balancer: Rc<Balancer<Pools>>,
    pub started: Instant,
    /// The request timeout, if there is one.
    pub deadline: Option<Instant>,
    /// From then on nothing is tried any more, if that is not the deadline.
    pub last_try: Option<Instant>,
    /// What is changed on the way there and back.
    pub plan: Option<Arc<Plan>>,
    /// Bytes of the path that the route's prefix matched.
    pub prefix: usize,
    /// What is added to the response for the browser of a cross-origin request.
    pub cors: Fields,
    /// The client is to stay with the endpoint that answers.
    session: Option<Box<Sticky>>,
    /// Tries so far.
    pub tries: u32,
    tried: Vec<SocketAddr>,
    key: Option<u64>,
    on_fallback: bool,
    permit: Option<RequestPermit>,
    budget: Option<Rc<RetryBudget>>,
    /// There was to be another try, and the backend's own budget had none left.
    spent: bool,
}

/// Why a request is answered here instead of being sent.
#[derive(Debug, Clone)]
pub enum Refusal {
    Error(ProxyError),
    /// The policy's fallback response answers; the error says why.
    Fallback(Arc<Fallback>, ProxyError),
    /// The route answers itself.
    Answer(Box<Answer>),
}

impl From<ProxyError> for Refusal {
    fn from(error: ProxyError) -> Self {
        Self::Error(error)
    }
}

impl Call {
    /// Chooses route and backend, takes a permit.
    pub async fn begin<R: RequestView>(
        worker: &Worker,
        destination: &Arc<Destination>,
        request: &R,
        peer: SocketAddr,
        now: Instant,
    ) -> Result<Self, Refusal> {
        let selected = route::select(destination, request).ok_or_else(|| {
            ProxyError::new(
                ErrorCode::NoRoute,
                format!(
                    "no route of {}/{}:{} matches {} {}",
                    destination.namespace,
                    destination.service,
                    destination.port,
                    String::from_utf8_lossy(request.method()),
                    String::from_utf8_lossy(route::path_only(request.path())),
                ),
            )
        })?;
        let route::Selected { route, prefix } = selected;
        let mut cors = match &route.cors {
            None => Fields::new(),
            Some(cors) => {
                if let Some(answer) = cors.preflight(request) {
                    return Err(Refusal::Answer(Box::new(answer)));
                }
                cors.response_fields(request)
            }
        };
        if let Some(why) = &route.refused {
            if destination.prohibited {
                return Err(ProxyError::new(ErrorCode::EgressRefused, &**why).into());
            }
            let text = format!("route {}: {why}", route.name);
            return Err(ProxyError::new(ErrorCode::InvalidRoute, text).into());
        }
        if let Some(redirect) = &route.redirect {
            let answer = redirect.answer(request, prefix, destination.port);
            return Err(Refusal::Answer(Box::new(answer)));
        }
        let deadline = route.policy.request_timeout.map(|t| now + t);
        if let Some(fault) = &route.policy.fault
            && fault.concerns(request)
        {
            let place = format!("route {}", route.name);
            let grpc = route::is_grpc(request);
            Box::pin(fault.inject(worker, destination, &place, grpc, deadline)).await?;
        }
        // Nothing of this unless the route has sessions.
        let key = (route.sessions)
            .then(|| worker.directory.session_key())
            .flatten();
        let resumed = key
            .as_ref()
            .and_then(|key| session::resume(key, route, request, session::now()));
        let (share, backend) = match resumed.map(|(share, _)| (share, &share.backend)) {
            Some((share, Ok(backend))) => (share, backend),
            _ => choose_backend(worker, route)?,
        };
        let session = share.session.as_ref().zip(key).map(|(of, key)| {
            let token = resumed.map(|(_, token)| token);
            Box::new(Sticky::new(of, key, route, token, request, prefix))
        });
        if let Some(plan) = &share.plan {
            if let Some(own) = &plan.cors {
                if let Some(answer) = own.preflight(request) {
                    return Err(Refusal::Answer(Box::new(answer)));
                }
                cors = own.response_fields(request);
            }
            if let Some(redirect) = &plan.redirect {
                let answer = redirect.answer(request, prefix, destination.port);
                return Err(Refusal::Answer(Box::new(answer)));
            }
        }
        let balancer = worker.balancer(backend);
        let retry = route.policy.retry.as_ref();
        let mut call = Self {
            route: route.clone(),
            started: now,
            deadline,
            last_try: None,
            plan: share.plan.clone(),
            prefix,
            cors,
            session,
            tries: 0,
            tried: Vec::new(),
            key: hash_key(backend, request, peer),
            on_fallback: false,
            permit: None,
            budget: retry.map(|policy| worker.budget_of(backend, route, policy)),
            spent: false,
            balancer,
        };
        if let Some(budget) = &call.budget {
            budget.deposit(now);
        }
        if backend.policy.max_requests != 0 {
            call.take_permit(worker).await?;
        }
        Ok(call)
    }

    /// Takes a permit of the current backend; of the fallback backend if its limit is reached.
    async fn take_permit(&mut self, worker: &Worker) -> Result<(), Refusal> {
        loop {
            let waiting = self.balancer.request_permit();
            let permit = match self.deadline {
                None => waiting.await,
                Some(deadline) => match timeout_at(deadline.into(), waiting).await {
                    Ok(permit) => permit,
                    Err(_) => {
                        let text = format!(
                            "{}: the timeout ran out while the request waited for room (maxPendingRequests)",
                            self.place()
                        );
                        return Err(ProxyError::new(ErrorCode::ResponseTimeout, text).into());
                    }
                },
            };
            match permit {
                Ok(permit) => {
                    self.permit = Some(permit);
                    return Ok(());
                }
                Err(limit) => {
                    let error = self.limit_reached(worker, limit);
                    self.fall_back(worker, error)?;
                    if self.balancer.backend().policy.max_requests == 0 {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// The error for a limit that is reached; counted.
    pub fn limit_reached(&self, worker: &Worker, limit: LimitReached) -> ProxyError {
        let backend = self.balancer.backend();
        let policy = &backend.policy;
        let (what, number) = match limit {
            LimitReached::Connections => ("maxConnections", policy.max_connections),
            LimitReached::Requests => ("maxRequests", policy.max_requests),
            LimitReached::PendingRequests => ("maxPendingRequests", policy.max_pending_requests),
        };
        worker.metrics.count(
            Counter::LimitsRejected,
            &[what, &backend.service, &backend.namespace],
        );
        ProxyError::new(
            ErrorCode::LimitReached,
            format!(
                "{}: the circuit is open: {what} ({number}) of its TrafficPolicy is reached",
                self.place()
            ),
        )
    }

    /// Route and backend, for sentences.
    pub fn place(&self) -> String {
        let backend = self.balancer.backend();
        format!(
            "route {}: backend {}/{}:{}",
            self.route.name, backend.namespace, backend.service, backend.port
        )
    }

    /// The circuit is open. `Ok`: from now on the fallback backend is used; otherwise the
    /// fallback's response is the answer, or the error is.
    pub fn fall_back(&mut self, worker: &Worker, error: ProxyError) -> Result<(), Refusal> {
        match self.route.policy.fallback.clone() {
            Some(fallback) if !self.on_fallback => {
                self.on_fallback = true;
                let Fallback::Backend(backend) = &*fallback else {
                    return Err(Refusal::Fallback(fallback, error));
                };
                tracing::debug!("{error}: using the fallback {}", backend.service);
                self.permit = None;
                self.tried.clear();
                self.balancer = worker.balancer(backend);
                Ok(())
            }
            _ => Err(error.into()),
        }
    }

    /// Chooses an endpoint for the next try, of the fallback backend if the backend has none.
    pub fn pick(&mut self, worker: &Worker, now: Instant) -> Result<Picked<Pools>, Refusal> {
        if let Some(endpoint) = self.sticky().and_then(Sticky::endpoint)
            && let Some(picked) = self.balancer.pick_session(endpoint, &self.tried, now)
        {
            self.tries += 1;
            return Ok(picked);
        }
        loop {
            let reason = match self.balancer.pick(self.key, &self.tried, now) {
                Ok(picked) => {
                    self.tries += 1;
                    return Ok(picked);
                }
                Err(reason) => reason,
            };
            let feed = self.balancer.backend().endpoints.feed.as_ref();
            let problem = feed.and_then(|feed| feed.problem());
            let why = match (reason, &problem) {
                (Unavailable::NoEndpoints, Some(problem)) => problem,
                (Unavailable::NoEndpoints, None) => {
                    "it has no endpoints: does the Service's selector match a workload?"
                }
                (Unavailable::NoneOnNode, _) => {
                    "it has no endpoint on this node, and is for clients on the same node \
                     (internalTrafficPolicy: Local)"
                }
                (Unavailable::NoneReady, _) => "none of its endpoints is ready",
                (Unavailable::AllEjected, _) => {
                    "the circuit is open: all of its endpoints are ejected after failures"
                }
            };
            let error = ProxyError::new(ErrorCode::NoEndpoint, format!("{}: {why}", self.place()));
            self.fall_back(worker, error)?;
        }
    }

    /// The session that the request's backend keeps, if it does.
    fn sticky(&self) -> Option<&Sticky> {
        self.session.as_deref().filter(|_| !self.on_fallback)
    }

    /// What a response tells the client of its session: nothing, nearly always.
    pub fn session_field(&self, endpoint: &EndpointInfo) -> Option<session::Given> {
        self.sticky()?.field(endpoint, session::now())
    }

    /// A try has failed: the pause before the next one, or `None` when there is none.
    /// `replayable` says that all that was sent is still there, `again` what the server says of it.
    #[allow(clippy::too_many_arguments)]
    pub fn failed(
        &mut self,
        worker: &Worker,
        address: SocketAddr,
        method: &[u8],
        grpc: bool,
        failure: Failure,
        replayable: bool,
        again: Option<Again>,
        now: Instant,
    ) -> Option<Duration> {
        let policy = self.route.policy.retry.as_deref();
        if !replayable || !retry::wanted(policy, method, grpc, failure, self.tries) {
            return None;
        }
        let least = match again {
            Some(Again::Never) => return None,
            // Others are asked meanwhile.
            Some(Again::After(_)) if self.has_others(address, now) => None,
            Some(Again::After(after)) => Some(after),
            None => None,
        };
        let pause = retry::backoff(policy, failure, self.tries, least, worker.random())?;
        let last = self.last_try.or(self.deadline);
        if last.is_some_and(|last| now + pause >= last) {
            return None;
        }
        // What was never processed cost the endpoint nothing: it does not draw on the budget.
        let free = matches!(failure, Failure::NeverProcessed);
        if let Some(budget) = &self.budget
            && !free
            && !budget.withdraw(now)
        {
            let backend = self.balancer.backend();
            worker.metrics.count(
                Counter::RetryBudgetExhausted,
                &[&backend.service, &backend.namespace],
            );
            self.spent = backend.policy.retry_constraint.is_some();
            return None;
        }
        self.tried.push(address);
        let backend = self.balancer.backend();
        worker.metrics.count(
            Counter::Retries,
            &[failure.name(), &backend.service, &backend.namespace],
        );
        Some(pause)
    }

    /// Whether the next try can go to an endpoint that has not been tried, is well and does not want
    /// to be left alone.
    fn has_others(&self, address: SocketAddr, now: Instant) -> bool {
        let tried = self.tried.iter().chain([&address]);
        self.balancer.has_others(tried, now)
    }

    /// The answer in place of a failed one that was not tried again because the backend's own
    /// budget is spent: 503, as RetryConstraint (GEP-3388) has it.
    pub fn spent(&self, answered: u16) -> Option<ProxyError> {
        self.spent.then(|| {
            let text = format!(
                "{}: the retry budget of its XBackendTrafficPolicy is spent; the last try was answered {answered}",
                self.place()
            );
            ProxyError::new(ErrorCode::LimitReached, text)
        })
    }

    /// When another endpoint is asked too, if this first one has not answered by then. Who stays with
    /// an endpoint has no other.
    pub fn hedge_after(&self, method: &[u8]) -> Option<Duration> {
        let after = self.route.policy.hedge_after?;
        let policy = self.route.policy.retry.as_deref()?;
        let first = self.tries == 1 && self.session.is_none();
        (first && retry::is_repeatable(policy, method)).then_some(after)
    }

    /// Chooses the endpoint that is asked beside `first`; `None`: there is no other, or the retry
    /// budget is spent.
    pub fn hedge(
        &mut self,
        worker: &Worker,
        first: SocketAddr,
        now: Instant,
    ) -> Option<Picked<Pools>> {
        let tried = [first];
        let picked = self.balancer.pick(self.key, &tried, now).ok()?;
        if picked.endpoint.info.address == first {
            return None;
        }
        let backend = self.balancer.backend();
        let labels = [&*backend.service, &*backend.namespace];
        if !self.budget.as_ref()?.withdraw(now) {
            worker.metrics.count(Counter::RetryBudgetExhausted, &labels);
            return None;
        }
        worker.metrics.count(Counter::Hedges, &labels);
        self.tries += 1;
        Some(picked)
    }

    /// Deadline of the current try, to the head of its response.
    pub fn try_deadline(&self, now: Instant) -> Option<Instant> {
        let per_try = self.route.policy.per_try_timeout.map(|t| now + t);
        match (per_try, self.deadline) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }
}

/// Chooses among a route's backends by weight.
pub fn choose_backend<'r>(
    worker: &Worker,
    route: &'r Arc<Route>,
) -> Result<(&'r Share, &'r Arc<Backend>), ProxyError> {
    let usable = |share: &'r Share| match &share.backend {
        Ok(backend) => Ok((share, backend)),
        Err(why) => Err(ProxyError::new(
            ErrorCode::InvalidRoute,
            format!("route {}: {why}", route.name),
        )),
    };
    if let [only] = &route.backends[..]
        && only.weight > 0
    {
        return usable(only);
    }
    if route.total_weight > 0 {
        let mut at = (worker.random() * f64::from(route.total_weight)) as u32;
        for share in &route.backends {
            if at < share.weight {
                return usable(share);
            }
            at -= share.weight;
        }
    }
    Err(ProxyError::new(
        ErrorCode::NoEndpoint,
        format!(
            "route {}: it has no backend with a weight above 0",
            route.name
        ),
    ))
}

/// Hash of what the backend's policy balances by.
fn hash_key<R: RequestView>(backend: &Backend, request: &R, peer: SocketAddr) -> Option<u64> {
    match backend.policy.hash_key.as_ref()? {
        HashKey::Header(name) => request.header(name).map(hash_bytes),
        HashKey::Cookie(name) => {
            let cookies = request.header("cookie")?;
            let value = cookies.split(|&b| b == b';').find_map(|pair| {
                let rest = pair.trim_ascii().strip_prefix(name.as_bytes())?;
                rest.strip_prefix(b"=")
            })?;
            Some(hash_bytes(value))
        }
        HashKey::SourceAddress => address_key(backend, peer),
    }
}

/// Hash of the source address, where the backend's policy balances by it.
pub fn address_key(backend: &Backend, peer: SocketAddr) -> Option<u64> {
    if backend.policy.hash_key != Some(HashKey::SourceAddress) {
        return None;
    }
    Some(match peer.ip() {
        std::net::IpAddr::V4(ip) => hash_bytes(&ip.octets()),
        std::net::IpAddr::V6(ip) => hash_bytes(&ip.octets()),
    })
}

/// What a response's status says of the endpoint.
pub fn outcome_of_status(status: u16) -> Outcome {
    match status {
        502..=504 => Outcome::GatewayError,
        500..=599 => Outcome::ServerError,
        _ => Outcome::Success,
    }
}

/// What a gRPC status code says of the endpoint.
pub fn outcome_of_grpc(code: u32) -> Outcome {
    match code {
        14 => Outcome::GatewayError,
        2 | 13 | 15 => Outcome::ServerError,
        _ => Outcome::Success,
    }
}
