//! Medians and quantiles of samples.

/// The `q` quantile of the samples, which it sorts; 0 where there are none.
pub(crate) fn quantile(samples: &mut [f64], q: f64) -> f64 {
    samples.sort_unstable_by(f64::total_cmp);
    let last = samples.len().saturating_sub(1);
    let index = (last as f64 * q).round() as usize;
    samples.get(index).copied().unwrap_or(0.0)
}

/// The median.
pub(crate) fn median(samples: &[f64]) -> f64 {
    quantile(&mut samples.to_vec(), 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples() {
        let mut samples = [5.0, 1.0, 4.0, 2.0, 3.0];
        assert_eq!(quantile(&mut samples, 0.5), 3.0);
        assert_eq!(quantile(&mut samples, 0.99), 5.0);
        assert_eq!(quantile(&mut [], 0.5), 0.0);
        assert_eq!(median(&[2.0, 9.0, 4.0]), 4.0);
    }
}
