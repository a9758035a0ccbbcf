//! The C programs of `bench/c`: run with far memory as `farpage bench conformance` does, but watched from outside.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use farpage_bench::conformance::{Form, SKIPPED, allowed_bytes, cases, programs, shell_status};

use super::runs::{Outcome, run_far_with, run_native};
use super::{alone, skip, without_far_memory, without_pins, without_program};

/// A run that takes longer hangs.
const DEADLINE: Duration = Duration::from_secs(90);
/// What the tree may have above its limit: the larger of this and a twentieth of the limit.
pub const SLACK_BYTES: u64 = 16 << 20;
/// What the cases that draw lots begin with.
const SEED: u64 = 1;
/// What the programs may keep here: a third of their smallest data.
pub const LOCAL: u64 = 16 << 20;

/// A folder with the compiled programs; removed with the test binary's last use of it, at the latest by the next
/// clean of the target folder.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("c");
        std::fs::create_dir_all(&folder).unwrap();
        folder
    })
}

/// Compiles a program of `bench/c`, and returns where it is.
pub fn compiled(name: &str) -> PathBuf {
    programs::compile(name, programs::Size::Whole, folder()).unwrap()
}

/// How a case is run and what it must come to.
#[derive(Clone, Copy, Debug)]
pub struct Expect {
    /// What may stay here.
    pub local: u64,
    /// As on a kernel without `UFFDIO_MOVE`.
    pub without_move: bool,
    /// Whether pages must have gone far.
    pub evicts: bool,
    /// Whether the peak must stay within the limit and the slack.
    pub bounded: bool,
    /// The status to end with; 128 and the signal's number if by one.
    pub status: i32,
    /// Whether it is farpage that ends it, and so tells why instead of a summary.
    pub ended: bool,
}

impl Default for Expect {
    fn default() -> Self {
        Self {
            local: LOCAL,
            without_move: false,
            evicts: true,
            bounded: true,
            status: 0,
            ended: false,
        }
    }
}

/// Runs a case of the conformance table in all its forms. Returns what those came to that this machine can run.
pub fn run_registered(program: &str, name: &str) -> Vec<Outcome> {
    let case =
        cases::find(program, name).unwrap_or_else(|| panic!("{program}.{name} is in no table"));
    let words = case.words(SEED);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let in_form = |form: &Form| {
        if case.pins && without_pins(&case.full_name(*form)) {
            return None;
        }
        let expect = Expect {
            local: case.local,
            without_move: *form == Form::WithoutMove,
            bounded: case.bounded,
            status: case.status,
            ..Expect::default()
        };
        let outcome = run_case(program, &words, expect);
        if outcome.is_some() && !case.twin.is_empty() {
            comes_to_the_same_in_plain_memory(program, case.twin);
        }
        outcome
    };
    case.forms().iter().filter_map(in_form).collect()
}

fn comes_to_the_same_in_plain_memory(program: &str, words: &[&str]) {
    let _alone = alone();
    let path = compiled(program);
    let words: Vec<&str> = path
        .to_str()
        .into_iter()
        .chain(words.iter().copied())
        .collect();
    let twin = run_native(&words, folder(), DEADLINE);
    assert!(twin.status.success(), "{}: {}", twin.status, twin.errors);
    println!("{program}: {}", twin.errors);
}

/// Runs one case of a program. `None`, said by a line, where this machine cannot.
pub fn run_case(program: &str, case: &[&str], expect: Expect) -> Option<Outcome> {
    let _alone = alone();
    let test = format!("{program} {}", case.join(" "));
    if without_far_memory(&test) || without_program(&test, "cc") {
        return None;
    }
    let path = compiled(program);
    let mut words = vec![path.to_str().unwrap()];
    words.extend(case);
    run_words(&test, &words, expect)
}

/// As [`run_case`], for words that begin with any program.
pub fn run_words(test: &str, words: &[&str], expect: Expect) -> Option<Outcome> {
    let environment: &[(&str, &str)] = if expect.without_move {
        &[("FARPAGE_WITHOUT_MOVE", "1")]
    } else {
        &[]
    };
    let outcome = run_far_with(expect.local, words, folder(), DEADLINE, environment);
    if outcome.status.code() == Some(SKIPPED) {
        let reason = outcome
            .errors
            .lines()
            .find_map(|line| line.strip_prefix("SKIP "))
            .unwrap_or("the program says so");
        skip(test, reason);
        return None;
    }
    let over = outcome.seen.peak_bytes as i64 - expect.local as i64;
    println!(
        "{test}: {:?}, {} KiB above the limit",
        outcome.elapsed,
        over >> 10
    );
    assert_eq!(
        shell_status(outcome.status),
        Some(expect.status),
        "{test}: {}: {}",
        outcome.status,
        outcome.errors
    );
    if !expect.ended {
        judge(test, &outcome, expect);
    }
    Some(outcome)
}

/// What every run must come to.
fn judge(test: &str, outcome: &Outcome, expect: Expect) {
    let summary = outcome
        .summary
        .as_ref()
        .unwrap_or_else(|| panic!("{test}: no summary: {}", outcome.errors));
    assert_eq!(
        summary["far_slots_in_use_at_exit"], 0,
        "{test}: a leak: {summary}"
    );
    if expect.evicts {
        assert!(
            summary["pages_evicted"].as_u64() > Some(0),
            "{test} went nowhere: {summary}"
        );
    }
    if expect.bounded {
        let allowed = allowed_bytes(expect.local);
        assert!(
            outcome.seen.peak_bytes <= allowed,
            "{test}: {:?} above {allowed}: {summary}",
            outcome.seen
        );
    }
}
