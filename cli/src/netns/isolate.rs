//! Moving this process into namespaces of its own, under a supervisor.
//!
//! ```text
//! weft (what the shell started)      waits, passes signals on, exits as the one below did
//!  └─ process 1 of a pid namespace   reaps orphans, passes signals on; ends when either other ends
//!      └─ weft (the caller goes on)  and its children: proxies, applications
//! ```
//!
//! When process 1 of a pid namespace ends, the kernel kills all others in it. It ends with the
//! caller, and is killed (`PR_SET_PDEATHSIG`) when the outermost process is, so that even SIGKILL
//! on any of the three leaves no process, no namespace and no network device behind.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::signalfd::SignalFd;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getegid, geteuid, pipe2, read};

use super::error::{Refused, forbidden};

/// Which network the process is in afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// One of its own, joined to nothing. Needs no rights where user namespaces are allowed.
    Private,
    /// The machine's. Needs root.
    Shared,
}

/// Moves the calling process into new namespaces (pid, mount, network if [`Network::Private`], and
/// user when it is not root). Returns in a child of a child of the process that called; the other
/// two never return, and end with this one's status.
///
/// Call it first in `main`: it refuses to work once there are threads.
///
/// # Errors
/// [`Refused`], whose text tells a person what to do.
pub fn isolate(network: Network) -> Result<(), Refused> {
    let io = |what| {
        move |errno: Errno| Refused::Io {
            what,
            source: errno.into(),
        }
    };
    let tasks = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if tasks > 1 {
        return Err(Refused::Threads(tasks));
    }
    let mut flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID;
    if network == Network::Private {
        flags |= CloneFlags::CLONE_NEWNET;
    }
    match unshare(flags) {
        Ok(()) => {}
        Err(Errno::EPERM) if network == Network::Shared => return Err(Refused::NeedsRoot),
        Err(Errno::EPERM) => {
            become_root_of_a_user_namespace()?;
            // AppArmor may grant the namespace and then deny the rights in it.
            unshare(flags).map_err(forbidden)?;
        }
        Err(errno) => return Err(forbidden(errno)),
    }

    let watched: SigSet = [
        Signal::SIGCHLD,
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
    ]
    .into_iter()
    .collect();
    let mut usual = SigSet::empty();
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&watched), Some(&mut usual))
        .map_err(io("block signals"))?;
    // The outermost process keeps the writing end open, and so shows that it lives.
    let (lifeline, outermost) =
        pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(io("make a pipe"))?;

    // SAFETY: the process has one thread (checked above), so the child may do anything.
    if let ForkResult::Parent { child } = unsafe { fork() }.map_err(io("fork"))? {
        supervise(child, &watched);
    }
    drop(outermost);
    follow(&lifeline);
    // SAFETY: as above; the first child has one thread as well.
    if let ForkResult::Parent { child } = unsafe { fork() }.map_err(io("fork"))? {
        supervise(child, &watched);
    }
    drop(lifeline);
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&usual), None).map_err(io("unblock signals"))?;

    // Mounts made here shall not appear elsewhere.
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(|errno| {
        if matches!(errno, Errno::EPERM | Errno::EACCES) {
            forbidden(errno)
        } else {
            io("make mounts private")(errno)
        }
    })?;
    // /proc for this pid namespace. Some containers forbid it; then /proc shows the outer numbers,
    // and only /proc/self is right.
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let _ = mount(Some("proc"), "/proc", Some("proc"), safe, none);
    Ok(())
}

/// Enters a user namespace in which this process's user and group are root, the only ids there.
fn become_root_of_a_user_namespace() -> Result<(), Refused> {
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER).map_err(forbidden)?;
    let maps = [
        // Without it, an unprivileged process may not map its group.
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", format!("0 {uid} 1")),
        ("/proc/self/gid_map", format!("0 {gid} 1")),
    ];
    for (path, text) in maps {
        std::fs::write(path, text).map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => forbidden(Errno::EPERM),
            _ => Refused::Io {
                what: "map this user into a user namespace",
                source: error,
            },
        })?;
    }
    Ok(())
}

/// Asks to be killed when the parent is, and ends at once when it is gone already (its pid cannot
/// be asked for from within a pid namespace).
fn follow(lifeline: &OwnedFd) {
    let asked = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
    let gone = matches!(read(lifeline, &mut [0]), Ok(0));
    if asked.is_err() || gone {
        std::process::exit(1);
    }
}

/// Passes signals on to `child` until it ends, then ends as it did. Reaps whatever else ends.
fn supervise(child: Pid, watched: &SigSet) -> ! {
    let Ok(signals) = SignalFd::new(watched) else {
        std::process::exit(1)
    };
    loop {
        match signals.read_signal() {
            Ok(Some(info)) => {
                let Ok(signal) = Signal::try_from(info.ssi_signo.cast_signed()) else {
                    continue;
                };
                if signal == Signal::SIGCHLD {
                    reap(child);
                // What the terminal sends (SI_KERNEL), it sends to the whole foreground group.
                } else if info.ssi_code != libc::SI_KERNEL {
                    let _ = kill(child, signal);
                }
            }
            Ok(None) | Err(Errno::EINTR) => {}
            Err(_) => std::process::exit(1),
        }
    }
}

/// Collects every ended child; ends this process when `child` is among them.
fn reap(child: Pid) {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == child => std::process::exit(code),
            // As a shell reports it.
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                std::process::exit(128 + signal as i32)
            }
            Ok(WaitStatus::StillAlive) | Err(_) => return,
            Ok(_) => {}
        }
    }
}
