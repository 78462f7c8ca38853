//! XBackendTrafficPolicy (`gateway.networking.x-k8s.io`, v1alpha1): sessions and retry budgets of
//! backends.

use serde::Deserialize;
use weft_api::policy::Duration;

use super::convert::Refusals;
use super::session::SessionPersistence;
use super::types::{Meta, Unknown};
use crate::model::{self, Name, ParentRef};

/// The API group and version of the kind.
pub const X_API_VERSION: &str = "gateway.networking.x-k8s.io/v1alpha1";

/// Defaults of the kind's own schema.
const PERCENT: u32 = 20;
const INTERVAL: &str = "10s";
const MIN_COUNT: u32 = 10;
const MIN_INTERVAL: &str = "1s";
/// Shortest and longest interval of a budget, milliseconds.
const INTERVALS: std::ops::RangeInclusive<u64> = 1_000..=3_600_000;

#[derive(Debug, Deserialize)]
pub struct BackendTrafficPolicy {
    pub metadata: Meta,
    #[serde(default)]
    pub spec: BackendTrafficSpec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BackendTrafficSpec {
    target_refs: Vec<TargetRef>,
    retry_constraint: Option<RetryConstraint>,
    session_persistence: Option<SessionPersistence>,
    #[serde(flatten)]
    unknown: Unknown,
}

#[derive(Debug, Deserialize)]
struct TargetRef {
    #[serde(default)]
    group: String,
    kind: String,
    name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct RetryConstraint {
    budget: Budget,
    min_retry_rate: Rate,
    #[serde(flatten)]
    unknown: Unknown,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Budget {
    percent: Option<u32>,
    interval: Option<Duration>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Rate {
    count: Option<u32>,
    interval: Option<Duration>,
}

impl BackendTrafficPolicy {
    pub fn into_model(self) -> model::Object {
        let mut refusals = Refusals::default();
        let BackendTrafficSpec {
            target_refs,
            retry_constraint,
            session_persistence,
            unknown,
        } = self.spec;
        refusals.unknown(&unknown, "");
        if target_refs.is_empty() {
            refusals.unsupported("targetRefs names no Service");
        }
        let retry = retry_constraint.map(|given| constraint(given, &mut refusals));
        let session = session_persistence.map(|given| given.into_model(&mut refusals));
        let targets = target_refs.into_iter().map(|given| ParentRef {
            group: Some(given.group),
            kind: Some(given.kind),
            name: given.name,
            ..ParentRef::default()
        });
        model::Object::BackendTraffic(Box::new(model::BackendTraffic {
            name: Name::new(self.metadata.namespace, self.metadata.name),
            created: self.metadata.creation_timestamp.unwrap_or_default(),
            targets: targets.collect(),
            session,
            retry,
            refused: refusals
                .0
                .into_iter()
                .map(|refused| refused.message)
                .collect(),
        }))
    }
}

fn constraint(given: RetryConstraint, refusals: &mut Refusals) -> model::RetryConstraint {
    const AT: &str = "retryConstraint";
    refusals.unknown(&given.unknown, "retryConstraint: ");
    let or = |given: Option<Duration>, default: &str| {
        given.or_else(|| default.parse().ok()).unwrap_or_default()
    };
    let constraint = model::RetryConstraint {
        percent: given.budget.percent.unwrap_or(PERCENT),
        interval: or(given.budget.interval, INTERVAL),
        min_count: given.min_retry_rate.count.unwrap_or(MIN_COUNT),
        min_interval: or(given.min_retry_rate.interval, MIN_INTERVAL),
    };
    if constraint.percent > 100 {
        refusals.unsupported(format!("{AT}: {} percent is above 100", constraint.percent));
    }
    for (name, interval) in [
        ("budget.interval", constraint.interval),
        ("minRetryRate.interval", constraint.min_interval),
    ] {
        if !INTERVALS.contains(&interval.as_millis()) {
            refusals.unsupported(format!("{AT}: {name} {interval} is not between 1s and 1h"));
        }
    }
    if !(1..=1_000_000).contains(&constraint.min_count) {
        refusals.unsupported(format!(
            "{AT}: minRetryRate.count {} is not between 1 and 1000000",
            constraint.min_count
        ));
    }
    constraint
}
