//! What the coordinator tells about the cluster.

use std::collections::BTreeMap;

use farpage_proto::{LeaseId, NodeId, v1};

use super::clock::{Millis, millis};
use super::lease::Lease;
use super::nodes::Node;
use super::record::Phase;
use super::state::State;

/// Bytes over all nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) capacity: u64,
    /// Granted to leases.
    pub(crate) used: u64,
    /// Being granted, or not yet scrubbed.
    pub(crate) pending: u64,
    /// Of nodes that are silent; part of the capacity.
    pub(crate) unreachable: u64,
}

#[derive(Clone, Copy, Default)]
struct Use {
    granted: u64,
    pending: u64,
}

impl State {
    fn use_by_node(&self) -> BTreeMap<&NodeId, Use> {
        let mut by_node: BTreeMap<&NodeId, Use> = BTreeMap::new();
        for extent in self.extents.values() {
            let entry = by_node.entry(&extent.node).or_default();
            match extent.phase {
                Phase::Granted { .. } => entry.granted += 1,
                Phase::Granting { .. } | Phase::Revoking => entry.pending += 1,
                Phase::Lost { .. } => {}
            }
        }
        by_node
    }

    pub(crate) fn totals(&self) -> Totals {
        let used = self.use_by_node();
        self.nodes
            .0
            .iter()
            .fold(Totals::default(), |mut totals, (id, node)| {
                let (bytes, used) = (
                    node.record.extent_bytes.0,
                    used.get(id).copied().unwrap_or_default(),
                );
                let capacity = bytes * u64::from(node.record.extents);
                totals.capacity += capacity;
                totals.used += used.granted * bytes;
                totals.pending += used.pending * bytes;
                totals.unreachable += if node.live { 0 } else { capacity };
                totals
            })
    }

    /// Everything that `farpage status` shows.
    pub(crate) fn status(&self, now: Millis) -> v1::GetStatusResponse {
        let used = self.use_by_node();
        let totals = self.totals();
        let node_status = |(id, node): (&NodeId, &Node)| {
            status_of_node(now, id, node, used.get(id).copied().unwrap_or_default())
        };
        v1::GetStatusResponse {
            nodes: self.nodes.0.iter().map(node_status).collect(),
            agents: self
                .leases
                .0
                .iter()
                .map(|(id, lease)| self.agent_status(now, *id, lease))
                .collect(),
            capacity_bytes: totals.capacity,
            used_bytes: totals.used,
            pending_bytes: totals.pending,
        }
    }

    fn agent_status(&self, now: Millis, id: LeaseId, lease: &Lease) -> v1::AgentStatus {
        let mut granted_bytes = 0;
        let mut lost_extents = 0;
        for record in lease
            .extents
            .iter()
            .filter_map(|extent| self.extents.get(extent))
        {
            match record.phase {
                Phase::Lost { .. } => lost_extents += 1,
                _ => {
                    granted_bytes += self
                        .nodes
                        .0
                        .get(&record.node)
                        .map_or(0, |node| node.record.extent_bytes.0);
                }
            }
        }
        v1::AgentStatus {
            lease_id: id.get(),
            agent_id: lease.record.agent.to_string(),
            host: lease.record.host.to_string(),
            tenant: lease.record.tenant.as_str().to_owned(),
            expires_in_ms: millis(lease.deadline.since(now)),
            extents: lease.extents.len() as u32,
            granted_bytes,
            lost_extents,
            report: lease.report.clone().map(v1::AgentReport::from),
        }
    }
}

fn status_of_node(now: Millis, id: &NodeId, node: &Node, used: Use) -> v1::NodeStatus {
    let record = &node.record;
    let health = if node.live {
        v1::NodeHealth::Live
    } else {
        v1::NodeHealth::Unreachable
    };
    v1::NodeStatus {
        node_id: id.to_string(),
        incarnation: record.incarnation.get(),
        health: health.into(),
        capacity_bytes: record.extent_bytes.0 * u64::from(record.extents),
        used_bytes: used.granted * record.extent_bytes.0,
        pending_bytes: used.pending * record.extent_bytes.0,
        extent_bytes: record.extent_bytes.0,
        labels: record.labels.clone().into_iter().collect(),
        data_addresses: record
            .data_addresses
            .iter()
            .map(ToString::to_string)
            .collect(),
        control_url: record.control_url.to_string(),
        last_heard_ms_ago: millis(now.since(node.last_heard)),
        draining: record.draining,
    }
}
