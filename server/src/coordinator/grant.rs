//! Granting: plan on the emptiest nodes, ask them, tell the lease's holder what they confirmed.
//!
//! Copies of an extent are a set: extents of one size on different nodes, next to each other in what is remembered of the
//! request.

use std::collections::BTreeSet;

use farpage_proto::lease::{ExtentGrant, GrantRequest};
use farpage_proto::{
    AccessKey, ByteCount, DataAddress, Epoch, ExtentId, FabricKind, LeaseId, NodeId, limits,
};

use super::clock::Millis;
use super::error::{GrantError, NoLease};
use super::nodes::Node;
use super::placement::{Candidate, spread};
use super::record::{ExtentRecord, Key, Phase};
use super::state::{NodeOrder, OrderKind, State};

/// What a grant request leads to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Plan {
    /// Ask the nodes; report each answer by [`State::grant_confirmed`] or [`State::grant_failed`].
    Ask(Vec<NodeOrder>),
    /// A repetition: this is what came of the request before.
    Repeat(Vec<ExtentGrant>),
}

impl State {
    /// Starts granting. `keys` are random numbers, one per extent. Nodes in `avoid` have just failed. `first` is false when a
    /// request goes on after some nodes failed.
    pub(crate) fn plan_grant(
        &mut self,
        request: &GrantRequest,
        first: bool,
        keys: &[u64],
        avoid: &BTreeSet<NodeId>,
    ) -> Result<Plan, GrantError> {
        let lease = self
            .leases
            .0
            .get(&request.lease)
            .ok_or(NoLease(request.lease))?;
        if first && let Some(grants) = self.repeated(request)? {
            return Ok(Plan::Repeat(grants));
        }
        let wanted = request.count.saturating_mul(request.copies) as usize;
        if lease.extents.len() + wanted > limits::MAX_EXTENTS_PER_LEASE {
            return Err(GrantError::LeaseFull);
        }
        if keys.len() < wanted {
            return Err(GrantError::NoKeys);
        }

        let nodes: Vec<(&NodeId, &Node)> = self
            .nodes
            .0
            .iter()
            .filter(|(id, node)| {
                let size = request.extent_bytes;
                node.takes_more()
                    && node.serves(request.fabric)
                    && size.is_none_or(|bytes| bytes == node.record.extent_bytes)
                    && !avoid.contains(id)
                    && !request.avoid.contains(id)
            })
            .collect();
        let candidates: Vec<Candidate> = nodes
            .iter()
            .map(|(_, node)| Candidate {
                free: node.free.len() as u32,
                extent_bytes: node.record.extent_bytes.0,
            })
            .collect();
        let free = candidates.iter().map(|candidate| candidate.free).sum();
        let able = candidates.iter().filter(|one| one.free > 0).count();
        let sets = spread(&candidates, request.count, request.copies)
            .ok_or_else(|| self.exhausted(request, free, able))?;
        let mut free: Vec<_> = nodes.iter().map(|(_, node)| node.free.iter()).collect();
        let chosen: Vec<(NodeId, u32)> = sets
            .into_iter()
            .filter_map(|at| Some(((*nodes.get(at)?.0).clone(), *free.get_mut(at)?.next()?)))
            .collect();

        let mut orders = Vec::with_capacity(chosen.len());
        for ((node, index), &key) in chosen.into_iter().zip(keys) {
            orders.extend(self.start_granting(
                request.lease,
                node,
                index,
                AccessKey::from_random(key),
            ));
        }
        self.remember(request, first, orders.iter().map(|order| order.extent));
        Ok(Plan::Ask(orders))
    }

    /// What came of the lease's last request, if this is it again. Nothing if all of that is gone.
    fn repeated(&self, request: &GrantRequest) -> Result<Option<Vec<ExtentGrant>>, GrantError> {
        let Some(lease) = self.leases.0.get(&request.lease) else {
            return Ok(None);
        };
        let Some((last, extents)) = &lease.record.last_request else {
            return Ok(None);
        };
        if Some(*last) != request.request {
            return Ok(None);
        }
        let phase = |id: &ExtentId| self.extents.get(id).map(|extent| extent.phase);
        if extents
            .iter()
            .any(|id| matches!(phase(id), Some(Phase::Granting { .. })))
        {
            return Err(GrantError::InProgress);
        }
        let sets = extents.chunks(lease.record.last_copies.max(1) as usize);
        let grants: Vec<_> = sets
            .zip(0..)
            .flat_map(|(ids, set)| ids.iter().map(move |id| (*id, set)))
            .filter(|(id, _)| lease.extents.contains(id))
            .filter_map(|(id, set)| self.grant_of(id, request.fabric, set))
            .collect();
        Ok((!grants.is_empty()).then_some(grants))
    }

    fn remember(
        &mut self,
        request: &GrantRequest,
        first: bool,
        planned: impl Iterator<Item = ExtentId>,
    ) {
        let (Some(lease), Some(id)) = (self.leases.0.get_mut(&request.lease), request.request)
        else {
            return;
        };
        match &mut lease.record.last_request {
            Some((last, extents)) if *last == id && !first => extents.extend(planned),
            last => *last = Some((id, planned.collect())),
        }
        lease.record.last_copies = request.copies;
        self.dirty.insert(Key::Lease(request.lease));
    }

    fn start_granting(
        &mut self,
        lease: LeaseId,
        id: NodeId,
        index: u32,
        key: AccessKey,
    ) -> Option<NodeOrder> {
        let epoch = Epoch::new(self.counters.next_epoch).ok()?;
        let node = self.nodes.0.get_mut(&id)?;
        if !node.free.remove(&index) {
            return None;
        }
        let extent = node.extent_id(index);
        let order = NodeOrder {
            node: id.clone(),
            control_url: node.record.control_url.clone(),
            token: node.record.control_token,
            extent,
            index,
            epoch,
            kind: OrderKind::Grant(key),
        };
        self.counters.next_epoch += 1;
        self.dirty.insert(Key::Counters);
        self.extents.insert(
            extent,
            ExtentRecord {
                node: id,
                index,
                epoch,
                phase: Phase::Granting { lease, key },
            },
        );
        self.dirty.insert(Key::Extent(extent));
        if let Some(lease) = self.leases.0.get_mut(&lease) {
            lease.extents.insert(extent);
        }
        Some(order)
    }

    /// The node has granted. Returns the grant, or `None` when the lease ended meanwhile.
    pub(crate) fn grant_confirmed(
        &mut self,
        id: ExtentId,
        epoch: Epoch,
        fabric: Option<FabricKind>,
        set: u32,
    ) -> Option<ExtentGrant> {
        let extent = self
            .extents
            .get_mut(&id)
            .filter(|extent| extent.epoch == epoch)?;
        let Phase::Granting { lease, key } = extent.phase else {
            return None;
        };
        extent.phase = Phase::Granted { lease, key };
        self.dirty.insert(Key::Extent(id));
        self.grant_of(id, fabric, set)
    }

    /// The node has refused, or not answered: it may or may not have granted, so revoke.
    pub(crate) fn grant_failed(&mut self, now: Millis, id: ExtentId, epoch: Epoch) {
        let granting =
            |e: &&ExtentRecord| e.epoch == epoch && matches!(e.phase, Phase::Granting { .. });
        if self.extents.get(&id).filter(granting).is_some() {
            self.detach(id);
            self.start_revoking(id, now);
        }
    }

    /// What a lease holds and can use.
    pub(crate) fn list_grants(
        &self,
        lease: LeaseId,
        fabric: Option<FabricKind>,
    ) -> Result<Vec<ExtentGrant>, NoLease> {
        let held = self.leases.0.get(&lease).ok_or(NoLease(lease))?;
        Ok(held
            .extents
            .iter()
            .filter_map(|&id| self.grant_of(id, fabric, 0))
            .zip(0..)
            .map(|(grant, set)| ExtentGrant { set, ..grant })
            .collect())
    }

    fn grant_of(&self, id: ExtentId, fabric: Option<FabricKind>, set: u32) -> Option<ExtentGrant> {
        let extent = self.extents.get(&id)?;
        let Phase::Granted { key, .. } = extent.phase else {
            return None;
        };
        let node = self.nodes.0.get(&extent.node)?;
        Some(ExtentGrant {
            extent: id,
            node: extent.node.clone(),
            index: extent.index,
            epoch: extent.epoch,
            key,
            bytes: node.record.extent_bytes,
            address: choose_address(&node.record.data_addresses, fabric)?.clone(),
            set,
        })
    }

    fn exhausted(&self, request: &GrantRequest, free_extents: u32, able: usize) -> GrantError {
        let totals = self.totals();
        GrantError::Exhausted {
            wanted: request.count,
            copies: request.copies,
            able: able as u32,
            fabric: request.fabric,
            free_extents,
            capacity: ByteCount(totals.capacity),
            used: ByteCount(totals.used),
            pending: ByteCount(totals.pending),
            unreachable: ByteCount(totals.unreachable),
        }
    }
}

/// The wanted fabric's address. Any: one that also crosses hosts, before one that does not.
fn choose_address(addresses: &[DataAddress], fabric: Option<FabricKind>) -> Option<&DataAddress> {
    match fabric {
        Some(kind) => addresses.iter().find(|address| address.fabric() == kind),
        None => addresses
            .iter()
            .find(|address| address.fabric() != FabricKind::Shm)
            .or_else(|| addresses.first()),
    }
}
