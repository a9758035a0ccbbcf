//! A batch of pages that the helper takes out, and which events belong to it.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Instant;

use farpage_attach::control::{BATCH_PAGES, Control, method};
use smallvec::SmallVec;

use crate::table::Page;

/// The pages of a batch, in the order of their addresses. No batch needs memory from the allocator, as no fault does.
pub(super) type Batch = SmallVec<[Page; BATCH_PAGES]>;

/// A batch with the helper.
#[derive(Debug)]
pub(crate) struct TakeOut {
    pub(super) command: u32,
    pub(super) pages: Batch,
    pub(super) area: usize,
    pub(super) method: u32,
    pub(super) since: Instant,
    /// Of which pages the events of our own drops are still to be read (kernels without `UFFDIO_MOVE`): one bit each.
    pub(super) drops_unread: u64,
    /// What became of which pages is in the table already, done by the agent before this one: one bit each.
    pub(super) settled: u64,
}

const _: () = assert!(BATCH_PAGES <= u64::BITS as usize);

impl TakeOut {
    pub(super) fn new(command: u32, how: u32, area: usize, pages: Batch) -> Self {
        Self {
            command,
            pages,
            area,
            method: how,
            since: Instant::now(),
            drops_unread: u64::MAX,
            settled: 0,
        }
    }

    /// The batch that another agent has handed over.
    pub(super) fn left(
        command: u32,
        how: u32,
        area: usize,
        pages: Batch,
        drops_unread: u64,
        settled: u64,
    ) -> Self {
        Self {
            drops_unread,
            settled,
            ..Self::new(command, how, area, pages)
        }
    }

    /// Pages of which it is still to be seen what became.
    pub(super) fn unsettled(&self) -> u64 {
        self.pages.len() as u64 - u64::from(self.settled.count_ones())
    }

    /// Which of these pages, from the first on, the events of our own drops are still to be read of; none where they are
    /// not all of this batch, for then the event is the program's.
    pub(super) fn own_drops(&self, pages: &Range<Page>) -> Option<u64> {
        let bits = || each(pages).map(|page| self.bit(page));
        if bits().any(|bit| bit == 0) {
            return None;
        }
        let own = bits().enumerate();
        let own = own.filter(|(_, bit)| self.drops_unread & bit != 0);
        Some(own.fold(0, |own, (index, _)| own | 1 << index))
    }

    /// Their events are read.
    pub(super) fn drops_are_read(&mut self, pages: &Range<Page>, own: u64) {
        for (index, page) in each(pages).take(BATCH_PAGES).enumerate() {
            if own >> index & 1 == 1 {
                self.drops_unread &= !self.bit(page);
            }
        }
    }

    pub(super) fn bit(&self, page: Page) -> u64 {
        match self.pages.binary_search(&page) {
            Ok(index) => 1 << index,
            Err(_) => 0,
        }
    }

    /// Whether the moves are over.
    pub(super) fn is_taken(&self, control: Option<&Control>) -> bool {
        self.method == method::DROP
            || control.is_none_or(|control| control.taken.load(Ordering::Acquire) == self.command)
    }
}

/// Each page of a range.
pub(super) fn each(pages: &Range<Page>) -> impl Iterator<Item = Page> + use<> {
    (pages.start.0..pages.end.0).map(Page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_discard_of_a_page_is_our_drop_and_the_second_the_programs() {
        let pages = [5, 6, 9].map(Page).into_iter().collect();
        let mut batch = TakeOut::new(1, method::DROP, 0, pages);
        let both = Page(5)..Page(7);
        assert_eq!(batch.own_drops(&(Page(6)..Page(8))), None);
        assert_eq!(batch.own_drops(&(Page(6)..Page(7))), Some(1));
        batch.drops_are_read(&(Page(6)..Page(7)), 1);
        assert_eq!(batch.own_drops(&both), Some(0b01));
        batch.drops_are_read(&both, 0b01);
        assert_eq!(batch.own_drops(&both), Some(0));

        // The next agent's is the same.
        let pages = batch.pages.clone();
        let left = TakeOut::left(1, method::DROP, 0, pages, batch.drops_unread, 0);
        assert_eq!(left.own_drops(&both), Some(0));
        assert_eq!(left.own_drops(&(Page(9)..Page(10))), Some(1));
    }
}
