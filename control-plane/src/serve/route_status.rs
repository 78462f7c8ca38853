//! The status of routes and policies in Kubernetes: conditions for each parent that is a Service, for
//! each target of a policy. The leader alone writes, only what is not written already, and leaves the
//! entries of other controllers alone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::core::ApiResource;
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::time::sleep;
use tracing::{debug, warn};

use super::discovery::Hub;
use crate::cluster::{ClusterError, Leadership, answer};
use crate::compile::{CONTROLLER, ParentStatus, RouteStatus};
use crate::model::{Kind, ObjectRef, ParentRef};
use crate::sources::gateway;
use weft_api::policy::API_VERSION;

/// Changes that come close together are written together.
const TOGETHER: Duration = Duration::from_millis(100);
/// After a write that failed.
const AGAIN: Duration = Duration::from_secs(2);

/// Keeps the statuses for as long as the process lives.
pub async fn keep(client: Client, hub: Arc<Hub>, leadership: Leadership) {
    loop {
        leadership.acquired().await;
        tokio::select! {
            () = write_all(&client, &hub, &leadership) => {}
            () = leadership.lost() => {}
        }
    }
}

/// Writes what changes, as long as this replica leads.
async fn write_all(client: &Client, hub: &Hub, leadership: &Leadership) {
    let mut changes = hub.routes_changed();
    let mut written: BTreeMap<ObjectRef, RouteStatus> = BTreeMap::new();
    loop {
        changes.mark_unchanged();
        let wanted = hub.route_statuses();
        let mut again = false;
        for status in &wanted {
            if written.get(&status.route) == Some(status) {
                continue;
            }
            if !leadership.is_leader() {
                return;
            }
            match write(client, status).await {
                Ok(()) => {
                    written.insert(status.route.clone(), status.clone());
                }
                // Somebody else wrote, or it is gone: the next look tells.
                Err(error) if error.is_conflict() || error.is_not_found() => {
                    debug!(route = %status.route, "status not written: {error}");
                    again |= error.is_conflict();
                }
                Err(error) => {
                    warn!(route = %status.route, "status not written: {error}");
                    again = true;
                }
            }
        }
        written.retain(|route, _| wanted.iter().any(|status| status.route == *route));
        tokio::select! {
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
                sleep(TOGETHER).await;
            }
            () = sleep(AGAIN), if again => {}
        }
    }
}

/// Writes one status, unless it is there already.
async fn write(client: &Client, status: &RouteStatus) -> Result<(), ClusterError> {
    let name = &status.route.name;
    let api: Api<DynamicObject> = Api::namespaced_with(
        client.clone(),
        &name.namespace,
        &resource(status.route.kind),
    );
    let there = answer(format!("read {}", status.route), api.get(&name.name)).await?;
    let (list, reference) = fields(status.route.kind);
    let before = there.data.get("status").and_then(|s| s.get(list));
    let before = before.and_then(Value::as_array).cloned();
    let before = before.unwrap_or_default();
    let now = Timestamp::now().as_second();
    let now = Timestamp::from_second(now).unwrap_or_default().to_string();
    let after = merged(&before, status, reference, &now);
    if after == before {
        return Ok(());
    }
    let patch = json!({
        "apiVersion": there.types.as_ref().map(|types| &types.api_version),
        "kind": there.types.as_ref().map(|types| &types.kind),
        // Not over what somebody else has written meanwhile.
        "metadata": { "resourceVersion": there.metadata.resource_version },
        "status": { list: after },
    });
    let parameters = PatchParams::default();
    let doing = format!("write the status of {}", status.route);
    let patch = Patch::Merge(&patch);
    let patched = api.patch_status(&name.name, &parameters, &patch);
    answer(doing, patched).await?;
    Ok(())
}

fn resource(kind: Kind) -> ApiResource {
    let routes = (gateway::GROUP, "v1");
    let ((group, version), name, plural) = match kind {
        Kind::GRPCRoute => (routes, "GRPCRoute", "grpcroutes"),
        Kind::TLSRoute => (routes, "TLSRoute", "tlsroutes"),
        Kind::TCPRoute => (routes, "TCPRoute", "tcproutes"),
        Kind::TrafficPolicy => (of(API_VERSION), "TrafficPolicy", "trafficpolicies"),
        Kind::XBackendTrafficPolicy => (
            of(gateway::X_API_VERSION),
            "XBackendTrafficPolicy",
            "xbackendtrafficpolicies",
        ),
        _ => (routes, "HTTPRoute", "httproutes"),
    };
    ApiResource {
        group: group.to_owned(),
        version: version.to_owned(),
        api_version: format!("{group}/{version}"),
        kind: name.to_owned(),
        plural: plural.to_owned(),
    }
}

/// Group and version.
fn of(api_version: &str) -> (&str, &str) {
    api_version.split_once('/').unwrap_or(("", api_version))
}

/// How a kind's status calls its entries, and what each is for (RouteStatus, PolicyStatus).
fn fields(kind: Kind) -> (&'static str, &'static str) {
    match kind {
        Kind::TrafficPolicy | Kind::XBackendTrafficPolicy => ("ancestors", "ancestorRef"),
        _ => ("parents", "parentRef"),
    }
}

/// `status.parents`, or `ancestors`, with our entries as they are to be. Others' stay, and a condition that does not
/// change keeps its time.
fn merged(before: &[Value], status: &RouteStatus, field: &str, now: &str) -> Vec<Value> {
    let ours = |entry: &&Value| entry["controllerName"] == CONTROLLER;
    let mut after: Vec<Value> = before.iter().filter(|e| !ours(e)).cloned().collect();
    for parent in &status.parents {
        let reference = parent_ref(&parent.parent);
        let old = before
            .iter()
            .filter(ours)
            .find(|entry| entry[field] == reference);
        after.push(json!({
            field: reference,
            "controllerName": CONTROLLER,
            "conditions": conditions(parent, status.generation, old, now),
        }));
    }
    after
}

fn conditions(
    parent: &ParentStatus,
    generation: i64,
    old: Option<&Value>,
    now: &str,
) -> Vec<Value> {
    let old = old.and_then(|entry| entry["conditions"].as_array());
    parent
        .conditions
        .iter()
        .map(|condition| {
            let status = if condition.status { "True" } else { "False" };
            let known = old
                .into_iter()
                .flatten()
                .find(|known| known["type"] == condition.kind && known["status"] == status);
            let since = known.and_then(|known| known["lastTransitionTime"].as_str());
            json!({
                "type": condition.kind,
                "status": status,
                "reason": condition.reason,
                "message": condition.message,
                "observedGeneration": generation,
                "lastTransitionTime": since.unwrap_or(now),
            })
        })
        .collect()
}

/// A parentRef as it stands in the spec.
fn parent_ref(parent: &ParentRef) -> Value {
    let mut to = serde_json::Map::new();
    let texts = [
        ("group", &parent.group),
        ("kind", &parent.kind),
        ("namespace", &parent.namespace),
        ("sectionName", &parent.section_name),
    ];
    for (field, value) in texts {
        if let Some(value) = value {
            to.insert(field.to_owned(), json!(value));
        }
    }
    to.insert("name".to_owned(), json!(parent.name));
    if let Some(port) = parent.port {
        to.insert("port".to_owned(), json!(port));
    }
    Value::Object(to)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::Condition;
    use crate::model::Name;

    fn status(accepted: bool) -> RouteStatus {
        RouteStatus {
            route: ObjectRef {
                kind: Kind::HTTPRoute,
                name: Name::new("shop", "cart"),
            },
            generation: 3,
            created: String::new(),
            parents: vec![ParentStatus {
                parent: ParentRef {
                    group: Some(String::new()),
                    kind: Some("Service".to_owned()),
                    name: "cart".to_owned(),
                    port: Some(80),
                    ..ParentRef::default()
                },
                conditions: vec![Condition {
                    kind: "Accepted",
                    status: accepted,
                    reason: "Accepted",
                    message: String::new(),
                }],
            }],
        }
    }

    #[test]
    fn a_policys_targets_are_its_ancestors() {
        assert_eq!(fields(Kind::TrafficPolicy), ("ancestors", "ancestorRef"));
        let written = merged(&[], &status(true), "ancestorRef", "t1");
        assert_eq!(written[0]["ancestorRef"]["name"], "cart");
        assert_eq!(written[0]["parentRef"], Value::Null);
        let resource = resource(Kind::XBackendTrafficPolicy);
        assert_eq!(resource.api_version, "gateway.networking.x-k8s.io/v1alpha1");
    }

    #[test]
    fn what_is_written_is_not_written_again() {
        let others = json!({"controllerName": "other", "parentRef": {"name": "gateway"}});
        let stale = json!({"controllerName": CONTROLLER, "parentRef": {"name": "gone"}});
        let first = merged(&[others.clone(), stale], &status(true), "parentRef", "t1");
        assert_eq!(first.len(), 2);
        assert_eq!(first[0], others);
        assert_eq!(
            first[1]["parentRef"],
            json!({"group": "", "kind": "Service", "name": "cart", "port": 80})
        );
        assert_eq!(first[1]["conditions"][0]["observedGeneration"], 3);
        assert_eq!(merged(&first, &status(true), "parentRef", "t2"), first);
        let refused = merged(&first, &status(false), "parentRef", "t3");
        assert_eq!(refused[1]["conditions"][0]["lastTransitionTime"], "t3");
        assert_eq!(refused[1]["conditions"][0]["status"], "False");
    }
}
