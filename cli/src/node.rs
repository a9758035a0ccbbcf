//! `farpage node`: lends this machine's memory.

use farpage_proto::address::HostPort;
use farpage_proto::transport::EndpointUrl;
use farpage_proto::{ByteCount, FieldError, NodeId};
use farpage_server::node::{Lock, TcpListen};
use farpage_server::{NodeConfig, run_node};

use crate::args::{Fabric, Label, NodeArgs};
use crate::daemon;
use crate::metrics::{Endpoint, MetricsError};

/// A node's parameters, judged and with their defaults filled in.
#[derive(Debug)]
pub(crate) struct NodeOptions<'a> {
    pub(crate) args: &'a NodeArgs,
    pub(crate) id: String,
    pub(crate) labels: &'a [Label],
}

/// Why no memory is lent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NodeError {
    #[error("this machine's host name cannot be read; name the node with --id")]
    NoName,
    #[error("{0}")]
    Field(#[from] FieldError),
    #[error("--fabric tcp and rdma need --listen ADDR:PORT, where the data path is served")]
    NoListen,
    #[error("cannot start: {0}")]
    Runtime(#[from] std::io::Error),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    #[error(transparent)]
    Node(#[from] farpage_server::NodeError),
}

/// Lends memory until a signal ends it.
pub(crate) fn command(args: &NodeArgs) -> Result<(), NodeError> {
    let id = match &args.id {
        Some(id) => id.clone(),
        None => {
            let name = std::fs::read_to_string("/proc/sys/kernel/hostname")
                .map_err(|_| NodeError::NoName)?;
            Some(name.trim().to_owned())
                .filter(|name| !name.is_empty())
                .ok_or(NodeError::NoName)?
        }
    };
    serve(&NodeOptions {
        args,
        id,
        labels: &args.labels,
    })
}

fn serve(options: &NodeOptions<'_>) -> Result<(), NodeError> {
    let args = options.args;
    daemon::start_logging();
    let coordinator = EndpointUrl::parse_field("--coordinator", &args.coordinator)?;
    let mut config = NodeConfig::new(
        NodeId::new(options.id.clone())?,
        ByteCount(args.capacity.bytes()),
        coordinator,
    );
    match args.fabric {
        Fabric::Shm => {
            config.shm = Some(
                args.listen
                    .clone()
                    .unwrap_or_else(|| format!("@farpage-node-{}", options.id)),
            );
        }
        Fabric::Tcp | Fabric::Rdma => {
            let listen = args.listen.as_deref().ok_or(NodeError::NoListen)?;
            let listen = HostPort::parse("--listen", listen)?;
            // The coordinator reaches the node's own gRPC where others reach its memory, at a port that it is told.
            config.control = EndpointUrl::Tcp(HostPort {
                host: listen.host.clone(),
                port: 0,
            });
            let listen = Some(TcpListen { listen });
            if args.fabric == Fabric::Rdma {
                config.rdma = listen;
                config.rdma_device = args.rdma.device.clone();
            } else {
                config.tcp = listen;
            }
        }
    }
    // Who maps reserved huge pages can take them away, and over shared memory agents do map the pool.
    config.huge_pages = args.huge_pages || args.fabric != Fabric::Shm;
    config.lock = if args.lock {
        Lock::AtOnce
    } else {
        Lock::AsUsed
    };
    config.labels = options
        .labels
        .iter()
        .map(|label| (label.key.clone(), label.value.clone()))
        .collect();
    let metrics = Endpoint::start(args.metrics.metrics)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let id = options.id.clone();
    let ready = move |ready: farpage_server::NodeReady| {
        let addresses: Vec<String> = ready
            .data_addresses
            .iter()
            .map(ToString::to_string)
            .collect();
        let metrics = metrics.map(|metrics| metrics.open(ready.observer));
        daemon::say(&format!(
            "node {id} lends memory at {}\n",
            addresses
                .into_iter()
                .chain(metrics)
                .collect::<Vec<_>>()
                .join(", ")
        ));
    };
    Ok(runtime.block_on(run_node(config, ready, daemon::told_to_stop()))?)
}
