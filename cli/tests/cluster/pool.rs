//! The node's pool: locked, and on huge pages.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use super::common::cluster::{Cluster, as_user, wait};
use super::common::{alone, eventually, skip, sys};
use super::{LOCAL, PIECES, cannot_run};

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
    let words = cluster.node_arguments("locked", "64M", "tcp");
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let field = |path: String, name: &str| -> u64 {
        let text = std::fs::read_to_string(path).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|rest| rest.split_whitespace().next());
        number.unwrap().parse().unwrap()
    };
    let huge = field("/proc/meminfo".to_owned(), "HugePages_Total:") * 2048 >= 64 << 10;
    for at_once in [true, false] {
        let more: &[&str] = if at_once { &["--lock"] } else { &[] };
        let mut node = cluster.daemon(&[&words, more].concat());
        assert!(node.said.contains("lends memory at"), "{}", node.said);
        let status = format!("/proc/{}/status", node.child.id());
        let locked = field(status.clone(), "VmLck:");
        let here = field(status, "RssShmem:");
        let (_, log) = node.stop();
        // Huge pages are never swapped out, and the kernel counts them neither as locked nor as here.
        assert!(huge || locked >= 64 << 10, "{locked} KiB are locked: {log}");
        // Nor does it count to the page.
        assert!(
            huge || at_once == (here >= 32 << 10),
            "{here} KiB are here: {log}"
        );
        assert_eq!(huge, !log.contains("no reserved huge pages"), "{log}");
    }

    let mut command = cluster.farpage();
    command
        .args(words)
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    as_user(&mut command, &[]);
    sys::before_exec(&mut command, || sys::limit_locked_memory(1 << 20));
    let mut node = command.spawn().unwrap();
    let mut log = BufReader::new(node.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains("is not locked in memory") {
        assert!(
            log.read_line(&mut said).unwrap() > 0,
            "it never says so: {said}"
        );
    }
    assert!(said.contains("RLIMIT_MEMLOCK"), "{said}");
    sys::kill(node.id() as i32, libc::SIGTERM);
    wait(&mut node, "the node's end");
}
