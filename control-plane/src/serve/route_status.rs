//! The status of routes in Kubernetes: conditions for each parent that is a Service. The leader alone
//! writes, only what is not written already, and leaves the entries of other controllers alone.

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
    let before = there.data.get("status").and_then(|s| s.get("parents"));
    let before = before.and_then(Value::as_array).cloned();
    let before = before.unwrap_or_default();
    let now = Timestamp::now().as_second();
    let now = Timestamp::from_second(now).unwrap_or_default().to_string();
    let after = merged(&before, status, &now);
    if after == before {
        return Ok(());
    }
    let patch = json!({
        "apiVersion": there.types.as_ref().map(|types| &types.api_version),
        "kind": there.types.as_ref().map(|types| &types.kind),
        // Not over what somebody else has written meanwhile.
        "metadata": { "resourceVersion": there.metadata.resource_version },
        "status": { "parents": after },
    });
    let parameters = PatchParams::default();
    let doing = format!("write the status of {}", status.route);
    let patch = Patch::Merge(&patch);
    let patched = api.patch_status(&name.name, &parameters, &patch);
    answer(doing, patched).await?;
    Ok(())
}

fn resource(kind: Kind) -> ApiResource {
    let (name, plural) = match kind {
        Kind::GRPCRoute => ("GRPCRoute", "grpcroutes"),
        Kind::TLSRoute => ("TLSRoute", "tlsroutes"),
        Kind::TCPRoute => ("TCPRoute", "tcproutes"),
        _ => ("HTTPRoute", "httproutes"),
    };
    ApiResource {
        group: gateway::GROUP.to_owned(),
        version: "v1".to_owned(),
        api_version: format!("{}/v1", gateway::GROUP),
        kind: name.to_owned(),
        plural: plural.to_owned(),
    }
}

/// `status.parents` with our entries as they are to be. Others' stay, and a condition that does not
/// change keeps its time.
fn merged(before: &[Value], status: &RouteStatus, now: &str) -> Vec<Value> {
    let ours = |entry: &&Value| entry["controllerName"] == CONTROLLER;
    let mut after: Vec<Value> = before.iter().filter(|e| !ours(e)).cloned().collect();
    for parent in &status.parents {
        let reference = parent_ref(&parent.parent);
        let old = before
            .iter()
            .filter(ours)
            .find(|entry| entry["parentRef"] == reference);
        after.push(json!({
            "parentRef": reference,
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
    fn what_is_written_is_not_written_again() {
        let others = json!({"controllerName": "other", "parentRef": {"name": "gateway"}});
        let stale = json!({"controllerName": CONTROLLER, "parentRef": {"name": "gone"}});
        let first = merged(&[others.clone(), stale], &status(true), "t1");
        assert_eq!(first.len(), 2);
        assert_eq!(first[0], others);
        assert_eq!(
            first[1]["parentRef"],
            json!({"group": "", "kind": "Service", "name": "cart", "port": 80})
        );
        assert_eq!(first[1]["conditions"][0]["observedGeneration"], 3);
        assert_eq!(merged(&first, &status(true), "t2"), first);
        let refused = merged(&first, &status(false), "t3");
        assert_eq!(refused[1]["conditions"][0]["lastTransitionTime"], "t3");
        assert_eq!(refused[1]["conditions"][0]["status"], "False");
    }
}
