//! How long faults took: a histogram of fixed size that many threads add to.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Sub-buckets of each power of two: figures are right to within 1/8.
const SUB: usize = 8;
const BUCKETS: usize = 40 * SUB;

/// Counts of durations by their logarithm.
#[derive(Debug)]
#[repr(C)]
pub struct Latencies {
    counts: [AtomicU64; BUCKETS],
}

impl Default for Latencies {
    fn default() -> Self {
        Self {
            counts: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

impl Latencies {
    /// Adds one duration.
    pub fn add(&self, duration: Duration) {
        let bucket = bucket_of(duration.as_nanos() as u64);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
    }

    /// The duration below which `share` (0 to 1) of all lie, in microseconds; 0 while there are none.
    #[must_use]
    pub fn quantile_us(&self, share: f64) -> f64 {
        let total: u64 = self
            .counts
            .iter()
            .map(|count| count.load(Ordering::Relaxed))
            .sum();
        if total == 0 {
            return 0.0;
        }
        let rank = ((total as f64 * share).ceil() as u64).clamp(1, total);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count.load(Ordering::Relaxed);
            if seen >= rank {
                return value_of(bucket) / 1000.0;
            }
        }
        0.0
    }
}

fn bucket_of(nanos: u64) -> usize {
    let value = nanos.max(SUB as u64);
    let exponent = value.ilog2() as usize;
    let sub = (value >> (exponent - 3)) as usize & (SUB - 1);
    ((exponent - 3) * SUB + sub).min(BUCKETS - 1)
}

/// The middle of a bucket, in nanoseconds.
fn value_of(bucket: usize) -> f64 {
    let width = (1u64 << (bucket / SUB).min(60)) as f64;
    (SUB + bucket % SUB) as f64 * width + width / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_an_eighth() {
        let latencies = Latencies::default();
        for micros in 1..=1000 {
            latencies.add(Duration::from_micros(micros));
        }
        for (share, expected) in [(0.5, 500.0), (0.99, 990.0), (0.1, 100.0)] {
            let got = latencies.quantile_us(share);
            assert!((got - expected).abs() <= expected / 8.0, "{share}: {got}");
        }
        assert!(Latencies::default().quantile_us(0.5).abs() < f64::EPSILON);
        latencies.add(Duration::MAX);
    }
}
