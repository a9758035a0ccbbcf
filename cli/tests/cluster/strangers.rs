//! Garbage, scribblers and those who are not meant to come in.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::common::cluster::{Cluster, GROUP, PYTHON, as_user};
use super::common::programs_in_c::compiled;
use super::common::{alone, copy_program, eventually, without_program};
use super::{LOCAL, PIECES, SMALL, cannot_run};

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
    copy_program(&compiled("hostile"), &scribbler);
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
