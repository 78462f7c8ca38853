//! Routes of the Gateway API with a Service as their parent, from a folder of manifests. The
//! expectations are those of the Gateway API's own conformance tests for meshes (v1.6), restated.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use weft_tests::mesh::{Mesh, Workload};
use weft_tests::wire::{Server, header, ok, serve_http, status};
use weft_tests::{PATIENCE, eventually};

/// A client, a Service "echo" in front of two workloads, and a Service for each of the two.
struct Shop {
    mesh: Mesh,
    echo: SocketAddr,
    v1: SocketAddr,
    _servers: Vec<Server>,
}

const CLIENT: usize = 0;

impl Shop {
    fn new(prepare: impl FnOnce(&mut Mesh)) -> Self {
        let mut mesh = Mesh::new();
        mesh.workload(Workload::new("client"));
        mesh.workload(Workload::new("echo-v1").port(8080, Some("http")));
        mesh.workload(Workload::new("echo-v2").port(8080, Some("http")));
        let echo = mesh.service("echo", 8080, Some("http"));
        let of = |last: u8| {
            let SocketAddr::V4(echo) = echo else {
                panic!("{echo} is not IPv4");
            };
            let mut octets = echo.ip().octets();
            octets[3] = last;
            SocketAddr::from((octets, 80))
        };
        for (name, last) in [("echo-v1", 201), ("echo-v2", 202)] {
            mesh.manifest(
                &format!("service-{name}"),
                &format!(
                    "apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: shop}}
spec:
  clusterIP: {}
  selector: {{name: {name}}}
  ports:
  - {{name: http, port: 80, targetPort: 8080, appProtocol: http}}
  - {{name: http-alt, port: 8080, appProtocol: http}}
",
                    of(last).ip()
                ),
            );
        }
        prepare(&mut mesh);
        mesh.start();
        let server = |i: usize, name: &'static str| {
            Server::start(mesh.host(i), 8080, move |wire| {
                serve_http(wire, move |head| {
                    let body = format!("{name}\n{head}");
                    format!(
                        "HTTP/1.1 200 OK\r\nX-Header-Set: theirs\r\nX-Kept: yes\r\nContent-Length: {}\r\n\r\n{body}",
                        body.len()
                    )
                    .into_bytes()
                });
            })
        };
        let servers = vec![server(1, "echo-v1"), server(2, "echo-v2")];
        Self {
            mesh,
            echo,
            v1: of(201),
            _servers: servers,
        }
    }

    /// Whoever answers, the head it saw, and the head of the answer.
    fn ask(&self, to: SocketAddr, request: &str, headers: &str) -> Answer {
        self.ask_from(CLIENT, to, request, headers)
    }

    fn ask_from(&self, client: usize, to: SocketAddr, request: &str, headers: &str) -> Answer {
        let mut wire = self.mesh.sidecar(client).connect(to);
        wire.send(format!("{request} HTTP/1.1\r\nHost: echo\r\n{headers}\r\n"));
        let (head, body) = wire.read_answer();
        let body = String::from_utf8(body).unwrap();
        let (backend, seen) = body.split_once('\n').unwrap_or_default();
        Answer {
            status: status(&head),
            backend: backend.to_owned(),
            seen: seen.to_owned(),
            head,
        }
    }

    fn get(&self, path: &str, headers: &str) -> Answer {
        self.ask(self.echo, &format!("GET {path}"), headers)
    }
}

struct Answer {
    status: u16,
    backend: String,
    seen: String,
    head: String,
}

impl Answer {
    /// Values of a request header as the server saw them, joined.
    fn saw(&self, name: &str) -> Option<String> {
        let values: Vec<&str> = self
            .seen
            .lines()
            .skip(1)
            .filter_map(|line| line.split_once(':'))
            .filter(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.trim())
            .collect();
        (!values.is_empty()).then(|| values.join(","))
    }

    fn request_line(&self) -> &str {
        self.seen.lines().next().unwrap_or_default()
    }
}

/// An HTTPRoute of namespace "shop" on a Service, with these rules.
fn route(service: &str, rules: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: {service}, namespace: shop}}
spec:
  parentRefs:
  - {{group: '', kind: Service, name: {service}, port: 80}}
  rules:
{rules}"
    )
}

fn with(rules: &str) -> Shop {
    Shop::new(|mesh| mesh.manifest("route", &route("echo", rules)))
}

pub fn requests_are_split_by_weight() {
    let shop = with(
        "  - backendRefs:
    - {name: echo-v1, port: 8080, weight: 70}
    - {name: echo-v2, port: 8080, weight: 30}
    - {name: nobody, port: 1, weight: 0}
",
    );
    let mut count: BTreeMap<String, u32> = BTreeMap::new();
    let mut wire = shop.mesh.sidecar(CLIENT).connect(shop.echo);
    for _ in 0..500 {
        wire.send("GET / HTTP/1.1\r\nHost: echo\r\n\r\n");
        let (head, body) = wire.read_answer();
        assert_eq!(status(&head), 200);
        let name = String::from_utf8_lossy(&body[..7]).into_owned();
        *count.entry(name).or_default() += 1;
    }
    // Four standard deviations of 500 draws are 41.
    let v1 = count["echo-v1"];
    assert!((309..=391).contains(&v1), "{count:?}");
    assert_eq!(v1 + count["echo-v2"], 500, "{count:?}");
}

/// MeshHTTPRouteMatching, MeshHTTPRouteNamedRouteRule.
pub fn matches_win_in_the_specified_order() {
    let shop = with(
        "  - name: one
    matches:
    - path: {type: PathPrefix, value: /}
    - headers: [{name: version, value: one}]
    backendRefs: [{name: echo-v1, port: 8080}]
  - matches:
    - path: {type: PathPrefix, value: /v2}
    - headers: [{name: version, value: two}]
    - method: DELETE
    - path: {type: RegularExpression, value: '/r[0-9]+'}
    backendRefs: [{name: echo-v2, port: 8080}]
",
    );
    for (request, headers, expected) in [
        ("GET /", "", "echo-v1"),
        ("GET /example", "", "echo-v1"),
        ("GET /", "Version: one\r\n", "echo-v1"),
        ("GET /v2", "", "echo-v2"),
        ("GET /v2/example", "", "echo-v2"),
        ("GET /", "Version: two\r\n", "echo-v2"),
        ("GET /v2/", "", "echo-v2"),
        ("GET /v2example", "", "echo-v1"),
        ("GET /foo/v2/example", "", "echo-v1"),
        ("DELETE /", "", "echo-v2"),
        ("GET /r12?x", "", "echo-v2"),
        ("GET /r12x", "", "echo-v1"),
    ] {
        let answer = shop.ask(shop.echo, request, headers);
        assert_eq!(
            (answer.status, &*answer.backend),
            (200, expected),
            "{request} {headers}"
        );
    }
}

/// MeshHTTPRouteQueryParamMatching.
pub fn query_parameters_choose_and_what_matches_nothing_is_404() {
    let shop = with(
        "  - matches:
    - queryParams: [{name: animal, value: whale}]
    backendRefs: [{name: echo-v1, port: 8080}]
  - matches:
    - queryParams: [{name: animal, value: dolphin}]
    backendRefs: [{name: echo-v2, port: 8080}]
  - matches:
    - headers: [{name: version, value: one}]
      queryParams: [{name: animal, value: whale}]
    backendRefs: [{name: echo-v2, port: 8080}]
  - matches:
    - path: {type: PathPrefix, value: /path3}
      queryParams: [{name: animal, value: shark}]
    - path: {type: PathPrefix, value: /path4}
      headers: [{name: version, value: three}]
      queryParams: [{name: animal, value: kraken}]
    backendRefs: [{name: echo-v1, port: 8080}]
  - matches:
    - path: {type: PathPrefix, value: /path5}
    backendRefs: [{name: echo-v1, port: 8080}]
  - matches:
    - queryParams: [{name: animal, value: hydra}]
    backendRefs: [{name: echo-v2, port: 8080}]
",
    );
    for (path, headers, expected) in [
        ("/?animal=whale", "", Some("echo-v1")),
        ("/?animal=dolphin&color=yellow", "", Some("echo-v2")),
        ("/?animal=whale", "version: one\r\n", Some("echo-v2")),
        ("/path3?animal=shark", "", Some("echo-v1")),
        (
            "/path4?animal=kraken",
            "version: three\r\n",
            Some("echo-v1"),
        ),
        ("/path5?animal=hydra", "", Some("echo-v1")),
        ("/?color=blue", "", None),
        ("/?animal=whaledolphin", "", None),
        ("/?animal=shark", "", None),
        ("/path4?animal=kraken", "", None),
        ("/", "", None),
    ] {
        let answer = shop.get(path, headers);
        match expected {
            Some(backend) => assert_eq!(answer.backend, backend, "{path} {headers}"),
            None => assert_eq!(answer.status, 404, "{path} {headers}"),
        }
    }
}

/// MeshHTTPRouteRedirectPath, -Port, -HostAndStatus, -SchemeRedirect, 303, 307 and 308.
pub fn redirects_say_where() {
    let filter = |redirect: &str| {
        format!(
            "    filters: [{{type: RequestRedirect, requestRedirect: {redirect}}}]
"
        )
    };
    let prefix =
        |path: &str| format!("  - matches: [{{path: {{type: PathPrefix, value: {path}}}}}]\n");
    let cases = [
        (
            "/prefix",
            "{path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}",
        ),
        (
            "/full",
            "{path: {type: ReplaceFullPath, replaceFullPath: /whole}, statusCode: 301}",
        ),
        ("/host", "{hostname: example.org}"),
        ("/port", "{port: 8083}"),
        ("/scheme", "{scheme: https}"),
        (
            "/all",
            "{scheme: https, hostname: example.org, port: 8443, statusCode: 308}",
        ),
        ("/303", "{statusCode: 303}"),
        ("/307", "{statusCode: 307}"),
    ];
    let rules: String = cases
        .iter()
        .map(|(path, redirect)| prefix(path) + &filter(redirect))
        .collect();
    let shop = with(&rules);
    for (path, code, location) in [
        ("/prefix/lemon?x=1", 302, "http://echo/new/lemon?x=1"),
        ("/full/path", 301, "http://echo/whole"),
        ("/host", 302, "http://example.org/host"),
        ("/port/a", 302, "http://echo:8083/port/a"),
        ("/scheme", 302, "https://echo/scheme"),
        ("/all", 308, "https://example.org:8443/all"),
        ("/303", 303, "http://echo/303"),
        ("/307", 307, "http://echo/307"),
    ] {
        let answer = shop.get(path, "");
        assert_eq!(answer.status, code, "{path}");
        assert_eq!(header(&answer.head, "location"), Some(location), "{path}");
    }
}

/// MeshHTTPRouteRewritePath.
pub fn urls_are_rewritten() {
    let shop = with(
        "  - matches: [{path: {type: PathPrefix, value: /prefix/one}}]
    filters:
    - type: URLRewrite
      urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /one}}
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /strip-prefix}}]
    filters:
    - type: URLRewrite
      urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /full/one}}]
    filters:
    - type: URLRewrite
      urlRewrite: {hostname: one.example.org, path: {type: ReplaceFullPath, replaceFullPath: /one}}
    backendRefs: [{name: echo-v1, port: 80}]
",
    );
    for (path, expected, host) in [
        ("/prefix/one/two", "GET /one/two HTTP/1.1", "echo"),
        (
            "/prefix/one?q=/prefix/one",
            "GET /one?q=/prefix/one HTTP/1.1",
            "echo",
        ),
        ("/strip-prefix/three", "GET /three HTTP/1.1", "echo"),
        ("/strip-prefix", "GET / HTTP/1.1", "echo"),
        ("/strip-prefix/", "GET / HTTP/1.1", "echo"),
        ("/full/one/two?q", "GET /one?q HTTP/1.1", "one.example.org"),
    ] {
        let answer = shop.get(path, "");
        assert_eq!(answer.request_line(), expected);
        assert_eq!(answer.saw("host").as_deref(), Some(host), "{path}");
    }
}

/// MeshHTTPRouteRequestHeaderModifier and MeshHTTPRouteBackendRequestHeaderModifier.
pub fn request_headers_are_changed_and_nothing_else() {
    let modifier = "type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: X-Set, value: set}], add: [{name: X-Add, value: added}], remove: [X-Remove]}";
    let shop = with(&format!(
        "  - matches: [{{path: {{type: PathPrefix, value: /rule}}}}]
    filters: [{{{modifier}}}]
    backendRefs: [{{name: echo-v1, port: 8080}}]
  - matches: [{{path: {{type: PathPrefix, value: /backend}}}}]
    backendRefs: [{{name: echo-v1, port: 8080, filters: [{{{modifier}}}]}}]
  - matches: [{{path: {{type: PathPrefix, value: /both}}}}]
    filters: [{{{modifier}}}]
    backendRefs:
    - name: echo-v1
      port: 8080
      filters:
      - type: RequestHeaderModifier
        requestHeaderModifier: {{add: [{{name: X-Set, value: more}}], remove: [X-Add]}}
"
    ));
    for path in ["/rule", "/backend"] {
        let answer = shop.get(
            path,
            "x-seT: 1\r\nOther: o\r\nX-Set: 2\r\nx-add: theirs\r\nX-REMOVE: y\r\n",
        );
        assert_eq!(
            answer.seen,
            format!(
                "GET {path} HTTP/1.1\r\nHost: echo\r\nx-seT: set\r\nOther: o\r\nx-add: theirs\r\nX-Add: added\r\n\r\n"
            )
        );
        let bare = shop.get(path, "");
        assert_eq!(
            bare.seen,
            format!("GET {path} HTTP/1.1\r\nHost: echo\r\nX-Set: set\r\nX-Add: added\r\n\r\n")
        );
    }
    let both = shop.get("/both", "X-Add: theirs\r\n");
    assert_eq!(both.saw("x-set").as_deref(), Some("set,more"));
    assert_eq!(both.saw("x-add"), None);
}

pub fn response_headers_are_changed() {
    let shop = with(
        "  - filters:
    - type: ResponseHeaderModifier
      responseHeaderModifier:
        set: [{name: x-header-set, value: ours}]
        add: [{name: X-New, value: new}]
        remove: [x-kept]
    backendRefs: [{name: echo-v1, port: 80}]
",
    );
    let answer = shop.get("/", "");
    assert_eq!(header(&answer.head, "x-header-set"), Some("ours"));
    assert_eq!(header(&answer.head, "x-new"), Some("new"));
    assert_eq!(header(&answer.head, "x-kept"), None);
    assert!(
        answer.head.contains("X-Header-Set: ours\r\n"),
        "{}",
        answer.head
    );
}

pub fn a_backend_that_is_not_there_is_500_for_its_share() {
    let shop = with(
        "  - matches: [{path: {type: Exact, value: /half}}]
    backendRefs:
    - {name: echo-v1, port: 80}
    - {name: nobody, port: 80}
  - matches: [{path: {type: Exact, value: /none}}]
    backendRefs: [{name: echo-v1, port: 81}]
  - matches: [{path: {type: Exact, value: /kind}}]
    backendRefs: [{group: example.org, kind: Bucket, name: echo-v1, port: 80}]
  - matches: [{path: {type: Exact, value: /empty}}]
  - matches: [{path: {type: Exact, value: /filter}}]
    filters: [{type: ExternalAuth}]
    backendRefs: [{name: echo-v1, port: 80}]
",
    );
    for path in ["/none", "/kind", "/empty", "/filter"] {
        assert_eq!(shop.get(path, "").status, 500, "{path}");
    }
    let failed = (0..100)
        .filter(|_| shop.get("/half", "").status == 500)
        .count();
    // Four standard deviations of 100 draws are 20.
    assert!((30..=70).contains(&failed), "{failed}");
}

pub fn rules_have_timeouts_and_retries() {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    mesh.workload(Workload::new("server").port(8080, None));
    let vip = mesh.service("server", 8080, Some("http"));
    mesh.manifest(
        "route",
        &route(
            "server",
            "  - matches: [{path: {type: Exact, value: /slow}}]
    timeouts: {request: 200ms}
    backendRefs: [{name: server, port: 80}]
  - matches: [{path: {type: Exact, value: /flaky}}]
    retry: {codes: [503], attempts: 3, backoff: 10ms}
    backendRefs: [{name: server, port: 80}]
  - backendRefs: [{name: server, port: 80}]
",
        ),
    );
    mesh.start();
    let count = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&count);
    let _server = Server::start(mesh.host(1), 8080, move |wire| {
        let count = Arc::clone(&counter);
        serve_http(wire, move |head| {
            if head.contains("/slow") {
                std::thread::sleep(Duration::from_secs(1));
            }
            let first = count.fetch_add(1, Ordering::SeqCst) % 3 < 2;
            if (head.contains("/flaky") || head.contains("/bare")) && first {
                return b"HTTP/1.1 503 Not Now\r\nContent-Length: 0\r\n\r\n".to_vec();
            }
            ok("well")
        });
    });
    let get = |path: &str| {
        let mut client = mesh.sidecar(0).connect(vip);
        client.send(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"));
        status(&client.read_answer().0)
    };
    assert_eq!(get("/flaky"), 200);
    assert_eq!(count.load(Ordering::SeqCst), 3);
    assert_eq!(get("/bare"), 503);
    assert_eq!(get("/slow"), 504);
}

/// MeshConsumerRoute.
pub fn a_consumer_route_is_for_its_own_namespace() {
    let set = |namespace: &str, value: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: set, namespace: {namespace}}}
spec:
  parentRefs: [{{group: '', kind: Service, name: echo-v1, namespace: shop}}]
  rules:
  - filters:
    - type: ResponseHeaderModifier
      responseHeaderModifier: {{set: [{{name: X-Header-Set, value: {value}}}]}}
    backendRefs: [{{name: echo-v1, namespace: shop, port: 80}}]
"
        )
    };
    let mut other = 0;
    let shop = Shop::new(|mesh| {
        other = mesh.workload(Workload::new("visitor").namespace("elsewhere"));
        mesh.manifest("consumer", &set("elsewhere", "consumer"));
    });
    let seen = |client: usize| {
        let answer = shop.ask_from(client, shop.v1, "GET /", "");
        assert_eq!((answer.status, &*answer.backend), (200, "echo-v1"));
        header(&answer.head, "x-header-set").unwrap().to_owned()
    };
    assert_eq!(
        (seen(CLIENT), seen(other)),
        ("theirs".into(), "consumer".into())
    );
    shop.mesh.manifest("producer", &set("shop", "producer"));
    eventually("the producer's route is known", PATIENCE, || {
        seen(CLIENT) == "producer"
    });
    assert_eq!(seen(other), "consumer");
    shop.mesh.remove_manifest("consumer");
    eventually("the consumer's route is gone", PATIENCE, || {
        seen(other) == "producer"
    });
    assert_eq!(seen(CLIENT), "producer");
}

/// MeshPorts, MeshFrontend, MeshFrontendHostname.
pub fn ports_and_pod_addresses_are_told_apart() {
    let shop = Shop::new(|mesh| {
        mesh.manifest(
            "route",
            &route(
                "echo-v1",
                "  - filters:
    - type: ResponseHeaderModifier
      responseHeaderModifier: {set: [{name: X-Header-Set, value: ours}]}
    backendRefs: [{name: echo-v1, port: 80}]
",
            ),
        );
    });
    let seen = |to: SocketAddr| {
        let answer = shop.ask(to, "GET /", "");
        assert_eq!(answer.status, 200);
        header(&answer.head, "x-header-set").unwrap().to_owned()
    };
    assert_eq!(seen(shop.v1), "ours");
    assert_eq!(seen(SocketAddr::new(shop.v1.ip(), 8080)), "theirs");
    assert_eq!(seen(shop.mesh.sidecar(1).address(8080)), "theirs");
    // The Host header chooses nothing.
    assert_eq!(seen(shop.echo), "theirs");
}

pub fn cross_origin_requests() {
    let shop = with(
        "  - filters:
    - type: CORS
      cors:
        allowOrigins: ['https://*.example.org', 'http://plain.example']
        allowMethods: [PUT]
        allowHeaders: [X-Token]
        exposeHeaders: [X-Kept]
        allowCredentials: true
        maxAge: 60
    backendRefs: [{name: echo-v1, port: 80}]
",
    );
    let ask = "Access-Control-Request-Method: PUT\r\nAccess-Control-Request-Headers: x-token\r\n";
    let preflight = |origin: &str| {
        shop.ask(
            shop.echo,
            "OPTIONS /",
            &format!("Origin: {origin}\r\n{ask}"),
        )
    };
    let allowed = preflight("https://a.b.example.org");
    assert_eq!((allowed.status, &*allowed.backend), (204, ""));
    for (name, value) in [
        ("access-control-allow-origin", "https://a.b.example.org"),
        ("access-control-allow-credentials", "true"),
        ("access-control-allow-methods", "PUT"),
        ("access-control-allow-headers", "X-Token"),
        ("access-control-max-age", "60"),
    ] {
        assert_eq!(header(&allowed.head, name), Some(value), "{name}");
    }
    for origin in [
        "https://example.com",
        "http://a.example.org",
        "https://a.example.org:8443",
    ] {
        let refused = preflight(origin);
        assert_eq!(refused.status, 204);
        assert_eq!(
            header(&refused.head, "access-control-allow-origin"),
            None,
            "{origin}"
        );
    }
    let actual = shop.get("/", "Origin: http://plain.example:80\r\n");
    assert_eq!(actual.backend, "echo-v1");
    assert_eq!(
        header(&actual.head, "access-control-allow-origin"),
        Some("http://plain.example:80")
    );
    assert_eq!(
        header(&actual.head, "access-control-expose-headers"),
        Some("X-Kept")
    );
    // OPTIONS that is no preflight is the application's.
    assert_eq!(shop.ask(shop.echo, "OPTIONS /", "").backend, "echo-v1");
}

pub fn a_backends_own_redirect_and_cors_hold_for_its_share() {
    let shop = with(
        "  - matches: [{path: {value: /moved}}]
    backendRefs:
    - {name: echo-v1, port: 80, weight: 0}
    - name: echo-v2
      port: 80
      filters:
      - {type: RequestRedirect, requestRedirect: {hostname: example.org, statusCode: 307}}
  - matches: [{path: {value: /api}}]
    filters: [{type: CORS, cors: {allowOrigins: ['http://rule.example']}}]
    backendRefs:
    - name: echo-v1
      port: 80
      filters: [{type: CORS, cors: {allowOrigins: ['http://backend.example']}}]
",
    );
    let moved = shop.get("/moved?x", "");
    assert_eq!((moved.status, &*moved.backend), (307, ""));
    assert_eq!(
        header(&moved.head, "location"),
        Some("http://example.org/moved?x")
    );
    let allowed = |origin: &str| {
        let answer = shop.get("/api", &format!("Origin: {origin}\r\n"));
        assert_eq!(answer.backend, "echo-v1");
        header(&answer.head, "access-control-allow-origin").map(str::to_owned)
    };
    assert_eq!(
        allowed("http://backend.example").as_deref(),
        Some("http://backend.example")
    );
    assert_eq!(allowed("http://rule.example"), None);
}

pub fn a_changed_route_takes_effect() {
    let to = |service: &str| format!("  - backendRefs: [{{name: {service}, port: 80}}]\n");
    let shop = with(&to("echo-v1"));
    assert_eq!(shop.get("/", "").backend, "echo-v1");
    shop.mesh.manifest("route", &route("echo", &to("echo-v2")));
    eventually("the route leads elsewhere", PATIENCE, || {
        shop.get("/", "").backend == "echo-v2"
    });
    shop.mesh.remove_manifest("route");
    eventually("without the route both are reached", PATIENCE, || {
        shop.get("/", "").backend == "echo-v1"
    });
}

pub fn copies_go_their_own_way() {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    mesh.workload(Workload::new("server").port(8080, None));
    mesh.workload(Workload::new("copy").port(8080, None));
    let vip = mesh.service("server", 8080, Some("http"));
    mesh.service("copy", 8080, Some("http"));
    mesh.manifest(
        "route",
        &route(
            "server",
            "  - filters:
    - type: RequestMirror
      requestMirror: {backendRef: {name: copy, port: 80}}
    - type: RequestHeaderModifier
      requestHeaderModifier: {set: [{name: X-Copied, value: 'yes'}]}
    backendRefs: [{name: server, port: 80}]
",
        ),
    );
    mesh.start();
    let _server = Server::answering(mesh.host(1), 8080, ok("well"));
    let (seen, copies) = std::sync::mpsc::channel();
    let seen = std::sync::Mutex::new(seen);
    // Slow to answer, and with an error: nobody hears of it.
    let _copy = Server::start(mesh.host(2), 8080, move |mut wire| {
        let head = wire.read_head();
        let length = header(&head, "content-length").map_or(0, |v| v.parse().unwrap());
        let body = wire.read_exactly(length);
        seen.lock().unwrap().send((head, body)).unwrap();
        std::thread::sleep(Duration::from_secs(1));
        // Nobody may be there any more to hear it.
        let _ = wire.try_send(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n");
    });
    // More than is sent with the head: the rest goes to the copy as it comes.
    let body = vec![b'x'; 300_000];
    let mut client = mesh.sidecar(0).connect(vip);
    let start = std::time::Instant::now();
    client.send(format!(
        "POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
        body.len()
    ));
    client.send(&body);
    let (head, answer) = client.read_answer();
    assert_eq!((status(&head), &*answer), (200, &b"well"[..]));
    client.send("GET /b HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!(status(&client.read_answer().0), 200);
    assert!(
        start.elapsed() < Duration::from_millis(900),
        "it waited for a copy"
    );
    let mut copied = BTreeMap::new();
    for _ in 0..2 {
        let (head, body) = copies.recv_timeout(PATIENCE).unwrap();
        assert!(head.contains("X-Copied: yes\r\n"), "{head}");
        let path = head.split(' ').nth(1).unwrap().to_owned();
        copied.insert(path, body);
    }
    assert_eq!(copied["/a"], body);
    assert_eq!(copied["/b"], b"");
}
