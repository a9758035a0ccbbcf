//! The address spaces and jobs of this agent, and the threads that page them.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use farpage_proto::limits::MAX_REPLICAS;

use crate::ceiling;
use crate::far::FarMemory;
use crate::figures::Counted;
use crate::job::{Job, Limits};
use crate::mailbox::{Request, SpaceHandle};
use crate::pager::Pager;
use crate::state::records::space;
use crate::state::{SpacePlace, State};

/// Most jobs at once.
const MAX_JOBS: usize = 1024;
/// Most address spaces at once: each costs a thread and some megabytes of frames when used.
const MAX_SPACES: u64 = 4096;

/// The least resident memory that a job can be asked to live with.
pub const LEAST_LOCAL_BYTES: u64 = 4 << 20;
/// How long a fault may be asked to wait at most: whoever wants more wants to wait for ever.
pub const MAX_FAULT_DEADLINE: Duration = Duration::from_secs(24 * 3600);
/// How often a launcher is looked for that has not come back to its job yet.
const LAUNCHER_POLL: Duration = Duration::from_millis(20);
/// How often a job without a launcher is looked at.
const LAST_PROCESS_POLL: Duration = Duration::from_millis(2);

/// Why a job was not opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// Below [`LEAST_LOCAL_BYTES`].
    #[error("--local is below 4M, which no program can run with; give it more")]
    TooLittle,
    /// None, or beyond [`MAX_FAULT_DEADLINE`].
    #[error("--fault-deadline is not between 1 second and a day")]
    Deadline,
    /// No copy at all, or more than [`MAX_REPLICAS`].
    #[error(
        "--replicas is not between 1 and {MAX_REPLICAS}: each copy of a page is sent and kept, and more would outlive no more \
         failures than nodes have at a time"
    )]
    Copies,
    /// As many jobs as there may be.
    #[error(
        "this agent serves as many jobs as it can ({MAX_JOBS}); try again when some have ended"
    )]
    TooMany,
    /// A memory cgroup leaves it less than [`LEAST_LOCAL_BYTES`].
    #[error(
        "the memory cgroup {group} allows {} MiB, and what others in it hold and a reserve leave {} MiB for a program; \
         give the group more ({file}), or start the program in another",
        limit_bytes >> 20, left_bytes >> 20
    )]
    Confined {
        /// Its folder.
        group: String,
        /// The file with its limit.
        file: String,
        /// The limit.
        limit_bytes: u64,
        /// What is left.
        left_bytes: u64,
    },
    /// The kernel gave no random bytes.
    #[error("no randomness for the job's token; try again")]
    NoRandomness,
}

/// What lives in this agent.
#[derive(Debug)]
pub struct Spaces {
    state: Arc<State>,
    live: AtomicU64,
    jobs: Mutex<HashMap<u64, Arc<Job>>>,
    /// What was counted for jobs that are no more. Changes under the lock of `jobs`.
    ended: Counted,
    /// Forked children that have no helper yet, with their parents' numbers.
    forked: Mutex<Vec<(u64, Arc<SpaceHandle>)>>,
    /// How many copies the last job keeps of its pages; before one, what the agent was started for.
    last_copies: AtomicU8,
    far_wanted: AtomicBool,
    far_signal: (Mutex<()>, Condvar),
}

impl Spaces {
    /// None yet, in an agent that expects jobs with so many copies; what is of use to the next agent will lie in this state.
    #[must_use]
    pub fn new(state: Arc<State>, copies: u8) -> Self {
        Self {
            state,
            live: AtomicU64::new(0),
            jobs: Mutex::default(),
            ended: Counted::default(),
            forked: Mutex::default(),
            last_copies: AtomicU8::new(copies),
            far_wanted: AtomicBool::new(false),
            far_signal: Default::default(),
        }
    }

    /// A handle for a new address space.
    ///
    /// # Errors
    /// When there are too many, or no eventfd is to be had.
    pub fn new_handle(&self, pid: i32) -> io::Result<Arc<SpaceHandle>> {
        if self.live.load(Ordering::Relaxed) >= MAX_SPACES {
            return Err(io::Error::other(
                "this agent serves as many processes as it can",
            ));
        }
        let last = &self.state.header().last_space;
        let id = last.fetch_add(1, Ordering::AcqRel) + 1;
        Ok(Arc::new(SpaceHandle::new(id, pid)?))
    }

    /// A place in the state for a new address space. It counts from when its pager is started.
    ///
    /// # Errors
    /// When there are too many.
    pub fn new_place(&self, handle: &SpaceHandle, job: &Job) -> io::Result<SpacePlace> {
        let place = self
            .state
            .new_space()
            .ok_or_else(|| io::Error::other("this agent serves as many processes as it can"))?;
        place.id.store(handle.id, Ordering::Relaxed);
        place.job.store(job.token, Ordering::Relaxed);
        place
            .regions_only
            .store(handle.manages_regions_only(), Ordering::Relaxed);
        Ok(place)
    }

    /// Starts the pager of an address space whose process has come to the door.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(
        self: &Arc<Self>,
        job: &Arc<Job>,
        pager: Pager,
        handle: Arc<SpaceHandle>,
    ) -> io::Result<()> {
        job.add(Arc::clone(&handle));
        pager.place().state.store(space::LIVE, Ordering::Release);
        self.run(job, pager, handle)
    }

    /// Starts the pager of an address space that another agent had.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start_again(
        self: &Arc<Self>,
        job: &Arc<Job>,
        pager: Pager,
        handle: Arc<SpaceHandle>,
    ) -> io::Result<()> {
        if handle.pid().is_none() {
            let parent = pager.place().parent.load(Ordering::Relaxed);
            self.forked().push((parent, Arc::clone(&handle)));
        }
        job.add_again(Arc::clone(&handle));
        self.run(job, pager, handle)
    }

    fn run(
        self: &Arc<Self>,
        job: &Arc<Job>,
        pager: Pager,
        handle: Arc<SpaceHandle>,
    ) -> io::Result<()> {
        let (spaces, name) = (Arc::clone(self), format!("pager-{}", handle.id));
        self.live.fetch_add(1, Ordering::Relaxed);
        let (job_of_thread, failed) = (Arc::clone(job), Arc::clone(&handle));
        let started = std::thread::Builder::new().name(name).spawn(move || {
            crate::sys::process::raise_priority(0, crate::sys::process::FIRST);
            // A defect in one pager must not take the others down: its program is ended, the agent lives on.
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pager.run()));
            if outcome.is_err() {
                tracing::error!(space = handle.id, "a pager failed; its program is ended");
                handle.close();
                job_of_thread.remove(handle.id);
                if let Some(pid) = handle.pid() {
                    crate::sys::process::kill(pid);
                }
            }
            spaces.forked().retain(|(_, forked)| forked.id != handle.id);
            spaces.live.fetch_sub(1, Ordering::Relaxed);
        });
        if started.is_err() {
            job.remove(failed.id);
            self.live.fetch_sub(1, Ordering::Relaxed);
        }
        started.map(drop)
    }

    /// Starts the pager of a forked child, which may come to the door for a helper.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start_forked(
        self: &Arc<Self>,
        parent: u64,
        pager: Pager,
        handle: Arc<SpaceHandle>,
    ) -> io::Result<()> {
        let job = pager.job();
        self.forked().push((parent, Arc::clone(&handle)));
        self.start(&job, pager, handle)
    }

    /// Forked children of `parent` that have no helper yet.
    #[must_use]
    pub fn forked_from(&self, parent: u64) -> Vec<Arc<SpaceHandle>> {
        self.forked()
            .iter()
            .filter(|(of, _)| *of == parent)
            .map(|(_, handle)| Arc::clone(handle))
            .collect()
    }

    /// A forked child has got its helper.
    pub fn adopted(&self, id: u64) {
        self.forked().retain(|(_, handle)| handle.id != id);
    }

    /// The job of this token.
    #[must_use]
    pub fn job(&self, token: u64) -> Option<Arc<Job>> {
        self.lock_jobs().get(&token).cloned()
    }

    /// Opens a job of these limits, bytes and how long a fault may wait, for a launcher.
    ///
    /// # Errors
    /// [`JobError`], for the launcher's user.
    pub fn open_job(
        &self,
        launcher: i32,
        uid: u32,
        local_bytes: u64,
        far_bytes: u64,
        copies: u8,
        fault_deadline: Duration,
    ) -> Result<Arc<Job>, JobError> {
        if local_bytes < LEAST_LOCAL_BYTES {
            return Err(JobError::TooLittle);
        }
        if !(1..=MAX_REPLICAS).contains(&copies) {
            return Err(JobError::Copies);
        }
        if fault_deadline < Duration::from_secs(1) || fault_deadline > MAX_FAULT_DEADLINE {
            return Err(JobError::Deadline);
        }
        let mut token = [0u8; 8];
        rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty())
            .map_err(|_| JobError::NoRandomness)?;
        let limits = Limits {
            local_pages: local_bytes / 4096,
            far_pages: far_bytes / 4096,
            copies,
            fault_deadline,
        };
        let place = self.state.new_job().ok_or(JobError::TooMany)?;
        let job = Arc::new(Job::new(u64::from_ne_bytes(token), uid, limits, place));
        job.opened_by(launcher);
        let mut jobs = self.lock_jobs();
        if jobs.len() >= MAX_JOBS {
            return Err(JobError::TooMany);
        }
        jobs.insert(job.token, Arc::clone(&job));
        self.last_copies.store(copies, Ordering::Relaxed);
        drop(jobs);
        ceiling::look(self);
        match job.ceiling.lowered() {
            Some(lowered) if lowered.local_bytes < LEAST_LOCAL_BYTES => {
                self.lock_jobs().remove(&job.token);
                Err(JobError::Confined {
                    group: lowered.group,
                    file: lowered.file,
                    limit_bytes: lowered.limit_bytes,
                    left_bytes: lowered.local_bytes,
                })
            }
            _ => Ok(job),
        }
    }

    /// Takes over a job that another agent had, and sees to it until its launcher comes back to it.
    pub fn job_again(self: &Arc<Self>, job: &Arc<Job>) {
        self.lock_jobs().insert(job.token, Arc::clone(job));
        let (spaces, job) = (Arc::clone(self), Arc::clone(job));
        let watching = std::thread::Builder::new()
            .name("launcher".into())
            .spawn(move || {
                while !job.is_held() && job.has_launcher() {
                    std::thread::sleep(LAUNCHER_POLL);
                }
                // Whoever comes first: nobody comes back to a job that is being ended.
                if job.hold() {
                    let kill = !job.is_finished() && !job.is_for_regions();
                    spaces.end_job(&job, kill);
                }
            });
        if let Err(error) = watching {
            tracing::error!(%error, "a launcher's end will not be seen");
        }
    }

    /// The launcher is gone. Its programs are ended with it if it did not finish; those that outlive an orderly
    /// end keep their memory, and the job lasts as long as the last of them.
    pub fn end_job(&self, job: &Arc<Job>, kill: bool) {
        if kill {
            crate::tree::end(job);
        }
        while !job.spaces().is_empty() {
            std::thread::sleep(LAST_PROCESS_POLL);
        }
        let mut jobs = self.lock_jobs();
        if jobs.remove(&job.token).is_some() {
            self.ended.add(&job.counters, &job.latencies);
        }
    }

    /// All jobs, and what was counted for those that are no more.
    #[must_use]
    pub fn jobs_and_ended(&self) -> (Vec<Arc<Job>>, Counted) {
        let jobs = self.lock_jobs();
        let ended = Counted::default();
        ended.add(&self.ended.counters, &self.ended.latencies);
        (jobs.values().cloned().collect(), ended)
    }

    /// All jobs.
    #[must_use]
    pub fn jobs(&self) -> Vec<Arc<Job>> {
        self.lock_jobs().values().cloned().collect()
    }

    /// An address space of this pid in a job: what it was before it replaced its program.
    pub fn close_previous(&self, job: &Job, pid: i32) {
        for handle in job
            .spaces()
            .into_iter()
            .filter(|handle| handle.pid() == Some(pid))
        {
            handle.ask(Request::Close);
        }
    }

    /// How many copies jobs keep of their pages, each number once. Without a job it is the last one's, so that the next finds
    /// slots.
    #[must_use]
    pub fn copies(&self) -> BTreeSet<u8> {
        let of_jobs: BTreeSet<u8> = self
            .lock_jobs()
            .values()
            .map(|job| job.limits.copies)
            .collect();
        if of_jobs.is_empty() {
            return BTreeSet::from([self.last_copies.load(Ordering::Relaxed)]);
        }
        of_jobs
    }

    /// Slots of extents with so many copies run low: the control plane is to ask for another.
    pub fn wanted_far_memory(&self, far: &FarMemory, copies: u8) {
        if far.is_low(copies) && !self.far_wanted.load(Ordering::Acquire) {
            self.wake_control_plane();
        }
    }

    /// Has the control plane's thread look what there is to do.
    pub fn wake_control_plane(&self) {
        let _guard = self
            .far_signal
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.far_wanted.store(true, Ordering::Release);
        self.far_signal.1.notify_all();
    }

    /// Waits until far memory is wanted, at most `timeout`. Returns whether it is.
    #[must_use]
    pub fn wait_for_want(&self, timeout: Duration) -> bool {
        let guard = self
            .far_signal
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let wanted = || self.far_wanted.load(Ordering::Acquire);
        let _ = self
            .far_signal
            .1
            .wait_timeout_while(guard, timeout, |()| !wanted());
        self.far_wanted.swap(false, Ordering::AcqRel)
    }

    fn forked(&self) -> MutexGuard<'_, Vec<(u64, Arc<SpaceHandle>)>> {
        self.forked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_jobs(&self) -> MutexGuard<'_, HashMap<u64, Arc<Job>>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
