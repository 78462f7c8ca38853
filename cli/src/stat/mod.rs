//! `weft stat` and `weft top`: rates, success, latency and mutual TLS from the proxies' own metrics,
//! without a Prometheus.
//!
//! Counters are read twice ([`scrape`]) and what they have grown by is summed ([`tally`]): for
//! workloads what their proxies took in, for Services what callers' proxies sent to them.

pub mod scrape;
pub mod tally;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use serde::Serialize;
use tokio::time::Instant;

use crate::duration;
use crate::kube::pods::{Meshed, ask_all};
use crate::kube::target::{self, Kind, Target};
use crate::kube::{self, Cluster};
use crate::output::{Cell, Format, Paint, Tone, print_json, show, span, table};
use crate::reach::{ProxyArgs, Reach};

use scrape::Samples;
use tally::{FAMILIES, Tally};

/// Flags of `weft stat`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft stat                        workloads of the namespace: what they take in
  weft stat -A                     of all namespaces
  weft stat svc                    Services: what their callers see
  weft stat pod                    each pod
  weft stat deploy/cart --window 10s
  weft stat --proxy http://10.210.0.2:15020

The proxies are asked twice; --window is the time between. RETRIES of a workload are those its own
proxy made; of a Service, those made to reach it. SUCCESS: neither 5xx, nor without a response, nor
a gRPC status that is the server's fault.")]
pub struct Stat {
    /// Kinds or names: deploy, pod, svc, deploy/NAME, pod/NAME, svc/NAME
    #[arg(value_name = "WHAT")]
    what: Option<String>,
    /// Time over which rates are measured
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = duration)]
    window: Duration,
    #[command(flatten)]
    proxy: ProxyArgs,
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

/// Flags of `weft top`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft top                         workloads of the namespace, the busiest first
  weft top svc -A --interval 5s

As `weft stat`, again and again until Ctrl-C.")]
pub struct Top {
    /// deploy, pod, svc, deploy/NAME, pod/NAME, svc/NAME
    #[arg(value_name = "WHAT")]
    what: Option<String>,
    /// How often it is refreshed
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = duration)]
    interval: Duration,
    #[command(flatten)]
    proxy: ProxyArgs,
}

/// What a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Owner,
    Pod,
    Service,
}

/// Which rows.
#[derive(Debug, Clone, PartialEq, Eq)]
struct View {
    by: By,
    only: Option<Target>,
}

impl View {
    fn read(what: Option<&str>) -> anyhow::Result<Self> {
        let by = |kind| match kind {
            Kind::Pod => By::Pod,
            Kind::Service => By::Service,
            Kind::Owner(_) => By::Owner,
        };
        let Some(what) = what else {
            let (by, only) = (By::Owner, None);
            return Ok(Self { by, only });
        };
        if let Some(kind) = target::kind(what) {
            let (by, only) = (by(kind), None);
            return Ok(Self { by, only });
        }
        let target: Target = what.parse()?;
        let by = by(target.kind);
        let only = Some(target);
        Ok(Self { by, only })
    }
}

/// One proxy, as it was found at one time.
struct Reading {
    pod: Meshed,
    at: Instant,
    samples: Result<Samples, String>,
}

/// A row of the table.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    namespace: String,
    name: String,
    pods: usize,
    requests_per_second: f64,
    /// Percent.
    success: Option<f64>,
    p50_seconds: Option<f64>,
    p99_seconds: Option<f64>,
    /// Percent.
    mtls: Option<f64>,
    retries_per_second: f64,
    requests_in_flight: f64,
    connections: f64,
}

/// Where the readings come from.
enum Source {
    One(crate::admin::Admin),
    Cluster(Cluster, Option<String>),
}

impl Source {
    async fn new(args: &ProxyArgs, view: &View) -> anyhow::Result<Self> {
        Ok(match args.reach().await? {
            Reach::Direct(admin) => Self::One(admin),
            Reach::Cluster(cluster) => {
                // Who calls a Service may be anywhere; those whom the user may see are asked.
                let wide = view.by == By::Service && args.kube.namespace.is_none();
                let scope = match wide {
                    true => match cluster.pods(None).await {
                        Err(error) if error.is_forbidden() => cluster.scope(),
                        _ => None,
                    },
                    false => cluster.scope(),
                };
                let scope = scope.map(str::to_owned);
                Self::Cluster(cluster, scope)
            }
        })
    }

    async fn read(&self) -> Result<Vec<Reading>, kube::Error> {
        let read = async |(pod, admin): (Meshed, crate::admin::Admin)| {
            let text = admin.text("/metrics").await;
            Reading {
                pod,
                at: Instant::now(),
                samples: text
                    .map(|text| scrape::parse(&text, &FAMILIES))
                    .map_err(|error| error.to_string()),
            }
        };
        Ok(match self {
            Self::One(admin) => {
                let pod = Meshed {
                    namespace: String::new(),
                    name: "proxy".to_owned(),
                    owner: "proxy".to_owned(),
                    admin_port: 0,
                    ready: true,
                    node: String::new(),
                };
                vec![read((pod, admin.clone())).await]
            }
            Self::Cluster(cluster, scope) => {
                let pods = cluster.meshed(scope.as_deref()).await?;
                let asked = pods.into_iter().map(|pod| {
                    let admin = cluster.proxy(&pod);
                    (pod, admin)
                });
                ask_all(asked, read).await
            }
        })
    }

    /// Whether rows of this namespace are shown.
    fn shows(&self, namespace: &str) -> bool {
        match self {
            Self::One(_) => true,
            Self::Cluster(cluster, _) => cluster.scope().is_none_or(|scope| scope == namespace),
        }
    }
}

pub async fn run(args: Stat) -> anyhow::Result<ExitCode> {
    let view = View::read(args.what.as_deref())?;
    let source = Source::new(&args.proxy, &view).await?;
    let before = source.read().await?;
    tokio::time::sleep(args.window).await;
    let now = source.read().await?;
    let (rows, silent) = rows(&view, &before, &now, |namespace| source.shows(namespace));
    if let (Some(first), true) = (silent.first(), silent.len() == now.len()) {
        bail!("none of {} proxies answers; {first}", now.len());
    }
    match args.output {
        Format::Json => print_json(&serde_json::json!({ "rows": rows, "noAnswer": silent }))?,
        Format::Table => show(&render(&view, &rows, &silent, Paint::stdout())),
    }
    Ok(ExitCode::SUCCESS)
}

pub async fn top(args: Top) -> anyhow::Result<ExitCode> {
    use std::io::IsTerminal;
    let view = View::read(args.what.as_deref())?;
    let source = Source::new(&args.proxy, &view).await?;
    let terminal = std::io::stdout().is_terminal();
    let mut before = source.read().await?;
    loop {
        tokio::select! {
            () = tokio::time::sleep(args.interval) => {}
            _ = tokio::signal::ctrl_c() => return Ok(ExitCode::SUCCESS),
        }
        let now = source.read().await?;
        let (mut rows, silent) = rows(&view, &before, &now, |namespace| source.shows(namespace));
        rows.sort_by(|a, b| b.requests_per_second.total_cmp(&a.requests_per_second));
        let text = render(&view, &rows, &silent, Paint::stdout());
        // To the beginning of the screen, and clear what was there (ECMA-48 CUP, ED).
        let clear = if terminal { "\x1b[H\x1b[J" } else { "" };
        show(&format!(
            "{clear}{text}{}",
            if terminal { "" } else { "\n" }
        ));
        before = now;
    }
}

/// What each row's proxies have counted between two times, and who did not answer.
fn rows(
    view: &View,
    before: &[Reading],
    now: &[Reading],
    shows: impl Fn(&str) -> bool,
) -> (Vec<Row>, Vec<String>) {
    let mut tallies: BTreeMap<(String, String), (Tally, f64, usize)> = BTreeMap::new();
    let mut silent = Vec::new();
    for reading in now {
        let pod = &reading.pod;
        let samples = match &reading.samples {
            Ok(samples) => samples,
            Err(error) => {
                silent.push(format!("{}: {error}", pod.workload()));
                continue;
            }
        };
        // A pod that has just come has counted from nothing.
        let known = before
            .iter()
            .find(|old| old.pod.workload() == pod.workload());
        let Some((old, Ok(was))) = known.map(|old| (old, &old.samples)) else {
            continue;
        };
        let seconds = (reading.at - old.at).as_secs_f64();
        let own = match view.by {
            By::Owner => Some(pod.owner.clone()),
            By::Pod => Some(pod.name.clone()),
            By::Service => None,
        };
        if let Some(name) = &own {
            let key = (pod.namespace.clone(), name.clone());
            let (_, time, pods) = tallies.entry(key).or_default();
            *pods += 1;
            *time = seconds;
        }
        // The row that a series belongs to.
        let key = |series: &scrape::Series| match &own {
            Some(name) => {
                let retries = series.name == "weft_retries_total";
                let inbound = series.label("direction") == "inbound";
                (retries || inbound).then(|| (pod.namespace.clone(), name.clone()))
            }
            None => {
                let service = series.label("destination_service");
                let namespace = series.label("destination_namespace");
                let outbound = series.label("direction") != "inbound";
                (outbound && !service.is_empty())
                    .then(|| (namespace.to_owned(), service.to_owned()))
            }
        };
        for (series, grown) in scrape::growth(was, samples) {
            if let Some(key) = key(series) {
                let (tally, time, _) = tallies.entry(key).or_default();
                *time = seconds;
                tally.count(series, grown);
                tally.gauge(series, samples[series]);
            }
        }
    }
    let wanted = |name: &str| match &view.only {
        None => true,
        Some(target) => match target.kind {
            Kind::Owner(_) => target.to_string() == name,
            _ => target.name == name,
        },
    };
    let rows = tallies
        .into_iter()
        .filter(|((namespace, name), _)| shows(namespace) && wanted(name))
        .map(|((namespace, name), (tally, seconds, pods))| Row {
            namespace,
            name,
            pods,
            requests_per_second: tally.requests / seconds,
            success: tally.success(),
            p50_seconds: tally.quantile(0.5),
            p99_seconds: tally.quantile(0.99),
            mtls: tally.mtls_share(),
            retries_per_second: tally.retries / seconds,
            requests_in_flight: tally.in_flight,
            connections: tally.connections,
        });
    (rows.collect(), silent)
}

fn render(view: &View, rows: &[Row], silent: &[String], paint: Paint) -> String {
    let name = match view.by {
        By::Owner => "WORKLOAD",
        By::Pod => "POD",
        By::Service => "SERVICE",
    };
    let dash = || Cell::new(Tone::Dim, "-");
    let cells = |row: &Row| {
        let mut cells = vec![
            Cell::from(row.namespace.as_str()),
            Cell::from(row.name.as_str()),
        ];
        if view.by == By::Owner {
            cells.push(Cell::from(row.pods.to_string()));
        }
        let rate = |rate: f64| match rate {
            0.0 => Cell::new(Tone::Dim, "0"),
            rate if rate < 10.0 => Cell::from(format!("{rate:.1}")),
            rate => Cell::from(format!("{rate:.0}")),
        };
        let time = |time: Option<f64>| time.map_or_else(dash, |time| Cell::from(latency(time)));
        cells.extend([
            rate(row.requests_per_second),
            row.success.map_or_else(dash, |success| {
                let tone = match success {
                    99.9.. => Tone::Good,
                    95.0.. => Tone::Warning,
                    _ => Tone::Bad,
                };
                // Never rounded up to a whole that it is not.
                Cell::new(tone, format!("{:.1} %", (success * 10.0).floor() / 10.0))
            }),
            time(row.p50_seconds),
            time(row.p99_seconds),
            row.mtls.map_or_else(dash, |share| {
                let tone = if share < 100.0 {
                    Tone::Warning
                } else {
                    Tone::Good
                };
                Cell::new(tone, format!("{:.0} %", share.floor()))
            }),
            rate(row.retries_per_second),
            Cell::from(format!("{:.0}", row.requests_in_flight)),
            Cell::from(format!("{:.0}", row.connections)),
        ]);
        cells
    };
    let mut headings = vec!["NAMESPACE", name];
    if view.by == By::Owner {
        headings.push("PODS");
    }
    headings.extend([
        "REQ/S",
        "SUCCESS",
        "P50",
        "P99",
        "MTLS",
        "RETRIES/S",
        "RUNNING",
        "TCP",
    ]);
    let mut out = if rows.is_empty() {
        "No proxy has counted anything here.\n".to_owned()
    } else {
        let rows: Vec<Vec<Cell>> = rows.iter().map(cells).collect();
        table(&headings, &rows, paint)
    };
    for line in silent {
        out.push_str(&paint.paint(Tone::Bad, &format!("no answer from {line}")));
        out.push('\n');
    }
    out
}

/// A latency, finer than [`span`] below a second.
fn latency(seconds: f64) -> String {
    match seconds * 1e3 {
        ms if ms < 10.0 => format!("{ms:.2} ms"),
        ms if ms < 1000.0 => format!("{ms:.0} ms"),
        _ => span(seconds),
    }
}

#[cfg(test)]
mod tests;
