//! `Service` (v1) and `EndpointSlice` (discovery.k8s.io/v1) as they are written in manifests: only
//! the fields that are used, with the rest ignored.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Deserialize;

use crate::model::{
    self, Distribution, Name, Object, SliceEndpoint, SlicePort, TargetPort, protocol,
};
use crate::sources::slices::{Conditions, Hints};

/// The label by which an EndpointSlice names its Service.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";

fn default_namespace() -> String {
    "default".to_owned()
}

#[derive(Deserialize)]
struct ObjectMeta {
    name: String,
    #[serde(default = "default_namespace")]
    namespace: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

#[derive(Deserialize)]
pub(super) struct Service {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: ServiceSpec,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ServiceSpec {
    selector: BTreeMap<String, String>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<ClusterIp>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Vec<ClusterIp>,
    ports: Vec<ServicePort>,
    publish_not_ready_addresses: bool,
    session_affinity: Option<SessionAffinity>,
    internal_traffic_policy: Option<TrafficPolicy>,
    traffic_distribution: Option<TrafficDistribution>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
enum SessionAffinity {
    None,
    #[serde(rename = "ClientIP")]
    ClientIp,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
enum TrafficPolicy {
    Cluster,
    Local,
}

/// "PreferClose" is the old name of "PreferSameZone" (KEP-3015).
#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[expect(clippy::enum_variant_names)] // As Kubernetes calls them.
enum TrafficDistribution {
    PreferClose,
    PreferSameZone,
    PreferSameNode,
}

/// An address, "None" (headless) or "" (not assigned yet).
#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
enum ClusterIp {
    Address(IpAddr),
    Headless,
    Unassigned,
}

impl TryFrom<String> for ClusterIp {
    type Error = String;

    fn try_from(given: String) -> Result<Self, Self::Error> {
        match given.as_str() {
            "None" => Ok(Self::Headless),
            "" => Ok(Self::Unassigned),
            address => address.parse().map(Self::Address).map_err(|_| {
                format!("'{given}' is not a cluster IP: write an IPv4 or IPv6 address, or None")
            }),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServicePort {
    #[serde(default)]
    name: String,
    port: u16,
    target_port: Option<IntOrString>,
    app_protocol: Option<String>,
    #[serde(default = "tcp")]
    protocol: String,
}

fn tcp() -> String {
    "TCP".to_owned()
}

#[derive(Deserialize)]
#[serde(untagged)]
enum IntOrString {
    Int(u16),
    String(String),
}

impl Service {
    pub(super) fn into_model(self) -> Object {
        let spec = self.spec;
        let given: Vec<ClusterIp> = spec
            .cluster_ip
            .into_iter()
            .chain(spec.cluster_ips)
            .collect();
        let mut vips: Vec<IpAddr> = Vec::new();
        for address in &given {
            if let ClusterIp::Address(address) = address
                && !vips.contains(address)
            {
                vips.push(*address);
            }
        }
        let ports = spec
            .ports
            .into_iter()
            .filter(|port| port.protocol == "TCP")
            .map(|port| model::ServicePort {
                protocol: protocol(port.app_protocol.as_deref(), &port.name),
                target: match port.target_port {
                    None | Some(IntOrString::Int(0)) => TargetPort::Number(port.port),
                    Some(IntOrString::Int(number)) => TargetPort::Number(number),
                    // kubectl writes 8080 as "8080" when quoted; a number is never a port's name.
                    Some(IntOrString::String(name)) => match name.parse() {
                        Ok(number) => TargetPort::Number(number),
                        Err(_) => TargetPort::Name(name),
                    },
                },
                name: port.name,
                port: port.port,
                node_port: None,
            })
            .collect();
        Object::Service(model::Service {
            external: false,
            name: Name::new(self.metadata.namespace, self.metadata.name),
            selector: spec.selector,
            headless: given.contains(&ClusterIp::Headless),
            vips,
            outer_vips: Vec::new(),
            publish_not_ready: spec.publish_not_ready_addresses,
            ports,
            sliced: false,
            client_affinity: spec.session_affinity == Some(SessionAffinity::ClientIp),
            node_local: spec.internal_traffic_policy == Some(TrafficPolicy::Local),
            distribution: spec.traffic_distribution.map(|given| match given {
                TrafficDistribution::PreferClose | TrafficDistribution::PreferSameZone => {
                    Distribution::SameZone
                }
                TrafficDistribution::PreferSameNode => Distribution::SameNode,
            }),
        })
    }
}

#[derive(Deserialize)]
pub(super) struct EndpointSlice {
    metadata: ObjectMeta,
    /// The apiserver says null when there are none; so below.
    endpoints: Option<Vec<Endpoint>>,
    ports: Option<Vec<Port>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Endpoint {
    addresses: Vec<IpAddr>,
    #[serde(default)]
    conditions: Conditions,
    zone: Option<String>,
    node_name: Option<String>,
    hints: Option<Hints>,
}

#[derive(Deserialize)]
struct Port {
    #[serde(default)]
    name: Option<String>,
    port: Option<u16>,
    #[serde(default = "tcp")]
    protocol: String,
}

impl EndpointSlice {
    pub(super) fn into_model(self) -> Object {
        Object::EndpointSlice(model::EndpointSlice {
            name: Name::new(self.metadata.namespace, self.metadata.name),
            service: self
                .metadata
                .labels
                .get(SERVICE_LABEL)
                .cloned()
                .unwrap_or_default(),
            ports: self
                .ports
                .into_iter()
                .flatten()
                .filter(|port| port.protocol == "TCP")
                .filter_map(|port| {
                    Some(SlicePort {
                        name: port.name.unwrap_or_default(),
                        port: port.port?,
                    })
                })
                .collect(),
            endpoints: self
                .endpoints
                .into_iter()
                .flatten()
                .map(|endpoint| SliceEndpoint {
                    health: endpoint.conditions.health(),
                    addresses: endpoint.addresses,
                    zone: endpoint.zone.unwrap_or_default(),
                    node: endpoint.node_name.unwrap_or_default(),
                    hints: endpoint.hints.and_then(Hints::into_model),
                    workload: None,
                })
                .collect(),
        })
    }
}
