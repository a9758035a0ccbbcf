//! The program's own memory calls: the table follows what the kernel tells of them.

use std::ops::Range;

use super::{Noted, Pager};
use crate::entry::{Entry, State};
use crate::sys::uffd::Message;
use crate::table::{Page, pages_of};

impl Pager {
    /// Follows one event. Faults are not events. Broken off anywhere, and followed again by the next agent, it comes to
    /// the same; until then it stays in the journal.
    pub(super) fn follow(&mut self, event: Noted) {
        let Noted { message, at } = event;
        tracing::debug!(space = self.handle.id, event = ?message, "event");
        match message {
            Message::Fault { .. } => {}
            Message::Fork(uffd) => self.forked(uffd, at),
            Message::Remap { from, to, len } => self.remapped(from, to, len, at),
            Message::Remove(range) => self.discard_to_zeros(pages_of(range)),
            Message::Unmap(range) => self.unmapped(&range),
        }
        self.journal.done(at);
    }

    /// `madvise` discards: what is there goes, the registration stays, the next touch reads zeros.
    pub(super) fn discard_to_zeros(&mut self, range: Range<Page>) {
        let changed = self.changed_by_zeros(&range);
        self.discard_pages(range);
        self.mark_soft_dirty(changed);
    }

    fn unmapped(&mut self, range: &Range<u64>) {
        self.registered.remove(range);
        self.discard_pages(pages_of(range.clone()));
    }

    /// `mremap` moved pages. With MREMAP_DONTUNMAP the old range stays registered and empty; without it an
    /// unmap of the old range follows, and finds nothing.
    fn remapped(&mut self, from: u64, to: u64, len: u64, at: Option<u32>) {
        let pages = len.div_ceil(4096);
        let (from_page, to_page) = (Page::of(from), Page::of(to));
        let (left, entered) = (
            from_page..from_page.plus(pages),
            to_page..to_page.plus(pages),
        );
        // What comes meanwhile is later than this move: the unmap of the old range, above all, must find it moved.
        let mut kept = self.leave_transit(left.clone());
        kept.extend(self.leave_transit(entered.clone()));
        let emptied = self.changed_by_zeros(&left);
        if !self.journal.has_begun(at) {
            self.discard_pages(entered.clone());
            self.journal.begin(at);
        }
        let mut released = Vec::new();
        self.table
            .remap(from_page, to_page, pages, |_, entry| released.push(entry));
        for entry in released {
            self.forget_entry(entry);
        }
        self.replaced_have_moved(&left, to_page);
        self.soft_dirty.forget_range(&left);
        self.soft_dirty.forget_range(&entered);
        self.mark_soft_dirty(emptied);
        self.mark_moved(entered.clone());
        for (page, entry) in self.table.touched(entered) {
            if entry.state() == State::Local {
                self.residents.arrived(page);
            }
        }
        self.registered.insert(to..to.saturating_add(len));
        self.tidy_residents();
        self.keep_messages(kept);
    }

    /// Forgets a range: slots are given back, transfers under way lose their say.
    pub(super) fn discard_pages(&mut self, range: Range<Page>) {
        for (page, entry) in self.table.touched(range.clone()).collect::<Vec<_>>() {
            match entry.state() {
                State::Fetching => self.forget_fetch(page),
                State::Evicting => self.forget_staged(page),
                _ => {}
            }
        }
        self.soft_dirty.forget_range(&range);
        let mut released = Vec::new();
        self.table.discard(range, |_, entry| released.push(entry));
        for entry in released {
            self.forget_entry(entry);
        }
        self.tidy_residents();
    }

    fn forget_entry(&mut self, entry: Entry) {
        if entry.state() == State::Local {
            self.job.discharge(1);
        }
        self.release_slot_of(entry);
    }

    /// Brings pages in transit to a state that can be moved to another address: fetches are given up, pages
    /// on their way out are waited for, since their bytes are in staging under their old address. Returns the messages
    /// that came meanwhile.
    fn leave_transit(&mut self, range: Range<Page>) -> Vec<Noted> {
        let in_transit: Vec<(Page, Entry)> = self
            .table
            .touched(range)
            .filter(|(_, entry)| matches!(entry.state(), State::Fetching | State::Evicting))
            .collect();
        let evicting = |(_, entry): &(Page, Entry)| entry.state() == State::Evicting;
        let kept = if in_transit.iter().any(evicting) {
            self.settle(None)
        } else {
            Vec::new()
        };
        for (page, entry) in in_transit {
            if entry.state() == State::Fetching {
                self.forget_fetch(page);
                self.table.change(page, Entry::fetch_dropped);
            }
        }
        kept
    }

    /// Messages that came while something had to be settled first: faults wait, events are followed when all that were read
    /// before them have been ([`Self::follow_later`]).
    pub(super) fn keep_messages(&mut self, kept: Vec<Noted>) {
        for noted in kept {
            match noted.message {
                Message::Fault {
                    address,
                    write,
                    protected,
                    thread,
                } => self.waiting.push_back(super::Fault::new(
                    address,
                    write,
                    protected,
                    thread,
                    self.attention.moment(std::time::Instant::now()),
                )),
                message => self.later.push(Noted { message, ..noted }),
            }
        }
    }

    /// Follows what came while other events were followed, in order.
    pub(super) fn follow_later(&mut self) {
        while !self.later.is_empty() {
            for noted in std::mem::take(&mut self.later) {
                self.follow(noted);
            }
        }
    }

    /// Discards leave pages behind in the queues, and so does what goes because the program wants it to; when those are the
    /// greater part, they are swept.
    pub(super) fn tidy_residents(&mut self) {
        let local = self.table.local_pages() as usize;
        if self.residents.len() > 2 * local + SWEEP_SLACK {
            let table = &self.table;
            let mut seen = std::collections::HashSet::with_capacity(local);
            self.residents
                .retain(|page| table.get(page).state() == State::Local && seen.insert(page));
        }
    }
}

/// Queue entries tolerated beside twice the resident pages before a sweep.
const SWEEP_SLACK: usize = 65_536;
