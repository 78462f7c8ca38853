//! Capture: netfilter hands an application's TCP connections to the proxy, and the proxy asks
//! where they were going.
//!
//! The way through this room: [`Config`] says what is wanted; [`rules`] turns it into one list of
//! rules per address family (pure data); [`nftables`] speaks that list to the kernel as a single
//! atomic netlink batch, [`iptables`] as input for `iptables-restore` where a kernel has no
//! nf_tables; [`original_destination`] is what the listeners call afterwards. [`command`] is
//! `weft-proxy init`.
//!
//! # What is captured
//!
//! Outbound (nat OUTPUT), TCP only, to port 15001, unless the connection is the proxy's own
//! (user, group or socket mark), leaves by `lo`, is DNS over TCP, or is excluded. Inbound (nat PREROUTING), TCP
//! only, to port 15006, when the destination is an address of this network namespace and the port
//! is neither the proxy's own nor excluded. A nat chain sees only the first packet of a
//! connection, so replies and established connections are never touched. UDP is never touched.
//!
//! # Two tables, `ip weft` and `ip6 weft`
//!
//! NAT in the `inet` family needs Linux 5.2; in `ip` and `ip6` it works on every kernel that has
//! nf_tables at all, the rules are the same lists that iptables needs per family, and a machine
//! without IPv6 simply has one table less. Both tables are replaced in one netlink batch, which
//! the kernel commits or drops as a whole, so the two families never disagree.
//!
//! # Loopback, and a workload that calls itself
//!
//! Whatever leaves by `lo` is left alone. That is more than 127.0.0.0/8 and ::1: a connection to
//! one of the namespace's own addresses also goes over `lo`. So an application that dials its own
//! pod address reaches itself directly, and the inbound proxy reaches the application at the
//! original destination without being captured again. A workload that dials a Service of which it
//! is itself an endpoint is captured (a virtual address is not local); when the outbound proxy then
//! chooses this very workload, its connection also stays on `lo` and arrives at the application
//! without passing the inbound proxy. The outbound proxy must not speak mesh TLS on it: it can
//! tell, because such a connection has the same address at both ends (`local_addr().ip() ==
//! peer_addr().ip()`).

#![forbid(unsafe_code)]

pub mod command;
mod config;
mod error;
pub mod iptables;
mod netlink;
pub mod nftables;
mod original;
pub mod rules;
#[cfg(test)]
mod tests;

pub use config::{Cidr, Config, ParseCidrError, ParsePortRangeError, PortRange};
pub use error::Error;
pub use original::{NotRedirected, is_not_redirected, original_destination};
pub use rules::Family;

use std::path::Path;

/// How rules reach the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Backend {
    /// nftables, and iptables when the kernel refuses nf_tables.
    Auto,
    /// nf_tables over netlink; needs no program.
    Nftables,
    /// The `iptables-restore` and `ip6tables-restore` programs.
    Iptables,
}

/// The address families to program: IPv4, and IPv6 unless it is turned off or the kernel has none.
///
/// `/proc/net/if_inet6` is there exactly when the kernel's IPv6 is on.
#[must_use]
pub fn families(config: &Config) -> Vec<Family> {
    if config.ipv4_only || !Path::new("/proc/self/net/if_inet6").exists() {
        vec![Family::V4]
    } else {
        vec![Family::V4, Family::V6]
    }
}

/// Puts the rules in place, replacing any that stand. Returns the backend that took them.
///
/// # Errors
/// When the caller lacks CAP_NET_ADMIN, or when no backend the caller allows is accepted here.
pub fn apply(config: &Config, backend: Backend) -> Result<Backend, Error> {
    let tables = rules::tables(config, &families(config));
    match backend {
        Backend::Nftables => nftables::apply(&tables).map(|()| Backend::Nftables),
        Backend::Iptables => apply_iptables(&tables),
        Backend::Auto => match nftables::apply(&tables) {
            Ok(()) => Ok(Backend::Nftables),
            Err(nft) if nft.is_unsupported() => {
                apply_iptables(&tables).map_err(|iptables| Error::NoBackend {
                    nftables: Box::new(nft),
                    iptables: Box::new(iptables),
                })
            }
            Err(error) => Err(error),
        },
    }
}

fn apply_iptables(tables: &[rules::Table]) -> Result<Backend, Error> {
    // Rules of both kinds would both be consulted; the older ones must not decide.
    match nftables::remove() {
        Ok(()) => {}
        Err(error) if error.is_unsupported() => {}
        Err(error) => return Err(error),
    }
    iptables::apply(tables).map(|()| Backend::Iptables)
}

/// Removes the rules, whichever backend made them. Removing what is not there is no error.
///
/// # Errors
/// When the caller lacks CAP_NET_ADMIN, or a program that holds the rules fails.
pub fn remove(backend: Backend) -> Result<(), Error> {
    if backend != Backend::Iptables {
        match nftables::remove() {
            Err(error) if error.is_unsupported() && backend == Backend::Auto => {}
            other => other?,
        }
    }
    if backend != Backend::Nftables {
        iptables::remove()?;
    }
    Ok(())
}

/// Whether exactly the rules that `config` asks for stand. `Ok(None)` is yes; otherwise the first
/// difference, as a sentence.
///
/// # Errors
/// When the kernel cannot be asked.
pub fn check(config: &Config, backend: Backend) -> Result<Option<String>, Error> {
    let tables = rules::tables(config, &families(config));
    match backend {
        Backend::Nftables => nftables::check(&tables),
        Backend::Iptables => iptables::check(&tables),
        Backend::Auto => match nftables::check(&tables) {
            Ok(None) => Ok(None),
            Ok(Some(nft)) => match iptables::check(&tables) {
                Ok(None) => Ok(None),
                Ok(Some(_)) | Err(_) => Ok(Some(nft)),
            },
            Err(error) if error.is_unsupported() => iptables::check(&tables),
            Err(error) => Err(error),
        },
    }
}
