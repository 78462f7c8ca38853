//! What a workload's own proxy does with what comes to one of its ports, and by which policies: for
//! people (`weft routes`, `weft explain`). The proxy itself is told by [`super::workload`], from the same
//! functions.

use weft_api::proto;

use super::provenance::is_of_port;
use super::{Settings, resilience, workload};
use crate::model::{Name, World};

/// What holds on one port of a workload.
#[derive(Clone, Debug, PartialEq)]
pub struct Inbound {
    /// Whether a proxy stands before the workload; without one nobody keeps any of this.
    pub sidecar: bool,
    pub service_account: String,
    /// Empty when not known.
    pub node: String,
    pub protocol: proto::Protocol,
    pub mtls: proto::MtlsMode,
    /// `None`: no policy says anything, here and below.
    pub mtls_from: Option<proto::Provenance>,
    /// Of every Service that leads to the port, whichever is called, if a policy says something.
    pub services: Vec<OfService>,
    pub telemetry: proto::Telemetry,
    pub telemetry_from: Option<proto::Provenance>,
    /// Let in as plaintext under STRICT.
    pub probes: Vec<proto::Probe>,
}

/// What the policies of one Service port say.
#[derive(Clone, Debug, PartialEq)]
pub struct OfService {
    pub service: Name,
    pub port: u16,
    pub rate: Option<proto::RateLimit>,
    pub heads: Option<proto::HeaderLimits>,
    pub connection: Option<proto::ConnectionSettings>,
    pub from: Option<proto::Provenance>,
}

/// What holds on a port of a workload; `None` when there is no such workload.
pub fn inbound(world: &World, settings: &Settings, name: &Name, port: u16) -> Option<Inbound> {
    let of = world.workload(name)?;
    let (mtls, mtls_from) = workload::mode_of(world, of, port);
    let services = resilience::by_service(world, of).into_iter();
    let services = services.filter(|given| given.number == port);
    let services = services.filter_map(|given| {
        let said = given.rate.is_some() || given.heads.is_some() || given.connection.is_some();
        said.then(|| OfService {
            service: given.service.name.clone(),
            port: given.port.port,
            rate: given.rate,
            heads: given.heads,
            connection: given.connection,
            from: given.sources.of(is_of_port),
        })
    });
    let probes = of.probes.iter().filter(|probe| probe.port == port);
    Some(Inbound {
        sidecar: of.sidecar,
        service_account: of.service_account.clone(),
        node: of.node.clone(),
        protocol: workload::protocol_of(world, of, port).unwrap_or_default(),
        mtls,
        mtls_from: mtls_from.of(|_| true),
        services: services.collect(),
        telemetry: workload::telemetry(world, settings, of),
        telemetry_from: workload::telemetry_sources(world, of).of(|_| true),
        probes: probes.filter_map(workload::probe).collect(),
    })
}

#[cfg(test)]
mod tests {
    use weft_api::proto::MtlsMode;

    use super::super::tests::{with, workload};
    use super::*;

    const POLICIES: &str = "
apiVersion: policy.weft.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: mesh, namespace: weft-system}
spec: {mtls: {mode: PERMISSIVE}}
---
apiVersion: policy.weft.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: shop, namespace: shop}
spec: {mtls: {mode: STRICT}}
---
apiVersion: policy.weft.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: cart, namespace: shop}
spec:
  selector: {matchLabels: {app: cart}}
  portLevelMtls: {8080: {mode: DISABLE}, 9001: {mode: UNSET}}
---
apiVersion: policy.weft.dev/v1alpha1
kind: Telemetry
metadata: {name: mesh, namespace: weft-system}
spec: {tracing: {samplingPercent: 5}, accessLog: {mode: All}}
---
apiVersion: policy.weft.dev/v1alpha1
kind: Telemetry
metadata: {name: shop, namespace: shop}
spec: {accessLog: {mode: Errors}}
---
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: all, namespace: shop}
spec:
  rateLimit: {requests: 7}
  requestHeaders: {maxBytes: 4096}
  timeouts: {request: 5s}
---
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: cart-http, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart, sectionName: http}]
  rateLimit: {requests: 100, key: {header: X-User}}
  connection: {maxRequests: 9, idleTimeout: 10s}
";

    fn of(world: &World, name: &str, port: u16) -> Inbound {
        let settings = Settings {
            trust_domain: "cluster.local".to_owned(),
            sampling_percent: 1.0,
        };
        inbound(world, &settings, &Name::parse(name).unwrap(), port).unwrap()
    }

    /// "field: whose (what for) before whose".
    fn said(given: Option<&proto::Provenance>) -> Vec<String> {
        let Some(given) = given else {
            return Vec::new();
        };
        let name = |index: u32| {
            let policy = &given.policies[index as usize];
            let (_, name) = policy.name.split_once(' ').unwrap();
            format!("{name} ({})", policy.target)
        };
        let fields = given.fields.iter().map(|one| {
            let over: Vec<String> = one.overridden.iter().copied().map(name).collect();
            let over = match over.is_empty() {
                true => String::new(),
                false => format!(" before {}", over.join(", ")),
            };
            format!("{}: {}{over}", one.field, name(one.used))
        });
        fields.collect()
    }

    #[test]
    fn each_field_is_said_with_whoever_says_it() {
        let world = with(POLICIES);
        let http = of(&world, "shop/cart-1", 8080);
        assert_eq!(http.mtls, MtlsMode::Disable);
        let expected = [
            "mtls.mode: shop/cart (workloads app=cart, port 8080) before shop/shop (namespace shop), \
             weft-system/mesh (the whole mesh)",
        ];
        assert_eq!(said(http.mtls_from.as_ref()), expected);
        let expected = [
            "accessLog.mode: shop/shop (namespace shop) before weft-system/mesh (the whole mesh)",
            "tracing.samplingPercent: weft-system/mesh (the whole mesh)",
        ];
        assert_eq!(said(http.telemetry_from.as_ref()), expected);
        let [service] = &http.services[..] else {
            panic!("{http:?}")
        };
        assert_eq!(
            (service.service.to_string(), service.port),
            ("shop/cart".to_owned(), 80)
        );
        // What callers' proxies keep is not its.
        let expected = [
            "rateLimit: shop/cart-http (Service cart, port http) before shop/all (namespace shop)",
            "connection.maxRequests: shop/cart-http (Service cart, port http)",
            "requestHeaders: shop/all (namespace shop)",
        ];
        assert_eq!(said(service.from.as_ref()), expected);
        let admin = of(&world, "shop/cart-1", 9001);
        let expected =
            ["mtls.mode: shop/shop (namespace shop) before weft-system/mesh (the whole mesh)"];
        assert_eq!(said(admin.mtls_from.as_ref()), expected);
        assert_eq!(admin.protocol, proto::Protocol::Tcp);
        assert!(!of(&world, "shop/cart-2", 8081).sidecar);
    }

    #[test]
    fn it_is_what_the_proxy_is_told() {
        let policies = [
            String::new(),
            POLICIES.to_owned(),
            POLICIES.replace("DISABLE", "UNSET"),
            POLICIES.replace("{mode: STRICT}", "{mode: UNSET}"),
        ];
        for policies in policies {
            let world = with(&policies);
            for name in ["shop/cart-1", "shop/cart-2", "other/cart-1"] {
                let told = workload(&world, name);
                for port in &told.ports {
                    let shown = of(&world, name, u16::try_from(port.port).unwrap());
                    let mode = port
                        .mtls
                        .map_or(told.mtls(), |mode| MtlsMode::try_from(mode).unwrap());
                    assert_eq!(shown.mtls, mode, "{name} {port:?}");
                    assert_eq!(shown.protocol, port.protocol());
                    let services = shown.services.iter();
                    let rates = services.clone().filter_map(|one| one.rate.clone());
                    assert_eq!(rates.collect::<Vec<_>>(), port.rate_limits);
                    let heads = services.filter_map(|one| one.heads.clone());
                    assert_eq!(heads.collect::<Vec<_>>(), port.header_limits);
                    assert_eq!(Some(shown.telemetry), told.telemetry);
                }
            }
        }
        let world = with("");
        let nobody = of(&world, "shop/cart-1", 8080);
        assert_eq!(nobody.mtls, MtlsMode::Permissive);
        assert_eq!((nobody.mtls_from, nobody.telemetry_from), (None, None));
        assert_eq!(nobody.services, []);
    }
}
