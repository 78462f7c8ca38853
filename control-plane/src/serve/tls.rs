//! The TLS side of the gRPC port: TLS 1.3 only, a client certificate asked for but not required
//! (whoever comes for its first certificate has none), and the peer's identity.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use weft_api::identity::SpiffeId;
use x509_parser::extensions::GeneralName;

use super::ca::{Authority, CaError, Signer, unix};

/// Why there is no TLS configuration.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error("TLS: {0}")]
    Rustls(#[from] rustls::Error),
    #[error("TLS: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// Why a client's certificate is not an identity.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    #[error("the client certificate cannot be read")]
    Malformed,
    #[error(
        "the client certificate has {0} URI names; exactly one is allowed (SPIFFE X509-SVID section 2)"
    )]
    Names(usize),
    #[error(transparent)]
    Identity(#[from] weft_api::identity::InvalidSpiffeId),
    #[error("the client is of the trust domain '{0}', not of this one")]
    TrustDomain(String),
}

/// Who a client is, by its certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub identity: SpiffeId,
    /// Seconds since the Unix epoch.
    pub not_after: u64,
    /// Who signed the certificate.
    pub signer: Signer,
}

/// Key exchanges offered: the hybrid one first.
fn provider() -> CryptoProvider {
    CryptoProvider {
        kx_groups: vec![
            aws_lc_rs::kx_group::X25519MLKEM768,
            aws_lc_rs::kx_group::X25519,
            aws_lc_rs::kx_group::SECP256R1,
        ],
        ..aws_lc_rs::default_provider()
    }
}

/// A fresh certificate of the control plane's own, in use.
pub struct Own {
    pub config: Arc<ServerConfig>,
    /// When it is half used up.
    pub renew_at: SystemTime,
    /// Seconds since the Unix epoch.
    pub not_before: u64,
    pub not_after: u64,
}

/// A server configuration with a fresh certificate.
///
/// # Errors
/// Signing fails, or the roots cannot be used.
pub fn server_config(authority: &Authority, now: SystemTime) -> Result<Own, TlsError> {
    let (issued, key) = authority.own_certificate(now)?;
    let not_after = issued.not_after;
    let mut roots = RootCertStore::empty();
    for root in authority.roots() {
        roots.add(CertificateDer::from(root))?;
    }
    let provider = Arc::new(provider());
    // Verifies the chain; who it is, is read from the URI name by `peer`.
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            issued.full_chain(),
            PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        )?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // Its own life, which may be shorter than what is configured: the leader has not yet noted a
    // longer lifetime, or the root ends before.
    let life = Duration::from_secs(not_after.saturating_sub(unix(now)));
    Ok(Own {
        config: Arc::new(config),
        renew_at: now + life / 2,
        not_before: unix(now),
        not_after,
    })
}

/// Reads a verified client certificate's identity.
///
/// # Errors
/// It has not exactly one URI name, or that is not a workload's identity of this trust domain.
pub fn peer(certificate: &CertificateDer<'_>, trust_domain: &str) -> Result<Peer, PeerError> {
    let (_, parsed) =
        x509_parser::parse_x509_certificate(certificate).map_err(|_| PeerError::Malformed)?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|_| PeerError::Malformed)?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    let [uri] = uris[..] else {
        return Err(PeerError::Names(uris.len()));
    };
    let identity: SpiffeId = uri.parse()?;
    if identity.trust_domain != trust_domain {
        return Err(PeerError::TrustDomain(identity.trust_domain));
    }
    Ok(Peer {
        identity,
        not_after: u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0),
        signer: Signer::issuer_of(&parsed),
    })
}
