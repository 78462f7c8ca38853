//! The control plane's program on a scripted apiserver.
#![allow(dead_code, clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use weft_api::names::CONTROL_PLANE_NAMESPACE;

use crate::apiserver::ApiServer;

/// Longer than anything takes that works.
const PATIENCE: Duration = Duration::from_secs(30);

/// The program; killed when the test ends before it.
pub struct Program {
    child: Child,
    /// Where proxies reach it.
    pub listen: SocketAddr,
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Program {
    pub fn start(server: &ApiServer, folder: &std::path::Path) -> Self {
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
        let log = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                eprintln!("{line}");
                let said = line.split_once(" listen=").map(|(_, rest)| rest);
                if let Some(address) = said.and_then(|rest| rest.split(' ').next()) {
                    let _ = sender.send(address.parse().unwrap());
                }
            }
        });
        let listen = receiver.recv_timeout(PATIENCE).unwrap();
        Self { child, listen }
    }

    /// SIGTERM, and the end of it.
    pub async fn end(mut self) {
        let id = self.child.id().to_string();
        let told = Command::new("kill").args(["-TERM", &id]).status().unwrap();
        assert!(told.success());
        eventually("the program ends", || {
            self.child.try_wait().unwrap().is_some()
        })
        .await;
    }
}

/// Waits until something is so.
pub async fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
