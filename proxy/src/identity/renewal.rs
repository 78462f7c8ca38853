//! Getting a certificate, and a new one in time.
//!
//! The first is asked for at start, each next one at a jittered half-life of the one before. When
//! asking fails, the certificate in use stays; it is asked again with growing waits. A change of
//! the roots brings the next request forward.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rand::Rng;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use weft_api::proto::identity_client::IdentityClient;
use weft_api::proto::{CertifyRequest, CertifyResponse};

use super::credentials::{
    Credentials, CredentialsError, Issuer, anonymous_config, control_plane_id,
};
use super::handle::Handle;
use super::trust::{TrustBundle, TrustError};
use crate::config::Config;
use crate::discovery::backoff::Backoff;
use crate::discovery::dial::{ControlPlane, DialError};

/// Asking, from the request to the answer.
const CERTIFY_TIMEOUT: Duration = Duration::from_secs(10);
/// Waits after a failure.
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(30);
/// A failure that goes on is logged again after this long.
const REPEAT_LOG: Duration = Duration::from_secs(60);
/// The wall clock may be set, and a machine may sleep: it is looked at this often.
const LOOK_AT_CLOCK: Duration = Duration::from_secs(30);
/// First wait for a certificate of the root that signs, when one of an older root was given (by a
/// replica of the control plane that has not heard of the new one); doubles from there.
const OLDER_ISSUER_RETRY: Duration = Duration::from_secs(5);
/// The token file is refused above this size, bytes: a token has a few KiB.
const MAX_TOKEN: u64 = 64 * 1024;

/// What renewal needs to know.
#[derive(Debug, Clone)]
pub struct Settings {
    pub control_plane: ControlPlane,
    pub trust_domain: String,
    /// PEM, read again at each try.
    pub trust_root: PathBuf,
    /// Read again at each try.
    pub token: PathBuf,
    /// Namespace the certificate must be for; empty: any.
    pub namespace: String,
    /// Renewals that the change of the roots asks for are spread over this long.
    pub rotation_jitter: Duration,
}

impl Settings {
    pub fn from_config(config: &Config) -> Result<Self, DialError> {
        Ok(Self {
            control_plane: ControlPlane::parse(&config.control_plane, config.mark)?,
            trust_domain: config.trust_domain.clone(),
            trust_root: config.trust_root.clone(),
            token: config.token.clone(),
            namespace: config
                .workload
                .split_once('/')
                .map_or("", |(namespace, _)| namespace)
                .to_owned(),
            rotation_jitter: Duration::from_secs(3),
        })
    }
}

/// Why there is no new certificate.
#[derive(Debug, thiserror::Error)]
pub enum CertifyError {
    #[error("the trust root {path} cannot be read: {source}")]
    TrustRootFile { path: PathBuf, source: io::Error },
    #[error("the trust root {path} cannot be used: {source}")]
    TrustRoot { path: PathBuf, source: TrustError },
    #[error("the token {path} cannot be read: {source}")]
    Token { path: PathBuf, source: io::Error },
    #[error("the key cannot be made: {0}")]
    Key(#[from] rcgen::Error),
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
    #[error("the control plane cannot be reached: {0}")]
    Dial(#[from] DialError),
    #[error("the control plane did not answer within {} s", CERTIFY_TIMEOUT.as_secs())]
    Timeout,
    #[error("the control plane refused: {0} ({1:?})")]
    Refused(String, tonic::Code),
    #[error("the control plane's roots cannot be used: {0}")]
    Roots(TrustError),
    #[error("{0}")]
    Credentials(#[from] CredentialsError),
    #[error("the certificate is for namespace '{shown}', this proxy's workload is in '{ours}'")]
    WrongNamespace { shown: String, ours: String },
}

/// Renews for as long as the proxy lives.
pub async fn run(settings: Settings, handle: Handle) {
    let mut renewal = Renewal {
        roots: BootstrapRoots::new(settings.trust_root.clone()),
        older: Backoff::new(OLDER_ISSUER_RETRY, Duration::from_secs(12 * 3600)),
        settings,
        handle,
    };
    let mut changes = renewal.handle.watch();
    let mut backoff = Backoff::new(FIRST_RETRY, LAST_RETRY);
    let mut logged: Option<Instant> = None;
    loop {
        changes.borrow_and_update();
        match renewal.renew().await {
            Ok(credentials) => {
                backoff.reset();
                logged = None;
                tracing::info!(
                    identity = %credentials.id,
                    seconds = credentials.remaining().as_secs(),
                    "certificate in place"
                );
                // Our own replacement is no news to us.
                changes.borrow_and_update();
                renewal.until_due(&credentials, &mut changes).await;
            }
            Err(error) => {
                let wait = backoff.wait();
                if logged.is_none_or(|at| at.elapsed() >= REPEAT_LOG) {
                    logged = Some(Instant::now());
                    renewal.log_failure(&error);
                } else {
                    tracing::debug!(%error, "no new certificate");
                }
                sleep(wait).await;
            }
        }
    }
}

struct Renewal {
    settings: Settings,
    handle: Handle,
    roots: BootstrapRoots,
    /// Waits while certificates still come from a root that is said not to sign any more.
    older: Backoff,
}

impl Renewal {
    fn log_failure(&self, error: &CertifyError) {
        match self.handle.remaining() {
            None => tracing::warn!(
                "no certificate yet: {error}; traffic passes without mutual TLS until there is one"
            ),
            Some(Duration::ZERO) => tracing::error!(
                "the certificate has expired and there is no new one: {error}; mutual TLS fails until there is"
            ),
            Some(left) => tracing::warn!(
                "no new certificate: {error}; the one in use is good for another {} s",
                left.as_secs()
            ),
        }
    }

    /// Waits until the next request is due: half-life, or a change of the roots.
    async fn until_due(&mut self, issued: &Credentials, changes: &mut watch::Receiver<u64>) {
        let mut due = renew_at(issued.not_before.max(SystemTime::now()), issued.expires);
        if issued.issuer() == Issuer::Signing {
            self.older.reset();
        } else {
            due = due.min(SystemTime::now() + self.older.wait());
        }
        while let Ok(left) = due.duration_since(SystemTime::now()) {
            tokio::select! {
                () = sleep(left.min(LOOK_AT_CLOCK)) => {}
                changed = changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let Some(now) = self.handle.get() else { continue };
                    if now.issuer() != Issuer::Signing {
                        let jitter = self.settings.rotation_jitter.mul_f64(rand::rng().random());
                        due = due.min(SystemTime::now() + jitter);
                    }
                }
            }
        }
    }

    async fn renew(&mut self) -> Result<Arc<Credentials>, CertifyError> {
        let current = self.handle.get().map(|c| c.trust().clone());
        let domain = &self.settings.trust_domain;
        let (trusted, file) = self.roots.with(domain, current.as_ref())?;
        let token = read_token(&self.settings.token)?;
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let csr = rcgen::CertificateParams::default().serialize_request(&key)?;
        let tls = anonymous_config(&trusted, control_plane_id(domain))?;
        let channel = self.settings.control_plane.connect(tls).await?;
        let request = CertifyRequest {
            csr: csr.der().to_vec(),
            token,
        };
        let answer = timeout(
            CERTIFY_TIMEOUT,
            IdentityClient::new(channel).certify(request),
        )
        .await
        .map_err(|_| CertifyError::Timeout)?
        .map_err(|status| CertifyError::Refused(status.message().to_owned(), status.code()))?
        .into_inner();
        let credentials = self.adopt(answer, &key)?;
        self.roots.adopted = Some(file);
        Ok(credentials)
    }

    /// The answer came from the control plane's verified identity; what is in it is checked all
    /// the same. Roots of its own are taken when there are none yet, or when the new certificate
    /// does not hang on the ones known (a rotation went by while the stream was down).
    fn adopt(
        &self,
        answer: CertifyResponse,
        key: &rcgen::KeyPair,
    ) -> Result<Arc<Credentials>, CertifyError> {
        let chain: Vec<_> = answer.chain.into_iter().map(CertificateDer::from).collect();
        let roots = answer.roots.into_iter().map(CertificateDer::from);
        let offered = Arc::new(
            TrustBundle::new(&self.settings.trust_domain, roots).map_err(CertifyError::Roots)?,
        );
        let namespace = &self.settings.namespace;
        let build = |trust: Arc<TrustBundle>, generation| {
            let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
            Credentials::new(chain.clone(), key, trust, generation)
        };
        let shown = super::peer_identity(&chain).map_err(CredentialsError::from)?;
        if !namespace.is_empty() && shown.namespace != *namespace {
            return Err(CertifyError::WrongNamespace {
                shown: shown.namespace,
                ours: namespace.clone(),
            });
        }
        Ok(self.handle.replace(|current, generation| {
            if let Some(current) = current
                && let Ok(credentials) = build(current.trust().clone(), generation)
            {
                return Ok(credentials);
            }
            build(offered, generation)
        })?)
    }
}

/// The moment to renew: half of the life from `from` on, give or take a fifth of it.
fn renew_at(from: SystemTime, expires: SystemTime) -> SystemTime {
    let life = expires.duration_since(from).unwrap_or_default();
    from + life.mul_f64(rand::rng().random_range(0.4..=0.6))
}

/// The roots in the file given at start.
///
/// Once the control plane has said what is trusted, the file counts only when it has changed
/// since: a proxy cut off for longer than a whole rotation finds its way back by a new file, but an
/// old file does not keep a withdrawn root alive.
struct BootstrapRoots {
    path: PathBuf,
    /// Content at the last success.
    adopted: Option<Vec<u8>>,
}

impl BootstrapRoots {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            adopted: None,
        }
    }

    /// What the control plane is verified against now, and the file's content.
    fn with(
        &self,
        domain: &str,
        current: Option<&Arc<TrustBundle>>,
    ) -> Result<(Arc<TrustBundle>, Vec<u8>), CertifyError> {
        let path = || self.path.clone();
        let file = std::fs::read(&self.path)
            .map_err(|source| CertifyError::TrustRootFile {
                path: path(),
                source,
            })
            .and_then(|pem| {
                let unchanged = self.adopted.as_ref() == Some(&pem);
                Ok((
                    TrustBundle::from_pem(domain, &pem).map_err(|source| {
                        CertifyError::TrustRoot {
                            path: path(),
                            source,
                        }
                    })?,
                    pem,
                    unchanged,
                ))
            });
        let Some(current) = current else {
            return file.map(|(roots, pem, _)| (Arc::new(roots), pem));
        };
        match file {
            Ok((roots, pem, false)) => {
                let all = current.roots().iter().chain(roots.roots()).cloned();
                let all = TrustBundle::new(domain, all).map_err(CertifyError::Roots)?;
                Ok((Arc::new(all), pem))
            }
            Ok((_, pem, true)) => Ok((current.clone(), pem)),
            // The file is for the start only.
            Err(_) => Ok((current.clone(), self.adopted.clone().unwrap_or_default())),
        }
    }
}

fn read_token(path: &PathBuf) -> Result<String, CertifyError> {
    use std::io::Read;
    let failed = |source| CertifyError::Token {
        path: path.clone(),
        source,
    };
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_TOKEN + 1).read_to_string(&mut text))
        .map_err(failed)?;
    let invalid = |why: &str| failed(io::Error::new(io::ErrorKind::InvalidData, why));
    if text.len() as u64 > MAX_TOKEN {
        return Err(invalid("it is larger than 64 KiB"));
    }
    let token = text.trim();
    if token.is_empty() {
        return Err(invalid("it is empty"));
    }
    Ok(token.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::identity::testing::{Authority, DOMAIN, trust};

    /// A file that has not changed since the control plane spoke does not bring a root back.
    #[test]
    fn the_file_counts_at_first_and_when_it_changes() {
        let (old, new, later) = (
            Authority::new("old", 1),
            Authority::new("new", 2),
            Authority::new("later", 3),
        );
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.pem");
        std::fs::write(&path, &old.pem).unwrap();
        let mut roots = BootstrapRoots::new(path.clone());
        let (first, file) = roots.with(DOMAIN, None).unwrap();
        assert_eq!(*first, *trust(&[&old]));
        roots.adopted = Some(file);
        // The mesh has gone on to another root; the file is as it was.
        let current = trust(&[&new]);
        let with = |roots: &BootstrapRoots| roots.with(DOMAIN, Some(&current)).unwrap().0;
        assert_eq!(*with(&roots), *trust(&[&new]));
        std::fs::write(&path, &later.pem).unwrap();
        assert_eq!(*with(&roots), *trust(&[&new, &later]));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(*with(&roots), *trust(&[&new]));
        assert!(roots.with(DOMAIN, None).is_err());
    }

    #[test]
    fn renewal_is_due_around_the_half_life() {
        let from = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let expires = from + Duration::from_secs(1000);
        for _ in 0..100 {
            let at = renew_at(from, expires).duration_since(from).unwrap();
            assert!((400..=600).contains(&at.as_secs()), "{at:?}");
        }
        assert_eq!(renew_at(expires, from), expires);
    }
}
