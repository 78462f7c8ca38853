//! The states of a root rotation, and when it moves on. Each state is on disk before it holds, so
//! a restart goes on where it was.
//!
//! ```text
//!            rotate                      all proxies acknowledged the
//!                                        new root, or TRUST_TIMEOUT
//!   Stable ----------> Announcing ------------------------------------> Draining
//!   one root           two trusted,      (at once with --finish)        two trusted,
//!     ^                the old signs                                    the new signs
//!     |                                                                    |
//!     +--------------------------------------------------------------------+
//!          every certificate of the old root has been renewed or has
//!          expired (or at once with --finish): the old root is dropped
//! ```
//!
//! The control plane's own certificate is signed by the oldest trusted root throughout, so a proxy
//! that was away during the announcement can still connect and hear of the new root.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::store::Store;
use super::{CaError, unix};

const STATE_FILE: &str = "state.json";
const REQUEST_FILE: &str = "rotation-request";
/// The announcement lasts at least this long: proxies that are just connecting are not counted.
const ANNOUNCE_AT_LEAST: Duration = Duration::from_secs(5);
/// And at most this long, for proxies that never acknowledge.
const ANNOUNCE_AT_MOST: Duration = Duration::from_secs(600);
/// A certificate is taken for expired only this long after its end, for clocks that are behind.
const SKEW_SECS: u64 = 60;

/// What the authority keeps about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct State {
    /// Of this file's format.
    version: u32,
    /// Ids of the roots trusted now, oldest first.
    pub(super) roots: Vec<String>,
    /// Id of the root that signs.
    pub(super) signing: String,
    pub(super) phase: Phase,
    /// Longest lifetime that leaves of today may have, seconds.
    #[serde(default)]
    pub(super) longest_lifetime_secs: u64,
}

/// Where a rotation is. Times are seconds since the Unix epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "name")]
pub enum Phase {
    Stable,
    Announcing { since: u64 },
    Draining { old_leaves_expire: u64 },
}

impl Phase {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Stable => "stable",
            Self::Announcing { .. } => "announcing",
            Self::Draining { .. } => "draining",
        }
    }
}

/// What an operator asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Begin a rotation.
    Rotate,
    /// End the one under way now, whoever still has a certificate of the old root.
    Finish,
}

/// What a rotation does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Sign,
    Finish,
}

/// Whether a request makes sense now.
pub(super) fn allowed(phase: &Phase, request: Request) -> Result<(), CaError> {
    match (request, phase) {
        (Request::Rotate, Phase::Stable) | (Request::Finish, _) => Ok(()),
        (Request::Rotate, phase) => Err(CaError::Rotating(phase.name())),
    }
}

impl Request {
    pub(super) fn save(self, store: &Store) -> Result<(), CaError> {
        let text = match self {
            Self::Rotate => "rotate\n",
            Self::Finish => "finish\n",
        };
        store.write(REQUEST_FILE, text.as_bytes())
    }

    /// Reads and removes a request.
    pub(super) fn take(store: &Store) -> Result<Option<Self>, CaError> {
        let Some(text) = store.read(REQUEST_FILE)? else {
            return Ok(None);
        };
        store.remove(REQUEST_FILE)?;
        Ok(match text.trim() {
            "rotate" => Some(Self::Rotate),
            "finish" => Some(Self::Finish),
            _ => None,
        })
    }
}

impl State {
    pub(super) fn first(root: &str) -> Self {
        Self {
            version: 1,
            roots: vec![root.to_owned()],
            signing: root.to_owned(),
            phase: Phase::Stable,
            longest_lifetime_secs: 0,
        }
    }

    pub(super) fn load(store: &Store) -> Result<Option<Self>, CaError> {
        let Some(text) = store.read(STATE_FILE)? else {
            return Ok(None);
        };
        let damaged = |reason: String| CaError::Damaged {
            path: store.path(STATE_FILE),
            reason,
        };
        let state: Self =
            serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))?;
        if state.version != 1 || state.roots.is_empty() || !state.roots.contains(&state.signing) {
            return Err(damaged("it names no usable root".to_owned()));
        }
        Ok(Some(state))
    }

    pub(super) fn save(&self, store: &Store) -> Result<(), CaError> {
        let text = serde_json::to_vec_pretty(self).map_err(|_| CaError::Crypto)?;
        store.write(STATE_FILE, &text)
    }

    /// Stable -> Announcing.
    pub(super) fn begin(&mut self, root: &str, now: SystemTime) {
        self.roots.push(root.to_owned());
        self.phase = Phase::Announcing { since: unix(now) };
    }

    /// Announcing -> Draining.
    pub(super) fn sign_with_new(&mut self, now: SystemTime) {
        if let Some(newest) = self.roots.last() {
            self.signing.clone_from(newest);
        }
        self.phase = Phase::Draining {
            old_leaves_expire: unix(now) + self.longest_lifetime_secs + SKEW_SECS,
        };
    }

    /// Any -> Stable; returns the roots that are no longer trusted.
    pub(super) fn finish(&mut self) -> Vec<String> {
        let Some(newest) = self.roots.pop() else {
            return Vec::new();
        };
        let dropped = std::mem::replace(&mut self.roots, vec![newest.clone()]);
        self.signing = newest;
        self.phase = Phase::Stable;
        dropped
    }

    /// What is due.
    pub(super) fn next(&self, all_trust: bool, now: SystemTime) -> Option<Next> {
        let now = unix(now);
        match self.phase {
            Phase::Stable => None,
            Phase::Announcing { since } => {
                let lasted = Duration::from_secs(now.saturating_sub(since));
                let done = all_trust && lasted >= ANNOUNCE_AT_LEAST;
                (done || lasted >= ANNOUNCE_AT_MOST).then_some(Next::Sign)
            }
            Phase::Draining { old_leaves_expire } => {
                (now >= old_leaves_expire).then_some(Next::Finish)
            }
        }
    }
}
