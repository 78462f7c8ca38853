//! Model -> the tables a proxy needs. Pure functions: no I/O, no clock, no state.
//!
//! A resource is compiled when a proxy asks for it and again when something it may depend on has
//! changed ([`crate::model::Dirty`] says what). The result carries its version, a hash of its
//! content, so that what turned out the same is never sent again.
//!
//! - [`destination`]: what "10.96.0.15:80" or "cart.shop:80" is.
//! - [`endpoints`]: where a Service port, or a workload addressed directly, is reached.
//! - [`external`]: services outside the mesh.
//! - [`workload`]: what a proxy needs to know about the workload it stands beside; [`mod@inbound`]: what it
//!   makes of that, port by port, for people.
//! - [`routes`]: which routes of the Gateway API apply, in which order; [`mod@status`]: what is said of
//!   them in return.
//! - [`session`]: who stays with the endpoint it has.
//! - [`policy`]: the most specific policy wins, field by field; [`policy_status`]: which are used;
//!   [`said`]: what is said of any object in return; [`provenance`]: which policy a field comes from;
//!   [`resilience`]: faults, and what a destination takes no more of.
//! - [`health`]: how endpoints are asked whether they are well.
//! - [`findings`]: what in the model cannot work, as sentences.

mod connection;
mod destination;
mod endpoints;
mod external;
mod findings;
mod health;
mod inbound;
mod policy;
mod policy_status;
mod provenance;
mod resilience;
mod routes;
mod said;
mod session;
mod status;
mod version;
mod workload;

use std::collections::{BTreeMap, BTreeSet};

use weft_api::proto::{Endpoints, ResourceKey, ResourceKind, Trust, resource::Body};

pub use destination::without_routes;
pub(crate) use endpoints::EVERYWHERE;
pub use findings::{Problem, problems};
pub use inbound::{Inbound, OfService, inbound};
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

/// A resource as proxies see it: nearly always one thing for all.
#[derive(Clone, Debug, PartialEq)]
pub struct Variants<C = Compiled> {
    pub common: C,
    /// What proxies of these audiences see instead.
    pub special: BTreeMap<String, C>,
}

/// What a resource may depend on of the proxy that asks for it: for endpoints its node, else its
/// namespace.
pub fn audience<'a>(kind: ResourceKind, namespace: &'a str, node: &'a str) -> &'a str {
    match kind {
        ResourceKind::Endpoints => node,
        _ => namespace,
    }
}

/// A resource now, for everybody.
pub fn variants(world: &World, settings: &Settings, key: &ResourceKey, trust: &Trust) -> Variants {
    if key.kind() == ResourceKind::Endpoints
        && let Some(nodes) = endpoints::by_node(world, settings, &key.name)
    {
        // Put apart at once: their number may be that of the nodes, as of a DaemonSet.
        let compiled =
            |endpoints: Endpoints| Compiled::new(key.clone(), Some(Body::Endpoints(endpoints)));
        return Variants {
            common: compiled(nowhere()),
            special: nodes
                .into_iter()
                .map(|(node, endpoints)| (node, compiled(endpoints)))
                .collect(),
        };
    }
    let one = |client: &str| compile(world, settings, key, trust, client);
    Variants {
        common: one(""),
        special: special_clients(world, key)
            .into_iter()
            .map(|client| {
                let compiled = one(&client);
                (client, compiled)
            })
            .collect(),
    }
}

/// The body of a resource now, for proxies of an [`audience`]; `Absent` when there is no such thing.
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
        ResourceKind::Endpoints => match endpoints::by_node(world, settings, &key.name) {
            Some(mut nodes) => nodes.remove(client).or_else(|| Some(nowhere())),
            None => endpoints::endpoints(world, settings, &key.name),
        }
        .map(Body::Endpoints),
        ResourceKind::Workload => Name::parse(&key.name)
            .and_then(|name| workload::workload(world, settings, &name))
            .map(Body::Workload),
        ResourceKind::Trust if key.name == TRUST => Some(Body::Trust(trust.clone())),
        ResourceKind::Trust | ResourceKind::Unspecified => None,
    };
    Compiled::new(key.clone(), body)
}

/// What there is on a node without endpoints, of a Service that is for clients on the same node.
fn nowhere() -> Endpoints {
    Endpoints {
        endpoints: Vec::new(),
        node_local: true,
    }
}

/// Namespaces for whose proxies a destination is not what it is for everybody else; nearly always
/// none.
fn special_clients(world: &World, key: &ResourceKey) -> BTreeSet<String> {
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
mod endpoint_tests;
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
