//! Simulated nodes, agents and messages around a coordinator's state, and everything that must hold.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use farpage_proto::lease::{ExtentGrant, GrantRequest, LeaseRequest};
use farpage_proto::node::{ControlToken, NodeRegistration};
use farpage_proto::*;
use proptest::prelude::*;

use super::super::clock::Millis;
use super::super::error::{GrantError, HeartbeatError, RegisterError};
use super::super::grant::Plan;
use super::super::record::{Phase, decode};
use super::super::state::{NodeOrder, OrderKind, State, Timing};

pub(super) const EXTENT: u64 = 1 << 20;
pub(super) const TIMING: Timing = Timing {
    lease_ttl: Duration::from_secs(10),
    node_timeout: Duration::from_secs(3),
    revoke_retry: Duration::from_secs(1),
};

/// What a node process knows, by the rules of `node/ledger.rs`.
#[derive(Clone, Debug, Default)]
pub(super) struct FakeNode {
    life: u64,
    up: bool,
    last: BTreeMap<u32, u64>,
    granted: BTreeMap<u32, (u64, AccessKey)>,
}

impl FakeNode {
    fn obey(&mut self, order: &NodeOrder) -> bool {
        let (last, epoch) = (
            self.last.get(&order.index).copied().unwrap_or(0),
            order.epoch.get(),
        );
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
pub(super) enum Step {
    Open,
    Renew(usize),
    Close(usize),
    Grant {
        lease: usize,
        count: u32,
        copies: u32,
        request: u64,
        lost: Vec<bool>,
    },
    Drain(usize, bool),
    Release {
        lease: usize,
        which: Vec<usize>,
    },
    Revokes {
        lost: Vec<bool>,
    },
    Late(usize),
    LateAnswer(usize),
    Pass(u64),
    Beat(usize),
    Kill(usize),
    Start(usize),
    Restart,
    /// The coordinator dies, or the lease ends, after the nodes were asked and before their answers are noted.
    Interrupted {
        lease: usize,
        count: u32,
        dies: bool,
    },
}

pub(super) fn steps() -> impl Strategy<Value = Vec<Step>> {
    let lost = || prop::collection::vec(prop::bool::weighted(0.2), 8);
    let step = prop_oneof![
        2 => Just(Step::Open),
        3 => (0usize..4).prop_map(Step::Renew),
        1 => (0usize..4).prop_map(Step::Close),
        6 => (0usize..4, 1u32..6, 1u32..4, 0u64..5, lost())
            .prop_map(|(lease, count, copies, request, lost)| Step::Grant { lease, count, copies, request, lost }),
        2 => (0usize..3, any::<bool>()).prop_map(|(at, undo)| Step::Drain(at, undo)),
        4 => (0usize..4, prop::collection::vec(0usize..8, 0..4)).prop_map(|(lease, which)| Step::Release { lease, which }),
        5 => lost().prop_map(|lost| Step::Revokes { lost }),
        1 => (0usize..64).prop_map(Step::Late),
        2 => (0usize..64).prop_map(Step::LateAnswer),
        3 => (1u64..5000).prop_map(Step::Pass),
        4 => (0usize..3).prop_map(Step::Beat),
        1 => (0usize..3).prop_map(Step::Kill),
        2 => (0usize..3).prop_map(Step::Start),
        1 => Just(Step::Restart),
        2 => (0usize..4, 1u32..4, any::<bool>())
            .prop_map(|(lease, count, dies)| Step::Interrupted { lease, count, dies }),
    ];
    prop::collection::vec(step, 1..80)
}

fn node_id(at: usize) -> NodeId {
    NodeId::new(format!("n{at}")).unwrap()
}

pub(super) struct World {
    pub(super) state: State,
    pub(super) stored: BTreeMap<String, Vec<u8>>,
    pub(super) now: u64,
    pub(super) nodes: Vec<FakeNode>,
    pub(super) leases: Vec<LeaseId>,
    /// What agents were told: extent to grant.
    pub(super) told: BTreeMap<LeaseId, BTreeMap<ExtentId, ExtentGrant>>,
    pub(super) sent: Vec<NodeOrder>,
    pub(super) revoked: Vec<(ExtentId, Epoch)>,
    pub(super) epochs: BTreeSet<u64>,
    pub(super) drawn: u64,
}

impl World {
    pub(super) fn new() -> Self {
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

    pub(super) fn step(&mut self, step: Step) {
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
            Step::Grant {
                lease,
                count,
                copies,
                request,
                lost,
            } => self.grant(lease, (count, copies), request, &lost),
            Step::Drain(at, undo) => {
                // A node that has not registered cannot be drained.
                let _ = self.state.drain(&node_id(at), undo);
            }
            Step::Interrupted { lease, count, dies } => self.interrupted(lease, count, dies),
            Step::Release { lease, which } => {
                let Some(id) = self.lease(lease) else { return };
                let held: Vec<ExtentId> = self.told[&id].keys().copied().collect();
                let give: Vec<ExtentId> = which
                    .iter()
                    .filter_map(|at| held.get(*at).copied())
                    .collect();
                if self.state.release(now, id, &give).is_ok() {
                    give.iter()
                        .for_each(|extent| drop(self.told.get_mut(&id).unwrap().remove(extent)));
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
                    self.nodes[at] = FakeNode {
                        life,
                        up: true,
                        ..FakeNode::default()
                    };
                    self.register(at);
                }
            }
            Step::Restart => {
                self.commit();
                let records = self
                    .stored
                    .iter()
                    .map(|(key, value)| decode(key, value).unwrap())
                    .collect();
                let before: Vec<_> = self
                    .leases
                    .iter()
                    .map(|id| self.state.list_grants(*id, None))
                    .collect();
                self.state = State::load(records, TIMING, now);
                let after: Vec<_> = self
                    .leases
                    .iter()
                    .map(|id| self.state.list_grants(*id, None))
                    .collect();
                assert_eq!(before, after, "a restart changes no grant");
            }
        }
        self.commit();
    }

    pub(super) fn registration(&self, at: usize) -> NodeRegistration {
        let node = &self.nodes[at];
        NodeRegistration {
            id: node_id(at),
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

    pub(super) fn beat(&mut self, at: usize) {
        if !self.nodes[at].up {
            return;
        }
        let node = self.registration(at);
        match self
            .state
            .heartbeat(Millis(self.now), &node.id, node.incarnation)
        {
            Ok(()) => {}
            Err(HeartbeatError::Unknown(_)) => self.register(at),
            Err(error) => panic!("{error}"),
        }
    }

    fn grant(&mut self, lease: usize, (count, copies): (u32, u32), request: u64, lost: &[bool]) {
        let now = Millis(self.now);
        let Some(lease) = self.lease(lease) else {
            return;
        };
        let request = GrantRequest {
            lease,
            count,
            copies,
            extent_bytes: None,
            avoid: Vec::new(),
            fabric: None,
            request: RequestId::new(request).ok(),
        };
        let keys: Vec<u64> = (0..count * copies).map(|_| self.draw()).collect();
        let draining: BTreeSet<NodeId> = self
            .state
            .nodes
            .0
            .iter()
            .filter(|(_, node)| node.record.draining)
            .map(|(id, _)| id.clone())
            .collect();
        match self
            .state
            .plan_grant(&request, true, &keys, &BTreeSet::new())
        {
            Ok(Plan::Ask(orders)) => {
                assert_eq!(orders.len(), (count * copies) as usize);
                for set in orders.chunks(copies as usize) {
                    let nodes: BTreeSet<_> = set.iter().map(|order| &order.node).collect();
                    assert_eq!(nodes.len(), set.len(), "copies lie on different nodes");
                    assert!(set.iter().all(|order| !draining.contains(&order.node)));
                }
                self.commit();
                for (order, lost) in orders
                    .iter()
                    .zip(lost.iter().chain(std::iter::repeat(&false)))
                {
                    assert!(
                        self.epochs
                            .last()
                            .is_none_or(|last| *last < order.epoch.get()),
                        "epochs only grow"
                    );
                    self.epochs.insert(order.epoch.get());
                    if self.deliver(order) && !lost {
                        let grant = self
                            .state
                            .grant_confirmed(order.extent, order.epoch, None, 0)
                            .unwrap();
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
                        self.told
                            .get_mut(&lease)
                            .unwrap()
                            .insert(grant.extent, grant);
                    } else {
                        self.state.grant_failed(now, order.extent, order.epoch);
                    }
                }
            }
            Ok(Plan::Repeat(grants)) => {
                for grant in grants {
                    self.told
                        .get_mut(&lease)
                        .unwrap()
                        .insert(grant.extent, grant);
                }
            }
            Err(GrantError::Exhausted {
                free_extents, able, ..
            }) => {
                // Where some node has too few it may be that the others have much.
                assert!(free_extents < count * copies || copies > 1, "{able} nodes");
            }
            Err(GrantError::NoLease(_)) => drop(self.told.insert(lease, BTreeMap::new())),
            Err(error) => panic!("{error}"),
        }
    }

    fn interrupted(&mut self, lease: usize, count: u32, dies: bool) {
        let Some(lease) = self.lease(lease) else {
            return;
        };
        let request = GrantRequest {
            lease,
            count,
            copies: 1,
            extent_bytes: None,
            avoid: Vec::new(),
            fabric: None,
            request: None,
        };
        let keys: Vec<u64> = (0..count).map(|_| self.draw()).collect();
        let plan = self
            .state
            .plan_grant(&request, true, &keys, &BTreeSet::new());
        self.commit();
        let Ok(Plan::Ask(orders)) = plan else { return };
        self.epochs
            .extend(orders.iter().map(|order| order.epoch.get()));
        if dies {
            for order in &orders {
                self.deliver(order);
            }
            self.step(Step::Restart);
        } else {
            self.step(Step::Close(
                self.leases.iter().position(|id| *id == lease).unwrap(),
            ));
            // The revocations may reach their nodes before the grants do.
            if count > 1 {
                self.step(Step::Revokes {
                    lost: vec![false; 8],
                });
            }
            for order in &orders {
                self.deliver(order);
            }
        }
        for order in orders {
            assert_eq!(
                self.state
                    .grant_confirmed(order.extent, order.epoch, None, 0),
                None,
                "nobody is told"
            );
        }
    }

    pub(super) fn check(&self) {
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
        let free: u64 = state
            .nodes
            .0
            .values()
            .map(|node| node.free.len() as u64 * EXTENT)
            .sum();
        assert_eq!(
            totals.used + totals.pending + free,
            totals.capacity,
            "capacity adds up"
        );

        // Against the nodes' own view: what the coordinator thinks free is closed and scrubbed there.
        for (at, fake) in self.nodes.iter().enumerate() {
            let Some(node) = state.nodes.0.get(&NodeId::new(format!("n{at}")).unwrap()) else {
                continue;
            };
            if node.record.incarnation.get() != fake.life {
                continue;
            }
            for index in &node.free {
                assert!(
                    !fake.granted.contains_key(index),
                    "n{at}/{index} is free here and granted there"
                );
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
