//! Who the proxy is: key, certificate, renewal, and the TLS configurations made from them.

use std::sync::Arc;
use std::time::SystemTime;

use weft_api::identity::SpiffeId;

/// What is inside a mutual-TLS connection between proxies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Alpn {
    Http1,
    H2,
    Tcp,
}

/// The certificate in use and what is trusted: replaced whole on renewal and root rotation.
pub struct Credentials {
    pub id: SpiffeId,
    pub expires: SystemTime,
    /// Grows with every replacement.
    pub generation: u64,
}

impl Credentials {
    /// For connections to a peer that must show `expected`; offers only `alpn`.
    pub fn client_config(&self, expected: &Arc<SpiffeId>, alpn: Alpn) -> Arc<rustls::ClientConfig> {
        let _ = (expected, alpn);
        unreachable!()
    }

    /// For incoming connections: takes the three Weft ALPN names, wants a client certificate.
    pub fn server_config(&self) -> Arc<rustls::ServerConfig> {
        unreachable!()
    }
}
