//! Who is near: a client in the mesh is sent where kube-proxy sends one without.
//!
//! One node is enough. The endpoints are real pods; on which node and in which zone they are is
//! what EndpointSlices written by hand say, and neither kube-proxy nor the mesh looks elsewhere.

use std::collections::BTreeSet;

use serde_json::Value;
use weft_tests::kube::{self, Namespace, PATIENCE, eventually, get, kubectl};

use crate::apps::{self, load, metric, metrics, number};

/// The zone the node is said to be in, unless it is in one.
const ZONE: &str = "weft-test-zone";
/// The label that says it.
const LABEL: &str = "topology.kubernetes.io/zone";

/// The node of both clients, in a zone until this goes away.
struct Place {
    node: String,
    zone: String,
    /// The zone is of our making.
    ours: bool,
}

impl Place {
    fn new(node: String) -> Self {
        let path = format!(
            "jsonpath={{.metadata.labels.{}}}",
            LABEL.replace('.', "\\.")
        );
        let zone = kubectl(&["get", "node", &node, "-o", &path]);
        // One that a killed run has left is ours, too.
        let ours = zone.is_empty() || zone == ZONE;
        let zone = if ours { ZONE.to_owned() } else { zone };
        let place = Self { node, zone, ours };
        place.label();
        place
    }

    fn label(&self) {
        if self.ours {
            kubectl(&[
                "label",
                "node",
                &self.node,
                &format!("{LABEL}={ZONE}"),
                "--overwrite",
            ]);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.ours {
            let _ = kube::try_kubectl(&["label", "node", &self.node, &format!("{LABEL}-")]);
        }
    }
}

/// Servers `near`, `side` and `far`, and on one node the clients `client`, which is in the mesh, and
/// `plain`, which is not.
struct Places {
    namespace: Namespace,
    place: Place,
    /// Of the three servers.
    pods: Vec<Value>,
}

const SERVERS: [&str; 3] = ["near", "side", "far"];

impl Places {
    fn start(name: &str) -> Self {
        let namespace = Namespace::create(name, true);
        let ns = namespace.0.as_str();
        let on_node = |manifest: String, node: &str| {
            let pinned = format!("    spec:\n      nodeName: {node}\n      serviceAccountName");
            manifest.replace("    spec:\n      serviceAccountName", &pinned)
        };
        apps::start(ns, &[apps::client("client")], &["client"]);
        let client = &kube::pods(ns, "app=client")[0];
        let node = client["spec"]["nodeName"].as_str().unwrap().to_owned();
        let plain = apps::client("plain").replace(
            "metadata: {labels: {app: plain}}",
            "metadata: {labels: {app: plain}, annotations: {weft.dev/inject: disabled}}",
        );
        let mut manifests = vec![on_node(plain, &node)];
        manifests.extend(SERVERS.map(|server| on_node(apps::server(server, 1), &node)));
        apps::start(ns, &manifests, &["plain", "near", "side", "far"]);
        let pods = SERVERS.map(|server| kube::pods(ns, &format!("app={server}")).remove(0));
        Self {
            place: Place::new(node),
            pods: pods.into(),
            namespace,
        }
    }

    fn ns(&self) -> &str {
        &self.namespace.0
    }

    /// A Service without a selector, and one EndpointSlice of it by hand.
    /// In an endpoint, HERE is the clients' node and ZONE their zone; all others are made up.
    fn apply(&self, &(name, spec, endpoints, _): &Case<'_>) {
        let family = match self.address("near").contains(':') {
            true => "IPv6",
            false => "IPv4",
        };
        let mut manifests = format!(
            "
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  ports: [{{name: http, port: 80, targetPort: 8080}}]
  {spec}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: {name}-by-hand
  labels: {{kubernetes.io/service-name: {name}, endpointslice.kubernetes.io/managed-by: weft-tests}}
addressType: {family}
ports: [{{name: http, port: 8080}}]
endpoints:
"
        );
        for (server, says) in endpoints {
            let says = says
                .replace("HERE", &self.place.node)
                .replace("ZONE", &self.place.zone);
            let pod = &self.pod(server)["metadata"];
            // As Kubernetes writes it, and as people do.
            let target = match *server {
                "far" => String::new(),
                _ => format!(
                    ", targetRef: {{kind: Pod, name: {}, namespace: {}, uid: {}}}",
                    pod["name"], pod["namespace"], pod["uid"]
                ),
            };
            let address = self.address(server);
            manifests += &format!("  - {{addresses: ['{address}'], {says}{target}}}\n");
        }
        kube::apply(self.ns(), &manifests);
    }

    fn pod(&self, server: &str) -> &Value {
        let index = SERVERS.iter().position(|name| *name == server);
        &self.pods[index.expect("one of the three")]
    }

    fn address(&self, server: &str) -> &str {
        self.pod(server)["status"]["podIP"].as_str().unwrap()
    }

    /// Who answers a client's requests.
    fn answering(&self, client: &str, url: &str) -> (BTreeSet<String>, Value) {
        let words = [
            url,
            "--count",
            "48",
            "--clients",
            "4",
            "--rate",
            "400",
            "--no-keepalive",
        ];
        let seen = load(self.ns(), client, &words);
        let servers = seen["servers"].as_object().unwrap().keys();
        let app = |pod: &String| pod.split('-').next().unwrap_or_default().to_owned();
        (servers.map(app).collect(), seen)
    }

    /// Waits until both clients are served by these and nobody else, the one in the mesh by mutual
    /// TLS: whom the proxy does not know yet, kube-proxy answers for.
    fn served(&self, what: &str, service: &str, url: &str, expected: &[&str]) {
        let expected: BTreeSet<String> = expected.iter().map(|&name| name.to_owned()).collect();
        let whole = |seen: &Value| seen["good"] == seen["requests"];
        eventually(
            &format!("{what}: kube-proxy sends to {expected:?}"),
            PATIENCE,
            || {
                let (servers, seen) = self.answering("plain", url);
                match servers == expected && whole(&seen) {
                    true => Ok(()),
                    false => Err(seen.to_string()),
                }
            },
        );
        let client = kube::pod(self.ns(), "app=client");
        let name = format!("destination_service=\"{service}\"");
        let labels = ["direction=\"outbound\"", "mtls=\"true\"", name.as_str()];
        let counted = || metric(&metrics(self.ns(), &client), "weft_requests_total", &labels);
        eventually(
            &format!("{what}: the mesh sends to {expected:?}"),
            PATIENCE,
            || {
                let before = counted();
                let (servers, seen) = self.answering("client", url);
                let mutual = counted() - before;
                match servers == expected
                    && whole(&seen)
                    && (mutual - number(&seen["requests"])).abs() < 0.5
                {
                    true => Ok(()),
                    false => Err(format!("{mutual} of them by mutual TLS: {seen}")),
                }
            },
        );
        // It was no luck of the balancer's.
        for _ in 0..3 {
            let (servers, seen) = self.answering("client", url);
            assert!(servers.is_subset(&expected), "{what}: {seen}");
        }
        println!("{what}: {expected:?}");
    }

    /// Waits until nobody serves either client: kube-proxy drops what they send, the mesh answers with
    /// 503 and says why.
    fn refused(&self, what: &str, service: &str) {
        let url = format!("http://{service}/");
        let sentences = ["no endpoint on this node", "none of its endpoints is ready"];
        let words = [url.as_str(), "--count", "4", "--clients", "4"];
        for client in ["plain", "client"] {
            let what = format!("{what}: nobody serves {client}");
            let seen = eventually(&what, PATIENCE, || {
                let seen = load(self.ns(), client, &words);
                let said = seen["outcomes"].to_string();
                let why = sentences.iter().any(|sentence| said.contains(sentence));
                let as_said = client == "plain" || why;
                match number(&seen["good"]) == 0.0 && as_said {
                    true => Ok(seen),
                    false => Err(seen.to_string()),
                }
            });
            println!("{what}: {}", seen["outcomes"]);
        }
    }
}

impl Places {
    /// Applies all, so that all are on their way, and then looks who answers for each.
    fn shown(&self, cases: &[Case<'_>]) {
        for case in cases {
            self.apply(case);
        }
        for (name, _, _, expected) in cases {
            match expected {
                [] => self.refused(name, name),
                expected => self.served(name, name, &format!("http://{name}/"), expected),
            }
        }
    }
}

/// Kubernetes 1.34 has hints for nodes, and the values of `trafficDistribution` that wish for them.
const NODE_HINTS: u32 = 34;

/// The minor version of the apiserver: 34 of `1.34`.
fn minor() -> u32 {
    let version: Value = serde_json::from_str(&kubectl(&["version", "-o", "json"])).unwrap();
    let minor = version["serverVersion"]["minor"].as_str().unwrap();
    minor.trim_end_matches('+').parse().unwrap()
}

/// A Service's name, what its `spec` says, what its slice says of servers, and who is to answer.
type Case<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)], &'a [&'a str]);

/// Where the three are, unless a case says something else.
const NEAR: &str = "nodeName: HERE, zone: ZONE";
const SIDE: &str = "nodeName: weft-test-ghost-1, zone: ZONE";
const FAR: &str = "nodeName: weft-test-ghost-2, zone: weft-test-far";

/// On its way out, serving what it has.
const LEAVING: &str = "conditions: {ready: false, serving: true, terminating: true}";
const UNWELL: &str = "conditions: {ready: false, serving: false}";
const GONE: &str = "conditions: {ready: false, serving: false, terminating: true}";

fn and(place: &str, says: &str) -> String {
    format!("{place}, {says}")
}

/// Hints for a zone.
fn zone(place: &str, name: &str) -> String {
    format!("{place}, hints: {{forZones: [{{name: {name}}}]}}")
}

/// Hints for a zone and a node.
fn node(place: &str, zone: &str, node: &str) -> String {
    format!("{place}, hints: {{forZones: [{{name: {zone}}}], forNodes: [{{name: {node}}}]}}")
}

pub fn a_local_service_keeps_to_the_node() {
    let places = Places::start("weft-test-local");
    let local = "internalTrafficPolicy: Local";
    let here = and(NEAR, LEAVING);
    let unwell = and(NEAR, UNWELL);
    let hinted = zone(NEAR, "weft-test-far");
    let all = [("near", NEAR), ("side", SIDE), ("far", FAR)];
    places.shown(&[
        (
            "cluster",
            "internalTrafficPolicy: Cluster",
            &all,
            &["near", "side", "far"],
        ),
        ("local", local, &all, &["near"]),
        // Nobody knows where the other one is.
        (
            "placeless",
            local,
            &[("near", NEAR), ("far", "zone: ZONE")],
            &["near"],
        ),
        // Whoever leaves is used while nobody else is there, whoever is ready elsewhere.
        (
            "leaving",
            local,
            &[("near", &here), ("far", FAR)],
            &["near"],
        ),
        (
            "replaced",
            local,
            &[("near", &here), ("side", NEAR), ("far", FAR)],
            &["side"],
        ),
        // Hints are for those that may go elsewhere.
        (
            "hinted",
            local,
            &[("near", &hinted), ("far", &zone(FAR, "ZONE"))],
            &["near"],
        ),
        ("elsewhere", local, &[("side", SIDE), ("far", FAR)], &[]),
        ("unwell", local, &[("near", &unwell), ("far", FAR)], &[]),
    ]);
    // Ports of nodes lead to every node.
    let node_port = "type: NodePort\n  internalTrafficPolicy: Local";
    let by_port: Case<'_> = ("by-port", node_port, &all, &["near"]);
    places.shown(&[by_port]);
    let service = get(places.ns(), &["service", "by-port"]);
    let node = get("default", &["node", &places.place.node]);
    let addresses = node["status"]["addresses"].as_array().unwrap();
    let inner = addresses.iter().find(|given| given["type"] == "InternalIP");
    let address = inner.unwrap()["address"].as_str().unwrap();
    let address = match address.contains(':') {
        true => format!("[{address}]"),
        false => address.to_owned(),
    };
    let url = format!(
        "http://{address}:{}/",
        service["spec"]["ports"][0]["nodePort"]
    );
    places.served("the node's port", "by-port", &url, &["near", "side", "far"]);

    // The last one goes, and comes back.
    for (endpoints, expected) in [
        (&all[1..], &[][..]),
        (&all[..1], &["near"]),
        (&[("near", unwell.as_str()), ("side", SIDE)], &[]),
        (&[("near", here.as_str()), ("side", SIDE)], &["near"]),
    ] {
        places.shown(&[("local", local, endpoints, expected)]);
    }
}

pub fn conditions_decide_who_is_used() {
    let places = Places::start("weft-test-conditions");
    let leaving = [and(NEAR, LEAVING), and(FAR, LEAVING)];
    let gone = and(NEAR, GONE);
    places.shown(&[
        (
            "unsaid",
            "",
            &[("near", NEAR), ("far", "conditions: {}")],
            &["near", "far"],
        ),
        (
            "one-leaves",
            "",
            &[("near", &leaving[0]), ("far", FAR)],
            &["far"],
        ),
        (
            "all-leave",
            "",
            &[
                ("near", &leaving[0]),
                ("side", &and(SIDE, UNWELL)),
                ("far", &leaving[1]),
            ],
            &["near", "far"],
        ),
        (
            "one-is-gone",
            "",
            &[("near", &gone), ("far", &leaving[1])],
            &["far"],
        ),
    ]);
}

pub fn hints_keep_to_the_zone() {
    let places = Places::start("weft-test-hints");
    let near = zone(NEAR, "ZONE");
    let side = zone(SIDE, "ZONE");
    let far = zone(FAR, "weft-test-far");
    let three = [("near", near.as_str()), ("side", &side), ("far", &far)];
    places.shown(&[
        ("zone", "", &three, &["near", "side"]),
        // It is the hints that say it, not where somebody is.
        (
            "crossed",
            "",
            &[
                ("near", &zone(NEAR, "weft-test-far")),
                ("far", &zone(FAR, "ZONE")),
            ],
            &["far"],
        ),
        (
            "two-zones",
            "",
            &[
                ("near", &near),
                ("side", &zone(SIDE, "weft-test-far")),
                (
                    "far",
                    &and(
                        FAR,
                        "hints: {forZones: [{name: weft-test-far}, {name: ZONE}]}",
                    ),
                ),
            ],
            &["near", "far"],
        ),
        (
            "not-every-one",
            "",
            &[("near", &near), ("far", FAR)],
            &["near", "far"],
        ),
        // Who is not ready needs no hint, and has none to give.
        (
            "others-unwell",
            "",
            &[("near", &near), ("far", &and(FAR, UNWELL))],
            &["near"],
        ),
        (
            "mine-unwell",
            "",
            &[("near", &and(&near, UNWELL)), ("far", &far)],
            &["far"],
        ),
        (
            "mine-leaves",
            "",
            &[("near", &and(&near, LEAVING)), ("far", &far)],
            &["far"],
        ),
        (
            "all-leave",
            "",
            &[("near", &and(&near, LEAVING)), ("far", &and(&far, LEAVING))],
            &["near", "far"],
        ),
        (
            "none-of-mine",
            "",
            &[("side", &zone(SIDE, "weft-test-other")), ("far", &far)],
            &["side", "far"],
        ),
    ]);
    if minor() >= NODE_HINTS {
        let near = node(NEAR, "ZONE", "HERE");
        let side = node(SIDE, "ZONE", "weft-test-ghost-1");
        let far = node(FAR, "weft-test-far", "weft-test-ghost-2");
        places.shown(&[
            (
                "node",
                "",
                &[("near", &near), ("side", &side), ("far", &far)],
                &["near"],
            ),
            (
                "none-on-mine",
                "",
                &[("side", &side), ("far", &far)],
                &["side"],
            ),
            (
                "not-every-node",
                "",
                &[
                    ("near", &near),
                    ("side", &zone(SIDE, "ZONE")),
                    ("far", &far),
                ],
                &["near", "side"],
            ),
        ]);
    }
    // Where nobody knows the client's zone, all are alike.
    if places.place.ours {
        let of_node = ["label", "node", &places.place.node, &format!("{LABEL}-")];
        kubectl(&of_node);
        places.served("no zone", "zone", "http://zone/", &["near", "side", "far"]);
        places.place.label();
        places.served("a zone again", "zone", "http://zone/", &["near", "side"]);
    }
}

/// `near` is in slices of Kubernetes' own, with the hints that it writes; the other two are as they
/// would be if their nodes existed.
pub fn a_distribution_prefers_what_is_near() {
    let places = Places::start("weft-test-distribution");
    let side = node(SIDE, "ZONE", "weft-test-ghost-1");
    let far = node(FAR, "weft-test-far", "weft-test-ghost-2");
    let others = [("side", side.as_str()), ("far", &far)];
    let mut given = vec![
        ("", &["near", "side", "far"][..]),
        ("PreferClose", &["near", "side"]),
    ];
    if minor() >= NODE_HINTS {
        given.push(("PreferSameZone", &["near", "side"]));
        given.push(("PreferSameNode", &["near"]));
    }
    let spec = |wish: &str| {
        let wish = match wish {
            "" => String::new(),
            wish => format!("trafficDistribution: {wish}"),
        };
        format!("selector: {{app: near}}\n  {wish}")
    };
    for (wish, expected) in &given {
        let name = format!("wish-{}", wish.to_lowercase());
        let name = name.trim_end_matches('-');
        places.shown(&[(name, &spec(wish), &others, expected)]);
    }
    // One Service that changes its mind.
    for (wish, expected) in given.iter().rev().chain(&given) {
        places.shown(&[("changing", &spec(wish), &others, expected)]);
    }
}
