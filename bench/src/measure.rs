//! The measurements: each candidate in turn, several rounds, and what a round's figures are.

use std::time::Duration;

use serde::Serialize;

use crate::candidates::{Candidate, Origin};
use crate::features::{self, Feature};
use crate::load::{self, Edge, Kind, Load};
use crate::process::{self, SyscallCount};

/// A kind of traffic at a number of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    pub name: &'static str,
    pub about: &'static str,
    pub kind: Kind,
    /// Bytes are copied: the opaque way of a candidate.
    pub opaque: bool,
    pub connections: usize,
    pub streams: usize,
    /// The policy that the requests are under.
    pub feature: Option<Feature>,
}

/// All cases, in the order in which they are measured.
pub const CASES: &[Case] = &[
    case(
        "http1-c1",
        "HTTP/1.1, 1 connection",
        Kind::Http1,
        false,
        1,
        1,
    ),
    case(
        "http1-c32",
        "HTTP/1.1, 32 connections",
        Kind::Http1,
        false,
        32,
        1,
    ),
    case(
        "http1-c256",
        "HTTP/1.1, 256 connections",
        Kind::Http1,
        false,
        256,
        1,
    ),
    case(
        "http1-1m",
        "HTTP/1.1, 1 MiB bodies, 4 connections",
        Kind::Http1Large,
        false,
        4,
        1,
    ),
    case(
        "http2",
        "HTTP/2, 4 connections of 8 streams",
        Kind::Http2,
        false,
        4,
        8,
    ),
    case(
        "grpc",
        "gRPC unary, 4 connections of 8 streams",
        Kind::Grpc,
        false,
        4,
        8,
    ),
    case("tcp-c1", "TCP, 1 connection", Kind::Http1, true, 1, 1),
    case("tcp-c32", "TCP, 32 connections", Kind::Http1, true, 32, 1),
    case(
        "tcp-1m",
        "TCP, 1 MiB bodies, 4 connections",
        Kind::Http1Large,
        true,
        4,
        1,
    ),
    case(
        "connect",
        "TCP, a new connection each, 8 at once",
        Kind::Http1Close,
        true,
        8,
        1,
    ),
    policy("rules-1", "1 rule", Feature::Rules(1)),
    policy("rules-10", "10 rules", Feature::Rules(10)),
    policy("rules-100", "100 rules", Feature::Rules(100)),
    policy("rules-1000", "1,000 rules", Feature::Rules(1000)),
    policy("headers", "header filters", Feature::Headers),
    policy("rewrite", "URL rewrite", Feature::Rewrite),
    policy("retries", "retries armed", Feature::Retries),
    policy("mirror", "mirror, all requests", Feature::Mirror),
];

/// HTTP/1.1 over 32 connections.
const fn policy(name: &'static str, about: &'static str, feature: Feature) -> Case {
    Case {
        feature: Some(feature),
        ..case(name, about, Kind::Http1, false, 32, 1)
    }
}

const fn case(
    name: &'static str,
    about: &'static str,
    kind: Kind,
    opaque: bool,
    connections: usize,
    streams: usize,
) -> Case {
    Case {
        name,
        about,
        kind,
        opaque,
        connections,
        streams,
        feature: None,
    }
}

impl Case {
    fn load(&self, candidate: &Candidate, window: Duration) -> Option<Load> {
        let ways = &candidate.ways;
        let target = match (self.feature, self.kind) {
            (Some(feature), _) => ways.features.get(&feature).copied(),
            (None, Kind::Http2 | Kind::Grpc) => ways.http2,
            (None, _) if self.opaque => ways.tcp,
            (None, _) => ways.http1,
        }?;
        Some(Load {
            kind: self.kind,
            target,
            path: self.feature.map_or("/", Feature::path),
            connections: self.connections,
            streams: self.streams,
            // Every connection is up by then, between the proxies too.
            warmup: (window / 4).clamp(Duration::from_millis(500), Duration::from_secs(1)),
            window,
        })
    }
}

/// What one run of one case over one candidate gave.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    pub requests: u64,
    pub errors: u64,
    pub requests_per_second: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
    /// CPU time per request, microseconds, of the outbound and the inbound proxy.
    pub cpu_us: Option<(f64, f64)>,
}

impl Figures {
    pub fn cpu_sum_us(&self) -> Option<f64> {
        self.cpu_us.map(|(out, inn)| out + inn)
    }
}

/// Runs a case over a candidate; `None` when the candidate has no way for it.
pub fn run(
    case: &Case,
    candidate: &Candidate,
    origin: &Origin,
    window: Duration,
) -> anyhow::Result<Option<Figures>> {
    let Some(load) = case.load(candidate, window) else {
        return Ok(None);
    };
    let copies_before = match case.feature {
        Some(Feature::Mirror) => Some(features::count(origin.mirrored)?),
        _ => None,
    };
    let mut tries = 0;
    let (outcome, readings) = loop {
        let mut readings = Vec::new();
        let outcome = load::run(&load, &mut |_| {
            readings.push(
                candidate
                    .pids
                    .map(|(out, inn)| (process::cpu(out), process::cpu(inn))),
            );
        })?;
        if outcome.latencies.count() > 0 {
            break (outcome, readings);
        }
        let why = outcome.first_error.as_deref().unwrap_or("no error either");
        let what = format!(
            "{} over {}: no request was answered ({why})",
            case.name, candidate.name
        );
        tries += 1;
        anyhow::ensure!(tries < 3, "{what}");
        eprintln!("{what}; measured again");
    };
    let requests = outcome.latencies.count();
    let mut outcome = outcome;
    if let Some(before) = copies_before {
        // Those of the warm-up too: what is missing is missing among those.
        let copies = features::count(origin.mirrored)? - before;
        outcome.missing(requests.saturating_sub(copies));
    }
    if let Some(error) = &outcome.first_error {
        eprintln!(
            "{} over {}: {} errors; the first: {error}",
            case.name, candidate.name, outcome.errors
        );
    }
    let per_request = |used: Duration| used.as_secs_f64() * 1e6 / requests as f64;
    let mut readings = readings.into_iter();
    let cpu_us = match (readings.next().flatten(), readings.next().flatten()) {
        (Some((out, inn)), Some((out_after, inn_after))) => Some((
            per_request(out_after? - out?),
            per_request(inn_after? - inn?),
        )),
        _ => None,
    };
    let micros = |share| outcome.latencies.quantile(share).as_nanos() as f64 / 1000.0;
    Ok(Some(Figures {
        requests,
        errors: outcome.errors,
        requests_per_second: outcome.requests_per_second(),
        p50_us: micros(0.5),
        p99_us: micros(0.99),
        p999_us: micros(0.999),
        cpu_us,
    }))
}

/// System calls per request of the outbound and the inbound proxy, in a run of its own so that
/// counting does not weigh on the other figures; `None` where perf cannot count.
pub fn syscalls(case: &Case, candidate: &Candidate) -> anyhow::Result<Option<(f64, f64)>> {
    let (Some(load), Some((out, inn))) =
        (case.load(candidate, Duration::from_secs(1)), candidate.pids)
    else {
        return Ok(None);
    };
    let Some(count) = SyscallCount::start(&[out, inn]) else {
        return Ok(None);
    };
    std::thread::sleep(Duration::from_millis(300));
    // Everything from here to the end of the load is counted, the warm-up too.
    let mut load = load;
    load.warmup = Duration::ZERO;
    let outcome = load::run(&load, &mut |_: Edge| {})?;
    let counts = count.stop();
    let requests = outcome.latencies.count().max(1) as f64;
    Ok(match counts[..] {
        [Some(out), Some(inn)] => Some((out as f64 / requests, inn as f64 / requests)),
        _ => None,
    })
}

/// Memory of a pair, KiB of the outbound and the inbound proxy.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Memory {
    pub out_kib: u64,
    pub in_kib: u64,
}

pub fn memory(candidate: &Candidate) -> anyhow::Result<Option<Memory>> {
    of_both(candidate, process::rss_kib)
}

/// The part of it that is not of files: what a process has put there.
pub fn anonymous(candidate: &Candidate) -> anyhow::Result<Option<Memory>> {
    of_both(candidate, process::anonymous_kib)
}

fn of_both(
    candidate: &Candidate,
    kib: fn(u32) -> anyhow::Result<u64>,
) -> anyhow::Result<Option<Memory>> {
    candidate
        .pids
        .map(|(out, inn)| {
            Ok(Memory {
                out_kib: kib(out)?,
                in_kib: kib(inn)?,
            })
        })
        .transpose()
}

/// Memory while 256 connections send requests.
pub fn memory_at_256(candidate: &Candidate) -> anyhow::Result<Option<Memory>> {
    let Some(load) = CASES
        .iter()
        .find(|c| c.name == "http1-c256")
        .and_then(|c| c.load(candidate, Duration::from_secs(3)))
    else {
        return Ok(None);
    };
    let mut reading = None;
    load::run(&load, &mut |edge| {
        if edge == Edge::Closes {
            reading = memory(candidate).transpose();
        }
    })?;
    reading.transpose()
}

/// KiB that each idle connection costs the outbound and the inbound proxy.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct IdleConnections {
    pub count: usize,
    pub out_kib_each: f64,
    pub in_kib_each: f64,
}

/// Opens connections that have each made one request and wait.
pub fn idle_connections(
    candidate: &Candidate,
    opaque: bool,
    count: usize,
) -> anyhow::Result<Option<IdleConnections>> {
    let target = if opaque {
        candidate.ways.tcp
    } else {
        candidate.ways.http1
    };
    let (Some(target), Some(before)) = (target, memory(candidate)?) else {
        return Ok(None);
    };
    let open = load::http1::open_idle(target, count)?;
    // Buffers that are given back when a connection turns idle are given back by now.
    std::thread::sleep(Duration::from_secs(3));
    let Some(after) = memory(candidate)? else {
        return Ok(None);
    };
    drop(open);
    let each = |before: u64, after: u64| (after as f64 - before as f64) / count as f64;
    Ok(Some(IdleConnections {
        count,
        out_kib_each: each(before.out_kib, after.out_kib),
        in_kib_each: each(before.in_kib, after.in_kib),
    }))
}
