//! What nodes say about themselves, and what is asked of them, checked.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::address::DataAddress;
use crate::field::{self, FieldError};
use crate::ids::{AccessKey, ByteCount, Epoch, Incarnation, NodeId};
use crate::transport::EndpointUrl;
use crate::{limits, v1};

/// Labels of a node, key to value.
pub type Labels = BTreeMap<String, String>;

/// Checks labels: their number, keys and values.
pub fn check_labels(labels: &Labels) -> Result<(), FieldError> {
    field::bounded("labels", labels.len(), limits::MAX_LABELS)?;
    labels.iter().try_for_each(|(key, value)| {
        field::key("labels", key)?;
        field::value("labels", value)
    })
}

/// What the coordinator must show a node. Not shown by `Debug`.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct ControlToken(pub [u8; limits::CONTROL_TOKEN_BYTES]);

impl ControlToken {
    /// Compares without telling by its duration where the difference lies.
    pub fn matches(&self, shown: &[u8]) -> bool {
        shown.len() == self.0.len()
            && self
                .0
                .iter()
                .zip(shown)
                .fold(0, |acc, (a, b)| acc | (a ^ b))
                == 0
    }
}

impl PartialEq for ControlToken {
    fn eq(&self, other: &Self) -> bool {
        self.matches(&other.0)
    }
}

impl std::fmt::Debug for ControlToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ControlToken(..)")
    }
}

/// The metadata key under which the coordinator shows a node its [`ControlToken`].
pub const CONTROL_TOKEN_METADATA: &str = "farpage-control-token-bin";

/// A node's description of itself: the checked `RegisterNodeRequest`.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeRegistration {
    /// Its name.
    pub id: NodeId,
    /// This life of its process.
    pub incarnation: Incarnation,
    /// Bytes lent; a multiple of `extent_bytes`, at least one extent.
    pub capacity: ByteCount,
    /// Bytes per extent.
    pub extent_bytes: ByteCount,
    /// Labels, free to use.
    pub labels: Labels,
    /// Where its memory is reached, at least one, no two alike.
    pub data_addresses: Vec<DataAddress>,
    /// Where its `MemoryNode` service is.
    pub control_url: EndpointUrl,
    /// What to show it.
    pub control_token: ControlToken,
    /// The highest epoch that it has seen; zero: none.
    pub last_epoch: u64,
    /// Position and epoch of each extent that it has granted, positions ascending.
    pub granted: Vec<(u32, Epoch)>,
}

impl NodeRegistration {
    /// Extents in the pool.
    pub fn extents(&self) -> u32 {
        // Both are checked: the quotient is at most MAX_EXTENTS_PER_NODE.
        self.capacity
            .0
            .checked_div(self.extent_bytes.0)
            .unwrap_or(0) as u32
    }
}

/// Checks a capacity against its extents' size. Returns the number of extents.
pub fn check_capacity(capacity: u64, extent_bytes: ByteCount) -> Result<u32, FieldError> {
    const FIELD: &str = "capacity_bytes";
    let max = extent_bytes.0.saturating_mul(limits::MAX_EXTENTS_PER_NODE);
    field::within(FIELD, capacity, extent_bytes.0.max(1), max)?;
    if !capacity.is_multiple_of(extent_bytes.0) {
        return Err(FieldError::Malformed {
            field: FIELD,
            expected: "must be a multiple of extent_bytes",
        });
    }
    Ok((capacity / extent_bytes.0) as u32)
}

impl TryFrom<v1::RegisterNodeRequest> for NodeRegistration {
    type Error = FieldError;

    fn try_from(message: v1::RegisterNodeRequest) -> Result<Self, FieldError> {
        let id = NodeId::new(message.node_id)?;
        let incarnation = Incarnation::new(message.incarnation)?;
        let extent_bytes = ByteCount::extent(message.extent_bytes)?;
        let extents = check_capacity(message.capacity_bytes, extent_bytes)?;
        let labels: Labels = message.labels.into_iter().collect();
        check_labels(&labels)?;

        const ADDRESSES: &str = "data_addresses";
        field::bounded(
            ADDRESSES,
            message.data_addresses.len(),
            limits::MAX_DATA_ADDRESSES,
        )?;
        let mut data_addresses = Vec::with_capacity(message.data_addresses.len());
        for text in message.data_addresses {
            let address: DataAddress = text.parse()?;
            if data_addresses.contains(&address) {
                return Err(FieldError::Malformed {
                    field: ADDRESSES,
                    expected: "must not repeat an address",
                });
            }
            data_addresses.push(address);
        }
        if data_addresses.is_empty() {
            return Err(FieldError::Missing { field: ADDRESSES });
        }

        let control_url = EndpointUrl::parse_field("control_url", &message.control_url)?;
        if let EndpointUrl::Tcp(at) = &control_url {
            at.clone().reachable("control_url")?;
        }
        const TOKEN: FieldError = FieldError::Malformed {
            field: "control_token",
            expected: "must have 16 bytes",
        };
        let control_token = ControlToken(message.control_token.try_into().map_err(|_| TOKEN)?);

        field::bounded("granted", message.granted.len(), extents as usize)?;
        let mut granted = Vec::with_capacity(message.granted.len());
        for entry in message.granted {
            field::within(
                "granted.index",
                entry.index.into(),
                0,
                u64::from(extents) - 1,
            )?;
            let after_last = granted.last().is_none_or(|&(last, _)| last < entry.index);
            if !after_last {
                return Err(FieldError::Malformed {
                    field: "granted.index",
                    expected: "must ascend",
                });
            }
            let epoch = field::within("granted.epoch", entry.epoch, 1, message.last_epoch)?;
            granted.push((entry.index, Epoch::new(epoch)?));
        }

        // Half of the epochs are out of a node's reach, so that no report can use them up.
        field::within("last_epoch", message.last_epoch, 0, u64::MAX / 2)?;
        Ok(Self {
            id,
            incarnation,
            capacity: ByteCount(message.capacity_bytes),
            extent_bytes,
            labels,
            data_addresses,
            control_url,
            control_token,
            last_epoch: message.last_epoch,
            granted,
        })
    }
}

impl From<NodeRegistration> for v1::RegisterNodeRequest {
    fn from(node: NodeRegistration) -> Self {
        Self {
            node_id: node.id.into(),
            incarnation: node.incarnation.get(),
            capacity_bytes: node.capacity.0,
            extent_bytes: node.extent_bytes.0,
            labels: node.labels.into_iter().collect(),
            data_addresses: node.data_addresses.into_iter().map(String::from).collect(),
            control_url: node.control_url.to_string(),
            control_token: node.control_token.0.to_vec(),
            last_epoch: node.last_epoch,
            granted: node
                .granted
                .into_iter()
                .map(|(index, epoch)| v1::GrantedExtent {
                    index,
                    epoch: epoch.get(),
                })
                .collect(),
        }
    }
}

/// The checked `GrantExtentRequest`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeGrant {
    /// Position in the pool; the node checks it against its pool.
    pub index: u32,
    /// Newer than any that the extent has seen.
    pub epoch: Epoch,
    /// What opens it.
    pub key: AccessKey,
}

impl TryFrom<v1::GrantExtentRequest> for NodeGrant {
    type Error = FieldError;
    fn try_from(message: v1::GrantExtentRequest) -> Result<Self, FieldError> {
        let v1::GrantExtentRequest { index, epoch, key } = message;
        Ok(Self {
            index: check_index(index)?,
            epoch: Epoch::new(epoch)?,
            key: AccessKey::new(key)?,
        })
    }
}

impl From<NodeGrant> for v1::GrantExtentRequest {
    fn from(grant: NodeGrant) -> Self {
        Self {
            index: grant.index,
            epoch: grant.epoch.get(),
            key: grant.key.get(),
        }
    }
}

/// The checked `RevokeExtentRequest`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeRevoke {
    /// Position in the pool.
    pub index: u32,
    /// Everything up to and with it ends.
    pub epoch: Epoch,
}

impl TryFrom<v1::RevokeExtentRequest> for NodeRevoke {
    type Error = FieldError;
    fn try_from(message: v1::RevokeExtentRequest) -> Result<Self, FieldError> {
        Ok(Self {
            index: check_index(message.index)?,
            epoch: Epoch::new(message.epoch)?,
        })
    }
}

impl From<NodeRevoke> for v1::RevokeExtentRequest {
    fn from(revoke: NodeRevoke) -> Self {
        Self {
            index: revoke.index,
            epoch: revoke.epoch.get(),
        }
    }
}

fn check_index(index: u32) -> Result<u32, FieldError> {
    field::within("index", index.into(), 0, limits::MAX_EXTENTS_PER_NODE - 1)?;
    Ok(index)
}
