//! Calls to nodes: one channel per control URL, each call under a deadline.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use farpage_proto::limits;
use farpage_proto::node::{CONTROL_TOKEN_METADATA, NodeGrant, NodeRevoke};
use farpage_proto::transport::{ConnectError, EndpointUrl, connect, connect_lazy};
use farpage_proto::v1::memory_node_client::MemoryNodeClient;
use farpage_proto::v1::{GrantExtentRequest, NodeInfoRequest, RevokeExtentRequest};
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Request, Status};

use super::nodes::Holder;
use super::state::{NodeOrder, OrderKind};

/// How long connecting to a node may take.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);
/// How long a node that stands in another's way has to show that it lives.
const PROBE_DEADLINE: Duration = Duration::from_millis(500);

/// The channels, kept while their nodes' URLs are in use.
#[derive(Debug, Default)]
pub(crate) struct NodeClients {
    channels: Mutex<HashMap<EndpointUrl, Channel>>,
}

impl NodeClients {
    /// Asks a node for what an order says. `Ok` means that the node has done it.
    pub(crate) async fn send(&self, order: &NodeOrder, deadline: Duration) -> Result<(), Status> {
        let channel = self.channel(&order.control_url)?;
        let mut client =
            MemoryNodeClient::new(channel).max_decoding_message_size(limits::MAX_MESSAGE_BYTES);
        let call = async {
            match order.kind {
                OrderKind::Grant(key) => {
                    let message = GrantExtentRequest::from(NodeGrant {
                        index: order.index,
                        epoch: order.epoch,
                        key,
                    });
                    client
                        .grant_extent(authorized(order, message, deadline))
                        .await
                        .map(drop)
                }
                OrderKind::Revoke => {
                    let message = RevokeExtentRequest::from(NodeRevoke {
                        index: order.index,
                        epoch: order.epoch,
                    });
                    client
                        .revoke_extent(authorized(order, message, deadline))
                        .await
                        .map(drop)
                }
            }
        };
        let timeout =
            || Status::deadline_exceeded(format!("no answer within {} ms", deadline.as_millis()));
        tokio::time::timeout(deadline, call)
            .await
            .unwrap_or_else(|_| Err(timeout()))
    }

    /// Whether a holder is gone for sure: nobody listens at its address, or somebody else answers. Silence proves
    /// nothing: a stopped process, or a network that is cut, may come back.
    pub(crate) async fn is_gone(&self, holder: &Holder) -> bool {
        let probe = async {
            let channel = match connect(&holder.control_url, PROBE_DEADLINE).await {
                Ok(channel) => channel,
                Err(ConnectError::Refused { kind, .. }) => {
                    return matches!(
                        kind,
                        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
                    );
                }
                Err(_) => return false,
            };
            match MemoryNodeClient::new(channel)
                .node_info(NodeInfoRequest {})
                .await
            {
                Ok(info) => {
                    let info = info.into_inner();
                    (info.node_id.as_str(), info.incarnation)
                        != (holder.id.as_str(), holder.incarnation.get())
                }
                Err(_) => false,
            }
        };
        tokio::time::timeout(PROBE_DEADLINE, probe)
            .await
            .unwrap_or(false)
    }

    fn channel(&self, url: &EndpointUrl) -> Result<Channel, Status> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(url) {
            return Ok(channel.clone());
        }
        // Nodes that come and go leave channels behind; starting over costs a reconnect each.
        if channels.len() >= 2 * limits::MAX_NODES {
            channels.clear();
        }
        let channel = connect_lazy(url, CONNECT_DEADLINE)
            .map_err(|error| Status::unavailable(error.to_string()))?;
        channels.insert(url.clone(), channel.clone());
        Ok(channel)
    }
}

fn authorized<T>(order: &NodeOrder, message: T, deadline: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request.metadata_mut().insert_bin(
        CONTROL_TOKEN_METADATA,
        MetadataValue::from_bytes(&order.token.0),
    );
    request
}
