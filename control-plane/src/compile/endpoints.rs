//! Where a Service port, or a workload addressed directly, is reached.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};

use weft_api::identity::SpiffeId;
use weft_api::proto::{Endpoint, Endpoints, Health};

use super::Settings;
use super::workload::is_plaintext;
use crate::model::{
    Distribution, EndpointSlice, Hints, Name, Service, ServicePort, SliceEndpoint, TargetPort,
    Workload, World,
};

/// Name of the Endpoints of a Service port.
pub(super) fn name_of(service: &Name, port: u16) -> String {
    format!("{service}:{port}")
}

/// Name of the Endpoints of a workload addressed directly.
pub(super) fn name_of_workload(workload: &Name, port: u16) -> String {
    format!("workload/{workload}:{port}")
}

/// Name of the Endpoints of a Service port on every node, for a Service that at its cluster addresses
/// is for clients on the same node.
pub(super) fn name_of_all(service: &Name, port: u16) -> String {
    format!("{EVERYWHERE}{}", name_of(service, port))
}

/// What the names of such Endpoints begin with.
pub(crate) const EVERYWHERE: &str = "everywhere/";

/// Compiles `<namespace>/<service>:<port>`, `everywhere/<namespace>/<service>:<port>` or
/// `workload/<namespace>/<name>:<port>`; `None` when there is no such Service port or workload.
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
            node_local: false,
        });
    }
    let owner = owner.strip_prefix(EVERYWHERE).unwrap_or(owner);
    let (service, port) = service_port(world, owner, port)?;
    Some(Endpoints {
        endpoints: of_port(world, settings, service, port),
        node_local: false,
    })
}

/// Endpoints of a Service port that is for clients on the same node, by that node; `None` when it is
/// for everybody, or there is none. A node that is not among them has none.
pub(super) fn by_node(
    world: &World,
    settings: &Settings,
    name: &str,
) -> Option<BTreeMap<String, Endpoints>> {
    let (owner, port) = name.rsplit_once(':')?;
    let (service, port) = service_port(world, owner, port.parse().ok()?)?;
    // Nothing stands between a client and the addresses of a headless Service.
    if !service.node_local || service.headless {
        return None;
    }
    let mut by_node: BTreeMap<&str, Vec<Found<'_>>> = BTreeMap::new();
    for one in found(world, settings, service, port) {
        by_node.entry(one.node).or_default().push(one);
    }
    // Who does not know where it is has no neighbours.
    by_node.remove("");
    let mut nodes = BTreeMap::new();
    for (node, mut on_it) in by_node {
        use_leaving(&mut on_it);
        let endpoints = Endpoints {
            endpoints: in_order(on_it),
            node_local: true,
        };
        nodes.insert(node.to_owned(), endpoints);
    }
    Some(nodes)
}

fn service_port<'a>(
    world: &'a World,
    service: &str,
    port: u16,
) -> Option<(&'a Service, &'a ServicePort)> {
    let service = world.service(&Name::parse(service)?)?;
    let port = service.ports.iter().find(|known| known.port == port)?;
    Some((service, port))
}

/// An endpoint, with what decides by whom it is used.
struct Found<'a> {
    at: SocketAddr,
    endpoint: Endpoint,
    /// Empty when not known.
    node: &'a str,
    hints: Option<Cow<'a, Hints>>,
    /// Its health is what an EndpointSlice says, not what a person says of a Workload.
    sliced: bool,
}

impl Found<'_> {
    fn is_ready(&self) -> bool {
        self.endpoint.health() == Health::Ready
    }
}

/// Endpoints of a Service port on every node, in the order of their addresses.
fn of_port(
    world: &World,
    settings: &Settings,
    service: &Service,
    port: &ServicePort,
) -> Vec<Endpoint> {
    let mut found = found(world, settings, service, port);
    hint(&mut found);
    use_leaving(&mut found);
    in_order(found)
}

fn in_order(mut found: Vec<Found<'_>>) -> Vec<Endpoint> {
    found.sort_by_key(|found| found.at);
    found.dedup_by_key(|found| found.at);
    found.into_iter().map(|found| found.endpoint).collect()
}

/// Hints count when every ready endpoint has some, as kube-proxy has it (KEP-2433, KEP-3015): whom
/// nobody is meant for could else be left out, and one without be overrun.
fn hint(found: &mut [Found<'_>]) {
    let every = |has: fn(&Hints) -> bool| {
        let mut ready = found.iter().filter(|found| found.is_ready());
        ready.all(|found| found.hints.as_deref().is_some_and(has))
    };
    let zones = every(|hints| !hints.zones.is_empty());
    let nodes = every(|hints| !hints.nodes.is_empty());
    for found in found.iter_mut().filter(|found| found.is_ready()) {
        let Some(hints) = &found.hints else { continue };
        if zones {
            found.endpoint.for_zones.clone_from(&hints.zones);
        }
        if nodes {
            found.endpoint.for_nodes.clone_from(&hints.nodes);
        }
    }
}

/// Those that are leaving but still serve are used when there is nobody else, as kube-proxy does
/// (KEP-1669).
fn use_leaving(found: &mut [Found<'_>]) {
    if found.iter().any(Found::is_ready) {
        return;
    }
    for found in found.iter_mut().filter(|found| found.sliced) {
        if found.endpoint.health() == Health::Draining {
            found.endpoint.health = Health::Ready.into();
        }
    }
}

/// Endpoints of a Service port: those of its EndpointSlices when it has any, else the workloads
/// its selector chooses.
fn found<'a>(
    world: &'a World,
    settings: &Settings,
    service: &'a Service,
    port: &ServicePort,
) -> Vec<Found<'a>> {
    let mut slices = world
        .slices_of
        .get(&service.name)
        .filter_map(|name| world.slices.get(name))
        .peekable();
    if service.sliced || slices.peek().is_some() {
        of_slices(world, settings, service, port, slices)
    } else {
        world
            .selected(service)
            .filter_map(|workload| {
                let number = target_port(workload, port)?;
                let address = *workload.addresses.first()?;
                let mut endpoint = of_workload(world, settings, workload, address, number);
                if service.publish_not_ready {
                    endpoint.health = Health::Ready.into();
                }
                Some(Found {
                    at: SocketAddr::new(address, number),
                    endpoint,
                    node: &workload.node,
                    hints: service
                        .distribution
                        .map(|wish| Cow::Owned(hints(world, workload, wish))),
                    sliced: false,
                })
            })
            .collect()
    }
}

/// What Kubernetes writes into the EndpointSlices of a Service that wishes this.
fn hints(world: &World, workload: &Workload, wish: Distribution) -> Hints {
    let known = |name: &str| -> Vec<String> {
        let known = Some(name).filter(|name| !name.is_empty());
        known.map(str::to_owned).into_iter().collect()
    };
    Hints {
        zones: known(world.zone_of(workload)),
        nodes: match wish {
            Distribution::SameZone => Vec::new(),
            Distribution::SameNode => known(&workload.node),
        },
    }
}

fn of_slices<'a>(
    world: &'a World,
    settings: &Settings,
    service: &Service,
    port: &ServicePort,
    slices: impl Iterator<Item = &'a EndpointSlice>,
) -> Vec<Found<'a>> {
    let mut found: Vec<Found<'_>> = Vec::new();
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
            // Both have to be well; of a Service that publishes whoever is not ready the slice
            // says it alone, as Kubernetes writes it and kube-proxy reads it.
            compiled.health = match service.publish_not_ready {
                true => endpoint.health.into(),
                false => worse(compiled.health(), endpoint.health).into(),
            };
            if !endpoint.zone.is_empty() {
                compiled.zone.clone_from(&endpoint.zone);
            }
            let one = Found {
                at: SocketAddr::new(address, number),
                endpoint: compiled,
                // As kube-proxy has it: the slice says it, or nobody.
                node: &endpoint.node,
                hints: endpoint.hints.as_deref().map(Cow::Borrowed),
                sliced: true,
            };
            let Some(workload) = workload else {
                found.push(one);
                continue;
            };
            match seen.get(&workload.name) {
                None => {
                    seen.insert(&workload.name, found.len());
                    found.push(one);
                }
                Some(at) if workload.addresses.first() == Some(&address) => found[*at] = one,
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
        ..Endpoint::default()
    }
}
