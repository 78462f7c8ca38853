//! A worker and destinations for tests over loopback sockets.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use clap::Parser;
use weft_api::identity::SpiffeId;

use crate::config::Config;
use crate::discovery::Directory;
use crate::http::flow::{Flow, Target};
use crate::identity::{Credentials, Handle};
use crate::tables::{
    Backend, BackendPolicy, Destination, EndpointInfo, EndpointSet, EndpointsCell, Health,
    Protocol, Route, RoutePolicy, fresh_id,
};
use crate::telemetry::{Direction, Registry, access_log, trace::span_channel};
use crate::worker::{Shared, Worker};

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    config: Config,
}

/// A worker of the workload "shop/web".
pub(crate) fn worker(credentials: Option<Credentials>) -> Rc<Worker> {
    let flags = ["test", "--trust-root=-", "--token=-", "--workload=shop/web"];
    let config = Flags::try_parse_from(flags).unwrap().config;
    let identity = Handle::new();
    if let Some(credentials) = credentials {
        identity.set(credentials);
    }
    let registry = Registry::new();
    Worker::new(&Shared {
        config: Arc::new(config),
        directory: Directory::detached(identity.clone()),
        identity,
        spans: span_channel(registry.clone()).0,
        access_log: access_log::channel(registry.clone()).0,
        taps: Arc::default(),
        registry,
    })
}

/// Lets timers of so long run out, and the engines do what they can then: between two rounds the
/// runtime looks at the sockets. From then on the runtime's clock is that much ahead of the system's,
/// so that timers set by the latter run out early: once in a test.
pub(crate) async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
    rounds().await;
}

/// Lets the engines do what they can with what has been sent.
pub(crate) async fn rounds() {
    for _ in 0..16 {
        tokio::task::yield_now().await;
    }
}

/// An endpoint; with an identity it is reached by mutual TLS.
pub(crate) fn endpoint(address: SocketAddr, identity: Option<&str>) -> Arc<EndpointInfo> {
    Arc::new(EndpointInfo {
        address,
        identity: identity.map(|id| Arc::new(id.parse::<SpiffeId>().unwrap())),
        workload: "shop/cart".into(),
        zone: Arc::default(),
        weight: 1,
        state: Health::Ready,
        health: Arc::default(),
        siblings: None,
    })
}

pub(crate) fn backend(endpoints: Vec<Arc<EndpointInfo>>, policy: BackendPolicy) -> Arc<Backend> {
    Arc::new(Backend {
        id: fresh_id(),
        namespace: "shop".into(),
        service: "cart".into(),
        port: 80,
        endpoints: Arc::new(EndpointsCell {
            name: "shop/cart".into(),
            current: ArcSwap::from_pointee(EndpointSet {
                generation: 1,
                endpoints,
                ..EndpointSet::default()
            }),
            feed: None,
        }),
        policy,
        limits: Arc::default(),
    })
}

/// A destination with one route to one backend.
pub(crate) fn destination(backend: Arc<Backend>, policy: RoutePolicy) -> Arc<Destination> {
    let route = Route::simple("cart", backend, policy);
    Arc::new(Destination::simple(
        "shop".into(),
        "cart".into(),
        80,
        Protocol::Auto,
        route,
    ))
}

/// A connection of the application to `destination`.
pub(crate) fn outbound(destination: Arc<Destination>) -> Rc<Flow> {
    Rc::new(Flow::new(
        Direction::Outbound,
        Target::Fixed,
        destination,
        ([127, 0, 0, 1], 1).into(),
        ("web".into(), "shop".into()),
        false,
    ))
}

/// A connection of another proxy of the mesh to the application, which is `destination`.
pub(crate) fn inbound(destination: Arc<Destination>) -> Rc<Flow> {
    Rc::new(Flow::new(
        Direction::Inbound,
        Target::Fixed,
        destination,
        ([127, 0, 0, 1], 1).into(),
        ("web".into(), "shop".into()),
        true,
    ))
}
