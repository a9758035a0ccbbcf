//! fork with memory far: each side has its own, whoever lives longer.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use common::programs_in_c::{Expect, run_case};

/// Open: after forks the peak is missed at times by more than the slack; 70 MiB above the limit seen.
fn case(name: &str) {
    let expect = Expect {
        bounded: false,
        ..Expect::default()
    };
    run_case("forks", &[name], expect);
}

#[test]
fn a_child_reads() {
    case("child_reads");
}

#[test]
#[ignore = "open (issue 4): with pages of a forked child taken out some are lost, so nothing of it is; the case wants them far"]
fn both_sides_write() {
    case("both_write");
}

#[test]
#[ignore = "open: a grandchild whose parent has ended waits"]
fn a_child_outlives_its_parent() {
    case("outlives");
}

#[test]
fn generations() {
    // 70 MiB above the limit seen.
    case("generations");
}

#[test]
fn fork_while_pages_come_and_go() {
    // 35 MiB above the limit seen.
    case("fork_in_transit");
}

#[test]
fn children_killed_at_any_moment() {
    case("storm");
}

#[test]
fn ranges_not_inherited() {
    // 33 MiB above the limit seen.
    case("not_inherited");
}
