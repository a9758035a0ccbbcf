//! What the end-to-end tests share: running a program natively and with far memory, and watching what it uses.
//!
//! A test that cannot run here says so with `skip`, on a line that `cargo xtask test` counts as skipped.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::print_stdout,
    clippy::print_stderr
)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod cgroup;
pub mod cluster;
pub mod held;
pub mod lab;
pub mod programs_in_c;
pub mod pty;
pub mod runs;
pub mod sys;
pub mod tree;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The binary under test.
pub fn farpage() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_farpage"))
        .canonicalize()
        .unwrap()
}

/// A part of farpage's own that serves until the test is over.
pub struct Part(Child);

impl Part {
    /// Starts it with these arguments and waits until it says that it is ready.
    pub fn start(arguments: &[&str]) -> Self {
        let mut process = Command::new(farpage())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = String::new();
        let mut out = BufReader::new(process.stdout.take().unwrap());
        out.read_line(&mut ready).unwrap();
        assert!(!ready.is_empty(), "{arguments:?} did not come up");
        Self(process)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A command of `farpage run` without a summary.
pub fn farpage_run() -> Command {
    let mut command = Command::new(farpage());
    command.args(["run", "--summary", "none", "--"]);
    command
        .env_remove("FARPAGE_AGENT")
        .env_remove("FARPAGE_COORDINATOR");
    command
}

/// Says that a test did not run. The form of the line is what `cargo xtask test` counts.
pub fn skip(test: &str, reason: &str) {
    println!("SKIPPED: {test}: {reason}");
}

/// What `farpage doctor` checks.
fn doctors_checks() -> Vec<serde_json::Value> {
    let out = Command::new(farpage())
        .args(["doctor", "--json"])
        .output()
        .unwrap();
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    report["checks"].as_array().unwrap().clone()
}

/// Says so and returns true if this machine or account cannot run `test` with far memory.
pub fn without_far_memory(test: &str) -> bool {
    // A missing shim is no property of the machine but an incomplete build, and must fail the test.
    let missing: Vec<_> = doctors_checks()
        .iter()
        .filter(|check| check["level"] == "missing" && check["id"] != "preload_shim")
        .map(|check| check["id"].to_string())
        .collect();
    if !missing.is_empty() {
        skip(
            test,
            &format!("farpage doctor misses {}", missing.join(", ")),
        );
    }
    !missing.is_empty()
}

/// Says so and returns true if this kernel has no `UFFDIO_MOVE`, and so does not say which pages are pinned.
pub fn without_pins(test: &str) -> bool {
    lacks_move(test, "before Linux 6.8 pinned pages are not known")
}

/// Says so and returns true if pages leave by a helper's helper here.
pub fn without_move(test: &str) -> bool {
    lacks_move(
        test,
        "before Linux 6.8 the helper leaves its work to another",
    )
}

fn lacks_move(test: &str, reason: &str) -> bool {
    let missing = doctors_checks()
        .iter()
        .any(|check| check["id"] == "uffd_move" && check["found"] == "not in this kernel");
    if missing {
        skip(test, reason);
    }
    missing
}

/// Says so and returns true if a program that `test` needs is not installed.
pub fn without_program(test: &str, program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|folder| folder.join(program).is_file());
    if !found {
        skip(
            test,
            &format!("{program} is not installed; cargo xtask setup installs it"),
        );
    }
    !found
}

/// One measurement at a time: two would share the CPUs and blur each other.
pub fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `usual`; or so many seconds as `FARPAGE_TEST_PATIENCE` says if that is more, on emulated machines.
pub fn patience(usual: Duration) -> Duration {
    let seconds = std::env::var("FARPAGE_TEST_PATIENCE").ok();
    let seconds = seconds.and_then(|seconds| seconds.parse().ok());
    seconds.map_or(usual, |seconds| usual.max(Duration::from_secs(seconds)))
}

/// Copies a program to be run. Another process does it: a child that some other test forks right now would keep ours open for
/// writing, and what is open for writing cannot be run (ETXTBSY).
pub fn copy_program(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg(from).arg(to).status().unwrap();
    assert!(copied.success(), "{copied}");
}

/// Waits until something holds, and fails the test with `what` if it does not in time.
pub fn eventually(what: &str, holds: impl FnMut() -> bool) {
    eventually_within(Duration::from_secs(10), what, holds);
}

/// The same for what takes its time by design.
pub fn eventually_within(usual: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience(usual);
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The field of `/proc/PID/status`, without its name.
pub fn status_field(pid: u32, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    text.lines().find_map(|line| {
        Some(
            line.strip_prefix(name)?
                .strip_prefix(':')?
                .trim()
                .to_owned(),
        )
    })
}

/// The first letter of the process's state; none if it is gone.
pub fn state(pid: u32) -> Option<char> {
    status_field(pid, "State")?.chars().next()
}

/// True if the process is gone or a zombie that somebody has yet to reap.
pub fn is_over(pid: u32) -> bool {
    matches!(state(pid), None | Some('Z' | 'X'))
}

/// Processes whose environment or command line carries the mark.
pub fn marked(mark: &str) -> Vec<u32> {
    let carries = |pid: u32| {
        ["environ", "cmdline"].iter().any(|file| {
            let bytes = std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            bytes
                .windows(mark.len())
                .any(|window| window == mark.as_bytes())
        })
    };
    let me = std::process::id();
    let pids = std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| *pid != me && !is_over(*pid) && carries(*pid))
        .collect()
}

/// Everything below a folder, by path.
pub fn listing(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    paths.sort();
    paths
}
