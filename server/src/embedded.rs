//! Coordinator and node in one process, for `farpage run` without an agent. See [`embedded`].

use std::future::Future;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use farpage_proto::address::HostPort;
use farpage_proto::transport::EndpointUrl;
use farpage_proto::{ByteCount, DataAddress, FabricKind, FieldError, NodeId};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tokio::sync::oneshot;

use crate::coordinator::{CoordinatorConfig, CoordinatorError, StoreUrl, Timing, run_coordinator};
use crate::node::{NodeConfig, NodeError, NodeReady, TcpListen, run_node};

/// The node's name in a cluster of its own.
const NODE_ID: &str = "embedded";

/// How to run both.
#[derive(Debug)]
pub struct EmbeddedConfig {
    /// Bytes to lend; rounded down to whole extents. Nothing is populated up front.
    pub capacity: ByteCount,
    /// Bytes per extent.
    pub extent_bytes: ByteCount,
    /// The data path: shared memory, TCP on the loopback, or an RDMA device that talks to itself.
    pub fabric: FabricKind,
    /// By which RDMA device, as [`NodeConfig::rdma_device`] has it.
    pub rdma_device: String,
    /// Name of the abstract Unix socket of the coordinator's gRPC, without `@`; the node's are `NAME.node` and `NAME.shm`.
    /// At most 100 characters, unique on this machine: put the process id in it.
    pub name: String,
    /// Be a further node of the coordinator of this name, and no coordinator.
    pub beside: Option<String>,
    /// Use reserved huge pages when there are any.
    pub huge_pages: bool,
    /// End when this pipe or socket reports end-of-file: its other end is held by the launcher, and so closed with it
    /// however it dies.
    pub exit_on_eof: Option<OwnedFd>,
}

impl EmbeddedConfig {
    /// The usual settings: shared memory, default extents.
    pub fn new(capacity: ByteCount, name: impl Into<String>) -> Self {
        Self {
            capacity,
            extent_bytes: ByteCount(farpage_proto::limits::DEFAULT_EXTENT_BYTES),
            fabric: FabricKind::Shm,
            rdma_device: String::new(),
            name: name.into(),
            beside: None,
            huge_pages: false,
            exit_on_eof: None,
        }
    }
}

/// What is said once extents can be granted.
#[derive(Clone, Debug)]
pub struct EmbeddedReady {
    /// The coordinator's gRPC.
    pub coordinator: EndpointUrl,
    /// Where the memory is reached.
    pub data_addresses: Vec<DataAddress>,
}

/// Why it ended.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// A setting is out of bounds.
    #[error(transparent)]
    Config(#[from] FieldError),
    /// No runtime, or the descriptor of `exit_on_eof` cannot be waited for.
    #[error("cannot start: {0}; check the limits on processes and open files")]
    System(#[from] io::Error),
    /// The coordinator failed.
    #[error(transparent)]
    Coordinator(#[from] CoordinatorError),
    /// The node failed.
    #[error(transparent)]
    Node(#[from] NodeError),
}

/// Runs a coordinator that forgets and one node on a runtime of their own in this thread, until `shutdown` completes or
/// `exit_on_eof` ends. Calls `ready` once extents can be granted.
///
/// # Errors
/// [`EmbeddedError`] at the start, or when either part fails.
pub fn embedded<S>(
    config: EmbeddedConfig,
    ready: impl FnOnce(EmbeddedReady) + Send,
    shutdown: S,
) -> Result<(), EmbeddedError>
where
    S: Future<Output = ()> + Send,
{
    let coordinator_name = config.beside.as_ref().unwrap_or(&config.name);
    let coordinator_url = EndpointUrl::parse_field("name", &format!("unix:@{coordinator_name}"))?;
    let node = node_config(&config, coordinator_url.clone())?;
    let coordinator = CoordinatorConfig {
        listen: coordinator_url.clone(),
        store: StoreUrl::Memory,
        timing: Timing::default(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let result = runtime.block_on(async {
        let launcher = config.exit_on_eof.map(watch).transpose()?;
        let launcher_gone = async {
            match launcher {
                Some(end) => drop(end.await),
                None => std::future::pending().await,
            }
        };
        let beside = config.beside.is_some();
        // Dropping either sender tells its part to stop; dropping a part drops the other's.
        let (serving, served) = oneshot::channel();
        let (stop_coordinator, stopped) = oneshot::channel::<()>();
        let coordinator = run_coordinator(
            coordinator,
            move |_| serving.send(()).unwrap_or_default(),
            async {
                let _ = stopped.await;
            },
        );
        let stop = async {
            tokio::select! {
                () = shutdown => {}
                () = launcher_gone => tracing::info!("the launcher is gone"),
            }
        };
        let told = move |node: NodeReady| {
            ready(EmbeddedReady {
                coordinator: coordinator_url,
                data_addresses: node.data_addresses,
            });
        };
        if beside {
            return Ok(run_node(node, told, stop).await?);
        }
        let node = async move {
            // A coordinator that fails before it serves ends the select below.
            if served.await.is_err() {
                return std::future::pending().await;
            }
            run_node(node, told, stop).await
        };
        tokio::pin!(coordinator);
        tokio::select! {
            ended = &mut coordinator => return ended.map_err(EmbeddedError::from),
            ended = node => ended?,
        }
        drop(stop_coordinator);
        Ok(coordinator.await?)
    });
    // A scrub that is still running must not hold up the exit.
    runtime.shutdown_background();
    result
}

fn node_config(
    config: &EmbeddedConfig,
    coordinator: EndpointUrl,
) -> Result<NodeConfig, EmbeddedError> {
    let id = match &config.beside {
        None => NODE_ID.to_owned(),
        // Names may be longer than identifiers; its end tells it apart.
        Some(first) => {
            let own = config.name.strip_prefix(first).unwrap_or(&config.name);
            format!("{NODE_ID}-{own}")
        }
    };
    let mut node = NodeConfig::new(NodeId::new(id)?, config.capacity, coordinator);
    node.extent_bytes = config.extent_bytes;
    node.huge_pages = config.huge_pages;
    node.rdma_device.clone_from(&config.rdma_device);
    node.control = EndpointUrl::parse_field("name", &format!("unix:@{}.node", config.name))?;
    match config.fabric {
        FabricKind::Shm => node.shm = Some(format!("@{}.shm", config.name)),
        FabricKind::Tcp => node.tcp = Some(on_loopback()),
        FabricKind::Rdma => node.rdma = Some(on_loopback()),
    }
    Ok(node)
}

fn on_loopback() -> TcpListen {
    TcpListen {
        listen: HostPort {
            host: Ipv4Addr::LOCALHOST.to_string(),
            port: 0,
        },
    }
}

/// Completes when the descriptor reports its end, or fails. What comes before is ignored. A thread of its own does the
/// waiting: it blocks whatever the descriptor's flags, which it shares with the launcher, say. It ends with the process.
fn watch(fd: OwnedFd) -> io::Result<oneshot::Receiver<()>> {
    let (ended, end) = oneshot::channel();
    std::thread::Builder::new()
        .name("launcher-watch".to_owned())
        .spawn(move || {
            wait_for_end(&fd);
            // Nobody listens any more when the end came from elsewhere.
            let _ = ended.send(());
        })?;
    Ok(end)
}

fn wait_for_end(fd: &OwnedFd) {
    let mut ignored = [0; 64];
    loop {
        let mut wanted = [PollFd::new(fd, PollFlags::IN)];
        match poll(&mut wanted, None).and_then(|_| rustix::io::read(fd, &mut ignored)) {
            Ok(0) => return,
            Ok(_) | Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => return,
        }
    }
}
