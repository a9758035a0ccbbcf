//! Soft-dirty: which pages were written since that was last cleared, wherever they are.
//!
//! A page's entry has the bit. Where it is clear the page is compared with its reference: the hash of what it held at the
//! clear. Mostly something has that hash anyway: of a page that was far its slot, of one that was never written or all zeros
//! the page of zeros. Only for pages that are here at the clear a hash is taken and kept. What is taken out is hashed in any
//! case, and that is where its bit is set if it differs; a page that is here is looked at when somebody asks.
//!
//! So nothing is fetched and no fault costs more, and no write is missed: not that of a device into pinned memory, nor one by
//! another process. A page that holds again what it held at the clear does not count as written, if it was here all the time.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use farpage_fabric::memory::hash128;

use super::Pager;
use crate::entry::{Entry, State};
use crate::sys::pagemap::Pagemap;
use crate::table::{Page, pages_of};

/// Pages looked at between two looks for faults: some 40 us if all of them are here.
const SLICE_PAGES: u64 = 32;
/// How long a page is waited for that the helper is taking out. Past that it counts as written.
const HELPER_DEADLINE: Duration = Duration::from_secs(2);

/// What is kept beside the entries.
#[derive(Debug, Default)]
pub(crate) struct SoftDirty {
    /// Whether anything was ever cleared: else a discard leaves nothing to remember.
    in_use: bool,
    /// References of pages whose slot or state does not say what they held at the clear: at most of those that have been
    /// here since.
    references: BTreeMap<Page, u128>,
    /// One of each thread that waits at the door, at most.
    questions: VecDeque<Question>,
}

/// A question about some pages, one bit each in the answer.
#[derive(Debug)]
pub struct Question {
    range: Range<Page>,
    clear: bool,
    next: Page,
    bits: Vec<u8>,
    until: Instant,
    answer: SyncSender<Option<Vec<u8>>>,
}

impl Question {
    /// Which pages of these addresses are soft-dirty. With `clear` they are not any more afterwards. The answer is `None`
    /// where the memory is not managed.
    #[must_use]
    pub fn new(addresses: Range<u64>, clear: bool, answer: SyncSender<Option<Vec<u8>>>) -> Self {
        let range = pages_of(addresses);
        let pages = range.end.0.saturating_sub(range.start.0) as usize;
        Self {
            next: range.start,
            range,
            clear,
            bits: vec![0; pages.div_ceil(8)],
            until: Instant::now() + HELPER_DEADLINE,
            answer,
        }
    }

    fn note(&mut self, page: Page, dirty: bool) {
        let index = page.0.saturating_sub(self.range.start.0) as usize;
        if let Some(byte) = self.bits.get_mut(index / 8) {
            *byte |= u8::from(dirty) << (index % 8);
        }
    }
}

impl SoftDirty {
    /// What a forked child begins with.
    pub(super) fn inherited(&self) -> Self {
        Self {
            in_use: self.in_use,
            references: self.references.clone(),
            questions: VecDeque::new(),
        }
    }

    /// What an agent begins with that takes over: what pages held at the clear is not known.
    pub(super) fn recovered(in_use: bool) -> Self {
        Self {
            in_use,
            ..Self::default()
        }
    }

    /// A page has come to where its state or slot says what it held at the clear.
    pub(super) fn forget(&mut self, page: Page) {
        self.references.remove(&page);
    }

    /// Pages have gone, and what they held at the clear with them.
    pub(super) fn forget_range(&mut self, range: &Range<Page>) {
        let forgotten = self.references.range(range.clone());
        for page in forgotten.map(|(page, _)| *page).collect::<Vec<_>>() {
            self.forget(page);
        }
    }
}

impl Pager {
    /// Takes a question, to be answered slice by slice. Whoever asks has memory managed from now on, if it was not.
    pub(super) fn ask_soft_dirty(&mut self, question: Question) {
        let addresses = question.range.start.address()..question.range.end.address();
        if !self.registered.covers(&addresses) && !self.job.is_for_regions() {
            self.job.arm();
            self.rescan();
        }
        if self.registered.covers(&addresses) {
            self.soft_dirty.questions.push_back(question);
        } else {
            let _ = question.answer.send(None);
        }
    }

    /// Goes on with the first question for a slice. Returns whether it came any further.
    pub(super) fn answer_soft_dirty(&mut self) -> bool {
        let Some(mut question) = self.soft_dirty.questions.pop_front() else {
            return false;
        };
        let began_at = question.next;
        // Where the process has ended nobody waits for an answer any more.
        if self.look_at_slice(&mut question).is_none() {
            return true;
        }
        let worked = question.next != began_at;
        if question.next == question.range.end {
            let _ = question.answer.send(Some(question.bits));
        } else {
            self.soft_dirty.questions.push_front(question);
        }
        worked
    }

    fn look_at_slice(&mut self, question: &mut Question) -> Option<()> {
        let first = question.next;
        let end = first.plus(SLICE_PAGES).min(question.range.end);
        let mut here = [false; SLICE_PAGES as usize];
        let note = |page| here[((page - first.0) % SLICE_PAGES) as usize] = true;
        let pagemap = Pagemap::open(self.process.as_ref()?.pid()).ok()?;
        pagemap.present(first.address()..end.address(), note).ok()?;
        if question.clear {
            self.soft_dirty.in_use = true;
            self.place.soft_dirty.store(true, Ordering::Release);
        }
        for here in here {
            let page = question.next;
            if page == end {
                break;
            }
            let entry = self.table.get(page);
            let mut dirty = entry.is_soft_dirty();
            if question.clear || !dirty {
                let holds = self.contents(page, entry, here);
                let with_helper = holds.is_none() && entry.state() == State::Evicting;
                if with_helper && Instant::now() < question.until {
                    break;
                }
                dirty |= holds.is_none() || self.reference(page, entry) != holds;
                if let Some(hash) = holds.filter(|_| question.clear) {
                    self.clear_soft_dirty(page, entry, hash);
                }
            }
            question.note(page, dirty);
            question.next = page.plus(1);
        }
        Some(())
    }

    /// The hash of what a page holds now; `None` where that cannot be known without fetching it.
    fn contents(&mut self, page: Page, entry: Entry, here: bool) -> Option<u128> {
        match entry.state() {
            State::FarRead | State::FarWrite | State::Fetching => {
                self.shared.far.hash(entry.slot()?)
            }
            State::Evicting => self.staging.hash(page),
            // What MADV_FREE gave up may be here still, though the table has forgotten it.
            State::Local | State::Zero | State::Untouched if here => {
                let mut bytes = [0; 4096];
                let memory = self.program_memory()?;
                memory.read_exact_at(&mut bytes, page.address()).ok()?;
                Some(hash128(&bytes))
            }
            State::Zero | State::Untouched => Some(self.fetches.zero_hash()),
            State::Local | State::Poisoned => None,
        }
    }

    /// What a page held when its bit was cleared, or as nobody has ever written it.
    fn reference(&self, page: Page, entry: Entry) -> Option<u128> {
        match self.soft_dirty.references.get(&page) {
            Some(reference) => Some(*reference),
            None => self.natural_reference(entry),
        }
    }

    /// The reference that needs no place of its own.
    fn natural_reference(&self, entry: Entry) -> Option<u128> {
        match entry.slot() {
            Some(slot) => self.shared.far.hash(slot),
            None => Some(self.fetches.zero_hash()),
        }
    }

    fn clear_soft_dirty(&mut self, page: Page, entry: Entry, holds: u128) {
        if entry.is_soft_dirty() {
            self.table.change(page, |entry| Some(entry.clean()));
        }
        if self.natural_reference(entry) == Some(holds) {
            self.soft_dirty.forget(page);
        } else {
            self.soft_dirty.references.insert(page, holds);
        }
    }

    fn set_soft_dirty(&mut self, page: Page) {
        self.table.change(page, |entry| Some(entry.soft_dirtied()));
        self.soft_dirty.forget(page);
    }

    /// A page that was taken out holds this: if that is not what it held at the clear, it was written.
    pub(super) fn note_taken_out(&mut self, page: Page, entry: Entry, hash: u128) {
        if !entry.is_soft_dirty() && self.reference(page, entry) != Some(hash) {
            self.set_soft_dirty(page);
        }
    }

    /// A page is about to lose the slot that may say what it held at the clear.
    pub(super) fn keep_reference(&mut self, page: Page) {
        let entry = self.table.get(page);
        if entry.is_soft_dirty() || entry.slot().is_none() {
            return;
        }
        match self.reference(page, entry) {
            Some(hash) => {
                self.soft_dirty.references.insert(page, hash);
            }
            None => self.set_soft_dirty(page),
        }
    }

    /// Pages of a range that held something at the clear. If they read as zeros from now on they have changed.
    pub(super) fn changed_by_zeros(&self, range: &Range<Page>) -> Vec<Page> {
        if !self.soft_dirty.in_use {
            return Vec::new();
        }
        let zeros = self.fetches.zero_hash();
        let touched = self.table.touched(range.clone());
        let changed = touched.filter(|(page, entry)| {
            entry.is_soft_dirty() || self.reference(*page, *entry) != Some(zeros)
        });
        // What MADV_FREE gave up has no entry, but may have held something at a clear after that.
        let references = self.soft_dirty.references.range(range.clone());
        let forgotten = references.filter(|(_, held)| **held != zeros);
        let changed = changed.map(|(page, _)| page);
        changed.chain(forgotten.map(|(page, _)| *page)).collect()
    }

    /// Marks pages as written, wherever they are.
    pub(super) fn mark_soft_dirty(&mut self, pages: Vec<Page>) {
        for page in pages {
            self.set_soft_dirty(page);
        }
    }

    /// Pages were moved to another address: as the kernel does, they are taken for written there.
    pub(super) fn mark_moved(&mut self, to: Range<Page>) {
        if self.soft_dirty.in_use {
            let moved = self.table.touched(to);
            let moved = moved.map(|(page, _)| page).collect();
            self.mark_soft_dirty(moved);
        }
    }
}
