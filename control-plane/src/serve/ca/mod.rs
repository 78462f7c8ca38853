//! The certificate authority: its roots and keys, the leaves it signs, the tokens it issues and
//! checks, and the change from one root to the next.
//!
//! - [`Authority`]: all of it. Reading it takes a lock for a moment and no I/O; what changes it is
//!   in the store before it holds.
//! - [`store`]: where it is kept: [`folder`] (files of one control plane) or [`secret`] (shared by
//!   replicas; the leader writes).
//! - [`brought`]: an authority of the user's.
//! - [`root`]: roots and leaves as X.509.
//! - [`csr`]: the one thing taken from a signing request, its public key.
//! - [`token`]: who a workload is, before it has a certificate, where there is no Kubernetes.
//! - [`rotation`]: the states of a root rotation.

mod brought;
mod csr;
mod folder;
mod root;
mod rotation;
pub mod secret;
mod store;
mod token;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde::Serialize;
use tokio::sync::watch;
use tracing::{info, warn};
use weft_api::identity::{InvalidSpiffeId, SpiffeId};
use weft_api::proto::Trust;

use crate::cluster::ClusterError;

pub use csr::InvalidCsr;
pub use root::{Issued, Signer};
pub use rotation::{Moving, Phase, Request};
pub use token::{Claims, InvalidToken};

use folder::Folder;
use root::{Material, Root};
use rotation::{Asked, STATE_FILE, State};
use store::{BUNDLE, Change, Files, Snapshot, Store};
use token::TokenKey;

/// How long a leaf lives when nothing else is said.
pub const DEFAULT_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Shortest lifetime that leaves time for a renewal.
pub const MIN_LIFETIME: Duration = Duration::from_secs(60);

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
        "{place} is damaged: {reason}; restore it, or remove all that is kept there to begin with a new certificate authority"
    )]
    Damaged { place: String, reason: String },
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error("another replica has changed the certificate authority meanwhile; trying again")]
    Changed,
    #[error("this replica is not the leader, which alone changes the certificate authority")]
    NotLeader,
    #[error("the certificate authority in the Secret {place} cannot be used: {reason}")]
    Brought { place: String, reason: String },
    #[error(
        "the certificate authority is your own, of the Secret {0}; change it there, and the change is taken up"
    )]
    NotOurs(String),
    #[error(
        "another control plane already uses {0}; stop it, or give this one its own data directory"
    )]
    InUse(PathBuf),
    #[error(
        "there is no certificate authority in {0}; a control plane makes it at its first start"
    )]
    None(PathBuf),
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

/// Life left of a root below which it is warned of: long before.
pub const ROOT_WARNING: Duration = Duration::from_secs(30 * 24 * 3600);

/// The certificate authority.
pub struct Authority {
    options: Options,
    store: Box<dyn Store>,
    /// Of the folder source.
    token_key: Option<TokenKey>,
    /// A root rotation is announced at least this long.
    announce_at_least: Duration,
    /// One change at a time.
    writing: tokio::sync::Mutex<()>,
    inner: Mutex<Inner>,
    /// The user's authority, where there is to be one.
    brought: Option<Mutex<brought::Brought>>,
    /// Counts changes of the roots.
    changed: watch::Sender<u64>,
}

#[derive(Clone)]
struct Inner {
    /// Of the store.
    version: String,
    state: State,
    /// In the order of `state.roots`.
    roots: Vec<Arc<Root>>,
    asked: Asked,
}

/// The authority as `/status` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    pub trust_domain: String,
    /// "stable", "announcing" or "draining".
    pub phase: String,
    /// While draining: when the last certificate of the old root has expired, seconds since the
    /// Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old_leaves_expire: Option<u64>,
    /// Oldest first.
    pub roots: Vec<RootStatus>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RootStatus {
    pub id: String,
    /// SHA-256 of the certificate, hexadecimal.
    pub fingerprint: String,
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
        options.check()?;
        let folder = Folder::open(data_dir)?;
        let _creating = folder.lock_for_change()?;
        let token_key = TokenKey::open(&folder)?;
        let mut inner = match folder.read_all()? {
            Some(snapshot) => Inner::read(snapshot, &|name| folder.place(name))?,
            None => {
                let material = Material::generate(&options.trust_domain, SystemTime::now())?;
                info!(
                    root = material.id,
                    "made a new certificate authority in {}",
                    data_dir.display()
                );
                let (inner, files) = Inner::first(&material, &options)?;
                folder.apply(&Change::creating(&files))?;
                inner
            }
        };
        let longest = &mut inner.state.longest_lifetime_secs;
        *longest = (*longest).max(options.lifetime.as_secs());
        let mut change = Change::default();
        change.put_state(&inner)?;
        folder.apply(&change)?;
        Ok(Self {
            token_key: Some(token_key),
            ..Self::with(
                options,
                Box::new(folder),
                inner,
                rotation::ANNOUNCE_AT_LEAST,
            )
        })
    }

    fn with(
        options: Options,
        store: Box<dyn Store>,
        inner: Inner,
        announce_at_least: Duration,
    ) -> Self {
        Self {
            options,
            token_key: None,
            announce_at_least,
            writing: tokio::sync::Mutex::new(()),
            inner: Mutex::new(inner),
            brought: None,
            changed: watch::Sender::new(0),
            store,
        }
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
        let claims = self.check_token(token, now)?;
        Ok((self.sign(csr, &claims, now)?, claims))
    }

    /// Checks a token of our own.
    ///
    /// # Errors
    /// It is not accepted, or this authority has none.
    pub fn check_token(&self, token: &str, now: SystemTime) -> Result<Claims, InvalidToken> {
        let key = self.token_key.as_ref().ok_or(InvalidToken::Signature)?;
        key.check(token, &self.options.trust_domain, now)
    }

    /// Signs a certificate for somebody whose token has been checked and the key the request holds.
    ///
    /// # Errors
    /// The request is not accepted, or signing fails.
    pub fn sign(
        &self,
        csr: &[u8],
        claims: &Claims,
        now: SystemTime,
    ) -> Result<Issued, CertifyError> {
        let identity = SpiffeId::new(
            &self.options.trust_domain,
            &claims.namespace,
            &claims.service_account,
        )
        .map_err(CaError::from)?;
        let key = csr::public_key(csr)?;
        let (root, lifetime) = {
            let inner = self.inner();
            (inner.signing().clone(), inner.lifetime(&self.options))
        };
        Ok(root.sign(&key, &identity, lifetime, now)?)
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
        let (root, lifetime) = {
            let inner = self.inner();
            (inner.oldest().clone(), inner.lifetime(&self.options))
        };
        let issued = root.sign(&key, &identity, lifetime, now)?;
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
        let (root, lifetime) = {
            let inner = self.inner();
            (inner.oldest().clone(), inner.lifetime(&self.options))
        };
        let issued = root.sign_server(&key, names, lifetime, now)?;
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
        let key = self.token_key.as_ref().ok_or(CaError::Crypto)?;
        let claims = Claims {
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
            workload: workload.map(str::to_owned),
        };
        key.issue(&claims, &self.options.trust_domain, lifetime, now)
    }

    /// The roots trusted now, as proxies are told.
    pub fn trust(&self) -> Trust {
        Trust {
            trust_domain: self.options.trust_domain.clone(),
            roots: self.roots(),
            session_key: self.session_key(),
        }
    }

    /// Key of session tokens, 32 bytes.
    fn session_key(&self) -> Vec<u8> {
        let inner = self.inner();
        let hex = inner.state.session_key.as_bytes();
        let digit = |byte: u8| (byte as char).to_digit(16).unwrap_or(0) as u8;
        let (pairs, _) = hex.as_chunks::<2>();
        pairs
            .iter()
            .map(|[high, low]| digit(*high) << 4 | digit(*low))
            .collect()
    }

    /// The roots trusted now, DER: the one that signs first, then the others, oldest first.
    pub fn roots(&self) -> Vec<Vec<u8>> {
        let inner = self.inner();
        let signing = inner.signing();
        let others = inner.roots.iter().filter(|root| root.id != signing.id);
        std::iter::once(signing)
            .chain(others)
            .map(|root| root.der.to_vec())
            .collect()
    }

    /// The roots trusted now, PEM.
    pub fn bundle(&self) -> String {
        self.inner().bundle()
    }

    /// Id of the root among those trusted now that signed a certificate.
    pub fn root_of(&self, signer: &Signer) -> Option<String> {
        let inner = self.inner();
        let root = inner.roots.iter().find(|root| root.signed(signer))?;
        Some(root.id.clone())
    }

    pub fn trust_domain(&self) -> &str {
        &self.options.trust_domain
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
            phase: inner.state.phase.name().to_owned(),
            old_leaves_expire: match inner.state.phase {
                Phase::Draining { old_leaves_expire } => Some(old_leaves_expire),
                Phase::Stable | Phase::Announcing { .. } => None,
            },
            roots: inner
                .roots
                .iter()
                .map(|root| RootStatus {
                    id: root.id.clone(),
                    fingerprint: root.fingerprint(),
                    not_after: root.not_after,
                    signing: root.id == signing,
                })
                .collect(),
        }
    }

    /// Takes up a rotation step at once.
    ///
    /// # Errors
    /// Another rotation is under way, the store cannot be written, or is not ours to write.
    pub async fn step(&self, request: Request, now: SystemTime) -> Result<(), CaError> {
        let _writing = self.writing.lock().await;
        self.take_up(request, None, now).await
    }

    /// Moves a rotation on when its time has come. With replicas, the leader calls it.
    ///
    /// # Errors
    /// The store cannot be written.
    pub async fn tick(&self, proxies: Moving, now: SystemTime) -> Result<(), CaError> {
        let _writing = self.writing.lock().await;
        let ticked = self.tick_once(proxies, now).await;
        if matches!(ticked, Err(CaError::Changed)) {
            // The next one begins from there.
            self.read_again().await?;
        }
        ticked
    }

    async fn tick_once(&self, proxies: Moving, now: SystemTime) -> Result<(), CaError> {
        let Inner { state, asked, .. } = self.inner().clone();
        let left = self.store.take_request().await?;
        if let Some(request) = left.or_else(|| asked.open(&state.done)) {
            return match self.take_up(request, Some(asked.clone()), now).await {
                Err(refused @ (CaError::Rotating(_) | CaError::NotOurs(_))) => {
                    info!("root rotation asked for: {refused}");
                    let mut next = self.inner().clone();
                    next.state.done.mark(request, &asked);
                    self.commit(next, Change::default()).await
                }
                other => other,
            };
        }
        if self.options.lifetime.as_secs() != state.longest_lifetime_secs {
            // Leaves of ours become as long as we were told only when this is written.
            let mut next = self.inner().clone();
            next.state.set_lifetime(self.options.lifetime, now);
            return self.commit(next, Change::default()).await;
        }
        if let Some(material) = self.brought_and_new(&state) {
            info!(
                root = material.id,
                "your certificate authority has changed: the new one is being made known"
            );
            return self.begin(&material, None, now).await;
        }
        match state.next(proxies, self.announce_at_least, now) {
            None => Ok(()),
            Some(rotation::Next::Sign) => {
                let mut next = self.inner().clone();
                next.state.sign_with_new(now);
                self.commit(next, Change::default()).await?;
                info!("root rotation: new certificates are signed by the new root");
                self.announce();
                Ok(())
            }
            Some(rotation::Next::Finish) => self.finish(None).await,
        }
    }

    async fn take_up(
        &self,
        request: Request,
        asked: Option<Asked>,
        now: SystemTime,
    ) -> Result<(), CaError> {
        rotation::allowed(&self.inner().state.phase, request)?;
        let done = asked.map(|asked| (request, asked));
        match (request, &self.brought) {
            (Request::Rotate, Some(brought)) => {
                let brought = brought.lock().unwrap_or_else(PoisonError::into_inner);
                Err(CaError::NotOurs(brought.place().to_owned()))
            }
            (Request::Rotate, None) => {
                let material = Material::generate(&self.options.trust_domain, now)?;
                info!(
                    root = material.id,
                    "root rotation: the new root is being made known"
                );
                self.begin(&material, done, now).await
            }
            (Request::Finish, _) => self.finish(done).await,
        }
    }

    /// Stable -> Announcing, with this new root.
    async fn begin(
        &self,
        material: &Material,
        done: Option<(Request, Asked)>,
        now: SystemTime,
    ) -> Result<(), CaError> {
        let damaged = |reason| CaError::Damaged {
            place: self.store.place(&root::certificate_file(&material.id)),
            reason,
        };
        let root = Root::load(material).map_err(damaged)?;
        let mut next = self.inner().clone();
        next.state.begin(&material.id, now);
        next.state.mark(done);
        next.roots.push(Arc::new(root));
        let mut change = Change::default();
        material.put(&mut change);
        self.commit(next, change).await?;
        self.announce();
        Ok(())
    }

    /// Any -> Stable.
    async fn finish(&self, done: Option<(Request, Asked)>) -> Result<(), CaError> {
        let mut next = self.inner().clone();
        let dropped = next.state.finish();
        next.state.mark(done);
        next.roots.retain(|root| !dropped.contains(&root.id));
        let mut change = Change::default();
        for id in &dropped {
            change.remove.push(root::key_file(id));
            change.remove.push(root::certificate_file(id));
        }
        self.commit(next, change).await?;
        for id in &dropped {
            info!(
                root = id,
                "root rotation: the old root is no longer trusted"
            );
        }
        self.announce();
        Ok(())
    }

    /// Writes the next state, with what else changes; then it holds.
    async fn commit(&self, mut next: Inner, mut change: Change) -> Result<(), CaError> {
        change.put_state(&next)?;
        next.version = self.store.save(&next.version, &change).await?;
        *self.inner() = next;
        Ok(())
    }

    /// Takes over what the store has now: what the leader has done, and what is asked for. A store
    /// found empty is filled again with what is known here, if that is for this replica to do.
    ///
    /// # Errors
    /// The store cannot be read, or what is in it is damaged: what was known goes on to hold.
    pub async fn reload(&self) -> Result<(), CaError> {
        let _writing = self.writing.lock().await;
        self.read_again().await
    }

    async fn read_again(&self) -> Result<(), CaError> {
        let Some(snapshot) = self.store.load().await? else {
            return self.fill_again().await;
        };
        let next = Inner::read(snapshot, &|name| self.store.place(name))?;
        let changed = {
            let mut inner = self.inner();
            let ids = |inner: &Inner| -> Vec<String> {
                inner.roots.iter().map(|root| root.fingerprint()).collect()
            };
            let changed = ids(&inner) != ids(&next) || inner.state.signing != next.state.signing;
            *inner = next;
            changed
        };
        if changed {
            let status = self.status();
            info!(
                phase = status.phase,
                roots = status.roots.len(),
                "the certificate authority has changed"
            );
            self.announce();
        }
        Ok(())
    }

    async fn fill_again(&self) -> Result<(), CaError> {
        let mut next = self.inner().clone();
        let mut change = Change::default();
        change.put_state(&next)?;
        for root in &next.roots {
            root.material().put(&mut change);
        }
        let files = change.put.into_iter().collect();
        match self.store.create(&files).await {
            // The leader does it.
            Err(CaError::NotLeader) => Ok(()),
            Err(error) => Err(error),
            Ok(version) => {
                warn!(
                    "somebody has deleted the certificate authority ({}); it has been written there again",
                    self.store.place(STATE_FILE)
                );
                next.version = version;
                *self.inner() = next;
                Ok(())
            }
        }
    }

    fn announce(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A panic while it was held cannot have left it half-changed: it is replaced whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes the data directory for one running control plane; until the result is dropped.
///
/// # Errors
/// Another one has it.
pub fn lock(data_dir: &Path) -> Result<std::fs::File, CaError> {
    Folder::open(data_dir)?.lock_for_serving()
}

/// Asks for a rotation step from outside the control plane that runs on a data directory; it takes
/// it up within seconds, or at its next start.
///
/// # Errors
/// There is no authority, the directory cannot be written, or another rotation is under way.
pub fn request(data_dir: &Path, request: Request) -> Result<(), CaError> {
    let (folder, inner) = existing(data_dir)?;
    rotation::allowed(&inner.state.phase, request)?;
    folder.leave_request(request)
}

/// The authority of a data directory, whether a control plane runs on it or not.
///
/// # Errors
/// There is none, or it is damaged.
pub fn status(data_dir: &Path) -> Result<Status, CaError> {
    let (folder, inner) = existing(data_dir)?;
    let options = Options::default();
    let store = Box::new(folder);
    let mut status = Authority::with(options, store, inner, rotation::ANNOUNCE_AT_LEAST).status();
    // What was given at start is not kept.
    status.trust_domain.clear();
    Ok(status)
}

fn existing(data_dir: &Path) -> Result<(Folder, Inner), CaError> {
    let none = || CaError::None(data_dir.to_owned());
    if !data_dir.join(STATE_FILE).exists() {
        return Err(none());
    }
    let folder = Folder::open(data_dir)?;
    let snapshot = folder.read_all()?.ok_or_else(none)?;
    let inner = Inner::read(snapshot, &|name| folder.place(name))?;
    Ok((folder, inner))
}

impl Options {
    fn check(&self) -> Result<(), CaError> {
        if self.lifetime < MIN_LIFETIME {
            return Err(CaError::Lifetime(self.lifetime));
        }
        Ok(())
    }
}

impl Change {
    /// The state, and the roots in the form others read.
    fn put_state(&mut self, inner: &Inner) -> Result<(), CaError> {
        self.put
            .push((STATE_FILE.to_owned(), inner.state.to_text()?));
        self.put.push((BUNDLE.to_owned(), inner.bundle()));
        Ok(())
    }
}

impl Inner {
    /// Of a new authority, and what is to be kept.
    fn first(material: &Material, options: &Options) -> Result<(Self, Files), CaError> {
        let root = Root::load(material).map_err(|reason| CaError::Damaged {
            place: material.id.clone(),
            reason,
        })?;
        let mut state = State::first(&material.id);
        state.longest_lifetime_secs = options.lifetime.as_secs();
        state.session_key = material.session_key();
        let inner = Self {
            version: String::new(),
            state,
            roots: vec![Arc::new(root)],
            asked: Asked::default(),
        };
        let mut change = Change::default();
        material.put(&mut change);
        change.put_state(&inner)?;
        Ok((inner, change.put.into_iter().collect()))
    }

    /// From what was kept; `place` says where a file is, for people.
    fn read(snapshot: Snapshot, place: &dyn Fn(&str) -> String) -> Result<Self, CaError> {
        let damaged = |(name, reason): (String, String)| CaError::Damaged {
            place: place(&name),
            reason,
        };
        let Snapshot {
            files,
            version,
            asked,
        } = snapshot;
        let in_state = |reason: String| damaged((STATE_FILE.to_owned(), reason));
        let text = files
            .get(STATE_FILE)
            .ok_or_else(|| in_state("it is missing".to_owned()))?;
        let mut state = State::parse(text).map_err(in_state)?;
        if state.session_key.is_empty() {
            // Every replica comes to the same, and the next one to write the state keeps it.
            let oldest = Material::read(&files, &state.roots[0]).map_err(damaged)?;
            state.session_key = oldest.session_key();
        }
        let roots = state
            .roots
            .iter()
            .map(|id| {
                let material = Material::read(&files, id).map_err(damaged)?;
                let root = Root::load(&material)
                    .map_err(|reason| damaged((root::certificate_file(id), reason)))?;
                Ok(Arc::new(root))
            })
            .collect::<Result<_, CaError>>()?;
        Ok(Self {
            version,
            state,
            roots,
            asked,
        })
    }

    fn bundle(&self) -> String {
        self.roots.iter().map(|root| root.pem.as_str()).collect()
    }

    fn oldest(&self) -> &Arc<Root> {
        &self.roots[0]
    }

    fn signing(&self) -> &Arc<Root> {
        let signing = &self.state.signing;
        self.roots
            .iter()
            .find(|root| root.id == *signing)
            .unwrap_or(&self.roots[0])
    }

    /// Lifetime of leaves now: never longer than the state says, by which a rotation reckons when
    /// the last leaf of the old root has expired.
    fn lifetime(&self, options: &Options) -> Duration {
        let longest = Duration::from_secs(self.state.longest_lifetime_secs);
        options.lifetime.min(longest)
    }
}

/// Seconds since the Unix epoch.
pub(crate) fn unix(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;
