//! The coordinator: nodes, capacity, placement, leases. See [`run_coordinator`].

mod clock;
mod dispatch;
mod drain;
mod error;
mod grant;
mod lease;
mod node_client;
mod nodes;
mod observer;
mod owner;
mod placement;
mod record;
mod service;
mod state;
#[cfg(test)]
mod state_tests;
mod status;
mod store;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use farpage_proto::limits;
use farpage_proto::transport::{EndpointUrl, ListenError, listen};
use farpage_proto::v1::coordinator_server::CoordinatorServer;

pub use error::{GrantError, HeartbeatError, NoLease, NoNode, OpenError, RegisterError};
pub use nodes::Holder;
pub use observer::{ClusterFigures, CoordinatorObserver};
pub use record::Unreadable;
pub use state::Timing;
pub use store::{StoreError, StoreUrl, StoreUrlError};

use crate::grpc::{self, ServeError};
use dispatch::Dispatch;
use owner::Owner;
use service::CoordinatorService;

/// How long the last transaction and closing the store may take.
const CLOSE_DEADLINE: Duration = Duration::from_secs(5);

/// How to run a coordinator.
#[derive(Clone, Debug)]
pub struct CoordinatorConfig {
    /// Where to serve gRPC; port 0 takes any.
    pub listen: EndpointUrl,
    /// Where the state is kept.
    pub store: StoreUrl,
    /// Leases' and nodes' timing.
    pub timing: Timing,
}

/// What a coordinator says once it serves.
#[derive(Clone, Debug)]
pub struct CoordinatorReady {
    /// Where, with the port that it got.
    pub url: EndpointUrl,
    /// Whom to ask for figures while it does.
    pub observer: CoordinatorObserver,
}

/// Why a coordinator ended.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// The address cannot be had.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The store cannot be opened or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The gRPC server failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

/// Serves the `Coordinator` service, health and reflection until `shutdown` completes. Calls `ready` once requests are
/// taken. Leases and grants are kept by a `file:` store; every lease then has one full time to live from the start.
///
/// Must run on a tokio runtime with time and IO, of either flavour.
///
/// # Errors
/// [`CoordinatorError`], at the start or when the store fails later (nothing unstored is ever answered).
pub async fn run_coordinator<S>(
    config: CoordinatorConfig,
    ready: impl FnOnce(CoordinatorReady) + Send,
    shutdown: S,
) -> Result<(), CoordinatorError>
where
    S: Future<Output = ()> + Send,
{
    // The store first: a second coordinator on the same file must not take requests.
    let (owner, ended) = Owner::start(&config.store, config.timing).await?;
    let listener = listen(&config.listen).await?;
    let url = listener.url().clone();
    let dispatch = Arc::new(Dispatch::new(owner));
    let service = CoordinatorService {
        dispatch: Arc::clone(&dispatch),
        timing: config.timing,
    };
    let server = CoordinatorServer::new(service)
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_STATUS_BYTES);
    let background = tokio::spawn(Arc::clone(&dispatch).run());
    let mut ended = ended;

    tracing::info!(%url, store = %config.store, "the coordinator serves");
    let observer = CoordinatorObserver(dispatch.owner.clone());
    ready(CoordinatorReady { url, observer });
    let mut store_failure = None;
    let stop = async {
        tokio::select! {
            () = shutdown => {}
            result = &mut ended => store_failure = result.ok().and_then(Result::err),
        }
    };
    let served = grpc::serve(listener, server, stop).await;
    background.abort();
    dispatch.owner.stop().await;
    if store_failure.is_none() {
        // So that whoever starts next finds the file closed.
        let _ = tokio::time::timeout(CLOSE_DEADLINE, ended).await;
    }
    match store_failure {
        Some(error) => Err(error.into()),
        None => Ok(served?),
    }
}
