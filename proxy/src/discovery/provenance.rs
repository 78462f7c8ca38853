//! Which policies the fields of a destination come from, for `/config`. Beside the tables that workers
//! read, not in them; destinations of which no policy says anything have none.

use std::sync::Arc;

use weft_api::proto;

use crate::tables::Backend;

/// Where the policies of a destination's routes and backends come from. What is the same for several
/// is there once.
#[derive(Debug, Default, PartialEq)]
pub struct Provenance {
    /// As the destination's routes, in their order.
    routes: Vec<Option<Arc<proto::Provenance>>>,
    opaque: Vec<Option<Arc<proto::Provenance>>>,
    /// By [`Backend::id`].
    backends: Vec<(u64, Arc<proto::Provenance>)>,
}

/// Those that are known already.
#[derive(Default)]
struct Known(Vec<Arc<proto::Provenance>>);

impl Known {
    fn share(&mut self, given: Option<&proto::Provenance>) -> Option<Arc<proto::Provenance>> {
        let given = given?;
        if let Some(known) = self.0.iter().find(|known| ***known == *given) {
            return Some(known.clone());
        }
        let shared = Arc::new(given.clone());
        self.0.push(shared.clone());
        Some(shared)
    }
}

impl Provenance {
    /// What a destination's routes and its `built` backends say.
    pub(super) fn collect(
        given: &proto::Destination,
        built: &[(&proto::Backend, Arc<Backend>)],
    ) -> Option<Box<Self>> {
        let mut known = Known::default();
        let mut of_route = |route: &proto::Route| {
            let policy = route.policy.as_ref();
            known.share(policy.and_then(|policy| policy.provenance.as_ref()))
        };
        let routes = given.routes.iter().map(&mut of_route).collect();
        let opaque = given.opaque.iter();
        let opaque = opaque.map(|one| of_route(one.route.as_ref()?)).collect();
        let backends = built.iter().filter_map(|(given, backend)| {
            let policy = given.policy.as_ref()?;
            Some((backend.id, known.share(policy.provenance.as_ref())?))
        });
        let backends = backends.collect();
        (!known.0.is_empty()).then(|| {
            Box::new(Self {
                routes,
                opaque,
                backends,
            })
        })
    }

    pub fn of_route(&self, index: usize) -> Option<&proto::Provenance> {
        self.routes.get(index)?.as_deref()
    }

    pub fn of_opaque(&self, index: usize) -> Option<&proto::Provenance> {
        self.opaque.get(index)?.as_deref()
    }

    pub fn of_backend(&self, id: u64) -> Option<&proto::Provenance> {
        let mut backends = self.backends.iter();
        let (_, found) = backends.find(|(known, _)| *known == id)?;
        Some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::{FieldSource, PolicySource};
    use weft_api::provenance::fields;

    fn provenance(name: &str) -> proto::Provenance {
        proto::Provenance {
            policies: vec![PolicySource {
                name: name.to_owned(),
                target: "Service cart".to_owned(),
            }],
            fields: vec![FieldSource {
                field: "timeouts.request".to_owned(),
                used: 0,
                // One that is not there is left out.
                overridden: vec![7],
            }],
        }
    }

    fn route(of: Option<&str>) -> proto::Route {
        proto::Route {
            policy: Some(proto::RoutePolicy {
                provenance: of.map(provenance),
                ..proto::RoutePolicy::default()
            }),
            ..proto::Route::default()
        }
    }

    #[test]
    fn the_same_is_kept_once_and_nothing_where_nobody_says_anything() {
        let mut given = proto::Destination {
            routes: vec![route(None), route(None)],
            ..proto::Destination::default()
        };
        assert_eq!(Provenance::collect(&given, &[]), None);
        given.routes = vec![route(Some("a")), route(None), route(Some("a"))];
        let kept = Provenance::collect(&given, &[]).unwrap();
        assert_eq!(kept.of_route(1), None);
        assert_eq!(kept.of_route(9), None);
        let [Some(first), _, Some(third)] = &kept.routes[..] else {
            panic!("{kept:?}")
        };
        assert!(Arc::ptr_eq(first, third));
        let [field] = &fields(kept.of_route(0))[..] else {
            panic!("{kept:?}")
        };
        assert_eq!(
            serde_json::json!(field),
            serde_json::json!({
                "field": "timeouts.request",
                "from": {"name": "a", "target": "Service cart"},
                "overridden": [],
            })
        );
        assert_eq!(fields(None), []);
    }
}
