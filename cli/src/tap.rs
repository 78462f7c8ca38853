//! `weft tap`: live requests of a workload, as they end, as its proxies see them.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use serde::Deserialize;
use tokio::sync::mpsc;

use crate::admin::{self, Admin};
use crate::duration;
use crate::kube::target::Target;
use crate::output::{Format, Paint, Tone, count, show, span};
use crate::reach::{ProxyArgs, Reach};

/// Lines that wait to be shown.
const QUEUE: usize = 256;

/// Flags of `weft tap`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft tap deploy/front
  weft tap deploy/front --to cart --status 5xx
  weft tap pod/front-1 --path /api --method GET --max-per-second 10
  weft tap deploy/front --output json | jq .duration_ms

Shows what its proxies see: requests it sends (->) and takes in (<-), also gRPC, when they end. TCP
connections are not shown. Who may is decided by the cluster: it takes pods/portforward. A proxy
that nobody taps does nothing for it.")]
pub struct Tap {
    /// deploy/NAME, sts/NAME, ds/NAME, job/NAME, svc/NAME or pod/NAME; not with --proxy
    target: Option<Target>,
    /// How the path begins
    #[arg(long, value_name = "PREFIX")]
    path: Option<String>,
    #[arg(long)]
    method: Option<String>,
    /// 503, 5xx or error (no response, 400 and above, a gRPC status other than OK); several with
    /// commas
    #[arg(long)]
    status: Option<String>,
    /// Service or workload that is called, NAME or NAMESPACE/NAME
    #[arg(long, value_name = "NAME")]
    to: Option<String>,
    /// Workload that calls, NAME or NAMESPACE/NAME
    #[arg(long, value_name = "NAME")]
    from: Option<String>,
    /// Only what it sends (outbound) or takes in (inbound)
    #[arg(long, value_name = "WAY", value_parser = ["outbound", "inbound"])]
    direction: Option<String>,
    /// Requests a second that each proxy shows at most; the others are counted
    #[arg(long, value_name = "N", default_value_t = 50,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    max_per_second: u32,
    /// End after this long [default: when it is interrupted]
    #[arg(long = "for", value_name = "DURATION", value_parser = duration)]
    time: Option<Duration>,
    #[command(flatten)]
    proxy: ProxyArgs,
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

/// A line of /tap.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Line {
    LeftOut { left_out: u64 },
    Request(Box<Seen>),
}

/// A request; what is empty was not known.
#[derive(Debug, Deserialize)]
struct Seen {
    time: String,
    direction: String,
    protocol: String,
    #[serde(default)]
    method: String,
    #[serde(default)]
    path: String,
    #[serde(default)]
    authority: String,
    #[serde(default)]
    status: u16,
    #[serde(default)]
    grpc_status: Option<u32>,
    #[serde(default)]
    error: Option<String>,
    duration_ms: f64,
    #[serde(default)]
    source_workload: String,
    #[serde(default)]
    source_address: String,
    #[serde(default)]
    destination_service: String,
    #[serde(default)]
    destination_workload: String,
    mtls: bool,
    #[serde(default)]
    retries: u32,
}

impl Tap {
    /// The request to the proxies.
    fn path(&self) -> String {
        let rate = self.max_per_second.to_string();
        let mut out = format!("/tap?max_per_second={rate}");
        for (name, value) in [
            ("path", &self.path),
            ("method", &self.method),
            ("status", &self.status),
            ("to", &self.to),
            ("from", &self.from),
            ("direction", &self.direction),
        ] {
            if let Some(value) = value {
                out.push_str(&format!("&{name}={}", admin::encode(value)));
            }
        }
        out
    }

    /// The proxies, with the names of their pods.
    async fn proxies(&self) -> anyhow::Result<Vec<(String, Admin)>> {
        Ok(match (self.proxy.reach().await?, &self.target) {
            (Reach::Direct(admin), _) => vec![(String::new(), admin)],
            (Reach::Cluster(_), None) => bail!("say whose requests: weft tap deploy/NAME"),
            (Reach::Cluster(cluster), Some(target)) => {
                let pods = cluster.pods_of(target).await?;
                let proxy = |pod| (pod_name(pod), cluster.proxy(pod));
                pods.iter().map(proxy).collect()
            }
        })
    }
}

fn pod_name(pod: &crate::kube::pods::Meshed) -> String {
    pod.name.clone()
}

pub async fn run(args: Tap) -> anyhow::Result<ExitCode> {
    let proxies = args.proxies().await?;
    let path = args.path();
    let several = proxies.len() > 1;
    let (send, mut lines) = mpsc::channel::<(String, String)>(QUEUE);
    let mut taps = tokio::task::JoinSet::new();
    for (name, admin) in proxies {
        let (path, send) = (path.clone(), send.clone());
        taps.spawn(async move {
            let of = name.clone();
            let ended = admin.lines(&path, send, move |line| (of.clone(), line.to_owned()));
            (name, ended.await)
        });
    }
    drop(send);
    let end = async {
        match args.time {
            Some(time) => tokio::time::sleep(time).await,
            None => std::future::pending().await,
        }
    };
    let mut end = std::pin::pin!(end);
    let paint = Paint::stdout();
    loop {
        tokio::select! {
            Some((pod, line)) = lines.recv() => {
                print(&args, several.then_some(&*pod), &line, paint);
            }
            ended = taps.join_next() => {
                let Some(ended) = ended else { break };
                if let Ok((pod, ended)) = ended {
                    let of = || if pod.is_empty() { "the proxy".to_owned() } else { pod.clone() };
                    match ended {
                        Err(error) if taps.is_empty() => return Err(error.into()),
                        Err(error) => eprintln!("weft: {error}"),
                        Ok(()) => eprintln!("weft: {} has ended", of()),
                    }
                }
            }
            () = &mut end => break,
            _ = tokio::signal::ctrl_c() => break,
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn print(args: &Tap, pod: Option<&str>, line: &str, paint: Paint) {
    if args.output == Format::Json {
        let mut document: serde_json::Value = match serde_json::from_str(line) {
            Ok(document) => document,
            Err(_) => return,
        };
        if let Some(pod) = pod {
            document["pod"] = pod.into();
        }
        return show(&format!("{document}\n"));
    }
    match serde_json::from_str(line) {
        Ok(line) => show(&format!("{}\n", render(&line, pod, paint))),
        Err(error) => tracing::debug!("a line of a proxy cannot be read: {error}"),
    }
}

/// "12:04:31.120 front-1 -> 503 GET cart/api/items  cart-2  3.2 ms  mtls  2 retries  limit"
fn render(line: &Line, pod: Option<&str>, paint: Paint) -> String {
    let pod = pod.map_or(String::new(), |pod| format!("{pod} "));
    let seen = match line {
        Line::LeftOut { left_out } => {
            let n = usize::try_from(*left_out).unwrap_or(usize::MAX);
            let text = format!("{pod}{} more were not shown", count(n));
            return paint.paint(Tone::Dim, &text);
        }
        Line::Request(seen) => seen,
    };
    let clock = seen.time.get(11..23).unwrap_or(&seen.time);
    let failed_call = seen.grpc_status.is_some_and(|code| code != 0);
    let (status, tone) = match (seen.status, seen.grpc_status) {
        (0, _) => ("---".to_owned(), Tone::Bad),
        (status, Some(code)) if failed_call => (format!("{status}/{code}"), Tone::Bad),
        (status, _) => (
            status.to_string(),
            match status {
                500.. => Tone::Bad,
                400.. => Tone::Warning,
                _ => Tone::Good,
            },
        ),
    };
    let inbound = seen.direction == "inbound";
    let other = if inbound {
        let source = Some(&seen.source_workload).filter(|name| !name.is_empty());
        source.unwrap_or(&seen.source_address)
    } else {
        let workload = Some(&seen.destination_workload).filter(|name| !name.is_empty());
        workload.unwrap_or(&seen.destination_service)
    };
    let mut out = format!(
        "{} {pod}{} {} {} {}{}  {}  {}",
        paint.paint(Tone::Dim, clock),
        if inbound { "<-" } else { "->" },
        paint.paint(tone, &status),
        seen.method,
        seen.authority,
        seen.path,
        other,
        span(seen.duration_ms / 1e3),
    );
    let mut add = |tone, text: &str| {
        out.push_str("  ");
        out.push_str(&paint.paint(tone, text));
    };
    if seen.protocol != "http1" {
        add(Tone::Plain, &seen.protocol);
    }
    match seen.mtls {
        true => add(Tone::Plain, "mtls"),
        false => add(Tone::Warning, "plaintext"),
    }
    match seen.retries {
        0 => {}
        1 => add(Tone::Warning, "1 retry"),
        n => add(Tone::Warning, &format!("{n} retries")),
    }
    if let Some(error) = &seen.error {
        add(Tone::Bad, error);
    }
    out
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        tap: Tap,
    }

    #[test]
    fn filters_become_a_query() {
        let flags = "tap deploy/front --path /a&b --status 5xx,404 --max-per-second 7";
        let tap = Flags::parse_from(flags.split(' ')).tap;
        assert_eq!(
            tap.path(),
            "/tap?max_per_second=7&path=/a%26b&status=5xx%2C404"
        );
    }

    #[test]
    fn lines_say_who_what_and_how() {
        let shown = |value: serde_json::Value, pod| {
            let line: Line = serde_json::from_value(value).unwrap();
            render(&line, pod, Paint::NEVER)
        };
        let mut request = serde_json::json!({
            "time": "2026-11-21T12:04:31.120Z", "direction": "outbound", "protocol": "http1",
            "method": "GET", "path": "/items?x=1", "authority": "cart", "status": 503,
            "error": "http_response_timeout", "duration_ms": 1003.4, "bytes_in": 0, "bytes_out": 0,
            "destination_service": "shop/cart", "destination_workload": "shop/cart-2",
            "mtls": true, "retries": 2,
        });
        assert_eq!(
            shown(request.clone(), Some("front-1")),
            "12:04:31.120 front-1 -> 503 GET cart/items?x=1  shop/cart-2  1.0 s  mtls  2 retries  http_response_timeout"
        );
        request["direction"] = "inbound".into();
        request["source_address"] = "10.0.0.7:4123".into();
        request["mtls"] = false.into();
        request["retries"] = 0.into();
        request["error"] = serde_json::Value::Null;
        request["protocol"] = "grpc".into();
        request["status"] = 200.into();
        request["grpc_status"] = 14.into();
        assert_eq!(
            shown(request, None),
            "12:04:31.120 <- 200/14 GET cart/items?x=1  10.0.0.7:4123  1.0 s  grpc  plaintext"
        );
        assert_eq!(
            shown(serde_json::json!({"left_out": 1234}), None),
            "1,234 more were not shown"
        );
    }
}
