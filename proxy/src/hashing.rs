//! Maps whose keys nobody outside chooses in number: what a table says, by address or name.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// A map on a request's way. The standard hasher withstands chosen keys, and costs a lookup a
/// hundred instructions; this one a tenth of them.
pub type TableMap<K, V> = HashMap<K, V, BuildHasherDefault<Mix>>;

/// Mixes words by rotation and multiplication.
#[derive(Debug, Default)]
pub struct Mix(u64);

/// 2^64 divided by the golden ratio: its multiples are spread evenly (Knuth, TAOCP volume 3,
/// section 6.4).
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

impl Hasher for Mix {
    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks();
        for word in words {
            self.write_u64(u64::from_le_bytes(*word));
        }
        if !rest.is_empty() {
            let mut last = [0; 8];
            last[..rest.len()].copy_from_slice(rest);
            self.write_u64(u64::from_le_bytes(last));
        }
    }

    fn write_u8(&mut self, word: u8) {
        self.write_u64(word.into());
    }

    fn write_u16(&mut self, word: u16) {
        self.write_u64(word.into());
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(word.into());
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(GOLDEN);
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }

    fn finish(&self) -> u64 {
        // A product's low bits, which choose the place, know nothing of the high ones.
        self.0 ^ (self.0 >> 32)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::hash::{BuildHasher, Hash};
    use std::net::SocketAddr;

    use super::*;

    /// How many of 256 places are taken, by low bits as by high ones, when there are as many keys.
    fn places<K: Hash>(keys: impl Iterator<Item = K>) -> (usize, usize) {
        let hasher = BuildHasherDefault::<Mix>::default();
        let hashes: Vec<_> = keys.map(|key| hasher.hash_one(key)).collect();
        assert_eq!(hashes.len(), 256);
        let low: HashSet<_> = hashes.iter().map(|hash| hash & 255).collect();
        let high: HashSet<_> = hashes.iter().map(|hash| hash >> 56).collect();
        (low.len(), high.len())
    }

    /// At random, 162 would be.
    #[test]
    fn keys_that_look_alike_are_spread() {
        let memory = |i: usize| (0x7f12_3456_0000 + i * 48, 0x7f12_3457_0000 + i * 64);
        let address = |i: usize| SocketAddr::from(([10, 0, 0, i as u8], 8080));
        let port = |i: usize| SocketAddr::from(([10, 0, 0, 1], 1024 + i as u16));
        let name = |i: usize| format!("route shop/cart-{i}");
        for (low, high) in [
            places((0..256).map(memory)),
            places((0..256).map(address)),
            places((0..256).map(port)),
            places((0..256).map(name)),
        ] {
            assert!(low > 120 && high > 120, "{low} {high}");
        }
    }
}
