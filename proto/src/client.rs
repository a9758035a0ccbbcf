//! The coordinator as an agent or a command line calls it: checked types in and out, every call under a deadline.

use std::time::Duration;

use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

use crate::address::FabricKind;
use crate::field::FieldError;
use crate::ids::{ExtentId, LeaseId, NodeId};
use crate::lease::{
    ExtentGrant, GrantRequest, LeaseRequest, ReleaseRequest, Renewal, check_grants,
};
use crate::report::AgentReport;
use crate::transport::{ConnectError, EndpointUrl, connect, connect_lazy};
use crate::v1::coordinator_client::CoordinatorClient;
use crate::{limits, v1};

/// Why a call failed, by what to do next.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The lease (or node) is not known any more: everything under it is revoked. Open a new one.
    #[error("{0}")]
    Gone(String),
    /// There is not enough, the message has the totals. Release, wait, or add a node.
    #[error("{0}")]
    Exhausted(String),
    /// Nobody answered in time, or not for now. Try again; a grant under the same request id.
    #[error("the coordinator does not answer: {0}; check that it runs, then try again")]
    Unavailable(String),
    /// It will not do this however often it is asked.
    #[error("the coordinator refuses: {0}")]
    Refused(String),
    /// It answered something that is not acceptable: another version, or not a coordinator.
    #[error("the coordinator's answer is not acceptable: {0}; use the same version on both sides")]
    Answer(#[from] FieldError),
}

impl From<Status> for CallError {
    fn from(status: Status) -> Self {
        let message = status.message().to_owned();
        match status.code() {
            Code::NotFound => Self::Gone(message),
            Code::ResourceExhausted => Self::Exhausted(message),
            Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Cancelled
            | Code::Aborted
            | Code::Unknown => Self::Unavailable(message),
            _ => Self::Refused(message),
        }
    }
}

/// A lease just opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenedLease {
    /// Its id.
    pub id: LeaseId,
    /// How long it lives without a renewal; renew at a third of it.
    pub ttl: Duration,
}

/// A coordinator. Clones share the connection, which is made anew after a break with the next call.
#[derive(Clone, Debug)]
pub struct Coordinator {
    client: CoordinatorClient<Channel>,
    deadline: Duration,
}

impl Coordinator {
    /// Connects. `deadline` bounds this and each later call.
    pub async fn connect(url: &EndpointUrl, deadline: Duration) -> Result<Self, ConnectError> {
        Ok(Self::over(connect(url, deadline).await?, deadline))
    }

    /// Connects with the first call: for an agent that may start before its coordinator.
    pub fn connect_lazy(url: &EndpointUrl, deadline: Duration) -> Result<Self, ConnectError> {
        Ok(Self::over(connect_lazy(url, deadline)?, deadline))
    }

    /// Over a channel that there is. `deadline` bounds each call.
    pub fn over(channel: Channel, deadline: Duration) -> Self {
        let client = CoordinatorClient::new(channel)
            .max_decoding_message_size(limits::MAX_STATUS_BYTES)
            .max_encoding_message_size(limits::MAX_MESSAGE_BYTES);
        Self { client, deadline }
    }

    /// Opens a lease.
    pub async fn open_lease(&self, request: LeaseRequest) -> Result<OpenedLease, CallError> {
        let mut client = self.client.clone();
        let message = v1::OpenLeaseRequest::from(request);
        let answer = self
            .bounded(client.open_lease(self.request(message)))
            .await?;
        let ttl = crate::field::within("ttl_ms", answer.ttl_ms.into(), 1, u32::MAX.into())?;
        Ok(OpenedLease {
            id: LeaseId::new(answer.lease_id)?,
            ttl: Duration::from_millis(ttl),
        })
    }

    /// Puts a lease's end off. [`CallError::Gone`]: it has ended.
    pub async fn renew_lease(&self, lease: LeaseId) -> Result<Renewal, CallError> {
        let mut client = self.client.clone();
        let message = v1::RenewLeaseRequest {
            lease_id: lease.get(),
        };
        Ok(self
            .bounded(client.renew_lease(self.request(message)))
            .await?
            .try_into()?)
    }

    /// Ends a lease. Ending it again is fine.
    pub async fn close_lease(&self, lease: LeaseId) -> Result<(), CallError> {
        let mut client = self.client.clone();
        let message = v1::CloseLeaseRequest {
            lease_id: lease.get(),
        };
        self.bounded(client.close_lease(self.request(message)))
            .await
            .map(drop)
    }

    /// Gets extents: as many as asked for, or fewer when a node fails meanwhile, never none. Nodes that hang are waited for
    /// for 2 s, three times at most: a deadline below 7 s may give up on an answer that comes. Then repeat the call under
    /// the same request id.
    pub async fn grant_extents(
        &self,
        request: GrantRequest,
    ) -> Result<Vec<ExtentGrant>, CallError> {
        let mut client = self.client.clone();
        let message = v1::GrantExtentsRequest::from(request);
        Ok(check_grants(
            self.bounded(client.grant_extents(self.request(message)))
                .await?
                .grants,
        )?)
    }

    /// What a lease holds; for an agent that takes over from one that died.
    pub async fn list_grants(
        &self,
        lease: LeaseId,
        fabric: Option<FabricKind>,
    ) -> Result<Vec<ExtentGrant>, CallError> {
        let mut client = self.client.clone();
        let message = v1::ListGrantsRequest {
            lease_id: lease.get(),
            fabric: FabricKind::to_wire(fabric),
        };
        Ok(check_grants(
            self.bounded(client.list_grants(self.request(message)))
                .await?
                .grants,
        )?)
    }

    /// Gives extents back, at most [`limits::MAX_RELEASE_COUNT`]. Returns how many of them the lease held.
    pub async fn release_extents(
        &self,
        lease: LeaseId,
        extents: Vec<ExtentId>,
    ) -> Result<u32, CallError> {
        let mut client = self.client.clone();
        let message = v1::ReleaseExtentsRequest::from(ReleaseRequest { lease, extents });
        Ok(self
            .bounded(client.release_extents(self.request(message)))
            .await?
            .released)
    }

    /// Tells the agent's figures, for the status.
    pub async fn report(&self, lease: LeaseId, report: AgentReport) -> Result<(), CallError> {
        let mut client = self.client.clone();
        let message = v1::ReportAgentRequest {
            lease_id: lease.get(),
            report: Some(report.into()),
        };
        self.bounded(client.report_agent(self.request(message)))
            .await
            .map(drop)
    }

    /// Has a node drained, or no more. Asked again, it tells what is left. [`CallError::Gone`]: there is no such node.
    pub async fn drain(
        &self,
        node: NodeId,
        undo: bool,
    ) -> Result<v1::DrainNodeResponse, CallError> {
        let mut client = self.client.clone();
        let message = v1::DrainNodeRequest {
            node_id: node.into(),
            undo,
        };
        self.bounded(client.drain_node(self.request(message))).await
    }

    /// The whole cluster.
    pub async fn status(&self) -> Result<v1::GetStatusResponse, CallError> {
        let mut client = self.client.clone();
        self.bounded(client.get_status(self.request(v1::GetStatusRequest {})))
            .await
    }

    /// Tells the server the deadline too, so that it does not work in vain.
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.deadline);
        request
    }

    async fn bounded<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, CallError> {
        match tokio::time::timeout(self.deadline, call).await {
            Ok(result) => Ok(result?.into_inner()),
            Err(_) => Err(CallError::Unavailable(format!(
                "no answer within {} ms",
                self.deadline.as_millis()
            ))),
        }
    }
}
