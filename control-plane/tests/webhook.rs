//! The admission webhook over real HTTPS, as the apiserver calls it.

#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::Arc;

use base64::Engine as _;
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use weft_control_plane::serve::ca::{Authority, Options};
use weft_control_plane::serve::{Config, IdentityConfig, Server, SourceConfig, webhook};

struct Webhook {
    address: SocketAddr,
    admin: SocketAddr,
    authority: Arc<Authority>,
    folder: TempDir,
}

impl Webhook {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("manifests")).unwrap();
        let settings = folder.path().join("settings.yaml");
        std::fs::write(&settings, "proxy: {image: 'weft-proxy:1'}\n").unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let server = Server::bind(Config {
            source: SourceConfig::Folder(folder.path().join("manifests")),
            data_dir: folder.path().join("data"),
            listen: any,
            admin: any,
            ca: Options::default(),
            identity: IdentityConfig::Folder,
            sampling_percent: 1.0,
            webhook: Some(webhook::Config {
                listen: any,
                settings,
            }),
        })
        .await
        .unwrap();
        let started = Self {
            address: server.webhook_address().unwrap().unwrap(),
            admin: server.admin_address().unwrap(),
            authority: server.authority(),
            folder,
        };
        tokio::spawn(server.run(std::future::pending()));
        started
    }

    /// A connection that trusts the mesh's roots and nothing else.
    async fn connect(
        &self,
        name: &str,
    ) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        for root in self.authority.roots() {
            roots.add(root.into()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let tcp = TcpStream::connect(self.address).await?;
        let name = ServerName::try_from(name.to_owned()).unwrap();
        TlsConnector::from(Arc::new(config))
            .connect(name, tcp)
            .await
    }

    async fn ask(&self, method: Method, path: &str, body: Vec<u8>) -> (StatusCode, String) {
        let name = "weft-control-plane.weft-system.svc";
        let stream = TokioIo::new(self.connect(name).await.unwrap());
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", name)
            .body(Full::new(Bytes::from(body)))
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    async fn review(&self, path: &str, pod: Value) -> Value {
        let review = json!({
            "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
            "request": {
                "uid": "7", "namespace": "shop", "kind": {"version": "v1", "kind": "Pod"},
                "object": pod,
            },
        });
        let (status, body) = self
            .ask(Method::POST, path, review.to_string().into_bytes())
            .await;
        assert_eq!(status, StatusCode::OK, "{body}");
        let mut answer: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(answer["response"]["uid"], "7");
        answer["response"].take()
    }
}

fn pod() -> Value {
    json!({
        "metadata": {"generateName": "web-"},
        "spec": {"containers": [{"name": "app", "image": "app"}]},
    })
}

fn patch(response: &Value) -> Vec<Value> {
    let encoded = response["patch"].as_str().unwrap();
    let patch = base64::engine::general_purpose::STANDARD.decode(encoded);
    serde_json::from_slice(&patch.unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_get_sidecars_over_https() {
    let webhook = Webhook::start().await;
    let response = webhook.review("/inject/namespace", pod()).await;
    assert_eq!(response["allowed"], true);
    let containers = patch(&response)
        .into_iter()
        .find(|operation| operation["path"] == "/spec/initContainers")
        .unwrap();
    assert_eq!(containers["value"][1]["name"], "weft-proxy");
    assert_eq!(containers["value"][1]["image"], "weft-proxy:1");

    // Asked for by nobody.
    let response = webhook.review("/inject/pod", pod()).await;
    assert_eq!(response, json!({"uid": "7", "allowed": true}));
    // By the pod itself.
    let mut asking = pod();
    asking["metadata"]["annotations"] = json!({"weft.dev/inject": "enabled"});
    let response = webhook.review("/inject/pod", asking).await;
    assert!(!patch(&response).is_empty());

    // The settings are those of now.
    let settings = webhook.folder.path().join("settings.yaml");
    std::fs::write(&settings, "proxy: {image: 'weft-proxy:2'}\n").unwrap();
    let response = webhook.review("/inject/namespace", pod()).await;
    assert!(
        patch(&response)
            .iter()
            .any(|operation| operation["value"][1]["image"] == "weft-proxy:2")
    );

    // Without them nothing is let through as if all were well.
    std::fs::write(&settings, "proxy: {img: x}\n").unwrap();
    let (status, body) = webhook
        .ask(Method::POST, "/inject/namespace", b"{}".to_vec())
        .await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(
        body.contains("the injection settings cannot be read"),
        "{body}"
    );

    let metrics = metrics(webhook.admin).await;
    for line in [
        "weft_control_plane_injections_total 3\n",
        "weft_control_plane_injections_skipped_total 1\n",
        "weft_control_plane_injections_failed_total 1\n",
    ] {
        assert!(metrics.contains(line), "{line}{metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_review_is_refused() {
    let webhook = Webhook::start().await;
    for (method, path, body, expected) in [
        (
            Method::GET,
            "/inject/pod",
            "",
            StatusCode::METHOD_NOT_ALLOWED,
        ),
        (Method::POST, "/", "{}", StatusCode::NOT_FOUND),
        (Method::POST, "/inject/pod", "{", StatusCode::BAD_REQUEST),
        (Method::POST, "/inject/pod", "{}", StatusCode::BAD_REQUEST),
    ] {
        let (status, said) = webhook.ask(method, path, body.into()).await;
        assert_eq!(status, expected, "{path} {body}: {said}");
    }
    let (status, _) = webhook
        .ask(Method::POST, "/inject/pod", vec![b' '; 9 << 20])
        .await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_certificate_is_for_the_services_names() {
    let webhook = Webhook::start().await;
    for name in [
        "weft-control-plane.weft-system.svc",
        "weft-control-plane.weft-system.svc.cluster.local",
    ] {
        let stream = webhook.connect(name).await.unwrap();
        let (_, session) = stream.get_ref();
        assert_eq!(
            session.protocol_version(),
            Some(rustls::ProtocolVersion::TLSv1_3)
        );
        let leaf = &session.peer_certificates().unwrap()[0];
        let (_, leaf) = x509_parser::parse_x509_certificate(leaf).unwrap();
        let usage = leaf.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.server_auth && !usage.client_auth);
        let life = leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp();
        assert!(life <= 24 * 3600 + 120, "{life}");
    }
    assert!(
        webhook
            .connect("weft-control-plane.other.svc")
            .await
            .is_err()
    );
}

async fn metrics(admin: SocketAddr) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = TcpStream::connect(admin).await.unwrap();
    let request = b"GET /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}
