//! Counts what passed, failed and was skipped, over checks and test runners.

use std::collections::BTreeSet;

/// How a test says that it did not run: `SKIPPED: name: reason`, on a line of its own.
const SKIPPED: &str = "SKIPPED: ";

/// The counts so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
    failures: Vec<String>,
    skips: Vec<String>,
    /// Tests of the current test binary that said they did not run. Its own count has them as passed.
    unrun: BTreeSet<String>,
}

impl Tally {
    /// Counts a check that is no test runner.
    pub(crate) fn check(&mut self, name: &str, passed: bool) {
        if passed {
            self.passed += 1;
        } else {
            self.fail(name);
        }
    }

    /// Counts something that failed as a whole.
    pub(crate) fn fail(&mut self, name: &str) {
        self.failed += 1;
        self.failures.push(name.to_owned());
    }

    /// Counts a check that could not be made.
    pub(crate) fn skip(&mut self, name: &str, reason: &str) {
        println!("{SKIPPED}{name}: {reason}");
        self.skipped += 1;
        self.skips.push(format!("{name}: {reason}"));
    }

    /// Takes one line of `cargo test`.
    pub(crate) fn line(&mut self, line: &str) {
        if let Some(said) = line.trim_start().strip_prefix(SKIPPED) {
            let name = said.split(':').next().unwrap_or(said);
            if self.unrun.insert(name.to_owned()) {
                self.skips.push(said.to_owned());
            }
        } else if let Some(name) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.failures.push(name.to_owned());
        } else if let Some(counts) = line.strip_prefix("test result: ") {
            let count = |what: &str| {
                let words: Vec<&str> = counts
                    .split([' ', ';', '.'])
                    .filter(|word| !word.is_empty())
                    .collect();
                words
                    .windows(2)
                    .find(|pair| pair[1] == what)
                    .and_then(|pair| pair[0].parse::<u64>().ok())
                    .unwrap_or(0)
            };
            let unrun = std::mem::take(&mut self.unrun).len() as u64;
            self.passed += count("passed").saturating_sub(unrun);
            self.failed += count("failed");
            self.skipped += count("ignored") + unrun;
        }
    }

    /// Prints what failed and was skipped, and the closing line.
    pub(crate) fn close(&self) -> Result<(), String> {
        println!();
        for skip in &self.skips {
            println!("skipped: {skip}");
        }
        for failure in &self.failures {
            println!("failed:  {failure}");
        }
        println!(
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        );
        if self.failed == 0 {
            Ok(())
        } else {
            Err("not all is well; see above".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_runners_and_takes_out_what_did_not_run() {
        let mut tally = Tally::default();
        let printed = "test a ... ok\ntest b ... FAILED\n---- a stdout ----\nSKIPPED: a: needs root: really\n\
                       SKIPPED: a: again\ntest result: FAILED. 5 passed; 1 failed; 2 ignored; 0 measured; 0 filtered \
                       out; finished in 0.1s\ntest result: ok. 3 passed; 0 failed; 0 ignored; 0 measured";
        printed.lines().for_each(|line| tally.line(line));
        tally.check("format", true);
        assert_eq!(
            (tally.passed, tally.failed, tally.skipped),
            (4 + 3 + 1, 1, 3)
        );
        assert_eq!(tally.failures, ["b"]);
        assert!(tally.close().is_err());
    }
}
