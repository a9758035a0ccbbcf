//! One page's entry in memory that outlives the agent: an atomic word, whole after every store.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering};

use crate::entry::Entry;

/// An entry word. Nothing but the word: zeroed memory is untouched pages.
#[derive(Debug)]
#[repr(transparent)]
pub struct PageCell(AtomicU64);

impl PageCell {
    /// A cell with this entry.
    #[must_use]
    pub fn new(entry: Entry) -> Self {
        Self(AtomicU64::new(entry.word()))
    }

    /// The entry now. A word that is no entry reads as poisoned.
    #[must_use]
    pub fn load(&self) -> Entry {
        decode(self.0.load(Ordering::Acquire))
    }

    /// Applies a transition to whatever the entry is at that moment; the entry before and after, or `None`
    /// where the transition does not apply. Whoever gets `Some` from a claim owns the transfer.
    pub fn change(&self, transition: impl Fn(Entry) -> Option<Entry>) -> Option<(Entry, Entry)> {
        let mut word = self.0.load(Ordering::Acquire);
        loop {
            let before = decode(word);
            let after = transition(before)?;
            match self
                .0
                .compare_exchange(word, after.word(), Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => return Some((before, after)),
                Err(now) => word = now,
            }
        }
    }
}

fn decode(word: u64) -> Entry {
    Entry::from_word(word).unwrap_or(Entry::UNTOUCHED.poisoned())
}
