use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use proptest::prelude::*;
use weft_api::identity::SpiffeId;
use weft_api::proto::{Held, Hello, ResourceKind, Trust};

use super::{Hub, Key};
use crate::compile::Settings;
use crate::model::{
    Change, EndpointSlice, Name, Node, Object, ObjectRef, Service, ServicePort, SliceEndpoint,
    SlicePort, TargetPort, Workload, WorkloadRef,
};
use crate::serve::metrics::Metrics;
use crate::serve::tls::Peer;
use crate::sources::folder::manifest;

fn hub() -> Arc<Hub> {
    let settings = Settings {
        trust_domain: "cluster.local".to_owned(),
        sampling_percent: 1.0,
    };
    Arc::new(Hub::new(
        settings,
        Trust::default(),
        Arc::new(Metrics::default()),
    ))
}

/// Objects that lead to one another and get in each other's way, some of the same name.
fn objects() -> Vec<Object> {
    let text = "
{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {clusterIP: 10.96.0.1, selector: {app: x}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {clusterIP: 10.96.0.2, selector: {app: y}, ports: [{port: 80, targetPort: web, appProtocol: http}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: b}, spec: {clusterIP: 10.96.0.1, selector: {app: x}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: c}, spec: {clusterIP: 10.0.0.1, ports: [{port: 80}]}}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: Workload, metadata: {name: w, labels: {app: x}}, spec: {addresses: [10.0.0.1]}}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: Workload, metadata: {name: w, labels: {app: y}}, spec: {addresses: [10.0.0.2], ports: [{name: web, port: 8080}]}}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: Workload, metadata: {name: v, labels: {app: x}}, spec: {addresses: [10.0.0.1, 10.0.0.2], health: NotReady}}
---
{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: s, labels: {kubernetes.io/service-name: a}}, ports: [{port: 8080}], endpoints: [{addresses: [10.0.0.1]}, {addresses: [10.0.0.3]}]}
---
{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: s, labels: {kubernetes.io/service-name: c}}, ports: [{port: 8080}], endpoints: [{addresses: [10.0.0.2]}]}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: TrafficPolicy, metadata: {name: p}, spec: {timeouts: {request: 1s}, circuitBreaker: {fallback: {backend: {name: c, port: 80}}}}}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: TrafficPolicy, metadata: {name: q}, spec: {targetRefs: [{kind: Service, name: c}], timeouts: {request: 2s}}}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: PeerAuthentication, metadata: {name: p}, spec: {selector: {matchLabels: {app: x}}, mtls: {mode: STRICT}}}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: Telemetry, metadata: {name: t, namespace: weft-system}, spec: {accessLog: {mode: All}}}
";
    let (parsed, _) = manifest::parse(Path::new("x.yaml"), text).unwrap();
    let mut objects: Vec<Object> = parsed.into_iter().map(|parsed| parsed.object).collect();
    objects.extend(of_kubernetes());
    assert_eq!(objects.len(), OBJECTS);
    objects
}

const OBJECTS: usize = 22;

/// Objects such as only Kubernetes has them.
fn of_kubernetes() -> Vec<Object> {
    let name = |name: &str| Name::new("default", name);
    let ip = |text: &str| text.parse().unwrap();
    let port = |node_port| ServicePort {
        name: "p".to_owned(),
        port: 80,
        target: TargetPort::Number(8080),
        protocol: weft_api::proto::Protocol::Http,
        node_port,
    };
    let service = |at: &str, vip: Option<&str>, node_port| {
        Object::Service(Service {
            name: name(at),
            selector: [("app".to_owned(), "x".to_owned())].into(),
            vips: vip.into_iter().map(ip).collect(),
            headless: vip.is_none(),
            sliced: true,
            ports: vec![port(node_port)],
            ..Service::default()
        })
    };
    let slice = |workload: &str, uid: &str, address: &str| {
        Object::EndpointSlice(EndpointSlice {
            name: name("t"),
            service: "b".to_owned(),
            ports: vec![SlicePort {
                name: "p".to_owned(),
                port: 8080,
            }],
            endpoints: vec![SliceEndpoint {
                addresses: vec![ip(address)],
                workload: Some(WorkloadRef {
                    name: name(workload),
                    uid: uid.to_owned(),
                }),
                ..SliceEndpoint::default()
            }],
        })
    };
    let pod = |uid: &str, host_network| {
        Object::Workload(Workload {
            name: name("w"),
            labels: [("app".to_owned(), "x".to_owned())].into(),
            service_account: "default".to_owned(),
            addresses: vec![ip(if host_network {
                "10.99.0.1"
            } else {
                "10.0.0.1"
            })],
            weight: 1,
            uid: uid.to_owned(),
            node: "n".to_owned(),
            host_network,
            sidecar: !host_network,
            ..Workload::default()
        })
    };
    let node = |zone: &str, address: &str| {
        Object::Node(Node {
            name: Name::new("", "n"),
            zone: zone.to_owned(),
            addresses: vec![ip(address)],
        })
    };
    vec![
        service("b", None, None),
        service("b", Some("10.96.0.2"), Some(30080)),
        slice("w", "1", "10.0.0.1"),
        slice("w", "2", "10.99.0.1"),
        slice("v", "", "10.0.0.2"),
        pod("1", false),
        pod("2", true),
        node("a", "10.99.0.1"),
        node("b", "10.99.0.2"),
    ]
}

const KEYS: [(ResourceKind, &str); 18] = [
    (ResourceKind::Destination, "10.99.0.1:30080"),
    (ResourceKind::Destination, "10.99.0.2:30080"),
    (ResourceKind::Destination, "10.99.0.1:8080"),
    (ResourceKind::Destination, "10.96.0.1:80"),
    (ResourceKind::Destination, "10.96.0.2:80"),
    (ResourceKind::Destination, "10.0.0.1:80"),
    (ResourceKind::Destination, "10.0.0.1:8080"),
    (ResourceKind::Destination, "10.0.0.2:8080"),
    (ResourceKind::Destination, "a.default:80"),
    (ResourceKind::Destination, "b.default.svc:80"),
    (ResourceKind::Destination, "c.default:80"),
    (ResourceKind::Endpoints, "default/a:80"),
    (ResourceKind::Endpoints, "default/b:80"),
    (ResourceKind::Endpoints, "default/c:80"),
    (ResourceKind::Endpoints, "workload/default/w:80"),
    (ResourceKind::Endpoints, "workload/default/v:8080"),
    (ResourceKind::Workload, "default/w"),
    (ResourceKind::Trust, "trust"),
];

proptest! {
    /// What a proxy has been sent is, after any changes, what a proxy that asks anew would get:
    /// nothing that changed was overlooked.
    #[test]
    fn a_proxy_has_what_holds(steps in proptest::collection::vec((0usize..OBJECTS, any::<bool>()), 1..40)) {
        let hub = hub();
        let peer = Peer {
            identity: SpiffeId::new("cluster.local", "default", "default").unwrap(),
            not_after: 0,
            signer: crate::serve::ca::Signer::default(),
        };
        let hello = Hello { workload: "default/w".to_owned(), ..Hello::default() };
        let address = ([127, 0, 0, 1], 1).into();
        let connection = hub.connect(&peer, address, hello).unwrap();
        let held = KEYS
            .iter()
            .map(|(kind, name)| Held {
                key: Key::new(*kind, *name).map(|key| key.to_proto()),
                version: 0,
            })
            .collect();
        connection.requests().subscribe(held).unwrap();
        let mut has = std::collections::BTreeMap::new();
        let objects = objects();
        for (index, set) in steps {
            let object = objects[index].clone();
            let change = if set {
                Change::Set(Box::new(object))
            } else {
                Change::Remove(object.reference())
            };
            hub.apply(vec![change], Instant::now());
            // Looking at what the world is without an object leaves it as it is.
            for object in &objects {
                hub.arrival(&object.reference());
            }
            for resource in connection.waiting() {
                has.insert(format!("{:?}", resource.key), resource.version);
            }
            for (kind, name) in KEYS {
                let key = Key::new(kind, name).unwrap().to_proto();
                let now = hub.look_up(&key, "").version();
                prop_assert_eq!(has.get(&format!("{:?}", Some(&key))), Some(&now), "{}", name);
            }
        }
        drop(connection);
        prop_assert_eq!(hub.subscribed(), 0);
    }
}

#[test]
fn a_change_has_arrived_when_those_who_use_it_have_acknowledged() {
    let hub = hub();
    let objects = objects();
    let policy = objects[10].reference();
    assert_eq!(policy.to_string(), "TrafficPolicy default/q");
    let set: Vec<Change> = objects
        .into_iter()
        .map(|object| Change::Set(Box::new(object)))
        .collect();
    hub.apply(set, Instant::now());
    let identity: SpiffeId = "spiffe://cluster.local/ns/default/sa/default"
        .parse()
        .unwrap();
    let peer = Peer {
        identity,
        not_after: 0,
        signer: crate::serve::ca::Signer::default(),
    };
    let hello = Hello {
        workload: "default/w".to_owned(),
        ..Hello::default()
    };
    let proxy = hub.connect(&peer, "10.0.0.1:1".parse().unwrap(), hello);
    let proxy = proxy.unwrap();
    assert!(hub.arrival(&policy).known && hub.arrival(&policy).tables.is_empty());
    let wanted = ["c.default:80", "a.default:80"].map(|name| Held {
        key: Some(
            Key::new(ResourceKind::Destination, name)
                .unwrap()
                .to_proto(),
        ),
        version: 0,
    });
    proxy.requests().subscribe(wanted.to_vec()).unwrap();
    let generation = Change::Generation {
        object: policy.clone(),
        generation: 7,
    };
    hub.apply(vec![generation], Instant::now());
    // Of what it asked for only c comes from the policy.
    let arrival = hub.arrival(&policy);
    assert_eq!(arrival.generation, Some(7));
    let names: Vec<&str> = arrival.tables.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["c.default:80"]);
    assert!(!arrival.tables[0].acknowledged);

    for resource in proxy.waiting() {
        proxy
            .requests()
            .acknowledge(resource.key, resource.version)
            .unwrap();
    }
    assert!(hub.arrival(&policy).tables[0].acknowledged);
    let key = Key::new(ResourceKind::Destination, "c.default:80").unwrap();
    let why = hub.policies_in(&key.to_proto(), |_| true);
    // q says more than p about the time, p alone says what the fallback is.
    let why: Vec<String> = why.iter().map(ToString::to_string).collect();
    assert_eq!(why, ["TrafficPolicy default/p", "TrafficPolicy default/q"]);

    hub.apply(vec![Change::Remove(policy.clone())], Instant::now());
    let arrival = hub.arrival(&policy);
    assert!(!arrival.known && arrival.generation.is_none());
}

#[test]
fn objects_are_named_as_kubectl_does() {
    for (given, expected) in [
        ("trafficpolicy/cart", Some("TrafficPolicy shop/cart")),
        ("TrafficPolicies/cart", Some("TrafficPolicy shop/cart")),
        ("svc/cart", Some("Service shop/cart")),
        ("pod/cart-1", Some("Workload shop/cart-1")),
        ("peerauthentication/a", Some("PeerAuthentication shop/a")),
        ("deployment/cart", None),
        ("cart", None),
        ("svc/", None),
        ("svc/a/b", None),
    ] {
        let read = ObjectRef::parse(given, "shop").map(|object| object.to_string());
        assert_eq!(read.as_deref(), expected, "{given}");
    }
}

#[test]
fn endpoints_come_before_what_leads_to_them() {
    let mut keys: Vec<Key> = KEYS
        .iter()
        .map(|(kind, name)| Key::new(*kind, *name).unwrap())
        .collect();
    keys.sort();
    let kinds: Vec<ResourceKind> = keys.iter().map(Key::kind).collect();
    let first = kinds
        .iter()
        .position(|kind| *kind == ResourceKind::Destination);
    assert_eq!(first, Some(7));
    assert_eq!(kinds[0], ResourceKind::Trust);
    assert!(Key::new(ResourceKind::Unspecified, "x").is_none());
}
