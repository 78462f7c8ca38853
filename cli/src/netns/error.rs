//! Why there are no namespaces, and what to do about it.

use std::io;

use nix::errno::Errno;

/// The machine does not let this process have namespaces of its own.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// A kernel setting or a container forbids user namespaces.
    #[error("this machine does not allow network namespaces here ({errno}): {advice}")]
    Forbidden {
        /// The kernel's answer.
        errno: Errno,
        /// Why, and how to go on.
        advice: String,
    },
    /// Joining the machine's own network takes real rights.
    #[error(
        "joining this machine's network needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN): run it with sudo"
    )]
    NeedsRoot,
    /// Threads run already.
    #[error("namespaces must be entered before the first thread starts, and {0} run")]
    Threads(usize),
    /// Something else failed.
    #[error("cannot {what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Why a fabric or a host could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A step failed.
    #[error("cannot {what}")]
    Step {
        /// What was being done.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// All addresses are taken.
    #[error("the fabric is full: it has {0} hosts")]
    Full(u16),
}

impl Error {
    pub(super) fn step(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Step {
            what: what.into(),
            source: source.into(),
        }
    }
}

/// What to tell a person whom the kernel has refused a user namespace or rights in it. `setting`
/// reads a file under /proc/sys.
pub(super) fn advice(setting: impl Fn(&str) -> Option<String>) -> String {
    let is = |name: &str, value: &str| setting(name).is_some_and(|text| text.trim() == value);
    let (cause, remedy) = if is("kernel/unprivileged_userns_clone", "0") {
        (
            "kernel.unprivileged_userns_clone is 0",
            "`sudo sysctl -w kernel.unprivileged_userns_clone=1`",
        )
    } else if is("user/max_user_namespaces", "0") {
        (
            "user.max_user_namespaces is 0",
            "`sudo sysctl -w user.max_user_namespaces=10000`",
        )
    } else if is("kernel/apparmor_restrict_unprivileged_userns", "1") {
        (
            "AppArmor restricts user namespaces (Ubuntu 23.10 and later)",
            "`sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`",
        )
    } else {
        (
            "probably a container's seccomp or AppArmor profile",
            "starting the container with `--privileged`, or with `--cap-add SYS_ADMIN --cap-add \
             NET_ADMIN --security-opt seccomp=unconfined --security-opt apparmor=unconfined`",
        )
    };
    format!("{cause}. Either run it as root (sudo), or allow it by {remedy}")
}

/// [`advice`] for this machine.
pub(super) fn forbidden(errno: Errno) -> Refused {
    let advice = advice(|name| std::fs::read_to_string(format!("/proc/sys/{name}")).ok());
    Refused::Forbidden { errno, advice }
}

#[cfg(test)]
mod tests {
    use super::advice;

    #[test]
    fn advice_names_the_setting_that_forbids() {
        let table = [
            (
                "kernel/unprivileged_userns_clone",
                "0\n",
                "unprivileged_userns_clone=1",
            ),
            (
                "user/max_user_namespaces",
                "0\n",
                "max_user_namespaces=10000",
            ),
            (
                "kernel/apparmor_restrict_unprivileged_userns",
                "1\n",
                "unprivileged_userns=0",
            ),
            ("nothing", "", "--privileged"),
        ];
        for (name, value, expected) in table {
            let text = advice(|asked| (asked == name).then(|| value.to_owned()));
            assert!(text.contains(expected) && text.contains("sudo"), "{text}");
        }
    }
}
