//! Serves a pool over TCP: a thread per connection.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, recv};

use crate::MAX_TRANSFER;
use crate::acceptor::{Acceptor, Host};
use crate::access::AccessTable;
use crate::connect::{receive_exact, send_all};
use crate::memory::RegisteredMemory;
use crate::tcp::session::Session;
use crate::tcp::spin::{Seats, Spinner};
use crate::wire::{CLIENT_HELLO_BYTES, ClientHello, ServerHello, VERSION};

/// Requests are received in portions of this many bytes: 2048 reads, or fifteen writes of a page.
const INPUT_BYTES: usize = 64 << 10;

/// A requester that takes no answers for so long is cut off: its thread and buffers are wanted.
const SEND_STALL_LIMIT: Duration = Duration::from_secs(30);

/// What one responder may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResponderLimits {
    /// Connections at a time; each costs a thread, 64 KiB of input buffer and up to
    /// [`crate::tcp::session::MAX_OUTPUT`] bytes of output buffer. More are told that it is busy.
    pub connections: usize,
    /// How long a new connection may take over its hello.
    pub handshake: Duration,
    /// How long after its last answer a connection looks for the next request before it sleeps, at most; adaptive
    /// below that. Zero: sleep at once.
    pub spin: Duration,
    /// How many connections may look at the same time; each takes a core meanwhile.
    pub spinners: usize,
}

impl Default for ResponderLimits {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            connections: 256,
            handshake: Duration::from_secs(5),
            spin: Duration::from_micros(50),
            spinners: (cores / 2).max(1),
        }
    }
}

/// What a responder did since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResponderStats {
    /// Connections that passed the handshake.
    pub connections: u64,
    /// Connections that were told that all places are taken.
    pub turned_away: u64,
    /// Connections that sent no proper hello, or none in time.
    pub bad_handshakes: u64,
    /// Connections that were closed because they broke the protocol later.
    pub protocol_errors: u64,
    /// Reads carried out.
    pub reads: u64,
    /// Writes carried out.
    pub writes: u64,
    /// Requests refused, for their key or their bounds.
    pub refused: u64,
    /// Payload bytes moved either way.
    pub bytes: u64,
}

#[derive(Debug, Default)]
struct Counters {
    connections: AtomicU64,
    turned_away: AtomicU64,
    bad_handshakes: AtomicU64,
    protocol_errors: AtomicU64,
    reads: AtomicU64,
    writes: AtomicU64,
    refused: AtomicU64,
    bytes: AtomicU64,
}

fn add(counter: &AtomicU64, count: u64) {
    if count > 0 {
        counter.fetch_add(count, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Shared {
    pool: Arc<RegisteredMemory>,
    access: Arc<AccessTable>,
    limits: ResponderLimits,
    counters: Counters,
    seats: Seats,
}

/// A running responder. Dropping it stops it.
#[derive(Debug)]
pub struct TcpResponder {
    shared: Arc<Shared>,
    acceptor: Acceptor,
}

impl TcpResponder {
    /// Serves `pool` on `listener` to whoever holds keys of `access`.
    ///
    /// # Errors
    /// `InvalidInput` when the pool is smaller than the table's geometry says; otherwise what the kernel said.
    pub fn start(
        listener: TcpListener,
        pool: Arc<RegisteredMemory>,
        access: Arc<AccessTable>,
        limits: ResponderLimits,
    ) -> io::Result<Self> {
        if (pool.len() as u64) < access.geometry().pool_bytes() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the pool is smaller than its extents",
            ));
        }
        let shared = Arc::new(Shared {
            pool,
            access,
            limits,
            counters: Counters::default(),
            seats: Seats::new(limits.spinners),
        });
        let acceptor = Acceptor::start(listener, "fabric", limits.connections, shared.clone())?;
        Ok(Self { shared, acceptor })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.acceptor.local_addr()
    }

    /// What it did.
    #[must_use]
    pub fn stats(&self) -> ResponderStats {
        let counters = &self.shared.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ResponderStats {
            connections: get(&counters.connections),
            turned_away: get(&counters.turned_away),
            bad_handshakes: get(&counters.bad_handshakes),
            protocol_errors: get(&counters.protocol_errors),
            reads: get(&counters.reads),
            writes: get(&counters.writes),
            refused: get(&counters.refused),
            bytes: get(&counters.bytes),
        }
    }

    /// Closes the listener and every connection, and waits for their threads: afterwards nothing touches the pool on
    /// behalf of a requester.
    pub fn stop(&mut self) {
        self.acceptor.stop();
    }
}

impl Host for Shared {
    fn serve(&self, socket: &TcpStream, _stopping: &AtomicBool) {
        serve(socket, self);
    }

    fn turn_away(&self, socket: &TcpStream) {
        add(&self.counters.turned_away, 1);
        // A courtesy: it fits the socket's buffer or is not sent.
        let _ = send_all(socket, &ServerHello::Busy.encode(), Instant::now());
    }
}

/// Serves one connection until it ends.
fn serve(socket: &TcpStream, shared: &Shared) {
    let Ok(mut gate) = shared.access.open_gate() else {
        return shared.turn_away(socket);
    };
    if handshake(socket, shared).is_err() {
        add(&shared.counters.bad_handshakes, 1);
        return;
    }
    add(&shared.counters.connections, 1);
    let mut session = Session::new();
    let mut spinner = Spinner::new(shared.limits.spin, &shared.seats);
    let mut input = vec![0; INPUT_BYTES];
    loop {
        let received = match receive(socket, &mut input, &mut spinner) {
            Ok(0) | Err(_) => return,
            Ok(received) => received,
        };
        let mut rest = input.get(..received).unwrap_or_default();
        while !rest.is_empty() {
            let fed = session.feed(&shared.pool, &mut gate, rest);
            let counts = session.take_counts();
            add(&shared.counters.reads, counts.reads);
            add(&shared.counters.writes, counts.writes);
            add(&shared.counters.refused, counts.refused);
            add(&shared.counters.bytes, counts.bytes);
            let Ok(consumed) = fed else {
                add(&shared.counters.protocol_errors, 1);
                return;
            };
            rest = rest.get(consumed..).unwrap_or_default();
            if !session.output().is_empty() {
                if send_all(socket, session.output(), Instant::now() + SEND_STALL_LIMIT).is_err() {
                    return;
                }
                session.clear_output();
                spinner.answered();
            }
        }
    }
}

fn handshake(socket: &TcpStream, shared: &Shared) -> io::Result<()> {
    let deadline = Instant::now() + shared.limits.handshake;
    socket.set_nonblocking(false)?;
    crate::tcp::tune(socket)?;
    let mut hello = [0; CLIENT_HELLO_BYTES];
    receive_exact(socket, &mut hello, deadline)?;
    let hello = ClientHello::decode(&hello)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    if hello.version != VERSION {
        send_all(
            socket,
            &ServerHello::OtherVersion(VERSION).encode(),
            deadline,
        )?;
        return Err(io::ErrorKind::InvalidData.into());
    }
    let welcome = ServerHello::Welcome {
        geometry: shared.access.geometry(),
        max_transfer: MAX_TRANSFER,
    };
    send_all(socket, &welcome.encode(), deadline)
}

/// Waits for input: looks for a while if that pays, then sleeps. Zero: the requester has closed.
fn receive(socket: &TcpStream, input: &mut [u8], spinner: &mut Spinner<'_>) -> io::Result<usize> {
    let look = |input: &mut [u8], flags| match recv(socket, input, flags) {
        Ok((received, _)) => Some(Ok(received)),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => None,
        Err(error) => Some(Err(io::Error::from(error))),
    };
    // Often the next request is here already.
    if let Some(found) = look(input, RecvFlags::DONTWAIT) {
        return found;
    }
    if let Some(found) = spinner.spin(|| look(input, RecvFlags::DONTWAIT)) {
        return found;
    }
    loop {
        if let Some(found) = look(input, RecvFlags::empty()) {
            spinner.woken();
            return found;
        }
    }
}
