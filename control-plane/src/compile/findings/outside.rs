//! Services outside the mesh, and what may be called there.

use super::Problems;
use crate::compile::external::{Holder, holder_of_address, holder_of_host};
use crate::finding::Severity;
use crate::model::{Kind, World};

pub(super) fn find(world: &World, found: &mut Problems) {
    addresses(world, found);
    hosts(world, found);
    egress(world, found);
}

/// Addresses that are somebody else's, too.
fn addresses(world: &World, found: &mut Problems) {
    for (name, external) in &world.external {
        for network in external.spec.networks() {
            let ports = external.spec.ports.iter().map(|port| port.port);
            let mut held = ports.filter_map(|port| {
                Some((port, holder_of_address(world, external, network, port)?))
            });
            let Some((port, holder)) = held.next() else {
                continue;
            };
            let address = network.addr();
            let (message, help) = match holder {
                Holder::Service(service) => (
                    format!("{address}:{port} is Service {service}, which is used"),
                    "give it an address that is nobody else's",
                ),
                Holder::Workload(workload) => (
                    format!("{address} is Workload {workload}, which is used"),
                    "give it an address that is nobody else's, or call the workload by a Service",
                ),
                Holder::External(first) => (
                    format!(
                        "{network} is ExternalService {first}'s already, with the same port, which is used"
                    ),
                    "merge the two, or give each addresses of its own",
                ),
            };
            let at = (Kind::ExternalService, name);
            found.add(at, "spec.addresses", Severity::Error, message, help);
        }
    }
}

/// The same host and port twice in a namespace.
fn hosts(world: &World, found: &mut Problems) {
    for (name, external) in &world.external {
        if !external.spec.networks().is_empty() {
            continue;
        }
        for (index, host) in external.spec.hosts.iter().enumerate() {
            for port in external.spec.ports.iter().map(|port| port.port) {
                if let Some(first) = holder_of_host(world, external, host, port) {
                    found.add(
                        (Kind::ExternalService, name),
                        &format!("spec.hosts.{index}"),
                        Severity::Error,
                        format!(
                            "{host}:{port} is ExternalService {first}'s already, which is used"
                        ),
                        "name the host in one of them",
                    );
                }
            }
        }
    }
}

fn egress(world: &World, found: &mut Problems) {
    for (name, policy) in &world.egress {
        let winner = crate::model::in_namespace(&world.egress, &name.namespace)
            .min_by(|a, b| a.precedence().cmp(&b.precedence()));
        if let Some(winner) = winner.filter(|winner| winner.name != *name)
            && winner.spec != policy.spec
        {
            found.add(
                (Kind::EgressPolicy, name),
                "spec.mode",
                Severity::Error,
                format!(
                    "namespace {} has EgressPolicy {} already, which is used; this one is not",
                    name.namespace, winner.name
                ),
                "keep one of the two",
            );
        }
    }
}
