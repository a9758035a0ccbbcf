//! The process tree of a job as `/proc` shows it: who is in it without having come to the door, and the end of all of it.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use farpage_attach::message::JOB_VARIABLE;

use crate::job::Job;
use crate::sys::process::{Process, is_running, kill, share_memory};

/// Between two looks at a tree; or so many times as long as the last look took, within bounds, for trees of hundreds of
/// processes.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
const LONGEST_INTERVAL: Duration = Duration::from_millis(500);
const LOOKS_TIMES: u32 = 20;
/// How long a process may take to come to the door after it was first seen: its loader brings the shim in.
const ARRIVAL: Duration = Duration::from_secs(1);
/// Most processes of one tree that are looked at.
const MAX_PROCESSES: usize = 4096;
/// The name of our own helpers.
const HELPER: &str = "farpage-helper";

/// Between two looks whether all of a job has ended.
const END_POLL: Duration = Duration::from_millis(1);
/// How long nothing must have been found: a process that is being replaced by another shows no environment meanwhile.
const END_SETTLED: Duration = Duration::from_millis(20);
/// How long the processes of a job may take to die of SIGKILL. Those that take longer are in the kernel's hands.
const END_DEADLINE: Duration = Duration::from_secs(5);

/// What is known of one job's tree.
#[derive(Debug, Default)]
pub struct Tree {
    look_at: Option<Instant>,
    strangers: HashMap<i32, Stranger>,
}

#[derive(Debug)]
struct Stranger {
    process: Process,
    since: Instant,
    counted: bool,
}

impl Tree {
    /// Resident anonymous pages of processes that are in the job's tree but not managed. Counts each such process
    /// once it has had time to attach.
    pub fn unmanaged_pages(&mut self, job: &Job) -> u64 {
        let began = Instant::now();
        if self.look_at.is_none_or(|at| began >= at) {
            self.look(job);
            let pause = began.elapsed() * LOOKS_TIMES;
            self.look_at = Some(began + pause.clamp(LOOK_INTERVAL, LONGEST_INTERVAL));
        }
        self.strangers
            .values()
            .filter(|stranger| stranger.counted)
            .filter_map(|stranger| stranger.process.sizes().ok())
            .map(|sizes| sizes.anonymous)
            .sum()
    }

    fn look(&mut self, job: &Job) {
        let Some(root) = job.root() else { return };
        let attached: HashSet<i32> = job
            .spaces()
            .iter()
            .filter_map(|handle| handle.pid())
            .collect();
        let members = descendants(root);
        self.strangers.retain(|pid, stranger| {
            if attached.contains(pid) && stranger.counted {
                // It was only late: a loaded machine may let a process wait for seconds.
                job.counters
                    .processes_unmanaged
                    .fetch_sub(1, Ordering::Relaxed);
            }
            members.contains(pid) && !attached.contains(pid) && is_running(*pid)
        });
        for pid in members {
            if attached.contains(&pid) || !is_running(pid) {
                continue;
            }
            if let Some(stranger) = self.strangers.get_mut(&pid) {
                if !stranger.counted && stranger.since.elapsed() > ARRIVAL {
                    // A vfork child borrows its parent's memory, and a helper is ours.
                    let borrowed = attached
                        .iter()
                        .any(|other| share_memory(pid, *other) == Some(true));
                    if !borrowed && stranger.process.name() != HELPER {
                        stranger.counted = true;
                        job.counters
                            .processes_unmanaged
                            .fetch_add(1, Ordering::Relaxed);
                        tracing::warn!(
                            pid,
                            name = stranger.process.name(),
                            "a process of the tree is not managed"
                        );
                    }
                }
            } else if let Ok(process) = Process::open(pid) {
                self.strangers.insert(
                    pid,
                    Stranger {
                        process,
                        since: Instant::now(),
                        counted: false,
                    },
                );
            }
        }
    }
}

/// Ends all processes of a job: those that attached, those whose environment names the job (they may be on their way to
/// a door that will be closed when they arrive), and those that descend from them. What any of them starts before it
/// dies is found at the next look.
pub fn end(job: &Job) {
    let began = Instant::now();
    let mut last_found = began;
    let mark = format!("{JOB_VARIABLE}={:x}", job.token);
    while last_found.elapsed() < END_SETTLED && began.elapsed() < END_DEADLINE {
        let attached = job.spaces();
        let members: HashSet<i32> = attached
            .iter()
            .filter_map(|handle| handle.pid())
            .chain(named(mark.as_bytes()))
            .flat_map(descendants)
            .filter(|pid| is_running(*pid))
            .collect();
        if !members.is_empty() {
            last_found = Instant::now();
        }
        for pid in members {
            kill(pid);
        }
        std::thread::sleep(END_POLL);
    }
}

/// Processes with this among the variables of their environment.
fn named(variable: &[u8]) -> impl Iterator<Item = i32> {
    let carries = move |pid: i32| {
        std::fs::read(format!("/proc/{pid}/environ"))
            .is_ok_and(|text| text.split(|byte| *byte == 0).any(|one| one == variable))
    };
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(move |pid| carries(*pid))
}

/// A process and all that descend from it, as far as their parents still live.
pub(crate) fn descendants(root: i32) -> Vec<i32> {
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() && found.len() < MAX_PROCESSES {
        let pid = found[next];
        next += 1;
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
            continue;
        };
        for task in tasks.flatten() {
            let children =
                std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            found.extend(
                children
                    .split_ascii_whitespace()
                    .filter_map(|child| child.parse::<i32>().ok()),
            );
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_carry_a_job_are_ended() {
        let limits = crate::job::Limits {
            local_pages: 1,
            far_pages: 1,
            copies: 1,
            fault_deadline: std::time::Duration::from_secs(1),
        };
        let place = crate::state::State::create().unwrap().new_job().unwrap();
        let job = Job::new(0xfeed_f00d_0123_4567, 0, limits, place);
        let mut orphans = std::process::Command::new("sh")
            .args(["-c", "sleep 5 & sleep 5 & wait"])
            .env(JOB_VARIABLE, format!("{:x}", job.token))
            .spawn()
            .unwrap();
        end(&job);
        assert!(!orphans.wait().unwrap().success());
        let mark = format!("{JOB_VARIABLE}={:x}", job.token);
        assert!(!named(mark.as_bytes()).any(is_running));
    }

    #[test]
    fn a_child_is_found() {
        let mut child = std::process::Command::new("sleep")
            .arg("5")
            .spawn()
            .unwrap();
        let found = descendants(std::process::id().cast_signed());
        let pid = child.id().cast_signed();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found.contains(&pid), "{found:?}");
    }
}
