//! What is missing, full, lost, silent or killed costs those who need it, and nobody else.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::{Duration, Instant};

use farpage_bench::conformance::programs::{Size, compile};

use super::common::cluster::{BUILD_AND_CHECK, Cluster, PATIENCE, PYTHON, Program};
use super::common::programs_in_c::SLACK_BYTES;
use super::common::{alone, eventually, marked, patience, sys, without_program};
use super::{LOCAL, PIECES, SMALL, cannot_run, granted};

/// A race that ends as it should more often than not is run so often.
const TRIES: usize = 12;

#[test]
fn an_agent_without_a_coordinator_says_so_and_leaves_nothing() {
    if cannot_run("an_agent_without_a_coordinator_says_so_and_leaves_nothing") {
        return;
    }
    let mut cluster = Cluster::empty();
    cluster.url = "http://127.0.0.1:1".to_owned();
    let words = cluster.agent_arguments();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (status, log) = cluster.refused(&words);
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(
        log.contains("cannot reach http://127.0.0.1:1") && log.contains("check that it runs"),
        "{log}"
    );
    assert!(!cluster.socket().exists());

    let mut status = cluster.farpage();
    status.args(["status", "--coordinator", &cluster.url]);
    let out = status.output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&out.stderr).contains("cannot reach"),
        "{out:?}"
    );
}

#[test]
fn programs_run_on_without_the_coordinator_and_with_the_next_one() {
    if cannot_run("programs_run_on_without_the_coordinator_and_with_the_next_one") {
        return;
    }
    let _alone = alone();
    let mut cluster = Cluster::start("tcp", &["128M", "128M"]);
    let mut program = cluster.run_program(LOCAL, PIECES, "summary");
    program.built();
    let hash = program.check();
    cluster.coordinator.as_mut().unwrap().kill();
    assert_eq!(program.check(), hash);
    assert!(cluster.agent_runs());

    // The state file knows the nodes and the lease; another program gets its share of what is left.
    cluster.start_coordinator();
    eventually("the nodes are known again", || {
        let status = cluster.status();
        status["nodes"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|node| node["health"] == "live")
            .count()
            == 2
    });
    let second = cluster.run_program(LOCAL, PIECES, "summary2").complete(1);
    assert_eq!(second[0], hash);
    assert_eq!(program.check(), hash);
    let (status, errors) = program.end();
    assert!(status.success(), "{status}: {errors}");
    assert_eq!(cluster.summary("summary")["far_slots_in_use_at_exit"], 0);
    cluster.stop();
}

#[test]
fn full_nodes_end_what_does_not_fit_and_nothing_else() {
    if cannot_run("full_nodes_end_what_does_not_fit_and_nothing_else") {
        return;
    }
    let _alone = alone();
    // Less than either program needs beside its 24M here. The first stays within it, the second does not.
    let mut cluster = Cluster::start("tcp", &["16M", "16M"]);
    let native = cluster.run_native(PIECES).complete(1);
    let mut fits = cluster.run_program("24M", PIECES, "fits");
    fits.built();
    assert_eq!(fits.check(), native[0]);

    let began = Instant::now();
    let too_large = cluster.run_program("24M", 4 * PIECES, "too_large");
    let (status, errors) = too_large.end();
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}: {errors}");
    assert!(began.elapsed() < PATIENCE);
    assert!(errors.contains("far memory is full"), "{errors}");

    assert_eq!(fits.check(), native[0]);
    assert!(fits.end().0.success());
    assert!(cluster.agent_runs());
    assert_eq!(cluster.summary("fits")["far_slots_in_use_at_exit"], 0);
    let logs = cluster.stop();
    assert!(logs[0].contains("far memory is full"), "{}", logs[0]);
}

#[test]
fn a_lost_node_ends_who_needs_its_pages_and_nobody_else() {
    if cannot_run("a_lost_node_ends_who_needs_its_pages_and_nobody_else") {
        return;
    }
    let _alone = alone();
    let mut cluster = Cluster::start("tcp", &["128M", "128M"]);
    let native = cluster.run_native(PIECES).complete(1);
    let mut small = cluster.run_program(LOCAL, SMALL, "small");
    small.built();
    let hash_of_small = small.check();
    let mut loser = cluster.run_program(LOCAL, PIECES, "loser");
    loser.built();
    assert_eq!(loser.check(), native[0]);
    assert!(granted(&cluster, 1) > 0);

    cluster.nodes[1].kill();
    // Its pages may come back: the program waits for them.
    loser.ask();
    assert_eq!(loser.line_within(Duration::from_secs(1)), None);
    eventually("the node counts as unreachable", || {
        cluster.status()["nodes"][1]["health"] == "unreachable"
    });
    assert!(cluster.status_text().contains("unreachable"));
    // Whoever comes now gets the other node's memory.
    assert_eq!(
        cluster.run_program(LOCAL, PIECES, "newcomer").complete(2),
        [native[0].clone(), native[0].clone()]
    );
    assert!(loser.child.try_wait().unwrap().is_none());

    // It comes back empty: now the pages are lost, and only now.
    cluster.start_node("n1", "128M", "tcp");
    let (status, errors) = loser.end();
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}: {errors}");
    assert!(errors.contains("its memory node has lost it"), "{errors}");
    assert_eq!(small.check(), hash_of_small);
    assert!(small.end().0.success());
    assert_eq!(
        cluster.run_program(LOCAL, PIECES, "later").complete(1),
        native
    );
    for summary in ["small", "loser", "newcomer", "later"] {
        assert_eq!(
            cluster.summary(summary)["far_slots_in_use_at_exit"],
            0,
            "{summary}"
        );
    }
    cluster.nodes.remove(1);
    cluster.stop();
}

#[test]
fn a_silent_node_ends_faults_at_their_deadline_and_not_before() {
    if cannot_run("a_silent_node_ends_faults_at_their_deadline_and_not_before") {
        return;
    }
    let _alone = alone();
    let mut cluster = Cluster::start("tcp", &["128M"]);
    let native = cluster.run_native(PIECES).complete(1);
    let mut patient = cluster.run_program(LOCAL, PIECES, "patient");
    let mut hasty = cluster.run_program_with(&["--fault-deadline", "2"], LOCAL, PIECES, "hasty");
    patient.built();
    hasty.built();
    assert_eq!(
        (patient.check(), hasty.check()),
        (native[0].clone(), native[0].clone())
    );

    let node = cluster.nodes[0].child.id() as i32;
    sys::kill(node, libc::SIGSTOP);
    let began = Instant::now();
    patient.ask();
    hasty.ask();
    let (status, errors) = hasty.end();
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}: {errors}");
    assert!(
        began.elapsed() >= Duration::from_secs(2),
        "{:?}",
        began.elapsed()
    );
    assert!(errors.contains("--fault-deadline"), "{errors}");
    assert_eq!(patient.line_within(Duration::from_millis(1)), None);
    sys::kill(node, libc::SIGCONT);
    assert_eq!(patient.line_within(PATIENCE), Some(native[0].clone()));
    assert_eq!(patient.check(), native[0]);
    assert!(patient.end().0.success());
    for summary in ["patient", "hasty"] {
        assert_eq!(
            cluster.summary(summary)["far_slots_in_use_at_exit"],
            0,
            "{summary}"
        );
    }
    assert!(cluster.agent_runs());
    cluster.stop();
}

/// What a fault waits for it waits for while somebody could bring it: not while its agent stood still.
#[test]
fn a_fault_does_not_end_for_the_time_that_its_agent_stood_still() {
    if cannot_run("a_fault_does_not_end_for_the_time_that_its_agent_stood_still") {
        return;
    }
    let _alone = alone();
    let cluster = Cluster::start("tcp", &["128M"]);
    let native = cluster.run_native(PIECES).complete(1);
    let mut program =
        cluster.run_program_with(&["--fault-deadline", "4"], LOCAL, PIECES, "summary");
    program.built();
    assert_eq!(program.check(), native[0]);

    let node = cluster.nodes[0].child.id() as i32;
    let agent = cluster.agent.as_ref().unwrap().child.id() as i32;
    sys::kill(node, libc::SIGSTOP);
    program.ask();
    assert_eq!(program.line_within(Duration::from_secs(1)), None);
    sys::kill(agent, libc::SIGSTOP);
    std::thread::sleep(Duration::from_secs(5));
    sys::kill(agent, libc::SIGCONT);
    // It is past the deadline, and has to be found so or not, before the node can answer.
    std::thread::sleep(Duration::from_millis(500));
    sys::kill(node, libc::SIGCONT);
    assert_eq!(program.line_within(PATIENCE), Some(native[0].clone()));
    assert!(program.end().0.success());
    assert_eq!(cluster.summary("summary")["far_slots_in_use_at_exit"], 0);
    cluster.stop();
}

/// The processes that have far pages.
fn with_far_pages(cluster: &Cluster) -> Vec<u64> {
    let status = cluster.status();
    let processes = status["agents"][0]["processes"].as_array().unwrap();
    processes
        .iter()
        .filter(|process| process["far_pages"].as_u64() > Some(0))
        .filter_map(|process| process["pid"].as_u64())
        .collect()
}

/// Pages on their way out have nowhere to go, and a fork waits for them: as long as a fault would, not shorter, not longer.
/// Mostly it waits itself, so that it leaves the machine to other tests.
#[test]
fn forks_beside_a_silent_node_wait_for_it_as_faults_do() {
    let test = "forks_beside_a_silent_node_wait_for_it_as_faults_do";
    if cannot_run(test) || without_program(test, "cc") {
        return;
    }
    let cluster = Cluster::start("tcp", &["256M"]);
    let path = compile("outage_alone", Size::Whole, cluster.folder()).unwrap();
    let native = Program::start(Command::new(&path)).complete(1);
    let node = cluster.nodes[0].child.id() as i32;
    let start_and_stop_the_node = |name: &str, deadline: &str| {
        let known = with_far_pages(&cluster);
        let mut command = cluster.run_command(LOCAL, name);
        command
            .args(["--fault-deadline", deadline, "--"])
            .arg(&path)
            .arg("forks");
        let program = Program::start(command);
        eventually("some of it is far", || {
            with_far_pages(&cluster)
                .iter()
                .any(|pid| !known.contains(pid))
        });
        sys::kill(node, libc::SIGSTOP);
        program
    };

    let mut patient = start_and_stop_the_node("patient", "120");
    // Longer than any deadline but its own.
    assert_eq!(
        patient.line_within(Duration::from_secs(32)),
        None,
        "it was built"
    );
    sys::kill(node, libc::SIGCONT);
    patient.built();
    assert_eq!(patient.check(), native[0]);

    let hasty = start_and_stop_the_node("hasty", "2");
    let (status, errors) = hasty.end();
    // Its fork is what waits, unless a touch of its own, or of its child, began to wait before.
    assert!(!status.success(), "{status}: {errors}");
    assert!(errors.contains("--fault-deadline"), "{errors}");
    let killed = status.signal() == Some(libc::SIGKILL);
    assert!(!killed || errors.contains("a fork or a move"), "{errors}");
    sys::kill(node, libc::SIGCONT);
    assert_eq!(patient.check(), native[0]);
    let (status, errors) = patient.end();
    assert!(status.success(), "{status}: {errors}");
    for name in ["patient", "hasty"] {
        assert_eq!(cluster.summary(name)["far_slots_in_use_at_exit"], 0);
    }
    cluster.stop();
}

/// A fork that has waited for its pages in vain ends its program; in the child they are pages that cannot be had, not zeros.
/// It may be a touch that ends the program before it forks: then it is tried again.
#[test]
fn pages_that_a_fork_gave_up_are_lost_to_its_child() {
    let test = "pages_that_a_fork_gave_up_are_lost_to_its_child";
    if cannot_run(test) || without_program(test, "cc") {
        return;
    }
    let cluster = Cluster::start("tcp", &["256M"]);
    let path = compile("outage_heir", Size::Whole, cluster.folder()).unwrap();
    let node = cluster.nodes[0].child.id() as i32;
    let orphaned = (0..TRIES).find_map(|_| {
        let mut command = cluster.run_command(LOCAL, "heir");
        command.args(["--fault-deadline", "2", "--"]).arg(&path);
        let mut program = Program::start(command);
        program.built();
        sys::kill(node, libc::SIGSTOP);
        program.ask();
        let alone = program.line_within(patience(Duration::from_secs(10)));
        sys::kill(node, libc::SIGCONT);
        alone.map(|_| program)
    });
    let mut program = orphaned.expect("a fork that gives up");
    let pages = program.check();
    assert!(pages.ends_with(" wrong 0"), "{pages}");
    assert!(!pages.contains(" lost 0 "), "{pages}");
    let (status, errors) = program.end();
    assert_eq!(status.signal(), Some(libc::SIGKILL), "{errors}");
    assert!(errors.contains("a fork or a move"), "{errors}");
    eventually("nothing of it is left", || {
        with_far_pages(&cluster).is_empty()
    });
    cluster.stop();
}

/// What is written has nowhere to go: staging fills, and then there is no room for more here.
#[test]
fn a_silent_node_keeps_writers_within_their_limit_until_their_deadline() {
    if cannot_run("a_silent_node_keeps_writers_within_their_limit_until_their_deadline") {
        return;
    }
    let _alone = alone();
    let cluster = Cluster::start("tcp", &["512M"]);
    // Its list is as long as it will be from the start: one that grows moves memory, which waits for what is on its way out.
    let grows = "data = [source.randbytes(3000) for _ in range(int(sys.argv[1]))]";
    let stays = "data = [None] * int(sys.argv[1])\nfor i in range(len(data)):\n    data[i] = source.randbytes(3000)";
    assert!(BUILD_AND_CHECK.contains(grows));
    let source = BUILD_AND_CHECK.replace(grows, stays);
    std::fs::write(cluster.path("program.py"), source).unwrap();
    let native = cluster.run_native(4 * PIECES).complete(1);
    let node = cluster.nodes[0].child.id() as i32;
    let stopped_once_far = |cluster: &Cluster, before: u64| {
        eventually("some of it is far", || granted(cluster, 0) > before);
        sys::kill(node, libc::SIGSTOP);
    };

    let before = granted(&cluster, 0);
    let mut patient = cluster.run_program(LOCAL, 4 * PIECES, "patient");
    stopped_once_far(&cluster, before);
    assert_eq!(
        patient.line_within(Duration::from_secs(3)),
        None,
        "it was built"
    );
    sys::kill(node, libc::SIGCONT);
    patient.built();
    assert_eq!(patient.check(), native[0]);

    let before = granted(&cluster, 0);
    let mut command = cluster.run_command(LOCAL, "hasty");
    command.args(["--fault-deadline", "2", "--", PYTHON]);
    command
        .arg(cluster.path("program.py"))
        .arg((4 * PIECES).to_string());
    let hasty = Program::start(command);
    stopped_once_far(&cluster, before);
    let began = Instant::now();
    let (status, errors) = hasty.end();
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}: {errors}");
    assert!(errors.contains("--fault-deadline"), "{errors}");
    assert!(began.elapsed() < PATIENCE);
    sys::kill(node, libc::SIGCONT);

    assert_eq!(patient.check(), native[0]);
    assert!(patient.end().0.success());
    for name in ["patient", "hasty"] {
        let summary = cluster.summary(name);
        assert_eq!(summary["far_slots_in_use_at_exit"], 0, "{name}");
        let bytes = |key: &str| summary[key].as_u64().unwrap();
        let over = bytes("local_peak_bytes").saturating_sub(bytes("local_limit_bytes"));
        assert!(over <= SLACK_BYTES, "{name}: {summary}");
    }
    cluster.stop();
}

#[test]
fn a_killed_agent_takes_its_programs_with_it_but_nothing_else() {
    if cannot_run("a_killed_agent_takes_its_programs_with_it_but_nothing_else") {
        return;
    }
    let _alone = alone();
    let mut cluster = Cluster::start("tcp", &["64M"]);
    let mut program = cluster.run_program(LOCAL, PIECES, "summary");
    program.built();
    let hash = program.check();
    cluster.agent.as_mut().unwrap().kill();
    program.ask();
    // Never another hash: the right one at most, if all of its way was at home.
    let line = program.line_within(Duration::from_secs(20));
    assert!(line.is_none() || line.as_ref() == Some(&hash), "{line:?}");
    let (status, errors) = program.end();
    assert_eq!(status.signal(), Some(libc::SIGKILL), "{status}: {errors}");
    assert!(errors.contains("agent"), "{errors}");

    // The next agent takes the socket over, although the file of the last one is still there.
    cluster.start_agent(&[]);
    assert_eq!(
        cluster.run_program(LOCAL, PIECES, "again").complete(1),
        [hash]
    );
    cluster.stop();
}

#[test]
fn a_killed_launcher_takes_its_programs_with_it() {
    if cannot_run("a_killed_launcher_takes_its_programs_with_it") {
        return;
    }
    let _alone = alone();
    let cluster = Cluster::start("tcp", &["64M"]);
    let mut program = cluster.run_program(LOCAL, PIECES, "summary");
    program.built();
    program.check();
    let mark = cluster.path("program.py").display().to_string();
    assert!(!marked(&mark).is_empty());
    program.child.kill().unwrap();
    eventually("the program is ended", || marked(&mark).is_empty());
    eventually("its far memory is given back", || {
        // What is kept for the next program: four extents of 16 MiB, and two that a request may add.
        cluster.status()["agents"][0]["processes"]
            .as_array()
            .unwrap()
            .is_empty()
    });
    drop(program);
    cluster.stop();
}
