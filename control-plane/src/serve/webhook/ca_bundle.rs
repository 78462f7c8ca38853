//! Tells the apiserver which roots the webhook's certificate is verified against: `caBundle` of the
//! MutatingWebhookConfiguration. The chart leaves it out, so that upgrades do not touch it.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use json_patch::{Patch as Operations, PatchOperation};
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, from_value, json};
use tokio::time::{MissedTickBehavior, interval};
use tracing::{info, warn};
use weft_api::names::INJECTOR;

use crate::cluster::{ClusterError, Leadership, answer};
use crate::serve::ca::Authority;

/// How often it is looked at: somebody may have installed or changed it.
const LOOK: Duration = Duration::from_secs(5);

/// Keeps the bundle right while this replica leads.
pub async fn keep(client: Client, authority: Arc<Authority>, leadership: Leadership) {
    let configurations: Api<MutatingWebhookConfiguration> = Api::all(client);
    let mut changes = authority.changes();
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut complained = false;
    loop {
        leadership.acquired().await;
        match once(&configurations, &authority.bundle()).await {
            Ok(changed) => {
                if changed {
                    info!("the apiserver was told the roots of the webhook {INJECTOR}");
                }
                complained = false;
            }
            // Once: the configuration may be left out of an installation on purpose.
            Err(error) if !complained => {
                warn!("the apiserver does not learn the roots of the webhook: {error}");
                complained = true;
            }
            Err(_) => {}
        }
        tokio::select! {
            _ = ticks.tick() => {}
            changed = changes.changed() => if changed.is_err() {
                return;
            },
        }
    }
}

async fn once(
    configurations: &Api<MutatingWebhookConfiguration>,
    bundle: &str,
) -> Result<bool, ClusterError> {
    let doing = |what| format!("{what} the MutatingWebhookConfiguration {INJECTOR}");
    let now = answer(doing("read"), configurations.get(INJECTOR)).await?;
    let now = serde_json::to_value(&now.webhooks).unwrap_or(Value::Null);
    let Some(operations) = operations(&now, bundle) else {
        return Ok(false);
    };
    let patch = Patch::Json::<()>(operations);
    let parameters = PatchParams::default();
    let patched = configurations.patch(INJECTOR, &parameters, &patch);
    answer(doing("change"), patched).await?;
    Ok(true)
}

/// What has to change in the list of webhooks; none when all is right. Fails at the apiserver when
/// the list has changed meanwhile.
fn operations(webhooks: &Value, bundle: &str) -> Option<Operations> {
    let encoded = STANDARD.encode(bundle);
    let mut operations: Vec<PatchOperation> = Vec::new();
    for (index, webhook) in webhooks.as_array()?.iter().enumerate() {
        if webhook.pointer("/clientConfig/caBundle") == Some(&json!(encoded)) {
            continue;
        }
        let at = format!("/webhooks/{index}");
        for operation in [
            json!({"op": "test", "path": format!("{at}/name"), "value": webhook.get("name")}),
            json!({"op": "add", "path": format!("{at}/clientConfig/caBundle"), "value": encoded}),
        ] {
            operations.push(from_value(operation).ok()?);
        }
    }
    (!operations.is_empty()).then_some(Operations(operations))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_wrong_is_changed() {
        let right = STANDARD.encode("ROOTS");
        let webhooks = json!([
            {"name": "a", "clientConfig": {"caBundle": right}},
            {"name": "b", "clientConfig": {"caBundle": STANDARD.encode("OLD")}},
            {"name": "c", "clientConfig": {}},
        ]);
        let patch = serde_json::to_value(operations(&webhooks, "ROOTS")).unwrap();
        assert_eq!(
            patch,
            json!([
                {"op": "test", "path": "/webhooks/1/name", "value": "b"},
                {"op": "add", "path": "/webhooks/1/clientConfig/caBundle", "value": right},
                {"op": "test", "path": "/webhooks/2/name", "value": "c"},
                {"op": "add", "path": "/webhooks/2/clientConfig/caBundle", "value": right},
            ])
        );
        assert_eq!(operations(&json!([webhooks[0]]), "ROOTS"), None);
    }
}
