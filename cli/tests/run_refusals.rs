//! What farpage refuses, with which status, and that it says what to do next.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::{copy_program, farpage, farpage_run, skip, sys};

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

#[test]
fn not_found_is_127_and_not_executable_126() {
    let folder = tempfile::tempdir().unwrap();
    let plain = folder.path().join("plain");
    fs::write(&plain, "x").unwrap();
    let plain = plain.to_str().unwrap();
    let cases = [
        ("farpage-no-such-program", 127, "command not found"),
        ("./no/such/program", 127, "No such file or directory"),
        ("/etc/passwd/x", 127, "No such file or directory"),
        (plain, 126, "Permission denied"),
        ("/tmp", 126, "Is a directory"),
        ("", 127, "command not found"),
    ];
    for (program, status, message) in cases {
        let out = run(&[program]);
        assert_eq!(
            out.status.code(),
            Some(status),
            "{program}: {}",
            text(&out.stderr)
        );
        assert!(
            text(&out.stderr).contains(message),
            "{program}: {}",
            text(&out.stderr)
        );
    }
}

#[test]
fn bad_arguments_are_2() {
    let cases: &[(&[&str], &str)] = &[
        (&[], "Usage"),
        (&["runn"], "unrecognized"),
        (&["run"], "CMD"),
        (&["run", "--locl", "64M", "--", "true"], "--locl"),
        (&["run", "--local", "0", "--", "true"], "zero"),
        (&["run", "--local", "-5M", "--", "true"], "-5"),
        (&["run", "--local", "64X", "--", "true"], "64M"),
        (&["run", "--local", "64MB", "--", "true"], "powers of 1024"),
        (&["run", "--local", "4K", "--", "true"], "too small"),
        (&["run", "--local", "999999P", "--", "true"], "128T"),
        (
            &["run", "--local", "99999999999999999999999", "--", "true"],
            "128T",
        ),
        (&["run", "--far", "100T", "--", "true"], "this machine"),
        (
            &["run", "--local", "2G", "--far", "1G", "--", "true"],
            "more than --far",
        ),
        (&["run", "--fabric", "pigeon", "--", "true"], "pigeon"),
        (
            &["run", "--device", "device=rxe0", "--", "true"],
            "for --fabric rdma",
        ),
        (
            &["run", "--agent", "/a", "--device", "port=1", "--", "true"],
            "farpage agent",
        ),
        (&["run", "--replicas", "0", "--", "true"], "0"),
        (&["run", "--replicas", "5", "--", "true"], "from 1 to 4"),
        (&["run", "--summary", "xml", "--", "true"], "xml"),
        (
            &[
                "run",
                "--summary",
                "none",
                "--summary-file",
                "x",
                "--",
                "true",
            ],
            "--summary-file",
        ),
        (
            &["node", "--capacity", "1G", "--fabric", "tcp"],
            "--coordinator",
        ),
        (
            &[
                "node",
                "--capacity",
                "0",
                "--fabric",
                "tcp",
                "--coordinator",
                "http://x",
            ],
            "zero",
        ),
        (
            &["coordinator", "--listen", "nowhere", "--state", "file:/x"],
            "--listen",
        ),
        (
            &[
                "coordinator",
                "--listen",
                "127.0.0.1:0",
                "--state",
                "redis:x",
            ],
            "file:PATH",
        ),
        (&["bench"], "NAME"),
        (&["bench", "fabric", "--queues", "1,0"], "--queues"),
    ];
    for (flags, message) in cases {
        let out = farpage_with(flags);
        assert_eq!(
            out.status.code(),
            Some(2),
            "{flags:?}: {}",
            text(&out.stderr)
        );
        assert!(
            text(&out.stderr).contains(message),
            "{flags:?}: {}",
            text(&out.stderr)
        );
        assert_eq!(text(&out.stdout), "", "{flags:?}");
    }
}

#[test]
fn failures_are_1_and_say_what_to_do() {
    let out = farpage_with(&[
        "run",
        "--summary-file",
        "/nonexistent/summary",
        "--",
        "true",
    ]);
    assert_eq!(out.status.code(), Some(1));
    assert!(
        text(&out.stderr).contains("can be written"),
        "{}",
        text(&out.stderr)
    );
    let out = farpage_with(&[
        "run",
        "--agent",
        "/nonexistent/agent.sock",
        "--",
        "touch",
        "/nonexistent/started",
    ]);
    assert_eq!(out.status.code(), Some(1));
    assert!(
        text(&out.stderr).contains("farpage agent --socket"),
        "{}",
        text(&out.stderr)
    );
    let benches: &[(&[&str], &str)] = &[
        (&["bench", "nonesuch"], "--list"),
        (&["bench", "fault", "--peer", "far:7700"], "bench fabric"),
        (&["bench", "fork", "--serve", "0.0.0.0:77"], "bench fabric"),
        (&["bench", "fault", "--agent", "a.sock"], "--peer"),
        (&["bench", "fabric", "--async-rdma", "x"], "--fabric rdma"),
        (&["bench", "fabric", "--sizes", "4K,5K"], "powers of two"),
        (&["bench", "fault", "--queues", "2"], "bench fabric"),
    ];
    for (words, message) in benches {
        let out = farpage_with(words);
        assert_eq!(out.status.code(), Some(1), "{words:?}");
        let said = text(&out.stderr);
        assert!(said.contains(message), "{words:?}: {said}");
    }
}

/// Compiles a program from nothing but a `main`.
fn compile(folder: &Path, flags: &[&str]) -> Option<String> {
    let (source, program) = (folder.join("main.c"), folder.join("main"));
    fs::write(&source, "int main(void) { return 0; }\n").unwrap();
    let built = Command::new("gcc")
        .args(flags)
        .arg(&source)
        .arg("-o")
        .arg(&program)
        .output()
        .ok()?;
    built
        .status
        .success()
        .then(|| program.to_str().unwrap().to_owned())
}

#[test]
fn static_programs_are_refused() {
    for flags in [["-static"], ["-static-pie"]] {
        let folder = tempfile::tempdir().unwrap();
        let Some(program) = compile(folder.path(), &flags) else {
            skip(
                "static_programs_are_refused",
                "gcc cannot link statically here; cargo xtask setup installs it",
            );
            return;
        };
        let out = run(&[&program]);
        assert_eq!(out.status.code(), Some(1));
        assert!(
            text(&out.stderr).contains("statically linked"),
            "{}",
            text(&out.stderr)
        );
        // Through a script as well.
        let script = folder.path().join("script");
        fs::write(&script, format!("#!{program}\n")).unwrap();
        fs::set_permissions(&script, Permissions::from_mode(0o755)).unwrap();
        let out = run(&[script.to_str().unwrap()]);
        assert!(
            text(&out.stderr).contains("statically linked"),
            "{}",
            text(&out.stderr)
        );
    }
}

#[test]
fn setuid_programs_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("true");
    copy_program(Path::new("/bin/true"), &program);
    for mode in [0o4755, 0o2755] {
        fs::set_permissions(&program, Permissions::from_mode(mode)).unwrap();
        let out = run(&[program.to_str().unwrap()]);
        assert_eq!(out.status.code(), Some(1));
        assert!(text(&out.stderr).contains("set"), "{}", text(&out.stderr));
        assert!(
            text(&out.stderr).contains("without farpage"),
            "{}",
            text(&out.stderr)
        );
    }
}

#[test]
fn an_account_without_privilege_is_told_the_remedy() {
    let test = "an_account_without_privilege_is_told_the_remedy";
    if !sys::is_root() {
        return skip(test, "needs root to become another account");
    }
    // Its own copy, as the build's folder may be closed to other accounts.
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let copy = folder.path().join("farpage");
    copy_program(&farpage(), &copy);
    let shim = "libfarpage_preload.so";
    let built = farpage().with_file_name(shim);
    copy_program(&built, &folder.path().join(shim));
    let as_nobody = |flags: &[&str]| {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
            .arg(&copy)
            .args(flags);
        command.current_dir("/").output().unwrap()
    };
    let doctor = as_nobody(&["doctor", "--json"]);
    assert_eq!(doctor.status.code(), Some(0), "{}", text(&doctor.stderr));
    let report: serde_json::Value = serde_json::from_slice(&doctor.stdout).unwrap();
    assert_eq!(report["ready"], false);
    if fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd")
        .is_ok_and(|value| value.trim() == "1")
    {
        return skip(
            test,
            "vm.unprivileged_userfaultfd is 1: every account has the privilege",
        );
    }
    let out = as_nobody(&["run", "--", "true"]);
    assert_eq!(out.status.code(), Some(1));
    for remedy in ["sudo farpage", "farpage agent", "--agent"] {
        assert!(text(&out.stderr).contains(remedy), "{}", text(&out.stderr));
    }
}

/// In a container, root may have userfaultfd by the system call; programs, which make their own, may not.
#[test]
fn without_the_device_it_says_how_to_have_it() {
    let alone = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && exec \"$@\"";
    let in_a_container = |words: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", alone, "sh"]);
        command.arg(farpage()).args(words).stdin(Stdio::null());
        command.output().unwrap()
    };
    if !in_a_container(&["--version"]).status.success() {
        skip(
            "without_the_device_it_says_how_to_have_it",
            "mounts of its own take root",
        );
        return;
    }
    let out = in_a_container(&["run", "--local", "16M", "--", "/bin/true"]);
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(
        said.contains("/dev/userfaultfd is not there") && said.contains("--device"),
        "{said}"
    );
    let out = in_a_container(&["doctor"]);
    let said = text(&out.stdout);
    assert!(said.contains("MISSING userfaultfd"), "{said}");
}
