//! What is said of policies that name no target, and of what cannot be read; and that after a change
//! only those need to be looked at again that the change names.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

use proptest::prelude::*;

use super::{ObjectStatus, status_of, with_status};
use crate::model::{Change, Dirty, Kind, Name, Object, ObjectRef, ParentRef, Unreadable, World};
use crate::sources::folder::manifest;

fn objects(manifests: &str) -> Vec<Object> {
    let (parsed, _) = manifest::parse(Path::new("test.yaml"), manifests)
        .unwrap_or_else(|findings| panic!("{findings:?}"));
    parsed.into_iter().map(|parsed| parsed.object).collect()
}

fn world(manifests: &str) -> World {
    let mut world = World::default();
    for object in objects(manifests) {
        let object = Box::new(object);
        world.apply(Change::Set(object), &mut Dirty::default());
    }
    world
}

fn reference(kind: Kind, name: &str) -> ObjectRef {
    ObjectRef {
        kind,
        name: Name::new("shop", name),
    }
}

/// "type=status reason: message" of each condition of an object that names no target.
fn said(world: &World, kind: Kind, name: &str) -> Vec<String> {
    let status = status_of(world, &reference(kind, name)).unwrap();
    assert_eq!(status.parents, []);
    let conditions = status.conditions.iter();
    conditions
        .map(|c| format!("{}={} {}: {}", c.kind, c.status, c.reason, c.message))
        .collect()
}

fn ours(kind: &str, name: &str, created: &str, spec: &str) -> String {
    format!(
        "---
apiVersion: policy.weft.dev/v1alpha1
kind: {kind}
metadata: {{name: {name}, namespace: shop, creationTimestamp: '{created}'}}
spec: {spec}
"
    )
}

fn workload(name: &str, labels: &str) -> String {
    format!(
        "---
apiVersion: policy.weft.dev/v1alpha1
kind: Workload
metadata: {{name: {name}, namespace: shop, labels: {{{labels}}}}}
spec: {{serviceAccount: {name}, addresses: [10.0.0.{}], sidecar: true}}
",
        name.len()
    )
}

const OLD: &str = "2026-01-01T00:00:00Z";
const NEW: &str = "2026-02-01T00:00:00Z";

#[test]
fn of_policies_for_workloads_the_older_is_used() {
    let selects = |labels: &str| format!("{{selector: {{matchLabels: {{{labels}}}}}}}");
    let manifests = [
        workload("cart", "app: cart, tier: back"),
        workload("front", "app: front, tier: back"),
        ours(
            "PeerAuthentication",
            "a-late",
            NEW,
            "{mtls: {mode: STRICT}}",
        ),
        ours(
            "PeerAuthentication",
            "b-first",
            OLD,
            "{mtls: {mode: PERMISSIVE}}",
        ),
        ours("PeerAuthentication", "cart", OLD, &selects("app: cart")),
        ours("PeerAuthentication", "tier", NEW, &selects("tier: back")),
        ours("PeerAuthentication", "same", NEW, &selects("app: cart")),
        ours("PeerAuthentication", "nobody", NEW, &selects("app: none")),
        ours("Telemetry", "cart", OLD, &selects("app: cart")),
        ours("Telemetry", "all", NEW, "{accessLog: {mode: All}}"),
    ]
    .concat();
    let world = world(&manifests);
    let peer = |name| said(&world, Kind::PeerAuthentication, name);
    for name in ["b-first", "cart"] {
        assert_eq!(peer(name), ["Accepted=true Accepted: "], "{name}");
    }
    for name in ["cart", "all"] {
        let said = said(&world, Kind::Telemetry, name);
        assert_eq!(said, ["Accepted=true Accepted: "], "{name}");
    }
    assert_eq!(
        peer("a-late"),
        [
            "Accepted=false Conflicted: shop/b-first already says what holds for namespace shop, and is used: it is older, or comes first by name"
        ]
    );
    assert_eq!(
        peer("same"),
        [
            "Accepted=false Conflicted: shop/cart already says what holds for the workloads that it selects, and is used: it is older, or comes first by name"
        ]
    );
    assert_eq!(
        peer("tier"),
        [
            "Accepted=true Accepted: ",
            "Overridden=true Overridden: shop/cart is used for 1 of the 2 workloads that it selects, such as shop/cart: it is older, or comes first by name"
        ]
    );
    assert_eq!(
        peer("nobody"),
        ["Accepted=false TargetNotFound: the selector matches no workload in namespace shop"]
    );
}

#[test]
fn what_a_host_or_a_namespace_has_once() {
    let host = |hosts: &str| {
        format!("{{hosts: [{hosts}], ports: [{{port: 443, appProtocol: tls}}], resolution: DNS}}")
    };
    let manifests = [
        ours("EgressPolicy", "a", NEW, "{mode: AllowAny}"),
        ours("EgressPolicy", "b", OLD, "{mode: RegistryOnly}"),
        ours("ExternalService", "a", NEW, &host("api.example.org")),
        ours("ExternalService", "b", OLD, &host("api.example.org")),
        ours(
            "ExternalService",
            "c",
            OLD,
            &host("api.example.org, www.example.org"),
        ),
    ]
    .concat();
    let world = world(&manifests);
    let external = |name| said(&world, Kind::ExternalService, name);
    assert_eq!(
        said(&world, Kind::EgressPolicy, "a"),
        [
            "Accepted=false Conflicted: shop/b already says what holds for namespace shop, and is used: it is older, or comes first by name"
        ]
    );
    assert_eq!(
        said(&world, Kind::EgressPolicy, "b"),
        ["Accepted=true Accepted: "]
    );
    assert_eq!(external("a"), ["Accepted=true Accepted: "]);
    let taken = "api.example.org:443 is ExternalService shop/a, which is used";
    assert_eq!(
        external("b"),
        [format!("Accepted=false Conflicted: {taken}")]
    );
    assert_eq!(
        external("c"),
        [
            "Accepted=true Accepted: ".to_owned(),
            format!("Overridden=true Overridden: {taken}")
        ]
    );
}

fn unreadable(object: ObjectRef, generation: i64, targets: Vec<ParentRef>) -> Change {
    Change::Unreadable {
        object,
        unreadable: Box::new(Unreadable {
            generation,
            created: OLD.to_owned(),
            why: "spec.mode: 'X' is no mode".to_owned(),
            targets,
        }),
    }
}

#[test]
fn what_cannot_be_read_is_invalid_and_what_it_said_before_stands() {
    let mut world = world(&ours("EgressPolicy", "a", OLD, "{mode: AllowAny}"));
    let object = reference(Kind::EgressPolicy, "a");
    let mut dirty = Dirty::default();
    let generation = Change::Generation {
        object: object.clone(),
        generation: 3,
    };
    world.apply(generation, &mut dirty);
    world.apply(unreadable(object.clone(), 4, Vec::new()), &mut dirty);
    assert!(dirty.said.contains(&object));
    let status = status_of(&world, &object).unwrap();
    assert_eq!(status.generation, 4);
    assert_eq!(
        said(&world, Kind::EgressPolicy, "a"),
        [
            "Accepted=false Invalid: spec.mode: 'X' is no mode; what it said before (generation 3) stands"
        ]
    );
    // One that never could be read says so, too: for what it names, or its namespace.
    let target = ParentRef {
        kind: Some("HTTPRoute".to_owned()),
        name: "cart".to_owned(),
        ..ParentRef::default()
    };
    for (targets, expected) in [
        (vec![target], "gateway.networking.k8s.io HTTPRoute cart"),
        (vec![], " Namespace shop"),
    ] {
        let object = reference(Kind::TrafficPolicy, "never");
        world.apply(unreadable(object.clone(), 1, targets), &mut dirty);
        assert!(with_status(&world).contains(&object));
        let status = status_of(&world, &object).unwrap();
        assert_eq!(status.conditions, []);
        let [entry] = &status.parents[..] else {
            panic!("{status:?}")
        };
        let parent = &entry.parent;
        let shown = format!(
            "{} {} {}",
            parent.group.as_deref().unwrap(),
            parent.kind.as_deref().unwrap(),
            parent.name
        );
        assert_eq!(shown, expected);
        assert_eq!(entry.conditions[0].reason, "Invalid");
        assert_eq!(entry.conditions[0].message, "spec.mode: 'X' is no mode");
    }
    // It can be read again, or is gone.
    for object in objects(&ours("EgressPolicy", "a", OLD, "{mode: AllowAny}")) {
        world.apply(Change::Set(Box::new(object)), &mut dirty);
    }
    assert_eq!(
        said(&world, Kind::EgressPolicy, "a"),
        ["Accepted=true Accepted: "]
    );
    let gone = reference(Kind::TrafficPolicy, "never");
    world.apply(Change::Remove(gone.clone()), &mut dirty);
    assert_eq!(status_of(&world, &gone), None);
}

/// Objects that bear on each other in every way there is; several are variants of one.
static POOL: LazyLock<Vec<Object>> = LazyLock::new(pool);

fn pool() -> Vec<Object> {
    let core = "
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {clusterIP: 203.0.113.7, selector: {app: cart}, ports: [{name: alt, port: 443}]}
---
apiVersion: v1
kind: Service
metadata: {name: other, namespace: shop}
spec: {clusterIP: 10.96.0.2, sessionAffinity: ClientIP, ports: [{port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: cart}]
  rules: [{name: slow, backendRefs: [{name: other, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: other, port: 80}]
  rules: [{backendRefs: [{name: cart, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: g, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: cart}]
  rules: [{backendRefs: [{name: other, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TCPRoute
metadata: {name: t, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: cart}]
  rules: [{backendRefs: [{name: other, port: 80}]}]
---
apiVersion: gateway.networking.x-k8s.io/v1alpha1
kind: XBackendTrafficPolicy
metadata: {name: a, namespace: shop}
spec:
  targetRefs: [{group: '', kind: Service, name: cart}]
  retryConstraint: {budget: {percent: 10, interval: 10s}, minRetryRate: {count: 1, interval: 1s}}
---
apiVersion: gateway.networking.x-k8s.io/v1alpha1
kind: XBackendTrafficPolicy
metadata: {name: b, namespace: shop}
spec:
  targetRefs: [{group: '', kind: Service, name: cart}, {group: '', kind: Service, name: other}]
  sessionPersistence: {sessionName: s}
";
    let targets = [
        "[{kind: Service, name: cart}]",
        "[{kind: Service, name: cart, sectionName: http}]",
        "[{kind: HTTPRoute, name: r}]",
        "[{kind: HTTPRoute, name: r, sectionName: slow}]",
        "[{kind: ExternalService, name: a}]",
        "[]",
    ];
    let mut text = core.to_owned();
    for (index, targets) in targets.iter().enumerate() {
        for name in ["one", "two"] {
            let spec = format!("{{targetRefs: {targets}, retries: {{budget: {{percent: 5}}}}}}");
            let created = if index % 2 == 0 { OLD } else { NEW };
            text += &ours("TrafficPolicy", name, created, &spec);
        }
    }
    for name in ["a", "b"] {
        for hosts in ["api.example.org", "www.example.org"] {
            let ports = "ports: [{port: 443, appProtocol: tls}]";
            let spec = format!("{{hosts: [{hosts}], {ports}, resolution: DNS}}");
            text += &ours("ExternalService", name, OLD, &spec);
            let by_address = "addresses: [203.0.113.7], resolution: Passthrough";
            let spec = format!("{{hosts: [{hosts}], {ports}, {by_address}}}");
            text += &ours("ExternalService", name, OLD, &spec);
        }
        for created in [OLD, NEW] {
            text += &ours("EgressPolicy", name, created, "{mode: AllowAny}");
            for spec in ["{}", "{selector: {matchLabels: {app: cart}}}"] {
                text += &ours("PeerAuthentication", name, created, spec);
                text += &ours("Telemetry", name, created, spec);
            }
        }
    }
    for labels in ["app: cart", "app: other"] {
        text += &workload("w", labels);
        text += &workload("w", labels).replace("10.0.0.1", "203.0.113.7");
        text += &workload("ww", labels);
    }
    objects(&text)
}

#[derive(Clone, Debug)]
enum Step {
    Set(usize),
    Remove(usize),
    Unreadable(usize),
    Generation(usize, i64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let one = prop_oneof![
        6 => any::<prop::sample::Index>().prop_map(|i| Step::Set(i.index(1 << 16))),
        2 => any::<prop::sample::Index>().prop_map(|i| Step::Remove(i.index(1 << 16))),
        1 => any::<prop::sample::Index>().prop_map(|i| Step::Unreadable(i.index(1 << 16))),
        1 => (any::<prop::sample::Index>(), 1i64..4)
            .prop_map(|(i, generation)| Step::Generation(i.index(1 << 16), generation)),
    ];
    prop::collection::vec(one, 1..60)
}

proptest! {
    #[test]
    fn a_change_names_everybody_of_whom_something_else_is_said(steps in steps()) {
        let mut world = World::default();
        let mut known: BTreeMap<ObjectRef, ObjectStatus> = BTreeMap::new();
        for step in steps {
            let at = |index: usize| &POOL[index % POOL.len()];
            let change = match step {
                Step::Set(index) => Change::Set(Box::new(at(index).clone())),
                Step::Remove(index) => Change::Remove(at(index).reference()),
                Step::Unreadable(index) => unreadable(at(index).reference(), 7, Vec::new()),
                Step::Generation(index, generation) => {
                    let object = at(index).reference();
                    // Of what is not there nobody tells one.
                    if world.object(&object).is_none() {
                        continue;
                    }
                    Change::Generation { object, generation }
                }
            };
            let mut dirty = Dirty::default();
            world.apply(change, &mut dirty);
            for object in &dirty.said {
                match status_of(&world, object) {
                    Some(status) => known.insert(object.clone(), status),
                    None => known.remove(object),
                };
            }
            let all: BTreeMap<ObjectRef, ObjectStatus> = with_status(&world)
                .into_iter()
                .filter_map(|object| Some((object.clone(), status_of(&world, &object)?)))
                .collect();
            prop_assert_eq!(&known, &all);
        }
    }
}
