//! A real Kubernetes, by `kubectl` and `helm`: whichever cluster `WEFT_TEST_KUBECONFIG` names.

use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Pods are started, stopped and replaced within this on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The kubeconfig of the cluster under test.
pub fn kubeconfig() -> Option<String> {
    std::env::var("WEFT_TEST_KUBECONFIG")
        .ok()
        .filter(|path| !path.is_empty())
}

/// A command that speaks to the cluster under test.
pub fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("KUBECONFIG", kubeconfig().expect("WEFT_TEST_KUBECONFIG"));
    command
}

fn done(what: &str, output: Output) -> Result<String, String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let error = String::from_utf8_lossy(&output.stderr);
    Err(format!("{what}: {}\n{error}{text}", output.status))
}

/// Runs `kubectl`; what it printed, or why it failed.
///
/// # Errors
/// It ended with another status than 0.
pub fn try_kubectl(arguments: &[&str]) -> Result<String, String> {
    let output = command("kubectl").args(arguments).output();
    let what = format!("kubectl {}", arguments.join(" "));
    done(&what, output.map_err(|error| format!("{what}: {error}"))?)
}

/// Runs `kubectl`, which must work.
#[track_caller]
pub fn kubectl(arguments: &[&str]) -> String {
    try_kubectl(arguments).unwrap_or_else(|error| panic!("{error}"))
}

/// Runs `helm`, which must work.
#[track_caller]
pub fn helm(arguments: &[&str]) -> String {
    let output = command("helm").args(arguments).output();
    let what = format!("helm {}", arguments.join(" "));
    match output {
        Ok(output) => done(&what, output).unwrap_or_else(|error| panic!("{error}")),
        Err(error) => panic!("{what}: {error}"),
    }
}

/// Whether sidecars are init containers here: the apiserver and all kubelets are of Kubernetes 1.29 or
/// newer. Otherwise the proxy is an ordinary container.
#[track_caller]
pub fn has_native_sidecars() -> bool {
    let apiserver: Value = serde_json::from_str(&kubectl(&["get", "--raw", "/version"])).unwrap();
    let nodes = get("", &["nodes"])["items"].clone();
    let kubelets = nodes.as_array().unwrap().iter();
    kubelets
        .map(|node| &node["status"]["nodeInfo"]["kubeletVersion"])
        .chain([&apiserver["gitVersion"]])
        .all(|said| {
            let text = said.as_str().unwrap_or_default();
            // "v1.28.15", "v1.29.3-gke.1".
            let numbers = text.trim_start_matches('v').split('.');
            let mut numbers = numbers.map(|number| number.parse::<u32>());
            match (numbers.next(), numbers.next()) {
                (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= (1, 29),
                _ => panic!("{said} is no version"),
            }
        })
}

/// Whether the apiserver has a resource in a version of a group: not every version of Kubernetes takes
/// every custom resource definition.
#[track_caller]
pub fn has_resource(group: &str, version: &str, plural: &str) -> bool {
    let path = format!("/apis/{group}/{version}");
    let said: Value = serde_json::from_str(&kubectl(&["get", "--raw", &path])).unwrap();
    let mut resources = said["resources"].as_array().unwrap().iter();
    resources.any(|resource| resource["name"] == plural)
}

/// Applies manifests.
#[track_caller]
pub fn apply(namespace: &str, manifests: &str) {
    let mut child = command("kubectl")
        .args(["apply", "-n", namespace, "-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(manifests.as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    done("kubectl apply", output).unwrap_or_else(|error| panic!("{error}\n{manifests}"));
}

/// An object or a list of them, as JSON.
#[track_caller]
pub fn get(namespace: &str, what: &[&str]) -> Value {
    let mut arguments = vec!["get", "-n", namespace, "-o", "json"];
    arguments.extend(what);
    serde_json::from_str(&kubectl(&arguments)).unwrap()
}

/// Pods with a label that are not going away, by name.
#[track_caller]
pub fn pods(namespace: &str, selector: &str) -> Vec<Value> {
    let list = get(namespace, &["pods", "-l", selector]);
    let mut pods: Vec<Value> = list["items"].as_array().unwrap().clone();
    pods.retain(|pod| pod["metadata"]["deletionTimestamp"].is_null());
    pods.sort_by_key(|pod| pod["metadata"]["name"].to_string());
    pods
}

/// Name of the first pod with a label.
#[track_caller]
pub fn pod(namespace: &str, selector: &str) -> String {
    let pods = pods(namespace, selector);
    let first = pods.first().expect("a pod");
    first["metadata"]["name"].as_str().unwrap().to_owned()
}

/// Runs a command in a container; what it printed, or why it failed.
///
/// # Errors
/// It ended with another status than 0.
pub fn try_exec(
    namespace: &str,
    pod: &str,
    container: &str,
    words: &[&str],
) -> Result<String, String> {
    let mut arguments = vec!["exec", "-n", namespace, pod, "-c", container, "--"];
    arguments.extend(words);
    try_kubectl(&arguments)
}

/// Runs a command in a container, which must work; its output as JSON.
#[track_caller]
pub fn exec(namespace: &str, pod: &str, container: &str, words: &[&str]) -> Value {
    let said = try_exec(namespace, pod, container, words).unwrap_or_else(|error| panic!("{error}"));
    serde_json::from_str(said.trim()).unwrap_or_else(|error| panic!("{error}: {said}"))
}

/// Waits until a Deployment, StatefulSet or DaemonSet is rolled out.
#[track_caller]
pub fn rolled_out(namespace: &str, what: &str) {
    let limit = format!("--timeout={}s", PATIENCE.as_secs());
    if let Err(error) = try_kubectl(&["rollout", "status", "-n", namespace, what, &limit]) {
        let pods = try_kubectl(&["describe", "pods", "-n", namespace]).unwrap_or_default();
        let tail: Vec<&str> = pods.lines().rev().take(120).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        panic!("{error}\n{}", tail.join("\n"));
    }
}

/// A namespace of its own that goes away with this value.
#[derive(Debug)]
pub struct Namespace(pub String);

impl Namespace {
    /// Makes it anew; injected or not.
    #[track_caller]
    pub fn create(name: &str, inject: bool) -> Self {
        let _ = try_kubectl(&["delete", "namespace", name, "--ignore-not-found"]);
        kubectl(&["create", "namespace", name]);
        if inject {
            kubectl(&["label", "namespace", name, "weft.dev/inject=enabled"]);
        }
        Self(name.to_owned())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // What a failed test left is worth looking at.
        if !std::thread::panicking() {
            let _ = try_kubectl(&["delete", "namespace", &self.0, "--wait=false"]);
        }
    }
}

/// Waits until something holds; panics with the last reason when it does not within `limit`.
#[track_caller]
pub fn eventually<T>(
    what: &str,
    limit: Duration,
    mut holds: impl FnMut() -> Result<T, String>,
) -> T {
    let end = Instant::now() + limit;
    loop {
        match holds() {
            Ok(value) => return value,
            Err(reason) if Instant::now() >= end => {
                panic!("after {limit:?} it still is not so that {what}: {reason}")
            }
            Err(_) => std::thread::sleep(Duration::from_millis(250)),
        }
    }
}
