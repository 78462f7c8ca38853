//! `weft run`: any program behind a sidecar of its own, in a network namespace of its own on this
//! machine, joined to a control plane.
//!
//! [`manifest`] is what the control plane is told of it, [`forward`] how the proxy reaches the
//! control plane from its namespace, [`dns`] how the program reaches this machine's resolver.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use weft_api::names;

use crate::admin::Admin;
use crate::netns::{self, Exemption, Fabric, FabricOptions, Host, Launch, hosts_file};
use crate::{Bad, binaries};

mod dns;
mod forward;
mod manifest;

use manifest::Manifest;

/// How long the proxy may take to have its tables and certificate before the program is started
/// all the same.
const READY: Duration = Duration::from_secs(10);
/// What the proxy is given to drain, and a little more before it is killed.
const DRAIN: Duration = Duration::from_secs(25);

/// Flags of `weft run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft run --name cart --port 8080 --data-dir /var/lib/weft --folder /etc/weft -- ./cart
  weft run --name cart --port http:8080 --port admin:9000 --namespace shop --user 1000 \\
      --control-plane mesh.example:15010 --token cart.token --trust-root root.pem -- ./cart -v

Needs root: the program gets a network namespace on a bridge of this machine (10.210.0.0/16), and
its connections are handed to the proxy by netfilter. SIGTERM goes to the program first; when it
has ended, the proxy finishes what runs. The exit code is the program's.

The program and other workloads of this machine reach each other, and this machine reaches it. For
it to reach other machines, this one has to route: sysctl net.ipv4.ip_forward=1, and masquerade
10.210.0.0/16. `weft demo` needs none of this.")]
pub struct Run {
    /// Name of the workload.
    #[arg(long)]
    name: String,
    /// Port that the program listens on, or NAME:PORT; may be repeated.
    #[arg(long = "port", value_name = "[NAME:]PORT")]
    ports: Vec<manifest::Port>,
    /// Namespace of the workload.
    #[arg(long, default_value = "default")]
    namespace: String,
    /// Service account: the program's identity in the mesh.
    #[arg(long, default_value = "default")]
    service_account: String,
    /// Label of the workload, by which Services select it; may be repeated. `app=NAME` is there
    /// unless it is given.
    #[arg(long = "label", value_name = "KEY=VALUE")]
    labels: Vec<manifest::Label>,
    /// Control plane, "host:port".
    #[arg(long, env = "WEFT_CONTROL_PLANE", value_name = "HOST:PORT",
          default_value_t = format!("127.0.0.1:{}", names::CONTROL_PORT))]
    control_plane: String,
    /// File with the workload's token.
    #[arg(
        long,
        env = "WEFT_TOKEN",
        value_name = "FILE",
        required_unless_present = "data_dir"
    )]
    token: Option<PathBuf>,
    /// Folder of a control plane's state on this machine: token and root are made from it.
    #[arg(long, value_name = "DIR", conflicts_with = "token")]
    data_dir: Option<PathBuf>,
    /// PEM file with the root certificates that the control plane is verified against.
    #[arg(
        long,
        env = "WEFT_TRUST_ROOT",
        value_name = "FILE",
        required_unless_present = "data_dir"
    )]
    trust_root: Option<PathBuf>,
    /// Trust domain of the mesh.
    #[arg(long, default_value = names::DEFAULT_TRUST_DOMAIN)]
    trust_domain: String,
    /// Folder that the control plane watches: the workload's manifest is written there, and taken
    /// away at the end. The program finds the folder's Services by their names.
    #[arg(long, value_name = "PATH")]
    folder: Option<PathBuf>,
    /// User (and group) the program runs as, by number. Default: this one.
    #[arg(long, value_name = "UID[:GID]")]
    user: Option<User>,
    /// File for the proxy's log. Default: standard error, warnings only.
    #[arg(long, value_name = "FILE")]
    proxy_log: Option<PathBuf>,
    /// The program and its arguments.
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// `--user`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct User {
    uid: u32,
    gid: u32,
}

impl std::str::FromStr for User {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        let (uid, gid) = given.split_once(':').unwrap_or((given, given));
        match (uid.parse(), gid.parse()) {
            (Ok(uid), Ok(gid)) => Ok(Self { uid, gid }),
            _ => {
                Err("write numbers, as `id -u` and `id -g` say them: 1000 or 1000:1000".to_owned())
            }
        }
    }
}

/// Runs the program. To be called before there is any thread.
pub fn run(args: Run) -> anyhow::Result<ExitCode> {
    let proxy = binaries::find(binaries::PROXY)?;
    for (file, flag) in [(&args.token, "--token"), (&args.trust_root, "--trust-root")] {
        if let Some(file) = file {
            std::fs::metadata(file)
                .with_context(|| format!("{flag}: {} cannot be read", file.display()))?;
        }
    }
    if let Some(folder) = &args.folder {
        ensure!(
            folder.is_dir(),
            "--folder: {} is not a folder",
            folder.display()
        );
    }
    netns::isolate(netns::Network::Shared)?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(join(args, &proxy))
}

async fn join(args: Run, proxy: &Path) -> anyhow::Result<ExitCode> {
    // Before anything starts, so that nobody's signal is lost.
    let mut signals = Signals::new()?;
    let fabric = Fabric::new(FabricOptions {
        refuse_unknown: false,
        ..FabricOptions::default()
    })?;
    let host = fabric.add_host(&args.name)?;
    let state = tempfile::Builder::new().prefix("weft-run-").tempdir()?;
    let credentials = Credentials::gather(&args, state.path(), fabric.exemption()).await?;
    let control_plane = forward::listen(fabric.v4(), args.control_plane.clone()).await?;

    let resolv_conf = names(&fabric);
    capture(&host, &fabric, proxy).await?;
    let mut sidecar = start_proxy(&args, &host, &fabric, proxy, &credentials, control_plane)?;
    let mut addresses = vec![IpAddr::from(host.v4())];
    addresses.extend(host.v6().map(IpAddr::from));
    let manifest = match &args.folder {
        Some(folder) => Some(Manifest::write(
            folder,
            &manifest::Workload {
                name: &args.name,
                namespace: &args.namespace,
                service_account: &args.service_account,
                labels: &args.labels,
                ports: &args.ports,
                addresses: &addresses,
            },
        )?),
        None => None,
    };
    let ready = tokio::select! {
        ready = wait_until_ready(host.v4(), &mut sidecar) => ready,
        signal = signals.next() => {
            drop(manifest);
            end_proxy(&mut sidecar).await;
            return Ok(ExitCode::from(128 + signal as u8));
        }
    };
    ready?;

    let mut program = match start_program(&args, &host, resolv_conf) {
        Ok(program) => program,
        Err(e) => {
            drop(manifest);
            end_proxy(&mut sidecar).await;
            return Err(e);
        }
    };
    let mut manifest = manifest;
    let mut proxy_lives = true;
    let status = loop {
        tokio::select! {
            status = program.wait() => break status?,
            died = sidecar.wait(), if proxy_lives => {
                proxy_lives = false;
                let died = died?;
                eprintln!(
                    "weft: the proxy of {} has ended ({died}); what the program sends and gets is refused until it is started again",
                    args.name
                );
            }
            signal = signals.next() => {
                if signal != Signal::SIGHUP {
                    // Others stop sending here, while the program finishes what it has.
                    manifest = None;
                }
                pass_on(&program, signal);
            }
        }
    };
    drop(manifest);
    if proxy_lives {
        end_proxy(&mut sidecar).await;
    }
    Ok(exit_code(status))
}

/// As a shell reports it.
fn exit_code(status: ExitStatus) -> ExitCode {
    use std::os::unix::process::ExitStatusExt;
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .and_then(|code| u8::try_from(code).ok());
    ExitCode::from(code.unwrap_or(Bad::BAD))
}

/// The signals that are meant for the program.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.terminate.recv() => Signal::SIGTERM,
            _ = self.interrupt.recv() => Signal::SIGINT,
            _ = self.hang_up.recv() => Signal::SIGHUP,
        }
    }
}

fn pass_on(program: &Child, signal: Signal) {
    use std::io::IsTerminal;
    // What the terminal sends, the program has got already: it is of the same group.
    if signal == Signal::SIGINT && std::io::stdin().is_terminal() {
        return;
    }
    if let Some(pid) = program.id().and_then(|pid| i32::try_from(pid).ok()) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// What the proxy shows to the control plane, and verifies it with.
struct Credentials {
    token: PathBuf,
    trust_root: PathBuf,
}

impl Credentials {
    /// Copies of the files given, or new ones made from the control plane's own state, which only
    /// the proxy's user can read.
    async fn gather(args: &Run, folder: &Path, exemption: Exemption) -> anyhow::Result<Self> {
        use std::os::unix::fs::PermissionsExt;
        let (token, root) = match &args.data_dir {
            Some(data) => (
                control_plane_says(
                    data,
                    &[
                        "token",
                        "--namespace",
                        &args.namespace,
                        "--service-account",
                        &args.service_account,
                    ],
                )
                .await?,
                match &args.trust_root {
                    Some(file) => std::fs::read(file)?,
                    None => control_plane_says(data, &["trust-root"]).await?,
                },
            ),
            None => {
                let read = |file: &Option<PathBuf>| {
                    let file = file.as_ref().context("a file is missing")?;
                    std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))
                };
                (read(&args.token)?, read(&args.trust_root)?)
            }
        };
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o711))?;
        let credentials = Self {
            token: folder.join("token"),
            trust_root: folder.join("trust-root.pem"),
        };
        for (path, contents) in [(&credentials.token, token), (&credentials.trust_root, root)] {
            std::fs::write(path, contents)?;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
            if let Exemption::User(id) = exemption {
                std::os::unix::fs::chown(path, Some(id), Some(id))?;
            }
        }
        Ok(credentials)
    }
}

async fn control_plane_says(data_dir: &Path, words: &[&str]) -> anyhow::Result<Vec<u8>> {
    let output = Command::new(binaries::find(binaries::CONTROL_PLANE)?)
        .args(words)
        .arg("--data-dir")
        .arg(data_dir)
        .output()
        .await?;
    ensure!(
        output.status.success(),
        "weft-control-plane {} failed: {}",
        words[0],
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(output.stdout)
}

async fn capture(host: &Host, fabric: &Fabric, proxy: &Path) -> anyhow::Result<()> {
    let mut command = host.command(proxy)?;
    command
        .arg("init")
        .args(fabric.exemption().init_arguments())
        .stdin(Stdio::null());
    let output = Command::from(command).output().await?;
    ensure!(
        output.status.success(),
        "the program's connections cannot be captured: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

fn start_proxy(
    args: &Run,
    host: &Host,
    fabric: &Fabric,
    proxy: &Path,
    credentials: &Credentials,
    control_plane: SocketAddr,
) -> anyhow::Result<Child> {
    let exemption = fabric.exemption();
    let mut command = host.command_with(proxy, &exemption.launch())?;
    command
        .arg("run")
        .args(["--control-plane", &control_plane.to_string()])
        .arg("--trust-root")
        .arg(&credentials.trust_root)
        .arg("--token")
        .arg(&credentials.token)
        .args(["--workload", &format!("{}/{}", args.namespace, args.name)])
        .args(["--trust-domain", &args.trust_domain])
        .args(["--drain-seconds", &DRAIN.as_secs().to_string()])
        // For `weft routes` and `weft tap` on this machine.
        .args(["--admin-trust", &fabric.v4().to_string()]);
    if let Some(mark) = exemption.mark() {
        command.args(["--mark", &mark.to_string()]);
    }
    match &args.proxy_log {
        Some(path) => {
            let file = std::fs::File::options()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("cannot write to {}", path.display()))?;
            command
                .stdout(file.try_clone()?)
                .stderr(file)
                .env("NO_COLOR", "1");
        }
        None => {
            command.stdout(Stdio::null());
            if std::env::var_os("WEFT_LOG").is_none() {
                command.env("WEFT_LOG", "warn");
            }
        }
    }
    let mut command = Command::from(command);
    command
        .stdin(Stdio::null())
        // Ctrl-C is for the program; the proxy ends after it.
        .process_group(0)
        .kill_on_drop(true);
    command.spawn().context("the proxy cannot be started")
}

/// Waits for tables and certificate; without a control plane the program starts all the same.
async fn wait_until_ready(address: std::net::Ipv4Addr, proxy: &mut Child) -> anyhow::Result<()> {
    let admin = Admin::new(&format!("{address}:{}", names::ADMIN_PORT))?;
    let deadline = tokio::time::Instant::now() + READY;
    loop {
        let why = match admin.text("/readyz").await {
            Ok(_) => return Ok(()),
            Err(e) => e,
        };
        if let Some(status) = proxy.try_wait()? {
            bail!("the proxy ended at once ({status}); its log says why");
        }
        if tokio::time::Instant::now() >= deadline {
            eprintln!(
                "weft: after {} s the proxy is not ready ({why}); the program starts all the same, its traffic passes through as it is",
                READY.as_secs()
            );
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Makes this machine's resolver reachable; says what the program's resolv.conf is to be.
fn names(fabric: &Fabric) -> Option<String> {
    let machines = std::fs::read_to_string("/etc/resolv.conf").ok()?;
    let resolver = dns::resolver(&machines)?;
    match dns::listen(fabric.v4(), resolver) {
        Ok(()) => Some(dns::resolv_conf(&machines, fabric.v4())),
        Err(e) => {
            eprintln!(
                "weft: the program cannot resolve names: port 53 of {} cannot be had ({e})",
                fabric.v4()
            );
            None
        }
    }
}

fn start_program(args: &Run, host: &Host, resolv_conf: Option<String>) -> anyhow::Result<Child> {
    let mut launch = Launch::default();
    if let Some(User { uid, gid }) = args.user {
        launch = launch.user(uid, gid);
    }
    if let Some(folder) = &args.folder {
        let services = manifest::services(folder, &args.namespace)?;
        let entries = services
            .iter()
            .map(|(address, name)| (*address, name.as_str()));
        launch = launch.file("/etc/hosts", hosts_file(entries));
    }
    if let Some(resolv_conf) = resolv_conf {
        launch = launch.file("/etc/resolv.conf", resolv_conf);
    }
    let (program, arguments) = args.command.split_first().context("there is no program")?;
    let mut command = host.command_with(program, &launch)?;
    command.args(arguments);
    Command::from(command)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("{} cannot be started", program.display()))
}

/// Lets the proxy finish what runs.
async fn end_proxy(proxy: &mut Child) {
    if let Some(pid) = proxy.id().and_then(|pid| i32::try_from(pid).ok()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    if tokio::time::timeout(DRAIN + Duration::from_secs(2), proxy.wait())
        .await
        .is_err()
    {
        let _ = proxy.kill().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users() {
        assert_eq!(
            "1000".parse(),
            Ok(User {
                uid: 1000,
                gid: 1000
            })
        );
        assert_eq!("1000:50".parse(), Ok(User { uid: 1000, gid: 50 }));
        assert!("me".parse::<User>().is_err());
    }
}
