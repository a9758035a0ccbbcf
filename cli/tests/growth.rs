//! Programs that allocate and write as fast as they can stay within the limit and its slack.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use common::programs_in_c::run_registered;

fn case(name: &str) {
    run_registered("growth", name);
}

#[test]
fn populated_by_one_call() {
    case("populate");
}

#[test]
fn a_stack_that_is_given_back_counts_no_longer() {
    case("given_back");
}

#[test]
fn one_mapping() {
    case("mapping");
}

#[test]
fn huge_pages() {
    case("huge");
}

#[test]
fn huge_pages_from_before_memory_was_short() {
    case("huge_before");
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
    case("small_blocks");
}

#[test]
fn growth_by_realloc() {
    case("reallocs");
}
