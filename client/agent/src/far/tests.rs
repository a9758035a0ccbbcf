//! Slots, copies, and what becomes of both.

use proptest::prelude::*;

use super::*;

pub(super) fn grant(id: u64, slots: u64) -> Grant {
    Grant {
        id,
        node: format!("n{id}"),
        address: format!("tcp:h:{id}"),
        index: id as u32,
        key: id,
        bytes: slots * PAGE,
    }
}

pub(super) fn far(extents: u64, slots: u64) -> FarMemory {
    let far = FarMemory::new(State::create().unwrap());
    for id in 0..extents {
        far.add(1, vec![grant(id, slots)]).unwrap();
    }
    far
}

proptest! {
    #[test]
    fn slots_are_held_once_and_come_back(ops in proptest::collection::vec((1u16..40, 0usize..50), 1..80)) {
        let far = far(3, 100);
        let mut held: Vec<Slot> = Vec::new();
        for (most, drop) in ops {
            if let Some(run) = far.take_run(most, 1) {
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
            prop_assert_eq!(far.used_of(1), held.len() as u64);
            prop_assert_eq!(far.free_of(1) + far.used_of(1), 300);
        }
    }
}

#[test]
fn only_unused_extents_retire() {
    let far = far(2, 64);
    let run = far.take_run(1, 1).unwrap();
    let retired = far.retire(|_| 0);
    assert_eq!(retired.len(), 1);
    assert_ne!(retired[0].id, u64::from(run.first.extent()));
    assert!(far.release(run.first));
    assert_eq!(far.retire(|_| 0).len(), 1);
    assert_eq!(far.free_of(1), 0);
}

#[test]
fn silent_and_lost_extents_give_no_slots_and_do_not_count_as_free() {
    let far = far(2, 64);
    let held = write_of(1, &far, 1, |_| true).first;
    far.heard_of_nodes(&[], &[0], &[]);
    assert_eq!(far.free_of(1), 64);
    assert!(!far.is_lost(held) && !far.is_usable(held) && far.any_unreachable());
    assert_eq!(far.take_run(1, 1).unwrap().first.extent(), 1);
    far.heard_of_nodes(&[], &[], &[]);
    assert_eq!(far.free_of(1), 63 + 63);
    assert!(far.is_usable(held) && !far.any_unreachable());
    far.heard_of_nodes(&[0], &[], &[]);
    assert!(far.is_lost(held));
    assert!(far.release(held));
    assert_eq!(far.free_of(1), 63);
    // Nothing names it any more: the lease is told.
    assert_eq!(
        far.retire(|_| 1000)
            .iter()
            .map(|g| g.id)
            .collect::<Vec<_>>(),
        [0]
    );
}

#[test]
fn what_a_lease_held_is_not_given_back_under_the_next() {
    let far = far(1, 64);
    let held = write_of(1, &far, 1, |_| true).first;
    far.lose_all();
    assert!(far.is_lost(held) && far.free_of(1) == 0);
    assert!(far.release(held));
    assert!(far.retire(|_| 0).is_empty());
    // The next extent of the same number within the agent is a fresh one.
    let number = far.add(1, vec![grant(0, 64)]);
    assert_eq!(number, Some(held.extent()));
    assert_eq!(write_of(1, &far, 1, |_| true).first, held);
    assert!(!far.is_lost(held) && far.release(held));
    assert_eq!((far.free_of(1), far.fabrics().as_str()), (64, "tcp"));
}

/// An extent with copies on nodes `n1` and so on, granted under their numbers.
fn with_copies(goal: u8, copies: u64, slots: u64) -> FarMemory {
    let far = FarMemory::new(State::create().unwrap());
    let grants = (1..=copies).map(|id| grant(id, slots)).collect();
    far.add(goal, grants).unwrap();
    far
}

fn write(far: &FarMemory, most: u16, done: impl Fn(u64) -> bool) -> SlotRun {
    write_of(2, far, most, done)
}

fn write_of(goal: u8, far: &FarMemory, most: u16, done: impl Fn(u64) -> bool) -> SlotRun {
    let run = far.take_run(most, goal).unwrap();
    for target in far.targets(run) {
        far.written(run, target.copy, done(target.grant.id));
    }
    run
}

fn nodes_of(far: &FarMemory, slot: Slot) -> Vec<u64> {
    let places = far.places(slot, 1);
    places.iter().map(|place| place.grant.id).collect()
}

/// Carries out all transfers that there are. Returns how many slots went where.
fn transfer_all(far: &FarMemory) -> Vec<(u64, u16)> {
    let all = std::iter::from_fn(|| far.next_transfer(0));
    let all = all.map(|transfer| {
        far.transferred(&transfer, u64::MAX, false);
        (transfer.to.grant.id, transfer.to.len)
    });
    all.collect()
}

#[test]
fn a_copy_that_did_not_confirm_a_write_does_not_count_as_having_it() {
    let far = with_copies(2, 2, 64);
    let both = write(&far, 1, |_| true).first;
    let one = write(&far, 3, |node| node == 1).first;
    assert_eq!(
        (nodes_of(&far, both), nodes_of(&far, one)),
        (vec![1, 2], vec![1])
    );
    // A run that a copy has in part ends where that does.
    assert_eq!(
        far.places(both, 4)
            .iter()
            .map(|it| it.len)
            .collect::<Vec<_>>(),
        [4, 1]
    );
    assert_eq!(far.below_goal(2), 1);
    assert_eq!(transfer_all(&far), [(2, 3)]);
    assert_eq!((nodes_of(&far, one), far.below_goal(2)), (vec![1, 2], 0));
}

#[test]
fn a_lost_node_costs_nothing_while_another_has_the_slot() {
    let far = with_copies(2, 2, 64);
    let (both, one) = (
        write(&far, 1, |_| true).first,
        write(&far, 1, |node| node == 1).first,
    );
    far.heard_of_nodes(&[1], &[], &[]);
    assert!(!far.is_lost(both) && far.is_usable(both) && far.is_lost(one));
    assert_eq!(nodes_of(&far, both), [2]);
    // What is written now goes to the one that is left, and the lost one is given back.
    assert_eq!(nodes_of(&far, write(&far, 1, |_| true).first), [2]);
    assert_eq!(far.let_go(), 1);
    assert_eq!(
        far.retire(|_| 0).iter().map(|it| it.id).collect::<Vec<_>>(),
        [1]
    );
    let wanted = far.wanted_copies(9);
    assert_eq!(
        (wanted[0].number, wanted[0].nodes.as_slice()),
        (0, ["n2".to_owned()].as_slice())
    );
    assert!(!far.add_copy(0, grant(2, 64)), "a second copy on one node");
    assert!(far.add_copy(0, grant(3, 64)));
    assert_eq!(transfer_all(&far), [(3, 1), (3, 1)]);
    // The slot that is lost is in none of them.
    assert_eq!((far.wanted_copies(9), far.below_goal(2)), (vec![], 0));
    assert!(far.is_lost(one) && far.release(one));
}

#[test]
fn a_silent_node_is_given_time_before_its_extents_are_copied_elsewhere() {
    let far = with_copies(2, 2, 64);
    let slot = write(&far, 1, |_| true).first;
    far.heard_of_nodes(&[], &[1], &[]);
    assert!(far.wanted_copies(9).is_empty());
    assert_eq!(nodes_of(&far, slot), [2, 1], "who answers is asked first");
    assert_eq!(far.let_go(), 0);
    far.heard_of_nodes(&[], &[], &[]);
    assert_eq!(far.below_goal(2), 0);
}

#[test]
fn a_drained_copy_goes_when_another_has_all_and_no_sooner() {
    let far = with_copies(2, 2, 64);
    let old = write(&far, 2, |_| true).first;
    let under_way = far.take_run(1, 2).unwrap();
    let targets = far.targets(under_way);
    far.heard_of_nodes(&[], &[], &[1]);
    assert!(far.add_copy(0, grant(3, 64)));
    // What is written from now on does not go there any more.
    assert_eq!(nodes_of(&far, write(&far, 1, |_| true).first), [2, 3]);
    assert_eq!(far.let_go(), 0);
    assert_eq!(transfer_all(&far), [(3, 2)]);
    // A write under way may still make it hold something.
    assert_eq!(far.let_go(), 0);
    for target in targets {
        far.written(under_way, target.copy, target.grant.id == 1);
    }
    assert_eq!(far.let_go(), 0, "it alone has what was under way");
    assert_eq!(transfer_all(&far), [(2, 1), (3, 1)]);
    assert_eq!(far.let_go(), 1);
    assert_eq!(nodes_of(&far, old), [2, 3]);
    assert_eq!(
        far.retire(|_| 0).iter().map(|it| it.id).collect::<Vec<_>>(),
        [1]
    );
}

#[test]
fn a_slot_given_up_while_it_is_copied_is_nobody_elses_until_that_is_over() {
    let far = with_copies(2, 1, 2);
    let slot = write(&far, 1, |_| true).first;
    far.add_copy(0, grant(2, 2));
    let transfer = far.next_transfer(0).unwrap();
    assert!(far.release(slot));
    assert_eq!(far.used_of(2), 0);
    let next = write(&far, 2, |_| true);
    assert_eq!((next.first.page(), next.len, far.free_of(2)), (1, 1, 0));
    assert!(far.take_run(1, 2).is_none());
    far.transferred(&transfer, u64::MAX, false);
    assert_eq!(far.free_of(2), 1);
    assert!(nodes_of(&far, slot).is_empty());
    assert_eq!(nodes_of(&far, write(&far, 1, |_| true).first), [1, 2]);
}

#[test]
fn what_is_written_while_an_extent_is_copied_is_in_the_new_copy_too() {
    let far = with_copies(2, 1, 64);
    let old = write(&far, 4, |_| true);
    let before = far.take_run(1, 2).unwrap();
    let targets_before = far.targets(before);
    far.add_copy(0, grant(2, 64));
    let transfer = far.next_transfer(0).unwrap();
    let during = write(&far, 1, |_| true).first;
    // Its write began before there was a new copy, and ends while others are being copied.
    targets_before
        .iter()
        .for_each(|it| far.written(before, it.copy, true));
    far.transferred(&transfer, u64::MAX, false);
    assert_eq!((transfer.to.len, old.len), (4, 4));
    assert_eq!(transfer_all(&far), [(2, 1)]);
    for slot in [old.first, before.first, during] {
        assert_eq!(nodes_of(&far, slot), [1, 2]);
    }
}

#[test]
fn doubted_bytes_are_copied_anew_where_another_has_them() {
    let far = with_copies(2, 2, 64);
    let slot = write(&far, 1, |_| true).first;
    let copies = far.places(slot, 1);
    assert!(far.doubt(slot, copies[0].copy));
    assert_eq!(nodes_of(&far, slot), [2]);
    assert!(!far.doubt(slot, copies[1].copy), "the last that has them");
    assert_eq!(transfer_all(&far), [(1, 1)]);
    assert_eq!(nodes_of(&far, slot), [1, 2]);
}

#[test]
fn the_next_agent_finds_what_each_copy_holds() {
    let state = State::create().unwrap();
    let far = FarMemory::new(Arc::clone(&state));
    far.add(2, (1..=3).map(|id| grant(id, 128)).collect())
        .unwrap();
    let all = write(&far, 2, |_| true);
    let some = write(&far, 1, |node| node != 2).first;
    let unnamed = write(&far, 1, |_| true).first;
    far.heard_of_nodes(&[3], &[], &[]);
    drop(far);

    let far = FarMemory::left(state);
    assert!(far.is_named(all.first) && far.is_named(some) && !far.is_named(some));
    far.all_is_named();
    assert!([1, 2, 3].into_iter().all(|id| far.knows(id)) && !far.knows(4));
    assert_eq!(
        (nodes_of(&far, all.first), nodes_of(&far, some)),
        (vec![1, 2], vec![1])
    );
    assert!(nodes_of(&far, unnamed).is_empty());
    assert_eq!((far.used_of(2), far.free_of(2)), (2, 126));
    let place = &far.places(some, 1)[0];
    assert_eq!(*place.grant, grant(1, 128));
    assert_eq!(far.references(some), 2);
    // One that is to go back is not taken into use again.
    // Whether it is known is asked while they are handed over, which once waited for itself.
    let grants = [grant(1, 128), grant(4, 128)].into_iter();
    far.needs_not(grants.filter(|grant| !far.knows(grant.id)));
    assert!(far.knows(4));
    assert_eq!(far.retire(|_| 0), [grant(4, 128)]);
    assert!(!far.knows(4));
}

#[test]
fn what_a_dead_mover_sent_is_never_where_another_page_is() {
    let state = State::create().unwrap();
    let far = FarMemory::new(Arc::clone(&state));
    far.add(2, vec![grant(1, 2)]).unwrap();
    let slot = write(&far, 1, |_| true).first;
    far.add_copy(0, grant(2, 2));
    let transfer = far.next_transfer(0).unwrap();
    drop(far);

    let far = FarMemory::left(state);
    assert!(far.is_named(transfer.first) && transfer.first == slot);
    far.all_is_named();
    assert!(far.release(slot));
    assert_eq!(far.take_run(2, 2).map(|run| run.len), Some(1));
    assert!(far.take_run(1, 2).is_none());
    far.end_rests_until(Instant::now() + rests::REST);
    assert_eq!(far.take_run(1, 2).map(|run| run.first), Some(slot));
}

#[derive(Clone, Copy, Debug)]
enum Op {
    /// Writes a run; which of its targets confirm it, by bits.
    Write(u16, u8),
    Release(usize),
    /// Lost, silent and draining nodes, by bits.
    Heard(u8, u8, u8),
    BeginTransfer(u32),
    EndTransfer(bool),
    /// The agent is killed while it writes a run, which some of its targets have confirmed; the next one takes over.
    Restart(u16, u8),
    /// What a dead agent had sent arrives.
    Arrive,
    Grow(u64),
    LetGo,
    Doubt(usize, usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => (1u16..9, any::<u8>()).prop_map(|(most, done)| Op::Write(most, done)),
        4 => (0usize..50).prop_map(Op::Release),
        1 => (0u8..8, 0u8..32, 0u8..32).prop_map(|(lost, silent, draining)| Op::Heard(lost & 1, silent, draining)),
        4 => (0u32..3).prop_map(Op::BeginTransfer),
        4 => any::<bool>().prop_map(Op::EndTransfer),
        2 => (1u64..9).prop_map(Op::Grow),
        2 => Just(Op::LetGo),
        1 => (0usize..50, 0usize..3).prop_map(|(slot, copy)| Op::Doubt(slot, copy)),
        1 => (1u16..9, any::<u8>()).prop_map(|(most, done)| Op::Restart(most, done)),
        1 => Just(Op::Arrive),
    ];
    proptest::collection::vec(op, 1..150)
}

/// What nodes really hold, beside what is believed of them.
struct Model {
    state: Arc<State>,
    far: FarMemory,
    bytes: std::collections::HashMap<(CopyId, Slot), u64>,
    /// Slots in use with their contents.
    held: Vec<(Slot, u64)>,
    writes: u64,
    transfer: Option<(Transfer, Vec<Option<u64>>)>,
    /// What a dead agent sent and nobody knows of.
    sent: Vec<((CopyId, Slot), u64)>,
}

impl Model {
    fn new() -> Self {
        let state = State::create().unwrap();
        Self {
            far: FarMemory::new(Arc::clone(&state)),
            state,
            bytes: Default::default(),
            held: Vec::new(),
            writes: 0,
            transfer: None,
            sent: Vec::new(),
        }
    }

    /// The copies by the grants and extents that they are.
    fn copies(&self) -> std::collections::HashMap<(u32, u64), CopyId> {
        let extents = (0..2).filter_map(|number| self.far.extent(number));
        let copies = extents.flat_map(|extent| {
            let parts = extent.lock();
            let of = |copy: &Copy| ((extent.number, copy.grant.id), copy.id);
            parts.copies.iter().map(of).collect::<Vec<_>>()
        });
        copies.collect()
    }

    fn restart(&mut self, most: u16, done: u8) {
        self.writes += 1;
        let under_way = self.far.take_run(most, 2);
        if let Some(run) = under_way {
            for (at, target) in self.far.targets(run).iter().enumerate() {
                let slots = Self::slots(run.first, run.len);
                let bytes = slots.map(|slot| ((target.copy, slot), self.writes));
                if done >> at & 1 == 1 {
                    self.far.written(run, target.copy, true);
                    self.bytes.extend(bytes);
                } else {
                    self.sent.extend(bytes);
                }
            }
        }
        if let Some((transfer, read)) = self.transfer.take() {
            let slots = Self::slots(transfer.first, transfer.to.len);
            let read = slots.zip(read).map(|(slot, it)| (slot, it.unwrap()));
            let sent = read.map(|(slot, bytes)| ((transfer.to.copy, slot), bytes));
            self.sent.extend(sent);
        }
        let before = self.copies();
        self.far = FarMemory::left(Arc::clone(&self.state));
        for (slot, _) in &self.held {
            assert!(self.far.is_named(*slot), "{slot:?} is free");
        }
        for slot in under_way
            .iter()
            .flat_map(|run| Self::slots(run.first, run.len))
        {
            self.far.lay_to_rest(slot);
        }
        self.far.all_is_named();
        let after = self.copies();
        let known: std::collections::HashMap<CopyId, CopyId> = after
            .iter()
            .map(|(grant, id)| (before[grant], *id))
            .collect();
        assert_eq!(known.len(), before.len());
        let again = |((copy, slot), bytes)| Some(((*known.get(&copy)?, slot), bytes));
        self.bytes = self.bytes.drain().filter_map(again).collect();
        self.sent = self.sent.drain(..).filter_map(again).collect();
    }

    fn slots(first: Slot, len: u16) -> impl Iterator<Item = Slot> {
        std::iter::successors(Some(first), |slot| slot.next()).take(len.into())
    }

    fn not_lost(&self) -> Vec<Slot> {
        let slots = self.held.iter().map(|(slot, _)| *slot);
        slots.filter(|slot| !self.far.is_lost(*slot)).collect()
    }

    fn apply(&mut self, op: Op) {
        let safe = self.not_lost();
        let mut may_lose = false;
        match op {
            Op::Write(most, done) => self.write(most, done),
            Op::Release(at) if at < self.held.len() => {
                let (slot, _) = self.held.swap_remove(at);
                assert!(self.far.release(slot));
                return;
            }
            Op::Heard(lost, silent, draining) => {
                let of = |bits: u8| {
                    (0..8)
                        .filter(|bit| bits >> bit & 1 == 1)
                        .collect::<Vec<u64>>()
                };
                self.far
                    .heard_of_nodes(&of(lost << 1), &of(silent), &of(draining));
                may_lose = true;
            }
            Op::BeginTransfer(from) if self.transfer.is_none() => {
                let Some(transfer) = self.far.next_transfer(from) else {
                    return;
                };
                let read = Self::slots(transfer.first, transfer.from.len);
                let read = read.map(|slot| self.bytes.get(&(transfer.from.copy, slot)).copied());
                self.transfer = Some((transfer.clone(), read.collect()));
            }
            Op::EndTransfer(failed) => {
                let Some((transfer, read)) = self.transfer.take() else {
                    return;
                };
                for (slot, bytes) in Self::slots(transfer.first, transfer.to.len).zip(read) {
                    self.bytes.insert((transfer.to.copy, slot), bytes.unwrap());
                }
                let good = if failed { 0 } else { u64::MAX };
                self.far.transferred(&transfer, good, failed);
            }
            Op::Grow(node) => {
                let wanted = self.far.wanted_copies(1);
                if let Some(wanted) = wanted.first() {
                    self.far.add_copy(wanted.number, grant(node, 16));
                }
            }
            Op::LetGo => drop(self.far.let_go()),
            Op::Restart(most, done) => self.restart(most, done),
            Op::Arrive => {
                self.bytes.extend(self.sent.drain(..));
                self.far.end_rests_until(Instant::now() + rests::REST);
            }
            Op::Doubt(slot, copy) => {
                let Some((slot, _)) = self.held.get(slot) else {
                    return;
                };
                if let Some(place) = self.far.places(*slot, 1).get(copy) {
                    self.far.doubt(*slot, place.copy);
                }
            }
            Op::Release(_) | Op::BeginTransfer(_) => {}
        }
        if !may_lose {
            for slot in safe {
                assert!(!self.far.is_lost(slot), "{slot:?} was lost for nothing");
            }
        }
    }

    fn write(&mut self, most: u16, done: u8) {
        let Some(run) = self.far.take_run(most, 2) else {
            return;
        };
        for slot in Self::slots(run.first, run.len) {
            assert!(
                self.held.iter().all(|(held, _)| *held != slot),
                "held twice"
            );
        }
        self.writes += 1;
        let mut any = false;
        for (at, target) in self.far.targets(run).iter().enumerate() {
            let done = done >> at & 1 == 1;
            // One that failed may have been carried out or not.
            if done || self.writes.is_multiple_of(2) {
                let slots = Self::slots(run.first, run.len);
                self.bytes
                    .extend(slots.map(|slot| ((target.copy, slot), self.writes)));
            }
            self.far.written(run, target.copy, done);
            any |= done;
        }
        for slot in Self::slots(run.first, run.len) {
            match any {
                true => self.held.push((slot, self.writes)),
                false => assert!(self.far.release(slot)),
            }
        }
    }

    fn check(&self) {
        for (slot, contents) in &self.held {
            for place in self.far.places(*slot, 1) {
                assert_eq!(self.bytes.get(&(place.copy, *slot)), Some(contents));
            }
        }
        assert_eq!(self.far.used_of(2), self.held.len() as u64);
    }
}

proptest! {
    #[test]
    fn no_copy_counts_for_bytes_that_it_does_not_hold(ops in ops()) {
        let mut model = Model::new();
        for first in [1, 3] {
            model.far.add(2, vec![grant(first, 16), grant(first + 1, 16)]).unwrap();
        }
        for op in ops {
            model.apply(op);
            model.check();
        }
        // In the end nothing is left over.
        if let Some((transfer, _)) = model.transfer.take() {
            model.far.transferred(&transfer, 0, false);
        }
        for (slot, _) in std::mem::take(&mut model.held) {
            prop_assert!(model.far.release(slot));
        }
        model.far.heard_of_nodes(&[], &[], &[]);
        model.far.end_rests_until(Instant::now() + rests::REST);
        model.far.retire(|_| 0);
        prop_assert!(model.far.extent(0).is_none() && model.far.extent(1).is_none());
        prop_assert_eq!((model.far.used_of(2), model.far.free_of(2)), (0, 0));
    }
}
