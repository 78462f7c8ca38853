//! Our own pair: the real control plane with a folder of manifests, and two real proxies that it
//! tells what to do. Everything that is on by default is on, and besides: endpoints to balance over
//! (so many addresses of the one inbound proxy), retries armed, outlier detection, 1 % of the
//! requests traced. No netfilter: the proxies are given their connections by `--forward`.

use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context;

use super::{Candidate, Origin, Told, Ways, endpoints, loopback};
use crate::process::{Cpus, Process, Side, free_port, wait_for};

mod policies;

/// Where the programs are, and what the pair is told.
#[derive(Debug, Clone)]
pub struct Setup {
    pub name: &'static str,
    pub proxy: PathBuf,
    pub control_plane: PathBuf,
    pub told: Told,
    /// The outbound proxy shares no connections.
    pub own_connections: bool,
}

impl Setup {
    /// Builds the two programs as released, and finds them.
    pub fn build() -> anyhow::Result<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let status = Command::new(cargo)
            .args([
                "build",
                "--release",
                "-p",
                "weft-proxy",
                "-p",
                "weft-control-plane",
            ])
            .arg("--manifest-path")
            .arg(manifest)
            .status()
            .context("running cargo build")?;
        anyhow::ensure!(
            status.success(),
            "weft-proxy and weft-control-plane do not build"
        );
        let beside = std::env::current_exe()?;
        let folder = beside.parent().context("the benchmark lies in no folder")?;
        // A debug build of the benchmark still measures release builds of the proxy.
        let folder = match folder.file_name() {
            Some(name) if name == "release" => folder.to_owned(),
            _ => folder.with_file_name("release"),
        };
        Self::in_folder(&folder)
    }

    /// Takes the programs that lie in a folder.
    pub fn in_folder(folder: &Path) -> anyhow::Result<Self> {
        let find = |name: &str| {
            let path = folder.join(name);
            anyhow::ensure!(path.is_file(), "{} is missing", path.display());
            Ok(path)
        };
        Ok(Self {
            name: "weft",
            proxy: find("weft-proxy")?,
            control_plane: find("weft-control-plane")?,
            told: Told::default(),
            own_connections: false,
        })
    }
}

/// A Service that the pair carries: its virtual address, the loopback port that stands for it at
/// the outbound proxy, the port of the inbound proxy, and where that one goes on to.
struct Carried {
    name: &'static str,
    app_protocol: &'static str,
    vip: SocketAddr,
    outbound: u16,
    inbound: u16,
    origin: SocketAddr,
}

/// Starts control plane and pair, and waits until requests go through.
pub fn start(
    setup: &Setup,
    origin: &Origin,
    cpus: &Cpus,
    folder: &Path,
) -> anyhow::Result<Candidate> {
    let folder = folder.join(format!("weft-{}", free_port()?));
    let manifests = folder.join("manifests");
    let state = folder.join("state");
    fs::create_dir_all(&manifests)?;
    fs::create_dir_all(&state)?;
    let carried = [
        ("http", "http", 80, origin.http1),
        ("http2", "kubernetes.io/h2c", 8080, origin.http2),
        ("tcp", "tcp", 9000, origin.http1),
    ];
    let carried = carried
        .into_iter()
        .zip(1..)
        .map(|((name, app_protocol, port, origin), i)| {
            Ok(Carried {
                name,
                app_protocol,
                vip: SocketAddr::from(([10, 96, 0, i], port)),
                outbound: free_port()?,
                inbound: free_port()?,
                origin,
            })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mirrored = free_port()?;
    fs::write(
        manifests.join("bench.yaml"),
        used(&carried, setup.told.endpoints, mirrored, origin)?,
    )?;
    let features = match setup.told.policies {
        true => policies::carried()?,
        false => Vec::new(),
    };
    if setup.told.policies {
        let yaml = policies::manifests(&features, carried[0].inbound, mirrored)?;
        fs::write(manifests.join("policies.yaml"), yaml)?;
    }

    let control = free_port()?;
    let control_admin = free_port()?;
    let log = folder.join("control-plane.log");
    cpus.enter(Side::Server)?;
    let mut control_plane = Process::start(
        "weft-control-plane",
        &setup.control_plane,
        [
            format!("--source=folder:{}", manifests.display()),
            format!("--data-dir={}", state.display()),
            format!("--listen={}", loopback(control)),
            format!("--admin={}", loopback(control_admin)),
        ],
        &log,
    )?;
    cpus.enter(Side::Client)?;
    let root = state.join("root.pem");
    wait_for("the control plane", Duration::from_secs(20), || {
        control_plane.check(&log)?;
        std::net::TcpStream::connect(loopback(control))?;
        anyhow::ensure!(root.is_file(), "{} is not there yet", root.display());
        Ok(())
    })?;

    let mut processes = Vec::new();
    for (side, workload) in [(Side::Server, "server-1"), (Side::Client, "client")] {
        let account = workload.split('-').next().unwrap_or(workload);
        let token = folder.join(format!("{workload}.token"));
        let output = Command::new(&setup.control_plane)
            .arg("token")
            .arg(format!("--data-dir={}", state.display()))
            .args(["--namespace=bench", &format!("--service-account={account}")])
            .output()?;
        anyhow::ensure!(
            output.status.success(),
            "no token for {account}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        fs::write(&token, output.stdout)?;
        let mut forwards: Vec<_> = carried
            .iter()
            .map(|c| match side {
                Side::Client => format!("--forward=outbound:{}={}", c.outbound, c.vip),
                Side::Server => format!("--forward=inbound:{}={}", c.inbound, c.origin),
            })
            .collect();
        match side {
            Side::Client => {
                let policies = features.iter();
                forwards
                    .extend(policies.map(|c| format!("--forward=outbound:{}={}", c.port, c.vip)));
            }
            Side::Server => {
                forwards.push(format!("--forward=inbound:{mirrored}={}", origin.mirrored))
            }
        }
        let log = folder.join(format!("{workload}.log"));
        let admin = loopback(free_port()?);
        let arguments = [
            "run".to_owned(),
            format!("--control-plane={}", loopback(control)),
            format!("--trust-root={}", root.display()),
            format!("--token={}", token.display()),
            format!("--workload=bench/{workload}"),
            format!("--outbound-port={}", free_port()?),
            format!("--inbound-port={}", free_port()?),
            format!("--admin={admin}"),
            "--workers=1".to_owned(),
        ];
        let own = setup
            .own_connections
            .then(|| "--own-connections".to_owned());
        cpus.enter(side)?;
        let mut process = Process::start(
            workload,
            &setup.proxy,
            arguments.into_iter().chain(own).chain(forwards),
            &log,
        )?;
        cpus.enter(Side::Client)?;
        wait_for(
            &format!("the proxy of {workload}"),
            Duration::from_secs(20),
            || {
                process.check(&log)?;
                ready(admin)
            },
        )?;
        processes.push(process);
    }
    let pids = Some((processes[1].pid(), processes[0].pid()));
    processes.push(control_plane);
    let way = |name: &str| {
        carried
            .iter()
            .find(|c| c.name == name)
            .map(|c| loopback(c.outbound))
    };
    let mut candidate = Candidate {
        name: setup.name,
        ways: Ways {
            http1: way("http"),
            http2: way("http2"),
            tcp: way("tcp"),
            features: (features.iter())
                .map(|c| (c.feature, loopback(c.port)))
                .collect(),
        },
        pids,
        mesh: Some(Mesh {
            manifests,
            control_plane: loopback(control_admin),
        }),
        _processes: processes,
    };
    candidate
        .wait_ready()
        .with_context(|| format!("logs are in {}", folder.display()))?;
    Ok(candidate)
}

/// The folder that a control plane reads, and where it answers.
pub struct Mesh {
    manifests: PathBuf,
    control_plane: SocketAddr,
}

impl Mesh {
    /// Adds Services that nothing is sent to, ten endpoints each, and waits until the control plane
    /// can say what a client of the last one gets.
    pub fn add_unused_services(&self, count: usize) -> anyhow::Result<()> {
        fs::write(self.manifests.join("unused.yaml"), unused(count)?)?;
        let last = count.saturating_sub(1);
        let path = format!("/explain?destination={}:80", unused_address(last)?);
        wait_for(
            "the control plane to know every Service",
            Duration::from_secs(20),
            || {
                let answer = get(self.control_plane, &path)?;
                let name = format!("unused-{last}");
                anyhow::ensure!(answer.contains(&name), "{name} is not known yet");
                Ok(())
            },
        )
    }
}

/// Asks the admin port whether tables and certificate are in place.
fn ready(admin: SocketAddr) -> anyhow::Result<()> {
    get(admin, "/readyz").map(drop)
}

/// The answer, which must be 200.
fn get(admin: SocketAddr, path: &str) -> anyhow::Result<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(admin)?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.lines().next().unwrap_or_default();
    anyhow::ensure!(status.contains(" 200 "), "{path}: {answer}");
    Ok(answer)
}

/// The manifests of what is measured.
fn used(carried: &[Carried], count: u8, mirrored: u16, origin: &Origin) -> anyhow::Result<String> {
    let mut yaml = String::new();
    for c in carried {
        service(&mut yaml, c.name, c.vip, c.inbound, c.app_protocol)?;
        retries(&mut yaml, c.name)?;
        yaml.push_str(
            "  circuitBreaker:
    outlierDetection:
      consecutiveGatewayErrors: 5
      baseEjectionTime: 30s
",
        );
    }
    for (i, ip) in (1..).zip(endpoints(count)) {
        write!(
            yaml,
            "---
apiVersion: policy.weft.dev/v1alpha1
kind: Workload
metadata:
  name: server-{i}
  namespace: bench
  labels: {{app: server}}
spec:
  addresses: [{ip}]
  serviceAccount: server
  ports:
"
        )?;
        for c in carried {
            writeln!(yaml, "  - {{name: {}, port: {}}}", c.name, c.inbound)?;
        }
        writeln!(yaml, "  - {{name: mirrored, port: {mirrored}}}")?;
    }
    write!(
        yaml,
        "---
apiVersion: policy.weft.dev/v1alpha1
kind: Workload
metadata: {{name: client, namespace: bench, labels: {{app: client}}}}
spec:
  addresses: [127.0.2.1]
  serviceAccount: client
---
apiVersion: policy.weft.dev/v1alpha1
kind: Telemetry
metadata: {{name: all, namespace: bench}}
spec:
  tracing: {{samplingPercent: 1, otlpEndpoint: 'http://{}'}}
",
        origin.http2
    )?;
    Ok(yaml)
}

/// A Service that the inbound proxy's port `target` is behind.
fn service(
    yaml: &mut String,
    name: &str,
    vip: SocketAddr,
    target: u16,
    protocol: &str,
) -> std::fmt::Result {
    writeln!(
        yaml,
        "---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: bench}}
spec:
  clusterIP: {}
  selector: {{app: server}}
  ports:
  - {{name: main, port: {}, targetPort: {target}, appProtocol: {protocol}}}",
        vip.ip(),
        vip.port(),
    )
}

/// The TrafficPolicy of a Service, with retries; more of its spec may follow.
fn retries(yaml: &mut String, name: &str) -> std::fmt::Result {
    writeln!(
        yaml,
        "---
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {{name: {name}, namespace: bench}}
spec:
  targetRefs: [{{kind: Service, name: {name}}}]
  retries:
    attempts: 2
    codes: [503]
    conditions: [ConnectFailure, RefusedStream, Reset]"
    )
}

fn unused_address(i: usize) -> anyhow::Result<Ipv4Addr> {
    let (high, low) = (u8::try_from(i >> 8)?, u8::try_from(i & 255)?);
    Ok(Ipv4Addr::new(10, 97, high, low))
}

/// Services that exist and are not called.
fn unused(count: usize) -> anyhow::Result<String> {
    let mut yaml = String::new();
    for i in 0..count {
        let address = unused_address(i)?;
        let [_, _, high, low] = address.octets();
        write!(
            yaml,
            "---
apiVersion: v1
kind: Service
metadata: {{name: unused-{i}, namespace: others}}
spec:
  clusterIP: {address}
  ports: [{{name: http, port: 80, targetPort: 8080, appProtocol: http}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: unused-{i}
  namespace: others
  labels: {{kubernetes.io/service-name: unused-{i}}}
addressType: IPv4
ports: [{{name: http, port: 8080}}]
endpoints:
"
        )?;
        for e in 1..=10 {
            writeln!(
                yaml,
                "- {{addresses: [10.{}.{low}.{e}], conditions: {{ready: true}}}}",
                100 + high
            )?;
        }
    }
    Ok(yaml)
}
