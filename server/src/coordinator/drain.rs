//! Draining: a node is granted nothing more, and those who hold something there are told to move it.

use std::collections::BTreeSet;

use farpage_proto::{NodeId, v1};

use super::error::NoNode;
use super::record::{Key, Phase};
use super::state::State;

impl State {
    /// Has a node drained, or no more, and tells what is left there. Repeating it is how to look.
    pub(crate) fn drain(
        &mut self,
        id: &NodeId,
        undo: bool,
    ) -> Result<v1::DrainNodeResponse, NoNode> {
        let node = self.nodes.0.get_mut(id).ok_or_else(|| NoNode(id.clone()))?;
        if node.record.draining == undo {
            node.record.draining = !undo;
            self.dirty.insert(Key::Node(id.clone()));
            tracing::info!(node = %id, undo, "draining");
        }
        let size = node.record.extent_bytes;
        let (mut held, mut pending, mut holders) = (0, 0, BTreeSet::new());
        for extent in self.extents.values().filter(|extent| extent.node == *id) {
            match extent.phase {
                Phase::Granting { lease, .. } | Phase::Granted { lease, .. } => {
                    held += 1;
                    holders.insert(lease);
                }
                Phase::Revoking => pending += 1,
                Phase::Lost { .. } => {}
            }
        }
        let others = self.nodes.0.iter().filter(|(other, node)| {
            *other != id && node.takes_more() && node.record.extent_bytes == size
        });
        let agents = holders.iter().filter_map(|lease| self.leases.0.get(lease));
        Ok(v1::DrainNodeResponse {
            held_extents: held,
            pending_extents: pending,
            free_elsewhere: others.map(|(_, node)| node.free.len() as u32).sum(),
            agents: agents.map(|lease| lease.record.agent.to_string()).collect(),
        })
    }
}
