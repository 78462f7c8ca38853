//! Where a Service port, or a workload addressed directly, is reached.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use weft_api::identity::SpiffeId;
use weft_api::proto::{Endpoint, Endpoints, Health};

use super::Settings;
use super::workload::is_plaintext;
use crate::model::{
    EndpointSlice, Name, Service, ServicePort, SliceEndpoint, TargetPort, Workload, World,
};

/// Name of the Endpoints of a Service port.
pub(super) fn name_of(service: &Name, port: u16) -> String {
    format!("{service}:{port}")
}

/// Name of the Endpoints of a workload addressed directly.
pub(super) fn name_of_workload(workload: &Name, port: u16) -> String {
    format!("workload/{workload}:{port}")
}

/// Compiles `<namespace>/<service>:<port>` or `workload/<namespace>/<name>:<port>`; `None` when
/// there is no such Service port or workload.
pub(super) fn endpoints(world: &World, settings: &Settings, name: &str) -> Option<Endpoints> {
    let (owner, port) = name.rsplit_once(':')?;
    let port: u16 = port.parse().ok()?;
    if let Some(endpoints) = super::external::endpoints(world, owner, port) {
        return Some(endpoints);
    }
    if let Some(workload) = owner.strip_prefix("workload/") {
        let workload = world.workload(&Name::parse(workload)?)?;
        let mut endpoint = of_workload(
            world,
            settings,
            workload,
            *workload.addresses.first()?,
            port,
        );
        // Whoever asks for this very workload gets it, ready or not.
        endpoint.health = Health::Ready.into();
        return Some(Endpoints {
            endpoints: vec![endpoint],
        });
    }
    let service = world.service(&Name::parse(owner)?)?;
    let port = service.ports.iter().find(|known| known.port == port)?;
    Some(Endpoints {
        endpoints: of_port(world, settings, service, port),
    })
}

/// Endpoints of a Service port: those of its EndpointSlices when it has any, else the workloads
/// its selector chooses. In the order of their addresses.
pub(super) fn of_port(
    world: &World,
    settings: &Settings,
    service: &Service,
    port: &ServicePort,
) -> Vec<Endpoint> {
    let mut slices = world
        .slices_of
        .get(&service.name)
        .filter_map(|name| world.slices.get(name))
        .peekable();
    let mut found: Vec<(SocketAddr, Endpoint)> = if service.sliced || slices.peek().is_some() {
        of_slices(world, settings, port, slices)
    } else {
        world
            .selected(service)
            .filter_map(|workload| {
                let number = target_port(workload, port)?;
                let address = *workload.addresses.first()?;
                Some((
                    SocketAddr::new(address, number),
                    of_workload(world, settings, workload, address, number),
                ))
            })
            .collect()
    };
    if service.publish_not_ready {
        for (_, endpoint) in &mut found {
            endpoint.health = Health::Ready.into();
        }
    }
    // Those that are leaving but still serve are used when there is nobody else, as kube-proxy
    // does (KEP-1669).
    let ready = |endpoint: &Endpoint| endpoint.health() == Health::Ready;
    if service.sliced && !found.iter().any(|(_, endpoint)| ready(endpoint)) {
        for (_, endpoint) in &mut found {
            if endpoint.health() == Health::Draining {
                endpoint.health = Health::Ready.into();
            }
        }
    }
    found.sort_by_key(|(address, _)| *address);
    found.dedup_by_key(|(address, _)| *address);
    found.into_iter().map(|(_, endpoint)| endpoint).collect()
}

fn of_slices<'a>(
    world: &World,
    settings: &Settings,
    port: &ServicePort,
    slices: impl Iterator<Item = &'a EndpointSlice>,
) -> Vec<(SocketAddr, Endpoint)> {
    let mut found: Vec<(SocketAddr, Endpoint)> = Vec::new();
    // A dual-stack workload stands in an IPv4 and in an IPv6 slice: it is one endpoint, at its
    // first address.
    let mut seen: HashMap<&Name, usize> = HashMap::new();
    for slice in slices {
        let Some(number) = slice
            .ports
            .iter()
            .find(|candidate| candidate.name == port.name)
            .map(|candidate| candidate.port)
        else {
            continue;
        };
        for endpoint in &slice.endpoints {
            // "Consumers … should only use the first address" (discovery.k8s.io/v1 Endpoint).
            let Some(address) = endpoint.addresses.first().copied() else {
                continue;
            };
            let workload = match behind(world, endpoint, address) {
                Behind::Workload(workload) => Some(workload),
                Behind::Nobody => None,
                Behind::NotKnownYet => continue,
            };
            let mut compiled = match workload {
                Some(workload) => of_workload(world, settings, workload, address, number),
                None => Endpoint {
                    address: SocketAddr::new(address, number).to_string(),
                    weight: 1,
                    ..Endpoint::default()
                },
            };
            // Both have to be well.
            compiled.health = worse(compiled.health(), endpoint.health).into();
            if !endpoint.zone.is_empty() {
                compiled.zone.clone_from(&endpoint.zone);
            }
            let compiled = (SocketAddr::new(address, number), compiled);
            let Some(workload) = workload else {
                found.push(compiled);
                continue;
            };
            match seen.get(&workload.name) {
                None => {
                    seen.insert(&workload.name, found.len());
                    found.push(compiled);
                }
                Some(at) if workload.addresses.first() == Some(&address) => found[*at] = compiled,
                Some(_) => {}
            }
        }
    }
    found
}

/// Whose endpoint it is.
enum Behind<'a> {
    Workload(&'a Workload),
    /// Nobody we know anything about: an address written down by hand.
    Nobody,
    /// The slice names a workload that has not been reported yet, or is gone.
    NotKnownYet,
}

/// Slices and workloads are reported by themselves, in any order. An endpoint whose workload is
/// named but not known is held back until it is: taken without, it would be plaintext, which
/// STRICT refuses and which nobody asked for.
fn behind<'a>(world: &'a World, endpoint: &SliceEndpoint, address: IpAddr) -> Behind<'a> {
    match &endpoint.workload {
        Some(named) => match world.workload(&named.name) {
            Some(workload)
                if named.uid == workload.uid || named.uid.is_empty() || workload.uid.is_empty() =>
            {
                Behind::Workload(workload)
            }
            _ => Behind::NotKnownYet,
        },
        None => world
            .workload_at(address)
            .map_or(Behind::Nobody, Behind::Workload),
    }
}

fn worse(one: Health, other: Health) -> Health {
    match (one, other) {
        (Health::NotReady, _) | (_, Health::NotReady) => Health::NotReady,
        (Health::Draining, _) | (_, Health::Draining) => Health::Draining,
        (Health::Ready, Health::Ready) => Health::Ready,
    }
}

/// The workload's port a Service port leads to; `None` when it has no port of that name.
pub(super) fn target_port(workload: &Workload, port: &ServicePort) -> Option<u16> {
    match &port.target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => workload
            .ports
            .iter()
            .find(|known| known.name == *name)
            .map(|known| known.port),
    }
}

fn of_workload(
    world: &World,
    settings: &Settings,
    workload: &Workload,
    address: IpAddr,
    port: u16,
) -> Endpoint {
    // Names were checked when the object was read; an identity that cannot be is plaintext.
    let identity = SpiffeId::new(
        &settings.trust_domain,
        &workload.name.namespace,
        &workload.service_account,
    )
    .ok()
    .filter(|_| workload.sidecar && !is_plaintext(world, workload, port));
    Endpoint {
        address: SocketAddr::new(address, port).to_string(),
        identity: identity.map_or(String::new(), |identity| identity.to_string()),
        workload: workload.name.to_string(),
        zone: world.zone_of(workload).to_owned(),
        weight: workload.weight,
        health: workload.health.into(),
    }
}
