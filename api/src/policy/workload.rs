//! A process at an address, with what the mesh needs to know about it.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::meta::{Ignored, Metadata};

/// One process at an address: outside Kubernetes what a Pod is inside. Services select Workloads
/// of their namespace by `metadata.labels`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Workload {
    pub api_version: String,
    pub kind: String,
    pub metadata: Metadata,
    pub spec: WorkloadSpec,
    #[serde(default, skip_serializing)]
    #[doc(hidden)]
    pub status: Ignored,
}

fn default_service_account() -> String {
    "default".to_owned()
}

fn default_weight() -> u32 {
    1
}

fn default_true() -> bool {
    true
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WorkloadSpec {
    /// Addresses it is reached at, IPv4 or IPv6; at least one. The first is the one used in a
    /// Service's endpoints.
    pub addresses: Vec<IpAddr>,
    /// Service account: its identity is
    /// `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`. Default "default".
    #[serde(default = "default_service_account")]
    pub service_account: String,
    /// Zone it runs in; default empty (unknown).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub zone: String,
    /// Name of the machine it runs on, for Services that are for clients on the same one
    /// (`internalTrafficPolicy: Local`) or prefer it; default empty (unknown).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node: String,
    /// Ports it listens on. A Service's `targetPort` may use their names. May be empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<WorkloadPort>,
    /// Share of the traffic relative to the other endpoints; 0 takes none. Default 1, at most
    /// 10000.
    #[serde(default = "default_weight")]
    pub weight: u32,
    /// Whether it takes requests. Default `Ready`.
    #[serde(default)]
    pub health: Health,
    /// Whether a weft proxy stands before it, which takes mutual TLS. Default true. A workload
    /// with `false` is reached in plaintext.
    #[serde(default = "default_true")]
    pub sidecar: bool,
}

/// A port a workload listens on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WorkloadPort {
    /// Name, unique in the workload; optional. A prefix says the protocol when `appProtocol` does
    /// not ("http", "http-admin", "grpc-api", "tcp-raw").
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Port number, 1 to 65535.
    pub port: u16,
    /// What is spoken there, by the names Kubernetes uses in `appProtocol`: "http", "http2",
    /// "kubernetes.io/h2c", "grpc", "tcp", "tls", "https", "kubernetes.io/ws". Default: found
    /// out from the name's prefix, else from the first bytes of each connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app_protocol: Option<String>,
}

/// Whether a workload takes requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Health {
    /// Takes requests.
    #[default]
    Ready,
    /// Takes none now, and is not about to leave.
    NotReady,
    /// Leaving: no new requests, what runs is finished.
    Draining,
}
