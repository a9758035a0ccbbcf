//! The parts that `farpage run` brings up by itself, and their end.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::common::cluster::{PATIENCE, PYTHON, Program, wait};
use super::common::{alone, eventually, farpage, is_over, marked, sys};
use super::{PIECES, cannot_run};

/// `farpage run` without an agent, by root, marked by an argument.
fn embedded(mark: &str, script: &str) -> Command {
    let mut command = Command::new(farpage());
    command.args([
        "run",
        "--local",
        "16M",
        "--far",
        "256M",
        "--summary",
        "none",
        "--",
    ]);
    command
        .args([PYTHON, "-c", script, mark])
        .env_remove("FARPAGE_AGENT");
    command.env("FARPAGE_TEST_MARK", mark);
    command
}

/// Processes with the mark that run farpage's own executable.
fn own(mark: &str) -> Vec<u32> {
    let exe = farpage();
    marked(mark)
        .into_iter()
        .filter(|pid| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|path| path == exe))
        .collect()
}

#[test]
fn a_child_that_outlives_the_program_keeps_its_memory_and_is_the_last_to_go() {
    let test = "a_child_that_outlives_the_program_keeps_its_memory_and_is_the_last_to_go";
    if cannot_run(test) {
        return;
    }
    let _alone = alone();
    let mark = format!("mark-of-{test}-{}", std::process::id());
    let folder = tempfile::tempdir().unwrap();
    let (go, result) = (folder.path().join("go"), folder.path().join("result"));
    let script = format!(
        "import hashlib, os, random, time\n\
         data = [random.Random(i).randbytes(3000) for i in range({PIECES})]\n\
         want = hashlib.sha256(b''.join(data)).hexdigest()\n\
         if os.fork(): os._exit(3)\n\
         os.setsid()\n\
         null = os.open('/dev/null', os.O_RDWR)\n\
         for fd in (0, 1, 2): os.dup2(null, fd)\n\
         while not os.path.exists({go:?}): time.sleep(0.02)\n\
         digest = hashlib.sha256()\n\
         for piece in data: digest.update(piece)\n\
         open({result:?}, 'w').write('same' if digest.hexdigest() == want else 'other')\n"
    );
    let out = embedded(&mark, &script)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(3), "{out:?}");
    // The launcher has ended; the child, the agent and the memory node have not.
    eventually("agent and memory node alone are left", || {
        own(&mark).len() == 2
    });
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(own(&mark).len(), 2, "{:?}", marked(&mark));
    std::fs::write(&go, "").unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !result.exists() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    eventually("everything ends", || marked(&mark).is_empty());
    assert_eq!(std::fs::read_to_string(&result).unwrap(), "same");
}

#[test]
fn killed_parts_of_an_embedded_run_leave_nothing_running() {
    let test = "killed_parts_of_an_embedded_run_leave_nothing_running";
    if cannot_run(test) {
        return;
    }
    let _alone = alone();
    let script = "import sys, time\nd = [bytes([i % 251]) * 4000 for i in range(8000)]\n\
                  print('built', flush=True)\n\
                  while True:\n    time.sleep(0.01)\n    sum(x[7] for x in d)\n";
    // Who takes pages out without UFFDIO_MOVE waits for the agent, mostly.
    let turns = ["agent", "far-memory", "run"].map(|victim| (victim, None));
    let without_move = [("agent", Some("1")); 4];
    for (turn, (victim, hidden)) in turns.into_iter().chain(without_move).enumerate() {
        let mark = format!("mark-of-{test}-{turn}-{}", std::process::id());
        let mut command = embedded(&mark, script);
        command.envs(hidden.map(|value| ("FARPAGE_WITHOUT_MOVE", value)));
        let mut program = Program::start(command);
        program.built();
        let of_kind = |pid: &u32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).nth(1) == Some(victim.as_bytes())
        };
        let pid = own(&mark).into_iter().find(of_kind).unwrap();
        sys::kill(pid as i32, libc::SIGKILL);
        match victim {
            "run" => drop(wait(&mut program.child, "run's end")),
            // Pages that lay there may not come back: the program ends when it needs one, at its deadline.
            "far-memory" => {
                std::thread::sleep(Duration::from_secs(1));
                sys::kill(program.child.id() as i32, libc::SIGTERM);
                assert_eq!(program.end().0.signal(), Some(libc::SIGTERM));
            }
            _ => {
                let (status, errors) = program.end();
                assert_eq!(status.signal(), Some(libc::SIGKILL), "{errors}");
            }
        }
        assert!(is_over(pid));
        eventually("everything ends", || marked(&mark).is_empty());
    }
}
