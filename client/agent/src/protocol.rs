//! The job protocol: what `farpage run` and `farpage status` say to the agent, in JSON packets behind the
//! handshake's first one.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::mailbox::SpaceHandle;

/// The longest packet.
pub const MAX_PACKET: usize = 64 << 10;

/// From the launcher.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobRequest {
    /// Opens a job. The connection is its lifeline: closed without [`JobRequest::Finish`], the job's processes
    /// are ended.
    Open {
        /// Resident anonymous memory of the whole tree, bytes.
        local_bytes: u64,
        /// Far memory, bytes.
        far_bytes: u64,
        /// Copies of each page.
        replicas: u32,
        /// How long a fault may wait for its page, seconds; the agent's own choice where none is given.
        #[serde(default)]
        fault_deadline_s: Option<u64>,
    },
    /// Goes on with a job that was opened at an agent which has died since, by the process that opened it.
    Resume {
        /// The job's token, hexadecimal.
        token: String,
    },
    /// The first program of the job runs under this pid.
    Started {
        /// Its pid.
        pid: i32,
    },
    /// The first program has ended: give the account. Others of the job live on.
    Finish,
}

/// To the launcher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobReply {
    /// The job is open under this token.
    Opened {
        /// Hexadecimal, as programs find it in their environment.
        token: String,
        /// Why it may have less resident than was asked for, if it may.
        lowered: Option<Lowered>,
    },
    /// Noted.
    Noted,
    /// The account.
    Account(Box<Account>),
    /// No, and why, with what to do.
    Refused {
        /// For the user.
        reason: String,
    },
}

/// A memory cgroup that leaves less to a job than was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lowered {
    /// What may be resident, bytes.
    pub local_bytes: u64,
    /// The group's folder.
    pub group: String,
    /// The file in it that holds its limit.
    pub file: String,
    /// That limit, bytes.
    pub limit_bytes: u64,
}

/// What was counted for a job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Account {
    /// Page faults answered.
    pub faults: u64,
    /// Half of them took at most this long, microseconds from message to wake-up.
    pub fault_p50_us: f64,
    /// All but one in a hundred took at most this long.
    pub fault_p99_us: f64,
    /// Pages read from memory nodes.
    pub pages_fetched: u64,
    /// Those read ahead of their fault.
    pub pages_prefetched: u64,
    /// Those of them that a later fault proved used.
    pub prefetch_hits: u64,
    /// Pages taken out.
    pub pages_evicted: u64,
    /// Pages written to memory nodes.
    pub pages_written_back: u64,
    /// Pages lost.
    pub pages_poisoned: u64,
    /// Why the first of them was.
    pub loss: Option<String>,
    /// What of anonymous memory might be resident at the end, bytes.
    pub local_limit_bytes: u64,
    /// Most anonymous memory resident at any sample, bytes.
    pub local_peak_bytes: u64,
    /// Most far memory in use, bytes.
    pub far_peak_bytes: u64,
    /// References to slots that are still held.
    pub far_slots_in_use_at_exit: u64,
    /// Processes that attached.
    pub processes: u64,
    /// Processes of the tree that did not.
    pub processes_unmanaged: u64,
    /// Most resident memory that was not managed, bytes.
    pub unmanaged_bytes: u64,
    /// Why the agent ended the job's processes, if it did.
    pub failure: Option<String>,
    /// Processes that live on.
    pub processes_left: u64,
    /// The most pages of each process, the largest ones first; those of less than the largest 64 are left out.
    pub process_peaks: Vec<ProcessPeaks>,
    /// The fabric in use.
    pub fabric: String,
    /// On how many nodes each page was to be.
    #[serde(default)]
    pub replicas: u32,
    /// Extents of the agent's, of so many copies, that had fewer at the end.
    #[serde(default)]
    pub extents_below_replicas: u32,
}

/// The most pages that one process had, each count at its own worst moment, as far as it was sampled.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessPeaks {
    /// Its pid; 0 for a forked child that ended before it was known.
    pub pid: u32,
    /// Its name.
    pub name: String,
    /// Resident.
    pub local_pages: u64,
    /// Far, zeros held nowhere included.
    pub far_pages: u64,
    /// Far, in slots that another process's page was in too.
    pub shared_far_pages: u64,
    /// Resident and far together: what would have been resident without far memory.
    pub total_pages: u64,
}

impl ProcessPeaks {
    pub(crate) fn of(handle: &SpaceHandle) -> Self {
        let peaks = &handle.figures.peaks;
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Self {
            pid: handle.pid().unwrap_or(0).unsigned_abs(),
            name: handle.name.get().cloned().unwrap_or_default(),
            local_pages: load(&peaks.local),
            far_pages: load(&peaks.far),
            shared_far_pages: load(&peaks.shared_far),
            total_pages: load(&peaks.total),
        }
    }
}

/// One address space, for `farpage status`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessFigures {
    /// Its pid; 0 for a forked child not yet known.
    pub pid: i32,
    /// Its name.
    pub name: String,
    /// Anonymous pages resident, managed or not; of a library's program, its regions'.
    pub local_pages: u64,
    /// Pages present in managed memory, those that are the kernel's page of zeros included.
    pub managed_pages: u64,
    /// Pages held far or on their way, and zeros held nowhere.
    pub far_pages: u64,
    /// Those of them whose slot another process's page is in too.
    pub shared_far_pages: u64,
    /// Those of them that are zeros held nowhere.
    pub zero_pages: u64,
    /// Faults answered.
    pub faults: u64,
    /// Its job's limit, bytes.
    pub local_limit_bytes: u64,
}

impl ProcessFigures {
    /// Those of an address space now, in a job of this limit.
    pub(crate) fn of(handle: &SpaceHandle, local_limit_bytes: u64) -> Self {
        let pid = handle.pid().unwrap_or(0);
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let now = &handle.figures;
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let (managed_pages, far_pages) = (load(&now.local), load(&now.far));
        Self {
            pid,
            name: name.trim_end().to_owned(),
            // Before the first sample what the table says is the best there is.
            local_pages: match load(&now.anonymous) {
                0 => managed_pages,
                sampled => sampled,
            },
            managed_pages,
            far_pages,
            // Counted at another moment than the whole.
            shared_far_pages: load(&now.shared_far).min(far_pages),
            zero_pages: load(&now.zero).min(far_pages),
            faults: load(&now.faults),
            local_limit_bytes,
        }
    }
}
