//! An Envoy pair with a static configuration: the router filter and nothing more, one worker each,
//! mutual TLS 1.3 with P-256 certificates between, no session resumption (so that a new connection
//! is a full handshake, as ours is).

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::{Candidate, Origin, Told, Ways, endpoints, loopback};
use crate::features::{ANSWERED, FEATURES, Feature, REMOVED, REWRITTEN, SET};
use crate::process::{Cpus, Process, Side, free_port, wait_for};

/// What is spoken between the two Envoys for HTTP/1.1 requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Between {
    /// "lean": HTTP/2, as service meshes set it up.
    Http2,
    /// "lean1": HTTP/1.1.
    Http1,
}

/// How an Envoy pair is set up.
#[derive(Debug, Clone)]
pub struct Setup {
    pub name: &'static str,
    pub binary: PathBuf,
    pub between: Between,
    /// Key exchange group, Envoy's name for it: X25519MLKEM768 or X25519.
    pub group: &'static str,
    pub told: Told,
    /// Services that nothing is sent to; ten endpoints each.
    pub unused_services: usize,
}

/// The certificates of a pair, in a folder.
pub struct Certificates {
    folder: PathBuf,
}

impl Certificates {
    /// A root and two leaves for `client` and `server`, P-256, with SPIFFE ids as their only names.
    pub fn make(folder: &Path) -> anyhow::Result<Self> {
        use rcgen::{
            BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose,
            IsCa, KeyPair, KeyUsagePurpose, SanType,
        };
        let mut root = CertificateParams::default();
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        root.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        root.distinguished_name
            .push(DnType::CommonName, "bench root");
        let root = CertifiedIssuer::self_signed(root, KeyPair::generate()?)?;
        fs::write(folder.join("ca.crt"), root.pem())?;
        for who in ["client", "server"] {
            let key = KeyPair::generate()?;
            let mut leaf = CertificateParams::default();
            leaf.subject_alt_names = vec![SanType::URI(spiffe(who).as_str().try_into()?)];
            leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            leaf.extended_key_usages = vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ];
            let certificate = leaf.signed_by(&key, &root)?;
            fs::write(folder.join(format!("{who}.crt")), certificate.pem())?;
            fs::write(folder.join(format!("{who}.key")), key.serialize_pem())?;
        }
        Ok(Self {
            folder: folder.to_owned(),
        })
    }

    fn context(&self, who: &str, peer: &str, group: &str, alpn: &[&str]) -> Value {
        let file = |name: String| json!({"filename": self.folder.join(name)});
        json!({
            "tls_params": {
                "tls_minimum_protocol_version": "TLSv1_3",
                "tls_maximum_protocol_version": "TLSv1_3",
                "ecdh_curves": [group],
            },
            "tls_certificates": [{
                "certificate_chain": file(format!("{who}.crt")),
                "private_key": file(format!("{who}.key")),
            }],
            "validation_context": {
                "trusted_ca": file("ca.crt".to_owned()),
                "match_typed_subject_alt_names": [
                    {"san_type": "URI", "matcher": {"exact": spiffe(peer)}}
                ],
            },
            "alpn_protocols": alpn,
        })
    }
}

fn spiffe(who: &str) -> String {
    format!("spiffe://cluster.local/ns/bench/sa/{who}")
}

/// Starts a pair and waits until it answers.
pub fn start(
    setup: &Setup,
    origin: &Origin,
    certificates: &Certificates,
    cpus: &Cpus,
    folder: &Path,
) -> anyhow::Result<Candidate> {
    let folder = folder.join(setup.name);
    fs::create_dir_all(&folder)?;
    let out = Ports::free()?;
    let inn = Ports::free()?;
    let http2_between = setup.between == Between::Http2;
    let tls_out = |alpn: &[&str]| {
        transport_socket(
            "UpstreamTlsContext",
            json!({
                "common_tls_context": certificates.context("client", "server", setup.group, alpn),
                "sni": "server.bench.svc.cluster.local",
                "max_session_keys": 0,
            }),
        )
    };
    let tls_in = |alpn: &[&str]| {
        transport_socket(
            "DownstreamTlsContext",
            json!({
                "common_tls_context": certificates.context("server", "client", setup.group, alpn),
                "require_client_certificate": true,
                "disable_stateless_session_resumption": true,
            }),
        )
    };
    let http_alpn = if http2_between { "h2" } else { "http/1.1" };
    let origin_at = || [Ipv4Addr::LOCALHOST];
    let inbound_at: Vec<Ipv4Addr> = endpoints(setup.told.endpoints).collect();
    let inbound_at = || inbound_at.iter().copied();
    let mut clusters = vec![
        cluster(
            "http",
            inbound_at(),
            inn.http1,
            Some(tls_out(&[http_alpn])),
            Some(http2_between),
        ),
        cluster(
            "http2",
            inbound_at(),
            inn.http2,
            Some(tls_out(&["h2"])),
            Some(true),
        ),
        cluster(
            "tcp",
            inbound_at(),
            inn.tcp,
            Some(tls_out(&["mesh-tcp"])),
            None,
        ),
    ];
    let mut hosts = vec![host("used", &["*"], "http")];
    for i in 0..setup.unused_services {
        let name = format!("svc-{i}.ns-{}.svc.cluster.local", i % 50);
        let high = u8::try_from(i >> 8)?;
        let low = u8::try_from(i & 255)?;
        clusters.push(cluster(
            &name,
            (1..=10).map(|e| Ipv4Addr::new(10, high, low, e)),
            8080,
            Some(tls_out(&["h2"])),
            Some(true),
        ));
        hosts.push(host(&name, &[&name], &name));
    }
    let mut listeners = vec![
        listener("http", out.http1, http_manager("out", hosts), None),
        listener(
            "http2",
            out.http2,
            http_manager("out2", vec![host("used", &["*"], "http2")]),
            None,
        ),
        listener("tcp", out.tcp, tcp_proxy("tcp"), None),
    ];
    let mut features = BTreeMap::new();
    if setup.told.policies {
        clusters.push(cluster(
            "mirrored",
            inbound_at(),
            inn.mirrored,
            Some(tls_out(&[http_alpn])),
            Some(http2_between),
        ));
        for feature in FEATURES {
            let port = free_port()?;
            let name = feature.name();
            let host = json!({"name": name, "domains": ["*"], "routes": routes(feature)});
            listeners.push(listener(&name, port, http_manager(&name, vec![host]), None));
            features.insert(feature, loopback(port));
        }
    }
    let outbound = bootstrap(out.admin, listeners, clusters);
    let inbound = bootstrap(
        inn.admin,
        vec![
            listener(
                "mirrored",
                inn.mirrored,
                http_manager("in-mirrored", vec![host("used", &["*"], "mirrored")]),
                Some((setup.told.endpoints, tls_in(&["h2", "http/1.1"]))),
            ),
            listener(
                "http",
                inn.http1,
                http_manager("in", vec![host("used", &["*"], "http")]),
                Some((setup.told.endpoints, tls_in(&["h2", "http/1.1"]))),
            ),
            listener(
                "http2",
                inn.http2,
                http_manager("in2", vec![host("used", &["*"], "http2")]),
                Some((setup.told.endpoints, tls_in(&["h2"]))),
            ),
            listener(
                "tcp",
                inn.tcp,
                tcp_proxy("tcp"),
                Some((setup.told.endpoints, tls_in(&["mesh-tcp"]))),
            ),
        ],
        vec![
            cluster("http", origin_at(), origin.http1.port(), None, Some(false)),
            cluster("http2", origin_at(), origin.http2.port(), None, Some(true)),
            cluster("tcp", origin_at(), origin.http1.port(), None, None),
            cluster(
                "mirrored",
                origin_at(),
                origin.mirrored.port(),
                None,
                Some(false),
            ),
        ],
    );
    let mut processes = Vec::new();
    for (side, name, config, admin) in [
        (Side::Server, "in", inbound, inn.admin),
        (Side::Client, "out", outbound, out.admin),
    ] {
        let path = folder.join(format!("{name}.json"));
        fs::write(&path, serde_json::to_vec_pretty(&config)?)?;
        let log = folder.join(format!("{name}.log"));
        cpus.enter(side)?;
        let mut process = Process::start(
            &format!("{} ({name})", setup.name),
            &setup.binary,
            [
                "-c".as_ref(),
                path.as_os_str(),
                "--concurrency".as_ref(),
                "1".as_ref(),
                "--disable-hot-restart".as_ref(),
                "-l".as_ref(),
                "warning".as_ref(),
            ],
            &log,
        )?;
        cpus.enter(Side::Client)?;
        wait_for(
            &format!("{} ({name})", setup.name),
            Duration::from_secs(60),
            || {
                process.check(&log)?;
                std::net::TcpStream::connect(loopback(admin))?;
                Ok(())
            },
        )?;
        processes.push(process);
    }
    let mut candidate = Candidate {
        name: setup.name,
        ways: Ways {
            http1: Some(loopback(out.http1)),
            http2: Some(loopback(out.http2)),
            tcp: Some(loopback(out.tcp)),
            features,
        },
        pids: Some((processes[1].pid(), processes[0].pid())),
        mesh: None,
        _processes: processes,
    };
    candidate.wait_ready()?;
    Ok(candidate)
}

struct Ports {
    admin: u16,
    http1: u16,
    http2: u16,
    tcp: u16,
    mirrored: u16,
}

impl Ports {
    fn free() -> anyhow::Result<Self> {
        Ok(Self {
            admin: free_port()?,
            http1: free_port()?,
            http2: free_port()?,
            tcp: free_port()?,
            mirrored: free_port()?,
        })
    }
}

fn typed(kind: &str, mut config: Value) -> Value {
    config["@type"] = json!(format!("type.googleapis.com/envoy.extensions.{kind}"));
    config
}

fn transport_socket(kind: &str, config: Value) -> Value {
    let kind = format!("transport_sockets.tls.v3.{kind}");
    json!({"name": "tls", "typed_config": typed(&kind, config)})
}

fn address(ip: Ipv4Addr, port: u16) -> Value {
    json!({"socket_address": {"address": ip, "port_value": port}})
}

/// `http2`: `None` for an opaque cluster.
fn cluster(
    name: &str,
    at: impl IntoIterator<Item = Ipv4Addr>,
    port: u16,
    tls: Option<Value>,
    http2: Option<bool>,
) -> Value {
    let endpoints: Vec<Value> = (at.into_iter())
        .map(|ip| json!({"endpoint": {"address": address(ip, port)}}))
        .collect();
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "10s",
        "lb_policy": "LEAST_REQUEST",
        "circuit_breakers": {"thresholds": [{
            "max_connections": 100_000,
            "max_pending_requests": 100_000,
            "max_requests": 100_000,
            "max_retries": 1000,
        }]},
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": endpoints}],
        },
    });
    if let Some(tls) = tls {
        cluster["transport_socket"] = tls;
    }
    if let Some(http2) = http2 {
        let explicit = if http2 {
            json!({"http2_protocol_options": {"max_concurrent_streams": 1000}})
        } else {
            json!({"http_protocol_options": {}})
        };
        cluster["typed_extension_protocol_options"] = json!({
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": typed(
                "upstreams.http.v3.HttpProtocolOptions",
                json!({"explicit_http_config": explicit}),
            )
        });
    }
    cluster
}

fn host(name: &str, domains: &[&str], cluster: &str) -> Value {
    json!({
        "name": name,
        "domains": domains,
        "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster, "timeout": "0s"}}],
    })
}

/// The routes of a policy; all lead to the cluster `http`.
fn routes(feature: Feature) -> Value {
    let field = |(name, value): (&str, &str)| {
        json!({
            "header": {"key": name, "value": value},
            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
        })
    };
    let to_server = json!({"cluster": "http", "timeout": "0s"});
    let mut all = json!({"match": {"prefix": "/"}, "route": to_server});
    match feature {
        Feature::Rules(count) => {
            return (0..count)
                .map(|i| {
                    let prefix = format!("/r{i}");
                    json!({"match": {"path_separated_prefix": prefix}, "route": to_server})
                })
                .collect();
        }
        Feature::Headers => {
            all["request_headers_to_add"] = SET.map(field).to_vec().into();
            all["request_headers_to_remove"] = json!([REMOVED]);
            all["response_headers_to_add"] = json!([field(ANSWERED)]);
        }
        Feature::Rewrite => {
            let (prefix, host) = REWRITTEN;
            all["match"] = json!({"path_separated_prefix": "/from"});
            all["route"]["prefix_rewrite"] = prefix.into();
            all["route"]["host_rewrite_literal"] = host.into();
        }
        Feature::Retries => {
            all["route"]["retry_policy"] = json!({
                "retry_on": "connect-failure,refused-stream,reset,retriable-status-codes",
                "retriable_status_codes": [503],
                "num_retries": 2,
            });
        }
        Feature::Mirror => {
            all["route"]["request_mirror_policies"] = json!([{"cluster": "mirrored"}]);
        }
    }
    json!([all])
}

fn http_manager(prefix: &str, hosts: Vec<Value>) -> Value {
    let router = json!({
        "name": "envoy.filters.http.router",
        "typed_config": typed("filters.http.router.v3.Router", json!({})),
    });
    json!({"name": "http", "typed_config": typed(
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        json!({
            "stat_prefix": prefix,
            "codec_type": "AUTO",
            "generate_request_id": false,
            "http_filters": [router],
            "route_config": {"virtual_hosts": hosts},
        }),
    )})
}

fn tcp_proxy(cluster: &str) -> Value {
    json!({"name": "tcp", "typed_config": typed(
        "filters.network.tcp_proxy.v3.TcpProxy",
        json!({"stat_prefix": cluster, "cluster": cluster}),
    )})
}

/// What the load generator connects to, without `tls`; else what the outbound proxy does, at the
/// addresses of `count` endpoints.
fn listener(name: &str, port: u16, filter: Value, tls: Option<(u8, Value)>) -> Value {
    let mut chain = json!({"filters": [filter]});
    let Some((count, tls)) = tls else {
        let address = address(Ipv4Addr::LOCALHOST, port);
        return json!({"name": name, "address": address, "filter_chains": [chain]});
    };
    chain["transport_socket"] = tls;
    let addresses: Vec<Value> = endpoints(count).map(|ip| address(ip, port)).collect();
    let more: Vec<Value> = (addresses.iter().skip(1))
        .map(|address| json!({"address": address}))
        .collect();
    json!({
        "name": name,
        "address": addresses[0],
        "additional_addresses": more,
        "filter_chains": [chain],
    })
}

fn bootstrap(admin: u16, listeners: Vec<Value>, clusters: Vec<Value>) -> Value {
    json!({
        "admin": {"address": address(Ipv4Addr::LOCALHOST, admin)},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    })
}
