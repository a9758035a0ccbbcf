//! What is stored, and its form: text keys and JSON values, the same for a file and for etcd.
//!
//! | key | value |
//! |---|---|
//! | `counters` | the next epoch and extent id |
//! | `node/ID` | a node's registration |
//! | `lease/HEX` | a lease (not when it expires: that restarts with the coordinator) |
//! | `extent/HEX` | an extent that is not free |

use farpage_proto::node::{ControlToken, Labels};
use farpage_proto::transport::EndpointUrl;
use farpage_proto::{
    AccessKey, AgentId, ByteCount, DataAddress, Epoch, ExtentId, HostName, Incarnation, LeaseId,
    NodeId, RequestId, Tenant,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Names one stored record.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Key {
    Counters,
    Node(NodeId),
    Lease(LeaseId),
    Extent(ExtentId),
}

impl Key {
    pub(crate) fn to_text(&self) -> String {
        match self {
            Self::Counters => "counters".to_owned(),
            Self::Node(id) => format!("node/{id}"),
            Self::Lease(id) => format!("lease/{id}"),
            Self::Extent(id) => format!("extent/{:08x}", id.0),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        if text == "counters" {
            return Some(Self::Counters);
        }
        let (kind, name) = text.split_once('/')?;
        match kind {
            "node" => Some(Self::Node(NodeId::new(name).ok()?)),
            "lease" => Some(Self::Lease(
                LeaseId::new(u64::from_str_radix(name, 16).ok()?).ok()?,
            )),
            "extent" => Some(Self::Extent(ExtentId(u32::from_str_radix(name, 16).ok()?))),
            _ => None,
        }
    }
}

/// Numbers that only grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counters {
    pub(crate) next_epoch: u64,
    /// Where the search for a node's range of extent ids starts; wraps.
    pub(crate) next_extent_id: u32,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            next_epoch: 1,
            next_extent_id: 0,
        }
    }
}

/// A node that has registered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct NodeRecord {
    pub(crate) incarnation: Incarnation,
    pub(crate) first_extent: ExtentId,
    pub(crate) extents: u32,
    pub(crate) extent_bytes: ByteCount,
    pub(crate) labels: Labels,
    pub(crate) data_addresses: Vec<DataAddress>,
    pub(crate) control_url: EndpointUrl,
    pub(crate) control_token: ControlToken,
    /// Nothing is granted there any more. Outlives the node's process: who is to be drained is so by name.
    #[serde(default)]
    pub(crate) draining: bool,
}

/// A lease that has not ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LeaseRecord {
    pub(crate) agent: AgentId,
    pub(crate) host: HostName,
    pub(crate) tenant: Tenant,
    /// The last grant request that had an id, and what came of it.
    pub(crate) last_request: Option<(RequestId, Vec<ExtentId>)>,
    /// How many of its extents, one after the other, are copies of one.
    #[serde(default = "one")]
    pub(crate) last_copies: u32,
}

fn one() -> u32 {
    1
}

/// An extent that is not free.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ExtentRecord {
    pub(crate) node: NodeId,
    pub(crate) index: u32,
    pub(crate) epoch: Epoch,
    pub(crate) phase: Phase,
}

/// Where an extent is in its life. Free ones have no record.
///
/// ```text
///  free --> Granting --> Granted --> Revoking --> free
///              |            |            ^
///              +------------|------------+   the node may or may not have granted it
///                           +--> Lost        its node came back empty; gone when the lease lets go of it
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Phase {
    /// The node is being asked; nobody knows the key yet.
    Granting { lease: LeaseId, key: AccessKey },
    /// The lease's holder may use it.
    Granted { lease: LeaseId, key: AccessKey },
    /// Nobody may use it; the node has not confirmed its fence and scrub.
    Revoking,
    /// The contents are gone, the lease has not released it yet.
    Lost { lease: LeaseId },
}

impl Phase {
    pub(crate) fn lease(self) -> Option<LeaseId> {
        match self {
            Self::Granting { lease, .. } | Self::Granted { lease, .. } | Self::Lost { lease } => {
                Some(lease)
            }
            Self::Revoking => None,
        }
    }
}

/// A stored record with its value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Record {
    Counters(Counters),
    Node(NodeId, NodeRecord),
    Lease(LeaseId, LeaseRecord),
    Extent(ExtentId, ExtentRecord),
}

/// A stored record that this version cannot read.
#[derive(Debug, thiserror::Error)]
#[error(
    "the stored record `{key}` cannot be read ({cause}); it was written by another version or is damaged"
)]
pub struct Unreadable {
    key: String,
    cause: String,
}

/// Decodes one stored record.
pub(crate) fn decode(key: &str, value: &[u8]) -> Result<Record, Unreadable> {
    let unreadable = |cause: String| Unreadable {
        key: key.to_owned(),
        cause,
    };
    match Key::parse(key).ok_or_else(|| unreadable("unknown key".to_owned()))? {
        Key::Counters => json(value).map(Record::Counters),
        Key::Node(id) => json(value).map(|node| Record::Node(id, node)),
        Key::Lease(id) => json(value).map(|lease| Record::Lease(id, lease)),
        Key::Extent(id) => json(value).map(|extent| Record::Extent(id, extent)),
    }
    .map_err(unreadable)
}

fn json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    serde_json::from_slice(bytes).map_err(|error| error.to_string())
}

/// Encodes a value.
pub(crate) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, Unreadable> {
    serde_json::to_vec(value).map_err(|error| Unreadable {
        key: String::new(),
        cause: error.to_string(),
    })
}
