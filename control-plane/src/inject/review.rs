//! `AdmissionReview` (admission.k8s.io/v1) in and out.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::{Outcome, Refused, Request, Settings, Version, inject};

/// What came of a review, for metrics and the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Injected,
    /// Left as it is; why.
    Skipped(String),
    /// Why.
    Refused(String),
}

/// A body that is not an AdmissionReview of a Pod that is created.
#[derive(Debug, thiserror::Error)]
#[error("this is not an AdmissionReview (admission.k8s.io/v1) with a Pod: {0}")]
pub struct InvalidReview(String);

/// Answers an AdmissionReview.
///
/// # Errors
/// The body is not one.
pub fn review(
    body: &[u8],
    namespace_enabled: bool,
    settings: &Settings,
    kubernetes: Version,
) -> Result<(Value, Verdict), InvalidReview> {
    let invalid = |reason: &str| InvalidReview(reason.to_owned());
    let mut review: Value =
        serde_json::from_slice(body).map_err(|error| InvalidReview(error.to_string()))?;
    let request = review
        .get_mut("request")
        .map(Value::take)
        .filter(Value::is_object)
        .ok_or_else(|| invalid("it has no request"))?;
    let uid = request.get("uid").and_then(Value::as_str);
    let uid = uid.ok_or_else(|| invalid("request.uid is missing"))?;
    let text = |field: &str| request.pointer(field).and_then(Value::as_str);
    if text("/kind/kind") != Some("Pod") {
        return Err(invalid("request.kind is not Pod"));
    }
    // A pod that is created often has no namespace of its own; the request always has.
    let namespace = text("/namespace").ok_or_else(|| invalid("request.namespace is missing"))?;
    let pod = request
        .get("object")
        .filter(|object| object.is_object())
        .ok_or_else(|| invalid("request.object is missing"))?;
    let request = Request {
        pod,
        namespace,
        namespace_enabled,
        kubernetes,
    };
    let mut response = json!({"uid": uid, "allowed": true});
    let verdict = match inject(request, settings) {
        Ok(Outcome::Injected(after)) => {
            set_patch(&mut response, pod, &after);
            Verdict::Injected
        }
        Ok(Outcome::Impossible { pod: after, reason }) => {
            set_patch(&mut response, pod, &after);
            response["warnings"] = json!([format!("{} has no sidecar: {reason}", called(pod))]);
            Verdict::Skipped(reason)
        }
        Ok(Outcome::NotWanted(reason)) => Verdict::Skipped(reason),
        Err(Refused(reason)) => {
            response["allowed"] = json!(false);
            response["status"] = json!({
                "status": "Failure",
                "reason": "Invalid",
                "code": 422,
                "message": reason,
            });
            Verdict::Refused(reason)
        }
    };
    let answer = json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "response": response,
    });
    Ok((answer, verdict))
}

/// The pod by its name; pods of controllers have only the beginning of one.
fn called(pod: &Value) -> String {
    let metadata = pod.get("metadata");
    let text = |field: &str| metadata.and_then(|metadata| metadata.get(field)?.as_str());
    match (text("name"), text("generateName")) {
        (Some(name), _) => format!("pod {name}"),
        (None, Some(beginning)) => format!("pod {beginning}*"),
        (None, None) => "the pod".to_owned(),
    }
}

fn set_patch(response: &mut Value, before: &Value, after: &Value) {
    let patch = patch(before, after);
    if !patch.is_empty() {
        response["patchType"] = json!("JSONPatch");
        response["patch"] = json!(STANDARD.encode(Value::Array(patch).to_string()));
    }
}

/// JSON Patch (RFC 6902) between two pods of which only the fields that injection touches differ.
/// Each is set as a whole: `add` replaces a member that is there (section 4.1).
pub fn patch(before: &Value, after: &Value) -> Vec<Value> {
    [
        "/metadata/annotations",
        "/spec/containers",
        "/spec/initContainers",
        "/spec/volumes",
    ]
    .into_iter()
    .filter_map(|path| {
        let (old, new) = (before.pointer(path), after.pointer(path)?);
        (old != Some(new)).then(|| json!({"op": "add", "path": path, "value": new}))
    })
    .collect()
}
