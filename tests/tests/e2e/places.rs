//! Who is near: Services for clients on the same node, and those that prefer what is near.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use weft_tests::mesh::{Mesh, Workload};
use weft_tests::wire::{Server, Wire, header, ok, serve_http, status};
use weft_tests::{PATIENCE, eventually};

/// Where a workload is: its node, in a zone.
fn at(zone: &str, node: &str) -> String {
    format!("  zone: {zone}\n  node: {node}\n")
}

/// A client at the first place, servers at the others, and a Service of them with this in its
/// `spec`. A server answers with its number.
fn start(places: &[(&str, &str)], spec: &str) -> (Mesh, SocketAddr, Vec<Server>) {
    let mut mesh = Mesh::new();
    for (i, (zone, node)) in places.iter().enumerate() {
        let workload = match i {
            0 => Workload::new("client"),
            _ => Workload::new(&format!("server-{i}")).port(8080, Some("http")),
        };
        mesh.workload(workload.extra(&at(zone, node)));
    }
    let vip = mesh.service("server", 8080, Some("http"));
    service(&mesh, vip, spec);
    mesh.start();
    let servers = (1..places.len())
        .map(|i| {
            Server::start(mesh.host(i), 8080, move |wire| {
                serve_http(wire, move |_| ok(&i.to_string()));
            })
        })
        .collect();
    (mesh, vip, servers)
}

fn service(mesh: &Mesh, vip: SocketAddr, spec: &str) {
    mesh.manifest(
        "service-server",
        &format!(
            "apiVersion: v1
kind: Service
metadata: {{name: server, namespace: shop}}
spec:
  clusterIP: {}
  selector: {{app: server}}
  ports: [{{port: {}, targetPort: 8080, appProtocol: http}}]
  {spec}
",
            vip.ip(),
            vip.port()
        ),
    );
}

fn ask(wire: &mut Wire) -> (String, String) {
    wire.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, body) = wire.read_answer();
    (head, String::from_utf8(body).unwrap())
}

/// Who answers twenty requests; "503" when nobody does.
fn answering(mesh: &Mesh, vip: SocketAddr) -> BTreeSet<String> {
    let mut wire = mesh.sidecar(0).connect(vip);
    (0..20)
        .map(|_| match ask(&mut wire) {
            (head, body) if status(&head) == 200 => body,
            (head, _) => status(&head).to_string(),
        })
        .collect()
}

fn only<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.map(str::to_owned).into()
}

pub fn a_local_service_is_for_clients_on_the_same_node() {
    let places = [("a", "n"), ("a", "n"), ("a", "m")];
    let (mesh, vip, _servers) = start(&places, "internalTrafficPolicy: Local");
    assert_eq!(answering(&mesh, vip), only(["1"]));
    let (_, config) = mesh.sidecar(0).get_inside("/config").unwrap();
    let elsewhere = mesh.host(2).v4().to_string();
    assert!(!config.contains(&elsewhere), "it is not even told of them");

    // One on another connection that stays open: a change takes effect there, too.
    let mut open = mesh.sidecar(0).connect(vip);
    assert_eq!(ask(&mut open).1, "1");
    mesh.change_workload(1, &at("a", "m"));
    eventually("nobody is left on this node", PATIENCE, || {
        status(&ask(&mut open).0) == 503
    });
    let (head, body) = ask(&mut open);
    assert_eq!(status(&head), 503);
    assert!(
        body.contains("no endpoint on this node") && body.contains("internalTrafficPolicy: Local"),
        "{body}"
    );
    assert!(header(&head, "proxy-status").is_some(), "{head}");
    // The client's pod is another one now, on the other node.
    mesh.change_workload(0, &at("a", "m"));
    eventually("both are there", PATIENCE, || {
        answering(&mesh, vip) == only(["1", "2"])
    });
    service(&mesh, vip, "internalTrafficPolicy: Cluster");
    mesh.change_workload(0, &at("a", "nowhere"));
    eventually("everybody is there for everybody", PATIENCE, || {
        answering(&mesh, vip) == only(["1", "2"])
    });
}

/// What is no HTTP is refused, where kube-proxy drops it: a client need not wait.
pub fn a_local_service_without_an_endpoint_here_refuses_connections() {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client").extra(&at("a", "n")));
    mesh.workload(
        Workload::new("server")
            .port(8080, Some("tcp"))
            .extra(&at("a", "m")),
    );
    let vip = mesh.service("server", 8080, Some("tcp"));
    mesh.manifest(
        "service-server",
        &format!(
            "apiVersion: v1
kind: Service
metadata: {{name: server, namespace: shop}}
spec:
  clusterIP: {}
  selector: {{app: server}}
  internalTrafficPolicy: Local
  ports: [{{port: 80, targetPort: 8080, appProtocol: tcp}}]
",
            vip.ip()
        ),
    );
    mesh.start();
    // Speaks first, and ends.
    let server = Server::start(mesh.host(1), 8080, |mut wire| wire.send("hello"));
    // The reset may come before the client knows that it is connected.
    if let Ok(mut wire) = Wire::try_connect(mesh.host(0), vip) {
        assert_eq!(wire.expect_reset(), b"");
    }
    assert_eq!(server.accepted(), 0);
    eventually("the log says why", PATIENCE, || {
        mesh.sidecar(0).log().contains("no endpoint on this node")
    });
    mesh.change_workload(1, &at("a", "n"));
    eventually("it has come", PATIENCE, || {
        let _ = Wire::try_connect(mesh.host(0), vip);
        server.accepted() > 0
    });
    assert_eq!(mesh.sidecar(0).connect(vip).read_to_end(), b"hello");
}

/// `trafficDistribution`: what is near is preferred, node before zone, and the others are there
/// when nobody near is.
pub fn what_is_near_is_preferred() {
    let places = [("a", "n"), ("a", "n"), ("a", "m"), ("b", "o")];
    let (mesh, vip, _servers) = start(&places, "trafficDistribution: PreferSameNode");
    assert_eq!(answering(&mesh, vip), only(["1"]));
    service(&mesh, vip, "trafficDistribution: PreferClose");
    eventually("the zone is used", PATIENCE, || {
        answering(&mesh, vip) == only(["1", "2"])
    });
    // Those in the zone take no new requests: the other one is there.
    let leaving = "  health: NotReady\n";
    for i in [1, 2] {
        mesh.change_workload(i, &(at("a", "n") + leaving));
    }
    eventually("the other zone helps", PATIENCE, || {
        answering(&mesh, vip) == only(["3"])
    });
    for i in [1, 2] {
        mesh.change_workload(i, &at("a", "n"));
    }
    eventually("they are back", PATIENCE, || {
        answering(&mesh, vip) == only(["1", "2"])
    });
    service(&mesh, vip, "");
    eventually("all are alike", PATIENCE, || {
        answering(&mesh, vip) == only(["1", "2", "3"])
    });
    // An endpoint of which nobody knows where it is: all are used.
    service(&mesh, vip, "trafficDistribution: PreferSameZone");
    eventually("the zone is used", PATIENCE, || {
        answering(&mesh, vip) == only(["1", "2"])
    });
    mesh.change_workload(3, "");
    eventually("all are alike", PATIENCE, || {
        answering(&mesh, vip) == only(["1", "2", "3"])
    });
}
