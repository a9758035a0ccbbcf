//! Signals, job control and sudden death: as without farpage, and nothing is left behind.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use common::programs_in_c::{LOCAL, compiled};
use common::pty::Shell;
use common::{
    eventually, farpage, farpage_run, is_over, listing, marked, skip, state, status_field, sys,
    without_move, without_program,
};

/// Says so and returns true if this account cannot bring far memory up.
fn without_privilege(test: &str) -> bool {
    if !sys::is_root() {
        skip(test, "needs root for userfaultfd");
    }
    !sys::is_root()
}

/// A program under `farpage run`, started in a process group of its own as by a shell.
struct Running {
    launcher: Child,
    output: BufReader<ChildStdout>,
    /// The program's own pid, which it printed.
    program: u32,
}

impl Running {
    /// Runs a bash script. It must not print before this has printed its pid for it.
    fn start(script: &str) -> Self {
        Self::start_marked(script, "")
    }

    fn start_marked(script: &str, mark: &str) -> Self {
        let mut command = farpage_run();
        command
            .args(["/bin/bash", "-c", &format!("echo $$; {script}")])
            .env("FARPAGE_TEST_MARK", mark);
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        sys::before_exec(&mut command, sys::terminal_signals_as_usual);
        let mut launcher = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(launcher.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        Self {
            launcher,
            output,
            program: line.trim().parse().unwrap(),
        }
    }

    fn pid(&self) -> u32 {
        self.launcher.id()
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        sys::kill(-(self.pid() as i32), libc::SIGKILL);
        let _ = self.launcher.wait();
    }
}

#[test]
fn signals_sent_to_run_reach_the_program_once() {
    if without_privilege("signals_sent_to_run_reach_the_program_once") {
        return;
    }
    for name in [
        "INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "ALRM", "WINCH", "CONT", "RTMIN+5",
    ] {
        // No command substitution: bash itself can lose a trap that comes while it reads one.
        let mut running = Running::start(&format!(
            "n=0; trap 'n=$((n+1)); echo got $n' {name}; echo set; for ((i = 0; i < 400; i++)); do sleep 0.01; done; exit 7"
        ));
        assert_eq!(running.line(), "set");
        Command::new("kill")
            .args(["-s", name, &running.pid().to_string()])
            .status()
            .unwrap();
        assert_eq!(running.line(), "got 1", "{name}");
        // A second copy would be printed before the next signal's.
        std::thread::sleep(std::time::Duration::from_millis(30));
        Command::new("kill")
            .args(["-s", name, &running.pid().to_string()])
            .status()
            .unwrap();
        assert_eq!(running.line(), "got 2", "{name}");
    }
}

#[test]
fn a_program_that_signals_its_group_is_not_answered_with_an_echo() {
    if without_privilege("a_program_that_signals_its_group_is_not_answered_with_an_echo") {
        return;
    }
    let mut running = Running::start("trap 'echo got' USR1; kill -USR1 0; sleep 0.2; echo end");
    assert_eq!(running.line(), "got");
    assert_eq!(running.line(), "end");
}

#[test]
fn run_dies_of_what_the_program_dies_of() {
    if without_privilege("run_dies_of_what_the_program_dies_of") {
        return;
    }
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGUSR1] {
        let mut running = Running::start("exec sleep 30");
        sys::kill(running.pid() as i32, signal);
        let status = running.launcher.wait().unwrap();
        assert_eq!(status.signal(), Some(signal));
        assert!(is_over(running.program));
    }
}

#[test]
fn ignored_signals_stay_ignored_as_under_nohup() {
    if without_privilege("ignored_signals_stay_ignored_as_under_nohup") {
        return;
    }
    let mut command = Command::new("/bin/bash");
    let script = format!(
        "trap '' HUP; exec {} run --summary none -- bash -c 'echo $$; sleep 0.3; echo lived'",
        farpage().display()
    );
    let mut child = command
        .args(["-c", &script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    sys::kill(child.id() as i32, libc::SIGHUP);
    line.clear();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "lived\n");
    assert!(child.wait().unwrap().success());
}

#[test]
fn stops_and_continues_with_the_program() {
    if without_privilege("stops_and_continues_with_the_program") {
        return;
    }
    let mut running = Running::start("for ((i = 0; i < 1000; i++)); do sleep 0.01; done");
    sys::kill(running.pid() as i32, libc::SIGTSTP);
    eventually("both stop", || {
        state(running.program) == Some('T') && state(running.pid()) == Some('T')
    });
    sys::kill(running.pid() as i32, libc::SIGCONT);
    eventually("both go on", || {
        state(running.program) != Some('T') && state(running.pid()) != Some('T')
    });
    // Stopped and continued behind our back, it must not leave us stopped for ever.
    sys::kill(running.program as i32, libc::SIGSTOP);
    eventually("it stops", || state(running.program) == Some('T'));
    sys::kill(running.program as i32, libc::SIGCONT);
    sys::kill(running.program as i32, libc::SIGKILL);
    assert_eq!(
        running.launcher.wait().unwrap().signal(),
        Some(libc::SIGKILL)
    );
}

#[test]
fn terminal_interrupt_reaches_the_program_once() {
    if without_privilege("terminal_interrupt_reaches_the_program_once") {
        return;
    }
    let mut shell = Shell::start();
    let run = format!("{} run --summary none --", farpage().display());
    shell.expect("PROMPT> ");
    shell.keys(&format!(
        "{run} bash -c 'n=0; trap \"n=\\$((n+1))\" INT; echo rea\"\"dy; sleep 5; sleep 0.3; echo end $n'; echo status=$?.\n"
    ));
    shell.expect("ready");
    std::thread::sleep(std::time::Duration::from_millis(100));
    shell.keys("\x03");
    shell.expect("end 1");
    shell.expect("status=0.");
    shell.keys(&format!(
        "{run} bash -c 'echo rea\"\"dy; exec sleep 30'; echo status=$?.\n"
    ));
    shell.expect("ready");
    std::thread::sleep(std::time::Duration::from_millis(100));
    shell.keys("\x03");
    shell.expect("PROMPT> ");
    shell.keys("echo stat\"\"us=$?.\n");
    shell.expect("status=130.");
}

#[test]
fn terminal_stop_and_foreground() {
    if without_privilege("terminal_stop_and_foreground") {
        return;
    }
    let mut shell = Shell::start();
    shell.expect("PROMPT> ");
    let run = format!("{} run --summary none --", farpage().display());
    shell.keys(&format!(
        "{run} bash -c 'echo rea\"\"dy; read x; echo read $x; exit 5'\n"
    ));
    shell.expect("ready");
    std::thread::sleep(std::time::Duration::from_millis(100));
    shell.keys("\x1a");
    shell.expect("Stopped");
    shell.expect("PROMPT> ");
    shell.keys("fg\n");
    shell.expect("exit 5'");
    std::thread::sleep(std::time::Duration::from_millis(100));
    shell.keys("words\n");
    shell.expect("read words");
    shell.expect("PROMPT> ");
    shell.keys("echo status=$?.\n");
    shell.expect("status=5.");
    // A stop that the program gives itself must hand the terminal back as well.
    shell.keys(&format!("{run} bash -c 'kill -STOP $$; echo aga\"\"in'\n"));
    shell.expect("Stopped");
    shell.keys("fg\n");
    shell.expect("again");
}

/// Waits for the long work of `bench/c/hostile.c` to have most of its memory far. It reads it over and over for as long as the
/// file stays that it has made for this. Returns its pid.
fn at_long_work(ready: &Path) -> u32 {
    let mut pid = None;
    eventually("the long work begins", || {
        let text = std::fs::read_to_string(ready).unwrap_or_default();
        pid = text.strip_suffix('\n').and_then(|text| text.parse().ok());
        pid.is_some()
    });
    pid.unwrap()
}

#[test]
fn terminal_stop_and_foreground_with_pages_far() {
    const TEST: &str = "terminal_stop_and_foreground_with_pages_far";
    if without_privilege(TEST) || without_program(TEST, "cc") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let ready = folder.path().join("long_work.ready");
    let mut shell = Shell::start();
    shell.expect("PROMPT> ");
    shell.keys(&format!(
        "cd {}; {} run --local {LOCAL} --summary none -- {} long_work\n",
        folder.path().display(),
        farpage().display(),
        compiled("hostile").display()
    ));
    let program = at_long_work(&ready);
    for _ in 0..3 {
        shell.keys("\x1a");
        shell.expect("Stopped");
        shell.expect("PROMPT> ");
        assert_eq!(state(program), Some('T'));
        shell.keys("fg\n");
        eventually("it goes on", || state(program) != Some('T'));
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    std::fs::remove_file(ready).unwrap();
    shell.expect("PROMPT> ");
    shell.keys("echo stat\"\"us=$?.\n");
    shell.expect("status=0.");
}

#[test]
fn killed_with_pages_far_nothing_is_left_behind() {
    const TEST: &str = "killed_with_pages_far_nothing_is_left_behind";
    if without_privilege(TEST) || without_program(TEST, "cc") {
        return;
    }
    let shared = || listing(Path::new("/dev/shm"));
    let before = shared();
    for victim in ["program", "launcher"] {
        let folder = tempfile::tempdir().unwrap();
        let mark = format!("farpage-mark-far-{}-{victim}", std::process::id());
        let mut launcher = Command::new(farpage())
            .args([
                "run",
                "--local",
                &LOCAL.to_string(),
                "--summary",
                "none",
                "--",
            ])
            .arg(compiled("hostile"))
            .arg("long_work")
            .env("FARPAGE_TEST_MARK", &mark)
            .env_remove("FARPAGE_AGENT")
            .current_dir(folder.path())
            .spawn()
            .unwrap();
        let program = at_long_work(&folder.path().join("long_work.ready"));
        let killed = if victim == "program" {
            program
        } else {
            launcher.id()
        };
        sys::kill(killed as i32, libc::SIGKILL);
        assert_eq!(launcher.wait().unwrap().signal(), Some(libc::SIGKILL));
        eventually(&format!("{victim}: all processes end"), || {
            marked(&mark).is_empty()
        });
        eventually("shared memory is gone", || {
            shared().iter().all(|file| before.contains(file))
        });
    }
}

/// Who waits for the agent to read of its moves must not outlive it, with the program's whole memory.
#[test]
fn killed_while_pages_leave_by_mremap_nothing_is_left_behind() {
    const TEST: &str = "killed_while_pages_leave_by_mremap_nothing_is_left_behind";
    if without_privilege(TEST) || without_program(TEST, "cc") {
        return;
    }
    let local = LOCAL.to_string();
    for turn in 0..12 {
        let mark = format!("farpage-mark-leave-{}-{turn}", std::process::id());
        let mut launcher = Command::new(farpage())
            .args(["run", "--local", &local, "--summary", "none", "--"])
            .arg(compiled("memory_calls"))
            .arg("reuse")
            .env("FARPAGE_TEST_MARK", &mark)
            .env("FARPAGE_WITHOUT_MOVE", "1")
            .env_remove("FARPAGE_AGENT")
            .spawn()
            .unwrap();
        let program = || {
            let is_it = |pid: &u32| status_field(*pid, "Name").as_deref() == Some("memory_calls");
            marked(&mark).into_iter().find(is_it)
        };
        eventually("the program runs", || program().is_some());
        std::thread::sleep(Duration::from_millis(500 + 20 * turn));
        sys::kill(program().expect("it runs for longer") as i32, libc::SIGKILL);
        assert_eq!(launcher.wait().unwrap().signal(), Some(libc::SIGKILL));
        eventually("all processes end", || marked(&mark).is_empty());
    }
}

#[test]
fn no_process_and_no_file_is_left_behind() {
    let test = "no_process_and_no_file_is_left_behind";
    if without_privilege(test) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let shared = || listing(std::path::Path::new("/dev/shm"));
    let before = shared();
    for (round, victim) in ["nobody", "program", "launcher", "launcher"]
        .into_iter()
        .enumerate()
    {
        let mark = format!("farpage-mark-{}-{round}", std::process::id());
        let script = match victim {
            "nobody" => "sleep 0.1",
            _ => "sleep 100 & echo beside; wait",
        };
        let mut running =
            Running::start_marked(&format!("cd {}; {script}", folder.path().display()), &mark);
        match victim {
            "program" => {
                assert_eq!(running.line(), "beside");
                sys::kill(running.program as i32, libc::SIGKILL);
            }
            // At whatever moment: a child may have been forked but not be at the agent's door yet.
            "launcher" => sys::kill(running.pid() as i32, libc::SIGKILL),
            _ => {}
        }
        running.launcher.wait().unwrap();
        if victim == "program" {
            // As without farpage, what the killed program started lives on; the agent stays with it.
            let sleeping = || {
                let is_sleep =
                    |pid: &u32| status_field(*pid, "Name").is_some_and(|name| name == "sleep");
                marked(&mark).into_iter().find(is_sleep)
            };
            eventually("the program's child lives", || sleeping().is_some());
            sys::kill(sleeping().unwrap() as i32, libc::SIGKILL);
        }
        eventually(&format!("{victim}: all processes end"), || {
            marked(&mark).is_empty()
        });
        assert_eq!(listing(folder.path()), Vec::<std::path::PathBuf>::new());
        // What others had there before may go meanwhile.
        eventually("shared memory is gone", || {
            shared().iter().all(|file| before.contains(file))
        });
    }
}

/// Longer than a helper may take over a batch (`pager/take_out.rs`).
const SUSPENDED: Duration = Duration::from_secs(33);

/// The helper of a program.
fn helper_of(program: u32) -> u32 {
    let is_its = |pid: &u32| {
        let parent = status_field(*pid, "PPid").and_then(|parent| parent.parse().ok());
        parent == Some(program) && status_field(*pid, "Name").as_deref() == Some("farpage-helper")
    };
    let all = std::fs::read_dir("/proc").unwrap();
    let pids = all.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.into_iter().find(is_its).unwrap()
}

/// Suspends a program at long work, its helper first, so that a batch is in its hands, and sees it end well all the same.
fn is_suspended(how: &dyn Fn(u32), how_it_goes_on: &dyn Fn(u32)) {
    let folder = tempfile::tempdir().unwrap();
    let ready = folder.path().join("long_work.ready");
    let mut launcher = Command::new(farpage())
        .args(["run", "--local", &LOCAL.to_string(), "--summary", "none"])
        .arg("--")
        .arg(compiled("hostile"))
        .arg("long_work")
        .env_remove("FARPAGE_AGENT")
        .current_dir(folder.path())
        .spawn()
        .unwrap();
    let program = at_long_work(&ready);
    let helper = helper_of(program);
    how(helper);
    let mut looks_in_vain = 0;
    eventually("the program waits for pages to go", || {
        let what = std::fs::read_to_string(format!("/proc/{program}/wchan"));
        let waits = what.is_ok_and(|what| what.contains("userfault"));
        looks_in_vain = if waits { looks_in_vain + 1 } else { 0 };
        looks_in_vain > 50
    });
    how(program);
    std::thread::sleep(SUSPENDED);
    how_it_goes_on(program);
    how_it_goes_on(helper);
    std::fs::remove_file(ready).unwrap();
    assert!(launcher.wait().unwrap().success());
}

/// As batch systems do it that take a job's processors away for a while.
#[test]
fn a_program_that_is_stopped_for_long_goes_on() {
    const TEST: &str = "a_program_that_is_stopped_for_long_goes_on";
    if without_privilege(TEST) || without_program(TEST, "cc") || without_move(TEST) {
        return;
    }
    is_suspended(&|pid| sys::kill(pid as i32, libc::SIGSTOP), &|pid| {
        sys::kill(pid as i32, libc::SIGCONT);
    });
}

/// As containers are paused.
#[test]
fn a_program_that_is_frozen_for_long_goes_on() {
    const TEST: &str = "a_program_that_is_frozen_for_long_goes_on";
    if without_privilege(TEST) || without_program(TEST, "cc") || without_move(TEST) {
        return;
    }
    let Some(groups) = Cgroups::mount() else {
        return skip(TEST, "cgroups of version 2 cannot be mounted here");
    };
    let frozen = groups.frozen();
    is_suspended(
        &|pid| std::fs::write(frozen.join("cgroup.procs"), pid.to_string()).unwrap(),
        &|pid| std::fs::write(groups.folder().join("cgroup.procs"), pid.to_string()).unwrap(),
    );
    std::fs::remove_dir(frozen).unwrap();
}

/// Cgroups of version 2, mounted for a test.
struct Cgroups(tempfile::TempDir);

impl Cgroups {
    fn mount() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "cgroup2", "none"]).arg(folder.path());
        mount.status().unwrap().success().then(|| Self(folder))
    }

    fn folder(&self) -> &Path {
        self.0.path()
    }

    /// A group of which nobody runs.
    fn frozen(&self) -> PathBuf {
        let group = self
            .folder()
            .join(format!("farpage-frozen-{}", std::process::id()));
        std::fs::create_dir(&group).unwrap();
        std::fs::write(group.join("cgroup.freeze"), "1").unwrap();
        group
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.folder()).status();
    }
}
