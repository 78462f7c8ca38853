//! Endpoints near by.

use serde::{Deserialize, Serialize};

use super::percent::Percent;

/// Requests stay in the caller's own zone while enough of the Service is well there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ZonePreference {
    /// What the well endpoints of the zone must be able to take, percent of an equal part of the
    /// Service for each of its zones; with less the requests go to all zones. Default 70; 0 is
    /// content with any endpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<Percent>,
}
