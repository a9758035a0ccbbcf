//! redis-server with half of its data far: it is written to all the time, forks to save every few seconds, is started again
//! from its dump, and has every key right.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::tree::Tree;
use common::{alone, farpage, without_far_memory, without_program};
use farpage_bench::conformance::allowed_bytes;

/// How much data there is, MiB; `FARPAGE_REDIS_MIB` asks for more.
const DATA_MIB: u64 = 100;
/// What of it stays here at most.
const LOCAL_SHARE: u64 = 2;
const VALUE_BYTES: usize = 4000;
/// Keys of a MiB, with redis' own overhead.
const KEYS_PER_MIB: u64 = 240;
/// How long it is written to, seconds; `FARPAGE_REDIS_SECONDS` asks for longer.
const WRITING_SECONDS: u64 = 15;
/// How often the native server saves, to compare what its forks take.
const NATIVE_SAVES: usize = 5;
const SAVE_EVERY: Duration = Duration::from_secs(3);
/// An answer that takes longer does not come.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);
const START_DEADLINE: Duration = Duration::from_secs(60);

/// A number that the environment may ask for.
fn asked(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |number| number.parse().unwrap())
}

/// A server, killed if the test fails.
struct Server {
    run: Child,
    tree: Option<Tree>,
    /// What it may keep here.
    local: u64,
}

impl Drop for Server {
    fn drop(&mut self) {
        // The launcher's death ends the program.
        let _ = self.run.kill();
        let _ = self.run.wait();
    }
}

impl Server {
    /// Starts one under `farpage run`.
    fn start(folder: &Path, local: u64) -> (Self, Client) {
        let mut run = Command::new(farpage());
        run.args(["run", "--local", &local.to_string()])
            .args(["--summary", "json", "--summary-file", "account.json", "--"])
            .arg("redis-server")
            .env_remove("FARPAGE_AGENT");
        Self::start_by(run, folder, local)
    }

    /// Starts one by a command that ends in its name.
    fn start_by(mut command: Command, folder: &Path, local: u64) -> (Self, Client) {
        let socket = folder.join("redis.sock");
        let _ = std::fs::remove_file(&socket);
        let run = command
            .args(["--port", "0", "--save", "", "--appendonly", "no"])
            .args([
                "--rdbcompression",
                "no",
                "--daemonize",
                "no",
                "--unixsocket",
            ])
            .arg(&socket)
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let tree = Some(Tree::watch(run.id(), farpage()));
        let mut server = Self { run, tree, local };
        let began = Instant::now();
        loop {
            assert!(
                began.elapsed() < START_DEADLINE,
                "redis-server does not answer"
            );
            let ended = server.run.try_wait().unwrap();
            assert!(ended.is_none(), "redis-server ended: {ended:?}");
            if let Ok(stream) = UnixStream::connect(&socket) {
                let mut client = Client::new(stream);
                // Until its dump is loaded it says that it is loading.
                if client.ask(&["PING"]) == Reply::Line("PONG".into()) {
                    return (server, client);
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends it with a dump and judges what the run came to.
    fn shut_down(mut self, mut client: Client, folder: &Path, when: &str) {
        client.send(&["SHUTDOWN", "SAVE"]);
        let began = Instant::now();
        let status = loop {
            if let Some(status) = self.run.try_wait().unwrap() {
                break status;
            }
            assert!(began.elapsed() < ANSWER_DEADLINE, "it does not shut down");
            std::thread::sleep(Duration::from_millis(20));
        };
        assert!(status.success(), "{status}");
        let seen = self.tree.take().unwrap().seen();
        let account = std::fs::read(folder.join("account.json")).unwrap();
        let account: serde_json::Value = serde_json::from_slice(&account).unwrap();
        println!("redis, {when}: {seen:?} {account}");
        assert_eq!(
            account["far_slots_in_use_at_exit"], 0,
            "{when}: a leak: {account}"
        );
        assert_eq!(account["processes_unmanaged"], 0, "{when}: {account}");
        assert!(
            account["pages_evicted"].as_u64() > Some(0),
            "{when}: nothing went far: {account}"
        );
        // The summary's own peak counts what a fork shares twice; seen from outside it counts once.
        let allowed = allowed_bytes(self.local);
        assert!(seen.peak_bytes <= allowed, "{when}: {seen:?}");
    }
}

#[derive(Debug, PartialEq)]
enum Reply {
    /// A line, a number or an error's text.
    Line(String),
    Bytes(Vec<u8>),
    Nothing,
}

/// The little of redis' protocol that is needed.
struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(ANSWER_DEADLINE)).unwrap();
        stream.set_write_timeout(Some(ANSWER_DEADLINE)).unwrap();
        Self {
            stream: BufReader::new(stream),
        }
    }

    fn send(&mut self, words: &[&str]) {
        let mut text = format!("*{}\r\n", words.len());
        for word in words {
            text += &format!("${}\r\n{word}\r\n", word.len());
        }
        self.stream.get_mut().write_all(text.as_bytes()).unwrap();
    }

    fn ask(&mut self, words: &[&str]) -> Reply {
        self.send(words);
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        let (kind, rest) = line.trim_end().split_at(1);
        match kind {
            "$" if rest == "-1" => Reply::Nothing,
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>().unwrap() + 2];
                self.stream.read_exact(&mut bytes).unwrap();
                bytes.truncate(bytes.len() - 2);
                Reply::Bytes(bytes)
            }
            _ => Reply::Line(rest.to_owned()),
        }
    }

    fn set(&mut self, key: u64, version: u64) {
        let reply = self.ask(&["SET", &format!("key{key}"), &value(key, version)]);
        assert_eq!(reply, Reply::Line("OK".into()));
    }

    fn info(&mut self, section: &str, name: &str) -> String {
        let Reply::Bytes(text) = self.ask(&["INFO", section]) else {
            panic!("no INFO")
        };
        let text = String::from_utf8(text).unwrap();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("{name} is not in {text}"))
            .to_owned()
    }
}

fn value(key: u64, version: u64) -> String {
    let mut state =
        key.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ version.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mut text = String::with_capacity(VALUE_BYTES + 16);
    while text.len() < VALUE_BYTES {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        text += &format!("{:016x}", state ^ state >> 29);
    }
    text
}

/// A server's keys, as it must have them.
#[derive(Default)]
struct Model {
    versions: HashMap<u64, u64>,
    lot: u64,
}

impl Model {
    fn filled(client: &mut Client, keys: u64) -> Self {
        let mut model = Self::default();
        for key in 0..keys {
            client.set(key, 0);
            model.versions.insert(key, 0);
        }
        model
    }

    /// Writes a key.
    fn write_one(&mut self, client: &mut Client) {
        self.lot = self
            .lot
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let (key, version) = (
            (self.lot >> 33) % self.versions.len() as u64,
            self.lot >> 40,
        );
        client.set(key, version);
        self.versions.insert(key, version);
    }
}

/// Begins a save; returns how long the fork took, in microseconds, by redis' own measure.
fn save(client: &mut Client) -> u64 {
    let begun = client.ask(&["BGSAVE"]);
    assert_eq!(begun, Reply::Line("Background saving started".into()));
    client.info("stats", "latest_fork_usec").parse().unwrap()
}

/// Waits until no save is under way; the last one must have been well.
fn saved(client: &mut Client) {
    let deadline = Instant::now() + ANSWER_DEADLINE;
    while client.info("persistence", "rdb_bgsave_in_progress") != "0" {
        assert!(Instant::now() < deadline, "a save does not end");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(client.info("persistence", "rdb_last_bgsave_status"), "ok");
}

/// What forks take, in microseconds, where all memory is here: with pages of 4 KiB, as redis itself asks for.
fn native_forks(folder: &Path, keys: u64) -> Vec<u64> {
    let (_server, mut client) = Server::start_by(Command::new("redis-server"), folder, u64::MAX);
    let mut model = Model::filled(&mut client, keys);
    let forks = (0..NATIVE_SAVES).map(|_| {
        let took = save(&mut client);
        model.write_one(&mut client);
        saved(&mut client);
        took
    });
    forks.collect()
}

/// The median, and the most.
fn middle_and_most(mut values: Vec<u64>) -> (u64, u64) {
    values.sort_unstable();
    (values[values.len() / 2], values[values.len() - 1])
}

/// Every key has the version last written, and there are no others.
fn verify(client: &mut Client, versions: &HashMap<u64, u64>, when: &str) {
    assert_eq!(
        client.ask(&["DBSIZE"]),
        Reply::Line(versions.len().to_string()),
        "{when}"
    );
    for (key, version) in versions {
        let reply = client.ask(&["GET", &format!("key{key}")]);
        assert!(
            reply == Reply::Bytes(value(*key, *version).into_bytes()),
            "{when}: key{key} is not what was written last"
        );
    }
}

#[test]
fn saves_and_restarts() {
    let test = "redis saves_and_restarts";
    let _alone = alone();
    if without_far_memory(test) || without_program(test, "redis-server") {
        return;
    }
    let data_mib = asked("FARPAGE_REDIS_MIB", DATA_MIB);
    let (keys, local) = (data_mib * KEYS_PER_MIB, (data_mib << 20) / LOCAL_SHARE);
    let writing = Duration::from_secs(asked("FARPAGE_REDIS_SECONDS", WRITING_SECONDS));
    let folder = tempfile::tempdir().unwrap();
    let native = native_forks(folder.path(), keys);
    // Its dump is not the other's to begin with.
    std::fs::remove_file(folder.path().join("dump.rdb")).unwrap();

    let (server, mut client) = Server::start(folder.path(), local);
    let mut model = Model::filled(&mut client, keys);
    let (began, mut last_saved, mut forks) = (Instant::now(), Instant::now(), Vec::new());
    while began.elapsed() < writing {
        model.write_one(&mut client);
        if last_saved.elapsed() > SAVE_EVERY
            && client.info("persistence", "rdb_bgsave_in_progress") == "0"
        {
            forks.push(save(&mut client));
            last_saved = Instant::now();
        }
    }
    assert!(!forks.is_empty(), "it never saved");
    saved(&mut client);
    verify(&mut client, &model.versions, "before the restart");
    server.shut_down(client, folder.path(), "before the restart");

    let (server, mut client) = Server::start(folder.path(), local);
    verify(&mut client, &model.versions, "after the restart");
    server.shut_down(client, folder.path(), "after the restart");
    println!(
        "redis: {keys} keys, {} saves; fork, median and most: {:?} us, natively {:?} us",
        forks.len(),
        middle_and_most(forks.clone()),
        middle_and_most(native),
    );
}
