//! Where an authority is kept: named texts, changed together.
//!
//! One control plane with a data directory has it to itself ([`super::folder`]); replicas in a
//! cluster share a Secret ([`super::secret`]), which only the leader changes and all read.

use std::collections::BTreeMap;

use super::CaError;
use super::rotation::{Asked, Request};

/// Texts by name: `state.json`, `root-ID.crt.pem`, `root-ID.key.pem`, `root.pem`.
pub(super) type Files = BTreeMap<String, String>;

/// The roots trusted now, PEM.
pub(super) const BUNDLE: &str = "root.pem";

/// A store's content at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub(super) files: Files,
    /// Of the store's; changes with each write, whoever writes.
    pub(super) version: String,
    /// What operators have asked for, done or not.
    pub(super) asked: Asked,
}

/// What one write changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    pub(super) put: Vec<(String, String)>,
    pub(super) remove: Vec<String>,
}

impl Change {
    pub(super) fn creating(files: &Files) -> Self {
        Self {
            put: files.clone().into_iter().collect(),
            remove: Vec::new(),
        }
    }
}

#[tonic::async_trait]
pub trait Store: Send + Sync {
    /// Where a text is, for people.
    fn place(&self, name: &str) -> String;

    /// What is there now; `None` when no authority has been made.
    async fn load(&self) -> Result<Option<Snapshot>, CaError>;

    /// Writes the first content; returns its version.
    ///
    /// # Errors
    /// [`CaError::Changed`] when somebody else was first.
    async fn create(&self, files: &Files) -> Result<String, CaError>;

    /// Changes what is there, all of it or nothing; returns the new version.
    ///
    /// # Errors
    /// [`CaError::Changed`] when it is no longer the version `base`.
    async fn save(&self, base: &str, change: &Change) -> Result<String, CaError>;

    /// Takes a request that an operator has left beside the content.
    async fn take_request(&self) -> Result<Option<Request>, CaError> {
        Ok(None)
    }
}
