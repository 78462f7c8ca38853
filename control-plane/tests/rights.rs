//! What the control plane asks of a cluster, and what its chart grants: the program itself, on a
//! scripted apiserver that keeps what each request takes.

#![allow(clippy::unwrap_used)]

#[path = "support/apiserver.rs"]
mod apiserver;

use std::process::{Child, Command};
use std::time::{Duration, Instant};

use apiserver::{Access, ApiServer};
use k8s_openapi::api::rbac::v1::PolicyRule;
use serde_json::{Value, json};
use weft_api::names::{CA_SECRET, CONTROL_PLANE, CONTROL_PLANE_NAMESPACE, INJECTOR};

const PATIENCE: Duration = Duration::from_secs(30);
const CHART: &str = include_str!("../../charts/weft/templates/rbac.yaml");

/// Rules of the chart, and the namespace they are for; none: the whole cluster.
fn granted() -> Vec<(Option<&'static str>, PolicyRule)> {
    // As Helm makes it without values.
    let mut plain = String::new();
    let mut left_out = 0;
    for line in CHART.lines() {
        match line.trim() {
            begin if begin.starts_with("{{- with") || begin.starts_with("{{- if") => left_out += 1,
            "{{- end }}" => left_out -= 1,
            _ if left_out > 0 => {}
            _ => {
                let line = line
                    .replace("{{ include \"weft.name\" . }}", CONTROL_PLANE)
                    .replace("{{ .Release.Namespace }}", CONTROL_PLANE_NAMESPACE)
                    .replace("{{- include \"weft.labels\" . | nindent 4 }}", "{}");
                assert!(!line.contains("{{"), "{line}");
                plain.push_str(&line);
                plain.push('\n');
            }
        }
    }
    let mut granted = Vec::new();
    for document in plain.split("\n---\n") {
        let object: Value = serde_saphyr::from_str(document).unwrap();
        let namespace = match object["kind"].as_str().unwrap() {
            "ClusterRole" => None,
            "Role" => Some(CONTROL_PLANE_NAMESPACE),
            _ => continue,
        };
        let rules: Vec<PolicyRule> = serde_json::from_value(object["rules"].clone()).unwrap();
        granted.extend(rules.into_iter().map(|rule| (namespace, rule)));
    }
    granted
}

/// As the apiserver decides (RBAC).
fn allows(namespace: Option<&str>, rule: &PolicyRule, wanted: &Access) -> bool {
    let has = |list: &Option<Vec<String>>, one: &str| list.iter().flatten().any(|it| it == one);
    namespace.is_none_or(|namespace| wanted.namespace == namespace)
        && has(&rule.api_groups, &wanted.group)
        && has(&rule.resources, &wanted.resource)
        && rule.verbs.iter().any(|verb| verb == wanted.verb)
        && (rule.resource_names.is_none() || has(&rule.resource_names, &wanted.name))
}

/// The program; killed when the test ends before it.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Program {
    fn start(server: &ApiServer, folder: &std::path::Path) -> Self {
        let kubeconfig = folder.join("kubeconfig");
        std::fs::write(&kubeconfig, server.kubeconfig()).unwrap();
        let settings = folder.join("settings.yaml");
        std::fs::write(&settings, "proxy: {image: 'weft-proxy:1'}\n").unwrap();
        let any = "127.0.0.1:0";
        let child = Command::new(env!("CARGO_BIN_EXE_weft-control-plane"))
            .args(["--source", "kubernetes", "--listen", any, "--admin", any])
            .args(["--webhook", any, "--log-level", "warn"])
            .arg("--injector-settings")
            .arg(&settings)
            .arg("--data-dir")
            .arg(folder.join("data"))
            .env("KUBECONFIG", &kubeconfig)
            .env("POD_NAMESPACE", CONTROL_PLANE_NAMESPACE)
            .env("POD_NAME", "weft-control-plane-1")
            .spawn()
            .unwrap();
        Self(child)
    }

    /// SIGTERM, and the end of it.
    async fn end(mut self) {
        let id = self.0.id().to_string();
        let told = Command::new("kill").args(["-TERM", &id]).status().unwrap();
        assert!(told.success());
        eventually("the program ends", || self.0.try_wait().unwrap().is_some()).await;
    }
}

async fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn fill(server: &ApiServer) {
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
    server.put(
        "services",
        json!({"metadata": {"name": "cart", "namespace": "shop"},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}]}}),
    );
    server.put(
        "trafficpolicies",
        json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "TrafficPolicy",
            "metadata": {"name": "cart", "namespace": "shop", "generation": 1},
            "spec": {"targetRefs": [{"kind": "Service", "name": "cart"}],
                "timeouts": {"request": "3s"}}}),
    );
    let route = |kind: &str, name: &str| {
        json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": kind,
            "metadata": {"name": name, "namespace": "shop", "generation": 1},
            "spec": {
                "parentRefs": [{"group": "", "kind": "Service", "name": "cart"}],
                "rules": [{"backendRefs": [{"name": "cart", "port": 80}]}]}})
    };
    for (kind, plural) in ROUTES {
        server.put(plural, route(kind, plural));
    }
}

const ROUTES: [(&str, &str); 4] = [
    ("HTTPRoute", "httproutes"),
    ("GRPCRoute", "grpcroutes"),
    ("TLSRoute", "tlsroutes"),
    ("TCPRoute", "tcproutes"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_chart_grants_what_the_control_plane_asks_for() {
    let server = ApiServer::start().await;
    fill(&server);
    let folder = tempfile::tempdir().unwrap();
    let program = Program::start(&server, folder.path());
    // All that it writes.
    eventually("the certificate authority", || {
        let secret = server.get("secrets", CONTROL_PLANE_NAMESPACE, CA_SECRET);
        secret.is_some()
    })
    .await;
    for namespace in ["shop", CONTROL_PLANE_NAMESPACE] {
        eventually("the trusted roots", || {
            let roots = server.get("configmaps", namespace, "weft-trust");
            roots.is_some()
        })
        .await;
    }
    eventually("the webhook's roots", || {
        let hook = server.get("mutatingwebhookconfigurations", "", INJECTOR);
        hook.unwrap()["webhooks"][0]["clientConfig"]["caBundle"].is_string()
    })
    .await;
    for (_, plural) in ROUTES {
        eventually("the status of a route", || {
            let route = server.get(plural, "shop", plural).unwrap();
            route["status"]["parents"][0]["conditions"].is_array()
        })
        .await;
    }
    program.end().await;

    let granted = granted();
    let wanted = server.wanted();
    assert!(wanted.len() > 20, "{wanted:#?}");
    let refused: Vec<&Access> = wanted
        .iter()
        .filter(|wanted| {
            !(granted.iter()).any(|(namespace, rule)| allows(*namespace, rule, wanted))
        })
        .collect();
    assert!(refused.is_empty(), "not granted: {refused:#?}");
}
