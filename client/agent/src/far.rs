//! Far memory as this agent holds it: extents granted to it, slots in them, references and hashes per slot.
//!
//! A slot is never overwritten while anybody names it: a changed page goes to a fresh slot and the old one is
//! released. So a slot's bytes are fixed from the write that fills it to its release, its hash can be checked
//! on every fetch, and a fork shares it by counting one reference more.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use farpage_fabric::RemoteSlice;

use crate::entry::{EXTENT_BITS, PAGE_IN_EXTENT_BITS, Slot};
use crate::state::State;
use crate::state::records::{HashRecord, extent};

const PAGE: u64 = 4096;

/// Free slots below which the control plane is asked for another extent: what a pager can fill (at 1 GB/s)
/// while the coordinator answers (some milliseconds).
const LOW_WATER_SLOTS: u64 = 4096;

/// How long nothing is put where a dead agent's request may still write: longer than a connection that was broken off takes
/// to come to its end at a node that runs.
const REST: Duration = Duration::from_secs(120);

/// An extent as the coordinator granted it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The coordinator's number for it.
    pub id: u64,
    /// Where the node's data path is, as a fabric address.
    pub address: String,
    /// The extent's index in the node's pool.
    pub index: u32,
    /// The key under which it may be read and written.
    pub key: u64,
    /// Its size.
    pub bytes: u64,
}

/// What is kept of each slot besides its hash, which is in the state: 16 bytes there, 4 here and 8 for an entry.
#[derive(Debug, Default)]
struct SlotRecord {
    references: AtomicU32,
}

const _: () = assert!(
    size_of::<SlotRecord>() + size_of::<HashRecord>() + size_of::<u64>() <= 32,
    "metadata per far page"
);

/// An extent this agent holds.
#[derive(Debug)]
pub struct Extent {
    /// Its number within this agent.
    pub number: u32,
    /// How it was granted.
    pub grant: Grant,
    slots: Box<[SlotRecord]>,
    free: Mutex<FreeSlots>,
}

/// What is known of an extent's node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Condition {
    /// It answers, as far as is known.
    Usable,
    /// It is silent: nothing new goes there, what is there may come back.
    Unreachable,
    /// It came back empty. The lease still names the extent.
    Lost,
    /// The lease has ended, and the extent may be another's by now.
    Revoked,
}

impl Condition {
    fn is_lost(self) -> bool {
        matches!(self, Self::Lost | Self::Revoked)
    }
}

#[derive(Debug)]
struct FreeSlots {
    bits: Vec<u64>,
    count: u64,
    cursor: usize,
    condition: Condition,
}

impl FreeSlots {
    fn new(slots: usize) -> Self {
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
            condition: Condition::Usable,
        }
    }

    fn is_free(&self, slot: usize) -> bool {
        self.bits
            .get(slot / 64)
            .is_some_and(|word| word >> (slot % 64) & 1 == 1)
    }

    /// Takes a run of up to `most` neighbouring slots, the next one free behind the last taken.
    fn take_run(&mut self, most: usize) -> Option<(usize, usize)> {
        let words = self.bits.len();
        let first_word = (0..=words)
            .map(|i| (self.cursor / 64 + i) % words)
            .find(|word| self.bits[*word] != 0)?;
        let start = first_word * 64 + self.bits[first_word].trailing_zeros() as usize;
        let mut len = 0;
        while len < most && self.is_free(start + len) {
            self.bits[(start + len) / 64] &= !(1 << ((start + len) % 64));
            len += 1;
        }
        self.count -= len as u64;
        self.cursor = start + len;
        if self.cursor >= words * 64 {
            self.cursor = 0;
        }
        Some((start, len))
    }

    /// Takes one slot, if it is free.
    fn take_this(&mut self, slot: usize) -> bool {
        let is_free = self.is_free(slot);
        if is_free {
            self.bits[slot / 64] &= !(1 << (slot % 64));
            self.count -= 1;
        }
        is_free
    }

    fn give_back(&mut self, slot: usize) {
        self.bits[slot / 64] |= 1 << (slot % 64);
        self.count += 1;
    }
}

/// Neighbouring slots just taken, each with one reference and no contents yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRun {
    /// The first.
    pub first: Slot,
    /// How many.
    pub len: u16,
}

/// The extents of this agent and the slots in them. Shared by all pagers.
#[derive(Debug)]
pub struct FarMemory {
    state: Arc<State>,
    extents: RwLock<Vec<Option<Arc<Extent>>>>,
    /// Free slots of usable extents. Changes under the lock of the extent that it changes for.
    free: AtomicU64,
    used: AtomicU64,
    /// Slots that nobody names, but that a request of a dead agent's may still write to; and until when that is thought so.
    resting: Mutex<Vec<(Instant, Slot)>>,
}

impl FarMemory {
    /// None yet; what is of use to the next agent will lie in this state.
    #[must_use]
    pub fn new(state: Arc<State>) -> Self {
        Self {
            state,
            extents: RwLock::default(),
            free: AtomicU64::new(0),
            used: AtomicU64::new(0),
            resting: Mutex::default(),
        }
    }

    /// What another agent held. All of its slots are free until [`Self::is_named`] says otherwise.
    #[must_use]
    pub fn left(state: Arc<State>) -> Self {
        let far = Self::new(state);
        for number in 0..far.state.header().extents.load(Ordering::Acquire) {
            let Some(record) = far.state.extent(number) else {
                break;
            };
            let condition = match record.state.load(Ordering::Acquire) {
                extent::HELD => Condition::Usable,
                extent::REVOKED => Condition::Revoked,
                _ => continue,
            };
            let grant = Grant {
                id: record.id.load(Ordering::Relaxed),
                address: record.address(),
                index: record.index.load(Ordering::Relaxed),
                key: record.key.load(Ordering::Relaxed),
                bytes: record.bytes.load(Ordering::Relaxed),
            };
            far.put(number, grant, condition);
        }
        far
    }

    /// An entry that another agent left names this slot. Returns whether it is the first.
    pub fn is_named(&self, slot: Slot) -> bool {
        let named = self.record(slot, |extent, record| {
            let first = record.references.fetch_add(1, Ordering::Relaxed) == 0;
            if first {
                self.take(extent, usize::from(slot.page()));
            }
            first
        });
        let first = named == Some(true);
        if first {
            self.used.fetch_add(1, Ordering::Relaxed);
        }
        first
    }

    /// What a dead agent sent may still arrive: nothing is to be put there for a while, unless somebody names it already.
    pub fn lay_to_rest(&self, slot: Slot) {
        let rests = self.record(slot, |extent, record| {
            record.references.load(Ordering::Relaxed) == 0
                && self.take(extent, usize::from(slot.page()))
        });
        if rests == Some(true) {
            lock(&self.resting).push((Instant::now() + REST, slot));
        }
    }

    /// Slots that have rested long enough are free.
    pub fn end_rests(&self) {
        let now = Instant::now();
        let mut resting = lock(&self.resting);
        for (_, slot) in resting.extract_if(.., |(until, _)| *until <= now) {
            self.record(slot, |extent, _| {
                let mut free = lock(&extent.free);
                free.give_back(usize::from(slot.page()));
                if free.condition == Condition::Usable {
                    self.free.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    }

    /// Takes one slot out of the free ones, if it is among them.
    fn take(&self, extent: &Extent, page: usize) -> bool {
        let mut free = lock(&extent.free);
        let taken = free.take_this(page);
        if taken && free.condition == Condition::Usable {
            self.free.fetch_sub(1, Ordering::Relaxed);
        }
        taken
    }

    /// Whether an extent of this id is held under the lease there is.
    #[must_use]
    pub fn holds(&self, id: u64) -> bool {
        let extents = self.extents.read().unwrap_or_else(PoisonError::into_inner);
        let mut extents = extents.iter().flatten();
        extents.any(|extent| {
            extent.grant.id == id && lock(&extent.free).condition != Condition::Revoked
        })
    }

    fn put(&self, number: u32, grant: Grant, condition: Condition) {
        let slots = grant.bytes / PAGE;
        let mut free = FreeSlots::new(slots as usize);
        free.condition = condition;
        let extent = Arc::new(Extent {
            number,
            grant,
            slots: (0..slots).map(|_| SlotRecord::default()).collect(),
            free: Mutex::new(free),
        });
        let mut extents = self.extents.write().unwrap_or_else(PoisonError::into_inner);
        let place = number as usize;
        if place >= extents.len() {
            extents.resize(place + 1, None);
        }
        extents[place] = Some(extent);
        if condition == Condition::Usable {
            self.free.fetch_add(slots, Ordering::Relaxed);
        }
    }

    /// Takes an extent into use. `None` where the agent's numbers for extents have run out, or where the grant's
    /// size does not fit the entry word.
    pub fn add(&self, grant: Grant) -> Option<u32> {
        let slots = grant.bytes / PAGE;
        if slots == 0 || slots > 1 << PAGE_IN_EXTENT_BITS {
            return None;
        }
        let extents = self.extents.read().unwrap_or_else(PoisonError::into_inner);
        let number = extents
            .iter()
            .position(Option::is_none)
            .unwrap_or(extents.len());
        drop(extents);
        let number = u32::try_from(number)
            .ok()
            .filter(|number| *number < 1 << EXTENT_BITS)?;
        let record = self.state.extent(number)?;
        if !record.set_address(&grant.address) {
            return None;
        }
        record.id.store(grant.id, Ordering::Relaxed);
        record.index.store(grant.index, Ordering::Relaxed);
        record.key.store(grant.key, Ordering::Relaxed);
        record.bytes.store(grant.bytes, Ordering::Relaxed);
        record.state.store(extent::HELD, Ordering::Release);
        self.put(number, grant, Condition::Usable);
        Some(number)
    }

    /// Gives up extents of which no slot is in use, keeping `spare_slots` free ones. Returns the grants that the
    /// lease still names.
    pub fn retire(&self, spare_slots: u64) -> Vec<Grant> {
        let mut extents = self.extents.write().unwrap_or_else(PoisonError::into_inner);
        let mut retired = Vec::new();
        for place in extents.iter_mut() {
            let Some(extent) = place else { continue };
            let slots = extent.slots.len() as u64;
            let free = lock(&extent.free);
            if free.count != slots {
                continue;
            }
            if free.condition == Condition::Usable {
                if self.free.load(Ordering::Relaxed).saturating_sub(slots) < spare_slots {
                    continue;
                }
                self.free.fetch_sub(slots, Ordering::Relaxed);
            }
            // A revoked extent may have been granted anew, to this very agent: it must not be given back twice.
            if free.condition != Condition::Revoked {
                retired.push(extent.grant.clone());
            }
            drop(free);
            if let Some(record) = self.state.extent(extent.number) {
                record.state.store(extent::FREE, Ordering::Release);
            }
            *place = None;
        }
        retired
    }

    /// The extent of this number.
    #[must_use]
    pub fn extent(&self, number: u32) -> Option<Arc<Extent>> {
        let extents = self.extents.read().unwrap_or_else(PoisonError::into_inner);
        extents.get(number as usize)?.clone()
    }

    /// Takes over what the coordinator says of the nodes: the grants whose contents are gone, and those whose node
    /// is silent. All others can be used.
    pub fn heard_of_nodes(&self, lost: &[u64], unreachable: &[u64]) {
        self.set_conditions(|id, now| match now {
            Condition::Lost | Condition::Revoked => now,
            _ if lost.contains(&id) => Condition::Lost,
            _ if unreachable.contains(&id) => Condition::Unreachable,
            _ => Condition::Usable,
        });
    }

    /// Marks every extent held as lost: the lease under which they were granted has ended.
    pub fn lose_all(&self) {
        self.set_conditions(|_, _| Condition::Revoked);
    }

    fn set_conditions(&self, decide: impl Fn(u64, Condition) -> Condition) {
        let extents = self.extents.read().unwrap_or_else(PoisonError::into_inner);
        for extent in extents.iter().flatten() {
            let mut free = lock(&extent.free);
            let (before, now) = (free.condition, decide(extent.grant.id, free.condition));
            free.condition = now;
            if now == Condition::Revoked
                && let Some(record) = self.state.extent(extent.number)
            {
                record.state.store(extent::REVOKED, Ordering::Release);
            }
            match (before == Condition::Usable, now == Condition::Usable) {
                (true, false) => {
                    self.free.fetch_sub(free.count, Ordering::Relaxed);
                }
                (false, true) => {
                    self.free.fetch_add(free.count, Ordering::Relaxed);
                }
                _ => {}
            }
        }
    }

    /// Whether a slot's extent is lost.
    #[must_use]
    pub fn is_lost(&self, slot: Slot) -> bool {
        self.record(slot, |extent, _| lock(&extent.free).condition.is_lost())
            .unwrap_or(false)
    }

    /// Whether a slot's extent is neither lost nor on a silent node, as far as is known.
    #[must_use]
    pub fn is_usable(&self, slot: Slot) -> bool {
        self.record(slot, |extent, _| {
            lock(&extent.free).condition == Condition::Usable
        })
        .unwrap_or(false)
    }

    /// Whether some extent's node is silent: what cannot be had now may be had again.
    #[must_use]
    pub fn any_unreachable(&self) -> bool {
        let extents = self.extents.read().unwrap_or_else(PoisonError::into_inner);
        let mut extents = extents.iter().flatten();
        extents.any(|extent| lock(&extent.free).condition == Condition::Unreachable)
    }

    /// By which fabrics the extents held are reached: `tcp`, `shm`, both joined by a plus; empty without extents.
    #[must_use]
    pub fn fabrics(&self) -> String {
        let extents = self.extents.read().unwrap_or_else(PoisonError::into_inner);
        let kinds: std::collections::BTreeSet<&str> = extents
            .iter()
            .flatten()
            .filter_map(|extent| Some(extent.grant.address.split_once(':')?.0))
            .collect();
        kinds.into_iter().collect::<Vec<_>>().join("+")
    }

    /// Takes a run of up to `most` slots that are free, each with one reference.
    pub fn take_run(&self, most: u16) -> Option<SlotRun> {
        let extents = self.extents.read().unwrap_or_else(PoisonError::into_inner);
        for extent in extents.iter().flatten() {
            let mut free = lock(&extent.free);
            if free.condition != Condition::Usable || free.count == 0 {
                continue;
            }
            let Some((start, len)) = free.take_run(usize::from(most)) else {
                continue;
            };
            self.free.fetch_sub(len as u64, Ordering::Relaxed);
            drop(free);
            for record in &extent.slots[start..start + len] {
                record.references.store(1, Ordering::Relaxed);
            }
            self.used.fetch_add(len as u64, Ordering::Relaxed);
            let first = Slot::new(extent.number, u16::try_from(start).ok()?)?;
            return Some(SlotRun {
                first,
                len: len as u16,
            });
        }
        None
    }

    fn record<R>(&self, slot: Slot, use_it: impl FnOnce(&Extent, &SlotRecord) -> R) -> Option<R> {
        let extents = self.extents.read().unwrap_or_else(PoisonError::into_inner);
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
                let mut free = lock(&extent.free);
                free.give_back(usize::from(slot.page()));
                if free.condition == Condition::Usable {
                    self.free.fetch_add(1, Ordering::Relaxed);
                }
            }
            last
        });
        if freed == Some(true) {
            self.used.fetch_sub(1, Ordering::Relaxed);
            return true;
        }
        false
    }

    /// How many entries name this slot.
    #[must_use]
    pub fn references(&self, slot: Slot) -> u32 {
        self.record(slot, |_, record| record.references.load(Ordering::Acquire))
            .unwrap_or(0)
    }

    /// Notes what a slot now holds.
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

    /// Where a slot is on the fabric: its node's address and the slice.
    #[must_use]
    pub fn locate(&self, slot: Slot) -> Option<(Arc<Extent>, RemoteSlice)> {
        let extent = self.extent(slot.extent())?;
        let remote = RemoteSlice {
            extent: extent.grant.index,
            key: extent.grant.key,
            offset: u64::from(slot.page()) * PAGE,
        };
        Some((extent, remote))
    }

    /// Whether another extent should be asked for.
    #[must_use]
    pub fn is_low(&self) -> bool {
        self.free.load(Ordering::Relaxed) < LOW_WATER_SLOTS
    }

    /// Slots in use.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Slots free in the extents held whose nodes answer.
    #[must_use]
    pub fn free(&self) -> u64 {
        self.free.load(Ordering::Relaxed)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn far(extents: u64, slots: u64) -> FarMemory {
        let far = FarMemory::new(State::create().unwrap());
        for id in 0..extents {
            far.add(Grant {
                id,
                address: String::new(),
                index: id as u32,
                key: id,
                bytes: slots * PAGE,
            })
            .unwrap();
        }
        far
    }

    proptest! {
        #[test]
        fn slots_are_held_once_and_come_back(ops in proptest::collection::vec((1u16..40, 0usize..50), 1..80)) {
            let far = far(3, 100);
            let mut held: Vec<Slot> = Vec::new();
            for (most, drop) in ops {
                if let Some(run) = far.take_run(most) {
                    prop_assert!(run.len >= 1 && run.len <= most);
                    for i in 0..run.len {
                        let slot = Slot::new(run.first.extent(), run.first.page() + i).unwrap();
                        prop_assert!(!held.contains(&slot));
                        held.push(slot);
                    }
                } else {
                    prop_assert_eq!(held.len(), 300);
                }
                for slot in held.drain(..drop.min(held.len())) {
                    far.share(slot);
                    prop_assert!(!far.release(slot));
                    prop_assert!(far.release(slot));
                }
                prop_assert_eq!(far.used(), held.len() as u64);
                prop_assert_eq!(far.free() + far.used(), 300);
            }
        }
    }

    #[test]
    fn only_unused_extents_retire() {
        let far = far(2, 64);
        let run = far.take_run(1).unwrap();
        let retired = far.retire(0);
        assert_eq!(retired.len(), 1);
        assert_ne!(retired[0].id, u64::from(run.first.extent()));
        assert!(far.release(run.first));
        assert_eq!(far.retire(0).len(), 1);
        assert_eq!(far.free(), 0);
    }

    #[test]
    fn silent_and_lost_extents_give_no_slots_and_do_not_count_as_free() {
        let far = far(2, 64);
        let held = far.take_run(1).unwrap().first;
        far.heard_of_nodes(&[], &[0]);
        assert_eq!(far.free(), 64);
        assert!(!far.is_lost(held) && !far.is_usable(held) && far.any_unreachable());
        assert_eq!(far.take_run(1).unwrap().first.extent(), 1);
        far.heard_of_nodes(&[], &[]);
        assert_eq!(far.free(), 63 + 63);
        assert!(far.is_usable(held) && !far.any_unreachable());
        far.heard_of_nodes(&[0], &[]);
        assert!(far.is_lost(held));
        assert!(far.release(held));
        assert_eq!(far.free(), 63);
        // Nothing names it any more: the lease is told.
        assert_eq!(
            far.retire(1000).iter().map(|g| g.id).collect::<Vec<_>>(),
            [0]
        );
    }

    #[test]
    fn what_a_lease_held_is_not_given_back_under_the_next() {
        let far = far(1, 64);
        let held = far.take_run(1).unwrap().first;
        far.lose_all();
        assert!(far.is_lost(held) && far.free() == 0);
        assert!(far.release(held));
        assert!(far.retire(0).is_empty());
        // The next extent of the same number within the agent is a fresh one.
        let number = far.add(Grant {
            id: 0,
            address: "tcp:h:1".into(),
            index: 0,
            key: 2,
            bytes: 64 * PAGE,
        });
        assert_eq!(number, Some(held.extent()));
        assert!(!far.is_lost(held));
        assert_eq!((far.free(), far.fabrics().as_str()), (64, "tcp"));
    }
}
