//! What the processes of a job have in common since a fork. Every table counts such a page, and so does the kernel's
//! resident size of each process; but it takes up memory once.
//!
//! The kernel can say how much that is, at a cost that grows with the memory. Between two looks the figure shrinks by
//! what is known to have gone, and by one for every minor fault, since each copy on write is one: so it is not above the
//! truth by more than a tick's copies, and a job that relies on it stays within its limit. A thread of its own does this,
//! while a job is so near its limit that it matters.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::job::Job;
use crate::spaces::Spaces;
use crate::sys::process::{FaultCount, shared_pages};

/// The shortest time between two counts of minor faults, and between two looks.
const SHORTEST_TICK: Duration = Duration::from_millis(1);
const SHORTEST_REST: Duration = Duration::from_millis(5);
/// How much longer than a count or a look itself the time to the next one is.
const REST_SHARE: u32 = 10;

/// How many pages of a job are counted more than once.
#[derive(Debug, Default)]
pub struct Sharing {
    pages: AtomicU64,
    /// What was subtracted since the last look, in all.
    gone: AtomicU64,
    wanted: AtomicBool,
}

/// A look at a job's processes, begun.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    gone: u64,
}

impl Sharing {
    /// Pages counted too often, as far as is certain.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }

    /// A forked child's table is counted from now on, with so many pages of its parent's.
    pub fn forked(&self, pages: u64) {
        self.pages.fetch_add(pages, Ordering::Relaxed);
    }

    /// Pages are counted no more, or nobody else's any more, that may have been shared.
    pub fn went(&self, pages: u64) {
        self.gone.fetch_add(pages, Ordering::Relaxed);
        let less = |now: u64| Some(now.saturating_sub(pages));
        let _ = self
            .pages
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// Says whether the job is so near its limit that this matters.
    pub fn want(&self, wanted: bool) {
        self.wanted.store(wanted, Ordering::Relaxed);
    }

    /// Whether it does.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    /// Begins a look.
    #[must_use]
    pub fn look(&self) -> Look {
        Look {
            gone: self.gone.load(Ordering::Relaxed),
        }
    }

    /// What a look has found, less what went since it was begun.
    pub fn found(&self, pages: u64, look: Look) {
        let gone = self.gone.load(Ordering::Relaxed).wrapping_sub(look.gone);
        self.pages
            .store(pages.saturating_sub(gone), Ordering::Relaxed);
    }
}

/// Keeps the figures of all jobs that want it, until `ended` says so; parked while none does.
pub fn run(spaces: &Arc<Spaces>, ended: &dyn Fn() -> bool) {
    crate::sys::process::raise_priority(0, crate::sys::process::FIRST);
    let mut watched: HashMap<u64, Watched> = HashMap::new();
    while !ended() {
        let began = Instant::now();
        let jobs = spaces.jobs();
        watched.retain(|token, _| jobs.iter().any(|job| job.token == *token));
        let wanting: Vec<&Arc<Job>> = jobs.iter().filter(|job| job.sharing.is_wanted()).collect();
        for job in &wanting {
            watched.entry(job.token).or_default().tick(job);
        }
        if wanting.is_empty() {
            watched.clear();
            std::thread::park();
        } else {
            std::thread::sleep((began.elapsed() * REST_SHARE).max(SHORTEST_TICK));
        }
    }
}

/// A job's processes as last seen.
#[derive(Debug, Default)]
struct Watched {
    faults: HashMap<u64, (FaultCount, u64)>,
    look_at: Option<Instant>,
}

impl Watched {
    fn tick(&mut self, job: &Job) {
        self.count_copies(job);
        if self.look_at.is_some_and(|at| Instant::now() < at) {
            return;
        }
        let began = Instant::now();
        let look = job.sharing.look();
        let processes = job.spaces();
        let shared = |pid| shared_pages(pid).unwrap_or(0);
        let pages = processes
            .iter()
            .filter_map(|handle| handle.pid())
            .map(shared)
            .sum();
        self.count_copies(job);
        job.sharing.found(pages, look);
        let rest = (began.elapsed() * REST_SHARE).max(SHORTEST_REST);
        self.look_at = Some(Instant::now() + rest);
    }

    /// Minor faults since the last count: so many pages may have been copied.
    fn count_copies(&mut self, job: &Job) {
        let processes = job.spaces();
        self.faults
            .retain(|id, _| processes.iter().any(|handle| handle.id == *id));
        let mut copies = 0;
        for handle in &processes {
            let Some(pid) = handle.pid() else { continue };
            if let Some((count, last)) = self.faults.get_mut(&handle.id) {
                let now = count.minor().unwrap_or(*last);
                copies += now.saturating_sub(std::mem::replace(last, now));
            } else if let Ok(count) = FaultCount::open(pid) {
                let now = count.minor().unwrap_or(0);
                self.faults.insert(handle.id, (count, now));
            }
        }
        if copies > 0 {
            job.sharing.went(copies);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_is_subtracted_once() {
        let sharing = Sharing::default();
        sharing.forked(1000);
        sharing.went(100);
        assert_eq!(sharing.pages(), 900);
        sharing.went(1000);
        assert_eq!(sharing.pages(), 0);
    }

    #[test]
    fn what_goes_during_a_look_is_not_found() {
        let sharing = Sharing::default();
        sharing.went(7);
        let look = sharing.look();
        sharing.went(300);
        sharing.found(1000, look);
        assert_eq!(sharing.pages(), 700);
        sharing.found(200, look);
        assert_eq!(sharing.pages(), 0);
    }
}
