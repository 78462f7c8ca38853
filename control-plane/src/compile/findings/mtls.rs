//! Mutual TLS that is asked for where nobody can speak it, or for ports that are not there.

use std::collections::BTreeSet;

use weft_api::policy::MtlsMode;

use super::Problems;
use crate::compile::endpoints::target_port;
use crate::compile::workload::{display_name, is_strict};
use crate::finding::Severity;
use crate::model::{Kind, World};

/// The port that no workload has; what is asked about is the mode of all others.
const ANY_PORT: u16 = 0;

pub(super) fn find(world: &World, found: &mut Problems) {
    without_proxy(world, found);
    ports(world, found);
}

/// Of workloads alike the first.
fn without_proxy(world: &World, found: &mut Problems) {
    let mut said = BTreeSet::new();
    for workload in world
        .workloads
        .values()
        .filter(|workload| !workload.sidecar)
    {
        let name = &workload.name;
        if is_strict(world, workload, ANY_PORT)
            && said.insert((&name.namespace, display_name(workload)))
        {
            found.add(
                (Kind::Workload, name),
                "spec.sidecar",
                Severity::Warning,
                "mutual TLS is required of it (STRICT), but it has no proxy: what comes in the clear reaches it, and its callers send it in the clear".to_owned(),
                "give it a proxy (weft.dev/inject), or a PeerAuthentication of its own that says what is so",
            );
        }
    }
}

fn ports(world: &World, found: &mut Problems) {
    for (name, policy) in &world.peer_authentication {
        let Some(selector) = &policy.spec.selector else {
            continue;
        };
        let chosen: Vec<_> = world
            .workloads_in(&name.namespace)
            .filter(|workload| selector.matches(&workload.labels))
            .collect();
        for (number, mtls) in &policy.spec.port_level_mtls {
            if mtls.mode == MtlsMode::Unset || chosen.is_empty() {
                continue;
            }
            let has = chosen.iter().any(|workload| {
                let own = workload.ports.iter().any(|port| port.port == *number);
                let services = world.services_of(workload).into_iter();
                let mut ports = services.flat_map(|service| &service.ports);
                // A workload need not say which ports it has.
                own || ports.any(|port| target_port(workload, port) == Some(*number))
            });
            let all_say = chosen.iter().all(|workload| !workload.ports.is_empty());
            if !has && all_say {
                found.add(
                    (Kind::PeerAuthentication, name),
                    &format!("spec.portLevelMtls.{number}"),
                    Severity::Warning,
                    format!("no workload that it selects has port {number}"),
                    "write the workload's own port, not the Service's",
                );
            }
        }
    }
}
