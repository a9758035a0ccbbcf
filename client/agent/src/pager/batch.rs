//! A batch of pages that the helper takes out.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use farpage_attach::control::{BATCH_PAGES, Control};
use smallvec::SmallVec;

use super::attention::{Attention, Moment};
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
    /// Whether it was found that it cannot.
    pub(super) is_held: bool,
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
            is_held: false,
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

    /// Looks every now and then whether the helper is kept from going on. What it has been kept from since the last look is missed.
    pub(super) fn doubt(
        &mut self,
        attention: &mut Attention,
        now: Instant,
        is_held: impl FnOnce() -> bool,
    ) {
        if now.saturating_duration_since(self.doubted.at) <= DOUBT {
            return;
        }
        self.is_held = is_held();
        if self.is_held {
            attention.miss_since(self.doubted, now);
        }
        self.doubted = attention.moment(now);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Every second look counted for nothing, so that the helper of a program that was stopped for a minute had failed.
    #[test]
    fn a_helper_that_is_held_misses_all_of_it() {
        let start = Instant::now();
        let mut attention = Attention::since(start);
        let since = attention.moment(start);
        let mut batch = TakeOut::new(1, 0, 0, Batch::new(), since);
        let mut now = start;
        for _ in 0..100_000 {
            now += Duration::from_millis(7);
            attention.look(now);
            batch.doubt(&mut attention, now, || true);
        }
        assert!(attention.waited(since, now) <= DOUBT + Duration::from_millis(7));
        let free = attention.moment(now);
        for _ in 0..1000 {
            now += Duration::from_millis(7);
            attention.look(now);
            batch.doubt(&mut attention, now, || false);
        }
        assert_eq!(attention.waited(free, now), Duration::from_secs(7));
    }
}
