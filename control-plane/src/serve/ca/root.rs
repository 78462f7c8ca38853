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

use super::store::Store;
use super::{CaError, unix};

/// How long a root lives: ten years of 365.25 days.
const ROOT_LIFETIME: Duration = Duration::from_secs(315_576_000);
/// Certificates are valid from a little before they were signed, for clocks that are behind.
const BACKDATE: Duration = Duration::from_secs(60);

/// A root with its key.
pub(super) struct Root {
    pub(super) id: String,
    pub(super) der: CertificateDer<'static>,
    pub(super) pem: String,
    /// Seconds since the Unix epoch.
    pub(super) not_after: u64,
    issuer: Issuer<'static, KeyPair>,
}

/// A leaf that was signed.
#[derive(Clone, Debug)]
pub struct Issued {
    /// DER.
    pub leaf: CertificateDer<'static>,
    /// All roots trusted are in [`super::Authority::roots`]; times in seconds since the Unix epoch.
    pub not_before: u64,
    pub not_after: u64,
}

fn certificate_file(id: &str) -> String {
    format!("root-{id}.crt.pem")
}

fn key_file(id: &str) -> String {
    format!("root-{id}.key.pem")
}

impl Root {
    /// Makes a root and keeps it.
    pub(super) fn create(
        store: &Store,
        trust_domain: &str,
        now: SystemTime,
    ) -> Result<Self, CaError> {
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
        let pem = params.self_signed(&key)?.pem();
        // Nothing uses these files until the state names them.
        store.write(&key_file(&id), key.serialize_pem().as_bytes())?;
        store.write(&certificate_file(&id), pem.as_bytes())?;
        Self::load(store, &id)
    }

    pub(super) fn load(store: &Store, id: &str) -> Result<Self, CaError> {
        let read = |name: &str| {
            let damaged = |reason: &str| CaError::Damaged {
                path: store.path(name),
                reason: reason.to_owned(),
            };
            store.read(name)?.ok_or_else(|| damaged("it is missing"))
        };
        let name = certificate_file(id);
        let damaged = |reason: String| CaError::Damaged {
            path: store.path(&name),
            reason,
        };
        let pem = read(&name)?;
        let der = CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| damaged(error.to_string()))?;
        let key = KeyPair::from_pem(&read(&key_file(id))?).map_err(|error| CaError::Damaged {
            path: store.path(&key_file(id)),
            reason: error.to_string(),
        })?;
        let not_after = {
            let (_, parsed) = x509_parser::parse_x509_certificate(&der)
                .map_err(|error| damaged(error.to_string()))?;
            if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
                return Err(damaged("its key is not the one beside it".to_owned()));
            }
            u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0)
        };
        let issuer = Issuer::from_ca_cert_der(&der, key)?;
        Ok(Self {
            id: id.to_owned(),
            der,
            pem,
            not_after,
            issuer,
        })
    }

    /// Removes a root that is no longer named by the state; what stays behind does no harm.
    pub(super) fn remove(store: &Store, id: &str) {
        for name in [key_file(id), certificate_file(id)] {
            if let Err(error) = store.remove(&name) {
                tracing::warn!("{error}");
            }
        }
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
            not_before: unix(not_before),
            not_after: unix(not_after),
        })
    }
}
