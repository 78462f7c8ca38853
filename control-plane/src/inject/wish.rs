//! Whether a sidecar is wanted, and whether the pod can have one.

use serde_json::Value;
use weft_api::names::{
    ADMIN_PORT, INBOUND_PORT, INIT_CONTAINER, INJECT, OUTBOUND_PORT, PROXY_CONTAINER, PROXY_UID,
};

use super::{Refused, Request, Settings, annotation, containers, name};

/// Namespaces of Kubernetes itself: what runs there is needed by what runs here.
pub const NEVER: [&str; 2] = ["kube-system", "kube-node-lease"];

/// Whether a sidecar is to be put in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    Yes,
    /// Asked for, but the pod cannot have one; why.
    Impossible(String),
    /// Not asked for; why.
    No(String),
}

/// The pod's own word, label before annotation, wins over its namespace's.
pub(super) fn wish(request: Request<'_>, settings: &Settings) -> Result<Wish, Refused> {
    let Request { pod, namespace, .. } = request;
    let label = pod
        .pointer("/metadata/labels")
        .and_then(|labels| labels.get(INJECT)?.as_str());
    let own = [("label", label), ("annotation", annotation(pod, INJECT))]
        .into_iter()
        .find_map(|(place, value)| Some((place, value?)));
    match own {
        Some((_, "enabled" | "true")) => {}
        Some((place, "disabled" | "false")) => {
            return Ok(Wish::No(format!(
                "the pod's {place} {INJECT} says that it wants no sidecar"
            )));
        }
        Some((place, other)) => {
            return Err(Refused(format!(
                "{place} {INJECT}: '{other}' is not known; write enabled or disabled"
            )));
        }
        None if !request.namespace_enabled => {
            return Ok(Wish::No(format!(
                "neither the namespace {namespace} nor the pod has {INJECT}: enabled"
            )));
        }
        None => {}
    }
    let flag = |field: &str| pod.pointer(field) == Some(&Value::Bool(true));
    let windows = ["/spec/os/name", "/spec/nodeSelector/kubernetes.io~1os"]
        .into_iter()
        .any(|field| pod.pointer(field).and_then(Value::as_str) == Some("windows"));
    Ok(
        if namespace == settings.system_namespace || NEVER.contains(&namespace) {
            Wish::Impossible(format!("pods of the namespace {namespace} get no sidecar"))
        } else if flag("/spec/hostNetwork") {
            Wish::Impossible(
                "the pod uses the node's network (hostNetwork), whose connections are not only its \
                 own"
                .to_owned(),
            )
        } else if windows {
            Wish::Impossible(
                "the pod is for Windows, and connections are captured on Linux only".to_owned(),
            )
        } else {
            Wish::Yes
        },
    )
}

/// What would run, but not as it looks: connections that would bypass the mesh, ports taken twice.
pub(super) fn fits(pod: &Value) -> Result<(), Refused> {
    let ids = [("runAsUser", "user"), ("runAsGroup", "group")];
    for (field, what) in ids {
        let own = pod.pointer("/spec/securityContext");
        let clash = |context: Option<&Value>| {
            context.and_then(|context| context.get(field)?.as_u64()) == Some(u64::from(PROXY_UID))
        };
        let wrong = |who: &str| {
            Err(Refused(format!(
                "{who} runs as {what} {PROXY_UID}, which is the proxy's: its connections would \
                 bypass the mesh; choose another securityContext.{field}, or set {INJECT}: disabled"
            )))
        };
        if clash(own) {
            return wrong("the pod");
        }
        let theirs = containers(pod).filter(|container| !is_ours(container));
        for container in theirs {
            if clash(container.get("securityContext")) {
                return wrong(&format!(
                    "container {}",
                    name(container).unwrap_or("without a name")
                ));
            }
        }
    }
    let reserved = [OUTBOUND_PORT, INBOUND_PORT, ADMIN_PORT];
    for container in containers(pod).filter(|container| !is_ours(container)) {
        let ports = container.get("ports").and_then(Value::as_array);
        for port in ports.into_iter().flatten() {
            let number = port.get("containerPort").and_then(Value::as_u64);
            let udp = port.get("protocol").and_then(Value::as_str) == Some("UDP");
            if !udp && reserved.iter().any(|own| number == Some(u64::from(*own))) {
                return Err(Refused(format!(
                    "container {} listens on port {}, which the proxy needs; choose another port, \
                     or set {INJECT}: disabled",
                    name(container).unwrap_or("without a name"),
                    number.unwrap_or_default()
                )));
            }
        }
    }
    Ok(())
}

fn is_ours(container: &Value) -> bool {
    matches!(name(container), Some(INIT_CONTAINER | PROXY_CONTAINER))
}
