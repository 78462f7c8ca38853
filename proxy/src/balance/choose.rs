//! The algorithms that choose among a [`View`]'s candidates.

use std::cmp::Reverse;
use std::net::SocketAddr;
use std::time::Instant;

use rand::Rng as _;

use super::view::{Slot, View};
use crate::tables::Algorithm;

/// Costs that differ by less than this factor are the same: latency is noisy, and a difference of
/// a few percent is no reason to give one of two endpoints all the traffic.
const NOISE: f64 = 1.25;

/// Draws before the candidates are searched for one that is acceptable.
const DRAWS: usize = 8;

/// Distance between two turns of an endpoint of weight 1.
const STRIDE: u128 = 1 << 40;

/// An endpoint's next turn in the weighted round robin; the smallest comes first. After its turn,
/// an endpoint waits for the longer the lighter it is (stride scheduling), which spreads the turns
/// of a heavy endpoint evenly among those of the others.
pub(super) type Turn = Reverse<(u128, u32)>;

/// Whom a request should not go to if another is there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avoid<'a> {
    /// Addresses of earlier tries.
    pub(super) tried: &'a [SocketAddr],
    /// Milliseconds of [`super::clock`]: those that want to be left alone beyond this.
    pub(super) backing_off_at: Option<u64>,
}

impl Avoid<'_> {
    fn accepts<P>(&self, slot: &Slot<P>) -> bool {
        !self.tried.contains(&slot.info.address)
            && self
                .backing_off_at
                .is_none_or(|now| slot.info.health.avoid_until() <= now)
    }

    fn nobody(&self) -> bool {
        self.tried.is_empty() && self.backing_off_at.is_none()
    }

    /// From the full wish down to none: an endpoint not tried yet is worth more than one that
    /// does not mind.
    fn relaxed(self) -> impl Iterator<Item = Self> {
        let levels = [
            Some(self),
            (self.backing_off_at.is_some() && !self.tried.is_empty()).then_some(Self {
                backing_off_at: None,
                ..self
            }),
            (self.backing_off_at.is_some() && !self.tried.is_empty())
                .then_some(Self { tried: &[], ..self }),
            (!self.nobody()).then_some(Self {
                tried: &[],
                backing_off_at: None,
            }),
        ];
        levels.into_iter().flatten()
    }
}

impl<P: Default> View<P> {
    /// A candidate's slot by the policy's algorithm; `None` if there are no candidates.
    pub(super) fn choose(
        &mut self,
        algorithm: Algorithm,
        avoid: Avoid<'_>,
        now: Instant,
    ) -> Option<u32> {
        match (self.candidates.as_slice(), avoid.nobody()) {
            ([], _) => return None,
            ([only], _) => return Some(*only),
            _ => {}
        }
        avoid.relaxed().find_map(|avoid| match algorithm {
            Algorithm::PeakEwma => self.better(avoid, |a, b| {
                let cost = |s: &Slot<P>| s.endpoint.cost(s.share, now);
                cost(b) * NOISE < cost(a)
            }),
            Algorithm::LeastRequest => self.better(avoid, |a, b| {
                let load = |s: &Slot<P>| f64::from(s.endpoint.in_flight()) / s.share;
                load(b) < load(a)
            }),
            Algorithm::RoundRobin => self.turn(avoid),
            // Without a key, the hashing ones have nothing to go by.
            Algorithm::Random | Algorithm::RingHash | Algorithm::Maglev => self.draw(avoid),
        })
    }

    /// The slots for a key in order of preference, each once for every point it has.
    pub(super) fn walk(&self, key: u64) -> impl Iterator<Item = u32> + '_ {
        self.table.iter().flat_map(move |table| table.walk(key))
    }

    /// The first in a key's order that is a candidate and acceptable, so that a key whose endpoint
    /// is unwell has a second one for as long as that lasts.
    pub(super) fn choose_by_key(&self, key: u64, avoid: Avoid<'_>) -> Option<u32> {
        avoid.relaxed().find_map(|avoid| {
            self.walk(key).find(|i| {
                let slot = &self.slots[*i as usize];
                (!slot.out || self.panic) && avoid.accepts(slot)
            })
        })
    }

    /// Power of two choices: draws two, takes the first unless the second is better.
    fn better(
        &mut self,
        avoid: Avoid<'_>,
        second_is_better: impl Fn(&Slot<P>, &Slot<P>) -> bool,
    ) -> Option<u32> {
        let n = self.candidates.len();
        let (first, second) = if self.weights.is_none() && avoid.nobody() {
            // Two different ones, each pair as likely as any other.
            let a = self.rng.random_range(0..n as u32);
            let b = self.rng.random_range(0..n as u32 - 1);
            let b = b + u32::from(b >= a);
            (self.candidates[a as usize], self.candidates[b as usize])
        } else {
            // With weights the same one may come up twice: a draw without it would give the
            // light ones more than their share.
            (self.draw(avoid)?, self.draw(avoid)?)
        };
        let better = second_is_better(&self.slots[first as usize], &self.slots[second as usize]);
        Some(if better { second } else { first })
    }

    /// A random one by weight.
    fn draw(&mut self, avoid: Avoid<'_>) -> Option<u32> {
        for _ in 0..DRAWS {
            let drawn = self.draw_any();
            if avoid.accepts(&self.slots[drawn as usize]) {
                return Some(drawn);
            }
        }
        // Few are left: search.
        let accepted = |i: &&u32| avoid.accepts(&self.slots[**i as usize]);
        let weight = |i: &u32| u64::from(self.slots[*i as usize].weight);
        let left: Vec<u32> = self.candidates.iter().filter(accepted).copied().collect();
        let total = left.iter().map(weight).sum::<u64>();
        let mut at = if total == 0 {
            return None;
        } else {
            self.rng.random_range(0..total)
        };
        let weight = |i: &u32| u64::from(self.slots[*i as usize].weight);
        left.into_iter().find(|i| {
            let found = at < weight(i);
            at = at.saturating_sub(weight(i));
            found
        })
    }

    fn draw_any(&mut self) -> u32 {
        let at = match &self.weights {
            None => self.rng.random_range(0..self.candidates.len()),
            Some(sums) => {
                let total = sums.last().copied().unwrap_or(1);
                let at = self.rng.random_range(0..total);
                sums.partition_point(|sum| *sum <= at)
            }
        };
        self.candidates[at]
    }

    /// The next in turn.
    fn turn(&mut self, avoid: Avoid<'_>) -> Option<u32> {
        if self.weights.is_none() {
            let n = self.candidates.len();
            let at = (0..n)
                .map(|i| (self.next + i) % n)
                .find(|at| avoid.accepts(&self.slots[self.candidates[*at] as usize]))?;
            self.next = at + 1;
            return Some(self.candidates[at]);
        }
        // Those passed over keep their turn.
        let mut passed = Vec::new();
        let mut found = None;
        while let Some(Reverse((at, slot))) = self.turns.pop() {
            if avoid.accepts(&self.slots[slot as usize]) {
                let weight = self.slots[slot as usize].weight;
                self.turns.push(Reverse((at + stride(weight), slot)));
                found = Some(slot);
                break;
            }
            passed.push(Reverse((at, slot)));
        }
        self.turns.extend(passed);
        found
    }

    /// The round robin begins anew, somewhere: workers and proxies that begin together should not
    /// all begin with the same endpoint.
    pub(super) fn restart_turns(&mut self) {
        self.next = self.rng.random_range(0..self.candidates.len().max(1));
        self.turns.clear();
        if self.weights.is_some() {
            for i in 0..self.candidates.len() {
                let slot = self.candidates[i];
                let stride = stride(self.slots[slot as usize].weight);
                let at = self.rng.random_range(0..stride);
                self.turns.push(Reverse((at, slot)));
            }
        }
    }
}

fn stride(weight: u32) -> u128 {
    (STRIDE / u128::from(weight.max(1))).max(1)
}
