//! Bringing far pages home: claim and read. What becomes of it then: `arrival.rs`.
//!
//! A fetch is a run of neighbouring pages with a frame for each. It begins because a thread waits for a page
//! at its end, or ahead of a stream's next fault; in that case it stays in its frames until a fault asks for it, so
//! that what was read in vain never displaces anything.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use farpage_fabric::WorkId;
use farpage_fabric::memory::{MemoryOptions, RegisteredMemory};
use smallvec::SmallVec;

use super::links::{WINDOW, Work};
use super::{Fault, Pager};
use crate::entry::{Entry, Slot};
use crate::far::{CopyId, MAX_COPIES};
use crate::prefetch::{MAX_WINDOW, Way, Window};
use crate::table::Page;

/// Fetches under way or kept ahead at once in one address space.
pub(super) const MAX_FETCHES: usize = 16;
/// Threads that wait for one fetch without the record having to grow.
const USUAL_WAITERS: usize = 8;
const FRAMES_BYTES: usize = ZERO_FRAME + 4096;
const ZERO_FRAME: usize = MAX_FETCHES * MAX_WINDOW as usize * 4096;

const _: () = assert!(MAX_WINDOW <= 64, "a fetch keeps one bit per page");

/// One fetch's record. Records are kept and used again, so that a fault allocates nothing.
#[derive(Debug)]
pub(super) struct Fetch {
    pub(super) active: bool,
    pub(super) first: Page,
    pub(super) slots: Vec<Slot>,
    /// Of each slot for which a read has been posted, the copy that was asked.
    pub(super) sources: Vec<CopyId>,
    /// Copies that did not give what they were asked for.
    pub(super) failed_copies: SmallVec<[CopyId; MAX_COPIES]>,
    /// Pages that were discarded or otherwise taken from this fetch.
    pub(super) dropped: u64,
    /// Reads posted and not completed.
    pub(super) outstanding: u32,
    pub(super) failed: bool,
    pub(super) checked: bool,
    pub(super) retries: u8,
    /// A thread waits for it (else it was read ahead).
    pub(super) wanted: bool,
    /// The program has asked for it without waiting for it.
    pub(super) hinted: bool,
    pub(super) waiters: Vec<Fault>,
}

impl Fetch {
    fn unused() -> Self {
        Self {
            active: false,
            first: Page(0),
            slots: Vec::with_capacity(MAX_WINDOW as usize),
            sources: Vec::with_capacity(MAX_WINDOW as usize),
            failed_copies: SmallVec::new(),
            dropped: 0,
            outstanding: 0,
            failed: false,
            checked: false,
            retries: 0,
            wanted: false,
            hinted: false,
            waiters: Vec::with_capacity(USUAL_WAITERS),
        }
    }

    /// Begins anew, for pages from `first` on.
    fn begin(&mut self, first: Page) {
        self.slots.clear();
        self.sources.clear();
        self.failed_copies.clear();
        self.waiters.clear();
        (self.active, self.first) = (true, first);
        (self.dropped, self.outstanding, self.retries) = (0, 0, 0);
        (self.failed, self.checked) = (false, false);
        (self.wanted, self.hinted) = (false, false);
    }

    /// Has all of its pages read again.
    pub(super) fn again(&mut self) {
        self.sources.clear();
        self.retries += 1;
        (self.failed, self.checked) = (false, false);
    }

    /// First of the slots for which no read has been posted yet.
    pub(super) fn posted(&self) -> usize {
        self.sources.len()
    }

    fn index_of(&self, page: Page) -> Option<usize> {
        let index = page.0.checked_sub(self.first.0)? as usize;
        (index < self.slots.len() && self.dropped >> index & 1 == 0).then_some(index)
    }

    /// How many of its pages lie from one of them on.
    fn pages_from(&self, page: Page, way: Way) -> u64 {
        let before = page.0.saturating_sub(self.first.0);
        match way {
            Way::Up => (self.slots.len() as u64).saturating_sub(before),
            Way::Down => before + 1,
        }
    }

    pub(super) fn is_complete(&self) -> bool {
        self.outstanding == 0 && (self.failed || self.posted() == self.slots.len())
    }
}

/// The fetches of one address space and their frames.
#[derive(Debug)]
pub(crate) struct Fetches {
    frames: Option<Arc<RegisteredMemory>>,
    zero_hash: u128,
    pub(super) places: [Fetch; MAX_FETCHES],
    /// Places read ahead, oldest first: the first to go when a frame is needed.
    pub(super) ahead: VecDeque<usize>,
}

impl Default for Fetches {
    fn default() -> Self {
        let options = MemoryOptions::default();
        let frames = RegisteredMemory::create("farpage-frames", FRAMES_BYTES, options);
        let frames = frames
            .inspect_err(|error| tracing::error!(%error, "no frames: pages cannot be fetched"))
            .ok();
        let frames = frames.map(|(memory, _)| Arc::new(memory));
        Self {
            zero_hash: frames
                .as_ref()
                .and_then(|frames| frames.hash128(ZERO_FRAME as u64, 4096).ok())
                .unwrap_or(0),
            frames,
            places: std::array::from_fn(|_| Fetch::unused()),
            ahead: VecDeque::new(),
        }
    }
}

impl Fetches {
    /// A page of zeros, for `UFFDIO_COPY`.
    pub(super) fn zero_page(&self) -> *const u8 {
        self.frames.as_ref().map_or(std::ptr::null(), |frames| {
            frames.as_ptr().wrapping_add(ZERO_FRAME)
        })
    }

    /// The hash of a page of zeros.
    pub(super) fn zero_hash(&self) -> u128 {
        self.zero_hash
    }

    pub(super) fn frame(&self, place: usize, index: usize) -> *const u8 {
        let offset = frame_offset(place, index) as usize;
        self.frames.as_ref().map_or(std::ptr::null(), |frames| {
            frames.as_ptr().wrapping_add(offset)
        })
    }

    /// The memory that reads go to.
    pub(super) fn memory(&self) -> Option<Arc<RegisteredMemory>> {
        self.frames.clone()
    }

    /// Whether something has arrived for a thread that waits.
    pub(super) fn any_to_install(&self) -> bool {
        self.places
            .iter()
            .any(|fetch| fetch.active && fetch.wanted && fetch.is_complete())
    }

    /// Those that are under way because the program asked for them: how many, and of how many pages.
    pub(super) fn hinted(&self) -> (usize, usize) {
        let hinted = self.places.iter().filter(|it| it.active && it.hinted);
        hinted.fold((0, 0), |(count, pages), it| {
            (count + 1, pages + it.slots.len())
        })
    }

    fn find(&self, page: Page) -> Option<usize> {
        self.places
            .iter()
            .position(|fetch| fetch.active && fetch.index_of(page).is_some())
    }

    pub(super) fn get(&mut self, place: usize) -> Option<&mut Fetch> {
        self.places.get_mut(place).filter(|fetch| fetch.active)
    }
}

pub(super) fn frame_offset(place: usize, index: usize) -> u64 {
    (place as u64 * MAX_WINDOW + index as u64) * 4096
}

impl Pager {
    /// A fault on a far page: reads it with the window that its stream has earned, and the next window ahead.
    pub(super) fn start_fetch(&mut self, fault: Fault) -> Option<Fault> {
        if self.room() <= 0 {
            return Some(fault);
        }
        let Some(place) = self.free_place() else {
            return Some(fault);
        };
        let mut window = self.prefetcher.fault(fault.page);
        if fault.alone || !self.is_inheritance_known() {
            window.pages = 1;
        }
        self.job
            .counters
            .prefetch_hits
            .fetch_add(window.hits, Relaxed);
        let room = (self.room() as u64 / 4).max(1);
        let pages = self.claim_run(place, fault.page, window.way, window.pages.min(room));
        self.prefetcher.covered(pages);
        tracing::trace!(page = fault.page.0, ?window, pages, room, "fetch");
        if let Some(fetch) = self.fetches.get(place) {
            fetch.wanted = true;
            fetch.waiters.push(fault);
        }
        self.job
            .counters
            .pages_prefetched
            .fetch_add(pages.saturating_sub(1), Relaxed);
        self.post_reads(place);
        if window.pages > 1 && pages == window.pages {
            self.read_ahead(fault.page, pages, window);
        }
        None
    }

    /// A fault on a page that is on its way: the fetch is wanted now. If it was read ahead, its stream goes on.
    pub(super) fn join_fetch(&mut self, fault: Fault) -> Option<Fault> {
        let Some(place) = self.fetches.find(fault.page) else {
            // Claimed, but in no list: cannot be. The page goes back to far and is fetched anew.
            tracing::error!(page = ?fault.page, entry = ?self.table.get(fault.page), "a page in transit without a transfer");
            self.table.change(fault.page, Entry::fetch_dropped);
            return Some(fault);
        };
        let was_ahead = self
            .fetches
            .get(place)
            .is_some_and(|fetch| !std::mem::replace(&mut fetch.wanted, true));
        if let Some(fetch) = self.fetches.get(place) {
            fetch.waiters.push(fault);
        }
        if was_ahead {
            self.fetches.ahead.retain(|ahead| *ahead != place);
            let window = self.prefetcher.fault(fault.page);
            self.job
                .counters
                .prefetch_hits
                .fetch_add(window.hits, Relaxed);
            let pages = self.fetches.places[place].pages_from(fault.page, window.way);
            self.prefetcher.covered(pages);
            tracing::trace!(page = fault.page.0, ?window, pages, "was read ahead");
            self.try_install(place);
            if window.pages > 1 {
                self.read_ahead(fault.page, pages, window);
            }
        } else {
            self.try_install(place);
        }
        None
    }

    /// Reads a window that no fault asks for yet, behind the pages that the one at `page` brings.
    fn read_ahead(&mut self, page: Page, brought: u64, window: Window) {
        let Some(next) = window.way.step(page, brought) else {
            return;
        };
        if !self.table.get(next).is_far() || self.links.credits() < 2 {
            return;
        }
        let Some(place) = self.free_place() else {
            return;
        };
        let claimed = self.claim_run(place, next, window.way, window.pages);
        self.job
            .counters
            .pages_prefetched
            .fetch_add(claimed, Relaxed);
        self.fetches.ahead.push_back(place);
        self.post_reads(place);
    }

    /// Reads pages for which no thread waits, from a far one on, to be installed as they arrive. Returns how many, or nothing
    /// where there is no place for that now.
    pub(super) fn start_hinted(&mut self, page: Page, most: u64) -> Option<u64> {
        let place = self.fetches.places.iter().position(|it| !it.active)?;
        // Half of what may be asked for at once is left to faults.
        if self.links.credits() < WINDOW / 2 {
            return None;
        }
        let claimed = self.claim_run(place, page, Way::Up, most);
        self.fetches.places[place].hinted = true;
        self.post_reads(place);
        Some(claimed)
    }

    /// A place for a fetch; one that was read ahead and not asked for gives way.
    fn free_place(&mut self) -> Option<usize> {
        if let Some(place) = self.fetches.places.iter().position(|fetch| !fetch.active) {
            return Some(place);
        }
        let oldest = self
            .fetches
            .ahead
            .iter()
            .copied()
            .find(|place| self.fetches.places[*place].outstanding == 0)
            .or_else(|| {
                let unneeded = |it: &Fetch| it.hinted && !it.wanted && it.outstanding == 0;
                self.fetches.places.iter().position(unneeded)
            })?;
        self.drop_fetch(oldest);
        Some(oldest)
    }

    /// Claims neighbouring far pages from one on, up or down, for a fetch at `place`. Returns how many.
    fn claim_run(&mut self, place: usize, from: Page, way: Way, most: u64) -> u64 {
        let fetch = &mut self.fetches.places[place];
        fetch.begin(from);
        let mut claimed = 0;
        while claimed < most.min(MAX_WINDOW)
            && let Some(page) = way.step(from, claimed)
            && let Some((_, entry)) = self.table.change(page, Entry::claim_fetch)
        {
            fetch.slots.extend(entry.slot());
            claimed += 1;
        }
        if way == Way::Down {
            fetch.slots.reverse();
        }
        fetch.first = way.pages(from, claimed).start;
        claimed
    }

    /// Posts the reads of a fetch, one for each run of neighbouring slots, as far as the window allows.
    pub(super) fn post_reads(&mut self, place: usize) {
        let Some(memory) = self.fetches.memory() else {
            return;
        };
        while let Some(fetch) = self.fetches.get(place) {
            let (index, slots) = (fetch.posted(), &fetch.slots);
            let Some(slot) = slots.get(index).copied() else {
                break;
            };
            let mut len = 1;
            while let Some(next) = slots.get(index + len)
                && slots[index + len - 1].next() == Some(*next)
            {
                len += 1;
            }
            let work = Work::Read {
                place: place as u8,
                index: index as u8,
                ahead: !fetch.wanted,
            };
            let failed = &fetch.failed_copies;
            let places = self.shared.far.places(slot, len as u16);
            let untried = places.iter().filter(|it| !failed.contains(&it.copy));
            let offset = frame_offset(place, index);
            match self.links.read(&memory, work, offset, untried) {
                Ok(source) => {
                    let Some(fetch) = self.fetches.get(place) else {
                        break;
                    };
                    let (copy, len) = (source.copy, source.len);
                    fetch.sources.extend((0..len).map(|_| copy));
                    fetch.outstanding += 1;
                    self.job
                        .counters
                        .pages_fetched
                        .fetch_add(len.into(), Relaxed);
                }
                Err(super::links::LinkError::Busy | super::links::LinkError::Away) => break,
                Err(super::links::LinkError::Unreachable) => {
                    let Some(fetch) = self.fetches.get(place) else {
                        break;
                    };
                    fetch.failed = true;
                    fetch.failed_copies = places.iter().map(|it| it.copy).collect();
                    break;
                }
            }
        }
        self.links.flush();
    }

    /// Gives a fetch up: its pages are far again.
    pub(super) fn drop_fetch(&mut self, place: usize) {
        self.fetches.ahead.retain(|ahead| *ahead != place);
        let fetch = &mut self.fetches.places[place];
        fetch.active = false;
        for index in (0..fetch.slots.len()).filter(|index| fetch.dropped >> index & 1 == 0) {
            self.table
                .change(fetch.first.plus(index as u64), Entry::fetch_dropped);
        }
    }

    /// A page being fetched was discarded, moved or cloned away: what arrives for it is not used.
    pub(super) fn forget_fetch(&mut self, page: Page) {
        if let Some(place) = self.fetches.find(page)
            && let Some(fetch) = self.fetches.get(place)
            && let Some(index) = fetch.index_of(page)
        {
            fetch.dropped |= 1 << index;
            let (gone, kept): (Vec<Fault>, Vec<Fault>) =
                fetch.waiters.iter().partition(|fault| fault.page == page);
            fetch.waiters = kept;
            self.waiting.extend(gone);
        }
    }

    /// Work ids of reads name a place; places with reads under way are not given to others.
    pub(super) fn read_id(place: u8, index: u8) -> WorkId {
        WorkId(u64::from(place) << 8 | u64::from(index))
    }
}
