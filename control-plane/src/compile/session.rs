//! Session persistence (GEP-1619).

use weft_api::policy::Duration;
use weft_api::proto;

use crate::model::{Route, Service, SessionPersistence};

/// As a rule of a route asks for it (`by_path`: its cookie is for the rule's path), or a policy of
/// a backend. A session without a name gets one of its route's from the proxy.
pub(super) fn compile(given: &SessionPersistence, by_path: bool) -> proto::SessionPersistence {
    let millis = |given: Option<Duration>| given.map_or(0, Duration::as_millis);
    proto::SessionPersistence {
        name: given.name.clone().unwrap_or_default(),
        header: given.header,
        absolute_timeout_ms: millis(given.absolute_timeout),
        idle_timeout_ms: millis(given.idle_timeout),
        permanent: given.permanent,
        by_path: by_path && !given.header,
    }
}

/// Whether a route cannot hold for a Service because both say where a client stays (GEP-1619,
/// "Session Affinity in K8S Services": the route must be rejected).
pub(super) fn excluded(service: &Service, route: &Route) -> bool {
    service.client_affinity && route.rules.iter().any(|rule| rule.session.is_some())
}
