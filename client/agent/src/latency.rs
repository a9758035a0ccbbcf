//! How long faults took: a histogram of fixed size that many threads add to.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Sub-buckets of each power of two: figures are right to within 1/8.
const SUB: usize = 8;
const BUCKETS: usize = 40 * SUB;
/// The bounds of a [`Histogram`], as powers of two of nanoseconds: 1.024 us, which no fault is below, and 69 s, which is
/// beyond the usual deadline of one.
const FIRST_BOUND: u32 = 10;
const LAST_BOUND: u32 = 36;

/// Counts of durations by their logarithm.
#[derive(Debug)]
#[repr(C)]
pub struct Latencies {
    counts: [AtomicU64; BUCKETS],
}

/// How many durations fell between bounds that double, for whoever adds several such up.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    /// Upper bounds in seconds, ascending, each with how many are below it and not below the one before; the last is
    /// infinite.
    pub buckets: Vec<(f64, u64)>,
    /// All of them together, in seconds, right to within 1/16.
    pub sum_seconds: f64,
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

    /// Adds all that another has counted.
    pub fn add_all(&self, other: &Self) {
        for (count, others) in self.counts.iter().zip(other.counts.iter()) {
            count.fetch_add(others.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// The counts, told in fewer buckets: from 1 us to above the longest wait that is usual.
    #[must_use]
    pub fn histogram(&self) -> Histogram {
        let counts: Vec<u64> = self
            .counts
            .iter()
            .map(|count| count.load(Ordering::Relaxed))
            .collect();
        let mut rest = counts.as_slice();
        let mut buckets = Vec::new();
        for exponent in FIRST_BOUND..=LAST_BOUND {
            // Where the bucket of this power of two begins.
            let below = bucket_of(1 << exponent) - (counts.len() - rest.len());
            let (these, others) = rest.split_at(below);
            buckets.push(((1u64 << exponent) as f64 / 1e9, these.iter().sum()));
            rest = others;
        }
        buckets.push((f64::INFINITY, rest.iter().sum()));
        let nanos = |(bucket, count): (usize, &u64)| value_of(bucket) * *count as f64;
        let sum_seconds = counts.iter().enumerate().map(nanos).sum::<f64>() / 1e9;
        Histogram {
            buckets,
            sum_seconds,
        }
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

    #[test]
    fn a_histogram_has_everything_once_below_its_bound() {
        let (one, other) = (Latencies::default(), Latencies::default());
        for nanos in [0, 1023, 1024, 1_000_000, (1 << 36) - 1] {
            one.add(Duration::from_nanos(nanos));
        }
        other.add(Duration::from_secs(70));
        one.add_all(&other);
        let histogram = one.histogram();
        let below = |bound: f64| -> u64 {
            let buckets = histogram.buckets.iter();
            let below = buckets.filter(|(upper, _)| *upper <= bound);
            below.map(|(_, count)| count).sum()
        };
        assert_eq!(histogram.buckets.len(), 28);
        assert_eq!(below(1.024e-6), 2);
        assert_eq!(below(2.048e-6), 3);
        assert_eq!(below(0.000_5), 3);
        assert_eq!(below(0.001_1), 4);
        assert_eq!(below(100.0), 5);
        assert_eq!(below(f64::INFINITY), 6);
        assert!((histogram.sum_seconds / 138.72 - 1.0).abs() < 1.0 / 16.0);
        assert!(Latencies::default().histogram().sum_seconds.abs() < f64::EPSILON);
    }
}
