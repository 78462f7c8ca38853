//! Pods that come and go in other ways than a Deployment's.

use std::time::{Duration, Instant};

use weft_tests::kube::{self, Namespace, PATIENCE, eventually};

use crate::apps::{self, all_good, load};

/// Requests that the server's proxies have taken in by mutual TLS and answered well.
#[track_caller]
fn by_mutual_tls(namespace: &str) -> f64 {
    let labels = [
        "direction=\"inbound\"",
        "mtls=\"true\"",
        "response_class=\"2xx\"",
    ];
    apps::of_all(namespace, "server", "weft_requests_total", &labels)
}

fn job(name: &str, image: &str, init: bool) -> String {
    let command = format!(
        "
          image: {image}
          imagePullPolicy: IfNotPresent
          args: [load, \"http://server/job\", --count, \"10\", --clients, \"1\"]"
    );
    let init = if init {
        format!(
            "
      initContainers:
        - name: first{command}"
        )
    } else {
        String::new()
    };
    format!(
        "
apiVersion: batch/v1
kind: Job
metadata: {{name: {name}}}
spec:
  backoffLimit: 0
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      restartPolicy: Never{init}
      containers:
        - name: app{command}
"
    )
}

/// Runs a Job to its end; how long that took.
#[track_caller]
fn run(namespace: &str, name: &str, init: bool) -> Duration {
    let began = Instant::now();
    kube::apply(namespace, &job(name, &apps::image(), init));
    kube::kubectl(&[
        "wait",
        "-n",
        namespace,
        &format!("job/{name}"),
        "--for=condition=Complete",
        "--timeout=90s",
    ]);
    began.elapsed()
}

pub fn jobs_finish() {
    let namespace = Namespace::create("weft-test-job", true);
    let ns = namespace.0.as_str();
    apps::start(ns, &[apps::server("server", 1)], &["server"]);
    let took = run(ns, "count", false);
    println!("a Job with a sidecar was complete after {took:.1?}");
    let said = kube::kubectl(&["logs", "-n", ns, "job/count", "-c", "app"]);
    assert!(said.contains("\"good\":10"), "{said}");
}

/// A Job that fails is over, too: nothing waits for a proxy that stays.
pub fn jobs_fail() {
    let namespace = Namespace::create("weft-test-fails", true);
    let ns = namespace.0.as_str();
    let image = apps::image();
    let began = Instant::now();
    for (name, policy) in [("never", "Never"), ("on-failure", "OnFailure")] {
        let manifest = format!(
            "
apiVersion: batch/v1
kind: Job
metadata: {{name: {name}}}
spec:
  backoffLimit: 1
  template:
    spec:
      restartPolicy: {policy}
      containers:
        - name: app
          image: {image}
          imagePullPolicy: IfNotPresent
          args: [no-such-command]
"
        );
        kube::apply(ns, &manifest);
    }
    for job in ["job/never", "job/on-failure"] {
        kube::kubectl(&[
            "wait",
            "-n",
            ns,
            job,
            "--for=condition=Failed",
            "--timeout=120s",
        ]);
        println!("{job} had failed {:.1?} after its start", began.elapsed());
    }
    eventually("its pods have ended", PATIENCE, || {
        let pods = kube::get(ns, &["pods"]);
        let phases: Vec<&str> = pods["items"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|pod| pod["status"]["phase"].as_str())
            .collect();
        if phases.iter().all(|phase| *phase == "Failed") {
            Ok(())
        } else {
            Err(format!("{phases:?}"))
        }
    });
}

/// What an application does while it starts and while it ends goes through the proxy.
pub fn the_proxy_is_there_first_and_last() {
    let namespace = Namespace::create("weft-test-last", true);
    let ns = namespace.0.as_str();
    apps::start(ns, &[apps::server("server", 1)], &["server"]);
    let image = apps::image();
    let manifest = format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: busy, labels: {{app: busy}}}}
spec:
  terminationGracePeriodSeconds: 60
  containers:
    - name: app
      image: {image}
      imagePullPolicy: IfNotPresent
      args: [serve]
      lifecycle:
        postStart:
          exec: {{command: [/weft-probe, load, 'http://server/first', --count, '20', --clients, '1', --rate, '20']}}
        preStop:
          exec: {{command: [/weft-probe, load, 'http://server/last', --count, '100', --clients, '1', --rate, '20', --seconds, '30']}}
"
    );
    kube::apply(ns, &manifest);
    kube::kubectl(&[
        "wait",
        "-n",
        ns,
        "pod/busy",
        "--for=condition=Ready",
        "--timeout=90s",
    ]);
    let first = by_mutual_tls(ns);
    let began = Instant::now();
    kube::kubectl(&["delete", "pod", "-n", ns, "busy", "--timeout=90s"]);
    let took = began.elapsed();
    let last = by_mutual_tls(ns) - first;
    println!(
        "by mutual TLS: {first} of 20 requests as the application started, {last} of 100 as it \
         ended; the pod was gone after {took:.1?}"
    );
    assert!((first - 20.0).abs() < 0.5 && (last - 100.0).abs() < 0.5);
}

pub fn init_containers_have_network() {
    let namespace = Namespace::create("weft-test-init", true);
    let ns = namespace.0.as_str();
    apps::start(ns, &[apps::server("server", 1)], &["server"]);
    run(ns, "prepare", true);
    for container in ["first", "app"] {
        let said = kube::kubectl(&["logs", "-n", ns, "job/prepare", "-c", container]);
        assert!(said.contains("\"good\":10"), "{container}: {said}");
    }
    // Without native sidecars there is no proxy yet while init containers run.
    let expected = if kube::has_native_sidecars() {
        20.0
    } else {
        10.0
    };
    let seen = by_mutual_tls(ns);
    println!(
        "by mutual TLS: {seen} of 10 requests of the init container and 10 of the application"
    );
    assert!((seen - expected).abs() < 0.5, "{expected} were expected");
}

pub fn scaling_reaches_the_proxies() {
    let namespace = Namespace::create("weft-test-scale", true);
    let ns = namespace.0.as_str();
    apps::start(
        ns,
        &[apps::server("server", 1), apps::client("client")],
        &["server", "client"],
    );
    let url = "http://server/";
    all_good(&load(ns, "client", &[url, "--seconds", "1"]));
    let arguments = [url, "--seconds", "45", "--rate", "60"];
    let (seen, ()) = apps::load_during(ns, "client", &arguments, || {
        let scale = |n: &str| {
            kube::kubectl(&["scale", "-n", ns, "deployment/server", "--replicas", n]);
            kube::rolled_out(ns, "deployment/server");
        };
        scale("10");
        eventually("all ten are used", PATIENCE, || {
            let seen = load(ns, "client", &[url, "--seconds", "2", "--rate", "100"]);
            match seen["servers"].as_object().map(serde_json::Map::len) {
                Some(10) => Ok(()),
                _ => Err(seen.to_string()),
            }
        });
        scale("1");
    });
    println!("1 → 10 → 1 under load: {seen}");
    all_good(&seen);
}
