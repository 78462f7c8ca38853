//! The command line, through the cluster's apiserver with the user's kubeconfig.

use std::io::{BufRead, BufReader};
use std::process::{Output, Stdio};

use serde_json::Value;
use weft_tests::kube::{self, Namespace, PATIENCE, eventually};

use crate::apps::{self, all_good, load, one};

/// The `weft` program, with a kubeconfig of the cluster under test.
pub fn weft() -> std::process::Command {
    let program = std::env::var("WEFT_TEST_CLI").expect("WEFT_TEST_CLI names the weft program");
    kube::command(&program)
}

fn run(arguments: &[&str]) -> Output {
    weft().args(arguments).output().unwrap()
}

/// What a command says as JSON, and its exit code.
fn json(arguments: &[&str]) -> Result<(Option<i32>, Value), String> {
    let output = run(arguments);
    let said = serde_json::from_slice(&output.stdout);
    let said = said.map_err(|error| format!("{arguments:?}: {error}: {output:?}"))?;
    Ok((output.status.code(), said))
}

pub fn both_sides_of_a_request_are_told() {
    let namespace = Namespace::create("weft-test-cli", true);
    let ns = namespace.0.as_str();
    let outside = apps::client("outside").replace(
        "metadata: {labels: {app: outside}}",
        "metadata: {labels: {app: outside}, annotations: {weft.dev/inject: disabled}}",
    );
    apps::start(
        ns,
        &[apps::server("server", 1), apps::client("client"), outside],
        &["server", "client", "outside"],
    );
    kube::apply(
        ns,
        "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: limit}
spec:
  targetRefs: [{kind: Service, name: server}]
  rateLimit: {requests: 1000, per: 1s, key: {header: x-user}}
---
apiVersion: policy.weft.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: strict}
spec: {mtls: {mode: STRICT}}
",
    );
    all_good(&one(ns, "client", "http://server/"));
    let arrived = run(&["status", "-n", ns, "--wait-for", "trafficpolicy/limit"]);
    assert!(arrived.status.success(), "{arrived:?}");

    let request = ["--request", "GET / x-user: ann", "-n", ns, "-o", "json"];
    let routes = |client| json(&[&["routes", client, "server:80"], &request[..]].concat());
    let said = eventually("both sides are told", PATIENCE, || {
        let (code, said) = routes("deploy/client")?;
        let rules = &said["inbound"]["proxies"][0]["rules"];
        let whole = rules["mtls"] == "STRICT" && said["inbound"]["proxies"][0]["refused"].is_null();
        match code {
            Some(0) if whole => Ok(said),
            _ => Err(format!("{code:?}: {said:#}")),
        }
    });
    let service = &said["inbound"]["proxies"][0]["rules"]["services"][0];
    assert_eq!(service["rateLimit"]["requests"], 1000, "{said:#}");
    assert_eq!(service["rateLimit"]["key"]["header"], "x-user", "{said:#}");
    // Who has no proxy is told of the destination's, which refuses it.
    let (code, said) = routes("deploy/outside").unwrap();
    assert_eq!(code, Some(1), "{said:#}");
    let refused = &said["inbound"]["proxies"][0]["refused"];
    assert!(
        refused.as_str().is_some_and(|why| why.contains("STRICT")),
        "{said:#}"
    );
    println!("without a proxy: {refused}");

    let (code, said) = json(&["stat", "deploy/client", "-n", ns, "-o", "json"]).unwrap();
    assert_eq!(code, Some(0), "{said:#}");
}

pub fn requests_are_seen_as_they_end() {
    let namespace = Namespace::create("weft-test-tap", true);
    let ns = namespace.0.as_str();
    apps::start(
        ns,
        &[apps::server("server", 1), apps::client("client")],
        &["server", "client"],
    );
    let mut tap = weft()
        .args([
            "tap",
            "deploy/server",
            "--path",
            "/seen",
            "-n",
            ns,
            "-o",
            "json",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(tap.stdout.take().unwrap()).lines();
    let (found, first) = std::sync::mpsc::channel();
    let reading = std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            let _ = found.send(line);
        }
    });
    let line = eventually("a request is shown", PATIENCE, || {
        let few = ["--rate", "10", "--seconds", "1"];
        load(
            ns,
            "client",
            &[&["http://server/unseen"], &few[..]].concat(),
        );
        load(ns, "client", &[&["http://server/seen"], &few[..]].concat());
        first.try_recv().map_err(|error| error.to_string())
    });
    tap.kill().unwrap();
    tap.wait().unwrap();
    reading.join().unwrap();
    println!("{line}");
    for line in std::iter::once(line).chain(first.try_iter()) {
        let seen: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(seen["path"], "/seen", "{line}");
        assert_eq!(seen["status"], 200, "{line}");
    }
}
