//! A data worker: one thread, one runtime, its own listeners, pools and counters. Nothing on a
//! request's way takes a lock or crosses threads.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use weft_api::identity::SpiffeId;

use crate::balance::{Balancer, RetryBudget};
use crate::config::Config;
use crate::discovery::Directory;
use crate::hashing::TableMap;
use crate::inbound::local;
use crate::outbound::Sessions;
use crate::tables::{Backend, Destination, RetryConstraint, RetryPolicy, Route, Workload};
use crate::telemetry::{
    AccessLogSink, Direction, FlowLabels, FlowProtocol, Registry, Sampler, Taps, Tracer,
    WorkerMetrics, trace::SpanSink,
};
use crate::transport;
use crate::{http1, http2, identity};

/// How often pools are looked through for connections that have been idle for too long.
const SWEEP: Duration = Duration::from_secs(1);
/// Local destinations a worker remembers: ports of the workload's addresses that were called.
const MAX_LOCAL: usize = 1024;

/// What a worker keeps with an endpoint.
#[derive(Debug, Default)]
pub struct Pools {
    pub http1: http1::pool::Pool,
    pub http2: http2::Pool,
}

/// What every worker of a proxy shares.
#[derive(Clone)]
pub struct Shared {
    pub config: Arc<Config>,
    pub directory: Arc<Directory>,
    pub identity: identity::Handle,
    pub registry: Arc<Registry>,
    pub spans: SpanSink,
    pub access_log: AccessLogSink,
    pub taps: Arc<Taps>,
}

/// Everything a connection needs on its way; reached through an `Rc`.
pub struct Worker {
    pub config: Arc<Config>,
    pub directory: Arc<Directory>,
    pub identity: identity::Handle,
    pub metrics: WorkerMetrics,
    pub tracer: Tracer,
    pub access_log: AccessLogSink,
    pub taps: Arc<Taps>,
    pub connect_options: transport::Options,
    pub drain: Drain,
    /// Who serves HTTP/2 streams.
    pub crew: http2::Crew,
    /// Connections to other proxies that streams share.
    pub sessions: Sessions,
    /// Copies of requests that are under way.
    pub mirrors: Cell<usize>,
    open: Cell<usize>,
    balancers: RefCell<TableMap<(usize, usize), Rc<Balancer<Pools>>>>,
    budgets: RefCell<TableMap<Arc<str>, (Arc<RetryPolicy>, Rc<RetryBudget>)>>,
    /// Of backends that have their own, by their endpoints.
    constraints: RefCell<TableMap<Arc<str>, (RetryConstraint, Rc<RetryBudget>)>>,
    /// With the workload they were made from.
    locals: RefCell<(Arc<Workload>, HashMap<SocketAddr, Arc<Destination>>)>,
    rng: RefCell<SmallRng>,
}

/// Whether the worker is going away, as its connections see it.
#[derive(Debug, Default)]
pub struct Drain {
    began: Cell<bool>,
    ended: Cell<bool>,
    changed: tokio::sync::Notify,
}

impl Drain {
    pub fn is_draining(&self) -> bool {
        self.began.get()
    }

    /// No new work: what is idle goes, what runs is finished.
    pub fn begin(&self) {
        self.began.set(true);
        self.changed.notify_waiters();
    }

    /// The deadline has passed: what still runs is cut.
    pub fn end(&self) {
        self.began.set(true);
        self.ended.set(true);
        self.changed.notify_waiters();
    }

    /// Until draining begins; at once if it has.
    pub async fn begun(&self) {
        while !self.began.get() {
            let changed = self.changed.notified();
            if !self.began.get() {
                changed.await;
            }
        }
    }

    /// Until the deadline has passed.
    pub async fn over(&self) {
        while !self.ended.get() {
            let changed = self.changed.notified();
            if !self.ended.get() {
                changed.await;
            }
        }
    }
}

/// Counts a connection as open while it lives.
pub struct Open(Rc<Worker>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get() - 1);
    }
}

impl Worker {
    pub fn new(shared: &Shared) -> Rc<Self> {
        Rc::new(Self {
            config: shared.config.clone(),
            directory: shared.directory.clone(),
            identity: shared.identity.clone(),
            metrics: shared.registry.worker(),
            tracer: Tracer::new(shared.spans.clone()),
            access_log: shared.access_log.clone(),
            taps: shared.taps.clone(),
            connect_options: transport::Options {
                mark: shared.config.mark,
                ..transport::Options::default()
            },
            drain: Drain::default(),
            crew: http2::Crew::default(),
            sessions: Sessions::default(),
            mirrors: Cell::new(0),
            open: Cell::new(0),
            balancers: RefCell::default(),
            budgets: RefCell::default(),
            constraints: RefCell::default(),
            locals: RefCell::default(),
            rng: RefCell::new(SmallRng::from_os_rng()),
        })
    }

    /// Counts a connection for as long as the guard lives.
    pub fn opened(self: &Rc<Self>) -> Open {
        self.open.set(self.open.get() + 1);
        Open(self.clone())
    }

    /// Connections that are open.
    pub fn open_connections(&self) -> usize {
        self.open.get()
    }

    /// The workload beside this proxy, as the control plane describes it.
    pub fn workload(&self) -> Arc<Workload> {
        self.directory.workload()
    }

    /// Whether `<namespace>/<name>` is the workload beside this proxy.
    pub fn is_me(&self, workload: &str) -> bool {
        workload == self.config.workload
    }

    /// Source labels of a peer with this identity.
    pub fn source_of(&self, id: &SpiffeId) -> (Arc<str>, Arc<str>) {
        (
            id.service_account.as_str().into(),
            id.namespace.as_str().into(),
        )
    }

    /// Ready when the drain deadline has passed: what is copied then is cut.
    pub fn cut(&self) -> impl Future<Output = ()> + '_ {
        self.drain.over()
    }

    /// The application as a destination, for connections that arrive for `to`.
    pub fn local(&self, to: SocketAddr) -> Arc<Destination> {
        let workload = self.workload();
        let (made_from, locals) = &mut *self.locals.borrow_mut();
        if !Arc::ptr_eq(made_from, &workload) || locals.len() >= MAX_LOCAL {
            locals.clear();
            *made_from = workload.clone();
        }
        locals
            .entry(to)
            .or_insert_with(|| local::destination(&workload, to))
            .clone()
    }

    /// Labels of a connection to an address that is not of the mesh.
    pub fn unknown_destination(&self, to: SocketAddr) -> FlowLabels {
        let (source_workload, source_namespace) = self.workload().source();
        FlowLabels {
            direction: Direction::Outbound,
            source_workload,
            source_namespace,
            destination_service: "passthrough".into(),
            destination_namespace: Arc::default(),
            destination_workload: Arc::default(),
            port: to.port(),
            protocol: FlowProtocol::Tcp,
            mtls: false,
        }
    }

    /// This worker's view of a backend. One serves all destinations that name the same endpoints
    /// under the same limits; a changed policy takes the old one's place and keeps its pools.
    pub fn balancer(&self, backend: &Arc<Backend>) -> Rc<Balancer<Pools>> {
        let key = (
            Arc::as_ptr(&backend.endpoints) as usize,
            Arc::as_ptr(&backend.limits) as usize,
        );
        let mut balancers = self.balancers.borrow_mut();
        // Read only where it matters.
        let zone = backend
            .policy
            .zone_threshold
            .map(|_| self.workload().zone.clone());
        let moved = |known: &Balancer<Pools>| zone.as_ref().is_some_and(|zone| !known.is_in(zone));
        let new = match balancers.get(&key) {
            Some(known) if moved(known) => {
                Rc::new(known.replace_in(backend.clone(), zone.unwrap_or_default()))
            }
            Some(known)
                if known.backend().id == backend.id || known.backend().policy == backend.policy =>
            {
                return known.clone();
            }
            Some(known) => Rc::new(known.replace(backend.clone())),
            None => {
                let new = Balancer::new(backend.clone());
                Rc::new(match zone {
                    Some(zone) => new.replace_in(backend.clone(), zone),
                    None => new,
                })
            }
        };
        balancers.insert(key, new.clone());
        new
    }

    /// This worker's share of a route's retry budget; it outlives recompilations of the route.
    pub fn budget(&self, route: &Route, policy: &Arc<RetryPolicy>) -> Rc<RetryBudget> {
        let mut budgets = self.budgets.borrow_mut();
        match budgets.get(&route.name) {
            Some((of, budget)) if Arc::ptr_eq(of, policy) || of == policy => budget.clone(),
            _ => {
                let floor = policy.budget_min_per_second;
                let share = floor.div_ceil(self.config.workers.max(1) as u32);
                let budget = Rc::new(RetryBudget::new(policy.budget_percent, share));
                budgets.insert(route.name.clone(), (policy.clone(), budget.clone()));
                budget
            }
        }
    }

    /// This worker's share of the retries that a request may draw on: of its backend's budget, else
    /// of its route's.
    pub fn budget_of(
        &self,
        backend: &Backend,
        route: &Route,
        policy: &Arc<RetryPolicy>,
    ) -> Rc<RetryBudget> {
        let Some(constraint) = backend.policy.retry_constraint else {
            return self.budget(route, policy);
        };
        let mut constraints = self.constraints.borrow_mut();
        match constraints.get(&backend.endpoints.name) {
            Some((of, budget)) if *of == constraint => budget.clone(),
            _ => {
                let floor = constraint.floor;
                let share = floor.div_ceil(self.config.workers.max(1) as u64);
                let budget = RetryBudget::within(constraint.interval, constraint.percent, share);
                let budget = Rc::new(budget);
                constraints.insert(backend.endpoints.name.clone(), (constraint, budget.clone()));
                budget
            }
        }
    }

    /// Closes what is idle, for a worker that ends.
    pub fn clear(&self) {
        self.balancers.borrow_mut().clear();
    }

    /// 0 to 1.
    pub fn random(&self) -> f64 {
        self.rng.borrow_mut().random()
    }

    /// Looks after what is idle, for as long as the worker lives.
    pub async fn sweep(self: Rc<Self>) {
        loop {
            tokio::time::sleep(SWEEP).await;
            let now = Instant::now();
            self.crew.sweep();
            self.sessions.sweep(now);
            let balancers: Vec<_> = self.balancers.borrow().values().cloned().collect();
            for balancer in balancers {
                balancer.for_each(now, |endpoint| {
                    endpoint.pool.http1.sweep(now);
                    endpoint.pool.http2.sweep(now);
                });
            }
            // A backend that only this map knows is part of no table any more.
            self.balancers.borrow_mut().retain(|_, balancer| {
                Rc::strong_count(balancer) > 1 || Arc::strong_count(balancer.backend()) > 1
            });
        }
    }
}

impl Workload {
    /// Source labels of what this workload sends: workload, namespace.
    pub fn source(&self) -> (Arc<str>, Arc<str>) {
        let name = if self.display_name.is_empty() {
            &self.name
        } else {
            &self.display_name
        };
        (name.clone(), self.namespace.clone())
    }

    pub fn sampler(&self) -> Sampler {
        Sampler::per_myriad(self.sampling_per_myriad)
    }
}
