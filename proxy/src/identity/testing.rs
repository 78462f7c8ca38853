//! Certificates for tests.

use std::convert::Infallible;
use std::sync::Arc;

use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls::ServerConfig;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;

use super::{Credentials, TrustBundle};

pub(crate) const DOMAIN: &str = "cluster.local";

/// A certificate authority.
pub(crate) struct Authority {
    pub cert: CertificateDer<'static>,
    pub pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// `age` tells roots apart by the day they became valid: larger is newer.
    pub(crate) fn new(name: &str, age: u8) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.not_before = rcgen::date_time_ymd(2024, 1, age);
        params.not_after = rcgen::date_time_ymd(2100, 1, 1);
        let cert = params.self_signed(&key).unwrap();
        Self {
            cert: cert.der().clone(),
            pem: cert.pem(),
            issuer: Issuer::new(params, key),
        }
    }

    pub(crate) fn sign(
        &self,
        params: &CertificateParams,
        key: &impl PublicKeyData,
    ) -> CertificateDer<'static> {
        params.signed_by(key, &self.issuer).unwrap().der().clone()
    }

    /// Credentials of `id`, trusting `trusted`.
    pub(crate) fn credentials(&self, id: &str, trusted: &[&Authority]) -> Credentials {
        let key = KeyPair::generate().unwrap();
        let leaf = self.sign(&leaf(&[id]), &key);
        Credentials::new(vec![leaf], private(&key), trust(trusted), 1).unwrap()
    }
}

/// A leaf as the control plane issues it: URI SANs, both uses, a day.
pub(crate) fn leaf(uris: &[&str]) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.subject_alt_names = uris
        .iter()
        .map(|uri| SanType::URI(Ia5String::try_from(*uri).unwrap()))
        .collect();
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.not_before = std::time::SystemTime::now().into();
    params.not_after =
        (std::time::SystemTime::now() + std::time::Duration::from_secs(86_400)).into();
    params
}

pub(crate) fn private(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivatePkcs8KeyDer::from(key.serialize_der()).into()
}

pub(crate) fn trust(authorities: &[&Authority]) -> Arc<TrustBundle> {
    let roots = authorities.iter().map(|a| a.cert.clone());
    Arc::new(TrustBundle::new(DOMAIN, roots).unwrap())
}

/// `spiffe://cluster.local/ns/shop/sa/<account>`.
pub(crate) fn shop(account: &str) -> String {
    format!("spiffe://{DOMAIN}/ns/shop/sa/{account}")
}

/// A gRPC server's configuration that asks the client for nothing.
pub(crate) fn open_server(authority: &Authority, id: &str) -> Arc<ServerConfig> {
    let provider = super::credentials::provider();
    let key = KeyPair::generate().unwrap();
    let chain = vec![authority.sign(&leaf(&[id]), &key)];
    let key = provider
        .key_provider
        .load_private_key(private(&key))
        .unwrap();
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(CertifiedKey::new(
            chain, key,
        ))));
    server.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(server)
}

/// Serves gRPC on one connection.
pub(crate) fn serve<S>(io: TcpStream, acceptor: TlsAcceptor, service: S)
where
    S: tower::Service<
            http::Request<hyper::body::Incoming>,
            Response = http::Response<tonic::body::Body>,
            Error = Infallible,
            Future: Send,
        > + Clone
        + Send
        + 'static,
{
    tokio::spawn(async move {
        let Ok(tls) = acceptor.accept(io).await else {
            return;
        };
        let service = hyper::service::service_fn(move |request| service.clone().oneshot(request));
        let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(tls), service)
            .await;
    });
}
