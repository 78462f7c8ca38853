//! Misbehaviour on order, over a Unix socket, which reaches into any network namespace and is not
//! captured. One order a line, each answered with `ok` or `error: …`:
//!
//! - `latency 250`: every request takes 250 ms longer;
//! - `fail 500 30`: 30 percent of the requests are answered 500 (gRPC: INTERNAL; TCP: closed);
//! - `well`: as it should be.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

/// How a process misbehaves now.
#[derive(Debug, Default)]
pub struct Knobs {
    latency_ms: AtomicU64,
    status: AtomicU32,
    /// 0-100.
    percent: AtomicU32,
    requests: AtomicU64,
}

/// One order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Latency { ms: u64 },
    Fail { status: u16, percent: u32 },
    Well,
}

impl std::str::FromStr for Order {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, Self::Err> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let order = match words[..] {
            ["latency", ms] => ms.parse().ok().map(|ms| Self::Latency { ms }),
            ["fail", status, percent] => match (status.parse(), percent.parse()) {
                (Ok(status @ 400..=599), Ok(percent @ 0..=100)) => {
                    Some(Self::Fail { status, percent })
                }
                _ => None,
            },
            ["well"] => Some(Self::Well),
            _ => None,
        };
        order.ok_or_else(|| {
            format!("'{line}' is not 'latency MILLISECONDS', 'fail STATUS PERCENT' or 'well'")
        })
    }
}

impl std::fmt::Display for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Latency { ms } => write!(f, "latency {ms}"),
            Self::Fail { status, percent } => write!(f, "fail {status} {percent}"),
            Self::Well => write!(f, "well"),
        }
    }
}

impl Knobs {
    /// Takes an order.
    pub fn apply(&self, order: Order) {
        match order {
            Order::Latency { ms } => self.latency_ms.store(ms, Ordering::Relaxed),
            Order::Fail { status, percent } => {
                self.status.store(u32::from(status), Ordering::Relaxed);
                self.percent.store(percent, Ordering::Relaxed);
            }
            Order::Well => {
                self.latency_ms.store(0, Ordering::Relaxed);
                self.percent.store(0, Ordering::Relaxed);
            }
        }
    }

    /// Called once per request: waits out the latency, and says the status to fail with, if any.
    pub async fn misbehave(&self) -> Option<u16> {
        let n = self.requests.fetch_add(1, Ordering::Relaxed);
        let latency = self.latency_ms.load(Ordering::Relaxed);
        if latency > 0 {
            tokio::time::sleep(Duration::from_millis(latency)).await;
        }
        let percent = u64::from(self.percent.load(Ordering::Relaxed));
        // Evenly spread rather than random: 30 percent of any run of requests.
        let fails = (n + 1) * percent / 100 > n * percent / 100;
        fails.then(|| u16::try_from(self.status.load(Ordering::Relaxed)).unwrap_or(500))
    }

    /// Takes orders from the socket at `path`, made anew, for as long as the process lives.
    pub fn listen(self: &Arc<Self>, path: &Path) -> anyhow::Result<()> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        let listener = UnixListener::bind(path)
            .with_context(|| format!("cannot listen on {}", path.display()))?;
        let knobs = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(take_orders(knobs.clone(), stream));
            }
        });
        Ok(())
    }
}

async fn take_orders(knobs: Arc<Knobs>, mut stream: UnixStream) {
    let (read, mut write) = stream.split();
    let mut lines = BufReader::new(read).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let answer = match line.parse() {
            Ok(order) => {
                knobs.apply(order);
                "ok\n".to_owned()
            }
            Err(e) => format!("error: {e}\n"),
        };
        if write.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// Gives an order to the application whose socket is at `path`.
pub async fn order(path: &Path, order: Order) -> anyhow::Result<()> {
    let mut stream = UnixStream::connect(path)
        .await
        .with_context(|| format!("cannot reach the application at {}", path.display()))?;
    stream.write_all(format!("{order}\n").as_bytes()).await?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).await?;
    anyhow::ensure!(answer.trim() == "ok", "the application said: {answer}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_round_trip_and_nonsense_is_refused() {
        for order in [
            Order::Latency { ms: 250 },
            Order::Fail {
                status: 500,
                percent: 30,
            },
            Order::Well,
        ] {
            assert_eq!(order.to_string().parse(), Ok(order));
        }
        for bad in [
            "",
            "latency",
            "latency x",
            "fail 200 10",
            "fail 500 101",
            "wel",
        ] {
            assert!(bad.parse::<Order>().is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_share_of_the_requests_fails() {
        let knobs = Knobs::default();
        knobs.apply(Order::Fail {
            status: 503,
            percent: 30,
        });
        let mut failed = 0;
        for _ in 0..100 {
            failed += u32::from(knobs.misbehave().await == Some(503));
        }
        assert_eq!(failed, 30);
        knobs.apply(Order::Well);
        for _ in 0..100 {
            assert_eq!(knobs.misbehave().await, None);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn latency_is_waited_out() {
        let knobs = Knobs::default();
        knobs.apply(Order::Latency { ms: 250 });
        let start = tokio::time::Instant::now();
        knobs.misbehave().await;
        assert_eq!(start.elapsed(), Duration::from_millis(250));
    }

    #[tokio::test]
    async fn orders_arrive_over_the_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("knobs.sock");
        let knobs = Arc::new(Knobs::default());
        knobs.listen(&path).unwrap();
        order(
            &path,
            Order::Fail {
                status: 500,
                percent: 100,
            },
        )
        .await
        .unwrap();
        assert_eq!(knobs.misbehave().await, Some(500));
    }
}
