//! `weft check --pre`: whether a cluster is ready for Weft.

use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use k8s_openapi::api::core::v1::{Namespace, Node};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ListParams, PostParams};
use weft_api::names::INJECT;

use super::items::Items;
use crate::kube::pods::ask_all;
use crate::kube::{CONTROL_PLANE, Cluster, Error, SYSTEM, explain};

/// Oldest Kubernetes that has what the chart uses (admission match conditions, stable).
const OLDEST: (u32, u32) = (1, 28);
/// From here on sidecars start before the application and end after it.
const NATIVE_SIDECARS: (u32, u32) = (1, 29);
/// Oldest Linux whose nf_tables do all that capture needs; below it iptables-restore is used.
const NF_TABLES: (u32, u32) = (4, 18);

/// What installing takes: verb, group, resource, in weft-system or the whole cluster.
const PERMISSIONS: [(&str, &str, &str, bool); 13] = [
    ("create", "", "namespaces", false),
    (
        "create",
        "apiextensions.k8s.io",
        "customresourcedefinitions",
        false,
    ),
    ("create", "rbac.authorization.k8s.io", "clusterroles", false),
    (
        "create",
        "rbac.authorization.k8s.io",
        "clusterrolebindings",
        false,
    ),
    (
        "create",
        "admissionregistration.k8s.io",
        "mutatingwebhookconfigurations",
        false,
    ),
    ("create", "apps", "deployments", true),
    ("create", "", "services", true),
    ("create", "", "serviceaccounts", true),
    ("create", "", "configmaps", true),
    ("create", "", "secrets", true),
    ("create", "rbac.authorization.k8s.io", "roles", true),
    ("create", "rbac.authorization.k8s.io", "rolebindings", true),
    ("create", "policy", "poddisruptionbudgets", true),
];

/// Webhooks of other meshes, by a part of their names.
const OTHERS: [(&str, &str); 5] = [
    ("istio-sidecar-injector", "Istio"),
    ("linkerd-proxy-injector", "Linkerd"),
    ("kuma-admission", "Kuma"),
    ("consul-connect-injector", "Consul"),
    ("osm-webhook", "Open Service Mesh"),
];

pub async fn check(cluster: &Cluster, items: &mut Items) -> Result<(), Error> {
    version(cluster, items).await?;
    permissions(cluster, items).await;
    nodes(cluster, items).await;
    gateway_api(cluster, items).await;
    other_meshes(cluster, items).await;
    namespaces(cluster, items).await;
    match cluster.control_plane().await {
        Ok(deployment) => {
            let labels = deployment.metadata.labels.unwrap_or_default();
            let version = labels.get("app.kubernetes.io/version");
            let version = version.map_or(String::new(), |version| format!(" ({version})"));
            let message = format!("Deployment {SYSTEM}/{CONTROL_PLANE} is there already{version}");
            items.ok("installed", format!("{message}; installing upgrades it"));
        }
        Err(Error::NotInstalled) => items.ok("installed", "not yet"),
        Err(error) => items.unseen("installed", &error),
    }
    Ok(())
}

/// "1.34", "v1.29.3+k3s1", "4.18.0-305.el8".
fn major_minor(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.trim_start_matches('v').split('.');
    let major = parts.next()?.parse().ok()?;
    let minor = parts.next()?;
    let digits = minor.find(|c: char| !c.is_ascii_digit());
    Some((major, minor[..digits.unwrap_or(minor.len())].parse().ok()?))
}

async fn version(cluster: &Cluster, items: &mut Items) -> Result<(), Error> {
    let info = cluster.client.apiserver_version().await;
    let info = info.map_err(Error::api("read the apiserver's version"))?;
    let what = "kubernetes";
    match major_minor(&info.git_version) {
        None => items.warning(
            what,
            format!("version {} cannot be read", info.git_version),
            format!("make sure that it is {}.{} or newer", OLDEST.0, OLDEST.1),
        ),
        Some(version) if version < OLDEST => items.error(
            what,
            format!("version {} is too old", info.git_version),
            format!("upgrade it to {}.{} or newer", OLDEST.0, OLDEST.1),
        ),
        Some(version) if version < NATIVE_SIDECARS => items.warning(
            what,
            format!("version {} has no native sidecars", info.git_version),
            "nothing to do; but until 1.29 proxies are ordinary containers: init containers run outside the mesh, and a Job ends when the control plane has told its proxy",
        ),
        Some(_) => items.ok(what, format!("version {}", info.git_version)),
    }
    Ok(())
}

async fn permissions(cluster: &Cluster, items: &mut Items) {
    let api: Api<SelfSubjectAccessReview> = Api::all(cluster.client.clone());
    let ask = async |(verb, group, resource, own): (&str, &str, &str, bool)| {
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(ResourceAttributes {
                    verb: Some(verb.to_owned()),
                    group: Some(group.to_owned()),
                    resource: Some(resource.to_owned()),
                    namespace: own.then(|| SYSTEM.to_owned()),
                    ..ResourceAttributes::default()
                }),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let answer = api.create(&PostParams::default(), &review).await;
        answer.map(|answer| answer.status.is_some_and(|status| status.allowed))
    };
    let answers = ask_all(PERMISSIONS, ask).await;
    let mut missing = Vec::new();
    for ((verb, _, resource, _), answer) in PERMISSIONS.iter().zip(answers) {
        match answer {
            Ok(true) => {}
            Ok(false) => missing.push(format!("{verb} {resource}")),
            Err(error) => return items.unseen("permissions", &explain(&error)),
        }
    }
    if missing.is_empty() {
        items.ok("permissions", "you may create all that is installed");
    } else {
        items.error(
            "permissions",
            format!("you may not: {}", missing.join(", ")),
            "install as an administrator of the cluster",
        );
    }
}

async fn nodes(cluster: &Cluster, items: &mut Items) {
    let api: Api<Node> = Api::all(cluster.client.clone());
    let nodes = match api.list(&ListParams::default()).await {
        Ok(nodes) => nodes.items,
        Err(error) => return items.unseen("kernel", &explain(&error)),
    };
    let infos = nodes.iter().filter_map(|node| {
        let info = node.status.as_ref()?.node_info.as_ref()?;
        Some((node.metadata.name.as_deref().unwrap_or_default(), info))
    });
    let mut kernels: Vec<&str> = Vec::new();
    for (name, info) in infos {
        if info.operating_system != "linux" {
            items.warning(
                "kernel",
                format!(
                    "node {name} runs {}: its pods get no proxy",
                    info.operating_system
                ),
                "keep workloads of the mesh on Linux nodes",
            );
            continue;
        }
        if major_minor(&info.kernel_version).is_some_and(|version| version < NF_TABLES) {
            items.warning(
                "kernel",
                format!("node {name} has Linux {}", info.kernel_version),
                "capture falls back to iptables there, if the image of weft-init finds it; 4.18 and newer need nothing",
            );
        }
        kernels.push(&info.kernel_version);
    }
    kernels.sort_unstable();
    kernels.dedup();
    if !kernels.is_empty() {
        let message = format!(
            "{} node{}, Linux {}; whether netfilter can be programmed shows in the first injected pod",
            nodes.len(),
            if nodes.len() == 1 { "" } else { "s" },
            kernels.join(", ")
        );
        items.ok("kernel", message);
    }
}

async fn gateway_api(cluster: &Cluster, items: &mut Items) {
    let what = "gateway api";
    let api: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
    match api.get_metadata_opt("httproutes.gateway.networking.k8s.io").await {
        Ok(Some(found)) => {
            let annotations = found.metadata.annotations.unwrap_or_default();
            let version = annotations.get("gateway.networking.k8s.io/bundle-version");
            items.ok(what, format!("its resources are there, {}", version.map_or("of an unknown version", |v| v)));
        }
        Ok(None) => items.warning(
            what,
            "its resources (HTTPRoute, GRPCRoute…) are not there: traffic cannot be split or matched",
            "kubectl apply --server-side -f https://github.com/kubernetes-sigs/gateway-api/releases/latest/download/standard-install.yaml; it can be done later",
        ),
        Err(error) => items.unseen(what, &explain(&error)),
    }
}

async fn other_meshes(cluster: &Cluster, items: &mut Items) {
    let what = "other meshes";
    let api: Api<MutatingWebhookConfiguration> = Api::all(cluster.client.clone());
    let hooks = match api.list_metadata(&ListParams::default()).await {
        Ok(hooks) => hooks.items,
        Err(error) => return items.unseen(what, &explain(&error)),
    };
    let mut found = false;
    for hook in &hooks {
        let name = hook.metadata.name.as_deref().unwrap_or_default();
        if let Some((_, mesh)) = OTHERS.iter().find(|(part, _)| name.contains(part)) {
            found = true;
            items.warning(
                what,
                format!("{mesh} injects pods too (MutatingWebhookConfiguration {name})"),
                "a pod can have one mesh: do not label a namespace for both",
            );
        }
    }
    if !found {
        items.ok(what, "no webhook of another mesh");
    }
}

/// Labels by which other meshes are asked for.
const OTHER_LABELS: [&str; 4] = [
    "istio-injection",
    "istio.io/rev",
    "linkerd.io/inject",
    "kuma.io/sidecar-injection",
];

async fn namespaces(cluster: &Cluster, items: &mut Items) {
    let what = "namespaces";
    let api: Api<Namespace> = Api::all(cluster.client.clone());
    let namespaces = match api.list(&ListParams::default()).await {
        Ok(namespaces) => namespaces.items,
        Err(error) => return items.unseen(what, &explain(&error)),
    };
    let mut bad = false;
    for namespace in &namespaces {
        for (message, help) in conflicts(namespace) {
            bad = true;
            items.warning(what, message, help);
        }
    }
    if !bad {
        items.ok(
            what,
            "none asks for another mesh too, or forbids what capture needs",
        );
    }
}

/// What in a namespace that asks for sidecars stands against them.
pub(super) fn conflicts(namespace: &Namespace) -> Vec<(String, String)> {
    let name = namespace.metadata.name.as_deref().unwrap_or_default();
    let empty = std::collections::BTreeMap::new();
    let labels = namespace.metadata.labels.as_ref().unwrap_or(&empty);
    let wanted = matches!(
        labels.get(INJECT).map(String::as_str),
        Some("enabled" | "true")
    );
    let mut found = Vec::new();
    if !wanted {
        return found;
    }
    if let Some(other) = OTHER_LABELS.iter().find(|label| {
        labels
            .get(**label)
            .is_some_and(|value| value != "disabled" && value != "false")
    }) {
        found.push((
            format!("{name} is labelled for two meshes: {INJECT} and {other}"),
            format!("remove one: kubectl label namespace {name} {other}-"),
        ));
    }
    let level = labels.get("pod-security.kubernetes.io/enforce");
    if let Some(level) = level.filter(|level| matches!(level.as_str(), "baseline" | "restricted")) {
        found.push((
            format!(
                "{name} enforces the Pod Security level {level}, which refuses the NET_ADMIN of weft-init: its pods would not be created"
            ),
            format!(
                "kubectl label --overwrite namespace {name} pod-security.kubernetes.io/enforce=privileged, and keep pod-security.kubernetes.io/warn={level} for the applications"
            ),
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        for (text, expected) in [
            ("v1.34.8", Some((1, 34))),
            ("1.29.3+k3s1", Some((1, 29))),
            ("1.27+", Some((1, 27))),
            ("4.18.0-305.el8", Some((4, 18))),
            ("next", None),
        ] {
            assert_eq!(major_minor(text), expected, "{text}");
        }
    }

    #[test]
    fn namespaces_that_stand_against_sidecars() {
        let of = |labels: serde_json::Value| {
            let namespace = serde_json::json!({"metadata": {"name": "shop", "labels": labels}});
            conflicts(&serde_json::from_value(namespace).unwrap())
        };
        let enforce = "pod-security.kubernetes.io/enforce";
        assert!(
            of(serde_json::json!({"istio-injection": "enabled", enforce: "restricted"})).is_empty()
        );
        assert!(
            of(serde_json::json!({INJECT: "enabled", "istio-injection": "disabled"})).is_empty()
        );
        assert!(of(serde_json::json!({INJECT: "enabled", enforce: "privileged"})).is_empty());
        let two = of(
            serde_json::json!({INJECT: "enabled", "linkerd.io/inject": "enabled", enforce: "baseline"}),
        );
        assert_eq!(two.len(), 2);
        assert!(
            two[0]
                .0
                .contains("two meshes: weft.dev/inject and linkerd.io/inject")
        );
        assert!(two[1].0.contains("level baseline"));
    }
}
