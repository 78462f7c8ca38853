//! Resources as a control plane sends them.

use weft_api::proto::resource::Body;
use weft_api::proto::*;

pub(super) const VIP: &str = "10.96.0.15:80";
pub(super) const ENDPOINTS: &str = "shop/cart:80";

pub(super) fn resource(kind: ResourceKind, name: &str, version: u64, body: Body) -> Resource {
    Resource {
        key: Some(ResourceKey {
            kind: kind.into(),
            name: name.into(),
        }),
        version,
        body: Some(body),
    }
}

pub(super) fn backend() -> Backend {
    Backend {
        namespace: "shop".into(),
        service: "cart".into(),
        port: 80,
        endpoints: ENDPOINTS.into(),
        policy: Some(BackendPolicy {
            outlier_detection: Some(OutlierDetection {
                consecutive_gateway_errors: 5,
                max_ejection_percent: 50,
                ..Default::default()
            }),
            ..Default::default()
        }),
    }
}

pub(super) fn route() -> Route {
    Route {
        name: "Service/shop/cart".into(),
        matches: vec![RouteMatch {
            method: "GET".into(),
            path: Some(route_match::Path::PathPrefix("/api/".into())),
            headers: [("X-Version".to_owned(), "2".to_owned())].into(),
            ..Default::default()
        }],
        backends: vec![WeightedBackend {
            weight: 3,
            backend: Some(backend()),
            ..Default::default()
        }],
        policy: Some(RoutePolicy {
            request_timeout_ms: 1500,
            retry: Some(RetryPolicy {
                attempts: 2,
                status_codes: vec![503],
                budget_percent: 20,
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

pub(super) fn destination() -> Destination {
    Destination {
        namespace: "shop".into(),
        service: "cart".into(),
        port: 80,
        port_name: "http".into(),
        protocol: Protocol::Http.into(),
        routes: vec![route()],
        ..Default::default()
    }
}

pub(super) fn endpoints(addresses: &[&str]) -> Endpoints {
    Endpoints {
        endpoints: addresses
            .iter()
            .map(|address| Endpoint {
                address: (*address).into(),
                identity: "spiffe://cluster.local/ns/shop/sa/cart".into(),
                workload: "shop/cart-1".into(),
                zone: "a".into(),
                weight: 1,
                health: Health::Ready.into(),
                ..Endpoint::default()
            })
            .collect(),
        ..Endpoints::default()
    }
}

pub(super) fn workload() -> Workload {
    Workload {
        namespace: "shop".into(),
        name: "web".into(),
        service_account: "web".into(),
        mtls: MtlsMode::Strict.into(),
        ports: vec![WorkloadPort {
            port: 8080,
            protocol: Protocol::Http.into(),
            mtls: Some(MtlsMode::Permissive.into()),
            ..Default::default()
        }],
        telemetry: Some(Telemetry {
            sampling_per_myriad: 100,
            access_log: AccessLog::Errors.into(),
            otlp_endpoint: String::new(),
        }),
        ..Default::default()
    }
}

pub(super) fn of_destination(version: u64, destination: Destination) -> Resource {
    resource(
        ResourceKind::Destination,
        VIP,
        version,
        Body::Destination(destination),
    )
}

pub(super) fn of_endpoints(version: u64, addresses: &[&str]) -> Resource {
    resource(
        ResourceKind::Endpoints,
        ENDPOINTS,
        version,
        Body::Endpoints(endpoints(addresses)),
    )
}

pub(super) fn of_workload(version: u64) -> Resource {
    resource(
        ResourceKind::Workload,
        "shop/web",
        version,
        Body::Workload(workload()),
    )
}

pub(super) fn absent(kind: ResourceKind, name: &str, version: u64) -> Resource {
    resource(kind, name, version, Body::Absent(Absent {}))
}
