use std::path::Path;

use proptest::prelude::*;
use weft_api::proto::load_balancer::HashKey;
use weft_api::proto::resource::Body;
use weft_api::proto::{
    AccessLog, Algorithm, BackendPolicy, Destination, Endpoint, Endpoints, Health, MtlsMode,
    Protocol, ResourceKey, ResourceKind, RoutePolicy, Trust, Workload, fallback,
};

use super::{Compiled, Settings, compile, problems};
use crate::finding::Severity;
use crate::model::{Change, Dirty, Name, Object, World};
use crate::sources::folder::manifest;

fn world(manifests: &str) -> World {
    let mut world = World::default();
    let (parsed, _) = manifest::parse(Path::new("test.yaml"), manifests)
        .unwrap_or_else(|findings| panic!("{findings:?}"));
    for parsed in parsed {
        world.apply(Change::Set(Box::new(parsed.object)), &mut Dirty::default());
    }
    world
}

/// Sets the objects of these manifests, too.
pub(super) fn change(world: &mut World, manifests: &str, dirty: &mut Dirty) {
    let (parsed, _) = manifest::parse(Path::new("test.yaml"), manifests)
        .unwrap_or_else(|findings| panic!("{findings:?}"));
    for parsed in parsed {
        world.apply(Change::Set(Box::new(parsed.object)), dirty);
    }
}

fn resource(world: &World, kind: ResourceKind, name: &str) -> Compiled {
    let settings = Settings {
        trust_domain: "cluster.local".to_owned(),
        sampling_percent: 1.0,
    };
    let key = ResourceKey {
        kind: kind.into(),
        name: name.to_owned(),
    };
    compile(world, &settings, &key, &Trust::default(), "")
}

fn destination(world: &World, name: &str) -> Option<Destination> {
    match resource(world, ResourceKind::Destination, name)
        .resource
        .body
    {
        Some(Body::Destination(destination)) => Some(destination),
        _ => None,
    }
}

fn endpoints(world: &World, name: &str) -> Option<Vec<Endpoint>> {
    match resource(world, ResourceKind::Endpoints, name).resource.body {
        Some(Body::Endpoints(Endpoints { endpoints, .. })) => Some(endpoints),
        _ => None,
    }
}

fn addresses(world: &World, name: &str) -> Vec<String> {
    endpoints(world, name)
        .unwrap_or_default()
        .into_iter()
        .map(|endpoint| endpoint.address)
        .collect()
}

pub(super) fn workload(world: &World, name: &str) -> Workload {
    match resource(world, ResourceKind::Workload, name).resource.body {
        Some(Body::Workload(workload)) => workload,
        other => panic!("{other:?}"),
    }
}

pub(super) fn route_policy(world: &World, name: &str) -> RoutePolicy {
    let destination = destination(world, name).expect("a destination");
    destination.routes[0].policy.clone().expect("a policy")
}

pub(super) fn backend_policy(world: &World, name: &str) -> BackendPolicy {
    let destination = destination(world, name).expect("a destination");
    let backend = destination.routes[0].backends[0].backend.clone();
    backend
        .and_then(|backend| backend.policy)
        .expect("a policy")
}

const SHOP: &str = "
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec:
  clusterIPs: [10.96.0.15, 'fd00::15']
  selector: {app: cart}
  ports:
    - {name: http, port: 80, targetPort: web}
    - {name: admin, port: 9000, targetPort: 9001, appProtocol: tcp}
    - {name: dns, port: 53, protocol: UDP}
---
apiVersion: policy.weft.dev/v1alpha1
kind: Workload
metadata: {name: cart-1, namespace: shop, labels: {app: cart}}
spec: {addresses: [10.0.0.1, 'fd00::1'], serviceAccount: cart, zone: a, ports: [{name: web, port: 8080}]}
---
apiVersion: policy.weft.dev/v1alpha1
kind: Workload
metadata: {name: cart-2, namespace: shop, labels: {app: cart, version: v2}}
spec: {addresses: [10.0.0.2], serviceAccount: cart, weight: 3, health: NotReady, sidecar: false, ports: [{name: web, port: 8081}]}
---
apiVersion: policy.weft.dev/v1alpha1
kind: Workload
metadata: {name: cart-1, namespace: other, labels: {app: cart}}
spec: {addresses: [10.0.0.3], ports: [{name: web, port: 8080}]}
";

pub(super) fn with(more: &str) -> World {
    world(&format!("{SHOP}\n---\n{more}"))
}

#[test]
fn a_service_is_found_by_address_and_by_name() {
    let world = world(SHOP);
    for name in [
        "10.96.0.15:80",
        "[fd00::15]:80",
        "cart.shop:80",
        "cart.shop.svc:80",
        "cart.shop.svc.cluster.local:80",
        "Cart.Shop.svc.cluster.local.:80",
    ] {
        let found = destination(&world, name).unwrap_or_else(|| panic!("{name}"));
        assert_eq!((found.service.as_str(), found.port), ("cart", 80), "{name}");
        assert_eq!(found.port_name, "http");
        assert_eq!(found.protocol(), Protocol::Http);
        assert_eq!(found.routes.len(), 1);
        let backend = found.routes[0].backends[0].backend.clone().unwrap();
        assert_eq!(backend.endpoints, "shop/cart:80");
    }
    for name in [
        "10.96.0.15:81",
        "10.96.0.15:53",
        "10.96.0.16:80",
        "cart:80",
        "cart.other:80",
        "cart.shop.example:80",
        "cart.shop",
        "cart.shop:http",
        "",
        ":",
    ] {
        assert!(destination(&world, name).is_none(), "{name}");
    }
    let admin = destination(&world, "10.96.0.15:9000").unwrap();
    assert_eq!(admin.protocol(), Protocol::Tcp);
}

#[test]
fn endpoints_are_the_selected_workloads_of_the_namespace() {
    let world = world(SHOP);
    let found = endpoints(&world, "shop/cart:80").unwrap();
    assert_eq!(
        found,
        [
            Endpoint {
                address: "10.0.0.1:8080".to_owned(),
                identity: "spiffe://cluster.local/ns/shop/sa/cart".to_owned(),
                workload: "shop/cart-1".to_owned(),
                zone: "a".to_owned(),
                weight: 1,
                health: Health::Ready.into(),
                ..Endpoint::default()
            },
            Endpoint {
                address: "10.0.0.2:8081".to_owned(),
                identity: String::new(),
                workload: "shop/cart-2".to_owned(),
                zone: String::new(),
                weight: 3,
                health: Health::NotReady.into(),
                ..Endpoint::default()
            },
        ]
    );
    assert_eq!(
        addresses(&world, "shop/cart:9000"),
        ["10.0.0.1:9001", "10.0.0.2:9001"]
    );
    assert_eq!(endpoints(&world, "shop/cart:81"), None);
    assert_eq!(endpoints(&world, "shop/none:80"), None);
}

#[test]
fn a_workload_addressed_directly_has_mutual_tls_but_no_service_policy() {
    let world = with(
        "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: default, namespace: shop}
spec: {timeouts: {request: 1s}}
",
    );
    for name in ["10.0.0.1:8080", "[fd00::1]:8080", "10.0.0.1:4711"] {
        let found = destination(&world, name).unwrap();
        assert_eq!(found.service, "cart-1");
        let policy = found.routes[0].policy.clone().unwrap();
        assert_eq!(policy.request_timeout_ms, 0);
        let backend = found.routes[0].backends[0].backend.clone().unwrap();
        assert!(backend.endpoints.starts_with("workload/shop/cart-1:"));
        let found = endpoints(&world, &backend.endpoints).unwrap();
        assert_eq!(found[0].identity, "spiffe://cluster.local/ns/shop/sa/cart");
    }
    // Port 8080 is HTTP because a Service that leads there says so.
    assert_eq!(
        destination(&world, "10.0.0.1:8080").unwrap().protocol(),
        Protocol::Http
    );
    assert_eq!(
        destination(&world, "10.0.0.1:4711").unwrap().protocol(),
        Protocol::Auto
    );
    // Asked for by address, it is used whether it is ready or not.
    let direct = endpoints(&world, "workload/shop/cart-2:8081").unwrap();
    assert_eq!(direct[0].health(), Health::Ready);
}

#[test]
fn endpoint_slices_say_who_is_ready() {
    let world = with(
        "
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: None, ports: [{name: pg, port: 5432}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-1, namespace: shop, labels: {kubernetes.io/service-name: db}}
addressType: IPv4
ports: [{name: pg, port: 15432}, {name: other, port: 1}]
endpoints:
  - {addresses: [10.0.1.1]}
  - {addresses: [10.0.1.2], conditions: {ready: false}}
  - {addresses: [10.0.1.3], conditions: {ready: false, serving: true, terminating: true}, zone: b}
  - {addresses: [10.0.1.4], conditions: {ready: false, serving: false, terminating: true}}
  - {addresses: [10.0.0.1], conditions: {ready: true}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-6, namespace: shop, labels: {kubernetes.io/service-name: db}}
addressType: IPv6
ports: [{name: pg, port: 15432}]
endpoints: [{addresses: ['fd00::1']}]
",
    );
    let found = endpoints(&world, "shop/db:5432").unwrap();
    let seen: Vec<(&str, Health, &str)> = found
        .iter()
        .map(|endpoint| {
            (
                endpoint.address.as_str(),
                endpoint.health(),
                endpoint.identity.as_str(),
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            // A workload at that address has a proxy before it; its IPv6 twin is the same one.
            (
                "10.0.0.1:15432",
                Health::Ready,
                "spiffe://cluster.local/ns/shop/sa/cart"
            ),
            ("10.0.1.1:15432", Health::Ready, ""),
            ("10.0.1.2:15432", Health::NotReady, ""),
            ("10.0.1.3:15432", Health::Draining, ""),
            ("10.0.1.4:15432", Health::NotReady, ""),
        ]
    );
    // Headless: by name only.
    assert!(destination(&world, "db.shop:5432").is_some());
}

#[test]
fn without_a_policy_the_defaults_hold() {
    let world = world(SHOP);
    let found = destination(&world, "cart.shop:80").unwrap();
    assert_eq!(route_policy(&world, "cart.shop:80"), RoutePolicy::default());
    let backend = found.routes[0].backends[0].backend.clone().unwrap();
    let policy = backend.policy.unwrap();
    assert_eq!(policy.connect_timeout_ms, 5_000);
    let balancer = policy.load_balancer.unwrap();
    assert_eq!(balancer.algorithm(), Algorithm::PeakEwma);
    assert_eq!(balancer.panic_threshold_percent, 50);
    let outlier = policy.outlier_detection.unwrap();
    assert_eq!(outlier.consecutive_gateway_errors, 5);
    assert_eq!(
        (outlier.base_ejection_ms, outlier.max_ejection_percent),
        (30_000, 50)
    );
}

#[test]
fn the_most_specific_policy_wins_field_by_field() {
    let world = with(
        "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: all, namespace: shop}
spec:
  timeouts: {connect: 1s, request: 10s, idle: 60s}
  circuitBreaker: {limits: {maxRequests: 100, maxConnections: 10}}
  loadBalancer: {algorithm: RoundRobin}
---
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: cart, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart}]
  timeouts: {request: 5s}
  circuitBreaker: {limits: {maxRequests: 50}, outlierDetection: {consecutiveGatewayErrors: 0}}
  retries: {attempts: 1, codes: [503]}
---
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: cart-http, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart, sectionName: http}]
  timeouts: {request: 0s}
  retries: {grpcCodes: [UNAVAILABLE], conditions: [Timeout]}
---
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: elsewhere, namespace: other}
spec: {timeouts: {request: 99s}}
",
    );
    let timeouts = |name| {
        let policy = route_policy(&world, name);
        (policy.request_timeout_ms, policy.idle_timeout_ms)
    };
    assert_eq!(timeouts("cart.shop:80"), (0, 60_000));
    assert_eq!(timeouts("cart.shop:9000"), (5_000, 60_000));
    let found = destination(&world, "cart.shop:80").unwrap();
    let policy = found.routes[0].backends[0]
        .backend
        .clone()
        .unwrap()
        .policy
        .unwrap();
    let limits = policy.limits.unwrap();
    assert_eq!((limits.max_requests, limits.max_connections), (50, 10));
    assert_eq!(policy.connect_timeout_ms, 1_000);
    assert_eq!(
        policy.load_balancer.unwrap().algorithm(),
        Algorithm::RoundRobin
    );
    assert_eq!(
        policy.outlier_detection.unwrap().consecutive_gateway_errors,
        0
    );
    let retry = route_policy(&world, "cart.shop:80").retry.unwrap();
    assert_eq!((retry.attempts, retry.status_codes), (1, vec![503]));
    assert_eq!(retry.grpc_codes, [14]);
    assert!(retry.timeout && !retry.reset && !retry.connect_failure);
    assert_eq!(
        (retry.budget_percent, retry.budget_min_per_second),
        (20, 10)
    );
    assert_eq!((retry.backoff_base_ms, retry.backoff_max_ms), (25, 250));
}

#[test]
fn of_two_policies_for_the_same_target_the_older_is_used_and_the_other_named() {
    let policy = |name: &str, created: &str, timeout: &str| {
        format!(
            "
---
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {{name: {name}, namespace: shop{created}}}
spec:
  targetRefs: [{{kind: Service, name: cart}}]
  timeouts: {{request: {timeout}}}
"
        )
    };
    let by_name = with(&(policy("a", "", "1s") + &policy("b", "", "2s")));
    assert_eq!(
        route_policy(&by_name, "cart.shop:80").request_timeout_ms,
        1_000
    );
    let found: Vec<_> = problems(&by_name)
        .into_iter()
        .filter(|problem| problem.severity == Severity::Error)
        .collect();
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].object.name.name, "b");
    assert_eq!(found[0].path.join("."), "spec.targetRefs.0");
    let old = ", creationTimestamp: '2025-01-01T00:00:00Z'";
    let by_age = with(&(policy("a", "", "1s") + &policy("b", old, "2s")));
    assert_eq!(
        route_policy(&by_age, "cart.shop:80").request_timeout_ms,
        2_000
    );
}

#[test]
fn hash_keys_and_fallbacks() {
    let world = with(
        "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: hashed, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart, sectionName: '80'}]
  loadBalancer: {algorithm: Maglev, hashKey: {cookie: session}, panicThreshold: 0}
  circuitBreaker:
    fallback:
      response: {status: 200, headers: [{name: content-type, value: text/plain}], body: later}
---
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: to-other, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart, sectionName: admin}]
  circuitBreaker: {fallback: {backend: {name: cart, port: 80}}}
",
    );
    let found = destination(&world, "cart.shop:80").unwrap();
    let policy = found.routes[0].backends[0]
        .backend
        .clone()
        .unwrap()
        .policy
        .unwrap();
    let balancer = policy.load_balancer.unwrap();
    assert_eq!(
        balancer.hash_key,
        Some(HashKey::Cookie("session".to_owned()))
    );
    assert_eq!(balancer.panic_threshold_percent, 0);
    match route_policy(&world, "cart.shop:80")
        .fallback
        .unwrap()
        .action
    {
        Some(fallback::Action::Response(response)) => {
            assert_eq!(
                (response.status, response.body.as_slice()),
                (200, &b"later"[..])
            );
            assert_eq!(response.headers[0].name, "content-type");
        }
        other => panic!("{other:?}"),
    }
    match route_policy(&world, "cart.shop:9000")
        .fallback
        .unwrap()
        .action
    {
        Some(fallback::Action::Backend(backend)) => {
            assert_eq!(backend.endpoints, "shop/cart:80");
            // As that Service port is used by anybody: with its own policy.
            let balancer = backend.policy.unwrap().load_balancer.unwrap();
            assert_eq!(balancer.algorithm(), Algorithm::Maglev);
        }
        other => panic!("{other:?}"),
    }
    let compiled = resource(&world, ResourceKind::Destination, "cart.shop:9000");
    assert_eq!(
        compiled.endpoint_names(),
        ["shop/cart:80", "shop/cart:9000"]
    );
}

#[test]
fn the_own_workload_has_ports_modes_and_telemetry() {
    let policies = "
apiVersion: policy.weft.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: mesh, namespace: weft-system}
spec: {mtls: {mode: STRICT}}
---
apiVersion: policy.weft.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: v2, namespace: shop}
spec:
  selector: {matchLabels: {version: v2}}
  mtls: {mode: UNSET}
  portLevelMtls: {9001: {mode: DISABLE}, 7000: {mode: PERMISSIVE}}
---
apiVersion: policy.weft.dev/v1alpha1
kind: Telemetry
metadata: {name: all, namespace: shop}
spec: {tracing: {samplingPercent: 0.05, otlpEndpoint: 'http://collector:4317'}}
---
apiVersion: policy.weft.dev/v1alpha1
kind: Telemetry
metadata: {name: v2, namespace: shop}
spec: {selector: {matchLabels: {version: v2}}, tracing: {samplingPercent: 100}, accessLog: {mode: Errors}}
";
    let world = with(policies);
    let first = workload(&world, "shop/cart-1");
    assert_eq!(
        (first.service_account.as_str(), first.zone.as_str()),
        ("cart", "a")
    );
    assert_eq!(first.display_name, "cart");
    assert_eq!(first.mtls(), MtlsMode::Strict);
    let telemetry = first.telemetry.unwrap();
    assert_eq!(
        (telemetry.sampling_per_myriad, telemetry.access_log()),
        (5, AccessLog::Off)
    );
    let second = workload(&world, "shop/cart-2");
    assert_eq!(second.mtls(), MtlsMode::Strict, "UNSET asks the next one");
    let ports: Vec<_> = second
        .ports
        .iter()
        .map(|port| {
            (
                port.port,
                port.protocol(),
                port.mtls.map(|mode| MtlsMode::try_from(mode).unwrap()),
            )
        })
        .collect();
    assert_eq!(
        ports,
        [
            (7000, Protocol::Auto, Some(MtlsMode::Permissive)),
            (8081, Protocol::Http, None),
            (9001, Protocol::Tcp, Some(MtlsMode::Disable)),
        ]
    );
    let telemetry = second.telemetry.unwrap();
    assert_eq!(telemetry.sampling_per_myriad, 10_000);
    assert_eq!(telemetry.access_log(), AccessLog::Errors);
    assert_eq!(telemetry.otlp_endpoint, "http://collector:4317");
    // Without any policy.
    let plain = workload(&self::world(SHOP), "shop/cart-1");
    assert_eq!(plain.mtls(), MtlsMode::Permissive);
    assert_eq!(plain.telemetry.unwrap().sampling_per_myriad, 100);
}

#[test]
fn a_proxy_is_told_that_its_application_has_ended() {
    let mut world = world(SHOP);
    assert!(!workload(&world, "shop/cart-1").application_ended);
    let ended = crate::model::Workload {
        ended: true,
        ..world
            .workload(&Name::new("shop", "cart-1"))
            .unwrap()
            .clone()
    };
    let mut dirty = Dirty::default();
    let change = Change::Set(Box::new(Object::Workload(ended)));
    world.apply(change, &mut dirty);
    assert!(workload(&world, "shop/cart-1").application_ended);
    assert!(!workload(&world, "shop/cart-2").application_ended);
}

#[test]
fn a_version_is_of_the_content() {
    let (one, two) = (world(SHOP), world(SHOP));
    let version = |world: &World| resource(world, ResourceKind::Workload, "shop/cart-1").version();
    assert_eq!(version(&one), version(&two));
    let moved = world(&SHOP.replace("zone: a", "zone: b"));
    assert_ne!(version(&one), version(&moved));
    let absent = resource(&one, ResourceKind::Destination, "1.2.3.4:5");
    assert!(absent.is_absent());
    assert_ne!(absent.version(), 0);
}

#[test]
fn what_cannot_work_is_said() {
    let world = with(
        "
apiVersion: v1
kind: Service
metadata: {name: twin, namespace: shop}
spec: {clusterIP: 10.96.0.15, selector: {app: nobody}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: misled, namespace: shop}
spec: {clusterIP: 10.96.0.17, selector: {app: cart}, ports: [{port: 80, targetPort: 1}]}
---
apiVersion: policy.weft.dev/v1alpha1
kind: Workload
metadata: {name: zwilling, namespace: shop}
spec: {addresses: [10.0.0.1]}
---
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: lost, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: nobody}, {kind: Service, name: cart, sectionName: grpc}]
  circuitBreaker: {fallback: {backend: {name: cart, port: 81}}}
---
apiVersion: policy.weft.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: lost, namespace: shop}
spec: {selector: {matchLabels: {app: nobody}}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: lost, namespace: shop, labels: {kubernetes.io/service-name: nobody}}
endpoints: []
",
    );
    let found: Vec<String> = problems(&world)
        .into_iter()
        .map(|problem| {
            format!(
                "{} {} {}",
                problem.object,
                problem.path.join("."),
                problem.message
            )
        })
        .collect();
    for wanted in [
        "Service shop/twin spec.clusterIP 10.96.0.15:80 is also Service shop/cart",
        "Service shop/twin spec.selector no Workload in namespace shop has the labels app=nobody",
        "Service shop/misled spec.ports.0 port 80 of Service shop/misled leads to port 1",
        "Workload shop/zwilling spec.addresses 10.0.0.1 is also Workload shop/cart-1",
        "TrafficPolicy shop/lost spec.targetRefs.0.name there is no Service shop/nobody",
        "TrafficPolicy shop/lost spec.targetRefs.1.sectionName Service shop/cart has no port 'grpc'",
        "TrafficPolicy shop/lost spec.circuitBreaker.fallback.backend there is no Service shop/cart with port 81",
        "PeerAuthentication shop/lost spec.selector the selector matches no Workload",
        "EndpointSlice shop/lost metadata.labels there is no Service shop/nobody",
    ] {
        assert!(
            found.iter().any(|found| found.starts_with(wanted)),
            "{wanted}\n{found:#?}"
        );
    }
    // Port 9001 of cart's admin is in none of its workloads' lists.
    assert_eq!(found.len(), 10, "{found:#?}");
}

/// What a change touches, so that nothing else is compiled again.
#[test]
fn an_endpoint_change_touches_its_services_only() {
    let mut world = world(SHOP);
    let (parsed, _) = manifest::parse(
        Path::new("x.yaml"),
        "{apiVersion: policy.weft.dev/v1alpha1, kind: Workload, metadata: {name: cart-2, namespace: shop, labels: {app: cart}}, spec: {addresses: [10.0.0.2], serviceAccount: cart}}",
    )
    .unwrap();
    let change = Change::Set(Box::new(parsed[0].object.clone()));
    let mut dirty = Dirty::default();
    world.apply(change.clone(), &mut dirty);
    assert!(dirty.services.is_empty() && !dirty.all_workloads);
    assert_eq!(dirty.endpoints.len(), 1);
    assert_eq!(dirty.workloads.len(), 1);
    let mut again = Dirty::default();
    world.apply(change, &mut again);
    assert!(again.is_empty(), "the same again changes nothing");
}

proptest! {
    #[test]
    fn no_name_panics(name in "\\PC{0,40}", kind in 0i32..6) {
        let world = world(SHOP);
        let settings = Settings { trust_domain: "cluster.local".to_owned(), sampling_percent: 1.0 };
        let key = ResourceKey { kind, name };
        compile(&world, &settings, &key, &Trust::default(), "");
    }

    /// Whatever is set and removed in whatever order, the world is the one built from what is left.
    #[test]
    fn the_world_is_what_is_left(steps in proptest::collection::vec((0usize..12, any::<bool>()), 1..40)) {
        let (objects, _) = manifest::parse(Path::new("x.yaml"), &many()).unwrap();
        let mut stepped = World::default();
        let mut left = std::collections::BTreeMap::new();
        for (index, set) in steps {
            let object = objects[index % objects.len()].object.clone();
            let reference = object.reference();
            if set {
                left.insert(reference, object.clone());
                stepped.apply(Change::Set(Box::new(object)), &mut Dirty::default());
            } else {
                left.remove(&reference);
                stepped.apply(Change::Remove(reference), &mut Dirty::default());
            }
        }
        let mut built = World::default();
        for object in left.into_values() {
            built.apply(Change::Set(Box::new(object)), &mut Dirty::default());
        }
        for (kind, name) in [
            (ResourceKind::Destination, "10.96.0.1:80"),
            (ResourceKind::Destination, "10.96.0.2:80"),
            (ResourceKind::Destination, "10.0.0.1:80"),
            (ResourceKind::Destination, "10.0.0.2:80"),
            (ResourceKind::Endpoints, "default/a:80"),
            (ResourceKind::Endpoints, "default/b:80"),
            (ResourceKind::Workload, "default/w"),
        ] {
            prop_assert_eq!(resource(&stepped, kind, name), resource(&built, kind, name));
        }
        prop_assert_eq!(problems(&stepped), problems(&built));
    }
}

/// Objects that get in each other's way, some of the same name.
fn many() -> String {
    let mut text = String::new();
    for (name, vip) in [("a", 1), ("a", 2), ("b", 1), ("b", 2)] {
        text += &format!(
            "---\n{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {{clusterIP: 10.96.0.{vip}, selector: {{app: x}}, ports: [{{port: 80}}]}}}}\n"
        );
    }
    for (name, address, app) in [("w", 1, "x"), ("w", 2, "y"), ("v", 1, "x"), ("v", 2, "x")] {
        text += &format!(
            "---\n{{apiVersion: policy.weft.dev/v1alpha1, kind: Workload, metadata: {{name: {name}, labels: {{app: {app}}}}}, spec: {{addresses: [10.0.0.{address}]}}}}\n"
        );
    }
    for (name, service, address) in [("s", "a", 1), ("s", "b", 2), ("t", "a", 2), ("t", "a", 9)] {
        text += &format!(
            "---\n{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {{name: {name}, labels: {{kubernetes.io/service-name: {service}}}}}, ports: [{{port: 8080}}], endpoints: [{{addresses: [10.0.0.{address}]}}]}}\n"
        );
    }
    text
}
