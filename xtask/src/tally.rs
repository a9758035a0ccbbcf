//! Counts what passed, failed and was skipped, over checks and test runners.

use std::collections::{BTreeSet, VecDeque};

/// How a test says that it did not run: `SKIPPED: name: reason`, on a line of its own.
const SKIPPED: &str = "SKIPPED: ";

/// How many lines of what a failed test printed are repeated at the end, before its backtrace.
const LAST_WORDS: usize = 30;

/// The counts so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
    failures: Vec<String>,
    skips: Vec<String>,
    /// What the failed tests said last, each line with the test's name.
    last_words: Vec<String>,
    /// The failed test whose output is being printed, and the last lines of it.
    speaking: Option<(String, VecDeque<String>)>,
    /// Whether what is being printed is what tests that passed have to say.
    reassuring: bool,
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

    /// Whether the last line is worth repeating: not what passed tests printed. That they passed was said before, and what
    /// was skipped is said at the end.
    pub(crate) fn is_news(&self) -> bool {
        !self.reassuring
    }

    /// Takes one line of `cargo test`.
    pub(crate) fn line(&mut self, line: &str) {
        self.listen(line);
        if line == "successes:" {
            self.reassuring = true;
        } else if ["failures:", "test result: ", "running "]
            .iter()
            .any(|other| line.starts_with(other))
        {
            self.reassuring = false;
        }
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

    /// Takes one line of `farpage bench conformance`.
    pub(crate) fn verdict(&mut self, line: &str) {
        let mut words = line.splitn(2, "  ");
        match (words.next(), words.next()) {
            (Some("pass"), Some(_)) => self.passed += 1,
            (Some("fail"), Some(case)) => self.fail(case),
            (Some("skip"), Some(case)) => {
                self.skipped += 1;
                self.skips.push(case.to_owned());
            }
            _ => {}
        }
    }

    /// Keeps the last words of the tests that failed.
    fn listen(&mut self, line: &str) {
        let speaker = line
            .strip_prefix("---- ")
            .and_then(|rest| rest.strip_suffix(" stdout ----"));
        let ends = speaker.is_some()
            || ["stack backtrace:", "failures:", "successes:"].contains(&line)
            || line.starts_with("test result: ");
        if ends && let Some((name, lines)) = self.speaking.take() {
            let lines = lines.iter().filter(|line| !line.is_empty());
            self.last_words
                .extend(lines.map(|line| format!("{name}: {line}")));
        }
        if let Some(name) = speaker {
            let failed = self.failures.iter().any(|failure| failure == name);
            self.speaking = failed.then(|| (name.to_owned(), VecDeque::new()));
        } else if let Some((_, lines)) = &mut self.speaking {
            if lines.len() == LAST_WORDS {
                lines.pop_front();
            }
            lines.push_back(line.to_owned());
        }
    }

    /// Prints what failed and was skipped, and the closing line.
    pub(crate) fn close(&self) -> Result<(), String> {
        println!();
        for skip in &self.skips {
            println!("skipped: {skip}");
        }
        for words in &self.last_words {
            println!("{words}");
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
        let printed = "test a ... ok\ntest b ... FAILED\n\nsuccesses:\n\n---- a stdout ----\nSKIPPED: a: needs root: really\n\
                       SKIPPED: a: again\n\nfailures:\n\n---- b stdout ----\nlooked\n\npanicked: why\nstack \
                       backtrace:\n   0: where\n\nfailures:\n    b\n\ntest result: FAILED. 5 passed; 1 failed; 2 ignored; 0 measured; 0 filtered \
                       out; finished in 0.1s\ntest result: ok. 3 passed; 0 failed; 0 ignored; 0 measured";
        let repeated = printed.lines().filter(|line| {
            tally.line(line);
            tally.is_news()
        });
        let repeated: Vec<_> = repeated.collect();
        assert!(repeated.contains(&"panicked: why"));
        assert!(!repeated.concat().contains("SKIPPED"));
        tally.check("format", true);
        assert_eq!(
            (tally.passed, tally.failed, tally.skipped),
            (4 + 3 + 1, 1, 3)
        );
        assert_eq!(tally.failures, ["b"]);
        assert_eq!(tally.last_words, ["b: looked", "b: panicked: why"]);
        assert!(tally.close().is_err());
    }

    #[test]
    fn counts_verdicts() {
        let mut tally = Tally::default();
        let printed = "pass  a.b: shows\nfail  a.c: it did not\nskip  a.d: no kernel for it\n1 passed, 1 failed, 1 skipped";
        printed.lines().for_each(|line| tally.verdict(line));
        assert_eq!((tally.passed, tally.failed, tally.skipped), (1, 1, 1));
        assert_eq!(tally.failures, ["a.c: it did not"]);
    }
}
