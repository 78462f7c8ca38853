//! Many proxies lose their control plane at once. The real client of the proxy, two real
//! control planes with one certificate authority, and between them what a Service does: connections go
//! to whichever lives. Measured is how many come at once.

#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use weft_control_plane::serve::ca::{Authority, Options};
use weft_control_plane::serve::{Config, IdentityConfig, Server, SourceConfig};
use weft_proxy::discovery::dial::ControlPlane;
use weft_proxy::discovery::{Client, Directory, IDLE_DESTINATION, LinkState, Settings};
use weft_proxy::identity::{Credentials, Handle, TrustBundle};
use weft_proxy::telemetry::Registry;

/// A handshake without optimisation costs ten times as much: fewer of them tell as much.
const PROXIES: usize = if cfg!(debug_assertions) { 200 } else { 1000 };
const PATIENCE: Duration = Duration::from_secs(120);
const DOMAIN: &str = "cluster.local";

struct Replica {
    address: SocketAddr,
    authority: Arc<Authority>,
    task: JoinHandle<()>,
}

impl Replica {
    async fn start(folder: &Path, data: &Path) -> Self {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = Server::bind(Config {
            source: SourceConfig::Folder(folder.to_owned()),
            data_dir: data.to_owned(),
            listen: any,
            admin: any,
            ca: Options::default(),
            identity: IdentityConfig::Folder,
            sampling_percent: 1.0,
            webhook: None,
        })
        .await
        .unwrap();
        let address = server.address().unwrap();
        let authority = server.authority();
        let task = tokio::spawn(async move {
            server.run(std::future::pending()).await.unwrap();
        });
        Self {
            address,
            authority,
            task,
        }
    }
}

/// Connections go to the replica of the moment; those to the one before are cut when it is gone.
struct Service {
    address: SocketAddr,
    backend: watch::Sender<SocketAddr>,
    /// When connections came.
    came: Arc<Mutex<Vec<Instant>>>,
}

impl Service {
    async fn start(backend: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let backend = watch::Sender::new(backend);
        let came = Arc::new(Mutex::new(Vec::new()));
        let (to, log) = (backend.clone(), came.clone());
        tokio::spawn(async move {
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                log.lock().unwrap().push(Instant::now());
                let mut to = to.subscribe();
                tokio::spawn(async move {
                    let address = *to.borrow_and_update();
                    let Ok(mut server) = TcpStream::connect(address).await else {
                        return;
                    };
                    tokio::select! {
                        _ = copy_bidirectional(&mut client, &mut server) => {}
                        // It is gone: reset, as its host does.
                        _ = to.changed() => {}
                    }
                });
            }
        });
        Self {
            address,
            backend,
            came,
        }
    }
}

struct Proxy {
    directory: Arc<Directory>,
    task: JoinHandle<()>,
}

fn proxy(authority: &Authority, service: SocketAddr, n: usize) -> Proxy {
    let now = SystemTime::now();
    let key = KeyPair::generate().unwrap();
    let csr = CertificateParams::default()
        .serialize_request(&key)
        .unwrap();
    let token = authority
        .issue_token("shop", "cart", None, Duration::from_secs(600), now)
        .unwrap();
    let (issued, _) = authority.certify(csr.der(), &token, now).unwrap();
    let trust = TrustBundle::from_pem(DOMAIN, authority.bundle().as_bytes()).unwrap();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let credentials = Credentials::new(issued.full_chain(), key, Arc::new(trust), 1).unwrap();
    let handle = Handle::new();
    handle.set(credentials);
    let settings = Settings {
        control_plane: ControlPlane::parse(&service.to_string(), None).unwrap(),
        trust_domain: DOMAIN.to_owned(),
        workload: format!("shop/cart-{n}"),
        admin_address: String::new(),
        idle_destination: IDLE_DESTINATION,
        dns_servers: Vec::new(),
    };
    let (client, directory) = Client::new(settings, handle, Registry::new());
    let task = tokio::spawn(async move {
        client.run().await;
    });
    Proxy { directory, task }
}

async fn all_connected(proxies: &[Proxy]) -> Duration {
    let began = Instant::now();
    loop {
        let connected = proxies
            .iter()
            .filter(|proxy| proxy.directory.link() == LinkState::Connected)
            .count();
        if connected == proxies.len() {
            return began.elapsed();
        }
        assert!(began.elapsed() < PATIENCE, "{connected} are connected");
        sleep(Duration::from_millis(20)).await;
    }
}

/// The most that came within any stretch of this length.
fn peak(came: &[Instant], within: Duration) -> usize {
    let count = |from: &Instant| {
        came.iter()
            .filter(|at| (*from..*from + within).contains(at))
            .count()
    };
    came.iter().map(count).max().unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proxies_that_lose_their_control_plane_do_not_come_back_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("manifests");
    std::fs::create_dir(&folder).unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    let first = Replica::start(&folder, &one).await;
    // The same certificate authority.
    std::fs::create_dir(&two).unwrap();
    for file in std::fs::read_dir(&one).unwrap() {
        let file = file.unwrap();
        if !file.file_name().to_string_lossy().ends_with(".lock") {
            std::fs::copy(file.path(), two.join(file.file_name())).unwrap();
        }
    }
    let second = Replica::start(&folder, &two).await;
    assert_eq!(first.authority.roots(), second.authority.roots());

    let service = Service::start(first.address).await;
    let mut proxies = Vec::new();
    for n in 0..PROXIES {
        proxies.push(proxy(&first.authority, service.address, n));
        sleep(Duration::from_millis(if cfg!(debug_assertions) {
            25
        } else {
            5
        }))
        .await;
    }
    all_connected(&proxies).await;
    service.came.lock().unwrap().clear();

    // Killed: nobody says goodbye.
    first.task.abort();
    let killed = Instant::now();
    service.backend.send_replace(second.address);
    while service.came.lock().unwrap().len() < PROXIES {
        assert!(killed.elapsed() < PATIENCE);
        sleep(Duration::from_millis(20)).await;
    }
    all_connected(&proxies).await;
    let back = killed.elapsed();
    let came = service.came.lock().unwrap().clone();
    let (tenth, second_long) = (
        peak(&came, Duration::from_millis(100)),
        peak(&came, Duration::from_secs(1)),
    );
    let last = came.iter().max().unwrap().duration_since(killed);
    println!(
        "{PROXIES} proxies lost their control plane: {} connections, the last after {last:.1?}, at most {tenth} within 100 ms and {second_long} within 1 s; all have a stream again after {back:.1?}",
        came.len()
    );
    // Evenly over 3 s it is a thirtieth and a third of them.
    assert!(tenth <= PROXIES / 7, "{tenth} within 100 ms");
    assert!(second_long <= PROXIES / 2, "{second_long} within 1 s");

    for proxy in proxies {
        proxy.task.abort();
    }
}
