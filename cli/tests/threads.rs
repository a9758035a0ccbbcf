//! Many threads in far memory: the same pages, different pages, pages that leave while they are written.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use common::programs_in_c::run_registered;

fn case(name: &str) {
    run_registered("threads", name);
}

#[test]
fn the_same_pages() {
    case("same_pages");
}

#[test]
fn different_pages() {
    case("different_pages");
}

#[test]
fn no_addition_is_lost() {
    case("sums");
}

#[test]
fn discards_race_touches() {
    case("discard_race");
}

#[test]
fn threads_by_the_thousand() {
    case("thousands");
}

#[test]
fn robust_mutexes_are_handed_on() {
    case("robust_mutex");
}

#[test]
fn atomic_additions() {
    run_registered("atomics", "exclusive");
}

#[test]
fn atomic_additions_under_changing_protection() {
    run_registered("atomics", "exclusive_mprotect");
}

#[test]
fn atomic_additions_beside_children() {
    run_registered("atomics", "exclusive_cow");
}

#[test]
fn a_robust_mutex_that_is_far_is_not_handed_on() {
    case("robust_far");
}
