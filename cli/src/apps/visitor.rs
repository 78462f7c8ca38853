//! Load at a fixed rate, whatever becomes of it: a request that is answered late does not hold up
//! the next one, and its latency counts from when it was due (no coordinated omission).
//!
//! Each request is reported on standard output as one JSON line ([`Report`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use bytes::Bytes;
use clap::Args;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::sync::{Semaphore, mpsc};

use super::http::HttpClient;
use super::{http as web, terminated};

/// Requests that run at once; others wait their turn, and their latency counts from when they were
/// due. A slow answer thus costs time, not ever more connections.
const MAX_IN_FLIGHT: usize = 64;
/// What a visitor waits for at most.
const PATIENCE: Duration = Duration::from_secs(5);
/// Characters of a failure's text that are reported.
const MAX_SAID: usize = 400;

#[derive(Debug, Clone, Args)]
pub struct Visitor {
    /// Base URL of the front.
    #[arg(long, default_value = "http://front")]
    pub front: String,
    /// Requests a second.
    #[arg(long, default_value_t = 200)]
    pub rate: u32,
}

/// What became of one request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// When it was due, milliseconds since the Unix epoch.
    pub at: f64,
    /// From then to the end of the answer, milliseconds.
    pub took: f64,
    pub method: String,
    pub path: String,
    /// 0 when there was no answer.
    pub status: u16,
    /// What was said, when it failed.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub said: String,
}

impl Report {
    pub fn succeeded(&self) -> bool {
        (200..400).contains(&self.status)
    }
}

/// The `n`th request: mostly pages, some offers, some orders.
fn request(n: u64) -> (Method, String) {
    match n % 20 {
        7 | 17 => (Method::GET, "/offers".to_owned()),
        3 | 10 | 15 => (Method::POST, format!("/orders/{}", n % 89)),
        _ => (Method::GET, format!("/page/{}", n % 89)),
    }
}

pub async fn run(args: Visitor) -> anyhow::Result<()> {
    anyhow::ensure!(args.rate > 0, "a rate is at least one request a second");
    let (reports, mut written) = mpsc::unbounded_channel::<Report>();
    let writer = tokio::spawn(async move {
        let mut out = tokio::io::stdout();
        while let Some(report) = written.recv().await {
            let mut line = serde_json::to_vec(&report)?;
            line.push(b'\n');
            out.write_all(&line).await?;
            out.flush().await?;
        }
        anyhow::Ok(())
    });
    let load = drive(args, reports, terminated());
    load.await?;
    writer.await?
}

/// Sends requests until `stop` ends, then waits for those that run.
pub async fn drive(
    args: Visitor,
    reports: mpsc::UnboundedSender<Report>,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let client = web::client();
    let front: Arc<str> = args.front.trim_end_matches('/').into();
    front
        .parse::<hyper::Uri>()
        .with_context(|| format!("'{front}' is not a URL"))?;
    let room = Arc::new(Semaphore::new(MAX_IN_FLIGHT));
    let gone = Arc::new(AtomicBool::new(false));
    let mut due = tokio::time::interval(Duration::from_secs(1) / args.rate);
    let mut stop = std::pin::pin!(stop);
    let mut running = tokio::task::JoinSet::new();
    let mut n = 0;
    loop {
        let at = tokio::select! {
            biased;
            () = &mut stop => break,
            at = due.tick() => at,
        };
        while running.try_join_next().is_some() {}
        if gone.load(Ordering::Relaxed) {
            // Nobody reads the reports any more.
            break;
        }
        let late = at.elapsed();
        let at_wall = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .saturating_sub(late);
        let (method, path) = request(n);
        n += 1;
        let (client, front, room, reports, gone) = (
            client.clone(),
            front.clone(),
            room.clone(),
            reports.clone(),
            gone.clone(),
        );
        running.spawn(async move {
            let visiting = async {
                let _room = room.acquire().await?;
                visit(&client, &front, &method, &path).await
            };
            let outcome = tokio::time::timeout(PATIENCE, visiting)
                .await
                .unwrap_or_else(|_| Err(anyhow::anyhow!("no answer within five seconds")));
            let (status, said) = match outcome {
                Ok((status, said)) => (status, said),
                Err(e) => (0, format!("{e:#}")),
            };
            let report = Report {
                at: at_wall.as_secs_f64() * 1e3,
                took: at.elapsed().as_secs_f64() * 1e3,
                method: method.to_string(),
                path,
                status,
                said: said.chars().take(MAX_SAID).collect(),
            };
            if reports.send(report).is_err() {
                gone.store(true, Ordering::Relaxed);
            }
        });
    }
    // Each ends within its patience.
    while running.join_next().await.is_some() {}
    Ok(())
}

async fn visit(
    client: &HttpClient,
    front: &str,
    method: &Method,
    path: &str,
) -> anyhow::Result<(u16, String)> {
    let request = Request::builder()
        .method(method)
        .uri(format!("{front}{path}"))
        .header("user-agent", "weft-demo-visitor")
        .body(Full::<Bytes>::default())?;
    let response = client.request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    let said = if status.is_success() {
        String::new()
    } else {
        String::from_utf8_lossy(&body).trim().to_owned()
    };
    Ok((status.as_u16(), said))
}
