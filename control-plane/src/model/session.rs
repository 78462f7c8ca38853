//! Session persistence (Gateway API, GEP-1619), of a route's rule or of a backend.

use weft_api::policy::Duration;

/// A client stays with the endpoint that its token names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionPersistence {
    /// Of the cookie or header; none: one that nobody else uses.
    pub name: Option<String>,
    /// In a header; else in a cookie.
    pub header: bool,
    /// Since the session began.
    pub absolute_timeout: Option<Duration>,
    /// Since its last request.
    pub idle_timeout: Option<Duration>,
    /// The cookie outlives the browser, for as long as the absolute timeout.
    pub permanent: bool,
}
