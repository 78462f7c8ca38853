//! Model -> the tables a proxy needs. Pure functions: no I/O, no clock, no state.
//!
//! A resource is compiled when a proxy asks for it and again when something it may depend on has
//! changed ([`crate::model::Dirty`] says what). The result carries its version, a hash of its
//! content, so that what turned out the same is never sent again.
//!
//! - [`destination`]: what "10.96.0.15:80" or "cart.shop:80" is.
//! - [`endpoints`]: where a Service port, or a workload addressed directly, is reached.
//! - [`external`]: services outside the mesh.
//! - [`workload`]: what a proxy needs to know about the workload it stands beside.
//! - [`routes`]: which routes of the Gateway API apply, in which order; [`mod@status`]: what is said of
//!   them in return.
//! - [`session`]: who stays with the endpoint it has.
//! - [`policy`]: the most specific policy wins, field by field; [`policy_status`]: which are used;
//!   [`said`]: what is said of any object in return; [`resilience`]: faults, and what a destination takes no more of.
//! - [`health`]: how endpoints are asked whether they are well.
//! - [`findings`]: what in the model cannot work, as sentences.

mod connection;
mod destination;
mod endpoints;
mod external;
mod findings;
mod health;
mod policy;
mod policy_status;
mod resilience;
mod routes;
mod said;
mod session;
mod status;
mod version;
mod workload;

use std::collections::BTreeSet;

use weft_api::proto::{ResourceKey, ResourceKind, Trust, resource::Body};

pub use findings::{Problem, problems};
pub use said::{status_of, with_status};
pub use status::{CONTROLLER, Condition, ObjectStatus, ParentStatus};
pub use version::Compiled;

use crate::model::{Name, World};

/// What every compilation needs beside the model.
#[derive(Clone, Debug)]
pub struct Settings {
    pub trust_domain: String,
    /// Percent of the requests that are traced when no Telemetry says otherwise.
    pub sampling_percent: f64,
}

/// The body of a resource now, for proxies of the namespace `client`; `Absent` when there is no such
/// thing.
pub fn compile(
    world: &World,
    settings: &Settings,
    key: &ResourceKey,
    trust: &Trust,
    client: &str,
) -> Compiled {
    let body = match key.kind() {
        ResourceKind::Destination => {
            destination::destination(world, &key.name, client).map(Body::Destination)
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

/// Namespaces for whose proxies a resource is not what it is for everybody else; nearly always none.
pub fn special_clients(world: &World, key: &ResourceKey) -> BTreeSet<String> {
    if key.kind() != ResourceKind::Destination {
        return BTreeSet::new();
    }
    match destination::service_of(world, &key.name) {
        Some((service, _)) => routes::consumer_namespaces(world, &service.name),
        None => destination::external_clients(world, &key.name),
    }
}

/// Name of the one Trust resource.
pub const TRUST: &str = "trust";

#[cfg(test)]
mod external_tests;
#[cfg(test)]
mod policy_tests;
#[cfg(test)]
mod route_tests;
#[cfg(test)]
mod said_tests;
#[cfg(test)]
mod tests;
