//! A compiled resource and its version.

use aws_lc_rs::digest::{SHA256, digest};
use prost::Message;
use weft_api::proto::{Absent, Resource, ResourceKey, resource::Body};

/// A resource ready to be sent.
#[derive(Clone, Debug, PartialEq)]
pub struct Compiled {
    pub resource: Resource,
    /// Encoded length, bytes.
    pub len: usize,
}

impl Compiled {
    /// Puts the version on a body; none is `Absent`.
    pub fn new(key: ResourceKey, body: Option<Body>) -> Self {
        let mut resource = Resource {
            key: Some(key),
            version: 0,
            body: Some(body.unwrap_or(Body::Absent(Absent {}))),
        };
        // Maps are encoded in key order (api/build.rs), so equal content has equal bytes. The key
        // is part of them, which does no harm.
        let bytes = resource.encode_to_vec();
        let hash = digest(&SHA256, &bytes);
        let mut first = [0u8; 8];
        first.copy_from_slice(&hash.as_ref()[..8]);
        // Never 0: that says "none held".
        resource.version = u64::from_be_bytes(first).max(1);
        Self {
            len: resource.encoded_len(),
            resource,
        }
    }

    pub fn version(&self) -> u64 {
        self.resource.version
    }

    pub fn is_absent(&self) -> bool {
        matches!(self.resource.body, Some(Body::Absent(_)))
    }

    /// Names of the Endpoints resources a destination leads to; none for other kinds.
    pub fn endpoint_names(&self) -> Vec<String> {
        let Some(Body::Destination(destination)) = &self.resource.body else {
            return Vec::new();
        };
        let mut names: Vec<String> = destination
            .routes
            .iter()
            .chain(
                destination
                    .opaque
                    .iter()
                    .filter_map(|opaque| opaque.route.as_ref()),
            )
            .flat_map(|route| {
                let fallback = route
                    .policy
                    .as_ref()
                    .and_then(|policy| policy.fallback.as_ref())
                    .and_then(|fallback| match &fallback.action {
                        Some(weft_api::proto::fallback::Action::Backend(backend)) => Some(backend),
                        _ => None,
                    });
                let filters = route
                    .filters
                    .iter()
                    .chain(route.backends.iter().flat_map(|weighted| &weighted.filters));
                let mirrors = filters.filter_map(|filter| match &filter.filter {
                    Some(weft_api::proto::filter::Filter::Mirror(mirror)) => {
                        mirror.backend.as_ref()
                    }
                    _ => None,
                });
                route
                    .backends
                    .iter()
                    .filter_map(|weighted| weighted.backend.as_ref())
                    .chain(fallback)
                    .chain(mirrors)
            })
            .map(|backend| backend.endpoints.clone())
            .collect();
        names.sort();
        names.dedup();
        names
    }
}
