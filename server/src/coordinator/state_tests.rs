//! Random histories against simulated nodes: messages are lost, repeated and late, nodes die and come back empty, the
//! coordinator restarts from what it stored. After every step everything that must hold is checked.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use farpage_proto::lease::{ExtentGrant, GrantRequest, LeaseRequest};
use farpage_proto::node::{ControlToken, NodeRegistration};
use farpage_proto::*;
use proptest::prelude::*;

use super::clock::Millis;
use super::error::{GrantError, HeartbeatError, RegisterError};
use super::grant::Plan;
use super::record::{Phase, decode};
use super::state::{NodeOrder, OrderKind, State, Timing};

const EXTENT: u64 = 1 << 20;
const TIMING: Timing = Timing {
    lease_ttl: Duration::from_secs(10),
    node_timeout: Duration::from_secs(3),
    revoke_retry: Duration::from_secs(1),
};

/// What a node process knows, by the rules of `node/ledger.rs`.
#[derive(Clone, Debug, Default)]
struct FakeNode {
    life: u64,
    up: bool,
    last: BTreeMap<u32, u64>,
    granted: BTreeMap<u32, (u64, AccessKey)>,
}

impl FakeNode {
    fn obey(&mut self, order: &NodeOrder) -> bool {
        let (last, epoch) = (self.last.get(&order.index).copied().unwrap_or(0), order.epoch.get());
        match order.kind {
            OrderKind::Grant(key) => {
                if self.granted.get(&order.index) == Some(&(epoch, key)) {
                    return true;
                }
                if epoch <= last || self.granted.contains_key(&order.index) {
                    return false;
                }
                self.granted.insert(order.index, (epoch, key));
            }
            OrderKind::Revoke => {
                if epoch < last {
                    return !self.granted.contains_key(&order.index);
                }
                self.granted.remove(&order.index);
            }
        }
        self.last.insert(order.index, last.max(epoch));
        true
    }
}

#[derive(Clone, Debug)]
enum Step {
    Open,
    Renew(usize),
    Close(usize),
    Grant { lease: usize, count: u32, request: u64, lost: Vec<bool> },
    Release { lease: usize, which: Vec<usize> },
    Revokes { lost: Vec<bool> },
    Late(usize),
    LateAnswer(usize),
    Pass(u64),
    Beat(usize),
    Kill(usize),
    Start(usize),
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let lost = || prop::collection::vec(prop::bool::weighted(0.2), 8);
    let step = prop_oneof![
        2 => Just(Step::Open),
        3 => (0usize..4).prop_map(Step::Renew),
        1 => (0usize..4).prop_map(Step::Close),
        6 => (0usize..4, 1u32..6, 0u64..5, lost())
            .prop_map(|(lease, count, request, lost)| Step::Grant { lease, count, request, lost }),
        4 => (0usize..4, prop::collection::vec(0usize..8, 0..4)).prop_map(|(lease, which)| Step::Release { lease, which }),
        5 => lost().prop_map(|lost| Step::Revokes { lost }),
        1 => (0usize..64).prop_map(Step::Late),
        2 => (0usize..64).prop_map(Step::LateAnswer),
        3 => (1u64..5000).prop_map(Step::Pass),
        4 => (0usize..3).prop_map(Step::Beat),
        1 => (0usize..3).prop_map(Step::Kill),
        2 => (0usize..3).prop_map(Step::Start),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..80)
}

struct World {
    state: State,
    stored: BTreeMap<String, Vec<u8>>,
    now: u64,
    nodes: Vec<FakeNode>,
    leases: Vec<LeaseId>,
    /// What agents were told: extent to grant.
    told: BTreeMap<LeaseId, BTreeMap<ExtentId, ExtentGrant>>,
    sent: Vec<NodeOrder>,
    revoked: Vec<(ExtentId, Epoch)>,
    epochs: BTreeSet<u64>,
    drawn: u64,
}

impl World {
    fn new() -> Self {
        Self {
            state: State::load(Vec::new(), TIMING, Millis(0)),
            stored: BTreeMap::new(),
            now: 0,
            nodes: vec![FakeNode::default(); 3],
            leases: Vec::new(),
            told: BTreeMap::new(),
            sent: Vec::new(),
            revoked: Vec::new(),
            epochs: BTreeSet::new(),
            drawn: 0,
        }
    }

    fn draw(&mut self) -> u64 {
        self.drawn += 1;
        self.drawn
    }

    fn commit(&mut self) {
        for (key, value) in self.state.take_changes().unwrap() {
            match value {
                Some(value) => drop(self.stored.insert(key, value)),
                None => drop(self.stored.remove(&key)),
            }
        }
    }

    fn lease(&self, at: usize) -> Option<LeaseId> {
        self.leases.get(at % self.leases.len().max(1)).copied()
    }

    fn deliver(&mut self, order: &NodeOrder) -> bool {
        self.sent.push(order.clone());
        let at: usize = order.node.as_str()[1..].parse().unwrap();
        let node = &mut self.nodes[at];
        // Another life knows another token.
        let done = node.up && order.token.0[0] == node.life as u8 && node.obey(order);
        if done && order.kind == OrderKind::Revoke {
            self.revoked.push((order.extent, order.epoch));
        }
        done
    }

    fn step(&mut self, step: Step) {
        let now = Millis(self.now);
        match step {
            Step::Open => {
                let id = LeaseId::new(self.draw()).unwrap();
                let request = LeaseRequest {
                    agent: AgentId::new("agent").unwrap(),
                    host: HostName::new("host").unwrap(),
                    tenant: Tenant::default(),
                };
                self.state.open_lease(now, id, request).unwrap();
                self.leases.push(id);
                self.told.insert(id, BTreeMap::new());
            }
            Step::Renew(at) => {
                let Some(id) = self.lease(at) else { return };
                match self.state.renew_lease(now, id) {
                    Ok(renewal) => {
                        for extent in renewal.lost {
                            self.told.get_mut(&id).unwrap().remove(&extent);
                        }
                    }
                    Err(_) => drop(self.told.insert(id, BTreeMap::new())),
                }
            }
            Step::Close(at) => {
                let Some(id) = self.lease(at) else { return };
                self.state.end_lease(now, id);
                self.told.insert(id, BTreeMap::new());
            }
            Step::Grant { lease, count, request, lost } => self.grant(lease, count, request, &lost),
            Step::Release { lease, which } => {
                let Some(id) = self.lease(lease) else { return };
                let held: Vec<ExtentId> = self.told[&id].keys().copied().collect();
                let give: Vec<ExtentId> = which.iter().filter_map(|at| held.get(*at).copied()).collect();
                if self.state.release(now, id, &give).is_ok() {
                    give.iter().for_each(|extent| drop(self.told.get_mut(&id).unwrap().remove(extent)));
                }
            }
            Step::Revokes { lost } => {
                let orders = self.state.revokes_due(now, 8);
                self.commit();
                for (order, lost) in orders.iter().zip(lost) {
                    if self.deliver(order) && !lost {
                        self.state.revoke_confirmed(order.extent, order.epoch);
                    }
                }
            }
            // The answer to a revocation, when nobody expects it any more.
            Step::LateAnswer(at) => {
                if let Some(&(extent, epoch)) = self.revoked.get(at) {
                    self.state.revoke_confirmed(extent, epoch);
                }
            }
            // An old message arrives again; nobody waits for its answer.
            Step::Late(at) => {
                if let Some(order) = self.sent.get(at).cloned() {
                    self.deliver(&order);
                }
            }
            Step::Pass(ms) => {
                self.now += ms;
                self.state.tick(Millis(self.now));
            }
            Step::Beat(at) => self.beat(at),
            Step::Kill(at) => self.nodes[at].up = false,
            Step::Start(at) => {
                if !self.nodes[at].up {
                    let life = self.draw() % 250 + 1;
                    self.nodes[at] = FakeNode { life, up: true, ..FakeNode::default() };
                    self.register(at);
                }
            }
            Step::Restart => {
                self.commit();
                let records = self.stored.iter().map(|(key, value)| decode(key, value).unwrap()).collect();
                let before: Vec<_> = self.leases.iter().map(|id| self.state.list_grants(*id, None)).collect();
                self.state = State::load(records, TIMING, now);
                let after: Vec<_> = self.leases.iter().map(|id| self.state.list_grants(*id, None)).collect();
                assert_eq!(before, after, "a restart changes no grant");
            }
        }
        self.commit();
    }

    fn registration(&self, at: usize) -> NodeRegistration {
        let node = &self.nodes[at];
        NodeRegistration {
            id: NodeId::new(format!("n{at}")).unwrap(),
            incarnation: Incarnation::new(node.life).unwrap(),
            capacity: ByteCount(EXTENT * 4),
            extent_bytes: ByteCount(EXTENT),
            labels: BTreeMap::new(),
            data_addresses: vec![format!("tcp:host:{}", 100 + at).parse().unwrap()],
            control_url: format!("http://host:{}", 200 + at).parse().unwrap(),
            control_token: ControlToken([node.life as u8; 16]),
            last_epoch: node.last.values().copied().max().unwrap_or(0),
            granted: node
                .granted
                .iter()
                .map(|(index, (epoch, _))| (*index, Epoch::new(*epoch).unwrap()))
                .collect(),
        }
    }

    fn register(&mut self, at: usize) {
        let node = self.registration(at);
        match self.state.register_node(Millis(self.now), &node) {
            Ok(_) => {}
            Err(RegisterError::IdTaken { holder }) => {
                // The rim probes, and finds that the holder's process is gone.
                assert_ne!(holder.incarnation, node.incarnation);
                self.state.node_gone(&holder.id, holder.incarnation);
                self.state.register_node(Millis(self.now), &node).unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn beat(&mut self, at: usize) {
        if !self.nodes[at].up {
            return;
        }
        let node = self.registration(at);
        match self.state.heartbeat(Millis(self.now), &node.id, node.incarnation) {
            Ok(()) => {}
            Err(HeartbeatError::Unknown(_)) => self.register(at),
            Err(error) => panic!("{error}"),
        }
    }

    fn grant(&mut self, lease: usize, count: u32, request: u64, lost: &[bool]) {
        let now = Millis(self.now);
        let Some(lease) = self.lease(lease) else { return };
        let request = GrantRequest { lease, count, fabric: None, request: RequestId::new(request).ok() };
        let keys: Vec<u64> = (0..count).map(|_| self.draw()).collect();
        match self.state.plan_grant(&request, true, &keys, &BTreeSet::new()) {
            Ok(Plan::Ask(orders)) => {
                assert_eq!(orders.len(), count as usize);
                self.commit();
                for (order, lost) in orders.iter().zip(lost.iter().chain(std::iter::repeat(&false))) {
                    assert!(
                        self.epochs.last().is_none_or(|last| *last < order.epoch.get()),
                        "epochs only grow"
                    );
                    self.epochs.insert(order.epoch.get());
                    if self.deliver(order) && !lost {
                        let grant = self.state.grant_confirmed(order.extent, order.epoch, None).unwrap();
                        self.commit();
                        let others = self.told.iter().filter(|(id, _)| **id != lease);
                        // An agent whose lease has ended may not know yet; its key is void, see `check`.
                        for (id, held) in others {
                            let live = self.state.leases.0.contains_key(id);
                            assert!(
                                !live || !held.contains_key(&grant.extent),
                                "two owners of {:?}",
                                grant.extent
                            );
                        }
                        self.told.get_mut(&lease).unwrap().insert(grant.extent, grant);
                    } else {
                        self.state.grant_failed(now, order.extent, order.epoch);
                    }
                }
            }
            Ok(Plan::Repeat(grants)) => {
                for grant in grants {
                    self.told.get_mut(&lease).unwrap().insert(grant.extent, grant);
                }
            }
            Err(GrantError::Exhausted { free_extents, .. }) => assert!(free_extents < count),
            Err(GrantError::NoLease(_)) => drop(self.told.insert(lease, BTreeMap::new())),
            Err(error) => panic!("{error}"),
        }
    }

    fn check(&self) {
        let state = &self.state;
        for (id, extent) in &state.extents {
            let node = state.nodes.0.get(&extent.node);
            match extent.phase {
                Phase::Lost { lease } => assert!(state.leases.0[&lease].extents.contains(id)),
                phase => {
                    let node = node.expect("an extent that is not lost has a node");
                    assert_eq!(node.extent_id(extent.index), *id);
                    assert!(!node.free.contains(&extent.index), "free and held");
                    match phase.lease() {
                        Some(lease) => assert!(state.leases.0[&lease].extents.contains(id)),
                        None => assert!(state.revoking.contains_key(id)),
                    }
                }
            }
        }
        for (id, lease) in &state.leases.0 {
            for extent in &lease.extents {
                assert_eq!(state.extents[extent].phase.lease(), Some(*id));
            }
        }
        for extent in state.revoking.keys() {
            assert_eq!(state.extents[extent].phase, Phase::Revoking);
        }

        let totals = state.totals();
        let free: u64 = state.nodes.0.values().map(|node| node.free.len() as u64 * EXTENT).sum();
        assert_eq!(totals.used + totals.pending + free, totals.capacity, "capacity adds up");

        // Against the nodes' own view: what the coordinator thinks free is closed and scrubbed there.
        for (at, fake) in self.nodes.iter().enumerate() {
            let Some(node) = state.nodes.0.get(&NodeId::new(format!("n{at}")).unwrap()) else { continue };
            if node.record.incarnation.get() != fake.life {
                continue;
            }
            for index in &node.free {
                assert!(!fake.granted.contains_key(index), "n{at}/{index} is free here and granted there");
            }
            for (index, (epoch, key)) in &fake.granted {
                let extent = &state.extents[&node.extent_id(*index)];
                if let Phase::Granted { key: known, .. } = extent.phase {
                    assert_eq!((extent.epoch.get(), known), (*epoch, *key));
                }
            }
        }
    }
}

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
    world.step(Step::Grant { lease: 0, count: 2, request: 7, lost: vec![] });
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
    assert_eq!(lost, grants.iter().map(|grant| grant.extent).collect::<Vec<_>>());
    world.step(Step::Grant { lease: 0, count: 4, request: 0, lost: vec![] });
    let new: BTreeSet<_> =
        world.state.list_grants(lease, None).unwrap().iter().map(|grant| grant.extent).collect();
    assert!(lost.iter().all(|extent| !new.contains(extent)), "an id names one memory only");
    assert_eq!(world.state.release(Millis(0), lease, &lost), Ok(2));
    assert!(world.state.renew_lease(Millis(0), lease).unwrap().lost.is_empty());
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
    let request = GrantRequest { lease, count: 2, fabric: None, request: RequestId::new(7).ok() };
    let plan = world.state.plan_grant(&request, true, &[1, 2], &BTreeSet::new()).unwrap();
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
    world.step(Step::Revokes { lost: Vec::from([false; 8]) });
    assert_eq!(world.state.totals().pending, 0);
    world.leases.clear();
    world.epochs.clear();
    world.step(Step::Open);
    world.step(Step::Grant { lease: 0, count: 1, request: 0, lost: vec![] });
    assert!(world.epochs.iter().all(|epoch| *epoch > highest.get()));
}

#[test]
fn standing_still_expires_nobody() {
    let (mut world, lease, _) = world_with_grant();
    world.step(Step::Pass(60_000));
    assert!(world.state.renew_lease(Millis(world.now), lease).is_ok());
}
