//! A certificate authority that the user brings, as cert-manager writes it: a Secret with `tls.crt`
//! (what signs, and intermediates above it), `tls.key` (its key) and `ca.crt` (the root).
//!
//! It is copied into our own store as the newest root, and a change of it is a root rotation like
//! any other: the new one is trusted everywhere before it signs, the old one until nothing hangs
//! on it. So the old key outlives the Secret it came from, in the Secret beside it.

use std::sync::Arc;
use std::time::SystemTime;

use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use weft_api::identity::SpiffeId;
use weft_api::names::{CONTROL_PLANE_NAMESPACE, CONTROL_PLANE_SERVICE_ACCOUNT};

use super::root::{Material, Root, fingerprint, pem};
use super::rotation::State;
use super::{Authority, MIN_LIFETIME};

/// What begins the ids of roots that were brought.
const PREFIX: &str = "brought-";

/// The user's Secret, as it was seen last.
pub(super) struct Brought {
    place: String,
    material: Option<Material>,
}

impl Brought {
    pub(super) fn new(place: String, material: Material) -> Self {
        Self {
            place,
            material: Some(material),
        }
    }

    /// Not there, or not good, now.
    pub(super) fn waiting(place: String) -> Self {
        Self {
            place,
            material: None,
        }
    }

    /// Where it is, for people.
    pub(super) fn place(&self) -> &str {
        &self.place
    }

    pub(super) fn set(&mut self, material: Material) {
        self.material = Some(material);
    }
}

impl Authority {
    /// What the user has brought, when it is not the newest root yet and no rotation is under way.
    pub(super) fn brought_and_new(&self, state: &State) -> Option<Material> {
        let brought = self
            .brought
            .as_ref()?
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        brought
            .material
            .clone()
            .filter(|material| state.roots.last() != Some(&material.id))
            .filter(|_| matches!(state.phase, super::Phase::Stable))
    }
}

/// Reads `tls.crt`, `tls.key` and `ca.crt`, and tries them: a leaf signed with them must be good
/// for those who trust the root.
///
/// # Errors
/// What is wrong with them, as a sentence.
pub(super) fn read(
    certificate: &str,
    key: &str,
    root: Option<&str>,
    trust_domain: &str,
    now: SystemTime,
) -> Result<Material, String> {
    let certificates = |name: &str, text: &str| -> Result<Vec<CertificateDer<'static>>, String> {
        CertificateDer::pem_slice_iter(text.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(|error| format!("{name} is not PEM: {error}"))
    };
    let mut chain = certificates("tls.crt", certificate)?;
    let signing = chain.first().ok_or("tls.crt has no certificate")?.clone();
    let top = chain.last().cloned().unwrap_or_else(|| signing.clone());
    if !issued_by(&top, &top) {
        // An intermediate: the root is in ca.crt, among others perhaps.
        let root = certificates("ca.crt", root.unwrap_or_default())?
            .into_iter()
            .find(|candidate| issued_by(&top, candidate))
            .ok_or(
                "tls.crt is not self-signed, and ca.crt has no certificate that it was issued by; put the root there",
            )?;
        chain.push(root);
    }
    let id = format!("{PREFIX}{}", &fingerprint(&signing)[..16]);
    let material = Material {
        id,
        certificates: chain.iter().map(pem).collect(),
        key: key.to_owned(),
    };
    let root = Root::load(&material)?;
    try_it(&root, trust_domain, now)?;
    Ok(material)
}

/// By name; the signature is checked by what verifies the whole chain.
fn issued_by(certificate: &CertificateDer<'_>, issuer: &CertificateDer<'_>) -> bool {
    let (Ok((_, certificate)), Ok((_, issuer))) = (
        x509_parser::parse_x509_certificate(certificate),
        x509_parser::parse_x509_certificate(issuer),
    ) else {
        return false;
    };
    certificate.issuer().as_raw() == issuer.subject().as_raw()
}

/// Signs a leaf and verifies it as a proxy does.
fn try_it(root: &Root, trust_domain: &str, now: SystemTime) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let identity = SpiffeId::new(
        trust_domain,
        CONTROL_PLANE_NAMESPACE,
        CONTROL_PLANE_SERVICE_ACCOUNT,
    )
    .map_err(|error| text(&error))?;
    let key = rcgen::KeyPair::generate().map_err(|error| text(&error))?;
    let issued = root
        .sign(&key, &identity, MIN_LIFETIME, now)
        .map_err(|error| text(&error))?;
    let mut roots = RootCertStore::empty();
    roots.add(root.der.clone()).map_err(|error| text(&error))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .map_err(|error| text(&error))?;
    let since = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    verifier
        .verify_client_cert(
            &issued.leaf,
            &issued.chain,
            UnixTime::since_unix_epoch(since),
        )
        .map_err(|error| format!("a certificate signed with it does not hold: {error}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rcgen::{
        BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    };

    use super::*;

    struct Made {
        key: KeyPair,
        params: CertificateParams,
        pem: String,
    }

    fn params(name: &str, ca: bool) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        if ca {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        }
        params
    }

    fn root(name: &str) -> Made {
        let (key, params) = (KeyPair::generate().unwrap(), params(name, true));
        let pem = params.self_signed(&key).unwrap().pem();
        Made { key, params, pem }
    }

    fn below(above: &Made, name: &str, ca: bool) -> Made {
        let (key, params) = (KeyPair::generate().unwrap(), params(name, ca));
        let issuer = Issuer::from_params(&above.params, &above.key);
        let pem = params.signed_by(&key, &issuer).unwrap().pem();
        Made { key, params, pem }
    }

    fn take(certificate: &str, key: &KeyPair, ca: Option<&str>) -> Result<Material, String> {
        let now = SystemTime::now();
        read(certificate, &key.serialize_pem(), ca, "cluster.local", now)
    }

    #[test]
    fn a_root_and_an_intermediate_are_taken() {
        let root = root("company");
        let material = take(&root.pem, &root.key, Some(&root.pem)).unwrap();
        let loaded = Root::load(&material).unwrap();
        let identity = SpiffeId::new("cluster.local", "shop", "cart").unwrap();
        let key = KeyPair::generate().unwrap();
        let sign = |root: &Root| {
            root.sign(&key, &identity, MIN_LIFETIME, SystemTime::now())
                .unwrap()
        };
        assert_eq!(sign(&loaded).full_chain().len(), 1);
        assert_eq!(
            take(&root.pem, &root.key, None).unwrap(),
            material,
            "ca.crt says nothing new"
        );

        let middle = below(&root, "mesh", true);
        let other = super::tests::root("other");
        let ca = format!("{}{}", other.pem, root.pem);
        let material = take(&middle.pem, &middle.key, Some(&ca)).unwrap();
        let loaded = Root::load(&material).unwrap();
        assert_eq!(
            sign(&loaded).full_chain().len(),
            2,
            "the intermediate is shown"
        );
        let (_, leaf) = x509_parser::parse_x509_certificate(&sign(&loaded).leaf)
            .map(|(rest, leaf)| {
                (
                    rest.len(),
                    loaded.signed(&super::super::root::Signer::issuer_of(&leaf)),
                )
            })
            .unwrap();
        assert!(leaf);
        let der = CertificateDer::from_pem_slice(root.pem.as_bytes()).unwrap();
        assert_eq!(loaded.der, der, "the root is what is trusted");
    }

    #[test]
    fn what_cannot_work_is_said() {
        let root = root("company");
        let middle = below(&root, "mesh", true);
        let leaf = below(&root, "leaf", false);
        let other = super::tests::root("other");
        // Of the same name, but not what signed it.
        let impostor = super::tests::root("company");
        let mut expired = params("old", true);
        expired.not_after = (SystemTime::now() - Duration::from_secs(3600)).into();
        let old_key = KeyPair::generate().unwrap();
        let old = expired.self_signed(&old_key).unwrap().pem();
        for (what, certificate, key, ca, said) in [
            ("not PEM", "nonsense", &root.key, None, "has no certificate"),
            (
                "another key",
                root.pem.as_str(),
                &other.key,
                None,
                "its key is not the one",
            ),
            (
                "a leaf",
                leaf.pem.as_str(),
                &leaf.key,
                Some(&root.pem),
                "not a certificate authority",
            ),
            (
                "no root",
                middle.pem.as_str(),
                &middle.key,
                None,
                "put the root there",
            ),
            (
                "another root",
                middle.pem.as_str(),
                &middle.key,
                Some(&other.pem),
                "put the root there",
            ),
            (
                "an impostor",
                middle.pem.as_str(),
                &middle.key,
                Some(&impostor.pem),
                "does not hold",
            ),
            ("expired", old.as_str(), &old_key, None, "does not hold"),
        ] {
            let error = take(certificate, key, ca.map(String::as_str)).unwrap_err();
            assert!(error.contains(said), "{what}: {error}");
        }
    }
}
