//! The sampler: what the kernel says is resident, for each job, often enough for how fast it can grow.
//!
//! While a job fits, this is all that farpage does to it. Below a margin under the limit its memory is put
//! under management; from then on pagers charge what they install and take out, and the sampler measures what
//! they cannot see: stacks, small mappings, and memory that grew since the mappings were last looked at.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::job::Job;
use crate::mailbox::{Request, SpaceHandle};
use crate::spaces::Spaces;
use crate::sys::process::{Process, Sizes};

/// Pages that one program can make resident in a microsecond at the very most: huge pages on two threads,
/// 13 GB/s measured.
const GROWTH_PAGES_PER_US: u64 = 4;
const SHORTEST_TICK: Duration = Duration::from_micros(250);
const LONGEST_TICK: Duration = Duration::from_millis(10);
/// The tick while memory is managed and nothing grows.
const ARMED_TICK: Duration = Duration::from_millis(1);

/// Management begins this far below the limit: a share of it, within bounds. It must hold what grows during a
/// tick and the time it takes to register.
const MARGIN_SHARE: u64 = 8;
const MARGIN_LEAST_PAGES: u64 = 512;
const MARGIN_MOST_PAGES: u64 = 6144;

/// Held allocations go on when this much is free: well within what pagers keep free by themselves
/// (`pager::take_out`), or a program would be held for ever at a limit where they have nothing more to do.
const RELEASE_SHARE: u64 = 64;
const RELEASE_LEAST_PAGES: u64 = 32;
const RELEASE_MOST_PAGES: u64 = 512;

/// Resident pages that no table explains, beyond which the mappings are looked at again.
const UNEXPLAINED_PAGES: u64 = 128;

/// Runs until `ended` says so.
pub fn run(spaces: &Arc<Spaces>, ended: &dyn Fn() -> bool) {
    crate::sys::process::raise_priority(0, crate::sys::process::FIRST);
    let mut watched: HashMap<u64, Watched> = HashMap::new();
    while !ended() {
        let mut tick = LONGEST_TICK;
        let mut live = Vec::new();
        for job in spaces.jobs() {
            let handles = job.spaces();
            live.extend(handles.iter().map(|handle| handle.id));
            tick = tick.min(sample(&job, &handles, &mut watched));
        }
        watched.retain(|id, _| live.contains(id));
        std::thread::sleep(tick);
    }
}

/// An address space as last seen.
#[derive(Debug)]
struct Watched {
    process: Process,
    sizes: Sizes,
}

fn sample(
    job: &Arc<Job>,
    handles: &[Arc<SpaceHandle>],
    watched: &mut HashMap<u64, Watched>,
) -> Duration {
    let managed = job.managed();
    let (mut measured, mut floor, mut grown) = (0, 0, false);
    for handle in handles {
        let Some((before, now)) = measure(handle, watched) else {
            continue;
        };
        measured += now.anonymous;
        floor += handle.figures.unmanaged.load(Ordering::Relaxed);
        let local = handle.figures.local.load(Ordering::Relaxed);
        let known = local + handle.figures.unmanaged.load(Ordering::Relaxed);
        let unexplained = now.anonymous.saturating_sub(known);
        let changed = before.total != now.total || unexplained > UNEXPLAINED_PAGES;
        grown |= changed;
        if changed && job.is_armed() {
            handle.ask_rescan();
        }
    }
    job.note_sample(measured, measured.saturating_sub(managed).max(floor));
    let limit = job.limits.local_pages;
    let margin = (limit / MARGIN_SHARE)
        .clamp(MARGIN_LEAST_PAGES, MARGIN_MOST_PAGES)
        .min(limit / 2);
    if !job.is_armed() {
        let Some(headroom) = (limit - margin)
            .checked_sub(measured)
            .filter(|room| *room > 0)
        else {
            job.arm();
            for handle in handles {
                handle.ask_rescan();
            }
            return SHORTEST_TICK;
        };
        return Duration::from_micros(headroom / GROWTH_PAGES_PER_US)
            .clamp(SHORTEST_TICK, LONGEST_TICK);
    }
    hold_back(job, handles);
    if grown { SHORTEST_TICK } else { ARMED_TICK }
}

fn measure(handle: &SpaceHandle, watched: &mut HashMap<u64, Watched>) -> Option<(Sizes, Sizes)> {
    let pid = handle.pid()?;
    if watched
        .get(&handle.id)
        .is_none_or(|seen| seen.process.pid() != pid)
    {
        let process = Process::open(pid).ok()?;
        watched.insert(
            handle.id,
            Watched {
                process,
                sizes: Sizes::default(),
            },
        );
    }
    let seen = watched.get_mut(&handle.id)?;
    let now = seen.process.sizes().ok()?;
    Some((std::mem::replace(&mut seen.sizes, now), now))
}

/// Makes allocations wait while the job is over its limit, and spreads what must go over its address spaces.
fn hold_back(job: &Job, handles: &[Arc<SpaceHandle>]) {
    let room = job.room();
    let holding = room <= 0;
    let enough =
        (job.limits.local_pages / RELEASE_SHARE).clamp(RELEASE_LEAST_PAGES, RELEASE_MOST_PAGES);
    let release = room >= enough as i64;
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
                handle.ask(Request::Shrink(share));
            }
        }
    }
}
