//! Commands that run inside a host's namespaces.

use std::ffi::{CString, OsStr};
use std::fmt::Write as _;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};

/// How a command runs in a host.
#[derive(Clone, Debug, Default)]
pub struct Launch {
    user: Option<(u32, u32)>,
    files: Vec<(PathBuf, Vec<u8>)>,
}

impl Launch {
    /// As this user and group, with no other groups and no capabilities.
    #[must_use]
    pub fn user(mut self, uid: u32, gid: u32) -> Self {
        self.user = Some((uid, gid));
        self
    }

    /// With `contents` in place of the existing file `path`, such as /etc/hosts, for this process
    /// and its children only.
    #[must_use]
    pub fn file(mut self, path: impl Into<PathBuf>, contents: impl Into<Vec<u8>>) -> Self {
        self.files.push((path.into(), contents.into()));
        self
    }

    /// A command for `program` in the network namespace.
    pub(super) fn command(
        &self,
        namespace: Arc<OwnedFd>,
        program: impl AsRef<OsStr>,
    ) -> io::Result<Command> {
        let program = program.as_ref();
        let mut opened = None;
        let mut command = match self.user {
            // Another user may not be able to reach the program (a build under a private home
            // directory), so we open it and that user executes what is open.
            Some(_) if program.as_bytes().contains(&b'/') => {
                let fd = nix::fcntl::open(
                    Path::new(program),
                    OFlag::O_PATH | OFlag::O_CLOEXEC,
                    Mode::empty(),
                )?;
                let mut command = Command::new(format!("/proc/self/fd/{}", fd.as_raw_fd()));
                command.arg0(program);
                opened = Some(fd);
                command
            }
            _ => Command::new(program),
        };
        let files: Vec<(CString, Vec<u8>)> = self
            .files
            .iter()
            .map(|(path, contents)| {
                Ok((CString::new(path.as_os_str().as_bytes())?, contents.clone()))
            })
            .collect::<io::Result<_>>()?;
        let user = self.user;
        // SAFETY: the closure runs between fork and exec and makes only system calls on what was
        // prepared above; it takes no lock another thread could hold.
        unsafe {
            command.pre_exec(move || {
                let _program_stays_open = &opened;
                setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
                if !files.is_empty() {
                    replace_files(&files)?;
                }
                if let Some((uid, gid)) = user {
                    setgroups(&[])?;
                    setgid(Gid::from_raw(gid))?;
                    setuid(Uid::from_raw(uid))?;
                }
                Ok(())
            });
        }
        Ok(command)
    }
}

/// Puts files over others in a mount namespace of this process's own. Their contents live in a
/// memory file system that is mounted nowhere afterwards, and vanish with the process.
fn replace_files(files: &[(CString, Vec<u8>)]) -> nix::Result<()> {
    const STAGE: &str = "/tmp";
    const STAGED: &str = "/tmp/file";
    let none: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    for (path, contents) in files {
        mount(
            Some("tmpfs"),
            STAGE,
            Some("tmpfs"),
            MsFlags::empty(),
            Some("mode=755"),
        )?;
        let file = nix::fcntl::open(
            STAGED,
            OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_CLOEXEC,
            Mode::from_bits_truncate(0o644),
        )?;
        let mut rest = contents.as_slice();
        while !rest.is_empty() {
            let written = nix::unistd::write(&file, rest)?;
            rest = &rest[written..];
        }
        drop(file);
        mount(Some(STAGED), path.as_c_str(), none, MsFlags::MS_BIND, none)?;
        umount2(STAGE, MntFlags::MNT_DETACH)?;
    }
    Ok(())
}

/// An /etc/hosts with localhost and `names`.
#[must_use]
pub fn hosts_file<'a>(names: impl IntoIterator<Item = (IpAddr, &'a str)>) -> String {
    let mut text = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n".to_owned();
    for (address, name) in names {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{address} {name}");
    }
    text
}
