//! Which slots of an extent nobody has, and what is kept of each that somebody has.

use std::sync::atomic::{AtomicU32, AtomicU64};

/// What is kept of each slot: 24 bytes, beside 8 for an entry, 32 per far page; and a bit for each copy of its extent.
#[derive(Debug, Default)]
pub(super) struct SlotRecord {
    pub(super) references: AtomicU32,
    pub(super) hash: [AtomicU64; 2],
}

const _: () = assert!(
    size_of::<SlotRecord>() + size_of::<u64>() <= 32,
    "metadata per far page"
);

/// A bit for each slot of an extent.
#[derive(Clone, Debug)]
pub(super) struct SlotBits(Vec<u64>);

impl SlotBits {
    pub(super) fn none_of(slots: usize) -> Self {
        Self(vec![0; slots.div_ceil(64)])
    }

    fn all_of(slots: usize) -> Self {
        let mut bits = vec![u64::MAX; slots.div_ceil(64)];
        if !slots.is_multiple_of(64)
            && let Some(last) = bits.last_mut()
        {
            *last = (1 << (slots % 64)) - 1;
        }
        Self(bits)
    }

    pub(super) fn has(&self, slot: usize) -> bool {
        self.0
            .get(slot / 64)
            .is_some_and(|word| word >> (slot % 64) & 1 == 1)
    }

    pub(super) fn set(&mut self, slot: usize) {
        if let Some(word) = self.0.get_mut(slot / 64) {
            *word |= 1 << (slot % 64);
        }
    }

    pub(super) fn clear(&mut self, slot: usize) {
        if let Some(word) = self.0.get_mut(slot / 64) {
            *word &= !(1 << (slot % 64));
        }
    }

    pub(super) fn words(&self) -> &[u64] {
        &self.0
    }
}

/// The slots that nobody has.
#[derive(Debug)]
pub(super) struct FreeSlots {
    bits: SlotBits,
    pub(super) count: u64,
    cursor: usize,
}

impl FreeSlots {
    pub(super) fn new(slots: usize) -> Self {
        Self {
            bits: SlotBits::all_of(slots),
            count: slots as u64,
            cursor: 0,
        }
    }

    /// Takes a run of up to `most` neighbouring slots, the next one free behind the last taken.
    pub(super) fn take_run(&mut self, most: usize) -> Option<(usize, usize)> {
        let words = self.bits.words();
        let first_word = (0..=words.len())
            .map(|i| (self.cursor / 64 + i) % words.len())
            .find(|word| words[*word] != 0)?;
        let (start, end) = (
            first_word * 64 + words[first_word].trailing_zeros() as usize,
            words.len() * 64,
        );
        let mut len = 0;
        while len < most && self.bits.has(start + len) {
            self.bits.clear(start + len);
            len += 1;
        }
        self.count -= len as u64;
        self.cursor = start + len;
        if self.cursor >= end {
            self.cursor = 0;
        }
        Some((start, len))
    }

    pub(super) fn give_back(&mut self, slot: usize) {
        self.bits.set(slot);
        self.count += 1;
    }
}
