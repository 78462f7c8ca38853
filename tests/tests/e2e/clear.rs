//! Where one side has no proxy, and where both have one and nothing is declared (PERMISSIVE): what a
//! user gets who has only just begun.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustls::pki_types::ServerName;
use weft_tests::PATIENCE;
use weft_tests::eventually;
use weft_tests::mesh::{Mesh, Workload};
use weft_tests::netns::Host;
use weft_tests::wire::{Server, Wire, ok};

/// A client and a server with a proxy, and a client and a server without.
struct Places {
    mesh: Mesh,
    outside: Host,
    plain: Host,
}

/// Who calls whom.
#[derive(Debug, Clone, Copy)]
enum Place {
    BothHaveAProxy,
    /// The same, each connection with a TLS connection of its own.
    Unshared,
    OnlyTheServer,
    OnlyTheClient,
}

const PLACES: [Place; 4] = [
    Place::BothHaveAProxy,
    Place::Unshared,
    Place::OnlyTheServer,
    Place::OnlyTheClient,
];

impl Place {
    /// Of its server.
    fn port(self) -> u16 {
        7000 + self as u16
    }
}

impl Places {
    fn start(protocol: Option<&'static str>) -> Self {
        let mut mesh = Mesh::new();
        mesh.workload(Workload::new("client"));
        let server = PLACES
            .iter()
            .fold(Workload::new("server"), |server, place| {
                server.port(place.port(), protocol)
            });
        mesh.workload(server);
        mesh.workload(Workload::new("loner").proxy_flag("--own-connections"));
        let (outside, plain) = (mesh.outsider("outside"), mesh.outsider("plain"));
        let manifest = format!(
            "apiVersion: policy.weft.dev/v1alpha1
kind: Workload
metadata: {{name: plain, namespace: shop, labels: {{app: plain}}}}
spec: {{addresses: ['{}'], serviceAccount: plain, sidecar: false, ports: [{{port: {}}}]}}
",
            plain.v4(),
            Place::OnlyTheClient.port(),
        );
        mesh.manifest("plain", &manifest);
        mesh.start();
        Self {
            mesh,
            outside,
            plain,
        }
    }

    fn serve(&self, place: Place, script: impl Fn(Wire) + Send + Sync + 'static) -> Server {
        let host = match place {
            Place::OnlyTheClient => &self.plain,
            _ => self.mesh.host(1),
        };
        Server::start(host, place.port(), script)
    }

    fn connect(&self, place: Place) -> Wire {
        let meshed = self.mesh.sidecar(1).address(place.port());
        match place {
            Place::BothHaveAProxy => self.mesh.sidecar(0).connect(meshed),
            Place::Unshared => self.mesh.sidecar(2).connect(meshed),
            Place::OnlyTheServer => Wire::connect(&self.outside, meshed),
            Place::OnlyTheClient => {
                let plain = SocketAddr::new(self.plain.v4().into(), place.port());
                self.mesh.sidecar(0).connect(plain)
            }
        }
    }
}

/// Until a proxy that has heard nothing has opened the server's connection.
fn opened_in_silence(server: &Server) {
    eventually("the server has a connection", PATIENCE, || {
        server.accepted() > 0
    });
}

/// The first flight of an application's TLS.
fn client_hello() -> Vec<u8> {
    let mut config = rustls::ClientConfig::builder()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let name = ServerName::try_from("app.example").unwrap();
    let mut tls = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut hello = Vec::new();
    while tls.wants_write() {
        tls.write_tls(&mut hello).unwrap();
    }
    hello
}

pub fn tls_that_begins_late_has_one_connection() {
    let places = Places::start(None);
    let hello = client_hello();
    for place in PLACES {
        let expected = hello.clone();
        let server = places.serve(place, move |mut wire| {
            wire.expect(&expected);
            wire.send("a server's flight");
        });
        let mut client = places.connect(place);
        opened_in_silence(&server);
        client.send(&hello);
        client.expect("a server's flight");
        client.expect_end();
        assert_eq!(server.accepted(), 1, "{place:?}");
    }
}

pub fn a_request_that_comes_late_costs_an_orderly_connection() {
    let places = Places::start(None);
    for place in PLACES {
        let connections = AtomicUsize::new(0);
        let server = places.serve(place, move |mut wire| {
            if connections.fetch_add(1, Ordering::Relaxed) == 0 {
                // It was opened in case the server speaks first, and ends in order.
                wire.expect_end();
                return;
            }
            wire.read_head();
            wire.send(ok("answer"));
        });
        let mut client = places.connect(place);
        opened_in_silence(&server);
        client.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
        assert_eq!(client.read_answer().1, b"answer", "{place:?}");
        server.wait_for(2);
    }
}

pub fn what_is_declared_opaque_is_not_taken_for_http() {
    let places = Places::start(Some("tcp"));
    // As HTTP it would be refused.
    let odd = "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\nX: 1\r\n 2\r\n\r\n";
    for place in [Place::BothHaveAProxy, Place::Unshared, Place::OnlyTheServer] {
        let _server = places.serve(place, move |mut wire| {
            wire.expect(odd);
            wire.send("whatever");
            wire.expect_end();
        });
        let mut client = places.connect(place);
        client.send(odd);
        client.expect("whatever");
        client.finish();
        client.expect_end();
    }
}
