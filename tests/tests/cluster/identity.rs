//! Certificates: short ones under load, and a new root.

use std::time::Duration;

use weft_tests::authority::Authority;
use weft_tests::kube::{self, Namespace, PATIENCE, eventually};

use crate::apps::{self, all_good, load_during, metric, metrics};
use crate::cli;
use crate::install::{NAMESPACE, install, trusted_roots};

pub fn certificates_are_renewed_under_load() {
    install(&["--set", "certificates.lifetime=1m"]);
    let namespace = Namespace::create("weft-test-renew", true);
    let ns = namespace.0.as_str();
    apps::start(
        ns,
        &[apps::server("server", 1), apps::client("client")],
        &["server", "client"],
    );
    let pod = kube::pod(ns, "app=server");
    let expiry = || metric(&metrics(ns, &pod), "weft_certificate_expiry_seconds", &[]);
    let first = expiry();
    let load = [
        "http://server/",
        "--seconds",
        "100",
        "--rate",
        "50",
        "--no-keepalive",
    ];
    let (seen, renewed) = load_during(ns, "client", &load, || {
        std::thread::sleep(Duration::from_secs(90));
        expiry()
    });
    println!(
        "1-minute certificates, expiry moved by {} s: {seen}",
        renewed - first
    );
    assert!(renewed - first >= 30.0, "{first} → {renewed}");
    all_good(&seen);
}

pub fn roots_are_rotated_under_load() {
    let namespace = Namespace::create("weft-test-rotate", true);
    let ns = namespace.0.as_str();
    apps::start(
        ns,
        &[apps::server("server", 2), apps::client("client")],
        &["server", "client"],
    );
    let before = trusted_roots();
    let load = [
        "http://server/",
        "--seconds",
        "150",
        "--rate",
        "40",
        "--no-keepalive",
    ];
    let (seen, ()) = load_during(ns, "client", &load, || {
        let told = cli::weft()
            .args(["identity", "rotate-root"])
            .output()
            .unwrap();
        assert!(told.status.success(), "{told:?}");
        eventually("two roots are trusted", PATIENCE, || {
            let now = trusted_roots();
            match now.matches("BEGIN CERTIFICATE").count() {
                2 => Ok(()),
                _ => Err(now),
            }
        });
        eventually("the old root is dropped", PATIENCE, || {
            let now = trusted_roots();
            if now.matches("BEGIN CERTIFICATE").count() == 1 && now != before {
                Ok(())
            } else {
                Err(now)
            }
        });
    });
    println!("a new root under load: {seen}");
    all_good(&seen);
    install(&[]);
}

pub fn an_authority_of_ones_own_takes_over_under_load() {
    let namespace = Namespace::create("weft-test-authority", true);
    let ns = namespace.0.as_str();
    apps::start(
        ns,
        &[apps::server("server", 2), apps::client("client")],
        &["server", "client"],
    );
    let authority = Authority::new();
    kube::apply(NAMESPACE, &authority.secret("own-ca"));
    let load = [
        "http://server/",
        "--seconds",
        "100",
        "--rate",
        "40",
        "--no-keepalive",
    ];
    let only = |root: &str| {
        eventually("that root alone is trusted", PATIENCE, || {
            let now = trusted_roots();
            if now.trim() == root.trim() {
                Ok(())
            } else {
                Err(now)
            }
        });
    };
    let (seen, ()) = load_during(ns, "client", &load, || {
        install(&["--set", "certificates.caSecret=own-ca"]);
        only(&authority.pem());
    });
    println!("an authority of one's own, under load: {seen}");
    all_good(&seen);
    // Given up again, it goes on signing: the mesh has its key.
    install(&[]);
    kube::kubectl(&["delete", "secret", "-n", NAMESPACE, "own-ca"]);
    only(&authority.pem());
    all_good(&apps::load(
        ns,
        "client",
        &["http://server/", "--no-keepalive"],
    ));
}
