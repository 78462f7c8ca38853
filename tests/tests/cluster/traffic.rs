//! Who reaches whom, and how: injection, names and addresses, mutual TLS on the wire.

use std::sync::OnceLock;
use std::time::Duration;

use weft_tests::kube::{self, Namespace, PATIENCE, eventually, get, try_exec};

use crate::apps::{self, all_good, load, metric, metrics, one};

/// A server (2 replicas) and a client in the mesh; a client without.
fn mesh() -> (&'static str, &'static str) {
    static MADE: OnceLock<(Namespace, Namespace)> = OnceLock::new();
    let (inside, outside) = MADE.get_or_init(|| {
        let inside = Namespace::create("weft-test-in", true);
        let outside = Namespace::create("weft-test-out", false);
        apps::start(
            &inside.0,
            &[apps::server("server", 2), apps::client("client")],
            &["server", "client"],
        );
        apps::start(&outside.0, &[apps::client("stranger")], &["stranger"]);
        (inside, outside)
    });
    (&inside.0, &outside.0)
}

const STRICT: &str = "
apiVersion: policy.weft.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: strict}
spec: {mtls: {mode: STRICT}}
";

pub fn pods_are_injected_as_they_should() {
    let (inside, outside) = mesh();
    let pod = &kube::pods(inside, "app=server")[0];
    let names = |of: &str| -> Vec<&str> {
        let containers = pod["spec"][of].as_array().unwrap().iter();
        containers
            .map(|container| container["name"].as_str().unwrap())
            .collect()
    };
    let proxy = if kube::has_native_sidecars() {
        assert_eq!(names("initContainers"), ["weft-init", "weft-proxy"]);
        assert_eq!(names("containers"), ["app"]);
        let proxy = &pod["spec"]["initContainers"][1];
        assert_eq!(proxy["restartPolicy"], "Always");
        assert!(proxy["lifecycle"].is_null(), "{proxy:#}");
        proxy
    } else {
        assert_eq!(names("initContainers"), ["weft-init"]);
        assert_eq!(names("containers"), ["weft-proxy", "app"]);
        let proxy = &pod["spec"]["containers"][0];
        for (hook, waits_for) in [("postStart", "ready"), ("preStop", "alone")] {
            let command = &proxy["lifecycle"][hook]["exec"]["command"];
            assert_eq!(command[2], waits_for, "{proxy:#}");
        }
        let default = &pod["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"];
        assert_eq!(default, "app");
        proxy
    };
    let security = &proxy["securityContext"];
    assert_eq!(security["runAsNonRoot"], true);
    assert_eq!(security["readOnlyRootFilesystem"], true);
    assert_eq!(security["capabilities"]["drop"][0], "ALL");
    assert!(security["capabilities"]["add"].is_null());
    assert_eq!(security["seccompProfile"]["type"], "RuntimeDefault");
    let pod = &kube::pods(outside, "app=stranger")[0];
    assert!(pod["spec"]["initContainers"].is_null(), "{pod:#}");
}

pub fn services_pods_and_names_are_reached_by_mutual_tls() {
    let (inside, _) = mesh();
    let client = kube::pod(inside, "app=client");
    let address = kube::pods(inside, "app=server")[0]["status"]["podIP"]
        .as_str()
        .unwrap()
        .to_owned();
    let vip = get(inside, &["service", "server"])["spec"]["clusterIP"]
        .as_str()
        .unwrap()
        .to_owned();
    for url in [
        "http://server/".to_owned(),
        format!("http://{vip}/"),
        format!("http://server.{inside}.svc.cluster.local/"),
        format!("http://{address}:8080/"),
        "http://server-headless:8080/".to_owned(),
    ] {
        for version in [&[][..], &["--http2"]] {
            let mut arguments = vec![url.as_str(), "--seconds", "2", "--rate", "30"];
            arguments.extend(version);
            let before = metric(
                &metrics(inside, &client),
                "weft_requests_total",
                &["direction=\"outbound\"", "mtls=\"true\""],
            );
            let seen = load(inside, "client", &arguments);
            all_good(&seen);
            let after = metric(
                &metrics(inside, &client),
                "weft_requests_total",
                &["direction=\"outbound\"", "mtls=\"true\""],
            );
            let sent = seen["requests"].as_f64().unwrap();
            println!(
                "{url} {version:?}: {sent} requests, {} by mutual TLS",
                after - before
            );
            assert!((after - before - sent).abs() < 0.5, "{seen}");
            if url == "http://server/" {
                let servers = seen["servers"].as_object().unwrap();
                assert_eq!(servers.len(), 2, "balanced over both: {seen}");
            }
        }
    }
    for to in ["server:7000", "server-headless:7000"] {
        let said = kube::exec(inside, &client, "app", &["/weft-probe", "greet", to]);
        println!("{to}, where the server speaks first: {said}");
        assert_eq!(said["answer"], "250 HELO probe");
    }
}

/// An ear in the host's network.
fn ear(namespace: &str) -> String {
    let image = apps::image();
    kube::apply(
        namespace,
        &format!(
            "
apiVersion: v1
kind: Pod
metadata: {{name: ear, labels: {{app: ear}}}}
spec:
  hostNetwork: true
  terminationGracePeriodSeconds: 0
  containers:
    - name: app
      image: {image}
      imagePullPolicy: IfNotPresent
      args: [serve, --http, \"18080\", --greeting, \"17000\"]
      securityContext: {{runAsUser: 0, capabilities: {{add: [NET_RAW]}}}}
"
        ),
    );
    kube::kubectl(&[
        "wait",
        "-n",
        namespace,
        "pod/ear",
        "--for=condition=Ready",
        "--timeout=60s",
    ]);
    "ear".to_owned()
}

pub fn nothing_goes_over_the_wire_in_the_clear() {
    let (inside, outside) = mesh();
    let ear = ear(outside);
    let secret = "a-secret-between-friends";
    let hear = |from: &str, client: &str| {
        std::thread::scope(|scope| {
            let heard = scope.spawn(|| {
                kube::exec(
                    outside,
                    &ear,
                    "app",
                    &[
                        "/weft-probe",
                        "listen",
                        secret,
                        "--seconds",
                        "6",
                        "--port",
                        "8080",
                    ],
                )
            });
            std::thread::sleep(Duration::from_secs(1));
            let url = format!("http://server.{inside}/{secret}");
            all_good(&load(from, client, &[&url, "--seconds", "3"]));
            heard.join().unwrap()
        })
    };
    let plain = hear(outside, "stranger");
    assert!(
        plain["found"][secret].as_u64() > Some(0),
        "the ear is deaf: {plain}"
    );
    let meshed = hear(inside, "client");
    println!("on the wire, without a sidecar: {plain}; with: {meshed}");
    assert!(meshed["frames"].as_u64() > Some(0), "{meshed}");
    assert_eq!(meshed["found"][secret], 0, "{meshed}");
    kube::kubectl(&["delete", "pod", "-n", outside, "ear", "--wait=false"]);
}

pub fn plain_pods_are_served_until_strict() {
    let (inside, outside) = mesh();
    let url = format!("http://server.{inside}/");
    all_good(&load(outside, "stranger", &[&url, "--seconds", "2"]));
    kube::apply(inside, STRICT);
    eventually("strangers are refused", PATIENCE, || {
        let seen = one(outside, "stranger", &url);
        if seen["good"] == 0 {
            Ok(())
        } else {
            Err(seen.to_string())
        }
    });
    all_good(&load(inside, "client", &[&url, "--seconds", "2"]));
    let refused: f64 = kube::pods(inside, "app=server")
        .iter()
        .map(|pod| {
            let name = pod["metadata"]["name"].as_str().unwrap();
            metric(&metrics(inside, name), "weft_plaintext_refused_total", &[])
        })
        .sum();
    assert!(refused > 0.0, "the refusals are counted");
}

pub fn probes_go_on_under_strict() {
    let (inside, _) = mesh();
    kube::apply(inside, STRICT);
    // Readiness is asked every second, liveness every two: three failures would show.
    std::thread::sleep(Duration::from_secs(10));
    for pod in kube::pods(inside, "app=server") {
        for status in pod["status"]["containerStatuses"].as_array().unwrap() {
            assert_eq!(status["ready"], true, "{status:#}");
            assert_eq!(status["restartCount"], 0, "{status:#}");
        }
    }
    // A pod that starts under STRICT becomes ready.
    kube::kubectl(&["rollout", "restart", "-n", inside, "deployment/server"]);
    kube::rolled_out(inside, "deployment/server");
    kube::kubectl(&["delete", "peerauthentication", "-n", inside, "strict"]);
}

/// A `tcpSocket` probe would succeed as soon as the proxy listens.
pub fn tcp_probes_ask_the_application() {
    let namespace = Namespace::create("weft-test-probes", true);
    let ns = namespace.0.as_str();
    let image = apps::image();
    for (name, port) in [("well", 7000), ("unwell", 7009)] {
        let pod = format!(
            "
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: app
      image: {image}
      imagePullPolicy: IfNotPresent
      args: [serve]
      readinessProbe: {{tcpSocket: {{port: {port}}}, periodSeconds: 1}}
"
        );
        kube::apply(ns, &pod);
    }
    kube::kubectl(&[
        "wait",
        "-n",
        ns,
        "pod/well",
        "--for=condition=Ready",
        "--timeout=90s",
    ]);
    eventually("the kubelet says why", PATIENCE, || {
        let events = kube::kubectl(&["get", "events", "-n", ns, "-o", "jsonpath={..message}"]);
        if events.contains("statuscode: 503") {
            Ok(())
        } else {
            Err(events)
        }
    });
    let status = kube::get(ns, &["pod", "unwell"])["status"].clone();
    let conditions = status["conditions"].as_array().unwrap();
    let ready = conditions.iter().find(|given| given["type"] == "Ready");
    assert_eq!(ready.unwrap()["status"], "False", "{status:#}");
}

pub fn calls_between_namespaces_carry_both_identities() {
    let (inside, _) = mesh();
    let other = Namespace::create("weft-test-other", true);
    apps::start(&other.0, &[apps::client("guest")], &["guest"]);
    kube::apply(inside, STRICT);
    let url = format!("http://server.{inside}/");
    eventually("another namespace of the mesh is served", PATIENCE, || {
        let seen = load(&other.0, "guest", &[&url, "--seconds", "1"]);
        if seen["good"] == seen["requests"] {
            Ok(())
        } else {
            Err(seen.to_string())
        }
    });
    let labels = [
        "direction=\"inbound\"",
        "mtls=\"true\"",
        "source_namespace=\"weft-test-other\"",
    ];
    let counted: f64 = kube::pods(inside, "app=server")
        .iter()
        .map(|pod| {
            let name = pod["metadata"]["name"].as_str().unwrap();
            metric(&metrics(inside, name), "weft_requests_total", &labels)
        })
        .sum();
    assert!(counted > 0.0, "the server's proxy knows who called");
    // Without the proxy's certificate the port is closed: straight from the proxy's own user,
    // whose connections are not captured, in plaintext.
    let pod = kube::pod(&other.0, "app=guest");
    let address = kube::pods(inside, "app=server")[0]["status"]["podIP"].clone();
    let straight = format!("http://{}:8080/", address.as_str().unwrap());
    let seen = try_exec(
        &other.0,
        &pod,
        "app",
        &[
            "/weft-probe",
            "load",
            &straight,
            "--count",
            "1",
            "--clients",
            "1",
        ],
    );
    assert!(
        seen.is_ok_and(|seen| seen.contains("\"good\":1")),
        "captured calls go on"
    );
    kube::kubectl(&["delete", "peerauthentication", "-n", inside, "strict"]);
}
