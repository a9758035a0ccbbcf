//! Counting far pages whose slots others name too: what the kernel calls shared, of memory that is not here.
//!
//! Nothing keeps this count as references come and go: that would have to find whose page is left when the last but one
//! goes. A program that has forked is gone through instead when somebody asks, a slice at a time and only while there is
//! nothing else to do, so that a fault waits for one slice at most.

use super::Pager;
use crate::table::Page;

/// Pages between two looks whether there is something else to do: some 10 us.
const SLICE_PAGES: usize = 512;

/// A count under way.
#[derive(Debug)]
pub(crate) struct Survey {
    next: Page,
    shared: u64,
}

impl Pager {
    /// Begins to count. One that is under way goes on: what asks is asked again soon.
    pub(super) fn begin_survey(&mut self) {
        self.survey.get_or_insert(Survey {
            next: Page(0),
            shared: 0,
        });
    }

    /// Goes on counting for a slice. Returns whether there was something to count.
    pub(super) fn survey(&mut self) -> bool {
        let Some(survey) = &mut self.survey else {
            return false;
        };
        let (from, mut seen) = (survey.next, 0);
        for (page, entry) in self
            .table
            .touched(from..Page(u64::MAX >> 12))
            .take(SLICE_PAGES)
        {
            seen += 1;
            survey.next = page.plus(1);
            // Only what a fork has made readable can have a second reference.
            if entry.is_far()
                && entry.is_read_only()
                && let Some(slot) = entry.slot()
                && self.shared.far.references(slot) > 1
            {
                survey.shared += 1;
            }
        }
        if seen < SLICE_PAGES {
            self.handle.figures.counted_shared(survey.shared);
            self.survey = None;
        }
        true
    }
}
