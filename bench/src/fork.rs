//! `bench fork`: what a fork costs with almost all memory far, against one with all of it resident in pages of 4 KiB.
//!
//! Both sides run the same process, which forks over and over; its children touch one page and end.

use serde_json::Value;

use crate::child::Forks;
use crate::far::{finish, spawn_child, under_farpage};
use crate::median::median;
use crate::region::PAGE;
use crate::report::{Measurement, Report};
use crate::{BenchError, Options};

/// How much memory the process has. What grows with it shows.
const MEBIBYTES: [usize; 3] = [64, 256, 1024];
/// What may stay here: the least that a program of farpage's own needs.
const LOCAL: &str = "16M";
const FAR: &str = "2G";
/// Forks in each turn, of which the median counts.
const FORKS: &str = "7";

/// One figure of a fork: its name, its unit, and where it is found.
type Figure = (&'static str, &'static str, fn(&Forks) -> &[f64]);

const FIGURES: [Figure; 5] = [
    ("call", "ms", |forks| &forks.call_ms),
    ("child_runs", "ms", |forks| &forks.child_runs_ms),
    ("parent_touch", "us", |forks| &forks.parent_touch_us),
    ("child_touch", "us", |forks| &forks.child_touch_us),
    ("child_gone", "ms", |forks| &forks.child_gone_ms),
];

/// Runs it.
///
/// # Errors
/// [`BenchError`] where nothing can be measured.
pub fn run(options: &Options) -> Result<Report, BenchError> {
    let mut report = Report {
        bench: "fork",
        ..Report::default()
    };
    for mebibytes in MEBIBYTES {
        let pages = (mebibytes << 20) / PAGE;
        let pages = pages.to_string();
        let words = ["fork", &pages, FORKS];
        let (mut ours, mut native) = (Vec::new(), Vec::new());
        for _ in 0..options.turns.max(1) {
            native.push(finish::<Forks>(spawn_child(options, &words, &[])?, &words)?);
            let (forks, account): (Forks, Value) = under_farpage(options, LOCAL, FAR, &words)?;
            ours.push(forks);
            let far = account.get("far_peak_bytes").and_then(Value::as_u64);
            report.notes.push(format!(
                "{mebibytes} MiB: {} MiB of it far at most",
                far.unwrap_or(0) >> 20
            ));
        }
        for (name, unit, of) in FIGURES {
            let medians = |forks: &[Forks]| -> Vec<f64> {
                forks.iter().map(|forks| median(of(forks))).collect()
            };
            report.measurements.push(Measurement::new(
                format!("fork.{mebibytes}M.{name}"),
                unit,
                &medians(&ours),
                &medians(&native),
                "all of it resident, in pages of 4 KiB",
                &options.fabric,
            ));
        }
    }
    report.notes.dedup();
    report.notes.push(
        "call: how long fork() takes the parent; child_runs: from before it until the child is past it; parent_touch, \
         child_touch: the first read of a page afterwards, a far one with farpage; child_gone: until the child is reaped"
            .into(),
    );
    Ok(report)
}
