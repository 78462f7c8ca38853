//! TLS with servers outside the mesh, for applications that speak in the clear.
//!
//! Unlike between proxies the server is known by its DNS name or address (RFC 9525), and TLS 1.2
//! will do. Sessions are resumed where the server lets us: its name and roots are part of the
//! configuration, so what is resumed was verified by the same rules.

use std::fmt;
use std::sync::{Arc, OnceLock};

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName};
use weft_api::proto::OriginateTls;

use super::credentials::{Alpn, Credentials};

/// How TLS is spoken with the endpoints of a backend.
pub struct Origin {
    given: OriginateTls,
    name: ServerName<'static>,
    /// There is nobody who could have signed the server's certificate.
    no_roots: bool,
    template: ClientConfig,
    /// By what is spoken inside: HTTP/1, HTTP/2, anything.
    ready: [Arc<ClientConfig>; 3],
}

/// Why there can be no TLS with a server.
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    #[error("'{0}' is not the name of a server")]
    Name(String),
    #[error("a root certificate cannot be used: {0}")]
    Root(rustls::Error),
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
    #[error(
        "this proxy's system trusts no certificates (SSL_CERT_FILE says where they are); write caCertificates"
    )]
    NoRoots,
    #[error("this proxy has no certificate of its own to show yet")]
    NoCertificate,
}

impl Origin {
    /// # Errors
    /// The name or a root makes no sense.
    pub fn new(given: &OriginateTls) -> Result<Self, OriginError> {
        let name = ServerName::try_from(given.server_name.clone())
            .map_err(|_| OriginError::Name(given.server_name.clone()))?;
        let roots = if given.roots.is_empty() {
            system_roots()
        } else {
            let mut roots = RootCertStore::empty();
            for root in &given.roots {
                let root = CertificateDer::from(root.to_vec());
                roots.add(root).map_err(OriginError::Root)?;
            }
            Arc::new(roots)
        };
        let no_roots = roots.is_empty();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let template = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let ready = [Alpn::Http1, Alpn::H2, Alpn::Tcp].map(|alpn| Arc::new(with(&template, alpn)));
        Ok(Self {
            given: given.clone(),
            name,
            no_roots,
            template,
            ready,
        })
    }

    /// Whom the certificate must name.
    pub fn name(&self) -> &ServerName<'static> {
        &self.name
    }

    /// The configuration for a connection inside which `alpn` is spoken.
    ///
    /// # Errors
    /// There is no root to trust, or no certificate of our own where one is to be shown.
    pub fn config(
        &self,
        alpn: Alpn,
        own: Option<&Credentials>,
    ) -> Result<Arc<ClientConfig>, OriginError> {
        if self.no_roots {
            return Err(OriginError::NoRoots);
        }
        if !self.given.mutual {
            return Ok(self.ready[alpn as usize].clone());
        }
        let own = own.ok_or(OriginError::NoCertificate)?;
        let mut config = with(&self.template, alpn);
        config.client_auth_cert_resolver = own.shown();
        // A session is of the certificate it was begun with, and ours change.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::new(config))
    }
}

/// Names of the IANA registry instead of our own.
fn with(template: &ClientConfig, alpn: Alpn) -> ClientConfig {
    let mut config = template.clone();
    config.alpn_protocols = match alpn {
        Alpn::Http1 => vec![b"http/1.1".to_vec()],
        Alpn::H2 => vec![b"h2".to_vec()],
        // Streams are shared with proxies only.
        Alpn::Tcp | Alpn::Mux => Vec::new(),
    };
    config
}

/// Roots that the system trusts, read once: from `SSL_CERT_FILE`, `SSL_CERT_DIR` or where the
/// distribution keeps them.
fn system_roots() -> Arc<RootCertStore> {
    static ROOTS: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    let read = || {
        let found = rustls_native_certs::load_native_certs();
        let mut roots = RootCertStore::empty();
        let (taken, left) = roots.add_parsable_certificates(found.certs);
        for error in &found.errors {
            tracing::warn!("the system's trusted certificates: {error}");
        }
        tracing::info!(
            taken,
            left,
            "the system's trusted certificates have been read"
        );
        Arc::new(roots)
    };
    ROOTS.get_or_init(read).clone()
}

impl PartialEq for Origin {
    fn eq(&self, other: &Self) -> bool {
        self.given == other.given
    }
}

impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Origin")
            .field("name", &self.given.server_name)
            .field("mutual", &self.given.mutual)
            .finish_non_exhaustive()
    }
}
