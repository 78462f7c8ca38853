//! Child processes: where they run, what they use, and that none outlives the benchmark.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// Where the two sides run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    /// Everything on one CPU: the least noise, best for small differences.
    OneCpu,
    /// Load generator and outbound proxy on one CPU, inbound proxy and origin on another:
    /// closest to a deployment.
    TwoCpus,
    /// Wherever the kernel puts them.
    Free,
}

/// One of the two sides of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Client,
    Server,
}

/// The CPUs of each side.
pub struct Cpus {
    client: CpuSet,
    server: CpuSet,
}

impl Cpus {
    /// Takes them from those that this process may use.
    pub fn choose(placement: Placement) -> anyhow::Result<Self> {
        let allowed = sched_getaffinity(Pid::from_raw(0))?;
        let usable: Vec<usize> = (0..CpuSet::count())
            .filter(|cpu| allowed.is_set(*cpu).unwrap_or(false))
            .collect();
        let only = |cpu: usize| -> nix::Result<CpuSet> {
            let mut set = CpuSet::new();
            set.set(cpu)?;
            Ok(set)
        };
        let first = *usable.first().context("no CPU may be used")?;
        Ok(match placement {
            Placement::Free => Self {
                client: allowed,
                server: allowed,
            },
            Placement::OneCpu => Self {
                client: only(first)?,
                server: only(first)?,
            },
            Placement::TwoCpus => {
                let second = *usable
                    .get(1)
                    .context("--placement two-cpus on a machine with one CPU")?;
                Self {
                    client: only(first)?,
                    server: only(second)?,
                }
            }
        })
    }

    /// Moves this thread, and with it the children it starts, to a side.
    pub fn enter(&self, side: Side) -> anyhow::Result<()> {
        let set = match side {
            Side::Client => &self.client,
            Side::Server => &self.server,
        };
        Ok(sched_setaffinity(Pid::from_raw(0), set)?)
    }
}

/// A running child; killed when dropped.
pub struct Process {
    child: Child,
    name: String,
}

impl Process {
    /// Starts a program with its output in `log`; standard input is a pipe that ends with us.
    pub fn start<I, S>(name: &str, program: &Path, args: I, log: &Path) -> anyhow::Result<Self>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let out = fs::File::create(log)?;
        let mut command = Command::new(program);
        command
            .args(args)
            .stdin(Stdio::piped())
            .stdout(out.try_clone()?)
            .stderr(out);
        die_with_parent(&mut command);
        let child = command
            .spawn()
            .with_context(|| format!("starting {name} ({})", program.display()))?;
        Ok(Self {
            child,
            name: name.to_owned(),
        })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails with the end of its log when the process has ended.
    pub fn check(&mut self, log: &Path) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let text = fs::read_to_string(log).unwrap_or_default();
            let from = text.len().saturating_sub(1500);
            let tail = text.get(from..).unwrap_or(&text);
            anyhow::bail!(
                "{} ended ({status}); the end of its log:\n{tail}",
                self.name
            );
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[allow(unsafe_code)]
fn die_with_parent(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: between fork and exec only prctl is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            Ok(())
        });
    }
}

/// CPU time that all threads of a process have used.
pub fn cpu(pid: u32) -> anyhow::Result<Duration> {
    let mut nanos = 0u64;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end while we look.
        if let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) {
            nanos += text
                .split_whitespace()
                .next()
                .and_then(|field| field.parse::<u64>().ok())
                .context("an unreadable schedstat")?;
        }
    }
    Ok(Duration::from_nanos(nanos))
}

/// Resident memory, KiB.
pub fn rss_kib(pid: u32) -> anyhow::Result<u64> {
    of_status(pid, "VmRSS:")
}

/// Resident memory that is not of files (the program's own pages), KiB.
pub fn anonymous_kib(pid: u32) -> anyhow::Result<u64> {
    of_status(pid, "RssAnon:")
}

fn of_status(pid: u32, field: &str) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    status
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|field| field.parse().ok())
        .with_context(|| format!("no {field} in /proc"))
}

/// Counts the system calls of processes from its start to [`SyscallCount::stop`].
pub struct SyscallCount {
    perfs: Vec<Child>,
}

impl SyscallCount {
    /// `None` when `perf` is not installed; it then is not measured.
    pub fn start(pids: &[u32]) -> Option<Self> {
        let mut perfs = Vec::new();
        for pid in pids {
            let perf = Command::new("perf")
                .args(["stat", "-x,", "-e", "raw_syscalls:sys_enter", "-p"])
                .arg(pid.to_string())
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .ok()?;
            perfs.push(perf);
        }
        // perf needs a moment to attach; the window opens after the warm-up.
        Some(Self { perfs })
    }

    /// The count of each process; `None` where perf could not count.
    pub fn stop(self) -> Vec<Option<u64>> {
        self.perfs
            .into_iter()
            .map(|perf| {
                let pid = Pid::from_raw(i32::try_from(perf.id()).ok()?);
                nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).ok()?;
                let output = perf.wait_with_output().ok()?;
                let text = String::from_utf8_lossy(&output.stderr);
                text.lines()
                    .find(|line| line.contains("raw_syscalls"))?
                    .split(',')
                    .next()?
                    .parse()
                    .ok()
            })
            .collect()
    }
}

/// Raises the limit of open files as far as it goes; children inherit it.
pub fn raise_open_files() -> anyhow::Result<u64> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

/// Tries until it works or the time is over, then says why not.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut attempt: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let end = Instant::now() + limit;
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= end => {
                return Err(error).with_context(|| format!("waiting for {what}"));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// A loopback port that was free a moment ago.
pub fn free_port() -> anyhow::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .port())
}
