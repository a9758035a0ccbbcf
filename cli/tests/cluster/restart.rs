//! An agent that is killed and started again under programs that run: nothing lost, nothing zeroed, nobody ended.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use super::common::cluster::{Cluster, PATIENCE, PYTHON, USER, as_user, wait};
use super::common::programs_in_c::compiled;
use super::common::{
    alone, copy_program, eventually, eventually_within, patience, without_program,
};
use super::{LOCAL, PIECES, cannot_run, replicas};

/// How often the agent is killed under each set of programs.
const KILLS: u32 = 20;
/// The longest life of an agent between two kills, milliseconds: most of taking over falls into the shortest ones.
const LONGEST_LIFE: u64 = 1200;
/// How long calls are drawn by lot.
const CALLS_SECONDS: &str = "15";
/// How often under a program with copies, for each time that it changes its data; and at which of these a node is killed too.
const KILLS_IN_A_TURN: u32 = 3;
const LOSING_TURN: usize = 3;

/// Numbers by lot, from a seed that is told.
struct Lot(u64);

impl Lot {
    fn new(test: &str) -> Self {
        let drawn = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
        let given = std::env::var("FARPAGE_SEED").ok();
        let seed = given.and_then(|seed| seed.parse().ok()).unwrap_or(drawn);
        println!("{test}: FARPAGE_SEED={seed}");
        Self(seed | 1)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// A program of `bench/c` where the unprivileged user can run it.
fn program(cluster: &Cluster, name: &str) -> PathBuf {
    let copy = cluster.path(name);
    copy_program(&compiled(name), &copy);
    copy
}

fn start(cluster: &Cluster, local: &str, summary: &str, words: &[&str]) -> Child {
    let mut command = cluster.run_command(local, summary);
    command.arg("--").args(words);
    let log = std::fs::File::create(cluster.path(&format!("{summary}.log"))).unwrap();
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

fn ended_well(cluster: &Cluster, mut child: Child, summary: &str) {
    let status = wait(&mut child, summary);
    let log = std::fs::read_to_string(cluster.path(&format!("{summary}.log"))).unwrap();
    assert!(status.success(), "{summary}: {status}: {log}");
    let account = cluster.summary(summary);
    assert_eq!(account["far_slots_in_use_at_exit"], 0, "{account}");
    assert_eq!(account["pages_poisoned"], 0, "{account}");
}

/// Kills the agent and starts the next one, at moments by lot, until it was done often enough.
fn kill_and_restart(cluster: &mut Cluster, lot: &mut Lot) {
    for _ in 0..KILLS {
        std::thread::sleep(Duration::from_millis(lot.below(LONGEST_LIFE)));
        cluster.agent.as_mut().unwrap().kill();
        std::thread::sleep(Duration::from_millis(lot.below(200)));
        cluster.start_agent(&[]);
    }
}

/// The same at most as often, until a program ends.
fn kill_while_it_runs(cluster: &mut Cluster, lot: &mut Lot, program: &mut Child) {
    let mut kills = 0;
    while program.try_wait().unwrap().is_none() && kills < KILLS {
        std::thread::sleep(Duration::from_millis(lot.below(LONGEST_LIFE)));
        cluster.agent.as_mut().unwrap().kill();
        cluster.start_agent(&[]);
        kills += 1;
    }
    println!("killed {kills} times");
    assert!(kills > 0);
}

fn descriptors(cluster: &Cluster) -> usize {
    let pid = cluster.agent.as_ref().unwrap().child.id();
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count()
}

#[test]
fn programs_outlive_agents_that_are_killed() {
    if cannot_run("programs_outlive_agents_that_are_killed") {
        return;
    }
    let _alone = alone();
    let mut lot = Lot::new("programs_outlive_agents_that_are_killed");
    let mut cluster = Cluster::start("tcp", &["256M", "256M"]);
    let at_first = descriptors(&cluster);
    let sizes = [PIECES, PIECES / 2];
    let native = sizes.map(|pieces| cluster.run_native(pieces).complete(1));
    let names = ["first", "second"];
    let mut programs: Vec<_> = sizes
        .iter()
        .zip(names)
        .map(|(pieces, name)| cluster.run_program(LOCAL, *pieces, name))
        .collect();
    for program in &mut programs {
        program.built();
    }
    for _ in 0..2 {
        for program in &mut programs {
            program.ask();
        }
        kill_and_restart(&mut cluster, &mut lot);
        for (program, native) in programs.iter_mut().zip(&native) {
            let hash = program.line_within(patience(PATIENCE));
            assert_eq!(hash.as_ref(), Some(&native[0]));
            assert_eq!(program.check(), native[0]);
        }
    }
    for (program, name) in programs.into_iter().zip(names) {
        let (status, errors) = program.end();
        assert!(status.success(), "{status}: {errors}");
        assert_eq!(cluster.summary(name)["far_slots_in_use_at_exit"], 0);
    }
    eventually("no descriptor of a program's is left", || {
        descriptors(&cluster) <= at_first + 8
    });
    cluster.stop();
}

#[test]
fn forking_programs_outlive_agents_that_are_killed() {
    if cannot_run("forking_programs_outlive_agents_that_are_killed")
        || without_program("forking_programs_outlive_agents_that_are_killed", "cc")
    {
        return;
    }
    let _alone = alone();
    let mut lot = Lot::new("forking_programs_outlive_agents_that_are_killed");
    let mut cluster = Cluster::start("tcp", &["256M", "256M"]);
    let tree = program(&cluster, "fork_tree").display().to_string();
    let seed = lot.below(1000).to_string();
    let words = [tree.as_str(), "verify", "short", &seed];
    let mut forking = start(&cluster, "16M", "tree", &words);
    kill_while_it_runs(&mut cluster, &mut lot, &mut forking);
    ended_well(&cluster, forking, "tree");
    cluster.stop();
}

/// Mappings come, go, move, lose and regain permissions, and processes fork, against a model. Much of that memory cannot be moved
/// out, so that agents are killed while pages are dropped too: each such kill once ended a program.
#[test]
fn memory_calls_by_lot_outlive_agents_that_are_killed() {
    if cannot_run("memory_calls_by_lot_outlive_agents_that_are_killed")
        || without_program("memory_calls_by_lot_outlive_agents_that_are_killed", "cc")
    {
        return;
    }
    let _alone = alone();
    let mut lot = Lot::new("memory_calls_by_lot_outlive_agents_that_are_killed");
    let mut cluster = Cluster::start("tcp", &["256M", "256M"]);
    let calls = program(&cluster, "random_calls").display().to_string();
    let seed = lot.below(1000).to_string();
    let words = [calls.as_str(), "run", CALLS_SECONDS, &seed];
    let mut calling = start(&cluster, "16M", "calls", &words);
    kill_while_it_runs(&mut cluster, &mut lot, &mut calling);
    ended_well(&cluster, calling, "calls");
    cluster.stop();
}

/// Each page on two of three nodes, in a program that changes its data and forks. A node is killed while there is no agent.
#[test]
fn copies_outlive_agents_that_are_killed() {
    if cannot_run("copies_outlive_agents_that_are_killed") {
        return;
    }
    let _alone = alone();
    let mut lot = Lot::new("copies_outlive_agents_that_are_killed");
    let mut cluster = Cluster::start("tcp", &["128M", "128M", "128M"]);
    let native = replicas::expected(&cluster);
    let mut program = replicas::changing(&cluster, "2", "summary");
    program.built();
    for (turn, native) in native.iter().enumerate() {
        program.ask();
        for kill in 0..KILLS_IN_A_TURN {
            std::thread::sleep(Duration::from_millis(lot.below(LONGEST_LIFE)));
            cluster.agent.as_mut().unwrap().kill();
            if (turn, kill) == (LOSING_TURN, 0) {
                cluster.nodes[1].kill();
            }
            cluster.start_agent(&[]);
        }
        assert_eq!(
            program.line_within(patience(PATIENCE)).as_ref(),
            Some(native)
        );
        if turn == LOSING_TURN {
            // Of what was on the killed node another copy is made, by whichever agent.
            eventually_within(replicas::COPIED, "each extent has two copies again", || {
                replicas::has_all_copies(&cluster)
            });
        }
    }
    replicas::ends_well(&cluster, program, "summary");
    cluster.nodes.remove(1);
    cluster.stop();
}

#[test]
fn without_a_next_agent_programs_end_at_the_deadline() {
    if cannot_run("without_a_next_agent_programs_end_at_the_deadline") {
        return;
    }
    let _alone = alone();
    let mut cluster = Cluster::start("tcp", &["64M"]);
    cluster.agent.as_mut().unwrap().stop();
    cluster.start_agent(&["--takeover-deadline", "2"]);
    let mut program = cluster.run_program(LOCAL, PIECES, "summary");
    program.built();
    program.check();
    let keeper = cluster.path("agent.sock.keeper");
    assert!(!keeper.exists());
    cluster.agent.as_mut().unwrap().kill();
    eventually("the keeper waits", || keeper.exists());

    // Nobody but the agent's own user takes over.
    let mut stranger = Command::new(PYTHON);
    stranger.args([
        "-c",
        "import socket, sys\ns = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\ns.connect(sys.argv[1])",
    ]);
    stranger.arg(&keeper);
    as_user(&mut stranger, &[USER]);
    let out = stranger.output().unwrap();
    assert!(!out.status.success(), "{out:?}");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        said.contains("PermissionError") || !keeper.exists(),
        "{said}"
    );

    let (status, errors) = program.end();
    assert_eq!(status.signal(), Some(libc::SIGKILL), "{status}: {errors}");
    eventually("the keeper has ended", || !keeper.exists());
    cluster.agent = None;
    for node in &mut cluster.nodes {
        node.stop();
    }
    cluster.coordinator.as_mut().unwrap().stop();
    cluster.assert_nothing_runs();
}

#[test]
fn a_second_agent_is_refused_while_the_first_lives() {
    if cannot_run("a_second_agent_is_refused_while_the_first_lives") {
        return;
    }
    let _alone = alone();
    let mut cluster = Cluster::start("tcp", &["64M"]);
    let mut program = cluster.run_program(LOCAL, PIECES, "summary");
    program.built();
    let hash = program.check();
    let words = cluster.agent_arguments();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (status, log) = cluster.refused(&words);
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("another agent listens"), "{log}");
    assert_eq!(program.check(), hash);
    assert!(program.end().0.success());
    cluster.stop();
}
