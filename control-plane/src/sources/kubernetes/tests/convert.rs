//! From the apiserver's JSON to the model.

use serde_json::{Value, json};
use weft_api::proto::{Health, Protocol};

use super::super::objects::{EndpointSlice, Node, Service};
use super::super::pod::Pod;
use super::super::policies::{PeerAuthentication, Telemetry, TrafficPolicy};
use super::super::watch::Watched;
use super::{convert, pod, service};
use crate::model::{self, Check, Object, Probe, TargetPort};

fn file(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn workload(pod: Value) -> model::Workload {
    match convert::<Pod>(pod) {
        Some(Object::Workload(workload)) => workload,
        other => panic!("{other:?}"),
    }
}

fn service_of(given: Value) -> model::Service {
    match convert::<Service>(given) {
        Some(Object::Service(service)) => service,
        other => panic!("{other:?}"),
    }
}

/// Objects as Kubernetes 1.34 serves them.
#[test]
fn real_objects() {
    let given = file(include_str!("../testdata/pod.json"));
    let pod = workload(given.clone());
    assert_eq!(pod.name.namespace, "source-a");
    assert_eq!(pod.name.name, given["metadata"]["name"].as_str().unwrap());
    assert_eq!(pod.uid, given["metadata"]["uid"].as_str().unwrap());
    assert_eq!(pod.service_account, "default");
    assert_eq!(pod.node, "node1");
    assert_eq!(pod.labels["app"], "echo");
    assert_eq!(pod.addresses.len(), 1);
    assert!(!pod.sidecar && !pod.host_network);
    assert_eq!(
        (pod.ports[0].name.as_str(), pod.ports[0].port),
        ("http", 8080)
    );
    assert_eq!(
        pod.probes,
        [
            Probe {
                port: 8080,
                check: Check::Http {
                    path: "/health".to_owned()
                }
            },
            Probe {
                port: 8080,
                check: Check::Tcp
            },
        ]
    );

    let on_host = workload(file(include_str!("../testdata/pod-host-network.json")));
    assert!(on_host.host_network && !on_host.sidecar);
    assert_eq!(
        on_host.addresses,
        ["10.99.0.1".parse::<std::net::IpAddr>().unwrap()]
    );
    // A pod that has failed keeps its address in its status, which may be another's by now.
    let failed = file(include_str!("../testdata/pod-failed.json"));
    assert!(failed["status"]["podIP"].is_string());
    assert_eq!(convert::<Pod>(failed), None);

    let echo = service_of(file(include_str!("../testdata/service.json")));
    assert_eq!(echo.selector["app"], "echo");
    assert_eq!(
        (echo.vips.len(), echo.headless, echo.sliced),
        (1, false, true)
    );
    assert_eq!(
        echo.ports,
        [model::ServicePort {
            name: "http".to_owned(),
            port: 80,
            target: TargetPort::Name("http".to_owned()),
            protocol: Protocol::Http,
            node_port: Some(30780),
        }],
        "the UDP port is left out"
    );

    let Some(Object::EndpointSlice(slice)) =
        convert::<EndpointSlice>(file(include_str!("../testdata/slice.json")))
    else {
        panic!("a slice");
    };
    assert_eq!(slice.service, "echo");
    assert_eq!((slice.ports.len(), slice.endpoints.len()), (1, 2));
    let target = slice.endpoints[0].workload.clone().unwrap();
    assert!(target.name.name.starts_with("echo-") && target.uid.len() == 36);

    let Some(Object::Node(node)) = convert::<Node>(file(include_str!("../testdata/node.json")))
    else {
        panic!("a node");
    };
    assert_eq!(
        (node.name.name.as_str(), node.zone.as_str()),
        ("node1", "zone-a")
    );
    assert_eq!(node.addresses.len(), 1, "a host name is no address");
}

#[test]
fn the_addresses_of_a_service() {
    let vips = |given: Value| -> Vec<String> {
        let service = service_of(given);
        service.vips.iter().map(ToString::to_string).collect()
    };
    let dual = json!({"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00::1"],
        "externalIPs": ["192.0.2.1"]});
    assert_eq!(
        vips(service("a", dual)),
        ["10.96.0.1", "fd00::1", "192.0.2.1"]
    );
    let mut balanced = service("a", json!({"clusterIP": "10.96.0.1"}));
    balanced["status"] = json!({"loadBalancer": {"ingress": [
        {"ip": "192.0.2.2", "ipMode": "VIP"},
        {"ip": "192.0.2.3", "ipMode": "Proxy"},
        {"hostname": "lb.example.org"},
        {"ip": "192.0.2.4"},
    ]}});
    assert_eq!(vips(balanced), ["10.96.0.1", "192.0.2.2", "192.0.2.4"]);
    let headless = service_of(service(
        "a",
        json!({"clusterIP": "None", "clusterIPs": ["None"]}),
    ));
    assert!(headless.headless && headless.vips.is_empty());
    let pending = service_of(service("a", json!({"clusterIP": ""})));
    assert!(!pending.headless && pending.vips.is_empty());
    let name = json!({"type": "ExternalName", "externalName": "example.org",
        "ports": [{"port": 80}]});
    assert_eq!(convert::<Service>(service("a", name)), None);
}

#[test]
fn the_ports_of_a_service() {
    let given = service_of(service(
        "a",
        json!({"ports": [
            {"port": 80},
            {"name": "grpc", "port": 81, "targetPort": 9000, "protocol": "TCP"},
            {"name": "x", "port": 82, "targetPort": "web", "appProtocol": "kubernetes.io/h2c"},
            {"name": "dns", "port": 53, "protocol": "UDP"},
            {"name": "sctp", "port": 54, "protocol": "SCTP"},
        ]}),
    ));
    let ports: Vec<_> = given
        .ports
        .into_iter()
        .map(|port| (port.port, port.target, port.protocol))
        .collect();
    assert_eq!(
        ports,
        [
            (80, TargetPort::Number(80), Protocol::Auto),
            (81, TargetPort::Number(9000), Protocol::Grpc),
            (82, TargetPort::Name("web".to_owned()), Protocol::Http2),
        ]
    );
}

/// As kube-proxy reads the conditions.
#[test]
fn the_conditions_of_an_endpoint() {
    for (conditions, health) in [
        (json!({}), Health::Ready),
        (json!({"ready": true}), Health::Ready),
        (json!({"ready": null, "serving": null}), Health::Ready),
        (json!({"ready": false}), Health::NotReady),
        (json!({"ready": false, "serving": true}), Health::NotReady),
        (
            json!({"ready": false, "serving": true, "terminating": true}),
            Health::Draining,
        ),
        (
            json!({"ready": false, "serving": false, "terminating": true}),
            Health::NotReady,
        ),
        // publishNotReadyAddresses.
        (
            json!({"ready": true, "serving": false, "terminating": true}),
            Health::Ready,
        ),
    ] {
        let endpoints = json!([{"addresses": ["10.0.0.1"], "conditions": conditions}]);
        let given = super::slice("a", "a", json!([{"port": 1}]), endpoints);
        let Some(Object::EndpointSlice(slice)) = convert::<EndpointSlice>(given) else {
            panic!("a slice");
        };
        assert_eq!(slice.endpoints[0].health, health, "{conditions}");
    }
}

#[test]
fn odd_slices() {
    let mut unnamed = super::slice("a", "a", json!([]), json!([]));
    unnamed["metadata"]["labels"] = json!({});
    assert_eq!(convert::<EndpointSlice>(unnamed), None);
    let mut names = super::slice(
        "a",
        "a",
        Value::Null,
        json!([{"addresses": ["example.org"]}]),
    );
    names["addressType"] = "FQDN".into();
    let Some(Object::EndpointSlice(slice)) = convert::<EndpointSlice>(names) else {
        panic!("a slice");
    };
    assert!(slice.ports.is_empty() && slice.endpoints.is_empty());
    let mut none = super::slice("a", "a", json!([{"port": null}]), Value::Null);
    none["endpoints"] = Value::Null;
    assert!(convert::<EndpointSlice>(none).is_some());
}

#[test]
fn who_a_pod_is() {
    let given = workload(pod("cart-1", "10.0.0.1"));
    assert!(given.sidecar);
    assert_eq!((given.service_account.as_str(), given.weight), ("cart", 1));
    assert_eq!(given.health, Health::Ready);

    let mut classic = pod("a", "10.0.0.1");
    classic["spec"]["initContainers"] = json!([{"name": "weft-init"}]);
    assert!(
        !workload(classic.clone()).sidecar,
        "capture alone is no sidecar"
    );
    classic["spec"]["containers"] = json!([{"name": "app"}, {"name": "weft-proxy"}]);
    assert!(workload(classic.clone()).sidecar);
    classic["spec"]["hostNetwork"] = true.into();
    assert!(
        !workload(classic).sidecar,
        "there, a proxy has nothing of its own"
    );

    let mut leaving = pod("a", "10.0.0.1");
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    assert_eq!(workload(leaving).health, Health::Draining);

    let mut dual = pod("a", "10.0.0.1");
    dual["status"]["podIPs"] = json!([{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]);
    assert_eq!(workload(dual).addresses.len(), 2);
    let mut pending = pod("a", "10.0.0.1");
    pending["status"] = json!({"phase": "Pending"});
    assert!(workload(pending).addresses.is_empty());
    for phase in ["Succeeded", "Failed"] {
        let mut over = pod("a", "10.0.0.1");
        over["status"]["phase"] = phase.into();
        assert_eq!(convert::<Pod>(over), None);
    }
    for (weight, expected) in [
        ("3", 3),
        ("0", 0),
        ("99999999", 10_000),
        ("x", 1),
        ("-1", 1),
    ] {
        let mut weighted = pod("a", "10.0.0.1");
        weighted["metadata"]["annotations"] = json!({"weft.dev/weight": weight});
        assert_eq!(workload(weighted).weight, expected);
    }
}

/// A proxy among the containers is told to end when all others have ended for good.
#[test]
fn an_application_that_has_ended() {
    let terminated = |code: i32| json!({"terminated": {"exitCode": code, "reason": "Error"}});
    let running = || json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}});
    let crashing = || json!({"waiting": {"reason": "CrashLoopBackOff"}});
    let of_pod = |policy: &str, proxy_in: &str, states: [Value; 2]| {
        let mut given = json!({"metadata": {"name": "job-1", "namespace": "shop"},
            "spec": {"restartPolicy": policy, "containers": [{"name": "app"}, {"name": "helper"}]},
            "status": {"phase": "Running", "containerStatuses": [
                {"name": "weft-proxy", "state": running()}]}});
        let spec = given["spec"].as_object_mut().unwrap();
        let containers = spec.entry(proxy_in).or_insert_with(|| json!([]));
        containers
            .as_array_mut()
            .unwrap()
            .insert(0, json!({"name": "weft-proxy"}));
        let statuses = &mut given["status"]["containerStatuses"];
        for (name, state) in ["app", "helper"].into_iter().zip(states) {
            let status = json!({"name": name, "state": state});
            statuses.as_array_mut().unwrap().push(status);
        }
        workload(given).ended
    };
    let both = [terminated(0), terminated(0)];
    let failed = [terminated(1), terminated(0)];
    for (policy, states, ended) in [
        ("Never", both.clone(), true),
        ("Never", failed.clone(), true),
        ("Never", [terminated(0), running()], false),
        ("OnFailure", both.clone(), true),
        ("OnFailure", failed, false),
        ("OnFailure", [terminated(0), crashing()], false),
        ("Always", both.clone(), false),
    ] {
        let said = of_pod(policy, "containers", states.clone());
        assert_eq!(said, ended, "{policy} {states:?}");
    }
    // The kubelet ends a native sidecar by itself.
    assert!(!of_pod("Never", "initContainers", both));
    // Nothing is known of the containers yet.
    let young = json!({"metadata": {"name": "job-1", "namespace": "shop"},
        "spec": {"restartPolicy": "Never", "containers": [{"name": "weft-proxy"}, {"name": "app"}]}});
    assert!(!workload(young).ended);
}

#[test]
fn the_probes_of_a_pod() {
    let probes = |containers: Value| {
        let mut given = pod("a", "10.0.0.1");
        given["spec"]["containers"] = containers;
        workload(given).probes
    };
    let http = |port, path: &str| Probe {
        port,
        check: Check::Http {
            path: path.to_owned(),
        },
    };
    let found = probes(json!([
        {"name": "a", "ports": [{"name": "web", "containerPort": 8080}],
         "livenessProbe": {"httpGet": {"path": "/live?x=1", "port": "web", "scheme": "HTTP"}},
         "readinessProbe": {"tcpSocket": {"port": 5432}},
         "startupProbe": {"grpc": {"port": 9000, "service": "shop"}},
         "lifecycle": {"preStop": {"httpGet": {"path": "stop", "port": "8081"}}}},
        // The same name is another port in another container.
        {"name": "b", "ports": [{"name": "web", "containerPort": 8090}],
         "livenessProbe": {"httpGet": {"port": "web"}},
         "readinessProbe": {"exec": {"command": ["true"]}}},
        {"name": "weft-proxy", "readinessProbe": {"httpGet": {"path": "/ready", "port": 15020}}},
    ]));
    let tcp = Probe {
        port: 5432,
        check: Check::Tcp,
    };
    let grpc = Probe {
        port: 9000,
        check: Check::Grpc,
    };
    assert_eq!(
        found,
        [
            tcp,
            http(8080, "/live?x=1"),
            http(8081, "/stop"),
            http(8090, "/"),
            grpc
        ]
    );
    // What is not asked of this pod, or leads nowhere.
    let none = probes(json!([{"name": "a",
        "readinessProbe": {"httpGet": {"path": "/", "port": 1, "host": "192.0.2.1"}},
        "startupProbe": {"httpGet": {"path": "/", "port": "unknown"}}}]));
    assert_eq!(none, []);
}

#[test]
fn metrics_offered_to_prometheus_are_let_in() {
    let probes = |annotations: Value| {
        let mut given = pod("a", "10.0.0.1");
        given["metadata"]["annotations"] = annotations;
        workload(given).probes
    };
    let get = |port, path: &str| {
        let path = path.to_owned();
        vec![Probe {
            port,
            check: Check::Http { path },
        }]
    };
    for (annotations, expected) in [
        (
            json!({"prometheus.io/scrape": "true", "prometheus.io/port": "9100"}),
            get(9100, "/metrics"),
        ),
        (
            json!({"prometheus.io/scrape": "true", "prometheus.io/port": "9100",
                "prometheus.io/path": "stats?all"}),
            get(9100, "/stats?all"),
        ),
        (
            json!({"prometheus.io/scrape": "false", "prometheus.io/port": "9100"}),
            vec![],
        ),
        (json!({"prometheus.io/port": "9100"}), vec![]),
        // The proxy's own port is not captured at all.
        (
            json!({"prometheus.io/scrape": "true", "prometheus.io/port": "15020"}),
            vec![],
        ),
        (
            json!({"prometheus.io/scrape": "true", "prometheus.io/port": "web"}),
            vec![],
        ),
    ] {
        assert_eq!(probes(annotations.clone()), expected, "{annotations}");
    }
}

#[test]
fn protocols_by_annotation() {
    let mut given = pod("a", "10.0.0.1");
    given["metadata"]["annotations"] = json!({"weft.dev/protocol": "8080=grpc, 9000=tcp,x,0=tcp"});
    given["spec"]["containers"] = json!([{"name": "a", "ports": [
        {"name": "web", "containerPort": 8080}, {"containerPort": 8081},
    ]}]);
    let ports: Vec<_> = workload(given)
        .ports
        .into_iter()
        .map(|port| (port.name, port.port, port.protocol))
        .collect();
    assert_eq!(
        ports,
        [
            ("web".to_owned(), 8080, Protocol::Grpc),
            (String::new(), 8081, Protocol::Auto),
            (String::new(), 9000, Protocol::Tcp),
        ]
    );
}

#[test]
fn policies_are_read_as_strictly_as_in_a_folder() {
    let policy = |spec: Value| {
        json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "TrafficPolicy",
            "metadata": {"name": "a", "namespace": "shop",
                "creationTimestamp": "2026-01-02T03:04:05Z"},
            "spec": spec, "status": {"anything": true}})
    };
    let Some(Object::TrafficPolicy(read)) =
        convert::<TrafficPolicy>(policy(json!({"timeouts": {"request": "1s"}})))
    else {
        panic!("a policy");
    };
    assert_eq!(read.created, "2026-01-02T03:04:05Z");
    assert_eq!(read.name.to_string(), "shop/a");
    for (spec, said) in [
        (json!({"timeout": {}}), "unknown field `timeout`"),
        (json!({"timeouts": {"request": 1}}), "spec:"),
        (
            json!({"retries": {"attempts": 11}}),
            "spec.retries.attempts: more than 10",
        ),
        (json!([]), "spec is not"),
    ] {
        let given: TrafficPolicy = serde_json::from_value(policy(spec.clone())).unwrap();
        let wrong = given.into_model().unwrap_err();
        assert!(wrong[0].message.contains(said), "{spec}: {wrong:?}");
        assert!(!wrong[0].help.is_empty());
    }
    let empty = json!({"metadata": {"name": "a", "namespace": "shop"}});
    assert!(convert::<PeerAuthentication>(empty.clone()).is_some());
    assert!(convert::<Telemetry>(empty).is_some());
}
