//! What a connection to one original destination, or to one host name, is.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use weft_api::proto::{Backend, Destination, Fallback, Protocol, Route, WeightedBackend, fallback};

use super::external::{self, Found};
use super::{endpoints, policy, routes};
use crate::model::{self, Name, Rule, Service, ServicePort, Workload, World};

/// Compiles `<address>:<port>` or `<host>:<port>` for clients of a namespace; `None` when nothing
/// is known there.
pub(super) fn destination(world: &World, key: &str, client: &str) -> Option<Destination> {
    if let Some((service, port)) = service_of(world, key) {
        let mut destination = to_service(world, service, port, client);
        if service.node_local && is_outer(service, key) {
            use_every_node(&mut destination, service);
        }
        return Some(destination);
    }
    if let Ok(address) = key.parse::<SocketAddr>() {
        if let Some(workload) = world.workload_at(address.ip()) {
            return Some(to_workload(world, workload, address.port()));
        }
        let (external, port) = external::at(world, address, client)?;
        let found = Found::At(address.ip());
        return Some(external::destination(world, external, port, found));
    }
    let (host, port) = key.rsplit_once(':')?;
    let (external, port) = external::of_host(world, host, port.parse().ok()?, client)?;
    let found = Found::Host(host);
    Some(external::destination(world, external, port, found))
}

/// Name of the endpoints that whoever has no proxy comes to: those of the Service itself, whatever its
/// routes say, or of the workload at the address; `None` when it is neither.
pub fn without_routes(world: &World, key: &str) -> Option<String> {
    if let Some((service, port)) = service_of(world, key) {
        return Some(format!("{}:{}", service.name, port.port));
    }
    let address: SocketAddr = key.parse().ok()?;
    let workload = world.workload_at(address.ip())?;
    Some(endpoints::name_of_workload(&workload.name, address.port()))
}

/// Whether a destination of a Service is not one of its cluster addresses: what holds for calls
/// within the cluster says nothing of those.
fn is_outer(service: &Service, key: &str) -> bool {
    let address = key.parse::<SocketAddr>();
    address.is_ok_and(|address| {
        let ip = address.ip();
        !service.vips.contains(&ip) || service.outer_vips.contains(&ip)
    })
}

/// A Service's own endpoints are those on every node.
fn use_every_node(destination: &mut Destination, service: &Service) {
    let opaque = destination.opaque.iter_mut();
    let routes = opaque.filter_map(|opaque| opaque.route.as_mut());
    let backends = routes
        .chain(&mut destination.routes)
        .flat_map(|route| &mut route.backends)
        .filter_map(|weighted| weighted.backend.as_mut());
    for backend in backends {
        if backend.namespace == service.name.namespace && backend.service == service.name.name {
            let port = u16::try_from(backend.port).unwrap_or_default();
            backend.endpoints = endpoints::name_of_all(&service.name, port);
        }
    }
}

/// Namespaces for whose clients a destination that is no Service is another one.
pub(super) fn external_clients(world: &World, key: &str) -> BTreeSet<String> {
    match key.parse::<SocketAddr>() {
        Ok(address) if world.workload_at(address.ip()).is_some() => BTreeSet::new(),
        Ok(address) => external::clients_at(world, address),
        Err(_) => match key.rsplit_once(':') {
            Some((host, _)) => external::clients_of_host(world, host),
            None => BTreeSet::new(),
        },
    }
}

/// The Service port that a destination leads to.
pub(super) fn service_of<'a>(
    world: &'a World,
    key: &str,
) -> Option<(&'a Service, &'a ServicePort)> {
    if let Ok(address) = key.parse::<SocketAddr>() {
        return service_at(world, address);
    }
    let (_, port) = key.rsplit_once(':')?;
    let port: u16 = port.parse().ok()?;
    let service = world.service(&service_of_host(key)?)?;
    let port = service.ports.iter().find(|known| known.port == port)?;
    Some((service, port))
}

/// The Service at a virtual address, or at a node's address and a node port; of several with the
/// same address and port the first by name.
fn service_at(world: &World, address: SocketAddr) -> Option<(&Service, &ServicePort)> {
    let port_of = |name: &Name, wanted: &dyn Fn(&ServicePort) -> bool| {
        let service = world.service(name)?;
        let port = service.ports.iter().find(|port| wanted(port))?;
        Some((service, port))
    };
    let at_vip = world
        .vips
        .get(&address.ip())
        .find_map(|name| port_of(name, &|port| port.port == address.port()));
    at_vip.or_else(|| {
        if !world.node_addresses.contains(&address.ip()) {
            return None;
        }
        world
            .node_ports
            .get(&address.port())
            .find_map(|name| port_of(name, &|port| port.node_port == Some(address.port())))
    })
}

/// The Service a `<host>:<port>` names.
pub(super) fn service_of_host(key: &str) -> Option<Name> {
    if key.parse::<SocketAddr>().is_ok() {
        return None;
    }
    service_name(key.rsplit_once(':')?.0)
}

/// Reads "cart.shop", "cart.shop.svc" or `cart.shop.svc.<cluster domain>`.
fn service_name(host: &str) -> Option<Name> {
    let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    let mut labels = host.split('.');
    let (service, namespace) = (labels.next()?, labels.next()?);
    match labels.next() {
        None | Some("svc") => Some(Name::new(namespace, service)),
        Some(_) => None,
    }
}

fn to_service(world: &World, service: &Service, port: &ServicePort, client: &str) -> Destination {
    let (routes, opaque) = match routes::table(world, service, port, client) {
        Some(table) => (table.routes, table.opaque),
        None => (vec![own_route(world, service, port)], Vec::new()),
    };
    Destination {
        namespace: service.name.namespace.clone(),
        service: service.name.name.clone(),
        port: u32::from(port.port),
        port_name: port.name.clone(),
        protocol: port.protocol.into(),
        routes,
        opaque,
    }
}

/// What holds for requests to a Service port: for those that take a rule, or whatever their route.
pub(super) fn route_policy(
    world: &World,
    service: &Service,
    port: &ServicePort,
    of: Option<(&model::Route, &Rule)>,
) -> weft_api::proto::RoutePolicy {
    let effective = policy::effective(world, service, port, of);
    let mut route_policy = effective.route;
    if let Some(target) = effective.fallback_backend {
        route_policy.fallback = Some(Fallback {
            action: Some(fallback::Action::Backend(fallback_backend(
                world,
                &target.service,
                target.port,
            ))),
        });
    }
    route_policy
}

/// Where a Service's requests go when no route says otherwise: to itself.
pub(super) fn own_route(world: &World, service: &Service, port: &ServicePort) -> Route {
    Route {
        name: format!("Service/{}", service.name),
        backends: vec![WeightedBackend {
            weight: 1,
            backend: Some(backend(world, service, port)),
            ..WeightedBackend::default()
        }],
        policy: Some(route_policy(world, service, port, None)),
        ..Route::default()
    }
}

pub(super) fn backend(world: &World, service: &Service, port: &ServicePort) -> Backend {
    Backend {
        namespace: service.name.namespace.clone(),
        service: service.name.name.clone(),
        port: u32::from(port.port),
        endpoints: endpoints::name_of(&service.name, port.port),
        policy: Some(policy::effective(world, service, port, None).backend),
    }
}

/// A backend by name; when there is no such Service its endpoints are absent and callers are told
/// so.
fn fallback_backend(world: &World, name: &Name, number: u16) -> Backend {
    let found = world.service(name).and_then(|service| {
        let port = service.ports.iter().find(|port| port.port == number)?;
        Some(backend(world, service, port))
    });
    found.unwrap_or_else(|| Backend {
        namespace: name.namespace.clone(),
        service: name.name.clone(),
        port: u32::from(number),
        endpoints: endpoints::name_of(name, number),
        policy: Some(policy::default_backend()),
    })
}

/// A workload addressed directly: mutual TLS, but no routes (the Gateway API's rule for Pod
/// addresses). Its name in a headless Service is its address too; the policies of the one headless
/// Service that leads to this port hold.
fn to_workload(world: &World, workload: &Workload, number: u16) -> Destination {
    let port = workload.ports.iter().find(|port| port.port == number);
    let headless = headless_service(world, workload, number)
        .map(|(service, port)| policy::effective(world, service, port, None));
    let (route_policy, backend_policy) = match headless {
        Some(effective) => (effective.route, policy::direct(effective.backend)),
        None => (policy::default_route(), policy::direct_backend()),
    };
    Destination {
        namespace: workload.name.namespace.clone(),
        service: workload.name.name.clone(),
        port: u32::from(number),
        port_name: port.map_or(String::new(), |port| port.name.clone()),
        protocol: super::workload::protocol_of(world, workload, number)
            .unwrap_or(Protocol::Auto)
            .into(),
        routes: vec![Route {
            name: format!("Workload/{}", workload.name),
            backends: vec![WeightedBackend {
                weight: 1,
                backend: Some(Backend {
                    namespace: workload.name.namespace.clone(),
                    service: workload.name.name.clone(),
                    port: u32::from(number),
                    endpoints: endpoints::name_of_workload(&workload.name, number),
                    policy: Some(backend_policy),
                }),
                ..WeightedBackend::default()
            }],
            policy: Some(route_policy),
            ..Route::default()
        }],
        ..Destination::default()
    }
}

/// The headless Service whose port leads to a workload's port, if it is the only one.
fn headless_service<'a>(
    world: &'a World,
    workload: &Workload,
    number: u16,
) -> Option<(&'a Service, &'a ServicePort)> {
    let mut found = world
        .sliced_services_of(workload)
        .into_iter()
        .filter_map(|name| world.service(name))
        .filter(|service| service.headless)
        .filter_map(|service| {
            let leads = |port: &&ServicePort| {
                endpoints::target_port(workload, port) == Some(number)
                    || (service.selector.is_empty() && port.port == number)
            };
            Some((service, service.ports.iter().find(leads)?))
        });
    let only = found.next()?;
    found.next().is_none().then_some(only)
}
