//! Consistent hashing: the same key goes to the same endpoint, from every worker of every proxy.
//!
//! Both tables depend on nothing but the endpoints' addresses and weights, so all proxies that
//! know the same endpoints agree, and a change moves about the share of the keys that it must.

use std::net::SocketAddr;

/// XXH64 with seed 0: fast, well spread, and the same in every process and on every machine.
pub fn hash_bytes(bytes: &[u8]) -> u64 {
    const P1: u64 = 0x9E37_79B1_85EB_CA87;
    const P2: u64 = 0xC2B2_AE3D_27D4_EB4F;
    const P3: u64 = 0x1656_67B1_9E37_79F9;
    const P4: u64 = 0x85EB_CA77_C2B2_AE63;
    const P5: u64 = 0x27D4_EB2F_1656_67C5;

    fn round(acc: u64, lane: u64) -> u64 {
        acc.wrapping_add(lane.wrapping_mul(P2))
            .rotate_left(31)
            .wrapping_mul(P1)
    }
    fn merge(acc: u64, lane: u64) -> u64 {
        (acc ^ round(0, lane)).wrapping_mul(P1).wrapping_add(P4)
    }

    let (stripes, mut rest) = bytes.as_chunks::<32>();
    let mut h = if stripes.is_empty() {
        P5
    } else {
        let mut acc = [P1.wrapping_add(P2), P2, 0, 0u64.wrapping_sub(P1)];
        for stripe in stripes {
            for (acc, lane) in acc.iter_mut().zip(stripe.as_chunks::<8>().0) {
                *acc = round(*acc, u64::from_le_bytes(*lane));
            }
        }
        let mut h = acc[0]
            .rotate_left(1)
            .wrapping_add(acc[1].rotate_left(7))
            .wrapping_add(acc[2].rotate_left(12))
            .wrapping_add(acc[3].rotate_left(18));
        for lane in acc {
            h = merge(h, lane);
        }
        h
    };
    h = h.wrapping_add(bytes.len() as u64);
    while let Some((lane, tail)) = rest.split_first_chunk::<8>() {
        h = (h ^ round(0, u64::from_le_bytes(*lane)))
            .rotate_left(27)
            .wrapping_mul(P1)
            .wrapping_add(P4);
        rest = tail;
    }
    if let Some((lane, tail)) = rest.split_first_chunk::<4>() {
        h = (h ^ u64::from(u32::from_le_bytes(*lane)).wrapping_mul(P1))
            .rotate_left(23)
            .wrapping_mul(P2)
            .wrapping_add(P3);
        rest = tail;
    }
    for byte in rest {
        h = (h ^ u64::from(*byte).wrapping_mul(P5))
            .rotate_left(11)
            .wrapping_mul(P1);
    }
    h = (h ^ (h >> 33)).wrapping_mul(P2);
    h = (h ^ (h >> 29)).wrapping_mul(P3);
    h ^ (h >> 32)
}

/// Hash of an endpoint's address with a number: its points on the ring, its way through the
/// Maglev table.
fn hash_address(address: SocketAddr, number: u32) -> u64 {
    let mut bytes = [0; 22];
    let ip = match address.ip() {
        std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        std::net::IpAddr::V6(v6) => v6,
    };
    bytes[..16].copy_from_slice(&ip.octets());
    bytes[16..18].copy_from_slice(&address.port().to_be_bytes());
    bytes[18..].copy_from_slice(&number.to_le_bytes());
    hash_bytes(&bytes)
}

/// An endpoint as the tables see it: what they give back, its address, its weight (above 0).
pub(super) type Member = (u32, SocketAddr, u32);

/// A table of consistent hashing. A key has a first endpoint and, when that one is unwell, a next
/// one, always the same.
#[derive(Debug)]
pub(super) enum HashTable {
    Ring(Ring),
    Maglev(Maglev),
}

impl HashTable {
    /// The endpoints for a key in the order of preference. Repeats endpoints; ends after one turn.
    pub(super) fn walk(&self, key: u64) -> impl Iterator<Item = u32> + '_ {
        let (slots, start) = match self {
            Self::Ring(ring) => (&ring.slots, ring.position(key)),
            Self::Maglev(maglev) => (&maglev.slots, maglev.position(key)),
        };
        slots[start..].iter().chain(&slots[..start]).copied()
    }
}

/// Points on the ring for an endpoint of weight 1, as ketama has them.
const POINTS: u64 = 160;

/// Points on a ring at most: 12 bytes each, for every worker.
const MAX_POINTS: u64 = 65_536;

/// Ketama: every endpoint has points on a ring, and a key belongs to the next point.
#[derive(Debug)]
pub(super) struct Ring {
    /// Ascending; `slots` has the owners.
    points: Vec<u64>,
    slots: Vec<u32>,
}

impl Ring {
    pub(super) fn new(members: &[Member]) -> Self {
        // By address where two points fall together, so that all proxies agree.
        let mut members = members.to_vec();
        members.sort_unstable_by_key(|m| m.1);
        let divisor = members.iter().fold(0, |d, m| gcd(d, m.2)).max(1);
        let units = |weight: u32| u64::from(weight / divisor);
        let total: u64 = members.iter().map(|m| units(m.2)).sum();
        // Fewer points when there would be too many. The first ones stay where they are.
        let scale = (MAX_POINTS as f64 / (total * POINTS).max(1) as f64).min(1.0);
        let mut ring = Vec::new();
        for (rank, &(_, address, weight)) in (0u32..).zip(&members) {
            let points = ((units(weight) * POINTS) as f64 * scale).round().max(1.0) as u32;
            ring.extend((0..points).map(|n| (hash_address(address, n), rank)));
        }
        ring.sort_unstable();
        Self {
            points: ring.iter().map(|p| p.0).collect(),
            slots: ring.iter().map(|p| members[p.1 as usize].0).collect(),
        }
    }

    fn position(&self, key: u64) -> usize {
        match self.points.partition_point(|p| *p < key) {
            n if n == self.points.len() => 0,
            n => n,
        }
    }
}

/// Entries of a Maglev table: prime, and at least 100 for each of several hundred endpoints. One
/// size for all: a table that grew with the endpoints would move nearly every key when it does.
const MAGLEV_SIZE: usize = 65_537;

/// Maglev (Eisenbud et al., NSDI 2016, section 3.4): every endpoint has its own order of the
/// entries and they take turns, by weight, taking the next free one.
#[derive(Debug)]
pub(super) struct Maglev {
    slots: Vec<u32>,
}

impl Maglev {
    pub(super) fn new(members: &[Member]) -> Self {
        const FREE: u32 = u32::MAX;
        struct Turn {
            slot: u32,
            /// Next entry of this endpoint's order and the step to the one after.
            at: usize,
            skip: usize,
            share: f64,
            credit: f64,
        }
        let heaviest = members.iter().map(|m| m.2).max().unwrap_or(1).max(1);
        let mut members = members.to_vec();
        // The order of the turns must not depend on the order in which endpoints are listed.
        members.sort_unstable_by_key(|m| m.1);
        let mut turns: Vec<Turn> = members
            .iter()
            .map(|&(slot, address, weight)| Turn {
                slot,
                at: (hash_address(address, 0) % MAGLEV_SIZE as u64) as usize,
                skip: (hash_address(address, 1) % (MAGLEV_SIZE as u64 - 1)) as usize + 1,
                share: f64::from(weight) / f64::from(heaviest),
                credit: 0.0,
            })
            .collect();
        if turns.len() < 2 {
            return Self {
                slots: turns.iter().map(|t| t.slot).collect(),
            };
        }
        let mut slots = vec![FREE; MAGLEV_SIZE];
        let mut free = MAGLEV_SIZE;
        'fill: loop {
            for turn in &mut turns {
                turn.credit += turn.share;
                if turn.credit < 1.0 {
                    continue;
                }
                turn.credit -= 1.0;
                while slots[turn.at] != FREE {
                    turn.at += turn.skip;
                    if turn.at >= MAGLEV_SIZE {
                        turn.at -= MAGLEV_SIZE;
                    }
                }
                slots[turn.at] = turn.slot;
                free -= 1;
                if free == 0 {
                    break 'fill;
                }
            }
        }
        Self { slots }
    }

    fn position(&self, key: u64) -> usize {
        (key % self.slots.len().max(1) as u64) as usize
    }
}

fn gcd(mut a: u32, mut b: u32) -> u32 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn members(weights: &[u32]) -> Vec<Member> {
        weights
            .iter()
            .enumerate()
            .map(|(i, w)| {
                let address = SocketAddr::from(([10, 1, (i / 250) as u8, (i % 250) as u8], 8080));
                (i as u32, address, *w)
            })
            .collect()
    }

    fn tables(members: &[Member]) -> [HashTable; 2] {
        [
            HashTable::Ring(Ring::new(members)),
            HashTable::Maglev(Maglev::new(members)),
        ]
    }

    fn owner(table: &HashTable, key: u64) -> u32 {
        table.walk(key).next().expect("a table of members")
    }

    fn keys() -> impl Iterator<Item = u64> {
        (0..20_000u32).map(|n| hash_bytes(&n.to_le_bytes()))
    }

    #[test]
    fn is_xxh64() {
        for (text, hash) in [
            ("", 0xEF46_DB37_51D8_E999),
            ("a", 0xD24E_C4F1_A98C_6E5B),
            ("abc", 0x44BC_2CF5_AD77_0999),
            (
                "Nobody inspects the spammish repetition",
                0xFBCE_A83C_8A37_8BF1,
            ),
        ] {
            assert_eq!(hash_bytes(text.as_bytes()), hash, "{text}");
        }
    }

    #[test]
    fn weights_are_shares_of_the_keys() {
        let weights = [1, 1, 2, 4];
        for table in tables(&members(&weights)) {
            let mut hits = [0u32; 4];
            for key in keys() {
                hits[owner(&table, key) as usize] += 1;
            }
            for (hits, weight) in hits.iter().zip(weights) {
                let share = f64::from(*hits) / 20_000.0;
                let want = f64::from(weight) / 8.0;
                assert!((share / want - 1.0).abs() < 0.25, "{share} {want}");
            }
        }
    }

    #[test]
    fn removing_one_of_n_moves_its_keys_and_few_others() {
        for n in [5usize, 50] {
            let all = members(&vec![1; n]);
            let without: Vec<Member> = all.iter().filter(|m| m.0 != 2).copied().collect();
            for (before, after) in tables(&all).iter().zip(&tables(&without)) {
                let (mut owned, mut others_moved) = (0, 0);
                for key in keys() {
                    let (a, b) = (owner(before, key), owner(after, key));
                    if a == 2 {
                        owned += 1;
                    } else if a != b {
                        others_moved += 1;
                    }
                }
                let share = f64::from(owned) / 20_000.0 * n as f64;
                assert!((0.75..1.3).contains(&share), "{n}: {share}");
                match before {
                    HashTable::Ring(_) => assert_eq!(others_moved, 0),
                    // Maglev gives up a little of this for balance.
                    HashTable::Maglev(_) => {
                        assert!(f64::from(others_moved) < 20_000.0 * 0.04, "{others_moved}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_large_set_stays_small_and_covers_everyone() {
        let all = members(&vec![100; 1000]);
        let ring = Ring::new(&all);
        assert!(ring.points.len() as u64 <= MAX_POINTS + 1000);
        for table in tables(&all) {
            let mut seen: Vec<u32> = table.walk(0).collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), 1000);
        }
    }

    proptest! {
        /// Whatever order the endpoints are listed in, a key has the same address, first and next.
        #[test]
        fn the_order_of_listing_does_not_matter(weights in prop::collection::vec(1u32..5, 1..8), key: u64, turn in 0usize..8) {
            let all = members(&weights);
            let mut turned = all.clone();
            turned.rotate_left(turn % all.len());
            for (a, b) in tables(&all).iter().zip(&tables(&turned)) {
                let a: Vec<u32> = a.walk(key).take(50).collect();
                let b: Vec<u32> = b.walk(key).take(50).collect();
                prop_assert_eq!(a, b);
            }
        }
    }
}
