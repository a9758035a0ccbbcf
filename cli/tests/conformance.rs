//! The semantics of anonymous memory, each where it is local, far, in transit and shared after fork; trees of processes; calls
//! drawn by lot. `docs/testing.md` says which case shows what.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::path::Path;
use std::process::Command;

use common::programs_in_c::{compiled, run_registered};
use farpage_bench::conformance::CASES;

/// A case without a test would be run by nobody but `farpage bench conformance`.
#[test]
fn every_case_has_a_test() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut tests = String::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            tests += &std::fs::read_to_string(path).unwrap();
        }
    }
    for case in CASES {
        let calls = [
            format!("case(\"{}\")", case.name),
            format!("run_registered(\"{}\", \"{}\")", case.program, case.name),
        ];
        assert!(
            calls.iter().any(|call| tests.contains(call)),
            "{} {} has no test",
            case.program,
            case.name
        );
    }
}

/// The contract of `farpage bench conformance`: entries, the last line and the exit status.
#[test]
fn the_bench_tells_and_counts() {
    let test = "the_bench_tells_and_counts";
    if common::without_far_memory(test) || common::without_program(test, "cc") {
        return;
    }
    let _alone = common::alone();
    let json = tempfile::NamedTempFile::new().unwrap();
    let bench = |case: &str, path: &str| {
        Command::new(common::farpage())
            .args(["bench", "conformance", "--case", case, "--json"])
            .arg(json.path())
            .env("PATH", path)
            .output()
            .unwrap()
    };
    let told = |out: &std::process::Output| String::from_utf8_lossy(&out.stdout).into_owned();
    let entry = || -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(json.path()).unwrap()).unwrap()
    };

    let out = bench("memory_calls.exit", &std::env::var("PATH").unwrap());
    assert!(out.status.success(), "{out:?}");
    assert!(
        told(&out).ends_with("\n2 passed, 0 failed, 0 skipped\n"),
        "{out:?}"
    );
    assert_eq!(
        entry()["cases"][1]["name"],
        "memory_calls.exit.without_move"
    );
    assert_eq!(entry()["cases"][1]["result"], "pass");

    let out = bench("memory_calls.exit", "/nowhere");
    assert!(out.status.success(), "{out:?}");
    assert!(
        told(&out).ends_with("\n0 passed, 0 failed, 2 skipped\n"),
        "{out:?}"
    );
    let reason = entry()["cases"][0]["reason"].to_string();
    assert!(reason.contains("no C compiler"), "{reason}");

    let out = Command::new(common::farpage())
        .args(["bench", "conformance", "--plain"])
        .args(["--case", "memory_calls.exit"])
        .output()
        .unwrap();
    assert!(
        told(&out).ends_with("\n1 passed, 0 failed, 0 skipped\n"),
        "{out:?}"
    );

    let out = bench("no_such_case", "/nowhere");
    assert!(!out.status.success(), "{out:?}");
}

/// Where there is no device to travel over, every case is told and counted, and nothing has failed.
#[test]
fn without_a_device_every_case_is_skipped() {
    let test = "without_a_device_every_case_is_skipped";
    if std::fs::read_dir("/sys/class/infiniband").is_ok_and(|mut devices| devices.next().is_some())
    {
        return common::skip(test, "this machine has an RDMA device");
    }
    if !cfg!(feature = "verbs") {
        return common::skip(test, "built without RDMA");
    }
    let out = Command::new(common::farpage())
        .args(["bench", "conformance", "--fabric", "rdma"])
        .output()
        .unwrap();
    let cases: usize = CASES
        .iter()
        .filter(|case| !case.long)
        .map(|case| case.forms().len())
        .sum();
    let told = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{out:?}");
    assert!(
        told.ends_with(&format!("\n0 passed, 0 failed, {cases} skipped\n")),
        "{told}"
    );
    let skips = told.lines().filter(|line| line.starts_with("skip  "));
    assert_eq!(skips.count(), cases, "{told}");
}

/// All memory calls by lot, against a model; a failing round is made shorter and told.
#[test]
fn calls_drawn_by_lot() {
    run_registered("random_calls", "run");
}

/// A round that goes wrong in one call, without farpage: that call is what is left of it.
#[test]
fn a_failing_round_is_made_shorter() {
    let test = "a_failing_round_is_made_shorter";
    if common::without_program(test, "cc") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let out = Command::new(compiled("random_calls"))
        .args(["run", "5", "1"])
        .env("RANDOM_CALLS_WRONG", "77")
        .current_dir(folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success(), "{said}");
    assert!(said.contains("with these lines in it: 77\n"), "{said}");
    let kept = std::fs::read_to_string(folder.path().join("random_calls.100000")).unwrap();
    assert_eq!(kept.trim(), "77");
}

#[test]
fn anon_read() {
    run_registered("anon", "read");
}

#[test]
fn anon_read_prot() {
    run_registered("anon", "read_prot");
}

#[test]
fn anon_write() {
    run_registered("anon", "write");
}

#[test]
fn anon_write_prot() {
    run_registered("anon", "write_prot");
}

#[test]
fn anon_write_child() {
    run_registered("anon", "write_child");
}

#[test]
fn anon_write_child_shared() {
    run_registered("anon", "write_child_shared");
}

#[test]
fn anon_write_huge() {
    run_registered("anon", "write_huge");
}

#[test]
fn anon_huge_parts() {
    run_registered("anon", "huge_parts");
}

#[test]
fn anon_files() {
    run_registered("anon", "files");
}

#[test]
fn anon_round_trips() {
    run_registered("anon", "round_trips");
}

#[test]
fn anon_teardown() {
    run_registered("anon", "teardown");
}

#[test]
fn anon_double_map() {
    run_registered("anon", "double_map");
}

#[test]
fn anon_mixed() {
    run_registered("anon", "mixed");
}

#[test]
fn anon_snapshot() {
    run_registered("anon", "snapshot");
}

#[test]
fn anon_cow_far() {
    run_registered("anon", "cow_far");
}

#[test]
fn anon_partial_unmap() {
    run_registered("anon", "partial_unmap");
}

#[test]
fn anon_remap() {
    run_registered("anon", "remap");
}

#[test]
fn anon_unpopulated() {
    run_registered("anon", "unpopulated");
}

#[test]
fn anon_zeros() {
    run_registered("anon", "zeros");
}

#[test]
fn anon_on_fork() {
    run_registered("anon", "on_fork");
}

#[test]
fn anon_advice() {
    run_registered("anon", "advice");
}

#[test]
fn anon_populate() {
    run_registered("anon", "populate");
}

#[test]
fn anon_locked() {
    run_registered("anon", "locked");
}

#[test]
fn anon_address_reuse() {
    run_registered("anon", "address_reuse");
}

#[test]
fn anon_discard_fetch() {
    run_registered("anon", "discard_fetch");
}
