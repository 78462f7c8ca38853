use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use weft_api::identity::SpiffeId;
use weft_api::names::MOVE_METADATA;
use weft_api::proto::resource::Body;
use weft_api::proto::{Held, Hello, ResourceKind, Trust};

use super::hub::Connection;
use super::{Hub, Key};
use crate::compile::{Settings, audience};
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

/// The stream of a workload's proxy.
fn connect(hub: &Arc<Hub>, workload: &str) -> Connection {
    let peer = Peer {
        identity: SpiffeId::new("cluster.local", "default", "default").unwrap(),
        not_after: 0,
        signer: crate::serve::ca::Signer::default(),
    };
    let hello = Hello {
        workload: workload.to_owned(),
        ..Hello::default()
    };
    let address = ([127, 0, 0, 1], 1).into();
    hub.connect(&peer, address, hello).unwrap()
}

fn held((kind, name): (ResourceKind, &str)) -> Held {
    Held {
        key: Key::new(kind, name).map(|key| key.to_proto()),
        version: 0,
    }
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
{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {clusterIP: 10.96.0.1, selector: {app: x}, internalTrafficPolicy: Local, ports: [{port: 80}]}}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: Workload, metadata: {name: w, labels: {app: x}}, spec: {addresses: [10.0.0.1], node: m}}
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

const OBJECTS: usize = 24;

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

const KEYS: [(ResourceKind, &str); 19] = [
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
    (ResourceKind::Endpoints, "everywhere/default/a:80"),
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
        let connection = connect(&hub, "default/w");
        connection.requests().subscribe(KEYS.map(held).to_vec()).unwrap();
        let mut has = BTreeMap::new();
        // Where its workload was last.
        let mut node = String::new();
        let objects = objects();
        for (index, set) in steps {
            let object = objects[index].clone();
            let change = if set {
                Change::Set(Box::new(object))
            } else {
                Change::Remove(object.reference())
            };
            if let Change::Set(object) = &change
                && let Object::Workload(workload) = &**object
                && workload.name.name == "w"
            {
                node.clone_from(&workload.node);
            }
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
                let now = hub.look_up(&key, audience(kind, "default", &node)).version();
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
    let policy = objects[12].reference();
    assert_eq!(policy.to_string(), "TrafficPolicy default/q");
    let set: Vec<Change> = objects
        .into_iter()
        .map(|object| Change::Set(Box::new(object)))
        .collect();
    hub.apply(set, Instant::now());
    let proxy = connect(&hub, "default/w");
    assert!(hub.arrival(&policy).known && hub.arrival(&policy).tables.is_empty());
    let wanted = ["c.default:80", "a.default:80"].map(|name| (ResourceKind::Destination, name));
    proxy
        .requests()
        .subscribe(wanted.map(held).to_vec())
        .unwrap();
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

    assert!(hub.arrival(&policy).unused.is_empty());
    let service = ObjectRef::parse("service/c", "default").unwrap();
    hub.apply(vec![Change::Remove(service)], Instant::now());
    let unused = hub.arrival(&policy).unused;
    assert_eq!(unused, ["there is no Service default/c"]);

    hub.apply(vec![Change::Remove(policy.clone())], Instant::now());
    let arrival = hub.arrival(&policy);
    assert!(!arrival.known && arrival.generation.is_none() && arrival.unused.is_empty());
}

/// A Service for clients on the same node: a proxy is sent what is on its own, and something new
/// only when that changes, or when its workload moves.
#[test]
fn each_node_has_its_own_endpoints() {
    const CACHE: &str = "default/cache:80";
    let text = "
{apiVersion: v1, kind: Service, metadata: {name: cache}, spec: {clusterIP: 10.96.0.1, selector: {app: cache}, internalTrafficPolicy: Local, ports: [{port: 80}]}}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: Workload, metadata: {name: cache-m, labels: {app: cache}}, spec: {addresses: [10.0.0.1], node: m}}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: Workload, metadata: {name: cache-n, labels: {app: cache}}, spec: {addresses: [10.0.0.2], node: n}}
---
{apiVersion: policy.weft.dev/v1alpha1, kind: Workload, metadata: {name: client-m}, spec: {addresses: [10.0.0.3], node: m}}
";
    let set = |hub: &Hub, text: &str| {
        let (parsed, _) = manifest::parse(Path::new("x.yaml"), text).unwrap();
        let set = |object| Change::Set(Box::new(object));
        let changes = parsed.into_iter().map(|parsed| set(parsed.object));
        hub.apply(changes.collect(), Instant::now());
    };
    let sent = |proxy: &Connection| -> Vec<Vec<String>> {
        let waiting = proxy.waiting().into_iter();
        let endpoints = waiting.filter_map(|resource| match resource.body {
            Some(Body::Endpoints(endpoints)) => Some(endpoints),
            _ => None,
        });
        endpoints
            .map(|sent| {
                assert!(sent.node_local);
                sent.endpoints.into_iter().map(|e| e.address).collect()
            })
            .collect()
    };
    let hub = hub();
    set(&hub, text);
    let on_m = connect(&hub, "default/client-m");
    // Not known yet: it will be said where it is.
    let later = connect(&hub, "default/later");
    for proxy in [&on_m, &later] {
        let wanted = held((ResourceKind::Destination, "10.96.0.1:80"));
        proxy.requests().subscribe(vec![wanted]).unwrap();
    }
    assert_eq!(sent(&on_m), [["10.0.0.1:80"]]);
    assert_eq!(sent(&later), [[""; 0]]);
    let later_on = |node: &str| {
        set(
            &hub,
            &format!(
                "{{apiVersion: policy.weft.dev/v1alpha1, kind: Workload, metadata: {{name: later}}, spec: {{addresses: [10.0.0.4], node: {node}}}}}"
            ),
        );
    };
    later_on("n");
    assert_eq!(sent(&later), [["10.0.0.2:80"]]);
    later_on("m");
    assert_eq!(sent(&later), [["10.0.0.1:80"]], "it has moved");
    later_on("elsewhere");
    assert_eq!(sent(&later), [[""; 0]], "nobody is there");
    later_on("n");
    assert_eq!(sent(&later), [["10.0.0.2:80"]]);
    assert_eq!(sent(&on_m), [[""; 0]; 0], "nothing of it is its affair");

    // One on n more.
    set(
        &hub,
        "{apiVersion: policy.weft.dev/v1alpha1, kind: Workload, metadata: {name: cache-o, labels: {app: cache}}, spec: {addresses: [10.0.0.5], node: n}}",
    );
    assert_eq!(sent(&on_m), [[""; 0]; 0]);
    assert_eq!(sent(&later), [["10.0.0.2:80", "10.0.0.5:80"]]);
    // And one that moves from n to m.
    set(
        &hub,
        "{apiVersion: policy.weft.dev/v1alpha1, kind: Workload, metadata: {name: cache-n, labels: {app: cache}}, spec: {addresses: [10.0.0.2], node: m}}",
    );
    assert_eq!(sent(&on_m), [["10.0.0.1:80", "10.0.0.2:80"]]);
    assert_eq!(sent(&later), [["10.0.0.5:80"]]);
    // A client that is gone from the model is still where it was.
    let gone = ObjectRef::parse("workload/later", "default").unwrap();
    hub.apply(vec![Change::Remove(gone)], Instant::now());
    assert_eq!(sent(&later), [[""; 0]; 0]);
    let key = Key::new(ResourceKind::Endpoints, CACHE).unwrap();
    let names: BTreeSet<Option<u64>> = ["m", "n", "x"]
        .map(|node| Some(hub.look_up(&key.to_proto(), node).version()))
        .into();
    assert_eq!(names.len(), 3, "each is another");
}

/// Streams end one after another, evenly, and soon when there are few; nobody is told twice.
#[tokio::test(start_paused = true)]
async fn streams_end_one_after_another() {
    const SECOND: Duration = Duration::from_secs(1);
    for (streams, within, rate, pause) in [
        // With few it is the rate that decides, with many the time that there is.
        (1, 10 * SECOND, 20, Duration::ZERO),
        (4, 10 * SECOND, 20, SECOND / 20),
        (100, 10 * SECOND, 20, SECOND / 20),
        (1000, 10 * SECOND, 20, SECOND / 100),
        (0, 10 * SECOND, 20, Duration::ZERO),
        // Nothing to divide by.
        (3, Duration::ZERO, 0, Duration::ZERO),
    ] {
        let hub = hub();
        let began = tokio::time::Instant::now();
        let mut ends = tokio::task::JoinSet::new();
        for _ in 0..streams {
            let connection = connect(&hub, "default/w");
            ends.spawn(async move {
                let status = connection.next().await.unwrap_err();
                (began.elapsed(), status)
            });
        }
        assert_eq!(hub.connected(), streams as usize);
        hub.end_spread(within, rate, "moving on").await;
        let took = began.elapsed();
        assert!(took <= within, "{streams}: {took:?}");
        let mut seen = Vec::new();
        while let Some(end) = ends.join_next().await {
            let (at, status) = end.unwrap();
            assert_eq!(status.code(), tonic::Code::Unavailable);
            assert_eq!(status.message(), "moving on");
            assert!(status.metadata().contains_key(MOVE_METADATA), "{status:?}");
            seen.push(at);
        }
        seen.sort();
        // A timer rings at the millisecond after its time.
        let slack = Duration::from_millis(1);
        for (nth, at) in (0u32..).zip(&seen) {
            let due = pause * nth;
            assert!(
                (due..=due + slack).contains(at),
                "{streams} streams: the end {nth} came after {at:?}, due after {due:?}"
            );
        }
        assert_eq!(seen.len(), streams as usize);
        assert_eq!(hub.connected(), 0, "{streams}");
    }
}

/// Those that have gone by themselves meanwhile are no matter, and those that come are not ended.
#[tokio::test(start_paused = true)]
async fn a_stream_that_comes_while_others_end_stays() {
    let hub = hub();
    let mut there: Vec<Connection> = (0..3).map(|_| connect(&hub, "default/w")).collect();
    let ending = {
        let hub = hub.clone();
        tokio::spawn(async move {
            hub.end_spread(Duration::from_secs(3), 1, "moving on").await;
        })
    };
    // The first is told at once; then the last goes by itself, and another comes.
    there[0].next().await.unwrap_err();
    there.pop();
    let came = connect(&hub, "default/w");
    ending.await.unwrap();
    there[1].next().await.unwrap_err();
    let next = tokio::time::timeout(Duration::from_secs(60), came.next()).await;
    assert!(next.is_err(), "it is not ended: {next:?}");
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
    assert_eq!(first, Some(8));
    assert_eq!(kinds[0], ResourceKind::Trust);
    assert!(Key::new(ResourceKind::Unspecified, "x").is_none());
}
