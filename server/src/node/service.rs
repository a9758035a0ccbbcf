//! The node's gRPC service.

use std::sync::Arc;

use farpage_proto::node::{CONTROL_TOKEN_METADATA, ControlToken, NodeGrant, NodeRevoke};
use farpage_proto::v1::memory_node_server::MemoryNode;
use farpage_proto::v1::{
    GrantExtentRequest, GrantExtentResponse, NodeInfoRequest, NodeInfoResponse,
    RevokeExtentRequest, RevokeExtentResponse,
};
use farpage_proto::{DataAddress, Incarnation, NodeId};
use tonic::{Request, Response, Status};

use super::config::Shape;
use super::ledger::{Ledger, LedgerError};

/// What does not change while the node runs.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) id: NodeId,
    pub(crate) incarnation: Incarnation,
    pub(crate) shape: Shape,
    pub(crate) token: ControlToken,
    pub(crate) huge_pages: bool,
    pub(crate) locked: bool,
    pub(crate) data_addresses: Vec<DataAddress>,
}

/// See the module.
#[derive(Clone)]
pub(crate) struct NodeService {
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) identity: Arc<Identity>,
}

impl NodeService {
    /// Only the coordinator knows the token.
    fn authorize<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let shown = request
            .metadata()
            .get_bin(CONTROL_TOKEN_METADATA)
            .and_then(|value| value.to_bytes().ok());
        match shown {
            Some(shown) if self.identity.token.matches(&shown) => Ok(()),
            _ => Err(Status::permission_denied(
                "only the coordinator that this node registered with may call this",
            )),
        }
    }
}

impl From<LedgerError> for Status {
    fn from(error: LedgerError) -> Self {
        let message = error.to_string();
        match error {
            LedgerError::NoSuchExtent { .. } => Status::invalid_argument(message),
            LedgerError::Pool(_) => Status::internal(message),
            _ => Status::failed_precondition(message),
        }
    }
}

#[tonic::async_trait]
impl MemoryNode for NodeService {
    async fn grant_extent(
        &self,
        request: Request<GrantExtentRequest>,
    ) -> Result<Response<GrantExtentResponse>, Status> {
        self.authorize(&request)?;
        self.ledger
            .grant(NodeGrant::try_from(request.into_inner())?)?;
        Ok(Response::new(GrantExtentResponse {}))
    }

    async fn revoke_extent(
        &self,
        request: Request<RevokeExtentRequest>,
    ) -> Result<Response<RevokeExtentResponse>, Status> {
        self.authorize(&request)?;
        let revoke = NodeRevoke::try_from(request.into_inner())?;
        let ledger = Arc::clone(&self.ledger);
        // The fence waits for copies in progress and the scrub for the kernel; both go on if the caller hangs up.
        let revoked = tokio::task::spawn_blocking(move || ledger.revoke(revoke)).await;
        revoked.map_err(|error| Status::internal(error.to_string()))??;
        Ok(Response::new(RevokeExtentResponse {}))
    }

    async fn node_info(
        &self,
        _: Request<NodeInfoRequest>,
    ) -> Result<Response<NodeInfoResponse>, Status> {
        let identity = &self.identity;
        Ok(Response::new(NodeInfoResponse {
            node_id: identity.id.to_string(),
            incarnation: identity.incarnation.get(),
            capacity_bytes: identity.shape.capacity().0,
            extent_bytes: identity.shape.extent_bytes.0,
            granted_extents: self.ledger.held(),
            huge_pages: identity.huge_pages,
            locked: identity.locked,
            data_addresses: identity
                .data_addresses
                .iter()
                .map(ToString::to_string)
                .collect(),
        }))
    }
}
