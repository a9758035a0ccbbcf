//! Programs whose pages lie on another machine, by RDMA: alike with what runs natively; and what becomes of them when that
//! machine is cut off, paused, robbed of its node or ended. Runs in the lab, on two machines: `FARPAGE_LAB=serve` on b,
//! `FARPAGE_LAB=endure` on a; elsewhere it says that it did not.

#![cfg(feature = "verbs")]
#![allow(missing_docs)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use common::cluster::{Cluster, Program};
use common::lab::{self, Other};
use common::{eventually, patience, sys};
use farpage_bench::conformance::programs::{Size, compile};

/// 9 MB of data in a program of some 20 MB: a quarter of its peak may stay.
const PIECES: u32 = 3_000;
const LOCAL: &str = "5M";
const LOCAL_BYTES: u64 = 5 << 20;

/// Enough to show that pages go there and come back.
const FEW_PIECES: u32 = 500;

/// Fits into its memory here whatever happens to far memory.
const SMALL: u32 = 10;
const SMALL_LOCAL: &str = "32M";

/// A node that took part in transfers would wake for most of them; it may for one in so many, for whatever else goes on.
const SLEEPS_SHARE: f64 = 10.0;

/// How long the node's processor is watched while nothing goes on.
const IDLE: Duration = Duration::from_secs(5);

/// Some of the faults of [`start_threads`] are answered by then, and by far not all.
const UNDER_WAY: Duration = Duration::from_millis(300);

/// The end of a node's connections travels as fast as the machines run.
const HEARD_OF: Duration = Duration::from_secs(2);

/// The pages of `outage.c`.
const PAGES: u64 = 6144;

/// For how long the wire is pulled, seconds, unless `FARPAGE_OUTAGES` says otherwise.
const OUTAGES: &str = "1,5";

/// The agent's faults wait for at least so much longer than the longest outage, seconds.
const BEYOND_OUTAGES: u64 = 60;

#[test]
fn a_program_whose_pages_lie_on_another_machine() {
    match std::env::var("FARPAGE_LAB").as_deref() {
        Ok("serve") => lab::serve(),
        Ok(_) => endure(),
        Err(_) => println!(
            "SKIPPED: a_program_whose_pages_lie_on_another_machine: needs the lab's two machines (cargo xtask lab)"
        ),
    }
}

fn endure() {
    let outages = std::env::var("FARPAGE_OUTAGES").unwrap_or_else(|_| OUTAGES.to_owned());
    let outages: Vec<u64> = outages.split(',').map(|n| n.parse().unwrap()).collect();
    let deadline = (outages.iter().max().unwrap() + BEYOND_OUTAGES).to_string();
    let agent = [
        "--fabric",
        "rdma",
        "--device",
        "port=1",
        "--fault-deadline",
        &deadline,
    ];
    let (mut other, began) = (Other::find(), Instant::now());
    let mut cluster = Cluster::empty();
    cluster.url = lab::URL.to_owned();
    a_device_that_is_not_there_is_refused(&mut cluster);
    cluster.start_agent(&agent);

    let native = quarter_of_native(&cluster);
    let native_few = cluster.run_native(FEW_PIECES).complete(1).remove(0);
    same_as_native(&cluster, &mut other, &native);
    // Whoever fits is not to notice any of what follows.
    let mut small = cluster.run_program(SMALL_LOCAL, SMALL, "small");
    small.built();
    let hash_of_small = small.check();
    let mut threads = start_threads(&cluster);
    for seconds in outages {
        wait_out(&mut threads, "unplug", "plug", seconds, || {
            assert_eq!(small.check(), hash_of_small);
        });
    }
    wait_out(&mut threads, "pause", "resume", 3, || {});
    another_agent_takes_over(&mut cluster, &mut threads, &agent);
    lose_the_node(threads, &mut other);
    assert_eq!(small.check(), hash_of_small);

    println!("the node is another: {:?} since the start", began.elapsed());
    assert_eq!(complete(&cluster, FEW_PIECES, "again"), native_few);
    assert!(small.end().0.success());
    let (status, log) = cluster.agent.as_mut().unwrap().stop();
    assert!(status.success(), "{status}: {log}");
    eventually("the extents are given back", || {
        cluster.status()["nodes"][0]["used_bytes"] == 0
    });
    cluster.start_agent(&agent);
    assert_eq!(complete(&cluster, FEW_PIECES, "another_agent"), native_few);

    println!("the agent is another: {:?}", began.elapsed());
    end_the_lease(&mut cluster, &mut other, &agent);
    assert_eq!(complete(&cluster, FEW_PIECES, "another_lease"), native_few);

    println!("the lease is another: {:?}", began.elapsed());
    end_the_machine(&mut cluster);
    println!("the machine has ended: {:?}", began.elapsed());
    let mut agent = cluster.agent.take().unwrap();
    agent.stop();
    cluster.assert_nothing_runs();
}

fn a_device_that_is_not_there_is_refused(cluster: &mut Cluster) {
    let mut words = cluster.agent_arguments();
    words.extend(["--device", "device=nope"].map(str::to_owned));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (status, log) = cluster.refused(&words);
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("device=nope"), "{log}");
}

/// What the program says natively, with more than four times the memory that it is to have.
fn quarter_of_native(cluster: &Cluster) -> String {
    let mut native = cluster.run_native(PIECES);
    native.built();
    let (hash, peak) = (native.check(), native.peak());
    assert!(
        peak >= 4 * LOCAL_BYTES,
        "{peak} bytes; more pieces are needed"
    );
    assert!(native.end().0.success());
    hash
}

fn complete(cluster: &Cluster, pieces: u32, name: &str) -> String {
    let hashes = cluster.run_program(LOCAL, pieces, name).complete(1);
    assert_eq!(cluster.summary(name)["far_slots_in_use_at_exit"], 0);
    hashes.concat()
}

/// An unmodified program at a quarter of its peak, and what that costs the other machine's processor.
fn same_as_native(cluster: &Cluster, other: &mut Other, native: &str) {
    let (before, began) = (other.cpu(), Instant::now());
    assert_eq!(complete(cluster, PIECES, "python"), native);
    let (after, took) = (other.cpu(), began.elapsed());
    std::thread::sleep(IDLE);
    let (used, idle) = (after - before, other.cpu() - after);
    let summary = cluster.summary("python");
    assert_eq!(summary["fabric"], "rdma", "{summary}");
    let pages = |field: &str| summary[field].as_u64().unwrap();
    let moved = pages("pages_fetched") + pages("pages_written_back");
    println!(
        "{moved} pages ({} MiB) went to and from machine b in {took:?}; of its node they took {used:?}, and {IDLE:?} without {idle:?}",
        moved >> 8,
    );
    assert!(moved > u64::from(PIECES), "{summary}");
    // It sees to its heartbeats meanwhile. Its processor's time is that of emulation on a busy host: no measure for a test.
    let otherwise = idle.sleeps as f64 * took.as_secs_f64() / IDLE.as_secs_f64();
    let for_pages = used.sleeps as f64 - otherwise;
    assert!(
        for_pages < moved as f64 / SLEEPS_SHARE,
        "its threads slept and woke {for_pages} times for {moved} pages"
    );
}

/// `outage.c`: four threads that read 24 MiB of which 5 may stay.
fn start_threads(cluster: &Cluster) -> Program {
    let path = compile("outage", Size::Whole, cluster.folder()).unwrap();
    let mut command = cluster.run_command(LOCAL, "threads");
    command.arg("--").arg(path);
    let mut program = Program::start(command);
    program.built();
    assert_eq!(program.check(), all_right());
    program
}

fn all_right() -> String {
    format!("right {PAGES} wrong 0 lost 0 here 0")
}

/// The other machine is out of reach for some seconds, while the threads want their pages.
fn wait_out(
    threads: &mut Program,
    out: &str,
    back: &str,
    seconds: u64,
    mut meanwhile: impl FnMut(),
) {
    Other::control(out);
    threads.ask();
    let early = threads.line_within(Duration::from_secs(seconds) / 2);
    assert_eq!(early, None, "nothing comes while machine b is out of reach");
    meanwhile();
    std::thread::sleep(Duration::from_secs(seconds) / 2);
    Other::control(back);
    let again = Instant::now();
    let line = threads.line_within(patience(Duration::from_secs(60)));
    assert_eq!(line, Some(all_right()));
    println!(
        "{out} for {seconds} s: all pages were read {:?} after {back}",
        again.elapsed()
    );
}

/// The agent is killed while faults are under way; another connects anew and goes on with its pages.
fn another_agent_takes_over(cluster: &mut Cluster, threads: &mut Program, agent: &[&str]) {
    threads.ask();
    std::thread::sleep(UNDER_WAY);
    cluster.agent.as_mut().unwrap().kill();
    cluster.start_agent(agent);
    let line = threads.line_within(patience(Duration::from_secs(60)));
    assert_eq!(line, Some(all_right()));
}

/// An agent that stands still past its lease's end, with reads and writes of its programs before it, has lost what lay under
/// it, and what it still writes there reaches nobody: another's pages, in the same memory, stay what they are.
fn end_the_lease(cluster: &mut Cluster, other: &mut Other, agent: &[&str]) {
    other.shorten_leases();
    let mut threads = start_threads(cluster);
    let before = cluster.status()["nodes"][0]["used_bytes"].as_u64();
    let writer = cluster.run_program(LOCAL, 10 * PIECES, "writer");
    eventually("some of it is written", || {
        cluster.status()["nodes"][0]["used_bytes"].as_u64() > before
    });
    let stands = cluster.agent.as_ref().unwrap().child.id() as i32;
    sys::kill(stands, libc::SIGSTOP);
    eventually("its lease has ended", || {
        cluster.status()["nodes"][0]["used_bytes"] == 0
    });
    let mut second = Cluster::empty();
    second.url.clone_from(&cluster.url);
    second.start_agent(agent);
    let mut newcomer = second.run_program(LOCAL, FEW_PIECES, "newcomer");
    newcomer.built();
    let hash = newcomer.check();

    sys::kill(stands, libc::SIGCONT);
    threads.ask();
    let line = threads.line_within(patience(Duration::from_secs(60)));
    let line = line.unwrap();
    println!("after the lease's end: {line}");
    assert_most_are_lost(&line);
    let (status, errors) = writer.end();
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}: {errors}");
    assert_eq!(newcomer.check(), hash);
    assert!(newcomer.end().0.success());
    assert!(threads.end().0.success());
    assert_eq!(second.summary("newcomer")["far_slots_in_use_at_exit"], 0);
    assert!(second.agent.as_mut().unwrap().stop().0.success());
}

/// `outage.c` found most of its pages lost, and no other wrong.
fn assert_most_are_lost(line: &str) {
    let numbers: Vec<u64> = line
        .split(' ')
        .filter_map(|word| word.parse().ok())
        .collect();
    let [right, wrong, lost, here] = numbers[..] else {
        panic!("{line}")
    };
    assert!(right + lost == PAGES && wrong == 0 && here == 0, "{line}");
    assert!(lost > PAGES / 2, "{line}");
}

/// A node that is gone may come back, and its pages are waited for; one that comes back empty has lost them, and them alone.
fn lose_the_node(mut threads: Program, other: &mut Other) {
    other.kill_node();
    // Until this machine hears of it, pages that are here as well may be dropped for their copies there.
    std::thread::sleep(HEARD_OF);
    threads.ask();
    assert_eq!(threads.line_within(Duration::from_secs(4)), None);
    other.start_node();
    let Some(line) = threads.line_within(patience(Duration::from_secs(60))) else {
        panic!("the program's end: {:?}", threads.end());
    };
    println!("after the node came back empty: {line}");
    assert_most_are_lost(&line);
    let (status, errors) = threads.end();
    assert!(status.success(), "{status}: {errors}");
}

/// Nobody is left who could say that pages are lost: their deadline does.
fn end_the_machine(cluster: &mut Cluster) {
    let mut small = cluster.run_program(SMALL_LOCAL, SMALL, "small");
    small.built();
    let hash = small.check();
    let mut command = cluster.run_command(LOCAL, "loser");
    command
        .args(["--fault-deadline", "5", "--", common::cluster::PYTHON])
        .arg(cluster.path("program.py"))
        .arg(PIECES.to_string());
    let mut loser = Program::start(command);
    loser.built();
    Other::control("kill");
    loser.ask();
    let (status, errors) = loser.end();
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}: {errors}");
    assert_eq!(small.check(), hash);
    assert!(small.end().0.success());
    assert!(cluster.agent_runs());
}
