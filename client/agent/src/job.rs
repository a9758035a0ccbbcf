//! A job: the process tree of one `farpage run`, its limits, and what was counted for it.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::ceiling::Ceiling;
use crate::latency::Latencies;
use crate::mailbox::SpaceHandle;
use crate::protocol::{Account, ProcessPeaks};
use crate::sharing::Sharing;
use crate::state::JobPlace;
use crate::state::records::JobRecord;
use crate::sys::state::Ref;

/// How long an account waits for address spaces whose process has ended.
const ACCOUNT_DEADLINE: Duration = Duration::from_secs(5);
/// How long it takes until what is resident when management begins is in the tables.
const ADOPTION: Duration = Duration::from_millis(100);
const ACCOUNT_POLL: Duration = Duration::from_millis(1);
/// Most processes that an account tells apart, the largest: it must fit one packet.
const MAX_PROCESSES_TOLD: usize = 64;

/// What one run asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Pages of anonymous memory that may be resident, if no memory cgroup allows less: see [`Job::local_pages`].
    pub local_pages: u64,
    /// Slots that may be used.
    pub far_pages: u64,
    /// On how many nodes each page is to be.
    pub copies: u8,
    /// How long a fault may wait for whatever it needs (its node, a free frame, a slot for a victim) before its thread gets
    /// SIGBUS.
    pub fault_deadline: Duration,
}

/// Counters of a job. All are totals since its start unless they say otherwise.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Counters {
    /// Page faults answered.
    pub faults: AtomicU64,
    /// Pages read from memory nodes, prefetched ones included.
    pub pages_fetched: AtomicU64,
    /// Pages read ahead of their fault.
    pub pages_prefetched: AtomicU64,
    /// Prefetched pages that a later fault proved used.
    pub prefetch_hits: AtomicU64,
    /// Pages taken out of the programs' memory.
    pub pages_evicted: AtomicU64,
    /// Pages written to memory nodes.
    pub pages_written_back: AtomicU64,
    /// Pages lost: their fault was answered with SIGBUS.
    pub pages_poisoned: AtomicU64,
    /// Processes that attached.
    pub processes: AtomicU64,
    /// Processes seen in the tree that did not attach.
    pub processes_unmanaged: AtomicU64,
}

/// One job.
#[derive(Debug)]
pub struct Job {
    /// Its token, by which programs name it.
    pub token: u64,
    /// The user who opened it; only this user's processes (and root's) may join.
    pub uid: u32,
    /// What was asked for.
    pub limits: Limits,
    /// What memory cgroups leave to it.
    pub ceiling: Ceiling,
    /// What was counted.
    pub counters: Ref<Counters>,
    /// How long faults took, from their message to the wake-up.
    pub latencies: Ref<Latencies>,
    /// What of it is counted more than once.
    pub sharing: Sharing,
    /// Resident pages that tables know of, over all address spaces.
    managed: AtomicI64,
    /// Resident pages that no table knows of; measured by the sampler.
    unmanaged: AtomicU64,
    /// Slots that entries of this job name, each once.
    far_used: AtomicI64,
    armed_at: OnceLock<Instant>,
    /// Whether its launcher is there: the one that opened it under this agent, or has come back to it.
    is_held: AtomicBool,
    failure: OnceLock<String>,
    loss: OnceLock<String>,
    settling: AtomicU64,
    spaces: Mutex<Vec<Arc<SpaceHandle>>>,
    /// Of processes that have ended, the largest.
    ended: Mutex<Vec<ProcessPeaks>>,
    /// Where the rest of it lies, which outlives the agent.
    place: JobPlace,
}

impl Job {
    /// A job without processes.
    #[must_use]
    pub fn new(token: u64, uid: u32, limits: Limits, place: JobPlace) -> Self {
        let deadline = limits.fault_deadline.as_millis();
        place.token.store(token, Ordering::Relaxed);
        place.uid.store(uid, Ordering::Relaxed);
        place
            .local_pages
            .store(limits.local_pages, Ordering::Relaxed);
        place.far_pages.store(limits.far_pages, Ordering::Relaxed);
        place.copies.store(limits.copies.into(), Ordering::Relaxed);
        place.fault_deadline_ms.store(
            u64::try_from(deadline).unwrap_or(u64::MAX),
            Ordering::Relaxed,
        );
        place.live.store(true, Ordering::Release);
        let job = Self::over(place);
        job.is_held.store(true, Ordering::Release);
        job
    }

    /// A job that another agent has left: what its place says, without processes yet.
    #[must_use]
    pub fn over(place: JobPlace) -> Self {
        let record: &Ref<JobRecord> = place.record();
        let load = |word: &AtomicU64| word.load(Ordering::Relaxed);
        let token = load(&record.token);
        let uid = record.uid.load(Ordering::Relaxed);
        let limits = Limits {
            local_pages: load(&record.local_pages),
            far_pages: load(&record.far_pages),
            copies: record.copies.load(Ordering::Relaxed) as u8,
            fault_deadline: Duration::from_millis(load(&record.fault_deadline_ms)),
        };
        let armed_at = OnceLock::new();
        if record.armed.load(Ordering::Acquire) {
            let _ = armed_at.set(Instant::now());
        }
        let counters = record.part(|record| &record.counters);
        let latencies = record.part(|record| &record.latencies);
        Self {
            token,
            uid,
            limits,
            ceiling: Ceiling::default(),
            counters,
            latencies,
            sharing: Sharing::default(),
            managed: AtomicI64::new(0),
            unmanaged: AtomicU64::new(0),
            far_used: AtomicI64::new(0),
            armed_at,
            is_held: AtomicBool::new(false),
            failure: OnceLock::new(),
            loss: OnceLock::new(),
            settling: AtomicU64::new(0),
            spaces: Mutex::new(Vec::new()),
            ended: Mutex::new(Vec::new()),
            place,
        }
    }

    /// Pages of anonymous memory that may be resident now.
    #[must_use]
    pub fn local_pages(&self) -> u64 {
        self.limits.local_pages.min(self.ceiling.pages())
    }

    /// What was asked for to be resident, in bytes.
    #[must_use]
    pub fn asked_bytes(&self) -> u64 {
        self.limits.local_pages * 4096
    }

    /// What its user can do where the limit is too low for it.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self.ceiling.lowered() {
            None => "give --local more than that".to_owned(),
            Some(lowered) => format!(
                "the memory cgroup {} leaves no more; give that group more ({})",
                lowered.group, lowered.file
            ),
        }
    }

    /// Pages that may still be installed before the limit is reached; negative past it.
    #[must_use]
    pub fn room(&self) -> i64 {
        self.local_pages() as i64 - self.resident()
    }

    /// Resident pages as far as is known between two samples.
    #[must_use]
    pub fn resident(&self) -> i64 {
        let counted = self.managed.load(Ordering::Relaxed) + self.unmanaged() as i64;
        counted - self.sharing.pages() as i64
    }

    /// Resident pages that no table knows of.
    #[must_use]
    pub fn unmanaged(&self) -> u64 {
        self.unmanaged.load(Ordering::Relaxed)
    }

    /// Resident pages that tables know of.
    #[must_use]
    pub fn managed(&self) -> u64 {
        self.managed.load(Ordering::Relaxed).max(0) as u64
    }

    /// Counts pages installed (positive) or taken out (negative).
    pub fn charge(&self, pages: i64) {
        self.managed.fetch_add(pages, Ordering::Relaxed);
    }

    /// Counts pages that a program gave up itself, whether others have them too or not.
    pub fn discharge(&self, pages: u64) {
        self.charge(-(pages as i64));
        self.sharing.went(pages);
    }

    /// Counts slots taken (positive) or freed (negative).
    pub fn charge_far(&self, slots: i64) {
        let used = self.far_used.fetch_add(slots, Ordering::Relaxed) + slots;
        self.place
            .far_peak
            .fetch_max(used.max(0) as u64, Ordering::Relaxed);
    }

    /// Slots that entries of this job name, however many entries name each.
    #[must_use]
    pub fn far_used(&self) -> u64 {
        self.far_used.load(Ordering::Relaxed).max(0) as u64
    }

    /// Slots that may still be taken.
    #[must_use]
    pub fn far_room(&self) -> u64 {
        self.limits.far_pages.saturating_sub(self.far_used())
    }

    /// The sampler's measurement of the tree.
    pub fn note_sample(&self, measured: u64, unmanaged: u64) {
        self.unmanaged.store(unmanaged, Ordering::Relaxed);
        // At first nothing is in any table yet.
        if self
            .armed_at
            .get()
            .is_some_and(|at| at.elapsed() > ADOPTION)
        {
            self.place
                .unmanaged_peak
                .fetch_max(unmanaged, Ordering::Relaxed);
        }
        self.place.local_peak.fetch_max(measured, Ordering::Relaxed);
    }

    /// Most pages resident at any sample.
    #[must_use]
    pub fn local_peak(&self) -> u64 {
        self.place.local_peak.load(Ordering::Relaxed)
    }

    /// Most slots in use at any time.
    #[must_use]
    pub fn far_peak(&self) -> u64 {
        self.place.far_peak.load(Ordering::Relaxed)
    }

    /// Most resident pages that no table knew of while memory was managed.
    #[must_use]
    pub fn unmanaged_peak(&self) -> u64 {
        self.place.unmanaged_peak.load(Ordering::Relaxed)
    }

    /// Whether memory is managed already (it is left alone while it fits).
    #[must_use]
    pub fn is_armed(&self) -> bool {
        self.place.armed.load(Ordering::Acquire)
    }

    /// Begins managing memory; returns whether this call was the first.
    pub fn arm(&self) -> bool {
        let _ = self.armed_at.set(Instant::now());
        !self.place.armed.swap(true, Ordering::AcqRel)
    }

    /// The pid of the first program; the tree is its.
    #[must_use]
    pub fn root(&self) -> Option<i32> {
        Some(self.place.root.load(Ordering::Relaxed)).filter(|pid| *pid > 0)
    }

    /// The first program runs under this pid.
    pub fn started(&self, pid: i32) {
        self.place.root.store(pid, Ordering::Relaxed);
    }

    /// The process that opened it runs under this pid: where it is, its program begins.
    pub fn opened_by(&self, pid: i32) {
        let start = crate::sys::process::start_time(pid).unwrap_or(0);
        self.place.launcher_start.store(start, Ordering::Relaxed);
        self.place.launcher.store(pid, Ordering::Relaxed);
    }

    /// Whether the process that opened it still runs.
    #[must_use]
    pub fn has_launcher(&self) -> bool {
        let pid = self.place.launcher.load(Ordering::Relaxed);
        let start = self.place.launcher_start.load(Ordering::Relaxed);
        crate::sys::process::is_running(pid) && crate::sys::process::start_time(pid) == Some(start)
    }

    /// Its launcher has come back to it: returns whether it was this process that opened it, and nobody has it.
    #[must_use]
    pub fn resume(&self, pid: i32) -> bool {
        pid == self.place.launcher.load(Ordering::Relaxed) && self.hold()
    }

    /// Takes it in hand; returns whether nobody had.
    #[must_use]
    pub fn hold(&self) -> bool {
        !self.is_held.swap(true, Ordering::AcqRel)
    }

    /// Whether its launcher is there.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.is_held.load(Ordering::Acquire)
    }

    /// Its launcher has asked for the account: who is left of it lives on.
    pub fn finish(&self) {
        self.place.finished.store(true, Ordering::Release);
    }

    /// Whether its launcher has.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.place.finished.load(Ordering::Acquire)
    }

    /// Its processes as far as they attached; who opened it, before any has.
    #[must_use]
    pub fn pids(&self) -> Vec<i32> {
        let attached: Vec<i32> = self
            .lock()
            .iter()
            .filter_map(|handle| handle.pid())
            .collect();
        // Later the launcher's place says nothing: when the last has ended, the account tells what held for it.
        if self.counters.processes.load(Ordering::Relaxed) == 0 {
            return vec![self.place.launcher.load(Ordering::Relaxed)];
        }
        attached
    }

    /// The job cannot go on: its processes are ended, and its user is told why. The first reason counts.
    pub fn fail(&self, reason: String) {
        tracing::error!(
            job = format_args!("{:x}", self.token),
            reason,
            "a job is ended"
        );
        let _ = self.failure.set(reason);
        crate::tree::end(self);
    }

    /// A page of it cannot be had any more, for the reason given. The first reason counts.
    pub fn a_page_is_lost(&self, why: &str) {
        self.loss.get_or_init(|| {
            format!("a page of the program is lost, and its touch ended in SIGBUS: {why}")
        });
    }

    /// A process of it is ended, since pages on their way out cannot come to their places. The first reason counts.
    pub fn a_process_is_ended(&self, why: &str) {
        self.loss.get_or_init(|| {
            format!(
                "a process of the program is ended, since a fork or a move of its memory had to wait for pages on their way \
                 out: {why}"
            )
        });
    }

    /// A pager of it begins, or ends, to do nothing but wait for pages on their way out.
    pub fn settles(&self, begins: bool) {
        match begins {
            true => self.settling.fetch_add(1, Ordering::Relaxed),
            false => self.settling.fetch_sub(1, Ordering::Relaxed),
        };
    }

    /// Whether any does.
    #[must_use]
    pub fn any_settles(&self) -> bool {
        self.settling.load(Ordering::Relaxed) > 0
    }

    /// Whether it is a library's: its limit holds for the regions named to it, not for the program's memory, and
    /// the program outlives it.
    #[must_use]
    pub fn is_for_regions(&self) -> bool {
        self.place.regions_only.load(Ordering::Acquire)
    }

    /// Makes it a library's.
    pub fn for_regions(&self) {
        self.place.regions_only.store(true, Ordering::Release);
        self.arm();
    }

    /// A process joined.
    pub fn add(&self, space: Arc<SpaceHandle>) {
        self.counters.processes.fetch_add(1, Ordering::Relaxed);
        self.add_again(space);
    }

    /// The same of one that had joined before another agent died.
    pub fn add_again(&self, space: Arc<SpaceHandle>) {
        self.lock().push(space);
    }

    /// A process's address space is gone.
    pub fn remove(&self, space: u64) {
        let mut spaces = self.lock();
        for handle in spaces.extract_if(.., |handle| handle.id == space) {
            let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
            ended.push(ProcessPeaks::of(&handle));
            keep_largest(&mut ended);
        }
    }

    /// The most pages of each process, of those that live and of those that have ended; the largest of them.
    fn peaks(&self) -> Vec<ProcessPeaks> {
        let mut peaks: Vec<_> = self
            .spaces()
            .iter()
            .map(|handle| ProcessPeaks::of(handle))
            .collect();
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        peaks.extend(ended.iter().cloned());
        keep_largest(&mut peaks);
        peaks
    }

    /// The address spaces now.
    #[must_use]
    pub fn spaces(&self) -> Vec<Arc<SpaceHandle>> {
        self.lock().clone()
    }

    /// Whether somebody has stopped or frozen a process of it: what it cannot do now it may be able to do afterwards.
    #[must_use]
    pub fn is_suspended(&self) -> bool {
        let is_held = |pid| crate::sys::process::is_stopped(pid) || crate::cgroup::is_frozen(pid);
        self.spaces()
            .iter()
            .filter_map(|space| space.pid())
            .any(is_held)
    }

    /// The account so far. Address spaces whose process has just ended are given a moment to give back what
    /// they held.
    #[must_use]
    pub fn account(&self, fabric: &str) -> Account {
        let began = Instant::now();
        let ended =
            |handle: &Arc<SpaceHandle>| handle.pid().is_none_or(crate::sys::process::is_ending);
        while self.spaces().iter().any(ended) && began.elapsed() < ACCOUNT_DEADLINE {
            std::thread::sleep(ACCOUNT_POLL);
        }
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        Account {
            faults: count(&counters.faults),
            fault_p50_us: self.latencies.quantile_us(0.5),
            fault_p99_us: self.latencies.quantile_us(0.99),
            pages_fetched: count(&counters.pages_fetched),
            pages_prefetched: count(&counters.pages_prefetched),
            prefetch_hits: count(&counters.prefetch_hits),
            pages_evicted: count(&counters.pages_evicted),
            pages_written_back: count(&counters.pages_written_back),
            pages_poisoned: count(&counters.pages_poisoned),
            loss: self.loss.get().cloned(),
            local_limit_bytes: self.local_pages() * 4096,
            local_peak_bytes: self.local_peak() * 4096,
            far_peak_bytes: self.far_peak() * 4096,
            far_slots_in_use_at_exit: self.far_used(),
            processes: count(&counters.processes),
            processes_unmanaged: count(&counters.processes_unmanaged),
            unmanaged_bytes: self.unmanaged_peak() * 4096,
            failure: self.failure.get().cloned(),
            processes_left: self.spaces().len() as u64,
            process_peaks: self.peaks(),
            fabric: fabric.to_owned(),
            replicas: self.limits.copies.into(),
            extents_below_replicas: 0,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<SpaceHandle>>> {
        self.spaces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn keep_largest(peaks: &mut Vec<ProcessPeaks>) {
    peaks.sort_by_key(|one| std::cmp::Reverse(one.total_pages));
    peaks.truncate(MAX_PROCESSES_TOLD);
}
