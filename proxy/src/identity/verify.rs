//! Whom a peer's certificate makes it.
//!
//! SPIFFE leaves carry only a URI SAN, so the usual check of a host name cannot be used: the chain
//! is built by webpki against the current roots, then the leaf's one URI SAN is parsed and compared
//! whole, never by substring (X509-SVID sections 2, 4 and 5.2).

use std::io;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    AlertDescription, CertificateError, DigitallySignedStruct, DistinguishedName, OtherError,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage};
use weft_api::identity::{InvalidSpiffeId, SpiffeId};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::trust::TrustBundle;

/// Why a peer's certificate is not taken. Each is a sentence that stands in logs and error answers.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PeerError {
    #[error("the peer showed no certificate")]
    NoCertificate,
    #[error("the peer's certificate cannot be read: {0}")]
    Malformed(String),
    #[error("the peer's certificate names {0} URIs; a workload's names exactly one, its SPIFFE id")]
    NotOneUri(usize),
    #[error("the peer's certificate may sign other certificates; a workload's may not")]
    MaySign,
    #[error("the peer's certificate does not name a workload: {0}")]
    NotWorkload(#[from] InvalidSpiffeId),
    #[error("the endpoint showed {shown} but {expected} was expected")]
    WrongIdentity {
        shown: Box<SpiffeId>,
        expected: Arc<SpiffeId>,
    },
    #[error("the peer showed {shown}, which is not of the trust domain '{ours}'")]
    ForeignTrustDomain { shown: Box<SpiffeId>, ours: String },
    #[error("the peer's certificate is for another use than {0}")]
    WrongUse(&'static str),
    #[error("the peer's certificate does not hold: {0}")]
    Chain(String),
}

/// The workload a verified certificate chain (leaf first) names. This reads the name only; whoever
/// calls it has the chain from a handshake that verified it.
pub fn peer_identity(chain: &[CertificateDer<'_>]) -> Result<SpiffeId, PeerError> {
    let leaf = chain.first().ok_or(PeerError::NoCertificate)?;
    let malformed = |e: String| PeerError::Malformed(e);
    let (rest, leaf) = X509Certificate::from_der(leaf).map_err(|e| malformed(e.to_string()))?;
    if !rest.is_empty() {
        return Err(malformed("bytes follow it".into()));
    }
    // X509-SVID section 5.2: a leaf that may sign is refused.
    let usage = leaf.key_usage().map_err(|e| malformed(e.to_string()))?;
    if usage.is_some_and(|u| u.value.key_cert_sign() || u.value.crl_sign()) {
        return Err(PeerError::MaySign);
    }
    let names = leaf
        .subject_alternative_name()
        .map_err(|e| malformed(e.to_string()))?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|san| &san.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    match uris[..] {
        [uri] => Ok(uri.parse()?),
        _ => Err(PeerError::NotOneUri(uris.len())),
    }
}

/// Which side of the handshake the certificate was shown on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Server,
    Client,
}

/// Builds the chain at `now` and returns the root it ends at.
pub(super) fn verify_chain<'a>(
    trust: &'a TrustBundle,
    algorithms: &WebPkiSupportedAlgorithms,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
    side: Side,
) -> Result<&'a TrustAnchor<'static>, CertificateError> {
    let cert = EndEntityCert::try_from(leaf).map_err(|e| certificate_error(e, side))?;
    let usage = match side {
        Side::Server => KeyUsage::server_auth(),
        Side::Client => KeyUsage::client_auth(),
    };
    let path = cert
        .verify_for_usage(
            algorithms.all,
            trust.anchors(),
            intermediates,
            now,
            usage,
            None,
            None,
        )
        .map_err(|e| certificate_error(e, side))?;
    let anchor = path.anchor();
    trust
        .anchors()
        .iter()
        .find(|a| same_anchor(a, anchor))
        .ok_or(CertificateError::UnknownIssuer)
}

pub(super) fn same_anchor(a: &TrustAnchor<'_>, b: &TrustAnchor<'_>) -> bool {
    a.subject == b.subject && a.subject_public_key_info == b.subject_public_key_info
}

/// Keeps the kinds that have a TLS alert of their own; the others become sentences.
fn certificate_error(error: webpki::Error, side: Side) -> CertificateError {
    use webpki::Error as E;
    match error {
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding,
        E::CertNotValidYet { time, not_before } => {
            CertificateError::NotValidYetContext { time, not_before }
        }
        E::CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
        E::UnknownIssuer => CertificateError::UnknownIssuer,
        E::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        E::RequiredEkuNotFoundContext(_) | E::CaUsedAsEndEntity => {
            refusal(PeerError::WrongUse(match side {
                Side::Server => "taking connections (extended key usage serverAuth)",
                Side::Client => "opening connections (extended key usage clientAuth)",
            }))
        }
        other => refusal(PeerError::Chain(other.to_string())),
    }
}

fn refusal(error: PeerError) -> CertificateError {
    CertificateError::Other(OtherError(Arc::new(error)))
}

/// Verifies a peer against the current roots. As a client it wants one identity; as a server it
/// takes every workload of the trust domain, authorization comes later.
#[derive(Debug)]
pub(super) struct SpiffeVerifier {
    pub trust: Arc<TrustBundle>,
    /// `None`: any workload of the trust domain.
    pub expected: Option<Arc<SpiffeId>>,
    pub algorithms: WebPkiSupportedAlgorithms,
}

impl SpiffeVerifier {
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        side: Side,
    ) -> Result<(), CertificateError> {
        verify_chain(
            &self.trust,
            &self.algorithms,
            leaf,
            intermediates,
            now,
            side,
        )?;
        let shown = peer_identity(std::slice::from_ref(leaf)).map_err(refusal)?;
        if let Some(expected) = &self.expected
            && shown != **expected
        {
            return Err(refusal(PeerError::WrongIdentity {
                shown: Box::new(shown),
                expected: expected.clone(),
            }));
        }
        // Also with an expected identity: the roots speak for one trust domain only.
        if shown.trust_domain != self.trust.domain() {
            return Err(refusal(PeerError::ForeignTrustDomain {
                shown: Box::new(shown),
                ours: self.trust.domain().to_owned(),
            }));
        }
        Ok(())
    }
}

/// TLS 1.2 is not offered; should it ever be negotiated, the signature does not count.
fn tls12_refused() -> rustls::Error {
    rustls::Error::General("TLS 1.2 is not spoken between workloads".into())
}

impl ServerCertVerifier for SpiffeVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, now, Side::Server)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls12_refused())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for SpiffeVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A peer has one certificate; hints would only say who we trust.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, now, Side::Client)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls12_refused())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// A failed handshake (or a connection that TLS ended) as a sentence a person can act on.
pub fn explain(error: &io::Error) -> String {
    let Some(tls) = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>())
    else {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                "the peer closed the connection during the TLS handshake".into()
            }
            io::ErrorKind::ConnectionReset => {
                "the peer reset the connection during the TLS handshake".into()
            }
            _ => error.to_string(),
        };
    };
    explain_tls(tls)
}

fn explain_tls(error: &rustls::Error) -> String {
    use rustls::Error as E;
    match error {
        E::InvalidCertificate(CertificateError::Other(OtherError(inner))) => inner.to_string(),
        E::InvalidCertificate(CertificateError::ExpiredContext { time, not_after }) => format!(
            "the peer's certificate expired {} seconds ago",
            time.as_secs().saturating_sub(not_after.as_secs())
        ),
        E::InvalidCertificate(CertificateError::NotValidYetContext { time, not_before }) => {
            format!(
                "the peer's certificate is not valid for another {} seconds; is a clock wrong?",
                not_before.as_secs().saturating_sub(time.as_secs())
            )
        }
        E::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "the peer's certificate was not issued by a root that is trusted now".into()
        }
        E::InvalidCertificate(CertificateError::BadSignature) => {
            "the peer's certificate is not signed by the root it names".into()
        }
        E::InvalidCertificate(CertificateError::BadEncoding) => {
            "the peer's certificate cannot be read".into()
        }
        E::NoCertificatesPresented => PeerError::NoCertificate.to_string(),
        E::AlertReceived(AlertDescription::CertificateRequired) => {
            "the peer wants a certificate and got none".into()
        }
        E::AlertReceived(AlertDescription::CertificateExpired) => {
            "the peer refused this proxy's certificate as expired".into()
        }
        E::AlertReceived(AlertDescription::UnknownCA) => {
            "the peer does not trust the issuer of this proxy's certificate".into()
        }
        E::AlertReceived(
            AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::AccessDenied
            | AlertDescription::UnsupportedCertificate,
        ) => "the peer refused this proxy's certificate; its log says why".into(),
        E::AlertReceived(AlertDescription::NoApplicationProtocol) | E::NoApplicationProtocol => {
            "the two sides share no ALPN name".into()
        }
        E::AlertReceived(alert) => format!("the peer ended the TLS handshake: {alert:?}"),
        E::PeerIncompatible(why) => format!("the peer's TLS is not compatible: {why:?}"),
        E::InvalidMessage(_) => {
            "the peer does not speak TLS (its first bytes are something else)".into()
        }
        other => other.to_string(),
    }
}
