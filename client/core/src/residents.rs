//! Which pages to take out: two queues in the order of arrival, and a memory of what left.
//!
//! The kernel tells user space of no access to a page that is present, so the policy lives on what the pager
//! sees: arrivals and refaults. A page arrives on probation. If it is fetched again soon after it left, sooner
//! than as many evictions as there are resident pages, it is kept among the proven ones. Probation is emptied
//! first while it holds more than its share, so that a scan passes through without driving out what is used. Only now
//! and then does the oldest of the proven ones go: if it is still used it comes back, if not it would stay for ever.

use std::collections::VecDeque;

use crate::table::Page;

/// Probation's share of the resident set: one in this many pages.
const PROBATION_SHARE: usize = 8;

/// One victim in so many is a proven page, though probation holds more than its share.
const PROVEN_TURN: u64 = 16;

/// Evictions per step of the age clock, so that 16 bits of age span four million evictions.
const AGE_STEP: u64 = 64;

/// The resident pages of one address space, in the order in which they might go. Entries are dropped lazily:
/// the caller asks the table whether a page it was given is still local.
#[derive(Debug, Default)]
pub struct Residents {
    probation: VecDeque<Page>,
    proven: VecDeque<Page>,
    evictions: u64,
    victims: u64,
}

impl Residents {
    /// A page that was touched for the first time, or found present.
    pub fn arrived(&mut self, page: Page) {
        self.probation.push_back(page);
    }

    /// A page that was fetched after it had left at `age`.
    pub fn refaulted(&mut self, page: Page, age: u16, resident: u64) {
        let steps = self.age().wrapping_sub(age);
        if u64::from(steps) * AGE_STEP <= resident {
            self.proven.push_back(page);
        } else {
            self.probation.push_back(page);
        }
    }

    /// A page that was touched while it was being taken out, or would not go: it goes to the back.
    pub fn stayed(&mut self, page: Page) {
        self.proven.push_back(page);
    }

    /// The next page that might go.
    pub fn next_victim(&mut self) -> Option<Page> {
        let total = self.probation.len() + self.proven.len();
        self.victims += 1;
        let proven_turn = self.victims.is_multiple_of(PROVEN_TURN);
        if self.probation.len() * PROBATION_SHARE >= total && !proven_turn {
            self.probation
                .pop_front()
                .or_else(|| self.proven.pop_front())
        } else {
            self.proven
                .pop_front()
                .or_else(|| self.probation.pop_front())
        }
    }

    /// Counts pages taken out.
    pub fn evicted(&mut self, pages: u64) {
        self.evictions += pages;
    }

    /// The age to note in the entry of a page that leaves now.
    #[must_use]
    pub fn age(&self) -> u16 {
        (self.evictions / AGE_STEP) as u16
    }

    /// How many pages are queued, those dropped since included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.probation.len() + self.proven.len()
    }

    /// The queued pages, those that will stay for longest first.
    pub fn last_to_go(&self) -> impl Iterator<Item = Page> {
        let queues = self.proven.iter().rev().chain(self.probation.iter().rev());
        queues.copied()
    }

    /// Whether nothing is queued.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets queued pages for which `keep` says no; for when discards have left many behind.
    pub fn retain(&mut self, mut keep: impl FnMut(Page) -> bool) {
        self.probation.retain(|page| keep(*page));
        self.proven.retain(|page| keep(*page));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scan_passes_through_and_leaves_the_proven() {
        let mut residents = Residents::default();
        for i in 0..64 {
            residents.refaulted(Page(i), 0, 64);
        }
        for i in 0..64 / PROBATION_SHARE as u64 {
            residents.arrived(Page(900 + i));
        }
        let mut left = 0;
        for i in 1000..2000 {
            residents.arrived(Page(i));
            residents.arrived(Page(i + 5000));
            let victim = residents.next_victim().unwrap();
            if victim.0 < 900 {
                left += 1;
                // Still used: it is back before long.
                residents.refaulted(victim, residents.age(), 64);
            }
        }
        assert!(left <= 1000 / PROVEN_TURN, "{left} proven pages left");
    }

    #[test]
    fn a_proven_page_that_is_used_no_more_goes_in_the_end() {
        let mut residents = Residents::default();
        residents.refaulted(Page(1), 0, 64);
        for i in 100..100 + PROVEN_TURN {
            residents.arrived(Page(2 * i));
            residents.arrived(Page(2 * i + 1));
        }
        assert!((0..PROVEN_TURN).any(|_| residents.next_victim() == Some(Page(1))));
    }

    #[test]
    fn a_page_back_too_late_is_on_probation_again() {
        let mut residents = Residents::default();
        let age = residents.age();
        residents.evicted(AGE_STEP * 100);
        residents.refaulted(Page(1), age, AGE_STEP * 50);
        residents.refaulted(Page(2), age, AGE_STEP * 150);
        assert_eq!(residents.next_victim(), Some(Page(1)));
        assert_eq!(residents.next_victim(), Some(Page(2)));
        assert_eq!(residents.next_victim(), None);
    }
}
