//! The statuses of policies that name no target, as the program writes them: on a scripted apiserver.

#![allow(clippy::unwrap_used)]

#[path = "support/apiserver.rs"]
mod apiserver;
#[path = "support/program.rs"]
mod program;

use apiserver::ApiServer;
use program::{Program, eventually};
use serde_json::{Value, json};

fn plural(kind: &str) -> &'static str {
    match kind {
        "EgressPolicy" => "egresspolicies",
        "ExternalService" => "externalservices",
        "PeerAuthentication" => "peerauthentications",
        "TrafficPolicy" => "trafficpolicies",
        _ => "telemetries",
    }
}

fn put(server: &ApiServer, kind: &str, name: &str, generation: i64, spec: &Value) {
    let there = server.get(plural(kind), "shop", name);
    server.put(
        plural(kind),
        json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": kind,
            "metadata": {"name": name, "namespace": "shop", "generation": generation,
                "creationTimestamp": format!("2026-01-0{}T00:00:00Z", name.len())},
            "spec": spec,
            "status": there.map_or(json!({}), |there| there["status"].clone())}),
    );
}

/// "status reason generation: message" of `Accepted`, when it is there.
fn accepted(server: &ApiServer, kind: &str, name: &str) -> Option<String> {
    let object = server.get(plural(kind), "shop", name)?;
    let conditions = match kind {
        "TrafficPolicy" => &object["status"]["ancestors"][0]["conditions"],
        _ => &object["status"]["conditions"],
    };
    let conditions = conditions.as_array()?;
    let of = conditions.iter().find(|one| one["type"] == "Accepted")?;
    assert!(of["lastTransitionTime"].is_string(), "{of}");
    let text = |field: &str| of[field].as_str().unwrap().to_owned();
    let (status, reason, message) = (text("status"), text("reason"), text("message"));
    let generation = &of["observedGeneration"];
    Some(format!("{status} {reason} {generation}: {message}"))
}

async fn becomes(server: &ApiServer, kind: &str, name: &str, expected: &str) {
    eventually(server, &format!("{kind} {name} is {expected}"), || {
        accepted(server, kind, name).as_deref() == Some(expected)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_kind_says_what_became_of_it() {
    let server = ApiServer::start().await;
    let host = |hosts: Value| {
        json!({"hosts": hosts, "resolution": "DNS",
            "ports": [{"port": 443, "appProtocol": "tls"}]})
    };
    let selector = json!({"selector": {"matchLabels": {"app": "none"}}});
    put(
        &server,
        "EgressPolicy",
        "a",
        1,
        &json!({"mode": "AllowAny"}),
    );
    put(
        &server,
        "EgressPolicy",
        "bb",
        1,
        &json!({"mode": "RegistryOnly"}),
    );
    put(&server, "PeerAuthentication", "a", 1, &selector);
    put(&server, "Telemetry", "a", 1, &json!({}));
    // Neither can be read, and never could.
    put(
        &server,
        "ExternalService",
        "a",
        1,
        &host(json!("api.example.org")),
    );
    let targets = json!([{"kind": "Service", "name": "cart"}]);
    let bad = json!({"targetRefs": targets, "timeouts": {"request": "5 seconds"}});
    put(&server, "TrafficPolicy", "a", 1, &bad);
    let folder = tempfile::tempdir().unwrap();
    let program = Program::start(&server, folder.path());

    becomes(&server, "EgressPolicy", "a", "True Accepted 1: ").await;
    becomes(&server, "EgressPolicy", "bb", "False Conflicted 1: shop/a already says what holds for namespace shop, and is used: it is older, or comes first by name").await;
    becomes(
        &server,
        "PeerAuthentication",
        "a",
        "False TargetNotFound 1: the selector matches no workload in namespace shop",
    )
    .await;
    becomes(&server, "Telemetry", "a", "True Accepted 1: ").await;
    becomes(
        &server,
        "ExternalService",
        "a",
        "False Invalid 1: spec: invalid type: string \"api.example.org\", expected a sequence",
    )
    .await;
    eventually(&server, "a TrafficPolicy that cannot be read", || {
        accepted(&server, "TrafficPolicy", "a")
            .is_some_and(|said| said.starts_with("False Invalid 1: spec: '5 seconds' is not"))
    })
    .await;
    let policy = server.get("trafficpolicies", "shop", "a").unwrap();
    let ancestor = &policy["status"]["ancestors"][0]["ancestorRef"];
    assert_eq!(
        *ancestor,
        json!({"group": "", "kind": "Service", "name": "cart"})
    );

    // Corrected, then wrong again: what it said before stands.
    put(
        &server,
        "ExternalService",
        "a",
        2,
        &host(json!(["api.example.org"])),
    );
    becomes(&server, "ExternalService", "a", "True Accepted 2: ").await;
    put(&server, "ExternalService", "a", 3, &host(json!(["API"])));
    becomes(&server, "ExternalService", "a", "False Invalid 3: spec.hosts.0: 'API' is not a host; what it said before (generation 2) stands").await;

    // The other one is gone: its turn.
    server.delete("egresspolicies", "shop", "a");
    becomes(&server, "EgressPolicy", "bb", "True Accepted 1: ").await;

    // What changes nothing is not written; what others say there stays.
    let mut telemetry = server.get("telemetries", "shop", "a").unwrap();
    telemetry["metadata"]["labels"] = json!({"team": "shop"});
    let others = json!({"type": "Ready", "status": "True"});
    let conditions = telemetry["status"]["conditions"].as_array_mut().unwrap();
    conditions.push(others.clone());
    server.put("telemetries", telemetry);
    put(&server, "Telemetry", "bb", 1, &json!({}));
    becomes(&server, "Telemetry", "bb", "False Conflicted 1: shop/a already says what holds for namespace shop, and is used: it is older, or comes first by name").await;
    assert_eq!(server.asked("telemetries", "patch"), 2);
    put(
        &server,
        "Telemetry",
        "a",
        2,
        &json!({"accessLog": {"mode": "All"}}),
    );
    becomes(&server, "Telemetry", "a", "True Accepted 2: ").await;
    let telemetry = server.get("telemetries", "shop", "a").unwrap();
    let conditions = telemetry["status"]["conditions"].as_array().unwrap();
    assert!(conditions.contains(&others), "{conditions:?}");
    for kind in ["EgressPolicy", "ExternalService", "Telemetry"] {
        assert_eq!(server.asked(plural(kind), "update"), 0, "{kind}");
    }
    program.end().await;
}
