//! The data path: the fabric's responders over the pool.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;

use farpage_fabric::address::{AddressError, ShmAddress};
use farpage_fabric::shm::{ShmLimits, ShmResponder};
use farpage_fabric::tcp::{ResponderLimits, TcpResponder};
#[cfg(feature = "verbs")]
use farpage_fabric::verbs::{DeviceChoice, VerbsLimits, VerbsResponder};
use farpage_proto::{DataAddress, FabricKind, FieldError};

use super::config::{NodeConfig, TcpListen, advertise_at};
use super::observer::Connections;
use super::pool::Pool;

/// Why the data path is not served.
#[derive(Debug, thiserror::Error)]
pub enum DataPathError {
    /// Nothing to serve.
    #[error("no fabric is chosen; choose shm, tcp or rdma")]
    NoFabric,
    /// An address cannot be told to others.
    #[error(transparent)]
    Address(#[from] FieldError),
    /// An address is none of the fabric's.
    #[error(transparent)]
    Form(#[from] AddressError),
    /// Verbs are not built in.
    #[cfg(not(feature = "verbs"))]
    #[error("this build has no rdma transport; choose tcp or shm, or build with the feature verbs")]
    NoRdma,
    /// No choice of a device.
    #[cfg(feature = "verbs")]
    #[error(transparent)]
    Device(#[from] farpage_fabric::verbs::DeviceChoiceError),
    /// No device, or none that works.
    #[cfg(feature = "verbs")]
    #[error("cannot serve {address}: {source}")]
    Rdma {
        /// Where the control connections were to come.
        address: String,
        /// What is missing.
        source: io::Error,
    },
    /// An address cannot be had.
    #[error("cannot serve {address}: {source}; choose another address, or stop its holder")]
    Start {
        /// Which.
        address: String,
        /// What the system said.
        source: io::Error,
    },
}

/// The running responders. They stop when dropped.
#[derive(Debug)]
pub(crate) struct DataPath {
    addresses: Vec<DataAddress>,
    tcp: Option<TcpResponder>,
    shm: Option<ShmResponder>,
    #[cfg(feature = "verbs")]
    rdma: Option<VerbsResponder>,
}

impl DataPath {
    /// Starts what the settings name.
    pub(crate) fn start(
        config: &NodeConfig,
        pool: &Pool,
        advertised: &str,
    ) -> Result<Self, DataPathError> {
        let mut path = Self {
            addresses: Vec::new(),
            tcp: None,
            shm: None,
            #[cfg(feature = "verbs")]
            rdma: None,
        };
        if let Some(listen) = &config.tcp {
            path.start_tcp(listen, pool, advertised)?;
        }
        if let Some(listen) = &config.rdma {
            path.start_rdma(listen, &config.rdma_device, pool, advertised)?;
        }
        if let Some(name) = &config.shm {
            path.start_shm(name, pool)?;
        }
        if path.addresses.is_empty() {
            Err(DataPathError::NoFabric)
        } else {
            Ok(path)
        }
    }

    fn start_tcp(
        &mut self,
        tcp: &TcpListen,
        pool: &Pool,
        advertised: &str,
    ) -> Result<(), DataPathError> {
        let listener = TcpListener::bind((tcp.listen.host.as_str(), tcp.listen.port));
        let started = listener.and_then(|listener| {
            let port = listener.local_addr()?.port();
            let (memory, access) = (Arc::clone(pool.memory()), Arc::clone(pool.access()));
            Ok((
                TcpResponder::start(listener, memory, access, ResponderLimits::default())?,
                port,
            ))
        });
        let (responder, port) = started.map_err(|source| DataPathError::Start {
            address: format!("tcp:{}", tcp.listen),
            source,
        })?;
        let mut at = advertise_at(&tcp.listen, advertised);
        at.port = port;
        self.addresses.push(DataAddress::Tcp(at));
        self.tcp = Some(responder);
        Ok(())
    }

    #[cfg(not(feature = "verbs"))]
    fn start_rdma(
        &mut self,
        _: &TcpListen,
        _: &str,
        _: &Pool,
        _: &str,
    ) -> Result<(), DataPathError> {
        Err(DataPathError::NoRdma)
    }

    #[cfg(feature = "verbs")]
    fn start_rdma(
        &mut self,
        rdma: &TcpListen,
        device: &str,
        pool: &Pool,
        advertised: &str,
    ) -> Result<(), DataPathError> {
        let address = format!("rdma:{}", rdma.listen);
        let listener =
            TcpListener::bind((rdma.listen.host.as_str(), rdma.listen.port)).map_err(|source| {
                DataPathError::Start {
                    address: address.clone(),
                    source,
                }
            })?;
        let (memory, access) = (Arc::clone(pool.memory()), Arc::clone(pool.access()));
        let choice = if device.is_empty() {
            DeviceChoice::default()
        } else {
            device.parse()?
        };
        let limits = VerbsLimits::default();
        let responder = VerbsResponder::start(listener, &choice, memory, access, limits)
            .map_err(|source| DataPathError::Rdma { address, source })?;
        tracing::info!(device = responder.device(), "memory is served by RDMA");
        let mut at = advertise_at(&rdma.listen, advertised);
        at.port = responder.local_addr().port();
        self.addresses.push(DataAddress::Rdma(at));
        self.rdma = Some(responder);
        Ok(())
    }

    fn start_shm(&mut self, name: &str, pool: &Pool) -> Result<(), DataPathError> {
        let address: DataAddress = format!("shm:{name}").parse()?;
        let socket: ShmAddress = name.parse()?;
        let (memory, access) = (Arc::clone(pool.memory()), Arc::clone(pool.access()));
        let responder = ShmResponder::start(&socket, memory, access, ShmLimits::default())
            .map_err(|source| DataPathError::Start {
                address: address.to_string(),
                source,
            })?;
        self.addresses.push(address);
        self.shm = Some(responder);
        Ok(())
    }

    /// Where requesters connect.
    pub(crate) fn addresses(&self) -> &[DataAddress] {
        &self.addresses
    }

    /// What became of the connections to each.
    pub(crate) fn connections(&self) -> Vec<(FabricKind, Connections)> {
        let mut all = Vec::new();
        if let Some(stats) = self.tcp.as_ref().map(TcpResponder::stats) {
            let connections = Connections {
                admitted: stats.connections,
                turned_away: stats.turned_away,
                refused: stats.bad_handshakes,
                broken: stats.protocol_errors,
            };
            all.push((FabricKind::Tcp, connections));
        }
        if let Some(stats) = self.shm.as_ref().map(ShmResponder::stats) {
            let connections = Connections {
                admitted: stats.connections,
                turned_away: stats.turned_away,
                refused: stats.bad_handshakes + stats.forbidden,
                // A requester over shared memory sends nothing that could break a protocol.
                broken: 0,
            };
            all.push((FabricKind::Shm, connections));
        }
        #[cfg(feature = "verbs")]
        if let Some(stats) = self.rdma.as_ref().map(VerbsResponder::stats) {
            let connections = Connections {
                admitted: stats.connections,
                turned_away: stats.turned_away,
                refused: stats.bad_handshakes,
                broken: stats.failed,
            };
            all.push((FabricKind::Rdma, connections));
        }
        all
    }

    /// Stops all responders: closes their sockets and connections. May wait for requesters that are inside the pool.
    pub(crate) fn stop(mut self) {
        self.tcp.iter_mut().for_each(TcpResponder::stop);
        self.shm.iter_mut().for_each(ShmResponder::stop);
        #[cfg(feature = "verbs")]
        self.rdma.iter_mut().for_each(VerbsResponder::stop);
    }
}
