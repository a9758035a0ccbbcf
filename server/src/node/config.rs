//! How to run a node.

use std::net::{IpAddr, Ipv4Addr};

pub use farpage_fabric::memory::Lock;
use farpage_proto::address::HostPort;
use farpage_proto::node::{Labels, check_capacity, check_labels};
use farpage_proto::transport::EndpointUrl;
use farpage_proto::{ByteCount, FieldError, NodeId, limits};
use tokio::net::UdpSocket;

/// Settings of a node.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Its name, unique in the cluster.
    pub id: NodeId,
    /// Bytes to lend; rounded down to whole extents.
    pub capacity: ByteCount,
    /// Bytes per extent: a power of two between 1 MiB and 256 MiB. [`limits::DEFAULT_EXTENT_BYTES`].
    pub extent_bytes: ByteCount,
    /// The coordinator.
    pub coordinator: EndpointUrl,
    /// Serve the data path over shared memory under this Unix socket name: `@NAME` or an absolute path.
    pub shm: Option<String>,
    /// Serve the data path over TCP.
    pub tcp: Option<TcpListen>,
    /// Serve the data path over RDMA; this is where the control connections come to.
    pub rdma: Option<TcpListen>,
    /// By which RDMA device, port and address, as `device=NAME&port=N&gid=N` or a part of it; empty for the best.
    pub rdma_device: String,
    /// Where to serve the node's own gRPC; port 0 takes any.
    pub control: EndpointUrl,
    /// The host name or address that others reach this node by, when it listens on all addresses. `None`: the address that
    /// the route to the coordinator leaves from.
    pub advertise_host: Option<String>,
    /// Free to use.
    pub labels: Labels,
    /// Use reserved huge pages when there are any.
    pub huge_pages: bool,
    /// Whether to lock the pool in memory, when allowed.
    pub lock: Lock,
}

/// Where to listen for the data path.
#[derive(Clone, Debug)]
pub struct TcpListen {
    /// Host or address, and port (0: any).
    pub listen: HostPort,
}

/// The pool's shape, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) extent_bytes: ByteCount,
    pub(crate) extents: u32,
}

impl Shape {
    pub(crate) fn capacity(self) -> ByteCount {
        ByteCount(self.extent_bytes.0 * u64::from(self.extents))
    }
}

impl NodeConfig {
    /// A node with the usual settings, which serves nothing yet: set `shm`, `tcp` or `rdma`.
    pub fn new(id: NodeId, capacity: ByteCount, coordinator: EndpointUrl) -> Self {
        let control = EndpointUrl::Tcp(HostPort {
            host: Ipv4Addr::LOCALHOST.to_string(),
            port: 0,
        });
        Self {
            id,
            capacity,
            extent_bytes: ByteCount(limits::DEFAULT_EXTENT_BYTES),
            coordinator,
            shm: None,
            tcp: None,
            rdma: None,
            rdma_device: String::new(),
            control,
            advertise_host: None,
            labels: Labels::new(),
            huge_pages: false,
            lock: Lock::No,
        }
    }

    /// Checks the settings that the coordinator would refuse.
    pub(crate) fn shape(&self) -> Result<Shape, FieldError> {
        let extent_bytes = ByteCount::extent(self.extent_bytes.0)?;
        let whole = self.capacity.0 - self.capacity.0 % extent_bytes.0;
        let extents = check_capacity(whole, extent_bytes)?;
        check_labels(&self.labels)?;
        if whole != self.capacity.0 {
            tracing::info!(asked = %self.capacity, lent = %ByteCount(whole), "the capacity is rounded down to whole extents");
        }
        Ok(Shape {
            extent_bytes,
            extents,
        })
    }

    /// What to say in place of "all addresses".
    pub(crate) async fn advertised_host(&self) -> String {
        if let Some(host) = &self.advertise_host {
            return host.clone();
        }
        match &self.coordinator {
            EndpointUrl::Tcp(at) => route_from(at)
                .await
                .unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
                .to_string(),
            _ => Ipv4Addr::LOCALHOST.to_string(),
        }
    }
}

/// The address that packets to a host leave from. Connecting a UDP socket sends nothing.
async fn route_from(to: &HostPort) -> Option<IpAddr> {
    for to in tokio::net::lookup_host((to.host.as_str(), to.port))
        .await
        .ok()?
    {
        let any: IpAddr = if to.is_ipv4() {
            [0; 4].into()
        } else {
            [0u16; 8].into()
        };
        let socket = UdpSocket::bind((any, 0)).await.ok()?;
        if socket.connect(to).await.is_ok() {
            return socket.local_addr().ok().map(|at| at.ip());
        }
    }
    None
}

/// A listening address as others can use it.
pub(crate) fn advertise_at(at: &HostPort, host: &str) -> HostPort {
    let everywhere = at
        .host
        .parse::<IpAddr>()
        .is_ok_and(|ip| ip.is_unspecified());
    HostPort {
        host: if everywhere {
            host.to_owned()
        } else {
            at.host.clone()
        },
        port: at.port,
    }
}

/// A listening URL as others can use it.
pub(crate) fn advertise(url: &EndpointUrl, host: &str) -> EndpointUrl {
    match url {
        EndpointUrl::Tcp(at) => EndpointUrl::Tcp(advertise_at(at, host)),
        other => other.clone(),
    }
}
