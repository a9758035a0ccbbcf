//! Programs of an unprivileged user through a cluster of separate processes, and what each part's failure does.
#![allow(missing_docs)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::cluster::{Cluster, GROUP, PATIENCE, PYTHON, Program, as_user, wait};
use common::programs_in_c::compiled;
use common::runs::{run, run_native};
use common::{alone, eventually, is_over, marked, skip, sys, without_far_memory, without_program};

/// 27 MB of data in a program of some 40 MB: a quarter of its peak may stay.
const PIECES: u32 = 9_000;
const LOCAL: &str = "10M";
const LOCAL_BYTES: u64 = 10 << 20;

/// Fits into [`LOCAL`] whatever happens to far memory.
const SMALL: u32 = 10;

fn cannot_run(test: &str) -> bool {
    if !sys::is_root() {
        skip(test, "starting programs as another user needs root");
        return true;
    }
    if !std::path::Path::new(PYTHON).exists() {
        skip(test, "/usr/bin/python3 is not installed");
        return true;
    }
    without_far_memory(test)
}

fn granted(cluster: &Cluster, node: usize) -> u64 {
    cluster.status()["nodes"][node]["used_bytes"]
        .as_u64()
        .unwrap()
}

fn same_as_native_over(fabric: &str) {
    let cluster = Cluster::start(fabric, &["64M", "64M"]);
    let native = cluster.run_native(PIECES).complete(1);
    let mut program = cluster.run_program(LOCAL, PIECES, "summary");
    program.built();
    assert_eq!(program.check(), native[0]);
    // Both nodes give, since the emptier one is asked first.
    assert!(granted(&cluster, 0) > 0 && granted(&cluster, 1) > 0);
    // A report comes every second.
    let figures = |field: &str| cluster.status()["agents"][0]["processes"][0][field].as_u64();
    eventually("the status shows the process", || {
        figures("far_pages").is_some_and(|n| n > 1000)
    });
    assert_eq!(
        figures("total_pages").unwrap(),
        figures("local_pages").unwrap() + figures("far_pages").unwrap()
    );
    assert_eq!(figures("local_limit_bytes"), Some(LOCAL_BYTES));
    let status = cluster.status();
    assert_eq!(status["agents"][0]["processes"][0]["name"], "python3");
    assert_eq!(status["capacity_bytes"], 128 << 20);
    assert_eq!(status["nodes"][1]["health"], "live");
    let text = cluster.status_text();
    for word in [
        "128.0 MiB lent by 2 nodes",
        "n0",
        "n1",
        "live",
        "python3",
        fabric,
    ] {
        assert!(text.contains(word), "{word} is not in:\n{text}");
    }
    assert_eq!(program.check(), native[0]);
    let (status, errors) = program.end();
    assert!(status.success(), "{status}: {errors}");

    let summary = cluster.summary("summary");
    assert_eq!(summary["far_slots_in_use_at_exit"], 0, "{summary}");
    assert_eq!(summary["fabric"], fabric, "{summary}");
    assert!(
        summary["pages_fetched"].as_u64().unwrap() > 1000,
        "{summary}"
    );
    assert!(
        summary["far_peak_bytes"].as_u64().unwrap() > LOCAL_BYTES,
        "{summary}"
    );
    cluster.stop();
}

#[test]
fn over_tcp_output_is_the_same_as_natively() {
    if cannot_run("over_tcp_output_is_the_same_as_natively") {
        return;
    }
    let _alone = alone();
    same_as_native_over("tcp");
}

/// The program of `cargo xtask demo`, smaller.
#[test]
fn over_tcp_sort_keeps_to_a_quarter_of_its_memory() {
    const TEST: &str = "over_tcp_sort_keeps_to_a_quarter_of_its_memory";
    if cannot_run(TEST) || without_program(TEST, "sort") {
        return;
    }
    let _alone = alone();
    let cluster = Cluster::start("tcp", &["128M", "128M"]);
    let mut text = String::new();
    let mut key = 0x9e37_79b9_7f4a_7c15_u64;
    for line in 0..100_000 {
        key = key
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        writeln!(text, "{key:016x}{line:0900}").unwrap();
    }
    std::fs::write(cluster.path("lines"), text).unwrap();
    let words = ["sort", "--parallel=1", "-S", "1G", "lines"];
    let native = run_native(&words, cluster.folder(), PATIENCE);
    assert!(native.status.success(), "{}", native.errors);

    let limit = native.seen.peak_bytes / 4;
    let mut command = cluster.run_command(&limit.to_string(), "sorted");
    command.arg("--").args(words);
    let far = run(
        command,
        &cluster.path("farpage"),
        cluster.folder(),
        2 * PATIENCE,
    );
    let summary = cluster.summary("sorted");
    println!(
        "{TEST}: native {:?}, {} MiB; far {:?}, {} KiB above the limit",
        native.elapsed,
        native.seen.peak_bytes >> 20,
        far.elapsed,
        far.seen.peak_bytes as i64 / 1024 - limit as i64 / 1024
    );
    assert!(far.status.success(), "{}", far.errors);
    assert_eq!(far.output, native.output);
    assert!(
        far.seen.peak_bytes <= limit + (16 << 20),
        "{:?} of {limit}: {summary}",
        far.seen
    );
    assert_eq!(summary["far_slots_in_use_at_exit"], 0, "{summary}");
    assert!(
        summary["far_peak_bytes"].as_u64().unwrap() > limit,
        "{summary}"
    );
    assert!(granted(&cluster, 0) > 0 && granted(&cluster, 1) > 0);
    cluster.stop();
}

#[test]
fn over_shm_between_processes_output_is_the_same_as_natively() {
    if cannot_run("over_shm_between_processes_output_is_the_same_as_natively") {
        return;
    }
    let _alone = alone();
    same_as_native_over("shm");
}

/// Huge pages reserved for one test.
struct Reserved {
    before: u64,
}

impl Reserved {
    const COUNT: &'static str = "/proc/sys/vm/nr_hugepages";

    /// Reserves so many more; fewer where the kernel finds no memory in one piece.
    fn pages(more: u64) -> Self {
        let reserved = Self {
            before: Self::count(),
        };
        let _ = std::fs::write(Self::COUNT, (reserved.before + more).to_string());
        reserved
    }

    fn count() -> u64 {
        let text = std::fs::read_to_string(Self::COUNT).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    /// Those that no file has been promised.
    fn unclaimed() -> u64 {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        let field = |name: &str| -> u64 {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .unwrap();
            line.trim().parse().unwrap()
        };
        field("HugePages_Free:") - field("HugePages_Rsvd:")
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::COUNT, self.before.to_string());
    }
}

#[test]
fn a_pool_of_reserved_huge_pages_serves() {
    const TEST: &str = "a_pool_of_reserved_huge_pages_serves";
    if cannot_run(TEST) {
        return;
    }
    let _alone = alone();
    // 64 MiB of 2 MiB each.
    let _reserved = Reserved::pages(32);
    if Reserved::unclaimed() < 32 {
        skip(
            TEST,
            "the kernel cannot reserve 32 huge pages (vm.nr_hugepages)",
        );
        return;
    }
    for fabric in ["tcp", "shm"] {
        let mut cluster = Cluster::start(fabric, &[]);
        let mut words = cluster.node_arguments("n0", "64M", fabric);
        words.push("--huge-pages".into());
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let unclaimed = Reserved::unclaimed();
        let node = cluster.daemon(&words);
        assert!(node.said.contains("lends memory at"), "{}", node.said);
        cluster.nodes.push(node);
        assert_eq!(Reserved::unclaimed(), unclaimed - 32, "{fabric}");
        eventually("the node is known", || {
            cluster.status()["nodes"][0]["health"] == "live"
        });
        let native = cluster.run_native(PIECES).complete(2);
        // The second program gets what the first has given back.
        for summary in ["first", "second"] {
            assert_eq!(
                cluster.run_program(LOCAL, PIECES, summary).complete(2),
                native,
                "{fabric}"
            );
            let summary = cluster.summary(summary);
            assert!(summary["pages_fetched"].as_u64() > Some(1000), "{summary}");
            assert_eq!(summary["far_slots_in_use_at_exit"], 0, "{summary}");
        }
        let logs = cluster.stop();
        assert!(!logs[1].contains("no reserved huge pages"), "{}", logs[1]);
    }
}

#[test]
fn an_agent_without_a_coordinator_says_so_and_leaves_nothing() {
    if cannot_run("an_agent_without_a_coordinator_says_so_and_leaves_nothing") {
        return;
    }
    let mut cluster = Cluster::empty();
    cluster.url = "http://127.0.0.1:1".to_owned();
    let words = cluster.agent_arguments();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (status, log) = cluster.refused(&words);
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(
        log.contains("cannot reach http://127.0.0.1:1") && log.contains("check that it runs"),
        "{log}"
    );
    assert!(!cluster.socket().exists());

    let mut status = cluster.farpage();
    status.args(["status", "--coordinator", &cluster.url]);
    let out = status.output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&out.stderr).contains("cannot reach"),
        "{out:?}"
    );
}

#[test]
fn programs_run_on_without_the_coordinator_and_with_the_next_one() {
    if cannot_run("programs_run_on_without_the_coordinator_and_with_the_next_one") {
        return;
    }
    let _alone = alone();
    let mut cluster = Cluster::start("tcp", &["128M", "128M"]);
    let mut program = cluster.run_program(LOCAL, PIECES, "summary");
    program.built();
    let hash = program.check();
    cluster.coordinator.as_mut().unwrap().kill();
    assert_eq!(program.check(), hash);
    assert!(cluster.agent_runs());

    // The state file knows the nodes and the lease; another program gets its share of what is left.
    cluster.start_coordinator();
    eventually("the nodes are known again", || {
        let status = cluster.status();
        status["nodes"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|node| node["health"] == "live")
            .count()
            == 2
    });
    let second = cluster.run_program(LOCAL, PIECES, "summary2").complete(1);
    assert_eq!(second[0], hash);
    assert_eq!(program.check(), hash);
    let (status, errors) = program.end();
    assert!(status.success(), "{status}: {errors}");
    assert_eq!(cluster.summary("summary")["far_slots_in_use_at_exit"], 0);
    cluster.stop();
}

#[test]
fn full_nodes_end_what_does_not_fit_and_nothing_else() {
    if cannot_run("full_nodes_end_what_does_not_fit_and_nothing_else") {
        return;
    }
    let _alone = alone();
    // Less than either program needs beside its 24M here. The first stays within it, the second does not.
    let mut cluster = Cluster::start("tcp", &["16M", "16M"]);
    let native = cluster.run_native(PIECES).complete(1);
    let mut fits = cluster.run_program("24M", PIECES, "fits");
    fits.built();
    assert_eq!(fits.check(), native[0]);

    let began = Instant::now();
    let too_large = cluster.run_program("24M", 4 * PIECES, "too_large");
    let (status, errors) = too_large.end();
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}: {errors}");
    assert!(began.elapsed() < PATIENCE);
    assert!(errors.contains("far memory is full"), "{errors}");

    assert_eq!(fits.check(), native[0]);
    assert!(fits.end().0.success());
    assert!(cluster.agent_runs());
    assert_eq!(cluster.summary("fits")["far_slots_in_use_at_exit"], 0);
    let logs = cluster.stop();
    assert!(logs[0].contains("far memory is full"), "{}", logs[0]);
}

#[test]
fn a_lost_node_ends_who_needs_its_pages_and_nobody_else() {
    if cannot_run("a_lost_node_ends_who_needs_its_pages_and_nobody_else") {
        return;
    }
    let _alone = alone();
    let mut cluster = Cluster::start("tcp", &["128M", "128M"]);
    let native = cluster.run_native(PIECES).complete(1);
    let mut small = cluster.run_program(LOCAL, SMALL, "small");
    small.built();
    let hash_of_small = small.check();
    let mut loser = cluster.run_program(LOCAL, PIECES, "loser");
    loser.built();
    assert_eq!(loser.check(), native[0]);
    assert!(granted(&cluster, 1) > 0);

    cluster.nodes[1].kill();
    // Its pages may come back: the program waits for them.
    loser.ask();
    assert_eq!(loser.line_within(Duration::from_secs(1)), None);
    eventually("the node counts as unreachable", || {
        cluster.status()["nodes"][1]["health"] == "unreachable"
    });
    assert!(cluster.status_text().contains("unreachable"));
    // Whoever comes now gets the other node's memory.
    assert_eq!(
        cluster.run_program(LOCAL, PIECES, "newcomer").complete(2),
        [native[0].clone(), native[0].clone()]
    );
    assert!(loser.child.try_wait().unwrap().is_none());

    // It comes back empty: now the pages are lost, and only now.
    cluster.start_node("n1", "128M", "tcp");
    let (status, errors) = loser.end();
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}: {errors}");
    assert!(errors.contains("its memory node has lost it"), "{errors}");
    assert_eq!(small.check(), hash_of_small);
    assert!(small.end().0.success());
    assert_eq!(
        cluster.run_program(LOCAL, PIECES, "later").complete(1),
        native
    );
    for summary in ["small", "loser", "newcomer", "later"] {
        assert_eq!(
            cluster.summary(summary)["far_slots_in_use_at_exit"],
            0,
            "{summary}"
        );
    }
    cluster.nodes.remove(1);
    cluster.stop();
}

#[test]
fn a_silent_node_ends_faults_at_their_deadline_and_not_before() {
    if cannot_run("a_silent_node_ends_faults_at_their_deadline_and_not_before") {
        return;
    }
    let _alone = alone();
    let mut cluster = Cluster::start("tcp", &["128M"]);
    let native = cluster.run_native(PIECES).complete(1);
    let mut patient = cluster.run_program(LOCAL, PIECES, "patient");
    let mut hasty = {
        let mut command = cluster.run_command(LOCAL, "hasty");
        command.args(["--fault-deadline", "2", "--", PYTHON]);
        command
            .arg(cluster.path("program.py"))
            .arg(PIECES.to_string());
        Program::start(command)
    };
    patient.built();
    hasty.built();
    assert_eq!(
        (patient.check(), hasty.check()),
        (native[0].clone(), native[0].clone())
    );

    let node = cluster.nodes[0].child.id() as i32;
    sys::kill(node, libc::SIGSTOP);
    let began = Instant::now();
    patient.ask();
    hasty.ask();
    let (status, errors) = hasty.end();
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}: {errors}");
    assert!(
        began.elapsed() >= Duration::from_secs(2),
        "{:?}",
        began.elapsed()
    );
    assert!(errors.contains("--fault-deadline"), "{errors}");
    assert_eq!(patient.line_within(Duration::from_millis(1)), None);
    sys::kill(node, libc::SIGCONT);
    assert_eq!(patient.line_within(PATIENCE), Some(native[0].clone()));
    assert_eq!(patient.check(), native[0]);
    assert!(patient.end().0.success());
    for summary in ["patient", "hasty"] {
        assert_eq!(
            cluster.summary(summary)["far_slots_in_use_at_exit"],
            0,
            "{summary}"
        );
    }
    assert!(cluster.agent_runs());
    cluster.stop();
}

#[test]
fn garbage_at_every_port_disturbs_nobody() {
    if cannot_run("garbage_at_every_port_disturbs_nobody") {
        return;
    }
    let _alone = alone();
    let cluster = Cluster::start("tcp", &["64M"]);
    let mut program = cluster.run_program(LOCAL, PIECES, "summary");
    program.built();
    let hash = program.check();

    let data_port = cluster.nodes[0]
        .said
        .trim()
        .rsplit(':')
        .next()
        .unwrap()
        .to_owned();
    let grpc_port = cluster.url.rsplit(':').next().unwrap().to_owned();
    for port in [data_port, grpc_port] {
        for garbage in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            &vec![0xff; 65536],
            &[0; 100],
            b"",
        ] {
            let mut stream = TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
            stream
                .set_read_timeout(Some(Duration::from_millis(200)))
                .unwrap();
            // The other end may have closed by now.
            let _ = stream.write_all(garbage);
            let _ = stream.read(&mut [0; 100]);
        }
    }
    // The agent's socket takes packets. One who sends no hello, one who breaks off, one who sends half a request.
    let mut python = Command::new(PYTHON);
    python.arg("-c").arg(
        "import os, socket, struct, sys\n\
         hello = struct.pack('<QII', int.from_bytes(b'farpage1', 'little'), 1, 4) + bytes(48)\n\
         for packets in [[b'x'], [bytes(4096)], [os.urandom(64)], [hello, b'{'], [hello, b'\"finish\"'], [hello[:60]], [], \
         [hello, b'{\"open\":{\"local_bytes\":16777216,\"far_bytes\":16777216,\"replicas\":1}}', b'}']]:\n\
         \u{20}   s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n\
         \u{20}   s.settimeout(0.3)\n\
         \u{20}   s.connect(sys.argv[1])\n\
         \u{20}   for packet in packets: s.send(packet)\n\
         \u{20}   try: s.recv(4096)\n\
         \u{20}   except OSError: pass\n\
         \u{20}   s.close()\n",
    );
    as_user(python.arg(cluster.socket()), &[GROUP]);
    let out = python.output().unwrap();
    assert!(out.status.success(), "{out:?}");

    // Handshakes whose packets are drawn by lot, some with descriptors.
    let mut python = Command::new(PYTHON);
    python.arg("-c").arg(
        "import array, os, random, socket, struct, sys\n\
         lot = random.Random(1)\n\
         magic = int.from_bytes(b'farpage1', 'little')\n\
         word = lambda: lot.choice([0, 1, 4096, 2**47, 2**64 - 1, lot.getrandbits(64), os.getpid()])\n\
         packet = lambda tag, kind: struct.pack('<QII6Q', magic, tag, kind, *(word() for _ in range(6)))\n\
         for _ in range(400):\n\
         \u{20}   s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n\
         \u{20}   s.settimeout(0.02)\n\
         \u{20}   s.connect(sys.argv[1])\n\
         \u{20}   try:\n\
         \u{20}       s.send(packet(1, lot.randrange(9)))\n\
         \u{20}       for _ in range(lot.randrange(5)):\n\
         \u{20}           fds = [array.array('i', [0] * lot.randrange(6))] if lot.randrange(2) else []\n\
         \u{20}           s.sendmsg([packet(lot.randrange(14), lot.randrange(9))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd) for fd in fds if fd])\n\
         \u{20}           s.recv(4096)\n\
         \u{20}   except OSError: pass\n\
         \u{20}   s.close()\n",
    );
    as_user(python.arg(cluster.socket()), &[GROUP]);
    let out = python.output().unwrap();
    assert!(out.status.success(), "{out:?}");

    assert_eq!(program.check(), hash);
    assert!(program.end().0.success());
    assert_eq!(cluster.summary("summary")["far_slots_in_use_at_exit"], 0);
    assert_eq!(
        cluster.run_program(LOCAL, PIECES, "again").complete(1),
        [hash]
    );
    cluster.stop();
}

#[test]
fn a_program_that_scribbles_on_what_it_shares_with_the_agent_harms_itself_alone() {
    const TEST: &str =
        "a_program_that_scribbles_on_what_it_shares_with_the_agent_harms_itself_alone";
    if cannot_run(TEST) || without_program(TEST, "cc") {
        return;
    }
    let _alone = alone();
    let mut cluster = Cluster::start("tcp", &["256M"]);
    let mut other = cluster.run_program(LOCAL, PIECES, "other");
    other.built();
    let hash = other.check();
    let scribbler = cluster.path("hostile");
    std::fs::copy(compiled("hostile"), &scribbler).unwrap();
    for seed in 1..=6 {
        let mut command = cluster.run_command("16M", "scribbler");
        command
            .arg("--")
            .arg(&scribbler)
            .arg("scribble")
            .env("SEED", seed.to_string());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let began = Instant::now();
        // What it has brought upon itself may be to wait for ever.
        while child.try_wait().unwrap().is_none() {
            if began.elapsed() > Duration::from_secs(5) {
                child.kill().unwrap();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(cluster.agent_runs());
        assert_eq!(other.check(), hash, "seed {seed}");
    }
    assert!(other.end().0.success());
    assert_eq!(cluster.summary("other")["far_slots_in_use_at_exit"], 0);
    eventually("nothing of theirs is left", || {
        cluster.status()["agents"][0]["processes"]
            .as_array()
            .is_some_and(Vec::is_empty)
    });
    assert_eq!(
        cluster.run_program(LOCAL, PIECES, "later").complete(1),
        [hash]
    );
    cluster.stop();
}

#[test]
fn wrong_sockets_users_and_names_are_told_what_to_do() {
    if cannot_run("wrong_sockets_users_and_names_are_told_what_to_do") {
        return;
    }
    let mut cluster = Cluster::start("tcp", &["32M"]);
    let complaint = |mut command: Command| {
        let out = command.output().unwrap();
        assert_eq!(out.status.code(), Some(1), "{out:?}");
        String::from_utf8(out.stderr).unwrap()
    };
    let run_at = |socket: &std::path::Path, groups: &[u32]| {
        let mut command = cluster.farpage();
        command
            .args(["run", "--local", LOCAL, "--agent"])
            .arg(socket)
            .args(["--", "true"]);
        as_user(&mut command, groups);
        command
    };
    // A socket that is not there; a file that is none.
    let text = complaint(run_at(&cluster.path("no.sock"), &[GROUP]));
    assert!(
        text.contains("no agent at") && text.contains("farpage agent --socket"),
        "{text}"
    );
    let file = cluster.path("no-socket");
    std::fs::write(&file, "").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o666)).unwrap();
    let text = complaint(run_at(&file, &[GROUP]));
    assert!(text.contains("no agent at"), "{text}");
    // A user of another group.
    let text = complaint(run_at(&cluster.socket(), &[GROUP + 1]));
    assert!(
        text.contains("does not serve this user") && text.contains("group"),
        "{text}"
    );
    // More copies than this version keeps.
    let mut replicas = cluster.farpage();
    replicas.args(["run", "--replicas", "2", "--agent"]);
    replicas.arg(cluster.socket()).args(["--", "true"]);
    let text = complaint(replicas);
    assert!(text.contains("leave out --replicas"), "{text}");
    // A second agent on the same socket. The first one keeps it.
    let words = cluster.agent_arguments();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (status, log) = cluster.refused(&words);
    assert_eq!(status.code(), Some(1));
    assert!(log.contains("another agent listens on"), "{log}");
    // A second node of the same name.
    let words = cluster.node_arguments("n0", "32M", "tcp");
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (status, log) = cluster.refused(&words);
    assert_eq!(status.code(), Some(1));
    assert!(
        log.contains("refuses this node") && log.contains("n0"),
        "{log}"
    );

    assert_eq!(
        cluster
            .run_program(LOCAL, SMALL, "summary")
            .complete(1)
            .len(),
        1
    );
    cluster.stop();
}

#[test]
fn a_killed_agent_takes_its_programs_with_it_but_nothing_else() {
    if cannot_run("a_killed_agent_takes_its_programs_with_it_but_nothing_else") {
        return;
    }
    let _alone = alone();
    let mut cluster = Cluster::start("tcp", &["64M"]);
    let mut program = cluster.run_program(LOCAL, PIECES, "summary");
    program.built();
    let hash = program.check();
    cluster.agent.as_mut().unwrap().kill();
    program.ask();
    // Never another hash: the right one at most, if all of its way was at home.
    let line = program.line_within(Duration::from_secs(20));
    assert!(line.is_none() || line.as_ref() == Some(&hash), "{line:?}");
    let (status, errors) = program.end();
    assert_eq!(status.signal(), Some(libc::SIGKILL), "{status}: {errors}");
    assert!(errors.contains("agent"), "{errors}");

    // The next agent takes the socket over, although the file of the last one is still there.
    cluster.start_agent(&[]);
    assert_eq!(
        cluster.run_program(LOCAL, PIECES, "again").complete(1),
        [hash]
    );
    cluster.stop();
}

#[test]
fn a_killed_launcher_takes_its_programs_with_it() {
    if cannot_run("a_killed_launcher_takes_its_programs_with_it") {
        return;
    }
    let _alone = alone();
    let cluster = Cluster::start("tcp", &["64M"]);
    let mut program = cluster.run_program(LOCAL, PIECES, "summary");
    program.built();
    program.check();
    let mark = cluster.path("program.py").display().to_string();
    assert!(!marked(&mark).is_empty());
    program.child.kill().unwrap();
    eventually("the program is ended", || marked(&mark).is_empty());
    eventually("its far memory is given back", || {
        // What is kept for the next program: four extents of 16 MiB, and two that a request may add.
        cluster.status()["agents"][0]["processes"]
            .as_array()
            .unwrap()
            .is_empty()
    });
    drop(program);
    cluster.stop();
}

/// `farpage run` without an agent, by root, marked by an argument.
fn embedded(mark: &str, script: &str) -> Command {
    let mut command = Command::new(common::farpage());
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
    let exe = common::farpage();
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
    for victim in ["agent", "far-memory", "run"] {
        let mark = format!("mark-of-{test}-{victim}-{}", std::process::id());
        let mut program = Program::start(embedded(&mark, script));
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

#[test]
fn a_node_locks_its_pool_and_says_what_it_cannot_have() {
    let _alone = alone();
    if !sys::is_root() {
        skip(
            "a_node_locks_its_pool_and_says_what_it_cannot_have",
            "locking 64 MiB needs root, or RLIMIT_MEMLOCK",
        );
        return;
    }
    let mut cluster = Cluster::empty();
    cluster.start_coordinator();
    let mut words = cluster.node_arguments("locked", "64M", "tcp");
    words.extend(["--lock".to_owned(), "--huge-pages".to_owned()]);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut node = cluster.daemon(&words);
    assert!(node.said.contains("lends memory at"), "{}", node.said);
    let field = |path: String, name: &str| -> u64 {
        let text = std::fs::read_to_string(path).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|rest| rest.split_whitespace().next());
        number.unwrap().parse().unwrap()
    };
    let huge = field("/proc/meminfo".to_owned(), "HugePages_Total:") * 2048 >= 64 << 10;
    let locked = field(format!("/proc/{}/status", node.child.id()), "VmLck:");
    let (_, log) = node.stop();
    // Huge pages are never swapped out, and the kernel does not count them as locked.
    assert!(huge || locked >= 64 << 10, "{locked} KiB are locked: {log}");
    assert_eq!(huge, !log.contains("no reserved huge pages"), "{log}");
}
