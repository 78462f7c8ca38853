//! The control plane on a real cluster: that of KUBECONFIG, when WEFT_TEST_KUBECONFIG names the same
//! (nobody's own cluster is meant by accident). Who may create namespaces, Services, EndpointSlices and
//! Pods there can run this.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Namespace, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use support::{ControlPlane, Identity, PATIENCE, TestProxy};
use weft_api::proto::resource::Body;
use weft_api::proto::{Endpoint, Health, ResourceKind};
use weft_control_plane::serve::SourceConfig;
use weft_control_plane::sources::kubernetes::Options;

/// Endpoint changes that are measured.
const CHANGES: usize = 100;
/// What the project promises, 99th percentile.
const TARGET: Duration = Duration::from_secs(1);

/// A namespace of its own, gone with the test.
struct Cluster {
    client: Client,
    namespace: String,
}

impl Cluster {
    async fn open(name: &str) -> Option<Self> {
        let meant = std::env::var_os("WEFT_TEST_KUBECONFIG");
        if meant.is_none() || meant != std::env::var_os("KUBECONFIG") {
            println!("skipped: KUBECONFIG and WEFT_TEST_KUBECONFIG do not name the same cluster");
            return None;
        }
        let client = Client::try_default().await.unwrap();
        let namespace = format!("weft-source-{name}-{}", std::process::id());
        let object = typed(json!({"metadata": {"name": namespace}}));
        let namespaces: Api<Namespace> = Api::all(client.clone());
        namespaces
            .create(&PostParams::default(), &object)
            .await
            .unwrap();
        Some(Self { client, namespace })
    }

    fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    async fn create<K>(&self, object: Value) -> K
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>
            + Clone
            + serde::Serialize
            + serde::de::DeserializeOwned
            + std::fmt::Debug,
    {
        let object = typed(object);
        let (api, options) = (self.api::<K>(), PostParams::default());
        api.create(&options, &object).await.unwrap()
    }

    async fn close(self) {
        let namespaces: Api<Namespace> = Api::all(self.client);
        let gone = DeleteParams::default();
        namespaces.delete(&self.namespace, &gone).await.unwrap();
    }
}

fn typed<K: serde::de::DeserializeOwned>(object: Value) -> K {
    serde_json::from_value(object).unwrap()
}

/// Waits for endpoints of a Service that are so, and acknowledges what comes.
async fn endpoints(proxy: &mut TestProxy, so: impl Fn(&[Endpoint]) -> bool) -> Instant {
    let waiting = async {
        loop {
            for resource in proxy.next().await.unwrap() {
                proxy.ack(&resource).await;
                if let Some(Body::Endpoints(endpoints)) = &resource.body
                    && so(&endpoints.endpoints)
                {
                    return Instant::now();
                }
            }
        }
    };
    tokio::time::timeout(PATIENCE, waiting)
        .await
        .expect("the endpoints do not come")
}

async fn start() -> (ControlPlane, Identity, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let source = SourceConfig::Kubernetes(Options::default());
    let control = ControlPlane::start_with(source, dir.path(), dir.path()).await;
    // It certifies once it has read the cluster.
    let deadline = Instant::now() + PATIENCE;
    let identity = loop {
        match control
            .certify(&control.token("weft-source", "proxy"))
            .await
        {
            Ok(identity) => break identity,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    (control, identity, dir)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_arrive() {
    let Some(cluster) = Cluster::open("changes").await else {
        return;
    };
    let (control, identity, _dir) = start().await;
    let service: Service = cluster
        .create(json!({"metadata": {"name": "byhand"},
            "spec": {"ports": [{"name": "http", "port": 80}]}}))
        .await;
    let slice = |change: usize| {
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": "byhand-1", "labels": {"kubernetes.io/service-name": "byhand"}},
            "addressType": "IPv4", "ports": [{"name": "http", "port": 8080}],
            "endpoints": [{"addresses": [format!("192.0.2.{change}")]}]})
    };
    let _: EndpointSlice = cluster.create(slice(200)).await;
    let vip = service.spec.unwrap().cluster_ip.unwrap();
    let mut proxy = control
        .stream(&identity, "weft-source/proxy")
        .await
        .unwrap();
    proxy
        .subscribe_all(&[(ResourceKind::Destination, &format!("{vip}:80"), 0)])
        .await;
    let at = |change: usize| {
        move |endpoints: &[Endpoint]| {
            endpoints.len() == 1 && endpoints[0].address == format!("192.0.2.{change}:8080")
        }
    };
    endpoints(&mut proxy, at(200)).await;
    let slices: Api<EndpointSlice> = cluster.api();
    let mut taken = Vec::with_capacity(CHANGES);
    let options = PatchParams::default();
    for change in 0..CHANGES {
        let asked = Instant::now();
        let patch = Patch::Merge(slice(change));
        let patched = slices.patch("byhand-1", &options, &patch);
        let (patched, received) = tokio::join!(patched, endpoints(&mut proxy, at(change)));
        patched.unwrap();
        taken.push(received - asked);
    }
    taken.sort();
    let share = |percent: usize| taken[(CHANGES - 1) * percent / 100];
    println!(
        "{CHANGES} endpoint changes, asking the apiserver to the proxy's receipt: p50 {:.1?}, p99 {:.1?}, max {:.1?}",
        share(50),
        share(99),
        taken[CHANGES - 1]
    );
    cluster.close().await;
    assert!(share(99) < TARGET);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_come_and_go() {
    let Some(cluster) = Cluster::open("pods").await else {
        return;
    };
    let (control, identity, _dir) = start().await;
    let service: Service = cluster
        .create(json!({"metadata": {"name": "web"},
            "spec": {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80}]}}))
        .await;
    let vip = service.spec.unwrap().cluster_ip.unwrap();
    let destination = format!("{vip}:80");
    let mut proxy = control
        .stream(&identity, "weft-source/proxy")
        .await
        .unwrap();
    proxy
        .subscribe_all(&[(ResourceKind::Destination, &destination, 0)])
        .await;
    endpoints(&mut proxy, |endpoints| endpoints.is_empty()).await;
    let pod = |name: &str, container: &str| {
        json!({"metadata": {"name": name, "labels": {"app": "web"}},
            "spec": {"terminationGracePeriodSeconds": 5, "containers": [{
                "name": container, "image": "registry.k8s.io/pause:3.10",
                "imagePullPolicy": "IfNotPresent"}]}})
    };
    // Named as a sidecar is.
    let _: Pod = cluster.create(pod("inside", "weft-proxy")).await;
    let _: Pod = cluster.create(pod("outside", "app")).await;
    let trusted = format!("spiffe://cluster.local/ns/{}/sa/default", cluster.namespace);
    endpoints(&mut proxy, |endpoints| {
        // Never, not even for a moment, is the one inside plaintext.
        for endpoint in endpoints {
            let inside = endpoint.workload.ends_with("/inside");
            assert_eq!(inside, endpoint.identity == trusted, "{endpoint:?}");
        }
        endpoints.len() == 2
    })
    .await;
    let pods: Api<Pod> = cluster.api();
    let asked = Instant::now();
    let options = DeleteParams::default();
    let deleted = pods.delete("outside", &options);
    let left = |endpoints: &[Endpoint]| {
        let ready = |endpoint: &&Endpoint| endpoint.health() == Health::Ready;
        endpoints.iter().filter(ready).count() == 1
    };
    let (deleted, received) = tokio::join!(deleted, endpoints(&mut proxy, left));
    deleted.unwrap();
    println!("a deleted pod left after {:.1?}", received - asked);
    assert!(received - asked < TARGET);
    let shown = control
        .admin_json(&format!("/explain?destination={destination}"))
        .await;
    assert_eq!(shown["service"], "web", "{shown}");
    cluster.close().await;
}
