//! Programs in a memory cgroup that allows less than `--local`: they run within it, and the kernel ends nobody.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::Duration;

use common::cgroup::MemoryCgroup;
use common::cluster::{Cluster, GROUP, PATIENCE, PYTHON, Program, as_user};
use common::programs_in_c::{Expect, compiled, run_words};
use common::{
    alone, eventually, farpage, patience, skip, status_field, sys, without_far_memory,
    without_program,
};

const MIB: u64 = 1 << 20;
/// 90 MB of data, in a program of some 100 MB.
const PIECES: u32 = 30_000;

/// A group with this limit; none, said so, where there can be none, or nothing could be run in it.
fn group(test: &str, limit_bytes: u64) -> Option<MemoryCgroup> {
    if !sys::is_root() {
        skip(test, "making a memory cgroup needs root");
        return None;
    }
    if without_far_memory(test) || without_program(test, "python3") {
        return None;
    }
    MemoryCgroup::create(test, limit_bytes)
        .map_err(|reason| skip(test, &reason))
        .ok()
}

/// The program of the unprivileged user's, begun in the group; agent and memory nodes are outside of it.
fn begin(cluster: &Cluster, group: &MemoryCgroup, local: &str, pieces: u32) -> Program {
    let mut command = cluster.run_command(local, "summary");
    command
        .args(["--", PYTHON])
        .arg(cluster.path("program.py"))
        .arg(pieces.to_string());
    group.contain(&mut command);
    Program::start(command)
}

#[test]
fn a_program_stays_below_a_limit_that_is_below_local() {
    let test = "a_program_stays_below_a_limit_that_is_below_local";
    let Some(group) = group(test, 64 * MIB) else {
        return;
    };
    let _alone = alone();
    let cluster = Cluster::start("tcp", &["128M", "128M"]);
    let native = cluster.run_native(PIECES).complete(1);
    let mut program = begin(&cluster, &group, "200M", PIECES);
    program.built();
    assert_eq!(program.check(), native[0]);
    assert_eq!(program.check(), native[0]);
    let (status, errors) = program.end();
    let (peak, met) = group.peak();
    println!(
        "{test}: {} MiB charged at most, the limit met {met} times",
        peak >> 20
    );
    assert!(status.success(), "{status}: {errors}");
    assert_eq!(group.kills(), 0);
    let shown = group.folder.display().to_string();
    for word in ["--local 200M is lowered to", "limited to 64.0 MiB", &shown] {
        assert!(errors.contains(word), "{word} is not in: {errors}");
    }
    let summary = cluster.summary("summary");
    let limit = summary["local_limit_bytes"].as_u64().unwrap();
    assert!((20 * MIB..44 * MIB).contains(&limit), "{summary}");
    assert_eq!(summary["far_slots_in_use_at_exit"], 0, "{summary}");
    cluster.stop();
}

#[test]
fn a_limit_that_changes_is_followed() {
    let test = "a_limit_that_changes_is_followed";
    let Some(group) = group(test, 512 * MIB) else {
        return;
    };
    let _alone = alone();
    let cluster = Cluster::start("tcp", &["128M"]);
    let mut program = begin(&cluster, &group, "200M", PIECES);
    program.built();
    let hash = program.check();
    let shown = || cluster.status()["agents"][0]["processes"][0].clone();
    eventually("it is allowed --local", || {
        shown()["local_limit_bytes"] == 200 * MIB
    });
    let pid = shown()["pid"].as_u64().unwrap() as u32;
    let resident = || {
        let field = status_field(pid, "RssAnon").unwrap();
        field.trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    };
    let before = resident();
    assert!(before > 90 * MIB, "{before}");

    // Not far above what is there: below that the kernel does not let the limit go.
    group.set_limit(before + 10 * MIB);
    eventually("what it is allowed falls", || {
        shown()["local_limit_bytes"].as_u64() < Some(before)
    });
    let allowed = shown()["local_limit_bytes"].as_u64().unwrap();
    eventually("it keeps to that", || resident() <= allowed);
    assert_eq!(program.check(), hash);
    assert!(resident() <= allowed + 16 * MIB);

    group.set_limit(512 * MIB);
    eventually("it is allowed --local again", || {
        shown()["local_limit_bytes"] == 200 * MIB
    });
    assert_eq!(program.check(), hash);
    assert!(program.end().0.success());
    assert_eq!(group.kills(), 0);
    cluster.stop();
}

/// Another in its group fills that to the limit at full speed, while the program's pages come home. The kernel ends the one whose
/// score says so, which is not the program, and nobody else; no page is lost or waits for ever.
#[test]
fn pages_come_home_while_another_meets_the_limit() {
    let test = "pages_come_home_while_another_meets_the_limit";
    let Some(group) = group(test, 128 * MIB) else {
        return;
    };
    let _alone = alone();
    let cluster = Cluster::start("tcp", &["128M"]);
    let mut program = begin(&cluster, &group, "64M", PIECES);
    program.built();
    let hash = program.check();
    let script = "open('/proc/self/oom_score_adj', 'w').write('1000')\n\
        held = []\n\
        while True: held.append(bytearray(b'x') * (1 << 20))";
    let mut command = Command::new(PYTHON);
    command.args(["-I", "-c", script]);
    group.contain(&mut command);
    let mut filler = command.spawn().unwrap();
    let (mut checks, mut ended) = (0, None);
    while ended.is_none() && checks < 100 {
        assert_eq!(program.check(), hash);
        checks += 1;
        ended = filler.try_wait().unwrap();
    }
    let _ = filler.kill();
    let status = filler.wait().unwrap();
    println!(
        "{test}: {checks} checks, {:?} charged and met, {} ended, {status}",
        group.peak(),
        group.kills()
    );
    assert_eq!(
        ended.and_then(|status| status.signal()),
        Some(libc::SIGKILL)
    );
    assert!(group.peak().1 > 0, "the limit was not met");
    assert_eq!(group.kills(), 1);
    assert_eq!(program.check(), hash);
    let (status, errors) = program.end();
    assert!(status.success(), "{status}: {errors}");
    assert_eq!(cluster.summary("summary")["pages_poisoned"], 0);
    cluster.stop();
}

/// Fills the group it is in as far as that goes, with memory that cannot leave.
fn filler(group: &MemoryCgroup) -> Program {
    let script = "held = []\nwhile True: held.append(bytearray(b'x') * (1 << 20))";
    let mut command = Command::new(PYTHON);
    command.args(["-I", "-c", script]);
    group.contain(&mut command);
    let filler = Program::start(command);
    eventually("the group is full", || group.is_full());
    filler
}

/// Where the kernel ends nobody to make room, it has no frame for what comes home: that waits, until its deadline.
#[test]
fn where_no_frame_is_free_pages_wait_until_their_deadline() {
    let test = "where_no_frame_is_free_pages_wait_until_their_deadline";
    let Some(group) = group(test, 128 * MIB) else {
        return;
    };
    if without_program(test, "cc") {
        return;
    }
    if !group.ends_nobody() {
        return skip(test, "version 2 cgroups always end somebody at their limit");
    }
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let summary = folder.path().join("summary");
    // The program alone is in the group, since who waits there answers nobody. It touches nothing new once it is built: that
    // the kernel would wait for.
    let program = compiled("outage_alone");
    let start = |deadline: &str| {
        let mut command = Command::new(farpage());
        command
            .args(["run", "--local", "32M", "--fault-deadline", deadline])
            .args(["--summary", "json", "--summary-file"])
            .arg(&summary)
            .args(["--", "sh", "-c", "echo $$ > \"$1\"; exec \"$2\"", "sh"])
            .arg(group.procs())
            .arg(&program)
            .env_remove("FARPAGE_AGENT");
        Program::start(command)
    };
    let end = |program: Program| {
        let (status, errors) = program.end();
        let text = std::fs::read_to_string(&summary).unwrap();
        let summary: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(summary["far_slots_in_use_at_exit"], 0, "{summary}");
        (status, errors, summary)
    };

    let mut patient = start("60");
    patient.built();
    let hash = patient.check();
    let full = filler(&group);
    patient.ask();
    assert_eq!(patient.line_within(Duration::from_secs(5)), None);
    drop(full);
    assert_eq!(patient.line_within(patience(PATIENCE)), Some(hash.clone()));
    let (status, errors, summary) = end(patient);
    assert!(status.success(), "{status}: {errors}");
    assert_eq!(summary["pages_poisoned"], 0, "{summary}");

    let mut hasty = start("5");
    hasty.built();
    assert_eq!(hasty.check(), hash);
    let full = filler(&group);
    hasty.ask();
    let (status, errors, _) = end(hasty);
    drop(full);
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}: {errors}");
    assert!(errors.contains("had no free memory"), "{errors}");
    assert_eq!(group.kills(), 0);
}

#[test]
fn a_program_that_joins_a_group_of_its_own_is_kept_below_its_limit() {
    let test = "a_program_that_joins_a_group_of_its_own_is_kept_below_its_limit";
    let Some(group) = group(test, 48 * MIB) else {
        return;
    };
    let _alone = alone();
    if without_program(test, "cc") {
        return;
    }
    // As a service manager does it: in the process that then becomes the program.
    let script = "echo $$ > \"$1\"; exec \"$2\" work";
    let program = compiled("hostile");
    let procs = group.procs();
    let words = [
        "sh",
        "-c",
        script,
        "sh",
        procs.to_str().unwrap(),
        program.to_str().unwrap(),
    ];
    let expect = Expect {
        local: 64 * MIB,
        ..Expect::default()
    };
    if let Some(outcome) = run_words(test, &words, expect) {
        let summary = outcome.summary.unwrap();
        assert!(
            summary["local_limit_bytes"].as_u64() <= Some(28 * MIB),
            "{summary}"
        );
        assert!(outcome.seen.peak_bytes < 44 * MIB, "{:?}", outcome.seen);
    }
    assert_eq!(group.kills(), 0);
}

#[test]
fn too_small_a_limit_is_refused() {
    let test = "too_small_a_limit_is_refused";
    let Some(group) = group(test, 20 * MIB) else {
        return;
    };
    let _alone = alone();
    let cluster = Cluster::start("tcp", &["32M"]);
    let mut command = cluster.farpage();
    command
        .args(["run", "--local", "64M", "--agent"])
        .arg(cluster.socket());
    command.args(["--", "touch"]).arg(cluster.path("started"));
    as_user(&mut command, &[GROUP]);
    group.contain(&mut command);
    let out = command.output().unwrap();
    let errors = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{errors}");
    for word in [
        group.folder.to_str().unwrap(),
        "allows 20 MiB",
        "give the group more",
    ] {
        assert!(errors.contains(word), "{word} is not in: {errors}");
    }
    assert!(!cluster.path("started").exists());
    cluster.stop();
}

/// `farpage run` with everything of its own in the group.
fn embedded(group: &MemoryCgroup, flags: &[&str], megabytes: u64) -> Command {
    let program = "import sys\n\
        data = bytearray(int(sys.argv[1]) << 20)\n\
        for at in range(0, len(data), 4096): data[at] = at >> 12 & 255\n\
        assert all(data[at] == at >> 12 & 255 for at in range(0, len(data), 4096))\n\
        print('right')\n";
    let mut command = Command::new(farpage());
    command
        .arg("run")
        .args(flags)
        .args(["--", PYTHON, "-I", "-c", program]);
    command
        .arg(megabytes.to_string())
        .env_remove("FARPAGE_AGENT");
    group.contain(&mut command);
    command
}

#[test]
fn without_an_agent_far_memory_counts_too() {
    let test = "without_an_agent_far_memory_counts_too";
    let Some(group) = group(test, 192 * MIB) else {
        return;
    };
    let _alone = alone();
    for flags in [
        &["--local", "64M", "--far", "192M"][..],
        &["--local", "180M"],
    ] {
        let out = embedded(&group, flags, 1).output().unwrap();
        let errors = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{flags:?}: {errors}");
        for word in [
            group.folder.to_str().unwrap(),
            "limited to 192.0 MiB",
            "--agent SOCKET",
        ] {
            assert!(
                errors.contains(word),
                "{flags:?}: {word} is not in: {errors}"
            );
        }
    }
    // What fits into both together.
    let out = embedded(&group, &["--local", "32M"], 80).output().unwrap();
    let (peak, met) = group.peak();
    println!(
        "{test}: {} MiB charged at most, the limit met {met} times",
        peak >> 20
    );
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{}: {errors}", out.status);
    assert_eq!(out.stdout, b"right\n");
    assert!(!errors.contains("lowered"), "{errors}");
    assert_eq!(group.kills(), 0);
}
