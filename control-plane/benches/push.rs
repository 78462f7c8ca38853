//! How long an endpoint change takes from the file's writing, or from the apiserver's saying so, to
//! a proxy's receipt: the real binary, real files or a scripted apiserver (over HTTP; objects as
//! large as Kubernetes' own), real mutual TLS. `cargo bench -p weft-control-plane`, or with
//! `-- folder` or `-- kubernetes` one of the two.
//!
//! 1,000 Services of 10 endpoints; 50 proxies, each of which asked for all of them; 500 changes. On
//! Kubernetes every endpoint is a pod, and a change is what a rollout does: a new pod, the slice,
//! the old pod deleted.

#![allow(clippy::unwrap_used)]

#[path = "../tests/support/apiserver.rs"]
mod apiserver;
#[path = "../tests/support/mod.rs"]
mod support;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use apiserver::ApiServer;
use serde_json::{Value, json};
use support::{Identity, TestProxy, connect, csr};
use tokio::sync::mpsc;
use weft_api::proto::identity_client::IdentityClient;
use weft_api::proto::resource::Body;
use weft_api::proto::{CertifyRequest, ResourceKind};
use weft_control_plane::serve::ca::{Authority, Options};

const SERVICES: usize = 1_000;
const ENDPOINTS: usize = 10;
const PROXIES: usize = 50;
const CHANGES: usize = 500;
/// Between two changes.
const PACE: Duration = Duration::from_millis(20);
/// What the project promises, 99th percentile.
const TARGET: Duration = Duration::from_millis(250);

fn main() {
    // `cargo test --benches` only wants to know that it builds and starts.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let given: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |name: &str| {
        let names = ["folder", "kubernetes"];
        given.iter().any(|given| given == name)
            || !given.iter().any(|given| names.contains(&given.as_str()))
    };
    if wanted("folder") {
        println!("-- folder");
        runtime.block_on(bench(false));
    }
    if wanted("kubernetes") {
        println!("-- kubernetes");
        runtime.block_on(bench(true));
    }
}

/// Where the control plane looks.
enum Feed {
    Folder(PathBuf),
    Kubernetes(ApiServer),
}

impl Feed {
    fn folder(folder: PathBuf) -> Self {
        std::fs::create_dir(&folder).unwrap();
        for index in 0..SERVICES {
            std::fs::write(folder.join(format!("s{index}.yaml")), service(index)).unwrap();
            let text = slice(index, CHANGES + 1);
            std::fs::write(folder.join(format!("e{index}.yaml")), text).unwrap();
        }
        Self::Folder(folder)
    }

    async fn kubernetes() -> Self {
        let server = ApiServer::start().await;
        for index in 0..SERVICES {
            server.put("services", cluster::service(index));
            for endpoint in 0..ENDPOINTS {
                server.put("pods", cluster::pod(index, endpoint, CHANGES + 1));
            }
            server.put("endpointslices", cluster::slice(index, CHANGES + 1));
        }
        Self::Kubernetes(server)
    }

    /// Arguments and environment of the control plane.
    fn configure(&self, command: &mut Command, dir: &Path) {
        match self {
            Self::Folder(folder) => {
                let source = format!("folder:{}", folder.display());
                command.args(["--source", &source]);
            }
            Self::Kubernetes(server) => {
                let kubeconfig = dir.join("kubeconfig");
                std::fs::write(&kubeconfig, server.kubeconfig()).unwrap();
                command.env("KUBECONFIG", kubeconfig);
                command.args(["--source", "kubernetes", "--identity", "folder"]);
            }
        }
    }

    /// Changes the endpoints of a Service; when the endpoints themselves were written.
    fn change(&self, index: usize, change: usize, last: Option<usize>) -> Instant {
        match self {
            Self::Folder(folder) => {
                let text = slice(index, change);
                let written = Instant::now();
                write(folder, &format!("e{index}.yaml"), &text);
                written
            }
            Self::Kubernetes(server) => {
                server.put("pods", cluster::pod(index, ENDPOINTS - 1, change));
                let slice = cluster::slice(index, change);
                let written = Instant::now();
                server.put("endpointslices", slice);
                let old = cluster::pod_name(index, ENDPOINTS - 1, last.unwrap_or(CHANGES + 1));
                server.delete("pods", "bench", &old);
                written
            }
        }
    }
}

/// The same objects as Kubernetes serves them, as large as it does.
mod cluster {
    use super::{ENDPOINTS, Value, json};

    fn real(text: &str) -> Value {
        serde_json::from_str(text).unwrap()
    }

    fn named(mut object: Value, name: &str) -> Value {
        object["metadata"]["name"] = name.into();
        object["metadata"]["namespace"] = "bench".into();
        object
    }

    pub fn service(index: usize) -> Value {
        let text = include_str!("../src/sources/kubernetes/testdata/service.json");
        let mut service = named(real(text), &format!("s{index}"));
        let ip = format!("10.96.{}.{}", index / 250, index % 250);
        service["spec"]["clusterIP"] = ip.as_str().into();
        service["spec"]["clusterIPs"] = json!([ip]);
        service["spec"]["selector"] = json!({"app": format!("s{index}")});
        service["spec"]["ports"] =
            json!([{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}]);
        service
    }

    /// The last pod of a Service tells which change it is of.
    pub fn pod_name(index: usize, endpoint: usize, change: usize) -> String {
        if endpoint == ENDPOINTS - 1 {
            format!("s{index}-c{change}")
        } else {
            format!("s{index}-{endpoint}")
        }
    }

    fn address(index: usize, endpoint: usize, change: usize) -> String {
        if endpoint == ENDPOINTS - 1 && change <= super::CHANGES {
            format!("10.200.{}.{}", change / 250, change % 250)
        } else {
            format!("10.{endpoint}.{}.{}", index / 250, index % 250)
        }
    }

    pub fn pod(index: usize, endpoint: usize, change: usize) -> Value {
        let name = pod_name(index, endpoint, change);
        let text = include_str!("../src/sources/kubernetes/testdata/pod.json");
        let mut pod = named(real(text), &name);
        let ip = address(index, endpoint, change);
        pod["metadata"]["uid"] = format!("00000000-0000-0000-0000-{name:0>12}").into();
        pod["metadata"]["labels"]["app"] = format!("s{index}").into();
        pod["status"]["podIP"] = ip.as_str().into();
        pod["status"]["podIPs"] = json!([{"ip": ip}]);
        let mut proxy = pod["spec"]["containers"][0].clone();
        proxy["name"] = "weft-proxy".into();
        pod["spec"]["initContainers"] = json!([proxy]);
        pod
    }

    pub fn slice(index: usize, change: usize) -> Value {
        let text = include_str!("../src/sources/kubernetes/testdata/slice.json");
        let mut slice = named(real(text), &format!("s{index}-abcde"));
        slice["metadata"]["labels"]["kubernetes.io/service-name"] = format!("s{index}").into();
        let like = slice["endpoints"][0].clone();
        let endpoints = (0..ENDPOINTS).map(|number| {
            let mut endpoint = like.clone();
            let name = pod_name(index, number, change);
            endpoint["addresses"] = json!([address(index, number, change)]);
            endpoint["targetRef"]["namespace"] = "bench".into();
            endpoint["targetRef"]["uid"] = format!("00000000-0000-0000-0000-{name:0>12}").into();
            endpoint["targetRef"]["name"] = name.into();
            endpoint
        });
        slice["endpoints"] = endpoints.collect();
        slice["ports"] = json!([{"name": "http", "port": 8080, "protocol": "TCP"}]);
        slice
    }
}

/// Ends the control plane with the benchmark.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_port() -> SocketAddr {
    let any = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    any.local_addr().unwrap()
}

fn service(index: usize) -> String {
    let (a, b) = (index / 250, index % 250);
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: s{index}, namespace: bench}}
spec: {{clusterIP: 10.96.{a}.{b}, ports: [{{name: http, port: 80}}]}}
"
    )
}

/// Endpoints of a Service; the last one tells which change they are of.
fn slice(index: usize, change: usize) -> String {
    let mut text = format!(
        "apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: s{index}, namespace: bench, labels: {{kubernetes.io/service-name: s{index}}}}}
addressType: IPv4
ports: [{{name: http, port: 8080}}]
endpoints:
"
    );
    for endpoint in 0..ENDPOINTS - 1 {
        let (a, b) = (index / 250, index % 250);
        text += &format!("- addresses: [10.{endpoint}.{a}.{b}]\n  conditions: {{ready: true}}\n");
    }
    let (a, b) = (change / 250, change % 250);
    text += &format!("- addresses: [10.200.{a}.{b}]\n  conditions: {{ready: true}}\n");
    text
}

/// Which change endpoints are of.
fn change_of(address: &str) -> Option<usize> {
    let mut parts = address.strip_prefix("10.200.")?.split(['.', ':']);
    let (a, b) = (parts.next()?, parts.next()?);
    Some(a.parse::<usize>().ok()? * 250 + b.parse::<usize>().ok()?)
}

fn write(folder: &Path, name: &str, text: &str) {
    let new = folder.join(format!(".{name}"));
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, folder.join(name)).unwrap();
}

fn status_of(pid: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
        .unwrap_or(0)
}

/// CPU time used by all threads of a process.
fn cpu(pid: u32) -> Duration {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten();
    let nanos = tasks
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("schedstat")).ok())
        .filter_map(|text| text.split(' ').next()?.parse::<u64>().ok())
        .sum();
    Duration::from_nanos(nanos)
}

async fn certify(address: SocketAddr, authority: &Authority) -> Option<Identity> {
    let token = authority
        .issue_token(
            "bench",
            "proxy",
            None,
            Duration::from_secs(3600),
            SystemTime::now(),
        )
        .unwrap();
    let channel = connect(address, authority.roots(), None).await.ok()?;
    let (csr, key) = csr();
    let request = CertifyRequest { csr, token };
    let response = IdentityClient::new(channel).certify(request).await.ok()?;
    Some(Identity {
        chain: response.into_inner().chain,
        key: key.serialize_der(),
    })
}

async fn bench(on_kubernetes: bool) {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let feed = if on_kubernetes {
        Feed::kubernetes().await
    } else {
        Feed::folder(dir.path().join("manifests"))
    };
    let (address, admin) = (free_port(), free_port());
    let began = Instant::now();
    let mut command = Command::new(env!("CARGO_BIN_EXE_weft-control-plane"));
    feed.configure(&mut command, dir.path());
    let child = command
        .arg("--data-dir")
        .arg(&data)
        .args(["--listen", &address.to_string()])
        .args(["--admin", &admin.to_string()])
        .args(["--log-level", "warn"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let pid = child.id();
    let _running = Running(child);
    let authority = Arc::new(Authority::open(&data, Options::default()).unwrap());
    let identity = loop {
        match certify(address, &authority).await {
            Some(identity) => break identity,
            None => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    println!("ready after {:?}", began.elapsed());
    println!("RSS with no proxy: {} KiB", status_of(pid, "VmRSS:"));

    let keys: Vec<String> = (0..SERVICES)
        .map(|index| format!("10.96.{}.{}:80", index / 250, index % 250))
        .collect();
    let (received, mut receipts) = mpsc::unbounded_channel::<(usize, Instant)>();
    for proxy in 0..PROXIES {
        let channel = connect(address, authority.roots(), Some(&identity))
            .await
            .unwrap();
        let mut stream = TestProxy::open(channel, &format!("bench/proxy-{proxy}"))
            .await
            .unwrap();
        let wanted: Vec<(ResourceKind, &str, u64)> = keys
            .iter()
            .map(|key| (ResourceKind::Destination, key.as_str(), 0))
            .collect();
        stream.subscribe_all(&wanted).await;
        let mut had = 0;
        while had < 2 * SERVICES {
            had += stream.next().await.unwrap().len();
        }
        let received = received.clone();
        tokio::spawn(async move {
            while let Some(resources) = stream.whenever().await {
                let now = Instant::now();
                for resource in &resources {
                    if let Some(Body::Endpoints(endpoints)) = &resource.body {
                        for endpoint in &endpoints.endpoints {
                            if let Some(change) = change_of(&endpoint.address) {
                                let _ = received.send((change, now));
                            }
                        }
                    }
                    stream.ack(resource).await;
                }
            }
        });
    }
    println!(
        "RSS with {PROXIES} proxies of {SERVICES} destinations each: {} KiB",
        status_of(pid, "VmRSS:")
    );

    let cpu_before = cpu(pid);
    let mut written = Vec::with_capacity(CHANGES);
    let mut last = vec![None; SERVICES];
    for change in 0..CHANGES {
        let index = (change * 7) % SERVICES;
        written.push(feed.change(index, change, last[index].replace(change)));
        tokio::time::sleep(PACE).await;
    }
    let mut taken = Vec::with_capacity(CHANGES * PROXIES);
    while taken.len() < CHANGES * PROXIES {
        let receipt = tokio::time::timeout(Duration::from_secs(10), receipts.recv()).await;
        let Ok(Some((change, at))) = receipt else {
            break;
        };
        if let Some(written) = written.get(change) {
            taken.push(at.duration_since(*written));
        }
    }
    taken.sort();
    let missing = CHANGES * PROXIES - taken.len();
    assert_eq!(missing, 0, "receipts are missing");
    let at = |percent: usize| taken[(taken.len() - 1) * percent / 100];
    println!(
        "{CHANGES} endpoint changes to {PROXIES} proxies, {} to receipt: p50 {:.1?}, p90 {:.1?}, p99 {:.1?}, max {:.1?}",
        if on_kubernetes {
            "watch event"
        } else {
            "file write"
        },
        at(50),
        at(90),
        at(99),
        taken[taken.len() - 1]
    );
    println!(
        "control plane: {:.2?} of CPU a change, RSS {} KiB, peak {} KiB",
        (cpu(pid) - cpu_before) / CHANGES as u32,
        status_of(pid, "VmRSS:"),
        status_of(pid, "VmHWM:")
    );
    assert!(at(99) < TARGET, "p99 is above the promised {TARGET:?}");
}
