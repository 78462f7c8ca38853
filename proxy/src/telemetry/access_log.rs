//! The access log: one JSON line a request or connection, on standard output.
//!
//! Workers send records through a bounded queue and never wait; the control thread turns them into
//! text and writes. What does not fit is dropped and counted (`weft_access_log_dropped_total`).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use weft_api::proto::AccessLog;

use super::labels::{Direction, FlowProtocol};
use super::metrics::Registry;
use super::names::Counter;

/// Lines that may wait for the writer: a tenth of a second at 40,000 requests a second.
pub const QUEUE: usize = 4_096;
/// Lines written at once at most.
const BATCH: usize = 256;

/// Whether a request that ended so is to be logged. A status of 0 (no response) is an error, and
/// so is a gRPC status other than OK.
#[inline]
pub fn wanted(mode: AccessLog, status: u16, grpc_status: Option<u32>, error: bool) -> bool {
    match mode {
        AccessLog::Off => false,
        AccessLog::All => true,
        AccessLog::Errors => {
            error || status >= 400 || status == 0 || grpc_status.is_some_and(|code| code != 0)
        }
    }
}

/// One line. What is empty or `None` is left out.
#[derive(Debug, Clone)]
pub struct AccessRecord {
    /// When the request began.
    pub time: SystemTime,
    pub direction: Direction,
    pub protocol: FlowProtocol,
    /// Empty for opaque connections, like the path.
    pub method: Box<str>,
    /// With the query, as the application sent it.
    pub path: Box<str>,
    pub authority: Box<str>,
    /// 0: no response.
    pub status: u16,
    pub grpc_status: Option<u32>,
    /// Code of an error the proxy made itself (the one in `Proxy-Status`).
    pub error: Option<Arc<str>>,
    pub duration: Duration,
    /// Until the head of the response.
    pub time_to_head: Option<Duration>,
    /// Bytes of the bodies (connections: all bytes) from the source, and to it.
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub source_address: Option<SocketAddr>,
    /// `namespace/name`, as are the ones below.
    pub source_workload: Arc<str>,
    pub destination_service: Arc<str>,
    pub destination_workload: Arc<str>,
    pub destination_address: Option<SocketAddr>,
    pub route: Arc<str>,
    pub mtls: bool,
    pub trace_id: Option<u128>,
    pub retries: u32,
}

impl AccessRecord {
    /// With nothing known but the way, the protocol and the time.
    pub fn new(direction: Direction, protocol: FlowProtocol, time: SystemTime) -> Self {
        let empty: Arc<str> = Arc::default();
        Self {
            time,
            direction,
            protocol,
            method: Box::default(),
            path: Box::default(),
            authority: Box::default(),
            status: 0,
            grpc_status: None,
            error: None,
            duration: Duration::ZERO,
            time_to_head: None,
            bytes_in: 0,
            bytes_out: 0,
            source_address: None,
            source_workload: empty.clone(),
            destination_service: empty.clone(),
            destination_workload: empty.clone(),
            destination_address: None,
            route: empty,
            mtls: false,
            trace_id: None,
            retries: 0,
        }
    }
}

impl AccessRecord {
    /// As one JSON object, without a line's end.
    pub fn write_json(&self, out: &mut Vec<u8>) {
        // Neither writing to memory nor text and numbers can fail.
        let _ = serde_json::to_writer(out, &Line::from(self));
    }
}

/// Where workers put their lines. Never blocks.
#[derive(Debug, Clone)]
pub struct AccessLogSink {
    queue: mpsc::Sender<Box<AccessRecord>>,
    registry: Arc<Registry>,
}

/// The writer's end of the queue.
#[derive(Debug)]
pub struct AccessLogSource {
    queue: mpsc::Receiver<Box<AccessRecord>>,
}

/// A queue of lines.
pub fn channel(registry: Arc<Registry>) -> (AccessLogSink, AccessLogSource) {
    let (send, receive) = mpsc::channel(QUEUE);
    (
        AccessLogSink {
            queue: send,
            registry,
        },
        AccessLogSource { queue: receive },
    )
}

impl AccessLogSink {
    pub fn send(&self, record: Box<AccessRecord>) {
        if self.queue.try_send(record).is_err() {
            self.registry.count(Counter::AccessLogDropped, &[], 1);
        }
    }
}

impl AccessLogSource {
    /// Writes until all sinks are gone; on the control thread, usually to `tokio::io::stdout()`.
    ///
    /// # Errors
    /// The first error of the writer; lines sent after that are dropped and counted.
    pub async fn run(mut self, mut out: impl AsyncWrite + Unpin) -> std::io::Result<()> {
        let mut records = Vec::with_capacity(BATCH);
        let mut text = Vec::with_capacity(BATCH * 128);
        while self.queue.recv_many(&mut records, BATCH).await > 0 {
            text.clear();
            for record in records.drain(..) {
                record.write_json(&mut text);
                text.push(b'\n');
            }
            out.write_all(&text).await?;
            out.flush().await?;
        }
        Ok(())
    }
}

/// An [`AccessRecord`] as it is spelled.
#[derive(Serialize)]
struct Line<'a> {
    time: String,
    direction: &'a str,
    protocol: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    method: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    path: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    authority: &'a str,
    #[serde(skip_serializing_if = "is_zero")]
    status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    grpc_status: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
    duration_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    time_to_head_ms: Option<f64>,
    bytes_in: u64,
    bytes_out: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    source_address: Option<SocketAddr>,
    #[serde(skip_serializing_if = "str::is_empty")]
    source_workload: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    destination_service: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    destination_workload: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    destination_address: Option<SocketAddr>,
    #[serde(skip_serializing_if = "str::is_empty")]
    route: &'a str,
    mtls: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<String>,
    retries: u32,
}

fn is_zero(status: &u16) -> bool {
    *status == 0
}

fn milliseconds(duration: Duration) -> f64 {
    // Microseconds are as fine as anybody reads.
    duration.as_micros() as f64 / 1_000.0
}

impl<'a> From<&'a AccessRecord> for Line<'a> {
    fn from(record: &'a AccessRecord) -> Self {
        Self {
            time: rfc3339(record.time),
            direction: record.direction.as_str(),
            protocol: record.protocol.as_str(),
            method: &record.method,
            path: &record.path,
            authority: &record.authority,
            status: record.status,
            grpc_status: record.grpc_status,
            error: record.error.as_deref(),
            duration_ms: milliseconds(record.duration),
            time_to_head_ms: record.time_to_head.map(milliseconds),
            bytes_in: record.bytes_in,
            bytes_out: record.bytes_out,
            source_address: record.source_address,
            source_workload: &record.source_workload,
            destination_service: &record.destination_service,
            destination_workload: &record.destination_workload,
            destination_address: record.destination_address,
            route: &record.route,
            mtls: record.mtls,
            trace_id: record.trace_id.map(|id| format!("{id:032x}")),
            retries: record.retries,
        }
    }
}

/// RFC 3339 in UTC with milliseconds. Times before 1970 count as 1970.
fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Days to civil date, in years that begin in March (Hinnant, "chrono-compatible low-level date
    // algorithms"); days since 0000-03-01.
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        second / 3_600,
        second / 60 % 60,
        second % 60,
        since.subsec_millis()
    )
}

#[cfg(test)]
mod tests;
