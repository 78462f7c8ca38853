//! The shop's processes in their namespaces: setting up, killing, restarting.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use tokio::process::{Child, ChildStdout, Command};
use weft_api::names;

use super::topology::{HUB, MEMBERS, Member, NAMESPACE, NETWORK, OTLP_PORT, SERVICES};
use crate::admin::Admin;
use crate::apps::knobs::{Order, order};
use crate::binaries;
use crate::netns::{Exemption, Fabric, FabricOptions, Host, Launch, hosts_file};

/// How long everything may take to stand.
const SETUP: Duration = Duration::from_secs(20);

/// Everything that runs.
pub struct Stage {
    /// Folder of logs, sockets, tokens and the control plane's own state.
    home: PathBuf,
    /// Folder of manifests the control plane watches.
    manifests: PathBuf,
    rate: u32,
    fabric: Fabric,
    hosts: BTreeMap<&'static str, Host>,
    control_plane: Option<Child>,
    proxies: BTreeMap<&'static str, Child>,
    apps: BTreeMap<&'static str, Child>,
    programs: Programs,
}

struct Programs {
    weft: PathBuf,
    proxy: PathBuf,
    control_plane: PathBuf,
}

/// What stays when the demo ends.
pub struct Plan {
    pub home: PathBuf,
    pub manifests: PathBuf,
    /// Requests a second.
    pub rate: u32,
}

impl Stage {
    /// Lays the network. Nothing runs yet.
    pub fn new(plan: Plan) -> anyhow::Result<Self> {
        let programs = Programs {
            weft: binaries::own()?,
            proxy: binaries::find(binaries::PROXY)?,
            control_plane: binaries::find(binaries::CONTROL_PLANE)?,
        };
        let fabric = Fabric::new(FabricOptions {
            v4: NETWORK,
            ..FabricOptions::default()
        })?;
        ensure!(
            fabric.v4() == HUB,
            "the network's first address is {} and not {HUB}",
            fabric.v4()
        );
        let mut hosts = BTreeMap::new();
        for member in &MEMBERS {
            let host = fabric.add_host(member.name)?;
            ensure!(
                host.v4() == member.address,
                "{} got the address {} and not {}",
                member.name,
                host.v4(),
                member.address
            );
            hosts.insert(member.name, host);
        }
        for folder in ["logs", "sockets", "tokens", "control-plane"] {
            std::fs::create_dir_all(plan.home.join(folder))?;
        }
        Ok(Self {
            home: plan.home,
            manifests: plan.manifests,
            rate: plan.rate,
            fabric,
            hosts,
            control_plane: None,
            proxies: BTreeMap::new(),
            apps: BTreeMap::new(),
            programs,
        })
    }

    /// Starts everything but the visitor, and waits until it stands.
    pub async fn set_up(&mut self) -> anyhow::Result<()> {
        self.start_control_plane()?;
        self.wait_for_control_plane().await?;
        self.hand_out_tokens().await?;
        for member in &MEMBERS {
            self.capture(member).await?;
            if member.port.is_some() {
                self.start_app(member)?;
            }
            self.start_proxy(member)?;
        }
        for member in &MEMBERS {
            self.wait_for_proxy(member).await?;
        }
        Ok(())
    }

    /// Address of the control plane's admin port.
    pub fn control_admin() -> String {
        format!("{HUB}:{}", names::CONTROL_ADMIN_PORT)
    }

    /// Address of a proxy's admin port.
    pub fn proxy_admin(member: &Member) -> String {
        format!("{}:{}", member.address, names::ADMIN_PORT)
    }

    /// Starts the control plane.
    pub fn start_control_plane(&mut self) -> anyhow::Result<()> {
        let mut command = Command::new(&self.programs.control_plane);
        command
            .arg("--source")
            .arg(format!("folder:{}", self.manifests.display()))
            .arg("--data-dir")
            .arg(self.data_dir())
            .arg("--listen")
            .arg(format!("{HUB}:{}", names::CONTROL_PORT))
            .arg("--admin")
            .arg(Self::control_admin())
            .args(["--trust-domain", names::DEFAULT_TRUST_DOMAIN]);
        self.control_plane = Some(self.spawn(command, "control-plane")?);
        Ok(())
    }

    /// Kills the control plane (SIGKILL).
    pub async fn kill_control_plane(&mut self) -> anyhow::Result<()> {
        if let Some(mut child) = self.control_plane.take() {
            child.kill().await?;
        }
        Ok(())
    }

    pub async fn wait_for_control_plane(&self) -> anyhow::Result<()> {
        self.wait_for("control-plane", &Self::control_admin(), "/readyz")
            .await
    }

    /// Kills a workload's proxy and application (SIGKILL), as when its machine is lost.
    pub async fn kill_member(&mut self, name: &str) -> anyhow::Result<()> {
        for children in [&mut self.apps, &mut self.proxies] {
            if let Some(child) = children.get_mut(name) {
                child.start_kill()?;
            }
        }
        for children in [&mut self.apps, &mut self.proxies] {
            if let Some(mut child) = children.remove(name) {
                child.wait().await?;
            }
        }
        Ok(())
    }

    /// Starts a workload that was killed.
    pub fn start_member(&mut self, member: &'static Member) -> anyhow::Result<()> {
        self.start_app(member)?;
        self.start_proxy(member)
    }

    /// Makes an application misbehave, or not any more.
    pub async fn order(&self, name: &str, what: Order) -> anyhow::Result<()> {
        order(&self.socket(name), what).await
    }

    /// Starts the load; its reports come over the pipe.
    pub fn start_visitor(&mut self, member: &'static Member) -> anyhow::Result<ChildStdout> {
        self.start_app(member)?;
        let visitor = self.apps.get_mut(member.name);
        visitor
            .and_then(|child| child.stdout.take())
            .context("the visitor has no output")
    }

    /// Ends the load politely: what runs is finished and reported.
    pub fn stop_visitor(&self) {
        let pid = self.apps.get("visitor").and_then(Child::id);
        if let Some(pid) = pid.and_then(|pid| i32::try_from(pid).ok()) {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(pid),
                nix::sys::signal::Signal::SIGTERM,
            );
        }
    }

    /// A process that ended although nobody asked it to, and what it said last.
    pub fn casualty(&mut self) -> Option<String> {
        self.casualty_but("")
    }

    /// The same, one application excepted.
    pub fn casualty_but(&mut self, but: &str) -> Option<String> {
        let control_plane = self.control_plane.as_mut();
        let all = control_plane
            .map(|child| ("control-plane".to_owned(), child))
            .into_iter()
            .chain(
                self.proxies
                    .iter_mut()
                    .map(|(name, child)| (format!("{name}.proxy"), child)),
            )
            .chain(
                self.apps
                    .iter_mut()
                    .map(|(name, child)| ((*name).to_owned(), child)),
            );
        for (log, child) in all.filter(|(log, _)| log != but) {
            if let Ok(Some(status)) = child.try_wait() {
                return Some(format!(
                    "{log} ended ({status}):\n{}",
                    self.last_words(&log)
                ));
            }
        }
        None
    }

    /// Ends everything.
    pub async fn tear_down(mut self) {
        let apps = std::mem::take(&mut self.apps);
        let proxies = std::mem::take(&mut self.proxies);
        let all = apps.into_values().chain(proxies.into_values());
        for mut child in all.chain(self.control_plane.take()) {
            let _ = child.kill().await;
        }
    }

    fn data_dir(&self) -> PathBuf {
        self.home.join("control-plane")
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.home.join("sockets").join(name)
    }

    fn token(&self, member: &Member) -> PathBuf {
        self.home.join("tokens").join(member.app)
    }

    fn trust_root(&self) -> PathBuf {
        self.home.join("trust-root.pem")
    }

    fn log(&self, name: &str) -> PathBuf {
        self.home.join("logs").join(format!("{name}.log"))
    }

    /// The last lines of a log.
    fn last_words(&self, log: &str) -> String {
        let text = std::fs::read_to_string(self.log(log)).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    }

    fn host(&self, member: &Member) -> anyhow::Result<&Host> {
        self.hosts
            .get(member.name)
            .with_context(|| format!("{} has no namespace", member.name))
    }

    /// Tokens for every service account, and the root to verify the control plane with.
    async fn hand_out_tokens(&self) -> anyhow::Result<()> {
        for member in &MEMBERS {
            let path = self.token(member);
            if path.exists() {
                continue;
            }
            let token = self
                .control_plane_says(&[
                    "token",
                    "--namespace",
                    NAMESPACE,
                    "--service-account",
                    member.app,
                ])
                .await?;
            self.write_for_proxy(&path, &token)?;
        }
        let root = self.control_plane_says(&["trust-root"]).await?;
        self.write_for_proxy(&self.trust_root(), &root)
    }

    async fn control_plane_says(&self, words: &[&str]) -> anyhow::Result<Vec<u8>> {
        let output = Command::new(&self.programs.control_plane)
            .args(words)
            .arg("--data-dir")
            .arg(self.data_dir())
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

    /// A file that only its owner reads: the proxies' user, where there is one.
    fn write_for_proxy(&self, path: &Path, contents: &[u8]) -> anyhow::Result<()> {
        use std::os::unix::fs::PermissionsExt;
        std::fs::write(path, contents)
            .with_context(|| format!("cannot write {}", path.display()))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        if let Exemption::User(id) = self.fabric.exemption() {
            std::os::unix::fs::chown(path, Some(id), Some(id))?;
        }
        Ok(())
    }

    /// Has the kernel hand the workload's connections to its proxy.
    async fn capture(&self, member: &Member) -> anyhow::Result<()> {
        let mut command = self.host(member)?.command(&self.programs.proxy)?;
        command.arg("init");
        command.args(self.fabric.exemption().init_arguments());
        let output = Command::from(command).output().await?;
        ensure!(
            output.status.success(),
            "connections of {} cannot be captured: {}",
            member.name,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }

    fn start_app(&mut self, member: &'static Member) -> anyhow::Result<()> {
        let control = self.socket(member.name);
        let names = SERVICES.map(|(name, address)| (IpAddr::from(address), name));
        let launch = Launch::default().file("/etc/hosts", hosts_file(names));
        let mut command = self
            .host(member)?
            .command_with(&self.programs.weft, &launch)?;
        command.args(member.command(&control.display().to_string(), self.rate));
        let mut command = Command::from(command);
        let piped = member.port.is_none();
        if piped {
            command.stdout(Stdio::piped());
        }
        let child = self.spawn_with(command, member.name, piped)?;
        self.apps.insert(member.name, child);
        Ok(())
    }

    fn start_proxy(&mut self, member: &'static Member) -> anyhow::Result<()> {
        let exemption = self.fabric.exemption();
        let mut command = self
            .host(member)?
            .command_with(&self.programs.proxy, &exemption.launch())?;
        command
            .arg("run")
            .args(["--control-plane", &format!("{HUB}:{}", names::CONTROL_PORT)])
            .arg("--trust-root")
            .arg(self.trust_root())
            .arg("--token")
            .arg(self.token(member))
            .args(["--workload", &member.workload()])
            .args(["--trust-domain", names::DEFAULT_TRUST_DOMAIN])
            .args(["--admin", &format!("0.0.0.0:{}", names::ADMIN_PORT)])
            .args(["--otlp-endpoint", &format!("http://{HUB}:{OTLP_PORT}")]);
        if let Some(mark) = exemption.mark() {
            command.args(["--mark", &mark.to_string()]);
        }
        let child = self.spawn(Command::from(command), &format!("{}.proxy", member.name))?;
        self.proxies.insert(member.name, child);
        Ok(())
    }

    fn spawn(&self, command: Command, log: &str) -> anyhow::Result<Child> {
        self.spawn_with(command, log, false)
    }

    /// Starts a process whose output goes to a log, unless standard output is read by us.
    fn spawn_with(&self, mut command: Command, log: &str, piped: bool) -> anyhow::Result<Child> {
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.log(log))?;
        if !piped {
            command.stdout(file.try_clone()?);
        }
        command
            .stdin(Stdio::null())
            .stderr(file)
            // A log is not a terminal.
            .env("NO_COLOR", "1")
            // Ctrl-C on the terminal is for the demo, which ends the others in order.
            .process_group(0)
            .kill_on_drop(true);
        command
            .spawn()
            .with_context(|| format!("{log} cannot be started"))
    }

    async fn wait_for_proxy(&mut self, member: &Member) -> anyhow::Result<()> {
        let log = format!("{}.proxy", member.name);
        self.wait_for(&log, &Self::proxy_admin(member), "/readyz")
            .await
    }

    async fn wait_for(&self, log: &str, address: &str, path: &str) -> anyhow::Result<()> {
        let admin = Admin::new(address)?;
        let mut last = None;
        let ready = async {
            loop {
                match admin.text(path).await {
                    Ok(_) => return,
                    Err(e) => last = Some(e),
                }
                tokio::time::sleep(Duration::from_millis(25)).await;
            }
        };
        if tokio::time::timeout(SETUP, ready).await.is_err() {
            let last = last.map(|e| e.to_string()).unwrap_or_default();
            bail!(
                "{log} is not ready after {} s: {last}\nIts log ends:\n{}",
                SETUP.as_secs(),
                self.last_words(log)
            );
        }
        Ok(())
    }
}
