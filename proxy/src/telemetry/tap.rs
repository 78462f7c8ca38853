//! Requests shown live, as they end, to whoever asks the admin port (`GET /tap`, `weft tap`).
//!
//! Without a listener a request costs one relaxed load ([`Taps::is_on`]). With one, the worker makes
//! the same record as for the access log, asks each listener's filter and rate, and puts what
//! passes into the listener's queue, without waiting: what a listener does not take is counted and
//! told to it. The text is made on the control thread.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::Stream;
use hyper::body::Frame;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use super::access_log::AccessRecord;
use super::labels::Direction;

/// Listeners at once; more are refused.
pub const MAX_TAPS: usize = 8;
/// Requests a second that a listener is shown when it says nothing.
pub const DEFAULT_RATE: u32 = 50;
/// Requests a second that a listener may ask for.
pub const MAX_RATE: u32 = 1_000;
/// Requests that wait for a listener.
const QUEUE: usize = 1_024;
/// How often a listener is told how many it was not shown; an empty line when it is none, so that
/// one who has gone is noticed.
const NEWS: Duration = Duration::from_secs(1);

/// Who listens.
#[derive(Debug, Default)]
pub struct Taps {
    listeners: AtomicUsize,
    list: ArcSwap<Vec<Arc<Tap>>>,
}

/// One listener, as workers see it.
#[derive(Debug)]
struct Tap {
    filter: Filter,
    rate: Rate,
    /// Passed the filter, but was too much.
    left_out: AtomicU64,
    queue: mpsc::Sender<Arc<AccessRecord>>,
}

impl Taps {
    /// Whether anybody listens.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.listeners.load(Ordering::Relaxed) > 0
    }

    /// Shows a request that has ended to those who want it.
    pub fn offer(&self, record: &AccessRecord) {
        let now = Instant::now();
        let mut shared: Option<Arc<AccessRecord>> = None;
        for tap in self.list.load().iter() {
            if !tap.filter.wants(record) {
                continue;
            }
            let taken = tap.rate.take(now)
                && tap
                    .queue
                    .try_send(
                        shared
                            .get_or_insert_with(|| Arc::new(record.clone()))
                            .clone(),
                    )
                    .is_ok();
            if !taken {
                tap.left_out.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// A new listener: lines of JSON, one for each request, `{"left_out":N}` for those there was no
    /// room for. Ends when it is dropped.
    ///
    /// # Errors
    /// There are [`MAX_TAPS`] already.
    pub fn listen(
        self: &Arc<Self>,
        filter: Filter,
        per_second: u32,
    ) -> Result<impl Stream<Item = Result<Frame<Bytes>, Infallible>> + Send + use<>, TooMany> {
        self.listeners
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
                (n < MAX_TAPS).then_some(n + 1)
            })
            .map_err(|_| TooMany)?;
        let (send, receive) = mpsc::channel(QUEUE);
        let tap = Arc::new(Tap {
            filter,
            rate: Rate::new(per_second),
            left_out: AtomicU64::new(0),
            queue: send,
        });
        self.list.rcu(|old| {
            let mut list = Vec::clone(old);
            list.push(tap.clone());
            list
        });
        let mut news = tokio::time::interval(NEWS);
        news.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let listener = Listener {
            taps: self.clone(),
            tap,
        };
        Ok(futures_util::stream::unfold(
            (listener, receive, news),
            async |(listener, mut receive, mut news)| {
                let mut text = Vec::new();
                tokio::select! {
                    biased;
                    record = receive.recv() => record?.write_json(&mut text),
                    _ = news.tick() => {
                        let left_out = listener.tap.left_out.swap(0, Ordering::Relaxed);
                        if left_out > 0 {
                            text.extend_from_slice(format!("{{\"left_out\":{left_out}}}").as_bytes());
                        }
                    }
                }
                text.push(b'\n');
                let frame = Frame::data(Bytes::from(text));
                Some((Ok(frame), (listener, receive, news)))
            },
        ))
    }
}

/// There is no room for another listener.
#[derive(Debug, thiserror::Error)]
#[error("{MAX_TAPS} listen already; end one of them first")]
pub struct TooMany;

/// Takes its tap off the list with itself.
struct Listener {
    taps: Arc<Taps>,
    tap: Arc<Tap>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.taps.list.rcu(|old| {
            let others = old.iter().filter(|tap| !Arc::ptr_eq(tap, &self.tap));
            others.cloned().collect::<Vec<_>>()
        });
        self.taps.listeners.fetch_sub(1, Ordering::Relaxed);
    }
}

/// So many in each second, first come first served; the same for all workers together.
#[derive(Debug)]
struct Rate {
    began: Instant,
    per_second: u32,
    /// The second since `began`, then how many in it.
    window: AtomicU64,
}

impl Rate {
    fn new(per_second: u32) -> Self {
        Self {
            began: Instant::now(),
            per_second,
            window: AtomicU64::new(0),
        }
    }

    fn take(&self, now: Instant) -> bool {
        let second = now.saturating_duration_since(self.began).as_secs();
        self.window
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |window| {
                let (of, count) = (window >> 32, window & 0xffff_ffff);
                match () {
                    // A worker that read the clock before another one counts with the other.
                    () if of >= second && count >= u64::from(self.per_second) => None,
                    () if of >= second => Some(window + 1),
                    () => Some(second << 32 | 1),
                }
            })
            .is_ok()
    }
}

/// Which requests are shown; what is not set shows all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    pub direction: Option<Direction>,
    /// In capitals.
    pub method: Option<String>,
    /// How the path begins.
    pub path: Option<String>,
    /// Any of them.
    pub status: Vec<StatusFilter>,
    /// Service or workload it goes to, with or without the namespace before a slash.
    pub to: Option<String>,
    /// Workload it comes from, in the same way.
    pub from: Option<String>,
}

/// Which endings are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatusFilter {
    Code(u16),
    /// "5xx" is 5.
    Class(u16),
    /// No response, a status of 400 or above, a gRPC status other than OK, or an error of the
    /// proxy's own.
    Error,
}

/// What is wrong with a filter.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidFilter {
    #[error("'{0}' is not a direction: write inbound or outbound")]
    Direction(String),
    #[error("'{0}' is not a status: write 503, 5xx or error, several with commas")]
    Status(String),
    #[error("'{0}' is not a rate: write a number of requests a second from 1 to {MAX_RATE}")]
    Rate(String),
    #[error(
        "there is no filter '{0}'; there are direction, method, path, status, to, from and \
         max_per_second"
    )]
    Unknown(String),
}

impl Filter {
    /// Reads the decoded parameters of a query; also the rate.
    ///
    /// # Errors
    /// One is not known, or its value cannot be read.
    pub fn read<'a>(
        parameters: impl IntoIterator<Item = (&'a str, String)>,
    ) -> Result<(Self, u32), InvalidFilter> {
        let mut filter = Self::default();
        let mut rate = DEFAULT_RATE;
        for (name, value) in parameters {
            match name {
                "direction" => {
                    filter.direction = Some(match &*value {
                        "inbound" => Direction::Inbound,
                        "outbound" => Direction::Outbound,
                        _ => return Err(InvalidFilter::Direction(value)),
                    });
                }
                "method" => filter.method = Some(value.to_ascii_uppercase()),
                "path" => filter.path = Some(value),
                "status" => filter.status = statuses(&value)?,
                "to" => filter.to = Some(value),
                "from" => filter.from = Some(value),
                "max_per_second" => {
                    rate = value
                        .parse()
                        .ok()
                        .filter(|rate| (1..=MAX_RATE).contains(rate))
                        .ok_or(InvalidFilter::Rate(value))?;
                }
                _ => return Err(InvalidFilter::Unknown(name.to_owned())),
            }
        }
        Ok((filter, rate))
    }

    fn wants(&self, record: &AccessRecord) -> bool {
        let holds = |status: &StatusFilter| match status {
            StatusFilter::Code(code) => record.status == *code,
            StatusFilter::Class(class) => record.status / 100 == *class,
            StatusFilter::Error => {
                record.error.is_some()
                    || record.status == 0
                    || record.status >= 400
                    || record.grpc_status.is_some_and(|code| code != 0)
            }
        };
        self.direction.is_none_or(|d| d == record.direction)
            && self.method.as_ref().is_none_or(|m| **m == *record.method)
            && self
                .path
                .as_ref()
                .is_none_or(|p| record.path.starts_with(&**p))
            && (self.status.is_empty() || self.status.iter().any(holds))
            && self.to.as_ref().is_none_or(|to| {
                is_named(to, &record.destination_service)
                    || is_named(to, &record.destination_workload)
            })
            && (self.from.as_ref()).is_none_or(|from| is_named(from, &record.source_workload))
    }
}

fn statuses(given: &str) -> Result<Vec<StatusFilter>, InvalidFilter> {
    let one = |text: &str| match text.as_bytes() {
        b"error" => Some(StatusFilter::Error),
        [class @ b'1'..=b'5', b'x' | b'X', b'x' | b'X'] => {
            Some(StatusFilter::Class(u16::from(class - b'0')))
        }
        [b'1'..=b'9', _, _] => text.parse().ok().map(StatusFilter::Code),
        _ => None,
    };
    given
        .split(',')
        .map(|text| one(text.trim()).ok_or_else(|| InvalidFilter::Status(text.to_owned())))
        .collect()
}

/// Whether `wanted`, "name" or "namespace/name", is `name`.
fn is_named(wanted: &str, name: &str) -> bool {
    wanted == name
        || name
            .rsplit_once('/')
            .is_some_and(|(_, last)| wanted == last)
}

#[cfg(test)]
mod tests;
