//! What a proxy needs to know about the workload it stands beside.

use std::collections::BTreeMap;

use weft_api::names::CONTROL_PLANE_NAMESPACE;
use weft_api::policy::meta::LabelSelector;
use weft_api::policy::{AccessLogMode, MtlsMode, PeerAuthenticationSpec, TelemetrySpec};
use weft_api::proto;
use weft_api::proto::Protocol;

use super::Settings;
use super::endpoints::target_port;
use super::external;
use super::provenance::Sources;
use super::resilience;
use crate::model::{Check, Name, Policy, Probe, Workload, World, in_namespace};

/// Compiles a workload's own table; `None` when there is no such workload.
pub(super) fn workload(world: &World, settings: &Settings, name: &Name) -> Option<proto::Workload> {
    let workload = world.workload(name)?;
    let mut ports: BTreeMap<u16, Protocol> = BTreeMap::new();
    for service in world.services_of(workload) {
        for port in &service.ports {
            if let Some(number) = target_port(workload, port) {
                let known = ports.entry(number).or_insert(port.protocol);
                // Of several Services the first by name that says something.
                if *known == Protocol::Auto {
                    *known = port.protocol;
                }
            }
        }
    }
    for port in &workload.ports {
        let known = ports.entry(port.port).or_insert(port.protocol);
        if port.protocol != Protocol::Auto {
            *known = port.protocol;
        }
    }
    let modes = modes(world, workload);
    for port in modes.ports.keys() {
        ports.entry(*port).or_insert(Protocol::Auto);
    }
    let mut limits = resilience::limits(world, workload);
    for port in limits.keys() {
        ports.entry(*port).or_insert(Protocol::Auto);
    }
    Some(proto::Workload {
        namespace: name.namespace.clone(),
        name: name.name.clone(),
        service_account: workload.service_account.clone(),
        zone: world.zone_of(workload).to_owned(),
        labels: workload.labels.clone(),
        mtls: modes.all.into(),
        ports: ports
            .into_iter()
            .map(|(port, protocol)| {
                let limits = limits.remove(&port).unwrap_or_default();
                proto::WorkloadPort {
                    port: u32::from(port),
                    protocol: protocol.into(),
                    mtls: modes.ports.get(&port).map(|mode| (*mode).into()),
                    rate_limits: limits.rates,
                    header_limits: limits.heads,
                    connection: limits.connection,
                }
            })
            .collect(),
        telemetry: Some(telemetry(world, settings, workload)),
        display_name: display_name(workload),
        probes: workload.probes.iter().filter_map(probe).collect(),
        external_hosts: external::hosts(world, &name.namespace),
        egress: external::egress(world, &name.namespace).into(),
        node: workload.node.clone(),
        application_ended: workload.ended,
    })
}

/// The protocol of a workload's port: what it says itself, else what a Service says that leads
/// there.
pub(super) fn protocol_of(world: &World, workload: &Workload, number: u16) -> Option<Protocol> {
    let own = workload
        .ports
        .iter()
        .find(|port| port.port == number)
        .map(|port| port.protocol)
        .filter(|protocol| *protocol != Protocol::Auto);
    own.or_else(|| {
        world
            .services_of(workload)
            .into_iter()
            .flat_map(|service| &service.ports)
            .find(|port| {
                target_port(workload, port) == Some(number) && port.protocol != Protocol::Auto
            })
            .map(|port| port.protocol)
    })
}

pub(super) fn probe(probe: &Probe) -> Option<proto::Probe> {
    use proto::probe::Check as Way;
    Some(proto::Probe {
        port: u32::from(probe.port),
        check: Some(match &probe.check {
            Check::Http { path } => Way::HttpPath(path.clone()),
            Check::Tcp => Way::Tcp(true),
            Check::Grpc => Way::Grpc(true),
            Check::Https => return None,
        }),
    })
}

/// Whether a port of a workload takes mutual TLS only.
pub(super) fn is_strict(world: &World, workload: &Workload, port: u16) -> bool {
    modes(world, workload).of(port) == proto::MtlsMode::Strict
}

/// Whether a port of a workload takes no mutual TLS.
pub(super) fn is_plaintext(world: &World, workload: &Workload, port: u16) -> bool {
    modes(world, workload).of(port) == proto::MtlsMode::Disable
}

pub(super) fn display_name(workload: &Workload) -> String {
    ["app.kubernetes.io/name", "app"]
        .iter()
        .find_map(|label| workload.labels.get(*label))
        .unwrap_or(&workload.name.name)
        .clone()
}

/// The mode of one port, and which policies say so.
pub(super) fn mode_of(world: &World, workload: &Workload, port: u16) -> (proto::MtlsMode, Sources) {
    let layers = layers(&world.peer_authentication, workload, |spec| &spec.selector);
    let of_port = layers.iter().filter_map(|policy| {
        let selector = policy.spec.selector.as_ref()?;
        mode(policy.spec.port_level_mtls.get(&port)?.mode)?;
        Some((
            &policy.name,
            format!("{}, port {port}", chosen_by(selector)),
        ))
    });
    let of_all = layers.iter().filter_map(|policy| {
        mode(policy.spec.mtls?.mode)?;
        let target = meant(&policy.name, policy.spec.selector.as_ref());
        Some((&policy.name, target))
    });
    let mut sources = Sources::default();
    for (name, target) in of_port.chain(of_all) {
        let field = vec!["mtls.mode".to_owned()];
        sources.push(format!("PeerAuthentication {name}"), target, field);
    }
    (modes(world, workload).of(port), sources)
}

/// Which workloads a policy is for, in words.
fn meant(policy: &Name, selector: Option<&LabelSelector>) -> String {
    match selector {
        Some(selector) => chosen_by(selector),
        None if policy.namespace == CONTROL_PLANE_NAMESPACE => "the whole mesh".to_owned(),
        None => format!("namespace {}", policy.namespace),
    }
}

fn chosen_by(selector: &LabelSelector) -> String {
    let labels = selector.match_labels.iter();
    let labels: Vec<String> = labels
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    match labels.is_empty() {
        true => "every workload".to_owned(),
        false => format!("workloads {}", labels.join(",")),
    }
}

fn mode(given: MtlsMode) -> Option<proto::MtlsMode> {
    match given {
        MtlsMode::Unset => None,
        MtlsMode::Permissive => Some(proto::MtlsMode::Permissive),
        MtlsMode::Strict => Some(proto::MtlsMode::Strict),
        MtlsMode::Disable => Some(proto::MtlsMode::Disable),
    }
}

struct Modes {
    all: proto::MtlsMode,
    ports: BTreeMap<u16, proto::MtlsMode>,
}

impl Modes {
    fn of(&self, port: u16) -> proto::MtlsMode {
        *self.ports.get(&port).unwrap_or(&self.all)
    }
}

fn modes(world: &World, workload: &Workload) -> Modes {
    let layers = layers(&world.peer_authentication, workload, |spec| &spec.selector);
    let specs = layers.iter().map(|policy| &policy.spec);
    let all = specs
        .clone()
        .find_map(|spec: &PeerAuthenticationSpec| mode(spec.mtls?.mode))
        .unwrap_or(proto::MtlsMode::Permissive);
    let ports = specs
        .filter(|spec| spec.selector.is_some())
        .flat_map(|spec| &spec.port_level_mtls)
        .filter_map(|(port, mtls)| Some((*port, mode(mtls.mode)?)))
        .collect();
    Modes { all, ports }
}

pub(super) fn telemetry(
    world: &World,
    settings: &Settings,
    workload: &Workload,
) -> proto::Telemetry {
    let layers = layers(&world.telemetry, workload, |spec| &spec.selector);
    let specs = layers.iter().map(|policy| &policy.spec);
    let percent = specs
        .clone()
        .find_map(|spec| spec.tracing.sampling_percent)
        .unwrap_or(settings.sampling_percent);
    let mode = specs.clone().find_map(|spec| spec.access_log.mode);
    let endpoint = specs
        .clone()
        .find_map(|spec| spec.tracing.otlp_endpoint.clone());
    proto::Telemetry {
        // Checked to be 0 to 100 when it was read.
        sampling_per_myriad: (percent.clamp(0.0, 100.0) * 100.0).round() as u32,
        access_log: match mode {
            None | Some(AccessLogMode::Off) => proto::AccessLog::Off,
            Some(AccessLogMode::Errors) => proto::AccessLog::Errors,
            Some(AccessLogMode::All) => proto::AccessLog::All,
        }
        .into(),
        otlp_endpoint: endpoint.unwrap_or_default(),
    }
}

/// Which policies say what [`telemetry`] has.
pub(super) fn telemetry_sources(world: &World, workload: &Workload) -> Sources {
    let mut sources = Sources::default();
    for policy in layers(&world.telemetry, workload, |spec| &spec.selector) {
        let spec: &TelemetrySpec = &policy.spec;
        let fields = [
            (spec.access_log.mode.is_some(), "accessLog.mode"),
            (
                spec.tracing.sampling_percent.is_some(),
                "tracing.samplingPercent",
            ),
            (spec.tracing.otlp_endpoint.is_some(), "tracing.otlpEndpoint"),
        ];
        let set = fields.into_iter().filter(|(set, _)| *set);
        let set = set.map(|(_, field)| field.to_owned()).collect();
        let target = meant(&policy.name, spec.selector.as_ref());
        sources.push(format!("Telemetry {}", policy.name), target, set);
    }
    sources
}

/// The policies that apply to a workload, most specific first: with a selector, the namespace's,
/// the whole mesh's; at most one each.
fn layers<'a, T>(
    policies: &'a BTreeMap<Name, Policy<T>>,
    workload: &Workload,
    selector: impl Fn(&T) -> &Option<LabelSelector>,
) -> Vec<&'a Policy<T>> {
    let first = |namespace: &str, wanted: &dyn Fn(&Option<LabelSelector>) -> bool| {
        in_namespace(policies, namespace)
            .filter(|policy| wanted(selector(&policy.spec)))
            .min_by(|a, b| a.precedence().cmp(&b.precedence()))
    };
    let namespace = workload.name.namespace.as_str();
    let own = first(namespace, &|selector| {
        selector
            .as_ref()
            .is_some_and(|selector| selector.matches(&workload.labels))
    });
    let all = first(namespace, &Option::is_none);
    let mesh = (namespace != CONTROL_PLANE_NAMESPACE)
        .then(|| first(CONTROL_PLANE_NAMESPACE, &Option::is_none))
        .flatten();
    own.into_iter().chain(all).chain(mesh).collect()
}
