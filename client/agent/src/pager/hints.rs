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
/// Hints kept of each kind; the oldest gives way.
const MOST_KEPT: usize = 64;
/// Fetches under way for hints: a part of all, so that faults find places.
const MOST_FETCHES: usize = 4;
/// Chunks of the table looked at in one go: some 5 us.
const SLICE_CHUNKS: usize = 4;
/// So often while a thread may wait.
const SLICES: usize = 16;

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
        if pages.is_empty() {
            return;
        }
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

    /// How many pages all of them are of.
    fn pages(&self) -> u64 {
        let pages = self.0.iter().map(|it| it.pages.end.0 - it.pages.start.0);
        pages.sum()
    }

    /// Of the oldest, everything before `page` has been seen to.
    fn seen_to(&mut self, page: Page) {
        if let Some(it) = self.0.front_mut() {
            it.pages.start = page.min(it.pages.end);
        }
    }
}

/// What the program has said and what is still to be done about it.
#[derive(Debug, Default)]
pub(crate) struct Hints {
    needed: Wishes,
    leaving: Wishes,
    cold: Wishes,
}

impl Hints {
    /// Takes one in. Of what is needed no more than `most` pages are kept: what comes home beyond that would drive out what
    /// came before it.
    fn take(&mut self, hint: &Hint, most: u64) {
        let pages = pages_of(hint.from..hint.from.saturating_add(hint.bytes));
        if pages.is_empty() {
            return;
        }
        match hint.advice {
            hints::WILLNEED => {
                self.leaving.forget(&pages);
                self.cold.forget(&pages);
                let most = most.saturating_sub(self.needed.pages());
                let end = pages.end.min(pages.start.plus(most));
                self.needed.add(pages.start..end);
            }
            hints::COLD => {
                self.needed.forget(&pages);
                self.cold.add(pages);
            }
            hints::PAGEOUT => {
                self.needed.forget(&pages);
                self.leaving.add(pages);
            }
            _ => {}
        }
    }

    fn unneeded(&mut self, is_leaving: bool) -> &mut Wishes {
        match is_leaving {
            true => &mut self.leaving,
            false => &mut self.cold,
        }
    }

    /// Whether anything is to go at once.
    pub(super) fn any_leaving(&mut self) -> bool {
        self.leaving.first().is_some()
    }
}

impl Pager {
    /// Takes in what the program has said since it was last looked at. Returns whether that was anything.
    pub(super) fn take_hints(&mut self) -> bool {
        let Some(helper) = &mut self.helper else {
            return false;
        };
        let given: SmallVec<[Hint; RING]> = helper.new_hints().collect();
        if given.is_empty() {
            return false;
        }
        let most = self.job.local_pages() / 2;
        for hint in &given {
            self.hints.take(hint, most);
        }
        true
    }

    /// Brings home what the program has said it will need. Returns whether there was something to do.
    pub(super) fn bring_needed(&mut self) -> bool {
        for slice in 0..SLICES {
            // Mostly there is nothing, which is seen first: every fault passes here.
            let Some(pages) = self.hints.needed.first() else {
                return slice > 0;
            };
            let (under_way, coming) = self.fetches.hinted();
            // Half of the room is left to faults.
            let most = self.job.room() / 2 - coming as i64;
            let may_fetch = most > 0
                && self.waiting.is_empty()
                && self.is_inheritance_known()
                && under_way < MOST_FETCHES;
            if !may_fetch {
                return slice > 0;
            }
            let (far, seen) = self.look_for(&pages, |state| {
                matches!(state, State::FarRead | State::FarWrite)
            });
            let most = most.cast_unsigned().min(MAX_WINDOW);
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

    /// The next page here that the program wants to go, or, where something has to go, that it does not use.
    pub(super) fn next_unneeded(&mut self, is_short: bool) -> Option<Page> {
        for _ in 0..SLICES {
            let is_leaving = self.hints.any_leaving();
            if !is_leaving && !is_short {
                return None;
            }
            let pages = self.hints.unneeded(is_leaving).first()?;
            let (page, seen) = self.look_for(&pages, |state| state == State::Local);
            let seen = page.map_or(seen, |page| page.plus(1));
            self.hints.unneeded(is_leaving).seen_to(seen);
            if page.is_some() {
                return page;
            }
        }
        None
    }

    /// The first page of a range that is in such a state, looking at a slice of it; and the page up to which there is none.
    fn look_for(&self, pages: &Range<Page>, such: impl Fn(State) -> bool) -> (Option<Page>, Page) {
        let slice = self.table.slice(pages.clone(), SLICE_CHUNKS);
        let end = slice.end;
        let found = self.table.touched(slice).find(|(_, it)| such(it.state()));
        found.map_or((None, end), |(page, _)| (Some(page), page))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hint(advice: u32, from: u64, pages: u64) -> Hint {
        Hint {
            advice,
            from: from << 12,
            bytes: pages << 12,
        }
    }

    #[test]
    fn what_is_needed_is_not_cold_any_more_and_the_other_way_round() {
        let mut hints = Hints::default();
        hints.take(&hint(hints::COLD, 10, 4), 100);
        hints.take(&hint(hints::PAGEOUT, 20, 4), 100);
        assert_eq!(hints.cold.first(), Some(Page(10)..Page(14)));
        assert!(hints.any_leaving());
        hints.take(&hint(hints::WILLNEED, 12, 10), 100);
        assert_eq!(hints.cold.first(), None);
        assert!(!hints.any_leaving());
        hints.take(&hint(hints::COLD, 12, 1), 100);
        assert_eq!(hints.needed.first(), None);
    }

    #[test]
    fn no_more_is_needed_than_fits() {
        let mut hints = Hints::default();
        (0..10).for_each(|piece| hints.take(&hint(hints::WILLNEED, piece * 40, 40), 100));
        assert_eq!(hints.needed.pages(), 100);
    }

    #[test]
    fn what_nobody_can_mean_is_nothing() {
        let mut hints = Hints::default();
        let everywhere = [0, 1, 4095, 4096, u64::MAX - 1, u64::MAX];
        for (from, bytes) in everywhere
            .iter()
            .flat_map(|it| everywhere.map(|to| (*it, to)))
        {
            for advice in [0, hints::WILLNEED, hints::COLD, hints::PAGEOUT, u32::MAX] {
                let hint = Hint {
                    advice,
                    from,
                    bytes,
                };
                hints.take(&hint, 100);
                assert!(hints.needed.pages() <= 100);
            }
        }
        (0..1000).for_each(|at| hints.take(&hint(hints::COLD, at, 1), 100));
        assert_eq!(hints.cold.0.len(), MOST_KEPT);
    }
}
