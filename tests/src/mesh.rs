//! A control plane with a folder of manifests, and hosts with a captured workload each.
//!
//! A test adds hosts and manifests, calls [`Mesh::start`], and has a mesh: every proxy ready, every
//! manifest read. The folder can be changed afterwards. All processes end with the value.

use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::binaries::{Binaries, binaries};
use crate::netns::{Fabric, FabricOptions, Host};
use crate::wire::{Wire, header, status};
use crate::{PATIENCE, eventually};

/// Namespace of everything in these tests.
pub const NAMESPACE: &str = "shop";
const CONTROL_PORT: u16 = 15010;
const CONTROL_ADMIN_PORT: u16 = 15014;
pub const ADMIN_PORT: u16 = 15020;

/// A mesh of one test.
pub struct Mesh {
    binaries: &'static Binaries,
    fabric: Fabric,
    folder: tempfile::TempDir,
    number: u8,
    services: u8,
    control_plane: Option<Child>,
    dns: Option<SocketAddr>,
    sidecars: Vec<Sidecar>,
}

/// A workload: a host, and in time a proxy on it.
#[derive(Debug, Clone, Default)]
pub struct Workload {
    name: String,
    namespace: Option<String>,
    service_account: Option<String>,
    ports: Vec<(u16, Option<&'static str>)>,
    extra: String,
    arguments: Vec<String>,
}

impl Workload {
    /// Its label `app` is the part of the name before the first dash: "server-1" is of "server".
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            ..Self::default()
        }
    }

    /// A namespace other than [`NAMESPACE`].
    pub fn namespace(mut self, name: &str) -> Self {
        self.namespace = Some(name.to_owned());
        self
    }

    /// A port it listens on, and what is spoken there (`appProtocol`).
    pub fn port(mut self, port: u16, protocol: Option<&'static str>) -> Self {
        self.ports.push((port, protocol));
        self
    }

    pub fn service_account(mut self, name: &str) -> Self {
        self.service_account = Some(name.to_owned());
        self
    }

    /// More lines of its `spec`, two spaces in.
    pub fn extra(mut self, yaml: &str) -> Self {
        self.extra.push_str(yaml);
        self
    }

    /// A flag of its proxy.
    pub fn proxy_flag(mut self, flag: impl Into<String>) -> Self {
        self.arguments.push(flag.into());
        self
    }

    fn app(&self) -> &str {
        self.name.split('-').next().unwrap_or(&self.name)
    }

    fn in_namespace(&self) -> &str {
        self.namespace.as_deref().unwrap_or(NAMESPACE)
    }

    fn account(&self) -> &str {
        self.service_account.as_deref().unwrap_or(self.app())
    }

    fn manifest(&self, host: &Host) -> String {
        let mut addresses = host.v4().to_string();
        if let Some(v6) = host.v6() {
            let _ = write!(addresses, ", '{v6}'");
        }
        let mut yaml = format!(
            "apiVersion: policy.weft.dev/v1alpha1
kind: Workload
metadata: {{name: {}, namespace: {}, labels: {{app: {}, name: {}}}}}
spec:
  addresses: [{addresses}]
  serviceAccount: {}
{}",
            self.name,
            self.in_namespace(),
            self.app(),
            self.name,
            self.account(),
            self.extra,
        );
        if !self.ports.is_empty() {
            yaml.push_str("  ports:\n");
        }
        for (port, protocol) in &self.ports {
            let _ = write!(yaml, "  - {{port: {port}");
            if let Some(protocol) = protocol {
                let _ = write!(yaml, ", appProtocol: {protocol}");
            }
            yaml.push_str("}\n");
        }
        yaml
    }
}

/// A host with its proxy.
pub struct Sidecar {
    pub host: Host,
    workload: Workload,
    proxy: Option<Child>,
    log: PathBuf,
}

impl Drop for Mesh {
    fn drop(&mut self) {
        for sidecar in &mut self.sidecars {
            end(&mut sidecar.proxy);
        }
        end(&mut self.control_plane);
        if std::thread::panicking() {
            for (name, path) in self.logs() {
                let text = fs::read_to_string(&path).unwrap_or_default();
                let lines: Vec<&str> = text.lines().collect();
                eprintln!("---- the end of {name}'s log");
                for line in &lines[lines.len().saturating_sub(25)..] {
                    eprintln!("{line}");
                }
            }
        }
    }
}

fn end(child: &mut Option<Child>) {
    if let Some(mut child) = child.take() {
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Mesh {
    /// A fabric of its own, with nothing on it.
    pub fn new() -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let fabric = Fabric::new(FabricOptions {
            name: format!("t{number}"),
            // Services are in 10.96.0.0/16.
            v4: Ipv4Addr::new(10, 100 + number % 150, 0, 0),
            v6: Ipv6Addr::new(0xfd77, 0, 0, u16::from(number), 0, 0, 0, 0),
            ..FabricOptions::default()
        })
        .unwrap();
        let folder = tempfile::tempdir().unwrap();
        // Proxies run as another user, and read their root certificate and token here.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(folder.path().join("manifests")).unwrap();
        let mesh = Self {
            binaries: binaries().unwrap(),
            fabric,
            folder,
            number,
            services: 0,
            control_plane: None,
            dns: None,
            sidecars: Vec::new(),
        };
        // Tests compare bytes: nothing is added to a request unless a test wants it.
        mesh.manifest(
            "telemetry",
            "apiVersion: policy.weft.dev/v1alpha1
kind: Telemetry
metadata: {name: all, namespace: shop}
spec: {tracing: {samplingPercent: 0}}
",
        );
        mesh
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes (or replaces) a manifest, whole at once.
    pub fn manifest(&self, name: &str, yaml: &str) {
        let hidden = self.path(&format!("{name}.tmp"));
        fs::write(&hidden, yaml).unwrap();
        fs::rename(hidden, self.path("manifests").join(format!("{name}.yaml"))).unwrap();
    }

    /// Removes a manifest.
    pub fn remove_manifest(&self, name: &str) {
        fs::remove_file(self.path("manifests").join(format!("{name}.yaml"))).unwrap();
    }

    /// A TrafficPolicy of a Service: the lines of its `spec`, two spaces in.
    pub fn traffic_policy(&self, service: &str, spec: &str) {
        self.manifest(
            &format!("traffic-{service}"),
            &format!(
                "apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {{name: {service}, namespace: {NAMESPACE}}}
spec:
  targetRefs: [{{kind: Service, name: {service}}}]
{spec}
"
            ),
        );
    }

    /// The mTLS mode of every workload.
    pub fn mtls(&self, mode: &str) {
        self.manifest(
            "mtls",
            &format!(
                "apiVersion: policy.weft.dev/v1alpha1
kind: PeerAuthentication
metadata: {{name: default, namespace: {NAMESPACE}}}
spec: {{mtls: {{mode: {mode}}}}}
"
            ),
        );
    }

    /// The mesh's root certificate, PEM, once it has been started.
    pub fn root(&self) -> Vec<u8> {
        fs::read(self.path("root.pem")).unwrap()
    }

    /// Where proxies that are started from now on ask for names.
    pub fn dns(&mut self, server: SocketAddr) {
        self.dns = Some(server);
    }

    /// A virtual address that is nobody's host.
    pub fn spare_address(&mut self) -> Ipv4Addr {
        self.services += 1;
        Ipv4Addr::new(10, 97, self.number, self.services)
    }

    /// A host outside the mesh.
    pub fn outsider(&self, name: &str) -> Host {
        self.fabric.add_host(name).unwrap()
    }

    /// A host with a workload; its proxy is started by [`Mesh::start`]. The number is for
    /// [`Mesh::sidecar`].
    pub fn workload(&mut self, workload: Workload) -> usize {
        let host = self.fabric.add_host(&workload.name).unwrap();
        self.manifest(
            &format!("workload-{}", workload.name),
            &workload.manifest(&host),
        );
        let log = self.path(&format!("{}.log", workload.name));
        self.sidecars.push(Sidecar {
            host,
            workload,
            proxy: None,
            log,
        });
        self.sidecars.len() - 1
    }

    /// Writes the manifest of a workload anew, with these lines of its `spec` in place of its own
    /// [`Workload::extra`].
    pub fn change_workload(&self, i: usize, extra: &str) {
        let sidecar = self.sidecar(i);
        let changed = Workload {
            extra: extra.to_owned(),
            ..sidecar.workload.clone()
        };
        self.manifest(
            &format!("workload-{}", changed.name),
            &changed.manifest(&sidecar.host),
        );
    }

    /// A Service of the workloads whose label `app` is its name; its virtual address, in IPv4.
    pub fn service(&mut self, name: &str, target: u16, protocol: Option<&str>) -> SocketAddr {
        self.services += 1;
        let vip = Ipv4Addr::new(10, 96, self.number, self.services);
        self.service_at(name, vip.into(), 80, target, protocol)
    }

    /// The same with a virtual address in IPv6.
    pub fn service_v6(&mut self, name: &str, target: u16, protocol: Option<&str>) -> SocketAddr {
        self.services += 1;
        let vip = Ipv6Addr::new(
            0xfd96,
            0,
            0,
            u16::from(self.number),
            0,
            0,
            0,
            u16::from(self.services),
        );
        self.service_at(name, vip.into(), 80, target, protocol)
    }

    fn service_at(
        &self,
        name: &str,
        vip: IpAddr,
        port: u16,
        target: u16,
        protocol: Option<&str>,
    ) -> SocketAddr {
        let protocol = protocol.map_or(String::new(), |p| format!(", appProtocol: {p}"));
        let family = if vip.is_ipv4() { "IPv4" } else { "IPv6" };
        self.manifest(
            &format!("service-{name}"),
            &format!(
                "apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {NAMESPACE}}}
spec:
  clusterIP: '{vip}'
  ipFamilies: [{family}]
  selector: {{app: {name}}}
  ports: [{{port: {port}, targetPort: {target}{protocol}}}]
"
            ),
        );
        SocketAddr::new(vip, port)
    }

    /// Starts the control plane and every proxy, and waits until all are ready.
    pub fn start(&mut self) {
        self.start_control_plane();
        for i in 0..self.sidecars.len() {
            self.capture(i);
            self.start_proxy(i);
        }
        for i in 0..self.sidecars.len() {
            self.wait_ready(i);
        }
    }

    pub fn sidecar(&self, i: usize) -> &Sidecar {
        &self.sidecars[i]
    }

    pub fn host(&self, i: usize) -> &Host {
        &self.sidecars[i].host
    }

    /// Of the control plane's admin server, which tells callers on the machine itself everything; so
    /// do proxies with `--admin-trust` of its address.
    pub fn control_admin(&self) -> SocketAddr {
        self.control_address(CONTROL_ADMIN_PORT)
    }

    fn control_address(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.fabric.v4().into(), port)
    }

    pub fn start_control_plane(&mut self) {
        let log = append(&self.path("control-plane.log"));
        let child = Command::new(&self.binaries.control_plane)
            .arg(format!(
                "--source=folder:{}",
                self.path("manifests").display()
            ))
            .arg(format!("--data-dir={}", self.path("state").display()))
            .arg(format!("--listen={}", self.control_address(CONTROL_PORT)))
            .arg(format!(
                "--admin={}",
                self.control_address(CONTROL_ADMIN_PORT)
            ))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.control_plane = Some(child);
        let ready = self.control_address(CONTROL_ADMIN_PORT);
        eventually("the control plane is ready", PATIENCE, || {
            get(ready, "/readyz").is_some_and(|(code, _)| code == 200)
        });
        // The root is public; the state folder is not.
        fs::copy(self.path("state").join("root.pem"), self.path("root.pem")).unwrap();
        let readable = fs::Permissions::from_mode(0o644);
        fs::set_permissions(self.path("root.pem"), readable).unwrap();
    }

    /// Kills the control plane without a word.
    pub fn kill_control_plane(&mut self) {
        end(&mut self.control_plane);
    }

    /// Runs a command of the control plane's program on its state.
    pub fn control(&self, arguments: &[&str]) -> String {
        let output = Command::new(&self.binaries.control_plane)
            .args(arguments)
            .arg(format!("--data-dir={}", self.path("state").display()))
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// The control plane's admin server.
    pub fn control_get(&self, path: &str) -> Option<(u16, String)> {
        get(self.control_address(CONTROL_ADMIN_PORT), path)
    }

    /// Programs netfilter on a host.
    fn capture(&self, i: usize) {
        let mut init = self.host(i).command(&self.binaries.proxy).unwrap();
        init.arg("init")
            .args(self.fabric.exemption().init_arguments());
        let output = init.output().unwrap();
        assert!(
            output.status.success(),
            "weft-proxy init: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    pub fn start_proxy(&mut self, i: usize) {
        let workload = &self.sidecars[i].workload;
        let token = self.path(&format!("{}.token", workload.name));
        fs::write(
            &token,
            self.control(&[
                "token",
                &format!("--namespace={}", workload.in_namespace()),
                &format!("--service-account={}", workload.account()),
            ]),
        )
        .unwrap();
        fs::set_permissions(&token, fs::Permissions::from_mode(0o644)).unwrap();
        let log = append(&self.sidecars[i].log);
        let exemption = self.fabric.exemption();
        let launch = exemption.launch();
        let mut command = self
            .host(i)
            .command_with(&self.binaries.proxy, &launch)
            .unwrap();
        command
            .arg("run")
            .arg(format!(
                "--control-plane={}",
                self.control_address(CONTROL_PORT)
            ))
            .arg(format!("--trust-root={}", self.path("root.pem").display()))
            .arg(format!("--token={}", token.display()))
            .arg(format!(
                "--workload={}/{}",
                workload.in_namespace(),
                workload.name
            ))
            .arg("--log=info,weft_proxy=debug")
            .args(&workload.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        if let Some(dns) = self.dns {
            command.arg(format!("--dns-server={dns}"));
        }
        if let Some(mark) = exemption.mark() {
            command.arg(format!("--mark={mark}"));
        }
        self.sidecars[i].proxy = Some(command.spawn().unwrap());
    }

    pub fn wait_ready(&self, i: usize) {
        let sidecar = self.sidecar(i);
        let what = format!("the proxy of {} is ready", sidecar.workload.name);
        eventually(&what, PATIENCE, || {
            sidecar.get("/readyz").is_some_and(|(code, _)| code == 200)
        });
    }

    /// Kills a proxy without a word. Capture stays: the workload is cut off.
    pub fn kill_proxy(&mut self, i: usize) {
        end(&mut self.sidecars[i].proxy);
    }

    /// Ends a proxy politely; its exit code.
    #[track_caller]
    pub fn stop_proxy(&mut self, i: usize) -> Option<i32> {
        let mut child = self.sidecars[i].proxy.take().expect("a running proxy");
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
        let mut code = None;
        eventually("the proxy ends", Duration::from_secs(30), || {
            code = child.try_wait().unwrap();
            code.is_some()
        });
        code.and_then(|c| c.code())
    }

    fn logs(&self) -> Vec<(String, PathBuf)> {
        let control = ("control plane".to_owned(), self.path("control-plane.log"));
        self.sidecars
            .iter()
            .map(|s| (s.workload.name.clone(), s.log.clone()))
            .chain([control])
            .collect()
    }
}

impl Default for Mesh {
    fn default() -> Self {
        Self::new()
    }
}

impl Sidecar {
    /// Asks the proxy's admin server.
    pub fn get(&self, path: &str) -> Option<(u16, String)> {
        get(SocketAddr::new(self.host.v4().into(), ADMIN_PORT), path)
    }

    /// Asks the proxy's admin server from its own host, by the loopback address.
    pub fn get_inside(&self, path: &str) -> Option<(u16, String)> {
        let address = SocketAddr::from(([127, 0, 0, 1], ADMIN_PORT));
        let answer = self.host.within(|| Ok(get(address, path)));
        answer.ok().flatten()
    }

    /// The proxy's log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The sum of a metric's samples whose labels hold all of `labels` (as written: `key="value"`).
    pub fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let (_, text) = self.get("/metrics").expect("metrics");
        text.lines()
            .filter(|line| {
                line.strip_prefix(name)
                    .is_some_and(|rest| rest.starts_with([' ', '{']))
                    && labels.iter().all(|label| line.contains(label))
            })
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    /// The host's own address with one of its ports.
    pub fn address(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.host.v4().into(), port)
    }

    /// Connects from this workload, captured.
    #[track_caller]
    pub fn connect(&self, to: SocketAddr) -> Wire {
        Wire::connect(&self.host, to)
    }
}

fn append(path: &Path) -> fs::File {
    fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .unwrap()
}

/// A plain GET from this process; `None` when nobody answers.
fn get(to: SocketAddr, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(1)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n\r\n"
    )
    .ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let body = if header(head, "transfer-encoding").is_some() {
        dechunk(body)?
    } else {
        body.to_owned()
    };
    Some((status(head), body))
}

fn dechunk(mut body: &str) -> Option<String> {
    let mut whole = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n")?;
        let size = usize::from_str_radix(size, 16).ok()?;
        if size == 0 {
            return Some(whole);
        }
        whole.push_str(rest.get(..size)?);
        body = rest.get(size + 2..)?;
    }
}
