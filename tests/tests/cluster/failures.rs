//! What an abrupt death costs: bounded, and said.

use serde_json::Value;
use weft_tests::kube::{self, Namespace};

use crate::apps::{self, load_during};

/// Requests that may fail when one of three servers dies in the middle of its work: those it was
/// answering, and no more than these.
const MOST: u64 = 12;

fn start(name: &str) -> Namespace {
    let namespace = Namespace::create(name, true);
    apps::start(
        &namespace.0,
        &[apps::server("server", 3), apps::client("client")],
        &["server", "client"],
    );
    namespace
}

const LOAD: &[&str] = &[
    "http://server/",
    "--seconds",
    "20",
    "--rate",
    "100",
    "--clients",
    "8",
];

#[track_caller]
fn bounded(what: &str, seen: &Value) {
    let requests = seen["requests"].as_u64().unwrap();
    let good = seen["good"].as_u64().unwrap();
    println!(
        "{what}: {} of {requests} requests failed: {seen}",
        requests - good
    );
    assert!(requests > 1000 && requests - good <= MOST, "{seen:#}");
}

/// A pod that sees all processes of its host and may end them.
fn reaper(namespace: &str) {
    let image = apps::image();
    kube::apply(
        namespace,
        &format!(
            "
apiVersion: v1
kind: Pod
metadata: {{name: reaper, annotations: {{weft.dev/inject: disabled}}}}
spec:
  hostPID: true
  terminationGracePeriodSeconds: 0
  containers:
    - name: app
      image: {image}
      imagePullPolicy: IfNotPresent
      args: [serve]
      securityContext: {{privileged: true, runAsUser: 0}}
"
        ),
    );
    kube::kubectl(&[
        "wait",
        "-n",
        namespace,
        "pod/reaper",
        "--for=condition=Ready",
        "--timeout=60s",
    ]);
}

/// `kill -9` of the process that has `variable`.
#[track_caller]
fn kill(namespace: &str, variable: &str) {
    let said = kube::exec(
        namespace,
        "reaper",
        "app",
        &["/weft-probe", "kill", variable],
    );
    let killed = said["killed"].as_array().unwrap().len();
    assert_eq!(killed, 1, "{said}");
}

pub fn a_killed_application_costs_little() {
    let namespace = start("weft-test-kill");
    let ns = namespace.0.as_str();
    reaper(ns);
    let (seen, ()) = load_during(ns, "client", LOAD, || {
        let pod = kube::pod(ns, "app=server");
        kill(ns, &format!("NAME={pod}"));
    });
    bounded("an application killed", &seen);
}

pub fn a_killed_proxy_costs_little() {
    let namespace = start("weft-test-kill2");
    let ns = namespace.0.as_str();
    reaper(ns);
    let (seen, ()) = load_during(ns, "client", LOAD, || {
        let pod = kube::pod(ns, "app=server");
        kill(ns, &format!("WEFT_WORKLOAD={ns}/{pod}"));
    });
    bounded("a proxy killed", &seen);
}

pub fn a_pod_that_vanishes_costs_little() {
    let namespace = start("weft-test-kill3");
    let ns = namespace.0.as_str();
    let (seen, ()) = load_during(ns, "client", LOAD, || {
        let pod = kube::pod(ns, "app=server");
        kube::kubectl(&[
            "delete",
            "pod",
            "-n",
            ns,
            &pod,
            "--grace-period=0",
            "--force",
        ]);
    });
    bounded("a pod deleted without grace", &seen);
}
