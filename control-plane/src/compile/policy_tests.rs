//! Policies of routes, rules, namespaces and backends: which is used, field by field, and what is
//! said of those that are not.

use std::path::Path;

use weft_api::proto::resource::Body;
use weft_api::proto::{Destination, ResourceKey, ResourceKind, Route, Trust};

use super::{Settings, compile, problems, status_of};
use crate::model::{Change, Dirty, Kind, Name, ObjectRef, World};
use crate::sources::folder::manifest;

const SHOP: &str = "
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  ports: [{name: http, port: 80}, {name: grpc, port: 7070}]
---
apiVersion: v1
kind: Service
metadata: {name: v1, namespace: shop}
spec: {clusterIP: 10.96.0.2, ports: [{port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: echo, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: echo, port: 80}]
  rules:
  - name: slow
    matches: [{path: {value: /slow}}]
    timeouts: {backendRequest: 7s}
    backendRefs: [{name: v1, port: 80}]
  - backendRefs: [{name: v1, port: 80}]
";

fn add(world: &mut World, text: &str) -> Dirty {
    let (parsed, _) = manifest::parse(Path::new("test.yaml"), text)
        .unwrap_or_else(|findings| panic!("{findings:?}"));
    let mut dirty = Dirty::default();
    for parsed in parsed {
        world.apply(Change::Set(Box::new(parsed.object)), &mut dirty);
    }
    dirty
}

fn world(policies: &[String]) -> World {
    let mut world = World::default();
    add(&mut world, SHOP);
    for policy in policies {
        add(&mut world, policy);
    }
    world
}

fn policy(name: &str, targets: &str, spec: &str) -> String {
    format!(
        "apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {{name: {name}, namespace: shop}}
spec:
  targetRefs: [{targets}]
{spec}
"
    )
}

fn backend_policy(name: &str, targets: &str, spec: &str) -> String {
    format!(
        "apiVersion: gateway.networking.x-k8s.io/v1alpha1
kind: XBackendTrafficPolicy
metadata: {{name: {name}, namespace: shop}}
spec:
  targetRefs: [{targets}]
{spec}
"
    )
}

fn destination(world: &World, address: &str) -> Destination {
    let settings = Settings {
        trust_domain: "cluster.local".to_owned(),
        sampling_percent: 1.0,
    };
    let key = ResourceKey {
        kind: ResourceKind::Destination.into(),
        name: address.to_owned(),
    };
    let compiled = compile(world, &settings, &key, &Trust::default(), "shop");
    match compiled.resource.body {
        Some(Body::Destination(destination)) => destination,
        other => panic!("{address}: {other:?}"),
    }
}

fn named<'d>(destination: &'d Destination, name: &str) -> &'d Route {
    let found = destination.routes.iter().find(|route| route.name == name);
    found.unwrap_or_else(|| panic!("{destination:?}"))
}

/// Each ancestor of a policy with its conditions.
fn conditions(world: &World, kind: Kind, name: &str) -> Vec<String> {
    let object = ObjectRef {
        kind,
        name: Name::new("shop", name),
    };
    let status = status_of(world, &object);
    status
        .unwrap_or_else(|| panic!("{object} has no status"))
        .parents
        .iter()
        .map(|ancestor| {
            let conditions = ancestor.conditions.iter();
            let conditions: Vec<String> = conditions
                .map(|c| format!("{}={} {}", c.kind, c.status, c.reason))
                .collect();
            let parent = &ancestor.parent;
            let section = parent.section_name.as_ref();
            format!(
                "{} {}{}: {}",
                parent.kind.as_deref().unwrap_or_default(),
                parent.name,
                section.map_or(String::new(), |section| format!("/{section}")),
                conditions.join(", ")
            )
        })
        .collect()
}

#[test]
fn the_rule_goes_before_the_route_the_port_the_service_and_the_namespace() {
    let world = world(&[
        policy(
            "rule",
            "{kind: HTTPRoute, name: echo, sectionName: slow}",
            "  timeouts: {request: 1s}",
        ),
        policy(
            "route",
            "{group: gateway.networking.k8s.io, kind: HTTPRoute, name: echo}",
            "  timeouts: {request: 2s, perTry: 2s}\n  retries: {attempts: 2}",
        ),
        policy(
            "port",
            "{kind: Service, name: echo, sectionName: http}",
            "  timeouts: {request: 3s}\n  retries: {attempts: 3, codes: [503]}",
        ),
        policy(
            "service",
            "{kind: Service, name: echo}",
            "  timeouts: {request: 4s, idle: 4s}",
        ),
        policy(
            "namespace",
            "{kind: Namespace, name: shop}",
            "  timeouts: {idle: 5s, connect: 5500ms}\n  retries: {maxBodyBytes: 5}",
        ),
    ]);
    let table = destination(&world, "10.96.0.1:80");
    let seen = |route: &str| {
        let route = named(&table, route);
        let policy = route.policy.as_ref().unwrap();
        let retry = policy.retry.as_ref().unwrap();
        (
            policy.request_timeout_ms,
            policy.per_try_timeout_ms,
            policy.idle_timeout_ms,
            retry.attempts,
            retry.status_codes.clone(),
            retry.max_body_bytes,
        )
    };
    // The rule's own timeout goes before all of them.
    assert_eq!(
        seen("HTTPRoute/shop/echo/slow"),
        (1000, 7000, 4000, 2, vec![503], 5)
    );
    assert_eq!(
        seen("HTTPRoute/shop/echo/1"),
        (2000, 2000, 4000, 2, vec![503], 5)
    );
    // The backend is another Service: only the namespace's default is about it.
    let backend = named(&table, "HTTPRoute/shop/echo/1").backends[0]
        .backend
        .as_ref();
    let backend = backend.unwrap().policy.as_ref().unwrap();
    assert_eq!(backend.connect_timeout_ms, 5500);
    // Requests to the other port take no route.
    let table = destination(&world, "10.96.0.1:7070");
    let policy = table.routes[0].policy.as_ref().unwrap();
    assert_eq!(policy.request_timeout_ms, 4000);
    assert_eq!(policy.retry.as_ref().unwrap().attempts, 2, "the default");
    for name in ["rule", "route", "port", "service", "namespace"] {
        let found = conditions(&world, Kind::TrafficPolicy, name);
        assert!(
            found.len() == 1 && found[0].ends_with(": Accepted=true Accepted"),
            "{found:?}"
        );
    }
    assert!(
        problems(&world)
            .iter()
            .all(|p| p.object.kind != Kind::TrafficPolicy)
    );
}

#[test]
fn each_target_has_its_own_conditions() {
    let world = world(&[
        policy(
            "a",
            "{kind: HTTPRoute, name: echo}, {kind: Service, name: v1}",
            "  timeouts: {request: 1s}",
        ),
        policy(
            "b",
            "{kind: HTTPRoute, name: echo}, {kind: HTTPRoute, name: echo, sectionName: slow}, \
             {kind: HTTPRoute, name: echo, sectionName: quick}, {kind: GRPCRoute, name: echo}, \
             {kind: Service, name: v1, sectionName: '81'}, {kind: Service, name: nobody}",
            "  timeouts: {request: 2s}",
        ),
        policy("c", "", "  timeouts: {request: 3s}"),
        policy(
            "d",
            "{kind: Namespace, name: shop}",
            "  timeouts: {request: 4s}",
        ),
    ]);
    let traffic = |name: &str| conditions(&world, Kind::TrafficPolicy, name);
    assert_eq!(
        traffic("a"),
        [
            "HTTPRoute echo: Accepted=true Accepted",
            "Service v1: Accepted=true Accepted",
        ]
    );
    assert_eq!(
        traffic("b"),
        [
            "HTTPRoute echo: Accepted=false Conflicted",
            "HTTPRoute echo/slow: Accepted=true Accepted",
            "HTTPRoute echo/quick: Accepted=false TargetNotFound",
            "GRPCRoute echo: Accepted=false TargetNotFound",
            "Service v1/81: Accepted=false TargetNotFound",
            "Service nobody: Accepted=false TargetNotFound",
        ]
    );
    assert_eq!(traffic("c"), ["Namespace shop: Accepted=true Accepted"]);
    assert_eq!(traffic("d"), ["Namespace shop: Accepted=false Conflicted"]);
    let of = |name: &str| {
        let found = problems(&world);
        let found = found.iter().filter(|p| p.object.name.name == name);
        found.count()
    };
    assert_eq!((of("a"), of("b"), of("c"), of("d")), (0, 5, 0, 1));
    let table = destination(&world, "10.96.0.1:80");
    let timeout = |route: &str| {
        named(&table, route)
            .policy
            .as_ref()
            .unwrap()
            .request_timeout_ms
    };
    assert_eq!(timeout("HTTPRoute/shop/echo/slow"), 2000);
    assert_eq!(timeout("HTTPRoute/shop/echo/1"), 1000);
}

#[test]
fn what_is_about_endpoints_is_not_said_of_a_route() {
    for (targets, spec, refused) in [
        (
            "{kind: HTTPRoute, name: echo}",
            "timeouts: {connect: 1s}",
            true,
        ),
        (
            "{kind: HTTPRoute, name: echo}",
            "loadBalancer: {algorithm: Random}",
            true,
        ),
        (
            "{kind: GRPCRoute, name: echo}",
            "circuitBreaker: {limits: {maxRequests: 1}}",
            true,
        ),
        (
            "{kind: HTTPRoute, name: echo}",
            "circuitBreaker: {fallback: {response: {status: 200}}}",
            false,
        ),
        (
            "{kind: Service, name: echo}",
            "timeouts: {connect: 1s}",
            false,
        ),
        (
            "{group: apps, kind: Service, name: echo}",
            "timeouts: {}",
            true,
        ),
        (
            "{group: core, kind: HTTPRoute, name: echo}",
            "timeouts: {}",
            true,
        ),
        ("{kind: Namespace, name: other}", "timeouts: {}", true),
        (
            "{kind: Namespace, name: shop, sectionName: x}",
            "timeouts: {}",
            true,
        ),
    ] {
        let text = policy("a", targets, &format!("  {spec}"));
        let parsed = manifest::parse(Path::new("test.yaml"), &text);
        assert_eq!(parsed.is_err(), refused, "{targets} {spec}: {parsed:?}");
    }
}

#[test]
fn a_policy_touches_the_parents_of_its_route() {
    let mut world = world(&[]);
    let text = policy(
        "a",
        "{kind: HTTPRoute, name: echo}",
        "  timeouts: {request: 1s}",
    );
    let dirty = add(&mut world, &text);
    assert!(dirty.services.contains(&Name::new("shop", "echo")) && !dirty.said.is_empty());
    assert!(!dirty.services.contains(&Name::new("shop", "v1")));
}

#[test]
fn a_backends_policy_holds_on_every_way_to_it() {
    let mut world = world(&[backend_policy(
        "v1",
        "{group: '', kind: Service, name: v1}",
        "  sessionPersistence: {sessionName: stay, type: Header}
  retryConstraint: {budget: {percent: 5, interval: 1m}, minRetryRate: {count: 2, interval: 2s}}",
    )]);
    let seen = |world: &World| {
        let ways = [
            destination(world, "10.96.0.2:80"),
            destination(world, "10.96.0.1:80"),
        ];
        ways.map(|table| {
            let backend = table.routes[0].backends[0].backend.clone().unwrap();
            let policy = backend.policy.unwrap();
            (
                policy
                    .session_persistence
                    .map(|session| (session.name, session.header, session.by_path)),
                policy
                    .retry_constraint
                    .map(|c| (c.percent, c.interval_ms, c.min_count, c.min_interval_ms)),
            )
        })
    };
    let both = (
        Some(("stay".to_owned(), true, false)),
        Some((5, 60_000, 2, 2_000)),
    );
    assert_eq!(seen(&world), [both.clone(), both.clone()]);
    let of = |world: &World, name: &str| conditions(world, Kind::XBackendTrafficPolicy, name);
    assert_eq!(of(&world, "v1"), ["Service v1: Accepted=true Accepted"]);

    // A TrafficPolicy's budget for the same Service goes before the constraint, which is said.
    let budget = "  retries: {budget: {percent: 50}}";
    add(
        &mut world,
        &policy("v1", "{kind: Service, name: v1}", budget),
    );
    assert_eq!(seen(&world)[0], (both.0.clone(), None));
    assert_eq!(
        of(&world, "v1"),
        ["Service v1: Accepted=true Accepted, Overridden=true Overridden"]
    );
    assert!(problems(&world).iter().any(|problem| {
        problem.object.kind == Kind::XBackendTrafficPolicy
            && problem
                .message
                .contains("retries.budget of TrafficPolicy shop/v1")
    }));

    // The namespace's default does not.
    add(
        &mut world,
        &policy("v1", "{kind: Namespace, name: shop}", budget),
    );
    assert_eq!(seen(&world)[0], both);

    // Of two for a Service one is used.
    let other = "  retryConstraint: {}";
    let target =
        "{kind: Service, name: v1}, {kind: Service, name: nobody}, {kind: Bucket, name: x}";
    add(&mut world, &backend_policy("w", target, other));
    assert_eq!(
        of(&world, "w"),
        [
            "Service v1: Accepted=false Conflicted",
            "Service nobody: Accepted=false TargetNotFound",
            "Bucket x: Accepted=false Invalid",
        ]
    );
    assert_eq!(seen(&world)[0], both);
}

#[test]
fn a_backends_policy_that_makes_no_sense_is_not_used() {
    for bad in [
        "  retryConstraint: {budget: {percent: 101}}",
        "  retryConstraint: {budget: {interval: 500ms}}",
        "  retryConstraint: {budget: {interval: 61m}}",
        "  retryConstraint: {minRetryRate: {count: 0}}",
        "  retryConstraint: {jitter: 1}",
        "  sessionPersistence: {type: Address}",
        "  loadBalancer: {}",
    ] {
        let target = "{group: '', kind: Service, name: v1}";
        let world = world(&[backend_policy("v1", target, bad)]);
        let found = conditions(&world, Kind::XBackendTrafficPolicy, "v1");
        assert_eq!(found, ["Service v1: Accepted=false Invalid"], "{bad}");
        let table = destination(&world, "10.96.0.2:80");
        let backend = table.routes[0].backends[0].backend.as_ref().unwrap();
        let policy = backend.policy.as_ref().unwrap();
        assert!(policy.retry_constraint.is_none() && policy.session_persistence.is_none());
    }
}

/// "object field.path: message; help" of what is found.
fn found(world: &World) -> Vec<String> {
    let problems = problems(world).into_iter();
    problems
        .map(|p| {
            format!(
                "{} {}: {}; {}",
                p.object,
                p.path.join("."),
                p.message,
                p.help
            )
        })
        .collect()
}

#[test]
fn what_is_meant_for_nobody_or_says_nothing_is_found() {
    let mut world = world(&[
        policy(
            "rule",
            "{kind: HTTPRoute, name: echo, sectionName: nope}",
            "  timeouts: {request: 1s}",
        ),
        policy("mute", "{kind: Service, name: v1}", ""),
        policy("elsewhere", "", "  timeouts: {request: 1s}")
            .replace("namespace: shop", "namespace: empty"),
    ]);
    add(
        &mut world,
        "
apiVersion: v1
kind: Service
metadata: {name: two, namespace: shop}
spec: {clusterIP: 10.96.0.9, ports: [{name: http, port: 80}, {port: 81}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: zero, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: v1}]
  rules: [{backendRefs: [{name: v1, port: 80, weight: 0}]}]
",
    );
    let found = found(&world);
    for wanted in [
        "TrafficPolicy shop/rule spec.targetRefs.0.sectionName: HTTPRoute shop/echo has no rule named 'nope'; write the name of one of its rules (rules[].name)",
        "TrafficPolicy shop/mute spec: it names whom it is for, and says nothing; ",
        "TrafficPolicy empty/elsewhere spec: it is the default of namespace empty, and there is no Service or ExternalService in namespace empty; ",
        "Service shop/two spec.ports.1.name: port 81 of Service shop/two has no name, and there are others",
        "HTTPRoute shop/zero spec.rules.0.backendRefs: all backendRefs of rules[0] have weight 0: its requests are answered 500; ",
    ] {
        let number = found.iter().filter(|one| one.starts_with(wanted)).count();
        assert_eq!(number, 1, "{wanted} is not in {found:#?}");
    }
}
