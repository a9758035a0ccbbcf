//! Which slots of an extent nobody has, and what is kept of each that somebody has.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::state::records::{BitsRecord, HashRecord};
use crate::sys::state::Ref;

/// What is kept of each slot besides its hash and a bit for each copy of its extent, which are in the state: 16 bytes there, 4
/// here and 8 for an entry.
#[derive(Debug, Default)]
pub(super) struct SlotRecord {
    pub(super) references: AtomicU32,
}

const _: () = assert!(
    size_of::<SlotRecord>() + size_of::<HashRecord>() + size_of::<u64>() <= 32,
    "metadata per far page"
);

/// A bit for each slot of an extent, in the state. They change under the lock of their extent.
#[derive(Debug)]
pub(super) struct SlotBits {
    record: Ref<BitsRecord>,
    which: usize,
    words: usize,
}

impl SlotBits {
    /// As the state has them: which of the bits that it has for a slot, of an extent with so many slots.
    pub(super) fn of(record: Ref<BitsRecord>, which: usize, slots: usize) -> Self {
        Self {
            record,
            which,
            words: slots.div_ceil(64),
        }
    }

    fn word(&self, slot: usize) -> Option<&AtomicU64> {
        self.record.get(slot / 64)?.get(self.which)
    }

    fn all(&self) -> impl Iterator<Item = &AtomicU64> {
        let words = self.record.iter().take(self.words);
        words.filter_map(|words| words.get(self.which))
    }

    /// Clears them, whatever another extent or copy has left there.
    pub(super) fn clear_all(&self) {
        self.all().for_each(|word| word.store(0, Ordering::Release));
    }

    pub(super) fn has(&self, slot: usize) -> bool {
        let word = self.word(slot);
        word.is_some_and(|word| word.load(Ordering::Relaxed) >> (slot % 64) & 1 == 1)
    }

    pub(super) fn set(&self, slot: usize) {
        if let Some(word) = self.word(slot) {
            word.fetch_or(1 << (slot % 64), Ordering::Release);
        }
    }

    pub(super) fn clear(&self, slot: usize) {
        if let Some(word) = self.word(slot) {
            word.fetch_and(!(1 << (slot % 64)), Ordering::Release);
        }
    }

    pub(super) fn words(&self) -> impl Iterator<Item = u64> {
        self.all().map(|word| word.load(Ordering::Relaxed))
    }
}

/// The slots that nobody has.
#[derive(Debug)]
pub(super) struct FreeSlots {
    bits: Vec<u64>,
    pub(super) count: u64,
    cursor: usize,
}

impl FreeSlots {
    pub(super) fn new(slots: usize) -> Self {
        let mut bits = vec![u64::MAX; slots.div_ceil(64)];
        if !slots.is_multiple_of(64)
            && let Some(last) = bits.last_mut()
        {
            *last = (1 << (slots % 64)) - 1;
        }
        Self {
            bits,
            count: slots as u64,
            cursor: 0,
        }
    }

    fn is_free(&self, slot: usize) -> bool {
        let word = self.bits.get(slot / 64);
        word.is_some_and(|word| word >> (slot % 64) & 1 == 1)
    }

    /// Takes a run of up to `most` neighbouring slots, the next one free behind the last taken.
    pub(super) fn take_run(&mut self, most: usize) -> Option<(usize, usize)> {
        let words = self.bits.len();
        let first_word = (0..=words)
            .map(|i| (self.cursor / 64 + i) % words)
            .find(|word| self.bits[*word] != 0)?;
        let (start, end) = (
            first_word * 64 + self.bits[first_word].trailing_zeros() as usize,
            words * 64,
        );
        let mut len = 0;
        while len < most && self.take_this(start + len) {
            len += 1;
        }
        self.cursor = start + len;
        if self.cursor >= end {
            self.cursor = 0;
        }
        Some((start, len))
    }

    /// Takes one slot, if it is free.
    pub(super) fn take_this(&mut self, slot: usize) -> bool {
        let is_free = self.is_free(slot);
        if is_free {
            self.bits[slot / 64] &= !(1 << (slot % 64));
            self.count -= 1;
        }
        is_free
    }

    pub(super) fn give_back(&mut self, slot: usize) {
        self.bits[slot / 64] |= 1 << (slot % 64);
        self.count += 1;
    }
}
