//! Against a scripted apiserver: answers by path, everything else is 404.

use std::collections::BTreeMap;
use std::convert::Infallible;

use http::{Request, Response, StatusCode};
use http_body_util::Full;
use kube::client::Body;
use serde_json::{Value, json};

use super::target::NoPods;
use super::*;

/// A cluster whose apiserver answers these paths (with their queries) with these documents; a number
/// is a status without one.
fn cluster(answers: &[(&str, Value)]) -> Cluster {
    let answers: BTreeMap<String, Value> = answers
        .iter()
        .map(|(path, answer)| ((*path).to_owned(), answer.clone()))
        .collect();
    let service = tower::service_fn(move |request: Request<Body>| {
        let path = request.uri().to_string();
        let (status, body) = match answers.get(&path) {
            Some(Value::Number(code)) => {
                let code = code.as_u64().unwrap() as u16;
                let body = json!({
                    "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
                    "message": "pods is forbidden: User \"eve\" cannot list resource \"pods\"",
                    "reason": "Forbidden",
                });
                (StatusCode::from_u16(code).unwrap(), body)
            }
            Some(answer) => (StatusCode::OK, answer.clone()),
            None => {
                let body = json!({
                    "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404,
                    "message": format!("no {path}"), "reason": "NotFound",
                });
                (StatusCode::NOT_FOUND, body)
            }
        };
        let body = Full::new(bytes::Bytes::from(body.to_string()));
        let response = Response::builder().status(status).body(body).unwrap();
        async move { Ok::<_, Infallible>(response) }
    });
    Cluster {
        client: Client::new(service, "shop"),
        namespace: "shop".to_owned(),
        given: false,
        all: false,
    }
}

fn pod(name: &str, phase: &str, labels: Value, proxy: bool) -> Value {
    let init = if proxy {
        json!([{"name": "weft-proxy"}])
    } else {
        json!([])
    };
    json!({
        "metadata": {"name": name, "namespace": "shop", "labels": labels},
        "spec": {"containers": [{"name": "app"}], "initContainers": init},
        "status": {"phase": phase},
    })
}

fn list(kind: &str, items: Value) -> Value {
    json!({"kind": format!("{kind}List"), "apiVersion": "v1", "metadata": {}, "items": items})
}

const DEPLOYMENT: &str = "/apis/apps/v1/namespaces/weft-system/deployments/weft-control-plane";

#[tokio::test]
async fn the_control_planes_pods_are_those_of_its_deployment() {
    let deployment = json!({
        "metadata": {"name": "weft-control-plane"},
        "spec": {
            "selector": {"matchLabels": {"app.kubernetes.io/name": "weft"}},
            "template": {"metadata": {}, "spec": {"containers": []}},
        },
    });
    let pods = list(
        "Pod",
        json!([
            pod("cp-2", "Running", json!({}), false),
            pod("cp-1", "Running", json!({}), false),
            pod("cp-0", "Pending", json!({}), false),
        ]),
    );
    let of = "/api/v1/namespaces/weft-system/pods?&labelSelector=app.kubernetes.io%2Fname%3Dweft";
    let cluster = cluster(&[(DEPLOYMENT, deployment), (of, pods)]);
    let replicas = cluster.replicas().await.unwrap();
    let names: Vec<&str> = replicas.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(names, ["cp-1", "cp-2"]);
    assert_eq!(
        format!("{:?}", replicas[0].admin),
        "Pod(pod/weft-system/cp-1:15014)"
    );
}

#[tokio::test]
async fn what_is_not_there_or_not_allowed_is_said() {
    let error = cluster(&[]).replicas().await.unwrap_err();
    assert!(error.to_string().contains("`weft install`"), "{error}");
    let cluster = cluster(&[("/api/v1/namespaces/shop/pods?", json!(403))]);
    let error = cluster.meshed(Some("shop")).await.unwrap_err();
    assert!(error.is_forbidden());
    assert_eq!(
        error.to_string(),
        "cannot list pods in shop: pods is forbidden: User \"eve\" cannot list resource \"pods\""
    );
}

#[tokio::test]
async fn targets_lead_to_their_pods() {
    let labels = json!({"app": "cart"});
    let pods = list(
        "Pod",
        json!([
            pod("cart-1", "Running", labels.clone(), true),
            pod("cart-2", "Succeeded", labels, true),
            pod("front-1", "Running", json!({"app": "front"}), true),
            pod("plain", "Running", json!({"app": "plain"}), false),
        ]),
    );
    let service =
        |app: &str| json!({"metadata": {"name": app}, "spec": {"selector": {"app": app}}});
    let cluster = cluster(&[
        ("/api/v1/namespaces/shop/pods?", pods),
        ("/api/v1/namespaces/shop/services/cart", service("cart")),
        ("/api/v1/namespaces/shop/services/plain", service("plain")),
    ]);
    let of = async |target: &str| cluster.pods_of(&target.parse().unwrap()).await;
    for target in ["svc/cart", "pod/cart-1"] {
        let pods = of(target).await.unwrap();
        let names: Vec<&str> = pods.iter().map(|pod| pod.name.as_str()).collect();
        assert_eq!(names, ["cart-1"], "{target}");
    }
    assert!(matches!(
        of("svc/plain").await,
        Err(NoPods::NotMeshed { .. })
    ));
    assert!(matches!(of("pod/cart-2").await, Err(NoPods::None { .. })));
    assert!(matches!(
        of("deploy/nothing").await,
        Err(NoPods::None { .. })
    ));
    assert!(matches!(of("svc/nothing").await, Err(NoPods::Cluster(_))));
}
