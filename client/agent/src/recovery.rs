//! What an agent left is taken over by the next one, before it answers anybody.
//!
//! 1. Its jobs, extents and address spaces are put together from the state.
//! 2. What is not in the state is counted from what is: who names which slot, what is resident.
//! 3. Each pager follows what was read and not followed, and wakes who waits: they fault again.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::job::Job;
use crate::mailbox::SpaceHandle;
use crate::pager::{NotRecovered, Pager, Shared};
use crate::state::{Chunk, SpacePlace, State};

/// An address space that is taken over, not running yet.
struct Taken {
    job: Arc<Job>,
    handle: Arc<SpaceHandle>,
    pager: Pager,
}

/// Takes over what the state says, and starts its pagers.
pub(crate) fn take_over(shared: &Shared, state: &Arc<State>) {
    let left = state.left();
    let jobs: HashMap<u64, Arc<Job>> = left
        .jobs
        .into_iter()
        .map(|place| Arc::new(Job::over(place)))
        .map(|job| (job.token, job))
        .collect();
    let mut chunks: HashMap<u64, Vec<(u64, Chunk)>> = HashMap::new();
    for chunk in left.chunks {
        if let Some((owner, number)) = chunk.owner() {
            chunks.entry(owner).or_default().push((number, chunk));
        }
    }
    let uffd = |place: &SpacePlace| place.uffd.load(Ordering::Acquire);
    let live: HashSet<i32> = left.spaces.iter().map(uffd).collect();
    let mut taken = Vec::new();
    // Of those that are not taken over, too.
    for place in &left.spaces {
        place.rest_slots_under_way(|slot| shared.far.lay_to_rest(slot));
    }
    for place in left.spaces {
        let id = place.id.load(Ordering::Relaxed);
        let chunks = chunks.remove(&id).unwrap_or_default();
        let job = jobs.get(&place.job.load(Ordering::Relaxed));
        match job.map(|job| take_space(shared, job, place, chunks, &live)) {
            Some(Ok(space)) => taken.push(space),
            Some(Err(NotRecovered::Gone)) | None => {}
            Some(Err(why)) => {
                if let Some(job) = job {
                    job.a_page_is_lost(&why.to_string());
                }
                tracing::error!(space = id, %why, "a program is ended: the agent before this one was killed");
            }
        }
    }
    // Memory of those that are gone is free by now.
    drop(chunks);
    for space in &taken {
        for slot in space.pager.named_slots() {
            if shared.far.is_named(slot) {
                space.job.charge_far(1);
            }
        }
    }
    shared.far.all_is_named();
    tracing::info!(
        jobs = jobs.len(),
        processes = taken.len(),
        slots = shared.far.used(),
        "taken over from an agent that died"
    );
    for Taken { job, handle, pager } in taken {
        if let Err(error) = shared.spawner.start_again(&job, pager, handle) {
            job.fail(format!("no thread can be started for its pages: {error}"));
        }
    }
    for job in jobs.values() {
        shared.spawner.job_again(job);
    }
}

fn take_space(
    shared: &Shared,
    job: &Arc<Job>,
    place: SpacePlace,
    chunks: Vec<(u64, Chunk)>,
    live: &HashSet<i32>,
) -> Result<Taken, NotRecovered> {
    let id = place.id.load(Ordering::Relaxed);
    let handle = Arc::new(SpaceHandle::new(id, 0)?);
    if place.regions_only.load(Ordering::Relaxed) {
        handle.manage_regions_only();
    }
    let pager = Pager::recovered(
        shared.clone(),
        job,
        Arc::clone(&handle),
        place,
        chunks,
        live,
    )?;
    Ok(Taken {
        job: Arc::clone(job),
        handle,
        pager,
    })
}
