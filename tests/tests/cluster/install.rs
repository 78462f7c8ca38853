//! The chart: installed, upgraded, removed.

use std::path::Path;

use weft_tests::kube::{self, PATIENCE, eventually, get, helm, kubectl};

use crate::apps;

pub const NAMESPACE: &str = "weft-system";
pub const CONTROL_PLANE: &str = "deployment/weft-control-plane";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// `helm upgrade --install` with the values of the tests and some more.
#[track_caller]
pub fn install(more: &[&str]) {
    let chart = root().join("charts/weft");
    let values = root().join("tests/cluster/values.yaml");
    let mut arguments = vec![
        "upgrade",
        "--install",
        "weft",
        chart.to_str().unwrap(),
        "--namespace",
        NAMESPACE,
        "--create-namespace",
        "--values",
        values.to_str().unwrap(),
        "--wait",
        "--timeout",
        "180s",
    ];
    arguments.extend(more);
    helm(&arguments);
    kube::rolled_out(NAMESPACE, CONTROL_PLANE);
}

/// Waits for the replicas of before an upgrade to be gone.
pub fn old_replicas_gone() {
    eventually(
        "only as many replicas as wanted are there",
        PATIENCE,
        || {
            let wanted = get(NAMESPACE, &[CONTROL_PLANE])["spec"]["replicas"].as_u64();
            let selector = "app.kubernetes.io/name=weft-control-plane";
            let pods = get(NAMESPACE, &["pods", "-l", selector]);
            let there = pods["items"].as_array().map(|pods| pods.len() as u64);
            if there == wanted {
                Ok(())
            } else {
                Err(format!("{there:?} of {wanted:?}"))
            }
        },
    );
}

pub fn the_chart_installs() {
    install(&[]);
    let said = helm(&["test", "weft", "--namespace", NAMESPACE]);
    assert!(said.contains("Succeeded"), "{said}");
    eventually("the webhook has its certificate", PATIENCE, || {
        let hook = get("", &["mutatingwebhookconfiguration", "weft-injector"]);
        match hook["webhooks"][0]["clientConfig"]["caBundle"].as_str() {
            Some(bundle) if !bundle.is_empty() => Ok(()),
            _ => Err(hook.to_string()),
        }
    });
    eventually("new namespaces get the trusted roots", PATIENCE, || {
        kube::try_kubectl(&["get", "configmap", "-n", "default", "weft-trust"]).map(drop)
    });
}

/// Root certificates that the mesh trusts.
pub fn trusted_roots() -> String {
    let map = get("default", &["configmap", "weft-trust"]);
    map["data"]["root.pem"].as_str().unwrap().to_owned()
}

pub fn an_upgrade_keeps_certificates() {
    let namespace = kube::Namespace::create("weft-test-upgrade", true);
    let ns = namespace.0.as_str();
    apps::start(
        ns,
        &[apps::server("server", 2), apps::client("client")],
        &["server", "client"],
    );
    let before = trusted_roots();
    let url = "http://server/upgrade";
    let load = [url, "--seconds", "25", "--rate", "50"];
    let (seen, ()) = apps::load_during(ns, "client", &load, || {
        install(&["--set", "controlPlane.logLevel=debug"]);
    });
    println!("upgrade with changed values under load: {seen}");
    apps::all_good(&seen);
    assert_eq!(before, trusted_roots(), "the root certificate has changed");
}

pub fn nothing_stays_behind() {
    helm(&["uninstall", "weft", "--namespace", NAMESPACE, "--wait"]);
    let kinds = "all,configmaps,secrets,serviceaccounts,leases,roles,rolebindings,\
                 poddisruptionbudgets,networkpolicies";
    let cluster = "clusterroles,clusterrolebindings,mutatingwebhookconfigurations,\
                   validatingwebhookconfigurations,customresourcedefinitions";
    eventually("nothing of the mesh is left", PATIENCE, || {
        let mut left = kubectl(&["get", kinds, "-A", "-o", "name"]);
        left += &kubectl(&["get", cluster, "-o", "name"]);
        let left: Vec<&str> = left.lines().filter(|name| name.contains("weft")).collect();
        if left.is_empty() {
            Ok(())
        } else {
            Err(left.join(", "))
        }
    });
    kubectl(&["delete", "namespace", NAMESPACE, "--wait=false"]);
}
