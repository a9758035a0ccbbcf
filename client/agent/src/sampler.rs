//! The sampler: what the kernel says is resident, for each job, often enough for how fast it can grow.
//!
//! While a job fits, this and looks at what it has mapped ([`crate::pager`], `look_ahead`) are all that farpage does to it.
//! Within a margin under the limit its memory is put under management; from then on pagers charge what they install and take out, and the sampler measures what
//! they cannot see: stacks, small mappings, and memory that grew since the mappings were last looked at.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::Thread;
use std::time::{Duration, Instant};

use crate::job::Job;
use crate::mailbox::SpaceHandle;
use crate::spaces::Spaces;
use crate::sys::process::{Process, Sizes};
use crate::tree::Tree;

/// Pages that one program can make resident in a microsecond at the very most: huge pages on two threads,
/// 13 GB/s measured.
const GROWTH_PAGES_PER_US: u64 = 4;
const SHORTEST_TICK: Duration = Duration::from_micros(250);
const LONGEST_TICK: Duration = Duration::from_millis(10);
/// The tick while memory is managed and nothing grows.
const ARMED_TICK: Duration = Duration::from_millis(1);
/// The pause is so many times as long as what it follows, up to the longest tick: hundreds of processes take a while to sample.
const PAUSE_TIMES: u32 = 4;

/// Management begins this far below the limit: a share of it, within bounds. It must hold what grows during a
/// tick and the time it takes to register.
const MARGIN_SHARE: u64 = 8;
const MARGIN_LEAST_PAGES: u64 = 512;
const MARGIN_MOST_PAGES: u64 = 6144;

/// Room at which held allocations go on. Less than pagers keep free on any job, or the wait would have no end.
const RELEASE_PAGES: i64 = 32;
const _: () = assert!(RELEASE_PAGES < crate::pager::FREE_LEAST as i64);

/// How long what cannot be managed may exceed the limit by itself before the job is ended.
const CROWDED_DEADLINE: Duration = Duration::from_secs(3);

/// Resident pages that no table explains, or that are counted and not there, beyond which the mappings are looked at again.
const UNEXPLAINED_PAGES: u64 = 128;

/// Runs until `ended` says so. `sharing` is the thread that looks at what is counted more than once.
pub fn run(spaces: &Arc<Spaces>, sharing: &Thread, ended: &dyn Fn() -> bool) {
    crate::sys::process::raise_priority(0, crate::sys::process::FIRST);
    crate::sys::process::run_at_once(true);
    let mut watched: HashMap<u64, Watched> = HashMap::new();
    let mut jobs: HashMap<u64, WatchedJob> = HashMap::new();
    while !ended() {
        let (mut tick, began) = (LONGEST_TICK, Instant::now());
        let mut live = Vec::new();
        for job in spaces.jobs() {
            let handles = job.spaces();
            live.extend(handles.iter().map(|handle| handle.id));
            tick = tick.min(sample(
                &job,
                &handles,
                &mut watched,
                jobs.entry(job.token).or_default(),
                sharing,
            ));
        }
        watched.retain(|id, _| live.contains(id));
        jobs.retain(|token, _| spaces.job(*token).is_some());
        let pause = (began.elapsed() * PAUSE_TIMES).min(LONGEST_TICK);
        std::thread::sleep(tick.max(pause));
    }
}

/// An address space as last seen.
#[derive(Debug)]
struct Watched {
    process: Process,
    sizes: Sizes,
    /// By how many pages what is known was off when the mappings were last looked at: looking again would change nothing.
    accepted: u64,
}

/// A job's tree, and since when what cannot be managed of it is more than it may have.
#[derive(Debug, Default)]
struct WatchedJob {
    tree: Tree,
    crowded_since: Option<Instant>,
}

impl WatchedJob {
    /// Ends a job whose unmanageable memory alone exceeds its limit: nothing could be taken out to keep it.
    fn end_if_crowded(&mut self, job: &Job, unmanaged: u64) {
        let floor = unmanaged.saturating_sub(job.sharing.pages());
        let allowed = job.local_pages();
        if floor <= allowed {
            self.crowded_since = None;
        } else if self
            .crowded_since
            .get_or_insert_with(Instant::now)
            .elapsed()
            > CROWDED_DEADLINE
            && !job.is_suspended()
        {
            let mib = |pages: u64| (pages * 4096) >> 20;
            job.fail(format!(
                "{} MiB of its memory are stacks and small or locked mappings, which cannot be taken out, and {} MiB are \
                 allowed; {}",
                mib(floor),
                mib(allowed),
                job.remedy(),
            ));
        }
    }
}

fn sample(
    job: &Arc<Job>,
    handles: &[Arc<SpaceHandle>],
    watched: &mut HashMap<u64, Watched>,
    watched_job: &mut WatchedJob,
    sharing: &Thread,
) -> Duration {
    let managed = job.managed();
    if job.is_for_regions() {
        // What the rest of the program uses is not this job's business.
        job.note_sample(managed, 0);
        for handle in handles {
            handle
                .figures
                .sampled(handle.figures.local.load(Ordering::Relaxed));
        }
        hold_back(job, handles);
        return ARMED_TICK;
    }
    let strangers = watched_job.tree.unmanaged_pages(job);
    let (mut measured, mut floor, mut grown) = (strangers, 0, false);
    for handle in handles {
        let Some(seen) = watch(handle, watched) else {
            continue;
        };
        let (before, accepted) = (seen.sizes, seen.accepted);
        let Ok(now) = seen.process.sizes() else {
            continue;
        };
        seen.sizes = now;
        handle.figures.sampled(now.anonymous);
        measured += now.anonymous;
        // Counted at the last look: what has been given back since is still in it.
        let counted = handle.figures.unmanaged.load(Ordering::Relaxed);
        floor += counted.min(now.anonymous);
        let known = handle.figures.local.load(Ordering::Relaxed) + counted;
        let gone = counted.saturating_sub(now.anonymous);
        let unexplained = now.anonymous.saturating_sub(known).max(gone);
        let changed = before.total != now.total || unexplained > accepted + UNEXPLAINED_PAGES;
        grown |= changed;
        if changed && job.is_armed() {
            handle.ask_rescan();
            seen.accepted = unexplained;
        } else {
            seen.accepted = accepted.min(unexplained);
        }
    }
    let limit = job.local_pages();
    let near = measured > limit - margin(limit);
    job.sharing.want(near && handles.len() > 1);
    if job.sharing.is_wanted() {
        sharing.unpark();
    }
    let shared = job.sharing.pages();
    let unmanaged = measured.saturating_sub(managed).max(strangers + floor);
    job.note_sample(measured.saturating_sub(shared), unmanaged);
    if !job.is_armed() {
        let Some(headroom) = (limit - margin(limit))
            .checked_sub(measured.saturating_sub(shared))
            .filter(|room| *room > 0)
        else {
            job.arm();
            tracing::debug!(measured, limit, "memory is put under management");
            for handle in handles {
                handle.ask_rescan();
            }
            return SHORTEST_TICK;
        };
        return Duration::from_micros(headroom / GROWTH_PAGES_PER_US)
            .clamp(SHORTEST_TICK, LONGEST_TICK);
    }
    tracing::trace!(measured, managed, floor, room = job.room(), grown, "sample");
    hold_back(job, handles);
    watched_job.end_if_crowded(job, floor);
    if grown { SHORTEST_TICK } else { ARMED_TICK }
}

/// How far below a limit of so many pages management begins.
fn margin(limit: u64) -> u64 {
    (limit / MARGIN_SHARE)
        .clamp(MARGIN_LEAST_PAGES, MARGIN_MOST_PAGES)
        .min(limit / 2)
}

fn watch<'a>(
    handle: &SpaceHandle,
    watched: &'a mut HashMap<u64, Watched>,
) -> Option<&'a mut Watched> {
    let pid = handle.pid()?;
    if watched
        .get(&handle.id)
        .is_none_or(|seen| seen.process.pid() != pid)
    {
        let process = Process::open(pid).ok()?;
        let _ = handle.name.set(process.name());
        let fresh = Watched {
            process,
            sizes: Sizes::default(),
            accepted: 0,
        };
        watched.insert(handle.id, fresh);
    }
    watched.get_mut(&handle.id)
}

/// Makes allocations wait while the job is over its limit, and spreads what must go over its address spaces.
fn hold_back(job: &Job, handles: &[Arc<SpaceHandle>]) {
    let room = job.room();
    let holding = room <= 0;
    let release = room >= RELEASE_PAGES;
    for handle in handles {
        if holding || release {
            handle.hold(holding);
        }
    }
    if room < 0 {
        let managed = job.managed().max(1);
        for handle in handles {
            let local = handle.figures.local.load(Ordering::Relaxed);
            let share = room.unsigned_abs() * local / managed;
            if share > 0 {
                handle.ask_to_shrink(share);
            }
        }
    }
}
