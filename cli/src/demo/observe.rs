//! What a proxy says of itself at /stats.json, in the terms of the demo.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One proxy at one moment. Counters count from its start.
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
    pub ejections: u64,
    /// State ("ready", "ejected", …) by service and workload.
    pub endpoints: BTreeMap<String, BTreeMap<String, String>>,
    /// Requests and connections sent, by service and workload.
    pub by_endpoint: BTreeMap<String, BTreeMap<String, u64>>,
    /// Seconds since the Unix epoch; 0 when there is none.
    pub certificate_expires: u64,
}

/// The part of the document that is used here.
#[derive(Debug, Deserialize)]
struct Stats {
    destinations: Vec<Destination>,
    #[serde(default)]
    plaintext_refused: u64,
    certificate_expiry: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct Destination {
    direction: String,
    service: String,
    requests: u64,
    connections_opened: u64,
    /// Share (0-1) of the requests, or of the connections when there are no requests.
    mtls: Option<f64>,
    retries: u64,
    limits_rejected: u64,
    outlier_ejections: u64,
    workloads: BTreeMap<String, u64>,
    endpoints: Vec<Endpoint>,
}

#[derive(Debug, Deserialize)]
struct Endpoint {
    workload: String,
    state: String,
}

/// "shop/front-1" and "front-1" are the same to the demo.
fn short(workload: &str) -> &str {
    workload.rsplit('/').next().unwrap_or(workload)
}

impl ProxyView {
    /// Reads the document.
    pub fn read(json: &str) -> Result<Self, serde_json::Error> {
        let stats: Stats = serde_json::from_str(json)?;
        let mut view = Self {
            plaintext_refused: stats.plaintext_refused,
            certificate_expires: stats.certificate_expiry.unwrap_or_default(),
            ..Self::default()
        };
        for destination in &stats.destinations {
            // Without a service it is not of the mesh: passed through.
            if destination.direction == "outbound" && !destination.service.is_empty() {
                view.take(destination);
            }
        }
        Ok(view)
    }

    fn take(&mut self, destination: &Destination) {
        let service = &destination.service;
        let sent = match destination.requests {
            0 => destination.connections_opened,
            n => n,
        };
        self.sent += sent;
        self.sent_mtls += (sent as f64 * destination.mtls.unwrap_or_default()).round() as u64;
        self.retries += destination.retries;
        self.limits_rejected += destination.limits_rejected;
        self.ejections += destination.outlier_ejections;
        let counts = self.by_endpoint.entry(service.clone()).or_default();
        for (workload, n) in &destination.workloads {
            if !workload.is_empty() {
                *counts.entry(short(workload).to_owned()).or_default() += n;
            }
        }
        let states = self.endpoints.entry(service.clone()).or_default();
        for endpoint in &destination.endpoints {
            states.insert(short(&endpoint.workload).to_owned(), endpoint.state.clone());
        }
    }

    /// Whether an endpoint is ejected now.
    pub fn is_ejected(&self, service: &str, workload: &str) -> bool {
        let states = self.endpoints.get(service);
        states
            .and_then(|s| s.get(workload))
            .is_some_and(|state| state == "ejected")
    }

    /// What was sent to one endpoint of a service.
    pub fn sent_to(&self, service: &str, workload: &str) -> u64 {
        let counts = self.by_endpoint.get(service);
        counts
            .and_then(|c| c.get(workload))
            .copied()
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_in_the_demos_terms() {
        let destination = |direction: &str, service: &str, requests: u64, connections: u64| {
            serde_json::json!({
                "direction": direction, "namespace": "shop", "service": service, "port": 80,
                "protocols": ["http1"], "requests": requests, "connections_opened": connections,
                "mtls": 0.9, "retries": 2, "limits_rejected": 1, "outlier_ejections": 1,
                "workloads": {"catalog-1": 80, "catalog-2": 20},
                "endpoints": [
                    {"service": "catalog", "address": "10.77.0.5:8080", "workload": "shop/catalog-1", "state": "ready"},
                    {"service": "catalog", "address": "10.77.0.6:8080", "workload": "shop/catalog-2", "state": "ejected"},
                ],
            })
        };
        let document = serde_json::json!({
            "destinations": [
                destination("outbound", "catalog", 100, 7),
                destination("outbound", "", 1000, 7),
                destination("inbound", "front", 1000, 7),
                destination("outbound", "ledger", 0, 10),
            ],
            "plaintext_refused": 3,
            "certificate_expiry": 1_700_000_000,
            "added_later": {},
        });
        let view = ProxyView::read(&document.to_string()).unwrap();
        assert_eq!((view.sent, view.sent_mtls), (110, 99));
        assert_eq!((view.retries, view.limits_rejected), (4, 2));
        assert_eq!(view.sent_to("catalog", "catalog-2"), 20);
        assert_eq!(view.sent_to("pricing", "catalog-2"), 0);
        assert!(view.is_ejected("catalog", "catalog-2"));
        assert!(!view.is_ejected("catalog", "catalog-1"));
        assert_eq!(view.ejections, 2);
        assert_eq!(view.plaintext_refused, 3);
        assert_eq!(view.certificate_expires, 1_700_000_000);
        assert!(ProxyView::read("[]").is_err());
    }
}
