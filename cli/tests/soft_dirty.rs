//! Which pages were written since that was last cleared, wherever they are.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use common::programs_in_c::run_registered;

fn case(name: &str) {
    run_registered("soft_dirty", name);
}

#[test]
fn of_pages_that_are_here() {
    case("local");
}

#[test]
fn through_eviction_and_fetch() {
    case("far");
}

#[test]
fn while_pages_come_and_go() {
    case("transit");
}

#[test]
fn through_fork() {
    case("forked");
}

#[test]
fn of_what_a_child_does_not_inherit() {
    case("wiped");
}

#[test]
fn through_mprotect() {
    case("protect");
}

#[test]
fn of_what_is_discarded_or_moved() {
    case("given_up");
}

#[test]
fn only_of_managed_memory_of_ones_own() {
    case("refused");
}
