//! Services, EndpointSlices and Nodes as the apiserver serves them: the fields that are used.

use std::collections::BTreeMap;
use std::net::IpAddr;

use kube::core::ObjectMeta;
use serde::Deserialize;

use super::meta;
use super::watch::{Watched, Wrong};
use crate::model::{
    self, Kind, Name, Object, SliceEndpoint, SlicePort, TargetPort, WorkloadRef, protocol,
};
use crate::sources::slices::{Conditions, Hints};

/// The label by which an EndpointSlice names its Service.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";
/// The label that says where a node is.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// Says which resource of the apiserver a struct is. It has a field `metadata`.
macro_rules! resource {
    ($type:ty, $group:expr, $version:literal, $kind:expr, $plural:literal) => {
        impl kube::core::Resource for $type {
            type DynamicType = ();
            type Scope = kube::core::DynamicResourceScope;

            fn kind((): &()) -> std::borrow::Cow<'_, str> {
                $kind.into()
            }
            fn group((): &()) -> std::borrow::Cow<'_, str> {
                $group.into()
            }
            fn version((): &()) -> std::borrow::Cow<'_, str> {
                $version.into()
            }
            fn plural((): &()) -> std::borrow::Cow<'_, str> {
                $plural.into()
            }
            fn meta(&self) -> &kube::core::ObjectMeta {
                &self.metadata
            }
            fn meta_mut(&mut self) -> &mut kube::core::ObjectMeta {
                &mut self.metadata
            }
        }
    };
}
pub(super) use resource;

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum IntOrString {
    Int(u16),
    String(String),
}

/// TCP, when nothing is said, here as in Pods.
pub(super) fn is_tcp(protocol: Option<&str>) -> bool {
    matches!(protocol, None | Some("TCP"))
}

fn addresses<'a>(given: impl IntoIterator<Item = &'a String>) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for address in given.into_iter().filter_map(|given| given.parse().ok()) {
        if !found.contains(&address) {
            found.push(address);
        }
    }
    found
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Service {
    #[serde(deserialize_with = "meta::read")]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: ServiceSpec,
    #[serde(default)]
    status: ServiceStatus,
}
resource!(Service, "", "v1", "Service", "services");

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ServiceSpec {
    #[serde(rename = "type")]
    kind: Option<String>,
    selector: Option<BTreeMap<String, String>>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
    #[serde(rename = "externalIPs")]
    external_ips: Option<Vec<String>>,
    ports: Option<Vec<ServicePort>>,
    publish_not_ready_addresses: bool,
    session_affinity: Option<String>,
    internal_traffic_policy: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServicePort {
    #[serde(default)]
    name: String,
    port: u16,
    target_port: Option<IntOrString>,
    node_port: Option<u16>,
    app_protocol: Option<String>,
    protocol: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ServiceStatus {
    load_balancer: LoadBalancer,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct LoadBalancer {
    ingress: Option<Vec<Ingress>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ingress {
    ip: Option<String>,
    ip_mode: Option<String>,
}

impl Watched for Service {
    const KIND: Kind = Kind::Service;
    const PLURAL: &'static str = "services";

    fn into_model(self) -> Result<Option<Object>, Vec<Wrong>> {
        let spec = self.spec;
        // A name for something else: the application connects to what DNS says that is.
        if spec.kind.as_deref() == Some("ExternalName") {
            return Ok(None);
        }
        let cluster_ips = spec.cluster_ips.unwrap_or_default();
        let external_ips = spec.external_ips.unwrap_or_default();
        let ingress = self.status.load_balancer.ingress.unwrap_or_default();
        // kube-proxy takes a load balancer's address for its own, except in mode Proxy (KEP-1860).
        let balancer = ingress
            .iter()
            .filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy"))
            .filter_map(|ingress| ingress.ip.as_ref());
        let outer: Vec<&String> = external_ips.iter().chain(balancer).collect();
        let cluster = spec.cluster_ip.iter().chain(&cluster_ips);
        let vips = addresses(cluster.chain(outer.iter().copied()));
        let ports = spec.ports.unwrap_or_default();
        let ports = ports
            .into_iter()
            .filter(|port| is_tcp(port.protocol.as_deref()))
            .map(|port| model::ServicePort {
                protocol: protocol(port.app_protocol.as_deref(), &port.name),
                target: match port.target_port {
                    None | Some(IntOrString::Int(0)) => TargetPort::Number(port.port),
                    Some(IntOrString::Int(number)) => TargetPort::Number(number),
                    Some(IntOrString::String(name)) => TargetPort::Name(name),
                },
                name: port.name,
                port: port.port,
                node_port: port.node_port.filter(|port| *port != 0),
            });
        Ok(Some(Object::Service(model::Service {
            external: false,
            name: meta::name(&self.metadata),
            selector: spec.selector.unwrap_or_default(),
            headless: spec.cluster_ip.as_deref() == Some("None"),
            vips,
            outer_vips: addresses(outer),
            publish_not_ready: spec.publish_not_ready_addresses,
            sliced: true,
            node_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            // The hints of its slices say it.
            distribution: None,
            client_affinity: spec.session_affinity.as_deref() == Some("ClientIP"),
            ports: ports.collect(),
        })))
    }
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct EndpointSlice {
    #[serde(deserialize_with = "meta::read")]
    metadata: ObjectMeta,
    #[serde(default)]
    endpoints: Option<Vec<Endpoint>>,
    #[serde(default)]
    ports: Option<Vec<EndpointPort>>,
}
resource!(
    EndpointSlice,
    "discovery.k8s.io",
    "v1",
    "EndpointSlice",
    "endpointslices"
);

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Endpoint {
    #[serde(default)]
    addresses: Vec<String>,
    #[serde(default)]
    conditions: Conditions,
    zone: Option<String>,
    node_name: Option<String>,
    hints: Option<Hints>,
    target_ref: Option<TargetRef>,
}

#[derive(Clone, Debug, Deserialize)]
struct TargetRef {
    kind: Option<String>,
    namespace: Option<String>,
    name: Option<String>,
    uid: Option<String>,
}

impl TargetRef {
    fn into_model(self, namespace: &str) -> Option<WorkloadRef> {
        let name = self.name?;
        (self.kind.as_deref() == Some("Pod")).then(|| WorkloadRef {
            name: Name::new(self.namespace.unwrap_or_else(|| namespace.to_owned()), name),
            uid: self.uid.unwrap_or_default(),
        })
    }
}

#[derive(Clone, Debug, Deserialize)]
struct EndpointPort {
    name: Option<String>,
    port: Option<u16>,
    protocol: Option<String>,
}

impl Watched for EndpointSlice {
    const KIND: Kind = Kind::EndpointSlice;
    const PLURAL: &'static str = "endpointslices";

    fn into_model(self) -> Result<Option<Object>, Vec<Wrong>> {
        let name = meta::name(&self.metadata);
        let labels = self.metadata.labels.unwrap_or_default();
        let Some(service) = labels.get(SERVICE_LABEL) else {
            return Ok(None);
        };
        let ports = self.ports.unwrap_or_default().into_iter();
        let ports = ports
            .filter(|port| is_tcp(port.protocol.as_deref()))
            .filter_map(|port| {
                Some(SlicePort {
                    name: port.name.unwrap_or_default(),
                    port: port.port?,
                })
            })
            .collect();
        let endpoints = self.endpoints.unwrap_or_default().into_iter();
        let endpoints = endpoints
            .map(|endpoint| SliceEndpoint {
                // A host name (addressType FQDN) is no address.
                addresses: addresses(&endpoint.addresses),
                health: endpoint.conditions.health(),
                zone: endpoint.zone.unwrap_or_default(),
                node: endpoint.node_name.unwrap_or_default(),
                hints: endpoint.hints.and_then(Hints::into_model),
                workload: endpoint
                    .target_ref
                    .and_then(|target| target.into_model(&name.namespace)),
            })
            .filter(|endpoint| !endpoint.addresses.is_empty())
            .collect();
        Ok(Some(Object::EndpointSlice(model::EndpointSlice {
            service: service.clone(),
            name,
            ports,
            endpoints,
        })))
    }
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Node {
    #[serde(deserialize_with = "meta::read")]
    metadata: ObjectMeta,
    #[serde(default)]
    status: NodeStatus,
}
resource!(Node, "", "v1", "Node", "nodes");

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct NodeStatus {
    addresses: Option<Vec<NodeAddress>>,
}

#[derive(Clone, Debug, Deserialize)]
struct NodeAddress {
    address: String,
}

impl Watched for Node {
    const KIND: Kind = Kind::Node;
    const PLURAL: &'static str = "nodes";

    fn into_model(self) -> Result<Option<Object>, Vec<Wrong>> {
        let name = meta::name(&self.metadata);
        let mut labels = self.metadata.labels.unwrap_or_default();
        let given = self.status.addresses.unwrap_or_default();
        Ok(Some(Object::Node(model::Node {
            name,
            zone: labels.remove(ZONE_LABEL).unwrap_or_default(),
            // Host names among them are no addresses.
            addresses: addresses(given.iter().map(|given| &given.address)),
        })))
    }
}
