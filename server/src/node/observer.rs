//! The node's figures, for whoever asks: read from counters, so that no grant and no requester waits for it.

use std::sync::{Arc, Weak};

use farpage_proto::FabricKind;

use super::config::Shape;
use super::data_path::DataPath;
use super::ledger::Ledger;

/// A node's figures at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFigures {
    /// Bytes lent.
    pub capacity_bytes: u64,
    /// Bytes granted to agents.
    pub granted_bytes: u64,
    /// Bytes whose grant has ended and that are not known to be zero yet.
    pub pending_scrub_bytes: u64,
    /// Connections of each fabric that is served.
    pub connections: Vec<(FabricKind, Connections)>,
}

/// What became of a fabric's connections since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connections {
    /// Let in.
    pub admitted: u64,
    /// Sent away because all places were taken.
    pub turned_away: u64,
    /// Closed because they sent no proper hello, or none in time, or came from a user who may not connect.
    pub refused: u64,
    /// Closed later because they broke the protocol or failed.
    pub broken: u64,
}

/// Who can be asked for the figures while the node serves.
#[derive(Clone)]
pub struct NodeObserver {
    shape: Shape,
    // They end with the node, whoever still observes it.
    ledger: Weak<Ledger>,
    data_path: Weak<DataPath>,
}

impl NodeObserver {
    pub(super) fn new(shape: Shape, ledger: &Arc<Ledger>, data_path: &Arc<DataPath>) -> Self {
        Self {
            shape,
            ledger: Arc::downgrade(ledger),
            data_path: Arc::downgrade(data_path),
        }
    }

    /// The figures now; `None` of a node that has ended.
    #[must_use]
    pub fn figures(&self) -> Option<NodeFigures> {
        let bytes = |extents: u32| u64::from(extents) * self.shape.extent_bytes.0;
        let (granted, dirty) = self.ledger.upgrade()?.counts();
        Some(NodeFigures {
            capacity_bytes: self.shape.capacity().0,
            granted_bytes: bytes(granted),
            pending_scrub_bytes: bytes(dirty),
            connections: self.data_path.upgrade()?.connections(),
        })
    }
}

impl std::fmt::Debug for NodeObserver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeObserver")
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}
