//! Runs one program natively or with far memory, and reports all that can be seen from outside.

use std::hash::Hasher;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::tree::{Seen, Tree};
use super::{farpage, sys};

/// What one run came to.
#[derive(Debug)]
pub struct Outcome {
    pub status: ExitStatus,
    /// A hash of standard output, and its length.
    pub output: (u64, u64),
    pub errors: String,
    pub elapsed: Duration,
    pub seen: Seen,
    /// The summary, if there was one.
    pub summary: Option<serde_json::Value>,
}

/// Runs the program as it is.
pub fn run_native(program: &[&str], folder: &Path, deadline: Duration) -> Outcome {
    let mut command = Command::new(program[0]);
    command.args(&program[1..]);
    run(command, &farpage(), folder, deadline)
}

/// Runs the program with at most `local` bytes of its memory here.
pub fn run_far(local: u64, program: &[&str], folder: &Path, deadline: Duration) -> Outcome {
    run_far_with(local, program, folder, deadline, &[])
}

/// The same with more in the environment, the agent's too.
pub fn run_far_with(
    local: u64,
    program: &[&str],
    folder: &Path,
    deadline: Duration,
    environment: &[(&str, &str)],
) -> Outcome {
    let summary = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new(farpage());
    command
        .args([
            "run",
            "--local",
            &local.to_string(),
            "--summary",
            "json",
            "--summary-file",
        ])
        .arg(summary.path());
    command.arg("--").args(program).env_remove("FARPAGE_AGENT");
    command.envs(environment.iter().copied());
    let mut outcome = run(command, &farpage(), folder, deadline);
    let text = std::fs::read_to_string(summary.path()).unwrap();
    outcome.summary = serde_json::from_str(&text).ok();
    outcome
}

/// Runs a command in a folder. Of the processes that it becomes, those of the executable `ours` are not the program's.
pub fn run(mut command: Command, ours: &Path, folder: &Path, deadline: Duration) -> Outcome {
    command
        .current_dir(folder)
        .env("LC_ALL", "C")
        .process_group(0);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn().unwrap();
    let tree = Tree::watch(child.id(), ours.to_path_buf());
    let (mut output, mut errors) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let output = std::thread::spawn(move || digest(&mut output));
    let errors = std::thread::spawn(move || {
        let mut text = Vec::new();
        errors.read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    });
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > deadline {
            sys::kill(-(child.id() as i32), libc::SIGKILL);
            let _ = child.wait();
            panic!(
                "{command:?} did not end within {deadline:?}; seen: {:?}",
                tree.seen()
            );
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let elapsed = start.elapsed();
    let seen = tree.seen();
    let (output, errors) = (output.join().unwrap(), errors.join().unwrap());
    Outcome {
        status,
        output,
        errors,
        elapsed,
        seen,
        summary: None,
    }
}

/// A hash, the same in every run, and the length.
fn digest(source: &mut impl Read) -> (u64, u64) {
    let mut hasher = std::collections::hash_map::DefaultHasher::new();
    let mut buffer = vec![0; 1 << 18];
    let mut total = 0;
    loop {
        match source.read(&mut buffer) {
            Ok(0) => return (hasher.finish(), total),
            Ok(read) => {
                hasher.write(&buffer[..read]);
                total += read as u64;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => panic!("reading the program's output: {error}"),
        }
    }
}

/// The hash and length of a file, to compare with a run's output.
pub fn digest_of(file: &Path) -> (u64, u64) {
    digest(&mut std::fs::File::open(file).unwrap())
}
