//! Random histories against simulated nodes: messages are lost, repeated and late, nodes die and come back empty, the
//! coordinator restarts from what it stored. After every step everything that must hold is checked.

mod world;

use std::collections::BTreeSet;

use farpage_proto::lease::{ExtentGrant, GrantRequest};
use farpage_proto::*;
use proptest::prelude::*;

use super::clock::Millis;
use super::error::RegisterError;
use super::grant::Plan;
use super::state::State;
use world::{EXTENT, Step, TIMING, World, steps};

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_what_must_hold_holds(steps in steps()) {
        let mut world = World::new();
        (0..3).for_each(|at| world.step(Step::Start(at)));
        for step in steps {
            world.step(step);
            world.check();
        }
        // In the end everything comes back: leases expire, nodes live, revocations are confirmed.
        for at in 0..3 {
            world.step(Step::Start(at));
            world.step(Step::Beat(at));
        }
        for _ in 0..30 {
            (0..3).for_each(|at| world.step(Step::Beat(at)));
            world.step(Step::Pass(1100));
            world.step(Step::Revokes { lost: Vec::from([false; 8]) });
            world.check();
        }
        prop_assert_eq!(world.state.extents.len(), 0);
        prop_assert_eq!(world.state.leases.0.len(), 0);
        let free: usize = world.state.nodes.0.values().map(|node| node.free.len()).sum();
        prop_assert_eq!(free, 12);
    }
}

fn world_with_grant() -> (World, LeaseId, Vec<ExtentGrant>) {
    let mut world = World::new();
    world.step(Step::Start(0));
    world.step(Step::Open);
    let lease = world.leases[0];
    world.step(Step::Grant {
        lease: 0,
        count: 2,
        copies: 1,
        request: 7,
        lost: vec![],
    });
    let grants = world.state.list_grants(lease, None).unwrap();
    assert_eq!(grants.len(), 2);
    (world, lease, grants)
}

#[test]
fn a_node_that_comes_back_empty_loses_its_extents_by_name() {
    let (mut world, lease, grants) = world_with_grant();
    world.step(Step::Kill(0));
    world.step(Step::Start(0));
    let lost = world.state.renew_lease(Millis(0), lease).unwrap().lost;
    assert_eq!(
        lost,
        grants.iter().map(|grant| grant.extent).collect::<Vec<_>>()
    );
    world.step(Step::Grant {
        lease: 0,
        count: 4,
        copies: 1,
        request: 0,
        lost: vec![],
    });
    let new: BTreeSet<_> = world
        .state
        .list_grants(lease, None)
        .unwrap()
        .iter()
        .map(|grant| grant.extent)
        .collect();
    assert!(
        lost.iter().all(|extent| !new.contains(extent)),
        "an id names one memory only"
    );
    assert_eq!(world.state.release(Millis(0), lease, &lost), Ok(2));
    assert!(
        world
            .state
            .renew_lease(Millis(0), lease)
            .unwrap()
            .lost
            .is_empty()
    );
}

#[test]
fn a_silent_node_is_unreachable_not_lost() {
    let (mut world, lease, grants) = world_with_grant();
    for _ in 0..4 {
        world.step(Step::Pass(1000));
    }
    let renewal = world.state.renew_lease(Millis(world.now), lease).unwrap();
    assert_eq!((renewal.lost.len(), renewal.unreachable.len()), (0, 2));
    world.step(Step::Beat(0));
    let renewal = world.state.renew_lease(Millis(world.now), lease).unwrap();
    assert_eq!((renewal.lost.len(), renewal.unreachable.len()), (0, 0));
    assert_eq!(world.state.list_grants(lease, None).unwrap(), grants);
}

#[test]
fn repeating_a_request_returns_the_same_grants() {
    let (mut world, lease, grants) = world_with_grant();
    let request = GrantRequest {
        lease,
        count: 2,
        copies: 1,
        extent_bytes: None,
        avoid: Vec::new(),
        fabric: None,
        request: RequestId::new(7).ok(),
    };
    let plan = world
        .state
        .plan_grant(&request, true, &[1, 2], &BTreeSet::new())
        .unwrap();
    assert_eq!(plan, Plan::Repeat(grants));
}

#[test]
fn a_live_id_and_a_taken_address_name_their_holder() {
    let (mut world, ..) = world_with_grant();
    let mut twin = world.registration(0);
    twin.incarnation = Incarnation::new(999).unwrap();
    let error = world.state.register_node(Millis(5), &twin).unwrap_err();
    assert!(matches!(error, RegisterError::IdTaken { .. }));
    assert!(error.to_string().contains("http://host:200"), "{error}");
    twin.id = NodeId::new("other").unwrap();
    let error = world.state.register_node(Millis(5), &twin).unwrap_err();
    assert!(matches!(error, RegisterError::AddressTaken { .. }));
    assert!(error.to_string().contains("`n0`"), "{error}");
}

#[test]
fn a_coordinator_that_forgot_everything_revokes_what_nodes_still_grant() {
    let (mut world, _, grants) = world_with_grant();
    let highest = grants.iter().map(|grant| grant.epoch).max().unwrap();
    world.state = State::load(Vec::new(), TIMING, Millis(0));
    world.stored.clear();
    world.beat(0);
    world.check();
    assert_eq!(world.state.totals().pending, 2 * EXTENT);
    world.step(Step::Revokes {
        lost: Vec::from([false; 8]),
    });
    assert_eq!(world.state.totals().pending, 0);
    world.leases.clear();
    world.epochs.clear();
    world.step(Step::Open);
    world.step(Step::Grant {
        lease: 0,
        count: 1,
        copies: 1,
        request: 0,
        lost: vec![],
    });
    assert!(world.epochs.iter().all(|epoch| *epoch > highest.get()));
}

#[test]
fn standing_still_expires_nobody() {
    let (mut world, lease, _) = world_with_grant();
    world.step(Step::Pass(60_000));
    assert!(world.state.renew_lease(Millis(world.now), lease).is_ok());
}

#[test]
fn copies_of_an_extent_lie_on_different_nodes_and_a_repetition_groups_them_alike() {
    let mut world = World::new();
    (0..3).for_each(|at| world.step(Step::Start(at)));
    world.step(Step::Open);
    let request = GrantRequest {
        lease: world.leases[0],
        count: 3,
        copies: 2,
        extent_bytes: None,
        avoid: Vec::new(),
        fabric: None,
        request: RequestId::new(7).ok(),
    };
    let keys: Vec<u64> = (1..=6).collect();
    let none = BTreeSet::new();
    let Plan::Ask(orders) = world
        .state
        .plan_grant(&request, true, &keys, &none)
        .unwrap()
    else {
        panic!("a first request is no repetition");
    };
    let grants: Vec<_> = orders
        .iter()
        .zip(0..)
        .map(|(order, place)| {
            let set = place / 2;
            let granted = world
                .state
                .grant_confirmed(order.extent, order.epoch, None, set);
            granted.unwrap()
        })
        .collect();
    for pair in grants.chunks(2) {
        assert_ne!(pair[0].node, pair[1].node);
    }
    let again = world.state.plan_grant(&request, true, &keys, &none);
    assert_eq!(again.unwrap(), Plan::Repeat(grants.clone()));
    // A further copy of the first extent comes from where it has none.
    let third = GrantRequest {
        count: 1,
        copies: 1,
        extent_bytes: Some(ByteCount(EXTENT)),
        avoid: grants[..2].iter().map(|grant| grant.node.clone()).collect(),
        request: None,
        ..request
    };
    let Plan::Ask(orders) = world.state.plan_grant(&third, true, &keys, &none).unwrap() else {
        panic!("another request is no repetition");
    };
    assert!(!third.avoid.contains(&orders[0].node));
}

#[test]
fn a_node_that_is_drained_is_granted_nothing_and_says_what_is_left() {
    let (mut world, lease, grants) = world_with_grant();
    let n0 = NodeId::new("n0").unwrap();
    let left = world.state.drain(&n0, false).unwrap();
    assert_eq!((left.held_extents, left.free_elsewhere), (2, 0));
    assert_eq!(left.agents, ["agent"]);
    let renewal = world.state.renew_lease(Millis(0), lease).unwrap();
    let ids: Vec<_> = grants.iter().map(|grant| grant.extent).collect();
    assert_eq!(renewal.draining, ids);
    // It stays so over a restart of the coordinator, and under the node's next incarnation.
    world.step(Step::Restart);
    world.step(Step::Kill(0));
    world.step(Step::Start(0));
    assert!(world.state.nodes.0[&n0].record.draining);
    let grant = |world: &mut World, lost: usize| {
        world.step(Step::Grant {
            lease: 0,
            count: 1,
            copies: 1,
            request: 0,
            lost: vec![],
        });
        assert_eq!(world.state.list_grants(lease, None).unwrap().len(), lost);
    };
    grant(&mut world, 0);
    world.step(Step::Start(1));
    grant(&mut world, 1);
    assert_eq!(
        world.state.list_grants(lease, None).unwrap()[0]
            .node
            .as_str(),
        "n1"
    );
    assert_eq!(world.state.drain(&n0, true).unwrap().held_extents, 0);
    assert!(!world.state.nodes.0[&n0].record.draining);
    assert!(
        world
            .state
            .drain(&NodeId::new("other").unwrap(), false)
            .is_err()
    );
}

#[test]
fn an_extent_that_is_granted_is_nobody_elses() {
    let (mut world, lease, grants) = world_with_grant();
    world.step(Step::Open);
    let other = world.leases[1];
    // All that is left, and then nothing.
    for held in [2, 2] {
        world.step(Step::Grant {
            lease: 1,
            count: 2,
            copies: 1,
            request: 0,
            lost: vec![],
        });
        assert_eq!(world.state.list_grants(other, None).unwrap().len(), held);
    }
    assert_eq!(world.state.list_grants(lease, None).unwrap(), grants);
    // Nor can the other give it back.
    assert_eq!(
        world.state.release(Millis(0), other, &[grants[0].extent]),
        Ok(0)
    );
    assert_eq!(world.state.list_grants(lease, None).unwrap(), grants);
}
