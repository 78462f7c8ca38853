//! What ExternalServices and EgressPolicies compile to.

use std::collections::BTreeSet;
use std::path::Path;

use weft_api::proto::resource::Body;
use weft_api::proto::{
    Backend, Destination, Endpoints, Protocol, ResourceKey, ResourceKind, Trust,
};

use super::{Settings, compile, problems, special_clients};
use crate::model::{Change, Dirty, World};
use crate::sources::folder::manifest;

fn apply(world: &mut World, manifests: &str) -> Dirty {
    let mut dirty = Dirty::default();
    let (parsed, _) = manifest::parse(Path::new("test.yaml"), manifests)
        .unwrap_or_else(|findings| panic!("{findings:?}"));
    for parsed in parsed {
        world.apply(Change::Set(Box::new(parsed.object)), &mut dirty);
    }
    dirty
}

fn world(manifests: &str) -> World {
    let mut world = World::default();
    apply(&mut world, manifests);
    world
}

fn body(world: &World, kind: ResourceKind, name: &str, client: &str) -> Option<Body> {
    let settings = Settings {
        trust_domain: "cluster.local".to_owned(),
        sampling_percent: 1.0,
    };
    let key = ResourceKey {
        kind: kind.into(),
        name: name.to_owned(),
    };
    compile(world, &settings, &key, &Trust::default(), client)
        .resource
        .body
}

fn seen_by(world: &World, name: &str, client: &str) -> Option<Destination> {
    match body(world, ResourceKind::Destination, name, client) {
        Some(Body::Destination(destination)) => Some(destination),
        _ => None,
    }
}

/// Service and endpoints of a destination, as seen from `shop`.
fn leads(world: &World, name: &str) -> Option<(String, String)> {
    let found = seen_by(world, name, "shop")?;
    Some((found.service.clone(), backend(&found).endpoints))
}

fn backend(destination: &Destination) -> Backend {
    destination.routes[0].backends[0].backend.clone().unwrap()
}

fn addresses(world: &World, name: &str) -> Vec<(String, u32)> {
    match body(world, ResourceKind::Endpoints, name, "shop") {
        Some(Body::Endpoints(Endpoints { endpoints, .. })) => endpoints
            .into_iter()
            .map(|endpoint| (endpoint.address, endpoint.weight))
            .collect(),
        _ => Vec::new(),
    }
}

fn external(name: &str, spec: &str) -> String {
    let (namespace, name) = name.split_once('/').unwrap();
    format!(
        "apiVersion: policy.weft.dev/v1alpha1
kind: ExternalService
metadata: {{name: {name}, namespace: {namespace}}}
spec: {spec}
---
"
    )
}

#[test]
fn endpoints_that_are_written_down_are_its_addresses_unless_it_has_others() {
    let world = world(
        &(external(
            "shop/own",
            "{resolution: Static, ports: [{port: 80, targetPort: 8080}],
              endpoints: [{address: 192.0.2.1}, {address: 'fd00::9', weight: 3}]}",
        ) + &external(
            "shop/vip",
            "{resolution: Static, addresses: [240.0.0.1], ports: [{port: 80, name: http}],
              endpoints: [{address: 192.0.2.7}]}",
        )),
    );
    let own = Some(("own".to_owned(), "external/shop/own:80".to_owned()));
    assert_eq!(leads(&world, "192.0.2.1:80"), own);
    assert_eq!(leads(&world, "[fd00::9]:80"), own);
    assert_eq!(leads(&world, "192.0.2.1:8080"), None, "not its port");
    assert_eq!(
        leads(&world, "192.0.2.7:80"),
        None,
        "that is the other's endpoint"
    );
    assert_eq!(leads(&world, "240.0.0.1:80").unwrap().0, "vip");
    assert_eq!(
        addresses(&world, "external/shop/own:80"),
        [
            ("192.0.2.1:8080".to_owned(), 1),
            ("[fd00::9]:8080".to_owned(), 3)
        ]
    );
    assert_eq!(
        addresses(&world, "external/shop/vip:80"),
        [("192.0.2.7:80".to_owned(), 1)]
    );
    let vip = seen_by(&world, "240.0.0.1:80", "shop").unwrap();
    assert_eq!(vip.protocol(), Protocol::Http);
    assert_eq!(vip.routes[0].name, "ExternalService/shop/vip");
}

#[test]
fn the_narrowest_network_is_used_and_connections_go_where_they_were_sent() {
    let wide = "{addresses: [10.50.0.0/16], resolution: Passthrough, ports: [{port: 5432}]}";
    let narrow = "{addresses: [10.50.3.0/24], resolution: Passthrough, ports: [{port: 5432}]}";
    let world = world(&(external("shop/wide", wide) + &external("shop/narrow", narrow)));
    let of = |name: &str, address: &str| Some((name.to_owned(), format!("original/{address}")));
    for (address, name) in [("10.50.4.4:5432", "wide"), ("10.50.3.4:5432", "narrow")] {
        assert_eq!(leads(&world, address), of(name, address));
    }
    assert_eq!(leads(&world, "10.51.0.1:5432"), None);
    assert_eq!(leads(&world, "10.50.3.4:80"), None);
}

#[test]
fn names_are_the_proxys_to_resolve() {
    let hosts = "{hosts: [a.example.org, b.example.org], addresses: [240.0.0.1],
        ports: [{port: 80, targetPort: 8080}]}";
    let others = "{hosts: [c.example.org], addresses: [240.0.0.2], ports: [{port: 80}],
        endpoints: [{address: eu.example.org}, {address: 'fd00::1'}]}";
    let world = world(&(external("shop/hosts", hosts) + &external("shop/others", others)));
    let endpoints = |name| leads(&world, name).unwrap().1;
    assert_eq!(
        endpoints("240.0.0.1:80"),
        "dns/a.example.org:8080,b.example.org:8080"
    );
    assert_eq!(endpoints("b.example.org:80"), "dns/b.example.org:8080");
    assert_eq!(
        endpoints("240.0.0.2:80"),
        "dns/eu.example.org:80,[fd00::1]:80"
    );
    // The proxy is told of no such resource.
    let settings = Settings {
        trust_domain: String::new(),
        sampling_percent: 0.0,
    };
    let key = ResourceKey {
        kind: ResourceKind::Destination.into(),
        name: "240.0.0.1:80".to_owned(),
    };
    let compiled = compile(&world, &settings, &key, &Trust::default(), "shop");
    assert!(compiled.endpoint_names().is_empty());
}

#[test]
fn it_holds_for_its_own_namespace_and_that_of_the_mesh_for_all() {
    let spec = |port| {
        format!("{{addresses: [240.0.0.1], resolution: Passthrough, ports: [{{port: {port}}}]}}")
    };
    let world = world(
        &(external("shop/own", &spec(80))
            + &external("weft-system/all", &spec(80))
            + &external("weft-system/more", &spec(81))),
    );
    let found = |client: &str, name: &str| {
        let found = seen_by(&world, name, client)?;
        Some(format!("{}/{}", found.namespace, found.service))
    };
    assert_eq!(found("shop", "240.0.0.1:80").unwrap(), "shop/own");
    assert_eq!(found("other", "240.0.0.1:80").unwrap(), "weft-system/all");
    assert_eq!(found("shop", "240.0.0.1:81").unwrap(), "weft-system/more");
    let key = |name: &str| ResourceKey {
        kind: ResourceKind::Destination.into(),
        name: name.to_owned(),
    };
    let shop = BTreeSet::from(["shop".to_owned()]);
    assert_eq!(special_clients(&world, &key("240.0.0.1:80")), shop);
    assert!(special_clients(&world, &key("240.0.0.1:81")).is_empty());
}

#[test]
fn hosts_are_found_exactly_before_by_wildcard() {
    let any = "{hosts: ['*.example.org'], resolution: Passthrough,
        ports: [{port: 443, appProtocol: tls}]}";
    let one = "{hosts: [api.example.org], ports: [{port: 443, appProtocol: tls}]}";
    let world = world(&(external("shop/any", any) + &external("shop/one", one)));
    let found = |name: &str| leads(&world, name);
    let leads_to = |name: &str, endpoints: &str| Some((name.to_owned(), endpoints.to_owned()));
    assert_eq!(
        found("api.example.org:443"),
        leads_to("one", "dns/api.example.org:443")
    );
    assert_eq!(found("x.y.example.org:443"), leads_to("any", "original"));
    assert_eq!(found("example.org:443"), None);
    assert_eq!(found("x.example.org:80"), None);
}

#[test]
fn tls_is_spoken_to_the_name_of_the_host() {
    let certified = rcgen::generate_simple_self_signed(vec!["ca.example".to_owned()]).unwrap();
    let pem: String = certified
        .cert
        .pem()
        .lines()
        .map(|line| format!("        {line}\n"))
        .collect();
    let world = world(&format!(
        "apiVersion: policy.weft.dev/v1alpha1
kind: ExternalService
metadata: {{name: api, namespace: shop}}
spec:
  hosts: [api.example.org]
  addresses: [240.0.0.1]
  ports:
  - port: 80
    targetPort: 443
    appProtocol: http
    tls: {{}}
  - port: 81
    targetPort: 443
    tls:
      mode: Mutual
      sni: inner.example.org
      caCertificates: |
{pem}
  - {{port: 443, appProtocol: tls}}
"
    ));
    let tls = |name: &str| {
        let policy = backend(&seen_by(&world, name, "shop").unwrap()).policy;
        policy.unwrap().originate_tls
    };
    let simple = tls("240.0.0.1:80").unwrap();
    assert_eq!(simple.server_name, "api.example.org");
    assert!(simple.roots.is_empty() && !simple.mutual);
    let mutual = tls("240.0.0.1:81").unwrap();
    assert_eq!(mutual.server_name, "inner.example.org");
    assert_eq!(mutual.roots, [certified.cert.der().as_ref().to_vec()]);
    assert!(mutual.mutual);
    assert_eq!(tls("240.0.0.1:443"), None);
}

#[test]
fn policies_name_it_by_kind_and_the_namespaces_default_holds() {
    let spec = "{addresses: [240.0.0.1], resolution: Static, ports: [{port: 80}],
        endpoints: [{address: 192.0.2.1}]}";
    let policy = |name: &str, target: &str, timeout: u32| {
        format!(
            "apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {{name: {name}, namespace: shop}}
spec: {{targetRefs: {target}, timeouts: {{request: {timeout}s}}}}
---
"
        )
    };
    let timeout = |world: &World| {
        let found = seen_by(world, "240.0.0.1:80", "shop").unwrap();
        found.routes[0].policy.as_ref().unwrap().request_timeout_ms
    };
    let mut world = world(&external("shop/api", spec));
    assert_eq!(timeout(&world), 0);
    let dirty = apply(&mut world, &policy("all", "[]", 1));
    assert_eq!(timeout(&world), 1000);
    assert!(dirty.services.iter().any(|name| name.name == "api"));
    // A Service of the same name is another thing.
    apply(
        &mut world,
        &policy("service", "[{kind: Service, name: api}]", 2),
    );
    assert_eq!(timeout(&world), 1000);
    let target = "[{group: policy.weft.dev, kind: ExternalService, name: api, sectionName: '80'}]";
    let dirty = apply(&mut world, &policy("external", target, 3));
    assert_eq!(timeout(&world), 3000);
    assert!(dirty.services.iter().any(|name| name.name == "api"));
    let said: Vec<String> = problems(&world).into_iter().map(|p| p.message).collect();
    assert_eq!(said, ["there is no Service shop/api"]);
    // There is no proxy of its own to keep a rate.
    let limit = policy("limit", target, 1).replace(
        "timeouts: {request: 1s}",
        "rateLimit: {requests: 1, per: 1s}",
    );
    let findings = manifest::parse(Path::new("test.yaml"), &limit).unwrap_err();
    assert!(
        findings[0].message.contains("an ExternalService has none"),
        "{findings:?}"
    );
}

#[test]
fn a_change_says_which_destinations_it_may_be_of() {
    let spec = |addresses: &str| {
        format!("{{addresses: {addresses}, resolution: Passthrough, ports: [{{port: 80}}]}}")
    };
    let mut world = World::default();
    let dirty = apply(&mut world, &external("shop/api", &spec("[10.0.0.0/8]")));
    let nets =
        |dirty: &Dirty| -> Vec<String> { dirty.networks.iter().map(ToString::to_string).collect() };
    assert_eq!(nets(&dirty), ["10.0.0.0/8"]);
    let dirty = apply(&mut world, &external("shop/api", &spec("[10.0.0.0/8]")));
    assert!(dirty.is_empty());
    let dirty = apply(&mut world, &external("shop/api", &spec("['fd00::1']")));
    assert_eq!(nets(&dirty), ["10.0.0.0/8", "fd00::1/128"]);
    assert_eq!(leads(&world, "10.0.0.1:80"), None);
    assert!(leads(&world, "[fd00::1]:80").is_some());
}

#[test]
fn what_makes_no_sense_is_refused_with_a_sentence() {
    for (spec, says) in [
        ("{ports: [{port: 80}]}", "neither hosts nor addresses"),
        ("{hosts: [api], ports: [{port: 80}]}", "'api' is not a host"),
        (
            "{hosts: [10.0.0.1], ports: [{port: 80}]}",
            "'10.0.0.1' is not a host",
        ),
        ("{hosts: ['a.*.org'], ports: [{port: 80}]}", "is not a host"),
        ("{hosts: [a.org], ports: []}", "no port"),
        (
            "{hosts: [a.org], ports: [{port: 80}, {port: 80}]}",
            "there twice",
        ),
        (
            "{hosts: [a.org], addresses: [10.0.0/8], ports: [{port: 80}]}",
            "nor a network",
        ),
        (
            "{hosts: [a.org], resolution: Static, ports: [{port: 80}]}",
            "needs endpoints",
        ),
        (
            "{hosts: [a.org], resolution: Static, endpoints: [{address: b.org}], ports: [{port: 80}]}",
            "'b.org' is not an address",
        ),
        (
            "{hosts: ['*.a.org'], ports: [{port: 443, appProtocol: tls}]}",
            "no name to ask",
        ),
        (
            "{hosts: ['*.a.org'], resolution: Passthrough, ports: [{port: 80, appProtocol: http}]}",
            "by its SNI",
        ),
        (
            "{hosts: [a.org], resolution: Passthrough, ports: [{port: 80, targetPort: 81}]}",
            "the port it was made to",
        ),
        (
            "{hosts: [a.org], ports: [{port: 443, appProtocol: https, tls: {}}]}",
            "speak TLS on this port already",
        ),
        (
            "{addresses: [10.0.0.1], resolution: Passthrough, ports: [{port: 80, tls: {}}]}",
            "no name to look for",
        ),
        (
            "{hosts: [a.org], ports: [{port: 80, tls: {caCertificates: x}}]}",
            "no certificate that can be read",
        ),
    ] {
        let text = external("shop/api", spec);
        let findings = manifest::parse(Path::new("test.yaml"), &text).unwrap_err();
        assert!(
            findings.iter().any(|found| found.message.contains(says)),
            "{spec}: {findings:?}"
        );
    }
}

fn said(manifests: &str) -> Vec<String> {
    let problems = problems(&world(manifests)).into_iter();
    problems
        .map(|p| format!("{}: {}", p.object, p.message))
        .collect()
}

#[test]
fn what_is_somebody_elses_already_is_said() {
    let fixed = |name: &str, spec: &str| external(name, spec);
    let twice = "{addresses: [240.0.0.1], resolution: Passthrough, ports: [{port: 80}]}";
    let host = "{hosts: [a.example.org], ports: [{port: 80}]}";
    let vip = "{addresses: [10.96.0.1], resolution: Passthrough, ports: [{port: 80}]}";
    let egress = |name: &str, mode: &str| {
        format!(
            "apiVersion: policy.weft.dev/v1alpha1
kind: EgressPolicy
metadata: {{name: {name}, namespace: shop}}
spec: {{mode: {mode}}}
---
"
        )
    };
    let found = said(
        &(fixed("shop/a", twice)
            + &fixed("shop/b", twice)
            + &fixed("other/c", twice)
            + &fixed("shop/d", host)
            + &fixed("shop/e", host)
            + &fixed("shop/f", vip)
            + &egress("one", "AllowAny")
            + &egress("two", "RegistryOnly")
            + "apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{name: http, port: 80}]}
---
apiVersion: policy.weft.dev/v1alpha1
kind: Workload
metadata: {name: cart-1, namespace: shop, labels: {app: cart}}
spec: {addresses: [10.0.0.1]}
"),
    );
    assert_eq!(
        found,
        [
            "ExternalService shop/b: 240.0.0.1/32 is ExternalService shop/a's already, with the same port, which is used",
            "ExternalService shop/e: a.example.org:80 is ExternalService shop/d's already, which is used",
            "ExternalService shop/f: 10.96.0.1:80 is Service shop/cart, which is used",
            "EgressPolicy shop/two: namespace shop has EgressPolicy shop/one already, which is used; this one is not",
        ]
    );
}

const CART: &str = "apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{name: NAME, port: 80, targetPort: 8080}]}
---
apiVersion: policy.weft.dev/v1alpha1
kind: Workload
metadata: {name: cart-1, namespace: shop, labels: {app: cart}}
spec: {addresses: [10.0.0.1], SIDECAR ports: [{port: 8080}]}
---
";

fn cart(port_name: &str, sidecar: &str) -> String {
    CART.replace("NAME", port_name).replace("SIDECAR", sidecar)
}

#[test]
fn rules_that_no_request_comes_to_are_said() {
    let route = |name: &str, rules: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: {name}, namespace: shop}}
spec:
  parentRefs: [{{group: '', kind: Service, name: cart}}]
  rules:
{rules}
---
"
        )
    };
    let to = "backendRefs: [{name: cart, port: 80}]";
    let rule = |matches: &str| format!("  - {{matches: [{matches}], {to}}}\n");
    let found = said(
        &(cart("http", "")
            + &route(
                "a",
                &(rule("{path: {type: PathPrefix, value: /x}}")
                    + &rule("{path: {type: PathPrefix, value: /x}}")
                    // A header makes it more specific: it comes first.
                    + &rule("{path: {type: PathPrefix, value: /x}, headers: [{name: a, value: b}]}")
                    + &rule("{path: {type: Exact, value: /x/y}}")
                    // One of its matches is reached.
                    + &rule("{path: {type: Exact, value: /x/y}}, {path: {value: /z}}")),
            )
            + &route("b", &rule("{path: {type: PathPrefix, value: /x}}"))),
    );
    assert_eq!(
        found,
        [
            "HTTPRoute shop/a: no request comes to rule HTTPRoute/shop/a/1: HTTPRoute/shop/a/0 takes each of them before",
            "HTTPRoute shop/b: no request comes to rule HTTPRoute/shop/b/0: HTTPRoute/shop/a/0 takes each of them before",
        ]
    );
}

#[test]
fn ports_that_do_not_say_what_is_spoken_are_said_when_it_matters() {
    let policy = "apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: p, namespace: shop}
spec: {targetRefs: [{kind: Service, name: cart}], SPEC}
";
    let about = |port: &str, spec: &str| said(&(cart(port, "") + &policy.replace("SPEC", spec)));
    let found = about("web", "retries: {attempts: 1}");
    assert!(
        found[0].contains("TrafficPolicy shop/p is about requests to port 80"),
        "{found:?}"
    );
    assert_eq!(
        about("http-web", "retries: {attempts: 1}"),
        Vec::<String>::new()
    );
    // What holds for connections needs no protocol.
    assert_eq!(
        about("web", "timeouts: {connect: 1s}"),
        Vec::<String>::new()
    );
}

#[test]
fn mutual_tls_that_cannot_be_is_said() {
    let mode = |spec: &str| {
        format!(
            "apiVersion: policy.weft.dev/v1alpha1
kind: PeerAuthentication
metadata: {{name: m, namespace: shop}}
spec: {spec}
"
        )
    };
    let found = said(&(cart("http", "sidecar: false,") + &mode("{mtls: {mode: STRICT}}")));
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with(
        "Workload shop/cart-1: mutual TLS is required of it (STRICT), but it has no proxy"
    ));
    let port = "{selector: {matchLabels: {app: cart}}, portLevelMtls: {80: {mode: STRICT}}}";
    assert_eq!(
        said(&(cart("http", "") + &mode(port))),
        ["PeerAuthentication shop/m: no workload that it selects has port 80"]
    );
    assert_eq!(
        said(&(cart("http", "") + &mode(&port.replace("80:", "8080:")))),
        Vec::<String>::new()
    );
}

/// A port that takes plaintext only is called in plaintext.
#[test]
fn callers_know_of_a_port_without_mutual_tls() {
    let mut world = world(&cart("http", ""));
    let identity = |world: &World| match body(world, ResourceKind::Endpoints, "shop/cart:80", "") {
        Some(Body::Endpoints(endpoints)) => endpoints.endpoints[0].identity.clone(),
        other => panic!("{other:?}"),
    };
    assert!(!identity(&world).is_empty());
    let dirty = apply(
        &mut world,
        "apiVersion: policy.weft.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: m, namespace: shop}
spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: {8080: {mode: DISABLE}}}
",
    );
    assert_eq!(identity(&world), "");
    assert!(dirty.endpoints.iter().any(|name| name.name == "cart"));
}

#[test]
fn a_workload_is_told_of_hosts_and_whether_anything_else_may_be_called() {
    let workload = |namespace: &str| {
        format!(
            "apiVersion: policy.weft.dev/v1alpha1
kind: Workload
metadata: {{name: w, namespace: {namespace}}}
spec: {{addresses: [10.0.0.1]}}
---
"
        )
    };
    let egress = |namespace: &str, mode: &str| {
        format!(
            "apiVersion: policy.weft.dev/v1alpha1
kind: EgressPolicy
metadata: {{name: e, namespace: {namespace}}}
spec: {{mode: {mode}}}
---
"
        )
    };
    let host = "{hosts: [a.example.org], ports: [{port: 80}, {port: 81}]}";
    let wild = "{hosts: ['*.example.org'], resolution: Passthrough,
        ports: [{port: 443, appProtocol: tls}]}";
    let by_address = "{hosts: [b.example.org], addresses: [240.0.0.1], ports: [{port: 80}]}";
    let mut world = world(
        &(workload("shop").replace("10.0.0.1", "10.0.0.2")
            + &workload("other")
            + &external("shop/host", host)
            + &external("weft-system/wild", wild)
            + &external("shop/found", by_address)
            + &egress("weft-system", "RegistryOnly")
            + &egress("shop", "AllowAny")),
    );
    let told = |world: &World, namespace: &str| {
        let name = format!("{namespace}/w");
        match body(world, ResourceKind::Workload, &name, namespace) {
            Some(Body::Workload(workload)) => {
                let hosts = workload.external_hosts.iter().map(|known| {
                    let destination = known.destination.as_ref().unwrap();
                    format!("{}:{}", known.host, destination.port)
                });
                (hosts.collect::<Vec<_>>(), workload.egress().as_str_name())
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        told(&world, "shop"),
        (
            ["a.example.org:80", "a.example.org:81", "*.example.org:443"]
                .map(str::to_owned)
                .to_vec(),
            "EGRESS_MODE_ALLOW_ANY"
        )
    );
    let only = "EGRESS_MODE_REGISTRY_ONLY";
    assert_eq!(
        told(&world, "other"),
        (vec!["*.example.org:443".to_owned()], only)
    );
    let dirty = apply(&mut world, &egress("shop", "RegistryOnly"));
    assert!(dirty.workloads_of.contains("shop") && !dirty.all_workloads);
    assert_eq!(told(&world, "shop").1, only);
    assert!(apply(&mut world, &egress("weft-system", "AllowAny")).all_workloads);
}
