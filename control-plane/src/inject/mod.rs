//! Puts the sidecar into pods.
//!
//! [`inject`] is a pure function of the pod, what its namespace says, the settings and the version
//! of Kubernetes. The webhook ([`review`]) and `weft inject` ([`manifest`]) both call it, so that
//! both make the same of the same input. Pods stay `serde_json::Value`s: fields that we do not know
//! survive.
//!
//! - [`settings`]: what the ConfigMap `weft-injector` says, the same for all pods.
//! - [`wish`]: whether a sidecar is wanted, and whether the pod can have one.
//! - [`annotations`]: what a pod sets for itself.
//! - [`sidecar`]: the containers and volumes that are put in.
//! - [`probes`]: those that have to be made by the proxy.
//! - [`review`]: `AdmissionReview` in and out.
//! - [`manifest`]: pods inside Deployments, Jobs, Lists, …
//!
//! A pod that was injected before is left as it is when the same would be put in again, so that a
//! second look (the webhook is invoked again after other webhooks) changes nothing and takes nothing
//! from what others have added to our containers. When something else would be put in, ours goes out
//! first.

pub mod annotations;
pub mod manifest;
pub mod probes;
pub mod review;
pub mod settings;
pub mod sidecar;
#[cfg(test)]
mod tests;
pub mod wish;

use std::fmt;
use std::str::FromStr;

use serde_json::{Map, Value, json};
use weft_api::names::{INIT_CONTAINER, PROXY_CONTAINER, STATUS};

use annotations::Annotations;
pub use settings::Settings;
use wish::Wish;

/// A version of Kubernetes: what the API server says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
}

impl Version {
    /// Init containers with `restartPolicy: Always` are on by default from here
    /// (KEP-753, beta).
    pub const NATIVE_SIDECARS: Self = Self {
        major: 1,
        minor: 29,
    };
}

/// Text that is no version of Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a version of Kubernetes: write one such as 1.34")]
pub struct InvalidVersion(String);

impl FromStr for Version {
    type Err = InvalidVersion;

    /// Takes "1.34", "v1.34.8" and, as some providers report it, "1.34+".
    fn from_str(given: &str) -> Result<Self, Self::Err> {
        let wrong = || InvalidVersion(given.to_owned());
        let mut parts = given.strip_prefix('v').unwrap_or(given).split('.');
        let mut number = || {
            let part = parts.next()?;
            let digits = part.trim_end_matches(|c: char| !c.is_ascii_digit());
            digits.parse().ok()
        };
        Ok(Self {
            major: number().ok_or_else(wrong)?,
            minor: number().ok_or_else(wrong)?,
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A pod and what is around it.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// A Pod, or the template of one.
    pub pod: &'a Value,
    pub namespace: &'a str,
    /// The namespace has `weft.dev/inject: enabled`.
    pub namespace_enabled: bool,
    pub kubernetes: Version,
}

/// What became of a pod.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It has its sidecar now.
    Injected(Value),
    /// It was asked for, and the pod cannot have it: the pod with an annotation that says so, and
    /// the reason as a sentence.
    Impossible { pod: Value, reason: String },
    /// Nobody asked for it, with the reason as a sentence.
    NotWanted(String),
}

/// Something is wrong in the pod, and it must not run without what it asks for: a sentence that
/// names the place, the value and what is allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// Puts the sidecar into a pod.
///
/// # Errors
/// The pod asks for something that makes no sense; it is to be refused with the sentence given.
pub fn inject(request: Request<'_>, settings: &Settings) -> Result<Outcome, Refused> {
    match wish::wish(request, settings)? {
        Wish::No(reason) => return Ok(Outcome::NotWanted(reason)),
        Wish::Impossible(reason) => {
            let mut pod = request.pod.clone();
            annotate(&mut pod, STATUS, &format!("not injected: {reason}"))?;
            return Ok(Outcome::Impossible { pod, reason });
        }
        Wish::Yes => {}
    }
    let annotations = Annotations::read(request.pod)?;
    let native = request.kubernetes >= Version::NATIVE_SIDECARS;
    let asked = probes::asked(request.pod);
    let parts = sidecar::parts(settings, &annotations, &asked, native);
    let status = format!("injected: revision {}", parts.revision());
    let mut pod = request.pod.clone();
    match standing(&pod) {
        Standing::Ours(found) if found == status => return Ok(Outcome::Injected(pod)),
        Standing::Ours(_) => remove(&mut pod, &parts)?,
        Standing::Others(name) => {
            return Err(Refused(format!(
                "the pod has a container named {name}, which is the name of the mesh's own; \
                 give it another name"
            )));
        }
        Standing::None => {}
    }
    wish::fits(&pod)?;
    probes::rewrite(&mut pod);
    let spec = object(&mut pod, "spec")?;
    {
        let init = list(spec, "initContainers")?;
        if native {
            // First of all, so that every init container after them has a network.
            init.insert(0, parts.init.clone());
            init.insert(1, parts.proxy.clone());
        } else {
            // Last of all: the proxy runs only once the init containers are done.
            init.push(parts.init.clone());
        }
    }
    let first = spec
        .get("containers")
        .and_then(|containers| containers.get(0)?.get("name"))
        .cloned();
    if !native {
        list(spec, "containers")?.insert(0, parts.proxy.clone());
    }
    list(spec, "volumes")?.extend(parts.volumes.iter().cloned());
    if let (false, Some(Value::String(first))) = (native, first) {
        // Ours is the first one now, which kubectl would choose.
        annotate_default(&mut pod, "kubectl.kubernetes.io/default-container", &first)?;
    }
    if settings.prometheus.annotations && !has_annotation_prefix(&pod, "prometheus.io/") {
        for (key, value) in sidecar::prometheus() {
            annotate(&mut pod, key, &value)?;
        }
    }
    annotate(&mut pod, STATUS, &status)?;
    Ok(Outcome::Injected(pod))
}

/// What of the sidecar's names is there already.
enum Standing {
    None,
    /// Put in by us; what the status annotation says.
    Ours(String),
    /// A container of somebody else's.
    Others(String),
}

fn standing(pod: &Value) -> Standing {
    let ours = |name: &str| name == INIT_CONTAINER || name == PROXY_CONTAINER;
    let mut found = containers(pod).filter_map(name).filter(|name| ours(name));
    let Some(first) = found.next() else {
        return Standing::None;
    };
    match annotation(pod, STATUS) {
        Some(status) if status.starts_with("injected") => {
            // Half of it is not what we put in.
            if found.next().is_some() {
                Standing::Ours(status.to_owned())
            } else {
                Standing::Ours(String::new())
            }
        }
        _ => Standing::Others(first.to_owned()),
    }
}

fn remove(pod: &mut Value, parts: &sidecar::Parts) -> Result<(), Refused> {
    let volumes: Vec<&str> = parts.volumes.iter().filter_map(name).collect();
    let spec = object(pod, "spec")?;
    for (field, names) in [
        ("initContainers", &[INIT_CONTAINER, PROXY_CONTAINER][..]),
        ("containers", &[PROXY_CONTAINER]),
        ("volumes", &volumes),
    ] {
        if spec.contains_key(field) {
            list(spec, field)?.retain(|item| name(item).is_none_or(|name| !names.contains(&name)));
        }
    }
    Ok(())
}

/// Init containers, then containers.
fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    ["/spec/initContainers", "/spec/containers"]
        .into_iter()
        .filter_map(|at| pod.pointer(at)?.as_array())
        .flatten()
}

fn name(value: &Value) -> Option<&str> {
    value.get("name")?.as_str()
}

fn annotation<'a>(pod: &'a Value, key: &str) -> Option<&'a str> {
    pod.get("metadata")?.get("annotations")?.get(key)?.as_str()
}

fn has_annotation_prefix(pod: &Value, prefix: &str) -> bool {
    pod.pointer("/metadata/annotations")
        .and_then(Value::as_object)
        .is_some_and(|all| all.keys().any(|key| key.starts_with(prefix)))
}

fn annotate(pod: &mut Value, key: &str, value: &str) -> Result<(), Refused> {
    let metadata = object(pod, "metadata")?;
    let annotations = metadata.entry("annotations").or_insert(Value::Null);
    as_object(annotations, "metadata.annotations")?.insert(key.to_owned(), json!(value));
    Ok(())
}

fn annotate_default(pod: &mut Value, key: &str, value: &str) -> Result<(), Refused> {
    if annotation(pod, key).is_none() {
        annotate(pod, key, value)?;
    }
    Ok(())
}

fn object<'a>(pod: &'a mut Value, field: &str) -> Result<&'a mut Map<String, Value>, Refused> {
    let pod = as_object(pod, "the pod")?;
    as_object(pod.entry(field).or_insert(Value::Null), field)
}

/// An object; nothing (`null`) becomes an empty one.
fn as_object<'a>(value: &'a mut Value, at: &str) -> Result<&'a mut Map<String, Value>, Refused> {
    if value.is_null() {
        *value = json!({});
    }
    value
        .as_object_mut()
        .ok_or_else(|| Refused(format!("{at} is not an object")))
}

fn list<'a>(spec: &'a mut Map<String, Value>, field: &str) -> Result<&'a mut Vec<Value>, Refused> {
    let value = spec.entry(field).or_insert(Value::Null);
    if value.is_null() {
        *value = json!([]);
    }
    value
        .as_array_mut()
        .ok_or_else(|| Refused(format!("spec.{field} is not a list")))
}
