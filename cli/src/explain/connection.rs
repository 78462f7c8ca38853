//! Why a connection is as it is: what is known of its two ends, and what follows from it. No I/O.

use serde::{Deserialize, Serialize};

/// What the control plane says of a destination at /explain; the part that is used here.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Destination {
    pub destination: String,
    pub known: bool,
    #[serde(default)]
    pub namespace: String,
    #[serde(default)]
    pub service: String,
    #[serde(default)]
    pub port: u16,
    #[serde(default)]
    pub protocol: String,
    #[serde(default)]
    pub policies: Vec<String>,
    #[serde(default)]
    pub routes: Vec<Route>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Route {
    pub name: String,
    #[serde(default)]
    pub backends: Vec<Backend>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Backend {
    pub namespace: String,
    pub service: String,
    pub port: u16,
    /// Only endpoints on the caller's own node are used.
    #[serde(default, rename = "nodeLocal")]
    pub node_local: bool,
    #[serde(default)]
    pub endpoints: Option<Vec<Endpoint>>,
}

/// An endpoint as the control plane tells it to callers.
#[derive(Debug, Clone, Deserialize)]
pub struct Endpoint {
    pub address: String,
    /// "namespace/name"; empty when it is no workload that is known.
    pub workload: String,
    /// Whom mutual TLS is spoken with; empty: plaintext.
    #[serde(default)]
    pub identity: String,
    /// "Ready", "Draining", "NotReady".
    pub health: String,
    #[serde(default)]
    pub inbound: Option<Inbound>,
}

/// What the endpoint's own proxy takes on the port.
#[derive(Debug, Clone, Deserialize)]
pub struct Inbound {
    /// "PERMISSIVE", "STRICT", "DISABLE".
    pub mtls: String,
    /// The node it runs on; empty when not known.
    #[serde(default)]
    pub node: String,
    #[serde(default)]
    pub policies: Option<Vec<String>>,
}

/// The calling end.
#[derive(Debug, Clone, Default)]
pub struct Caller {
    /// "namespace/name".
    pub workload: String,
    /// The node it runs on.
    pub node: String,
    /// `None`: no proxy stands beside it.
    pub proxy: Option<CallersProxy>,
    /// The annotation that keeps this destination away from the proxy, as it is written.
    pub excluded: Option<String>,
}

/// What the caller's own proxy says of itself.
#[derive(Debug, Clone, Default)]
pub struct CallersProxy {
    /// SPIFFE id; `None` while it has no certificate.
    pub identity: Option<String>,
    /// Endpoints it knows with their states; `None` when it does not know the destination yet.
    pub states: Option<Vec<(String, String)>>,
    /// Connected to the control plane.
    pub connected: bool,
}

/// How a connection goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Way {
    MutualTls,
    Plaintext,
    /// Its own proxy refuses it.
    Refused,
    /// No new connection goes there.
    Unused,
}

/// An endpoint and what becomes of a connection to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Verdict {
    pub address: String,
    pub workload: String,
    pub backend: String,
    pub way: Way,
    /// A clause.
    pub why: String,
    /// Policies that decide about it.
    pub policies: Vec<String>,
}

/// What becomes of connections to each endpoint.
pub fn verdicts(caller: &Caller, destination: &Destination) -> Vec<Verdict> {
    let mut found: Vec<Verdict> = Vec::new();
    for backend in destination.routes.iter().flat_map(|route| &route.backends) {
        let name = format!("{}/{}:{}", backend.namespace, backend.service, backend.port);
        for endpoint in backend.endpoints.iter().flatten() {
            let known = |v: &Verdict| v.address == endpoint.address && v.backend == name;
            if found.iter().any(known) {
                continue;
            }
            let (way, why) = match elsewhere(caller, backend, endpoint) {
                Some(why) => (Way::Unused, why),
                None => way(caller, endpoint),
            };
            let policies = endpoint.inbound.as_ref().and_then(|i| i.policies.clone());
            found.push(Verdict {
                address: endpoint.address.clone(),
                workload: endpoint.workload.clone(),
                backend: name.clone(),
                way,
                why,
                policies: policies.unwrap_or_default(),
            });
        }
    }
    found
}

/// Why an endpoint of a Service for clients on the same node is none for this caller.
fn elsewhere(caller: &Caller, backend: &Backend, endpoint: &Endpoint) -> Option<String> {
    if !backend.node_local {
        return None;
    }
    let node = endpoint.inbound.as_ref().map(|inbound| &inbound.node);
    match node.filter(|node| !node.is_empty()) {
        Some(node) if *node == caller.node => None,
        Some(node) => Some(format!(
            "it is on node {node}, the caller on {}, and the Service is for clients on the same \
             node (internalTrafficPolicy: Local)",
            caller.node
        )),
        None => Some(
            "nobody knows on which node it is, and the Service is for clients on the same node \
             (internalTrafficPolicy: Local)"
                .to_owned(),
        ),
    }
}

fn way(caller: &Caller, endpoint: &Endpoint) -> (Way, String) {
    match endpoint.health.as_str() {
        "Ready" => {}
        "Draining" => {
            let why = "the pod is ending: no new requests";
            return (Way::Unused, why.to_owned());
        }
        _ => {
            let why = "the pod is not ready (its readiness probe)";
            return (Way::Unused, why.to_owned());
        }
    }
    let mode = endpoint
        .inbound
        .as_ref()
        .map(|inbound| inbound.mtls.as_str());
    let strict = mode == Some("STRICT") && !endpoint.identity.is_empty();
    // The caller's side first: without its proxy nothing else matters.
    let bare = if caller.proxy.is_none() {
        Some("the caller has no proxy".to_owned())
    } else {
        (caller.excluded.as_ref()).map(|a| format!("the caller keeps it from its proxy ({a})"))
    };
    if let Some(why) = bare {
        return if strict {
            let why = format!("{why}, and the endpoint takes mutual TLS only (STRICT)");
            (Way::Refused, why)
        } else {
            (Way::Plaintext, why)
        };
    }
    let proxy = caller.proxy.clone().unwrap_or_default();
    if let Some(states) = &proxy.states {
        let state = states
            .iter()
            .find(|(address, _)| *address == endpoint.address);
        if let Some((_, state)) = state.filter(|(_, state)| state == "ejected") {
            let why = format!("the caller's proxy has {state} it after failures");
            return (Way::Unused, why);
        }
    }
    if endpoint.identity.is_empty() {
        let why = match mode {
            Some("DISABLE") => "mutual TLS is switched off on this port (DISABLE)",
            _ if endpoint.workload.is_empty() => "it is no pod that the mesh knows",
            _ => "the endpoint has no proxy",
        };
        return (Way::Plaintext, why.to_owned());
    }
    match &proxy.identity {
        Some(_) => {
            let with = format!("with {}", endpoint.identity);
            let mode = mode.map_or(String::new(), |mode| format!("; it takes {mode}"));
            (Way::MutualTls, format!("{with}{mode}"))
        }
        None => (
            Way::Refused,
            "the caller's proxy has no certificate yet".to_owned(),
        ),
    }
}

/// The whole in a sentence, and whether a connection would come about.
pub fn summary(caller: &Caller, destination: &Destination, verdicts: &[Verdict]) -> (bool, String) {
    if !destination.known {
        let how =
            "nothing of the mesh is there: no Service and no pod has this address or name and port";
        return match &caller.proxy {
            _ if destination
                .destination
                .starts_with(|c: char| c.is_alphabetic()) =>
            {
                (
                    false,
                    format!(
                        "{how}. A name is looked up in the caller's namespace when it has none of its own"
                    ),
                )
            }
            Some(_) => (
                true,
                format!("{how}. Connections pass through untouched, as the application makes them"),
            ),
            None => (true, format!("{how}, and the caller has no proxy")),
        };
    }
    let of = |way: Way| verdicts.iter().filter(|v| v.way == way).count();
    let (mtls, plain, refused) = (of(Way::MutualTls), of(Way::Plaintext), of(Way::Refused));
    let used = mtls + plain + refused;
    let total = verdicts.len();
    let endpoints = |n: usize| if n == 1 { "endpoint" } else { "endpoints" };
    match (mtls, plain, refused) {
        _ if total == 0 => (
            false,
            "it has no endpoint: 503 destination_unavailable".to_owned(),
        ),
        (0, 0, 0) => (
            false,
            format!(
                "none of its {total} {} may be used: 503 destination_unavailable",
                endpoints(total)
            ),
        ),
        (mtls, 0, 0) => (
            true,
            format!("mutual TLS to {mtls} of {total} {}", endpoints(total)),
        ),
        (0, plain, 0) => (
            true,
            format!("plaintext to {plain} of {total} {}", endpoints(total)),
        ),
        (0, 0, refused) => (
            false,
            format!("refused by {refused} of {total} {}", endpoints(total)),
        ),
        _ => {
            let mut parts = Vec::new();
            for (n, what) in [
                (mtls, "mutual TLS to"),
                (plain, "plaintext to"),
                (refused, "refused by"),
            ] {
                if n > 0 {
                    parts.push(format!("{what} {n}"));
                }
            }
            (
                refused < used,
                format!("{} of {total} {}", parts.join(", "), endpoints(total)),
            )
        }
    }
}

/// Whether a destination address is kept from the proxy by `weft.dev/exclude-outbound-ports` or
/// `weft.dev/exclude-outbound-cidrs`; the annotation, as it is written.
pub fn excluded<'a>(
    annotations: impl IntoIterator<Item = (&'a String, &'a String)>,
    address: std::net::SocketAddr,
) -> Option<String> {
    let in_ports = |list: &str| {
        list.split(',').any(|item| {
            let (low, high) = item
                .trim()
                .split_once('-')
                .unwrap_or((item.trim(), item.trim()));
            let range = low.parse::<u16>().ok().zip(high.parse::<u16>().ok());
            range.is_some_and(|(low, high)| (low..=high).contains(&address.port()))
        })
    };
    let in_cidrs = |list: &str| {
        list.split(',')
            .any(|item| in_cidr(item.trim(), address.ip()))
    };
    annotations.into_iter().find_map(|(name, value)| {
        let out = match name.as_str() {
            "weft.dev/exclude-outbound-ports" => in_ports(value),
            "weft.dev/include-outbound-ports" => !in_ports(value),
            "weft.dev/exclude-outbound-cidrs" => in_cidrs(value),
            "weft.dev/include-outbound-cidrs" => !in_cidrs(value),
            _ => false,
        };
        out.then(|| format!("{name}: {value}"))
    })
}

fn in_cidr(cidr: &str, ip: std::net::IpAddr) -> bool {
    use std::net::IpAddr;
    let (network, bits) = cidr.split_once('/').unwrap_or((cidr, "128"));
    let (Ok(network), Ok(bits)) = (network.parse::<IpAddr>(), bits.parse::<u32>()) else {
        return false;
    };
    let (a, b, width) = match (network, ip) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (u128::from(a.to_bits()), u128::from(b.to_bits()), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits(), b.to_bits(), 128),
        _ => return false,
    };
    let host = width - bits.min(width);
    host >= 128 || a >> host == b >> host
}

#[cfg(test)]
mod tests {
    use super::*;

    fn destination(endpoints: serde_json::Value) -> Destination {
        serde_json::from_value(serde_json::json!({
            "destination": "cart.shop:80", "known": true, "namespace": "shop", "service": "cart",
            "port": 80, "protocol": "http", "policies": ["TrafficPolicy shop/cart"],
            "routes": [{"name": "Service/shop/cart", "backends": [
                {"namespace": "shop", "service": "cart", "port": 80, "weight": 1, "endpoints": endpoints},
            ]}],
        }))
        .unwrap()
    }

    fn endpoint(identity: &str, health: &str, mode: &str) -> serde_json::Value {
        serde_json::json!({
            "address": "10.0.0.1:8080", "workload": "shop/cart-1", "identity": identity,
            "health": health, "inbound": {"mtls": mode, "policies": ["PeerAuthentication shop/p"]},
        })
    }

    const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

    fn meshed() -> Caller {
        Caller {
            workload: "shop/front-1".to_owned(),
            node: "node-1".to_owned(),
            proxy: Some(CallersProxy {
                identity: Some("spiffe://cluster.local/ns/shop/sa/front".to_owned()),
                states: None,
                connected: true,
            }),
            excluded: None,
        }
    }

    #[test]
    fn what_becomes_of_a_connection_and_why() {
        let bare = Caller {
            proxy: None,
            ..meshed()
        };
        let young = Caller {
            proxy: Some(CallersProxy::default()),
            ..meshed()
        };
        let apart = Caller {
            excluded: Some("weft.dev/exclude-outbound-ports: 80".to_owned()),
            ..meshed()
        };
        let burnt = Caller {
            proxy: Some(CallersProxy {
                states: Some(vec![("10.0.0.1:8080".to_owned(), "ejected".to_owned())]),
                ..meshed().proxy.unwrap()
            }),
            ..meshed()
        };
        for (caller, endpoint, way, why) in [
            (
                &meshed(),
                endpoint(CART, "Ready", "STRICT"),
                Way::MutualTls,
                "with spiffe://cluster.local/ns/shop/sa/cart; it takes STRICT",
            ),
            (
                &meshed(),
                endpoint("", "Ready", "PERMISSIVE"),
                Way::Plaintext,
                "the endpoint has no proxy",
            ),
            (
                &meshed(),
                endpoint("", "Ready", "DISABLE"),
                Way::Plaintext,
                "mutual TLS is switched off on this port (DISABLE)",
            ),
            (
                &meshed(),
                endpoint(CART, "NotReady", "STRICT"),
                Way::Unused,
                "the pod is not ready (its readiness probe)",
            ),
            (
                &bare,
                endpoint(CART, "Ready", "STRICT"),
                Way::Refused,
                "the caller has no proxy, and the endpoint takes mutual TLS only (STRICT)",
            ),
            (
                &bare,
                endpoint(CART, "Ready", "PERMISSIVE"),
                Way::Plaintext,
                "the caller has no proxy",
            ),
            (
                &apart,
                endpoint(CART, "Ready", "PERMISSIVE"),
                Way::Plaintext,
                "the caller keeps it from its proxy (weft.dev/exclude-outbound-ports: 80)",
            ),
            (
                &young,
                endpoint(CART, "Ready", "PERMISSIVE"),
                Way::Refused,
                "the caller's proxy has no certificate yet",
            ),
            (
                &burnt,
                endpoint(CART, "Ready", "STRICT"),
                Way::Unused,
                "the caller's proxy has ejected it after failures",
            ),
        ] {
            let destination = destination(serde_json::json!([endpoint]));
            let verdicts = verdicts(caller, &destination);
            assert_eq!((verdicts[0].way, verdicts[0].why.as_str()), (way, why));
        }
    }

    #[test]
    fn a_service_for_the_same_node() {
        let told = |node: &str| {
            let mut one = endpoint(CART, "Ready", "STRICT");
            one["inbound"]["node"] = node.into();
            let mut destination = destination(vec![one].into());
            destination.routes[0].backends[0].node_local = true;
            let verdicts = verdicts(&meshed(), &destination);
            let (works, sentence) = summary(&meshed(), &destination, &verdicts);
            (works, sentence, verdicts[0].why.clone())
        };
        assert!(told("node-1").0);
        let (works, sentence, why) = told("node-2");
        assert!(!works && sentence.contains("none of its 1 endpoint may be used"));
        assert!(
            why.contains("on node node-2, the caller on node-1"),
            "{why}"
        );
        assert!(told("").2.contains("nobody knows"));
    }

    #[test]
    fn the_whole_in_a_sentence() {
        let mut two = vec![endpoint(CART, "Ready", "STRICT"), endpoint("", "Ready", "")];
        two[1]["address"] = "10.0.0.2:8080".into();
        let told = |endpoints: serde_json::Value| {
            let destination = destination(endpoints);
            let verdicts = verdicts(&meshed(), &destination);
            summary(&meshed(), &destination, &verdicts)
        };
        assert_eq!(
            told(two.clone().into()),
            (
                true,
                "mutual TLS to 1, plaintext to 1 of 2 endpoints".to_owned()
            )
        );
        assert_eq!(
            told(vec![two[0].clone()].into()),
            (true, "mutual TLS to 1 of 1 endpoint".to_owned())
        );
        assert!(told(serde_json::json!([])).1.contains("no endpoint"));
        let nowhere: Destination = serde_json::from_value(
            serde_json::json!({"destination": "1.2.3.4:443", "known": false}),
        )
        .unwrap();
        assert!(summary(&meshed(), &nowhere, &[]).1.contains("pass through"));
    }

    #[test]
    fn what_the_caller_keeps_from_its_proxy() {
        let is = |name: &str, value: &str| {
            let annotations = [(format!("weft.dev/{name}"), value.to_owned())];
            let address = "10.96.0.20:8080".parse().unwrap();
            excluded(annotations.iter().map(|(n, v)| (n, v)), address).is_some()
        };
        assert!(is("exclude-outbound-ports", "9090, 8000-8100"));
        assert!(!is("exclude-outbound-ports", "80"));
        assert!(is("include-outbound-ports", "80"));
        assert!(is("exclude-outbound-cidrs", "10.96.0.0/16"));
        assert!(is("exclude-outbound-cidrs", "fd00::/8,10.96.0.20"));
        assert!(!is("exclude-outbound-cidrs", "10.97.0.0/16"));
        assert!(is("exclude-outbound-cidrs", "0.0.0.0/0"));
        assert!(!is("proxy-cpu-limit", "8080"));
    }
}
