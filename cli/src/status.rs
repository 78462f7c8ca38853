//! `weft status`: which proxies are connected, and what each has acknowledged.

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use serde::{Deserialize, Serialize};
use weft_api::names;

use crate::admin::{Admin, Error};
use crate::output::{Cell, Format, Paint, Tone, print_json, span, table};
use crate::{Bad, duration};

/// How often `--wait` asks.
const AGAIN: Duration = Duration::from_millis(250);

/// Flags of `weft status`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft status
  weft status --wait --timeout 30s       until every proxy has the latest tables
  weft status --control-plane-admin http://10.0.0.5:15014 --output json

The exit code is 1 when a proxy has refused something, or (with --wait) is still behind.")]
pub struct StatusArgs {
    /// Admin address of the control plane.
    #[arg(long, value_name = "URL", env = "WEFT_CONTROL_PLANE_ADMIN",
          default_value_t = format!("http://127.0.0.1:{}", names::CONTROL_ADMIN_PORT))]
    control_plane_admin: String,
    /// Wait until every connected proxy has acknowledged everything.
    #[arg(long)]
    wait: bool,
    /// How long to wait.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration, requires = "wait")]
    timeout: Duration,
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

/// What the control plane says at /status.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    pub proxies: Vec<Proxy>,
}

/// One connected proxy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Proxy {
    /// "namespace/name".
    pub workload: String,
    #[serde(default)]
    pub version: String,
    /// Seconds since the Unix epoch.
    #[serde(default)]
    pub certificate_expires: i64,
    #[serde(default)]
    pub resources: Vec<Resource>,
}

/// One table of a proxy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resource {
    pub kind: String,
    pub name: String,
    pub state: State,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum State {
    Acknowledged,
    /// Sent, not answered yet.
    Pending,
    Refused,
}

impl Proxy {
    fn count(&self, state: State) -> usize {
        self.resources.iter().filter(|r| r.state == state).count()
    }
}

impl Status {
    pub fn connected(&self) -> usize {
        self.proxies.len()
    }

    /// Proxies that have not answered everything yet.
    pub fn behind(&self) -> usize {
        let behind = |p: &&Proxy| p.count(State::Pending) > 0;
        self.proxies.iter().filter(behind).count()
    }

    /// Tables refused, of all proxies.
    pub fn refused(&self) -> usize {
        self.proxies.iter().map(|p| p.count(State::Refused)).sum()
    }
}

/// Asks a control plane.
pub async fn fetch(admin: &Admin) -> Result<Status, Error> {
    admin.json("/status").await
}

pub async fn run(args: StatusArgs) -> anyhow::Result<ExitCode> {
    let admin = Admin::new(&args.control_plane_admin)?;
    let mut status = fetch(&admin).await?;
    if args.wait {
        let deadline = tokio::time::Instant::now() + args.timeout;
        while status.behind() > 0 && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(AGAIN).await;
            status = fetch(&admin).await?;
        }
    }
    match args.output {
        Format::Json => print_json(&status)?,
        Format::Table => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            let now = now.unwrap_or_default().as_secs_f64();
            print!("{}", render(&status, now, Paint::stdout()));
        }
    }
    let bad = status.refused() > 0 || (args.wait && status.behind() > 0);
    Ok(if bad { Bad::exit() } else { ExitCode::SUCCESS })
}

/// For people; `now` in seconds since the Unix epoch.
fn render(status: &Status, now: f64, paint: Paint) -> String {
    if status.proxies.is_empty() {
        return "No proxy is connected.\n".to_owned();
    }
    let mut rows = Vec::new();
    let mut refusals = Vec::new();
    let mut proxies: Vec<&Proxy> = status.proxies.iter().collect();
    proxies.sort_by(|a, b| a.workload.cmp(&b.workload));
    for proxy in proxies {
        let (pending, refused) = (proxy.count(State::Pending), proxy.count(State::Refused));
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
                proxy.count(State::Acknowledged),
                proxy.resources.len()
            )),
            state,
        ]);
        for r in &proxy.resources {
            if r.state == State::Refused {
                refusals.push(format!(
                    "{} refused {} {}: {}",
                    proxy.workload,
                    r.kind,
                    r.name,
                    r.reason.as_deref().unwrap_or("no reason given")
                ));
            }
        }
    }
    let mut out = table(
        &[
            "WORKLOAD",
            "VERSION",
            "CERTIFICATE",
            "ACKNOWLEDGED",
            "STATE",
        ],
        &rows,
        paint,
    );
    for refusal in refusals {
        out.push_str(&paint.paint(Tone::Bad, &refusal));
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(state: State, reason: Option<&str>) -> Resource {
        Resource {
            kind: "Destination".to_owned(),
            name: "10.96.0.20:80".to_owned(),
            state,
            reason: reason.map(str::to_owned),
        }
    }

    #[test]
    fn the_table_says_who_is_behind_and_who_refused_what() {
        let proxy = |workload: &str, certificate_expires, resources| Proxy {
            workload: workload.to_owned(),
            version: "0.1.0".to_owned(),
            certificate_expires,
            resources,
        };
        let status = Status {
            proxies: vec![
                proxy(
                    "shop/front-1",
                    86_400,
                    vec![resource(State::Acknowledged, None); 3],
                ),
                proxy(
                    "shop/catalog-1",
                    5,
                    vec![
                        resource(State::Pending, None),
                        resource(State::Refused, Some("a weight is missing")),
                    ],
                ),
            ],
        };
        assert_eq!((status.behind(), status.refused()), (1, 1));
        assert_eq!(
            render(&status, 10.0, Paint::NEVER),
            "\
WORKLOAD        VERSION  CERTIFICATE  ACKNOWLEDGED  STATE
shop/catalog-1  0.1.0    expired      0 of 2        1 refused, 1 behind
shop/front-1    0.1.0    23 h 59 min  3 of 3        up to date
shop/catalog-1 refused Destination 10.96.0.20:80: a weight is missing
"
        );
    }
}
