//! Discovery over real sockets and mutual TLS, with a folder of real files behind it.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use support::{ControlPlane, PATIENCE, TestProxy, connect};
use tonic::Code;
use weft_api::proto::discovery_request::Message;
use weft_api::proto::resource::Body;
use weft_api::proto::{Endpoints, Health, MtlsMode, Resource, ResourceKind, Subscribe};

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec:
  clusterIP: 10.96.0.15
  selector: {app: cart}
  ports: [{name: http, port: 80, targetPort: 8080}]
";

fn workload(name: &str, address: &str, more: &str) -> String {
    format!(
        "
apiVersion: policy.weft.dev/v1alpha1
kind: Workload
metadata: {{name: {name}, namespace: shop, labels: {{app: cart}}}}
spec: {{addresses: [{address}], serviceAccount: cart{more}}}
"
    )
}

async fn shop() -> ControlPlane {
    ControlPlane::start(&[
        ("service.yaml", SERVICE),
        ("cart-1.yaml", &workload("cart-1", "10.0.0.1", "")),
        ("cart-2.yaml", &workload("cart-2", "10.0.0.2", "")),
    ])
    .await
}

fn names(resources: &[Resource]) -> Vec<String> {
    resources
        .iter()
        .map(|resource| resource.key.as_ref().unwrap().name.clone())
        .collect()
}

fn endpoints(resource: &Resource) -> &Endpoints {
    match &resource.body {
        Some(Body::Endpoints(endpoints)) => endpoints,
        other => panic!("{other:?} is not endpoints"),
    }
}

fn addresses(resource: &Resource) -> Vec<&str> {
    endpoints(resource)
        .endpoints
        .iter()
        .map(|endpoint| endpoint.address.as_str())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_comes_after_its_endpoints_and_both_are_kept_up_to_date() {
    let plane = shop().await;
    let identity = plane.identity("shop", "cart").await;
    let mut proxy = plane.stream(&identity, "shop/cart-1").await.unwrap();
    proxy
        .subscribe(ResourceKind::Destination, "10.96.0.15:80", 0)
        .await;
    let first = proxy.next().await.unwrap();
    assert_eq!(names(&first), ["shop/cart:80", "10.96.0.15:80"]);
    assert_eq!(addresses(&first[0]), ["10.0.0.1:8080", "10.0.0.2:8080"]);
    assert_eq!(
        endpoints(&first[0]).endpoints[0].identity,
        "spiffe://cluster.local/ns/shop/sa/cart"
    );

    plane.write("cart-3.yaml", &workload("cart-3", "10.0.0.3", ""));
    let added = proxy.next().await.unwrap();
    assert_eq!(
        names(&added),
        ["shop/cart:80"],
        "only the endpoints changed"
    );
    assert_eq!(addresses(&added[0]).len(), 3);

    plane.write(
        "cart-3.yaml",
        &workload("cart-3", "10.0.0.3", ", health: Draining"),
    );
    let draining = proxy.next().await.unwrap();
    let health = endpoints(&draining[0]).endpoints[2].health();
    assert_eq!(health, Health::Draining);

    std::fs::remove_file(plane.folder.join("cart-3.yaml")).unwrap();
    let removed = proxy.next().await.unwrap();
    assert_eq!(addresses(&removed[0]).len(), 2);

    plane.write(
        "policy.yaml",
        "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: cart, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart}]
  timeouts: {request: 3s}
",
    );
    let policy = proxy.next().await.unwrap();
    assert_eq!(
        names(&policy),
        ["10.96.0.15:80"],
        "only the destination changed"
    );
    let Some(Body::Destination(destination)) = &policy[0].body else {
        panic!("not a destination");
    };
    let route = destination.routes[0].policy.as_ref().unwrap();
    assert_eq!(route.request_timeout_ms, 3_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_unknown_is_absent_until_it_is_known() {
    let plane = shop().await;
    let identity = plane.identity("shop", "cart").await;
    let mut proxy = plane.stream(&identity, "shop/cart-1").await.unwrap();
    proxy
        .subscribe(ResourceKind::Destination, "10.96.0.99:80", 0)
        .await;
    let absent = proxy.next().await.unwrap();
    assert!(matches!(absent[0].body, Some(Body::Absent(_))));
    assert_ne!(absent[0].version, 0);
    plane.write(
        "other.yaml",
        &SERVICE
            .replace("cart, n", "other, n")
            .replace("0.15", "0.99"),
    );
    let known = proxy.next().await.unwrap();
    assert_eq!(names(&known), ["shop/other:80", "10.96.0.99:80"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledgements_and_refusals_are_shown() {
    let plane = shop().await;
    let identity = plane.identity("shop", "cart").await;
    let mut proxy = plane.stream(&identity, "shop/cart-1").await.unwrap();
    proxy
        .subscribe(ResourceKind::Destination, "10.96.0.15:80", 0)
        .await;
    let resources = proxy.next().await.unwrap();
    proxy.ack(&resources[0]).await;
    proxy
        .nack(&resources[1], "a route I do not understand")
        .await;
    let status = until(&plane, |status| {
        status["proxies"][0]["resources"][0]["refused"].is_string()
    })
    .await;
    let shown = &status["proxies"][0];
    assert_eq!(shown["workload"], "shop/cart-1");
    assert_eq!(shown["upToDate"], false);
    let destination = shown["resources"]
        .as_array()
        .unwrap()
        .iter()
        .find(|resource| resource["kind"] == "Destination")
        .unwrap();
    assert!(
        destination["refused"]
            .as_str()
            .unwrap()
            .ends_with(": a route I do not understand")
    );
    assert_eq!(destination["acknowledged"], "");
    proxy.ack(&resources[1]).await;
    let status = until(&plane, |status| status["proxies"][0]["upToDate"] == true).await;
    for resource in status["proxies"][0]["resources"].as_array().unwrap() {
        assert_eq!(resource["newest"], resource["acknowledged"]);
    }
    assert!(
        plane
            .admin("GET", "/metrics")
            .await
            .contains("weft_control_plane_nacks_total 1\n")
    );
    drop(proxy);
    until(&plane, |status| {
        status["proxies"].as_array().unwrap().is_empty()
    })
    .await;
}

/// Asks for /status until it is as wanted.
async fn until(
    plane: &ControlPlane,
    wanted: impl Fn(&serde_json::Value) -> bool,
) -> serde_json::Value {
    let asking = async {
        loop {
            let status = plane.admin_json("/status").await;
            if wanted(&status) {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, asking)
        .await
        .expect("the status never came to be as wanted")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_is_not_sent_again_even_after_a_restart() {
    let plane = shop().await;
    let identity = plane.identity("shop", "cart").await;
    let mut proxy = plane.stream(&identity, "shop/cart-1").await.unwrap();
    proxy
        .subscribe(ResourceKind::Destination, "10.96.0.15:80", 0)
        .await;
    let held = proxy.next().await.unwrap();
    let (folder, data) = (plane.folder.clone(), plane.data.clone());
    let _dir = plane.stop().await;
    assert_eq!(proxy.next().await.unwrap_err().code(), Code::Unavailable);

    let plane = ControlPlane::start_in(&folder, &data).await;
    let mut proxy = plane.stream(&identity, "shop/cart-1").await.unwrap();
    proxy
        .subscribe_all(&[
            (ResourceKind::Destination, "10.96.0.15:80", held[1].version),
            (ResourceKind::Endpoints, "shop/cart:80", held[0].version),
        ])
        .await;
    assert!(proxy.is_silent().await);
    plane.write("cart-2.yaml", &workload("cart-2", "10.0.0.22", ""));
    let changed = proxy.next().await.unwrap();
    assert_eq!(addresses(&changed[0]), ["10.0.0.1:8080", "10.0.0.22:8080"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_longer_wanted_is_not_sent() {
    let plane = shop().await;
    let identity = plane.identity("shop", "cart").await;
    let mut proxy = plane.stream(&identity, "shop/cart-1").await.unwrap();
    proxy
        .subscribe(ResourceKind::Destination, "10.96.0.15:80", 0)
        .await;
    proxy.next().await.unwrap();
    proxy
        .unsubscribe(ResourceKind::Destination, "10.96.0.15:80")
        .await;
    until(&plane, |status| {
        status["proxies"][0]["resources"]
            .as_array()
            .unwrap()
            .is_empty()
    })
    .await;
    plane.write("cart-3.yaml", &workload("cart-3", "10.0.0.3", ""));
    assert!(proxy.is_silent().await);
    let metrics = plane.admin("GET", "/metrics").await;
    assert!(metrics.contains("weft_control_plane_subscribed_resources 0\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_proxy_is_sent_only_the_newest() {
    const CHANGES: usize = 30;
    const ENDPOINTS: usize = 2_000;
    let slice = |round: usize| {
        let mut text = String::from(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: big-1, namespace: shop, labels: {kubernetes.io/service-name: big}}\naddressType: IPv4\nports: [{name: '', port: 80}]\nendpoints:\n",
        );
        for index in 0..ENDPOINTS {
            let (a, b) = (index / 250, index % 250);
            text += &format!("- {{addresses: [10.{}.{a}.{b}]}}\n", round + 1);
        }
        text
    };
    let service = "
apiVersion: v1
kind: Service
metadata: {name: big, namespace: shop}
spec: {clusterIP: 10.96.0.20, ports: [{port: 80}]}
";
    let plane = ControlPlane::start(&[("big.yaml", service), ("slice.yaml", &slice(0))]).await;
    let identity = plane.identity("shop", "cart").await;
    let mut proxy = plane.stream(&identity, "shop/cart-1").await.unwrap();
    proxy
        .subscribe(ResourceKind::Destination, "10.96.0.20:80", 0)
        .await;
    proxy.next().await.unwrap();
    // The proxy does not read; the source goes on.
    for round in 1..=CHANGES {
        plane.write("slice.yaml", &slice(round));
        until_text(
            &plane,
            "/explain?destination=10.96.0.20:80",
            &format!("\"10.{}.0.0:80\"", round + 1),
        )
        .await;
    }
    let status = plane.admin_json("/status").await;
    assert!(status["proxies"][0]["waiting"].as_u64().unwrap() <= 1);
    let newest = format!("10.{}.0.0:80", CHANGES + 1);
    let mut messages = 0;
    loop {
        messages += 1;
        let resources = proxy.next().await.unwrap();
        if addresses(&resources[0])[0] == newest {
            break;
        }
    }
    assert!(
        messages < CHANGES / 2,
        "{messages} of {CHANGES} versions were kept for a proxy that did not read"
    );
}

async fn until_text(plane: &ControlPlane, path: &str, wanted: &str) {
    let asking = async {
        while !plane.admin("GET", path).await.contains(wanted) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, asking).await.expect(wanted);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_own_workload_says_how_to_take_connections() {
    let plane = shop().await;
    let identity = plane.identity("shop", "cart").await;
    let mut proxy = plane.stream(&identity, "shop/cart-1").await.unwrap();
    proxy
        .subscribe(ResourceKind::Workload, "shop/cart-1", 0)
        .await;
    let mode = |resources: &[Resource]| match &resources[0].body {
        Some(Body::Workload(workload)) => workload.mtls(),
        other => panic!("{other:?}"),
    };
    assert_eq!(mode(&proxy.next().await.unwrap()), MtlsMode::Permissive);
    plane.write(
        "strict.yaml",
        "{apiVersion: policy.weft.dev/v1alpha1, kind: PeerAuthentication, metadata: {name: strict, namespace: shop}, spec: {mtls: {mode: STRICT}}}",
    );
    assert_eq!(mode(&proxy.next().await.unwrap()), MtlsMode::Strict);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_speaks_for_another() {
    let plane = shop().await;
    let cart = plane.identity("shop", "cart").await;
    let other = plane.identity("shop", "other").await;
    let elsewhere = plane.identity("elsewhere", "cart").await;
    let refused = async |identity, workload| {
        let mut proxy = plane.stream(identity, workload).await.unwrap();
        proxy.next().await.unwrap_err()
    };
    let error = refused(&other, "shop/cart-1").await;
    assert_eq!(error.code(), Code::PermissionDenied);
    assert!(error.message().contains("ns/shop/sa/other"), "{error}");
    assert_eq!(
        refused(&elsewhere, "shop/cart-1").await.code(),
        Code::PermissionDenied
    );
    assert_eq!(
        refused(&cart, "elsewhere/x").await.code(),
        Code::PermissionDenied
    );
    assert_eq!(
        refused(&cart, "nonsense").await.code(),
        Code::InvalidArgument
    );

    let mut proxy = plane.stream(&cart, "shop/cart-1").await.unwrap();
    proxy
        .subscribe(ResourceKind::Workload, "shop/cart-2", 0)
        .await;
    assert_eq!(
        proxy.next().await.unwrap_err().code(),
        Code::PermissionDenied
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_given_to_another_account_loses_its_stream() {
    let plane = shop().await;
    let cart = plane.identity("shop", "cart").await;
    let mut proxy = plane.stream(&cart, "shop/cart-1").await.unwrap();
    proxy.subscribe(ResourceKind::Trust, "trust", 0).await;
    proxy.next().await.unwrap();
    plane.write(
        "cart-1.yaml",
        &workload("cart-1", "10.0.0.1", "").replace("serviceAccount: cart", "serviceAccount: new"),
    );
    assert_eq!(
        proxy.next().await.unwrap_err().code(),
        Code::PermissionDenied
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn discovery_needs_a_certificate_of_this_authority() {
    let plane = shop().await;
    let channel = connect(plane.address, plane.authority.roots(), None)
        .await
        .unwrap();
    let error = match TestProxy::open(channel, "shop/cart-1").await {
        Err(status) => status,
        Ok(mut proxy) => proxy.next().await.unwrap_err(),
    };
    assert_eq!(error.code(), Code::Unauthenticated);

    let stranger = shop().await.identity("shop", "cart").await;
    let opened = match plane.stream(&stranger, "shop/cart-1").await {
        Err(status) => Err(status),
        Ok(mut proxy) => proxy.next().await.map(|_| ()),
    };
    assert!(
        opened.is_err(),
        "a certificate of another authority was taken"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_message_is_hello() {
    let plane = shop().await;
    let cart = plane.identity("shop", "cart").await;
    let channel = connect(plane.address, plane.authority.roots(), Some(&cart))
        .await
        .unwrap();
    let first = Message::Subscribe(Subscribe::default());
    let mut proxy = TestProxy::open_with(channel, first).await.unwrap();
    assert_eq!(
        proxy.next().await.unwrap_err().code(),
        Code::InvalidArgument
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_file_changes_nothing_and_is_named() {
    let plane = shop().await;
    let identity = plane.identity("shop", "cart").await;
    let mut proxy = plane.stream(&identity, "shop/cart-1").await.unwrap();
    proxy
        .subscribe(ResourceKind::Destination, "10.96.0.15:80", 0)
        .await;
    proxy.next().await.unwrap();
    plane.write("cart-1.yaml", "apiVersion: policy.weft.dev/v1alpha1\nkind: Workload\nmetadata: {name: cart-1}\nspec:\n  adresses: [10.0.0.1]\n");
    let status = until(&plane, |status| {
        !status["findings"].as_array().unwrap().is_empty()
    })
    .await;
    let finding = &status["findings"][0];
    assert!(finding["file"].as_str().unwrap().ends_with("cart-1.yaml"));
    assert_eq!(finding["line"], 5);
    assert!(finding["message"].as_str().unwrap().contains("adresses"));
    // The rest goes on; what the broken file said before stands.
    plane.write("cart-3.yaml", &workload("cart-3", "10.0.0.3", ""));
    let changed = proxy.next().await.unwrap();
    assert_eq!(
        addresses(&changed[0]),
        ["10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.3:8080"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_root_is_told_before_it_signs() {
    let plane = shop().await;
    let identity = plane.identity("shop", "cart").await;
    let mut proxy = plane.stream(&identity, "shop/cart-1").await.unwrap();
    proxy.subscribe(ResourceKind::Trust, "trust", 0).await;
    let roots = |resources: &[Resource]| match &resources[0].body {
        Some(Body::Trust(trust)) => trust.roots.clone(),
        other => panic!("{other:?}"),
    };
    let first = proxy.next().await.unwrap();
    proxy.ack(&first[0]).await;
    assert_eq!(roots(&first), plane.authority.roots());
    plane.admin("POST", "/rotate-root").await;
    let second = proxy.next().await.unwrap();
    let both = roots(&second);
    assert_eq!(both.len(), 2);
    assert_eq!(both[0], roots(&first)[0]);
    // Not acknowledged: the old root goes on signing.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(plane.authority.status().phase, "announcing");
    proxy.ack(&second[0]).await;
    let signing = async {
        while plane.authority.status().phase != "draining" {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, signing).await.unwrap();
    // Proxies are told that it signs: it comes first.
    let turned = [both[1].clone(), both[0].clone()];
    let told = proxy.next().await.unwrap();
    assert_eq!(roots(&told), turned);
    proxy.ack(&told[0]).await;
    // Certificates of both roots connect.
    let renewed = plane.identity("shop", "cart").await;
    for identity in [&identity, &renewed] {
        let mut proxy = plane.stream(identity, "shop/cart-1").await.unwrap();
        proxy.subscribe(ResourceKind::Trust, "trust", 0).await;
        assert_eq!(roots(&proxy.next().await.unwrap()), turned);
    }
    plane.admin("POST", "/rotate-root?finish").await;
    let last = proxy.next().await.unwrap();
    assert_eq!(roots(&last), both[1..]);
    // A stream that says nothing within a moment was taken: the listener has still to hear of it.
    let refused = async {
        loop {
            let Ok(mut proxy) = plane.stream(&identity, "shop/cart-1").await else {
                return;
            };
            let moment = Duration::from_millis(100);
            if let Ok(Err(_)) = tokio::time::timeout(moment, proxy.next()).await {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, refused)
        .await
        .expect("a certificate of the dropped root is taken");
    assert!(plane.stream(&renewed, "shop/cart-1").await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_endpoints_proxy_keeps_is_explained_and_whether_it_has_been_told() {
    let plane = ControlPlane::start(&[
        ("service.yaml", SERVICE),
        ("cart-1.yaml", &workload("cart-1", "10.0.0.1", "")),
        (
            "policies.yaml",
            "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: cart, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart}]
  rateLimit: {requests: 10, per: 1m, burst: 4, global: true, key: {header: X-User}}
  requestHeaders: {maxCount: 20}
---
apiVersion: policy.weft.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: strict, namespace: shop}
spec: {mtls: {mode: STRICT}}
",
        ),
    ])
    .await;
    let inbound = async || {
        let said = plane.admin_json("/explain?destination=10.96.0.15:80").await;
        said["routes"][0]["backends"][0]["endpoints"][0]["inbound"].clone()
    };
    until_text(
        &plane,
        "/explain?destination=10.96.0.15:80",
        "PeerAuthentication",
    )
    .await;
    let said = inbound().await;
    let service = &said["services"][0];
    assert_eq!(service["service"], "shop/cart:80", "{said}");
    assert_eq!(
        service["rateLimit"],
        serde_json::json!({
            "requests": 10, "perMs": 60_000, "burst": 4, "replicas": 1,
            "key": {"header": "x-user"},
        })
    );
    let heads = serde_json::json!({"maxBytes": 0, "maxCount": 20});
    assert_eq!(service["requestHeaders"], heads);
    assert_eq!(service["sources"][0]["field"], "rateLimit");
    let from = &service["sources"][0]["from"];
    assert_eq!(from["name"], "TrafficPolicy shop/cart");
    assert_eq!(from["target"], "Service cart");
    assert_eq!(
        (&said["mtls"], &said["port"]),
        (&"STRICT".into(), &8080.into())
    );
    let policies = serde_json::json!(["PeerAuthentication shop/strict"]);
    assert_eq!(said["policies"], policies);
    assert!(
        said["acknowledged"].is_null(),
        "nobody is connected: {said}"
    );

    let identity = plane.identity("shop", "cart").await;
    let mut proxy = plane.stream(&identity, "shop/cart-1").await.unwrap();
    proxy
        .subscribe(ResourceKind::Workload, "shop/cart-1", 0)
        .await;
    let table = proxy.next().await.unwrap();
    assert_eq!(inbound().await["acknowledged"], false);
    proxy.ack(&table[0]).await;
    // What a proxy says is heard in order: with the answer, the acknowledgement has been.
    let endpoints = ResourceKind::Endpoints;
    proxy.subscribe(endpoints, "shop/cart:80", 0).await;
    proxy.next().await.unwrap();
    assert_eq!(inbound().await["acknowledged"], true);
}
