//! The certificate authority: its roots and keys on disk, the leaves it signs, the tokens it
//! issues and checks, and the change from one root to the next.
//!
//! - [`Authority`]: all of it, behind one lock.
//! - [`store`]: files, written so that a crash leaves the old or the new one.
//! - [`root`]: roots and leaves as X.509.
//! - [`csr`]: the one thing taken from a signing request, its public key.
//! - [`token`]: who a workload is, before it has a certificate.
//! - [`rotation`]: the states of a root rotation.

mod csr;
mod root;
mod rotation;
mod store;
mod token;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde::Serialize;
use tokio::sync::watch;
use tracing::info;
use weft_api::identity::{InvalidSpiffeId, SpiffeId};
use weft_api::proto::Trust;

pub use csr::InvalidCsr;
pub use root::Issued;
pub use rotation::{Phase, Request};
pub use token::{Claims, InvalidToken};

use root::Root;
use rotation::State;
use store::Store;
use token::TokenKey;

/// How long a leaf lives when nothing else is said.
pub const DEFAULT_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Shortest lifetime that leaves time for a renewal.
pub const MIN_LIFETIME: Duration = Duration::from_secs(60);
/// How long a token is valid when nothing else is said.
pub const DEFAULT_TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Why the authority cannot do something.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error("{action} {path}: {source}")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(
        "{path} is damaged: {reason}; restore it, or remove the whole data directory to begin with a new certificate authority"
    )]
    Damaged { path: PathBuf, reason: String },
    #[error(
        "another control plane already uses {0}; stop it, or give this one its own data directory"
    )]
    InUse(PathBuf),
    #[error("signing failed: {0}")]
    Signing(#[from] rcgen::Error),
    #[error("the cryptographic library failed")]
    Crypto,
    #[error(transparent)]
    Identity(#[from] InvalidSpiffeId),
    #[error("a root rotation is already under way ({0}); it ends by itself, or now with --finish")]
    Rotating(&'static str),
    #[error("the certificate lifetime {0:?} is below one minute, too short to be renewed in time")]
    Lifetime(Duration),
}

/// Why a certificate was not issued.
#[derive(Debug, thiserror::Error)]
pub enum CertifyError {
    #[error("the token is not accepted: {0}")]
    Token(#[from] InvalidToken),
    #[error("the signing request is not accepted: {0}")]
    Csr(#[from] InvalidCsr),
    #[error(transparent)]
    Ca(#[from] CaError),
}

/// How an authority behaves.
#[derive(Clone, Debug)]
pub struct Options {
    pub trust_domain: String,
    /// Of leaves.
    pub lifetime: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            trust_domain: weft_api::names::DEFAULT_TRUST_DOMAIN.to_owned(),
            lifetime: DEFAULT_LIFETIME,
        }
    }
}

/// The certificate authority.
pub struct Authority {
    options: Options,
    store: Store,
    token_key: TokenKey,
    inner: Mutex<Inner>,
    /// Counts changes of the roots.
    changed: watch::Sender<u64>,
}

struct Inner {
    state: State,
    /// In the order of `state.roots`.
    roots: Vec<Root>,
}

/// The authority as `/status` shows it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    pub trust_domain: String,
    pub phase: &'static str,
    /// Oldest first.
    pub roots: Vec<RootStatus>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RootStatus {
    pub id: String,
    /// Seconds since the Unix epoch.
    pub not_after: u64,
    /// Signs new workload certificates.
    pub signing: bool,
}

impl Authority {
    /// Opens the authority in `data_dir`; the first time, makes it.
    ///
    /// # Errors
    /// The files cannot be read or written, or are damaged.
    pub fn open(data_dir: &Path, options: Options) -> Result<Self, CaError> {
        if options.lifetime < MIN_LIFETIME {
            return Err(CaError::Lifetime(options.lifetime));
        }
        let store = Store::open(data_dir)?;
        let _creating = store.lock_for_change()?;
        let token_key = TokenKey::open(&store)?;
        let (mut state, roots) = match State::load(&store)? {
            Some(state) => {
                let roots = state
                    .roots
                    .iter()
                    .map(|id| Root::load(&store, id))
                    .collect::<Result<Vec<_>, _>>()?;
                (state, roots)
            }
            None => {
                let root = Root::create(&store, &options.trust_domain, SystemTime::now())?;
                info!(
                    root = root.id,
                    "made a new certificate authority in {}",
                    data_dir.display()
                );
                (State::first(&root.id), vec![root])
            }
        };
        state.longest_lifetime_secs = state.longest_lifetime_secs.max(options.lifetime.as_secs());
        state.save(&store)?;
        let authority = Self {
            options,
            token_key,
            inner: Mutex::new(Inner { state, roots }),
            changed: watch::Sender::new(0),
            store,
        };
        authority.write_bundle()?;
        Ok(authority)
    }

    /// Takes the data directory for one running control plane; until the result is dropped.
    ///
    /// # Errors
    /// Another one has it.
    pub fn lock(&self) -> Result<std::fs::File, CaError> {
        self.store.lock_for_serving()
    }

    /// Signs a certificate for whom the token names and the key the request holds.
    ///
    /// # Errors
    /// The token or the request is not accepted, or signing fails.
    pub fn certify(
        &self,
        csr: &[u8],
        token: &str,
        now: SystemTime,
    ) -> Result<(Issued, Claims), CertifyError> {
        let claims = self
            .token_key
            .check(token, &self.options.trust_domain, now)?;
        let identity = SpiffeId::new(
            &self.options.trust_domain,
            &claims.namespace,
            &claims.service_account,
        )
        .map_err(CaError::from)?;
        let key = csr::public_key(csr)?;
        let inner = self.inner();
        let root = inner.signing();
        let issued = root.sign(&key, &identity, self.options.lifetime, now)?;
        Ok((issued, claims))
    }

    /// A certificate and its key for the control plane itself. It is signed by the oldest root
    /// that is trusted, so that a proxy that has not heard of a new one yet still gets through.
    ///
    /// # Errors
    /// Signing fails.
    pub fn own_certificate(&self, now: SystemTime) -> Result<(Issued, rcgen::KeyPair), CaError> {
        use weft_api::names::{CONTROL_PLANE_NAMESPACE, CONTROL_PLANE_SERVICE_ACCOUNT};
        let identity = SpiffeId::new(
            &self.options.trust_domain,
            CONTROL_PLANE_NAMESPACE,
            CONTROL_PLANE_SERVICE_ACCOUNT,
        )?;
        let key = rcgen::KeyPair::generate()?;
        let inner = self.inner();
        let issued = inner
            .oldest()
            .sign(&key, &identity, self.options.lifetime, now)?;
        Ok((issued, key))
    }

    /// A certificate and its key for a server of the control plane's that is verified by these DNS
    /// names: the webhook. Signed as [`Self::own_certificate`] is.
    ///
    /// # Errors
    /// Signing fails.
    pub fn server_certificate(
        &self,
        names: &[String],
        now: SystemTime,
    ) -> Result<(Issued, rcgen::KeyPair), CaError> {
        let key = rcgen::KeyPair::generate()?;
        let inner = self.inner();
        let issued = inner
            .oldest()
            .sign_server(&key, names, self.options.lifetime, now)?;
        Ok((issued, key))
    }

    /// Issues a workload token.
    ///
    /// # Errors
    /// The names cannot be an identity, or signing fails.
    pub fn issue_token(
        &self,
        namespace: &str,
        service_account: &str,
        workload: Option<&str>,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<String, CaError> {
        SpiffeId::new(&self.options.trust_domain, namespace, service_account)?;
        let claims = Claims {
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
            workload: workload.map(str::to_owned),
        };
        self.token_key
            .issue(&claims, &self.options.trust_domain, lifetime, now)
    }

    /// The roots trusted now, as proxies are told.
    pub fn trust(&self) -> Trust {
        Trust {
            trust_domain: self.options.trust_domain.clone(),
            roots: self.roots(),
        }
    }

    /// The roots trusted now, DER, oldest first.
    pub fn roots(&self) -> Vec<Vec<u8>> {
        self.inner()
            .roots
            .iter()
            .map(|root| root.der.to_vec())
            .collect()
    }

    /// The roots trusted now, PEM.
    pub fn bundle(&self) -> String {
        self.inner()
            .roots
            .iter()
            .map(|root| root.pem.as_str())
            .collect()
    }

    pub fn trust_domain(&self) -> &str {
        &self.options.trust_domain
    }

    /// Lifetime of leaves.
    pub fn lifetime(&self) -> Duration {
        self.options.lifetime
    }

    /// Fires when the roots or the signing root change.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub fn status(&self) -> Status {
        let inner = self.inner();
        let signing = inner.signing().id.clone();
        Status {
            trust_domain: self.options.trust_domain.clone(),
            phase: inner.state.phase.name(),
            roots: inner
                .roots
                .iter()
                .map(|root| RootStatus {
                    id: root.id.clone(),
                    not_after: root.not_after,
                    signing: root.id == signing,
                })
                .collect(),
        }
    }

    /// Asks for a rotation step from outside the running control plane, which takes it up within
    /// seconds, or at its next start.
    ///
    /// # Errors
    /// The data directory cannot be written, or another rotation is under way.
    pub fn request(&self, request: Request) -> Result<(), CaError> {
        let phase = self.inner().state.phase.clone();
        rotation::allowed(&phase, request)?;
        request.save(&self.store)
    }

    /// Takes up a rotation step at once.
    ///
    /// # Errors
    /// Another rotation is under way, or the data directory cannot be written.
    pub fn step(&self, request: Request, now: SystemTime) -> Result<(), CaError> {
        let mut inner = self.inner();
        rotation::allowed(&inner.state.phase, request)?;
        match request {
            Request::Rotate => {
                let root = Root::create(&self.store, &self.options.trust_domain, now)?;
                info!(
                    root = root.id,
                    "root rotation: the new root is being made known"
                );
                let mut state = inner.state.clone();
                state.begin(&root.id, now);
                state.save(&self.store)?;
                inner.state = state;
                inner.roots.push(root);
            }
            Request::Finish => self.finish(&mut inner)?,
        }
        drop(inner);
        self.announce()
    }

    /// Moves a rotation on when its time has come. `all_trust`: every connected proxy has
    /// acknowledged the roots of now.
    ///
    /// # Errors
    /// The data directory cannot be written.
    pub fn tick(&self, all_trust: bool, now: SystemTime) -> Result<(), CaError> {
        if let Some(request) = Request::take(&self.store)? {
            match self.step(request, now) {
                Err(CaError::Rotating(phase)) => info!(phase, "root rotation asked for twice"),
                other => return other,
            }
        }
        let mut inner = self.inner();
        match inner.state.next(all_trust, now) {
            None => return Ok(()),
            Some(rotation::Next::Sign) => {
                let mut state = inner.state.clone();
                state.sign_with_new(now);
                state.save(&self.store)?;
                info!("root rotation: new certificates are signed by the new root");
                inner.state = state;
            }
            Some(rotation::Next::Finish) => self.finish(&mut inner)?,
        }
        drop(inner);
        self.announce()
    }

    fn finish(&self, inner: &mut Inner) -> Result<(), CaError> {
        let mut state = inner.state.clone();
        let dropped = state.finish();
        state.save(&self.store)?;
        inner.state = state;
        inner.roots.retain(|root| !dropped.contains(&root.id));
        for id in &dropped {
            info!(
                root = id,
                "root rotation: the old root is no longer trusted"
            );
            Root::remove(&self.store, id);
        }
        Ok(())
    }

    fn announce(&self) -> Result<(), CaError> {
        self.write_bundle()?;
        self.changed.send_modify(|count| *count += 1);
        Ok(())
    }

    /// Keeps `root.pem` beside the state for whoever starts proxies.
    fn write_bundle(&self) -> Result<(), CaError> {
        self.store.write(store::BUNDLE, self.bundle().as_bytes())
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A panic while it was held cannot have left it half-changed: state and roots are
        // replaced whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn oldest(&self) -> &Root {
        &self.roots[0]
    }

    fn signing(&self) -> &Root {
        let signing = &self.state.signing;
        self.roots
            .iter()
            .find(|root| root.id == *signing)
            .unwrap_or(&self.roots[0])
    }
}

/// Seconds since the Unix epoch.
pub(crate) fn unix(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;
