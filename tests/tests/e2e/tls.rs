//! Mutual TLS between the proxies, and TLS that is not the mesh's.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::{PrivatePkcs8KeyDer, ServerName};
use weft_tests::PATIENCE;
use weft_tests::eventually;
use weft_tests::mesh::{Mesh, Workload};
use weft_tests::sniff::{Sniffer, contains};
use weft_tests::wire::{Server, Wire, ok, status};

const SECRET: &str = "the-secret-that-nobody-may-read";

pub fn nothing_goes_over_the_wire_in_the_clear() {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    mesh.workload(Workload::new("server").port(8080, None).port(7000, None));
    let http = mesh.service("server", 8080, None);
    mesh.start();
    let outsider = mesh.outsider("outside");
    let _http = Server::answering(mesh.host(1), 8080, ok(SECRET));
    let _tcp = Server::start(mesh.host(1), 7000, |mut wire| {
        wire.send(SECRET);
        wire.expect(SECRET);
    });
    let request = format!("GET /{SECRET} HTTP/1.1\r\nHost: x\r\n\r\n");
    let ask = |wire: &mut Wire| {
        wire.send(&request);
        wire.expect(ok(SECRET));
    };

    let sniffer = Sniffer::start(mesh.host(1));
    ask(&mut mesh.sidecar(0).connect(http));
    ask(&mut mesh.sidecar(0).connect(mesh.sidecar(1).address(8080)));
    let mut tcp = mesh.sidecar(0).connect(mesh.sidecar(1).address(7000));
    tcp.expect(SECRET);
    tcp.send(SECRET);
    tcp.expect_end();
    let frames = sniffer.finish();
    assert!(frames.len() > 3 * SECRET.len(), "the sniffer saw nothing");
    assert!(!contains(&frames, SECRET), "the secret went over the wire");

    // The sniffer would have seen it: from outside the mesh it does.
    let sniffer = Sniffer::start(mesh.host(1));
    ask(&mut Wire::connect(&outsider, mesh.sidecar(1).address(8080)));
    assert!(contains(&sniffer.finish(), SECRET));
}

pub fn what_goes_to_one_endpoint_shares_a_handshake() {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    mesh.workload(Workload::new("loner").proxy_flag("--own-connections"));
    let server = Workload::new("server").port(8080, None).port(7000, None);
    mesh.workload(server);
    mesh.start();
    let _http = Server::answering(mesh.host(2), 8080, ok("answer"));
    let _tcp = Server::start(mesh.host(2), 7000, |mut wire| {
        wire.send("hello");
        wire.expect("there");
        wire.send("bye");
    });
    let (http, tcp) = (mesh.sidecar(2).address(8080), mesh.sidecar(2).address(7000));
    for (i, handshakes) in [(0, 2.0), (1, 16.0)] {
        // All are open at once: none takes the place of another.
        let asked: Vec<_> = (0..8)
            .map(|_| {
                let mut wire = mesh.sidecar(i).connect(http);
                wire.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
                wire.expect(ok("answer"));
                wire
            })
            .collect();
        let mut greeted: Vec<_> = (0..8)
            .map(|_| {
                let mut wire = mesh.sidecar(i).connect(tcp);
                wire.expect("hello");
                wire
            })
            .collect();
        for wire in &mut greeted {
            wire.send("there");
            wire.expect("bye");
            wire.expect_end();
        }
        drop(asked);
        let labels = ["direction=\"outbound\"", "result=\"ok\""];
        let sidecar = mesh.sidecar(i);
        let counted = sidecar.metric("weft_tls_handshakes_total", &labels);
        assert_eq!(counted, handshakes, "two addresses, sixteen connections");
    }
}

pub fn the_applications_own_tls_passes_untouched() {
    let certified = rcgen::generate_simple_self_signed(vec!["app.example".to_owned()]).unwrap();
    let certificate = certified.cert.der().clone();
    let key = PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
    let mut config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key.into())
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let config = Arc::new(config);
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate).unwrap();
    let mut client_config = rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client_config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let client_config = Arc::new(client_config);

    for protocol in [None, Some("tls")] {
        let mut mesh = Mesh::new();
        mesh.workload(Workload::new("client"));
        mesh.workload(Workload::new("server").port(8443, protocol));
        let vip = mesh.service("server", 8443, protocol);
        mesh.start();
        let config = Arc::clone(&config);
        let _server = Server::start(mesh.host(1), 8443, move |wire| {
            let mut tls = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut stream = wire.stream();
            let mut stream = rustls::Stream::new(&mut tls, &mut stream);
            let mut buffer = [0; 5];
            stream.read_exact(&mut buffer).unwrap();
            let name = stream.conn.server_name().map(str::to_owned);
            let alpn = stream.conn.alpn_protocol().map(<[u8]>::to_vec);
            write!(
                stream,
                "{name:?} {}",
                String::from_utf8_lossy(&alpn.unwrap())
            )
            .unwrap();
            stream.conn.send_close_notify();
            stream.flush().unwrap();
        });
        let wire = mesh.sidecar(0).connect(vip);
        let name = ServerName::try_from("app.example").unwrap();
        let mut tls = rustls::ClientConnection::new(Arc::clone(&client_config), name).unwrap();
        let mut stream = wire.stream();
        let mut stream = rustls::Stream::new(&mut tls, &mut stream);
        stream.write_all(b"hello").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "Some(\"app.example\") http/1.1");
    }
}

pub fn strict_refuses_plaintext() {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    mesh.workload(Workload::new("server").port(8080, None));
    let vip = mesh.service("server", 8080, None);
    mesh.mtls("STRICT");
    mesh.start();
    let outsider = mesh.outsider("outside");
    let server = Server::answering(mesh.host(1), 8080, ok("x"));

    let mut plain = Wire::connect(&outsider, mesh.sidecar(1).address(8080));
    plain.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    let mut answer = Vec::new();
    // Closed or reset, with an explanation or without; never the server's answer.
    let _ = plain.stream().read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer);
    assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(server.accepted(), 0, "it reached the server");
    let refused = mesh.sidecar(1);
    eventually("the log names the refused client", PATIENCE, || {
        refused.log().contains(&outsider.v4().to_string())
    });

    // The mesh's own clients go on.
    let mut client = mesh.sidecar(0).connect(vip);
    client.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!(client.read_answer().1, b"x");
}

pub fn permissive_takes_plaintext() {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("server").port(8080, None));
    mesh.mtls("PERMISSIVE");
    mesh.start();
    let outsider = mesh.outsider("outside");
    let _server = Server::answering(mesh.host(0), 8080, ok("x"));
    let ask = || {
        let mut plain = Wire::try_connect(&outsider, mesh.sidecar(0).address(8080)).ok()?;
        plain
            .try_send(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .ok()?;
        let mut answer = String::new();
        plain.stream().read_to_string(&mut answer).ok()?;
        Some(status(&answer))
    };
    assert_eq!(ask(), Some(200));
    // Turned on and off while it runs.
    mesh.mtls("STRICT");
    eventually("plaintext is refused", Duration::from_secs(5), || {
        ask() != Some(200)
    });
    mesh.mtls("PERMISSIVE");
    eventually("plaintext is taken", Duration::from_secs(5), || {
        ask() == Some(200)
    });
}
