//! What the proxies and the control plane say of themselves, gathered again and again.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::prometheus::{self, Sample};

/// One proxy's metrics at one moment, in the terms of the demo. Counters count from its start.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ProxyView {
    /// Requests and opaque connections sent to others of the mesh.
    pub sent: u64,
    /// Of those, over mutual TLS.
    pub sent_mtls: u64,
    pub retries: u64,
    pub limits_rejected: u64,
    pub plaintext_refused: u64,
    /// By service.
    pub ejections: BTreeMap<String, u64>,
    /// Endpoints by service and state ("ready", "ejected", …).
    pub endpoints: BTreeMap<String, BTreeMap<String, u64>>,
    /// Requests and connections sent, by service and workload.
    pub by_endpoint: BTreeMap<(String, String), u64>,
    /// Seconds since the Unix epoch; 0 when there is none.
    pub certificate_expires: f64,
}

fn whole(value: f64) -> u64 {
    value.max(0.0) as u64
}

impl ProxyView {
    /// Reads an exposition.
    pub fn read(text: &str) -> Self {
        let mut view = Self::default();
        for sample in prometheus::parse(text) {
            view.take(&sample);
        }
        view
    }

    fn take(&mut self, sample: &Sample) {
        let n = whole(sample.value);
        let service = sample.label("destination_service");
        match sample.name.as_str() {
            "weft_requests_total" if sample.label("direction") == "outbound" => {
                self.flow(sample, n);
            }
            "weft_tcp_connections_opened_total"
                if sample.label("direction") == "outbound"
                    && matches!(sample.label("protocol"), "tcp" | "tls") =>
            {
                self.flow(sample, n);
            }
            "weft_retries_total" => self.retries += n,
            "weft_limits_rejected_total" => self.limits_rejected += n,
            "weft_plaintext_refused_total" => self.plaintext_refused += n,
            "weft_outlier_ejections_total" => {
                *self.ejections.entry(service.to_owned()).or_default() += n;
            }
            "weft_endpoints" => {
                *self
                    .endpoints
                    .entry(service.to_owned())
                    .or_default()
                    .entry(sample.label("state").to_owned())
                    .or_default() += n;
            }
            "weft_certificate_expiry_seconds" => self.certificate_expires = sample.value,
            _ => {}
        }
    }

    fn flow(&mut self, sample: &Sample, n: u64) {
        let service = sample.label("destination_service");
        if service.is_empty() {
            // Not of the mesh: passed through.
            return;
        }
        self.sent += n;
        if sample.label("mtls") == "true" {
            self.sent_mtls += n;
        }
        let workload = sample.label("destination_workload");
        if !workload.is_empty() {
            let key = (service.to_owned(), workload.to_owned());
            *self.by_endpoint.entry(key).or_default() += n;
        }
    }

    /// Endpoints of a service that are ejected now.
    pub fn ejected(&self, service: &str) -> u64 {
        let states = self.endpoints.get(service);
        states
            .and_then(|s| s.get("ejected"))
            .copied()
            .unwrap_or_default()
    }

    /// What was sent to one endpoint of a service.
    pub fn sent_to(&self, service: &str, workload: &str) -> u64 {
        let key = (service.to_owned(), workload.to_owned());
        self.by_endpoint.get(&key).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exposition_in_the_demos_terms() {
        let view = ProxyView::read(
            r#"
weft_requests_total{direction="outbound",destination_service="catalog",destination_workload="catalog-1",protocol="http1",mtls="true",response_class="2xx"} 100
weft_requests_total{direction="outbound",destination_service="catalog",destination_workload="catalog-1",protocol="http1",mtls="true",response_class="5xx"} 5
weft_requests_total{direction="outbound",destination_service="catalog",destination_workload="catalog-2",protocol="http1",mtls="false",response_class="2xx"} 10
weft_requests_total{direction="inbound",destination_service="front",destination_workload="front-1",protocol="http1",mtls="true",response_class="2xx"} 7
weft_tcp_connections_opened_total{direction="outbound",destination_service="ledger",destination_workload="ledger-1",protocol="tcp",mtls="true"} 3
weft_tcp_connections_opened_total{direction="outbound",destination_service="catalog",destination_workload="catalog-1",protocol="http1",mtls="true"} 9
weft_tcp_connections_opened_total{direction="outbound",protocol="tcp",mtls="false"} 9
weft_retries_total{reason="status",destination_service="catalog"} 4
weft_retries_total{reason="reset",destination_service="pricing"} 2
weft_outlier_ejections_total{destination_service="catalog"} 1
weft_endpoints{destination_service="catalog",state="ready"} 2
weft_endpoints{destination_service="catalog",state="ejected"} 1
weft_certificate_expiry_seconds 1700000000
"#,
        );
        assert_eq!((view.sent, view.sent_mtls, view.retries), (118, 108, 6));
        assert_eq!(view.sent_to("catalog", "catalog-1"), 105);
        assert_eq!(view.sent_to("ledger", "ledger-1"), 3);
        assert_eq!(view.ejected("catalog"), 1);
        assert_eq!(view.ejected("ledger"), 0);
        assert_eq!(view.ejections["catalog"], 1);
        assert_eq!(view.certificate_expires, 1.7e9);
    }
}
