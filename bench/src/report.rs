//! What a benchmark found, in the form that `farpage bench --json` writes.

use std::fmt;

use serde::Serialize;

use crate::median::median;

/// One measurement. Names are a contract: runs are compared by them over time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measurement {
    /// Its name, as `fault.read.p50`.
    pub name: String,
    /// Of [`Self::ours`] and [`Self::baseline`].
    pub unit: &'static str,
    /// With farpage: the median over the turns.
    pub ours: f64,
    /// Without: the median over the turns; none where there is nothing to compare with.
    pub baseline: Option<f64>,
    /// What the baseline is.
    pub baseline_name: String,
    /// `ours / baseline`.
    pub ratio: Option<f64>,
    /// How many turns.
    pub runs: u32,
    /// The kernel's release.
    pub kernel: String,
    /// How pages travelled.
    pub fabric: String,
}

impl Measurement {
    /// From what was measured in each turn; an empty baseline is none.
    pub(crate) fn new(
        name: impl Into<String>,
        unit: &'static str,
        ours: &[f64],
        baseline: &[f64],
        baseline_name: &str,
        fabric: &str,
    ) -> Self {
        let our_median = median(ours);
        let baseline_median = (!baseline.is_empty()).then(|| median(baseline));
        Self {
            name: name.into(),
            unit,
            ours: rounded(our_median),
            baseline: baseline_median.map(rounded),
            baseline_name: baseline_name.to_owned(),
            ratio: baseline_median.map(|baseline| rounded(our_median / baseline)),
            runs: baseline_median.map_or(ours.len(), |_| ours.len().min(baseline.len())) as u32,
            kernel: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            fabric: fabric.to_owned(),
        }
    }
}

fn rounded(value: f64) -> f64 {
    if value.is_finite() {
        (value * 1000.0).round() / 1000.0
    } else {
        0.0
    }
}

/// What one benchmark found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// Its name.
    pub bench: &'static str,
    /// What was measured.
    pub measurements: Vec<Measurement>,
    /// How it was measured, and what could not be measured here and why.
    pub notes: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:30} {:>15} {:>15} {:>8}  unit",
            "", "ours", "baseline", "ratio"
        )?;
        for one in &self.measurements {
            let figure =
                |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.3}"));
            writeln!(
                f,
                "{:30} {:>15.3} {:>15} {:>8}  {}, against {}",
                one.name,
                one.ours,
                figure(one.baseline),
                figure(one.ratio),
                one.unit,
                one.baseline_name
            )?;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_has_the_keys_of_the_contract() {
        let one = Measurement::new("a.b", "us", &[1.0, 3.0, 2.0], &[4.0, 4.0, 4.0], "x", "shm");
        let json = serde_json::to_value(&one).unwrap();
        let mut keys: Vec<_> = json
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        keys.sort_unstable();
        let contract = [
            "baseline",
            "baseline_name",
            "fabric",
            "kernel",
            "name",
            "ours",
            "ratio",
            "runs",
            "unit",
        ];
        assert_eq!(keys, contract);
        assert_eq!((one.ours, one.ratio, one.runs), (2.0, Some(0.5), 3));
        let alone = Measurement::new("a.b", "us", &[1.0, 3.0, 2.0], &[], "none", "shm");
        assert_eq!((alone.baseline, alone.ratio, alone.runs), (None, None, 3));
    }
}
