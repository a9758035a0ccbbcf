//! The nodes: who lends, how much of it is free, who is heard of.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use farpage_proto::transport::EndpointUrl;
use farpage_proto::{ExtentId, FabricKind, Incarnation, NodeId, limits};

use super::clock::Millis;
use super::record::NodeRecord;

/// A registered node.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) record: NodeRecord,
    pub(crate) last_heard: Millis,
    pub(crate) live: bool,
    /// Positions that nobody holds. Derived from the extents' records.
    pub(crate) free: BTreeSet<u32>,
}

impl Node {
    pub(crate) fn new(record: NodeRecord, now: Millis) -> Self {
        let free = (0..record.extents).collect();
        Self {
            record,
            last_heard: now,
            live: true,
            free,
        }
    }

    /// Whether anything may be granted there.
    pub(crate) fn takes_more(&self) -> bool {
        self.live && !self.record.draining
    }

    /// The cluster-wide id of a position.
    pub(crate) fn extent_id(&self, index: u32) -> ExtentId {
        ExtentId(self.record.first_extent.0.saturating_add(index))
    }

    /// Whether its data can be reached over a fabric; `None`: over any.
    pub(crate) fn serves(&self, fabric: Option<FabricKind>) -> bool {
        fabric.is_none_or(|kind| {
            self.record
                .data_addresses
                .iter()
                .any(|address| address.fabric() == kind)
        })
    }
}

/// Who holds what another asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its name.
    pub id: NodeId,
    /// This life of its process.
    pub incarnation: Incarnation,
    /// Where to ask it.
    pub control_url: EndpointUrl,
    /// How long it has been silent.
    pub silent: Duration,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let silent = self.silent.as_millis();
        write!(
            f,
            "node `{}`, incarnation {}, at {}, heard of {silent} ms ago",
            self.id, self.incarnation, self.control_url
        )
    }
}

/// All nodes by name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Nodes(pub(crate) BTreeMap<NodeId, Node>);

impl Nodes {
    pub(crate) fn holder(&self, id: &NodeId, now: Millis) -> Option<Holder> {
        let node = self.0.get(id)?;
        Some(Holder {
            id: id.clone(),
            incarnation: node.record.incarnation,
            control_url: node.record.control_url.clone(),
            silent: now.since(node.last_heard),
        })
    }

    /// The other node that has one of these addresses, and which.
    pub(crate) fn address_holder(
        &self,
        id: &NodeId,
        wanted: &NodeRecord,
    ) -> Option<(NodeId, String)> {
        self.0
            .iter()
            .filter(|(other, _)| *other != id)
            .find_map(|(other, node)| {
                if node.record.control_url == wanted.control_url {
                    return Some((other.clone(), wanted.control_url.to_string()));
                }
                let taken = wanted
                    .data_addresses
                    .iter()
                    .find(|a| node.record.data_addresses.contains(a))?;
                Some((other.clone(), taken.to_string()))
            })
    }

    /// The first id of `count` in a row that no node and none of `others` has, searched from `start`, wrapping.
    pub(crate) fn free_ids(
        &self,
        start: u32,
        count: u32,
        others: &BTreeSet<ExtentId>,
    ) -> Option<ExtentId> {
        let mut taken: Vec<(u64, u64)> = self
            .0
            .values()
            .map(|node| {
                (
                    u64::from(node.record.first_extent.0),
                    u64::from(node.record.extents),
                )
            })
            .chain(others.iter().map(|id| (u64::from(id.0), 1)))
            .collect();
        taken.sort_unstable();
        // The highest id is left unused: arithmetic on ids stays away from the edge.
        let end = u64::from(u32::MAX);
        let search = |start: u64| {
            let mut at = start;
            for &(first, length) in &taken {
                if at.saturating_add(count.into()) <= first {
                    break;
                }
                at = at.max(first + length);
            }
            (at + u64::from(count) <= end).then_some(at)
        };
        let found = search(start.into()).or_else(|| search(0))?;
        u32::try_from(found).ok().map(ExtentId)
    }

    /// Marks the silent as unreachable. Returns those that became so.
    pub(crate) fn mark_silent(&mut self, now: Millis, timeout: Duration) -> Vec<NodeId> {
        let silent = self
            .0
            .iter_mut()
            .filter(|(_, node)| node.live && now.since(node.last_heard) > timeout);
        silent
            .map(|(id, node)| {
                node.live = false;
                id.clone()
            })
            .collect()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.0.len() >= limits::MAX_NODES
    }
}
