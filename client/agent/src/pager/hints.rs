//! What the program says of pages to come (`madvise`; the shim passes it on): `MADV_WILLNEED` brings far pages home while
//! there is room and no thread waits, `MADV_COLD` has pages go before all others, `MADV_PAGEOUT` has them go at once.
//!
//! A hint moves no limit and lasts for a while. What it says of pages that are not managed, or not where it takes them to
//! be, is nothing.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use farpage_attach::hints::{self, Hint, RING};
use smallvec::SmallVec;

use super::Pager;
use crate::entry::State;
use crate::prefetch::MAX_WINDOW;
use crate::table::{Page, pages_of};

/// What is not done by then is not done: the program has gone on meanwhile.
const HINT_LASTS: Duration = Duration::from_secs(10);
/// Hints kept of either kind; the oldest gives way.
const MOST_KEPT: usize = 64;
/// Fetches under way for hints: a part of all, so that faults find places.
const MOST_FETCHES: usize = 4;
/// Entries looked at in one go: some 10 us.
const SLICE_PAGES: usize = 512;
/// So often while a thread may wait.
const SLICES: usize = 32;

/// Pages, and until when something is wanted of them.
#[derive(Debug)]
struct Wish {
    pages: Range<Page>,
    until: Instant,
}

/// The wishes of one kind, oldest first.
#[derive(Debug, Default)]
struct Wishes(VecDeque<Wish>);

impl Wishes {
    fn add(&mut self, pages: Range<Page>) {
        if self.0.len() == MOST_KEPT {
            self.0.pop_front();
        }
        let until = Instant::now() + HINT_LASTS;
        self.0.push_back(Wish { pages, until });
    }

    /// Forgets what is said of any of these pages.
    fn forget(&mut self, pages: &Range<Page>) {
        self.0
            .retain(|it| it.pages.end <= pages.start || pages.end <= it.pages.start);
    }

    /// The pages of the oldest, those already seen to left out.
    fn first(&mut self) -> Option<Range<Page>> {
        while self
            .0
            .front()
            .is_some_and(|it| it.pages.is_empty() || it.until < Instant::now())
        {
            self.0.pop_front();
        }
        self.0.front().map(|it| it.pages.clone())
    }

    /// Of the oldest, everything before `page` has been seen to.
    fn seen_to(&mut self, page: Page) {
        if let Some(it) = self.0.front_mut() {
            it.pages.start = page;
        }
    }
}

/// What the program has said and what is still to be done about it.
#[derive(Debug, Default)]
pub(crate) struct Hints {
    needed: Wishes,
    cold: Wishes,
}

impl Pager {
    /// Takes in what the program has said since it was last looked at. Returns whether that was anything.
    pub(super) fn take_hints(&mut self) -> bool {
        let Some(helper) = &mut self.helper else {
            return false;
        };
        let given: SmallVec<[Hint; RING]> = helper.new_hints().collect();
        for hint in &given {
            let pages = pages_of(hint.from..hint.from.saturating_add(hint.bytes));
            self.hints.needed.forget(&pages);
            self.hints.cold.forget(&pages);
            match hint.advice {
                hints::WILLNEED => {
                    // What comes home beyond this would drive out what came before it.
                    let most = self.job.local_pages() / 2;
                    let end = pages.end.min(pages.start.plus(most));
                    self.hints.needed.add(pages.start..end);
                }
                hints::COLD => self.hints.cold.add(pages),
                hints::PAGEOUT => {
                    let here = self.table.touched(pages.clone());
                    let here = here.filter(|(_, entry)| entry.state() == State::Local);
                    let asked = self.shrink.saturating_add(here.count() as u64);
                    self.shrink = asked.min(self.table.local_pages());
                    self.hints.cold.add(pages);
                }
                _ => {}
            }
        }
        !given.is_empty()
    }

    /// Brings home what the program has said it will need. Returns whether there was something to do.
    pub(super) fn bring_needed(&mut self) -> bool {
        for slice in 0..SLICES {
            // Half of the room is left to faults.
            let most = (self.room() / 2).clamp(0, MAX_WINDOW as i64) as u64;
            let may_fetch = most > 0
                && self.waiting.is_empty()
                && self.is_inheritance_known()
                && self.fetches.hinted() < MOST_FETCHES;
            let Some(pages) = self.hints.needed.first().filter(|_| may_fetch) else {
                return slice > 0;
            };
            let (far, seen) = self.look_for(&pages, |state| {
                matches!(state, State::FarRead | State::FarWrite)
            });
            let brought = match far {
                Some(page) => self.start_hinted(page, most.min(pages.end.0 - page.0)),
                None => Some(0),
            };
            let Some(brought) = brought else {
                return slice > 0;
            };
            self.hints.needed.seen_to(seen.plus(brought));
        }
        true
    }

    /// The next page here that the program has said it does not use.
    pub(super) fn next_cold(&mut self) -> Option<Page> {
        for _ in 0..SLICES {
            let pages = self.hints.cold.first()?;
            let (page, seen) = self.look_for(&pages, |state| state == State::Local);
            self.hints
                .cold
                .seen_to(page.map_or(seen, |page| page.plus(1)));
            if page.is_some() {
                return page;
            }
        }
        None
    }

    /// The first page of a range that is in such a state, looking at a slice of it; and the page up to which there is none.
    fn look_for(&self, pages: &Range<Page>, such: impl Fn(State) -> bool) -> (Option<Page>, Page) {
        let mut seen = 0;
        let mut up_to = pages.start;
        for (page, entry) in self.table.touched(pages.clone()).take(SLICE_PAGES) {
            if such(entry.state()) {
                return (Some(page), page);
            }
            (seen, up_to) = (seen + 1, page.plus(1));
        }
        (None, if seen < SLICE_PAGES { pages.end } else { up_to })
    }
}
