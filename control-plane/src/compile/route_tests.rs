//! Which routes apply, in which order their matches win, and what is said of them in return.

use std::path::Path;

use weft_api::proto::resource::Body;
use weft_api::proto::{Destination, ResourceKey, ResourceKind, Trust, filter, route_match};

use super::status::status;
use super::{Condition, Settings, compile, problems, special_clients};
use crate::model::{Change, Dirty, Kind, Name, ObjectRef, World};
use crate::sources::folder::manifest;

const SERVICES: &str = "
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  ports: [{name: http, port: 80}, {name: alt, port: 8080}, {name: grpc, port: 7070}]
---
apiVersion: v1
kind: Service
metadata: {name: v1, namespace: shop}
spec: {clusterIP: 10.96.0.2, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: v2, namespace: other}
spec: {clusterIP: 10.96.0.3, ports: [{port: 80}]}
";

fn world(routes: &[String]) -> World {
    let mut world = World::default();
    let text = format!("{SERVICES}---\n{}", routes.join("---\n"));
    let (parsed, _) = manifest::parse(Path::new("test.yaml"), &text)
        .unwrap_or_else(|findings| panic!("{findings:?}"));
    for parsed in parsed {
        world.apply(Change::Set(Box::new(parsed.object)), &mut Dirty::default());
    }
    world
}

struct Given<'a> {
    kind: &'a str,
    name: &'a str,
    namespace: &'a str,
    created: &'a str,
    parent: &'a str,
    rules: &'a str,
}

impl Default for Given<'_> {
    fn default() -> Self {
        Self {
            kind: "HTTPRoute",
            name: "a",
            namespace: "shop",
            created: "2026-01-01T00:00:00Z",
            parent: "port: 80",
            rules: "  - backendRefs: [{name: v1, port: 80}]\n",
        }
    }
}

fn given(route: Given<'_>) -> String {
    let Given {
        kind,
        name,
        namespace,
        created,
        parent,
        rules,
    } = route;
    let parent = if parent.is_empty() {
        String::new()
    } else {
        format!(", {parent}")
    };
    format!(
        "apiVersion: gateway.networking.k8s.io/v1
kind: {kind}
metadata: {{name: {name}, namespace: {namespace}, creationTimestamp: '{created}', generation: 2}}
spec:
  parentRefs: [{{group: '', kind: Service, name: echo, namespace: shop{parent}}}]
  rules:
{rules}"
    )
}

fn rules(rules: &str) -> String {
    given(Given {
        rules,
        ..Given::default()
    })
}

fn key(address: &str) -> ResourceKey {
    ResourceKey {
        kind: ResourceKind::Destination.into(),
        name: address.to_owned(),
    }
}

fn destination(world: &World, address: &str, client: &str) -> Destination {
    let settings = Settings {
        trust_domain: "cluster.local".to_owned(),
        sampling_percent: 1.0,
    };
    let compiled = compile(world, &settings, &key(address), &Trust::default(), client);
    match compiled.resource.body {
        Some(Body::Destination(destination)) => destination,
        other => panic!("{address}: {other:?}"),
    }
}

fn names(destination: &Destination) -> Vec<&str> {
    let routes = destination.routes.iter();
    routes.map(|route| route.name.as_str()).collect()
}

/// Rules in the order in which their matches win, each match once.
fn order(destination: &Destination) -> Vec<String> {
    let mut all: Vec<(u32, String)> = Vec::new();
    for route in &destination.routes {
        let rule = route.name.rsplit_once('/').unwrap().1;
        for matched in &route.matches {
            let path = match &matched.path {
                Some(route_match::Path::PathExact(path)) => format!("={path}"),
                Some(route_match::Path::PathPrefix(path)) => format!("^{path}"),
                Some(route_match::Path::PathRegex(path)) => format!("~{path}"),
                None => String::new(),
            };
            all.push((matched.order, format!("{rule} {path}")));
        }
    }
    all.sort();
    all.into_iter().map(|(_, shown)| shown).collect()
}

fn conditions(world: &World, kind: Kind, namespace: &str, name: &str) -> Vec<Condition> {
    let route = world.routes.get(&ObjectRef {
        kind,
        name: Name::new(namespace, name),
    });
    let status = status(world, route.unwrap());
    assert_eq!(status.generation, 2);
    status.parents.into_iter().next().unwrap().conditions
}

fn shown(conditions: &[Condition]) -> Vec<String> {
    conditions
        .iter()
        .map(|c| format!("{}={} {}", c.kind, c.status, c.reason))
        .collect()
}

#[test]
fn matches_win_by_path_method_headers_query_then_in_order() {
    let to = "backendRefs: [{name: v1, port: 80}]";
    let route = rules(&format!(
        "  - {{name: any, {to}}}
  - {{name: query, matches: [{{queryParams: [{{name: a, value: b}}]}}], {to}}}
  - {{name: header, matches: [{{headers: [{{name: a, value: b}}]}}], {to}}}
  - {{name: headers, matches: [{{headers: [{{name: a, value: b}}, {{name: c, value: d}}]}}], {to}}}
  - {{name: method, matches: [{{method: GET}}], {to}}}
  - {{name: long, matches: [{{path: {{type: PathPrefix, value: /a/b/}}}}, {{path: {{value: /a}}}}], {to}}}
  - {{name: regex, matches: [{{path: {{type: RegularExpression, value: '/.*'}}}}], {to}}}
  - {{name: exact, matches: [{{path: {{type: Exact, value: /a}}}}], {to}}}
  - {{name: last, {to}}}
"
    ));
    let world = world(&[route]);
    assert_eq!(
        order(&destination(&world, "10.96.0.1:80", "x")),
        [
            "exact =/a",
            "regex ~/.*",
            "long ^/a/b",
            "long ^/a",
            "method ^/",
            "headers ^/",
            "header ^/",
            "query ^/",
            "any ^/",
            "last ^/",
        ]
    );
}

#[test]
fn several_routes_are_merged_the_oldest_first_then_by_name() {
    let at = |name, created| {
        given(Given {
            name,
            created,
            ..Given::default()
        })
    };
    let routes = [
        at("c", "2026-01-02T00:00:00Z"),
        at("b", "2026-01-03T00:00:00Z"),
        at("a", "2026-01-03T00:00:00Z"),
    ];
    let world = world(&routes);
    let table = destination(&world, "10.96.0.1:80", "x");
    let orders: Vec<u32> = table.routes.iter().map(|r| r.matches[0].order).collect();
    assert_eq!(
        names(&table),
        [
            "HTTPRoute/shop/c/0",
            "HTTPRoute/shop/a/0",
            "HTTPRoute/shop/b/0"
        ]
    );
    assert_eq!(orders, [0, 1, 2]);
}

#[test]
fn a_parent_is_a_port_by_number_or_name_or_all_of_them() {
    let governed = |parent: &str| -> Vec<u16> {
        let world = world(&[given(Given {
            parent,
            ..Given::default()
        })]);
        [80, 8080, 7070]
            .into_iter()
            .filter(|port| {
                let table = destination(&world, &format!("10.96.0.1:{port}"), "x");
                names(&table)[0].starts_with("HTTPRoute")
            })
            .collect()
    };
    assert_eq!(governed("port: 80"), [80]);
    assert_eq!(governed("sectionName: alt"), [8080]);
    assert_eq!(governed(""), [80, 8080, 7070]);
    assert_eq!(governed("port: 80, sectionName: alt"), [0u16; 0]);
}

#[test]
fn consumer_routes_replace_the_producers_for_their_own_namespace() {
    let consumer = given(Given {
        name: "theirs",
        namespace: "other",
        rules: "  - backendRefs: [{name: v2, port: 80}]\n",
        ..Given::default()
    });
    let world = world(&[given(Given::default()), consumer]);
    let seen = |client| names(&destination(&world, "10.96.0.1:80", client)).join(" ");
    assert_eq!(seen("other"), "HTTPRoute/other/theirs/0");
    assert_eq!(seen("shop"), "HTTPRoute/shop/a/0");
    assert_eq!(seen("third"), "HTTPRoute/shop/a/0");
    // By port: where the consumer says nothing, the Service is as for everybody.
    let other_port = destination(&world, "10.96.0.1:8080", "other");
    assert_eq!(names(&other_port), ["Service/shop/echo"]);
    let special = special_clients(&world, &key("10.96.0.1:80"));
    assert_eq!(special.into_iter().collect::<Vec<_>>(), ["other"]);
    assert!(special_clients(&world, &key("10.96.0.2:80")).is_empty());
}

#[test]
fn one_kind_applies_to_a_port_and_the_others_hear_of_it() {
    let grpc = given(Given {
        kind: "GRPCRoute",
        parent: "port: 7070",
        rules: "  - {name: both, matches: [{method: {service: a.B, method: C}}], backendRefs: [{name: v1, port: 80}]}
  - {name: method, matches: [{method: {method: C}}], backendRefs: [{name: v1, port: 80}]}
  - {name: service, matches: [{method: {service: a.B}}], backendRefs: [{name: v1, port: 80}]}
  - {name: any, backendRefs: [{name: v1, port: 80}]}
",
        ..Given::default()
    });
    let on = |parent| {
        given(Given {
            name: "h",
            parent,
            ..Given::default()
        })
    };
    let world_of = |parent| world(&[grpc.clone(), on(parent)]);
    let world = world_of("port: 7070");
    let table = destination(&world, "10.96.0.1:7070", "x");
    assert!(names(&table)[0].starts_with("GRPCRoute"));
    assert_eq!(
        order(&table)[..4],
        [
            "both =/a.B/C",
            "service ^/a.B",
            "method ~/[^/]+/C",
            "any ^/"
        ]
    );
    assert_eq!(table.routes.last().unwrap().name, "Service/shop/echo");
    assert_eq!(
        shown(&conditions(&world, Kind::HTTPRoute, "shop", "h"))[0],
        "Accepted=false Conflicted"
    );
    // It has two ports left.
    let world = world_of("");
    assert_eq!(
        shown(&conditions(&world, Kind::HTTPRoute, "shop", "h"))[0],
        "Accepted=true Accepted"
    );
}

#[test]
fn what_cannot_be_used_is_refused_by_condition() {
    let to = "backendRefs: [{name: v1, port: 80}]";
    let well = format!("  - {{matches: [{{path: {{value: /well}}}}], {to}}}\n");
    let cases: [(&str, &[&str]); 14] = [
        (
            to,
            &["Accepted=true Accepted", "ResolvedRefs=true ResolvedRefs"],
        ),
        (
            "backendRefs: [{name: nobody, port: 80}]",
            &[
                "Accepted=true Accepted",
                "ResolvedRefs=false BackendNotFound",
            ],
        ),
        (
            "backendRefs: [{name: v1, port: 81}]",
            &[
                "Accepted=true Accepted",
                "ResolvedRefs=false BackendNotFound",
            ],
        ),
        (
            "backendRefs: [{name: v1}]",
            &[
                "Accepted=true Accepted",
                "ResolvedRefs=false BackendNotFound",
            ],
        ),
        (
            "backendRefs: [{group: example.org, kind: Bucket, name: v1, port: 80}]",
            &["Accepted=true Accepted", "ResolvedRefs=false InvalidKind"],
        ),
        // GEP-1294: no ReferenceGrant is needed in a mesh.
        (
            "backendRefs: [{name: v2, namespace: other, port: 80}]",
            &["Accepted=true Accepted", "ResolvedRefs=true ResolvedRefs"],
        ),
        (
            "filters: [{type: RequestMirror, requestMirror: {backendRef: {name: v1, port: 80, filters: [{type: CORS, cors: {}}]}}}], backendRefs: [{name: v1, port: 80}]",
            &[
                "Accepted=false UnsupportedValue",
                "ResolvedRefs=true ResolvedRefs",
            ],
        ),
        (
            "filters: [{type: Teleport}], backendRefs: [{name: v1, port: 80}]",
            &[
                "Accepted=false UnsupportedValue",
                "ResolvedRefs=true ResolvedRefs",
            ],
        ),
        (
            "matches: [{path: {type: Vague, value: /}}], backendRefs: [{name: v1, port: 80}]",
            &[
                "Accepted=false UnsupportedValue",
                "ResolvedRefs=true ResolvedRefs",
            ],
        ),
        (
            "matches: [{path: {type: RegularExpression, value: '('}}], backendRefs: [{name: v1, port: 80}]",
            &[
                "Accepted=false UnsupportedValue",
                "ResolvedRefs=true ResolvedRefs",
            ],
        ),
        (
            "matched: [{path: {value: /}}], backendRefs: [{name: v1, port: 80}]",
            &[
                "Accepted=false UnsupportedValue",
                "ResolvedRefs=true ResolvedRefs",
            ],
        ),
        (
            "filters: [{type: RequestRedirect, requestRedirect: {statusCode: 418}}]",
            &[
                "Accepted=false UnsupportedValue",
                "ResolvedRefs=true ResolvedRefs",
            ],
        ),
        (
            "filters: [{type: RequestRedirect, requestRedirect: {}}, {type: URLRewrite, urlRewrite: {}}]",
            &[
                "Accepted=false IncompatibleFilters",
                "ResolvedRefs=true ResolvedRefs",
            ],
        ),
        (
            "matches: [{path: {type: Exact, value: /}}], filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /x}}}]",
            &[
                "Accepted=false IncompatibleFilters",
                "ResolvedRefs=true ResolvedRefs",
            ],
        ),
    ];
    for (rule, expected) in cases {
        let alone = world(&[rules(&format!("  - {{{rule}}}\n"))]);
        let found = conditions(&alone, Kind::HTTPRoute, "shop", "a");
        assert_eq!(shown(&found), *expected, "{rule}: {found:?}");
        let findings = problems(&alone)
            .into_iter()
            .filter(|problem| problem.object.kind == Kind::HTTPRoute)
            .count();
        let wrong = expected.iter().filter(|c| c.contains("=false")).count();
        assert_eq!(findings, wrong, "{rule}");
        if expected[0].starts_with("Accepted=false") {
            let beside = world(&[rules(&format!("{well}  - {{{rule}}}\n"))]);
            let found = conditions(&beside, Kind::HTTPRoute, "shop", "a");
            assert_eq!(shown(&found)[0], "Accepted=true Accepted", "{rule}");
            assert_eq!(shown(&found)[2], "PartiallyInvalid=true UnsupportedValue");
            assert!(
                found[2].message.starts_with("Dropped Rule rules[1]"),
                "{found:?}"
            );
        }
    }
}

#[test]
fn a_backend_of_a_grpc_route_takes_its_filters_only() {
    for (filter, accepted) in [
        (
            "{type: RequestHeaderModifier, requestHeaderModifier: {remove: [x]}}",
            "Accepted=true Accepted",
        ),
        (
            "{type: CORS, cors: {allowOrigins: ['*']}}",
            "Accepted=false UnsupportedValue",
        ),
        (
            "{type: RequestRedirect, requestRedirect: {}}",
            "Accepted=false UnsupportedValue",
        ),
        (
            "{type: URLRewrite, urlRewrite: {hostname: x}}",
            "Accepted=false UnsupportedValue",
        ),
    ] {
        let route = given(Given {
            kind: "GRPCRoute",
            parent: "port: 7070",
            rules: &format!("  - backendRefs: [{{name: v1, port: 80, filters: [{filter}]}}]\n"),
            ..Given::default()
        });
        let found = conditions(&world(&[route]), Kind::GRPCRoute, "shop", "a");
        assert_eq!(shown(&found)[0], accepted, "{filter}: {found:?}");
    }
}

#[test]
fn a_parent_that_is_not_there_is_no_parent() {
    for (parent, message) in [
        ("port: 81", "Service shop/echo has no port 81"),
        ("sectionName: x", "Service shop/echo has no port named 'x'"),
    ] {
        let world = world(&[given(Given {
            parent,
            ..Given::default()
        })]);
        let found = conditions(&world, Kind::HTTPRoute, "shop", "a");
        assert_eq!(shown(&found)[0], "Accepted=false NoMatchingParent");
        assert_eq!(found[0].message, message);
    }
}

#[test]
fn a_gateway_is_somebody_elses_to_look_after() {
    let route = "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: north, namespace: shop}
spec: {parentRefs: [{name: gateway}], rules: [{backendRefs: [{name: v1, port: 80}]}]}
";
    let world = world(&[route.to_owned()]);
    let route = world.routes().next().unwrap();
    assert!(status(&world, route).parents.is_empty());
    let table = destination(&world, "10.96.0.1:80", "x");
    assert_eq!(names(&table), ["Service/shop/echo"]);
}

#[test]
fn what_cannot_be_honoured_is_answered_500_and_never_skipped() {
    let route = rules(
        "  - {matches: [{path: {value: /filter}}], filters: [{type: ExternalAuth}], backendRefs: [{name: v1, port: 80}]}
  - {matches: [{path: {value: /none}}]}
  - {matches: [{path: {value: /zero}}], backendRefs: [{name: v1, port: 80, weight: 0}]}
  - {matches: [{path: {value: /half}}], backendRefs: [{name: v1, port: 80}, {name: x, port: 80}]}
  - {matches: [{path: {value: /mirror}}], filters: [{type: RequestMirror, requestMirror: {backendRef: {name: x, port: 80}}}], backendRefs: [{name: v1, port: 80}]}
",
    );
    let world = world(&[route]);
    let table = destination(&world, "10.96.0.1:80", "x");
    let refused: Vec<bool> = table.routes.iter().map(|r| !r.refused.is_empty()).collect();
    assert_eq!(refused, [true, true, true, false, false]);
    let half = &table.routes[3].backends;
    assert!(half[0].refused.is_empty() && half[0].backend.is_some());
    assert!(!half[1].refused.is_empty() && half[1].backend.is_none());
    // "must be dropped": requests go on without it.
    assert!(table.routes[4].filters.is_empty());
}

#[test]
fn sessions_are_the_rules_own_and_nonsense_is_refused() {
    let to = "backendRefs: [{name: v1, port: 80}]";
    let table = world(&[rules(&format!(
        "  - {{sessionPersistence: {{sessionName: stay, idleTimeout: 10m, absoluteTimeout: 0s}}, {to}}}
  - {{sessionPersistence: {{type: Header}}, {to}}}
  - {{{to}}}
"
    ))]);
    let table = destination(&table, "10.96.0.1:80", "x");
    let sessions: Vec<_> = table
        .routes
        .iter()
        .map(|route| route.policy.as_ref().unwrap().session_persistence.clone())
        .collect();
    let cookie = weft_api::proto::SessionPersistence {
        name: "stay".to_owned(),
        idle_timeout_ms: 600_000,
        by_path: true,
        ..Default::default()
    };
    let header = weft_api::proto::SessionPersistence {
        header: true,
        ..Default::default()
    };
    assert_eq!(sessions, [Some(cookie), Some(header), None]);
    for bad in [
        "{sessionName: 'a b'}",
        "{type: Header, sessionName: Content-Length}",
        "{type: Address}",
        "{cookieConfig: {lifetimeType: Permanent}}",
        "{cookieConfig: {lifetimeType: Forever}}",
        "{type: Header, cookieConfig: {lifetimeType: Session}}",
        "{sticky: true}",
    ] {
        let world = world(&[rules(&format!("  - {{sessionPersistence: {bad}, {to}}}\n"))]);
        let found = conditions(&world, Kind::HTTPRoute, "shop", "a");
        assert_eq!(shown(&found)[0], "Accepted=false UnsupportedValue", "{bad}");
        assert!(
            found[0].message.contains("sessionPersistence"),
            "{bad}: {found:?}"
        );
    }
}

/// GEP-1619, "Session Affinity in K8S Services".
#[test]
fn a_session_and_client_affinity_exclude_each_other() {
    let to = "backendRefs: [{name: v1, port: 80}]";
    let mut world = world(&[rules(&format!("  - {{sessionPersistence: {{}}, {to}}}\n"))]);
    let mut service = world.service(&Name::new("shop", "echo")).unwrap().clone();
    service.client_affinity = true;
    let service = crate::model::Object::Service(service);
    world.apply(Change::Set(Box::new(service)), &mut Dirty::default());
    let found = conditions(&world, Kind::HTTPRoute, "shop", "a");
    assert_eq!(shown(&found)[0], "Accepted=false UnsupportedValue");
    let table = destination(&world, "10.96.0.1:80", "x");
    assert_eq!(names(&table), ["Service/shop/echo"]);
}

#[test]
fn rules_go_before_the_policies_of_the_service() {
    let policy = "apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: p, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: echo}]
  timeouts: {request: 7s, idle: 9s}
  retries: {attempts: 1, codes: [500]}
";
    let route = rules(
        "  - {name: own, timeouts: {request: 2s, backendRequest: 1s}, retry: {codes: [503], attempts: 4, backoff: 50ms}, backendRefs: [{name: v1, port: 80}]}
  - {name: plain, timeouts: {request: 0s}, backendRefs: [{name: v1, port: 80}]}
",
    );
    let world = world(&[policy.to_owned(), route]);
    let table = destination(&world, "10.96.0.1:80", "x");
    let of = |index: usize| table.routes[index].policy.clone().unwrap();
    let (own, plain) = (of(0), of(1));
    assert_eq!(
        (own.request_timeout_ms, own.per_try_timeout_ms),
        (2000, 1000)
    );
    assert_eq!(own.idle_timeout_ms, 9000);
    let retry = own.retry.unwrap();
    assert_eq!((retry.attempts, &retry.status_codes[..]), (4, &[503][..]));
    // Half of it is random: at least 50 ms.
    assert_eq!(retry.backoff_base_ms, 100);
    assert!(retry.timeout && retry.connect_failure && retry.reset);
    assert_eq!(plain.request_timeout_ms, 0);
    assert_eq!(plain.retry.unwrap().status_codes, [500]);
}

#[test]
fn opaque_connections_are_not_for_http_routes() {
    let http = world(&[given(Given::default())]);
    let table = destination(&http, "10.96.0.1:80", "x");
    let opaque = table.opaque[0].route.as_ref().unwrap();
    assert_eq!(opaque.name, "Service/shop/echo");
    let tcp = world(&[given(Given {
        kind: "TCPRoute",
        rules: "  - backendRefs: [{name: v1, port: 80, weight: 3}, {name: v2, namespace: other, port: 80}]\n",
        ..Given::default()
    })]);
    let table = destination(&tcp, "10.96.0.1:80", "x");
    let weights: Vec<u32> = table.opaque[0]
        .route
        .as_ref()
        .unwrap()
        .backends
        .iter()
        .map(|b| b.weight)
        .collect();
    assert_eq!(weights, [3, 1]);
}

#[test]
fn server_names_choose_the_exact_one_first() {
    let tls = |name: &str, hosts: &str, to: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {{name: {name}, namespace: shop}}
spec:
  parentRefs: [{{group: '', kind: Service, name: echo, port: 80}}]
  hostnames: {hosts}
  rules: [{{backendRefs: [{{{to}, port: 80}}]}}]
"
        )
    };
    let world = world(&[
        tls("wide", "['*.org', '*.Example.org']", "name: v1"),
        tls("exact", "[a.example.org]", "name: v2, namespace: other"),
    ]);
    let table = destination(&world, "10.96.0.1:80", "x");
    let names: Vec<&str> = table
        .opaque
        .iter()
        .map(|o| o.server_names[0].as_str())
        .collect();
    assert_eq!(names, ["a.example.org", "*.example.org", "*.org"]);
    assert_eq!(table.routes[0].name, "Service/shop/echo");
}

#[test]
fn a_route_touches_its_services_only_and_a_backend_its_routes() {
    let mut world = world(&[]);
    let text = rules("  - backendRefs: [{name: later, port: 80}]\n");
    let (parsed, _) = manifest::parse(Path::new("test.yaml"), &text).unwrap();
    let route = parsed.into_iter().next().unwrap().object;
    let mut dirty = Dirty::default();
    world.apply(Change::Set(Box::new(route)), &mut dirty);
    let only = |dirty: &Dirty| {
        dirty
            .services
            .iter()
            .map(Name::to_string)
            .collect::<Vec<_>>()
    };
    assert_eq!(only(&dirty), ["shop/echo"]);
    assert!(dirty.addresses.is_empty() && dirty.endpoints.is_empty());
    let service = "apiVersion: v1
kind: Service
metadata: {name: later, namespace: shop}
spec: {clusterIP: 10.96.0.9, ports: [{port: 80}]}
";
    let (parsed, _) = manifest::parse(Path::new("test.yaml"), service).unwrap();
    let mut dirty = Dirty::default();
    let object = parsed.into_iter().next().unwrap().object;
    world.apply(Change::Set(Box::new(object)), &mut dirty);
    assert_eq!(only(&dirty), ["shop/echo", "shop/later"]);
    let table = destination(&world, "10.96.0.1:80", "x");
    assert!(table.routes[0].backends[0].backend.is_some());
}

#[test]
fn filters_are_passed_on() {
    let route = rules(
        "  - filters:
    - type: RequestHeaderModifier
      requestHeaderModifier: {set: [{name: A, value: b}], add: [{name: C, value: d}], remove: [E]}
    - type: RequestMirror
      requestMirror: {backendRef: {name: v2, namespace: other, port: 80}, percent: 25}
    backendRefs: [{name: v1, port: 80}]
",
    );
    let world = world(&[route]);
    let table = destination(&world, "10.96.0.1:80", "x");
    let filters: Vec<_> = table.routes[0]
        .filters
        .iter()
        .flat_map(|f| &f.filter)
        .collect();
    let [
        filter::Filter::RequestHeaders(edits),
        filter::Filter::Mirror(mirror),
    ] = filters[..]
    else {
        panic!("{filters:?}");
    };
    assert_eq!(
        (edits.set.len(), edits.add.len(), edits.remove.len()),
        (1, 1, 1)
    );
    assert_eq!((mirror.numerator, mirror.denominator), (25, 100));
}
