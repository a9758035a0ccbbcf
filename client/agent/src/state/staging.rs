//! Pages on their way out, as the state has them: which lie where, and which decide what their page is.
//!
//! A page that was taken out is nowhere but in staging until its entry says otherwise. So its bit is set before the helper
//! gets its batch, and cleared after its entry has changed.

use std::sync::atomic::Ordering;

use farpage_attach::control::BATCH_PAGES;

use super::SpacePlace;
use super::records::AreaRecord;
use crate::entry::Slot;
use crate::table::Page;

/// Says that a word names a slot.
const NAMED: u64 = 1 << 63;

/// A word that names a slot.
#[must_use]
pub fn slot_word(slot: Slot) -> u64 {
    NAMED | u64::from(slot.extent()) << 16 | u64::from(slot.page())
}

/// The slot that a word names, if it names one.
#[must_use]
pub fn slot_of(word: u64) -> Option<Slot> {
    (word & NAMED != 0).then(|| Slot::new(((word & !NAMED) >> 16) as u32, word as u16))?
}

impl SpacePlace {
    /// A batch is about to be handed to the helper.
    pub(crate) fn note_batch(&self, command: u32, method: u32, area: usize, pages: &[Page]) {
        let Some(record) = self.areas.get(area) else {
            return;
        };
        for (place, page) in record.pages.iter().zip(pages) {
            place.store(page.0, Ordering::Relaxed);
        }
        for slot in &record.slots {
            slot.store(0, Ordering::Relaxed);
        }
        self.command.store(command, Ordering::Relaxed);
        self.method.store(method, Ordering::Relaxed);
        self.area.store(area as u32, Ordering::Relaxed);
        self.batch_pages
            .store(pages.len() as u32, Ordering::Relaxed);
        let bits = match pages.len() {
            BATCH_PAGES.. => u64::MAX,
            less => (1 << less) - 1,
        };
        // In this order: bits of a batch that there is not would say that its pages lie in staging.
        self.batch.store(true, Ordering::Release);
        record.live.store(bits, Ordering::Release);
    }

    /// What became of each page of the batch is known, and those that are in staging are in it for no batch's sake.
    pub(crate) fn batch_is_over(&self) {
        self.batch.store(false, Ordering::Release);
    }

    /// A page is being written to a slot.
    pub(crate) fn is_written_to(&self, area: usize, index: usize, slot: Slot) {
        self.set_slot(area, index, slot_word(slot));
    }

    /// It is not any more, as far as is known.
    pub(crate) fn is_not_written(&self, area: usize, index: usize) {
        self.set_slot(area, index, 0);
    }

    /// Its entry says where it is.
    pub(crate) fn left_staging(&self, area: usize, index: usize) {
        self.is_no_more_in_staging(area, index);
        self.is_not_written(area, index);
    }

    /// The same of one whose bytes may still be on their way to a slot.
    pub(crate) fn is_no_more_in_staging(&self, area: usize, index: usize) {
        if let Some(record) = self.areas.get(area) {
            record.live.fetch_and(!(1 << index), Ordering::AcqRel);
        }
    }

    /// Hands on the slots that an agent before was writing to, in whichever copies: whoever was handed the bytes may do so at any
    /// time yet. Each is forgotten here once it is noted there.
    pub(crate) fn rest_slots_under_way(&self, rest: impl Fn(Slot)) {
        for word in self.areas.iter().flat_map(|area| &area.slots) {
            if let Some(slot) = slot_of(word.load(Ordering::Acquire)) {
                rest(slot);
            }
            word.store(0, Ordering::Release);
        }
    }

    fn set_slot(&self, area: usize, index: usize, word: u64) {
        if let Some(slot) = self.areas.get(area).and_then(|area| area.slots.get(index)) {
            slot.store(word, Ordering::Release);
        }
    }
}

impl AreaRecord {
    /// The pages that are in it, with their places.
    #[must_use]
    pub fn live_pages(&self) -> Vec<(usize, Page)> {
        let live = self.live.load(Ordering::Acquire);
        let pages = self.pages.iter().enumerate();
        pages
            .filter(|(index, _)| live >> index & 1 == 1)
            .map(|(index, page)| (index, Page(page.load(Ordering::Relaxed))))
            .collect()
    }
}
