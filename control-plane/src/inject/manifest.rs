//! Pods inside the objects that make them: what `weft inject` does with files.

use serde_json::Value;

use super::{Outcome, Refused, Request, Settings, Version, inject};

/// Where the pod or its template is in an object of this kind.
fn template(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "Pod" => "",
        "Deployment"
        | "ReplicaSet"
        | "StatefulSet"
        | "DaemonSet"
        | "Job"
        | "ReplicationController" => "/spec/template",
        "CronJob" => "/spec/jobTemplate/spec/template",
        _ => return None,
    })
}

/// What was done with one object, for the person who asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// "deployment/cart".
    pub object: String,
    /// Why there is no sidecar; none when there is one.
    pub skipped: Option<String>,
}

/// How files are read.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// Of objects that name none.
    pub namespace: &'a str,
    pub kubernetes: Version,
    pub settings: &'a Settings,
}

/// Puts sidecars into the pods of an object, and of all objects of a List. Other objects are left
/// alone and have no note. Whoever calls this asks for sidecars, as the label of a namespace does.
///
/// # Errors
/// A pod asks for something that makes no sense; the sentence names the object.
pub fn inject_object(
    object: &mut Value,
    context: Context<'_>,
    notes: &mut Vec<Note>,
) -> Result<(), Refused> {
    let kind = object.get("kind").and_then(Value::as_str).unwrap_or("");
    if kind == "List" || (kind.ends_with("List") && object.get("items").is_some()) {
        let items = object.get_mut("items").and_then(Value::as_array_mut);
        for item in items.into_iter().flatten() {
            inject_object(item, context, notes)?;
        }
        return Ok(());
    }
    let Some(at) = template(kind) else {
        return Ok(());
    };
    let metadata = object.get("metadata");
    let text = |field: &str| metadata.and_then(|metadata| metadata.get(field)?.as_str());
    let called = format!(
        "{}/{}",
        kind.to_ascii_lowercase(),
        text("name").or(text("generateName")).unwrap_or("unnamed")
    );
    let namespace = text("namespace").unwrap_or(context.namespace).to_owned();
    let Some(pod) = object.pointer_mut(at) else {
        return Err(Refused(format!("{called}: {} is missing", &at[1..])));
    };
    let request = Request {
        pod,
        namespace: &namespace,
        namespace_enabled: true,
        kubernetes: context.kubernetes,
    };
    let outcome = inject(request, context.settings)
        .map_err(|Refused(reason)| Refused(format!("{called}: {reason}")))?;
    let skipped = match outcome {
        Outcome::Injected(after) => {
            *pod = after;
            None
        }
        Outcome::Impossible { pod: after, reason } => {
            *pod = after;
            Some(reason)
        }
        Outcome::NotWanted(reason) => Some(reason),
    };
    notes.push(Note {
        object: called,
        skipped,
    });
    Ok(())
}

/// A document of a file: its text, and what it is once parsed.
///
/// Documents without pods come back as they were written, comments included.
///
/// # Errors
/// The text is not YAML, or a pod asks for something that makes no sense.
pub fn inject_text(
    text: &str,
    context: Context<'_>,
    notes: &mut Vec<Note>,
) -> Result<String, ManifestError> {
    let mut out = String::new();
    for (index, document) in documents(text).into_iter().enumerate() {
        let body = document.strip_prefix("---").unwrap_or(document);
        let object: Value =
            serde_saphyr::from_str(body).map_err(|error| ManifestError::Unreadable {
                document: index + 1,
                reason: error.to_string(),
            })?;
        let mut after = object.clone();
        inject_object(&mut after, context, notes)?;
        if !out.is_empty() || index > 0 {
            out.push_str("---\n");
        }
        if after == object {
            out.push_str(body.trim_start_matches(['\r', '\n']));
        } else {
            out.push_str(&serde_saphyr::to_string(&after).map_err(|error| {
                ManifestError::Unreadable {
                    document: index + 1,
                    reason: error.to_string(),
                }
            })?);
        }
        if !out.ends_with('\n') {
            out.push('\n');
        }
    }
    Ok(out)
}

/// Why a file is not injected.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("document {document} cannot be read: {reason}")]
    Unreadable { document: usize, reason: String },
    #[error(transparent)]
    Refused(#[from] Refused),
}

/// The documents of a file, each with its `---` line if it has one; those with nothing but comments
/// are left out.
fn documents(text: &str) -> Vec<&str> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut found = Vec::new();
    let (mut start, mut offset) = (0, 0);
    for line in text.split_inclusive('\n') {
        let rest = line.strip_prefix("---");
        if offset > 0
            && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace))
        {
            found.push(&text[start..offset]);
            start = offset;
        }
        offset += line.len();
    }
    found.push(&text[start..]);
    found.retain(|document| {
        document.lines().any(|line| {
            let line = line.strip_prefix("---").unwrap_or(line).trim();
            !line.is_empty() && !line.starts_with('#') && line != "..."
        })
    });
    found
}
