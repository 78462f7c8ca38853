//! A compiled resource and its version.

use aws_lc_rs::digest::{SHA256, digest};
use prost::Message;
use weft_api::proto::resource::Body;
use weft_api::proto::{
    Absent, Backend, Destination, Resource, ResourceKey, ResourceKind, fallback, filter,
};

use super::provenance;
use crate::model::Name;

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

    /// What of it decides anything: without its version, and without which policies it comes from.
    pub fn effect(&self) -> Resource {
        let mut resource = self.resource.clone();
        resource.version = 0;
        provenance::strip(&mut resource);
        resource
    }

    pub fn is_absent(&self) -> bool {
        matches!(self.resource.body, Some(Body::Absent(_)))
    }

    /// Names of the Endpoints resources that its destinations lead to.
    pub fn endpoint_names(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .backends()
            .map(|backend| backend.endpoints.clone())
            .filter(|name| !super::external::is_local(name))
            .collect();
        names.sort();
        names.dedup();
        names
    }

    /// Services that a destination is, leads to, or would be by its host name: a change to one of
    /// them may change it.
    pub fn services(&self) -> Vec<Name> {
        let mut names: Vec<Name> = self
            .backends()
            .map(|backend| Name::new(&backend.namespace, &backend.service))
            .collect();
        for destination in self.destinations() {
            names.push(Name::new(&destination.namespace, &destination.service));
        }
        if let Some(key) = &self.resource.key
            && key.kind() == ResourceKind::Destination
        {
            names.extend(super::destination::service_of_host(&key.name));
        }
        names.sort();
        names.dedup();
        names
    }

    /// A destination, or those that a workload knows by name.
    fn destinations(&self) -> impl Iterator<Item = &Destination> {
        let (one, named) = match &self.resource.body {
            Some(Body::Destination(destination)) => (Some(destination), &[][..]),
            Some(Body::Workload(workload)) => (None, &workload.external_hosts[..]),
            _ => (None, &[][..]),
        };
        let named = named.iter().filter_map(|host| host.destination.as_ref());
        one.into_iter().chain(named)
    }

    /// Every backend of them.
    fn backends(&self) -> impl Iterator<Item = &Backend> {
        let routes = self.destinations().flat_map(|destination| {
            let opaque = destination.opaque.iter();
            let opaque = opaque.filter_map(|opaque| opaque.route.as_ref());
            destination.routes.iter().chain(opaque)
        });
        routes.flat_map(|route| {
            let filters = route
                .filters
                .iter()
                .chain(route.backends.iter().flat_map(|weighted| &weighted.filters));
            let mirrors = filters.filter_map(|given| match &given.filter {
                Some(filter::Filter::Mirror(mirror)) => mirror.backend.as_ref(),
                _ => None,
            });
            let fallback = route
                .policy
                .as_ref()
                .and_then(|policy| policy.fallback.as_ref())
                .and_then(|fallback| match &fallback.action {
                    Some(fallback::Action::Backend(backend)) => Some(backend),
                    _ => None,
                });
            route
                .backends
                .iter()
                .filter_map(|weighted| weighted.backend.as_ref())
                .chain(fallback)
                .chain(mirrors)
        })
    }
}
