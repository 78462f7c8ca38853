//! Our own kinds as the apiserver serves them. They are read as loosely as can be, so that one that
//! makes no sense is a finding and not the end of a list; then as strictly as in a folder.

use kube::core::ObjectMeta;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use weft_api::policy::{
    EgressPolicySpec, ExternalServiceSpec, PeerAuthenticationSpec, TelemetrySpec, TrafficPolicySpec,
};

use super::meta;
use super::objects::resource;
use super::watch::{Watched, Wrong};
use crate::model::{Kind, Object, ParentRef, Policy, validate};

macro_rules! policy {
    ($type:ident, $plural:literal, $spec:ty, $object:expr) => {
        #[derive(Clone, Debug, Deserialize)]
        pub(super) struct $type {
            #[serde(deserialize_with = "meta::read")]
            metadata: ObjectMeta,
            #[serde(default)]
            spec: Value,
        }
        resource!(
            $type,
            weft_api::policy::GROUP,
            "v1alpha1",
            stringify!($type),
            $plural
        );

        impl Watched for $type {
            const KIND: Kind = Kind::$type;
            const PLURAL: &'static str = $plural;
            const OPTIONAL: bool = true;
            const GENERATIONS: bool = true;

            fn into_model(self) -> Result<Option<Object>, Vec<Wrong>> {
                let policy: Policy<$spec> = read(&self.metadata, self.spec)?;
                checked($object(policy))
            }

            fn names(&self) -> Vec<ParentRef> {
                meta::references(&self.spec, "targetRefs")
            }
        }
    };
}

policy!(
    TrafficPolicy,
    "trafficpolicies",
    TrafficPolicySpec,
    |policy| Object::TrafficPolicy(Box::new(policy))
);
policy!(
    PeerAuthentication,
    "peerauthentications",
    PeerAuthenticationSpec,
    Object::PeerAuthentication
);
policy!(Telemetry, "telemetries", TelemetrySpec, Object::Telemetry);
policy!(
    EgressPolicy,
    "egresspolicies",
    EgressPolicySpec,
    Object::EgressPolicy
);
policy!(
    ExternalService,
    "externalservices",
    ExternalServiceSpec,
    |service| Object::ExternalService(Box::new(service))
);

/// Reads a policy's `spec`; none is an empty one.
fn read<T: DeserializeOwned>(metadata: &ObjectMeta, spec: Value) -> Result<Policy<T>, Vec<Wrong>> {
    let wrong = |message| {
        vec![Wrong {
            message,
            help: "correct it; docs/reference/policies.md has every field with an example; what it said before stands".to_owned(),
        }]
    };
    let spec = match spec {
        Value::Null => Value::Object(serde_json::Map::new()),
        spec @ Value::Object(_) => spec,
        _ => return Err(wrong("spec is not an object".to_owned())),
    };
    let spec = serde_json::from_value(spec).map_err(|error| wrong(format!("spec: {error}")))?;
    Ok(Policy {
        name: meta::name(metadata),
        created: meta::created(metadata),
        spec,
    })
}

/// Refuses values that the types let through.
fn checked(object: Object) -> Result<Option<Object>, Vec<Wrong>> {
    let invalid = validate(&object);
    if invalid.is_empty() {
        return Ok(Some(object));
    }
    Err(invalid
        .into_iter()
        .map(|invalid| Wrong {
            message: format!("{}: {}", invalid.path.join("."), invalid.message),
            help: invalid.help,
        })
        .collect())
}
