//! The data path: the fabric's responders over the pool.

use std::net::TcpListener;
use std::sync::Arc;

use farpage_proto::{DataAddress, FieldError};

use super::config::{NodeConfig, advertise_at};
use super::pool::Pool;

/// Why the data path is not served.
#[derive(Debug, thiserror::Error)]
pub enum DataPathError {
    /// Nothing to serve.
    #[error("no fabric is chosen; choose shm, tcp, or both")]
    NoFabric,
    /// An address cannot be used.
    #[error(transparent)]
    Address(#[from] FieldError),
    /// An address cannot be had.
    #[error("cannot serve {address}: {source}; choose another address, or stop its holder")]
    Start {
        /// Which.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
}

/// The running responders.
#[derive(Debug)]
pub(crate) struct DataPath {
    addresses: Vec<DataAddress>,
    _tcp: Option<TcpListener>,
}

impl DataPath {
    /// Starts what the settings name.
    pub(crate) fn start(
        config: &NodeConfig,
        pool: &Arc<Pool>,
        advertised: &str,
    ) -> Result<Self, DataPathError> {
        let _ = (pool.memory(), pool.access());
        let mut addresses = Vec::new();
        if let Some(name) = &config.shm {
            addresses.push(format!("shm:{name}").parse()?);
        }
        let mut held = None;
        if let Some(tcp) = &config.tcp {
            let listening =
                TcpListener::bind((tcp.listen.host.as_str(), tcp.listen.port)).and_then(|listener| {
                    let port = listener.local_addr()?.port();
                    Ok((listener, port))
                });
            let (listener, port) = listening
                .map_err(|source| DataPathError::Start { address: format!("tcp:{}", tcp.listen), source })?;
            let mut at = advertise_at(&tcp.listen, advertised);
            at.port = port;
            addresses.push(DataAddress::Tcp(at));
            held = Some(listener);
        }
        if addresses.is_empty() { Err(DataPathError::NoFabric) } else { Ok(Self { addresses, _tcp: held }) }
    }

    /// Where requesters connect.
    pub(crate) fn addresses(&self) -> &[DataAddress] {
        &self.addresses
    }

    /// Stops all responders.
    pub(crate) fn stop(self) {}
}
