//! Network namespaces for `weft demo` and `weft run`, with nothing installed and, for the demo, no
//! rights needed.
//!
//! The way through: [`isolate()`] is called first thing in `main`, before any thread. It moves the
//! process into namespaces of its own, under a supervisor that ends everything inside when the
//! process ends, however it ends. Then a [`Fabric`] lays a bridge, and each [`Fabric::add_host`] a
//! network namespace joined to it by a veth pair, with an IPv4 and an IPv6 address and default
//! routes through the bridge (so that a virtual address can be dialled; capture takes it before it
//! leaves). [`Host::command`] makes commands that run there.
//!
//! The process itself stays in the namespace that has the bridge: what listens on
//! [`Fabric::v4`] (the control plane, a collector) is reachable from every host.
//!
//! Nothing is mounted or named where others could see it: network namespaces are held by file
//! descriptors and by the processes in them, and files that a host sees differently ([`Launch`])
//! exist in that process's mount namespace only.

mod error;
mod fabric;
mod isolate;
mod launch;
mod links;

pub use error::{Error, Refused};
pub use fabric::{Exemption, Fabric, FabricOptions, Host};
pub use isolate::{Network, isolate};
pub use launch::{Launch, hosts_file};

/// The user and group a proxy runs as, where users can be switched; capture exempts it by default.
pub const PROXY_ID: u32 = 1337;

/// The socket mark of a proxy that shares its user with the application
/// (`weft-proxy init --proxy-mark`).
pub const PROXY_MARK: u32 = 0x539;
