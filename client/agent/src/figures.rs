//! The agent's figures, for whoever asks: read from the counters that are there, so that being asked costs no fault anything.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::far::{ExtentCounts, FarMemory};
use crate::job::{Counters, Job};
use crate::latency::Latencies;
use crate::protocol::ProcessFigures;
use crate::spaces::Spaces;

/// What was counted for several jobs together.
#[derive(Debug, Default)]
pub struct Counted {
    /// Their counters' sums.
    pub counters: Counters,
    /// How long their faults took.
    pub latencies: Latencies,
}

impl Counted {
    /// Adds what was counted for one more.
    pub fn add(&self, counters: &Counters, latencies: &Latencies) {
        // All of them by name, so that none is forgotten when there is a further one.
        let Counters {
            faults,
            pages_fetched,
            pages_prefetched,
            prefetch_hits,
            pages_evicted,
            pages_written_back,
            pages_poisoned,
            processes,
            processes_unmanaged,
        } = counters;
        let sums = &self.counters;
        let add = |sum: &AtomicU64, count: &AtomicU64| {
            sum.fetch_add(count.load(Ordering::Relaxed), Ordering::Relaxed);
        };
        add(&sums.faults, faults);
        add(&sums.pages_fetched, pages_fetched);
        add(&sums.pages_prefetched, pages_prefetched);
        add(&sums.prefetch_hits, prefetch_hits);
        add(&sums.pages_evicted, pages_evicted);
        add(&sums.pages_written_back, pages_written_back);
        add(&sums.pages_poisoned, pages_poisoned);
        add(&sums.processes, processes);
        add(&sums.processes_unmanaged, processes_unmanaged);
        self.latencies.add_all(latencies);
    }
}

/// An agent's figures at one moment.
#[derive(Debug, Default)]
pub struct AgentFigures {
    /// Processes whose pid is known, by it.
    pub processes: Vec<ProcessFigures>,
    /// Address spaces, those included whose process has not shown itself yet.
    pub spaces: u64,
    /// Jobs that are open.
    pub jobs: u64,
    /// What was counted since the agent's start.
    pub counted: Counted,
    /// Slots that pages lie in.
    pub slots_used: u64,
    /// Slots free where nodes answer.
    pub slots_free: u64,
    /// Extents.
    pub extents: ExtentCounts,
}

/// Who can be asked for an agent's figures while it serves.
#[derive(Clone, Debug)]
pub struct Observer {
    spaces: Arc<Spaces>,
    far: Arc<FarMemory>,
}

impl Observer {
    pub(crate) fn new(spaces: Arc<Spaces>, far: Arc<FarMemory>) -> Self {
        Self { spaces, far }
    }

    /// The figures now. Far pages that are others' too are those of the last count, which nobody is asked to repeat: the
    /// report to the coordinator does that, once a second.
    #[must_use]
    pub fn figures(&self) -> AgentFigures {
        let (jobs, counted) = self.spaces.jobs_and_ended();
        let mut processes = BTreeMap::new();
        let mut spaces = 0;
        for job in &jobs {
            counted.add(&job.counters, &job.latencies);
            spaces += add_processes(job, &mut processes);
        }
        AgentFigures {
            processes: processes.into_values().collect(),
            spaces,
            jobs: jobs.len() as u64,
            counted,
            slots_used: self.far.used(),
            slots_free: self.far.free(),
            extents: self.far.extents(),
        }
    }
}

/// Adds a job's processes, and returns how many address spaces it has. One that has just replaced its program has two for
/// a moment, and the later counts.
fn add_processes(job: &Job, processes: &mut BTreeMap<i32, ProcessFigures>) -> u64 {
    let limit = job.local_pages() * 4096;
    let handles = job.spaces();
    for handle in &handles {
        if let Some(pid) = handle.pid() {
            processes.insert(pid, ProcessFigures::of(handle, limit));
        }
    }
    handles.len() as u64
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::far::Grant;
    use crate::mailbox::SpaceHandle;
    use crate::state::State;

    fn observed() -> (Arc<Spaces>, Arc<FarMemory>, Observer) {
        let state = State::create().unwrap();
        let spaces = Arc::new(Spaces::new(Arc::clone(&state), 1));
        let far = Arc::new(FarMemory::new(state));
        let observer = Observer::new(Arc::clone(&spaces), Arc::clone(&far));
        (spaces, far, observer)
    }

    fn open(spaces: &Spaces) -> Arc<Job> {
        let deadline = Duration::from_secs(1);
        spaces.open_job(0, 0, 64 << 20, 0, 1, deadline).unwrap()
    }

    fn faults(observer: &Observer) -> u64 {
        let counted = observer.figures().counted;
        counted.counters.faults.load(Ordering::Relaxed)
    }

    #[test]
    fn what_was_counted_for_a_job_outlives_it() {
        let (spaces, _, observer) = observed();
        let (first, second) = (open(&spaces), open(&spaces));
        first.counters.faults.store(5, Ordering::Relaxed);
        first.latencies.add(Duration::from_micros(3));
        second.counters.faults.store(2, Ordering::Relaxed);
        assert_eq!((observer.figures().jobs, faults(&observer)), (2, 7));
        for _ in 0..2 {
            spaces.end_job(&first, false);
            assert_eq!((observer.figures().jobs, faults(&observer)), (1, 7));
        }
        let buckets = observer.figures().counted.latencies.histogram().buckets;
        assert_eq!(buckets.iter().map(|(_, count)| count).sum::<u64>(), 1);
    }

    #[test]
    fn extents_are_told_by_what_was_heard_of_them() {
        let (_, far, observer) = observed();
        let counts = |held, unreachable, lost| ExtentCounts {
            held,
            unreachable,
            lost,
        };
        for id in 0..3 {
            let grant = Grant {
                id,
                node: id.to_string(),
                address: String::new(),
                index: id as u32,
                key: id,
                bytes: 1 << 20,
            };
            far.add(1, vec![grant]).unwrap();
        }
        assert_eq!(observer.figures().extents, counts(3, 0, 0));
        far.heard_of_nodes(&[0], &[1], &[]);
        assert_eq!(observer.figures().extents, counts(3, 1, 1));
        assert_eq!(observer.figures().slots_free, 256);
        far.lose_all();
        assert_eq!(observer.figures().extents, counts(3, 0, 3));
        far.retire(|_| 0);
        assert_eq!(observer.figures().extents, counts(0, 0, 0));
    }

    #[test]
    fn a_process_is_told_once_and_goes_with_its_address_space() {
        let (spaces, _, observer) = observed();
        let job = open(&spaces);
        // Of one pid before and after it replaced its program, and a child that nobody knows yet.
        for (id, pid, far) in [(1, 4_194_305, 7), (2, 4_194_305, 9), (3, 0, 0)] {
            let handle = Arc::new(SpaceHandle::new(id, pid).unwrap());
            handle.figures.far.store(far, Ordering::Relaxed);
            job.add(handle);
        }
        let figures = observer.figures();
        assert_eq!((figures.spaces, figures.processes.len()), (3, 1));
        assert_eq!(figures.processes[0].far_pages, 9);
        assert_eq!(figures.processes[0].local_limit_bytes, 64 << 20);
        job.remove(2);
        assert_eq!(observer.figures().processes[0].far_pages, 7);
        job.remove(1);
        assert!(observer.figures().processes.is_empty());
    }
}
