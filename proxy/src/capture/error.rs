//! What can go wrong, as sentences a person can act on.

use std::io;

use nix::errno::Errno;

/// Why capture rules could not be set, removed or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No CAP_NET_ADMIN.
    #[error(
        "{what} needs the CAP_NET_ADMIN capability in this network namespace: run it as root, or \
         in Kubernetes add NET_ADMIN (and NET_RAW for iptables) to the init container's \
         securityContext.capabilities"
    )]
    NotPermitted {
        /// What was tried.
        what: String,
    },
    /// The kernel has no nf_tables, or lacks a part that the rules need.
    #[error(
        "the kernel refused nftables while {step}: {errno}. It probably lacks a module: \
         try `modprobe -a nf_tables nft_chain_nat nft_redir nft_fib_ipv4 nft_fib_ipv6` on the \
         node, or use --backend iptables; where only IPv6 is missing, --ipv4-only leaves it alone"
    )]
    NftablesUnsupported {
        /// What was being done.
        step: String,
        /// The kernel's answer.
        errno: Errno,
    },
    /// The kernel refused for another reason.
    #[error("the kernel refused while {step}: {errno}")]
    Nftables {
        /// What was being done.
        step: String,
        /// The kernel's answer.
        errno: Errno,
    },
    /// Netlink itself failed.
    #[error("cannot talk to the kernel over netlink")]
    Netlink(#[source] io::Error),
    /// None of the programs that could set iptables rules is installed.
    #[error("none of {0} is installed")]
    ProgramMissing(String),
    /// A program ran and refused.
    #[error("`{program}` failed ({status}): {stderr}{hint}")]
    Program {
        /// The program, with its arguments.
        program: String,
        /// How it ended.
        status: String,
        /// What it said.
        stderr: String,
        /// What to do about it, when we know.
        hint: &'static str,
    },
    /// A program could not be started.
    #[error("cannot run `{program}`")]
    Spawn {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Neither backend works here.
    #[error("no way to set netfilter rules works here. nftables: {nftables}. iptables: {iptables}")]
    NoBackend {
        /// What nftables said.
        nftables: Box<Error>,
        /// What iptables said.
        iptables: Box<Error>,
    },
}

impl Error {
    /// Whether another backend may succeed where this one failed.
    #[must_use]
    pub fn is_unsupported(&self) -> bool {
        matches!(self, Self::NftablesUnsupported { .. })
    }

    /// The error for the kernel's `errno` while `step`.
    pub(super) fn from_errno(step: &str, errno: Errno) -> Self {
        let step = step.to_owned();
        match errno {
            Errno::EPERM | Errno::EACCES => Self::NotPermitted { what: step },
            // No such subsystem, family, chain type or expression, depending on the kernel's age.
            Errno::ENOENT
            | Errno::EOPNOTSUPP
            | Errno::EAFNOSUPPORT
            | Errno::EPROTONOSUPPORT
            | Errno::ENOPROTOOPT
            | Errno::EINVAL => Self::NftablesUnsupported { step, errno },
            _ => Self::Nftables { step, errno },
        }
    }
}
