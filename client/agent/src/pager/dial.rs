//! Connections being made: each by a thread of its own, so that no pager waits for a node that does not answer.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use farpage_fabric::address::AddressError;
use farpage_fabric::memory::RegisteredMemory;
use farpage_fabric::{Endpoint, FabricAddress, OwnDevice, connect};
use rustix::event::{EventfdFlags, eventfd};

use super::links::WINDOW;

/// How long a connection may take to come up.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);

/// Readable once some attempt is over.
#[derive(Clone, Debug)]
pub(super) struct Dialled(Arc<OwnedFd>);

impl Dialled {
    pub(super) fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(event)))
    }

    fn tell(&self) {
        // Fails when it is readable already, which is as good.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    /// The attempts that are over are about to be looked at.
    pub(super) fn quiet(&self) {
        let mut bytes = [0; 8];
        // Empty when nobody told, which is as good.
        let _ = rustix::io::read(&*self.0, &mut bytes);
    }
}

impl AsFd for Dialled {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What an attempt has come to.
pub(super) enum Said {
    NothingYet,
    /// Why, for the log.
    Failed(String),
    Connected(Box<dyn Endpoint>),
}

/// An attempt under way. Dropped, it ends by itself within [`CONNECT_DEADLINE`].
pub(super) struct Dialling(Receiver<Result<Box<dyn Endpoint>, String>>);

impl Dialling {
    /// Starts one. The connection has these regions registered, in their order.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(super) fn start(
        address: &str,
        device: &Arc<OwnDevice>,
        regions: Vec<Arc<RegisteredMemory>>,
        dialled: &Dialled,
    ) -> io::Result<Self> {
        let (tell, said) = channel();
        let (address, device, dialled) = (address.to_owned(), Arc::clone(device), dialled.clone());
        std::thread::Builder::new()
            .name("dial".into())
            .spawn(move || {
                // The pager may have ended meanwhile.
                let _ = tell.send(dial(&address, &device, regions));
                dialled.tell();
            })?;
        Ok(Self(said))
    }

    pub(super) fn said(&self) -> Said {
        match self.0.try_recv() {
            Ok(Ok(endpoint)) => Said::Connected(endpoint),
            Ok(Err(why)) => Said::Failed(why),
            Err(TryRecvError::Empty) => Said::NothingYet,
            Err(TryRecvError::Disconnected) => Said::Failed("the attempt broke off".to_owned()),
        }
    }
}

/// Connects, with these regions registered in their order. Takes [`CONNECT_DEADLINE`] at most.
pub(crate) fn dial(
    address: &str,
    device: &OwnDevice,
    regions: Vec<Arc<RegisteredMemory>>,
) -> Result<Box<dyn Endpoint>, String> {
    let address: FabricAddress = address
        .parse()
        .map_err(|error: AddressError| error.to_string())?;
    let endpoint = connect(
        &address.by(device),
        WINDOW,
        Instant::now() + CONNECT_DEADLINE,
    )
    .map_err(|error| error.to_string())?;
    let mut endpoint = crate::injection::inject(endpoint).map_err(|error| error.to_string())?;
    for region in regions {
        endpoint.register(region);
    }
    Ok(endpoint)
}
