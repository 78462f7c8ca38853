//! The roots that are trusted now.

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, TrustAnchor};
use x509_parser::prelude::{FromDer, X509Certificate};

/// More roots than this are refused; a rotation needs two.
const MAX_ROOTS: usize = 64;

/// A trust domain and its roots. Immutable: a rotation makes a new one.
pub struct TrustBundle {
    domain: String,
    /// Sorted by their bytes, each once: two bundles with the same roots are equal.
    roots: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
    /// Index into `roots` of the one that new certificates hang on.
    signing: usize,
}

/// Why a set of roots cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TrustError {
    #[error("there is no root certificate in it")]
    Empty,
    #[error("it holds {0} roots; at most {MAX_ROOTS} are taken")]
    TooMany(usize),
    #[error("root {index} is not an X.509 certificate: {reason}")]
    Malformed { index: usize, reason: String },
    #[error("root {0} is not a certificate authority (basicConstraints CA is not set)")]
    NotAuthority(usize),
    #[error("it is not PEM: {0}")]
    Pem(String),
}

impl TrustBundle {
    /// Checks the roots (DER) and makes them ready for chain building; new certificates hang on the
    /// first. Roots past their validity are taken: a chain to them is refused when it is used.
    pub fn new(
        domain: &str,
        roots: impl IntoIterator<Item = CertificateDer<'static>>,
    ) -> Result<Self, TrustError> {
        let mut roots: Vec<_> = roots.into_iter().collect();
        if roots.is_empty() {
            return Err(TrustError::Empty);
        }
        if roots.len() > MAX_ROOTS {
            return Err(TrustError::TooMany(roots.len()));
        }
        let mut checked = Vec::with_capacity(roots.len());
        for (index, root) in roots.drain(..).enumerate() {
            let malformed = |reason: String| TrustError::Malformed { index, reason };
            let (rest, parsed) =
                X509Certificate::from_der(&root).map_err(|e| malformed(e.to_string()))?;
            if !rest.is_empty() {
                return Err(malformed("bytes follow the certificate".into()));
            }
            if !parsed.is_ca() {
                return Err(TrustError::NotAuthority(index));
            }
            let anchor = webpki::anchor_from_trusted_cert(&root)
                .map_err(|e| malformed(e.to_string()))?
                .to_owned();
            checked.push((root, anchor));
        }
        let first = checked[0].0.clone();
        checked.sort_by(|a, b| a.0.as_ref().cmp(b.0.as_ref()));
        checked.dedup_by(|a, b| a.0 == b.0);
        let signing = checked.iter().position(|(root, _)| *root == first);
        let signing = signing.unwrap_or_default();
        let (roots, anchors) = checked.into_iter().unzip();
        Ok(Self {
            domain: domain.to_owned(),
            roots,
            anchors,
            signing,
        })
    }

    /// All certificates of a PEM file's text.
    pub fn from_pem(domain: &str, pem: &[u8]) -> Result<Self, TrustError> {
        let roots = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| TrustError::Pem(e.to_string()))?;
        Self::new(domain, roots)
    }

    /// The trust domain these roots speak for.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    pub(super) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }

    /// The anchor of the root that new certificates hang on.
    pub(super) fn signing_anchor(&self) -> &TrustAnchor<'static> {
        &self.anchors[self.signing]
    }
}

impl PartialEq for TrustBundle {
    fn eq(&self, other: &Self) -> bool {
        self.domain == other.domain && self.roots == other.roots && self.signing == other.signing
    }
}

impl std::fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TrustBundle")
            .field("domain", &self.domain)
            .field("roots", &self.roots.len())
            .finish()
    }
}
