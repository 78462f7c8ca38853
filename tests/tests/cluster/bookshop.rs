//! `examples/bookshop` as a newcomer goes through it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use weft_tests::kube::{self, Namespace, PATIENCE, eventually, try_kubectl};

use crate::install;

const BOOKSHOP: &str = "bookshop";

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../examples/bookshop")
        .join(name)
}

#[track_caller]
fn apply(name: &str) {
    let manifests = std::fs::read_to_string(file(name)).unwrap();
    kube::apply(BOOKSHOP, &manifests);
}

/// What the visitor saw in its last five seconds.
fn visits() -> Result<Value, String> {
    let said = try_kubectl(&[
        "logs",
        "-n",
        BOOKSHOP,
        "deploy/visitor",
        "-c",
        "visitor",
        "--tail=1",
    ])?;
    serde_json::from_str(said.trim()).map_err(|error| format!("{error}: {said}"))
}

/// The share of visits that were answered with 200, percent.
fn good(visits: &Value) -> f64 {
    100.0 * visits["answers"]["200"].as_f64().unwrap_or(0.0)
        / visits["requests"].as_f64().unwrap_or(1.0)
}

fn all_rolled_out() {
    for app in [
        "catalog",
        "reviews-v1",
        "reviews-v2",
        "stock",
        "front",
        "visitor",
    ] {
        kube::rolled_out(BOOKSHOP, &format!("deployment/{app}"));
    }
}

/// Waits until the visitor sees what is expected in three reports, one after another.
#[track_caller]
fn sees(what: &str, expected: impl Fn(&Value) -> bool) -> Value {
    let mut last = Value::Null;
    let mut times = 0;
    eventually(what, PATIENCE, || {
        let seen = visits()?;
        if seen == last {
            return Err(seen.to_string());
        }
        times = if expected(&seen) { times + 1 } else { 0 };
        last = seen.clone();
        if times == 3 {
            Ok(seen)
        } else {
            Err(seen.to_string())
        }
    })
}

pub fn a_newcomers_tour() {
    let namespace = Namespace::create(BOOKSHOP, false);
    apply("bookshop.yaml");
    all_rolled_out();
    let plain = sees("the shop works without a mesh", |seen| good(seen) > 99.9);
    println!("without a mesh: {plain}");

    kube::kubectl(&["label", "namespace", BOOKSHOP, "weft.dev/inject=enabled"]);
    kube::kubectl(&["rollout", "restart", "-n", BOOKSHOP, "deployment"]);
    all_rolled_out();
    let meshed = sees("the shop works in the mesh, its reviews balanced", |seen| {
        let reviews = &seen["reviews"];
        let both = ["v1", "v2"].iter().all(|v| reviews[*v].as_u64() > Some(30));
        good(seen) > 99.9 && both
    });
    println!("in the mesh: {meshed}");
    println!(
        "a visit is 8 calls; p50 {} → {} ms",
        plain["p50_ms"], meshed["p50_ms"]
    );

    apply("policies/1-strict.yaml");
    kube::apply(
        "default",
        "
apiVersion: v1
kind: Pod
metadata: {name: stranger}
spec:
  restartPolicy: Never
  containers:
    - name: visitor
      image: bookshop.local/visitor:v1
      imagePullPolicy: IfNotPresent
      env: [{name: URL, value: 'http://front.bookshop:8080/api/books'}]
",
    );
    eventually("a stranger is refused", PATIENCE, || {
        let said = try_kubectl(&["logs", "stranger", "-n", "default", "--tail=1"])?;
        let seen: Value = serde_json::from_str(said.trim()).map_err(|error| error.to_string())?;
        match seen["answers"].as_object() {
            Some(answers) if !answers.is_empty() && !answers.contains_key("200") => Ok(()),
            _ => Err(said),
        }
    });
    kube::kubectl(&["delete", "pod", "stranger", "-n", "default", "--wait=false"]);
    sees("the visitor notices nothing of STRICT", |seen| {
        good(seen) > 99.9
    });

    kube::kubectl(&[
        "set",
        "env",
        "-n",
        BOOKSHOP,
        "deploy/catalog",
        "FAIL_PERCENT=30",
    ]);
    all_rolled_out();
    let broken = sees("a broken catalogue is felt", |seen| good(seen) < 90.0);
    apply("policies/2-retries.yaml");
    let mended = sees("retries hide a broken catalogue", |seen| good(seen) > 98.0);
    println!(
        "a catalogue that fails 30 %: {:.0} % of the visits good, with retries {:.1} %",
        good(&broken),
        good(&mended)
    );
    kube::kubectl(&[
        "set",
        "env",
        "-n",
        BOOKSHOP,
        "deploy/catalog",
        "FAIL_PERCENT-",
    ]);
    all_rolled_out();

    apply("policies/3-split.yaml");
    let split = sees("a tenth of the reviews are version 2's", |seen| {
        let reviews = &seen["reviews"];
        let (v1, v2) = (reviews["v1"].as_f64(), reviews["v2"].as_f64());
        let share = v2.unwrap_or(0.0) / (v1.unwrap_or(0.0) + v2.unwrap_or(0.0)).max(1.0);
        (0.02..0.25).contains(&share)
    });
    println!("split 90 to 10: {split}");
    eventually("the route says that it is in force", PATIENCE, || {
        let route = kube::get(BOOKSHOP, &["grpcroute", "reviews"]);
        let conditions = &route["status"]["parents"][0]["conditions"];
        let accepted = conditions.as_array().is_some_and(|conditions| {
            let is = |kind: &str| {
                conditions
                    .iter()
                    .any(|condition| condition["type"] == kind && condition["status"] == "True")
            };
            is("Accepted") && is("ResolvedRefs")
        });
        accepted.then_some(()).ok_or_else(|| route.to_string())
    });
    drop(namespace);
}

/// Spans of a visit: who is whose parent, by service.
pub fn a_visit_is_one_trace_in_jaeger() {
    install::install(&[]);
    let _namespace = Namespace::create(BOOKSHOP, true);
    kube::apply(
        install::NAMESPACE,
        "
apiVersion: v1
kind: Service
metadata: {name: jaeger}
spec:
  selector: {app: jaeger}
  ports: [{name: otlp, port: 4317}, {name: query, port: 16686}]
---
apiVersion: v1
kind: Pod
metadata: {name: jaeger, labels: {app: jaeger}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
    - name: jaeger
      image: mesh.local/jaeger:v2.13.0
      imagePullPolicy: IfNotPresent
",
    );
    kube::kubectl(&[
        "wait",
        "-n",
        install::NAMESPACE,
        "pod/jaeger",
        "--for=condition=Ready",
        "--timeout=60s",
    ]);
    install::install(&[
        "--set",
        "tracing.otlp.endpoint=http://jaeger.weft-system:4317",
    ]);
    // Where spans go is told to sidecars when they are put in; a replica of before the upgrade, on its
    // way out, still says what it knew.
    install::old_replicas_gone();
    apply("bookshop.yaml");
    all_rolled_out();
    apply("policies/4-telemetry.yaml");
    let path = "/api/v1/namespaces/weft-system/pods/jaeger:16686/proxy/api/traces\
                ?service=front&limit=20&lookback=1m";
    let chain = eventually("a visit is one trace over three services", PATIENCE, || {
        let said: Value = serde_json::from_str(&try_kubectl(&["get", "--raw", path])?)
            .map_err(|error| error.to_string())?;
        let traces = said["data"].as_array().cloned().unwrap_or_default();
        traces
            .iter()
            .find_map(three_services)
            .ok_or_else(|| format!("{} traces, none over three services", traces.len()))
    });
    println!("in Jaeger: {chain}");
    kube::kubectl(&["delete", "pod,service", "-n", install::NAMESPACE, "jaeger"]);
    install::install(&[]);
    std::thread::sleep(Duration::from_secs(1));
}

/// The chain of services of a span of the catalogue that was called by the reviews, which the front
/// had called, each span the child of the one before.
fn three_services(trace: &Value) -> Option<String> {
    let spans = trace["spans"].as_array()?;
    let service = |span: &Value| {
        let process = span["processID"].as_str()?;
        trace["processes"][process]["serviceName"].as_str()
    };
    let parent = |span: &Value| {
        let reference = span["references"].as_array()?.first()?;
        spans
            .iter()
            .find(|other| other["spanID"] == reference["spanID"])
    };
    spans.iter().find_map(|span| {
        let mut chain = vec![service(span)?];
        let mut at = span;
        while let Some(next) = parent(at) {
            chain.push(service(next)?);
            at = next;
        }
        chain.reverse();
        let mut services = chain.clone();
        services.dedup();
        services
            .ends_with(&["front", "reviews", "catalog"])
            .then(|| chain.join(" → "))
    })
}
