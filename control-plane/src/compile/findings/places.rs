//! Services that are for those near by, or prefer them, with endpoints of which nobody knows where
//! they are. In Kubernetes every pod has a node, and hints are written by Kubernetes itself, which
//! leaves them out when they would do harm: nothing there is to be said of.

use super::Problems;
use crate::finding::Severity;
use crate::model::{Distribution, Kind, Service, World};

pub(super) fn find(world: &World, found: &mut Problems) {
    let written = world.services.values().filter(|service| !service.sliced);
    for service in written.filter(|service| !service.headless) {
        let mut slices = world
            .slices_of
            .get(&service.name)
            .filter_map(|name| world.slices.get(name))
            .peekable();
        if slices.peek().is_none() {
            of_workloads(world, service, found);
            continue;
        }
        for slice in slices {
            let at = (Kind::EndpointSlice, &slice.name);
            for (index, endpoint) in slice.endpoints.iter().enumerate() {
                if service.node_local && endpoint.node.is_empty() {
                    found.add(
                        at,
                        &format!("endpoints.{index}"),
                        Severity::Warning,
                        format!("Service {} is for clients on the same node (internalTrafficPolicy: Local), and this endpoint has no nodeName: no client is sent to it", service.name),
                        "add nodeName, or leave internalTrafficPolicy out",
                    );
                }
                let hints = endpoint.hints.as_deref();
                let hinted = match service.distribution {
                    None => true,
                    Some(Distribution::SameZone) => hints.is_some_and(|h| !h.zones.is_empty()),
                    Some(Distribution::SameNode) => hints.is_some_and(|h| !h.nodes.is_empty()),
                };
                if !hinted {
                    found.add(
                        at,
                        &format!("endpoints.{index}"),
                        Severity::Warning,
                        format!("Service {} has a trafficDistribution, and this endpoint has no hints for it: while it is ready all endpoints are used alike", service.name),
                        "add hints (forZones; forNodes for PreferSameNode), as Kubernetes does where it writes the EndpointSlices",
                    );
                }
            }
        }
    }
}

fn of_workloads(world: &World, service: &Service, found: &mut Problems) {
    for workload in world.selected(service) {
        let at = (Kind::Workload, &workload.name);
        if service.node_local && workload.node.is_empty() {
            found.add(
                at,
                "spec",
                Severity::Warning,
                format!("Service {} is for clients on the same node (internalTrafficPolicy: Local), and Workload {} does not say on which it runs: no client is sent to it", service.name, workload.name),
                "add spec.node, or leave internalTrafficPolicy out",
            );
        }
        let missing = match service.distribution {
            Some(Distribution::SameZone) if world.zone_of(workload).is_empty() => "zone",
            Some(Distribution::SameNode) if workload.node.is_empty() => "node",
            _ => continue,
        };
        found.add(
            at,
            "spec",
            Severity::Warning,
            format!("Service {} has a trafficDistribution, and Workload {} does not say in which {missing} it is: while it is ready all endpoints are used alike", service.name, workload.name),
            format!("add spec.{missing}, or leave trafficDistribution out"),
        );
    }
}
