//! The application beside the proxy as a destination: one endpoint, no policy but the safe
//! defaults and what a port says of its connections, so that requests take the same way in as out.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;

use crate::tables::{
    Backend, BackendPolicy, Destination, EndpointInfo, EndpointSet, EndpointsCell, Health,
    Protocol, Route, RoutePolicy, Workload, fresh_id,
};

/// How long connecting to an application on the same host may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The destination for connections that arrive for `to`.
pub fn destination(workload: &Workload, to: SocketAddr) -> Arc<Destination> {
    let display = if workload.display_name.is_empty() {
        workload.name.clone()
    } else {
        workload.display_name.clone()
    };
    let endpoint = EndpointInfo {
        address: to,
        identity: None,
        workload: format!("{}/{display}", workload.namespace).into(),
        zone: workload.zone.clone(),
        weight: 1,
        state: Health::Ready,
        health: Arc::default(),
        siblings: None,
    };
    let cell = EndpointsCell {
        name: "local".into(),
        current: ArcSwap::from_pointee(EndpointSet {
            generation: 1,
            endpoints: vec![Arc::new(endpoint)],
            ..EndpointSet::default()
        }),
        feed: None,
    };
    let backend = Arc::new(Backend {
        id: fresh_id(),
        namespace: workload.namespace.clone(),
        service: display.clone(),
        port: to.port(),
        endpoints: Arc::new(cell),
        policy: BackendPolicy {
            connect_timeout: CONNECT_TIMEOUT,
            connection: workload.connection(to.port()),
            ..BackendPolicy::default()
        },
        limits: Arc::default(),
    });
    Arc::new(Destination::simple(
        workload.namespace.clone(),
        display,
        to.port(),
        Protocol::Auto,
        Route::simple("local", backend, RoutePolicy::default()),
    ))
}
