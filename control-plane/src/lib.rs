//! The control plane: watches services and policies, tells proxies what to do, issues
//! certificates. It keeps nothing of its own but the certificate authority: the source (a folder,
//! Kubernetes) is the store.
//!
//! The way of a change: [`sources`] report objects -> [`model`] holds them -> [`compile`] makes the
//! tables -> [`serve`] sends them to the proxies that asked for them.

#![forbid(unsafe_code)]

pub mod check;
pub mod cluster;
pub mod compile;
pub mod finding;
pub mod inject;
pub mod model;
pub mod serve;
pub mod sources;
