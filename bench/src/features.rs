//! What policies cost a request: routing rules, filters, retries and mirrors, as the Gateway API
//! writes them for us and as Envoy's routes have them; and whether both sides really do it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::Context;

use crate::candidates::{Candidate, Origin};
use crate::load::http1::head_end;
use crate::process::wait_for;

/// What a route does besides leading to the server. Each is a Service of its own with us, and a
/// listener of its own with Envoy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Feature {
    /// So many rules by path; the requests are for the last of them.
    Rules(u16),
    /// Two fields of the request are set, one is removed; one of the response is set.
    Headers,
    /// Another host, and another prefix of the path.
    Rewrite,
    /// Retries on 503 and broken connections; no request of the load needs one.
    Retries,
    /// A copy of every request goes to another server.
    Mirror,
}

/// All that are measured.
pub const FEATURES: [Feature; 8] = [
    Feature::Rules(1),
    Feature::Rules(10),
    Feature::Rules(100),
    Feature::Rules(1000),
    Feature::Headers,
    Feature::Rewrite,
    Feature::Retries,
    Feature::Mirror,
];

/// Fields that [`Feature::Headers`] sets, and the one that it removes.
pub const SET: [(&str, &str); 2] = [("x-bench-a", "one"), ("x-bench-b", "two")];
pub const REMOVED: &str = "user-agent";
pub const ANSWERED: (&str, &str) = ("x-bench-answer", "three");
/// What [`Feature::Rewrite`] makes of `/from` and the host.
pub const REWRITTEN: (&str, &str) = ("/to", "rewritten.bench");
/// A request with this field is answered with its own head.
pub const ECHO: &str = "x-bench-echo";
/// Of requests with this field, the origin answers every other one 503.
pub const FLAKY: &str = "x-bench-flaky";
/// Where the origin says how many requests a port has had.
pub const COUNT: &str = "/count";

/// Requests that a check makes where one says nothing.
const CHECKS: u64 = 20;

impl Feature {
    /// Names its Service and listener.
    pub fn name(self) -> String {
        match self {
            Feature::Rules(count) => format!("rules-{count}"),
            Feature::Headers => "headers".to_owned(),
            Feature::Rewrite => "rewrite".to_owned(),
            Feature::Retries => "retries".to_owned(),
            Feature::Mirror => "mirror".to_owned(),
        }
    }

    /// The path that is asked for.
    pub fn path(self) -> &'static str {
        match self {
            Feature::Rules(1) => "/r0/item",
            Feature::Rules(10) => "/r9/item",
            Feature::Rules(100) => "/r99/item",
            Feature::Rules(_) => "/r999/item",
            Feature::Rewrite => "/from/item",
            Feature::Headers | Feature::Retries | Feature::Mirror => "/",
        }
    }
}

/// Makes sure that each feature is in force over a candidate.
pub fn check(candidate: &Candidate, origin: &Origin) -> anyhow::Result<()> {
    for (feature, way) in &candidate.ways.features {
        let what = format!("{} over {}", feature.name(), candidate.name);
        wait_for(&what, Duration::from_secs(20), || {
            check_one(*feature, *way, origin)
        })?;
    }
    Ok(())
}

fn check_one(feature: Feature, way: SocketAddr, origin: &Origin) -> anyhow::Result<()> {
    let echo = || ask(way, feature.path(), &format!("{ECHO}: 1\r\n"));
    match feature {
        Feature::Rules(_) => {
            echo()?.is(200)?;
            // Nothing but the rules leads to the server.
            ask(way, "/elsewhere", "")?.is(404)
        }
        Feature::Headers => {
            let answer = echo()?;
            answer.is(200)?;
            for (name, value) in SET {
                answer.has(&answer.body, &format!("{name}: {value}"))?;
            }
            let removed = answer.body.to_ascii_lowercase().contains(REMOVED);
            anyhow::ensure!(!removed, "{REMOVED} is still there: {}", answer.body);
            answer.has(&answer.head, &format!("{}: {}", ANSWERED.0, ANSWERED.1))
        }
        Feature::Rewrite => {
            let answer = echo()?;
            answer.is(200)?;
            answer.has(&answer.body, &format!("get {}/item http/1.1", REWRITTEN.0))?;
            answer.has(&answer.body, &format!("host: {}", REWRITTEN.1))
        }
        Feature::Retries => {
            for _ in 0..CHECKS / 4 {
                ask(way, feature.path(), &format!("{FLAKY}: 1\r\n"))?.is(200)?;
            }
            Ok(())
        }
        Feature::Mirror => {
            let before = count(origin.mirrored)?;
            for _ in 0..CHECKS {
                echo()?.is(200)?;
            }
            // A copy may arrive after the answer to what it is a copy of.
            wait_for("the copies", Duration::from_secs(2), || {
                let copies = count(origin.mirrored)? - before;
                anyhow::ensure!(copies >= CHECKS, "{copies} copies of {CHECKS} requests");
                Ok(())
            })
        }
    }
}

/// Requests that a port of the origin has had.
pub fn count(origin: SocketAddr) -> anyhow::Result<u64> {
    let answer = ask(origin, COUNT, "")?;
    answer.is(200)?;
    Ok(answer.body.trim().parse()?)
}

struct Answer {
    head: String,
    body: String,
}

impl Answer {
    fn is(&self, status: u16) -> anyhow::Result<()> {
        let said = self.head.get(9..12);
        anyhow::ensure!(
            said == Some(status.to_string().as_str()),
            "{status} was expected: {}",
            self.head
        );
        Ok(())
    }

    /// Whether a line stands in a head; names in any case.
    fn has(&self, head: &str, line: &str) -> anyhow::Result<()> {
        let there = head.lines().any(|l| l.eq_ignore_ascii_case(line));
        anyhow::ensure!(there, "{line:?} is missing: {head}");
        Ok(())
    }
}

/// One request on a connection of its own.
fn ask(to: SocketAddr, path: &str, fields: &str) -> anyhow::Result<Answer> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: server.bench\r\nUser-Agent: weft-bench\r\n{fields}Connection: close\r\n\r\n"
    )?;
    let mut all = Vec::new();
    stream.read_to_end(&mut all)?;
    let end = head_end(&all).context("an answer without a head")?;
    let (head, body) = all.split_at(end);
    Ok(Answer {
        head: String::from_utf8_lossy(head).into_owned(),
        body: String::from_utf8_lossy(body).into_owned(),
    })
}
