//! Renewal against a scripted certificate authority.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use rcgen::CertificateSigningRequestParams;
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_rustls::TlsAcceptor;
use tonic::{Request, Response, Status};
use weft_api::proto::identity_server::{Identity, IdentityServer};
use weft_api::proto::{CertifyRequest, CertifyResponse};

use super::credentials::Issuer;
use super::renewal::{self, Settings};
use super::testing::{Authority, DOMAIN, leaf, open_server, serve, shop};
use super::{Handle, TrustBundle};
use crate::discovery::dial::ControlPlane;
use crate::testing::rounds;

const CONTROL_PLANE: &str = "spiffe://cluster.local/ns/weft-system/sa/weft-control-plane";
const PATIENCE: Duration = Duration::from_secs(20);

/// What the authority does.
struct Script {
    issuer: Arc<Authority>,
    roots: Vec<Arc<Authority>>,
    life: Duration,
    identity: String,
    refusal: Option<Status>,
    /// Tokens shown and public keys asked for, in order.
    tokens: Vec<String>,
    keys: Vec<Vec<u8>>,
}

#[derive(Clone)]
struct Ca(Arc<Mutex<Script>>);

#[tonic::async_trait]
impl Identity for Ca {
    async fn certify(
        &self,
        request: Request<CertifyRequest>,
    ) -> Result<Response<CertifyResponse>, Status> {
        let mut script = self.0.lock().unwrap();
        let CertifyRequest { csr, token } = request.into_inner();
        script.tokens.push(token);
        if let Some(refusal) = &script.refusal {
            return Err(refusal.clone());
        }
        let csr = CertificateSigningRequestParams::from_der(&csr.to_vec().into())
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        use rcgen::PublicKeyData;
        script.keys.push(csr.public_key.der_bytes().to_vec());
        let mut params = leaf(&[&script.identity]);
        params.not_after = (SystemTime::now() + script.life).into();
        let cert = script.issuer.sign(&params, &csr.public_key);
        Ok(Response::new(CertifyResponse {
            chain: vec![cert.to_vec()],
            roots: script.roots.iter().map(|r| r.cert.to_vec()).collect(),
            not_before: params.not_before.unix_timestamp(),
            not_after: params.not_after.unix_timestamp(),
        }))
    }
}

struct World {
    script: Arc<Mutex<Script>>,
    handle: Handle,
    token: PathBuf,
    root: PathBuf,
    renewal: JoinHandle<()>,
    _dir: tempfile::TempDir,
}

impl Drop for World {
    fn drop(&mut self) {
        self.renewal.abort();
    }
}

impl World {
    async fn start(authority: Arc<Authority>, life: Duration) -> Self {
        Self::scripted(authority, life, |_| {}).await
    }

    async fn scripted(
        authority: Arc<Authority>,
        life: Duration,
        setup: impl FnOnce(&mut Script),
    ) -> Self {
        let server = open_server(&authority, CONTROL_PLANE);
        Self::with(authority, life, server, setup).await
    }

    /// The root file is the authority's, the token is "one".
    async fn with(
        authority: Arc<Authority>,
        life: Duration,
        server: Arc<ServerConfig>,
        setup: impl FnOnce(&mut Script),
    ) -> Self {
        let script = Arc::new(Mutex::new(Script {
            issuer: authority.clone(),
            roots: vec![authority.clone()],
            life,
            identity: shop("web"),
            refusal: None,
            tokens: Vec::new(),
            keys: Vec::new(),
        }));
        setup(&mut script.lock().unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (ca, acceptor) = (Ca(script.clone()), TlsAcceptor::from(server));
        tokio::spawn(async move {
            while let Ok((io, _)) = listener.accept().await {
                serve(io, acceptor.clone(), IdentityServer::new(ca.clone()));
            }
        });
        let dir = tempfile::tempdir().unwrap();
        let (token, root) = (dir.path().join("token"), dir.path().join("root.pem"));
        std::fs::write(&token, "one\n").unwrap();
        std::fs::write(&root, &authority.pem).unwrap();
        let settings = Settings {
            control_plane: ControlPlane::parse(&address.to_string(), None).unwrap(),
            trust_domain: DOMAIN.into(),
            trust_root: root.clone(),
            token: token.clone(),
            namespace: "shop".into(),
            rotation_jitter: Duration::ZERO,
        };
        let handle = Handle::new();
        Self {
            script,
            renewal: tokio::spawn(renewal::run(settings, handle.clone())),
            handle,
            token,
            root,
            _dir: dir,
        }
    }

    async fn until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let begin = Instant::now();
        while !done(self) {
            assert!(begin.elapsed() < PATIENCE, "{what}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    fn asked(&self) -> usize {
        self.script.lock().unwrap().tokens.len()
    }
}

fn day() -> Duration {
    Duration::from_secs(86_400)
}

#[tokio::test]
async fn a_certificate_for_a_token() {
    let world = World::start(Arc::new(Authority::new("root", 1)), day()).await;
    world
        .until("certificate", |w| w.handle.get().is_some())
        .await;
    let credentials = world.handle.get().unwrap();
    assert_eq!(credentials.id.to_string(), shop("web"));
    assert_eq!(credentials.issuer(), Issuer::Signing);
    assert!(world.handle.remaining().unwrap() > day() - Duration::from_secs(60));
    assert_eq!(world.script.lock().unwrap().tokens, ["one"]);
}

#[tokio::test]
async fn files_are_read_again_at_each_try() {
    let ca = Arc::new(Authority::new("root", 1));
    let refusal = Status::unauthenticated("the token has expired");
    let world = World::scripted(ca.clone(), day(), |s| s.refusal = Some(refusal)).await;
    world.until("a refusal", |w| w.asked() > 0).await;
    // Without a usable root nobody is asked.
    std::fs::write(&world.root, "not a root").unwrap();
    sleep(Duration::from_millis(100)).await;
    std::fs::write(&world.token, "two").unwrap();
    {
        let mut script = world.script.lock().unwrap();
        script.refusal = None;
        script.tokens.clear();
    }
    std::fs::write(&world.root, &ca.pem).unwrap();
    world
        .until("certificate", |w| w.handle.get().is_some())
        .await;
    assert_eq!(world.script.lock().unwrap().tokens, ["two"]);
}

#[tokio::test]
async fn renewed_in_time_with_a_new_key_and_kept_while_that_fails() {
    let life = Duration::from_secs(6);
    let world = World::start(Arc::new(Authority::new("root", 1)), life).await;
    world
        .until("certificate", |w| w.handle.generation() == 1)
        .await;
    world.until("renewal", |w| w.handle.generation() == 2).await;
    assert!(!world.handle.remaining().unwrap().is_zero());
    {
        let mut script = world.script.lock().unwrap();
        assert_ne!(script.keys[0], script.keys[1]);
        script.refusal = Some(Status::unavailable("the CA is not ready"));
    }
    let asked = world.asked();
    world.until("tries", |w| w.asked() >= asked + 3).await;
    assert_eq!(world.handle.generation(), 2);
    assert_eq!(world.handle.get().unwrap().id.to_string(), shop("web"));
    world.script.lock().unwrap().refusal = None;
    world.until("renewal", |w| w.handle.generation() == 3).await;
}

#[tokio::test]
async fn a_new_root_brings_the_renewal_forward() {
    let (old, new) = (
        Arc::new(Authority::new("old", 2)),
        // One that a user brings may have been valid for long.
        Arc::new(Authority::new("new", 1)),
    );
    let world = World::start(old.clone(), day()).await;
    world
        .until("certificate", |w| w.handle.generation() == 1)
        .await;
    // As the discovery stream does.
    let both = |first: &Authority, then: &Authority| {
        TrustBundle::new(DOMAIN, [first.cert.clone(), then.cert.clone()]).unwrap()
    };
    // Made known: nothing is asked for while the old root signs. It would be of no use, and the
    // next would be the third.
    world.handle.set_trust(both(&old, &new)).unwrap();
    assert_eq!(world.handle.get().unwrap().issuer(), Issuer::Signing);
    rounds().await;
    {
        let mut script = world.script.lock().unwrap();
        script.issuer = new.clone();
        script.roots = vec![new.clone(), old.clone()];
    }
    world.handle.set_trust(both(&new, &old)).unwrap();
    assert_eq!(world.handle.get().unwrap().issuer(), Issuer::Older);
    world
        .until("renewal", |w| {
            w.handle.get().unwrap().issuer() == Issuer::Signing
        })
        .await;
    assert_eq!(world.asked(), 2);
    // The old root goes: nothing is left that hangs on it.
    let only = TrustBundle::new(DOMAIN, [new.cert.clone()]).unwrap();
    world.handle.set_trust(only).unwrap();
    assert_eq!(world.handle.get().unwrap().issuer(), Issuer::Signing);
}

#[tokio::test]
async fn a_certificate_of_another_namespace_is_not_taken() {
    let ca = Arc::new(Authority::new("root", 1));
    let other = "spiffe://cluster.local/ns/bank/sa/web";
    let world = World::scripted(ca, day(), |s| s.identity = other.into()).await;
    world.until("tries", |w| w.asked() >= 2).await;
    assert!(world.handle.get().is_none());
}

#[tokio::test]
async fn no_token_is_shown_to_anybody_but_the_control_plane() {
    let ca = Arc::new(Authority::new("root", 1));
    let stranger = Authority::new("root", 1);
    for server in [
        open_server(&ca, &shop("weft-control-plane")),
        open_server(&stranger, CONTROL_PLANE),
    ] {
        let world = World::with(ca.clone(), day(), server, |_| {}).await;
        sleep(Duration::from_millis(700)).await;
        assert_eq!(world.asked(), 0);
        assert!(world.handle.get().is_none());
    }
}
