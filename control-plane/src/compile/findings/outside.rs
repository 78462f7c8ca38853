//! Services outside the mesh, and what may be called there.

use std::collections::BTreeMap;

use super::Problems;
use crate::finding::Severity;
use crate::model::{Kind, Name, World};

pub(super) fn find(world: &World, found: &mut Problems) {
    addresses(world, found);
    hosts(world, found);
    egress(world, found);
}

/// Addresses that are somebody else's, too.
fn addresses(world: &World, found: &mut Problems) {
    for (name, external) in &world.external {
        let at = (Kind::ExternalService, name);
        for network in external.spec.networks() {
            let single = network.prefix_len() == network.max_prefix_len();
            let address = network.addr();
            let mut services = world.vips.get(&address).filter_map(|of| world.service(of));
            let shared = services.find_map(|service| {
                let same = |port: &u16| external.spec.ports.iter().any(|p| p.port == *port);
                let port = service.ports.iter().map(|port| port.port).find(same)?;
                Some((&service.name, port))
            });
            if let Some((service, port)) = shared.filter(|_| single) {
                found.add(
                    at,
                    "spec.addresses",
                    Severity::Error,
                    format!("{address}:{port} is Service {service}, which is used"),
                    "give it an address that is nobody else's",
                );
            } else if let Some(workload) = world.workload_at(address).filter(|_| single) {
                found.add(
                    at,
                    "spec.addresses",
                    Severity::Error,
                    format!("{address} is Workload {}, which is used", workload.name),
                    "give it an address that is nobody else's, or call the workload by a Service",
                );
            }
            let first = world.external_at(address).find(|other| {
                let same_port = |port: u16| {
                    let ports = &external.spec.ports;
                    ports.iter().any(|own| own.port == port)
                };
                other.name.namespace == name.namespace
                    && other.spec.networks().contains(&network)
                    && other.spec.ports.iter().any(|port| same_port(port.port))
            });
            if let Some(first) = first.filter(|first| first.name != *name) {
                found.add(
                    at,
                    "spec.addresses",
                    Severity::Error,
                    format!("{network} is ExternalService {}'s already, with the same port, which is used", first.name),
                    "merge the two, or give each addresses of its own",
                );
            }
        }
    }
}

/// The same host and port twice in a namespace.
fn hosts(world: &World, found: &mut Problems) {
    let mut seen: BTreeMap<(&str, &str, u16), &Name> = BTreeMap::new();
    for (name, external) in &world.external {
        if !external.spec.networks().is_empty() {
            continue;
        }
        for (index, host) in external.spec.hosts.iter().enumerate() {
            for port in &external.spec.ports {
                let key = (name.namespace.as_str(), host.as_str(), port.port);
                let first = *seen.entry(key).or_insert(name);
                if first != name {
                    found.add(
                        (Kind::ExternalService, name),
                        &format!("spec.hosts.{index}"),
                        Severity::Error,
                        format!(
                            "{host}:{} is ExternalService {first}'s already, which is used",
                            port.port
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
