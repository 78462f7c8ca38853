//! The status of routes and policies in Kubernetes: conditions for each parent that is a Service, for
//! each target of a policy, or of a policy that names none. The leader alone writes, only what is not written already, and leaves the
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
use crate::compile::{CONTROLLER, Condition, ObjectStatus};
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
    let mut changes = hub.statuses_changed();
    let mut written: BTreeMap<ObjectRef, ObjectStatus> = BTreeMap::new();
    // Whose status may not be what it should be.
    let mut open = hub.with_status();
    loop {
        changes.mark_unchanged();
        open.extend(hub.take_changed_statuses());
        for object in std::mem::take(&mut open) {
            let Some(status) = hub.status_of(&object) else {
                written.remove(&object);
                continue;
            };
            if written.get(&object) == Some(&status) {
                continue;
            }
            if !leadership.is_leader() {
                return;
            }
            match write(client, &status).await {
                Ok(()) => {
                    written.insert(object, status);
                }
                // It is gone: the next look tells.
                Err(error) if error.is_not_found() => {
                    debug!(%object, "status not written: {error}");
                }
                Err(error) => {
                    if error.is_conflict() {
                        // Somebody else wrote.
                        debug!(%object, "status not written: {error}");
                    } else {
                        warn!(%object, "status not written: {error}");
                    }
                    open.insert(object);
                }
            }
        }
        tokio::select! {
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
                sleep(TOGETHER).await;
            }
            () = sleep(AGAIN), if !open.is_empty() => {}
        }
    }
}

/// Writes one status, unless it is there already.
async fn write(client: &Client, status: &ObjectStatus) -> Result<(), ClusterError> {
    let object = &status.object;
    let name = &object.name;
    let Some(resource) = resource(object.kind) else {
        return Ok(());
    };
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), &name.namespace, &resource);
    let there = answer(format!("read {object}"), api.get(&name.name)).await?;
    let (list, reference) = fields(object.kind);
    let before = there.data.get("status").and_then(|s| s.get(list));
    let before = before.and_then(Value::as_array).cloned();
    let before = before.unwrap_or_default();
    let now = Timestamp::now().as_second();
    let now = Timestamp::from_second(now).unwrap_or_default().to_string();
    let after = match reference {
        Some(reference) => merged(&before, status, reference, &now),
        None => own(&before, status, &now),
    };
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
    let doing = format!("write the status of {object}");
    let patch = Patch::Merge(&patch);
    let patched = api.patch_status(&name.name, &parameters, &patch);
    answer(doing, patched).await?;
    Ok(())
}

/// A kind in the apiserver; none: it has no status of ours.
fn resource(kind: Kind) -> Option<ApiResource> {
    let (routes, ours) = ((gateway::GROUP, "v1"), of(API_VERSION));
    let ((group, version), plural) = match kind {
        Kind::HTTPRoute => (routes, "httproutes"),
        Kind::GRPCRoute => (routes, "grpcroutes"),
        Kind::TLSRoute => (routes, "tlsroutes"),
        Kind::TCPRoute => (routes, "tcproutes"),
        Kind::TrafficPolicy => (ours, "trafficpolicies"),
        Kind::PeerAuthentication => (ours, "peerauthentications"),
        Kind::Telemetry => (ours, "telemetries"),
        Kind::ExternalService => (ours, "externalservices"),
        Kind::EgressPolicy => (ours, "egresspolicies"),
        Kind::XBackendTrafficPolicy => (of(gateway::X_API_VERSION), "xbackendtrafficpolicies"),
        Kind::Service | Kind::EndpointSlice | Kind::Workload | Kind::Node => return None,
    };
    Some(ApiResource {
        group: group.to_owned(),
        version: version.to_owned(),
        api_version: format!("{group}/{version}"),
        kind: format!("{kind:?}"),
        plural: plural.to_owned(),
    })
}

/// Group and version.
fn of(api_version: &str) -> (&str, &str) {
    api_version.split_once('/').unwrap_or(("", api_version))
}

/// How a kind's status calls its entries, and what each is for (RouteStatus, PolicyStatus); none:
/// they are its conditions.
fn fields(kind: Kind) -> (&'static str, Option<&'static str>) {
    match kind {
        Kind::TrafficPolicy | Kind::XBackendTrafficPolicy => ("ancestors", Some("ancestorRef")),
        Kind::PeerAuthentication | Kind::Telemetry | Kind::ExternalService | Kind::EgressPolicy => {
            ("conditions", None)
        }
        _ => ("parents", Some("parentRef")),
    }
}

/// Types of conditions that are ours among those of an object.
const OURS: [&str; 2] = ["Accepted", "Overridden"];

/// `status.conditions` with ours as they are to be. Others' stay.
fn own(before: &[Value], status: &ObjectStatus, now: &str) -> Vec<Value> {
    let ours = |known: &&Value| OURS.iter().any(|kind| known["type"] == *kind);
    let mut after: Vec<Value> = before.iter().filter(|one| !ours(one)).cloned().collect();
    after.extend(conditions(
        &status.conditions,
        status.generation,
        before,
        now,
    ));
    after
}

/// `status.parents`, or `ancestors`, with our entries as they are to be. Others' stay, and a condition that does not
/// change keeps its time.
fn merged(before: &[Value], status: &ObjectStatus, field: &str, now: &str) -> Vec<Value> {
    let ours = |entry: &&Value| entry["controllerName"] == CONTROLLER;
    let mut after: Vec<Value> = before.iter().filter(|e| !ours(e)).cloned().collect();
    for parent in &status.parents {
        let reference = parent_ref(&parent.parent);
        let old = before
            .iter()
            .filter(ours)
            .find(|entry| entry[field] == reference);
        let old = old.and_then(|entry| entry["conditions"].as_array());
        let old = old.map_or(&[][..], Vec::as_slice);
        after.push(json!({
            field: reference,
            "controllerName": CONTROLLER,
            "conditions": conditions(&parent.conditions, status.generation, old, now),
        }));
    }
    after
}

/// As they are written; one that does not change keeps its time.
fn conditions(given: &[Condition], generation: i64, old: &[Value], now: &str) -> Vec<Value> {
    given
        .iter()
        .map(|condition| {
            let status = if condition.status { "True" } else { "False" };
            let known = old
                .iter()
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
    use crate::compile::ParentStatus;
    use crate::model::Name;

    fn status(accepted: bool) -> ObjectStatus {
        ObjectStatus {
            object: ObjectRef {
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
            conditions: Vec::new(),
        }
    }

    #[test]
    fn a_policys_targets_are_its_ancestors() {
        let expected = ("ancestors", Some("ancestorRef"));
        assert_eq!(fields(Kind::TrafficPolicy), expected);
        let written = merged(&[], &status(true), "ancestorRef", "t1");
        assert_eq!(written[0]["ancestorRef"]["name"], "cart");
        assert_eq!(written[0]["parentRef"], Value::Null);
        let resource = resource(Kind::XBackendTrafficPolicy).unwrap();
        assert_eq!(resource.api_version, "gateway.networking.x-k8s.io/v1alpha1");
    }

    #[test]
    fn conditions_of_a_kind_without_targets() {
        let object = ObjectStatus {
            conditions: status(true).parents.remove(0).conditions,
            parents: Vec::new(),
            ..status(true)
        };
        let others = json!({"type": "Ready", "status": "True"});
        let stale = json!({"type": "Overridden", "status": "True"});
        let first = own(&[others.clone(), stale], &object, "t1");
        assert_eq!(first.len(), 2);
        assert_eq!(first[0], others);
        assert_eq!(first[1]["type"], "Accepted");
        assert_eq!(own(&first, &object, "t2"), first);
        for kind in [
            Kind::PeerAuthentication,
            Kind::Telemetry,
            Kind::ExternalService,
            Kind::EgressPolicy,
        ] {
            assert_eq!(fields(kind), ("conditions", None));
            assert_eq!(resource(kind).unwrap().api_version, API_VERSION);
        }
        assert_eq!(resource(Kind::EgressPolicy).unwrap().kind, "EgressPolicy");
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
