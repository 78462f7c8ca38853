//! Model -> the tables a proxy needs. Pure functions: no I/O, no clock, no state.
//!
//! A resource is compiled when a proxy asks for it and again when something it may depend on has
//! changed ([`crate::model::Dirty`] says what). The result carries its version, a hash of its
//! content, so that what turned out the same is never sent again.
//!
//! - [`destination`]: what "10.96.0.15:80" or "cart.shop:80" is.
//! - [`endpoints`]: where a Service port, or a workload addressed directly, is reached.
//! - [`workload`]: what a proxy needs to know about the workload it stands beside.
//! - [`policy`]: the most specific policy wins, field by field.
//! - [`findings`]: what in the model cannot work, as sentences.

mod destination;
mod endpoints;
mod findings;
mod policy;
mod version;
mod workload;

use weft_api::proto::{ResourceKey, ResourceKind, Trust, resource::Body};

pub use findings::{Problem, problems};
pub use version::Compiled;

use crate::model::{Name, World};

/// What every compilation needs beside the model.
#[derive(Clone, Debug)]
pub struct Settings {
    pub trust_domain: String,
    /// Percent of the requests that are traced when no Telemetry says otherwise.
    pub sampling_percent: f64,
}

/// The body of a resource now; `Absent` when there is no such thing.
pub fn compile(world: &World, settings: &Settings, key: &ResourceKey, trust: &Trust) -> Compiled {
    let body = match key.kind() {
        ResourceKind::Destination => {
            destination::destination(world, &key.name).map(Body::Destination)
        }
        ResourceKind::Endpoints => {
            endpoints::endpoints(world, settings, &key.name).map(Body::Endpoints)
        }
        ResourceKind::Workload => Name::parse(&key.name)
            .and_then(|name| workload::workload(world, settings, &name))
            .map(Body::Workload),
        ResourceKind::Trust if key.name == TRUST => Some(Body::Trust(trust.clone())),
        ResourceKind::Trust | ResourceKind::Unspecified => None,
    };
    Compiled::new(key.clone(), body)
}

/// Name of the one Trust resource.
pub const TRUST: &str = "trust";

#[cfg(test)]
mod tests;
