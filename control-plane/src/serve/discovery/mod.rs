//! The discovery service: one stream per proxy, incremental and on demand.
//!
//! - [`hub`]: the model, what is compiled of it, and who asked for what. A change goes through
//!   [`Hub::apply`] to the streams that asked for what it touches, at once.
//! - [`stream`]: one proxy's stream: what it asked for, what is to be sent, what it acknowledged.
//!   Only the newest version of a resource waits to be sent, so a slow proxy costs no memory.
//! - [`service`]: the gRPC side.

mod hub;
mod service;
mod stream;

use std::sync::Arc;

use weft_api::proto::{ResourceKey, ResourceKind};

pub use hub::{Arrival, Carried, Hub, ProxyStatus, ResourceStatus, Trusting};
pub use service::DiscoveryService;

use crate::compile::TRUST;

/// A resource's key, ordered so that what others lead to comes first: a destination is sent after
/// its endpoints.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    rank: u8,
    /// Shared by all streams that ask for it.
    pub name: Arc<str>,
}

const KINDS: [ResourceKind; 4] = [
    ResourceKind::Trust,
    ResourceKind::Workload,
    ResourceKind::Endpoints,
    ResourceKind::Destination,
];

impl Key {
    pub fn new(kind: ResourceKind, name: impl Into<Arc<str>>) -> Option<Self> {
        let rank = KINDS.iter().position(|known| *known == kind)?;
        Some(Self {
            rank: u8::try_from(rank).ok()?,
            name: name.into(),
        })
    }

    fn of(kind: Kind, name: impl Into<Arc<str>>) -> Self {
        Self {
            rank: kind as u8,
            name: name.into(),
        }
    }

    fn trust() -> Self {
        Self::of(Kind::Trust, TRUST)
    }

    pub fn kind(&self) -> ResourceKind {
        KINDS[usize::from(self.rank)]
    }

    /// The kind's name, for people.
    fn kind_name(&self) -> &'static str {
        match self.kind() {
            ResourceKind::Destination => "Destination",
            ResourceKind::Endpoints => "Endpoints",
            ResourceKind::Workload => "Workload",
            ResourceKind::Trust => "Trust",
            ResourceKind::Unspecified => "",
        }
    }

    fn to_proto(&self) -> ResourceKey {
        ResourceKey {
            kind: self.kind().into(),
            name: self.name.to_string(),
        }
    }
}

/// Ranks of the kinds; the order of `KINDS`.
#[derive(Clone, Copy)]
enum Kind {
    Trust,
    Workload,
    Endpoints,
    Destination,
}

#[cfg(test)]
mod tests;
