//! A certificate with its key, the roots of the moment, and the TLS configurations made of both.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::NoServerSessionStorage;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{CipherSuite, ClientConfig, ServerConfig, SupportedCipherSuite};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use weft_api::identity::SpiffeId;
use weft_api::names;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::trust::TrustBundle;
use super::verify::{PeerError, Side, SpiffeVerifier, peer_identity, same_anchor, verify_chain};

/// What is inside a mutual-TLS connection between proxies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Alpn {
    Http1,
    H2,
    Tcp,
    /// Streams, each of which says what is inside it.
    Mux,
}

impl Alpn {
    /// As it stands in the handshake.
    pub fn wire(self) -> &'static [u8] {
        match self {
            Alpn::Http1 => names::ALPN_HTTP1,
            Alpn::H2 => names::ALPN_H2,
            Alpn::Tcp => names::ALPN_TCP,
            Alpn::Mux => names::ALPN_MUX,
        }
    }

    /// Reads what was negotiated; `None` for a name that is not ours.
    pub fn from_wire(name: &[u8]) -> Option<Self> {
        [Alpn::Http1, Alpn::H2, Alpn::Tcp, Alpn::Mux]
            .into_iter()
            .find(|alpn| alpn.wire() == name)
    }
}

/// HTTP/2 as the control plane's gRPC server knows it.
const ALPN_GRPC: &[u8] = b"h2";

/// Client configurations kept at most; past this the cache begins anew. One takes about 0.5 KiB.
const MAX_CLIENT_CONFIGS: usize = 4096;

/// By peer, what is inside, and whether the connection may be shared.
type ClientConfigs = HashMap<(Arc<SpiffeId>, Alpn, bool), Arc<ClientConfig>>;

/// The certificate in use and what is trusted: replaced whole on renewal and root rotation.
///
/// Sessions are never resumed, neither by tickets nor by stored sessions: a resumed handshake
/// skips the certificates, so a peer whose identity, expiry or root is no longer good would still
/// come in. A full handshake costs about 0.3 ms of CPU on each side; connections are pooled.
pub struct Credentials {
    pub id: SpiffeId,
    pub not_before: SystemTime,
    pub expires: SystemTime,
    /// Grows with every replacement.
    pub generation: u64,
    key: Arc<CertifiedKey>,
    trust: Arc<TrustBundle>,
    /// Whether the root our certificate hangs on is trusted now, and is the one that signs.
    issuer: Issuer,
    provider: Arc<CryptoProvider>,
    client_template: ClientConfig,
    clients: ArcSwap<ClientConfigs>,
    server: Arc<ServerConfig>,
}

/// Where the own certificate's chain ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Issuer {
    /// At the root that new certificates hang on.
    Signing,
    /// At another root that is still trusted: a rotation is under way.
    Older,
    /// At none that is trusted now: peers refuse the certificate.
    Unknown,
}

/// Why a certificate that was issued cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error("the issued certificate cannot be read: {0}")]
    Malformed(String),
    #[error("the issued certificate names no workload: {0}")]
    Identity(#[from] PeerError),
    #[error("the issued certificate is for {shown}, not of the trust domain '{ours}'")]
    ForeignTrustDomain { shown: Box<SpiffeId>, ours: String },
    #[error("the issued certificate does not hold with the roots that are trusted: {0}")]
    Chain(String),
    #[error("the issued certificate and the key do not go together: {0}")]
    Key(String),
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
}

/// TLS 1.3 suites of aws-lc-rs; the post-quantum hybrid first, then X25519.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = vec![
        aws_lc_rs::kx_group::X25519MLKEM768,
        aws_lc_rs::kx_group::X25519,
    ];
    provider
        .cipher_suites
        .retain(|suite| matches!(suite, SupportedCipherSuite::Tls13(_)));
    // 128 bits are what X25519 and P-256 give; AES-128 is the cheaper one.
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// The name handed to rustls for outgoing connections: it is neither sent (SNI is off) nor
/// compared, the identity is.
pub fn server_name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into())
}

/// The control plane's own identity in a trust domain.
pub fn control_plane_id(trust_domain: &str) -> Arc<SpiffeId> {
    Arc::new(SpiffeId {
        trust_domain: trust_domain.to_owned(),
        namespace: names::CONTROL_PLANE_NAMESPACE.to_owned(),
        service_account: names::CONTROL_PLANE_SERVICE_ACCOUNT.to_owned(),
    })
}

/// For asking for the first certificate: the server is verified, nothing of ours is shown.
pub(crate) fn anonymous_config(
    trust: &Arc<TrustBundle>,
    expected: Arc<SpiffeId>,
) -> Result<Arc<ClientConfig>, rustls::Error> {
    let provider = provider();
    let verifier = SpiffeVerifier {
        trust: trust.clone(),
        expected: Some(expected),
        algorithms: provider.signature_verification_algorithms,
    };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![ALPN_GRPC.to_vec()];
    Ok(Arc::new(config))
}

impl Credentials {
    /// Puts together a chain (leaf first), its key (PKCS#8) and the roots. The chain must hold
    /// with the roots now, and name exactly one workload of the trust domain.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        trust: Arc<TrustBundle>,
        generation: u64,
    ) -> Result<Self, CredentialsError> {
        let provider = provider();
        let key = provider.key_provider.load_private_key(key)?;
        let key = CertifiedKey::new(chain, key);
        key.keys_match()
            .map_err(|e| CredentialsError::Key(e.to_string()))?;
        Self::assemble(Arc::new(key), trust, generation, provider, true)
    }

    /// The same certificate with other roots. Does not fail when the certificate no longer hangs
    /// on one of them: it is still the one we have, [`Credentials::issuer`] says so.
    pub fn with_trust(
        &self,
        trust: Arc<TrustBundle>,
        generation: u64,
    ) -> Result<Self, CredentialsError> {
        Self::assemble(
            self.key.clone(),
            trust,
            generation,
            self.provider.clone(),
            false,
        )
    }

    fn assemble(
        key: Arc<CertifiedKey>,
        trust: Arc<TrustBundle>,
        generation: u64,
        provider: Arc<CryptoProvider>,
        must_hold: bool,
    ) -> Result<Self, CredentialsError> {
        let id = peer_identity(&key.cert)?;
        if id.trust_domain != trust.domain() {
            return Err(CredentialsError::ForeignTrustDomain {
                shown: Box::new(id),
                ours: trust.domain().to_owned(),
            });
        }
        let leaf = key.cert.first().ok_or(PeerError::NoCertificate)?;
        let (not_before, expires) = validity(leaf)?;
        let algorithms = provider.signature_verification_algorithms;
        let mut issuer = Issuer::Signing;
        for side in [Side::Server, Side::Client] {
            let now = UnixTime::now();
            match verify_chain(&trust, &algorithms, leaf, &key.cert[1..], now, side) {
                Ok(anchor) if same_anchor(anchor, trust.signing_anchor()) => {}
                Ok(_) => issuer = Issuer::Older,
                Err(error) if must_hold => {
                    return Err(CredentialsError::Chain(error.to_string()));
                }
                Err(_) => issuer = Issuer::Unknown,
            }
        }
        let resolver = Arc::new(SingleCertAndKey::from(CertifiedKey::clone(&key)));
        let any = Arc::new(SpiffeVerifier {
            trust: trust.clone(),
            expected: None,
            algorithms,
        });
        let mut client_template = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(any.clone())
            .with_client_cert_resolver(resolver.clone());
        client_template.enable_sni = false;
        client_template.resumption = Resumption::disabled();
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(any)
            .with_cert_resolver(resolver);
        // The first of these that a client offers is taken.
        server.alpn_protocols = [Alpn::Mux, Alpn::H2, Alpn::Http1, Alpn::Tcp]
            .map(|alpn| alpn.wire().to_vec())
            .into();
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self {
            id,
            not_before,
            expires,
            generation,
            key,
            trust,
            issuer,
            provider,
            client_template,
            clients: ArcSwap::default(),
            server: Arc::new(server),
        })
    }

    /// For connections to a peer that must show `expected`; offers only `alpn`. Use it with
    /// [`server_name`]. Kept per identity and ALPN; a lookup takes no lock.
    pub fn client_config(&self, expected: &Arc<SpiffeId>, alpn: Alpn) -> Arc<ClientConfig> {
        self.kept(expected, alpn, false)
    }

    /// The same for a connection that streams can share; `alpn` is what is inside when the peer
    /// knows of no shared connections.
    pub fn shared_config(&self, expected: &Arc<SpiffeId>, alpn: Alpn) -> Arc<ClientConfig> {
        self.kept(expected, alpn, true)
    }

    fn kept(&self, expected: &Arc<SpiffeId>, alpn: Alpn, shared: bool) -> Arc<ClientConfig> {
        let key = (expected.clone(), alpn, shared);
        if let Some(config) = self.clients.load().get(&key) {
            return config.clone();
        }
        let shared = shared.then(|| Alpn::Mux.wire());
        let offered = shared.into_iter().chain([alpn.wire()]);
        let config = self.client_for(expected.clone(), offered);
        self.clients.rcu(|known| {
            let mut known = if known.len() < MAX_CLIENT_CONFIGS {
                ClientConfigs::clone(known)
            } else {
                ClientConfigs::default()
            };
            known.insert(key.clone(), config.clone());
            known
        });
        config
    }

    /// For incoming connections: takes the Weft ALPN names, wants a client certificate of
    /// the trust domain; [`peer_identity`] of the connection's peer certificates says whose.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// For the discovery stream: shows our certificate, wants the control plane's identity.
    pub(crate) fn control_plane_config(&self) -> Arc<ClientConfig> {
        self.client_for(control_plane_id(self.trust.domain()), [ALPN_GRPC])
    }

    fn client_for<'a>(
        &self,
        expected: Arc<SpiffeId>,
        alpn: impl IntoIterator<Item = &'a [u8]>,
    ) -> Arc<ClientConfig> {
        let mut config = self.client_template.clone();
        config.alpn_protocols = alpn.into_iter().map(<[u8]>::to_vec).collect();
        config
            .dangerous()
            .set_certificate_verifier(Arc::new(SpiffeVerifier {
                trust: self.trust.clone(),
                expected: Some(expected),
                algorithms: self.provider.signature_verification_algorithms,
            }));
        Arc::new(config)
    }

    /// Shows our certificate to whoever asks for one.
    pub(crate) fn shown(&self) -> Arc<dyn ResolvesClientCert> {
        self.client_template.client_auth_cert_resolver.clone()
    }

    /// The certificate itself, DER.
    pub(crate) fn leaf(&self) -> &[u8] {
        // There is one: without it nothing is assembled.
        self.key.cert.first().map_or(&[], |leaf| leaf.as_ref())
    }

    /// What is trusted now.
    pub fn trust(&self) -> &Arc<TrustBundle> {
        &self.trust
    }

    /// Where our own chain ends.
    pub fn issuer(&self) -> Issuer {
        self.issuer
    }

    /// Whether our certificate hangs on a root that is trusted now.
    pub fn is_trusted(&self) -> bool {
        self.issuer != Issuer::Unknown
    }

    /// Life left; zero once expired.
    pub fn remaining(&self) -> Duration {
        self.expires
            .duration_since(SystemTime::now())
            .unwrap_or_default()
    }
}

/// Not before and not after of a certificate.
fn validity(leaf: &CertificateDer<'_>) -> Result<(SystemTime, SystemTime), CredentialsError> {
    let malformed = |e: String| CredentialsError::Malformed(e);
    let (_, leaf) = X509Certificate::from_der(leaf).map_err(|e| malformed(e.to_string()))?;
    let time = |seconds: i64| {
        u64::try_from(seconds)
            .map(|s| SystemTime::UNIX_EPOCH + Duration::from_secs(s))
            .map_err(|_| malformed("its validity lies before 1970".into()))
    };
    let validity = leaf.validity();
    Ok((
        time(validity.not_before.timestamp())?,
        time(validity.not_after.timestamp())?,
    ))
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("id", &self.id)
            .field("expires", &self.expires)
            .field("generation", &self.generation)
            .field("issuer", &self.issuer)
            .finish_non_exhaustive()
    }
}
