//! Where the credentials of the moment are found.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwapOption, Guard};
use tokio::sync::watch;

use super::credentials::{Credentials, CredentialsError};
use super::trust::TrustBundle;

/// Shared by workers, renewal and discovery; cheap to clone. Reading takes no lock.
#[derive(Debug, Clone)]
pub struct Handle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    current: ArcSwapOption<Credentials>,
    /// Held while a replacement is put together, so that a renewal and a trust push do not undo
    /// each other; never on a connection's way.
    replacing: Mutex<()>,
    generation: watch::Sender<u64>,
}

impl Default for Handle {
    fn default() -> Self {
        Self::new()
    }
}

impl Handle {
    /// Nothing in it yet.
    pub fn new() -> Self {
        Self(Arc::new(Shared {
            current: ArcSwapOption::empty(),
            replacing: Mutex::new(()),
            generation: watch::Sender::new(0),
        }))
    }

    /// The credentials now, without counting a reference.
    pub fn load(&self) -> Guard<Option<Arc<Credentials>>> {
        self.0.current.load()
    }

    /// The credentials now.
    pub fn get(&self) -> Option<Arc<Credentials>> {
        self.0.current.load_full()
    }

    /// Generation of the credentials in place; 0 before the first.
    pub fn generation(&self) -> u64 {
        *self.0.generation.borrow()
    }

    /// Life left of the certificate in use; `None` before the first, zero once expired.
    pub fn remaining(&self) -> Option<Duration> {
        self.load().as_ref().map(|c| c.remaining())
    }

    /// Tells of every replacement; the value is the generation.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.0.generation.subscribe()
    }

    /// Replaces the credentials by what `make` builds from the current ones and the next
    /// generation.
    pub(crate) fn replace(
        &self,
        make: impl FnOnce(Option<&Arc<Credentials>>, u64) -> Result<Credentials, CredentialsError>,
    ) -> Result<Arc<Credentials>, CredentialsError> {
        let _replacing = self
            .0
            .replacing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let generation = self.generation() + 1;
        let next = Arc::new(make(self.get().as_ref(), generation)?);
        self.0.current.store(Some(next.clone()));
        self.0.generation.send_replace(generation);
        Ok(next)
    }

    /// Puts credentials in place, as a test or a tool has them.
    pub fn set(&self, mut credentials: Credentials) {
        let result = self.replace(|_, generation| {
            credentials.generation = generation;
            Ok(credentials)
        });
        debug_assert!(result.is_ok());
    }

    /// New roots from the control plane: the configurations are built anew, the certificate
    /// stays. Without a certificate there is nothing to rebuild, and roots come with the first.
    pub fn set_trust(&self, trust: TrustBundle) -> Result<(), CredentialsError> {
        let trust = Arc::new(trust);
        match self.get() {
            Some(now) if *now.trust() != trust => self
                .replace(|current, generation| match current {
                    Some(current) => current.with_trust(trust, generation),
                    None => now.with_trust(trust, generation),
                })
                .map(|_| ()),
            _ => Ok(()),
        }
    }
}
