//! A worker's picture of a backend's endpoints: who is there, who is ready, who is ejected.
//!
//! It is made anew only when the endpoints change, and regrouped only when some endpoint's circuit
//! does: a pick in quiet times compares two numbers.

use std::collections::{BinaryHeap, HashMap};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;
use weft_api::identity::SpiffeId;

use super::balancer::Endpoint;
use super::choose::Turn;
use super::hash::{HashTable, Maglev, Ring};
use super::health;
use crate::tables::{Algorithm, BackendPolicy, EndpointInfo, EndpointSet, Health};

/// An endpoint's place in a [`View`].
#[derive(Debug)]
pub(super) struct Slot<P> {
    pub(super) endpoint: Rc<Endpoint<P>>,
    /// As last told; the endpoint's own `info` is from when it was first seen.
    pub(super) info: Arc<EndpointInfo>,
    pub(super) ready: bool,
    /// Preferred by hints.
    near: bool,
    /// Ejected, half-open, or unwell by active checks, as of the last regrouping.
    pub(super) out: bool,
    /// Weight as a share of the mean weight of those ready; less for those that are new.
    pub(super) share: f64,
    /// Weight among the others of the view; less for those that are new.
    pub(super) weight: u32,
    /// When it was new beside others that were not.
    since: Option<Instant>,
}

/// What a new endpoint begins with, as a share of its weight: enough to be measured.
const LEAST: f64 = 0.1;
/// Steps in which new endpoints get their weight.
const STEPS: u32 = 50;
/// Parts of a weight while somebody is new.
const PARTS: f64 = 100.0;

#[derive(Debug)]
pub(super) struct View<P> {
    /// Of the endpoint set that this was made from; `None` before the first.
    generation: Option<u64>,
    /// [`health::changes`] at the last regrouping.
    changes: u64,
    pub(super) slots: Vec<Slot<P>>,
    /// Slots that may be chosen: those that are well, or all that are ready in panic; of those that
    /// are well only the near ones, where they are preferred and enough.
    pub(super) candidates: Vec<u32>,
    /// Running sums of the candidates' weights; `None` when all are equal.
    pub(super) weights: Option<Vec<u64>>,
    pub(super) any_ready: bool,
    /// Some are preferred by hints.
    pub(super) hinted: bool,
    /// So few are well that all are used.
    pub(super) panic: bool,
    /// When the first of the ejected can be probed, in milliseconds of [`super::clock`].
    pub(super) probe_at: u64,
    /// Until then somebody may want to be avoided.
    pub(super) avoid_until: u64,
    /// Place of the round robin, where weights are equal and where not.
    pub(super) next: usize,
    pub(super) turns: BinaryHeap<Turn>,
    /// When the weights of those that are new are next to be looked at.
    weigh_at: Option<Instant>,
    /// For ring hash and maglev.
    pub(super) table: Option<HashTable>,
    /// Slots by what session tokens call their endpoints; made when the first token comes.
    sessions: Option<HashMap<u64, u32>>,
    /// The proxy's own; empty when not known.
    pub(super) zone: Arc<str>,
    pub(super) rng: SmallRng,
}

impl<P: Default> View<P> {
    pub(super) fn new(rng: SmallRng) -> Self {
        Self {
            generation: None,
            changes: 0,
            slots: Vec::new(),
            candidates: Vec::new(),
            weights: None,
            any_ready: false,
            hinted: false,
            panic: false,
            probe_at: u64::MAX,
            avoid_until: 0,
            next: 0,
            turns: BinaryHeap::new(),
            weigh_at: None,
            table: None,
            sessions: None,
            zone: Arc::default(),
            rng,
        }
    }

    /// A new view that knows the old one's endpoints, for a recompiled backend.
    pub(super) fn successor(&mut self) -> Self {
        let mut next = Self::new(SmallRng::from_rng(&mut self.rng));
        next.zone = self.zone.clone();
        next.slots = self
            .slots
            .iter()
            .map(|slot| Slot {
                endpoint: slot.endpoint.clone(),
                info: slot.info.clone(),
                ..*slot
            })
            .collect();
        next
    }

    /// Brings the view up to date with the endpoints and their circuits.
    pub(super) fn refresh(&mut self, set: &EndpointSet, policy: &BackendPolicy, now: Instant) {
        if self.generation != Some(set.generation) {
            self.reconcile(set, policy.algorithm, now);
            self.weigh(policy, now);
            self.regroup(policy);
        } else if self.changes != health::changes() {
            self.regroup(policy);
        }
        if self.weigh_at.is_some_and(|at| now >= at) {
            self.weigh(policy, now);
            self.reweigh();
        }
    }

    /// Gives everyone the weight that it has by now: those that are new begin with a part of it,
    /// which grows in a straight line (slow start).
    fn weigh(&mut self, policy: &BackendPolicy, now: Instant) {
        // Who hashes has a table made of weights: keys would move with every step.
        let window = policy.slow_start.filter(|_| self.table.is_none());
        let grown = |slot: &Slot<P>| {
            let (window, since) = (window?, slot.since?);
            let age = now.saturating_duration_since(since);
            (age < window).then(|| age.div_duration_f64(window).max(LEAST))
        };
        let (count, total) = self.ready().fold((0u32, 0f64), |(n, sum), (_, slot)| {
            (n + 1, sum + f64::from(slot.info.weight))
        });
        let mean = (total / f64::from(count.max(1))).max(1.0);
        let growing = self.ready().any(|(_, slot)| grown(slot).is_some());
        for slot in &mut self.slots {
            let part = grown(slot);
            if part.is_none() {
                slot.since = None;
            }
            let part = part.unwrap_or(1.0);
            slot.share = f64::from(slot.info.weight) / mean * part;
            slot.weight = match growing {
                false => slot.info.weight,
                // Whoever has a weight keeps some; the largest weight has room for this.
                true => (f64::from(slot.info.weight) * PARTS * part).ceil() as u32,
            };
        }
        let step = window.filter(|_| growing).map(|window| window / STEPS);
        self.weigh_at = step.map(|step| now + step);
    }

    /// Takes over a new set. Endpoints that stay (same address, identity and workload: an address
    /// can be given to another workload) keep their measurements and what the transport has put
    /// there; those that leave live on only in what runs.
    fn reconcile(&mut self, set: &EndpointSet, algorithm: Algorithm, now: Instant) {
        type Key<'a> = (SocketAddr, Option<&'a SpiffeId>, &'a str);
        fn key(info: &EndpointInfo) -> Key<'_> {
            (info.address, info.identity.as_deref(), &info.workload)
        }
        let old = std::mem::take(&mut self.slots);
        let known: HashMap<Key<'_>, &Slot<P>> = old.iter().map(|s| (key(&s.info), s)).collect();
        let ready = |info: &EndpointInfo| info.state == Health::Ready && info.weight > 0;
        // Where nobody was, nobody is new: there is no one to take the load meanwhile.
        let beside = old.iter().any(|slot| slot.ready);
        self.slots = set
            .endpoints
            .iter()
            .map(|info| {
                let known = known.get(&key(info));
                let endpoint = match known {
                    Some(slot) => {
                        slot.endpoint.set_health(info.health.clone());
                        Rc::clone(&slot.endpoint)
                    }
                    None => Rc::new(Endpoint::new(info.clone(), now)),
                };
                Slot {
                    endpoint,
                    ready: ready(info),
                    near: false,
                    out: false,
                    share: 1.0,
                    weight: info.weight,
                    since: match known {
                        Some(slot) if slot.ready => slot.since,
                        _ => beside.then_some(now),
                    },
                    info: info.clone(),
                }
            })
            .collect();
        for near in &set.near {
            if let Some(slot) = self.slots.get_mut(*near as usize) {
                slot.near = slot.ready;
            }
        }
        self.hinted = self.slots.iter().any(|slot| slot.near);
        self.any_ready = self.slots.iter().any(|slot| slot.ready);
        self.generation = Some(set.generation);
        self.table = match algorithm {
            Algorithm::RingHash => Some(HashTable::Ring(Ring::new(&self.members()))),
            Algorithm::Maglev => Some(HashTable::Maglev(Maglev::new(&self.members()))),
            _ => None,
        };
        // Whatever was remembered by slot is void.
        self.candidates.clear();
        self.sessions = None;
    }

    /// The slot of a session's endpoint, if it is there and well.
    pub(super) fn of_session(&mut self, session: u64) -> Option<u32> {
        let slots = &self.slots;
        let sessions = self.sessions.get_or_insert_with(|| {
            let ids = slots.iter().map(|slot| slot.info.session_id());
            ids.zip(0u32..).collect()
        });
        let at = *sessions.get(&session)?;
        let slot = &self.slots[at as usize];
        (slot.ready && (self.panic || !slot.out)).then_some(at)
    }

    /// Slots, addresses and weights of those ready.
    fn members(&self) -> Vec<(u32, SocketAddr, u32)> {
        self.ready()
            .map(|(i, slot)| (i, slot.info.address, slot.info.weight))
            .collect()
    }

    fn ready(&self) -> impl Iterator<Item = (u32, &Slot<P>)> {
        (0u32..).zip(&self.slots).filter(|(_, slot)| slot.ready)
    }

    /// Groups the endpoints by their circuits.
    fn regroup(&mut self, policy: &BackendPolicy) {
        // Before looking: what changes meanwhile makes us look again.
        self.changes = health::changes();
        let ejecting = policy.outlier.is_some();
        let (mut ready, mut well) = (0usize, 0usize);
        self.probe_at = u64::MAX;
        self.avoid_until = 0;
        for slot in self.slots.iter_mut().filter(|slot| slot.ready) {
            let health = &slot.info.health;
            // One that active checks find unwell is theirs to ask, not a request's.
            let unwell = !health.is_well();
            let probe_at = health.probe_at().filter(|_| ejecting && !unwell);
            slot.out = unwell || probe_at.is_some();
            ready += 1;
            well += usize::from(!slot.out);
            self.probe_at = self.probe_at.min(probe_at.unwrap_or(u64::MAX));
            self.avoid_until = self.avoid_until.max(health.avoid_until());
        }
        self.panic = well * 100 < policy.panic_threshold as usize * ready;
        let panic = self.panic;
        let candidates: Vec<u32> = self
            .ready()
            .filter(|(_, slot)| panic || !slot.out)
            .map(|(i, _)| i)
            .collect();
        let candidates = match policy.zone_threshold {
            Some(threshold) if !panic => self.near(threshold, candidates),
            None if !panic && self.hinted => self.meant(candidates),
            _ => candidates,
        };
        if candidates != self.candidates {
            self.candidates = candidates;
            self.reweigh();
        }
    }

    /// Those of `well` that are in the proxy's own zone, if they can take `threshold` percent of
    /// what would be its part if all zones that have endpoints were alike; else all.
    fn near(&self, threshold: u32, well: Vec<u32>) -> Vec<u32> {
        if self.zone.is_empty() {
            return well;
        }
        let weight = |slot: &Slot<P>| u64::from(slot.info.weight);
        let mut zones: Vec<&str> = self.ready().map(|(_, slot)| &*slot.info.zone).collect();
        zones.sort_unstable();
        zones.dedup();
        let total: u64 = self.ready().map(|(_, slot)| weight(slot)).sum();
        let is_near = |i: &u32| self.slots[*i as usize].info.zone == self.zone;
        let near: Vec<u32> = well.iter().copied().filter(is_near).collect();
        let takes: u64 = near.iter().map(|i| weight(&self.slots[*i as usize])).sum();
        let enough = takes * 100 * zones.len() as u64 >= u64::from(threshold) * total;
        if near.is_empty() || !enough {
            return well;
        }
        near
    }

    /// Those of `well` that hints prefer, while there are any.
    fn meant(&self, well: Vec<u32>) -> Vec<u32> {
        let meant = |i: &u32| self.slots[*i as usize].near;
        let near: Vec<u32> = well.iter().copied().filter(meant).collect();
        if near.is_empty() { well } else { near }
    }

    /// Whether every candidate is among these; then there may be others elsewhere.
    pub(super) fn are_all_tried(&self, tried: &[SocketAddr]) -> bool {
        let mut candidates = self.candidates.iter();
        candidates.all(|i| tried.contains(&self.slots[*i as usize].info.address))
    }

    /// Somebody well, not tried yet, in whatever zone.
    pub(super) fn elsewhere(&mut self, tried: &[SocketAddr]) -> Option<u32> {
        let others: Vec<u32> = self
            .ready()
            .filter(|(_, slot)| !slot.out && !tried.contains(&slot.info.address))
            .map(|(i, _)| i)
            .collect();
        others.choose(&mut self.rng).copied()
    }

    fn reweigh(&mut self) {
        let weight = |i: &u32| self.slots[*i as usize].weight;
        let mut weights = self.candidates.iter().map(weight);
        let first = weights.next();
        self.weights = if weights.all(|w| Some(w) == first) {
            None
        } else {
            let mut sum = 0;
            let sums = self.candidates.iter().map(|i| {
                sum += u64::from(weight(i));
                sum
            });
            Some(sums.collect())
        };
        self.restart_turns();
    }
}
