//! What the parts of Weft agree on. No I/O happens here.
//!
//! - [`proto`]: the protocol between control plane and proxy (`api/proto`).
//! - [`identity`]: SPIFFE identities.
//! - [`names`]: ports, ALPN names and other constants that both ends must spell alike.
//! - [`policy`]: the kinds of `policy.weft.dev/v1alpha1` as people write them in YAML.

#![forbid(unsafe_code)]

pub mod identity;
pub mod names;
pub mod policy;
pub mod provenance;

/// Generated from `api/proto/weft/v1`.
#[allow(clippy::all, clippy::pedantic, clippy::unwrap_used)]
#[allow(rustdoc::invalid_html_tags)] // Comments of the .proto, as they stand there.
pub mod proto {
    tonic::include_proto!("weft.v1");
}
