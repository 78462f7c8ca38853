//! The source against a scripted apiserver: what is reported, and what goes wrong.

use std::time::Duration;

use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::apiserver::ApiServer;
use super::{pod, service};
use crate::finding::{Finding, Severity};
use crate::model::{Dirty, Name, World};
use crate::sources::Update;
use crate::sources::kubernetes::Kubernetes;

/// Longer than anything takes that works.
const PATIENCE: Duration = Duration::from_secs(20);

/// The source on a server, and what it has reported.
struct Running {
    server: ApiServer,
    updates: mpsc::Receiver<Update>,
    world: World,
    findings: Vec<Finding>,
    synced: bool,
    /// Changes that were reported.
    changes: usize,
    source: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.source.abort();
    }
}

impl Running {
    fn start(server: ApiServer) -> Self {
        let (sink, updates) = mpsc::channel(64);
        let source = tokio::spawn(Kubernetes::with(server.client()).run(sink));
        Self {
            server,
            updates,
            world: World::default(),
            findings: Vec::new(),
            synced: false,
            changes: 0,
            source,
        }
    }

    fn take(&mut self, update: Update) {
        match update {
            Update::Changes { changes, .. } => {
                self.changes += changes.len();
                for change in changes {
                    self.world.apply(change, &mut Dirty::default());
                }
            }
            Update::Findings(findings) => self.findings = findings,
            Update::Synced => self.synced = true,
        }
    }

    /// Takes updates until it is so.
    async fn until(&mut self, what: &str, so: impl Fn(&Self) -> bool) {
        let waiting = async {
            while !so(self) {
                let update = self.updates.recv().await.expect("the source runs");
                self.take(update);
            }
        };
        if tokio::time::timeout(PATIENCE, waiting).await.is_err() {
            panic!("not in time: {what}; findings {:?}", self.findings);
        }
    }

    async fn synced(server: ApiServer) -> Self {
        let mut running = Self::start(server);
        running.until("synced", |running| running.synced).await;
        running
    }

    fn has_service(&self, name: &str) -> bool {
        self.world.service(&Name::new("shop", name)).is_some()
    }

    fn has_pod(&self, name: &str) -> bool {
        self.world.workload(&Name::new("shop", name)).is_some()
    }
}

fn plain(name: &str) -> serde_json::Value {
    service(
        name,
        json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}),
    )
}

fn policy(name: &str, spec: serde_json::Value) -> serde_json::Value {
    json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "TrafficPolicy",
        "metadata": {"name": name, "namespace": "shop"}, "spec": spec})
}

async fn server() -> ApiServer {
    let server = ApiServer::start().await;
    server.put("services", plain("a"));
    server.put("services", plain("b"));
    server.put("pods", pod("cart-1", "10.0.0.1"));
    server
}

#[tokio::test]
async fn what_there_is_and_what_changes() {
    let mut running = Running::synced(server().await).await;
    assert!(running.has_service("a") && running.has_service("b") && running.has_pod("cart-1"));
    assert_eq!(running.findings, []);
    running.server.put("services", plain("c"));
    running.server.delete("services", "shop", "a");
    running
        .until("c for a", |now| {
            now.has_service("c") && !now.has_service("a")
        })
        .await;
    let mut over = pod("cart-1", "10.0.0.1");
    over["status"]["phase"] = "Succeeded".into();
    running.server.put("pods", over);
    running
        .until("a pod is over", |now| !now.has_pod("cart-1"))
        .await;
    assert_eq!(
        running.server.asked("services", "list"),
        0,
        "lists are streamed"
    );
}

#[tokio::test]
async fn an_apiserver_that_streams_no_lists_is_asked_page_by_page() {
    let server = server().await;
    server.no_streams();
    for index in 0..1200 {
        server.put("pods", pod(&format!("p{index}"), "10.0.0.2"));
    }
    let mut running = Running::synced(server).await;
    assert_eq!(running.world.workloads.len(), 1201);
    assert_eq!(running.server.asked("pods", "list"), 3);
    assert_eq!(running.findings, []);
    running.server.put("services", plain("c"));
    running.until("c", |now| now.has_service("c")).await;
}

#[tokio::test]
async fn a_lost_connection_goes_on_where_it_ended() {
    let mut running = Running::synced(server().await).await;
    let before = running.changes;
    running.server.disconnect("services");
    running.server.put("services", plain("c"));
    running.server.delete("services", "shop", "b");
    running
        .until("c for b", |now| {
            now.has_service("c") && !now.has_service("b")
        })
        .await;
    assert_eq!(running.changes, before + 2, "nothing else was reported");
    assert_eq!(running.server.asked("services", "stream"), 1);
}

#[tokio::test]
async fn what_went_away_while_nobody_looked_is_gone_after_a_new_list() {
    for streams in [true, false] {
        let server = server().await;
        if !streams {
            server.no_streams();
        }
        let mut running = Running::synced(server).await;
        running.server.disconnect("services");
        running.server.delete("services", "shop", "b");
        running.server.put("services", plain("c"));
        running.server.compact();
        running
            .until("c for b", |now| {
                now.has_service("c") && !now.has_service("b")
            })
            .await;
        assert!(running.has_service("a"));
        assert_eq!(running.findings, []);
    }
}

#[tokio::test]
async fn an_expired_watch_lists_anew() {
    let mut running = Running::synced(server().await).await;
    let expired = r#"{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"too old resource version","reason":"Expired","code":410}}"#;
    running.server.say("pods", &format!("{expired}\n"));
    running.server.put("pods", pod("cart-2", "10.0.0.2"));
    running.until("cart-2", |now| now.has_pod("cart-2")).await;
    assert_eq!(running.findings, [], "nobody needs to know");
}

#[tokio::test]
async fn a_policy_that_cannot_be_read_is_a_finding_and_the_last_good_one_stays() {
    let server = server().await;
    server.put(
        "trafficpolicies",
        policy("ok", json!({"timeouts": {"request": "1s"}})),
    );
    server.put(
        "trafficpolicies",
        policy("odd", json!({"retries": {"attempts": 99}})),
    );
    let mut running = Running::synced(server).await;
    let wrong = running.findings.clone();
    assert_eq!(wrong.len(), 1, "{wrong:?}");
    assert_eq!(wrong[0].object.as_deref(), Some("TrafficPolicy shop/odd"));
    assert_eq!(wrong[0].severity, Severity::Error);

    running
        .server
        .put("trafficpolicies", policy("ok", json!({"timeout": "2s"})));
    running
        .until("two findings", |now| now.findings.len() == 2)
        .await;
    let kept = &running.world.traffic[&Name::new("shop", "ok")];
    let request = kept.spec.timeouts.unwrap().request.unwrap();
    assert_eq!(request.as_millis(), 1_000);

    running.server.put(
        "trafficpolicies",
        policy("ok", json!({"timeouts": {"request": "3s"}})),
    );
    running
        .until("one finding", |now| now.findings.len() == 1)
        .await;
    running.server.delete("trafficpolicies", "shop", "odd");
    running
        .until("no finding", |now| now.findings.is_empty())
        .await;
}

#[tokio::test]
async fn missing_kinds_are_said_and_looked_for() {
    let server = server().await;
    for kind in [
        "trafficpolicies",
        "peerauthentications",
        "telemetries",
        "tcproutes",
    ] {
        server.set_missing(kind, true);
    }
    let mut running = Running::synced(server).await;
    assert!(running.has_service("a"), "the rest is not held up");
    running
        .until("four findings", |now| now.findings.len() == 4)
        .await;
    let first = &running.findings[0];
    assert_eq!(first.severity, Severity::Warning);
    assert!(
        first
            .message
            .contains("peerauthentications.policy.weft.dev"),
        "{first}"
    );
    // Whoever installs the chart has no Gateway API by that.
    let help = |kind: &str| {
        let of = |finding: &&Finding| finding.message.contains(kind);
        running.findings.iter().find(of).unwrap().help.clone()
    };
    assert!(help("telemetries.policy.weft.dev").contains("Helm chart"));
    assert!(help("tcproutes.gateway.networking.k8s.io").contains("Gateway API"));
    running
        .server
        .put("trafficpolicies", policy("a", json!({})));
    running.server.set_missing("trafficpolicies", false);
    running
        .until("the policy", |now| {
            now.world.traffic.len() == 1 && now.findings.len() == 3
        })
        .await;
}

#[tokio::test]
async fn without_permission_it_is_not_synced_and_says_why() {
    let server = server().await;
    server.set_forbidden("pods", true);
    let mut running = Running::start(server);
    running
        .until("a finding", |now| !now.findings.is_empty())
        .await;
    assert!(!running.synced);
    let finding = &running.findings[0];
    assert!(
        finding.message.starts_with("cannot watch pods"),
        "{finding}"
    );
    assert!(finding.help.contains("ClusterRole"), "{finding}");
    running.server.set_forbidden("pods", false);
    running
        .until("synced", |now| now.synced && now.findings.is_empty())
        .await;
    assert!(running.has_pod("cart-1"));
}

#[tokio::test]
async fn what_nobody_understands_ends_nothing() {
    let mut running = Running::synced(server().await).await;
    running.server.say(
        "services",
        "{\"type\":\"ADDED\",\"object\":{\"metadata\":7}}\n",
    );
    running
        .until("a finding", |now| !now.findings.is_empty())
        .await;
    assert!(running.findings[0].message.contains("one of the services"));
    running.server.put("services", plain("c"));
    running
        .until("c", |now| now.has_service("c") && now.findings.is_empty())
        .await;
}
