//! Being a member of the cluster: registering, heartbeats, registering again.

use std::time::Duration;

use farpage_proto::node::NodeRegistration;
use farpage_proto::transport::{ConnectError, EndpointUrl, connect_lazy};
use farpage_proto::v1::coordinator_client::CoordinatorClient;
use farpage_proto::v1::{NodeHeartbeatRequest, RegisterNodeRequest};
use farpage_proto::{ExtentId, limits};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::ledger::Ledger;

/// How long one call to the coordinator may take. Its disk may be slow.
const CALL_DEADLINE: Duration = Duration::from_secs(5);
/// The pause after the first failure ...
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
/// ... doubles up to this.
const MAX_BACKOFF: Duration = Duration::from_secs(2);

/// Why the coordinator does not want this node.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    /// The URL cannot be used.
    #[error(transparent)]
    Url(#[from] ConnectError),
    /// The id or an address is another's, or the registration is not acceptable.
    #[error("the coordinator at {coordinator} refuses this node: {}", status.message())]
    Refused {
        /// Which coordinator.
        coordinator: EndpointUrl,
        /// What it said.
        status: Status,
    },
}

/// Stays a member, for good. Calls `joined` after the first registration. Returns only when refused.
pub(crate) async fn keep(
    coordinator: &EndpointUrl,
    registration: NodeRegistration,
    ledger: &Ledger,
    joined: impl FnOnce(ExtentId),
) -> MembershipError {
    let channel = match connect_lazy(coordinator, CALL_DEADLINE) {
        Ok(channel) => channel,
        Err(error) => return error.into(),
    };
    let mut client = CoordinatorClient::new(channel)
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES);
    let mut joined = Some(joined);
    let mut backoff = Backoff::default();
    loop {
        let status = match register(&mut client, &registration, ledger).await {
            Ok((first_extent, interval)) => {
                backoff = Backoff::default();
                tracing::info!(%coordinator, %first_extent, "registered");
                if let Some(joined) = joined.take() {
                    joined(first_extent);
                }
                beat(&mut client, &registration, interval).await
            }
            Err(status) => status,
        };
        match status.code() {
            // Forgotten: register again at once.
            Code::NotFound => {
                tracing::warn!(%coordinator, "the coordinator does not know this node, registering again");
            }
            Code::AlreadyExists
            | Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::Unimplemented => {
                return MembershipError::Refused {
                    coordinator: coordinator.clone(),
                    status,
                };
            }
            _ => {
                tracing::warn!(%coordinator, %status, "the coordinator cannot be reached, trying again");
                backoff.pause().await;
            }
        }
    }
}

async fn register(
    client: &mut CoordinatorClient<Channel>,
    registration: &NodeRegistration,
    ledger: &Ledger,
) -> Result<(ExtentId, Duration), Status> {
    let (granted, last_epoch) = ledger.inventory();
    let registration = NodeRegistration {
        granted,
        last_epoch,
        ..registration.clone()
    };
    let call = client.register_node(timed(RegisterNodeRequest::from(registration)));
    let answer = bounded(call).await?.into_inner();
    let interval = Duration::from_millis(answer.heartbeat_interval_ms.into());
    Ok((
        ExtentId(answer.first_extent_id),
        interval.clamp(Duration::from_millis(10), limits::HEARTBEAT_INTERVAL),
    ))
}

/// Heartbeats until the coordinator says something else than yes. One that cannot be reached for a moment is asked again.
async fn beat(
    client: &mut CoordinatorClient<Channel>,
    registration: &NodeRegistration,
    interval: Duration,
) -> Status {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut away = false;
    loop {
        ticks.tick().await;
        let message = NodeHeartbeatRequest {
            node_id: registration.id.to_string(),
            incarnation: registration.incarnation.get(),
        };
        match bounded(client.node_heartbeat(timed(message))).await {
            Ok(_) if away => {
                tracing::info!("the coordinator is back");
                away = false;
            }
            Ok(_) => {}
            Err(status)
                if matches!(
                    status.code(),
                    Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown
                ) =>
            {
                if !away {
                    tracing::warn!(%status, "the coordinator does not answer heartbeats; grants stay in force");
                }
                away = true;
            }
            Err(status) => return status,
        }
    }
}

fn timed<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_DEADLINE);
    request
}

async fn bounded<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(CALL_DEADLINE, call).await {
        Ok(result) => result,
        Err(_) => Err(Status::deadline_exceeded(
            "no answer from the coordinator in time",
        )),
    }
}

/// Pauses that grow, so that a coordinator that comes back is not met by everybody at full pace.
#[derive(Debug)]
struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(FIRST_BACKOFF)
    }
}

impl Backoff {
    async fn pause(&mut self) {
        // Between half and all of it, so that nodes spread out. Any bits do.
        let spread = crate::random::number().unwrap_or(0) % 500;
        tokio::time::sleep(self.0.mul_f64(1.0 - spread as f64 / 1000.0)).await;
        self.0 = (self.0 * 2).min(MAX_BACKOFF);
    }
}
