//! Latencies in logarithmic buckets: 128 to each power of two, so a percentile is within 0.8 %.

use std::time::Duration;

const SUB_BITS: u32 = 7;
const SUB: usize = 1 << SUB_BITS;

/// Counts of durations, nanosecond input, no upper bound.
#[derive(Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        // 64-bit values need (64 - SUB_BITS) rows after the first, exact one.
        Self {
            counts: vec![0; SUB * (64 - SUB_BITS as usize + 1)],
            total: 0,
        }
    }
}

impl Histogram {
    pub fn record(&mut self, value: Duration) {
        let nanos = u64::try_from(value.as_nanos()).unwrap_or(u64::MAX);
        self.counts[index(nanos)] += 1;
        self.total += 1;
    }

    pub fn count(&self) -> u64 {
        self.total
    }

    /// The value that `share` (0.0 to 1.0) of the records do not exceed; zero when there is none.
    pub fn quantile(&self, share: f64) -> Duration {
        let wanted = ((self.total as f64 * share).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        for (i, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return Duration::from_nanos(upper(i));
            }
        }
        Duration::ZERO
    }
}

fn index(value: u64) -> usize {
    let magnitude = 64 - value.leading_zeros();
    let row = magnitude.saturating_sub(SUB_BITS);
    if row == 0 {
        return value as usize;
    }
    // The top SUB_BITS bits below the leading one select the column.
    let column = (value >> (row - 1)) as usize & (SUB - 1);
    row as usize * SUB + column
}

/// The largest value of a bucket.
fn upper(index: usize) -> u64 {
    let (row, column) = (index / SUB, index % SUB);
    if row == 0 {
        return column as u64;
    }
    let low = (SUB as u64 + column as u64) << (row - 1);
    low + ((1u64 << (row - 1)) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_its_bucket() {
        let mut value = 1u64;
        while value < u64::MAX / 3 {
            for v in [value - 1, value, value + 1] {
                let i = index(v);
                assert!(upper(i) >= v, "{v}");
                assert!(i == 0 || upper(i - 1) < v, "{v}");
                assert!(upper(i) as f64 <= v as f64 * 1.01 + 1.0, "{v}");
            }
            value = value * 3 / 2 + 1;
        }
    }

    #[test]
    fn quantiles_of_a_straight_line() {
        let mut h = Histogram::default();
        for micros in 1..=1000 {
            h.record(Duration::from_micros(micros));
        }
        for (share, micros) in [(0.5, 500.0), (0.99, 990.0), (1.0, 1000.0)] {
            let got = h.quantile(share).as_nanos() as f64 / 1000.0;
            assert!((got / micros - 1.0).abs() < 0.01, "{share}: {got}");
        }
    }

    #[test]
    fn nothing_recorded_is_zero() {
        assert_eq!(Histogram::default().quantile(0.99), Duration::ZERO);
    }
}
