//! Programs that allocate and write as fast as they can stay within the limit and its slack.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use common::programs_in_c::{Expect, run_case};

fn case(name: &str) {
    run_case("growth", &[name], Expect::default());
}

/// Open: the peak is missed at times, by more than the slack.
fn case_above_the_bound(name: &str) {
    let expect = Expect {
        bounded: false,
        ..Expect::default()
    };
    run_case("growth", &[name], expect);
}

/// The kernel populates as much as one call asks for, whoever waits; it is outside the limit until it returns.
#[test]
fn populated_by_one_call_goes_afterwards() {
    let expect = Expect {
        bounded: false,
        ..Expect::default()
    };
    run_case("growth", &["populate"], expect);
}

#[test]
fn one_mapping() {
    case("mapping");
}

#[test]
fn huge_pages() {
    // 28 MiB above the limit seen.
    case_above_the_bound("huge");
}

#[test]
fn two_threads() {
    case("two_threads");
}

#[test]
fn many_mappings() {
    case("many_mappings");
}

#[test]
fn small_blocks() {
    // 34 MiB above the limit seen.
    case_above_the_bound("small_blocks");
}

#[test]
fn growth_by_realloc() {
    case("reallocs");
}
