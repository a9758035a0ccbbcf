//! The coordinator's state: plain data. Time and randomness come in with each call; what must be stored goes out through
//! [`State::take_changes`], what must be asked of nodes through the calls' answers as [`NodeOrder`]s. Nothing here waits.
//!
//! What always holds (the property tests check it after every step):
//! - an extent that is not free has exactly one record, and at most one lease;
//! - an extent is free only if its node has confirmed fence and scrub since the last grant, or came back empty;
//! - epochs only grow, and no two grants share one;
//! - what is derived (free positions, leases' extents, what is to be revoked) agrees with the records.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use farpage_proto::lease::{LeaseRequest, Renewal};
use farpage_proto::node::{ControlToken, NodeRegistration};
use farpage_proto::report::AgentReport;
use farpage_proto::transport::EndpointUrl;
use farpage_proto::{AccessKey, Epoch, ExtentId, Incarnation, LeaseId, NodeId, limits};

use super::clock::Millis;
use super::error::{HeartbeatError, NoLease, OpenError, RegisterError};
use super::lease::{Lease, Leases};
use super::nodes::{Node, Nodes};
use super::record::{
    Counters, ExtentRecord, Key, LeaseRecord, NodeRecord, Phase, Record, Unreadable, encode,
};

/// The timing of leases and nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// How long a lease lives without a renewal.
    pub lease_ttl: Duration,
    /// A node that is silent for longer is unreachable.
    pub node_timeout: Duration,
    /// A revocation that a node has not confirmed is sent again after this. Longer than the call's own deadline.
    pub revoke_retry: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            lease_ttl: limits::LEASE_TTL,
            node_timeout: limits::NODE_TIMEOUT,
            revoke_retry: super::dispatch::REVOKE_DEADLINE + Duration::from_secs(1),
        }
    }
}

/// What a node is asked to do.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct NodeOrder {
    pub(crate) node: NodeId,
    pub(crate) control_url: EndpointUrl,
    pub(crate) token: ControlToken,
    pub(crate) extent: ExtentId,
    pub(crate) index: u32,
    pub(crate) epoch: Epoch,
    pub(crate) kind: OrderKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OrderKind {
    Grant(AccessKey),
    /// Fence, scrub, then answer.
    Revoke,
}

/// A record to be written, or removed when it has no value. In the store's form.
pub(crate) type Change = (String, Option<Vec<u8>>);

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct State {
    pub(super) timing: Timing,
    pub(super) counters: Counters,
    pub(super) nodes: Nodes,
    pub(super) leases: Leases,
    pub(super) extents: BTreeMap<ExtentId, ExtentRecord>,
    /// Extents in [`Phase::Revoking`], each with when to ask its node (again).
    pub(super) revoking: BTreeMap<ExtentId, Millis>,
    pub(super) dirty: BTreeSet<Key>,
    last_tick: Millis,
}

impl State {
    /// From what is stored; nothing for a new cluster. Every lease gets a full time to live from now, and every node a
    /// full timeout: while no coordinator ran, nobody could renew.
    pub(crate) fn load(records: Vec<Record>, timing: Timing, now: Millis) -> Self {
        let mut state = Self {
            timing,
            counters: Counters::default(),
            nodes: Nodes::default(),
            leases: Leases::default(),
            extents: BTreeMap::new(),
            revoking: BTreeMap::new(),
            dirty: BTreeSet::new(),
            last_tick: now,
        };
        for record in records {
            match record {
                Record::Counters(counters) => state.counters = counters,
                Record::Node(id, record) => drop(state.nodes.0.insert(id, Node::new(record, now))),
                Record::Lease(id, record) => {
                    let deadline = now.after(timing.lease_ttl);
                    state.leases.0.insert(id, Lease::new(record, deadline));
                }
                Record::Extent(id, record) => drop(state.extents.insert(id, record)),
            }
        }
        let ids: Vec<ExtentId> = state.extents.keys().copied().collect();
        for id in ids {
            state.adopt(id, now);
        }
        state
    }

    /// Derives what follows from one stored extent. Nobody was told of a grant that was not finished.
    fn adopt(&mut self, id: ExtentId, now: Millis) {
        let Some(extent) = self.extents.get(&id).cloned() else {
            return;
        };
        if let Some(node) = self.nodes.0.get_mut(&extent.node)
            && node.extent_id(extent.index) == id
        {
            node.free.remove(&extent.index);
        }
        let lease = extent
            .phase
            .lease()
            .and_then(|lease| self.leases.0.get_mut(&lease));
        match (extent.phase, lease) {
            (Phase::Granted { .. } | Phase::Lost { .. }, Some(lease)) => {
                lease.extents.insert(id);
            }
            (Phase::Lost { .. }, None) => self.forget(id),
            _ => self.start_revoking(id, now),
        }
    }

    /// What is to be stored before anybody hears of it.
    pub(crate) fn take_changes(&mut self) -> Result<Vec<Change>, Unreadable> {
        let dirty = std::mem::take(&mut self.dirty);
        dirty
            .into_iter()
            .map(|key| {
                let value = match &key {
                    Key::Counters => Some(encode(&self.counters)?),
                    Key::Node(id) => self
                        .nodes
                        .0
                        .get(id)
                        .map(|node| encode(&node.record))
                        .transpose()?,
                    Key::Lease(id) => self
                        .leases
                        .0
                        .get(id)
                        .map(|lease| encode(&lease.record))
                        .transpose()?,
                    Key::Extent(id) => self.extents.get(id).map(encode).transpose()?,
                };
                Ok((key.to_text(), value))
            })
            .collect()
    }

    // --- nodes ---

    /// Takes a node in, or refreshes what is known of it. Returns its first extent id.
    pub(crate) fn register_node(
        &mut self,
        now: Millis,
        node: &NodeRegistration,
    ) -> Result<ExtentId, RegisterError> {
        let known = self.nodes.0.get(&node.id);
        let same_life = known
            .filter(|n| n.record.incarnation == node.incarnation)
            .map(|n| n.record.first_extent);
        if known.is_some_and(|known| same_life.is_none() && known.live)
            && let Some(holder) = self.nodes.holder(&node.id, now)
        {
            return Err(RegisterError::IdTaken { holder });
        }
        if let Some(known) = known.filter(|_| same_life.is_some())
            && (known.record.extents, known.record.extent_bytes)
                != (node.extents(), node.extent_bytes)
        {
            return Err(RegisterError::ShapeChanged);
        }

        let mut record = NodeRecord {
            incarnation: node.incarnation,
            first_extent: same_life.unwrap_or(ExtentId(0)),
            extents: node.extents(),
            extent_bytes: node.extent_bytes,
            labels: node.labels.clone(),
            data_addresses: node.data_addresses.clone(),
            control_url: node.control_url.clone(),
            control_token: node.control_token,
            draining: known.is_some_and(|known| known.record.draining),
        };
        while let Some((other, address)) = self.nodes.address_holder(&node.id, &record) {
            match self
                .nodes
                .0
                .get(&other)
                .filter(|n| n.live)
                .and_then(|_| self.nodes.holder(&other, now))
            {
                Some(holder) => return Err(RegisterError::AddressTaken { address, holder }),
                // Silent, and its address answers for somebody else: that process is gone.
                None => self.remove_node(&other),
            }
        }

        self.counters.next_epoch = self
            .counters
            .next_epoch
            .max(node.last_epoch.saturating_add(1));
        self.dirty.insert(Key::Counters);
        if same_life.is_some() {
            if let Some(known) = self.nodes.0.get_mut(&node.id) {
                known.record = record.clone();
                known.last_heard = now;
                known.live = true;
            }
        } else {
            // The name's former holder is silent: its memory is gone, or nobody here will ever reach it again.
            self.remove_node(&node.id);
            if self.nodes.is_full() {
                return Err(RegisterError::TooManyNodes);
            }
            let taken = self.extents.keys().copied().collect();
            record.first_extent = self
                .nodes
                .free_ids(self.counters.next_extent_id, record.extents, &taken)
                .ok_or(RegisterError::NoIds(record.extents))?;
            self.counters.next_extent_id = record.first_extent.0.saturating_add(record.extents);
            self.nodes
                .0
                .insert(node.id.clone(), Node::new(record.clone(), now));
        }
        self.dirty.insert(Key::Node(node.id.clone()));
        self.reconcile(now, node);
        Ok(record.first_extent)
    }

    /// Compares what the node has granted with what is known: a grant from a life of the coordinator that was not
    /// stored, or one newer than a restored backup, must end. An older one is an old list, overtaken by a revocation.
    fn reconcile(&mut self, now: Millis, registration: &NodeRegistration) {
        for &(index, epoch) in &registration.granted {
            let Some(node) = self.nodes.0.get_mut(&registration.id) else {
                return;
            };
            let id = node.extent_id(index);
            let newer = self
                .extents
                .get(&id)
                .is_none_or(|known| known.epoch < epoch);
            if !newer {
                continue;
            }
            tracing::warn!(node = %registration.id, index, %epoch, "the node has a grant that is not known here, revoking it");
            node.free.remove(&index);
            self.detach(id);
            self.extents.insert(
                id,
                ExtentRecord {
                    node: registration.id.clone(),
                    index,
                    epoch,
                    phase: Phase::Revoking,
                },
            );
            self.start_revoking(id, now);
        }
    }

    /// Drops a node. What leases held there is lost, what was being revoked is gone with its memory.
    pub(crate) fn remove_node(&mut self, id: &NodeId) {
        let Some(node) = self.nodes.0.remove(id) else {
            return;
        };
        self.dirty.insert(Key::Node(id.clone()));
        let first = node.record.first_extent;
        let last = node.extent_id(node.record.extents);
        let held: Vec<ExtentId> = self.extents.range(first..last).map(|(id, _)| *id).collect();
        for extent in held {
            self.revoking.remove(&extent);
            let Some(record) = self.extents.get_mut(&extent) else {
                continue;
            };
            match record.phase {
                Phase::Granted { lease, .. } => {
                    record.phase = Phase::Lost { lease };
                    self.dirty.insert(Key::Extent(extent));
                }
                Phase::Granting { .. } | Phase::Revoking => self.forget(extent),
                Phase::Lost { .. } => {}
            }
        }
    }

    /// Notes that a node is there.
    pub(crate) fn heartbeat(
        &mut self,
        now: Millis,
        id: &NodeId,
        life: Incarnation,
    ) -> Result<(), HeartbeatError> {
        let node = self
            .nodes
            .0
            .get_mut(id)
            .ok_or_else(|| HeartbeatError::Unknown(id.clone()))?;
        if node.record.incarnation != life {
            return Err(HeartbeatError::Superseded {
                id: id.clone(),
                current: node.record.incarnation,
            });
        }
        if !node.live {
            tracing::info!(node = %id, "the node is back");
        }
        node.last_heard = now;
        node.live = true;
        Ok(())
    }

    /// Notes that nobody answers for this life of a node any more, so that its successor may take its place.
    pub(crate) fn node_gone(&mut self, id: &NodeId, life: Incarnation) {
        if let Some(node) = self
            .nodes
            .0
            .get_mut(id)
            .filter(|node| node.record.incarnation == life)
        {
            node.live = false;
        }
    }

    // --- leases ---

    /// Opens a lease under an id drawn at random.
    pub(crate) fn open_lease(
        &mut self,
        now: Millis,
        id: LeaseId,
        request: LeaseRequest,
    ) -> Result<(), OpenError> {
        if self.leases.0.len() >= limits::MAX_LEASES {
            return Err(OpenError::TooManyLeases);
        }
        if self.leases.0.contains_key(&id) {
            return Err(OpenError::IdDrawnTwice);
        }
        let LeaseRequest {
            agent,
            host,
            tenant,
        } = request;
        let record = LeaseRecord {
            agent,
            host,
            tenant,
            last_request: None,
            last_copies: 1,
        };
        self.leases
            .0
            .insert(id, Lease::new(record, now.after(self.timing.lease_ttl)));
        self.dirty.insert(Key::Lease(id));
        Ok(())
    }

    /// Puts a lease's end off, and tells what happened to its extents.
    pub(crate) fn renew_lease(&mut self, now: Millis, id: LeaseId) -> Result<Renewal, NoLease> {
        let lease = self.leases.0.get_mut(&id).ok_or(NoLease(id))?;
        lease.deadline = now.after(self.timing.lease_ttl);
        let mut renewal = Renewal {
            ttl: self.timing.lease_ttl,
            lost: Vec::new(),
            unreachable: Vec::new(),
            draining: Vec::new(),
        };
        for &extent in &lease.extents {
            let Some(record) = self.extents.get(&extent) else {
                continue;
            };
            let node = self.nodes.0.get(&record.node);
            match record.phase {
                Phase::Lost { .. } => renewal.lost.push(extent),
                _ if node.is_none_or(|node| !node.live) => renewal.unreachable.push(extent),
                _ => {}
            }
            if node.is_some_and(|node| node.record.draining) {
                renewal.draining.push(extent);
            }
        }
        Ok(renewal)
    }

    /// Ends a lease; everything under it is revoked. Ending it again does nothing.
    pub(crate) fn end_lease(&mut self, now: Millis, id: LeaseId) {
        let Some(lease) = self.leases.0.remove(&id) else {
            return;
        };
        self.dirty.insert(Key::Lease(id));
        for extent in lease.extents {
            self.let_go(extent, now);
        }
    }

    /// Gives extents back. Returns how many of them the lease held.
    pub(crate) fn release(
        &mut self,
        now: Millis,
        id: LeaseId,
        extents: &[ExtentId],
    ) -> Result<u32, NoLease> {
        let mut released = 0;
        for extent in extents {
            let lease = self.leases.0.get_mut(&id).ok_or(NoLease(id))?;
            // One that is being granted is not yet known to its lease's holder.
            let granting = self
                .extents
                .get(extent)
                .is_some_and(|e| matches!(e.phase, Phase::Granting { .. }));
            if !granting && lease.extents.remove(extent) {
                released += 1;
                self.let_go(*extent, now);
            }
        }
        self.leases
            .0
            .contains_key(&id)
            .then_some(released)
            .ok_or(NoLease(id))
    }

    /// Keeps an agent's figures.
    pub(crate) fn report(&mut self, id: LeaseId, report: AgentReport) -> Result<(), NoLease> {
        self.leases.0.get_mut(&id).ok_or(NoLease(id))?.report = Some(report);
        Ok(())
    }

    /// What time does by itself: leases expire, silent nodes become unreachable.
    pub(crate) fn tick(&mut self, now: Millis) {
        // This process itself stood still (stopped, or starved): nobody could renew meanwhile.
        if now.since(self.last_tick) > self.timing.node_timeout {
            tracing::warn!(gap = ?now.since(self.last_tick), "the coordinator stood still, everybody gets a grace");
            self.leases.grace(now, self.timing.lease_ttl);
            self.nodes
                .0
                .values_mut()
                .filter(|node| node.live)
                .for_each(|node| node.last_heard = now);
        }
        self.last_tick = now;
        for id in self.leases.expired(now) {
            tracing::warn!(lease = %id, "the lease expired, its extents are revoked");
            self.end_lease(now, id);
        }
        for id in self.nodes.mark_silent(now, self.timing.node_timeout) {
            tracing::warn!(node = %id, "the node is unreachable");
        }
    }

    // --- extents ---

    /// After its lease let go of it: a lost one is forgotten, any other revoked.
    fn let_go(&mut self, id: ExtentId, now: Millis) {
        match self.extents.get(&id).map(|extent| extent.phase) {
            Some(Phase::Lost { .. }) => self.forget(id),
            Some(_) => self.start_revoking(id, now),
            None => {}
        }
    }

    /// Takes an extent out of its lease's hands.
    pub(super) fn detach(&mut self, id: ExtentId) {
        let lease = self
            .extents
            .get(&id)
            .and_then(|extent| extent.phase.lease());
        if let Some(lease) = lease.and_then(|lease| self.leases.0.get_mut(&lease)) {
            lease.extents.remove(&id);
        }
    }

    pub(super) fn start_revoking(&mut self, id: ExtentId, now: Millis) {
        if let Some(extent) = self.extents.get_mut(&id) {
            extent.phase = Phase::Revoking;
            self.revoking.insert(id, now);
            self.dirty.insert(Key::Extent(id));
        }
    }

    fn forget(&mut self, id: ExtentId) {
        self.detach(id);
        self.extents.remove(&id);
        self.dirty.insert(Key::Extent(id));
    }

    /// Revocations that are due at live nodes, at most `max`. Each comes again after a while unless it is confirmed.
    pub(crate) fn revokes_due(&mut self, now: Millis, max: usize) -> Vec<NodeOrder> {
        let mut orders = Vec::new();
        let retry = now.after(self.timing.revoke_retry);
        for (&id, due) in self.revoking.iter_mut().filter(|(_, due)| **due <= now) {
            if orders.len() >= max {
                break;
            }
            let Some(extent) = self.extents.get(&id) else {
                continue;
            };
            let Some(node) = self.nodes.0.get(&extent.node).filter(|node| node.live) else {
                continue;
            };
            *due = retry;
            orders.push(NodeOrder {
                node: extent.node.clone(),
                control_url: node.record.control_url.clone(),
                token: node.record.control_token,
                extent: id,
                index: extent.index,
                epoch: extent.epoch,
                kind: OrderKind::Revoke,
            });
        }
        orders
    }

    /// The node has fenced and scrubbed: the extent is free.
    pub(crate) fn revoke_confirmed(&mut self, id: ExtentId, epoch: Epoch) {
        let Some(extent) = self.extents.get(&id) else {
            return;
        };
        // An answer to an order that is long over.
        if extent.phase != Phase::Revoking || extent.epoch != epoch {
            return;
        }
        if let Some(node) = self.nodes.0.get_mut(&extent.node) {
            node.free.insert(extent.index);
        }
        self.revoking.remove(&id);
        self.forget(id);
    }
}
