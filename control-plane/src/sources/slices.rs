//! What an EndpointSlice says of an endpoint, read the same from a folder and from an apiserver.

use serde::Deserialize;
use weft_api::proto::Health;

use crate::model;

/// discovery.k8s.io/v1 EndpointConditions.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

impl Conditions {
    /// As kube-proxy reads them: `ready` and `serving` are true when they are not said. Who is
    /// terminating is not ready, unless the Service publishes addresses that are not ready.
    pub(super) fn health(self) -> Health {
        if self.ready != Some(false) {
            Health::Ready
        } else if self.serving != Some(false) && self.terminating == Some(true) {
            Health::Draining
        } else {
            Health::NotReady
        }
    }
}

/// discovery.k8s.io/v1 EndpointHints.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Hints {
    for_zones: Option<Vec<Named>>,
    for_nodes: Option<Vec<Named>>,
}

#[derive(Clone, Debug, Deserialize)]
struct Named {
    name: String,
}

impl Hints {
    pub(super) fn into_model(self) -> Option<Box<model::Hints>> {
        let names = |given: Option<Vec<Named>>| -> Vec<String> {
            let given = given.into_iter().flatten();
            given.map(|named| named.name).collect()
        };
        let hints = model::Hints {
            zones: names(self.for_zones),
            nodes: names(self.for_nodes),
        };
        (hints != model::Hints::default()).then(|| Box::new(hints))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every combination, as kube-proxy reads it.
    #[test]
    fn conditions_of_an_endpoint() {
        use Health::{Draining, NotReady, Ready};
        const YES: Option<bool> = Some(true);
        const NO: Option<bool> = Some(false);
        for (ready, serving, terminating, health) in [
            (None, None, None, Ready),
            (None, None, NO, Ready),
            (None, None, YES, Ready),
            (None, NO, None, Ready),
            (None, NO, YES, Ready),
            (None, YES, YES, Ready),
            (YES, None, None, Ready),
            (YES, YES, NO, Ready),
            // publishNotReadyAddresses: ready, whatever else.
            (YES, YES, YES, Ready),
            (YES, NO, YES, Ready),
            (YES, NO, NO, Ready),
            (NO, None, None, NotReady),
            (NO, YES, None, NotReady),
            (NO, YES, NO, NotReady),
            (NO, NO, NO, NotReady),
            (NO, NO, YES, NotReady),
            (NO, YES, YES, Draining),
            (NO, None, YES, Draining),
        ] {
            let conditions = Conditions {
                ready,
                serving,
                terminating,
            };
            assert_eq!(conditions.health(), health, "{conditions:?}");
        }
    }
}
