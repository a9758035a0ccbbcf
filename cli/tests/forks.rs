//! fork with memory far: each side has its own, whoever lives longer.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use common::programs_in_c::run_registered;

/// On this kernel, and as on one without `UFFDIO_MOVE`.
fn case(name: &str) {
    run_registered("forks", name);
}

#[test]
fn a_child_reads() {
    case("child_reads");
}

#[test]
fn both_sides_write() {
    case("both_write");
}

#[test]
fn a_child_outlives_its_parent() {
    case("outlives");
}

#[test]
fn generations() {
    case("generations");
}

#[test]
fn fork_while_pages_come_and_go() {
    case("fork_in_transit");
}

/// Answers take longer over TCP: a fork falls between question and answer, and what the answer brings to the parent is not
/// its child's.
#[test]
fn fork_while_pages_come_over_tcp() {
    let test = "fork_while_pages_come_over_tcp";
    if common::without_far_memory(test) || common::without_program(test, "cc") {
        return;
    }
    let _alone = common::alone();
    let out = std::process::Command::new(common::farpage())
        .args(["bench", "conformance", "--fabric", "tcp"])
        .args(["--case", "forks.fork_in_transit"])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&out.stdout);
    assert!(
        told.ends_with("\n2 passed, 0 failed, 0 skipped\n"),
        "{told}"
    );
}

#[test]
fn a_parent_exits_as_it_forks() {
    case("parent_exits");
}

#[test]
fn children_killed_at_any_moment() {
    case("storm");
}

#[test]
fn siblings_write_what_they_share() {
    case("cow_storm");
}

/// What nine processes share lies far once, and counts once against `--far`.
#[test]
fn siblings_share_what_is_far() {
    for outcome in run_registered("forks", "siblings") {
        let summary = outcome.summary.unwrap();
        let peak = summary["far_peak_bytes"].as_u64().unwrap();
        // 48 MiB of data, and 24 that push them out; nine times the data is 432.
        assert!(peak < 128 << 20, "{summary}");
    }
}

#[test]
fn ranges_not_inherited() {
    case("not_inherited");
}

#[test]
fn what_is_inherited_is_settled_by_the_fork() {
    case("changed_after_fork");
}

#[test]
fn trees_verify_every_page() {
    run_registered("fork_tree", "verify");
}

#[test]
fn trees_with_processes_killed() {
    run_registered("fork_tree", "kill");
}

#[test]
fn daemons() {
    run_registered("births", "daemon");
}

#[test]
fn children_by_the_bare_system_call() {
    run_registered("births", "raw_clone");
}

#[test]
fn children_that_borrow_memory() {
    run_registered("births", "vfork");
}

#[test]
fn programs_spawned() {
    run_registered("births", "posix_spawn");
}

#[test]
fn children_that_become_other_programs() {
    run_registered("births", "fork_exec");
}

#[test]
fn threads_that_fork_while_others_fault() {
    run_registered("births", "threads_fork");
}

#[test]
fn descriptors_and_folder_unshared() {
    run_registered("births", "unshare");
}

#[test]
fn children_in_namespaces() {
    run_registered("births", "namespaces");
}

#[test]
fn fork_while_threads_discard_and_map_anew() {
    run_registered("births", "fork_discard");
}
