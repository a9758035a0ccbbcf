//! What a program says of pages to come (`madvise`): a ring in the control block, of which the newest stay.
//!
//! Where threads give many at once one may be lost, or be half of another: nothing but speed hangs on a hint, and the agent
//! takes it for what a program may say anyway.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// How many wait for the agent at most.
pub const RING: usize = 8;

/// `MADV_WILLNEED`: bring it home.
pub const WILLNEED: u32 = 3;
/// `MADV_COLD`: when something has to go, then this.
pub const COLD: u32 = 20;
/// `MADV_PAGEOUT`: take it out now.
pub const PAGEOUT: u32 = 21;

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint {
    /// The number that `madvise` has for it.
    pub advice: u32,
    /// The first address.
    pub from: u64,
    /// How much memory.
    pub bytes: u64,
}

#[repr(C)]
#[derive(Debug, Default)]
struct Place {
    from: AtomicU64,
    bytes: AtomicU64,
    advice: AtomicU32,
    reserved: AtomicU32,
}

/// The ring.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Hints {
    /// Places given out to threads that write one.
    begun: AtomicU32,
    /// How many have been written.
    pub given: AtomicU32,
    places: [Place; RING],
}

impl Hints {
    /// Adds one.
    pub fn give(&self, hint: Hint) {
        let place = &self.places[self.begun.fetch_add(1, Ordering::Relaxed) as usize % RING];
        place.from.store(hint.from, Ordering::Relaxed);
        place.bytes.store(hint.bytes, Ordering::Relaxed);
        place.advice.store(hint.advice, Ordering::Relaxed);
        self.given.fetch_add(1, Ordering::SeqCst);
    }

    /// What was given since `seen` hints were, which is brought up to date. Of many those that are still there.
    pub fn since(&self, seen: &mut u32) -> impl Iterator<Item = Hint> + '_ {
        let given = self.given.load(Ordering::Acquire);
        let count = given.wrapping_sub(*seen).min(RING as u32);
        *seen = given;
        (0..count).rev().map(move |back| {
            let number = given.wrapping_sub(1).wrapping_sub(back);
            let place = &self.places[number as usize % RING];
            Hint {
                advice: place.advice.load(Ordering::Relaxed),
                from: place.from.load(Ordering::Relaxed),
                bytes: place.bytes.load(Ordering::Relaxed),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hint(number: u64) -> Hint {
        Hint {
            advice: COLD,
            from: number << 12,
            bytes: 4096,
        }
    }

    #[test]
    fn what_is_given_is_told_once_and_in_order() {
        let (hints, mut seen) = (Hints::default(), 0);
        (1..=3).for_each(|number| hints.give(hint(number)));
        assert!(hints.since(&mut seen).eq((1..=3).map(hint)));
        assert_eq!(hints.since(&mut seen).count(), 0);
        hints.give(hint(4));
        assert!(hints.since(&mut seen).eq([hint(4)]));
    }

    #[test]
    fn of_more_than_fit_the_newest_stay() {
        let (hints, mut seen) = (Hints::default(), u32::MAX - 3);
        hints.begun.store(seen, Ordering::Relaxed);
        hints.given.store(seen, Ordering::Relaxed);
        (1..=20).for_each(|number| hints.give(hint(number)));
        assert!(hints.since(&mut seen).eq((13..=20).map(hint)));
    }
}
