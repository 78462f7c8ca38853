//! `sessionPersistence` as it is written (GEP-1619), in a rule of a route or in an
//! XBackendTrafficPolicy.

use serde::Deserialize;
use weft_api::policy::Duration;

use super::convert::Refusals;
use super::filters::{NOT_TO_EDIT, is_token};
use super::types::Unknown;
use crate::model;

/// Longest name of a session (SessionPersistence SessionName).
const MAX_NAME: usize = 128;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SessionPersistence {
    session_name: Option<String>,
    absolute_timeout: Option<Duration>,
    idle_timeout: Option<Duration>,
    #[serde(rename = "type")]
    kind: Option<String>,
    cookie_config: Option<CookieConfig>,
    #[serde(flatten)]
    unknown: Unknown,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct CookieConfig {
    lifetime_type: Option<String>,
    #[serde(flatten)]
    unknown: Unknown,
}

impl SessionPersistence {
    pub(super) fn into_model(self, refusals: &mut Refusals) -> model::SessionPersistence {
        const AT: &str = "sessionPersistence";
        refusals.unknown(&self.unknown, "sessionPersistence: ");
        let header = match self.kind.as_deref() {
            None | Some("Cookie") => false,
            Some("Header") => true,
            Some(other) => {
                refusals.unsupported(format!("{AT}: type '{other}' is not known"));
                false
            }
        };
        if let Some(name) = &self.session_name {
            let lower = name.to_ascii_lowercase();
            let taken = header && (NOT_TO_EDIT.contains(&&*lower) || lower.contains("cookie"));
            if !is_token(name) || name.len() > MAX_NAME || taken {
                refusals.unsupported(format!(
                    "{AT}: '{name}' cannot be the name of a {}",
                    if header { "session's header" } else { "cookie" }
                ));
            }
        }
        let mut permanent = false;
        if let Some(cookie) = self.cookie_config {
            refusals.unknown(&cookie.unknown, "sessionPersistence: cookieConfig: ");
            permanent = match cookie.lifetime_type.as_deref() {
                None | Some("Session") => false,
                Some("Permanent") => true,
                Some(other) => {
                    refusals.unsupported(format!("{AT}: lifetimeType '{other}' is not known"));
                    false
                }
            };
            if header {
                refusals.unsupported(format!("{AT}: cookieConfig is for the type Cookie"));
            }
        }
        let some = |given: Option<Duration>| given.filter(|timeout| !timeout.is_zero());
        let absolute_timeout = some(self.absolute_timeout);
        if permanent && absolute_timeout.is_none() {
            refusals.unsupported(format!(
                "{AT}: lifetimeType Permanent needs an absoluteTimeout"
            ));
        }
        model::SessionPersistence {
            name: self.session_name,
            header,
            absolute_timeout,
            idle_timeout: some(self.idle_timeout),
            permanent,
        }
    }
}
