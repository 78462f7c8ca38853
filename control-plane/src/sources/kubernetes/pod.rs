//! Pods as the apiserver serves them: the fields that are used.

use std::net::IpAddr;

use kube::core::ObjectMeta;
use serde::Deserialize;
use weft_api::names::{ADMIN_PORT, PROTOCOL_ANNOTATION, PROXY_CONTAINER, WEIGHT_ANNOTATION};
use weft_api::proto::{Health, Protocol};

use super::meta;
use super::objects::{IntOrString, is_tcp, resource};
use super::watch::{Watched, Wrong};
use crate::model::{Check, Kind, Object, Probe, Workload, WorkloadPort, protocol};

/// Largest weight.
const MAX_WEIGHT: u32 = 10_000;

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Pod {
    #[serde(deserialize_with = "meta::read")]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: PodSpec,
    #[serde(default)]
    status: PodStatus,
}
resource!(Pod, "", "v1", "Pod", "pods");

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodSpec {
    node_name: Option<String>,
    service_account_name: Option<String>,
    host_network: bool,
    restart_policy: Option<String>,
    containers: Vec<Container>,
    init_containers: Option<Vec<Container>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Container {
    name: String,
    #[serde(default)]
    ports: Vec<ContainerPort>,
    liveness_probe: Option<Handler>,
    readiness_probe: Option<Handler>,
    startup_probe: Option<Handler>,
    lifecycle: Option<Lifecycle>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort {
    #[serde(default)]
    name: String,
    container_port: u16,
    protocol: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Lifecycle {
    post_start: Option<Handler>,
    pre_stop: Option<Handler>,
}

/// What the kubelet does to a container.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Handler {
    http_get: Option<HttpGet>,
    tcp_socket: Option<TcpSocket>,
    grpc: Option<Grpc>,
}

#[derive(Clone, Debug, Deserialize)]
struct HttpGet {
    #[serde(default)]
    path: String,
    port: IntOrString,
    #[serde(default)]
    host: String,
    scheme: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
struct TcpSocket {
    port: IntOrString,
    #[serde(default)]
    host: String,
}

#[derive(Clone, Debug, Deserialize)]
struct Grpc {
    port: u16,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct PodStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<PodIp>>,
    #[serde(rename = "containerStatuses")]
    containers: Option<Vec<ContainerStatus>>,
}

#[derive(Clone, Debug, Deserialize)]
struct ContainerStatus {
    name: String,
    #[serde(default)]
    state: ContainerState,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct ContainerState {
    terminated: Option<Terminated>,
}

#[derive(Clone, Debug, Deserialize)]
struct Terminated {
    #[serde(default, rename = "exitCode")]
    exit_code: i32,
}

#[derive(Clone, Debug, Deserialize)]
struct PodIp {
    #[serde(default)]
    ip: String,
}

impl Container {
    /// A port given by number, or by the name this container gives it.
    fn port(&self, given: &IntOrString) -> Option<u16> {
        let number = match given {
            IntOrString::Int(number) => *number,
            IntOrString::String(name) => match name.parse() {
                Ok(number) => number,
                Err(_) => {
                    let known = self.ports.iter().find(|port| port.name == *name)?;
                    known.container_port
                }
            },
        };
        (number != 0).then_some(number)
    }

    /// What the kubelet asks of the container's ports over the pod's address.
    fn probes(&self) -> impl Iterator<Item = Probe> {
        let lifecycle = self.lifecycle.iter();
        let hooks =
            lifecycle.flat_map(|lifecycle| lifecycle.post_start.iter().chain(&lifecycle.pre_stop));
        self.liveness_probe
            .iter()
            .chain(&self.readiness_probe)
            .chain(&self.startup_probe)
            .chain(hooks)
            .filter_map(|handler| self.probe(handler))
    }

    fn probe(&self, handler: &Handler) -> Option<Probe> {
        if let Some(http) = &handler.http_get {
            // A host is somebody else's address.
            if !http.host.is_empty() {
                return None;
            }
            let slash = if http.path.starts_with('/') { "" } else { "/" };
            let path = format!("{slash}{}", http.path);
            return Some(Probe {
                port: self.port(&http.port)?,
                check: match http.scheme.as_deref() {
                    Some("HTTPS") => Check::Https,
                    _ => Check::Http { path },
                },
            });
        }
        if let Some(tcp) = &handler.tcp_socket {
            return tcp.host.is_empty().then_some(Probe {
                port: self.port(&tcp.port)?,
                check: Check::Tcp,
            });
        }
        handler.grpc.as_ref().map(|grpc| Probe {
            port: grpc.port,
            check: Check::Grpc,
        })
    }
}

impl PodSpec {
    /// Whether the application of a pod that is to end (a Job's) has ended for good, so that the proxy
    /// is all that keeps the pod. A native sidecar, an init container, the kubelet ends by itself; a
    /// proxy among the containers (below Kubernetes 1.29, or put in for that) has to be told.
    fn has_ended(&self, status: &PodStatus) -> bool {
        let is_over = |terminated: &Terminated| match self.restart_policy.as_deref() {
            Some("Never") => true,
            // Else it is started again.
            Some("OnFailure") => terminated.exit_code == 0,
            _ => false,
        };
        let has_ended = |container: &Container| {
            let mut all = status.containers.iter().flatten();
            let own = all.find(|status| status.name == container.name);
            let terminated = own.and_then(|status| status.state.terminated.as_ref());
            terminated.is_some_and(is_over)
        };
        let is_proxy = |container: &&Container| container.name == PROXY_CONTAINER;
        self.containers.iter().any(|container| is_proxy(&container))
            && self
                .containers
                .iter()
                .filter(|container| !is_proxy(container))
                .all(has_ended)
    }
}

impl PodStatus {
    fn addresses(&self) -> Vec<IpAddr> {
        let all = self.pod_ips.iter().flatten().map(|given| &given.ip);
        let mut found: Vec<IpAddr> = Vec::new();
        for address in all.chain(&self.pod_ip).filter_map(|ip| ip.parse().ok()) {
            if !found.contains(&address) {
                found.push(address);
            }
        }
        found
    }

    /// A pod that has run to its end: its address may be another's already.
    fn is_over(&self) -> bool {
        matches!(self.phase.as_deref(), Some("Succeeded" | "Failed"))
    }
}

/// What is spoken on ports, "8080=grpc,9000=tcp". The webhook refuses what makes no sense; in a pod
/// that it has not seen, that is passed over.
fn protocols(given: &str) -> impl Iterator<Item = (u16, Protocol)> {
    given.split(',').filter_map(|pair| {
        let (port, spoken) = pair.split_once('=')?;
        let port = port.trim().parse().ok().filter(|port| *port != 0)?;
        Some((port, protocol(Some(spoken.trim()), "")))
    })
}

/// The application's own metrics, which it offers to a Prometheus outside the mesh by the usual
/// annotations: let in as the kubelet's probes are.
fn scraped<'a>(annotation: impl Fn(&str) -> Option<&'a str>) -> Option<Probe> {
    if annotation("prometheus.io/scrape")? != "true" {
        return None;
    }
    let port = annotation("prometheus.io/port")?.parse().ok()?;
    let path = annotation("prometheus.io/path").unwrap_or("/metrics");
    let slash = if path.starts_with('/') { "" } else { "/" };
    (port != 0 && port != ADMIN_PORT).then(|| Probe {
        port,
        check: Check::Http {
            path: format!("{slash}{path}"),
        },
    })
}

impl Watched for Pod {
    const KIND: Kind = Kind::Workload;
    const PLURAL: &'static str = "pods";

    fn into_model(self) -> Result<Option<Object>, Vec<Wrong>> {
        let (meta, spec, status) = (self.metadata, self.spec, self.status);
        if status.is_over() {
            return Ok(None);
        }
        let containers = || {
            spec.init_containers
                .iter()
                .flatten()
                .chain(&spec.containers)
        };
        let sidecar = !spec.host_network && containers().any(|c| c.name == PROXY_CONTAINER);
        let applications = || containers().filter(|container| container.name != PROXY_CONTAINER);
        let mut ports: Vec<WorkloadPort> = Vec::new();
        for port in applications().flat_map(|container| &container.ports) {
            if is_tcp(port.protocol.as_deref()) {
                ports.push(WorkloadPort {
                    name: port.name.clone(),
                    port: port.container_port,
                    // A container's port has a name for the Service's sake; what is spoken there
                    // is the Service's to say.
                    protocol: Protocol::Auto,
                });
            }
        }
        let annotation = |key: &str| {
            let annotations = meta.annotations.as_ref()?;
            annotations.get(key).map(String::as_str)
        };
        for (number, protocol) in protocols(annotation(PROTOCOL_ANNOTATION).unwrap_or_default()) {
            match ports.iter_mut().find(|port| port.port == number) {
                Some(port) => port.protocol = protocol,
                None => ports.push(WorkloadPort {
                    name: String::new(),
                    port: number,
                    protocol,
                }),
            }
        }
        let mut probes: Vec<Probe> = applications().flat_map(Container::probes).collect();
        // The proxy's own port is not captured.
        probes.retain(|probe| probe.port != ADMIN_PORT);
        probes.extend(scraped(annotation));
        probes.sort();
        probes.dedup();
        // Kept for as long as the pod lives.
        probes.shrink_to_fit();
        ports.shrink_to_fit();
        let name = meta::name(&meta);
        let weight = annotation(WEIGHT_ANNOTATION).and_then(|weight| weight.parse::<u32>().ok());
        Ok(Some(Object::Workload(Workload {
            name,
            labels: meta.labels.unwrap_or_default(),
            service_account: spec
                .service_account_name
                .clone()
                .filter(|account| !account.is_empty())
                .unwrap_or_else(|| "default".to_owned()),
            zone: String::new(),
            addresses: status.addresses(),
            ports,
            weight: weight.map_or(1, |weight| weight.min(MAX_WEIGHT)),
            // Whether it is ready is said by its EndpointSlices; that it is to go, first by itself.
            health: match meta.deletion_timestamp {
                Some(_) => Health::Draining,
                None => Health::Ready,
            },
            sidecar,
            uid: meta.uid.unwrap_or_default(),
            node: spec.node_name.clone().unwrap_or_default(),
            host_network: spec.host_network,
            probes,
            ended: spec.has_ended(&status),
        })))
    }
}
