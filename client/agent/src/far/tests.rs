//! Slots, copies, and what becomes of both.

use proptest::prelude::*;

use super::*;

fn grant(id: u64, slots: u64) -> Grant {
    Grant {
        id,
        node: format!("n{id}"),
        address: format!("tcp:h:{id}"),
        index: id as u32,
        key: id,
        bytes: slots * PAGE,
    }
}

fn far(extents: u64, slots: u64) -> FarMemory {
    let far = FarMemory::default();
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
    let held = far.take_run(1, 1).unwrap().first;
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
    let held = far.take_run(1, 1).unwrap().first;
    far.lose_all();
    assert!(far.is_lost(held) && far.free_of(1) == 0);
    assert!(far.release(held));
    assert!(far.retire(|_| 0).is_empty());
    // The next extent of the same number within the agent is a fresh one.
    let number = far.add(1, vec![grant(0, 64)]);
    assert_eq!(number, Some(held.extent()));
    assert!(!far.is_lost(held));
    assert_eq!((far.free_of(1), far.fabrics().as_str()), (64, "tcp"));
}
