//! Counters of the control plane, in the text format of Prometheus.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Counts up.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, number: u64) {
        self.0.fetch_add(number, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of the buckets, seconds.
const BUCKETS: [f64; 14] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// Durations by size.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [Counter; BUCKETS.len()],
    count: Counter,
    sum_micros: Counter,
}

impl Histogram {
    pub fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        if let Some(bucket) = BUCKETS.iter().position(|bound| seconds <= *bound) {
            self.buckets[bucket].add(1);
        }
        self.count.add(1);
        self.sum_micros
            .add(u64::try_from(duration.as_micros()).unwrap_or(0));
    }
}

/// Everything that is counted.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Resources handed to streams.
    pub pushes: Counter,
    pub nacks: Counter,
    pub streams_opened: Counter,
    pub streams_refused: Counter,
    pub certificates_issued: Counter,
    pub certificates_refused: Counter,
    /// Pods that got a sidecar.
    pub injections: Counter,
    /// Pods that the webhook was asked about and left as they are.
    pub injections_skipped: Counter,
    /// Pods that were refused because something in them is wrong.
    pub injections_refused: Counter,
    /// Questions that could not be answered.
    pub injections_failed: Counter,
    /// Tokens that the apiserver was to review and did not.
    pub token_reviews_failed: Counter,
    /// From the source's report to the stream.
    pub push: Histogram,
    /// From the source's report to the proxy's acknowledgement.
    pub acknowledged: Histogram,
    /// Compiling what one batch of changes touches.
    pub compile: Histogram,
}

/// What is looked up when metrics are asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Gauges {
    pub connected_proxies: u64,
    pub subscribed_resources: u64,
    pub bad_files: u64,
    /// Seconds until the signing root expires.
    pub root_expires_in: u64,
    /// Seconds until the control plane's own certificate expires.
    pub certificate_expires_in: u64,
    pub trusted_roots: u64,
    /// 1 for the replica that writes in the cluster.
    pub leader: u64,
    /// Resident memory, bytes.
    pub resident: u64,
}

impl Metrics {
    /// All metrics as text.
    pub fn render(&self, gauges: Gauges) -> String {
        let mut text = String::new();
        for (name, help, value) in [
            (
                "connected_proxies",
                "Proxies with an open stream.",
                gauges.connected_proxies,
            ),
            (
                "subscribed_resources",
                "Resources that at least one proxy asked for.",
                gauges.subscribed_resources,
            ),
            (
                "bad_files",
                "Files that are not used because something in them is wrong.",
                gauges.bad_files,
            ),
            (
                "root_certificate_expires_in_seconds",
                "Life left of the root that signs.",
                gauges.root_expires_in,
            ),
            (
                "certificate_expires_in_seconds",
                "Life left of the control plane's own certificate.",
                gauges.certificate_expires_in,
            ),
            (
                "trusted_roots",
                "Root certificates trusted now; more than one during a rotation.",
                gauges.trusted_roots,
            ),
            (
                "leader",
                "1 for the replica that leads: it alone writes in the cluster.",
                gauges.leader,
            ),
            (
                "resident_memory_bytes",
                "Resident memory of this process.",
                gauges.resident,
            ),
        ] {
            let _ = writeln!(
                text,
                "# HELP weft_control_plane_{name} {help}\n# TYPE weft_control_plane_{name} gauge\nweft_control_plane_{name} {value}"
            );
        }
        for (name, help, value) in [
            (
                "pushes_total",
                "Resources handed to proxies' streams.",
                &self.pushes,
            ),
            (
                "nacks_total",
                "Resources that proxies refused.",
                &self.nacks,
            ),
            (
                "streams_opened_total",
                "Discovery streams accepted.",
                &self.streams_opened,
            ),
            (
                "streams_refused_total",
                "Discovery streams refused.",
                &self.streams_refused,
            ),
            (
                "certificates_issued_total",
                "Workload certificates signed.",
                &self.certificates_issued,
            ),
            (
                "certificates_refused_total",
                "Signing requests refused.",
                &self.certificates_refused,
            ),
            (
                "injections_total",
                "Pods that got a sidecar.",
                &self.injections,
            ),
            (
                "injections_skipped_total",
                "Pods that the webhook was asked about and left as they are.",
                &self.injections_skipped,
            ),
            (
                "injections_refused_total",
                "Pods refused because of what they say about their sidecar.",
                &self.injections_refused,
            ),
            (
                "injections_failed_total",
                "Calls of the webhook that could not be answered.",
                &self.injections_failed,
            ),
            (
                "token_reviews_failed_total",
                "Tokens the apiserver was asked to review and could not.",
                &self.token_reviews_failed,
            ),
        ] {
            let _ = writeln!(
                text,
                "# HELP weft_control_plane_{name} {help}\n# TYPE weft_control_plane_{name} counter\nweft_control_plane_{name} {}",
                value.get()
            );
        }
        for (name, help, histogram) in [
            (
                "push_seconds",
                "From a change seen to its resource handed to a stream.",
                &self.push,
            ),
            (
                "acknowledge_seconds",
                "From a change seen to its acknowledgement by a proxy.",
                &self.acknowledged,
            ),
            (
                "compile_seconds",
                "Compiling what a batch of changes touches.",
                &self.compile,
            ),
        ] {
            let _ = writeln!(
                text,
                "# HELP weft_control_plane_{name} {help}\n# TYPE weft_control_plane_{name} histogram"
            );
            let mut below = 0;
            for (bound, bucket) in BUCKETS.iter().zip(&histogram.buckets) {
                below += bucket.get();
                let _ = writeln!(
                    text,
                    "weft_control_plane_{name}_bucket{{le=\"{bound}\"}} {below}"
                );
            }
            let count = histogram.count.get();
            let sum = Duration::from_micros(histogram.sum_micros.get()).as_secs_f64();
            let _ = writeln!(
                text,
                "weft_control_plane_{name}_bucket{{le=\"+Inf\"}} {count}\nweft_control_plane_{name}_sum {sum}\nweft_control_plane_{name}_count {count}"
            );
        }
        text
    }
}

/// Resident memory of this process, bytes; 0 where the kernel does not say.
pub fn resident_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024)
}
