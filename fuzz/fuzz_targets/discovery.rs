//! What a control plane sends: decoded and compiled without a panic, and what is taken holds what
//! the data workers rely on.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use prost::Message;
use weft_api::proto;
use weft_api::proto::resource::Body;
use weft_proxy::balance::SharedLimits;
use weft_proxy::discovery::compile::{self, BackendKey, Links};
use weft_proxy::discovery::endpoints;
use weft_proxy::tables::{EndpointSet, EndpointsCell};

struct Fresh;

impl Links for Fresh {
    fn endpoints(&mut self, name: &str) -> Arc<EndpointsCell> {
        Arc::new(EndpointsCell {
            name: name.into(),
            ..EndpointsCell::default()
        })
    }

    fn limits(&mut self, _: BackendKey) -> Arc<SharedLimits> {
        Arc::new(SharedLimits::default())
    }
}

fuzz_target!(|data: &[u8]| {
    let Ok(response) = proto::DiscoveryResponse::decode(data) else {
        return;
    };
    for resource in response.resources {
        let name = resource.key.map(|key| key.name).unwrap_or_default();
        match resource.body {
            Some(Body::Destination(destination)) => {
                let Ok(compiled) = compile::destination(&destination, &mut Fresh) else {
                    continue;
                };
                for route in &compiled.routes {
                    let sum: u64 = route.backends.iter().map(|share| u64::from(share.weight)).sum();
                    assert_eq!(sum, u64::from(route.total_weight));
                }
                compile::endpoint_names(&compiled);
            }
            Some(Body::Endpoints(endpoints)) => {
                let before = EndpointSet::default();
                if let Ok(first) = endpoints::endpoints(&endpoints, &before) {
                    assert!(first.generation > before.generation);
                    // The same again keeps what is known of each endpoint's health.
                    let again = endpoints::endpoints(&endpoints, &first).expect("it was good");
                    for (a, b) in first.endpoints.iter().zip(&again.endpoints) {
                        assert_eq!(a.address, b.address);
                        assert!(Arc::ptr_eq(&a.health, &b.health));
                    }
                }
            }
            Some(Body::Workload(workload)) => {
                let _ = compile::workload(&workload, &name, &Default::default());
            }
            _ => {}
        }
    }
});
