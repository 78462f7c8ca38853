//! A control plane on real sockets, and a client that speaks to it as a proxy does.
#![allow(dead_code, clippy::unwrap_used)]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::aws_lc_rs;
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};
use weft_api::names::{CONTROL_PLANE_NAMESPACE, CONTROL_PLANE_SERVICE_ACCOUNT};
use weft_api::proto::discovery_client::DiscoveryClient;
use weft_api::proto::discovery_request::Message;
use weft_api::proto::identity_client::IdentityClient;
use weft_api::proto::{
    Ack, CertifyRequest, CertifyResponse, DiscoveryRequest, DiscoveryResponse, Held, Hello, Nack,
    Resource, ResourceKey, ResourceKind, Subscribe, Unsubscribe,
};
use weft_control_plane::serve::ca::{Authority, Options};
use weft_control_plane::serve::{Config, IdentityConfig, Server, SourceConfig, tls};

/// Longer than anything takes that works.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A running control plane with its own folder and data directory.
pub struct ControlPlane {
    pub address: SocketAddr,
    pub admin: SocketAddr,
    pub authority: Arc<Authority>,
    pub folder: PathBuf,
    pub data: PathBuf,
    _dir: Option<tempfile::TempDir>,
    stop: Option<oneshot::Sender<()>>,
    done: tokio::task::JoinHandle<()>,
}

impl ControlPlane {
    /// With these files in its folder.
    pub async fn start(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("manifests");
        std::fs::create_dir(&folder).unwrap();
        for (name, text) in files {
            std::fs::write(folder.join(name), text).unwrap();
        }
        let data = dir.path().join("data");
        let mut started = Self::start_in(&folder, &data).await;
        started._dir = Some(dir);
        started
    }

    pub async fn start_in(folder: &Path, data: &Path) -> Self {
        Self::start_with(SourceConfig::Folder(folder.to_owned()), folder, data).await
    }

    /// With another source than the folder.
    pub async fn start_with(source: SourceConfig, folder: &Path, data: &Path) -> Self {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = Server::bind(Config {
            source,
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
        let (address, admin) = (server.address().unwrap(), server.admin_address().unwrap());
        let authority = server.authority();
        let (stop, stopped) = oneshot::channel();
        let done = tokio::spawn(async move {
            let ended = server.run(async {
                let _ = stopped.await;
            });
            ended.await.unwrap();
        });
        Self {
            address,
            admin,
            authority,
            folder: folder.to_owned(),
            data: data.to_owned(),
            _dir: None,
            stop: Some(stop),
            done,
        }
    }

    /// Ends it as SIGTERM does. The folder stays.
    pub async fn stop(mut self) -> Option<tempfile::TempDir> {
        self.stop.take();
        tokio::time::timeout(PATIENCE, &mut self.done)
            .await
            .unwrap()
            .unwrap();
        self._dir.take()
    }

    /// Writes a file as an editor does: beside it, then renamed.
    pub fn write(&self, name: &str, text: &str) {
        let new = self.folder.join(format!(".{name}.new"));
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, self.folder.join(name)).unwrap();
    }

    pub fn token(&self, namespace: &str, account: &str) -> String {
        self.authority
            .issue_token(
                namespace,
                account,
                None,
                Duration::from_secs(600),
                SystemTime::now(),
            )
            .unwrap()
    }

    /// A certificate for a service account.
    pub async fn identity(&self, namespace: &str, account: &str) -> Identity {
        let token = self.token(namespace, account);
        self.certify(&token).await.unwrap()
    }

    pub async fn certify(&self, token: &str) -> Result<Identity, Status> {
        let (csr, key) = csr();
        let response = self.certify_csr(csr, token).await?;
        Ok(Identity {
            chain: response.chain,
            key: key.serialize_der(),
        })
    }

    pub async fn certify_csr(&self, csr: Vec<u8>, token: &str) -> Result<CertifyResponse, Status> {
        let channel = connect(self.address, self.authority.roots(), None).await?;
        let request = CertifyRequest {
            csr,
            token: token.to_owned(),
        };
        Ok(IdentityClient::new(channel)
            .certify(request)
            .await?
            .into_inner())
    }

    /// A stream that has said Hello.
    pub async fn stream(&self, identity: &Identity, workload: &str) -> Result<TestProxy, Status> {
        let channel = connect(self.address, self.authority.roots(), Some(identity)).await?;
        TestProxy::open(channel, workload).await
    }

    /// A JSON answer of the admin port.
    pub async fn admin_json(&self, path: &str) -> serde_json::Value {
        serde_json::from_str(&self.admin("GET", path).await).unwrap()
    }

    /// The body of an answer of the admin port.
    pub async fn admin(&self, method: &str, path: &str) -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = TcpStream::connect(self.admin).await.unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }
}

/// A certificate with its key, DER.
#[derive(Clone)]
pub struct Identity {
    pub chain: Vec<Vec<u8>>,
    pub key: Vec<u8>,
}

/// A signing request with a new key.
pub fn csr() -> (Vec<u8>, rcgen::KeyPair) {
    let key = rcgen::KeyPair::generate().unwrap();
    let csr = rcgen::CertificateParams::default()
        .serialize_request(&key)
        .unwrap();
    (csr.der().to_vec(), key)
}

/// Connects as a proxy does: the chain by the roots, then the SPIFFE identity.
pub async fn connect(
    address: SocketAddr,
    roots: Vec<Vec<u8>>,
    identity: Option<&Identity>,
) -> Result<Channel, Status> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(CertificateDer::from(root)).unwrap();
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier(store)));
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => builder
            .with_client_auth_cert(
                identity
                    .chain
                    .iter()
                    .map(|der| CertificateDer::from(der.clone()))
                    .collect(),
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(identity.key.clone())),
            )
            .unwrap(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    Endpoint::from_static("http://control-plane")
        // As small as HTTP/2 begins with, so that not reading is felt at the other end soon.
        .initial_stream_window_size(65_535)
        .initial_connection_window_size(65_535)
        .connect_with_connector(tower::service_fn(move |_| {
            let connector = connector.clone();
            async move {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                let name = ServerName::try_from("control-plane").unwrap();
                let stream = connector.connect(name, stream).await?;
                Ok::<_, std::io::Error>(TokioIo::new(stream))
            }
        }))
        .await
        .map_err(|error| Status::unavailable(format!("{error:?}")))
}

#[derive(Debug)]
struct Verifier(RootCertStore);

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.0,
            intermediates,
            now,
            aws_lc_rs::default_provider()
                .signature_verification_algorithms
                .all,
        )?;
        let peer = tls::peer(end_entity, "cluster.local")
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        assert_eq!(peer.identity.namespace, CONTROL_PLANE_NAMESPACE);
        assert_eq!(peer.identity.service_account, CONTROL_PLANE_SERVICE_ACCOUNT);
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 was used".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signed,
            &aws_lc_rs::default_provider().signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        aws_lc_rs::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// The proxy's end of a stream.
pub struct TestProxy {
    requests: mpsc::Sender<DiscoveryRequest>,
    responses: Streaming<DiscoveryResponse>,
    /// Keeps the connection.
    _channel: Channel,
}

pub fn key(kind: ResourceKind, name: &str) -> ResourceKey {
    ResourceKey {
        kind: kind.into(),
        name: name.to_owned(),
    }
}

impl TestProxy {
    pub async fn open(channel: Channel, workload: &str) -> Result<Self, Status> {
        let hello = Message::Hello(Hello {
            workload: workload.to_owned(),
            proxy_version: "test".to_owned(),
            instance: "1".to_owned(),
            ..Hello::default()
        });
        Self::open_with(channel, hello).await
    }

    pub async fn open_with(channel: Channel, first: Message) -> Result<Self, Status> {
        let (requests, outgoing) = mpsc::channel(64);
        let proxy = Self {
            responses: DiscoveryClient::new(channel.clone())
                .stream(ReceiverStream::new(outgoing))
                .await?
                .into_inner(),
            requests,
            _channel: channel,
        };
        proxy.say(first).await;
        Ok(proxy)
    }

    pub async fn say(&self, message: Message) {
        let request = DiscoveryRequest {
            message: Some(message),
        };
        // The stream may have ended; the test sees it when it reads.
        let _ = self.requests.send(request).await;
    }

    pub async fn subscribe(&self, kind: ResourceKind, name: &str, version: u64) {
        self.subscribe_all(&[(kind, name, version)]).await;
    }

    pub async fn subscribe_all(&self, wanted: &[(ResourceKind, &str, u64)]) {
        let resources = wanted
            .iter()
            .map(|(kind, name, version)| Held {
                key: Some(key(*kind, name)),
                version: *version,
            })
            .collect();
        self.say(Message::Subscribe(Subscribe { resources })).await;
    }

    pub async fn unsubscribe(&self, kind: ResourceKind, name: &str) {
        let keys = vec![key(kind, name)];
        self.say(Message::Unsubscribe(Unsubscribe { keys })).await;
    }

    pub async fn ack(&self, resource: &Resource) {
        let ack = Ack {
            key: resource.key.clone(),
            version: resource.version,
        };
        self.say(Message::Ack(ack)).await;
    }

    pub async fn nack(&self, resource: &Resource, reason: &str) {
        let nack = Nack {
            key: resource.key.clone(),
            version: resource.version,
            reason: reason.to_owned(),
        };
        self.say(Message::Nack(nack)).await;
    }

    /// The next message's resources.
    pub async fn next(&mut self) -> Result<Vec<Resource>, Status> {
        let message = tokio::time::timeout(PATIENCE, self.responses.message())
            .await
            .expect("nothing came");
        match message? {
            Some(response) => Ok(response.resources),
            None => Err(Status::ok("the stream has ended")),
        }
    }

    /// The next message's resources, however long it takes; `None` at the end.
    pub async fn whenever(&mut self) -> Option<Vec<Resource>> {
        let response = self.responses.message().await.ok()??;
        Some(response.resources)
    }

    /// True when nothing comes for a while.
    pub async fn is_silent(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(400), self.responses.message())
            .await
            .is_err()
    }
}
