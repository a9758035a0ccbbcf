//! A requester's end of a shared-memory connection.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, socket_with,
};

use crate::access::key_memory_bytes;
use crate::address::ShmAddress;
use crate::connect::{ConnectError, check_window, handshake_error, remaining, send_all, welcome};
use crate::endpoint::{
    Completion, Endpoint, LocalSlice, PostError, RegionId, RemoteSlice, WorkError, WorkId,
};
use crate::gate::{GATE_BYTES, SharedGate};
use crate::geometry::PoolGeometry;
use crate::memory::RegisteredMemory;
use crate::regions::Regions;
use crate::shm::handover;
use crate::wire::{ClientHello, ServerHello, VERSION};

/// A responder that stops says so in shared memory, at once; one that was killed shows only at the socket, which is
/// looked at once in so many posts and empty polls. The looks cost a system call, some 0.2 us.
const LOOK_EVERY: u32 = 64;

/// Pause before connecting again to a listener whose backlog is full.
const BACKLOG_NAP: Duration = Duration::from_millis(1);

/// A connection to a [`crate::shm::ShmResponder`]. Posts copy at once; the completion comes with the next poll.
#[derive(Debug)]
pub struct ShmEndpoint {
    socket: OwnedFd,
    pool: RegisteredMemory,
    gate: SharedGate,
    geometry: PoolGeometry,
    max_transfer: u32,
    window: usize,
    regions: Regions,
    done: VecDeque<Completion>,
    connected: bool,
    until_look: u32,
}

impl ShmEndpoint {
    /// Connects, and maps what the responder hands over. At most `window` requests, 1..=[`crate::MAX_WINDOW`], will
    /// be outstanding. Blocks until `deadline` at most.
    ///
    /// # Errors
    /// [`ConnectError`], with what to do next.
    pub fn connect(
        address: &ShmAddress,
        window: usize,
        deadline: Instant,
    ) -> Result<Self, ConnectError> {
        check_window(window)?;
        let socket = open(address, deadline).map_err(|error| ConnectError::Unreachable {
            address: format!("shm:{address}"),
            error,
        })?;
        // A responder that turns us away does not wait for our hello: read what it says even if sending fails.
        let sent = send_all(
            &socket,
            &ClientHello { version: VERSION }.encode(),
            deadline,
        );
        let (hello, descriptors) = handover::receive(&socket, deadline).map_err(handshake_error)?;
        let (geometry, max_transfer) = welcome(ServerHello::decode(&hello)?)?;
        sent.map_err(handshake_error)?;
        let Ok([pool, keys, gate]) = <[OwnedFd; handover::DESCRIPTORS]>::try_from(descriptors)
        else {
            return Err(ConnectError::HungUp);
        };
        let pool_bytes = usize::try_from(geometry.pool_bytes()).map_err(io::Error::other)?;
        let pool = RegisteredMemory::from_memfd(pool, pool_bytes)?;
        let keys = RegisteredMemory::from_memfd_read_only(keys, key_memory_bytes(&geometry))?;
        let gate = RegisteredMemory::from_memfd(gate, GATE_BYTES)?;
        let gate = SharedGate::new(geometry, keys, gate).map_err(io::Error::other)?;
        Ok(Self {
            socket,
            pool,
            gate,
            geometry,
            max_transfer,
            window,
            regions: Regions::default(),
            done: VecDeque::new(),
            connected: true,
            until_look: LOOK_EVERY,
        })
    }

    /// The responder's pool.
    #[must_use]
    pub fn geometry(&self) -> PoolGeometry {
        self.geometry
    }

    /// Notices a responder that is gone.
    fn look(&mut self) {
        self.until_look -= 1;
        if self.until_look > 0 && !self.gate.is_closed() {
            return;
        }
        self.until_look = LOOK_EVERY;
        // The responder never sends anything, so only "nothing yet" means that it lives.
        let mut byte = [0u8; 1];
        let alive = matches!(
            recv(&self.socket, &mut byte, RecvFlags::DONTWAIT),
            Err(Errno::AGAIN | Errno::INTR)
        );
        self.connected = self.connected && alive && !self.gate.is_closed();
    }

    fn post(
        &mut self,
        id: WorkId,
        local: LocalSlice,
        remote: RemoteSlice,
        copy: impl FnOnce(&RegisteredMemory, &RegisteredMemory, u64) -> bool,
    ) -> Result<(), PostError> {
        self.look();
        if !self.connected {
            return Err(PostError::Disconnected);
        }
        let region = self.regions.check(local, self.max_transfer)?;
        if self.done.len() >= self.window {
            return Err(PostError::WindowFull);
        }
        let result = match self
            .gate
            .check(remote.extent, remote.key, remote.offset, local.len)
        {
            Ok(guard) if copy(region, &self.pool, guard.pool_offset()) => Ok(()),
            Ok(_) => Err(WorkError::RemoteBounds),
            Err(error) => Err(error),
        };
        self.done.push_back(Completion { id, result });
        Ok(())
    }
}

impl Endpoint for ShmEndpoint {
    fn register(&mut self, memory: Arc<RegisteredMemory>) -> RegionId {
        self.regions.register(memory)
    }

    fn post_read(
        &mut self,
        id: WorkId,
        local: LocalSlice,
        remote: RemoteSlice,
    ) -> Result<(), PostError> {
        self.post(id, local, remote, |region, pool, at| {
            pool.copy_to(at, region, local.offset, local.len as usize)
                .is_ok()
        })
    }

    fn post_write(
        &mut self,
        id: WorkId,
        local: LocalSlice,
        remote: RemoteSlice,
    ) -> Result<(), PostError> {
        self.post(id, local, remote, |region, pool, at| {
            region
                .copy_to(local.offset, pool, at, local.len as usize)
                .is_ok()
        })
    }

    fn flush(&mut self) {}

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        let count = self.done.len();
        if count == 0 {
            self.look();
        }
        // What was copied is done, whatever became of the responder since.
        out.extend(self.done.drain(..));
        count
    }

    fn credits(&self) -> usize {
        self.window - self.done.len()
    }

    fn window(&self) -> usize {
        self.window
    }

    fn is_connected(&self) -> bool {
        self.connected && !self.gate.is_closed()
    }

    /// Nothing wakes who sleeps on what was done as it was asked for.
    fn arm(&mut self) -> bool {
        self.done.is_empty()
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Connects without blocking beyond the deadline, even when the listener's backlog is full.
fn open(address: &ShmAddress, deadline: Instant) -> io::Result<OwnedFd> {
    let name = match address {
        ShmAddress::Abstract(name) => SocketAddrUnix::new_abstract_name(name.as_bytes())?,
        ShmAddress::Path(path) => SocketAddrUnix::new(path)?,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        match connect(&socket, &name) {
            Ok(()) => return Ok(socket),
            Err(Errno::AGAIN | Errno::INTR) => {
                std::thread::sleep(BACKLOG_NAP.min(remaining(deadline)?));
            }
            Err(error) => return Err(error.into()),
        }
    }
}
