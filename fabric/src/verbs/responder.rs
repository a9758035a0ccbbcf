//! Serves a pool over verbs: a thread per connection, which sleeps while the devices work.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvFlags, recv};

use super::DeviceChoice;
use super::device::{Device, explain};
use super::door::VerbsDoor;
use super::wire::{Answer, Ask, FRAME_BYTES, HELLO_BYTES, Port, Tell, VERSION, decode_hello};
use crate::MAX_TRANSFER;
use crate::acceptor::{Acceptor, Host};
use crate::access::{AccessTable, Door};
use crate::connect::{receive_exact, send_all};
use crate::memory::RegisteredMemory;

/// Frames received at a time.
const INPUT_BYTES: usize = 64 * FRAME_BYTES;

/// A requester that takes no answers for so long is cut off.
const SEND_STALL_LIMIT: Duration = Duration::from_secs(5);

/// What one responder may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerbsLimits {
    /// Connections at a time; each costs a thread, three queue pairs and the pinning of what it is granted.
    pub connections: usize,
    /// How long a new connection may take over its hello.
    pub handshake: Duration,
    /// Whether to use the device's memory windows, if it has any of type 2B; otherwise a region is registered per grant.
    pub windows: bool,
}

impl Default for VerbsLimits {
    fn default() -> Self {
        Self {
            connections: 256,
            handshake: Duration::from_secs(5),
            windows: true,
        }
    }
}

/// What a responder did since it started. Of reads and writes it knows nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VerbsStats {
    /// Connections that passed the handshake.
    pub connections: u64,
    /// Connections that were told that all places are taken.
    pub turned_away: u64,
    /// Connections that sent no proper hello, or none in time.
    pub bad_handshakes: u64,
    /// Connections that were closed because they broke the protocol later, or the device failed.
    pub failed: u64,
    /// Lanes opened.
    pub lanes: u64,
    /// Extents opened to a lane.
    pub bound: u64,
    /// Keys refused.
    pub refused: u64,
}

#[derive(Debug, Default)]
struct Counters {
    connections: AtomicU64,
    turned_away: AtomicU64,
    bad_handshakes: AtomicU64,
    failed: AtomicU64,
    lanes: AtomicU64,
    bound: AtomicU64,
    refused: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[derive(Debug)]
struct Shared {
    device: Arc<Device>,
    pool: Arc<RegisteredMemory>,
    access: Arc<AccessTable>,
    limits: VerbsLimits,
    counters: Counters,
}

/// A running responder. Dropping it stops it.
#[derive(Debug)]
pub struct VerbsResponder {
    shared: Arc<Shared>,
    acceptor: Acceptor,
}

impl VerbsResponder {
    /// Serves `pool` by the chosen device to whoever comes to `listener` and holds keys of `access`.
    ///
    /// # Errors
    /// `InvalidInput` when the pool is smaller than the table's geometry says; otherwise what is missing of a device, or what
    /// the kernel said.
    pub fn start(
        listener: TcpListener,
        choice: &DeviceChoice,
        pool: Arc<RegisteredMemory>,
        access: Arc<AccessTable>,
        limits: VerbsLimits,
    ) -> io::Result<Self> {
        if (pool.len() as u64) < access.geometry().pool_bytes() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the pool is smaller than its extents",
            ));
        }
        let device = Device::open(choice, Some(listener.local_addr()?.ip()))?;
        let shared = Arc::new(Shared {
            device: Arc::new(device),
            pool,
            access,
            limits,
            counters: Counters::default(),
        });
        let acceptor = Acceptor::start(listener, "verbs", limits.connections, shared.clone())?;
        Ok(Self { shared, acceptor })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.acceptor.local_addr()
    }

    /// The device's name.
    #[must_use]
    pub fn device(&self) -> &str {
        &self.shared.device.name
    }

    /// What it did.
    #[must_use]
    pub fn stats(&self) -> VerbsStats {
        let counters = &self.shared.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        VerbsStats {
            connections: get(&counters.connections),
            turned_away: get(&counters.turned_away),
            bad_handshakes: get(&counters.bad_handshakes),
            failed: get(&counters.failed),
            lanes: get(&counters.lanes),
            bound: get(&counters.bound),
            refused: get(&counters.refused),
        }
    }

    /// Closes the listener and every connection, and waits for their threads: afterwards nothing touches the pool on
    /// behalf of a requester.
    pub fn stop(&mut self) {
        self.acceptor.stop();
    }
}

impl Host for Shared {
    fn serve(&self, socket: &TcpStream, stopping: &AtomicBool) {
        serve(socket, self, stopping);
    }

    fn turn_away(&self, socket: &TcpStream) {
        count(&self.counters.turned_away);
        // A courtesy: it fits the socket's buffer or is not sent.
        let _ = send_all(socket, &Answer::Busy.encode(), Instant::now());
    }
}

/// Serves one connection until it ends.
fn serve(socket: &TcpStream, shared: &Shared, stopping: &AtomicBool) {
    let Ok(their_port) = receive_hello(socket, shared) else {
        count(&shared.counters.bad_handshakes);
        return;
    };
    let door = VerbsDoor::new(
        &shared.device,
        their_port,
        &shared.pool,
        &shared.access,
        shared.limits.windows,
    );
    let door = match door {
        Ok(door) => Arc::new(door),
        Err(error) => {
            count(&shared.counters.failed);
            let reason = explain("taking a connection in", &error);
            tracing::warn!(%reason, "a connection is turned away");
            return;
        }
    };
    let as_door: Arc<dyn Door> = door.clone();
    if shared.access.add_door(Arc::clone(&as_door)).is_err() {
        return shared.turn_away(socket);
    }
    count(&shared.counters.connections);
    if let Err(error) = answer(socket, &door, shared)
        && error.kind() != io::ErrorKind::UnexpectedEof
        && !stopping.load(Ordering::Acquire)
    {
        count(&shared.counters.failed);
        let reason = explain("serving a connection", &error);
        tracing::warn!(%reason, "a connection is given up");
    }
    // Revocations pass it by once it is removed, so it must be closed first.
    door.close();
    shared.access.remove_door(&as_door);
}

fn receive_hello(socket: &TcpStream, shared: &Shared) -> io::Result<Port> {
    let deadline = Instant::now() + shared.limits.handshake;
    socket.set_nonblocking(true)?;
    crate::tcp::tune(socket)?;
    let mut hello = [0; HELLO_BYTES];
    receive_exact(socket, &mut hello, deadline)?;
    match decode_hello(&hello) {
        Ok((_, Some(port))) => Ok(port),
        Ok((_, None)) => {
            send_all(socket, &Answer::OtherVersion(VERSION).encode(), deadline)?;
            Err(io::ErrorKind::InvalidData.into())
        }
        Err(error) => Err(io::Error::new(io::ErrorKind::InvalidData, error)),
    }
}

/// Answers what the requester asks, and tells it what happens, until it leaves.
fn answer(socket: &TcpStream, door: &VerbsDoor, shared: &Shared) -> io::Result<()> {
    let welcome = Answer::Welcome {
        port: shared.device.as_told(),
        geometry: shared.access.geometry(),
        max_transfer: MAX_TRANSFER,
    };
    let tell = |bytes: &[u8]| send_all(socket, bytes, Instant::now() + SEND_STALL_LIMIT);
    tell(&welcome.encode())?;
    let mut input = [0; INPUT_BYTES];
    let mut received = 0;
    loop {
        let wake = door.wake_fd();
        let mut fds = [
            PollFd::new(socket, PollFlags::IN),
            PollFd::from_borrowed_fd(wake, PollFlags::IN),
        ];
        if poll(&mut fds, None).is_err() {
            continue;
        }
        for news in door.take_news() {
            tell(&news.encode())?;
        }
        let room = input.get_mut(received..).unwrap_or_default();
        match recv(socket, room, RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((got, _)) => received += got,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let taken = input;
        let (frames, _) = taken
            .get(..received)
            .unwrap_or_default()
            .as_chunks::<FRAME_BYTES>();
        for frame in frames {
            let ask = Ask::decode(frame)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            let told = match ask {
                Ask::Open {
                    lane,
                    generation,
                    queue,
                    packet,
                } => {
                    count(&shared.counters.lanes);
                    door.open(lane, generation, queue, packet)?
                }
                Ask::Bind {
                    lane,
                    generation,
                    extent,
                    key,
                } => door.bind(lane, generation, extent, key)?,
            };
            match told {
                Tell::Bound { .. } => count(&shared.counters.bound),
                Tell::Refused { .. } => count(&shared.counters.refused),
                Tell::Opened { .. } | Tell::Gone { .. } => {}
            }
            tell(&told.encode())?;
        }
        let used = frames.len() * FRAME_BYTES;
        input.copy_within(used..received, 0);
        received -= used;
    }
}
