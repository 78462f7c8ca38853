//! Endpoints of a Service that somebody else keeps.

use std::net::IpAddr;

use weft_api::proto::Health;

use super::Name;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointSlice {
    pub name: Name,
    /// Name of the Service, of the same namespace; empty when it names none.
    pub service: String,
    pub ports: Vec<SlicePort>,
    pub endpoints: Vec<SliceEndpoint>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// Name of the Service port.
    pub name: String,
    pub port: u16,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SliceEndpoint {
    pub addresses: Vec<IpAddr>,
    pub health: Health,
    pub zone: String,
    /// Name of the node it is on; empty when not known.
    pub node: String,
    /// Whose it is meant to be used by, when the slice says so.
    pub hints: Option<Box<Hints>>,
    /// Whose address it is, when the slice says so.
    pub workload: Option<WorkloadRef>,
}

/// By whom an endpoint is to be used (discovery.k8s.io/v1 EndpointHints).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    pub zones: Vec<String>,
    pub nodes: Vec<String>,
}

/// Which workload: one of the same name that came later is another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadRef {
    pub name: Name,
    /// Empty when not known.
    pub uid: String,
}
