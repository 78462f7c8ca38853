//! Roots and leaves as X.509.

use std::time::{Duration, SystemTime};

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use weft_api::identity::SpiffeId;

use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::ParsedExtension;

use super::store::{Change, Files};
use super::{CaError, unix};

/// How long a root lives: ten years of 365.25 days.
const ROOT_LIFETIME: Duration = Duration::from_secs(315_576_000);
/// Certificates are valid from a little before they were signed, for clocks that are behind.
const BACKDATE: Duration = Duration::from_secs(60);

/// A root with the key that signs for it: its own, or that of an intermediate below it.
pub(super) struct Root {
    pub(super) id: String,
    /// What is trusted.
    pub(super) der: CertificateDer<'static>,
    pub(super) pem: String,
    /// The earliest end of what stands between a leaf and the root, seconds since the Unix epoch.
    pub(super) not_after: u64,
    /// Subject and key id of what signs, to tell whose a leaf is.
    signer: Signer,
    /// What is shown together with a leaf: the intermediates.
    chain: Vec<CertificateDer<'static>>,
    issuer: Issuer<'static, KeyPair>,
    material: Material,
}

/// How a leaf names who signed it (RFC 5280 sections 4.1.2.4 and 4.2.1.1).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Signer {
    /// DER.
    name: Vec<u8>,
    key: Option<Vec<u8>>,
}

/// A leaf that was signed.
#[derive(Clone, Debug)]
pub struct Issued {
    /// DER.
    pub leaf: CertificateDer<'static>,
    /// What a peer needs to follow it to a root: the intermediates, usually none.
    pub chain: Vec<CertificateDer<'static>>,
    /// All roots trusted are in [`super::Authority::roots`]; times in seconds since the Unix epoch.
    pub not_before: u64,
    pub not_after: u64,
}

impl Issued {
    /// The leaf and what goes with it.
    pub fn full_chain(&self) -> Vec<CertificateDer<'static>> {
        std::iter::once(&self.leaf)
            .chain(&self.chain)
            .cloned()
            .collect()
    }
}

/// What is kept of a root: certificates from the one that signs to the root, and the key of the
/// first. PEM.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Material {
    pub(super) id: String,
    pub(super) certificates: String,
    pub(super) key: String,
}

pub(super) fn certificate_file(id: &str) -> String {
    format!("root-{id}.crt.pem")
}

pub(super) fn key_file(id: &str) -> String {
    format!("root-{id}.key.pem")
}

impl std::fmt::Debug for Material {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Material").field("id", &self.id).finish()
    }
}

impl Material {
    /// A new root.
    pub(super) fn generate(trust_domain: &str, now: SystemTime) -> Result<Self, CaError> {
        let mut random = [0u8; 4];
        aws_lc_rs::rand::fill(&mut random).map_err(|_| CaError::Crypto)?;
        let id = format!("{}-{:08x}", unix(now), u32::from_be_bytes(random));
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        // Roots are told apart by their subjects when both are trusted.
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::OrganizationName, trust_domain);
        params
            .distinguished_name
            .push(DnType::CommonName, format!("weft root {id}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + ROOT_LIFETIME).into();
        Ok(Self {
            certificates: params.self_signed(&key)?.pem(),
            key: key.serialize_pem(),
            id,
        })
    }

    /// A key for session tokens that only those who know the root's key can make: hexadecimal.
    pub(super) fn session_key(&self) -> String {
        use aws_lc_rs::hmac;
        let key = hmac::Key::new(hmac::HMAC_SHA256, self.key.as_bytes());
        let tag = hmac::sign(&key, b"weft session tokens");
        tag.as_ref().iter().map(|b| format!("{b:02x}")).collect()
    }

    /// As it is in a store; the name of what is wrong, and why, when something is.
    pub(super) fn read(files: &Files, id: &str) -> Result<Self, (String, String)> {
        let read = |name: String| {
            files
                .get(&name)
                .cloned()
                .ok_or_else(|| (name, "it is missing".to_owned()))
        };
        Ok(Self {
            id: id.to_owned(),
            certificates: read(certificate_file(id))?,
            key: read(key_file(id))?,
        })
    }

    pub(super) fn put(&self, change: &mut Change) {
        change.put.push((key_file(&self.id), self.key.clone()));
        change
            .put
            .push((certificate_file(&self.id), self.certificates.clone()));
    }
}

impl Root {
    /// Makes use of what is kept; says what is wrong with it when it is.
    pub(super) fn load(material: &Material) -> Result<Self, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let certificates: Vec<CertificateDer<'static>> =
            CertificateDer::pem_slice_iter(material.certificates.as_bytes())
                .collect::<Result<_, _>>()
                .map_err(|error| text(&error))?;
        let (Some(signing), Some(der)) = (certificates.first(), certificates.last()) else {
            return Err("there is no certificate in it".to_owned());
        };
        let key = KeyPair::from_pem(&material.key).map_err(|error| text(&error))?;
        let mut not_after = u64::MAX;
        for certificate in &certificates {
            let (_, parsed) =
                x509_parser::parse_x509_certificate(certificate).map_err(|error| text(&error))?;
            let end = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
            not_after = not_after.min(end);
        }
        let signer = {
            let (_, parsed) =
                x509_parser::parse_x509_certificate(signing).map_err(|error| text(&error))?;
            if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
                return Err("its key is not the one beside it".to_owned());
            }
            if !parsed.is_ca() {
                return Err(
                    "it is not a certificate authority's (basic constraints: CA)".to_owned(),
                );
            }
            Signer::subject_of(&parsed)
        };
        let issuer = Issuer::from_ca_cert_der(signing, key).map_err(|error| text(&error))?;
        Ok(Self {
            id: material.id.clone(),
            pem: pem(der),
            der: der.clone(),
            not_after,
            signer,
            chain: certificates[..certificates.len() - 1].to_vec(),
            issuer,
            material: material.clone(),
        })
    }

    /// What is kept of it.
    pub(super) fn material(&self) -> &Material {
        &self.material
    }

    /// Whether a leaf says that this root signed it.
    pub(super) fn signed(&self, says: &Signer) -> bool {
        self.signer.name == says.name
            && (self.signer.key.is_none() || says.key.is_none() || self.signer.key == says.key)
    }

    /// SHA-256 of the root certificate, hexadecimal.
    pub(super) fn fingerprint(&self) -> String {
        fingerprint(&self.der)
    }

    /// Signs a server's certificate for these DNS names: what programs outside the mesh (the
    /// apiserver) verify by name.
    pub(super) fn sign_server(
        &self,
        key: &impl PublicKeyData,
        names: &[String],
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Issued, CaError> {
        let names = names
            .iter()
            .map(|name| Ok(SanType::DnsName(Ia5String::try_from(name.as_str())?)))
            .collect::<Result<Vec<_>, rcgen::Error>>()?;
        self.sign_leaf(
            key,
            names,
            vec![ExtendedKeyUsagePurpose::ServerAuth],
            lifetime,
            now,
        )
    }

    /// Signs a leaf: an empty subject, exactly one URI SAN (SPIFFE X509-SVID section 2), critical
    /// because the subject is empty (RFC 5280 section 4.2.1.6), for both sides of mutual TLS.
    pub(super) fn sign(
        &self,
        key: &impl PublicKeyData,
        identity: &SpiffeId,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Issued, CaError> {
        self.sign_leaf(
            key,
            vec![SanType::URI(Ia5String::try_from(identity.to_string())?)],
            vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ],
            lifetime,
            now,
        )
    }

    fn sign_leaf(
        &self,
        key: &impl PublicKeyData,
        names: Vec<SanType>,
        usages: Vec<ExtendedKeyUsagePurpose>,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Issued, CaError> {
        let not_before = now - BACKDATE;
        // Never beyond the root itself.
        let not_after =
            (now + lifetime).min(SystemTime::UNIX_EPOCH + Duration::from_secs(self.not_after));
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = usages;
        params.use_authority_key_identifier_extension = true;
        params.not_before = not_before.into();
        params.not_after = not_after.into();
        let certificate = params.signed_by(key, &self.issuer)?;
        Ok(Issued {
            leaf: certificate.der().clone(),
            chain: self.chain.clone(),
            not_before: unix(not_before),
            not_after: unix(not_after),
        })
    }
}

impl Signer {
    fn subject_of(certificate: &X509Certificate<'_>) -> Self {
        let key = certificate.extensions().iter().find_map(|extension| {
            match extension.parsed_extension() {
                ParsedExtension::SubjectKeyIdentifier(key) => Some(key.0.to_vec()),
                _ => None,
            }
        });
        Self {
            name: certificate.subject().as_raw().to_vec(),
            key,
        }
    }

    /// Whom a leaf names.
    pub fn issuer_of(leaf: &X509Certificate<'_>) -> Self {
        let key =
            leaf.extensions()
                .iter()
                .find_map(|extension| match extension.parsed_extension() {
                    ParsedExtension::AuthorityKeyIdentifier(authority) => {
                        authority.key_identifier.as_ref().map(|key| key.0.to_vec())
                    }
                    _ => None,
                });
        Self {
            name: leaf.issuer().as_raw().to_vec(),
            key,
        }
    }
}

/// SHA-256 of a certificate, hexadecimal.
pub(super) fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, certificate);
    digest
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// RFC 7468.
pub(super) fn pem(certificate: &CertificateDer<'_>) -> String {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
    let encoded = STANDARD.encode(certificate);
    let mut rest = encoded.as_str();
    while !rest.is_empty() {
        let (line, more) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = more;
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}
