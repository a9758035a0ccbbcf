//! An extent of this agent's: slots, and copies of all of them on different nodes.
//!
//! A slot is the same place in every copy. What a copy holds is kept slot by slot, so that it never counts for bytes that it
//! does not hold: a write that failed there, or bytes that failed their check, cost that copy those slots and nothing else.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use farpage_fabric::RemoteSlice;
use farpage_proto::limits::MAX_REPLICAS;
use smallvec::SmallVec;

use super::PAGE;
use super::slots::{FreeSlots, SlotBits, SlotRecord};
use crate::state::State;
use crate::state::records::{self, CopyRecord, ExtentRecord, RESTING, extent};
use crate::sys::state::Ref;

/// Most copies of an extent: as many as a job may ask for, and one more while another takes the place of one.
pub const MAX_COPIES: usize = MAX_REPLICAS as usize + 1;

/// Most slots of an extent that are being copied at once: what one request of the mover's moves.
pub const MAX_TRANSFER_SLOTS: usize = 64;

/// A copy of an extent, as the coordinator granted it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The coordinator's number for it.
    pub id: u64,
    /// The node that it is on.
    pub node: String,
    /// Where the node's data path is, as a fabric address.
    pub address: String,
    /// The extent's index in the node's pool.
    pub index: u32,
    /// The key under which it may be read and written.
    pub key: u64,
    /// Its size.
    pub bytes: u64,
}

/// Names a copy within this agent. None is given twice, so that what was asked of one that is gone is not taken for another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CopyId(pub(super) u64);

/// Where a run of slots is in one copy.
#[derive(Clone, Debug)]
pub struct Place {
    /// Which copy.
    pub copy: CopyId,
    /// How it was granted.
    pub grant: Arc<Grant>,
    /// The first slot of the run on its node.
    pub remote: RemoteSlice,
    /// How many slots.
    pub len: u16,
}

/// Places of the same slots in different copies.
pub type Places = SmallVec<[Place; MAX_COPIES]>;

/// What is known of a copy's node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    /// It answers, as far as is known.
    Usable,
    /// It is silent: nothing new goes there, what is there may come back.
    Unreachable,
    /// It came back empty. The lease still names the grant.
    Lost,
    /// The lease has ended, and the memory may be another's by now.
    Revoked,
}

impl Condition {
    pub(super) fn is_lost(self) -> bool {
        matches!(self, Self::Lost | Self::Revoked)
    }
}

/// One copy.
#[derive(Debug)]
pub(super) struct Copy {
    pub(super) id: CopyId,
    pub(super) grant: Arc<Grant>,
    pub(super) condition: Condition,
    /// Since when its node has been silent.
    pub(super) silent_since: Option<Instant>,
    /// Its node is being drained: another copy is to take its place.
    pub(super) draining: bool,
    /// The slots whose bytes it holds.
    pub(super) holds: SlotBits,
    /// Writes under way that have it among their targets.
    pub(super) writers: u32,
    /// What of it outlives the agent.
    record: Ref<CopyRecord>,
}

impl Copy {
    /// Notes its condition where the next agent finds it. Of a node that is silent that one hears anew.
    pub(super) fn note_condition(&self) {
        let state = match self.condition {
            Condition::Usable | Condition::Unreachable => records::copy::HELD,
            Condition::Lost => records::copy::LOST,
            Condition::Revoked => records::copy::REVOKED,
        };
        self.record.state.store(state, Ordering::Release);
    }

    pub(super) fn is_usable(&self) -> bool {
        self.condition == Condition::Usable
    }

    /// Whether it counts towards the copies that there should be.
    pub(super) fn is_sound(&self) -> bool {
        self.is_usable() && !self.draining
    }

    pub(super) fn place(&self, slot: usize, len: usize) -> Place {
        Place {
            copy: self.id,
            grant: Arc::clone(&self.grant),
            remote: RemoteSlice {
                extent: self.grant.index,
                key: self.grant.key,
                offset: slot as u64 * PAGE,
            },
            len: len as u16,
        }
    }

    /// How many slots from one on it holds without a gap.
    pub(super) fn run_held(&self, slot: usize, most: usize) -> usize {
        (slot..slot + most)
            .take_while(|slot| self.holds.has(*slot))
            .count()
    }
}

/// What of an extent changes.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) free: FreeSlots,
    pub(super) copies: SmallVec<[Copy; 2]>,
    /// Slots that are being copied: one that is given up meanwhile is not given out again before that is over.
    pub(super) pinned: SmallVec<[Pinned; MAX_TRANSFER_SLOTS]>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pinned {
    pub(super) slot: u16,
    pub(super) given_up: bool,
}

impl Parts {
    pub(super) fn copy(&mut self, id: CopyId) -> Option<&mut Copy> {
        self.copies.iter_mut().find(|copy| copy.id == id)
    }

    pub(super) fn sound(&self) -> usize {
        self.copies.iter().filter(|copy| copy.is_sound()).count()
    }

    /// Whether some copy that is there has the bytes of a slot.
    pub(super) fn is_held(&self, slot: usize) -> bool {
        let mut copies = self.copies.iter();
        copies.any(|copy| !copy.condition.is_lost() && copy.holds.has(slot))
    }

    /// Takes a copy out of use. Before its grant goes back no record may name it.
    pub(super) fn remove(&mut self, at: usize) -> Copy {
        let copy = self.copies.remove(at);
        copy.record
            .state
            .store(records::copy::FREE, Ordering::Release);
        copy
    }

    /// A slot that was being copied, or rested, does so no more.
    pub(super) fn unpin(&mut self, slot: usize) -> Option<Pinned> {
        let is_it = |pinned: &Pinned| usize::from(pinned.slot) == slot;
        let at = self.pinned.iter().position(is_it)?;
        let pinned = self.pinned.swap_remove(at);
        // It may be pinned for both.
        if pinned.given_up && !self.pinned.iter().any(is_it) {
            self.free.give_back(slot);
        }
        Some(pinned)
    }

    /// Nobody names a slot any more.
    pub(super) fn give_back(&mut self, slot: u16) {
        for copy in &mut self.copies {
            copy.holds.clear(slot.into());
        }
        let pins = self.pinned.iter_mut().filter(|pinned| pinned.slot == slot);
        let pins = pins.map(|pinned| pinned.given_up = true).count();
        if pins == 0 {
            self.free.give_back(slot.into());
        }
    }
}

/// An extent this agent holds.
#[derive(Debug)]
pub struct Extent {
    /// Its number within this agent.
    pub number: u32,
    /// How many copies of it there should be.
    pub goal: u8,
    pub(super) bytes: u64,
    pub(super) slots: Box<[SlotRecord]>,
    parts: Mutex<Parts>,
    /// What of it outlives the agent.
    record: Ref<ExtentRecord>,
    /// Slots that a request may still write to which was given up: nothing else goes there.
    pub(super) rests: SlotBits,
}

impl Extent {
    pub(super) fn new(number: u32, goal: u8, bytes: u64, state: &State) -> Option<Self> {
        let record = state.extent(number)?;
        let slots = (bytes / PAGE) as usize;
        let rests = SlotBits::of(state.bits(number)?, RESTING, slots);
        Some(Self {
            number,
            goal,
            bytes,
            slots: (0..slots).map(|_| SlotRecord::default()).collect(),
            parts: Mutex::new(Parts {
                free: FreeSlots::new(slots),
                copies: SmallVec::new(),
                pinned: SmallVec::new(),
            }),
            record,
            rests,
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy that holds nothing yet, noted in the state; none where there is no room for it.
    pub(super) fn new_copy(&self, state: &State, id: CopyId, grant: Grant) -> Option<Copy> {
        let is_free =
            |record: &CopyRecord| record.state.load(Ordering::Relaxed) == records::copy::FREE;
        let place = self.record.copies.iter().position(is_free)?;
        let record = self.record.part(|record| &record.copies[place]);
        if !CopyRecord::fits(&grant) {
            return None;
        }
        record.note(&grant);
        let holds = SlotBits::of(state.bits(self.number)?, place, self.slots.len());
        holds.clear_all();
        let copy = Copy {
            id,
            grant: Arc::new(grant),
            condition: Condition::Usable,
            silent_since: None,
            draining: false,
            holds,
            writers: 0,
            record,
        };
        copy.note_condition();
        Some(copy)
    }

    /// The copy that another agent left at this place of the record, if it left one.
    pub(super) fn copy_left(&self, state: &State, id: CopyId, place: usize) -> Option<Copy> {
        self.record.copies.get(place)?;
        let record = self.record.part(|record| &record.copies[place]);
        let condition = match record.state.load(Ordering::Acquire) {
            records::copy::HELD => Condition::Usable,
            records::copy::LOST => Condition::Lost,
            records::copy::REVOKED => Condition::Revoked,
            _ => return None,
        };
        Some(Copy {
            id,
            grant: Arc::new(record.grant(self.bytes)),
            condition,
            silent_since: None,
            draining: false,
            holds: SlotBits::of(state.bits(self.number)?, place, self.slots.len()),
            writers: 0,
            record,
        })
    }

    /// It is held from now on, without copies yet.
    pub(super) fn note(&self) {
        for copy in &self.record.copies {
            copy.state.store(records::copy::FREE, Ordering::Relaxed);
        }
        self.rests.clear_all();
        let (goal, bytes) = (u32::from(self.goal), self.bytes);
        self.record.goal.store(goal, Ordering::Relaxed);
        self.record.bytes.store(bytes, Ordering::Relaxed);
        self.record.state.store(extent::HELD, Ordering::Release);
    }

    /// It is not any more.
    pub(super) fn note_end(&self) {
        self.record.state.store(extent::FREE, Ordering::Release);
    }

    /// Slots that are given out first: those of an extent with all the copies that it should have.
    pub(super) fn offered(&self, parts: &Parts) -> u64 {
        if parts.sound() >= usize::from(self.goal) {
            parts.free.count
        } else {
            0
        }
    }
}
