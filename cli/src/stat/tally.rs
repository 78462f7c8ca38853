//! Sums of what several proxies have counted over a stretch of time.

use std::collections::BTreeMap;

use super::scrape::Series;

/// gRPC statuses that are the server's fault: UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL,
/// UNAVAILABLE, DATA_LOSS (OpenTelemetry's conventions for gRPC servers).
const GRPC_FAILURES: [&str; 6] = ["2", "4", "12", "13", "14", "15"];

/// The families that are read.
pub const FAMILIES: [&str; 5] = [
    "weft_requests_total",
    "weft_request_duration_seconds_bucket",
    "weft_requests_in_flight",
    "weft_tcp_connections_active",
    "weft_retries_total",
];

/// What was counted; a rate is this by the time it took.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tally {
    pub requests: f64,
    pub failed: f64,
    pub mtls: f64,
    pub retries: f64,
    /// Requests that run now.
    pub in_flight: f64,
    /// TCP connections open now.
    pub connections: f64,
    /// Requests by upper bound of their duration, milliseconds of a second ("le" × 1e6, so that it
    /// has an order); cumulative.
    buckets: BTreeMap<u64, f64>,
}

impl Tally {
    /// Adds one counter's growth.
    pub fn count(&mut self, series: &Series, grown: f64) {
        match &*series.name {
            "weft_requests_total" => {
                self.requests += grown;
                let class = series.label("response_class");
                let failed = matches!(class, "5xx" | "none")
                    || GRPC_FAILURES.contains(&series.label("grpc_status"));
                if failed {
                    self.failed += grown;
                }
                if series.label("mtls") == "true" {
                    self.mtls += grown;
                }
            }
            "weft_retries_total" => self.retries += grown,
            "weft_request_duration_seconds_bucket" => {
                let bound = match series.label("le") {
                    "+Inf" => u64::MAX,
                    bound => bound.parse::<f64>().map_or(u64::MAX, |s| (s * 1e6) as u64),
                };
                *self.buckets.entry(bound).or_default() += grown;
            }
            _ => {}
        }
    }

    /// Adds what a gauge says now.
    pub fn gauge(&mut self, series: &Series, value: f64) {
        match &*series.name {
            "weft_requests_in_flight" => self.in_flight += value,
            "weft_tcp_connections_active" => self.connections += value,
            _ => {}
        }
    }

    /// Share of requests that were answered well, percent; `None` without requests.
    pub fn success(&self) -> Option<f64> {
        (self.requests > 0.0).then(|| (self.requests - self.failed) * 100.0 / self.requests)
    }

    /// Share of requests that came or went by mutual TLS, percent.
    pub fn mtls_share(&self) -> Option<f64> {
        (self.requests > 0.0).then(|| self.mtls * 100.0 / self.requests)
    }

    /// The duration that this share (0 to 1) of the requests does not exceed, seconds: within a
    /// bucket they count as spread evenly, as in Prometheus' histogram_quantile.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let total = *self.buckets.get(&u64::MAX)?;
        if total <= 0.0 {
            return None;
        }
        let rank = share * total;
        let (mut lower, mut below) = (0.0, 0.0);
        for (bound, count) in &self.buckets {
            if *bound == u64::MAX {
                break;
            }
            let upper = *bound as f64 / 1e6;
            if *count >= rank {
                let within = (rank - below) / (count - below).max(f64::MIN_POSITIVE);
                return Some(lower + (upper - lower) * within.clamp(0.0, 1.0));
            }
            (lower, below) = (upper, *count);
        }
        // Beyond the last bound: no more than that is known.
        Some(lower)
    }
}

#[cfg(test)]
mod tests {
    use super::super::scrape::parse;
    use super::*;

    #[test]
    fn sums_shares_and_quantiles() {
        let text = "\
weft_requests_total{mtls=\"true\",response_class=\"2xx\",grpc_status=\"\"} 90
weft_requests_total{mtls=\"true\",response_class=\"2xx\",grpc_status=\"14\"} 3
weft_requests_total{mtls=\"true\",response_class=\"2xx\",grpc_status=\"5\"} 2
weft_requests_total{mtls=\"false\",response_class=\"5xx\",grpc_status=\"\"} 4
weft_requests_total{mtls=\"false\",response_class=\"none\",grpc_status=\"\"} 1
weft_request_duration_seconds_bucket{le=\"0.01\"} 50
weft_request_duration_seconds_bucket{le=\"0.1\"} 90
weft_request_duration_seconds_bucket{le=\"1\"} 100
weft_request_duration_seconds_bucket{le=\"+Inf\"} 100
weft_requests_in_flight{mtls=\"true\"} 2
weft_tcp_connections_active{mtls=\"true\"} 7
weft_retries_total{reason=\"reset\"} 5
";
        let mut tally = Tally::default();
        for (series, value) in parse(text, &FAMILIES) {
            tally.count(&series, value);
            tally.gauge(&series, value);
        }
        assert_eq!((tally.requests, tally.failed), (100.0, 8.0));
        assert_eq!(tally.success(), Some(92.0));
        assert_eq!(tally.mtls_share(), Some(95.0));
        assert_eq!(
            (tally.retries, tally.in_flight, tally.connections),
            (5.0, 2.0, 7.0)
        );
        let near = |share, expected: f64| {
            let found = tally.quantile(share).unwrap();
            assert!((found - expected).abs() < 1e-9, "{share}: {found}");
        };
        near(0.5, 0.01);
        near(0.7, 0.055);
        near(0.99, 0.91);
        assert_eq!(Tally::default().success(), None);
        assert_eq!(Tally::default().quantile(0.5), None);
    }
}
