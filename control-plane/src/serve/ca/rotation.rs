//! The states of a root rotation, and when it moves on. Each state is in the store before it
//! holds, so a restart, or another leader, goes on where it was.
//!
//! ```text
//!            rotate                      all proxies acknowledged the
//!                                        new root, or ANNOUNCE_AT_MOST
//!   Stable ----------> Announcing ------------------------------------> Draining
//!   one root           two trusted,      (at once with --finish)        two trusted,
//!     ^                the old signs                                    the new signs
//!     |                                                                    |
//!     +--------------------------------------------------------------------+
//!          every certificate of the old root has expired, or every workload
//!          with a proxy is seen to have one of the new root (or at once with
//!          --finish): the old root is dropped
//! ```
//!
//! The control plane's own certificate is signed by the oldest trusted root throughout, so a proxy
//! that was away during the announcement can still connect and hear of the new root.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::{CaError, unix};

pub(super) const STATE_FILE: &str = "state.json";
/// The announcement lasts at least this long: proxies that are just connecting are not counted.
pub const ANNOUNCE_AT_LEAST: Duration = Duration::from_secs(5);
/// And with replicas: a proxy that is between two of them comes back within 15 s, the longest wait
/// of its backoff.
pub const ANNOUNCE_AT_LEAST_REPLICATED: Duration = Duration::from_secs(16);
/// And at most this long, for proxies that never acknowledge.
const ANNOUNCE_AT_MOST: Duration = Duration::from_secs(600);
/// A certificate is taken for expired only this long after its end: for clocks that are behind, and
/// replicas that hear of the new root a little later than the leader.
const SKEW_SECS: u64 = 30;
/// All certificates have been seen to hang on the new root for this long before the old one is
/// dropped: longer than it takes to notice that a connection is dead.
const MOVED_FOR: Duration = Duration::from_secs(30);

/// What the authority keeps about itself.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
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
    /// When the last of the leaves has expired that were signed with a longer lifetime than that,
    /// before it was shortened; seconds since the Unix epoch.
    #[serde(default)]
    pub(super) longer_leaves_expire: u64,
    /// Key of the tokens by which sessions stay with an endpoint: hexadecimal, the same for as long
    /// as the authority is kept, whatever its roots. Empty in one that is older than sessions.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) session_key: String,
    /// Requests taken up already, as they were asked for.
    #[serde(default, skip_serializing_if = "Asked::is_empty")]
    pub(super) done: Asked,
}

/// Requests of operators by when they were asked, or whatever tells one from the next.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Asked {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) rotate: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) finish: Option<String>,
}

impl Asked {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What was asked for and is not done.
    pub(super) fn open(&self, done: &Self) -> Option<Request> {
        if self.rotate.is_some() && self.rotate != done.rotate {
            return Some(Request::Rotate);
        }
        (self.finish.is_some() && self.finish != done.finish).then_some(Request::Finish)
    }

    /// Takes over what was asked for.
    pub(super) fn mark(&mut self, request: Request, asked: &Self) {
        match request {
            Request::Rotate => self.rotate.clone_from(&asked.rotate),
            Request::Finish => self.finish.clone_from(&asked.finish),
        }
    }
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

/// How far the proxies are, as far as is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moving {
    /// Every connected proxy has acknowledged the roots of now.
    pub all_trust: bool,
    /// Every workload that has a proxy is connected with a certificate of the newest root, and has
    /// been for this long; none when one has not, or may not have.
    pub all_moved_for: Option<Duration>,
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
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Rotate => "rotate",
            Self::Finish => "finish",
        }
    }

    pub(super) fn named(name: &str) -> Option<Self> {
        match name {
            "rotate" => Some(Self::Rotate),
            "finish" => Some(Self::Finish),
            _ => None,
        }
    }
}

impl std::fmt::Debug for State {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("roots", &self.roots)
            .field("signing", &self.signing)
            .field("phase", &self.phase)
            .finish_non_exhaustive()
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
            longer_leaves_expire: 0,
            session_key: String::new(),
            done: Asked::default(),
        }
    }

    /// Reads it from text.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let state: Self = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if state.version != 1 || state.roots.is_empty() || !state.roots.contains(&state.signing) {
            return Err("it names no usable root".to_owned());
        }
        Ok(state)
    }

    pub(super) fn to_text(&self) -> Result<String, CaError> {
        serde_json::to_string_pretty(self).map_err(|_| CaError::Crypto)
    }

    /// Remembers a request that is done with this state.
    pub(super) fn mark(&mut self, done: Option<(Request, Asked)>) {
        if let Some((request, asked)) = done {
            self.done.mark(request, &asked);
        }
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
            old_leaves_expire: self.leaves_expire(now) + SKEW_SECS,
        };
    }

    /// When the last leaf signed until now has expired.
    fn leaves_expire(&self, now: SystemTime) -> u64 {
        self.longer_leaves_expire
            .max(unix(now) + self.longest_lifetime_secs)
    }

    /// From now on leaves live this long.
    pub(super) fn set_lifetime(&mut self, lifetime: Duration, now: SystemTime) {
        self.longer_leaves_expire = self.leaves_expire(now);
        self.longest_lifetime_secs = lifetime.as_secs();
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
    pub(super) fn next(
        &self,
        proxies: Moving,
        announce_at_least: Duration,
        now: SystemTime,
    ) -> Option<Next> {
        let now = unix(now);
        match self.phase {
            Phase::Stable => None,
            Phase::Announcing { since } => {
                let lasted = Duration::from_secs(now.saturating_sub(since));
                let done = proxies.all_trust && lasted >= announce_at_least;
                (done || lasted >= ANNOUNCE_AT_MOST).then_some(Next::Sign)
            }
            Phase::Draining { old_leaves_expire } => {
                let moved = proxies.all_moved_for.is_some_and(|long| long >= MOVED_FOR);
                (moved || now >= old_leaves_expire).then_some(Next::Finish)
            }
        }
    }
}
