//! What a balancer does with given endpoints, answers and times.

mod choice;
mod ejection;
mod limits;
mod slow_start;
mod zones;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::*;
use crate::tables::{
    Algorithm, Backend, BackendPolicy, EndpointInfo, EndpointSet, EndpointsCell, Health,
    OutlierDetection, fresh_id,
};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

fn address(n: usize) -> SocketAddr {
    SocketAddr::from(([10, 0, (n / 250) as u8, (n % 250) as u8], 8080))
}

/// The number that [`address`] was made from.
fn number(address: SocketAddr) -> usize {
    match address.ip() {
        std::net::IpAddr::V4(ip) => usize::from(ip.octets()[2]) * 250 + usize::from(ip.octets()[3]),
        std::net::IpAddr::V6(_) => panic!("not one of ours"),
    }
}

fn info(n: usize, weight: u32, state: Health, health: Arc<EndpointHealth>) -> Arc<EndpointInfo> {
    Arc::new(EndpointInfo {
        address: address(n),
        identity: None,
        workload: format!("shop/cart-{n}").into(),
        zone: "".into(),
        weight,
        state,
        health,
        siblings: None,
    })
}

fn infos(weights: &[u32]) -> Vec<Arc<EndpointInfo>> {
    (0..)
        .zip(weights)
        .map(|(n, w)| info(n, *w, Health::Ready, Arc::default()))
        .collect()
}

fn cell(endpoints: Vec<Arc<EndpointInfo>>) -> Arc<EndpointsCell> {
    let cell = EndpointsCell::default();
    set(&cell, endpoints);
    Arc::new(cell)
}

fn set(cell: &EndpointsCell, endpoints: Vec<Arc<EndpointInfo>>) {
    static GENERATION: AtomicU64 = AtomicU64::new(1);
    cell.current.store(Arc::new(EndpointSet {
        generation: GENERATION.fetch_add(1, Ordering::Relaxed),
        endpoints,
        ..EndpointSet::default()
    }));
}

fn backend(endpoints: &Arc<EndpointsCell>, policy: BackendPolicy) -> Arc<Backend> {
    Arc::new(Backend {
        id: fresh_id(),
        namespace: "shop".into(),
        service: "cart".into(),
        port: 80,
        endpoints: endpoints.clone(),
        policy,
        limits: Arc::default(),
    })
}

fn with(algorithm: Algorithm) -> BackendPolicy {
    BackendPolicy {
        algorithm,
        ..BackendPolicy::default()
    }
}

fn outlier() -> OutlierDetection {
    OutlierDetection {
        consecutive_gateway_errors: 3,
        consecutive_5xx: 5,
        success_rate_threshold: 0,
        success_rate_min_requests: 0,
        interval: 10 * SECOND,
        base_ejection: 30 * SECOND,
        max_ejection: 300 * SECOND,
        max_ejection_percent: 50,
    }
}
