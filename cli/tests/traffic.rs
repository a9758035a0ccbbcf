//! What crosses the fabric, what need not (zeros, pages unchanged since they came), what is read ahead, and what a bad
//! connection makes of it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::path::Path;
use std::time::Duration;

use common::runs::{run_far, run_far_with};
use common::{alone, without_far_memory, without_program};

const DEADLINE: Duration = Duration::from_secs(120);
const LOCAL_BYTES: u64 = 16 << 20;
/// Pages of the programs' arrays: three times what may stay.
const PAGES: u64 = 12288;

/// A figure of the summary of a Python program that has `data`, an array of [`PAGES`] pages, and a range of their addresses.
struct Traffic {
    evicted: u64,
    written_back: u64,
    fetched: u64,
    prefetch_hits: u64,
}

fn traffic(test: &str, body: &str) -> Option<Traffic> {
    let _alone = alone();
    if without_program(test, "/usr/bin/python3") || without_far_memory(test) {
        return None;
    }
    let script =
        format!("data = bytearray({PAGES} << 12)\npages = range(0, {PAGES} << 12, 4096)\n{body}");
    let program = ["/usr/bin/python3", "-I", "-c", &script];
    let outcome = run_far(LOCAL_BYTES, &program, Path::new("/"), DEADLINE);
    assert!(outcome.status.success(), "{test}: {}", outcome.errors);
    let summary = outcome.summary.expect("a summary");
    println!("{test}: {summary}");
    let figure = |name: &str| summary[name].as_u64().unwrap();
    Some(Traffic {
        evicted: figure("pages_evicted"),
        written_back: figure("pages_written_back"),
        fetched: figure("pages_fetched"),
        prefetch_hits: figure("prefetch_hits"),
    })
}

#[test]
fn unchanged_pages_are_not_sent_again() {
    let body = "
for at in pages: data[at] = at % 255 + 1
for turn in range(4): assert sum(data[at] for at in pages) == sum(at % 255 + 1 for at in pages)
";
    if let Some(seen) = traffic("unchanged_pages_are_not_sent_again", body) {
        assert!(seen.evicted > 3 * PAGES, "{} went", seen.evicted);
        assert!(
            seen.written_back < PAGES + PAGES / 2,
            "{} of {} sent",
            seen.written_back,
            seen.evicted
        );
    }
}

#[test]
fn zeros_are_not_sent() {
    let body = "
for at in pages: data[at] = 1
for at in pages: data[at] = 0
for turn in range(2): assert sum(data[at] for at in pages) == 0
";
    if let Some(seen) = traffic("zeros_are_not_sent", body) {
        assert!(seen.evicted > 2 * PAGES, "{} went", seen.evicted);
        // The ones, and what the interpreter has beside.
        assert!(
            seen.written_back < PAGES + PAGES / 2,
            "{} of {} sent",
            seen.written_back,
            seen.evicted
        );
    }
}

#[test]
fn a_walk_finds_its_pages_read_ahead() {
    let body = "
for at in pages: data[at] = at % 255 + 1
for turn in range(3): assert sum(data[at] for at in pages) > 0
";
    if let Some(seen) = traffic("a_walk_finds_its_pages_read_ahead", body) {
        assert!(seen.fetched > PAGES, "{} came back", seen.fetched);
        assert!(
            seen.prefetch_hits > seen.fetched / 2,
            "{} of {} were read ahead",
            seen.prefetch_hits,
            seen.fetched
        );
    }
}

/// What became of a script over connections that misbehave as asked for: all is right, and nothing is left. Returns the log; none
/// where it cannot run.
fn log_of_bad_connections(test: &str, faults: &str, script: &str) -> Option<String> {
    let _alone = alone();
    if without_program(test, "/usr/bin/python3") || without_far_memory(test) {
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let outcome = run_far_with(
        LOCAL_BYTES,
        &["/usr/bin/python3", "-I", "-c", script],
        folder.path(),
        DEADLINE,
        &[
            ("FARPAGE_FAULTS", faults),
            ("FARPAGE_LOG_FILE", log.to_str().unwrap()),
        ],
    );
    let log = std::fs::read_to_string(log).unwrap_or_default();
    assert!(outcome.status.success(), "{}\n{log}", outcome.errors);
    let summary = outcome.summary.expect("a summary");
    println!("{test}: {summary}");
    assert_eq!(summary["far_slots_in_use_at_exit"], 0, "{summary}");
    Some(log)
}

/// Reads come late, in any order, with wrong bits, and every connection breaks in the end: the program sees nothing of it.
#[test]
fn a_bad_connection_changes_nothing() {
    let script = format!(
        "
import random
source = random.Random(7)
pages = range(0, {PAGES} << 12, 4096)
data = bytearray({PAGES} << 12)
for turn in range(3):
    for at in pages: data[at:at + 2] = ((at >> 12) + turn & 0xffff).to_bytes(2, 'little')
    for page in source.sample(range({PAGES}), 4096):
        assert int.from_bytes(data[page << 12:(page << 12) + 2], 'little') == page + turn & 0xffff
"
    );
    let faults = "seed=7,delayed=100,longest_delay=8,corrupted=5,reordered=1,disconnect_after=4000";
    let test = "a_bad_connection_changes_nothing";
    let Some(log) = log_of_bad_connections(test, faults, &script) else {
        return;
    };
    for met in [
        "failed their check",
        "the connection to a memory node broke",
    ] {
        assert!(log.contains(met), "nothing says {met:?}: {log}");
    }
}

/// Some requests are never answered, over a connection that stands: they are asked again over another, long before their faults end.
#[test]
fn what_is_never_answered_is_asked_again() {
    let script = format!(
        "
data = bytearray({PAGES} << 12)
pages = range({PAGES})
for page in pages: data[page << 12] = page % 251
for page in pages: assert data[page << 12] == page % 251
"
    );
    let test = "what_is_never_answered_is_asked_again";
    let Some(log) = log_of_bad_connections(test, "seed=3,lost=2", &script) else {
        return;
    };
    assert!(
        log.contains("it does not answer"),
        "nothing was lost: {log}"
    );
}
