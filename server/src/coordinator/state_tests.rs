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
