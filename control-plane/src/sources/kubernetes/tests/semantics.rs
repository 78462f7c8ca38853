//! What connections are on Kubernetes: as without a mesh, plus mutual TLS where the other end is in
//! it.

use serde_json::{Value, json};
use weft_api::proto::resource::Body;
use weft_api::proto::{Destination, Endpoint, Health, Protocol, ResourceKey, ResourceKind, Trust};

use super::super::objects::{EndpointSlice, Node, Service};
use super::super::pod::Pod;
use super::super::policies::{PeerAuthentication, TrafficPolicy};
use super::{apply, endpoint, pod, service, slice};
use crate::compile::{Settings, compile};
use crate::model::{Change, Dirty, Kind, Name, ObjectRef, World};

fn body(world: &World, kind: ResourceKind, name: &str) -> Option<Body> {
    let settings = Settings {
        trust_domain: "cluster.local".to_owned(),
        sampling_percent: 1.0,
    };
    let key = ResourceKey {
        kind: kind.into(),
        name: name.to_owned(),
    };
    compile(world, &settings, &key, &Trust::default(), "")
        .resource
        .body
}

fn destination(world: &World, name: &str) -> Option<Destination> {
    match body(world, ResourceKind::Destination, name) {
        Some(Body::Destination(destination)) => Some(destination),
        _ => None,
    }
}

fn endpoints(world: &World, name: &str) -> Vec<Endpoint> {
    match body(world, ResourceKind::Endpoints, name) {
        Some(Body::Endpoints(endpoints)) => endpoints.endpoints,
        other => panic!("{name}: {other:?}"),
    }
}

/// Address, whether mutual TLS, and health, of a destination's endpoints.
fn reached(world: &World, name: &str) -> Vec<(String, bool, Health)> {
    let destination = destination(world, name).unwrap_or_else(|| panic!("{name} is not known"));
    let backend = destination.routes[0].backends[0].backend.clone().unwrap();
    endpoints(world, &backend.endpoints)
        .into_iter()
        .map(|e| (e.address.clone(), !e.identity.is_empty(), e.health()))
        .collect()
}

fn web() -> Value {
    service(
        "web",
        json!({"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00::1"],
            "externalIPs": ["192.0.2.1"], "type": "NodePort", "selector": {"app": "cart"},
            "ports": [{"name": "http", "port": 80, "targetPort": "web", "nodePort": 30080}]}),
    )
}

fn web_slice(endpoints: Value) -> Value {
    slice(
        "web-1",
        "web",
        json!([{"name": "http", "port": 8080}]),
        endpoints,
    )
}

fn node(name: &str, ip: &str, zone: &str) -> Value {
    json!({"metadata": {"name": name, "resourceVersion": "1",
            "labels": {"topology.kubernetes.io/zone": zone}},
        "status": {"addresses": [{"type": "InternalIP", "address": ip},
            {"type": "Hostname", "address": name}]}})
}

fn without_sidecar(mut pod: Value) -> Value {
    pod["spec"]["initContainers"] = json!([]);
    pod
}

fn remove(world: &mut World, kind: Kind, name: &str) -> Dirty {
    let mut dirty = Dirty::default();
    let name = Name::new("shop", name);
    world.apply(Change::Remove(ObjectRef { kind, name }), &mut dirty);
    dirty
}

#[test]
fn every_address_of_a_service_leads_to_its_endpoints() {
    let mut world = World::default();
    apply::<Node>(&mut world, [node("node-1", "10.99.0.1", "a")]);
    apply::<Service>(&mut world, [web()]);
    let both = json!([
        endpoint("cart-1", "10.0.0.1"),
        endpoint("cart-2", "10.0.0.2")
    ]);
    apply::<EndpointSlice>(&mut world, [web_slice(both)]);
    let pods = [
        pod("cart-1", "10.0.0.1"),
        without_sidecar(pod("cart-2", "10.0.0.2")),
    ];
    apply::<Pod>(&mut world, pods);
    let expected = [
        ("10.0.0.1:8080".to_owned(), true, Health::Ready),
        ("10.0.0.2:8080".to_owned(), false, Health::Ready),
    ];
    for name in [
        "10.96.0.1:80",
        "[fd00::1]:80",
        "192.0.2.1:80",
        "10.99.0.1:30080",
        "web.shop:80",
        "web.shop.svc.cluster.local:80",
    ] {
        assert_eq!(reached(&world, name), expected, "{name}");
    }
    for name in [
        "10.99.0.1:80",
        "10.99.0.1:8080",
        "10.96.0.1:30080",
        "10.96.0.2:80",
    ] {
        assert!(destination(&world, name).is_none(), "{name}");
    }
    // A node that comes is another way in, and one that goes is none any more.
    let dirty = apply::<Node>(&mut world, [node("node-2", "10.99.0.2", "b")]);
    assert!(dirty.addresses.contains(&"10.99.0.2".parse().unwrap()));
    assert_eq!(reached(&world, "10.99.0.2:30080"), expected);
    let mut plain = web();
    plain["spec"]["ports"][0]["nodePort"] = Value::Null;
    let dirty = apply::<Service>(&mut world, [plain]);
    assert!(dirty.addresses.contains(&"10.99.0.2".parse().unwrap()));
    assert!(destination(&world, "10.99.0.2:30080").is_none());
}

#[test]
fn an_endpoint_waits_for_its_pod_and_is_never_plaintext_meanwhile() {
    let mut world = World::default();
    apply::<Service>(&mut world, [web()]);
    let one = json!([endpoint("cart-1", "10.0.0.1")]);
    apply::<EndpointSlice>(&mut world, [web_slice(one)]);
    assert_eq!(reached(&world, "10.96.0.1:80"), []);
    let dirty = apply::<Pod>(&mut world, [pod("cart-1", "10.0.0.1")]);
    assert!(dirty.endpoints.contains(&Name::new("shop", "web")));
    let up = [("10.0.0.1:8080".to_owned(), true, Health::Ready)];
    assert_eq!(reached(&world, "10.96.0.1:80"), up);

    // A StatefulSet's next pod of the same name is another pod, perhaps without a sidecar: the
    // slice still means the one before.
    let mut next = without_sidecar(pod("cart-1", "10.0.0.9"));
    next["metadata"]["uid"] = "another".into();
    apply::<Pod>(&mut world, [next]);
    assert_eq!(reached(&world, "10.96.0.1:80"), []);
    remove(&mut world, Kind::Workload, "cart-1");
    assert_eq!(reached(&world, "10.96.0.1:80"), []);

    // Written by hand, without a targetRef: the address says who it is, if anybody.
    let by_hand = json!([{"addresses": ["10.0.0.1"]}, {"addresses": ["192.0.2.9"]}]);
    apply::<EndpointSlice>(&mut world, [web_slice(by_hand)]);
    let plain = |address: &str| (address.to_owned(), false, Health::Ready);
    let both = [plain("10.0.0.1:8080"), plain("192.0.2.9:8080")];
    assert_eq!(reached(&world, "10.96.0.1:80"), both);
    apply::<Pod>(&mut world, [pod("cart-1", "10.0.0.1")]);
    assert!(reached(&world, "10.96.0.1:80")[0].1, "now it is known");
}

#[test]
fn whoever_leaves_is_used_only_when_nobody_else_is_there() {
    let mut world = World::default();
    apply::<Service>(&mut world, [web()]);
    apply::<Pod>(
        &mut world,
        [pod("cart-1", "10.0.0.1"), pod("cart-2", "10.0.0.2")],
    );
    let healths = |world: &World| -> Vec<Health> {
        let reached = reached(world, "10.96.0.1:80");
        reached.into_iter().map(|(_, _, health)| health).collect()
    };
    let conditioned = |one: Value, two: Value| {
        let (mut a, mut b) = (
            endpoint("cart-1", "10.0.0.1"),
            endpoint("cart-2", "10.0.0.2"),
        );
        a["conditions"] = one;
        b["conditions"] = two;
        web_slice(json!([a, b]))
    };
    let leaving = json!({"ready": false, "serving": true, "terminating": true});
    let unwell = json!({"ready": false, "serving": false, "terminating": true});
    let well = json!({"ready": true});
    for (one, two, expected) in [
        (&well, &leaving, [Health::Ready, Health::Draining]),
        (&leaving, &leaving, [Health::Ready, Health::Ready]),
        (&leaving, &unwell, [Health::Ready, Health::NotReady]),
        (&unwell, &unwell, [Health::NotReady, Health::NotReady]),
    ] {
        apply::<EndpointSlice>(&mut world, [conditioned(one.clone(), two.clone())]);
        assert_eq!(healths(&world), expected, "{one} {two}");
    }
    // The pod says that it goes before its slice does.
    apply::<EndpointSlice>(&mut world, [conditioned(well.clone(), well)]);
    let mut going = pod("cart-2", "10.0.0.2");
    going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    apply::<Pod>(&mut world, [going]);
    assert_eq!(healths(&world), [Health::Ready, Health::Draining]);
}

#[test]
fn pods_on_the_host_network_share_its_address() {
    let mut world = World::default();
    apply::<Node>(&mut world, [node("node-1", "10.99.0.1", "a")]);
    let on_host = |name: &str| {
        let mut pod = pod(name, "10.99.0.1");
        pod["spec"]["hostNetwork"] = true.into();
        pod
    };
    apply::<Pod>(&mut world, [on_host("agent-1"), on_host("agent-2")]);
    assert!(destination(&world, "10.99.0.1:9100").is_none());
    apply::<Service>(&mut world, [web()]);
    let one = json!([endpoint("agent-2", "10.99.0.1")]);
    apply::<EndpointSlice>(&mut world, [web_slice(one)]);
    let plain = [("10.99.0.1:8080".to_owned(), false, Health::Ready)];
    assert_eq!(reached(&world, "10.96.0.1:80"), plain);
    assert_eq!(endpoints(&world, "shop/web:80")[0].workload, "shop/agent-2");
    assert_eq!(crate::compile::problems(&world), []);
}

#[test]
fn a_service_has_no_endpoints_but_those_of_its_slices() {
    let mut world = World::default();
    apply::<Service>(&mut world, [web()]);
    apply::<Pod>(&mut world, [pod("cart-1", "10.0.0.1")]);
    assert_eq!(
        reached(&world, "10.96.0.1:80"),
        [],
        "not ready yet, perhaps"
    );
}

#[test]
fn a_dual_stack_pod_is_one_endpoint_at_its_first_address() {
    let mut world = World::default();
    apply::<Service>(&mut world, [web()]);
    let mut dual = pod("cart-1", "10.0.0.1");
    dual["status"]["podIPs"] = json!([{"ip": "10.0.0.1"}, {"ip": "fd00::a"}]);
    apply::<Pod>(&mut world, [dual]);
    let ports = || json!([{"name": "http", "port": 8080}]);
    // The IPv6 slice comes first by name.
    let six = slice(
        "web-0",
        "web",
        ports(),
        json!([endpoint("cart-1", "fd00::a")]),
    );
    apply::<EndpointSlice>(&mut world, [six]);
    let at = |address: &str| [(address.to_owned(), true, Health::Ready)];
    assert_eq!(reached(&world, "10.96.0.1:80"), at("[fd00::a]:8080"));
    let four = web_slice(json!([endpoint("cart-1", "10.0.0.1")]));
    apply::<EndpointSlice>(&mut world, [four]);
    assert_eq!(reached(&world, "10.96.0.1:80"), at("10.0.0.1:8080"));
}

#[test]
fn a_pod_called_by_its_headless_name_has_that_services_policies() {
    let mut world = World::default();
    let headless = |name: &str, port: u16| {
        service(
            name,
            json!({"clusterIP": "None", "selector": {"app": "cart"},
                "ports": [{"name": "pg", "port": port, "appProtocol": "tcp"}]}),
        )
    };
    let policy = |name: &str, service: &str, timeout: &str| {
        json!({"metadata": {"name": name, "namespace": "shop"},
            "spec": {"targetRefs": [{"kind": "Service", "name": service}],
                "timeouts": {"idle": timeout, "connect": timeout}}})
    };
    apply::<Pod>(&mut world, [pod("db-0", "10.0.0.1")]);
    apply::<TrafficPolicy>(&mut world, [policy("db", "db", "7s")]);
    apply::<Service>(&mut world, [headless("db", 5432)]);
    let of_db = |name: &str, service: &str| {
        slice(
            name,
            service,
            json!([{"name": "pg", "port": 5432}]),
            json!([endpoint("db-0", "10.0.0.1")]),
        )
    };
    let dirty = apply::<EndpointSlice>(&mut world, [of_db("db-1", "db")]);
    assert!(dirty.addresses.contains(&"10.0.0.1".parse().unwrap()));
    let direct = destination(&world, "10.0.0.1:5432").unwrap();
    assert_eq!(
        (direct.service.as_str(), direct.protocol()),
        ("db-0", Protocol::Tcp)
    );
    let policy_of = |world: &World, name: &str| {
        let destination = destination(world, name).unwrap();
        let route = &destination.routes[0];
        let backend = route.backends[0].backend.clone().unwrap().policy.unwrap();
        assert_eq!(backend.outlier_detection, None, "there is nobody else");
        (
            route.policy.clone().unwrap().idle_timeout_ms,
            backend.connect_timeout_ms,
        )
    };
    assert_eq!(policy_of(&world, "10.0.0.1:5432"), (7_000, 7_000));
    assert_eq!(
        policy_of(&world, "10.0.0.1:9999"),
        (0, 5_000),
        "another port"
    );
    let dirty = apply::<TrafficPolicy>(&mut world, [policy("db", "db", "8s")]);
    assert!(dirty.addresses.contains(&"10.0.0.1".parse().unwrap()));
    assert_eq!(policy_of(&world, "10.0.0.1:5432"), (8_000, 8_000));
    // Of two Services nobody knows which name was meant.
    apply::<Service>(&mut world, [headless("also", 5432)]);
    apply::<EndpointSlice>(&mut world, [of_db("also-1", "also")]);
    assert_eq!(policy_of(&world, "10.0.0.1:5432"), (0, 5_000));
}

#[test]
fn what_cannot_be_honoured_is_said() {
    let mut world = World::default();
    let mut probed = pod("cart-1", "10.0.0.1");
    probed["spec"]["containers"][0]["livenessProbe"] =
        json!({"httpGet": {"path": "/", "port": 8443, "scheme": "HTTPS"}});
    let mut twin = probed.clone();
    twin["metadata"]["name"] = "cart-2".into();
    twin["status"]["podIPs"] = json!([{"ip": "10.0.0.2"}]);
    twin["status"]["podIP"] = "10.0.0.2".into();
    apply::<Pod>(&mut world, [probed, twin]);
    match body(&world, ResourceKind::Workload, "shop/cart-1") {
        Some(Body::Workload(workload)) => assert_eq!(workload.probes, []),
        other => panic!("{other:?}"),
    }
    let said = |world: &World| -> Vec<String> {
        let problems = crate::compile::problems(world).into_iter();
        problems.map(|problem| problem.object.to_string()).collect()
    };
    assert_eq!(said(&world), [""; 0], "PERMISSIVE lets it in");
    let strict = json!({"metadata": {"name": "all", "namespace": "shop"},
        "spec": {"mtls": {"mode": "STRICT"}}});
    apply::<PeerAuthentication>(&mut world, [strict]);
    assert_eq!(said(&world), ["Workload shop/cart-1"]);
}

#[test]
fn a_zone_is_the_nodes() {
    let mut world = World::default();
    apply::<Pod>(&mut world, [pod("cart-1", "10.0.0.1")]);
    let zone = |world: &World| match body(world, ResourceKind::Workload, "shop/cart-1") {
        Some(Body::Workload(workload)) => workload.zone,
        other => panic!("{other:?}"),
    };
    assert_eq!(zone(&world), "");
    let dirty = apply::<Node>(&mut world, [node("node-1", "10.99.0.1", "a")]);
    assert!(dirty.workloads.contains(&Name::new("shop", "cart-1")));
    assert_eq!(zone(&world), "a");
    let dirty = apply::<Node>(&mut world, [node("node-1", "10.99.0.1", "a")]);
    assert!(dirty.is_empty());
}

#[test]
fn affinity_to_a_client_is_kept() {
    let mut world = World::default();
    let mut sticky = web();
    sticky["spec"]["sessionAffinity"] = "ClientIP".into();
    apply::<Service>(&mut world, [sticky]);
    let algorithm = |world: &World| {
        let destination = destination(world, "10.96.0.1:80").unwrap();
        let backend = destination.routes[0].backends[0].backend.clone().unwrap();
        backend.policy.unwrap().load_balancer.unwrap().algorithm()
    };
    assert_eq!(algorithm(&world), weft_api::proto::Algorithm::RingHash);
    let policy = json!({"metadata": {"name": "a", "namespace": "shop"},
        "spec": {"loadBalancer": {"algorithm": "Random"}}});
    apply::<TrafficPolicy>(&mut world, [policy]);
    assert_eq!(algorithm(&world), weft_api::proto::Algorithm::Random);
}

/// A rollout touches many pods: each costs what it touches.
#[test]
fn a_pod_touches_its_services_only() {
    let mut world = World::default();
    for index in 0..50 {
        let name = format!("s{index}");
        let spec = json!({"clusterIP": format!("10.96.1.{index}"),
            "selector": {"app": name}, "ports": [{"port": 80}]});
        apply::<Service>(&mut world, [service(&name, spec)]);
        let mut of = pod(&format!("p{index}"), &format!("10.0.1.{index}"));
        of["metadata"]["labels"]["app"] = name.clone().into();
        apply::<Pod>(&mut world, [of]);
        let endpoints = json!([endpoint(&format!("p{index}"), &format!("10.0.1.{index}"))]);
        apply::<EndpointSlice>(
            &mut world,
            [slice(
                &format!("{name}-1"),
                &name,
                json!([{"port": 80}]),
                endpoints,
            )],
        );
    }
    let dirty = remove(&mut world, Kind::Workload, "p7");
    assert_eq!(dirty.endpoints, [Name::new("shop", "s7")].into());
    assert_eq!(dirty.workloads, [Name::new("shop", "p7")].into());
    assert_eq!(dirty.addresses, ["10.0.1.7".parse().unwrap()].into());
    assert!(dirty.services.is_empty() && dirty.workloads_of.is_empty());
    let dirty = remove(&mut world, Kind::EndpointSlice, "s8-1");
    assert_eq!(dirty.endpoints, [Name::new("shop", "s8")].into());
    assert!(dirty.services.is_empty() && dirty.addresses.is_empty());
    let dirty = remove(&mut world, Kind::Service, "s9");
    assert_eq!(dirty.services, [Name::new("shop", "s9")].into());
    assert_eq!(dirty.workloads, [Name::new("shop", "p9")].into());
}
