//! Opaque connections: whoever speaks first, and every way to end.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, send};
use weft_tests::mesh::{Mesh, Sidecar, Workload};
use weft_tests::wire::{Server, Wire};

fn start(protocol: Option<&'static str>) -> (Mesh, std::net::SocketAddr) {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    mesh.workload(Workload::new("server").port(7000, protocol));
    let vip = mesh.service("server", 7000, protocol);
    mesh.start();
    (mesh, vip)
}

fn serve(mesh: &Mesh, script: impl Fn(Wire) + Send + Sync + 'static) -> Server {
    Server::start(mesh.host(1), 7000, script)
}

pub fn servers_that_speak_first_need_no_configuration() {
    let (mesh, vip) = start(None);
    let server = serve(&mesh, |mut wire| {
        wire.send("220 mail ready\r\n");
        wire.expect("HELO me\r\n");
        wire.send("250 hello\r\n");
        // It looks like HTTP and is not.
        wire.expect("GET / HTTP/1.1\r\n\r\n");
        wire.send("500 what?\r\n");
    });
    for _ in 0..2 {
        let start = Instant::now();
        let mut client = mesh.sidecar(0).connect(vip);
        client.expect("220 mail ready\r\n");
        assert!(
            start.elapsed() < Duration::from_secs(1),
            "{:?}",
            start.elapsed()
        );
        client.send("HELO me\r\n");
        client.expect("250 hello\r\n");
        client.send("GET / HTTP/1.1\r\n\r\n");
        client.expect("500 what?\r\n");
        client.expect_end();
    }
    server.wait_for(2);
}

pub fn a_few_bytes_are_passed_on_at_once() {
    let (mesh, vip) = start(None);
    let _server = serve(&mesh, |mut wire| {
        wire.expect("\x01");
        wire.send("\x02");
    });
    let mut client = mesh.sidecar(0).connect(vip);
    client.send("\x01");
    client.expect("\x02");
}

pub fn half_closes_are_kept_both_ways() {
    for protocol in [None, Some("tcp")] {
        let (mesh, vip) = start(protocol);
        let server = serve(&mesh, |mut wire| {
            if wire.read_exactly(1) == b"c" {
                assert_eq!(wire.read_to_end(), b"lient ends first");
                std::thread::sleep(Duration::from_millis(100));
                wire.send("answer after the end");
            } else {
                wire.send("server ends first");
                wire.finish();
                assert_eq!(wire.read_to_end(), b"still talking");
            }
        });
        let mut client = mesh.sidecar(0).connect(vip);
        client.send("client ends first");
        client.finish();
        assert_eq!(client.read_to_end(), b"answer after the end");

        let mut client = mesh.sidecar(0).connect(vip);
        client.send("s");
        assert_eq!(client.read_to_end(), b"server ends first");
        client.send("still talking");
        client.finish();
        server.wait_for(2);
    }
}

pub fn resets_arrive_as_resets() {
    let (mesh, vip) = start(Some("tcp"));
    let (seen, told) = std::sync::mpsc::channel();
    let seen = std::sync::Mutex::new(seen);
    let _server = serve(&mesh, move |mut wire| {
        if wire.read_exactly(1) == b"s" {
            wire.reset();
        } else {
            wire.send("x");
            wire.expect_reset();
            seen.lock().unwrap().send(()).unwrap();
        }
    });
    let mut client = mesh.sidecar(0).connect(vip);
    client.send("s");
    client.expect_reset();

    let mut client = mesh.sidecar(0).connect(vip);
    client.send("c");
    client.expect("x");
    client.reset();
    told.recv_timeout(weft_tests::PATIENCE)
        .expect("the server's connection was not reset");
}

pub fn data_before_a_reset_arrives() {
    let (mesh, vip) = start(Some("tcp"));
    let _server = serve(&mesh, |mut wire| {
        wire.read_exactly(1);
        wire.send("last words");
        // Left unread, the client's bytes turn the close into a reset.
        std::thread::sleep(Duration::from_millis(100));
        wire.reset();
    });
    let mut client = mesh.sidecar(0).connect(vip);
    client.send("x");
    client.expect("last words");
    client.expect_reset();
}

pub fn what_follows_an_urgent_byte_is_not_left_behind() {
    let (mesh, vip) = start(None);
    let speak = |wire: &mut Wire| {
        wire.send("abc");
        let socket = wire.stream().as_raw_fd();
        send(socket, b"U", MsgFlags::MSG_OOB).unwrap();
        wire.send("def");
    };
    let server = serve(&mesh, move |mut wire| {
        for _ in 0..10 {
            wire.expect("abcUdef");
            speak(&mut wire);
        }
        wire.expect_end();
    });
    let mut client = mesh.sidecar(0).connect(vip);
    for _ in 0..10 {
        speak(&mut client);
        client.expect("abcUdef");
    }
    client.finish();
    client.expect_end();
    server.wait_for(1);
}

pub fn many_bytes_arrive_whole() {
    const LENGTH: usize = 20 << 20;
    let bytes: Vec<u8> = (0..LENGTH as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let (mesh, vip) = start(None);
    let expected = bytes.clone();
    let _server = serve(&mesh, move |mut wire| {
        let got = wire.read_to_end();
        assert!(got == expected, "{} bytes of {}", got.len(), expected.len());
        wire.send(got);
    });
    let mut client = mesh.sidecar(0).connect(vip);
    client.send(&bytes);
    client.finish();
    let got = client.read_to_end();
    assert!(got == bytes, "{} bytes of {LENGTH}", got.len());
}

pub fn ipv6_is_captured_too() {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    mesh.workload(Workload::new("server").port(7000, None));
    if mesh.host(0).v6().is_none() {
        eprintln!("the kernel has no IPv6: nothing to test");
        return;
    }
    let vip = mesh.service_v6("server", 7000, Some("tcp"));
    mesh.start();
    let _server = serve(&mesh, |mut wire| {
        wire.expect("six?");
        wire.send("six.");
    });
    let direct = std::net::SocketAddr::new(mesh.host(1).v6().unwrap().into(), 7000);
    for to in [vip, direct] {
        let mut client = mesh.sidecar(0).connect(to);
        client.send("six?");
        client.expect("six.");
    }
    assert!(
        captured(mesh.sidecar(1)) >= 2.0,
        "it did not go through the proxy"
    );
}

/// Connections that an inbound proxy has taken over mutual TLS.
fn captured(server: &Sidecar) -> f64 {
    server.metric(
        "weft_tcp_connections_opened_total",
        &["direction=\"inbound\"", "mtls=\"true\""],
    )
}

pub fn what_is_not_in_the_mesh_passes_through() {
    let (mesh, _) = start(None);
    let outsider = mesh.outsider("outside");
    let _http = Server::answering(&outsider, 80, weft_tests::wire::ok("outside"));
    let _first = Server::start(&outsider, 25, |mut wire| {
        wire.send("220 outside\r\n");
    });
    let mut client = mesh
        .sidecar(0)
        .connect(std::net::SocketAddr::new(outsider.v4().into(), 80));
    client.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    client.expect(weft_tests::wire::ok("outside"));
    let mut client = mesh
        .sidecar(0)
        .connect(std::net::SocketAddr::new(outsider.v4().into(), 25));
    client.expect("220 outside\r\n");
}

pub fn a_refused_connection_is_not_left_hanging() {
    let (mesh, vip) = start(Some("tcp"));
    // Nobody listens on the server's port.
    let start = Instant::now();
    match Wire::try_connect(mesh.host(0), vip) {
        Err(_) => {}
        Ok(mut client) => {
            client.expect_reset();
        }
    }
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
}
