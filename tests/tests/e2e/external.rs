//! Services outside the mesh.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use weft_tests::authority::Authority;
use weft_tests::dns::Dns;
use weft_tests::mesh::{Mesh, NAMESPACE, Workload};
use weft_tests::netns::Host;
use weft_tests::wire::{Server, Wire, header, ok, status};
use weft_tests::{PATIENCE, eventually};

/// A server's configuration, with a certificate for a name.
fn configuration(authority: &Authority, name: &str, alpn: &[&str]) -> Arc<rustls::ServerConfig> {
    let (chain, key) = authority.issue(&[name]).pair();
    let mut config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    Arc::new(config)
}

/// An HTTPS server that answers each request with the name and the protocol that the handshake
/// was for; a path is answered as `answer` says. What is no TLS is noted.
struct Https {
    _server: Server,
    requests: Arc<AtomicUsize>,
    in_the_clear: Arc<Mutex<Vec<String>>>,
}

impl Https {
    fn start(host: &Host, port: u16, config: Arc<rustls::ServerConfig>) -> Self {
        let requests = Arc::new(AtomicUsize::new(0));
        let in_the_clear = Arc::new(Mutex::new(Vec::new()));
        let (counter, clear) = (requests.clone(), in_the_clear.clone());
        let server = Server::start(host, port, move |wire| {
            let mut tls = rustls::ServerConnection::new(config.clone()).unwrap();
            let mut tcp = wire.stream();
            let mut stream = rustls::Stream::new(&mut tls, &mut tcp);
            loop {
                let mut head = Vec::new();
                let mut byte = [0];
                while !head.ends_with(b"\r\n\r\n") {
                    match stream.read(&mut byte) {
                        Ok(1) => head.push(byte[0]),
                        // An alert is the client's way to refuse a certificate.
                        Err(error)
                            if error.kind() == std::io::ErrorKind::InvalidData
                                && !error.to_string().contains("alert") =>
                        {
                            clear.lock().unwrap().push(error.to_string());
                            return;
                        }
                        Ok(_) | Err(_) => return,
                    }
                }
                counter.fetch_add(1, Ordering::SeqCst);
                let head = String::from_utf8_lossy(&head).into_owned();
                if head.starts_with("GET /slow ") {
                    std::thread::sleep(Duration::from_secs(2));
                }
                let body = format!(
                    "{} {} {}",
                    stream.conn.server_name().unwrap_or("-"),
                    String::from_utf8_lossy(stream.conn.alpn_protocol().unwrap_or(b"-")),
                    header(&head, "host").unwrap_or("-"),
                );
                if stream.write_all(&ok(&body)).is_err() {
                    return;
                }
            }
        });
        Self {
            _server: server,
            requests,
            in_the_clear,
        }
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

fn external(mesh: &Mesh, name: &str, spec: &str) {
    mesh.manifest(
        &format!("external-{name}"),
        &format!(
            "apiVersion: policy.weft.dev/v1alpha1
kind: ExternalService
metadata: {{name: {name}, namespace: {NAMESPACE}}}
spec:
{spec}
"
        ),
    );
}

fn get(wire: &mut Wire, path: &str, host: &str) -> (String, String) {
    wire.send(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"));
    let (head, body) = wire.read_answer();
    (head, String::from_utf8(body).unwrap())
}

/// One request on a connection of its own, which the client ends.
fn ask(mesh: &Mesh, to: SocketAddr, host: &str) -> (u16, String) {
    let mut wire = mesh.sidecar(0).connect(to);
    let (head, body) = get(&mut wire, "/", host);
    (status(&head), body)
}

pub fn plaintext_becomes_tls_with_a_server_that_proves_its_name() {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    let outside = mesh.outsider("outside");
    let (vip, server) = (mesh.spare_address(), outside.v4());
    let authority = Authority::new();
    external(
        &mesh,
        "api",
        &format!(
            "  hosts: [api.example.org]
  addresses: [{vip}]
  resolution: Static
  endpoints: [{{address: {server}}}]
  ports:
  - port: 80
    targetPort: 8443
    appProtocol: http
    tls:
      caCertificates: {ca}
  - port: 81
    targetPort: 8443
    name: http-wrong
    tls:
      sni: wrong.example.org
      caCertificates: {ca}
  - port: 82
    targetPort: 8443
    name: http-untrusted
    tls: {{}}
  - port: 83
    targetPort: 8443
    name: tcp
    tls:
      caCertificates: {ca}",
            ca = authority.yaml(6)
        ),
    );
    mesh.manifest(
        "policy",
        &format!(
            "apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {{name: api, namespace: {NAMESPACE}}}
spec:
  targetRefs: [{{group: policy.weft.dev, kind: ExternalService, name: api}}]
  timeouts: {{request: 500ms}}
"
        ),
    );
    mesh.start();
    let https = Https::start(
        &outside,
        8443,
        configuration(&authority, "api.example.org", &["h2", "http/1.1"]),
    );
    let at = |port| SocketAddr::new(vip.into(), port);

    let mut wire = mesh.sidecar(0).connect(at(80));
    let (head, body) = get(&mut wire, "/", "api.example.org");
    assert_eq!(status(&head), 200, "{head}");
    assert_eq!(body, "api.example.org http/1.1 api.example.org");
    // The policy holds, as for a Service.
    let began = Instant::now();
    let (head, _) = get(&mut wire, "/slow", "api.example.org");
    assert_eq!(status(&head), 504, "{head}");
    assert!(began.elapsed() < Duration::from_secs(2));
    assert_eq!(https.requests(), 2);

    // A certificate for another name, or by somebody who is not trusted, is none.
    for port in [81, 82] {
        let mut wire = mesh.sidecar(0).connect(at(port));
        let (head, body) = get(&mut wire, "/", "api.example.org");
        assert_eq!(status(&head), 502, "{head}");
        let reason = header(&head, "proxy-status").unwrap();
        assert!(reason.contains("tls_protocol_error"), "{reason}");
        assert!(body.contains("ExternalService/shop/api"), "{body}");
    }
    assert_eq!(https.requests(), 2);

    // What is not HTTP is wrapped too.
    let mut wire = mesh.sidecar(0).connect(at(83));
    let (_, body) = get(&mut wire, "/", "any");
    assert_eq!(body, "api.example.org - any");
    assert_eq!(*https.in_the_clear.lock().unwrap(), Vec::<String>::new());
    let requests = [
        "destination_service=\"api\"",
        "destination_namespace=\"shop\"",
    ];
    assert!(mesh.sidecar(0).metric("weft_requests_total", &requests) >= 2.0);
}

pub fn endpoints_follow_dns_and_outlive_it() {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    let hosts = [mesh.outsider("one"), mesh.outsider("two")];
    let dns_host = mesh.outsider("dns");
    let vip = mesh.spare_address();
    let dns = Dns::start(&dns_host);
    mesh.dns(dns.address());
    let ip = |n: usize| -> IpAddr { hosts[n].v4().into() };
    let name = "api.example.org";
    dns.set(name, &[ip(0)], 1);
    external(
        &mesh,
        "api",
        &format!(
            "  hosts: [{name}]
  addresses: [{vip}]
  ports: [{{port: 80, targetPort: 8080, appProtocol: http}}]"
        ),
    );
    mesh.start();
    let _one = Server::answering(&hosts[0], 8080, ok("one"));
    let _two = Server::answering(&hosts[1], 8080, ok("two"));
    let to = SocketAddr::new(vip.into(), 80);

    assert_eq!(dns.asked(), 0, "nobody has asked for it yet");
    assert_eq!(ask(&mesh, to, name), (200, "one".to_owned()));

    // An open connection follows, too.
    let mut wire = mesh.sidecar(0).connect(to);
    assert_eq!(get(&mut wire, "/", name).1, "one");
    dns.set(name, &[ip(1)], 1);
    eventually("requests go to the new address", PATIENCE, || {
        get(&mut wire, "/", name).1 == "two"
    });

    // Nobody answers: what was said last stays, long after its time.
    dns.silence(true);
    let before = dns.asked();
    eventually("the proxy asks in vain", PATIENCE, || {
        dns.asked() > before + 2
    });
    assert_eq!(ask(&mesh, to, name), (200, "two".to_owned()));

    // And the name may go for good.
    dns.silence(false);
    dns.set(name, &[], 1);
    eventually(
        "the answer says that DNS knows no address",
        PATIENCE * 2,
        || {
            let (code, body) = ask(&mesh, to, name);
            code == 503 && body.contains("DNS has no address for api.example.org")
        },
    );
}

/// Nobody is at the IPv6 address of the name, not even to refuse.
pub fn a_dead_address_family_costs_little_and_no_request() {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    let outside = mesh.outsider("outside");
    let dns_host = mesh.outsider("dns");
    let vip = mesh.spare_address();
    let dns = Dns::start(&dns_host);
    mesh.dns(dns.address());
    let mut dead = outside.v6().expect("the fabric has IPv6").segments();
    dead[7] = 0xdead;
    let name = "both.example.org";
    dns.set(name, &[outside.v4().into(), IpAddr::from(dead)], 60);
    external(
        &mesh,
        "api",
        &format!(
            "  hosts: [{name}]
  addresses: [{vip}]
  ports: [{{port: 80, targetPort: 8080, appProtocol: http}}]"
        ),
    );
    mesh.start();
    let _server = Server::answering(&outside, 8080, ok("here"));
    let to = SocketAddr::new(vip.into(), 80);
    for n in 0..8 {
        let began = Instant::now();
        assert_eq!(ask(&mesh, to, name), (200, "here".to_owned()));
        let took = began.elapsed();
        // A connect alone would take five seconds to give up.
        assert!(took < Duration::from_secs(2), "request {n}: {took:?}");
    }
}

/// What answers at an address, whatever is asked: its name.
fn named(host: &Host, port: u16) -> Server {
    Server::answering(host, port, ok(host.name()))
}

fn egress(mesh: &Mesh, mode: &str) {
    mesh.manifest(
        "egress",
        &format!(
            "apiVersion: policy.weft.dev/v1alpha1
kind: EgressPolicy
metadata: {{name: default, namespace: {NAMESPACE}}}
spec: {{mode: {mode}}}
"
        ),
    );
}

/// The attack: an application connects where it means to, and somebody else chooses its Host.
pub fn the_original_destination_rules_whatever_the_host_says() {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    let (api, other) = (mesh.outsider("api"), mesh.outsider("other"));
    let dns_host = mesh.outsider("dns");
    let dns = Dns::start(&dns_host);
    mesh.dns(dns.address());
    dns.set("api.example.org", &[api.v4().into()], 60);
    let authority = Authority::new();
    external(
        &mesh,
        "api",
        &format!(
            "  hosts: [api.example.org]
  ports:
  - port: 80
    targetPort: 8443
    appProtocol: http
    tls:
      caCertificates: {}
  - {{port: 81, appProtocol: http}}",
            authority.yaml(6)
        ),
    );
    mesh.start();
    let config = configuration(&authority, "api.example.org", &["http/1.1"]);
    let https = Https::start(&api, 8443, config);
    let _api = named(&api, 81);
    let _other = named(&other, 81);
    let _clear = named(&other, 80);
    let at = |host: &Host, port| SocketAddr::new(host.v4().into(), port);

    // Found by the address that its name has, without any address written down.
    let answer = ask(&mesh, at(&api, 80), "api.example.org");
    assert_eq!(
        answer,
        (200, "api.example.org http/1.1 api.example.org".to_owned())
    );
    assert_eq!(ask(&mesh, at(&api, 81), "api.example.org").1, "api");

    // The Host of another address leads nowhere else: the connection goes where it was made to.
    assert_eq!(ask(&mesh, at(&other, 80), "api.example.org").1, "other");
    assert_eq!(ask(&mesh, at(&other, 81), "api.example.org").1, "other");
    assert_eq!(https.requests(), 1);
    // And neither does any Host on a connection to the host's own address.
    for host in [
        "other.example.org",
        "10.0.0.1",
        "localhost",
        "control-plane.weft-system",
    ] {
        let (code, body) = ask(&mesh, at(&api, 80), host);
        assert_eq!(
            (code, body),
            (200, format!("api.example.org http/1.1 {host}"))
        );
        assert_eq!(ask(&mesh, at(&api, 81), host).1, "api");
    }
    // Nor one in the request's target.
    let mut wire = mesh.sidecar(0).connect(at(&other, 81));
    let (_, body) = get(&mut wire, "http://api.example.org/", "api.example.org");
    assert_eq!(body, "other");
}

pub fn hosts_on_one_address_are_told_apart_request_by_request() {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    let (shared, second) = (mesh.outsider("shared"), mesh.outsider("second"));
    let dns_host = mesh.outsider("dns");
    let dns = Dns::start(&dns_host);
    mesh.dns(dns.address());
    let authority = Authority::new();
    for name in ["a", "b"] {
        let host = format!("{name}.example.org");
        dns.set(&host, &[shared.v4().into()], 60);
        external(
            &mesh,
            name,
            &format!(
                "  hosts: [{host}]
  ports:
  - port: 80
    targetPort: 8443
    appProtocol: http
    tls: {{sni: one.example.org, caCertificates: {ca}}}",
                ca = format_args!("\"{}\"", authority.pem().replace('\n', "\\n")),
            )
            .replace("one.example.org", &host),
        );
    }
    mesh.start();
    // It answers with the SNI; its certificate is for both.
    let (chain, key) = authority.issue(&["a.example.org", "b.example.org"]).pair();
    let config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let _https = Https::start(&shared, 8443, Arc::new(config));
    let _second = named(&second, 80);
    let mut wire = mesh
        .sidecar(0)
        .connect(SocketAddr::new(shared.v4().into(), 80));
    for host in ["a.example.org", "b.example.org", "A.example.org:80"] {
        let (_, body) = get(&mut wire, "/", host);
        let name = host.to_ascii_lowercase();
        let name = name.trim_end_matches(":80");
        assert_eq!(body, format!("{name} - {host}"));
    }
}

/// A TLS client that says a name; what it is answered, if anything.
fn tls_ask(mesh: &Mesh, to: SocketAddr, name: &str, authority: &Authority) -> Option<String> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority.der()).unwrap();
    let config = rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = name.to_owned().try_into().unwrap();
    let mut tls = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let wire = mesh.sidecar(0).connect(to);
    let mut tcp = wire.stream();
    let mut stream = rustls::Stream::new(&mut tls, &mut tcp);
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        .ok()?;
    let mut answer = Vec::new();
    let mut byte = [0];
    while !answer.ends_with(b" x") {
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        answer.push(byte[0]);
    }
    let answer = String::from_utf8(answer).unwrap();
    Some(answer.rsplit("\r\n").next()?.to_owned())
}

pub fn only_what_is_known_may_be_called() {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    mesh.workload(Workload::new("server").port(8080, None));
    let vip = mesh.service("server", 8080, None);
    let (api, other) = (mesh.outsider("api"), mesh.outsider("other"));
    let dns_host = mesh.outsider("dns");
    let dns = Dns::start(&dns_host);
    mesh.dns(dns.address());
    dns.set("a.example.org", &[api.v4().into()], 60);
    external(
        &mesh,
        "wild",
        "  hosts: ['*.example.org']
  resolution: Passthrough
  ports: [{port: 443, appProtocol: tls}]",
    );
    external(
        &mesh,
        "net",
        &format!(
            "  addresses: ['{}/32']
  resolution: Passthrough
  ports: [{{port: 7000, appProtocol: tcp}}]",
            api.v4()
        ),
    );
    egress(&mesh, "RegistryOnly");
    mesh.start();
    let authority = Authority::new();
    let tls_server =
        |host: &Host| Https::start(host, 443, configuration(&authority, "a.example.org", &[]));
    let (_api_tls, other_tls) = (tls_server(&api), tls_server(&other));
    let _servers = [
        named(&api, 80),
        named(&other, 80),
        Server::answering(mesh.host(1), 8080, ok("server")),
    ];
    let greeting = |host: &Host| {
        Server::start(host, 7000, |mut wire| {
            wire.send("220 hello\r\n");
            let _ = wire.stream().read(&mut [0]);
        })
    };
    let _greeters = [greeting(&api), greeting(&other)];
    let at = |host: &Host, port| SocketAddr::new(host.v4().into(), port);

    // The mesh, and what is declared.
    assert_eq!(ask(&mesh, vip, "x").1, "server");
    assert_eq!(ask(&mesh, mesh.sidecar(1).address(8080), "x").1, "server");
    mesh.sidecar(0)
        .connect(at(&api, 7000))
        .expect("220 hello\r\n");
    let answer = tls_ask(&mesh, at(&api, 443), "a.example.org", &authority);
    assert_eq!(answer.as_deref(), Some("a.example.org - x"));

    // What is not known is refused here, as it is spoken.
    let mut wire = mesh.sidecar(0).connect(at(&other, 80));
    let (head, body) = get(&mut wire, "/", "a.example.org");
    assert_eq!(status(&head), 502, "{head}");
    let reason = header(&head, "proxy-status").unwrap();
    assert!(
        reason.contains("error=destination_ip_prohibited"),
        "{reason}"
    );
    assert!(
        body.contains("RegistryOnly") && body.contains("ExternalService"),
        "{body}"
    );
    // No host has that port: whoever waits for a greeting is told soon, not when it could have said a
    // name.
    let begun = Instant::now();
    mesh.sidecar(0).connect(at(&other, 7000)).expect_reset();
    assert!(begun.elapsed() < Duration::from_secs(4));
    // Another port of a known address is not known.
    assert_eq!(ask(&mesh, at(&api, 80), "x").0, 502);
    let refused = ["code=\"destination_ip_prohibited\""];
    let client = mesh.sidecar(0);
    eventually("the three are counted", PATIENCE, || {
        client.metric("weft_errors_total", &refused) >= 3.0
    });
    assert!(client.log().contains("connection refused"));

    // A name is not believed: neither that of another address, nor one below no wildcard.
    assert_eq!(
        tls_ask(&mesh, at(&other, 443), "a.example.org", &authority),
        None
    );
    assert_eq!(
        tls_ask(&mesh, at(&api, 443), "a.example.com", &authority),
        None
    );
    assert_eq!(other_tls.requests(), 0);

    // It stays so without a control plane, also for what was never asked for before.
    mesh.kill_control_plane();
    assert_eq!(ask(&mesh, at(&other, 8080), "x").0, 502);
    assert_eq!(ask(&mesh, vip, "x").1, "server");
    mesh.start_control_plane();
    egress(&mesh, "AllowAny");
    eventually("what is not known passes through", PATIENCE, || {
        ask(&mesh, at(&other, 80), "x").1 == "other"
    });
    mesh.sidecar(0)
        .connect(at(&other, 7000))
        .expect("220 hello\r\n");
}

/// A server that trusts the mesh's roots, and takes nobody without a certificate of theirs.
pub fn mutual_tls_shows_the_workloads_own_certificate() {
    let mut mesh = Mesh::new();
    mesh.workload(Workload::new("client"));
    let outside = mesh.outsider("outside");
    let authority = Authority::new();
    let port = |port: u16, mode: &str| {
        format!(
            "
  - port: {port}
    targetPort: 8443
    name: http-{port}
    tls:
      mode: {mode}
      sni: vault.example.org
      caCertificates: {}",
            authority.yaml(6)
        )
    };
    external(
        &mesh,
        "vault",
        &format!(
            "  resolution: Static
  endpoints: [{{address: {}}}]
  ports:{}{}",
            outside.v4(),
            port(80, "Mutual"),
            port(81, "Simple")
        ),
    );
    mesh.start();
    let mut roots = rustls::RootCertStore::empty();
    let pem = mesh.root();
    for root in rustls::pki_types::CertificateDer::pem_slice_iter(&pem) {
        roots.add(root.unwrap()).unwrap();
    }
    let verifier = rustls::server::WebPkiClientVerifier::builder(Arc::new(roots));
    let (chain, key) = authority.issue(&["vault.example.org"]).pair();
    let config = rustls::ServerConfig::builder()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(chain, key)
        .unwrap();
    let shown = Arc::new(Mutex::new(Vec::new()));
    let (config, note) = (Arc::new(config), shown.clone());
    let _server = Server::start(&outside, 8443, move |wire| {
        let mut tls = rustls::ServerConnection::new(config.clone()).unwrap();
        let mut tcp = wire.stream();
        let mut stream = rustls::Stream::new(&mut tls, &mut tcp);
        if stream.read(&mut [0; 1024]).is_ok_and(|n| n > 0) {
            let chain = stream.conn.peer_certificates().unwrap();
            note.lock().unwrap().push(chain[0].to_vec());
            let _ = stream.write_all(&ok("come in"));
        }
    });
    let at = |port| SocketAddr::new(outside.v4().into(), port);
    let answer = ask(&mesh, at(80), "vault.example.org");
    assert_eq!(answer, (200, "come in".to_owned()));
    let shown = shown.lock().unwrap();
    let identity = b"spiffe://cluster.local/ns/shop/sa/client";
    assert!(shown[0].windows(identity.len()).any(|w| w == identity));
    // With TLS 1.3 the server's refusal comes after the handshake: the request is lost with it.
    let mut wire = mesh.sidecar(0).connect(at(81));
    wire.send("GET / HTTP/1.1\r\nHost: vault.example.org\r\n\r\n");
    let mut answer = Vec::new();
    let _ = wire.stream().read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer);
    assert!(!answer.contains("come in"), "{answer}");
    assert_eq!(shown.len(), 1);
}
