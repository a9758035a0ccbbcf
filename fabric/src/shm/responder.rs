//! Hands a pool to requesters on the same host: one thread for all of them, as it has next to nothing to do.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv, sockopt};

use crate::MAX_TRANSFER;
use crate::access::{AccessTable, FENCE_DEADLINE};
use crate::address::ShmAddress;
use crate::connect::send_all;
use crate::gate::{GATE_BYTES, Gate};
use crate::memory::{MemoryOptions, RegisteredMemory};
use crate::shm::handover;
use crate::wire::{CLIENT_HELLO_BYTES, ClientHello, ServerHello, VERSION};

/// After a failed accept (no descriptors left, say) the listener rests: the cause does not pass in a moment.
const ACCEPT_REST: Duration = Duration::from_millis(20);

/// Which users' processes are let in.
#[derive(Clone, Default)]
pub enum PeerPolicy {
    /// The responder's own user, and root.
    #[default]
    SameUser,
    /// Those for whose uid the function says yes.
    Allow(Arc<dyn Fn(u32) -> bool + Send + Sync>),
}

impl PeerPolicy {
    fn lets_in(&self, uid: u32) -> bool {
        match self {
            Self::SameUser => uid == 0 || uid == rustix::process::geteuid().as_raw(),
            Self::Allow(allow) => allow(uid),
        }
    }
}

impl fmt::Debug for PeerPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SameUser => "SameUser",
            Self::Allow(_) => "Allow(..)",
        })
    }
}

/// What one responder may take.
#[derive(Clone, Debug)]
pub struct ShmLimits {
    /// Connections at a time; each costs two descriptors and a page. More are told that it is busy.
    pub connections: usize,
    /// How long a new connection may take over its hello.
    pub handshake: Duration,
    /// Who may connect.
    pub policy: PeerPolicy,
}

impl Default for ShmLimits {
    fn default() -> Self {
        Self {
            connections: 256,
            handshake: Duration::from_secs(5),
            policy: PeerPolicy::default(),
        }
    }
}

/// What a responder did since it started. What requesters copy, it does not see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShmStats {
    /// Connections that were handed the pool.
    pub connections: u64,
    /// Connections that were told that all places are taken.
    pub turned_away: u64,
    /// Connections of users who may not connect.
    pub forbidden: u64,
    /// Connections that sent no proper hello, or none in time.
    pub bad_handshakes: u64,
}

#[derive(Debug)]
struct Shared {
    pool: Arc<RegisteredMemory>,
    access: Arc<AccessTable>,
    limits: ShmLimits,
    stopping: AtomicBool,
    connections: AtomicU64,
    turned_away: AtomicU64,
    forbidden: AtomicU64,
    bad_handshakes: AtomicU64,
}

/// A running responder. Dropping it stops it, and removes its socket's path.
#[derive(Debug)]
pub struct ShmResponder {
    shared: Arc<Shared>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    address: ShmAddress,
}

impl ShmResponder {
    /// Serves `pool` at `address` to whoever the policy lets in.
    ///
    /// # Errors
    /// `AddrInUse` when somebody listens there (a path that nobody listens at any more is taken over); `InvalidInput`
    /// when the pool is smaller than the table's geometry says; otherwise what the kernel said.
    pub fn start(
        address: &ShmAddress,
        pool: Arc<RegisteredMemory>,
        access: Arc<AccessTable>,
        limits: ShmLimits,
    ) -> io::Result<Self> {
        if (pool.len() as u64) < access.geometry().pool_bytes() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the pool is smaller than its extents",
            ));
        }
        let listener = listen(address)?;
        listener.set_nonblocking(true)?;
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let shared = Arc::new(Shared {
            pool,
            access,
            limits,
            stopping: AtomicBool::new(false),
            connections: AtomicU64::new(0),
            turned_away: AtomicU64::new(0),
            forbidden: AtomicU64::new(0),
            bad_handshakes: AtomicU64::new(0),
        });
        let thread = std::thread::Builder::new()
            .name("fabric-shm".into())
            .spawn({
                let (shared, wake) = (shared.clone(), wake.clone());
                move || serve(&listener, &wake, &shared)
            })?;
        Ok(Self {
            shared,
            wake,
            thread: Some(thread),
            address: address.clone(),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> &ShmAddress {
        &self.address
    }

    /// What it did.
    #[must_use]
    pub fn stats(&self) -> ShmStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ShmStats {
            connections: get(&self.shared.connections),
            turned_away: get(&self.shared.turned_away),
            forbidden: get(&self.shared.forbidden),
            bad_handshakes: get(&self.shared.bad_handshakes),
        }
    }

    /// Closes the listener and every connection. Afterwards no cooperating requester touches the pool; one that does
    /// not leave it within [`FENCE_DEADLINE`] is not waited for.
    pub fn stop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        // Writing 1 to a fresh eventfd cannot fail.
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
            if let ShmAddress::Path(path) = &self.address {
                // Whoever removed it before us is welcome.
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

impl Drop for ShmResponder {
    fn drop(&mut self) {
        self.stop();
    }
}

fn listen(address: &ShmAddress) -> io::Result<UnixListener> {
    let in_use = |error: io::Error| {
        let advice = "another process listens there; stop it or choose another address";
        match error.kind() {
            io::ErrorKind::AddrInUse => {
                io::Error::new(error.kind(), format!("shm:{address}: {error}: {advice}"))
            }
            kind => io::Error::new(kind, format!("shm:{address}: {error}")),
        }
    };
    match address {
        ShmAddress::Abstract(name) => SocketAddr::from_abstract_name(name)
            .and_then(|name| UnixListener::bind_addr(&name))
            .map_err(in_use),
        ShmAddress::Path(path) => match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_abandoned(path) => {
                std::fs::remove_file(path)
                    .and_then(|()| UnixListener::bind(path))
                    .map_err(in_use)
            }
            other => other.map_err(in_use),
        },
    }
}

/// Whether a path is a socket that nobody listens at: what a responder leaves behind that was killed.
fn is_abandoned(path: &Path) -> bool {
    UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// One requester.
struct Connection {
    socket: UnixStream,
    hello: [u8; CLIENT_HELLO_BYTES],
    hello_len: usize,
    deadline: Instant,
    /// From the hello on.
    gate: Option<Gate>,
}

/// What is to become of a connection that had something to say.
enum Verdict {
    Keep,
    Close,
}

fn serve(listener: &UnixListener, wake: &OwnedFd, shared: &Arc<Shared>) {
    let mut connections: Vec<Connection> = Vec::new();
    while !shared.stopping.load(Ordering::Acquire) {
        let mut fds: Vec<PollFd<'_>> = vec![
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(wake, PollFlags::IN),
        ];
        fds.extend(
            connections
                .iter()
                .map(|connection| PollFd::new(&connection.socket, PollFlags::IN)),
        );
        let timeout = next_deadline(&connections);
        if poll(&mut fds, timeout.as_ref()).is_err() {
            continue;
        }
        let ready: Vec<bool> = fds
            .iter()
            .skip(2)
            .map(|fd| !fd.revents().is_empty())
            .collect();
        let mut ready = ready.into_iter();
        let now = Instant::now();
        connections.retain_mut(|connection| {
            let verdict = if ready.next().unwrap_or(false) {
                hear(connection, shared)
            } else {
                Verdict::Keep
            };
            let late = connection.gate.is_none() && now >= connection.deadline;
            if late {
                shared.bad_handshakes.fetch_add(1, Ordering::Relaxed);
            }
            matches!(verdict, Verdict::Keep) && !late
        });
        match listener.accept() {
            Ok((socket, _)) => connections.extend(admit(socket, connections.len(), shared)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => std::thread::sleep(ACCEPT_REST),
        }
    }
    // Dropping a gate lets revocations pass it by, so it must be left first.
    let gates: Vec<&Gate> = connections
        .iter()
        .filter_map(|connection| connection.gate.as_ref())
        .collect();
    for gate in &gates {
        gate.close();
    }
    let deadline = Instant::now() + FENCE_DEADLINE;
    while gates.iter().any(|gate| gate.is_occupied()) && Instant::now() < deadline {
        std::thread::yield_now();
    }
}

/// When the first handshake is overdue.
fn next_deadline(connections: &[Connection]) -> Option<Timespec> {
    let first = connections
        .iter()
        .filter(|connection| connection.gate.is_none())
        .map(|c| c.deadline)
        .min()?;
    let left = first.saturating_duration_since(Instant::now());
    Some(Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(left.subsec_nanos()),
    })
}

fn admit(socket: UnixStream, open: usize, shared: &Shared) -> Option<Connection> {
    let uid = sockopt::socket_peercred(&socket).ok()?.uid.as_raw();
    let refusal = if !shared.limits.policy.lets_in(uid) {
        shared.forbidden.fetch_add(1, Ordering::Relaxed);
        Some(ServerHello::Forbidden)
    } else if open >= shared.limits.connections {
        shared.turned_away.fetch_add(1, Ordering::Relaxed);
        Some(ServerHello::Busy)
    } else {
        None
    };
    if let Some(refusal) = refusal {
        // A fresh socket's buffer takes it; if not, closing says enough.
        let _ = send_all(&socket, &refusal.encode(), Instant::now());
        return None;
    }
    socket.set_nonblocking(true).ok()?;
    let deadline = Instant::now() + shared.limits.handshake;
    Some(Connection {
        socket,
        hello: [0; CLIENT_HELLO_BYTES],
        hello_len: 0,
        deadline,
        gate: None,
    })
}

/// Takes in what a requester sent: its hello, then nothing but its end.
fn hear(connection: &mut Connection, shared: &Shared) -> Verdict {
    let rest = connection
        .hello
        .get_mut(connection.hello_len..)
        .unwrap_or_default();
    let mut surplus = [0u8; 1];
    let to = if rest.is_empty() {
        &mut surplus[..]
    } else {
        rest
    };
    match recv(&connection.socket, to, RecvFlags::DONTWAIT) {
        Err(Errno::AGAIN | Errno::INTR) => return Verdict::Keep,
        Ok((received, _)) if received > 0 && connection.gate.is_none() => {
            connection.hello_len += received;
        }
        _ => {
            if let Some(gate) = &connection.gate {
                gate.close();
            } else {
                shared.bad_handshakes.fetch_add(1, Ordering::Relaxed);
            }
            return Verdict::Close;
        }
    }
    if connection.hello_len < CLIENT_HELLO_BYTES {
        return Verdict::Keep;
    }
    match welcome(connection, shared) {
        Ok(gate) => {
            connection.gate = Some(gate);
            shared.connections.fetch_add(1, Ordering::Relaxed);
            Verdict::Keep
        }
        Err(_) => {
            shared.bad_handshakes.fetch_add(1, Ordering::Relaxed);
            Verdict::Close
        }
    }
}

fn welcome(connection: &Connection, shared: &Shared) -> io::Result<Gate> {
    let hello = ClientHello::decode(&connection.hello).map_err(io::Error::other)?;
    if hello.version != VERSION {
        send_all(
            &connection.socket,
            &ServerHello::OtherVersion(VERSION).encode(),
            Instant::now(),
        )?;
        return Err(io::ErrorKind::InvalidData.into());
    }
    let (page, _) = RegisteredMemory::create("farpage-gate", GATE_BYTES, MemoryOptions::default())?;
    let page_fd = page.fd().try_clone_to_owned()?;
    let gate = shared
        .access
        .open_shared_gate(page)
        .map_err(io::Error::other)?;
    let hello = ServerHello::Welcome {
        geometry: shared.access.geometry(),
        max_transfer: MAX_TRANSFER,
    };
    let descriptors = [shared.pool.fd(), shared.access.keys().fd(), page_fd.as_fd()];
    handover::send(&connection.socket, &hello.encode(), descriptors)?;
    Ok(gate)
}
