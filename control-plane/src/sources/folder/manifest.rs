//! One file's text -> objects, or what is wrong with it.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use weft_api::policy::{
    API_VERSION, EgressPolicy, ExternalService, Metadata, PeerAuthentication, Telemetry,
    TrafficPolicy, Workload,
};

use super::kubernetes;
use super::yaml;
use crate::finding::{Finding, Severity};
use crate::model::{
    self, Object, Policy, RouteKind, WorkloadPort, is_known_protocol, protocol, validate,
};
use crate::sources::gateway;

/// An object and where it begins.
#[derive(Clone, Debug, PartialEq)]
pub struct Parsed {
    pub object: Object,
    /// Line of the first line of its document, from 1.
    pub line: u32,
}

/// A whole file: its objects, and what is worth a word. Errors: what keeps the file from being
/// used.
pub fn parse(file: &Path, text: &str) -> Result<(Vec<Parsed>, Vec<Finding>), Vec<Finding>> {
    let mut parsed = Vec::new();
    let mut findings = Vec::new();
    for document in yaml::documents(text) {
        let mut context = Context {
            file,
            document,
            item: None,
            findings: &mut findings,
        };
        context.read_all(&mut parsed, MAX_DEPTH);
    }
    if findings
        .iter()
        .any(|found| found.severity == Severity::Error)
    {
        return Err(findings);
    }
    Ok((parsed, findings))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TypeMeta {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
}

/// Deepest list in a list.
const MAX_DEPTH: u32 = 8;

struct Context<'a> {
    file: &'a Path,
    document: yaml::Document<'a>,
    /// Which item of a list it is, from 0.
    item: Option<usize>,
    findings: &'a mut Vec<Finding>,
}

const KINDS: &str = "Workload, TrafficPolicy, PeerAuthentication, Telemetry, ExternalService and EgressPolicy of \
     policy.weft.dev/v1alpha1, Service of v1, EndpointSlice of discovery.k8s.io/v1, and HTTPRoute, \
     GRPCRoute, TLSRoute and TCPRoute of gateway.networking.k8s.io, and XBackendTrafficPolicy of \
     gateway.networking.x-k8s.io/v1alpha1, and List of v1 with items of these";

impl Context<'_> {
    fn report(
        &mut self,
        severity: Severity,
        line: Option<u32>,
        object: Option<String>,
        message: String,
        help: &str,
    ) {
        self.findings.push(Finding {
            file: Some(self.file.to_owned()),
            line: line.or(Some(self.document.line)),
            severity,
            object,
            message,
            help: help.to_owned(),
        });
    }

    /// Reads a document, or each item of a list (as `kubectl get -o yaml` prints it).
    fn read_all(&mut self, parsed: &mut Vec<Parsed>, depth: u32) {
        let types = self.document.read::<TypeMeta>();
        if !types.is_ok_and(|types| types.api_version == "v1" && types.kind == "List") {
            let line = self.document.line;
            parsed.extend(self.read().map(|object| Parsed { object, line }));
            return;
        }
        if depth == 0 {
            self.report(
                Severity::Error,
                None,
                None,
                format!("lists in lists in lists: deeper than {MAX_DEPTH}"),
                "put the items into one list, or into documents",
            );
            return;
        }
        let items = match self.document.items() {
            Ok(items) => items,
            Err(error) => {
                self.report(
                    Severity::Error,
                    error.line,
                    None,
                    error.message,
                    "write the objects below items",
                );
                return;
            }
        };
        for (index, item) in items.iter().enumerate() {
            let mut context = Context {
                file: self.file,
                document: item.document(),
                item: Some(index),
                findings: &mut *self.findings,
            };
            context.read_all(parsed, depth - 1);
        }
    }

    /// What of a document that cannot be used can be said of which object it is; only for items of
    /// a list, where the line alone is no help.
    fn name(&self) -> Option<String> {
        #[derive(Deserialize)]
        struct Named {
            kind: String,
            metadata: Option<Meta>,
        }
        #[derive(Deserialize)]
        struct Meta {
            name: String,
            namespace: Option<String>,
        }
        let index = self.item?;
        let Ok(Named { kind, metadata }) = self.document.read() else {
            return Some(format!("items[{index}]"));
        };
        Some(match metadata {
            None => format!("items[{index}], {kind}"),
            Some(Meta { name, namespace }) => {
                let namespace = namespace.as_deref().unwrap_or("default");
                format!("items[{index}], {kind} {namespace}/{name}")
            }
        })
    }

    /// Reads a document as `T`; reports why it is none.
    fn typed<T: DeserializeOwned>(&mut self) -> Option<T> {
        match self.document.read() {
            Ok(value) => Some(value),
            Err(error) => {
                self.report(
                    Severity::Error,
                    error.line,
                    self.name(),
                    error.message,
                    "correct it; docs/reference/policies.md has every field with an example",
                );
                None
            }
        }
    }

    fn read(&mut self) -> Option<Object> {
        let types: TypeMeta = self.typed()?;
        let object = match (types.api_version.as_str(), types.kind.as_str()) {
            ("v1", "Service") => self.typed::<kubernetes::Service>()?.into_model(),
            ("discovery.k8s.io/v1", "EndpointSlice") => {
                self.typed::<kubernetes::EndpointSlice>()?.into_model()
            }
            (API_VERSION, "Workload") => {
                self.typed::<Workload>().map(|given| self.workload(given))?
            }
            (API_VERSION, "TrafficPolicy") => {
                let given: TrafficPolicy = self.typed()?;
                Object::TrafficPolicy(Box::new(policy(given.metadata, given.spec)))
            }
            (API_VERSION, "PeerAuthentication") => {
                let given: PeerAuthentication = self.typed()?;
                Object::PeerAuthentication(policy(given.metadata, given.spec))
            }
            (API_VERSION, "Telemetry") => {
                let given: Telemetry = self.typed()?;
                Object::Telemetry(policy(given.metadata, given.spec))
            }
            (API_VERSION, "EgressPolicy") => {
                let given: EgressPolicy = self.typed()?;
                Object::EgressPolicy(policy(given.metadata, given.spec))
            }
            (API_VERSION, "ExternalService") => {
                let given: ExternalService = self.typed()?;
                self.known_protocols(
                    &given.metadata,
                    given.spec.ports.iter().map(|port| &port.app_protocol),
                );
                Object::ExternalService(Box::new(policy(given.metadata, given.spec)))
            }
            (gateway::X_API_VERSION, "XBackendTrafficPolicy") => {
                self.typed::<gateway::BackendTrafficPolicy>()?.into_model()
            }
            (version, "HTTPRoute") if gateway::is_version(version) => {
                self.typed::<gateway::HttpRoute>()?.into_model()
            }
            (version, "GRPCRoute") if gateway::is_version(version) => {
                self.typed::<gateway::GrpcRoute>()?.into_model()
            }
            (version, "TLSRoute") if gateway::is_version(version) => self
                .typed::<gateway::TlsRoute>()?
                .into_stream_model(RouteKind::Tls),
            (version, "TCPRoute") if gateway::is_version(version) => self
                .typed::<gateway::TcpRoute>()?
                .into_stream_model(RouteKind::Tcp),
            ("", _) | (_, "") => {
                let what = match self.item {
                    None => "the document".to_owned(),
                    Some(index) => format!("items[{index}]"),
                };
                self.report(
                    Severity::Error,
                    None,
                    None,
                    format!("{what} has no apiVersion or no kind"),
                    &format!("write both; known are {KINDS}"),
                );
                return None;
            }
            (version, kind) => {
                // A Deployment lying beside the Services is no mistake; our own kinds misspelt are.
                let ours = version.contains("weft.dev")
                    || matches!(
                        kind,
                        "Service"
                            | "EndpointSlice"
                            | "Workload"
                            | "TrafficPolicy"
                            | "PeerAuthentication"
                            | "Telemetry"
                            | "ExternalService"
                            | "EgressPolicy"
                            | "HTTPRoute"
                            | "GRPCRoute"
                            | "TLSRoute"
                            | "TCPRoute"
                            | "XBackendTrafficPolicy"
                    );
                let severity = if ours {
                    Severity::Error
                } else {
                    Severity::Warning
                };
                self.report(
                    severity,
                    None,
                    self.name(),
                    format!("'{kind}' of '{version}' is not known and not used"),
                    &format!("known are {KINDS}"),
                );
                return None;
            }
        };
        let reference = object.reference().to_string();
        let invalid = validate(&object);
        if invalid.is_empty() {
            return Some(object);
        }
        for found in invalid {
            let line = self.document.line_of(&found.path);
            self.report(
                Severity::Error,
                line,
                Some(reference.clone()),
                found.message,
                &found.help,
            );
        }
        None
    }

    /// Warns of protocols that nobody knows.
    fn known_protocols<'a>(
        &mut self,
        metadata: &Metadata,
        given: impl Iterator<Item = &'a Option<String>>,
    ) {
        for (index, protocol) in given.enumerate() {
            let Some(unknown) = protocol
                .as_deref()
                .filter(|given| !is_known_protocol(given))
            else {
                continue;
            };
            let path = ["spec", "ports", &index.to_string(), "appProtocol"].map(str::to_owned);
            let line = self.document.line_of(&path);
            self.report(
                Severity::Warning,
                line,
                Some(format!("ExternalService {}/{}", metadata.namespace, metadata.name)),
                format!("appProtocol '{unknown}' is not known; the protocol is found out from each connection's first bytes"),
                "use http, http2, grpc, tcp or tls, or leave it out",
            );
        }
    }

    fn workload(&mut self, given: Workload) -> Object {
        let name = model::Name::new(given.metadata.namespace, given.metadata.name);
        let mut ports = Vec::new();
        for (index, port) in given.spec.ports.into_iter().enumerate() {
            if let Some(unknown) = port
                .app_protocol
                .as_deref()
                .filter(|given| !is_known_protocol(given))
            {
                let path = ["spec", "ports", &index.to_string(), "appProtocol"].map(str::to_owned);
                let line = self.document.line_of(&path);
                self.report(
                    Severity::Warning,
                    line,
                    Some(format!("Workload {name}")),
                    format!("appProtocol '{unknown}' is not known; the protocol is found out from each connection's first bytes"),
                    "use http, http2, grpc, tcp or tls, or leave it out",
                );
            }
            ports.push(WorkloadPort {
                protocol: protocol(port.app_protocol.as_deref(), &port.name),
                name: port.name,
                port: port.port,
            });
        }
        Object::Workload(model::Workload {
            name,
            labels: given.metadata.labels,
            service_account: given.spec.service_account,
            zone: given.spec.zone,
            node: given.spec.node,
            addresses: given.spec.addresses,
            ports,
            weight: given.spec.weight,
            health: match given.spec.health {
                weft_api::policy::workload::Health::Ready => weft_api::proto::Health::Ready,
                weft_api::policy::workload::Health::NotReady => weft_api::proto::Health::NotReady,
                weft_api::policy::workload::Health::Draining => weft_api::proto::Health::Draining,
            },
            sidecar: given.spec.sidecar,
            ..model::Workload::default()
        })
    }
}

fn policy<T>(metadata: Metadata, spec: T) -> Policy<T> {
    Policy {
        name: model::Name::new(metadata.namespace, metadata.name),
        created: metadata.creation_timestamp.unwrap_or_default(),
        spec,
    }
}
