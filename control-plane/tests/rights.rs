//! What the control plane asks of a cluster, and what its chart grants: the program itself, on a
//! scripted apiserver that keeps what each request takes. Neither is more than the other.

#![allow(clippy::unwrap_used)]

#[path = "support/apiserver.rs"]
mod apiserver;
#[path = "support/program.rs"]
mod program;
mod support;

use apiserver::{Access, ApiServer};
use k8s_openapi::api::rbac::v1::PolicyRule;
use program::{Program, eventually};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};
use weft_api::names::{
    CA_SECRET, CONTROL_PLANE, CONTROL_PLANE_NAMESPACE, INJECTOR, ROTATE_ANNOTATION,
    TRUST_CONFIG_MAP, TRUST_KEY,
};
use weft_api::proto::CertifyRequest;
use weft_api::proto::identity_client::IdentityClient;

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

/// Each single right of a rule: group, resource, verb, name (empty: whatever it is).
fn rights(rule: &PolicyRule) -> Vec<PolicyRule> {
    let one = |value: &String| Some(vec![value.clone()]);
    let mut all = Vec::new();
    for group in rule.api_groups.iter().flatten() {
        for resource in rule.resources.iter().flatten() {
            for verb in &rule.verbs {
                let names = rule.resource_names.as_ref();
                let names: Vec<_> = match names {
                    Some(names) => names.iter().map(one).collect(),
                    None => vec![None],
                };
                all.extend(names.into_iter().map(|resource_names| PolicyRule {
                    api_groups: one(group),
                    resources: one(resource),
                    verbs: vec![verb.clone()],
                    resource_names,
                    ..PolicyRule::default()
                }));
            }
        }
    }
    all
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

fn fill(server: &ApiServer) {
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
    for (kind, plural, spec) in policies() {
        server.put(
            plural,
            json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": kind,
                "metadata": {"name": plural, "namespace": "shop", "generation": 1},
                "spec": spec}),
        );
    }
    server.put(
        "xbackendtrafficpolicies",
        json!({"apiVersion": "gateway.networking.x-k8s.io/v1alpha1",
            "kind": "XBackendTrafficPolicy",
            "metadata": {"name": "cart", "namespace": "shop", "generation": 1},
            "spec": {"targetRefs": [{"group": "", "kind": "Service", "name": "cart"}],
                "sessionPersistence": {"sessionName": "s"}}}),
    );
    server.review(
        TOKEN,
        json!({"authenticated": true, "audiences": ["weft.dev/control-plane"],
            "user": {"username": "system:serviceaccount:shop:cart"}}),
    );
}

/// What a proxy shows.
const TOKEN: &str = "a token of cart";

/// Those whose conditions are at `status.conditions`.
fn policies() -> [(&'static str, &'static str, Value); 4] {
    let host = json!({"hosts": ["api.example.org"], "resolution": "DNS",
        "ports": [{"port": 443, "appProtocol": "tls"}]});
    [
        ("PeerAuthentication", "peerauthentications", json!({})),
        ("Telemetry", "telemetries", json!({})),
        ("ExternalService", "externalservices", host),
        (
            "EgressPolicy",
            "egresspolicies",
            json!({"mode": "AllowAny"}),
        ),
    ]
}

/// The status of a condition `Accepted`.
fn accepted(conditions: &Value) -> bool {
    let mut conditions = conditions.as_array().into_iter().flatten();
    conditions.any(|one| one["type"] == "Accepted" && one["status"] == "True")
}

/// A workload's proxy gets its certificate.
async fn certify(server: &ApiServer, program: &Program) {
    let map = server.get("configmaps", "shop", TRUST_CONFIG_MAP).unwrap();
    let pem = map["data"][TRUST_KEY].as_str().unwrap();
    let roots = CertificateDer::pem_slice_iter(pem.as_bytes())
        .map(|root| root.unwrap().to_vec())
        .collect();
    let channel = support::connect(program.listen, roots, None).await.unwrap();
    let request = CertifyRequest {
        csr: support::csr().0,
        token: TOKEN.to_owned(),
    };
    let answer = IdentityClient::new(channel).certify(request).await.unwrap();
    assert!(!answer.into_inner().chain.is_empty());
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
    eventually(&server, "the certificate authority", || {
        let secret = server.get("secrets", CONTROL_PLANE_NAMESPACE, CA_SECRET);
        secret.is_some()
    })
    .await;
    for namespace in ["shop", CONTROL_PLANE_NAMESPACE] {
        eventually(&server, "the trusted roots", || {
            let roots = server.get("configmaps", namespace, "weft-trust");
            roots.is_some()
        })
        .await;
    }
    eventually(&server, "the webhook's roots", || {
        let hook = server.get("mutatingwebhookconfigurations", "", INJECTOR);
        hook.unwrap()["webhooks"][0]["clientConfig"]["caBundle"].is_string()
    })
    .await;
    for (_, plural) in ROUTES {
        eventually(&server, "the status of a route", || {
            let route = server.get(plural, "shop", plural).unwrap();
            route["status"]["parents"][0]["conditions"].is_array()
        })
        .await;
    }
    for (kind, plural, _) in policies() {
        eventually(&server, kind, || {
            let policy = server.get(plural, "shop", plural).unwrap();
            accepted(&policy["status"]["conditions"])
        })
        .await;
    }
    for plural in ["trafficpolicies", "xbackendtrafficpolicies"] {
        eventually(&server, plural, || {
            let policy = server.get(plural, "shop", "cart").unwrap();
            accepted(&policy["status"]["ancestors"][0]["conditions"])
        })
        .await;
    }
    certify(&server, &program).await;
    // Asked for, as `weft identity rotate-root` does.
    let mut secret = server
        .get("secrets", CONTROL_PLANE_NAMESPACE, CA_SECRET)
        .unwrap();
    let before = secret["data"].clone();
    secret["metadata"]["annotations"] = json!({ROTATE_ANNOTATION: "now"});
    server.put("secrets", secret);
    eventually(&server, "another root", || {
        let secret = server.get("secrets", CONTROL_PLANE_NAMESPACE, CA_SECRET);
        secret.unwrap()["data"] != before
    })
    .await;
    program.end().await;
    let mut wanted = server.wanted();

    // An older apiserver is asked for lists in another way.
    let server = ApiServer::start().await;
    server.no_streams();
    fill(&server);
    let folder = tempfile::tempdir().unwrap();
    let program = Program::start(&server, folder.path());
    for (plural, name) in [("trafficpolicies", "cart"), ("httproutes", "httproutes")] {
        eventually(&server, "a status", || {
            let object = server.get(plural, "shop", name).unwrap();
            object["status"].is_object()
        })
        .await;
    }
    program.end().await;
    wanted.extend(server.wanted());

    let granted = granted();
    assert!(wanted.len() > 20, "{wanted:#?}");
    let refused: Vec<&Access> = wanted
        .iter()
        .filter(|wanted| {
            !(granted.iter()).any(|(namespace, rule)| allows(*namespace, rule, wanted))
        })
        .collect();
    assert!(refused.is_empty(), "not granted: {refused:#?}");
    let rights = granted.iter().flat_map(|(namespace, rule)| {
        let rights = rights(rule).into_iter();
        rights.map(|right| (*namespace, right))
    });
    let unused: Vec<_> = rights
        .filter(|(namespace, right)| !wanted.iter().any(|one| allows(*namespace, right, one)))
        .collect();
    assert!(unused.is_empty(), "granted and never used: {unused:#?}");
}
