//! Programs that close, filter, lock or give up what ties them to their pager, or are stopped and debugged.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::programs_in_c::{Expect, run_case, run_registered};
use common::{eventually, sys};

fn case(name: &str) {
    run_registered("hostile", name);
}

/// Runs the long work, and does something to it meanwhile. The file that says it is ready ends it when removed.
fn meanwhile(what: impl FnOnce(i32) + Send + 'static) {
    let ready = Path::new(env!("CARGO_TARGET_TMPDIR")).join("c/long_work.ready");
    let _ = std::fs::remove_file(&ready);
    let outside = std::thread::spawn(move || {
        let mut pid = 0;
        eventually("the long work begins", || {
            let text = std::fs::read_to_string(&ready).unwrap_or_default();
            pid = text.trim().parse().unwrap_or(0);
            pid != 0 && text.ends_with('\n')
        });
        what(pid);
        std::fs::remove_file(&ready).unwrap();
    });
    if run_case("hostile", &["long_work"], Expect::default()).is_some() {
        outside.join().unwrap();
    }
}

#[test]
fn stopped_and_continued() {
    meanwhile(|pid| {
        for pause in [1, 5, 30, 100, 3, 20] {
            sys::kill(pid, libc::SIGSTOP);
            eventually("it stops", || common::state(pid as u32) == Some('T'));
            std::thread::sleep(Duration::from_millis(pause));
            sys::kill(pid, libc::SIGCONT);
            std::thread::sleep(Duration::from_millis(pause));
        }
    });
}

#[test]
fn a_debugger_attaches_and_detaches() {
    if common::without_program("a_debugger_attaches_and_detaches", "gdb") {
        return;
    }
    meanwhile(|pid| {
        for _ in 0..2 {
            let out = Command::new("gdb")
                .args(["-nx", "-batch", "-ex", "bt 1", "-p", &pid.to_string()])
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&out.stdout);
            assert!(text.contains("#0"), "gdb: {out:?}");
        }
    });
}

#[test]
fn every_descriptor_closed() {
    case("close_everything");
}

#[test]
fn a_child_closes_every_descriptor() {
    case("closing_child");
}

#[test]
fn killed_by_a_filter_for_madvise() {
    case("filtered");
}

#[test]
fn a_filtered_child() {
    case("filtered_child");
}

#[test]
fn another_user() {
    case("other_user");
}

#[test]
fn a_title_over_the_environment() {
    case("title");
}

#[test]
fn address_space_limited() {
    case("limited");
}

#[test]
fn a_child_of_a_filtered_program() {
    case("child_of_filtered");
}

#[test]
fn all_locked() {
    case("lock_all");
}

#[test]
fn all_to_come_locked() {
    case("lock_future");
}

#[test]
fn more_that_cannot_be_managed_than_may_stay() {
    let expect = Expect {
        status: 1,
        ended: true,
        ..Expect::default()
    };
    if let Some(outcome) = run_case("hostile", &["crowd"], expect) {
        assert!(
            outcome.errors.contains("give --local more than that"),
            "{}",
            outcome.errors
        );
    }
}

#[test]
fn stopped_at_every_stage() {
    run_registered("stopped", "stopped");
}

#[test]
fn in_the_background_at_every_stage() {
    run_registered("stopped", "job_control");
}

#[test]
fn debugged_at_every_stage() {
    run_registered("stopped", "traced");
}
