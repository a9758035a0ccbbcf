//! Copies of extents: what becomes of those whose nodes are silent, lost or drained, and how another is made.
//!
//! A new copy begins empty. From then on writes go to it too, and what was written before is copied slot by slot
//! ([`FarMemory::next_transfer`]). Once it holds all that the others do, one that is not needed may go
//! ([`FarMemory::let_go`]).

use std::time::{Duration, Instant};

use super::extent::{
    Condition, Copy, CopyId, Extent, Grant, MAX_TRANSFER_SLOTS, Parts, Pinned, Place,
};
use super::{FarMemory, MAX_COPIES, lock};
use crate::entry::Slot;

/// How long a node may be silent before what it holds is copied elsewhere: it may only have been restarted, or cut off for a
/// moment, and copying its extents costs the others their network.
const REBUILD_AFTER: Duration = Duration::from_secs(10);

/// An extent that should have another copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Which.
    pub number: u32,
    /// Its size.
    pub bytes: u64,
    /// The nodes that have one.
    pub nodes: Vec<String>,
}

/// Slots to be copied. They stay what they are until [`FarMemory::transferred`].
#[derive(Clone, Debug)]
pub struct Transfer {
    /// The first.
    pub first: Slot,
    /// A copy that holds them.
    pub from: Place,
    /// The one that does not.
    pub to: Place,
}

impl FarMemory {
    /// Takes over what the coordinator says of the nodes: the grants whose contents are gone, those whose node is silent, and
    /// those whose node is being drained. All others can be used.
    pub fn heard_of_nodes(&self, lost: &[u64], unreachable: &[u64], draining: &[u64]) {
        let now = Instant::now();
        self.change_copies(|copy| {
            let id = copy.grant.id;
            copy.draining = draining.contains(&id);
            copy.condition = match copy.condition {
                Condition::Lost | Condition::Revoked => copy.condition,
                _ if lost.contains(&id) => Condition::Lost,
                _ if unreachable.contains(&id) => Condition::Unreachable,
                _ => Condition::Usable,
            };
            copy.silent_since = match copy.condition {
                Condition::Unreachable => copy.silent_since.or(Some(now)),
                _ => None,
            };
        });
    }

    /// Marks every extent held as lost: the lease under which they were granted has ended.
    pub fn lose_all(&self) {
        lock(&self.left).clear();
        self.change_copies(|copy| copy.condition = Condition::Revoked);
    }

    fn change_copies(&self, mut change: impl FnMut(&mut Copy)) {
        for extent in self.all().iter().flatten() {
            self.update(extent, |parts| {
                for copy in &mut parts.copies {
                    change(copy);
                    copy.note_condition();
                }
            });
        }
    }

    /// Whether no copy has a slot's bytes any more.
    #[must_use]
    pub fn is_lost(&self, slot: Slot) -> bool {
        let at = usize::from(slot.page());
        self.record(slot, |extent, _| !extent.lock().is_held(at))
            .unwrap_or(false)
    }

    /// Whether some copy of a slot is neither lost nor on a silent node, as far as is known.
    #[must_use]
    pub fn is_usable(&self, slot: Slot) -> bool {
        let at = usize::from(slot.page());
        let usable = |copy: &Copy| copy.is_usable() && copy.holds.has(at);
        self.record(slot, |extent, _| extent.lock().copies.iter().any(usable))
            .unwrap_or(false)
    }

    /// Whether some extent's node is silent: what cannot be had now may be had again.
    #[must_use]
    pub fn any_unreachable(&self) -> bool {
        let silent = |copy: &Copy| copy.condition == Condition::Unreachable;
        let extents = self.all();
        let mut extents = extents.iter().flatten();
        extents.any(|extent| extent.lock().copies.iter().any(silent))
    }

    /// A copy gave other bytes than a slot should hold. If another copy has them, this one counts as not having them, so that
    /// they are copied to it anew. Returns whether that is so.
    pub fn doubt(&self, slot: Slot, copy: CopyId) -> bool {
        let at = usize::from(slot.page());
        let doubted = self.record(slot, |extent, _| {
            let mut parts = extent.lock();
            let has = |it: &Copy| !it.condition.is_lost() && it.holds.has(at);
            let elsewhere = parts.copies.iter().any(|it| it.id != copy && has(it));
            if elsewhere && let Some(doubted) = parts.copy(copy) {
                doubted.holds.clear(at);
            }
            elsewhere
        });
        doubted.unwrap_or(false)
    }

    /// Extents in use that should have so many copies and have fewer whole ones.
    #[must_use]
    pub fn below_goal(&self, goal: u8) -> u32 {
        let extents = self.all();
        let of_goal = extents.iter().flatten().filter(|it| it.goal == goal);
        let below = of_goal.filter(|extent| {
            let parts = extent.lock();
            is_in_use(extent, &parts) && whole(&parts, None) < usize::from(extent.goal)
        });
        below.count() as u32
    }

    /// Up to `most` extents that should have another copy, and can: some copy of theirs can be read.
    #[must_use]
    pub fn wanted_copies(&self, most: usize) -> Vec<Wanted> {
        let extents = self.all();
        let wanted = extents.iter().flatten().filter_map(|extent| {
            let parts = extent.lock();
            let hoped_for = |copy: &&Copy| {
                let patient = |since: Instant| since.elapsed() < REBUILD_AFTER;
                copy.is_sound() || !copy.draining && copy.silent_since.is_some_and(patient)
            };
            let enough = parts.copies.iter().filter(hoped_for).count() >= usize::from(extent.goal);
            let can = parts.copies.len() < MAX_COPIES && parts.copies.iter().any(Copy::is_usable);
            (is_in_use(extent, &parts) && can && !enough).then(|| Wanted {
                number: extent.number,
                bytes: extent.bytes,
                nodes: parts
                    .copies
                    .iter()
                    .map(|copy| copy.grant.node.clone())
                    .collect(),
            })
        });
        wanted.take(most).collect()
    }

    /// Lets copies go that their extents do not need: lost ones where there is another, and any where enough others hold all
    /// that there is; those of nodes that are drained or silent before others. Returns how many.
    pub fn let_go(&self) -> usize {
        let mut gone = 0;
        for extent in self.all().iter().flatten() {
            self.update(extent, |parts| {
                while let Some(at) = dispensable(extent, parts) {
                    let copy = parts.remove(at);
                    if copy.condition != Condition::Revoked {
                        lock(&self.left).push(Grant::clone(&copy.grant));
                    }
                    gone += 1;
                }
            });
        }
        gone
    }

    /// The next slots that some copy should hold and does not, to be looked for from extent `from` on; they are not given out
    /// to others until [`Self::transferred`].
    pub fn next_transfer(&self, from: u32) -> Option<Transfer> {
        let extents = self.all();
        let (before, after) = extents
            .split_at_checked(from as usize)
            .unwrap_or((&[], &extents));
        let mut extents = after.iter().chain(before).flatten();
        extents.find_map(|extent| {
            let mut parts = extent.lock();
            let missing = missing(extent, &parts)?;
            let (slots, from, to) = missing;
            let first = Slot::new(extent.number, u16::try_from(slots.start).ok()?)?;
            let pin = |slot: usize| Pinned {
                slot: slot as u16,
                given_up: false,
            };
            parts.pinned.extend(slots.clone().map(pin));
            self.note_transfer(first, slots.len());
            let place = |at: usize| Some(parts.copies.get(at)?.place(slots.start, slots.len()));
            Some(Transfer {
                first,
                from: place(from)?,
                to: place(to)?,
            })
        })
    }

    /// A transfer is over. Of its slots, those in `good` (one bit each) are held by the copy that they went to. `failed`: that
    /// copy did not confirm them; where others hold all that it does it goes, and what was sent to it is fenced off with it.
    pub fn transferred(&self, transfer: &Transfer, good: u64, failed: bool) {
        let Some(extent) = self.extent(transfer.first.extent()) else {
            return;
        };
        let first = usize::from(transfer.first.page());
        self.update(&extent, |parts| {
            for (index, slot) in (first..first + usize::from(transfer.to.len)).enumerate() {
                let is_named = parts.unpin(slot).is_some_and(|pinned| !pinned.given_up);
                if is_named
                    && good >> index & 1 == 1
                    && let Some(copy) = parts.copy(transfer.to.copy)
                {
                    copy.holds.set(slot);
                }
            }
            if failed {
                self.abandon(parts, transfer.to.copy);
            }
        });
        self.note_no_transfer();
    }

    fn abandon(&self, parts: &mut Parts, id: CopyId) {
        let Some(at) = parts.copies.iter().position(|copy| copy.id == id) else {
            return;
        };
        let copy = &parts.copies[at];
        let elsewhere = parts
            .copies
            .iter()
            .enumerate()
            .any(|(other, it)| other != at && it.is_usable() && covers(it, copy.holds.words()));
        if elsewhere && copy.writers == 0 {
            let copy = parts.remove(at);
            if copy.condition != Condition::Revoked {
                lock(&self.left).push(Grant::clone(&copy.grant));
            }
        }
    }
}

fn is_in_use(extent: &Extent, parts: &Parts) -> bool {
    parts.free.count < extent.slots.len() as u64
}

/// What any copy that is not lost holds.
fn held(parts: &Parts) -> Vec<u64> {
    let there = parts.copies.iter().filter(|copy| !copy.condition.is_lost());
    there.fold(Vec::new(), |mut all, copy| {
        for (at, word) in copy.holds.words().enumerate() {
            match all.get_mut(at) {
                Some(all) => *all |= word,
                None => all.push(word),
            }
        }
        all
    })
}

fn covers(copy: &Copy, wanted: impl Iterator<Item = u64>) -> bool {
    let mut both = copy.holds.words().zip(wanted);
    both.all(|(has, wanted)| wanted & !has == 0)
}

/// How many sound copies other than the one at `but` hold all that there is.
fn whole(parts: &Parts, but: Option<usize>) -> usize {
    let all = held(parts);
    let others = parts.copies.iter().enumerate();
    others
        .filter(|(at, copy)| {
            Some(*at) != but && copy.is_sound() && covers(copy, all.iter().copied())
        })
        .count()
}

/// A copy that its extent does not need.
fn dispensable(extent: &Extent, parts: &Parts) -> Option<usize> {
    if parts.copies.len() < 2 {
        return None;
    }
    let idle = |at: &usize| parts.copies[*at].writers == 0;
    let lost = |at: &usize| parts.copies[*at].condition.is_lost();
    let some_there = parts.copies.iter().any(|copy| !copy.condition.is_lost());
    let places = || (0..parts.copies.len()).filter(idle);
    if let Some(at) = places().find(|at| some_there && lost(at)) {
        return Some(at);
    }
    let enough = |at: &usize| whole(parts, Some(*at)) >= usize::from(extent.goal);
    let unsound = places().find(|at| !parts.copies[*at].is_sound() && enough(at));
    unsound.or_else(|| places().rev().find(enough))
}

/// Neighbouring slots that one copy can give and another should have: which, from where and to where.
fn missing(extent: &Extent, parts: &Parts) -> Option<(std::ops::Range<usize>, usize, usize)> {
    // What rests may be copied meanwhile: whatever still arrives there is what it holds.
    let is_copied = |pinned: &Pinned| !extent.rests.has(usize::from(pinned.slot));
    if parts.copies.len() < 2 || parts.pinned.iter().any(is_copied) {
        return None;
    }
    let slots = extent.slots.len();
    let readable = |at: &usize| parts.copies[*at].is_usable();
    let places = || (0..parts.copies.len()).filter(readable);
    places()
        .filter(|to| !parts.copies[*to].draining)
        .find_map(|to| {
            let has = |at: usize, slot: usize| parts.copies[at].holds.has(slot);
            places().filter(|from| *from != to).find_map(|from| {
                let lacks = |slot: &usize| has(from, *slot) && !has(to, *slot);
                let words = parts.copies[from].holds.words();
                let word = words
                    .zip(parts.copies[to].holds.words())
                    .position(|(from, to)| from & !to != 0)?;
                let start = (word * 64..slots).find(lacks)?;
                let len = (start..slots.min(start + MAX_TRANSFER_SLOTS))
                    .take_while(lacks)
                    .count();
                Some((start..start + len, from, to))
            })
        })
}

#[cfg(test)]
mod tests {
    use super::super::LOW_WATER_SLOTS;
    use super::super::tests::{far, grant};

    /// They were given back, and the program on them ended for want of far memory although its node had it.
    #[test]
    fn free_extents_of_a_node_that_is_drained_stay_until_there_is_room_elsewhere() {
        let far = far(2, 64);
        let run = far.take_run(1, 1).unwrap();
        for target in far.targets(run) {
            far.written(run, target.copy, true);
        }
        far.heard_of_nodes(&[], &[], &[0, 1]);
        assert!(far.retire(|_| 0).is_empty());
        assert!(far.take_run(1, 1).is_some_and(|run| far.release(run.first)));
        far.add(1, vec![grant(2, LOW_WATER_SLOTS)]).unwrap();
        let retired = far.retire(|_| LOW_WATER_SLOTS);
        assert_eq!(retired.iter().map(|it| it.id).collect::<Vec<_>>(), [1]);
        // Nor where nothing is far.
        assert!(far.release(run.first));
        let retired = far.retire(|_| LOW_WATER_SLOTS);
        assert_eq!(retired.iter().map(|it| it.id).collect::<Vec<_>>(), [0]);
    }
}
