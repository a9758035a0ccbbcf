//! Runs a program and watches its anonymous memory from outside.

use std::fs;
use std::hash::Hasher;
use std::io::{self, Read};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How often to look. Reading a counter takes microseconds.
const INTERVAL: Duration = Duration::from_millis(3);

/// What one run came to.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) status: ExitStatus,
    /// A hash of standard output, and its length.
    pub(crate) output: (u64, u64),
    /// The most anonymous memory that the program had resident at a look.
    pub(crate) peak_bytes: u64,
    pub(crate) elapsed: Duration,
}

/// Runs a command. What runs the executable `ours`, and has not become the program, is not counted.
pub(crate) fn run(command: &mut Command, ours: &Path) -> io::Result<Run> {
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let output = child.stdout.take();
    let reader = std::thread::spawn(move || digest(output));
    let mut peak_bytes = 0;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        peak_bytes = peak_bytes.max(resident(child.id(), ours));
        std::thread::sleep(INTERVAL);
    };
    let elapsed = start.elapsed();
    let output = reader
        .join()
        .map_err(|_| io::Error::other("the thread that reads the output died"))??;
    Ok(Run {
        status,
        output,
        peak_bytes,
        elapsed,
    })
}

/// The anonymous memory of the process, or of the program it started if it runs `ours`.
fn resident(pid: u32, ours: &Path) -> u64 {
    if fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == ours) {
        let children =
            fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let children = children
            .split_whitespace()
            .filter_map(|child| child.parse::<u32>().ok());
        let programs = children.filter(|child| {
            fs::read_link(format!("/proc/{child}/exe")).is_ok_and(|exe| exe != ours)
        });
        return programs.map(anonymous).sum();
    }
    anonymous(pid)
}

fn anonymous(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

fn digest(source: Option<impl Read>) -> io::Result<(u64, u64)> {
    let Some(mut source) = source else {
        return Ok((0, 0));
    };
    let mut hasher = std::collections::hash_map::DefaultHasher::new();
    let mut buffer = vec![0; 1 << 18];
    let mut total = 0;
    loop {
        match source.read(&mut buffer) {
            Ok(0) => return Ok((hasher.finish(), total)),
            Ok(read) => {
                hasher.write(buffer.get(..read).unwrap_or_default());
                total += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
