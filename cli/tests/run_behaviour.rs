//! `farpage run` shows nothing of itself: exit status, environment, descriptors, signals as inherited.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use common::runs::run_far;
use common::{farpage, farpage_run, skip, sys, without_program};

fn farpage_with(flags: &[&str]) -> Output {
    Command::new(farpage())
        .args(flags)
        .env_remove("FARPAGE_AGENT")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn run(program: &[&str]) -> Output {
    farpage_run()
        .args(program)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Says so and returns true if this account cannot bring far memory up.
fn without_privilege(test: &str) -> bool {
    if !sys::is_root() {
        skip(test, "needs root for userfaultfd");
    }
    !sys::is_root()
}

#[test]
fn exit_statuses_are_the_programs() {
    if without_privilege("exit_statuses_are_the_programs") {
        return;
    }
    for status in [0, 1, 2, 42, 126, 127, 255] {
        let out = run(&["sh", "-c", &format!("exit {status}")]);
        assert_eq!(out.status.code(), Some(status));
        assert_eq!(
            (text(&out.stdout), text(&out.stderr)),
            (String::new(), String::new())
        );
    }
}

#[test]
fn death_by_signal_is_the_programs() {
    if without_privilege("death_by_signal_is_the_programs") {
        return;
    }
    for signal in [
        libc::SIGTERM,
        libc::SIGKILL,
        libc::SIGSEGV,
        libc::SIGABRT,
        libc::SIGPIPE,
        libc::SIGHUP,
        40,
    ] {
        let out = run(&[
            "/bin/bash",
            "-c",
            &format!("ulimit -c 0; kill -{signal} $$; sleep 5"),
        ]);
        assert_eq!(out.status.signal(), Some(signal), "{}", out.status);
        let json = Command::new(farpage())
            .args([
                "run",
                "--summary",
                "json",
                "--",
                "/bin/bash",
                "-c",
                &format!("ulimit -c 0; kill -{signal} $$"),
            ])
            .output()
            .unwrap();
        let summary: serde_json::Value = serde_json::from_slice(&json.stderr).unwrap();
        assert_eq!(summary["exit_status"], 128 + signal);
    }
}

#[test]
fn standard_streams_pass_through() {
    if without_privilege("standard_streams_pass_through") {
        return;
    }
    let input = tempfile::NamedTempFile::new().unwrap();
    fs::write(input.path(), "over\n").unwrap();
    let mut command = farpage_run();
    command
        .args(["sh", "-c", "read x; echo out $x; echo err $x >&2"])
        .stdin(File::open(input.path()).unwrap());
    let out = command.output().unwrap();
    assert_eq!(
        (text(&out.stdout), text(&out.stderr)),
        ("out over\n".into(), "err over\n".into())
    );
}

#[test]
fn signals_are_inherited_as_they_were() {
    if without_privilege("signals_are_inherited_as_they_were") {
        return;
    }
    let masks = |mut command: Command, prepare: fn()| {
        sys::before_exec(&mut command, move || {
            prepare();
            Ok(())
        });
        let out = command
            .args(["grep", "-E", "Sig(Ign|Blk|Cgt|Pnd)", "/proc/self/status"])
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", text(&out.stderr));
        text(&out.stdout)
    };
    let cases: [fn(); 3] = [
        // Restoring SIGPIPE is what a shell's child has and what Rust's own start-up changes.
        || sys::default(libc::SIGPIPE),
        || sys::ignore(libc::SIGPIPE),
        || {
            for signal in [
                libc::SIGINT,
                libc::SIGHUP,
                libc::SIGCHLD,
                libc::SIGTSTP,
                libc::SIGTERM,
            ] {
                sys::ignore(signal);
            }
            sys::block(libc::SIGUSR1);
            sys::block(40);
        },
    ];
    for prepare in cases {
        assert_eq!(
            masks(farpage_run(), prepare),
            masks(Command::new("env"), prepare)
        );
    }
}

#[test]
fn a_closed_pipe_ends_the_program_as_without_us() {
    if without_privilege("a_closed_pipe_ends_the_program_as_without_us") {
        return;
    }
    let script = format!(
        "{} run --summary none -- yes | head -1; echo ${{PIPESTATUS[0]}}",
        farpage().display()
    );
    let mut shell = Command::new("/bin/bash");
    sys::before_exec(&mut shell, || {
        sys::default(libc::SIGPIPE);
        Ok(())
    });
    assert_eq!(
        text(&shell.args(["-c", &script]).output().unwrap().stdout),
        "y\n141\n"
    );
}

#[test]
fn descriptors_are_inherited_as_they_were() {
    if without_privilege("descriptors_are_inherited_as_they_were") {
        return;
    }
    let list = |mut command: Command, closed: Option<i32>| {
        let file = tempfile::tempfile().unwrap();
        let fd = sys::number(&file);
        sys::before_exec(&mut command, move || {
            sys::place(fd, 57);
            if let Some(closed) = closed {
                sys::close(closed);
            }
            Ok(())
        });
        let out = command
            .args(["/bin/bash", "-c", "cd /proc/$$/fd; echo *"])
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        text(&out.stdout)
    };
    for closed in [None, Some(0), Some(2)] {
        let native = list(Command::new("env"), closed);
        assert!(native.contains("57"), "{native}");
        assert_eq!(list(farpage_run(), closed), native);
    }
}

#[test]
fn environment_and_first_argument() {
    if without_privilege("environment_and_first_argument") {
        return;
    }
    let out = farpage_run()
        .args(["env"])
        .env("MARK", "a=b c")
        .env("LD_PRELOAD", "/nonexistent/x.so")
        .output()
        .unwrap();
    let environment = text(&out.stdout);
    assert!(
        environment.lines().any(|line| line == "MARK=a=b c"),
        "{environment}"
    );
    assert!(
        environment
            .lines()
            .any(|line| line.starts_with("LD_PRELOAD=") && line.ends_with("/nonexistent/x.so")),
        "{environment}"
    );
    let out = run(&["bash", "-c", "echo $0; tr '\\0' ' ' < /proc/$$/cmdline"]);
    assert!(
        text(&out.stdout).starts_with("bash\nbash -c"),
        "{}",
        text(&out.stdout)
    );
}

#[test]
fn the_summary_goes_where_it_is_told_to() {
    if without_privilege("the_summary_goes_where_it_is_told_to") {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let out = farpage_with(&[
        "run",
        "--local",
        "64M",
        "--summary",
        "json",
        "--summary-file",
        path,
        "--",
        "true",
    ]);
    assert_eq!(
        (out.status.code(), text(&out.stderr)),
        (Some(0), String::new())
    );
    let summary: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert_eq!(summary["local_limit_bytes"], 64 << 20);
    assert_eq!(summary["fabric"], "shm");
    let out = farpage_with(&["run", "--local", "64M", "--", "true"]);
    assert!(
        text(&out.stderr).contains("local memory"),
        "{}",
        text(&out.stderr)
    );
    let out = farpage_with(&["run", "--summary", "none", "--", "true"]);
    assert_eq!(text(&out.stderr), "");
}

/// The agent gives its helpers precedence, each in a session of its own, and takes care that they have one by then.
#[test]
fn precedence_is_the_helpers_and_not_the_sessions() {
    let test = "precedence_is_the_helpers_and_not_the_sessions";
    if without_privilege(test) || without_program(test, "python3") {
        return;
    }
    if !Path::new("/proc/self/autogroup").exists() {
        return skip(test, "this kernel has no automatic task groups");
    }
    let script = "import os\n\
        def precedence(pid): return open(f'/proc/{pid}/autogroup').read().split()[-1]\n\
        for _ in range(100):\n\
        \x20   child = os.fork()\n\
        \x20   if not child: os._exit(0)\n\
        \x20   os.waitpid(child, 0)\n\
        me = os.getpid()\n\
        children = open(f'/proc/{me}/task/{me}/children').read().split()\n\
        names = {pid: open(f'/proc/{pid}/comm').read().strip() for pid in children}\n\
        helpers = [pid for pid in children if names[pid] == 'farpage-helper']\n\
        print(precedence(me), [precedence(pid) for pid in helpers])";
    let out = Command::new("setsid")
        .arg("--wait")
        .arg(farpage())
        .args([
            "run",
            "--summary",
            "none",
            "--",
            "/usr/bin/python3",
            "-I",
            "-c",
            script,
        ])
        .env_remove("FARPAGE_AGENT")
        .output()
        .unwrap();
    assert_eq!(
        (text(&out.stdout), text(&out.stderr)),
        ("0 ['-19']\n".to_owned(), String::new())
    );
}

#[test]
fn a_child_without_the_shim_is_counted() {
    if without_privilege("a_child_without_the_shim_is_counted") {
        return;
    }
    // The shell has the shim. What it starts with an empty environment has not, and fills more than the limit.
    let fill = "data = bytearray(20 << 20)\nfor at in range(0, 20 << 20, 4096): data[at] = 1";
    let script =
        format!("env -i /usr/bin/python3 -I -c '{fill}\nimport time\ntime.sleep(3)'; true");
    let outcome = run_far(
        16 << 20,
        &["sh", "-c", &script],
        Path::new("/"),
        Duration::from_secs(60),
    );
    assert!(outcome.status.success(), "{}", outcome.errors);
    let summary = outcome.summary.expect("a summary");
    assert_eq!(summary["processes_unmanaged"], 1, "{summary}");
    assert!(
        summary["unmanaged_bytes"].as_u64() >= Some(20 << 20),
        "{summary}"
    );
}

#[test]
fn what_does_not_fit_ends_and_says_why() {
    if without_privilege("what_does_not_fit_ends_and_says_why") {
        return;
    }
    let run = |mib: u64| {
        let program = format!(
            "import random\nprint('began', flush=True)\ndata = [random.randbytes(4000) for _ in range(256 * {mib})]\nprint(len(data))"
        );
        Command::new(farpage())
            .args([
                "run",
                "--local",
                "24M",
                "--far",
                "32M",
                "--summary",
                "none",
                "--",
            ])
            .args(["/usr/bin/python3", "-I", "-c", &program])
            .env_remove("FARPAGE_AGENT")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    let fits = run(40);
    assert_eq!(
        (text(&fits.stdout), text(&fits.stderr)),
        ("began\n10240\n".to_owned(), String::new())
    );
    let too_large = run(96);
    assert_eq!(too_large.status.signal(), Some(libc::SIGBUS));
    assert_eq!(text(&too_large.stdout), "began\n");
    let told = text(&too_large.stderr);
    assert!(
        told.contains("far memory is full") && told.contains("--far"),
        "{told}"
    );
}

#[test]
fn under_a_limit_of_address_space_set_before() {
    if without_privilege("under_a_limit_of_address_space_set_before") {
        return;
    }
    // In KiB: room for the program and for all that farpage maps beside it, the pool included.
    let script = "ulimit -v 2000000; exec \"$@\"";
    let program = "data = bytearray(64 << 20)\nfor at in range(0, 64 << 20, 4096): data[at] = 1\nprint(sum(data))";
    let out = Command::new("sh")
        .args(["-c", script, "sh"])
        .arg(farpage())
        .args([
            "run",
            "--local",
            "24M",
            "--far",
            "256M",
            "--summary",
            "none",
            "--",
        ])
        .args(["/usr/bin/python3", "-I", "-c", program])
        .env_remove("FARPAGE_AGENT")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(
        (text(&out.stdout), text(&out.stderr)),
        ("16384\n".to_owned(), String::new())
    );
}
