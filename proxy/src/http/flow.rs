//! One accepted connection, as request handling sees it.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use super::{ErrorCode, ProxyError, RequestView};
use crate::discovery::{DestinationCell, Host};
use crate::hashing::TableMap;
use crate::inbound::limits::Guard;
use crate::inbound::probes::Probes;
use crate::tables::{Destination, EndpointInfo, Known};
use crate::telemetry::{Direction, FlowLabels, FlowProtocol, RequestSeries};
use crate::worker::Worker;

/// Where a connection's requests go.
#[derive(Debug)]
pub enum Target {
    /// A destination of the mesh, which can change while the connection lives.
    Cell(Arc<DestinationCell>),
    /// One of several hosts outside the mesh that share an address, told by what each request
    /// says; else the first. Not empty.
    Hosts(Vec<Host>),
    /// The application beside this proxy, or what does not change.
    Fixed,
}

/// A connection's part of what is known of its requests.
#[derive(Debug)]
pub struct Flow {
    pub direction: Direction,
    pub target: Target,
    /// What the target was when it was last looked at.
    pub destination: RefCell<Arc<Destination>>,
    pub peer: SocketAddr,
    /// Workload and namespace of the source.
    pub source: (Arc<str>, Arc<str>),
    /// Another proxy is the client: the connection outlives `Connection: close`, which is meant
    /// for the applications at both ends.
    pub from_mesh: bool,
    /// Set where only probes are let in.
    only: Option<Probes>,
    /// What the application takes no more of.
    guard: Guard,
    series: RefCell<TableMap<(SocketAddr, FlowProtocol), Rc<RequestSeries>>>,
}

impl Flow {
    pub fn new(
        direction: Direction,
        target: Target,
        destination: Arc<Destination>,
        peer: SocketAddr,
        source: (Arc<str>, Arc<str>),
        from_mesh: bool,
    ) -> Self {
        Self {
            direction,
            target,
            destination: RefCell::new(destination),
            peer,
            source,
            from_mesh,
            only: None,
            guard: Guard::default(),
            series: RefCell::default(),
        }
    }

    /// Lets in nothing but these probes.
    pub fn only(mut self, probes: Probes) -> Self {
        self.only = Some(probes);
        self
    }

    /// Whether a request is let in.
    ///
    /// # Errors
    /// It is none of the probes that are, or there is no room for it.
    pub fn admit(
        &self,
        worker: &Worker,
        request: &impl RequestView,
        now: Instant,
    ) -> Result<(), ProxyError> {
        match &self.only {
            Some(probes) if !probes.admit(request.method(), request.path()) => {
                let port = self.destination.borrow().port;
                Err(ProxyError::new(
                    ErrorCode::PlaintextRefused,
                    format!(
                        "port {port} takes mutual TLS only (PeerAuthentication mode STRICT); \
                         in plaintext only the probes of its pod are let in"
                    ),
                ))
            }
            None if self.direction == Direction::Inbound => {
                let port = self.destination.borrow().port;
                self.guard.admit(worker, self, port, request, now)
            }
            _ => Ok(()),
        }
    }

    /// The destination of a request as it is now.
    pub fn destination_of(&self, request: &impl RequestView) -> Arc<Destination> {
        if let Target::Hosts(hosts) = &self.target {
            let host = request.host().unwrap_or_default();
            let host = String::from_utf8_lossy(host).to_ascii_lowercase();
            let name = match host.rsplit_once(':') {
                Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
                _ => &host,
            };
            let called = hosts.iter().find(|known| *known.name.host == *name);
            if let Some(called) = called.or(hosts.first())
                && let Known::Present(now) = called.cell.known()
            {
                *self.destination.borrow_mut() = now;
            }
        }
        self.destination()
    }

    /// The destination as it is now. One that has left the mesh stays as it was for connections
    /// that are open.
    pub fn destination(&self) -> Arc<Destination> {
        if let Target::Cell(cell) = &self.target
            && let Known::Present(now) = &**cell.current.load()
            && now.id != self.destination.borrow().id
        {
            *self.destination.borrow_mut() = now.clone();
        }
        self.destination.borrow().clone()
    }

    /// Labels of requests and connections to an endpoint of this flow's destination.
    pub fn labels(&self, endpoint: Option<&EndpointInfo>, protocol: FlowProtocol) -> FlowLabels {
        let destination = self.destination.borrow();
        let workload = endpoint.map_or("", |e| &*e.workload);
        let name = workload.split_once('/').map_or(workload, |(_, name)| name);
        FlowLabels {
            direction: self.direction,
            source_workload: self.source.0.clone(),
            source_namespace: self.source.1.clone(),
            destination_service: destination.service.clone(),
            destination_namespace: destination.namespace.clone(),
            destination_workload: name.into(),
            port: destination.port,
            protocol,
            mtls: match self.direction {
                Direction::Inbound => self.from_mesh,
                Direction::Outbound => endpoint.is_some_and(|e| e.identity.is_some()),
            },
        }
    }

    /// The counters of requests to an endpoint; resolved once a connection.
    pub fn series(
        &self,
        worker: &Worker,
        endpoint: Option<&EndpointInfo>,
        protocol: FlowProtocol,
    ) -> Rc<RequestSeries> {
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let key = (endpoint.map_or(nowhere, |e| e.address), protocol);
        if let Some(series) = self.series.borrow().get(&key) {
            return series.clone();
        }
        let series = worker.metrics.requests(&self.labels(endpoint, protocol));
        self.series.borrow_mut().insert(key, series.clone());
        series
    }
}
