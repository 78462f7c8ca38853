//! What the end-to-end tests stand on: the real binaries, on hosts of their own.
//!
//! - [`binaries`]: finds `weft-proxy` and `weft-control-plane`, building them when they are missing
//! - [`netns`]: network namespaces (the same code as `weft demo` runs on)
//! - [`kube`]: a real Kubernetes, by `kubectl` and `helm`
//! - [`dns`]: names that a test makes up
//! - [`mesh`]: a control plane with a folder of manifests, and hosts with a captured workload each
//! - [`wire`]: clients and servers that send and expect exact bytes
//! - [`sniff`]: what went over a host's wire
//! - [`traffic`]: requests in a loop from many clients, every failure kept

#![allow(clippy::unwrap_used)] // The whole crate is for tests.

pub mod authority;
pub mod binaries;
pub mod dns;
pub mod kube;
pub mod mesh;
#[allow(dead_code, unused_imports)]
#[path = "../../cli/src/netns/mod.rs"]
pub mod netns;
pub mod sniff;
pub mod traffic;
pub mod wire;

use std::time::{Duration, Instant};

/// The longest that anything may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until something holds; panics when it does not within `limit`.
#[track_caller]
pub fn eventually(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !holds() {
        assert!(
            Instant::now() < end,
            "after {limit:?} it still is not so that {what}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}
