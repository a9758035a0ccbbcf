//! Slots that rest: a write to them was broken off, and may still arrive. Nothing else is put there for a while.
//!
//! A node that was paused, or a network that was, has such a write in some buffer, and carries it out when it goes on: behind
//! everything that was sent over the next connection.

use std::time::{Duration, Instant};

use super::extent::Pinned;
use super::{FarMemory, SlotRun, lock};
use crate::entry::Slot;

/// Longer than a connection that was broken off takes to come to its end at a node that runs. At one that does not, nothing else is
/// written meanwhile either.
pub(super) const REST: Duration = Duration::from_secs(120);

impl FarMemory {
    /// What a dead agent sent to a slot may still arrive, in any copy. Counts from [`Self::all_is_named`].
    pub fn lay_to_rest(&self, slot: Slot) {
        self.record(slot, |extent, _| {
            let _parts = extent.lock();
            extent.rests.set(usize::from(slot.page()));
        });
    }

    /// What this agent sent to a run may still arrive. Its slots stay what they are, and are not given out when they are released.
    pub fn may_still_arrive(&self, run: SlotRun) {
        let until = Instant::now() + REST;
        let slots = std::iter::successors(Some(run.first), |slot| slot.next());
        for slot in slots.take(run.len.into()) {
            let begins = self.record(slot, |extent, _| {
                let mut parts = extent.lock();
                let begins = !extent.rests.has(usize::from(slot.page()));
                if begins {
                    extent.rests.set(usize::from(slot.page()));
                    parts.pinned.push(Pinned {
                        slot: slot.page(),
                        given_up: false,
                    });
                }
                begins
            });
            if begins == Some(true) {
                lock(&self.resting).push((until, slot));
            }
        }
    }

    /// Slots that have rested long enough are free, if nobody names them.
    pub fn end_rests(&self) {
        self.end_rests_until(Instant::now());
    }

    /// Those that rest no longer than this.
    pub(super) fn end_rests_until(&self, now: Instant) {
        let due: Vec<_> = lock(&self.resting)
            .extract_if(.., |(until, _)| *until <= now)
            .collect();
        for (_, slot) in due {
            let page = usize::from(slot.page());
            self.record(slot, |extent, _| {
                self.update(extent, |parts| {
                    extent.rests.clear(page);
                    if parts.unpin(page).is_none() {
                        parts.free.give_back(page);
                    }
                });
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{far, grant};
    use super::*;
    use crate::state::State;

    /// They were given out at once, and what had been sent before the connection broke could arrive upon another page's bytes.
    #[test]
    fn slots_of_a_write_that_broke_off_rest() {
        let far = far(1, 2);
        let run = far.take_run(1, 1).unwrap();
        let target = &far.targets(run)[0];
        far.written(run, target.copy, false);
        far.may_still_arrive(run);
        far.may_still_arrive(run);
        assert!(far.release(run.first));
        assert_eq!(far.take_run(2, 1).map(|other| other.len), Some(1));
        assert!(far.take_run(1, 1).is_none());
        far.end_rests_until(Instant::now());
        assert!(far.take_run(1, 1).is_none());
        far.end_rests_until(Instant::now() + REST);
        assert_eq!(far.take_run(2, 1), Some(run));
        assert!(far.take_run(1, 1).is_none());
    }

    /// A transfer's end took it for still named where another slot's end had changed the order of what is pinned, and the copy then
    /// counted for whatever was put there next.
    #[test]
    fn what_rests_and_is_copied_is_given_up_for_both() {
        let far = FarMemory::new(State::create().unwrap());
        far.add(2, vec![grant(1, 8), grant(2, 8)]).unwrap();
        let broken_off = |len| {
            let run = far.take_run(len, 2).unwrap();
            let targets = far.targets(run);
            far.written(run, targets[0].copy, true);
            far.written(run, targets[1].copy, false);
            far.may_still_arrive(run);
            (run, targets[1].copy)
        };
        let (first, _) = broken_off(1);
        let (second, lacks) = broken_off(1);
        let transfer = far.next_transfer(0).unwrap();
        assert_eq!((transfer.first, transfer.to.len), (first.first, 2));
        assert!(far.release(second.first));
        far.transferred(&transfer, 3, false);
        far.end_rests_until(Instant::now() + REST);
        let again = far.take_run(1, 2).unwrap();
        assert_eq!(again, second);
        for target in far.targets(again) {
            far.written(again, target.copy, target.copy != lacks);
        }
        let places = far.places(again.first, 1);
        assert!(places.iter().all(|place| place.copy != lacks));
    }

    /// What a node lacked since it was killed was made up for two minutes late.
    #[test]
    fn what_rests_is_copied_to_where_it_is_missing() {
        let far = FarMemory::new(State::create().unwrap());
        far.add(2, vec![grant(1, 2), grant(2, 2)]).unwrap();
        let run = far.take_run(1, 2).unwrap();
        let targets = far.targets(run);
        far.written(run, targets[0].copy, true);
        far.written(run, targets[1].copy, false);
        far.may_still_arrive(run);
        let transfer = far.next_transfer(0).unwrap();
        assert_eq!(
            (transfer.first, transfer.to.copy),
            (run.first, targets[1].copy)
        );
        assert!(far.release(run.first));
        far.transferred(&transfer, 1, false);
        assert_eq!(far.take_run(2, 2).map(|other| other.len), Some(1));
        far.end_rests_until(Instant::now() + REST);
        assert_eq!(far.take_run(2, 2), Some(run));
    }
}
