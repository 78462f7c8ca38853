//! A certificate authority of somebody else's, for services outside the mesh.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// Self-signed, with a key of its own.
#[derive(Debug)]
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    #[allow(clippy::new_without_default)] // Makes a key: nothing that a default should do.
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub fn der(&self) -> CertificateDer<'static> {
        self.0.der().clone()
    }

    /// Its certificate as PEM.
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// Its certificate as a block of YAML, under a key with `spaces` before it.
    pub fn yaml(&self, spaces: usize) -> String {
        block(&self.pem(), spaces)
    }

    /// A Secret of Kubernetes with its key, as cert-manager writes it for a CA certificate.
    pub fn secret(&self, name: &str) -> String {
        let certificate = self.yaml(2);
        format!(
            "apiVersion: v1\nkind: Secret\nmetadata: {{name: {name}}}\nstringData:\n  ca.crt: {certificate}\n  \
             tls.crt: {certificate}\n  tls.key: {}\n",
            block(&self.0.key().serialize_pem(), 2),
        )
    }

    /// A certificate for a server of these names.
    pub fn issue(&self, names: &[&str]) -> Issued {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let params = CertificateParams::new(names).unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Issued { certificate, key }
    }
}

/// A server's certificate with its key.
#[derive(Debug)]
pub struct Issued {
    certificate: rcgen::Certificate,
    key: KeyPair,
}

impl Issued {
    /// As rustls takes it.
    pub fn pair(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = PrivatePkcs8KeyDer::from(self.key.serialize_der());
        (vec![self.certificate.der().clone()], key.into())
    }

    /// A Secret of Kubernetes with `tls.crt` and `tls.key`.
    pub fn secret(&self, name: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Secret\nmetadata: {{name: {name}}}\nstringData:\n  tls.crt: {}\n  tls.key: {}\n",
            block(&self.certificate.pem(), 2),
            block(&self.key.serialize_pem(), 2),
        )
    }
}

fn block(text: &str, spaces: usize) -> String {
    let indent = " ".repeat(spaces + 2);
    let lines = text.lines().map(|line| format!("\n{indent}{line}"));
    format!("|{}", lines.collect::<String>())
}
