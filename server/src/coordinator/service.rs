//! The gRPC service: checks what comes in, calls the owner, answers.

use std::sync::Arc;

use farpage_proto::lease::{GrantRequest, LeaseRequest, ReleaseRequest};
use farpage_proto::node::NodeRegistration;
use farpage_proto::report::AgentReport;
use farpage_proto::v1::coordinator_server::Coordinator;
use farpage_proto::v1::*;
use farpage_proto::{FabricKind, FieldError, Incarnation, LeaseId, NodeId, limits};
use tonic::{Request, Response, Status};

use super::clock::millis;
use super::dispatch::Dispatch;
use super::state::Timing;
use crate::random;

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct CoordinatorService {
    pub(crate) dispatch: Arc<Dispatch>,
    pub(crate) timing: Timing,
}

type Answer<T> = Result<Response<T>, Status>;

impl CoordinatorService {
    fn ttl_ms(&self) -> u32 {
        u32::try_from(millis(self.timing.lease_ttl)).unwrap_or(u32::MAX)
    }
}

#[tonic::async_trait]
impl Coordinator for CoordinatorService {
    async fn register_node(
        &self,
        request: Request<RegisterNodeRequest>,
    ) -> Answer<RegisterNodeResponse> {
        let node = Arc::new(NodeRegistration::try_from(request.into_inner())?);
        let register = || {
            let node = Arc::clone(&node);
            self.dispatch
                .owner
                .call(move |state, now| state.register_node(now, &node))
        };
        let mut result = register().await?;
        // Whoever stands in the way may be a process that has just died: look, rather than wait for its timeout. An id
        // and each address can have a holder of its own.
        for _ in 0..=limits::MAX_DATA_ADDRESSES {
            let Some(holder) = result
                .as_ref()
                .err()
                .and_then(|error| error.holder())
                .cloned()
            else {
                break;
            };
            if !self.dispatch.nodes.is_gone(&holder).await {
                break;
            }
            tracing::info!(%holder, "gone, its place is free");
            self.dispatch
                .owner
                .call(move |state, _| state.node_gone(&holder.id, holder.incarnation))
                .await?;
            result = register().await?;
        }
        let first = result
            .inspect_err(|error| tracing::warn!(node = %node.id, %error, "refused a node"))?;
        tracing::info!(node = %node.id, incarnation = %node.incarnation, capacity = %node.capacity, "registered a node");
        self.dispatch.revoke.notify_one();
        let interval = self.timing.node_timeout.min(limits::NODE_TIMEOUT) / NODE_BEATS;
        Ok(Response::new(RegisterNodeResponse {
            first_extent_id: first.0,
            heartbeat_interval_ms: u32::try_from(millis(interval)).unwrap_or(u32::MAX).max(1),
        }))
    }

    async fn node_heartbeat(
        &self,
        request: Request<NodeHeartbeatRequest>,
    ) -> Answer<NodeHeartbeatResponse> {
        let NodeHeartbeatRequest {
            node_id,
            incarnation,
        } = request.into_inner();
        let (id, life) = (NodeId::new(node_id)?, Incarnation::new(incarnation)?);
        self.dispatch
            .owner
            .call(move |state, now| state.heartbeat(now, &id, life))
            .await??;
        Ok(Response::new(NodeHeartbeatResponse {}))
    }

    async fn open_lease(&self, request: Request<OpenLeaseRequest>) -> Answer<OpenLeaseResponse> {
        let request = LeaseRequest::try_from(request.into_inner())?;
        let id = LeaseId::from_random(
            random::number().map_err(|error| Status::internal(error.to_string()))?,
        );
        tracing::info!(lease = %id, agent = %request.agent, host = %request.host, "opening a lease");
        self.dispatch
            .owner
            .call(move |state, now| state.open_lease(now, id, request))
            .await??;
        Ok(Response::new(OpenLeaseResponse {
            lease_id: id.get(),
            ttl_ms: self.ttl_ms(),
        }))
    }

    async fn renew_lease(&self, request: Request<RenewLeaseRequest>) -> Answer<RenewLeaseResponse> {
        let id = LeaseId::new(request.into_inner().lease_id)?;
        let renewal = self
            .dispatch
            .owner
            .call(move |state, now| state.renew_lease(now, id))
            .await??;
        Ok(Response::new(renewal.into()))
    }

    async fn close_lease(&self, request: Request<CloseLeaseRequest>) -> Answer<CloseLeaseResponse> {
        let id = LeaseId::new(request.into_inner().lease_id)?;
        self.dispatch
            .owner
            .call(move |state, now| state.end_lease(now, id))
            .await?;
        self.dispatch.revoke.notify_one();
        Ok(Response::new(CloseLeaseResponse {}))
    }

    async fn grant_extents(
        &self,
        request: Request<GrantExtentsRequest>,
    ) -> Answer<GrantExtentsResponse> {
        let request = GrantRequest::try_from(request.into_inner())?;
        let dispatch = Arc::clone(&self.dispatch);
        // A task of its own: a requester that hangs up must not leave extents between two states.
        let granting = tokio::spawn(async move { dispatch.grant(request).await });
        let grants = granting
            .await
            .map_err(|error| Status::internal(error.to_string()))??;
        Ok(Response::new(GrantExtentsResponse {
            grants: grants.into_iter().map(ExtentGrant::from).collect(),
        }))
    }

    async fn list_grants(&self, request: Request<ListGrantsRequest>) -> Answer<ListGrantsResponse> {
        let ListGrantsRequest { lease_id, fabric } = request.into_inner();
        let (id, fabric) = (LeaseId::new(lease_id)?, FabricKind::from_wire(fabric)?);
        let grants = self
            .dispatch
            .owner
            .call(move |state, _| state.list_grants(id, fabric))
            .await??;
        Ok(Response::new(ListGrantsResponse {
            grants: grants.into_iter().map(ExtentGrant::from).collect(),
        }))
    }

    async fn release_extents(
        &self,
        request: Request<ReleaseExtentsRequest>,
    ) -> Answer<ReleaseExtentsResponse> {
        let ReleaseRequest { lease, extents } = ReleaseRequest::try_from(request.into_inner())?;
        let released = self
            .dispatch
            .owner
            .call(move |state, now| state.release(now, lease, &extents))
            .await??;
        self.dispatch.revoke.notify_one();
        Ok(Response::new(ReleaseExtentsResponse { released }))
    }

    async fn report_agent(
        &self,
        request: Request<ReportAgentRequest>,
    ) -> Answer<ReportAgentResponse> {
        let ReportAgentRequest { lease_id, report } = request.into_inner();
        let id = LeaseId::new(lease_id)?;
        let report = AgentReport::try_from(report.ok_or(FieldError::Missing { field: "report" })?)?;
        self.dispatch
            .owner
            .call(move |state, _| state.report(id, report))
            .await??;
        Ok(Response::new(ReportAgentResponse {}))
    }

    async fn drain_node(&self, request: Request<DrainNodeRequest>) -> Answer<DrainNodeResponse> {
        let DrainNodeRequest { node_id, undo } = request.into_inner();
        let id = NodeId::new(node_id)?;
        let left = self
            .dispatch
            .owner
            .call(move |state, _| state.drain(&id, undo))
            .await??;
        Ok(Response::new(left))
    }

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Answer<GetStatusResponse> {
        Ok(Response::new(
            self.dispatch
                .owner
                .call(|state, now| state.status(now))
                .await?,
        ))
    }
}

/// Heartbeats within a node's timeout: some may be lost before it counts as silent.
const NODE_BEATS: u32 = 6;
