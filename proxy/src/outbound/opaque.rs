//! Opaque connections: an endpoint is chosen once, then bytes are copied.

use std::time::{Duration, Instant};

use super::{OPAQUE, code_of, connect};
use crate::balance::{ConnectionPermit, LimitReached, Outcome, Picked, Unavailable};
use crate::http::ErrorCode;
use crate::http::flow::Flow;
use crate::tables::{Destination, Fallback};
use crate::transport::{ConnectError, Stream};
use crate::worker::{Pools, Worker};

/// Endpoints that are tried before the client is refused. Nothing was sent, so it is safe.
const TRIES: usize = 3;

/// A connection to an endpoint, with what is held while it is open.
pub struct Upstream {
    pub stream: Stream,
    pub picked: Picked<Pools>,
    pub idle_timeout: Option<Duration>,
    pub permit: ConnectionPermit,
}

impl AsMut<Stream> for Upstream {
    fn as_mut(&mut self) -> &mut Stream {
        &mut self.stream
    }
}

impl From<Upstream> for Stream {
    fn from(upstream: Upstream) -> Self {
        upstream.stream
    }
}

/// Why there is no connection to an endpoint.
#[derive(Debug, thiserror::Error)]
pub enum Unopened {
    #[error("the destination has no route with a backend")]
    NoRoute,
    #[error("{}", match .0 {
        Unavailable::NoEndpoints => "the backend has no endpoints",
        Unavailable::NoneOnNode => "the backend has no endpoint on this node, and is for clients on the same node (internalTrafficPolicy: Local)",
        Unavailable::NoneReady => "none of the backend's endpoints is ready",
        Unavailable::AllEjected => "all of the backend's endpoints are ejected after failures",
    })]
    Unavailable(Unavailable),
    #[error("the circuit is open: maxConnections of the TrafficPolicy is reached")]
    Limit(LimitReached),
    #[error(transparent)]
    Connect(#[from] ConnectError),
}

impl Unopened {
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::NoRoute => ErrorCode::NoRoute,
            Self::Unavailable(_) => ErrorCode::NoEndpoint,
            Self::Limit(_) => ErrorCode::LimitReached,
            Self::Connect(error) => code_of(error),
        }
    }
}

impl Upstream {
    /// Chooses an endpoint of the route that the connection takes (`server_name` is its SNI) and
    /// connects to it; another one if that fails.
    pub async fn open(
        worker: &Worker,
        flow: &Flow,
        destination: &Destination,
        server_name: Option<&str>,
    ) -> Result<Self, Unopened> {
        let route = match &destination.opaque[..] {
            [] => destination.routes.first(),
            opaque => opaque
                .iter()
                .find(|opaque| opaque.takes(server_name))
                .map(|opaque| &opaque.route),
        };
        let route = route.ok_or(Unopened::NoRoute)?;
        if route.refused.is_some() {
            return Err(Unopened::NoRoute);
        }
        let (_, backend) =
            crate::http::call::choose_backend(worker, route).map_err(|_| Unopened::NoRoute)?;
        let opened = Self::open_backend(worker, flow, backend, route.policy.idle_timeout).await;
        match (opened, route.policy.fallback.as_deref()) {
            (Err(_), Some(Fallback::Backend(other))) => {
                Self::open_backend(worker, flow, other, route.policy.idle_timeout).await
            }
            (opened, _) => opened,
        }
    }

    async fn open_backend(
        worker: &Worker,
        flow: &Flow,
        backend: &std::sync::Arc<crate::tables::Backend>,
        idle_timeout: Option<Duration>,
    ) -> Result<Self, Unopened> {
        let balancer = worker.balancer(backend);
        let key = crate::http::call::address_key(backend, flow.peer);
        let mut tried = Vec::new();
        loop {
            let mut picked = balancer
                .pick(key, &tried, Instant::now())
                .map_err(Unopened::Unavailable)?;
            let permit = balancer.connection_permit().map_err(Unopened::Limit)?;
            let info = picked.endpoint.info.clone();
            match connect::connect(worker, &info, &backend.policy, OPAQUE).await {
                Ok(stream) => {
                    picked.observe(Outcome::Success, Instant::now());
                    return Ok(Self {
                        stream,
                        picked,
                        idle_timeout,
                        permit,
                    });
                }
                Err(error) => {
                    if error.is_endpoints() {
                        picked.observe(Outcome::ConnectFailure, Instant::now());
                    }
                    tried.push(info.address);
                    if tried.len() == TRIES {
                        return Err(error.into());
                    }
                }
            }
        }
    }
}
