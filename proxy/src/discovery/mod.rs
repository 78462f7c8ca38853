//! What the control plane says, kept where the workers read it.
//!
//! A worker asks the [`Directory`] what an original destination is: one atomic load and a hash
//! lookup when it is known. When it is not, the [`Client`] on the control thread subscribes to it on
//! the one stream to the control plane; [`store`] takes the answers in, [`compile`] turns them into
//! tables, or says why not. Nothing is subscribed to before somebody calls it, so memory does not
//! grow with the mesh, and what nobody uses is forgotten again.
//!
//! When the control plane is away, everything known stays, and what is not known passes through.

mod backend;
pub mod backoff;
mod client;
pub mod compile;
mod connection;
pub mod dial;
mod directory;
pub mod endpoints;
mod filters;
mod health;
mod matches;
mod outside;
pub mod provenance;
mod resilience;
mod sessions;
mod status;
mod store;
#[cfg(test)]
mod tests;

use prost::Message;
use weft_api::proto::resource::Body;
use weft_api::proto::{DiscoveryResponse, Resource};

pub use client::{Client, IDLE_DESTINATION, Settings};
pub use directory::{DestinationCell, Directory, LinkState, Readiness};
pub use outside::{Host, Hosts, Outside};
pub use status::{NackStatus, ResourceState, ResourceStatus, Status};

/// A message of the control plane, decoded and compiled and thrown away: the entry for fuzzing.
/// Gives the result of each resource.
pub fn decode(bytes: &[u8]) -> Result<Vec<Result<(), compile::Invalid>>, prost::DecodeError> {
    let response = DiscoveryResponse::decode(bytes)?;
    let mut links = Discard;
    Ok(response
        .resources
        .iter()
        .map(|resource| compile_alone(resource, &mut links))
        .collect())
}

fn compile_alone(resource: &Resource, links: &mut Discard) -> Result<(), compile::Invalid> {
    let name = resource.key.as_ref().map_or("", |key| key.name.as_str());
    match &resource.body {
        Some(Body::Destination(given)) => {
            let table = compile::destination(given, links)?;
            compile::endpoint_names(&table);
            Ok(())
        }
        Some(Body::Endpoints(given)) => {
            endpoints::endpoints(given, &crate::tables::EndpointSet::default()).map(|_| ())
        }
        Some(Body::Workload(given)) => {
            compile::workload(given, name, &Default::default()).map(|_| ())
        }
        Some(Body::Trust(given)) => {
            let roots = given.roots.iter().map(|root| root.to_vec().into());
            crate::identity::TrustBundle::new(&given.trust_domain, roots)
                .map(|_| ())
                .map_err(|e| compile::Invalid(e.to_string()))
        }
        Some(Body::Absent(_)) | None => Ok(()),
    }
}

/// Links that lead nowhere.
struct Discard;

impl compile::Links for Discard {
    fn endpoints(&mut self, name: &str) -> std::sync::Arc<crate::tables::EndpointsCell> {
        std::sync::Arc::new(crate::tables::EndpointsCell {
            name: name.into(),
            ..Default::default()
        })
    }

    fn limits(&mut self, _: compile::BackendKey) -> std::sync::Arc<crate::balance::SharedLimits> {
        std::sync::Arc::default()
    }
}
