//! The control plane's program on a scripted apiserver.
#![allow(dead_code, clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::json;
use tokio::sync::oneshot;
use tokio::time::timeout;
use weft_api::names::{CONTROL_PLANE, CONTROL_PLANE_NAMESPACE, INJECTOR};

use crate::apiserver::ApiServer;

/// Longer than anything takes that works.
const PATIENCE: Duration = Duration::from_secs(30);

/// The program; killed when the test ends before it.
pub struct Program {
    child: Child,
    /// Where proxies reach it.
    pub listen: SocketAddr,
    /// It says nothing any more.
    silent: oneshot::Receiver<()>,
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Program {
    pub fn start(server: &ApiServer, folder: &std::path::Path) -> Self {
        install(server);
        let kubeconfig = folder.join("kubeconfig");
        std::fs::write(&kubeconfig, server.kubeconfig()).unwrap();
        let settings = folder.join("settings.yaml");
        std::fs::write(&settings, "proxy: {image: 'weft-proxy:1'}\n").unwrap();
        let any = "127.0.0.1:0";
        let mut child = Command::new(env!("CARGO_BIN_EXE_weft-control-plane"))
            .args(["--source", "kubernetes", "--listen", any, "--admin", any])
            .args([
                "--webhook",
                any,
                "--log-level",
                "warn,weft_control_plane=info",
            ])
            .arg("--injector-settings")
            .arg(&settings)
            .arg("--data-dir")
            .arg(folder.join("data"))
            .env("KUBECONFIG", &kubeconfig)
            .env("POD_NAMESPACE", CONTROL_PLANE_NAMESPACE)
            .env("POD_NAME", "weft-control-plane-1")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        let (silence, silent) = oneshot::channel();
        let log = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                eprintln!("{line}");
                let said = line.split_once(" listen=").map(|(_, rest)| rest);
                if let Some(address) = said.and_then(|rest| rest.split(' ').next()) {
                    let _ = sender.send(address.parse().unwrap());
                }
            }
            let _ = silence.send(());
        });
        let listen = receiver.recv_timeout(PATIENCE).unwrap();
        Self {
            child,
            listen,
            silent,
        }
    }

    /// SIGTERM, and the end of it.
    pub async fn end(mut self) {
        let id = self.child.id().to_string();
        let told = Command::new("kill").args(["-TERM", &id]).status().unwrap();
        assert!(told.success());
        // The log ends with the process.
        let silent = timeout(PATIENCE, &mut self.silent).await;
        silent.expect("the program does not end").unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

/// What the chart makes, as far as the program needs it, and a namespace with applications, "shop".
fn install(server: &ApiServer) {
    for name in ["shop", CONTROL_PLANE_NAMESPACE] {
        let metadata = json!({"name": name});
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata});
        server.put("namespaces", namespace);
    }
    server.put(
        "clusterroles",
        json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
            "metadata": {"name": CONTROL_PLANE, "uid": "u-1"}}),
    );
    server.put(
        "mutatingwebhookconfigurations",
        json!({"apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "MutatingWebhookConfiguration", "metadata": {"name": INJECTOR},
            "webhooks": [{"name": "pods.weft.dev", "admissionReviewVersions": ["v1"],
                "sideEffects": "None", "clientConfig": {}}]}),
    );
}

/// Waits until something is so at the apiserver.
pub async fn eventually(server: &ApiServer, what: &str, mut so: impl FnMut() -> bool) {
    let mut news = server.news();
    let waiting = async {
        while !so() {
            news.changed().await.unwrap();
        }
    };
    let waited = timeout(PATIENCE, waiting).await;
    waited.unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"));
}
