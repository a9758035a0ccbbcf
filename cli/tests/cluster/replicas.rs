//! With each page on two nodes, whatever happens to one of them costs a program nothing.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::Duration;

use super::common::cluster::{Cluster, PATIENCE, PYTHON, Program};
use super::common::{alone, eventually, eventually_within, patience, sys};
use super::{LOCAL, PIECES, cannot_run, granted};

/// A node that is silent may come back: its extents are copied elsewhere after ten seconds, and that goes on beside other work.
pub(super) const COPIED: Duration = Duration::from_secs(60);
/// Agents report once a second.
const TOLD_EVERY: Duration = Duration::from_secs(1);

/// Builds data as `BUILD_AND_CHECK` does; for each line of input it changes a third of it, forks a child that changes its own
/// and hashes it, and prints the child's hash and its own.
const CHANGE_AND_CHECK: &str = r#"
import hashlib, os, random, sys
source = random.Random(7)
data = [bytearray(source.randbytes(3000)) for _ in range(int(sys.argv[1]))]
def digest():
    all = hashlib.sha256()
    for piece in data:
        all.update(piece)
    return all.hexdigest()
print("built", flush=True)
for turn, line in enumerate(sys.stdin):
    for at in range(turn % 3, len(data), 3):
        data[at][turn % 3000] ^= 0x5a
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        for at in range(0, len(data), 50):
            data[at][0] ^= 1
        os.write(theirs, digest().encode())
        os._exit(0)
    os.close(theirs)
    said = b""
    while piece := os.read(ours, 100):
        said += piece
    os.close(ours)
    _, status = os.waitpid(child, 0)
    print(status, said.decode(), digest(), flush=True)
"#;

const TURNS: usize = 8;

pub(super) fn changing(cluster: &Cluster, replicas: &str, summary: &str) -> Program {
    let path = cluster.path("changing.py");
    std::fs::write(&path, CHANGE_AND_CHECK).unwrap();
    let mut command = cluster.run_command(LOCAL, summary);
    command
        .args(["--replicas", replicas, "--", PYTHON])
        .arg(path);
    command.arg(PIECES.to_string());
    Program::start(command)
}

/// What it says natively, turn by turn.
pub(super) fn expected(cluster: &Cluster) -> Vec<String> {
    let path = cluster.path("changing.py");
    std::fs::write(&path, CHANGE_AND_CHECK).unwrap();
    let mut command = Command::new(PYTHON);
    command.arg(path).arg(PIECES.to_string());
    Program::start(command).complete(TURNS)
}

pub(super) fn ends_well(cluster: &Cluster, program: Program, summary: &str) {
    let (status, errors) = program.end();
    assert!(status.success(), "{status}: {errors}");
    let summary = cluster.summary(summary);
    assert_eq!(summary["far_slots_in_use_at_exit"], 0, "{summary}");
    assert_eq!(summary["pages_poisoned"], 0, "{summary}");
}

/// Waits until each extent has its copies, one of them on this node.
fn await_copies_on(cluster: &Cluster, node: usize) {
    let is_told = || granted(cluster, node) > 0 && has_all_copies(cluster);
    eventually_within(COPIED, "each extent has its copies again", is_told);
    // That may be what the agent told before it heard of the loss.
    std::thread::sleep(2 * TOLD_EVERY);
    eventually_within(COPIED, "and that is news", is_told);
}

pub(super) fn has_all_copies(cluster: &Cluster) -> bool {
    cluster.status()["extents_below_replicas"] == 0
}

#[test]
fn a_killed_node_costs_nothing_and_its_copies_are_made_elsewhere() {
    if cannot_run("a_killed_node_costs_nothing_and_its_copies_are_made_elsewhere") {
        return;
    }
    let _alone = alone();
    let mut cluster = Cluster::start("tcp", &["128M", "128M"]);
    let native = expected(&cluster);
    let mut program = changing(&cluster, "2", "summary");
    program.built();
    assert_eq!(program.check(), native[0]);
    assert_eq!(granted(&cluster, 0), granted(&cluster, 1));
    assert!(granted(&cluster, 0) > 0);

    // While it changes its data and forks.
    program.ask();
    std::thread::sleep(Duration::from_millis(30));
    cluster.nodes[1].kill();
    let line = program.line_within(patience(PATIENCE));
    assert_eq!(line.as_ref(), Some(&native[1]));
    assert_eq!(program.check(), native[2]);
    eventually("status tells of missing copies", || {
        !has_all_copies(&cluster)
    });

    cluster.start_node("n2", "128M", "tcp");
    assert_eq!(program.check(), native[3]);
    await_copies_on(&cluster, 2);
    // The one that was spared all the time goes now.
    cluster.nodes[0].kill();
    for turn in &native[4..] {
        assert_eq!(&program.check(), turn);
    }
    ends_well(&cluster, program, "summary");
    assert_eq!(cluster.summary("summary")["replicas"], 2);
    cluster.nodes.truncate(3);
    cluster.nodes.remove(1);
    cluster.nodes.remove(0);
    cluster.stop();
}

#[test]
fn a_silent_node_is_not_waited_for_where_another_answers() {
    if cannot_run("a_silent_node_is_not_waited_for_where_another_answers") {
        return;
    }
    let _alone = alone();
    let cluster = Cluster::start("tcp", &["128M", "128M"]);
    let native = expected(&cluster);
    let mut program = changing(&cluster, "2", "summary");
    program.built();
    assert_eq!(program.check(), native[0]);
    // The one that is asked first.
    let node = cluster.nodes[0].child.id() as i32;
    sys::kill(node, libc::SIGSTOP);
    for turn in &native[1..4] {
        assert_eq!(&program.check(), turn);
    }
    eventually("the node counts as unreachable", || {
        cluster.status()["nodes"][0]["health"] == "unreachable"
    });
    assert_eq!(program.check(), native[4]);
    sys::kill(node, libc::SIGCONT);
    eventually_within(COPIED, "it has what it missed", || {
        cluster.status()["nodes"][0]["health"] == "live" && has_all_copies(&cluster)
    });
    for turn in &native[5..] {
        assert_eq!(&program.check(), turn);
    }
    ends_well(&cluster, program, "summary");
    cluster.stop();
}

#[test]
fn a_node_that_comes_back_empty_is_filled_again() {
    if cannot_run("a_node_that_comes_back_empty_is_filled_again") {
        return;
    }
    let _alone = alone();
    let mut cluster = Cluster::start("shm", &["128M", "128M"]);
    let native = expected(&cluster);
    let mut program = changing(&cluster, "2", "summary");
    program.built();
    assert_eq!(program.check(), native[0]);
    for (node, turn) in [(0, 1), (1, 3)] {
        cluster.nodes[node].kill();
        let id = format!("n{node}");
        cluster.start_node(&id, "128M", "shm");
        let fresh = cluster.nodes.pop().unwrap();
        cluster.nodes[node] = fresh;
        assert_eq!(program.check(), native[turn]);
        assert_eq!(program.check(), native[turn + 1]);
        await_copies_on(&cluster, node);
    }
    for turn in &native[5..] {
        assert_eq!(&program.check(), turn);
    }
    ends_well(&cluster, program, "summary");
    cluster.stop();
}

/// A node's pool as the kernel shows it.
struct Pool {
    memory: File,
    pages: Vec<u64>,
}

impl Pool {
    /// Its pages that are not zeros.
    fn of(pid: u32) -> Self {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let memory = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .unwrap();
        let mut pages = Vec::new();
        for line in maps.lines().filter(|line| line.contains("/memfd:")) {
            let range = line.split_whitespace().next().unwrap();
            let (start, end) = range.split_once('-').unwrap();
            let address = |text: &str| u64::from_str_radix(text, 16).unwrap();
            let (start, end) = (address(start), address(end));
            // Only pools are as large.
            if end - start < 64 << 20 {
                continue;
            }
            let mut page = [0; 4096];
            pages.extend((start..end).step_by(4096).filter(|at| {
                memory.read_exact_at(&mut page, *at).is_ok() && page.iter().any(|byte| *byte != 0)
            }));
        }
        assert!(pages.len() > 1000, "{maps}");
        Self { memory, pages }
    }

    fn byte(&self, page: u64) -> u8 {
        let mut byte = [0];
        self.memory.read_exact_at(&mut byte, page + 100).unwrap();
        byte[0]
    }

    /// Flips a bit in each page. Returns what was there.
    fn flip(&self) -> Vec<u8> {
        let before: Vec<u8> = self.pages.iter().map(|page| self.byte(*page)).collect();
        for (page, byte) in self.pages.iter().zip(&before) {
            self.memory.write_all_at(&[byte ^ 4], page + 100).unwrap();
        }
        before
    }
}

#[test]
fn bits_flipped_on_a_node_are_healed_from_the_other() {
    if cannot_run("bits_flipped_on_a_node_are_healed_from_the_other") {
        return;
    }
    let _alone = alone();
    let cluster = Cluster::start("tcp", &["128M", "128M"]);
    let native = cluster.run_native(PIECES).complete(1);
    let mut program = cluster.run_program_with(&["--replicas", "2"], LOCAL, PIECES, "summary");
    program.built();
    assert_eq!(program.check(), native[0]);
    let pool = Pool::of(cluster.nodes[0].child.id());
    let before = pool.flip();
    for _ in 0..3 {
        assert_eq!(program.check(), native[0]);
    }
    // All that it read was found to be bad, and is good again; some pages were here all the time.
    eventually("it is healed", || {
        let now = pool.pages.iter().zip(&before);
        let healed = now
            .filter(|(page, byte)| pool.byte(**page) == **byte)
            .count();
        healed > before.len() / 2
    });
    assert_eq!(program.check(), native[0]);
    ends_well(&cluster, program, "summary");
    let logs = cluster.stop();
    assert!(logs[0].contains("failed their check"), "{}", logs[0]);
}

#[test]
fn bits_flipped_in_the_only_copy_end_in_sigbus_and_are_never_returned() {
    if cannot_run("bits_flipped_in_the_only_copy_end_in_sigbus_and_are_never_returned") {
        return;
    }
    let _alone = alone();
    let cluster = Cluster::start("tcp", &["128M"]);
    let mut program = cluster.run_program(LOCAL, PIECES, "summary");
    program.built();
    program.check();
    Pool::of(cluster.nodes[0].child.id()).flip();
    program.ask();
    assert_eq!(program.line_within(patience(PATIENCE)), None);
    let (status, errors) = program.end();
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}: {errors}");
    assert!(errors.contains("keep failing their check"), "{errors}");
    assert_eq!(cluster.summary("summary")["far_slots_in_use_at_exit"], 0);
    cluster.stop();
}

#[test]
fn without_an_agent_there_are_as_many_nodes_as_copies() {
    if cannot_run("without_an_agent_there_are_as_many_nodes_as_copies") {
        return;
    }
    let _alone = alone();
    let cluster = Cluster::empty();
    let native = cluster.run_native(PIECES).complete(2);
    let mut command = cluster.farpage();
    command.args(["run", "--local", LOCAL, "--far", "128M", "--replicas", "3"]);
    command.args(["--summary", "json", "--summary-file"]);
    command.arg(cluster.path("summary")).args(["--", PYTHON]);
    command
        .arg(cluster.path("program.py"))
        .arg(PIECES.to_string());
    let hashes = Program::start(command).complete(2);
    assert_eq!(hashes, native);
    let summary = cluster.summary("summary");
    assert_eq!(summary["replicas"], 3, "{summary}");
    assert_eq!(summary["extents_below_replicas"], 0, "{summary}");
    assert_eq!(summary["far_slots_in_use_at_exit"], 0, "{summary}");
    cluster.assert_nothing_runs();
}
