//! The memory node: lends a pool of registered memory. See [`run_node`].

mod config;
mod data_path;
mod ledger;
mod membership;
mod observer;
mod pool;
mod service;

use std::future::Future;
use std::sync::Arc;

use farpage_proto::node::{ControlToken, NodeRegistration};
use farpage_proto::transport::{EndpointUrl, ListenError, listen};
use farpage_proto::v1::memory_node_server::MemoryNodeServer;
use farpage_proto::{DataAddress, ExtentId, FieldError, Incarnation, limits};

pub use config::{Lock, NodeConfig, TcpListen};
pub use data_path::DataPathError;
pub use membership::MembershipError;
pub use observer::{Connections, NodeFigures, NodeObserver};
pub use pool::PoolError;

use crate::grpc::{self, ServeError};
use crate::random::{self, NoRandomness};
use data_path::DataPath;
use ledger::Ledger;
use pool::Pool;
use service::{Identity, NodeService};

/// What a node says once the coordinator has taken it in.
#[derive(Clone, Debug)]
pub struct NodeReady {
    /// This life of its process.
    pub incarnation: Incarnation,
    /// Where its own gRPC is served.
    pub control_url: EndpointUrl,
    /// Where its memory is reached.
    pub data_addresses: Vec<DataAddress>,
    /// The cluster-wide id of its first extent.
    pub first_extent: ExtentId,
    /// Whether the pool consists of reserved huge pages.
    pub huge_pages: bool,
    /// Whether the pool is locked in memory.
    pub locked: bool,
    /// Whom to ask for figures while it serves.
    pub observer: NodeObserver,
}

/// Why a node ended.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A setting is out of bounds.
    #[error(transparent)]
    Config(#[from] FieldError),
    /// The pool cannot be had.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The data path cannot be served.
    #[error(transparent)]
    DataPath(#[from] DataPathError),
    /// The control address cannot be had.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// No keys without randomness.
    #[error(transparent)]
    Random(#[from] NoRandomness),
    /// The coordinator does not want this node.
    #[error(transparent)]
    Membership(#[from] MembershipError),
    /// The gRPC server failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

/// Lends memory until `shutdown` completes, or the coordinator refuses this node for good. Builds the pool, serves the data
/// path and the `MemoryNode` service (with health and reflection), registers (waiting for the coordinator if it is away) and
/// sends heartbeats. Calls `ready` once registered, and never again when it has to register anew.
///
/// Each call is a new incarnation with an empty pool. Must run on a tokio runtime with time and IO.
///
/// # Errors
/// [`NodeError`]: at the start, or when another process has taken this node's id or address.
pub async fn run_node<S>(
    config: NodeConfig,
    ready: impl FnOnce(NodeReady) + Send,
    shutdown: S,
) -> Result<(), NodeError>
where
    S: Future<Output = ()> + Send,
{
    let shape = config.shape()?;
    let incarnation = Incarnation::from_random(random::number()?);
    let token = ControlToken(random::bytes()?);
    let options = config.clone();
    // Locking populates the pool: seconds for a large one.
    let pool = tokio::task::spawn_blocking(move || Pool::create(shape, &options)).await;
    let pool = Arc::new(pool.map_err(|error| PoolError::Thread(error.to_string()))??);
    let advertised = config.advertised_host().await;
    let data_path = Arc::new(DataPath::start(&config, &pool, &advertised)?);
    let ledger = Arc::new(Ledger::new(
        shape.extents,
        Arc::clone(&pool) as Arc<dyn pool::Extents>,
    ));

    let listener = listen(&config.control).await?;
    let control_url = config::advertise(listener.url(), &advertised);
    let identity = Identity {
        id: config.id.clone(),
        incarnation,
        shape,
        token,
        huge_pages: pool.huge_pages(),
        locked: pool.locked(),
        data_addresses: data_path.addresses().to_vec(),
    };
    let registration = NodeRegistration {
        id: config.id.clone(),
        incarnation,
        capacity: shape.capacity(),
        extent_bytes: shape.extent_bytes,
        labels: config.labels.clone(),
        data_addresses: data_path.addresses().to_vec(),
        control_url: control_url.clone(),
        control_token: token,
        last_epoch: 0,
        granted: Vec::new(),
    };
    let told = NodeReady {
        incarnation,
        control_url,
        data_addresses: registration.data_addresses.clone(),
        first_extent: ExtentId(0),
        huge_pages: pool.huge_pages(),
        locked: pool.locked(),
        observer: NodeObserver::new(shape, &ledger, &data_path),
    };
    let service = NodeService {
        ledger: Arc::clone(&ledger),
        identity: Arc::new(identity),
    };
    let server = MemoryNodeServer::new(service)
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES);

    let mut refused = None;
    let stop = async {
        let membership =
            membership::keep(&config.coordinator, registration, &ledger, |first_extent| {
                ready(NodeReady {
                    first_extent,
                    ..told
                });
            });
        tokio::select! {
            () = shutdown => tracing::info!("the node is asked to stop"),
            error = membership => refused = Some(error),
        }
    };
    let served = grpc::serve(listener, server, stop).await;
    // Joins the responders' threads, which may wait for requesters that are inside the pool.
    let stopped = tokio::task::spawn_blocking(move || {
        // Whoever is being told its figures ends it in our place.
        Arc::into_inner(data_path).map(DataPath::stop)
    });
    if let Err(error) = stopped.await {
        tracing::warn!(%error, "the data path did not stop in order");
    }
    match refused {
        Some(error) => Err(error.into()),
        None => Ok(served?),
    }
}
