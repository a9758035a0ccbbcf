//! The journal: events that were read and are not followed yet, where the next agent finds them.
//!
//! Reading an event releases the program, so an event that was read must not be lost. The kernel writes it into the state
//! itself; it stays there until the table says what it says. Whoever takes over follows it then: doing it again, from wherever
//! it was broken off, comes to the same.

use std::collections::HashSet;
use std::io;
use std::sync::atomic::Ordering;

use crate::state::records::{JOURNAL_SLOTS, JournalSlot, SpaceRecord, undecided};
use crate::sys::state::Ref;
use crate::sys::uffd::{Message, Uffd};

const SLOTS: u32 = JOURNAL_SLOTS as u32;
/// In the first word of a slot, which the kernel leaves zero there: the move's target has been cleared.
const BEGUN: u64 = 1 << 32;

/// A message, and where it is noted; nowhere if it is a fault.
#[derive(Debug)]
pub(crate) struct Noted {
    pub(crate) message: Message,
    pub(crate) at: Option<u32>,
}

/// The journal of one address space. Places are counted on and on, and taken by turns.
#[derive(Debug)]
pub(crate) struct Journal {
    record: Ref<SpaceRecord>,
    head: u32,
    next: u32,
}

impl Journal {
    pub(crate) fn new(record: Ref<SpaceRecord>) -> Self {
        let head = record.journal_head.load(Ordering::Acquire);
        Self {
            record,
            head,
            next: head,
        }
    }

    /// What an agent has left, in order. `live` are the descriptors of address spaces that are there: a fork that has come
    /// to one has been followed.
    pub(crate) fn left(&mut self, live: &HashSet<i32>) -> Vec<Noted> {
        let mut left = Vec::new();
        for at in (0..SLOTS).map(|i| self.head.wrapping_add(i)) {
            let slot = self.slot(at);
            if slot[0].load(Ordering::Acquire) == 0 {
                continue;
            }
            if Uffd::fork_in(slot).is_some_and(|number| live.contains(&number)) {
                slot[0].store(0, Ordering::Release);
                continue;
            }
            let at = Some(at);
            match Uffd::message_in(slot) {
                None | Some(Message::Fault { .. }) => slot[0].store(0, Ordering::Release),
                Some(message) => left.push(Noted { message, at }),
            }
        }
        self.next = left
            .last()
            .and_then(|noted| noted.at)
            .map_or(self.head, |last| last.wrapping_add(1));
        left
    }

    /// Reads what there is, at most so much, to the end of `out`. Returns how many came.
    pub(crate) fn read(
        &mut self,
        uffd: &Uffd,
        most: usize,
        out: &mut Vec<Noted>,
    ) -> io::Result<usize> {
        let from = self.next % SLOTS;
        let room = SLOTS - self.next.wrapping_sub(self.head);
        let slots = room.min(SLOTS - from).min(most as u32);
        if slots == 0 {
            // Only where a batch that moves pages by `mremap` keeps others from being followed for long.
            self.record
                .undecided
                .fetch_or(undecided::EVENTS, Ordering::AcqRel);
            let mut messages = Vec::new();
            let read = uffd.read(most, &mut messages)?;
            out.extend(
                messages
                    .into_iter()
                    .map(|message| Noted { message, at: None }),
            );
            return Ok(read);
        }
        let slots = &self.record.journal[from as usize..(from + slots) as usize];
        let read = uffd.read_to(slots)?;
        for slot in slots.iter().take(read) {
            let at = self.next;
            self.next = self.next.wrapping_add(1);
            match Uffd::message_in(slot) {
                Some(message @ Message::Fault { .. }) => {
                    slot[0].store(0, Ordering::Release);
                    out.push(Noted { message, at: None });
                }
                Some(message) => out.push(Noted {
                    message,
                    at: Some(at),
                }),
                None => slot[0].store(0, Ordering::Release),
            }
        }
        self.advance();
        Ok(read)
    }

    /// An event has been followed.
    pub(crate) fn done(&mut self, at: Option<u32>) {
        if let Some(at) = at {
            self.slot(at)[0].store(0, Ordering::Release);
            self.advance();
        }
    }

    /// Whether a move's target has been cleared already.
    pub(crate) fn has_begun(&self, at: Option<u32>) -> bool {
        at.is_some_and(|at| self.slot(at)[0].load(Ordering::Acquire) & BEGUN != 0)
    }

    /// A move's target has been cleared: what is there from now on is what was moved.
    pub(crate) fn begin(&self, at: Option<u32>) {
        if let Some(at) = at {
            self.slot(at)[0].fetch_or(BEGUN, Ordering::AcqRel);
        }
    }

    /// Whether everything that was read has been followed.
    pub(crate) fn is_empty(&self) -> bool {
        self.head == self.next
    }

    fn advance(&mut self) {
        while self.head != self.next && self.slot(self.head)[0].load(Ordering::Relaxed) == 0 {
            self.head = self.head.wrapping_add(1);
        }
        self.record.journal_head.store(self.head, Ordering::Release);
    }

    fn slot(&self, at: u32) -> &JournalSlot {
        // The remainder is always within the array.
        &self.record.journal[(at % SLOTS) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::State;

    const UNMAP: u64 = 0x16;

    fn write(record: &SpaceRecord, at: usize, words: [u64; 4]) {
        for (place, word) in record.journal[at].iter().zip(words) {
            place.store(word, Ordering::Relaxed);
        }
    }

    #[test]
    fn what_was_not_followed_is_found_in_its_order() {
        let place = State::create().unwrap().new_space().unwrap();
        place.journal_head.store(SLOTS - 2, Ordering::Relaxed);
        // A ring: the older ones are at its end.
        for (at, page) in [(JOURNAL_SLOTS - 1, 1), (0, 2), (1, 3)] {
            write(&place, at, [UNMAP, page * 4096, page * 4096 + 4096, 0]);
        }
        // A fork that has come to an address space, and one that has not.
        write(&place, 2, [0x13, 70, 0, 0]);
        let mut journal = Journal::new(place.record().clone());
        let left = journal.left(&HashSet::from([70]));
        let pages: Vec<u64> = left
            .iter()
            .map(|noted| match &noted.message {
                Message::Unmap(range) => range.start / 4096,
                _ => 0,
            })
            .collect();
        assert_eq!(pages, [1, 2, 3]);
        assert!(!journal.is_empty());
        journal.begin(left[1].at);
        let again = Journal::new(place.record().clone());
        assert!(again.has_begun(left[1].at) && !again.has_begun(left[0].at));
        for noted in left {
            journal.done(noted.at);
        }
        assert!(journal.is_empty());
        assert_eq!(
            Journal::new(place.record().clone())
                .left(&HashSet::new())
                .len(),
            0
        );
    }
}
