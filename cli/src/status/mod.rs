//! `weft status`: which proxies are connected, and what each has acknowledged.
//!
//! On a cluster every replica of the control plane is asked, each of which knows its own proxies, and
//! the pods are looked through for proxies that none of them knows. [`wait`] waits until a change is in
//! force everywhere.

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use serde::Deserialize;

use crate::admin::{Admin, Error};
use crate::kube::pods::ask_all;
use crate::kube::{Cluster, Replica};
use crate::output::{Cell, Format, Paint, Tone, print_json, show, span, table};
use crate::reach::{ControlPlaneArgs, Reach};
use crate::{Bad, duration};

mod wait;

/// How often `--wait` asks.
const AGAIN: Duration = Duration::from_millis(250);

/// Flags of `weft status`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft status                            every proxy of the cluster
  weft status -n shop --wait --timeout 30s
                                         until every proxy of shop has the latest tables
  weft status --wait-for httproute/cart -n shop
                                         until what I have just applied is in force
  weft status --control-plane http://10.0.0.5:15014 --output json

The exit code is 1 when a proxy has refused something, or is not connected, or (with --wait and
--wait-for) is still behind.")]
pub struct StatusArgs {
    #[command(flatten)]
    control_plane: ControlPlaneArgs,
    /// Wait until every connected proxy has acknowledged everything
    #[arg(long)]
    wait: bool,
    /// Wait until the proxies that use this object have it as it is now
    #[arg(long, value_name = "KIND/NAME", conflicts_with = "wait")]
    wait_for: Option<String>,
    /// How long to wait
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration)]
    timeout: Duration,
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

/// What the control plane says at /status; the part that is used here.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    pub version: String,
    pub proxies: Vec<Proxy>,
    pub findings: Vec<Finding>,
}

/// One connected proxy.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Proxy {
    /// "namespace/name".
    pub workload: String,
    pub version: String,
    /// Seconds since the Unix epoch; 0 when unknown.
    pub certificate_expires: i64,
    /// Tables that wait to be sent.
    pub waiting: usize,
    pub resources: Vec<Resource>,
}

/// One table as a proxy has it. Versions are hexadecimal; empty for none.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resource {
    pub kind: String,
    pub name: String,
    pub newest: String,
    pub acknowledged: String,
    /// Why the proxy refused the newest.
    #[serde(default)]
    pub refused: Option<String>,
}

/// Something wrong with the manifests.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Finding {
    #[serde(default)]
    pub file: Option<String>,
    #[serde(default)]
    pub line: Option<u32>,
    pub severity: String,
    #[serde(default)]
    pub object: Option<String>,
    pub message: String,
    #[serde(default)]
    pub help: String,
}

impl Proxy {
    pub fn refused(&self) -> impl Iterator<Item = (&Resource, &str)> {
        let reason = |r| -> Option<(&Resource, &str)> {
            let resource: &Resource = r;
            Some((resource, resource.refused.as_deref()?))
        };
        self.resources.iter().filter_map(reason)
    }

    /// Tables that were sent, or should be, and are not acknowledged.
    pub fn behind(&self) -> usize {
        let behind = |r: &&Resource| r.refused.is_none() && r.acknowledged != r.newest;
        self.waiting
            .max(self.resources.iter().filter(behind).count())
    }

    fn acknowledged(&self) -> usize {
        let newest = |r: &&Resource| r.acknowledged == r.newest;
        self.resources.iter().filter(newest).count()
    }
}

impl Status {
    pub fn connected(&self) -> usize {
        self.proxies.len()
    }

    /// Proxies that have not acknowledged everything yet.
    pub fn behind(&self) -> usize {
        self.proxies.iter().filter(|p| p.behind() > 0).count()
    }

    /// Tables refused, of all proxies.
    pub fn refused(&self) -> usize {
        self.proxies.iter().map(|p| p.refused().count()).sum()
    }
}

/// Asks a control plane.
pub async fn fetch(admin: &Admin) -> Result<Status, Error> {
    admin.json("/status").await
}

/// What is known of all proxies.
struct Everything {
    status: Status,
    /// As the control planes said it, with the names of their pods.
    raw: Vec<(String, serde_json::Value)>,
    /// Pods with a proxy that no control plane knows: "namespace/name".
    not_connected: Vec<String>,
}

async fn gather(reach: &Reach) -> anyhow::Result<Everything> {
    let cluster = match reach {
        Reach::Direct(admin) => {
            let raw: serde_json::Value = admin.json("/status").await?;
            return Ok(Everything {
                status: Status::deserialize(&raw)?,
                raw: vec![(String::new(), raw)],
                not_connected: Vec::new(),
            });
        }
        Reach::Cluster(cluster) => cluster,
    };
    let replicas = cluster.replicas().await?;
    let mut raw = Vec::new();
    let ask = async |replica: Replica| {
        let status: Result<serde_json::Value, _> = replica.admin.json("/status").await;
        status.map(|status| (replica.name, status))
    };
    for answer in ask_all(replicas, ask).await {
        raw.push(answer?);
    }
    let mut status = Status {
        version: String::new(),
        proxies: Vec::new(),
        findings: Vec::new(),
    };
    for (_, one) in &raw {
        let one = Status::deserialize(one)?;
        status.version = one.version;
        status.proxies.extend(one.proxies);
        status.findings.extend(one.findings);
    }
    status.findings.sort();
    status.findings.dedup();
    let not_connected = not_connected(cluster, &status).await;
    let scope = cluster.wide_scope();
    if let Some(namespace) = scope {
        let of = format!("{namespace}/");
        status
            .proxies
            .retain(|proxy| proxy.workload.starts_with(&of));
    }
    status.proxies.sort_by(|a, b| a.workload.cmp(&b.workload));
    Ok(Everything {
        status,
        raw,
        not_connected,
    })
}

/// Pods whose proxies no control plane knows; none when the user may not list pods.
async fn not_connected(cluster: &Cluster, status: &Status) -> Vec<String> {
    let pods = match cluster.meshed(cluster.wide_scope()).await {
        Ok(pods) => pods,
        Err(error) => {
            tracing::warn!("proxies that are not connected cannot be told: {error}");
            return Vec::new();
        }
    };
    let workloads = pods.iter().map(|pod| pod.workload());
    let connected = |name: &String| status.proxies.iter().any(|proxy| proxy.workload == *name);
    workloads.filter(|name| !connected(name)).collect()
}

impl Everything {
    fn json(self) -> serde_json::Value {
        let mut raw = self.raw;
        if let [(name, one)] = raw.as_mut_slice()
            && name.is_empty()
        {
            return one.take();
        }
        let replicas: Vec<serde_json::Value> = raw
            .into_iter()
            .map(|(name, mut status)| {
                status["name"] = name.into();
                status
            })
            .collect();
        serde_json::json!({ "replicas": replicas, "notConnected": self.not_connected })
    }
}

pub async fn run(args: StatusArgs) -> anyhow::Result<ExitCode> {
    let reach = args.control_plane.reach().await?;
    if let Some(object) = &args.wait_for {
        let namespace = args.control_plane.kube.namespace.as_deref();
        let object = (object.as_str(), namespace.unwrap_or("default"));
        return wait::run(&reach, object, args.timeout, args.output).await;
    }
    let mut known = gather(&reach).await?;
    let late = |known: &Everything| known.status.behind() + known.not_connected.len();
    if args.wait {
        let deadline = tokio::time::Instant::now() + args.timeout;
        while late(&known) > 0 && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(AGAIN).await;
            known = gather(&reach).await?;
        }
    }
    let bad = known.status.refused() > 0
        || !known.not_connected.is_empty()
        || (args.wait && late(&known) > 0);
    match args.output {
        Format::Json => print_json(&known.json())?,
        Format::Table => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            let now = now.unwrap_or_default().as_secs_f64();
            let text = render(&known.status, &known.not_connected, now, Paint::stdout());
            show(&text);
        }
    }
    Ok(if bad { Bad::exit() } else { ExitCode::SUCCESS })
}

/// For people; `now` in seconds since the Unix epoch.
fn render(status: &Status, not_connected: &[String], now: f64, paint: Paint) -> String {
    let mut rows = Vec::new();
    let mut refusals = Vec::new();
    let mut proxies: Vec<&Proxy> = status.proxies.iter().collect();
    proxies.sort_by(|a, b| a.workload.cmp(&b.workload));
    for proxy in proxies {
        let (pending, refused) = (proxy.behind(), proxy.refused().count());
        let state = match (pending, refused) {
            (0, 0) => Cell::new(Tone::Good, "up to date"),
            (_, 0) => Cell::new(Tone::Warning, format!("{pending} behind")),
            (0, _) => Cell::new(Tone::Bad, format!("{refused} refused")),
            _ => Cell::new(Tone::Bad, format!("{refused} refused, {pending} behind")),
        };
        let left = proxy.certificate_expires as f64 - now;
        let certificate = match proxy.certificate_expires {
            0 => Cell::new(Tone::Dim, "unknown"),
            _ if left <= 0.0 => Cell::new(Tone::Bad, "expired"),
            _ => Cell::from(span(left)),
        };
        rows.push(vec![
            Cell::from(proxy.workload.as_str()),
            Cell::from(proxy.version.as_str()),
            certificate,
            Cell::from(format!(
                "{} of {}",
                proxy.acknowledged(),
                proxy.resources.len()
            )),
            state,
        ]);
        for (table, reason) in proxy.refused() {
            refusals.push(format!(
                "{} refused {} {}: {reason}",
                proxy.workload, table.kind, table.name
            ));
        }
    }
    for workload in not_connected {
        let none = || Cell::new(Tone::Dim, "-");
        let state = Cell::new(Tone::Bad, "not connected");
        rows.push(vec![
            Cell::from(workload.as_str()),
            none(),
            none(),
            none(),
            state,
        ]);
    }
    let mut out = if rows.is_empty() {
        "No proxy is connected.\n".to_owned()
    } else {
        let headings = [
            "WORKLOAD",
            "VERSION",
            "CERTIFICATE",
            "ACKNOWLEDGED",
            "STATE",
        ];
        table(&headings, &rows, paint)
    };
    for refusal in refusals {
        out.push_str(&paint.paint(Tone::Bad, &refusal));
        out.push('\n');
    }
    for finding in &status.findings {
        let place = match (&finding.file, finding.line) {
            (Some(file), Some(line)) => format!("{file}:{line}: "),
            (Some(file), None) => format!("{file}: "),
            _ => finding
                .object
                .as_ref()
                .map_or(String::new(), |object| format!("{object}: ")),
        };
        let tone = match finding.severity.as_str() {
            "error" => Tone::Bad,
            _ => Tone::Warning,
        };
        let severity = paint.paint(tone, &finding.severity);
        out.push_str(&format!("{place}{severity}: {}\n", finding.message));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_who_is_behind_and_who_refused_what() {
        let table = |acknowledged: &str, refused: serde_json::Value| {
            serde_json::json!({
                "kind": "destination", "name": "10.96.0.20:80", "newest": "00000000000000aa",
                "acknowledged": acknowledged, "refused": refused,
            })
        };
        let newest = table("00000000000000aa", serde_json::Value::Null);
        let status: Status = serde_json::from_value(serde_json::json!({
            "version": "0.1.0", "ready": true, "certificateAuthority": {},
            "proxies": [
                {
                    "workload": "shop/front-1", "identity": "spiffe://x", "address": "10.77.0.8:4",
                    "adminAddress": "", "version": "0.1.0", "instance": "a", "connected": 0,
                    "certificateExpires": 86_400, "upToDate": true, "waiting": 0,
                    "resources": [newest, newest, newest],
                },
                {
                    "workload": "shop/catalog-1", "version": "0.1.0", "certificateExpires": 5,
                    "waiting": 0,
                    "resources": [
                        table("", serde_json::Value::Null),
                        table("", "a weight is missing".into()),
                    ],
                },
            ],
            "findings": [
                {"file": "shop.yaml", "line": 3, "severity": "error", "message": "no such Service"},
            ],
        }))
        .unwrap();
        assert_eq!((status.behind(), status.refused()), (1, 1));
        assert_eq!(
            render(&status, &["shop/late-1".to_owned()], 10.0, Paint::NEVER),
            "\
WORKLOAD        VERSION  CERTIFICATE  ACKNOWLEDGED  STATE
shop/catalog-1  0.1.0    expired      0 of 2        1 refused, 1 behind
shop/front-1    0.1.0    23 h 59 min  3 of 3        up to date
shop/late-1     -        -            -             not connected
shop/catalog-1 refused destination 10.96.0.20:80: a weight is missing
shop.yaml:3: error: no such Service
"
        );
    }
}
