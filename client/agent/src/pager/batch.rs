//! A batch of pages that the helper takes out.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use farpage_attach::control::{BATCH_PAGES, Control};
use smallvec::SmallVec;

use super::Moment;
use crate::table::Page;

/// The pages of a batch, in the order of their addresses. No batch needs memory from the allocator, as no fault does.
pub(super) type Batch = SmallVec<[Page; BATCH_PAGES]>;

/// How often it is looked whether the helper can go on at all.
const DOUBT: Duration = Duration::from_secs(1);

/// A batch with the helper.
#[derive(Debug)]
pub(crate) struct TakeOut {
    pub(super) command: u32,
    pub(super) pages: Batch,
    pub(super) area: usize,
    pub(super) method: u32,
    pub(super) since: Moment,
    /// When it was last looked whether the helper can go on.
    doubted: Moment,
    /// What became of which pages is in the table already, done by the agent before this one: one bit each.
    pub(super) settled: u64,
    /// When something was last read between its moves.
    pub(super) read: Instant,
    /// The helper's `mremap` that was last seen under way, and since when.
    pub(super) remap_seen: Option<(u32, Instant)>,
}

const _: () = assert!(BATCH_PAGES <= u64::BITS as usize);

impl TakeOut {
    pub(super) fn new(command: u32, how: u32, area: usize, pages: Batch, since: Moment) -> Self {
        Self {
            command,
            pages,
            area,
            method: how,
            since,
            doubted: since,
            settled: 0,
            read: since.at,
            remap_seen: None,
        }
    }

    /// The batch that another agent has handed over.
    pub(super) fn left(
        command: u32,
        how: u32,
        area: usize,
        pages: Batch,
        settled: u64,
        since: Moment,
    ) -> Self {
        Self {
            settled,
            ..Self::new(command, how, area, pages, since)
        }
    }

    /// If it has been a while that it was looked after its helper: since when. It is now.
    pub(super) fn doubt(&mut self, now: Moment) -> Option<Moment> {
        let due = now.at.saturating_duration_since(self.doubted.at) > DOUBT;
        due.then(|| std::mem::replace(&mut self.doubted, now))
    }

    /// Pages of which it is still to be seen what became.
    pub(super) fn unsettled(&self) -> u64 {
        self.pages.len() as u64 - u64::from(self.settled.count_ones())
    }

    /// Whether the moves are over.
    pub(super) fn is_taken(&self, control: &Control) -> bool {
        control.taken.load(Ordering::Acquire) == self.command
    }
}
