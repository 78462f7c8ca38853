//! Applications that the tests run in pods, all of them `weft-probe`.

use serde_json::Value;
use weft_tests::kube::{self, PATIENCE, eventually};

/// Image of the probe.
pub fn image() -> String {
    std::env::var("WEFT_TEST_PROBE").unwrap_or_else(|_| "mesh.local/weft-probe:dev".to_owned())
}

/// A Service `name` (ports 80 → 8080 HTTP, 7000 TCP) and a Deployment behind it.
pub fn server(name: &str, replicas: u32) -> String {
    let image = image();
    format!(
        "
apiVersion: v1
kind: ServiceAccount
metadata: {{name: {name}}}
---
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  selector: {{app: {name}}}
  ports:
    - {{name: http, port: 80, targetPort: http}}
    - {{name: greeting, port: 7000}}
---
apiVersion: v1
kind: Service
metadata: {{name: {name}-headless}}
spec:
  clusterIP: None
  selector: {{app: {name}}}
  ports:
    - {{name: http, port: 8080}}
    - {{name: greeting, port: 7000}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      serviceAccountName: {name}
      terminationGracePeriodSeconds: 40
      containers:
        - name: app
          image: {image}
          imagePullPolicy: IfNotPresent
          args: [serve]
          env:
            - {{name: NAME, valueFrom: {{fieldRef: {{fieldPath: metadata.name}}}}}}
          ports:
            - {{name: http, containerPort: 8080}}
            - {{name: greeting, containerPort: 7000}}
          readinessProbe:
            httpGet: {{path: /ready, port: http}}
            periodSeconds: 1
          livenessProbe:
            tcpSocket: {{port: greeting}}
            periodSeconds: 2
"
    )
}

/// A Deployment that does nothing but wait for commands.
pub fn client(name: &str) -> String {
    let image = image();
    format!(
        "
apiVersion: v1
kind: ServiceAccount
metadata: {{name: {name}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}}}
spec:
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      serviceAccountName: {name}
      containers:
        - name: app
          image: {image}
          imagePullPolicy: IfNotPresent
          args: [serve]
"
    )
}

/// Starts manifests in a namespace and waits for the Deployments named.
#[track_caller]
pub fn start(namespace: &str, manifests: &[String], deployments: &[&str]) {
    for manifest in manifests {
        kube::apply(namespace, manifest);
    }
    for deployment in deployments {
        kube::rolled_out(namespace, &format!("deployment/{deployment}"));
    }
}

/// Requests from a client's pod; what became of them.
#[track_caller]
pub fn load(namespace: &str, client: &str, arguments: &[&str]) -> Value {
    let pod = kube::pod(namespace, &format!("app={client}"));
    let mut words = vec!["/weft-probe", "load"];
    words.extend(arguments);
    kube::exec(namespace, &pod, "app", &words)
}

/// The same while something else happens; both results.
pub fn load_during<T>(
    namespace: &str,
    client: &str,
    arguments: &[&str],
    happens: impl FnOnce() -> T,
) -> (Value, T) {
    std::thread::scope(|scope| {
        let load = scope.spawn(|| load(namespace, client, arguments));
        // The clients are well under way.
        std::thread::sleep(std::time::Duration::from_secs(2));
        let happened = happens();
        (load.join().unwrap(), happened)
    })
}

/// Panics unless every request was answered with 200.
#[track_caller]
pub fn all_good(seen: &Value) {
    assert!(
        seen["requests"].as_u64() > Some(0) && seen["requests"] == seen["good"],
        "{seen:#}"
    );
}

/// One request; what the server said of it.
#[track_caller]
pub fn one(namespace: &str, client: &str, url: &str) -> Value {
    load(namespace, client, &[url, "--count", "1", "--clients", "1"])
}

/// A proxy's metrics, as text.
#[track_caller]
pub fn metrics(namespace: &str, pod: &str) -> String {
    let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}:15020/proxy/metrics");
    kube::kubectl(&["get", "--raw", &path])
}

/// The sum of a metric's series whose labels contain all of `labels`.
pub fn metric(text: &str, name: &str, labels: &[&str]) -> f64 {
    text.lines()
        .filter(|line| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with(['{', ' ']))
        })
        .filter(|line| labels.iter().all(|label| line.contains(label)))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

/// A number of what was counted.
#[track_caller]
pub fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

/// How many answers servers whose names begin so have given.
pub fn by(seen: &Value, prefix: &str) -> u64 {
    counted(&seen["servers"], prefix)
}

/// How many answers were so: "503 ", "grpc-status 4".
pub fn outcomes(seen: &Value, prefix: &str) -> u64 {
    counted(&seen["outcomes"], prefix)
}

/// The sum of what is counted under names that begin so.
fn counted(counts: &Value, prefix: &str) -> u64 {
    let counts = counts.as_object().unwrap();
    let so = counts.iter().filter(|(name, _)| name.starts_with(prefix));
    so.filter_map(|(_, count)| count.as_u64()).sum()
}

/// A metric of all proxies of an application, summed.
#[track_caller]
pub fn of_all(ns: &str, app: &str, name: &str, labels: &[&str]) -> f64 {
    let pods = kube::pods(ns, &format!("app={app}"));
    pods.iter()
        .map(|pod| {
            let pod = pod["metadata"]["name"].as_str().unwrap();
            metric(&metrics(ns, pod), name, labels)
        })
        .sum()
}

/// Waits until a route's status says that this mesh has taken it.
#[track_caller]
pub fn accepted(ns: &str, route: &str) {
    eventually("the route's status says Accepted", PATIENCE, || {
        let status = kube::get(ns, &[route])["status"].clone();
        let parents = status["parents"].as_array().cloned().unwrap_or_default();
        let is_ours = |parent: &&Value| parent["controllerName"] == "weft.dev/mesh";
        let ours = parents.iter().find(is_ours);
        let conditions = ours.and_then(|parent| parent["conditions"].as_array());
        let holds = |kind: &str| {
            let mut conditions = conditions.into_iter().flatten();
            conditions.any(|given| given["type"] == kind && given["status"] == "True")
        };
        if holds("Accepted") && holds("ResolvedRefs") {
            Ok(())
        } else {
            Err(status.to_string())
        }
    });
}
