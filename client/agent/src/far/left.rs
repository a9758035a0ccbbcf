//! What an agent finds of the extents that one before it held, and what of them it lays to rest ([`super::rests`]) because that
//! one's requests may still be under way.
//!
//! The state has the grants, what each copy holds, and which slots were being written to. Which slots are free is counted from
//! the tables ([`FarMemory::is_named`], [`FarMemory::all_is_named`]).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use farpage_proto::limits::MAX_EXTENT_BYTES;

use super::extent::{Condition, Copy, Extent, Grant, MAX_COPIES, MAX_TRANSFER_SLOTS, Pinned};
use super::rests::REST;
use super::{FarMemory, lock, of};
use crate::entry::Slot;
use crate::state::records::extent;
use crate::state::{State, slot_of, slot_word};

impl FarMemory {
    /// What another agent held. All of its slots are free until [`Self::is_named`] says otherwise.
    #[must_use]
    pub fn left(state: Arc<State>) -> Self {
        let far = Self::new(state);
        for number in 0..far.state.header().extents.load(Ordering::Acquire) {
            let Some(record) = far.state.extent(number) else {
                break;
            };
            if record.state.load(Ordering::Acquire) != extent::HELD {
                continue;
            }
            let goal = record.goal.load(Ordering::Relaxed);
            let bytes = record.bytes.load(Ordering::Relaxed);
            // Nor what no agent of ours has written.
            if !(1..=MAX_COPIES as u32).contains(&goal) || bytes > MAX_EXTENT_BYTES {
                continue;
            }
            let goal = goal as u8;
            let Some(extent) = Extent::new(number, goal, bytes, &far.state).map(Arc::new) else {
                break;
            };
            far.update(&extent, |parts| {
                let copies =
                    (0..MAX_COPIES).map(|at| extent.copy_left(&far.state, far.next_copy(), at));
                parts.copies.extend(copies.flatten());
            });
            let mut extents = far.all_mut();
            let place = number as usize;
            if place >= extents.len() {
                extents.resize(place + 1, None);
            }
            extents[place] = Some(extent);
        }
        far
    }

    /// An entry that another agent left names this slot. Returns whether it is the first.
    pub fn is_named(&self, slot: Slot) -> bool {
        let page = usize::from(slot.page());
        let named = self.record(slot, |extent, record| {
            let first = record.references.fetch_add(1, Ordering::Relaxed) == 0;
            if first {
                self.update(extent, |parts| parts.free.take_this(page));
                of(&self.used, extent.goal).fetch_add(1, Ordering::Relaxed);
            }
            first
        });
        named == Some(true)
    }

    /// All entries have been asked: what copies hold beside that nobody will ask for, and what rests begins to. A slot that is
    /// named stays what it is, and is not given out when it is no longer. Before anything is copied or written.
    pub fn all_is_named(&self) {
        self.rest_what_was_copied();
        let until = Instant::now() + REST;
        let mut resting = Vec::new();
        for extent in self.all().iter().flatten() {
            self.update(extent, |parts| {
                for (slot, record) in (0..=u16::MAX).zip(&extent.slots) {
                    let is_named = record.references.load(Ordering::Relaxed) > 0;
                    let page = usize::from(slot);
                    if !is_named {
                        parts.copies.iter().for_each(|copy| copy.holds.clear(page));
                    }
                    if !extent.rests.has(page) {
                        continue;
                    }
                    if is_named {
                        parts.pinned.push(Pinned {
                            slot,
                            given_up: false,
                        });
                    } else {
                        parts.free.take_this(page);
                    }
                    resting.extend(Slot::new(extent.number, slot).map(|it| (until, it)));
                }
            });
        }
        lock(&self.resting).append(&mut resting);
    }

    /// The slots that the dead agent's mover was writing to rest too.
    fn rest_what_was_copied(&self) {
        let header = self.state.header();
        let Some(first) = slot_of(header.transfer.load(Ordering::Acquire)) else {
            return;
        };
        let len = header.transfer_len.load(Ordering::Relaxed) as usize;
        let slots = std::iter::successors(Some(first), |slot| slot.next());
        for slot in slots.take(len.min(MAX_TRANSFER_SLOTS)) {
            self.lay_to_rest(slot);
        }
        self.note_no_transfer();
    }

    /// Whether a grant of this id is held under the lease there is, or about to be given back.
    #[must_use]
    pub fn knows(&self, id: u64) -> bool {
        if lock(&self.left).iter().any(|grant| grant.id == id) {
            return true;
        }
        let is_it = |copy: &Copy| copy.grant.id == id && copy.condition != Condition::Revoked;
        let extents = self.all();
        let mut extents = extents.iter().flatten();
        extents.any(|extent| extent.lock().copies.iter().any(is_it))
    }

    /// Grants of the lease that no extent needs: they are given back with the next ([`Self::retire`]).
    pub fn needs_not(&self, grants: impl Iterator<Item = Grant>) {
        // Before the list is held: who chooses them asks it whether each is known ([`Self::knows`]).
        let grants: Vec<Grant> = grants.collect();
        lock(&self.left).extend(grants);
    }

    /// The mover is about to write to slots.
    pub(super) fn note_transfer(&self, first: Slot, len: usize) {
        let header = self.state.header();
        header.transfer_len.store(len as u64, Ordering::Relaxed);
        header.transfer.store(slot_word(first), Ordering::Release);
    }

    /// It has come to an end.
    pub(super) fn note_no_transfer(&self) {
        self.state.header().transfer.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::table::{Page, PageTable};

    /// Where a part of the state lies in its memory.
    fn place_of<T>(state: &State, part: &T) -> u64 {
        (std::ptr::from_ref(part).addr() - std::ptr::from_ref(state.header()).addr()) as u64
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// An agent that went wrong may have left anything.
        #[test]
        fn whatever_was_left_can_be_looked_at(
            records in vec((vec(any::<u8>(), 2048), any::<bool>(), 0u32..6, prop_oneof![0u64..1 << 22, any::<u64>()]), 0..4),
            bits in vec(any::<u8>(), 0..4096),
            cells in vec(any::<u8>(), 4096),
            counts in any::<[u32; 4]>(),
            transfer in any::<[u64; 2]>(),
            named in vec((0u32..5, any::<u16>()), 0..40),
        ) {
            let state = State::create().unwrap();
            let memory = File::from(state.memory().as_fd().try_clone_to_owned().unwrap());
            for (number, (bytes, is_held, goal, size)) in (0..).zip(&records) {
                let record = state.extent(number).unwrap();
                memory.write_all_at(&bytes[..size_of_val(&*record).min(2048)], place_of(&state, &*record)).unwrap();
                if *is_held {
                    record.state.store(extent::HELD, Ordering::Relaxed);
                    record.goal.store(*goal, Ordering::Relaxed);
                    record.bytes.store(*size, Ordering::Relaxed);
                }
                memory.write_all_at(&bits, place_of(&state, &*state.bits(number).unwrap())).unwrap();
            }
            memory.write_all_at(&cells, place_of(&state, &*state.memory().chunk(0))).unwrap();
            state.memory().chunk_record(0).owner.store(1, Ordering::Relaxed);
            let header = state.header();
            // What a smaller number leaves out is not looked at.
            header.jobs.store(counts[0], Ordering::Relaxed);
            header.spaces.store(counts[1], Ordering::Relaxed);
            header.extents.fetch_max(counts[2], Ordering::Relaxed);
            header.chunks.store(counts[3] % 64, Ordering::Relaxed);
            header.transfer.store(transfer[0], Ordering::Relaxed);
            header.transfer_len.store(transfer[1], Ordering::Relaxed);

            let state = Arc::new(State::adopt(state.memory().as_fd().try_clone_to_owned().unwrap()).unwrap());
            let far = FarMemory::left(Arc::clone(&state));
            let mut table = PageTable::new(farpage_core::table::Heap);
            for chunk in state.left().chunks {
                if let Some((_, number)) = chunk.owner() {
                    let cells: Vec<_> = chunk.iter().map(farpage_core::page_cell::PageCell::load).collect();
                    for (page, entry) in (number.wrapping_mul(512)..).zip(cells) {
                        table.change(Page(page), |_| Some(entry));
                    }
                }
            }
            let slots = named.iter().filter_map(|(extent, page)| Slot::new(*extent, *page));
            let entries = table.touched(Page(0)..Page(u64::MAX >> 12)).filter_map(|(_, entry)| entry.slot());
            for slot in slots.chain(entries).collect::<Vec<_>>() {
                far.is_named(slot);
            }
            far.all_is_named();
            let used = far.used();
            if let Some(run) = far.take_run(8, 1) {
                prop_assert!(far.used() > used);
                prop_assert!(far.release(run.first));
            }
        }
    }
}
