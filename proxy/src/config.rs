//! How a proxy is started: flags, each also an environment variable.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use weft_api::names;

/// Flags of `weft-proxy run`.
#[derive(Debug, Clone, Args)]
pub struct Config {
    /// Control plane, "host:port".
    #[arg(long, env = "WEFT_CONTROL_PLANE", default_value = "127.0.0.1:15010")]
    pub control_plane: String,
    /// PEM file with the root certificates the control plane is verified against at first.
    #[arg(long, env = "WEFT_TRUST_ROOT")]
    pub trust_root: PathBuf,
    /// File with the workload token that is shown for a certificate; read again at each renewal.
    #[arg(long, env = "WEFT_TOKEN")]
    pub token: PathBuf,
    /// The workload this proxy stands beside, "namespace/name".
    #[arg(long, env = "WEFT_WORKLOAD")]
    pub workload: String,
    /// Trust domain of the mesh.
    #[arg(long, env = "WEFT_TRUST_DOMAIN", default_value = names::DEFAULT_TRUST_DOMAIN)]
    pub trust_domain: String,
    /// Port that captured outgoing connections arrive at.
    #[arg(long, env = "WEFT_OUTBOUND_PORT", default_value_t = names::OUTBOUND_PORT)]
    pub outbound_port: u16,
    /// Port that captured incoming connections arrive at.
    #[arg(long, env = "WEFT_INBOUND_PORT", default_value_t = names::INBOUND_PORT)]
    pub inbound_port: u16,
    /// Admin address: health, readiness, metrics, config dump, drain.
    #[arg(long, env = "WEFT_ADMIN", default_value_t = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), names::ADMIN_PORT))]
    pub admin: SocketAddr,
    /// Address that may use all of the admin port, as the loopback address may; others are served
    /// health, readiness and metrics. May be repeated.
    #[arg(
        long,
        env = "WEFT_ADMIN_TRUST",
        value_delimiter = ',',
        value_name = "ADDRESS"
    )]
    pub admin_trust: Vec<IpAddr>,
    /// Data workers; each is a thread.
    #[arg(long, env = "WEFT_WORKERS", default_value_t = 1)]
    pub workers: usize,
    /// Mark (SO_MARK) put on the proxy's own connections, when capture exempts by mark.
    #[arg(long, env = "WEFT_MARK")]
    pub mark: Option<u32>,
    /// What may be asked of the application by way of the admin port (`GET /probe/…`): "tcp/5432",
    /// "https/8443/healthz"; separated by spaces.
    #[arg(long = "probe", env = "WEFT_PROBES", value_delimiter = ' ')]
    pub probes: Vec<String>,
    /// How long SIGTERM waits for what runs to finish, seconds.
    #[arg(long, env = "WEFT_DRAIN_SECONDS", default_value_t = 25)]
    pub drain_seconds: u64,
    /// How long a connection to a destination not known yet waits for the control plane,
    /// milliseconds; after that it passes through to its original address.
    #[arg(long, env = "WEFT_DISCOVERY_WAIT_MS", default_value_t = 1000)]
    pub discovery_wait_ms: u64,
    /// DNS server, "address:port", asked for names outside the mesh instead of those of
    /// /etc/resolv.conf. May be repeated.
    #[arg(
        long = "dns-server",
        env = "WEFT_DNS_SERVER",
        value_delimiter = ',',
        value_name = "ADDRESS:PORT"
    )]
    pub dns_servers: Vec<SocketAddr>,
    /// OTLP endpoint for spans: http://host:4317 (gRPC) or http://host:4318/v1/traces (HTTP).
    #[arg(long, env = "WEFT_OTLP_ENDPOINT")]
    pub otlp_endpoint: Option<String>,
    /// Opens a connection between proxies for each of the application's, where HTTP/1.1 and opaque
    /// connections to an endpoint share one otherwise.
    #[arg(long, env = "WEFT_OWN_CONNECTIONS")]
    pub own_connections: bool,
    /// Log filter, as RUST_LOG ("info", "weft_proxy=debug").
    #[arg(long, env = "WEFT_LOG", default_value = "info")]
    pub log: String,
    /// Where capture is not possible: "outbound:PORT=ADDRESS:PORT" listens on the loopback
    /// address for connections meant for ADDRESS:PORT; "inbound:PORT=ADDRESS:PORT" listens on all
    /// addresses for connections of the workload's port at ADDRESS:PORT. May be repeated.
    #[arg(long = "forward", env = "WEFT_FORWARD", value_delimiter = ',')]
    pub forwards: Vec<Forward>,
}

impl Config {
    /// Time that SIGTERM waits for what runs to finish.
    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }
}

/// One `--forward`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    pub inbound: bool,
    pub port: u16,
    pub to: SocketAddr,
}

impl std::str::FromStr for Forward {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (direction, rest) = given.split_once(':')?;
            let inbound = match direction {
                "inbound" => true,
                "outbound" => false,
                _ => return None,
            };
            let (port, to) = rest.split_once('=')?;
            Some(Self {
                inbound,
                port: port.parse().ok()?,
                to: to.parse().ok()?,
            })
        };
        parse().ok_or_else(|| {
            format!("'{given}' is not outbound:PORT=ADDRESS:PORT or inbound:PORT=ADDRESS:PORT")
        })
    }
}
