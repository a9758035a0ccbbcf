//! Ceilings: how much of its `--local` the memory cgroups above a job leave to it.
//!
//! What a group holds besides our jobs' memory (other programs, shared memory, the kernel's own) goes off its limit, and so
//! does a reserve. Jobs in one group share the rest in proportion to what they asked for, if it is less than that.
//! Limits and other programs change, so all of it is looked at again and again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::cgroup::{self, LimitedGroup};
use crate::job::Job;
use crate::protocol::Lowered;
use crate::spaces::{LEAST_LOCAL_BYTES, Spaces};

/// Between two looks at all groups; longer where looking takes long, so that it costs a fiftieth of a processor at most.
const INTERVAL: Duration = Duration::from_secs(1);
const REST_SHARE: u32 = 50;

/// By how much a job may be above its limit for a moment: the larger of this and a twentieth.
const SLACK_BYTES: u64 = 16 << 20;
const SLACK_SHARE: u64 = 20;
/// What page tables, stacks, staging and other programs may grow by until the next look.
const GROWTH_BYTES: u64 = 4 << 20;
/// Ceilings are whole multiples of this, so that one does not move with every page that somebody else takes.
const STEP_BYTES: u64 = 1 << 20;

/// What memory cgroups leave to a job.
#[derive(Debug)]
pub struct Ceiling {
    pages: AtomicU64,
    /// Why it is below what was asked for.
    lowered: Mutex<Option<Lowered>>,
    /// Where its processes were when last looked at.
    memberships: Mutex<BTreeSet<String>>,
}

impl Default for Ceiling {
    fn default() -> Self {
        Self {
            pages: AtomicU64::new(u64::MAX),
            lowered: Mutex::default(),
            memberships: Mutex::default(),
        }
    }
}

impl Ceiling {
    /// In pages; more than any job asks for where there is none.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }

    /// Why the job has less than it asked for, where it has.
    #[must_use]
    pub fn lowered(&self) -> Option<Lowered> {
        lock(&self.lowered).clone()
    }

    /// Whether a process of the job is in other groups than those that were looked at.
    #[must_use]
    pub fn is_news(&self, pid: i32) -> bool {
        cgroup::membership(pid).is_some_and(|now| !lock(&self.memberships).contains(&now))
    }

    /// Returns whether it is lower than before.
    fn set(&self, lowered: Option<Lowered>) -> bool {
        // With less than the least no program gets anywhere; then it is the kernel's to decide who goes.
        let pages = |at: &Lowered| at.local_bytes.max(LEAST_LOCAL_BYTES) / 4096;
        let pages = lowered.as_ref().map_or(u64::MAX, pages);
        *lock(&self.lowered) = lowered;
        self.pages.swap(pages, Ordering::Relaxed) > pages
    }
}

/// Looks at all jobs' groups now and then, until `ended` says so.
pub fn run(spaces: &Arc<Spaces>, ended: &dyn Fn() -> bool) {
    while !ended() {
        let began = Instant::now();
        look(spaces);
        std::thread::sleep(INTERVAL.max(began.elapsed() * REST_SHARE));
    }
}

/// Looks at the groups that processes of any job are in, and sets every job's ceiling.
pub fn look(spaces: &Spaces) {
    let jobs = spaces.jobs();
    let mut groups: BTreeMap<_, (LimitedGroup, BTreeSet<usize>)> = BTreeMap::new();
    let mut known = vec![false; jobs.len()];
    for (number, job) in jobs.iter().enumerate() {
        let memberships: BTreeSet<String> = job
            .pids()
            .into_iter()
            .filter_map(cgroup::membership)
            .collect();
        // What has ended says nothing, and its job keeps the ceiling it had.
        known[number] = !memberships.is_empty();
        for group in memberships
            .iter()
            .flat_map(|one| cgroup::limited_above(one))
        {
            let members = groups.entry(group.folder.clone());
            let (_, members) = members.or_insert_with(|| (group, BTreeSet::new()));
            members.insert(number);
        }
        *lock(&job.ceiling.memberships) = memberships;
    }
    let mut lowest: Vec<Option<Lowered>> = vec![None; jobs.len()];
    for (group, members) in groups.values() {
        let members: Vec<(usize, &Job)> = members.iter().map(|at| (*at, &*jobs[*at])).collect();
        for (number, lowered) in share(group, &members) {
            let lower = |one: &Lowered| one.local_bytes < lowered.local_bytes;
            if !lowest[number].as_ref().is_some_and(lower) {
                lowest[number] = Some(lowered);
            }
        }
    }
    for ((job, lowered), known) in jobs.iter().zip(lowest).zip(known) {
        if known {
            set(job, lowered);
        }
    }
}

fn set(job: &Job, lowered: Option<Lowered>) {
    if !job.ceiling.set(lowered) {
        return;
    }
    let token = format_args!("{:x}", job.token);
    tracing::info!(job = token, lowered = ?job.ceiling.lowered(), "a memory cgroup lowers a job's limit");
    // What may be mapped before anything is managed was reckoned from the limit as it was.
    for handle in job.spaces() {
        handle.ask_rescan();
    }
}

/// What a group leaves to each of the jobs in it; nothing where that is all they asked for.
fn share(group: &LimitedGroup, members: &[(usize, &Job)]) -> Vec<(usize, Lowered)> {
    let resident = || -> u64 {
        let pages = members.iter().map(|(_, job)| job.resident().max(0));
        pages.sum::<i64>().unsigned_abs() * 4096
    };
    // What comes between the two must not be taken for somebody else's.
    let before = resident();
    let held = group.held_bytes();
    let room = room(
        group.limit_bytes,
        held.saturating_sub(before.max(resident())),
    );
    let asked: Vec<u64> = members.iter().map(|(_, job)| job.asked_bytes()).collect();
    let shares = shares(room, &asked);
    let lowered = members
        .iter()
        .zip(shares)
        .filter_map(|((number, _), share)| {
            let lowered = Lowered {
                local_bytes: share?,
                group: group.folder.display().to_string(),
                file: group.file.to_owned(),
                limit_bytes: group.limit_bytes,
            };
            Some((*number, lowered))
        });
    lowered.collect()
}

/// What a limit leaves to memory that can go far, where others hold so much.
#[must_use]
pub fn room(limit_bytes: u64, others_bytes: u64) -> u64 {
    let free = limit_bytes
        .saturating_sub(others_bytes)
        .saturating_sub(GROWTH_BYTES);
    let room = free.saturating_sub(SLACK_BYTES);
    room.min(free / (SLACK_SHARE + 1) * SLACK_SHARE)
}

/// Shares room among those who asked for so much; none for each where there is enough for all.
fn shares(room: u64, asked: &[u64]) -> Vec<Option<u64>> {
    let all: u128 = asked.iter().copied().map(u128::from).sum();
    let share = |one: &u64| {
        let part = u128::from(room) * u128::from(*one) / all.max(1);
        let bytes = u64::try_from(part).unwrap_or(u64::MAX);
        (all > u128::from(room)).then_some(bytes / STEP_BYTES * STEP_BYTES)
    };
    asked.iter().map(share).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_reserve_is_kept() {
        assert_eq!(room(100 * MIB, 0), 80 * MIB);
        assert_eq!(room(100 * MIB, 30 * MIB), 50 * MIB);
        assert_eq!(room(20 * MIB, 0), 0);
        assert_eq!(room(20 * MIB, 30 * MIB), 0);
        // A twentieth of a large one.
        assert_eq!(room(4204 * MIB, 0), 4000 * MIB);
    }

    #[test]
    fn jobs_in_one_group_share_it() {
        assert_eq!(shares(80 * MIB, &[30 * MIB, 50 * MIB]), [None, None]);
        assert_eq!(
            shares(80 * MIB, &[40 * MIB, 120 * MIB]),
            [Some(20 * MIB), Some(60 * MIB)]
        );
        assert_eq!(shares(0, &[MIB]), [Some(0)]);
    }

    proptest! {
        #[test]
        fn never_more_than_there_is(room in 0..1u64 << 50, asked in proptest::collection::vec(0..=u64::MAX, 1..9)) {
            let shares = shares(room, &asked);
            let given = shares.iter().zip(&asked).map(|(share, asked)| u128::from(share.unwrap_or(*asked)));
            prop_assert!(given.sum::<u128>() <= u128::from(room));
            for (share, asked) in shares.iter().zip(&asked) {
                prop_assert!(share.is_none_or(|share| share <= *asked));
            }
        }
    }
}
