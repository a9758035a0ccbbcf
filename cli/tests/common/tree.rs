//! Watches how much anonymous memory a program's process tree has resident, from outside.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::sys;

/// How often to look, if looking is cheap.
const INTERVAL: Duration = Duration::from_millis(3);

/// How much longer to wait than a look takes. Looking holds the program's memory map, and must not be what slows it.
const REST_PER_LOOK: u32 = 2;

/// A sum over processes that took longer than this to read is of no one moment: what one process gave back meanwhile,
/// another may have taken, and is in the sum twice. It's read again, and the least of these sums counts.
const ONE_MOMENT: Duration = Duration::from_millis(8);

/// How often a sum is read if it never is of one moment.
const READINGS: usize = 3;

/// The name of the process that farpage adds to each program process and that shares its memory.
const HELPER: &str = "farpage-helper";

/// What was seen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// The most anonymous memory resident in the whole tree at one look.
    pub peak_bytes: u64,
    /// How many processes there were in all, without farpage's own.
    pub processes: usize,
    /// How often was looked.
    pub looks: usize,
    /// How many sums over processes were read again, since reading them took too long.
    pub read_again: usize,
    /// The longest time without a look: a peak shorter than this can have been missed.
    pub longest_gap: Duration,
}

/// A thread that watches until it is asked for what it saw.
#[derive(Debug)]
pub struct Tree {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Seen>,
}

impl Tree {
    /// Watches this process and its descendants, without those that run farpage's own executable.
    pub fn watch(root: u32, own: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut watcher = Watcher {
                own,
                known: BTreeMap::from([(root, birth(root))]),
                programs: BTreeSet::new(),
                seen: Seen::default(),
            };
            let mut last = Instant::now();
            while !asked.load(Ordering::Relaxed) {
                let start = Instant::now();
                watcher.look();
                watcher.seen.looks += 1;
                watcher.seen.longest_gap = watcher.seen.longest_gap.max(start - last);
                last = start;
                std::thread::sleep(INTERVAL.max(start.elapsed() * REST_PER_LOOK));
            }
            watcher.seen
        });
        Self { stop, thread }
    }

    /// Ends the watching.
    pub fn seen(self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

struct Watcher {
    own: PathBuf,
    /// Every process of the tree seen so far and when it was born: one whose parent has died is no one's child any
    /// more, and a number can come to belong to somebody else.
    known: BTreeMap<u32, Option<u64>>,
    /// The processes among them that were seen to be the program's.
    programs: BTreeSet<u32>,
    seen: Seen,
}

impl Watcher {
    fn look(&mut self) {
        self.known
            .retain(|pid, born| born.is_some() && birth(*pid) == *born);
        let mut queue: Vec<u32> = self.known.keys().copied().collect();
        while let Some(pid) = queue.pop() {
            for child in children(pid) {
                if self.known.insert(child, birth(child)).is_none() {
                    queue.push(child);
                }
            }
        }
        let mut memories: Vec<u32> = Vec::new();
        let programs: Vec<u32> = self
            .known
            .keys()
            .copied()
            .filter(|pid| !self.is_ours(*pid))
            .collect();
        for pid in programs {
            self.programs.insert(pid);
            // Processes that share one memory each report all of it.
            if !memories
                .iter()
                .any(|other| sys::same_memory(pid, *other) == Some(true))
            {
                memories.push(pid);
            }
        }
        let bytes = self.resident(&memories);
        self.seen.peak_bytes = self.seen.peak_bytes.max(bytes);
        self.seen.processes = self.programs.len();
    }

    /// How much anonymous memory these processes have resident, which share no memory with each other.
    fn resident(&mut self, memories: &[u32]) -> u64 {
        if let [only] = memories {
            // Nothing is shared, so that the kernel's counter says the same as walking the pages, at once.
            return field(&format!("/proc/{only}/status"), "RssAnon:");
        }
        let mut least = u64::MAX;
        for reading in 1..=READINGS {
            let start = Instant::now();
            let sum = memories
                .iter()
                .map(|pid| field(&format!("/proc/{pid}/smaps_rollup"), "Pss_Anon:"))
                .sum();
            least = least.min(sum);
            if start.elapsed() <= ONE_MOMENT || reading == READINGS {
                break;
            }
            self.seen.read_again += 1;
        }
        least
    }

    /// farpage's own processes: the launcher, the agent, the memory node, and the helpers beside program processes.
    fn is_ours(&self, pid: u32) -> bool {
        let runs_own = fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == self.own);
        runs_own
            || fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|comm| comm.trim_end() == HELPER)
    }
}

/// The children of all of a process's threads.
fn children(pid: u32) -> Vec<u32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    let lists = tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<_>>()
        })
        .collect()
}

/// When the process was started, in clock ticks since boot.
fn birth(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text.get(text.rfind(')')? + 1..)?
        .split_whitespace()
        .nth(19)?
        .parse()
        .ok()
}

/// A field in KiB, as bytes; zero if the process is gone.
fn field(path: &str, name: &str) -> u64 {
    let text = fs::read_to_string(Path::new(path)).unwrap_or_default();
    let value = text.lines().find_map(|line| {
        line.strip_prefix(name)?
            .split_whitespace()
            .next()?
            .parse::<u64>()
            .ok()
    });
    value.unwrap_or(0) * 1024
}
