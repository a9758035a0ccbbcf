//! Regions against a real agent, the one of the release build.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use farpage::{Advice, Agent, Error, Region};

const PAGE: usize = 4096;
const MIB: usize = 1 << 20;

/// An agent with memory of its own, ended with the test.
struct RunningAgent {
    process: Child,
    socket: String,
    /// One test at a time: they share this process's descriptors and the machine.
    _alone: MutexGuard<'static, ()>,
}

static ONE: Mutex<()> = Mutex::new(());

impl RunningAgent {
    /// `None`, said so, where there is nothing to run or this machine does not let it.
    fn start(test: &str) -> Option<Self> {
        let alone = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(farpage) = binary() else {
            println!("SKIPPED: {test}: no farpage binary; cargo build --release builds it");
            return None;
        };
        let socket = format!("@farpage-test-{test}-{}", std::process::id());
        let mut process = Command::new(farpage)
            .args(["agent", "--own-far-memory", "1G", "--socket", &socket])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = String::new();
        let mut out = BufReader::new(process.stdout.take().unwrap());
        out.read_line(&mut ready).unwrap();
        if ready.is_empty() {
            let output = process.wait_with_output().unwrap();
            let why = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(
                why.contains("userfaultfd"),
                "the agent did not start: {why}"
            );
            println!("SKIPPED: {test}: {}", why.trim());
            return None;
        }
        Some(Self {
            process,
            socket,
            _alone: alone,
        })
    }
}

impl Drop for RunningAgent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// `farpage` of the release build: `target/{debug,release}/deps/region-...` lies two folders below `target`.
fn binary() -> Option<PathBuf> {
    let test = std::env::current_exe().unwrap();
    let target = test.ancestors().nth(3)?;
    Some(target.join("release/farpage")).filter(|path| path.is_file())
}

fn resident(bytes: &[u8]) -> usize {
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    let mut words = vec![0u8; bytes.len() / PAGE * 8];
    let first = bytes.as_ptr().addr() / PAGE;
    pagemap.read_exact_at(&mut words, first as u64 * 8).unwrap();
    let present = |word: &&[u8]| word[7] & 0x80 != 0;
    words.chunks_exact(8).filter(present).count() * PAGE
}

fn mark(page: usize) -> [u8; 8] {
    (page as u64 + 1)
        .wrapping_mul(0x9E37_79B9_7F4A_7C15)
        .to_ne_bytes()
}

#[test]
fn a_region_larger_than_its_limit_keeps_every_byte() {
    let Some(agent) = RunningAgent::start("keeps") else {
        return;
    };
    let limit = 16 * MIB;
    let agent = Agent::connect(&agent.socket).unwrap();
    let mut region = agent.map(128 * MIB, limit).unwrap();
    assert_eq!(region.len(), 128 * MIB);
    let mut most = 0;
    for (number, page) in region.as_mut_slice().chunks_exact_mut(PAGE).enumerate() {
        page[..8].copy_from_slice(&mark(number));
        page[PAGE - 8..].copy_from_slice(&mark(number));
    }
    for number in 0..region.len() / PAGE {
        let page = &region[number * PAGE..][..PAGE];
        assert_eq!(
            (&page[..8], &page[PAGE - 8..]),
            (&mark(number)[..], &mark(number)[..])
        );
        assert!(page[8..PAGE - 8].iter().all(|byte| *byte == 0));
        if number % 1024 == 0 {
            most = most.max(resident(&region));
        }
    }
    // The limit, and the pages that may be on their way out.
    assert!(most <= limit + 4 * MIB, "{most} bytes were resident");
}

#[test]
fn advice_gives_pages_up_and_brings_them_home() {
    let Some(agent) = RunningAgent::start("advice") else {
        return;
    };
    let agent = Agent::connect(&agent.socket).unwrap();
    let mut region = agent.map(32 * MIB, 8 * MIB).unwrap();
    region.fill(7);
    region.advise(0..4 * MIB, Advice::DontNeed).unwrap();
    assert!(region[..4 * MIB].iter().all(|byte| *byte == 0));
    assert!(region[4 * MIB..].iter().all(|byte| *byte == 7));
    region.advise(8 * MIB..10 * MIB, Advice::WillNeed).unwrap();
    let here = resident(&region[8 * MIB..10 * MIB]);
    assert!(here > MIB, "{here} bytes came home");
    region.advise(8 * MIB..10 * MIB, Advice::Cold).unwrap();
    let outside = 0..33 * MIB;
    assert!(matches!(
        region.advise(outside, Advice::Cold),
        Err(Error::OutOfRange)
    ));
}

#[test]
fn regions_come_and_go_and_leave_nothing_behind() {
    let Some(agent) = RunningAgent::start("leaves") else {
        return;
    };
    let agent = Agent::connect(&agent.socket).unwrap();
    let mut rounds = Vec::new();
    for round in 0..5u8 {
        let mut region = agent.map(24 * MIB, 8 * MIB).unwrap();
        let other = agent.map(8 * MIB, 8 * MIB).unwrap();
        region.fill(round + 1);
        assert!(region.iter().all(|byte| *byte == round + 1));
        assert!(other.iter().all(|byte| *byte == 0));
        drop((region, other));
        rounds.push(std::fs::read_dir("/proc/self/fd").unwrap().count());
    }
    assert_eq!(rounds.first(), rounds.last(), "descriptors leaked");
}

#[test]
fn an_absent_agent_and_too_small_a_limit_are_told() {
    let Some(agent) = RunningAgent::start("told") else {
        return;
    };
    let error = Agent::connect("@farpage-nobody-listens-here").unwrap_err();
    assert!(matches!(&error, Error::NoAgent { .. }), "{error}");
    let agent = Agent::connect(&agent.socket).unwrap();
    let error = agent.map(MIB, 1024).unwrap_err();
    assert!(matches!(&error, Error::Refused(_)), "{error}");
}

/// Writes to every `nth` page, and returns these pages as runs.
fn write_every(region: &mut Region, nth: usize) -> Vec<Range<usize>> {
    let starts = (0..region.len()).step_by(nth * PAGE);
    let runs: Vec<_> = starts.map(|start| start..start + PAGE).collect();
    for run in &runs {
        region[run.start] ^= 1;
    }
    runs
}

/// Whatever of it is far: more than may be here, if there is far memory.
fn tell_what_was_written(region: &mut Region) {
    let all = 0..region.len();
    assert_eq!(region.soft_dirty(all.clone()).unwrap(), []);
    region.fill(7);
    let everything = std::slice::from_ref(&all);
    assert_eq!(region.soft_dirty(all.clone()).unwrap(), everything);
    let here = resident(region);
    assert_eq!(region.clear_soft_dirty(all.clone()).unwrap(), everything);
    assert_eq!(region.soft_dirty(all.clone()).unwrap(), []);
    assert!(resident(region) <= here, "something came home");
    assert!(region.iter().all(|byte| *byte == 7));
    assert_eq!(region.soft_dirty(all.clone()).unwrap(), []);

    let written = write_every(region, 3);
    assert_eq!(region.soft_dirty(all.clone()).unwrap(), written);
    assert!(region[PAGE..].iter().all(|byte| *byte == 7 || *byte == 6));
    // Whole pages are told of and cleared, the one in which the range ends too.
    let page = 3 * PAGE..4 * PAGE;
    let told = region.clear_soft_dirty(PAGE..3 * PAGE + 1).unwrap();
    assert_eq!(told, std::slice::from_ref(&page));
    let left: Vec<_> = written.into_iter().filter(|run| *run != page).collect();
    assert_eq!(region.soft_dirty(all).unwrap(), left);
    assert_eq!(region.soft_dirty(5..5).unwrap(), []);
    let outside = 0..region.len() + 1;
    assert!(matches!(region.soft_dirty(outside), Err(Error::OutOfRange)));
}

#[test]
fn what_was_written_is_told_wherever_it_is() {
    let Some(agent) = RunningAgent::start("written") else {
        return;
    };
    let agent = Agent::connect(&agent.socket).unwrap();
    // More than the pages of one packet, and not a multiple of them.
    let mut region = agent.map(40 * MIB + 5 * PAGE, 8 * MIB).unwrap();
    let other = agent.map(MIB, 8 * MIB).unwrap();
    tell_what_was_written(&mut region);
    assert_eq!(other.soft_dirty(0..MIB).unwrap(), []);
}

/// Whether this process is the test, run by `farpage run` with these words; else it has been run so, where that can be.
fn is_run(test: &str, words: &[&str]) -> bool {
    if std::env::var_os("FARPAGE_JOB").is_some() {
        return true;
    }
    // Only to see whether there can be far memory here.
    let Some(_agent) = RunningAgent::start(test) else {
        return false;
    };
    let run = Command::new(binary().unwrap())
        .arg("run")
        .args(words)
        .arg("--")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&run.stdout);
    let errors = String::from_utf8_lossy(&run.stderr);
    assert!(
        run.status.success() && told.contains("1 passed"),
        "{told}{errors}"
    );
    false
}

#[test]
fn what_was_written_is_told_under_a_run() {
    if !is_run("what_was_written_is_told_under_a_run", &["--local", "16M"]) {
        return;
    }
    let agent = Agent::from_environment().unwrap();
    let mut region = agent.map(40 * MIB + 5 * PAGE, 0).unwrap();
    tell_what_was_written(&mut region);
    let small = agent.map(PAGE, 0).unwrap();
    let error = small.soft_dirty(0..PAGE).unwrap_err();
    assert!(matches!(&error, Error::Refused(_)), "{error}");
}

/// Pages that are here lose their clean copies, by which they were known not to have been written.
#[test]
fn what_was_written_is_told_where_far_memory_is_full() {
    if !is_run(
        "what_was_written_is_told_where_far_memory_is_full",
        &["--local", "16M", "--far", "34M"],
    ) {
        return;
    }
    let agent = Agent::from_environment().unwrap();
    let mut region = agent.map(24 * MIB, 0).unwrap();
    let mut other = agent.map(16 * MIB, 0).unwrap();
    region.fill(7);
    region.clear_soft_dirty(0..region.len()).unwrap();
    for value in 1..4 {
        assert!(region.iter().all(|byte| *byte == 7));
        other.fill(value);
        assert_eq!(region.soft_dirty(0..region.len()).unwrap(), []);
    }
    assert!(other.iter().all(|byte| *byte == 3));
}
