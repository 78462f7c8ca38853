//! The one thing taken from a signing request: its public key. Subject and extensions are ignored,
//! whatever they are; the identity comes from the token.

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use rcgen::SubjectPublicKeyInfo;
use x509_parser::prelude::{FromDer, X509CertificationRequest};

/// Largest request that is looked at, bytes; a usual one has about 300.
const MAX_LEN: usize = 16 << 10;
/// id-ecPublicKey, RFC 5480 section 2.1.1.
const EC_PUBLIC_KEY: &str = "1.2.840.10045.2.1";
/// secp256r1, RFC 5480 section 2.1.1.1.
const P256: &str = "1.2.840.10045.3.1.7";
/// ecdsa-with-SHA256, RFC 5758 section 3.2.
const ECDSA_SHA256: &str = "1.2.840.10045.4.3.2";

/// Why a signing request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCsr {
    #[error("it is not a PKCS#10 request in DER")]
    Malformed,
    #[error("its key is not on the curve P-256")]
    NotP256,
    #[error("it is not signed with its own key (ECDSA with SHA-256)")]
    Signature,
}

/// Reads the public key, after checking that whoever asks holds its private half.
pub(super) fn public_key(der: &[u8]) -> Result<SubjectPublicKeyInfo, InvalidCsr> {
    if der.len() > MAX_LEN {
        return Err(InvalidCsr::Malformed);
    }
    let (rest, csr) = X509CertificationRequest::from_der(der).map_err(|_| InvalidCsr::Malformed)?;
    if !rest.is_empty() {
        return Err(InvalidCsr::Malformed);
    }
    let info = &csr.certification_request_info;
    let key = &info.subject_pki;
    let curve = key
        .algorithm
        .parameters
        .as_ref()
        .and_then(|parameters| parameters.as_oid().ok());
    if key.algorithm.algorithm.to_id_string() != EC_PUBLIC_KEY
        || curve.map(|curve| curve.to_id_string()).as_deref() != Some(P256)
    {
        return Err(InvalidCsr::NotP256);
    }
    if csr.signature_algorithm.algorithm.to_id_string() != ECDSA_SHA256 {
        return Err(InvalidCsr::Signature);
    }
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &key.subject_public_key.data)
        .verify(info.raw, &csr.signature_value.data)
        .map_err(|_| InvalidCsr::Signature)?;
    SubjectPublicKeyInfo::from_der(key.raw).map_err(|_| InvalidCsr::NotP256)
}
