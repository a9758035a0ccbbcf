//! Leases and grants, checked.

use crate::address::{DataAddress, FabricKind};
use crate::field::{self, FieldError};
use crate::ids::{
    AccessKey, AgentId, ByteCount, Epoch, ExtentId, HostName, LeaseId, NodeId, RequestId, Tenant,
};
use crate::{limits, v1};

/// The checked `OpenLeaseRequest`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseRequest {
    /// Who borrows.
    pub agent: AgentId,
    /// Where it runs.
    pub host: HostName,
    /// Who pays.
    pub tenant: Tenant,
}

impl TryFrom<v1::OpenLeaseRequest> for LeaseRequest {
    type Error = FieldError;
    fn try_from(message: v1::OpenLeaseRequest) -> Result<Self, FieldError> {
        Ok(Self {
            agent: AgentId::new(message.agent_id)?,
            host: HostName::new(message.host)?,
            tenant: Tenant::new(message.tenant)?,
        })
    }
}

impl From<LeaseRequest> for v1::OpenLeaseRequest {
    fn from(request: LeaseRequest) -> Self {
        Self {
            agent_id: request.agent.into(),
            host: request.host.into(),
            tenant: request.tenant.into(),
        }
    }
}

/// The checked `GrantExtentsRequest`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantRequest {
    /// Under which lease.
    pub lease: LeaseId,
    /// How many extents; with their copies 1 to [`limits::MAX_GRANT_COUNT`].
    pub count: u32,
    /// How many copies of each, on as many nodes, 1 to [`limits::MAX_REPLICAS`].
    pub copies: u32,
    /// Of which size; `None`: any.
    pub extent_bytes: Option<ByteCount>,
    /// Nodes that are not to be used.
    pub avoid: Vec<NodeId>,
    /// Over which fabric they will be reached; `None`: any.
    pub fabric: Option<FabricKind>,
    /// What makes a repetition known.
    pub request: Option<RequestId>,
}

impl TryFrom<v1::GrantExtentsRequest> for GrantRequest {
    type Error = FieldError;
    fn try_from(message: v1::GrantExtentsRequest) -> Result<Self, FieldError> {
        let copies = field::within(
            "copies",
            message.copies.max(1).into(),
            1,
            limits::MAX_REPLICAS.into(),
        )?;
        let most = u64::from(limits::MAX_GRANT_COUNT) / copies;
        let count = field::within("count", message.count.into(), 1, most)?;
        field::bounded(
            "avoid_nodes",
            message.avoid_nodes.len(),
            limits::MAX_AVOIDED,
        )?;
        let extent_bytes = match message.extent_bytes {
            0 => None,
            bytes => Some(ByteCount::extent(bytes)?),
        };
        Ok(Self {
            lease: LeaseId::new(message.lease_id)?,
            count: count as u32,
            copies: copies as u32,
            extent_bytes,
            avoid: message
                .avoid_nodes
                .into_iter()
                .map(NodeId::new)
                .collect::<Result<_, _>>()?,
            fabric: FabricKind::from_wire(message.fabric)?,
            request: RequestId::new(message.request_id).ok(),
        })
    }
}

impl From<GrantRequest> for v1::GrantExtentsRequest {
    fn from(request: GrantRequest) -> Self {
        Self {
            lease_id: request.lease.get(),
            count: request.count,
            copies: request.copies,
            extent_bytes: request.extent_bytes.map_or(0, |bytes| bytes.0),
            avoid_nodes: request.avoid.into_iter().map(String::from).collect(),
            fabric: FabricKind::to_wire(request.fabric),
            request_id: request.request.map_or(0, RequestId::get),
        }
    }
}

/// An extent that a lease may use: the checked `ExtentGrant`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentGrant {
    /// Its name in the cluster.
    pub extent: ExtentId,
    /// Whose memory it is.
    pub node: NodeId,
    /// Position in that node's pool: what a work request names.
    pub index: u32,
    /// The grant's epoch.
    pub epoch: Epoch,
    /// What opens it.
    pub key: AccessKey,
    /// Its size.
    pub bytes: ByteCount,
    /// Where it is reached.
    pub address: DataAddress,
    /// Grants of one answer with the same number are copies of one extent.
    pub set: u32,
}

impl TryFrom<v1::ExtentGrant> for ExtentGrant {
    type Error = FieldError;
    fn try_from(message: v1::ExtentGrant) -> Result<Self, FieldError> {
        field::within(
            "index",
            message.index.into(),
            0,
            limits::MAX_EXTENTS_PER_NODE - 1,
        )?;
        Ok(Self {
            extent: ExtentId(message.extent_id),
            node: NodeId::new(message.node_id)?,
            index: message.index,
            epoch: Epoch::new(message.epoch)?,
            key: AccessKey::new(message.key)?,
            bytes: ByteCount::extent(message.bytes)?,
            address: message.data_address.parse()?,
            set: message.set,
        })
    }
}

impl From<ExtentGrant> for v1::ExtentGrant {
    fn from(grant: ExtentGrant) -> Self {
        Self {
            extent_id: grant.extent.0,
            node_id: grant.node.into(),
            index: grant.index,
            epoch: grant.epoch.get(),
            key: grant.key.get(),
            bytes: grant.bytes.0,
            data_address: grant.address.into(),
            set: grant.set,
        }
    }
}

/// Checks the grants of an answer: their number and each of them.
pub fn check_grants(grants: Vec<v1::ExtentGrant>) -> Result<Vec<ExtentGrant>, FieldError> {
    field::bounded("grants", grants.len(), limits::MAX_EXTENTS_PER_LEASE)?;
    grants.into_iter().map(ExtentGrant::try_from).collect()
}

/// The checked `ReleaseExtentsRequest`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReleaseRequest {
    /// Under which lease.
    pub lease: LeaseId,
    /// What is given back, at most [`limits::MAX_RELEASE_COUNT`].
    pub extents: Vec<ExtentId>,
}

impl TryFrom<v1::ReleaseExtentsRequest> for ReleaseRequest {
    type Error = FieldError;
    fn try_from(message: v1::ReleaseExtentsRequest) -> Result<Self, FieldError> {
        field::bounded(
            "extent_ids",
            message.extent_ids.len(),
            limits::MAX_RELEASE_COUNT,
        )?;
        Ok(Self {
            lease: LeaseId::new(message.lease_id)?,
            extents: message.extent_ids.into_iter().map(ExtentId).collect(),
        })
    }
}

impl From<ReleaseRequest> for v1::ReleaseExtentsRequest {
    fn from(request: ReleaseRequest) -> Self {
        Self {
            lease_id: request.lease.get(),
            extent_ids: request.extents.into_iter().map(|extent| extent.0).collect(),
        }
    }
}

/// What a renewal told: the checked `RenewLeaseResponse`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renewal {
    /// How long the lease lives from the time of the answer.
    pub ttl: std::time::Duration,
    /// Extents whose contents are gone; listed until released.
    pub lost: Vec<ExtentId>,
    /// Extents whose node is silent.
    pub unreachable: Vec<ExtentId>,
    /// Extents whose node is being drained.
    pub draining: Vec<ExtentId>,
}

impl TryFrom<v1::RenewLeaseResponse> for Renewal {
    type Error = FieldError;
    fn try_from(message: v1::RenewLeaseResponse) -> Result<Self, FieldError> {
        field::bounded(
            "lost_extents",
            message.lost_extents.len(),
            limits::MAX_EXTENTS_PER_LEASE,
        )?;
        field::bounded(
            "unreachable_extents",
            message.unreachable_extents.len(),
            limits::MAX_EXTENTS_PER_LEASE,
        )?;
        field::bounded(
            "draining_extents",
            message.draining_extents.len(),
            limits::MAX_EXTENTS_PER_LEASE,
        )?;
        let ttl = field::within("ttl_ms", message.ttl_ms.into(), 1, u32::MAX.into())?;
        Ok(Self {
            ttl: std::time::Duration::from_millis(ttl),
            lost: message.lost_extents.into_iter().map(ExtentId).collect(),
            unreachable: message
                .unreachable_extents
                .into_iter()
                .map(ExtentId)
                .collect(),
            draining: message.draining_extents.into_iter().map(ExtentId).collect(),
        })
    }
}

impl From<Renewal> for v1::RenewLeaseResponse {
    fn from(renewal: Renewal) -> Self {
        Self {
            ttl_ms: u32::try_from(renewal.ttl.as_millis()).unwrap_or(u32::MAX),
            lost_extents: renewal.lost.into_iter().map(|extent| extent.0).collect(),
            unreachable_extents: renewal
                .unreachable
                .into_iter()
                .map(|extent| extent.0)
                .collect(),
            draining_extents: renewal
                .draining
                .into_iter()
                .map(|extent| extent.0)
                .collect(),
        }
    }
}
