//! A data worker: one thread, one runtime, its own listeners, pools and counters.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::balance::{Balancer, RetryBudget};
use crate::config::Config;
use crate::discovery::Directory;
use crate::tables::{Backend, RetryPolicy, Route};
use crate::{http1, identity};

/// What a worker keeps with an endpoint.
#[derive(Debug, Default)]
pub struct Pools {
    pub http1: http1::pool::Pool,
}

/// Everything a connection needs on its way; reached through an `Rc`.
pub struct Worker {
    pub config: Arc<Config>,
    pub directory: Arc<Directory>,
    pub identity: identity::Handle,
    pub drain: Drain,
    balancers: RefCell<HashMap<(usize, usize), Rc<Balancer<Pools>>>>,
    budgets: RefCell<HashMap<Arc<str>, (Arc<RetryPolicy>, Rc<RetryBudget>)>>,
    rng: RefCell<SmallRng>,
}

/// Whether the worker is going away, as its connections see it.
#[derive(Debug, Default)]
pub struct Drain {
    began: Cell<Option<Instant>>,
    changed: tokio::sync::Notify,
}

impl Drain {
    pub fn is_draining(&self) -> bool {
        self.began.get().is_some()
    }

    pub fn begin(&self) {
        self.began.set(Some(Instant::now()));
        self.changed.notify_waiters();
    }

    /// Until draining begins; at once if it has.
    pub async fn begun(&self) {
        let changed = self.changed.notified();
        if !self.is_draining() {
            changed.await;
        }
    }
}

impl Worker {
    /// This worker's view of a backend. One serves all destinations that name the same endpoints
    /// under the same limits; a changed policy takes the old one's place and keeps its pools.
    pub fn balancer(&self, backend: &Arc<Backend>) -> Rc<Balancer<Pools>> {
        let key = (
            Arc::as_ptr(&backend.endpoints) as usize,
            Arc::as_ptr(&backend.limits) as usize,
        );
        let mut balancers = self.balancers.borrow_mut();
        match balancers.get(&key) {
            Some(known)
                if known.backend().id == backend.id || known.backend().policy == backend.policy =>
            {
                known.clone()
            }
            Some(known) => {
                let replaced = Rc::new(known.replace(backend.clone()));
                balancers.insert(key, replaced.clone());
                replaced
            }
            None => {
                let new = Rc::new(Balancer::new(backend.clone()));
                balancers.insert(key, new.clone());
                new
            }
        }
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

    /// 0 to 1.
    pub fn random(&self) -> f64 {
        self.rng.borrow_mut().random()
    }
}

const _: Duration = Duration::ZERO;
