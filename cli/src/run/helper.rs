//! A process of our own beside the program: the memory node or the agent of one run.
//!
//! It lives in a session of its own, out of reach of the terminal's signals, and holds none of the program's
//! descriptors: whoever reads the program's output sees its end when the program ends. It ends itself when its
//! lifeline reads end-of-file, which also happens when `run` is killed.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Seek};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::sys;

/// What a helper writes to its standard output, at once and before anything else, when it is ready to serve.
pub(crate) const READY: &str = "ready\n";

/// How long a helper may take to be ready. It has no work to do before that which could take a second; on an emulated machine whose
/// host is busy it took more than 20.
const READY_DEADLINE: Duration = Duration::from_secs(60);

/// How long a helper may take to end by itself before it is killed.
const END_DEADLINE: Duration = Duration::from_secs(5);

/// As much of a failed helper's complaint as is repeated.
const COMPLAINT_BYTES: u64 = 4096;

/// Why a helper is not there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HelperError {
    #[error("cannot start {name}: {source}")]
    Start {
        name: &'static str,
        source: io::Error,
    },
    #[error("{name} is not ready after {READY_DEADLINE:?}; is this machine overloaded? Try again")]
    Late { name: &'static str },
    #[error("{name} gave up: {complaint}")]
    GaveUp {
        name: &'static str,
        complaint: String,
    },
}

/// A helper that runs. Dropping it ends and reaps it.
#[derive(Debug)]
pub(crate) struct Helper {
    name: &'static str,
    child: Child,
    /// Its end is the helper's sign to end. Nobody else holds it: it closes at exec.
    lifeline: Option<PipeWriter>,
    ready: PipeReader,
    /// What it says on standard error. Not our own standard error: that belongs to the program.
    log: File,
}

impl Helper {
    /// Starts this executable with the arguments and `--lifeline FD`.
    pub(crate) fn start(name: &'static str, arguments: &[OsString]) -> Result<Self, HelperError> {
        let program =
            std::env::current_exe().map_err(|source| HelperError::Start { name, source })?;
        Self::start_program(name, program.into(), arguments)
            .map_err(|source| HelperError::Start { name, source })
    }

    fn start_program(
        name: &'static str,
        program: OsString,
        arguments: &[OsString],
    ) -> io::Result<Self> {
        let (far_end, lifeline) = io::pipe()?;
        let (ready, ready_end) = io::pipe()?;
        let log = sys::memory_file("farpage-log")?;
        let far_end = OwnedFd::from(far_end);
        let mut command = Command::new(program);
        command
            .args(arguments)
            .arg("--lifeline")
            .arg(far_end.as_raw_fd().to_string());
        command
            .stdin(Stdio::null())
            .stdout(ready_end)
            .stderr(log.try_clone()?);
        sys::inherit_nothing_but(&mut command, far_end);
        // `command` still holds the helper's ends; they close with it at the end of this function.
        let child = command.spawn()?;
        Ok(Self {
            name,
            child,
            lifeline: Some(lifeline),
            ready,
            log,
        })
    }

    /// Lets go of the helper without waiting for its end: its lifeline closes with us, and it knows what to wait for.
    pub(crate) fn leave_to_itself(self) {
        std::mem::forget(self);
    }

    /// Waits until the helper says that it serves. Both a word and its end count as an answer.
    pub(crate) fn wait_ready(&mut self) -> Result<(), HelperError> {
        if !sys::readable_within(&self.ready, READY_DEADLINE) {
            return Err(HelperError::Late { name: self.name });
        }
        let mut answer = [0; READY.len()];
        match self.ready.read_exact(&mut answer) {
            Ok(()) if answer == *READY.as_bytes() => Ok(()),
            _ => Err(HelperError::GaveUp {
                name: self.name,
                complaint: self.complaint(),
            }),
        }
    }

    /// What the helper said on standard error.
    fn complaint(&mut self) -> String {
        let mut text = String::new();
        let read = self
            .log
            .rewind()
            .and_then(|()| (&self.log).take(COMPLAINT_BYTES).read_to_string(&mut text));
        match read {
            Ok(_) if !text.trim().is_empty() => {
                text.trim().trim_start_matches("farpage: ").to_owned()
            }
            _ => "it ended without saying why".to_owned(),
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        let deadline = Instant::now() + END_DEADLINE;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Helper {
        // `$1` is the lifeline's number, behind the word `--lifeline` as `$0`.
        Helper::start_program(
            "a helper",
            "/bin/bash".into(),
            &["-c".into(), script.into()],
        )
        .unwrap()
    }

    #[test]
    fn ends_with_its_lifeline() {
        let mut helper = shell("echo ready; read -r _ <&$1; exit 0");
        helper.wait_ready().unwrap();
        let pid = helper.child.id();
        let start = Instant::now();
        drop(helper);
        assert!(start.elapsed() < Duration::from_secs(2));
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn its_complaint_is_repeated() {
        let error = shell("echo farpage: no memory >&2; exit 1")
            .wait_ready()
            .unwrap_err();
        assert_eq!(error.to_string(), "a helper gave up: no memory");
    }

    #[test]
    fn holds_no_descriptor_of_ours_and_has_its_own_session() {
        let mut helper = shell("ls -l /proc/self/fd >&2; ps -o sid= -p $$ >&2; echo $$ >&2");
        let complaint = helper.wait_ready().unwrap_err().to_string();
        let lines: Vec<&str> = complaint.lines().collect();
        let descriptors = lines.iter().filter(|line| line.contains("->")).count();
        // Three standard ones, the lifeline, and the folder that `ls` itself reads.
        assert_eq!(descriptors, 5, "{complaint}");
        let [.., session, pid] = lines[..] else {
            panic!("{complaint}")
        };
        assert_eq!(session.trim(), pid.trim());
    }
}
