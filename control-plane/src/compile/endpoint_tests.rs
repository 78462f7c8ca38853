use std::collections::BTreeMap;

use weft_api::proto::resource::Body;
use weft_api::proto::{Endpoints, Health, ResourceKey, ResourceKind, Trust};

use super::tests::change;
use super::{Compiled, Settings, compile, problems, variants};
use crate::model::{Change, Dirty, Kind, Name, ObjectRef, World};

fn settings() -> Settings {
    Settings {
        trust_domain: "cluster.local".to_owned(),
        sampling_percent: 1.0,
    }
}

fn key(kind: ResourceKind, name: &str) -> ResourceKey {
    ResourceKey {
        kind: kind.into(),
        name: name.to_owned(),
    }
}

fn endpoints(compiled: &Compiled) -> Endpoints {
    match &compiled.resource.body {
        Some(Body::Endpoints(endpoints)) => endpoints.clone(),
        other => panic!("{other:?}"),
    }
}

/// Address, health and hints of what a proxy on a node sees.
fn seen(world: &World, name: &str, node: &str) -> Vec<String> {
    let key = key(ResourceKind::Endpoints, name);
    let all = variants(world, &settings(), &key, &Trust::default());
    let one = compile(world, &settings(), &key, &Trust::default(), node);
    let same = all.special.get(node).unwrap_or(&all.common);
    assert_eq!(*same, one, "put apart at once, or one by one");
    let shown = endpoints(&one).endpoints.into_iter().map(|endpoint| {
        let mut words = vec![endpoint.address.clone()];
        if endpoint.health() != Health::Ready {
            words.push(format!("{:?}", endpoint.health()));
        }
        words.extend(endpoint.for_zones.iter().map(|zone| format!("zone {zone}")));
        words.extend(endpoint.for_nodes.iter().map(|node| format!("node {node}")));
        words.join(" ")
    });
    shown.collect()
}

fn world(manifests: &str) -> World {
    let mut world = World::default();
    change(&mut world, manifests, &mut Dirty::default());
    world
}

fn service(more: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: cache, namespace: shop}}
spec: {{clusterIP: 10.96.0.7, selector: {{app: cache}}, ports: [{{name: http, port: 80}}], {more}}}
"
    )
}

/// Slices with these endpoints, in the flow style of YAML.
fn slice(endpoints: &[&str]) -> String {
    let endpoints: Vec<String> = endpoints
        .iter()
        .enumerate()
        .map(|(index, more)| format!("{{addresses: [10.0.0.{}], {more}}}", index + 1))
        .collect();
    format!(
        "
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: cache-1, namespace: shop, labels: {{kubernetes.io/service-name: cache}}}}
ports: [{{name: http, port: 80}}]
endpoints: [{}]
",
        endpoints.join(", ")
    )
}

const LEAVING: &str = "conditions: {ready: false, serving: true, terminating: true}";
const UNWELL: &str = "conditions: {ready: false}";
const GONE: &str = "conditions: {ready: false, serving: false, terminating: true}";

/// KEP-1669, from slices in a folder as from those of Kubernetes (whose test has the same cases).
#[test]
fn whoever_leaves_is_used_when_nobody_is_ready() {
    for (given, expected) in [
        (["", LEAVING], ["", " Draining"]),
        ([LEAVING, LEAVING], ["", ""]),
        ([LEAVING, UNWELL], ["", " NotReady"]),
        ([LEAVING, GONE], ["", " NotReady"]),
        ([UNWELL, GONE], [" NotReady", " NotReady"]),
    ] {
        let world = world(&(service("") + &slice(&given)));
        let expected = [
            format!("10.0.0.1:80{}", expected[0]),
            format!("10.0.0.2:80{}", expected[1]),
        ];
        assert_eq!(seen(&world, "shop/cache:80", ""), expected, "{given:?}");
    }
}

/// Kubernetes writes `ready` for every endpoint of such a Service, whatever the pod says: who is not
/// ready in a slice is not used, by kube-proxy or by us.
#[test]
fn whoever_is_published_is_what_the_slice_says() {
    let published = service("publishNotReadyAddresses: true");
    let unwell = "
---
apiVersion: policy.weft.dev/v1alpha1
kind: Workload
metadata: {name: cache-1, namespace: shop, labels: {app: cache}}
spec: {addresses: [10.0.0.1], health: NotReady}
";
    for (slices, expected) in [
        (String::new(), vec!["10.0.0.1:80"]),
        (slice(&[""]), vec!["10.0.0.1:80"]),
        (slice(&[UNWELL]), vec!["10.0.0.1:80 NotReady"]),
        (
            slice(&["", UNWELL, LEAVING]),
            vec![
                "10.0.0.1:80",
                "10.0.0.2:80 NotReady",
                "10.0.0.3:80 Draining",
            ],
        ),
    ] {
        let world = world(&(published.clone() + unwell + &slices));
        assert_eq!(seen(&world, "shop/cache:80", ""), expected, "{slices}");
    }
}

/// A person who writes that a Workload is draining means it.
#[test]
fn a_workload_that_is_draining_is_not_used() {
    let draining = "
---
apiVersion: policy.weft.dev/v1alpha1
kind: Workload
metadata: {name: cache-1, namespace: shop, labels: {app: cache}}
spec: {addresses: [10.0.0.1], health: Draining}
";
    let world = world(&(service("") + draining));
    assert_eq!(seen(&world, "shop/cache:80", ""), ["10.0.0.1:80 Draining"]);
}

#[test]
fn a_local_service_is_for_clients_on_the_same_node() {
    let slices = slice(&[
        "nodeName: a",
        "nodeName: a, conditions: {ready: false}",
        "nodeName: b, conditions: {ready: false, serving: true, terminating: true}",
        "nodeName: c, conditions: {ready: false}",
        // Nobody knows where it is.
        "zone: z",
    ]);
    let mut world = world(&(service("internalTrafficPolicy: Local") + &slices));
    let name = "shop/cache:80";
    for (node, expected) in [
        ("a", vec!["10.0.0.1:80", "10.0.0.2:80 NotReady"]),
        // The last one there is used although it leaves, whoever is ready elsewhere.
        ("b", vec!["10.0.0.3:80"]),
        ("c", vec!["10.0.0.4:80 NotReady"]),
        ("d", vec![]),
        ("", vec![]),
    ] {
        assert_eq!(seen(&world, name, node), expected, "on node '{node}'");
    }
    let of_name = key(ResourceKind::Endpoints, name);
    let all = variants(&world, &settings(), &of_name, &Trust::default());
    assert_eq!(all.special.keys().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert!(endpoints_of(&all.special).all(|endpoints| endpoints.node_local));
    assert!(endpoints(&all.common).node_local);
    let said: Vec<String> = problems(&world).into_iter().map(|p| p.message).collect();
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains("no nodeName"), "{said:?}");

    // Addresses outside the cluster, and ports of nodes, are another matter.
    let name = ObjectRef {
        kind: Kind::Service,
        name: Name::new("shop", "cache"),
    };
    let Some(crate::model::Object::Service(mut outer)) = world.object(&name) else {
        panic!("a Service");
    };
    outer.outer_vips = vec!["192.0.2.1".parse().unwrap()];
    outer.vips.extend(outer.outer_vips.clone());
    world.apply(
        Change::Set(Box::new(crate::model::Object::Service(outer))),
        &mut Dirty::default(),
    );
    for (address, name) in [
        ("10.96.0.7:80", "shop/cache:80"),
        ("cache.shop:80", "shop/cache:80"),
        ("192.0.2.1:80", "everywhere/shop/cache:80"),
    ] {
        let key = key(ResourceKind::Destination, address);
        let compiled = compile(&world, &settings(), &key, &Trust::default(), "");
        assert_eq!(compiled.endpoint_names(), [name], "{address}");
    }
    let everywhere = seen(&world, "everywhere/shop/cache:80", "a");
    assert_eq!(everywhere.len(), 5);
    assert_eq!(everywhere[2], "10.0.0.3:80 Draining");
}

fn endpoints_of(special: &BTreeMap<String, Compiled>) -> impl Iterator<Item = Endpoints> + use<'_> {
    special.values().map(endpoints)
}

#[test]
fn nothing_stands_before_a_headless_service() {
    let headless = service("internalTrafficPolicy: Local").replace("10.96.0.7", "None");
    let world = world(&(headless + &slice(&["nodeName: a", "nodeName: b"])));
    assert_eq!(seen(&world, "shop/cache:80", "a").len(), 2);
}

/// As kube-proxy: hints count when every ready endpoint has some (KEP-2433, KEP-3015).
#[test]
fn hints_count_when_every_ready_endpoint_has_some() {
    let zone = |name: &str, more: &str| format!("hints: {{forZones: [{{name: {name}}}]}}, {more}");
    let both = |zone: &str, node: &str| {
        format!("hints: {{forZones: [{{name: {zone}}}], forNodes: [{{name: {node}}}]}}")
    };
    let shown = |given: &[String]| {
        let given: Vec<&str> = given.iter().map(String::as_str).collect();
        let world = world(&(service("") + &slice(&given)));
        seen(&world, "shop/cache:80", "n")
    };
    assert_eq!(
        shown(&[zone("a", ""), zone("b", "")]),
        ["10.0.0.1:80 zone a", "10.0.0.2:80 zone b"]
    );
    assert_eq!(
        shown(&[zone("a", ""), String::new()]),
        ["10.0.0.1:80", "10.0.0.2:80"],
        "one has none"
    );
    assert_eq!(
        shown(&[zone("a", ""), UNWELL.to_owned(), LEAVING.to_owned()]),
        [
            "10.0.0.1:80 zone a",
            "10.0.0.2:80 NotReady",
            "10.0.0.3:80 Draining"
        ],
        "one that is not ready needs none"
    );
    assert_eq!(
        shown(&[zone("a", LEAVING), zone("b", LEAVING)]),
        ["10.0.0.1:80", "10.0.0.2:80"],
        "whoever is left is for all"
    );
    assert_eq!(
        shown(&[both("a", "n"), both("b", "m")]),
        ["10.0.0.1:80 zone a node n", "10.0.0.2:80 zone b node m"]
    );
    assert_eq!(
        shown(&[both("a", "n"), zone("b", "")]),
        ["10.0.0.1:80 zone a", "10.0.0.2:80 zone b"],
        "not every one has a node"
    );
}

/// Where nobody writes slices, the Workloads of a Service that wishes it have the hints that
/// Kubernetes would write.
#[test]
fn a_distribution_of_workloads() {
    let workload = |number: u8, place: &str| {
        format!(
            "
---
apiVersion: policy.weft.dev/v1alpha1
kind: Workload
metadata: {{name: cache-{number}, namespace: shop, labels: {{app: cache}}}}
spec: {{addresses: [10.0.0.{number}], {place}}}
"
        )
    };
    let with = |wish: &str, places: [&str; 2]| {
        world(&(service(wish) + &workload(1, places[0]) + &workload(2, places[1])))
    };
    let placed = ["zone: a, node: n", "zone: b, node: m"];
    for (wish, expected) in [
        ("", ["", ""]),
        ("trafficDistribution: PreferClose", [" zone a", " zone b"]),
        (
            "trafficDistribution: PreferSameZone",
            [" zone a", " zone b"],
        ),
        (
            "trafficDistribution: PreferSameNode",
            [" zone a node n", " zone b node m"],
        ),
    ] {
        let world = with(wish, placed);
        let expected = [
            format!("10.0.0.1:80{}", expected[0]),
            format!("10.0.0.2:80{}", expected[1]),
        ];
        assert_eq!(seen(&world, "shop/cache:80", "n"), expected, "{wish}");
        assert_eq!(problems(&world), []);
    }
    let lost = with(
        "trafficDistribution: PreferSameZone",
        ["zone: a", "node: m"],
    );
    let all = ["10.0.0.1:80", "10.0.0.2:80"];
    assert_eq!(seen(&lost, "shop/cache:80", "n"), all);
    let said: Vec<String> = problems(&lost).into_iter().map(|p| p.message).collect();
    assert!(
        said.len() == 1 && said[0].contains("in which zone"),
        "{said:?}"
    );
    let local = with("internalTrafficPolicy: Local", ["node: n", "zone: a"]);
    assert_eq!(seen(&local, "shop/cache:80", "n"), ["10.0.0.1:80"]);
    let said: Vec<String> = problems(&local).into_iter().map(|p| p.message).collect();
    assert!(said.len() == 1 && said[0].contains("cache-2"), "{said:?}");
}
