//! Connections that are not HTTP to the mesh, and services that are not in it.

use weft_tests::authority::Authority;
use weft_tests::kube::{self, Namespace, PATIENCE, eventually};

use crate::apps::{self, accepted, all_good, by, load, number, of_all};
use crate::install::NAMESPACE;

/// `apps::server` with HTTPS on port 8443 too, by the certificate of the Secret `tls`.
fn tls_server(name: &str) -> String {
    apps::server(name, 1)
        .replace(
            "    - {name: greeting, port: 7000}\n---",
            "    - {name: greeting, port: 7000}\n    - {name: https, port: 443, targetPort: 8443, appProtocol: tls}\n---",
        )
        .replace(
            "args: [serve]",
            "args: [serve, --tls, '8443', --certificate, /tls/tls.crt, --key, /tls/tls.key]
          volumeMounts: [{name: tls, mountPath: /tls}]",
        )
        .replace(
            "      containers:",
            "      volumes: [{name: tls, secret: {secretName: tls}}]\n      containers:",
        )
}

pub fn connections_are_shared_by_weight_and_by_name() {
    let namespace = Namespace::create("weft-test-raw", true);
    let ns = namespace.0.as_str();
    let authority = Authority::new();
    let names = ["a.example.org", "b.example.org"];
    apps::start(
        ns,
        &[
            authority.issue(&names).secret("tls"),
            tls_server("first"),
            tls_server("second"),
            apps::client("client"),
        ],
        &["first", "second", "client"],
    );
    let client = kube::pod(ns, "app=client");
    let greet = |count: &str| {
        let words = ["/weft-probe", "greet", "first:7000", "--count", count];
        kube::exec(ns, &client, "app", &words)
    };
    assert_eq!(by(&greet("10"), "second"), 0);
    let visit = |name: &str| {
        let words = [
            "https://first/",
            "--sni",
            name,
            "--no-keepalive",
            "--count",
            "8",
        ];
        load(ns, "client", &words)
    };
    assert_eq!(by(&visit("b.example.org"), "first"), 8);
    kube::apply(
        ns,
        "
apiVersion: gateway.networking.k8s.io/v1alpha2
kind: TCPRoute
metadata: {name: greetings}
spec:
  parentRefs: [{group: '', kind: Service, name: first, port: 7000}]
  rules:
    - backendRefs:
        - {name: first, port: 7000, weight: 1}
        - {name: second, port: 7000, weight: 1}
",
    );
    accepted(ns, "tcproute/greetings");
    eventually("connections are shared", PATIENCE, || {
        let seen = greet("20");
        if by(&seen, "second") > 0 {
            Ok(())
        } else {
            Err(seen.to_string())
        }
    });
    let seen = greet("100");
    println!("1 to 1 over 100 connections: {}", seen["servers"]);
    // Five standard deviations.
    assert!((25..=75).contains(&by(&seen, "second")), "{seen:#}");
    // The schema of TLSRoute has functions that Kubernetes 1.28 does not know.
    if !kube::has_resource("gateway.networking.k8s.io", "v1", "tlsroutes") {
        let replicas = "app.kubernetes.io/name=weft-control-plane";
        let said = kube::kubectl(&["logs", "-n", NAMESPACE, "-l", replicas, "--tail=-1"]);
        assert!(said.contains("the cluster does not know tlsroutes.gateway.networking.k8s.io"));
        println!("the cluster has no TLSRoutes, and the control plane says so");
        return;
    }
    kube::apply(
        ns,
        "
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {name: names}
spec:
  parentRefs: [{group: '', kind: Service, name: first, port: 443}]
  hostnames: [b.example.org]
  rules: [{backendRefs: [{name: second, port: 443}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {name: others}
spec:
  parentRefs: [{group: '', kind: Service, name: first, port: 443}]
  hostnames: ['*.example.org']
  rules: [{backendRefs: [{name: first, port: 443}]}]
",
    );
    for route in ["tlsroute/names", "tlsroute/others"] {
        accepted(ns, route);
    }
    eventually("names decide", PATIENCE, || {
        let (a, b) = (visit("a.example.org"), visit("b.example.org"));
        if by(&a, "first") == 8 && by(&b, "second") == 8 {
            Ok(())
        } else {
            Err(format!("{a}\n{b}"))
        }
    });
    let nobodys = visit("c.example.com");
    assert_eq!(number(&nobodys["good"]), 0.0, "{nobodys:#}");
}

pub fn plaintext_becomes_tls_outside() {
    // A server that the mesh knows nothing of, with a certificate of somebody else's.
    let outside = Namespace::create("weft-test-outside", false);
    let namespace = Namespace::create("weft-test-external", true);
    let ns = namespace.0.as_str();
    let authority = Authority::new();
    let secret = authority.issue(&["api.payments.example"]).secret("tls");
    apps::start(&outside.0, &[secret, tls_server("payments")], &["payments"]);
    apps::start(ns, &[apps::client("client")], &["client"]);
    let service = |server: &str, authority: &Authority| {
        format!(
            "
apiVersion: policy.weft.dev/v1alpha1
kind: ExternalService
metadata: {{name: payments}}
spec:
  hosts: [api.payments.example]
  # Made up: what applications connect to.
  addresses: [198.51.100.7]
  endpoints: [{{address: payments.{outside}.svc.cluster.local}}]
  ports:
    - port: 80
      targetPort: 443
      appProtocol: http
      tls:
        sni: {server}
        caCertificates: {ca}
---
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {{name: payments}}
spec:
  targetRefs: [{{group: policy.weft.dev, kind: ExternalService, name: payments}}]
  retries: {{attempts: 7, codes: [503], backoff: {{base: 5ms, max: 20ms}}}}
",
            outside = outside.0,
            ca = authority.yaml(8),
        )
    };
    let visits = ["http://198.51.100.7/?fail=10", "--rate", "50"];
    kube::apply(ns, &service("api.payments.example", &authority));
    let seen = eventually("the service outside answers", PATIENCE, || {
        let seen = load(ns, "client", &visits);
        if seen["good"] == seen["requests"] {
            Ok(seen)
        } else {
            Err(seen.to_string())
        }
    });
    println!("an external service over TLS, a tenth of its answers 503: {seen}");
    all_good(&seen);
    assert!(by(&seen, "payments") > 0, "{seen:#}");
    let retries = of_all(ns, "client", "weft_retries_total", &[]);
    assert!(retries > 0.0, "its policy has not been applied");
    // Another's certificate, and a certificate of another authority: no request gets there.
    for (server, authority) in [
        ("api.others.example", &authority),
        ("api.payments.example", &Authority::new()),
    ] {
        kube::apply(ns, &service(server, authority));
        let seen = eventually("the server is not trusted", PATIENCE, || {
            let seen = load(ns, "client", &["http://198.51.100.7/", "--count", "8"]);
            if number(&seen["good"]) == 0.0 {
                Ok(seen)
            } else {
                Err(seen.to_string())
            }
        });
        assert!(seen.to_string().contains("certificate"), "{seen:#}");
    }
}
