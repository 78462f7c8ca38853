//! Who the proxy is: key, certificate, renewal, and the TLS configurations made from them.
//!
//! [`renewal`] asks the control plane for a certificate and keeps it fresh; the result is a
//! [`Credentials`], replaced whole behind a [`Handle`] that the workers read. [`trust`] is the set
//! of roots, [`verify`] decides whom a peer's certificate makes it, and says why not in plain
//! words ([`explain`]).
//!
//! [`origin`] is TLS with servers outside the mesh, by their DNS names.
//!
//! Key material never leaves memory: the key is made anew for every certificate.

mod credentials;
mod handle;
mod origin;
pub mod renewal;
#[cfg(test)]
mod renewal_tests;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
pub mod trust;
pub mod verify;

pub use credentials::{Alpn, Credentials, CredentialsError, server_name};
pub use handle::Handle;
pub use origin::{Origin, OriginError};
pub use trust::{TrustBundle, TrustError};
pub use verify::{PeerError, explain, peer_identity};
