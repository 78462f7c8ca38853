//! Which endpoint gets a request: balancing, outlier ejection, concurrency limits, retry budgets.
//!
//! A worker has a [`Balancer`] for each backend, of its own and without locks (`balancer`). It
//! asks for a [`RequestPermit`] (`limits`), then for an endpoint: the candidates are those that
//! are ready and not ejected (`view`), chosen by the policy's algorithm (`choose`, `hash`)
//! over what the worker has measured (`ewma`). What the try came to goes back through
//! [`Picked::observe`] into the measurements and into the endpoint's [`EndpointHealth`], which all
//! workers share (`health`, with the states and the ways between them in `circuit`).
//! [`RetryBudget`] says whether a failed try may be followed by another (`budget`).
//!
//! Everything takes the time from its caller, so tests need not sleep.

mod balancer;
mod budget;
mod choose;
mod circuit;
mod clock;
mod ewma;
mod hash;
mod health;
mod limits;
mod view;

pub use balancer::{Balancer, Endpoint, EndpointStatus, Picked};
pub use budget::RetryBudget;
pub use hash::hash_bytes;
pub use health::{EndpointHealth, HealthState};
pub use limits::{ConnectionPermit, LimitsInUse, RequestPermit, SharedLimits};

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
    /// It is for clients on the same node, and has no endpoint on this one.
    NoneOnNode,
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

#[cfg(test)]
mod tests;
