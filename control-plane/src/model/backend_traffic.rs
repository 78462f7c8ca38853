//! Policies of backends (Gateway API, XBackendTrafficPolicy).

use weft_api::policy::Duration;

use super::{Name, ParentRef, SessionPersistence};

/// What holds for requests to Services, whatever their route.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BackendTraffic {
    pub name: Name,
    /// RFC 3339; empty when not known.
    pub created: String,
    /// Services of its own namespace, as they were written.
    pub targets: Vec<ParentRef>,
    pub session: Option<SessionPersistence>,
    pub retry: Option<RetryConstraint>,
    /// What it says that cannot be honoured: then none of it is.
    pub refused: Vec<String>,
}

/// How many retries a backend gets (GEP-3388).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryConstraint {
    /// Share of the requests of the last `interval`, percent.
    pub percent: u32,
    pub interval: Duration,
    /// And in any case this many each `min_interval`.
    pub min_count: u32,
    pub min_interval: Duration,
}

impl BackendTraffic {
    /// Which of two policies for the same target is used: the oldest, then the first by name (those
    /// without a time last).
    pub fn precedence(&self) -> (bool, &str, &Name) {
        (self.created.is_empty(), &self.created, &self.name)
    }

    /// The Services that it is for.
    pub fn services(&self) -> impl Iterator<Item = Name> {
        let services = self.targets.iter().filter(|target| target.is_service());
        services.map(|target| Name::new(self.name.namespace.as_str(), target.name.as_str()))
    }

    /// Whether it can be used, and is for a Service.
    pub fn holds_for(&self, service: &Name) -> bool {
        self.refused.is_empty() && self.services().any(|name| name == *service)
    }
}
