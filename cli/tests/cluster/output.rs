//! Through two nodes, by each fabric between processes: what comes out is what comes out natively.

use std::fmt::Write as _;

use super::common::cluster::{Cluster, PATIENCE};
use super::common::runs::{run, run_native};
use super::common::{alone, eventually, without_program};
use super::{LOCAL, LOCAL_BYTES, PIECES, cannot_run, granted};

fn same_as_native_over(fabric: &str) {
    let cluster = Cluster::start(fabric, &["64M", "64M"]);
    let native = cluster.run_native(PIECES).complete(1);
    let mut program = cluster.run_program(LOCAL, PIECES, "summary");
    program.built();
    assert_eq!(program.check(), native[0]);
    // Both nodes give, since the emptier one is asked first.
    assert!(granted(&cluster, 0) > 0 && granted(&cluster, 1) > 0);
    // A report comes every second.
    let figures = |field: &str| cluster.status()["agents"][0]["processes"][0][field].as_u64();
    eventually("the status shows the process", || {
        figures("far_pages").is_some_and(|n| n > 1000)
    });
    assert_eq!(
        figures("total_pages").unwrap(),
        figures("local_pages").unwrap() + figures("far_pages").unwrap()
    );
    assert_eq!(figures("local_limit_bytes"), Some(LOCAL_BYTES));
    let status = cluster.status();
    assert_eq!(status["agents"][0]["processes"][0]["name"], "python3");
    assert_eq!(status["capacity_bytes"], 128 << 20);
    assert_eq!(status["nodes"][1]["health"], "live");
    let text = cluster.status_text();
    for word in [
        "128.0 MiB lent by 2 nodes",
        "n0",
        "n1",
        "live",
        "python3",
        fabric,
    ] {
        assert!(text.contains(word), "{word} is not in:\n{text}");
    }
    assert_eq!(program.check(), native[0]);
    let (status, errors) = program.end();
    assert!(status.success(), "{status}: {errors}");

    let summary = cluster.summary("summary");
    assert_eq!(summary["far_slots_in_use_at_exit"], 0, "{summary}");
    assert_eq!(summary["fabric"], fabric, "{summary}");
    assert!(
        summary["pages_fetched"].as_u64().unwrap() > 1000,
        "{summary}"
    );
    assert!(
        summary["far_peak_bytes"].as_u64().unwrap() > LOCAL_BYTES,
        "{summary}"
    );
    cluster.stop();
}

#[test]
fn over_tcp_output_is_the_same_as_natively() {
    if cannot_run("over_tcp_output_is_the_same_as_natively") {
        return;
    }
    let _alone = alone();
    same_as_native_over("tcp");
}

/// The program of `cargo xtask demo`, smaller.
#[test]
fn over_tcp_sort_keeps_to_a_quarter_of_its_memory() {
    const TEST: &str = "over_tcp_sort_keeps_to_a_quarter_of_its_memory";
    if cannot_run(TEST) || without_program(TEST, "sort") {
        return;
    }
    let _alone = alone();
    let cluster = Cluster::start("tcp", &["128M", "128M"]);
    let mut text = String::new();
    let mut key = 0x9e37_79b9_7f4a_7c15_u64;
    for line in 0..100_000 {
        key = key
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        writeln!(text, "{key:016x}{line:0900}").unwrap();
    }
    std::fs::write(cluster.path("lines"), text).unwrap();
    let words = ["sort", "--parallel=1", "-S", "1G", "lines"];
    let native = run_native(&words, cluster.folder(), PATIENCE);
    assert!(native.status.success(), "{}", native.errors);

    let limit = native.seen.peak_bytes / 4;
    let mut command = cluster.run_command(&limit.to_string(), "sorted");
    command.arg("--").args(words);
    let far = run(
        command,
        &cluster.path("farpage"),
        cluster.folder(),
        2 * PATIENCE,
    );
    let summary = cluster.summary("sorted");
    println!(
        "{TEST}: native {:?}, {} MiB; far {:?}, {} KiB above the limit",
        native.elapsed,
        native.seen.peak_bytes >> 20,
        far.elapsed,
        far.seen.peak_bytes as i64 / 1024 - limit as i64 / 1024
    );
    assert!(far.status.success(), "{}", far.errors);
    assert_eq!(far.output, native.output);
    assert!(
        far.seen.peak_bytes <= limit + (16 << 20),
        "{:?} of {limit}: {summary}",
        far.seen
    );
    assert_eq!(summary["far_slots_in_use_at_exit"], 0, "{summary}");
    assert!(
        summary["far_peak_bytes"].as_u64().unwrap() > limit,
        "{summary}"
    );
    assert!(granted(&cluster, 0) > 0 && granted(&cluster, 1) > 0);
    cluster.stop();
}

#[test]
fn over_shm_between_processes_output_is_the_same_as_natively() {
    if cannot_run("over_shm_between_processes_output_is_the_same_as_natively") {
        return;
    }
    let _alone = alone();
    same_as_native_over("shm");
}
