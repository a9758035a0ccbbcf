//! Far memory as this agent holds it: extents granted to it, slots in them, references and hashes per slot.
//!
//! A slot is never overwritten while anybody names it: a changed page goes to a fresh slot and the old one is
//! released. So a slot's bytes are fixed from the write that fills it to its release, its hash can be checked
//! on every fetch, a fork shares it by counting one reference more, and it can be copied while it is in use.
//!
//! An [`extent`] has copies on different nodes. [`slots`] says which of its slots are free; [`copies`] what becomes of copies
//! whose nodes are silent, lost or drained; [`left`] what one agent finds of what another held;
//! [`rests`] where something may still arrive that was given up.

mod copies;
mod extent;
mod left;
mod rests;
mod slots;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Instant;

use farpage_proto::limits::MAX_REPLICAS;

pub use copies::{Transfer, Wanted};
pub use extent::{CopyId, Extent, Grant, MAX_COPIES, MAX_TRANSFER_SLOTS, Place, Places};

use crate::entry::{EXTENT_BITS, PAGE_IN_EXTENT_BITS, Slot};
use crate::state::State;
use crate::state::records::CopyRecord;
use extent::{Condition, Copy, Parts};
use slots::SlotRecord;

const PAGE: u64 = 4096;

/// Free slots below which the control plane is asked for another extent: what a pager can fill (at 1 GB/s)
/// while the coordinator answers (some milliseconds).
const LOW_WATER_SLOTS: u64 = 4096;

/// Neighbouring slots just taken, each with one reference and no contents yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRun {
    /// The first.
    pub first: Slot,
    /// How many.
    pub len: u16,
}

/// How many extents an agent holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExtentCounts {
    /// In all.
    pub held: u64,
    /// Those of them of which no copy can be had now, since their nodes are silent.
    pub unreachable: u64,
    /// Those of them of which no copy is left.
    pub lost: u64,
}

/// A count for each number of copies that a job may ask for.
type ByGoal = [AtomicU64; MAX_REPLICAS as usize + 1];

fn of(counts: &ByGoal, goal: u8) -> &AtomicU64 {
    &counts[usize::from(goal.min(MAX_REPLICAS))]
}

fn sum(counts: &ByGoal) -> u64 {
    counts
        .iter()
        .map(|count| count.load(Ordering::Relaxed))
        .sum()
}

/// The extents of this agent and the slots in them. Shared by all pagers.
#[derive(Debug)]
pub struct FarMemory {
    state: Arc<State>,
    extents: RwLock<Vec<Option<Arc<Extent>>>>,
    /// Free slots that are given out first. Changes under the lock of the extent that it changes for.
    free: ByGoal,
    used: ByGoal,
    next_copy: AtomicU64,
    /// Grants that no extent needs any more and that the lease still names.
    left: Mutex<Vec<Grant>>,
    /// Slots that a request may still write to which was given up; and until when that is thought so.
    resting: Mutex<Vec<(Instant, Slot)>>,
}

impl FarMemory {
    /// None yet; what is of use to the next agent will lie in this state.
    #[must_use]
    pub fn new(state: Arc<State>) -> Self {
        Self {
            state,
            extents: RwLock::default(),
            free: ByGoal::default(),
            used: ByGoal::default(),
            next_copy: AtomicU64::new(0),
            left: Mutex::default(),
            resting: Mutex::default(),
        }
    }

    /// Takes an extent into use of which there should be `goal` copies, and are these. `None` where the agent's numbers for
    /// extents have run out, or where the grants' size does not fit the entry word, or a name the state.
    pub fn add(&self, goal: u8, grants: Vec<Grant>) -> Option<u32> {
        let bytes = grants.first()?.bytes;
        let slots = bytes / PAGE;
        let fits = grants.iter().all(CopyRecord::fits);
        if slots == 0 || slots > 1 << PAGE_IN_EXTENT_BITS || !fits {
            return None;
        }
        let mut extents = self.all_mut();
        let number = extents
            .iter()
            .position(Option::is_none)
            .unwrap_or(extents.len());
        let number32 = u32::try_from(number)
            .ok()
            .filter(|number| *number < 1 << EXTENT_BITS)?;
        let extent = Arc::new(Extent::new(number32, goal, bytes, &self.state)?);
        extent.note();
        if number == extents.len() {
            extents.push(Some(Arc::clone(&extent)));
        } else {
            extents[number] = Some(Arc::clone(&extent));
        }
        drop(extents);
        for grant in grants {
            self.add_copy(number32, grant);
        }
        Some(number32)
    }

    /// A further copy of an extent, which holds nothing yet. Returns whether there was room for it.
    pub fn add_copy(&self, number: u32, grant: Grant) -> bool {
        let Some(extent) = self.extent(number).filter(|it| it.bytes == grant.bytes) else {
            return false;
        };
        self.update(&extent, |parts| {
            let other_node = |copy: &Copy| copy.grant.node != grant.node;
            let room = parts.copies.len() < MAX_COPIES && parts.copies.iter().all(other_node);
            let copy = room.then(|| extent.new_copy(&self.state, self.next_copy(), grant));
            let copy = copy.flatten();
            let is_added = copy.is_some();
            parts.copies.extend(copy);
            is_added
        })
    }

    fn next_copy(&self) -> CopyId {
        CopyId(self.next_copy.fetch_add(1, Ordering::Relaxed))
    }

    /// Gives up extents of which no slot is in use, keeping so many free slots of extents of each number of copies. Returns
    /// the grants that the lease still names, those among them that their extents need no more.
    pub fn retire(&self, spare_slots: impl Fn(u8) -> u64) -> Vec<Grant> {
        let mut retired = std::mem::take(&mut *lock(&self.left));
        let mut extents = self.all_mut();
        for place in extents.iter_mut() {
            let Some(extent) = place else { continue };
            let slots = extent.slots.len() as u64;
            let parts = extent.lock();
            let busy = parts.copies.iter().any(|copy| copy.writers > 0);
            if parts.free.count != slots || busy {
                continue;
            }
            let offered = extent.offered(&parts);
            let free = of(&self.free, extent.goal);
            let left = free.load(Ordering::Relaxed).saturating_sub(offered);
            if offered > 0 && left < spare_slots(extent.goal) {
                continue;
            }
            // One that is being drained stays for as long as there is no room elsewhere, which there may never be.
            let usable = parts.copies.iter().any(Copy::is_usable);
            if offered == 0 && usable && self.used_of(extent.goal) > 0 && self.is_low(extent.goal) {
                continue;
            }
            free.fetch_sub(offered, Ordering::Relaxed);
            // A revoked extent may have been granted anew, to this very agent: it must not be given back twice.
            let held = parts.copies.iter();
            let held = held.filter(|copy| copy.condition != Condition::Revoked);
            retired.extend(held.map(|copy| Grant::clone(&copy.grant)));
            drop(parts);
            extent.note_end();
            *place = None;
        }
        retired
    }

    /// The extent of this number.
    #[must_use]
    pub fn extent(&self, number: u32) -> Option<Arc<Extent>> {
        self.all().get(number as usize)?.clone()
    }

    fn all_mut(&self) -> RwLockWriteGuard<'_, Vec<Option<Arc<Extent>>>> {
        self.extents.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn all(&self) -> RwLockReadGuard<'_, Vec<Option<Arc<Extent>>>> {
        self.extents.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes something of an extent, and with it what is counted of its free slots.
    fn update<R>(&self, extent: &Extent, change: impl FnOnce(&mut Parts) -> R) -> R {
        let mut parts = extent.lock();
        let before = extent.offered(&parts);
        let result = change(&mut parts);
        let more = extent.offered(&parts).wrapping_sub(before);
        // Wraps where it is less.
        of(&self.free, extent.goal).fetch_add(more, Ordering::Relaxed);
        result
    }

    /// By which fabrics the extents held are reached: `tcp`, `shm`, both joined by a plus; empty without extents.
    #[must_use]
    pub fn fabrics(&self) -> String {
        let mut kinds = std::collections::BTreeSet::new();
        for extent in self.all().iter().flatten() {
            for copy in &extent.lock().copies {
                let kind = copy.grant.address.split_once(':');
                kinds.extend(kind.map(|(kind, _)| kind.to_owned()));
            }
        }
        kinds.into_iter().collect::<Vec<_>>().join("+")
    }

    /// Takes a run of up to `most` slots that are free, each with one reference, from extents that have `goal` copies; if
    /// there is none left, from one that should have.
    pub fn take_run(&self, most: u16, goal: u8) -> Option<SlotRun> {
        let extents = self.all();
        let of_goal = || extents.iter().flatten().filter(|it| it.goal == goal);
        let offered = of_goal()
            .find_map(|extent| self.take_from(extent, most, |parts| extent.offered(parts) > 0));
        offered.or_else(|| {
            let usable = |parts: &Parts| parts.copies.iter().any(Copy::is_usable);
            of_goal().find_map(|extent| self.take_from(extent, most, usable))
        })
    }

    fn take_from(
        &self,
        extent: &Extent,
        most: u16,
        may: impl FnOnce(&Parts) -> bool,
    ) -> Option<SlotRun> {
        let (start, len) = self.update(extent, |parts| {
            let may = parts.free.count > 0 && may(parts);
            may.then(|| parts.free.take_run(usize::from(most)))?
        })?;
        for record in &extent.slots[start..start + len] {
            record.references.store(1, Ordering::Relaxed);
        }
        of(&self.used, extent.goal).fetch_add(len as u64, Ordering::Relaxed);
        Some(SlotRun {
            first: Slot::new(extent.number, u16::try_from(start).ok()?)?,
            len: len as u16,
        })
    }

    fn record<R>(&self, slot: Slot, use_it: impl FnOnce(&Extent, &SlotRecord) -> R) -> Option<R> {
        let extents = self.all();
        let extent = extents.get(slot.extent() as usize)?.as_ref()?;
        Some(use_it(extent, extent.slots.get(usize::from(slot.page()))?))
    }

    /// One reference more.
    pub fn share(&self, slot: Slot) {
        self.record(slot, |_, record| {
            record.references.fetch_add(1, Ordering::Relaxed)
        });
    }

    /// One reference less; the last one frees the slot. Returns whether it did.
    pub fn release(&self, slot: Slot) -> bool {
        let freed = self.record(slot, |extent, record| {
            let before = record
                .references
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1));
            let last = before == Ok(1);
            if last {
                self.update(extent, |parts| parts.give_back(slot.page()));
                of(&self.used, extent.goal).fetch_sub(1, Ordering::Relaxed);
            }
            last
        });
        freed == Some(true)
    }

    /// How many entries name this slot.
    #[must_use]
    pub fn references(&self, slot: Slot) -> u32 {
        self.record(slot, |_, record| record.references.load(Ordering::Acquire))
            .unwrap_or(0)
    }

    /// Notes what a slot will hold.
    pub fn set_hash(&self, slot: Slot, hash: u128) {
        if let Some([low, high]) = self.state.hash(slot) {
            low.store(hash as u64, Ordering::Relaxed);
            high.store((hash >> 64) as u64, Ordering::Release);
        }
    }

    /// What a slot should hold.
    #[must_use]
    pub fn hash(&self, slot: Slot) -> Option<u128> {
        let [low, high] = self.state.hash(slot)?;
        let high = high.load(Ordering::Acquire);
        Some((u128::from(high) << 64) | u128::from(low.load(Ordering::Relaxed)))
    }

    /// The places that hold a slot, and of each how many of the `most` slots from it on it holds; those whose nodes answer
    /// first.
    #[must_use]
    pub fn places(&self, slot: Slot, most: u16) -> Places {
        let at = usize::from(slot.page());
        let places = self.record(slot, |extent, _| {
            let parts = extent.lock();
            let holds = |copy: &&Copy| !copy.condition.is_lost() && copy.holds.has(at);
            let holders = || parts.copies.iter().filter(holds);
            let usable = holders().filter(|copy| copy.is_usable());
            let others = holders().filter(|copy| !copy.is_usable());
            usable
                .chain(others)
                .map(|copy| copy.place(at, copy.run_held(at, usize::from(most))))
                .collect()
        });
        places.unwrap_or_default()
    }

    /// Where a run is to be written: in all copies that answer, or else nowhere. One that is to be given up gets no more, if
    /// there is another. [`Self::written`] is to be told of each.
    pub fn targets(&self, run: SlotRun) -> Places {
        let at = usize::from(run.first.page());
        let places = self.record(run.first, |extent, _| {
            let mut parts = extent.lock();
            let some_sound = parts.sound() > 0;
            let wanted = |copy: &&mut Copy| match some_sound {
                true => copy.is_sound(),
                false => copy.is_usable(),
            };
            let targets = parts.copies.iter_mut().filter(wanted);
            targets
                .map(|copy| {
                    copy.writers += 1;
                    copy.place(at, usize::from(run.len))
                })
                .collect()
        });
        places.unwrap_or_default()
    }

    /// A target has the bytes of a run, or will not have them.
    pub fn written(&self, run: SlotRun, copy: CopyId, done: bool) {
        self.record(run.first, |extent, _| {
            let mut parts = extent.lock();
            if let Some(copy) = parts.copy(copy) {
                copy.writers = copy.writers.saturating_sub(1);
                if done {
                    let first = usize::from(run.first.page());
                    (first..first + usize::from(run.len)).for_each(|slot| copy.holds.set(slot));
                }
            }
        });
    }

    /// Whether another extent of so many copies should be asked for.
    #[must_use]
    pub fn is_low(&self, goal: u8) -> bool {
        self.free_of(goal) < LOW_WATER_SLOTS
    }

    /// Whether slots can be had in extents that should have so many copies, whether they have them or not.
    #[must_use]
    pub fn has_room(&self, goal: u8) -> bool {
        let extents = self.all();
        let of_goal = extents.iter().flatten().filter(|it| it.goal == goal);
        let free = of_goal.map(|extent| {
            let parts = extent.lock();
            match parts.copies.iter().any(Copy::is_usable) {
                true => parts.free.count,
                false => 0,
            }
        });
        free.sum::<u64>() >= LOW_WATER_SLOTS
    }

    /// How many extents there are, and in which condition they were when the coordinator last told.
    #[must_use]
    pub fn extents(&self) -> ExtentCounts {
        let mut counts = ExtentCounts::default();
        for extent in self.all().iter().flatten() {
            let parts = extent.lock();
            counts.held += 1;
            if parts.copies.iter().all(|copy| copy.condition.is_lost()) {
                counts.lost += 1;
            } else if !parts.copies.iter().any(Copy::is_usable) {
                counts.unreachable += 1;
            }
        }
        counts
    }

    /// Slots in use.
    #[must_use]
    pub fn used(&self) -> u64 {
        sum(&self.used)
    }

    /// Slots free where nodes answer and extents have all of their copies.
    #[must_use]
    pub fn free(&self) -> u64 {
        sum(&self.free)
    }

    /// Slots in use in extents of so many copies.
    #[must_use]
    pub fn used_of(&self, goal: u8) -> u64 {
        of(&self.used, goal).load(Ordering::Relaxed)
    }

    /// Slots free in the extents of so many copies, where each has them and their nodes answer.
    #[must_use]
    pub fn free_of(&self, goal: u8) -> u64 {
        of(&self.free, goal).load(Ordering::Relaxed)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
