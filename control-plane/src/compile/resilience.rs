//! Faults, and what a destination takes no more of.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use weft_api::policy::resilience::{FaultInjection, RateLimit, RateLimitKey};
use weft_api::policy::traffic::{TargetKind, TargetRef, TrafficPolicySpec};
use weft_api::proto;
use weft_api::proto::{Health, Protocol};

use super::endpoints::target_port;
use super::provenance::Sources;
use super::{connection, policy};
use crate::model::{Name, Policy, Service, ServicePort, Workload, World};

pub(super) fn fault(given: &FaultInjection) -> proto::FaultInjection {
    proto::FaultInjection {
        headers: given
            .headers
            .iter()
            .map(|header| proto::Header {
                name: header.name.clone(),
                value: header.value.clone(),
            })
            .collect(),
        delay: given.delay.map(|delay| proto::FaultDelay {
            percent: delay.percent.get(),
            duration_ms: delay.duration.as_millis(),
        }),
        abort: given.abort.map(|abort| proto::FaultAbort {
            percent: abort.percent.get(),
            status: abort.status.map_or(0, u32::from),
            grpc_status: abort.grpc_status.map_or(0, |code| code as u32),
        }),
    }
}

/// What a port of a workload takes no more of.
#[derive(Default)]
pub(super) struct PortLimits {
    pub(super) rates: Vec<proto::RateLimit>,
    pub(super) heads: Vec<proto::HeaderLimits>,
    pub(super) connection: Option<proto::ConnectionSettings>,
}

/// What the policies of one Service port say of requests that come to a workload by it.
pub(super) struct ServiceLimits<'a> {
    pub(super) service: &'a Service,
    pub(super) port: &'a ServicePort,
    /// The workload's port that it leads to.
    pub(super) number: u16,
    pub(super) rate: Option<proto::RateLimit>,
    pub(super) heads: Option<proto::HeaderLimits>,
    pub(super) connection: Option<proto::ConnectionSettings>,
    /// Who says what of it, of other fields too.
    pub(super) sources: Sources,
}

/// Of every Service that leads to a workload, also those of which no policy says anything.
pub(super) fn by_service<'a>(world: &'a World, workload: &Workload) -> Vec<ServiceLimits<'a>> {
    let ports = led_to(world, workload).into_iter();
    let limits = ports.map(|(service, port, number)| {
        let (policy, sources) = policy::merged(world, service, port, None);
        let rate = policy.rate_limit.as_ref();
        ServiceLimits {
            service,
            port,
            number,
            rate: rate.map(|given| rate_limit(world, service, port, given)),
            heads: policy.request_headers.map(|given| proto::HeaderLimits {
                namespace: service.name.namespace.clone(),
                service: service.name.name.clone(),
                port: u32::from(port.port),
                max_bytes: given.max_bytes.unwrap_or(0),
                max_count: given.max_count.unwrap_or(0),
            }),
            connection: policy.connection.as_ref().and_then(connection::of_port),
            sources,
        }
    });
    limits.collect()
}

/// The limits of a workload's ports: those of every Service that leads to one.
pub(super) fn limits(world: &World, workload: &Workload) -> BTreeMap<u16, PortLimits> {
    let mut limits: BTreeMap<u16, PortLimits> = BTreeMap::new();
    for given in by_service(world, workload) {
        if given.rate.is_none() && given.heads.is_none() && given.connection.is_none() {
            continue;
        }
        let of_port = limits.entry(given.number).or_default();
        of_port.rates.extend(given.rate);
        of_port.heads.extend(given.heads);
        of_port.connection = match (of_port.connection, given.connection) {
            (Some(known), Some(given)) => Some(connection::stricter(known, given)),
            (known, given) => known.or(given),
        };
    }
    limits
}

fn rate_limit(
    world: &World,
    service: &Service,
    port: &ServicePort,
    given: &RateLimit,
) -> proto::RateLimit {
    use proto::rate_limit::Key;
    proto::RateLimit {
        namespace: service.name.namespace.clone(),
        service: service.name.name.clone(),
        port: u32::from(port.port),
        requests: given.requests,
        per_ms: given.per.as_millis(),
        burst: given.burst.unwrap_or(given.requests),
        replicas: match given.global {
            true => ready_replicas(world, service, port).max(1),
            false => 0,
        },
        key: given.key.as_ref().map(|key| match key {
            RateLimitKey::ClientIdentity(_) => Key::ClientIdentity(true),
            RateLimitKey::Header(name) => Key::Header(name.to_ascii_lowercase()),
            RateLimitKey::SourceAddress(_) => Key::SourceAddress(true),
        }),
    }
}

/// The Service ports that lead to a workload, and to which of its ports; by name of the Service.
fn led_to<'a>(world: &'a World, workload: &Workload) -> Vec<(&'a Service, &'a ServicePort, u16)> {
    let mut services = world.services_of(workload);
    let sliced = world.sliced_services_of(workload);
    services.extend(sliced.into_iter().filter_map(|name| world.service(name)));
    services.sort_by(|a, b| a.name.cmp(&b.name));
    services.dedup_by(|a, b| a.name == b.name);
    let ports = services.into_iter().flat_map(|service| {
        let ports = service.ports.iter().map(move |port| (service, port));
        ports.filter_map(|(service, port)| {
            let number = match service.selector.is_empty() {
                false => target_port(workload, port),
                true => slice_port(world, service, port),
            };
            Some((service, port, number?))
        })
    });
    ports.collect()
}

/// A workload that a policy limits and that has no proxy to keep the limit.
pub(super) fn unguarded<'a>(
    world: &'a World,
    policy: &Policy<TrafficPolicySpec>,
) -> Option<&'a Name> {
    let spec = &policy.spec;
    let services = world.services_in(&policy.name.namespace).filter(|service| {
        let named = |target: &TargetRef| {
            target.kind == TargetKind::Service && target.name == service.name.name
        };
        spec.is_default() || spec.target_refs.iter().any(named)
    });
    let mut selected = services.flat_map(|service| world.selected(service));
    Some(&selected.find(|workload| !workload.sidecar)?.name)
}

/// A field of a policy that is about requests, for a Service port that is named and declared to
/// carry none.
pub(super) fn meaningless<'a>(
    world: &'a World,
    policy: &Policy<TrafficPolicySpec>,
) -> Option<(&'static str, &'a Service, &'a ServicePort)> {
    let spec = &policy.spec;
    let field = [
        (spec.fault_injection.is_some(), "faultInjection"),
        (spec.rate_limit.is_some(), "rateLimit"),
        (spec.request_headers.is_some(), "requestHeaders"),
    ];
    let (_, field) = field.into_iter().find(|(set, _)| *set)?;
    let opaque = |port: &&ServicePort| matches!(port.protocol, Protocol::Tcp | Protocol::Tls);
    spec.target_refs
        .iter()
        .filter(|target| target.kind == TargetKind::Service)
        .find_map(|target| {
            let name = Name::new(&policy.name.namespace, &target.name);
            let service = world.service(&name)?;
            let mut named = service.ports.iter().filter(|port| {
                let section = target.section_name.as_deref();
                section.is_none_or(|section| policy::is_port(section, port))
            });
            // A Service with ports of both kinds is meant for its HTTP ports.
            let first = named.clone().next()?;
            named
                .all(|port| opaque(&port))
                .then_some((field, service, first))
        })
}

/// The port that the EndpointSlices of a Service say a port of it leads to.
fn slice_port(world: &World, service: &Service, port: &ServicePort) -> Option<u16> {
    let slices = world.slices_of.get(&service.name);
    slices
        .filter_map(|name| world.slices.get(name))
        .flat_map(|slice| &slice.ports)
        .find(|candidate| candidate.name == port.name)
        .map(|candidate| candidate.port)
}

/// How many endpoints of a Service port take requests now. As [`super::endpoints`] counts them, but
/// without making them: each of them needs this number.
fn ready_replicas(world: &World, service: &Service, port: &ServicePort) -> u32 {
    let takes = |workload: &Workload| {
        (service.publish_not_ready || workload.health == Health::Ready) && workload.weight > 0
    };
    let mut slices = world.slices_of.get(&service.name).peekable();
    let count = if service.sliced || slices.peek().is_some() {
        let endpoints = slices
            .filter_map(|name| world.slices.get(name))
            .filter(|slice| slice.ports.iter().any(|known| known.name == port.name))
            .flat_map(|slice| &slice.endpoints)
            .filter(|endpoint| endpoint.health == Health::Ready);
        // A dual-stack workload stands in two slices.
        let mut named = BTreeSet::new();
        let mut nameless: BTreeSet<&IpAddr> = BTreeSet::new();
        for endpoint in endpoints {
            match &endpoint.workload {
                Some(of) if world.workload(&of.name).is_some_and(takes) => {
                    named.insert(&of.name);
                }
                Some(_) => {}
                None => nameless.extend(endpoint.addresses.first()),
            }
        }
        named.len() + nameless.len()
    } else {
        let selected = world.selected(service);
        let leads = |workload: &&Workload| target_port(workload, port).is_some();
        selected
            .filter(|workload| takes(workload))
            .filter(leads)
            .count()
    };
    u32::try_from(count).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use weft_api::proto::rate_limit::Key;
    use weft_api::proto::{Header, RateLimit};

    use super::super::tests::{change, route_policy, with, workload};
    use crate::model::{Dirty, Name, World};

    #[test]
    fn the_most_specific_fault_is_used_whole() {
        let world = with(
            "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: all, namespace: shop}
spec: {faultInjection: {headers: [{name: x-chaos, value: 'on'}], delay: {duration: 2s}}}
---
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: cart-http, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart, sectionName: http}]
  timeouts: {request: 5s}
  faultInjection: {abort: {percent: 5, status: 503, grpcStatus: ABORTED}}
",
        );
        let fault = |name| route_policy(&world, name).fault_injection.unwrap();
        let http = fault("cart.shop:80");
        let abort = http.abort.unwrap();
        assert!(http.delay.is_none() && http.headers.is_empty());
        assert_eq!(
            (abort.percent, abort.status, abort.grpc_status),
            (5, 503, 10)
        );
        let admin = fault("cart.shop:9000");
        let header = |name: &str, value: &str| Header {
            name: name.to_owned(),
            value: value.to_owned(),
        };
        assert_eq!(admin.headers, [header("x-chaos", "on")]);
        let delay = admin.delay.unwrap();
        assert_eq!((delay.percent, delay.duration_ms), (100, 2_000));
        assert!(admin.abort.is_none());
    }

    /// The limits of a port of a workload.
    fn limits(world: &World, name: &str, port: u32) -> Vec<RateLimit> {
        let ports = workload(world, name).ports.into_iter();
        let of_port = ports.filter(|declared| declared.port == port);
        of_port.flat_map(|declared| declared.rate_limits).collect()
    }

    const GLOBAL: &str = "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: cart, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart}]
  rateLimit: {requests: 100, per: 1m, global: true, key: {header: X-User}}
";

    /// A third workload of cart, in this health.
    fn third(health: &str) -> String {
        format!(
            "apiVersion: policy.weft.dev/v1alpha1
kind: Workload
metadata: {{name: cart-3, namespace: shop, labels: {{app: cart}}}}
spec: {{addresses: [10.0.0.33], health: {health}, ports: [{{name: web, port: 8080}}]}}
"
        )
    }

    #[test]
    fn a_limit_reaches_the_workloads_of_every_service_that_leads_to_them() {
        let world = with(
            "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: all, namespace: shop}
spec: {rateLimit: {requests: 7, key: {clientIdentity: true}}}
---
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: cart-http, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart, sectionName: http}]
  rateLimit: {requests: 100, per: 1m, burst: 20}
---
apiVersion: v1
kind: Service
metadata: {name: basket, namespace: shop}
spec: {clusterIP: 10.96.0.16, selector: {app: cart}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: by-slice, namespace: shop}
spec: {clusterIP: 10.96.0.17, ports: [{port: 70}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: by-slice-1, namespace: shop, labels: {kubernetes.io/service-name: by-slice}}
addressType: IPv4
ports: [{name: '', port: 7070}]
endpoints: [{addresses: [10.0.0.1]}]
",
        );
        let http = limits(&world, "shop/cart-1", 8080);
        let named: Vec<_> = http.iter().map(|l| (&*l.service, l.port)).collect();
        assert_eq!(named, [("basket", 80), ("cart", 80)]);
        assert_eq!(
            (http[0].requests, http[0].per_ms, http[0].burst),
            (7, 1_000, 7)
        );
        assert_eq!(http[0].key, Some(Key::ClientIdentity(true)));
        assert_eq!((http[1].requests, http[1].per_ms), (100, 60_000));
        assert_eq!((http[1].burst, http[1].replicas), (20, 0));
        assert_eq!(http[1].key, None);
        assert_eq!(limits(&world, "shop/cart-1", 9001)[0].requests, 7);
        assert_eq!(limits(&world, "shop/cart-1", 7070)[0].service, "by-slice");
        // The other one listens elsewhere, and is in no slice.
        assert_eq!(limits(&world, "shop/cart-2", 8081)[0].service, "cart");
        assert!(limits(&world, "shop/cart-2", 7070).is_empty());
        assert!(limits(&world, "other/cart-1", 8080).is_empty());
    }

    #[test]
    fn a_global_limit_is_shared_by_those_that_are_ready() {
        let mut world = with(GLOBAL);
        let replicas = |world: &World| {
            let limit = limits(world, "shop/cart-1", 8080).remove(0);
            assert_eq!(limit.key, Some(Key::Header("x-user".to_owned())));
            limit.replicas
        };
        // cart-2 is not ready.
        assert_eq!(replicas(&world), 1);
        for (health, expected) in [("Ready", 2), ("Draining", 1), ("Ready", 2), ("NotReady", 1)] {
            let mut dirty = Dirty::default();
            change(&mut world, &third(health), &mut dirty);
            assert_eq!(replicas(&world), expected, "{health}");
            // Each of them is told.
            let of = |name| Name::new("shop", name);
            let told = ["cart-1", "cart-2", "cart-3"].map(of);
            assert!(
                told.iter().all(|name| dirty.workloads.contains(name)),
                "{dirty:?}"
            );
        }
    }

    #[test]
    fn a_limit_that_comes_or_goes_touches_the_workloads_and_other_policies_do_not() {
        let mut world = with("");
        let both = ["cart-1", "cart-2"].map(|name| Name::new("shop", name));
        let touched = |world: &mut World, policy: &str| {
            let mut dirty = Dirty::default();
            change(world, policy, &mut dirty);
            let workloads: Vec<_> = dirty.workloads.into_iter().collect();
            workloads
        };
        let without = "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: cart, namespace: shop}
spec: {targetRefs: [{kind: Service, name: cart}], timeouts: {request: 5s}}
";
        assert_eq!(touched(&mut world, without), []);
        assert_eq!(touched(&mut world, GLOBAL), both);
        assert_eq!(touched(&mut world, without), both);
        assert!(limits(&world, "shop/cart-1", 8080).is_empty());
        assert_eq!(touched(&mut world, &without.replace("5s", "6s")), []);
    }

    #[test]
    fn a_workload_without_a_proxy_keeps_no_limit() {
        let found = crate::compile::problems(&with(GLOBAL));
        let found: Vec<_> = found
            .iter()
            .filter(|p| p.path == ["spec", "rateLimit"])
            .collect();
        let [problem] = &found[..] else {
            panic!("{found:?}")
        };
        assert!(
            problem.message.contains("shop/cart-2 has no proxy"),
            "{problem:?}"
        );
    }

    #[test]
    fn the_size_of_heads_is_limited_where_they_arrive() {
        let mut world = with("");
        let policy = "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: cart, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart, sectionName: http}]
  requestHeaders: {maxBytes: 4096}
";
        let mut dirty = Dirty::default();
        change(&mut world, policy, &mut dirty);
        assert!(dirty.workloads.contains(&Name::new("shop", "cart-1")));
        let ports = workload(&world, "shop/cart-1").ports;
        let limited: Vec<_> = ports
            .iter()
            .filter(|p| !p.header_limits.is_empty())
            .collect();
        let [port] = &limited[..] else {
            panic!("{ports:?}")
        };
        let limit = &port.header_limits[0];
        assert_eq!((port.port, &*limit.service, limit.port), (8080, "cart", 80));
        assert_eq!((limit.max_bytes, limit.max_count), (4096, 0));
    }

    #[test]
    fn hedging_comes_with_retries() {
        let world = with(
            "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: all, namespace: shop}
spec: {retries: {hedging: {delay: 50ms}}}
---
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: cart-http, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart, sectionName: http}]
  retries: {attempts: 1}
",
        );
        let policy = route_policy(&world, "cart.shop:80");
        assert_eq!(policy.hedge_after_ms, 50);
        assert_eq!(policy.retry.unwrap().attempts, 1);
    }

    #[test]
    fn what_is_about_requests_says_nothing_of_other_ports() {
        let found = |section: &str| {
            let world = with(&format!(
                "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {{name: cart, namespace: shop}}
spec:
  targetRefs: [{{kind: Service, name: cart{section}}}]
  faultInjection: {{delay: {{duration: 1s}}}}
"
            ));
            let found = crate::compile::problems(&world).into_iter();
            let of_fault = found.filter(|p| p.path == ["spec", "faultInjection"]);
            of_fault.map(|p| p.message).collect::<Vec<_>>()
        };
        let admin = found(", sectionName: admin");
        assert!(
            admin.len() == 1 && admin[0].contains("port 9000"),
            "{admin:?}"
        );
        assert_eq!(found(", sectionName: http"), Vec::<String>::new());
        // Its other port is HTTP.
        assert_eq!(found(""), Vec::<String>::new());
    }
}
