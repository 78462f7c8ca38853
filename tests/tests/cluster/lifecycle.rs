//! Pods that come and go in other ways than a Deployment's.

use std::time::{Duration, Instant};

use weft_tests::kube::{self, Namespace, PATIENCE, eventually};

use crate::apps::{self, all_good, load};

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

pub fn init_containers_have_network() {
    let namespace = Namespace::create("weft-test-init", true);
    let ns = namespace.0.as_str();
    apps::start(ns, &[apps::server("server", 1)], &["server"]);
    run(ns, "prepare", true);
    let said = kube::kubectl(&["logs", "-n", ns, "job/prepare", "-c", "first"]);
    assert!(said.contains("\"good\":10"), "{said}");
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
