//! The containers and volumes that are put into a pod.

use std::collections::{BTreeMap, BTreeSet};

use aws_lc_rs::digest::{SHA256, digest};
use serde_json::{Map, Value, json};
use weft_api::names::{
    ADMIN_PORT, INIT_CONTAINER, PROXY_CONTAINER, PROXY_UID, TOKEN_AUDIENCE, TOKEN_PATH,
    TRUST_CONFIG_MAP, TRUST_KEY, TRUST_PATH,
};

use super::annotations::Annotations;
use super::settings::Settings;

/// The proxy's token is valid for so long; the kubelet renews it at 80 % of that.
const TOKEN_SECONDS: u64 = 12 * 3600;
/// The application waits so long for the proxy, and the proxy for the control plane, before the
/// kubelet starts the proxy again.
const START_SECONDS: u64 = 600;
/// Where the program is in the proxy's image.
const PROXY_PROGRAM: &str = "/weft-proxy";
const TOKEN_VOLUME: &str = "weft-token";
const TRUST_VOLUME: &str = "weft-trust";

/// What is put into a pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Parts {
    /// Sets the capture rules.
    pub init: Value,
    pub proxy: Value,
    pub volumes: Vec<Value>,
}

impl Parts {
    /// Says whether two pods were given the same: 16 hexadecimal digits.
    pub fn revision(&self) -> String {
        let all = json!([self.init, self.proxy, self.volumes]).to_string();
        let hash = digest(&SHA256, all.as_bytes());
        hash.as_ref()[..8]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// Makes the containers and volumes; `probes` is what the kubelet is to ask of the application by way
/// of the proxy.
pub(super) fn parts(
    settings: &Settings,
    annotations: &Annotations,
    probes: &BTreeSet<String>,
    native: bool,
) -> Parts {
    Parts {
        init: init(settings, annotations),
        proxy: proxy(settings, annotations, probes, native),
        volumes: volumes(),
    }
}

/// Annotations by which Prometheus finds the proxy.
pub(super) fn prometheus() -> [(&'static str, String); 3] {
    [
        ("prometheus.io/scrape", "true".to_owned()),
        ("prometheus.io/port", ADMIN_PORT.to_string()),
        ("prometheus.io/path", "/metrics".to_owned()),
    ]
}

fn init(settings: &Settings, annotations: &Annotations) -> Value {
    let capture = &settings.capture;
    let mut flags: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (flag, items) in [
        ("exclude-inbound-ports", &capture.exclude_inbound_ports),
        ("exclude-inbound-cidrs", &capture.exclude_inbound_cidrs),
        ("exclude-outbound-ports", &capture.exclude_outbound_ports),
        ("exclude-outbound-cidrs", &capture.exclude_outbound_cidrs),
    ] {
        flags.entry(flag).or_default().extend(items.iter().cloned());
    }
    for (flag, items) in &annotations.capture {
        flags.entry(flag).or_default().extend(items.iter().cloned());
    }
    let mut arguments = vec!["init".to_owned()];
    arguments.extend(
        flags
            .into_iter()
            .filter(|(_, items)| !items.is_empty())
            .map(|(flag, items)| format!("--{flag}={}", items.join(","))),
    );
    let mut container = container(settings, INIT_CONTAINER);
    container.insert("args".to_owned(), json!(arguments));
    container.insert(
        "resources".to_owned(),
        json!({
            "requests": settings.proxy.resources.requests,
            "limits": settings.proxy.resources.limits,
        }),
    );
    // Root: added capabilities are not in effect for other users (ambient ones, KEP-2763, are not
    // there yet). NET_RAW is what iptables would need; the image has none, nf_tables does without.
    container.insert(
        "securityContext".to_owned(),
        json!({
            "allowPrivilegeEscalation": false,
            "capabilities": {"add": ["NET_ADMIN"], "drop": ["ALL"]},
            "privileged": false,
            "readOnlyRootFilesystem": true,
            "runAsGroup": 0,
            "runAsNonRoot": false,
            "runAsUser": 0,
            "seccompProfile": {"type": "RuntimeDefault"},
        }),
    );
    Value::Object(container)
}

fn proxy(
    settings: &Settings,
    annotations: &Annotations,
    probes: &BTreeSet<String>,
    native: bool,
) -> Value {
    let field = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}});
    let drain = annotations
        .drain_seconds
        .unwrap_or(settings.proxy.drain_seconds);
    let mut env = vec![
        field("POD_NAME", "metadata.name"),
        field("POD_NAMESPACE", "metadata.namespace"),
        field("POD_UID", "metadata.uid"),
        field("NODE_NAME", "spec.nodeName"),
    ];
    let plain = [
        ("WEFT_WORKLOAD", "$(POD_NAMESPACE)/$(POD_NAME)".to_owned()),
        ("WEFT_CONTROL_PLANE", settings.control_plane.clone()),
        ("WEFT_TRUST_DOMAIN", settings.trust_domain.clone()),
        ("WEFT_TRUST_ROOT", TRUST_PATH.to_owned()),
        ("WEFT_TOKEN", TOKEN_PATH.to_owned()),
        ("WEFT_DRAIN_SECONDS", drain.to_string()),
        (
            "WEFT_OWN_CONNECTIONS",
            match annotations.own_connections {
                true => "true".to_owned(),
                false => String::new(),
            },
        ),
        (
            "WEFT_LOG",
            annotations
                .log_level
                .clone()
                .unwrap_or_else(|| settings.proxy.log_level.clone()),
        ),
        // As OpenTelemetry's SDKs are told of where they run.
        (
            "OTEL_RESOURCE_ATTRIBUTES",
            "k8s.namespace.name=$(POD_NAMESPACE),k8s.pod.name=$(POD_NAME),\
             k8s.pod.uid=$(POD_UID),k8s.node.name=$(NODE_NAME)"
                .to_owned(),
        ),
        ("WEFT_OTLP_ENDPOINT", settings.tracing.otlp_endpoint.clone()),
        (
            "WEFT_PROBES",
            // Kubernetes would take "$(…)" for a variable.
            probes
                .iter()
                .map(|probe| probe.replace('$', "$$"))
                .collect::<Vec<_>>()
                .join(" "),
        ),
    ];
    env.extend(
        plain
            .into_iter()
            .filter(|(_, value)| !value.is_empty())
            .map(|(name, value)| json!({"name": name, "value": value})),
    );
    let probe = |period: u64, failures: u64| {
        json!({
            "httpGet": {"path": "/readyz", "port": ADMIN_PORT},
            "periodSeconds": period,
            "timeoutSeconds": 2,
            "failureThreshold": failures,
        })
    };
    let mut container = container(settings, PROXY_CONTAINER);
    container.extend([
        ("args".to_owned(), json!(["run"])),
        ("env".to_owned(), json!(env)),
        (
            "ports".to_owned(),
            json!([{"name": "weft-metrics", "containerPort": ADMIN_PORT, "protocol": "TCP"}]),
        ),
        ("readinessProbe".to_owned(), probe(5, 3)),
        ("resources".to_owned(), resources(settings, annotations)),
        (
            "securityContext".to_owned(),
            json!({
                "allowPrivilegeEscalation": false,
                "capabilities": {"drop": ["ALL"]},
                "privileged": false,
                "readOnlyRootFilesystem": true,
                "runAsGroup": PROXY_UID,
                "runAsNonRoot": true,
                "runAsUser": PROXY_UID,
                "seccompProfile": {"type": "RuntimeDefault"},
            }),
        ),
        ("startupProbe".to_owned(), probe(1, START_SECONDS)),
        (
            "volumeMounts".to_owned(),
            json!([
                {"name": TOKEN_VOLUME, "mountPath": folder(TOKEN_PATH), "readOnly": true},
                {"name": TRUST_VOLUME, "mountPath": folder(TRUST_PATH), "readOnly": true},
            ]),
        ),
    ]);
    if native {
        container.insert("restartPolicy".to_owned(), json!("Always"));
    } else {
        // The kubelet starts the containers after it when the first hook has returned, and ends it
        // when the second has: the application starts after the proxy, and ends before it.
        let wait = |what: &str, within: u64| {
            let within = format!("--within={within}");
            json!({"exec": {"command": [PROXY_PROGRAM, "wait", what, within]}})
        };
        container.insert(
            "lifecycle".to_owned(),
            json!({
                "postStart": wait("ready", START_SECONDS),
                "preStop": wait("alone", drain),
            }),
        );
    }
    Value::Object(container)
}

fn container(settings: &Settings, name: &str) -> Map<String, Value> {
    let mut container = Map::new();
    container.insert("name".to_owned(), json!(name));
    container.insert("image".to_owned(), json!(settings.proxy.image));
    if let Some(policy) = &settings.proxy.image_pull_policy {
        container.insert("imagePullPolicy".to_owned(), json!(policy));
    }
    container
}

fn resources(settings: &Settings, annotations: &Annotations) -> Value {
    let mut resources = settings.proxy.resources.clone();
    let requests = [
        ("cpu", &annotations.cpu_request),
        ("memory", &annotations.memory_request),
    ];
    let limits = [
        ("cpu", &annotations.cpu_limit),
        ("memory", &annotations.memory_limit),
    ];
    for (into, given) in [
        (&mut resources.requests, requests),
        (&mut resources.limits, limits),
    ] {
        for (what, much) in given {
            if let Some(much) = much {
                into.insert(what.to_owned(), much.clone());
            }
        }
    }
    json!({"requests": resources.requests, "limits": resources.limits})
}

fn volumes() -> Vec<Value> {
    vec![
        json!({
            "name": TOKEN_VOLUME,
            "projected": {"sources": [{"serviceAccountToken": {
                "audience": TOKEN_AUDIENCE,
                "expirationSeconds": TOKEN_SECONDS,
                "path": file(TOKEN_PATH),
            }}]},
        }),
        json!({
            "name": TRUST_VOLUME,
            "configMap": {
                "name": TRUST_CONFIG_MAP,
                "items": [{"key": TRUST_KEY, "path": file(TRUST_PATH)}],
            },
        }),
    ]
}

fn folder(path: &str) -> &str {
    path.rsplit_once('/').map_or("/", |(folder, _)| folder)
}

fn file(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, file)| file)
}
