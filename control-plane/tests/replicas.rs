//! Replicas of the control plane on a scripted apiserver: the certificate authority they share, who
//! leads, whose tokens count, and what happens when the apiserver says no or nothing.

#![allow(clippy::unwrap_used)]

#[path = "support/apiserver.rs"]
mod apiserver;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use apiserver::ApiServer;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use weft_control_plane::cluster::election::{Election, Timing};
use weft_control_plane::cluster::{Cluster, Leadership};
use weft_control_plane::serve::authenticate::{Authenticator, TokenError};
use weft_control_plane::serve::ca::{Authority, CaError, Moving, Options, Request};

/// Paused time, as all of it here: it goes on by itself when everybody waits.
const PATIENCE: Duration = Duration::from_secs(60);
const NAMESPACE: &str = "weft-system";
const LEASE: &str = "weft-control-plane";

const TIMING: Timing = Timing {
    duration: Duration::from_secs(2),
    renew_within: Duration::from_millis(1200),
    retry: Duration::from_millis(100),
};

async fn cluster(server: &ApiServer, replica: &str) -> Cluster {
    Cluster::new(server.client(), NAMESPACE.to_owned(), replica.to_owned())
        .await
        .unwrap()
}

/// One who takes part in the election.
struct Candidate {
    leadership: Leadership,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Candidate {
    fn start(cluster: &Cluster) -> Self {
        let (election, leadership) = Election::new(cluster.clone(), LEASE, TIMING);
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(election.run(async {
            let _ = stopped.await;
        }));
        Self {
            leadership,
            stop,
            task,
        }
    }
}

async fn eventually(what: &str, so: impl Fn() -> bool) {
    let waiting = async {
        while !so() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting)
        .await
        .unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"));
}

fn holder(server: &ApiServer) -> String {
    let lease = server.get("leases", NAMESPACE, LEASE).unwrap_or_default();
    let holder = lease["spec"]["holderIdentity"].as_str();
    holder.unwrap_or_default().to_owned()
}

#[tokio::test(start_paused = true)]
async fn one_leads_and_another_takes_over() {
    let server = ApiServer::start().await;
    let (a, b) = (cluster(&server, "a").await, cluster(&server, "b").await);
    let first = Candidate::start(&a);
    eventually("a leads", || first.leadership.is_leader()).await;
    let second = Candidate::start(&b);
    tokio::time::sleep(TIMING.duration * 2).await;
    assert!(first.leadership.is_leader() && !second.leadership.is_leader());
    // Released: nobody waits for its end.
    let began = tokio::time::Instant::now();
    drop(first.stop);
    first.task.await.unwrap();
    assert!(!first.leadership.is_leader());
    eventually("b leads", || second.leadership.is_leader()).await;
    assert!(began.elapsed() < TIMING.duration, "{:?}", began.elapsed());
    let transitions = server.get("leases", NAMESPACE, LEASE).unwrap();
    assert_eq!(transitions["spec"]["leaseTransitions"], 2);

    // Killed: after the lease has run out.
    second.task.abort();
    let third = Candidate::start(&a);
    let began = tokio::time::Instant::now();
    eventually("a leads again", || third.leadership.is_leader()).await;
    assert!(began.elapsed() >= TIMING.duration - TIMING.retry * 2);
    assert_eq!(holder(&server), "a");
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_cannot_renew_stops_in_time() {
    let server = ApiServer::start().await;
    let a = cluster(&server, "a").await;
    let candidate = Candidate::start(&a);
    let leadership = candidate.leadership.clone();
    eventually("a leads", || leadership.is_leader()).await;
    // Lost writes and conflicts are tried again.
    server.conflict("leases", 2);
    tokio::time::sleep(TIMING.retry * 5).await;
    assert!(leadership.is_leader());
    server.away(true);
    let began = tokio::time::Instant::now();
    eventually("it leads no more", || !leadership.is_leader()).await;
    assert!(began.elapsed() <= TIMING.renew_within + TIMING.retry);
    let said = leadership.lost();
    let told = tokio::time::timeout(TIMING.retry, said).await;
    told.expect("whoever watches is told");
    server.away(false);
    eventually("it leads again", || leadership.is_leader()).await;
    // Somebody else has taken it: nothing is written from the moment that is seen.
    let mut lease = server.get("leases", NAMESPACE, LEASE).unwrap();
    lease["spec"]["holderIdentity"] = json!("b");
    server.put("leases", lease);
    eventually("it has seen the other", || !leadership.is_leader()).await;
    assert_eq!(holder(&server), "b");
}

fn options() -> Options {
    Options::default()
}

async fn authority(cluster: &Cluster, leadership: &Leadership) -> Arc<Authority> {
    let opening = Authority::in_cluster(cluster, leadership, options(), None);
    let opened = tokio::time::timeout(PATIENCE, opening).await.unwrap();
    Arc::new(opened.unwrap())
}

#[tokio::test(start_paused = true)]
async fn replicas_share_one_authority() {
    let server = ApiServer::start().await;
    server.put(
        "clusterroles",
        json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
               "metadata": {"name": LEASE, "uid": "u-1"}}),
    );
    let (a, b) = (cluster(&server, "a").await, cluster(&server, "b").await);
    let (leads, follows) = (Leadership::always(), Candidate::start(&b).leadership);
    // Whoever is not the leader waits.
    server.conflict("leases", usize::MAX);
    let waiting = Authority::in_cluster(&b, &follows, options(), None);
    let waited = tokio::time::timeout(Duration::from_secs(1), waiting).await;
    assert!(waited.is_err(), "it made one, or found one");
    assert!(server.get("secrets", NAMESPACE, "weft-ca").is_none());

    let first = authority(&a, &leads).await;
    let second = authority(&b, &follows).await;
    assert_eq!(first.roots(), second.roots());
    let secret = server.get("secrets", NAMESPACE, "weft-ca").unwrap();
    assert_eq!(secret["metadata"]["ownerReferences"][0]["uid"], "u-1");
    assert_eq!(
        secret["metadata"]["labels"]["app.kubernetes.io/managed-by"],
        "weft-control-plane"
    );

    // What the leader does, the other takes up; the other itself does nothing.
    let following = tokio::spawn(second.clone().follow(b.clone(), None));
    let now = SystemTime::now();
    assert!(matches!(
        second.step(Request::Rotate, now).await,
        Err(CaError::NotLeader)
    ));
    first.step(Request::Rotate, now).await.unwrap();
    let all_trust = Moving {
        all_trust: true,
        all_moved_for: None,
    };
    eventually("it knows both", || second.roots() == first.roots()).await;
    assert_eq!(second.roots().len(), 2);
    first
        .tick(all_trust, now + Duration::from_secs(5))
        .await
        .unwrap();
    assert_eq!(first.status().phase, "announcing", "replicas need longer");
    first
        .tick(all_trust, now + Duration::from_secs(16))
        .await
        .unwrap();
    assert_eq!(first.status().phase, "draining");
    eventually("it signs with it too", || second.status() == first.status()).await;

    // Deleted by somebody: the leader writes it again, the same.
    server.delete("secrets", NAMESPACE, "weft-ca");
    first.reload().await.unwrap();
    let again = server.get("secrets", NAMESPACE, "weft-ca").unwrap();
    assert_eq!(
        again["data"]["root.pem"],
        json!(STANDARD.encode(first.bundle()))
    );
    first.step(Request::Finish, now).await.unwrap();
    eventually("the old one is gone", || second.roots() == first.roots()).await;
    assert_eq!(first.status().phase, "stable");
    let secret = server.get("secrets", NAMESPACE, "weft-ca").unwrap();
    let keys = secret["data"].as_object().unwrap().keys();
    let keys: Vec<_> = keys.filter(|name| name.ends_with(".key.pem")).collect();
    assert_eq!(keys.len(), 1, "the old key is removed: {keys:?}");
    // A restart finds what was left.
    let restarted = authority(&a, &leads).await;
    assert_eq!(restarted.status(), first.status());
    following.abort();
}

#[tokio::test(start_paused = true)]
async fn a_write_that_somebody_else_was_quicker_than_is_not_made() {
    let server = ApiServer::start().await;
    let a = cluster(&server, "a").await;
    let leads = Leadership::always();
    let (first, second) = (authority(&a, &leads).await, authority(&a, &leads).await);
    let now = SystemTime::now();
    first.step(Request::Rotate, now).await.unwrap();
    // It knows the version before that.
    let refused = second.step(Request::Rotate, now).await;
    assert!(matches!(refused, Err(CaError::Changed)), "{refused:?}");
    second.reload().await.unwrap();
    assert_eq!(second.roots(), first.roots());
}

#[tokio::test(start_paused = true)]
async fn an_annotation_asks_for_a_rotation_once() {
    let server = ApiServer::start().await;
    let a = cluster(&server, "a").await;
    let authority = authority(&a, &Leadership::always()).await;
    let now = SystemTime::now();
    let ask = |name: &str, value: &str| {
        let mut secret = server.get("secrets", NAMESPACE, "weft-ca").unwrap();
        secret["metadata"]["annotations"][name] = json!(value);
        server.put("secrets", secret);
    };
    let tick = async || {
        authority.reload().await.unwrap();
        authority.tick(Moving::default(), now).await.unwrap();
        authority.status().phase
    };
    ask("weft.dev/rotate", "1");
    assert_eq!(tick().await, "announcing");
    ask("weft.dev/finish-rotation", "1");
    assert_eq!(tick().await, "stable");
    assert_eq!(tick().await, "stable", "asked for once, done once");
    ask("weft.dev/rotate", "2");
    assert_eq!(tick().await, "announcing");
    // While one is under way, another is marked as answered.
    ask("weft.dev/rotate", "3");
    assert_eq!(tick().await, "announcing");
    ask("weft.dev/finish-rotation", "2");
    assert_eq!(tick().await, "stable");
    assert_eq!(tick().await, "stable");
}

/// A self-signed authority in a Secret as cert-manager writes it.
fn brought(name: &str) -> Value {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose};
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let pem = params.self_signed(&key).unwrap().pem();
    json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
        "metadata": {"name": "my-ca", "namespace": NAMESPACE},
        "data": {
            "tls.crt": STANDARD.encode(&pem), "tls.key": STANDARD.encode(key.serialize_pem()),
            "ca.crt": STANDARD.encode(&pem),
        },
    })
}

#[tokio::test(start_paused = true)]
async fn an_authority_of_the_users_is_taken_up_and_rotated() {
    let server = ApiServer::start().await;
    let a = cluster(&server, "a").await;
    let leads = Leadership::always();
    // It is waited for.
    let opening = tokio::spawn({
        let (a, leads) = (a.clone(), leads.clone());
        async move { Authority::in_cluster(&a, &leads, options(), Some("my-ca")).await }
    });
    let asks = || server.asked("secrets", "get");
    eventually("it asks again and again", || asks() >= 6).await;
    assert!(!opening.is_finished());
    let one = brought("company 1");
    server.put("secrets", one.clone());
    let authority = Arc::new(opening.await.unwrap().unwrap());
    assert_eq!(STANDARD.encode(authority.bundle()), one["data"]["ca.crt"]);
    let following = tokio::spawn(
        authority
            .clone()
            .follow(a.clone(), Some("my-ca".to_owned())),
    );
    let now = SystemTime::now();
    assert!(matches!(
        authority.step(Request::Rotate, now).await,
        Err(CaError::NotOurs(_))
    ));
    // What cannot work changes nothing.
    let mut broken = brought("broken");
    broken["data"]["tls.key"] = one["data"]["tls.key"].clone();
    server.put("secrets", broken);
    // By then it is read, whatever the watch says.
    tokio::time::sleep(Duration::from_secs(11)).await;
    authority.tick(Moving::default(), now).await.unwrap();
    assert_eq!(authority.roots().len(), 1);
    // A new one is trusted beside the old.
    let two = brought("company 2");
    server.put("secrets", two.clone());
    let began = tokio::time::Instant::now();
    while authority.roots().len() < 2 {
        assert!(began.elapsed() < PATIENCE, "it is not taken up");
        tokio::time::sleep(Duration::from_millis(50)).await;
        // The version may just be read again.
        let _ = authority.tick(Moving::default(), now).await;
    }
    assert!(
        authority.status().roots[0].signing,
        "not before all trust it"
    );
    authority.step(Request::Finish, now).await.unwrap();
    assert_eq!(STANDARD.encode(authority.bundle()), two["data"]["ca.crt"]);
    following.abort();
}

#[tokio::test(start_paused = true)]
async fn the_apiserver_says_whose_a_token_is() {
    let server = ApiServer::start().await;
    let authenticator = Authenticator::Kubernetes(cluster(&server, "a").await);
    let now = SystemTime::now();
    server.review(
        "good",
        json!({"authenticated": true, "audiences": ["weft.dev/control-plane"],
               "user": {"username": "system:serviceaccount:shop:cart"}}),
    );
    let claims = authenticator.check("good\n", now).await.unwrap();
    assert_eq!(claims.service_account, "cart");
    for token in ["", "forged", &"x".repeat(20_000)] {
        let refused = authenticator.check(token, now).await;
        assert!(
            matches!(refused, Err(TokenError::Refused(_))),
            "{refused:?}"
        );
    }
    // Away: nobody is refused for it.
    server.away(true);
    let away = authenticator.check("good", now).await;
    assert!(matches!(away, Err(TokenError::Unavailable(_))), "{away:?}");
    server.away(false);
    assert!(authenticator.check("good", now).await.is_ok());
}
