//! The control block: memory that the agent, the program, the helper and its two assistants ([`crate::landing`],
//! [`crate::unsharer`]) share.
//!
//! One memfd per address space: this block in the first pages, staging pages behind it. Every field is an
//! atomic, since all of them read and write it; the agent believes nothing that it reads here beyond
//! what the kernel or a checksum confirms. A program that scribbles over it harms itself alone.

use core::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering};

use crate::PAGE_BYTES;
use crate::hints::{Hint, Hints};
use crate::sys::calls;

/// The most pages that one batch takes out: long enough to spread the cost of a wake-up, short enough
/// (about 0.1 ms) that a fault which must wait for it is not felt.
pub const BATCH_PAGES: usize = 64;

/// How many batches may have their pages in staging at once: one being taken out, the others on their way
/// to the memory node.
pub const STAGING_AREAS: usize = 4;

/// Bytes that the block itself occupies at the front of the memfd.
pub const CONTROL_BYTES: usize = 2 * PAGE_BYTES;

/// Bytes of the whole memfd.
pub const SHARED_BYTES: usize = CONTROL_BYTES + STAGING_AREAS * BATCH_PAGES * PAGE_BYTES;

/// Offset in the memfd of one staging page.
#[must_use]
pub const fn staging_offset(area: usize, index: usize) -> usize {
    CONTROL_BYTES + (area * BATCH_PAGES + index) * PAGE_BYTES
}

/// How the helper is to take pages out.
pub mod method {
    /// `UFFDIO_MOVE` to the holding range, copy to staging, move on to the drain range, drop there.
    pub const MOVE: u32 = 1;
    /// `mremap` to the landing range, copy to staging, unmap there (kernels without `UFFDIO_MOVE`, mappings that are not
    /// plain read-write). See [`crate::landing`].
    pub const REMAP: u32 = 2;
    /// As [`MOVE`], after making each page exclusive (`MADV_POPULATE_WRITE`): what a fork left shared
    /// cannot be moved. See [`crate::unsharer`].
    pub const UNSHARE_AND_MOVE: u32 = 3;
}

/// What became of a page of a batch: [`outcome::TAKEN`] or the errno that kept it where it was.
pub mod outcome {
    /// Not looked at yet.
    pub const PENDING: u32 = 0;
    /// Taken out; its bytes are in staging.
    pub const TAKEN: u32 = u32::MAX;
    /// Its mapping is not under the program's uffd: what would be taken out of it would be gone.
    pub const UNMANAGED: u32 = u32::MAX - 1;
    /// Taken out, but it may be another page than was chosen: the program has moved it there at the same moment.
    pub const REPLACED: u32 = u32::MAX - 2;
}

/// One batch of pages to take out. Written by the agent while the helper rests.
#[repr(C)]
#[derive(Debug)]
pub struct Batch {
    /// One of [`method`].
    pub method: AtomicU32,
    /// How many pages, at most [`BATCH_PAGES`].
    pub count: AtomicU32,
    /// Which staging area receives them.
    pub area: AtomicU32,
    /// Explicit padding.
    pub reserved: AtomicU32,
    /// Page addresses, ascending runs where possible.
    pub pages: [AtomicU64; BATCH_PAGES],
    /// What became of each.
    pub outcomes: [AtomicU32; BATCH_PAGES],
}

impl Batch {
    /// How many pages it has.
    pub(crate) fn count(&self) -> usize {
        (self.count.load(Ordering::Relaxed) as usize).min(BATCH_PAGES)
    }

    /// Its staging area.
    pub(crate) fn area(&self) -> usize {
        (self.area.load(Ordering::Relaxed) as usize) % STAGING_AREAS
    }
}

/// The block itself.
#[repr(C)]
#[derive(Debug)]
pub struct Control {
    /// [`crate::message::MAGIC`].
    pub magic: AtomicU64,

    /// Agent to program: how many bytes it may map before it is to report that. Negative once memory is managed, when
    /// every mapping is worth a report. The program counts it down.
    pub headroom: AtomicI64,

    /// Agent to program, a futex: not zero while allocations should wait for eviction to catch up.
    pub hold: AtomicU32,
    /// Program to agent, a futex: counts requests to look at the address space again.
    pub report: AtomicU32,
    /// Agent to program, a futex: the report that was last answered.
    pub report_ack: AtomicU32,

    /// Agent and program to helper, a futex: counts new commands, reports and hints.
    pub bell: AtomicU32,
    /// Agent to helper: the batch handed over, numbered on and on together with those of [`Self::landing_command`].
    pub command: AtomicU32,
    /// Helper to agent: the batch whose pages have left the program's ranges.
    pub taken: AtomicU32,
    /// Helper to agent: the batch that is finished, its pages in staging.
    pub done: AtomicU32,
    /// Helper to agent: not zero while it sleeps on [`Self::bell`].
    pub helper_sleeps: AtomicU32,
    /// Agent to helper: not zero while the agent wants a wake-up through the eventfd.
    pub agent_sleeps: AtomicU32,
    /// Agent to helper: not zero when it is to end.
    pub quit: AtomicU32,
    /// Agent to helper: seconds without an agent after which the program is ended.
    pub dead_man_seconds: AtomicU32,

    /// Not zero once there is a process beside the helper that takes batches out by `mremap`. The agent tells it itself then.
    pub lander: AtomicU32,
    /// Agent, or helper for the first, to that process, a futex: the batch that it is to take out.
    pub landing_command: AtomicU32,
    /// Helper to agent: counts the calls of `mremap` that it has begun, [`Self::remap_run`] said before, and those that are over.
    pub remaps_begun: AtomicU32,
    /// See [`Self::remaps_begun`].
    pub remaps_over: AtomicU32,
    /// Which pages of the batch the last one moves: the first, and behind it by 16 bits how many.
    pub remap_run: AtomicU32,
    /// Agent to helper: the last one during which the uffd was read.
    pub remap_read_in: AtomicU32,
    /// Agent to helper: the batch in which it is to move nothing more by `mremap`.
    pub given_up: AtomicU32,

    /// Unsharer to helper, a futex: the batch whose pages it has seen to.
    pub unshared: AtomicU32,

    /// The batch of [`Self::command`].
    pub batch: Batch,

    /// Program to agent: what it has said of pages to come.
    pub hints: Hints,
}

const _: () = assert!(core::mem::size_of::<Control>() <= CONTROL_BYTES);

impl Control {
    /// The program's side of an allocation: waits while eviction has to catch up, at most [`HOLD_LIMIT_MS`].
    pub fn wait_while_held(&self) {
        let mut waited = 0;
        while waited < HOLD_LIMIT_MS {
            let hold = self.hold.load(Ordering::Relaxed);
            if hold == 0 {
                return;
            }
            calls::futex_wait(&self.hold, hold, HOLD_STEP_MS);
            waited += HOLD_STEP_MS;
        }
    }

    /// Whether memory is managed, so that every mapping is worth a report.
    #[must_use]
    pub fn is_managed(&self) -> bool {
        self.headroom.load(Ordering::Relaxed) < 0
    }

    /// Counts `bytes` that the program has mapped. Returns whether that is to be reported.
    pub fn uses_up(&self, bytes: usize) -> bool {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.is_managed() || self.headroom.fetch_sub(bytes, Ordering::Relaxed) < bytes
    }

    /// Counts what the program has reported and what it has said of pages to come, all told.
    #[must_use]
    pub fn news(&self) -> u32 {
        let reports = self.report.load(Ordering::SeqCst);
        reports.wrapping_add(self.hints.given.load(Ordering::SeqCst))
    }

    /// The program's side of a hint; it waits for nothing.
    pub fn hint(&self, hint: Hint) {
        self.hints.give(hint);
        self.ring();
    }

    /// Wakes the helper, which tells the agent.
    fn ring(&self) {
        self.bell.fetch_add(1, Ordering::SeqCst);
        calls::futex_wake(&self.bell);
    }

    /// The program's side of a new mapping: asks the agent to look at the address space and waits for it to
    /// have done so, at most [`REPORT_LIMIT_MS`]; later is only less punctual, never wrong.
    pub fn report_mapping(&self) {
        let mine = self.report.fetch_add(1, Ordering::AcqRel).wrapping_add(1);
        self.ring();
        let mut waited = 0;
        while waited < REPORT_LIMIT_MS {
            let ack = self.report_ack.load(Ordering::Acquire);
            if ack.wrapping_sub(mine) as i32 >= 0 {
                return;
            }
            calls::futex_wait(&self.report_ack, ack, REPORT_STEP_MS);
            waited += REPORT_STEP_MS;
        }
    }
}

/// How long an allocation waits for eviction, at most. Eviction frees at least some megabytes in this time;
/// if it cannot, the program goes on and the limit is missed rather than the program stopped.
const HOLD_LIMIT_MS: u64 = 500;
const HOLD_STEP_MS: u64 = 10;
/// How long a new mapping waits for the agent.
const REPORT_LIMIT_MS: u64 = 500;
const REPORT_STEP_MS: u64 = 10;
