//! Why the coordinator refuses, one enum per operation, and the gRPC status of each.

use farpage_proto::{ByteCount, FabricKind, Incarnation, LeaseId, NodeId, limits};
use tonic::Status;

use super::nodes::Holder;

/// Why a node is not registered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// The name is in use.
    #[error("node_id: taken by {holder}; stop that node, or give this one another id")]
    IdTaken {
        /// By whom.
        holder: Holder,
    },
    /// An address is in use.
    #[error("{address} is taken by {holder}; stop that node, or let this one listen elsewhere")]
    AddressTaken {
        /// Which.
        address: String,
        /// By whom.
        holder: Holder,
    },
    /// The same process says that it has another size now.
    #[error(
        "capacity_bytes: differs from what this incarnation registered before; restart the node to change its size"
    )]
    ShapeChanged,
    /// Too many nodes.
    #[error(
        "the coordinator keeps {} nodes at most, and has them; remove nodes that are gone",
        limits::MAX_NODES
    )]
    TooManyNodes,
    /// No run of free extent ids is long enough.
    #[error("no {0} extent ids in a row are free; use larger extents")]
    NoIds(u32),
}

impl RegisterError {
    /// Who stands in the way, if somebody does.
    pub fn holder(&self) -> Option<&Holder> {
        match self {
            Self::IdTaken { holder } | Self::AddressTaken { holder, .. } => Some(holder),
            _ => None,
        }
    }
}

impl From<RegisterError> for Status {
    fn from(error: RegisterError) -> Self {
        let message = error.to_string();
        match error {
            RegisterError::IdTaken { .. } | RegisterError::AddressTaken { .. } => {
                Status::already_exists(message)
            }
            RegisterError::ShapeChanged => Status::invalid_argument(message),
            RegisterError::TooManyNodes | RegisterError::NoIds(_) => {
                Status::resource_exhausted(message)
            }
        }
    }
}

/// Why a heartbeat does not count.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeartbeatError {
    /// Never heard of.
    #[error("node `{0}` is not registered here; register again")]
    Unknown(NodeId),
    /// Another process has the name now.
    #[error("node `{id}` is registered under incarnation {current} now; stop this one")]
    Superseded {
        /// The name.
        id: NodeId,
        /// Who has it.
        current: Incarnation,
    },
}

impl From<HeartbeatError> for Status {
    fn from(error: HeartbeatError) -> Self {
        match error {
            HeartbeatError::Unknown(_) => Status::not_found(error.to_string()),
            HeartbeatError::Superseded { .. } => Status::failed_precondition(error.to_string()),
        }
    }
}

/// Why no lease is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Too many leases.
    #[error(
        "the coordinator keeps {} leases at most, and has them; close some",
        limits::MAX_LEASES
    )]
    TooManyLeases,
    /// The id drawn is in use; cannot happen twice.
    #[error("the lease id drawn is in use; try again")]
    IdDrawnTwice,
}

impl From<OpenError> for Status {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::TooManyLeases => Status::resource_exhausted(error.to_string()),
            OpenError::IdDrawnTwice => Status::unavailable(error.to_string()),
        }
    }
}

/// The lease has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "lease_id: there is no lease {0}: it expired or was closed, and what it held is revoked; open a new one"
)]
pub struct NoLease(pub LeaseId);

impl From<NoLease> for Status {
    fn from(error: NoLease) -> Self {
        Status::not_found(error.to_string())
    }
}

/// There is no such node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("node_id: there is no node `{0}` here; farpage status lists those there are")]
pub struct NoNode(pub NodeId);

impl From<NoNode> for Status {
    fn from(error: NoNode) -> Self {
        Status::not_found(error.to_string())
    }
}

/// Why nothing is granted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    /// The lease has ended.
    #[error(transparent)]
    NoLease(#[from] NoLease),
    /// The cluster is full.
    #[error(
        "{wanted} extents{} are wanted and {free_extents} are free on {able} live nodes that may be used{}: capacity \
         {capacity}, granted {used}, being scrubbed or granted {pending}, on unreachable nodes {unreachable}; release \
         extents or add a node",
        if *copies > 1 { format!(" on {copies} nodes each") } else { String::new() },
        fabric.map(|f| format!(" and serve {f}")).unwrap_or_default()
    )]
    Exhausted {
        /// Extents asked for.
        wanted: u32,
        /// Copies of each.
        copies: u32,
        /// Nodes that could give any.
        able: u32,
        /// Over which fabric.
        fabric: Option<FabricKind>,
        /// Extents free where they could come from.
        free_extents: u32,
        /// All nodes' bytes.
        capacity: ByteCount,
        /// Granted bytes.
        used: ByteCount,
        /// Bytes not yet scrubbed, or about to be granted.
        pending: ByteCount,
        /// Bytes of silent nodes.
        unreachable: ByteCount,
    },
    /// One lease holds too much.
    #[error(
        "count: a lease holds {} extents at most; open another or use larger extents",
        limits::MAX_EXTENTS_PER_LEASE
    )]
    LeaseFull,
    /// The first call with this id has not ended.
    #[error(
        "request_id: the first request with this id is still in progress; repeat it in a moment"
    )]
    InProgress,
    /// Every node that was asked failed.
    #[error("no node confirmed its grant in time; try again")]
    NodesFailed,
    /// The caller drew too few keys. A mistake of this program, not of the caller's.
    #[error("no access keys were drawn; try again")]
    NoKeys,
}

impl From<GrantError> for Status {
    fn from(error: GrantError) -> Self {
        let message = error.to_string();
        match error {
            GrantError::NoLease(inner) => inner.into(),
            GrantError::Exhausted { .. } | GrantError::LeaseFull => {
                Status::resource_exhausted(message)
            }
            GrantError::InProgress | GrantError::NodesFailed | GrantError::NoKeys => {
                Status::unavailable(message)
            }
        }
    }
}
