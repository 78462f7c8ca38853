//! What is measured: a way from the load generator to the origin.

pub mod envoy;
pub mod weft;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use crate::features::Feature;
use crate::load::{self, Kind, Load};
use crate::process::{Cpus, Process, Side, free_port, wait_for};

/// A way to the origin, with an address for each kind of traffic that it takes.
#[derive(Default, Clone)]
pub struct Ways {
    pub http1: Option<SocketAddr>,
    pub http2: Option<SocketAddr>,
    /// Opaque: bytes are copied.
    pub tcp: Option<SocketAddr>,
    /// HTTP/1.1 under a policy; nothing unless they are measured.
    pub features: BTreeMap<Feature, SocketAddr>,
}

/// What a pair is told besides what every pair is.
#[derive(Debug, Clone, Copy)]
pub struct Told {
    /// Addresses that the one inbound proxy is reached at, and balanced over.
    pub endpoints: u8,
    /// The policies of [`Feature`].
    pub policies: bool,
}

impl Default for Told {
    fn default() -> Self {
        Self {
            endpoints: 10,
            policies: false,
        }
    }
}

/// The addresses of endpoints; loopback answers to all of 127/8.
pub fn endpoints(count: u8) -> impl Iterator<Item = Ipv4Addr> {
    (1..=count).map(|i| Ipv4Addr::new(127, 0, 1, i))
}

/// Something to measure.
pub struct Candidate {
    pub name: &'static str,
    pub ways: Ways,
    /// Outbound and inbound proxy; none for the direct path.
    pub pids: Option<(u32, u32)>,
    /// What tells our own pair, while it runs.
    pub mesh: Option<weft::Mesh>,
    /// Killed with the candidate.
    pub _processes: Vec<Process>,
}

impl Candidate {
    /// Waits until every way answers a request. HTTP/2 that is not answered is left out, and said
    /// to be; without HTTP/1.1 or TCP there is nothing to measure.
    pub fn wait_ready(&mut self) -> anyhow::Result<()> {
        let wait = |target: Option<SocketAddr>, kind, seconds| {
            let Some(target) = target else { return Ok(()) };
            let what = format!("{} to answer {kind:?} on {target}", self.name);
            wait_for(&what, Duration::from_secs(seconds), || {
                answers(target, kind)
            })
        };
        wait(self.ways.http1, Kind::Http1, 20)?;
        wait(self.ways.tcp, Kind::Http1, 20)?;
        if let Err(error) = wait(self.ways.http2, Kind::Http2, 5) {
            eprintln!("HTTP/2 is not measured: {error:#}");
            self.ways.http2 = None;
        }
        Ok(())
    }
}

/// A short run that must succeed.
fn answers(target: SocketAddr, kind: Kind) -> anyhow::Result<()> {
    let load = Load {
        kind,
        target,
        path: "/",
        connections: 1,
        streams: 1,
        warmup: Duration::ZERO,
        window: Duration::from_millis(60),
    };
    let outcome = load::run(&load, &mut |_| {})?;
    match outcome.first_error {
        Some(error) => anyhow::bail!("{error}"),
        None if outcome.latencies.count() == 0 => anyhow::bail!("no answer"),
        None => Ok(()),
    }
}

/// The origin, and the direct path to it.
pub struct Origin {
    _process: Process,
    pub http1: SocketAddr,
    pub http2: SocketAddr,
    /// Where copies of requests go.
    pub mirrored: SocketAddr,
}

impl Origin {
    pub fn start(cpus: &Cpus, folder: &Path) -> anyhow::Result<Self> {
        let http1 = loopback(free_port()?);
        let http2 = loopback(free_port()?);
        let mirrored = loopback(free_port()?);
        let log = folder.join("origin.log");
        cpus.enter(Side::Server)?;
        let process = Process::start(
            "origin",
            &std::env::current_exe()?,
            ["origin".to_owned()]
                .into_iter()
                .chain([http1, http2, mirrored].map(|port| port.to_string())),
            &log,
        )?;
        cpus.enter(Side::Client)?;
        let origin = Self {
            _process: process,
            http1,
            http2,
            mirrored,
        };
        origin.direct().wait_ready()?;
        Ok(origin)
    }

    /// No proxy between.
    pub fn direct(&self) -> Candidate {
        Candidate {
            name: "direct",
            ways: Ways {
                http1: Some(self.http1),
                http2: Some(self.http2),
                tcp: None,
                features: BTreeMap::new(),
            },
            pids: None,
            mesh: None,
            _processes: Vec::new(),
        }
    }
}

pub fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}
