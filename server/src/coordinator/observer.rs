//! The coordinator's figures, for whoever asks: sums over the cluster, without the reports that `farpage status` copies.

use super::owner::{Owner, OwnerGone};
use super::record::Phase;
use super::state::State;

/// A cluster's figures at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClusterFigures {
    /// Nodes that are heard of.
    pub nodes_live: u64,
    /// Nodes that are silent.
    pub nodes_unreachable: u64,
    /// Bytes lent by all nodes.
    pub capacity_bytes: u64,
    /// Those of silent nodes.
    pub unreachable_bytes: u64,
    /// Bytes granted to leases.
    pub granted_bytes: u64,
    /// Bytes being granted, or not yet scrubbed.
    pub pending_bytes: u64,
    /// Leases, one for each agent.
    pub leases: u64,
    /// Extents that are on record: granted, pending or lost.
    pub extents: u64,
    /// Those of them whose contents are gone while a lease still names them.
    pub extents_lost: u64,
}

impl State {
    pub(crate) fn figures(&self) -> ClusterFigures {
        let totals = self.totals();
        let live = self.nodes.0.values().filter(|node| node.live).count();
        let records = self.extents.values();
        let lost = records.filter(|record| matches!(record.phase, Phase::Lost { .. }));
        ClusterFigures {
            nodes_live: live as u64,
            nodes_unreachable: (self.nodes.0.len() - live) as u64,
            capacity_bytes: totals.capacity,
            unreachable_bytes: totals.unreachable,
            granted_bytes: totals.used,
            pending_bytes: totals.pending,
            leases: self.leases.0.len() as u64,
            extents: self.extents.len() as u64,
            extents_lost: lost.count() as u64,
        }
    }
}

/// Who can be asked for the figures while the coordinator serves.
#[derive(Clone, Debug)]
pub struct CoordinatorObserver(pub(super) Owner);

impl CoordinatorObserver {
    /// The figures now; `None` from a coordinator that is ending.
    pub async fn figures(&self) -> Option<ClusterFigures> {
        let asked: Result<_, OwnerGone> = self.0.call(|state, _| state.figures()).await;
        asked.ok()
    }
}
