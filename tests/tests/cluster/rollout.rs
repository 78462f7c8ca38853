//! Rolling restarts under steady load lose no request.

use std::time::Duration;

use weft_tests::kube::{self, Namespace};

use crate::apps::{self, all_good, load_during};
use crate::install::{CONTROL_PLANE, NAMESPACE};

fn restart(namespace: &str, what: &str) {
    kube::kubectl(&["rollout", "restart", "-n", namespace, what]);
    kube::rolled_out(namespace, what);
}

fn start(name: &str) -> Namespace {
    let namespace = Namespace::create(name, true);
    apps::start(
        &namespace.0,
        &[apps::server("server", 2), apps::client("client")],
        &["server", "client"],
    );
    namespace
}

const LOAD: &[&str] = &["http://server/", "--seconds", "40", "--rate", "100"];

pub fn a_rolling_restart_of_the_server_loses_nothing() {
    let namespace = start("weft-test-roll");
    let (seen, ()) = load_during(&namespace.0, "client", LOAD, || {
        restart(&namespace.0, "deployment/server");
    });
    println!("rolling restart of the server: {seen}");
    all_good(&seen);
    let servers = seen["servers"].as_object().unwrap().len();
    assert!(servers >= 4, "old and new pods answered: {seen}");
}

pub fn a_rolling_restart_of_the_client_loses_nothing() {
    // The middle of a chain is client and server at once: what goes through it while it is replaced
    // must arrive. Here the caller is restarted while others of its kind go on.
    let namespace = start("weft-test-roll2");
    let ns = namespace.0.as_str();
    kube::apply(ns, &apps::client("other"));
    kube::rolled_out(ns, "deployment/other");
    let (seen, ()) = load_during(ns, "client", LOAD, || {
        restart(ns, "deployment/other");
        restart(ns, "deployment/server");
    });
    println!("rolling restart of every other proxy: {seen}");
    all_good(&seen);
}

pub fn a_rolling_restart_of_the_control_plane_loses_nothing() {
    let namespace = start("weft-test-roll3");
    let (seen, ()) = load_during(&namespace.0, "client", LOAD, || {
        restart(NAMESPACE, CONTROL_PLANE);
    });
    println!("rolling restart of the control plane: {seen}");
    all_good(&seen);
}

pub fn all_replicas_of_the_control_plane_may_die() {
    let namespace = start("weft-test-roll4");
    let (seen, ()) = load_during(&namespace.0, "client", LOAD, || {
        kube::kubectl(&[
            "delete",
            "pods",
            "-n",
            NAMESPACE,
            "-l",
            "app.kubernetes.io/component=control-plane",
            "--grace-period=0",
            "--force",
        ]);
        std::thread::sleep(Duration::from_secs(3));
        kube::rolled_out(NAMESPACE, CONTROL_PLANE);
    });
    println!("every replica of the control plane killed: {seen}");
    all_good(&seen);
}
