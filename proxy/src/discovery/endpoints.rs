//! The endpoints of a backend, as the workers read them.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use weft_api::identity::SpiffeId;
use weft_api::proto;

use super::compile::{Invalid, Result, known, refuse, weight};
use crate::tables::{EndpointInfo, EndpointSet, Hints};
use crate::transport::Siblings;

/// Endpoints of a backend.
const MAX_ENDPOINTS: usize = 100_000;

/// Compiles endpoints. Those that stay (same address and identity as in `before`) keep their
/// health; one that is named twice counts once. The generation is the next one after `before`.
pub fn endpoints(given: &proto::Endpoints, before: &EndpointSet) -> Result<EndpointSet> {
    endpoints_with(given, before, None)
}

/// The same for addresses of one name, which know each other.
pub(crate) fn endpoints_with(
    given: &proto::Endpoints,
    before: &EndpointSet,
    siblings: Option<&Arc<Siblings>>,
) -> Result<EndpointSet> {
    if given.endpoints.len() > MAX_ENDPOINTS {
        refuse!(
            "there are {} endpoints; at most {MAX_ENDPOINTS} are taken",
            given.endpoints.len()
        );
    }
    let old: HashMap<_, _> = before
        .endpoints
        .iter()
        .map(|info| ((info.address, info.identity.as_ref()), info))
        .collect();
    let mut seen = HashSet::with_capacity(given.endpoints.len());
    let mut names = Interned::default();
    let mut identities: HashSet<Arc<SpiffeId>> = HashSet::new();
    let mut compiled = Vec::with_capacity(given.endpoints.len());
    let mut hints = Vec::new();
    for endpoint in &given.endpoints {
        let address: SocketAddr = endpoint
            .address
            .parse()
            .map_err(|_| Invalid(format!("'{}' is not address:port", endpoint.address)))?;
        if address.port() == 0 || address.ip().is_unspecified() || address.ip().is_multicast() {
            refuse!("{address} is no address to connect to");
        }
        let identity = match endpoint.identity.as_str() {
            "" => None,
            text => {
                let id: SpiffeId = text
                    .parse()
                    .map_err(|e| Invalid(format!("endpoint {address}: {e}")))?;
                let id = Arc::new(id);
                Some(match identities.get(&id) {
                    Some(known) => known.clone(),
                    None => {
                        identities.insert(id.clone());
                        id
                    }
                })
            }
        };
        let state = known::<proto::Health>(endpoint.health, "endpoint health")?;
        let weight = weight(endpoint.weight)?;
        if !seen.insert((address, identity.clone())) {
            continue;
        }
        let health = old
            .get(&(address, identity.as_ref()))
            .map(|info| info.health.clone())
            .unwrap_or_default();
        let mut kept = |given: &[String]| given.iter().map(|name| names.get(name)).collect();
        hints.push(Hints {
            zones: kept(&endpoint.for_zones),
            nodes: kept(&endpoint.for_nodes),
        });
        compiled.push(Arc::new(EndpointInfo {
            address,
            identity,
            workload: endpoint.workload.as_str().into(),
            zone: names.get(&endpoint.zone),
            weight,
            state,
            health,
            siblings: siblings.cloned(),
        }));
    }
    if hints.iter().all(Hints::is_empty) {
        hints = Vec::new();
    }
    Ok(EndpointSet {
        generation: before.generation + 1,
        endpoints: compiled,
        node_local: given.node_local,
        hints: hints.into(),
        near: Box::default(),
    })
}

/// Strings that occur many times, kept once.
#[derive(Default)]
struct Interned(HashSet<Arc<str>>);

impl Interned {
    fn get(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.0.get(text) {
            return known.clone();
        }
        let new: Arc<str> = text.into();
        self.0.insert(new.clone());
        new
    }
}
