//! Opening connections: what can go wrong, and what to do then.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::address::FabricAddress;
use crate::endpoint::Endpoint;
use crate::geometry::PoolGeometry;
use crate::shm::ShmEndpoint;
use crate::tcp::TcpEndpoint;
#[cfg(feature = "verbs")]
use crate::verbs::VerbsEndpoint;
use crate::wire::{ServerHello, VERSION, WireError};

/// The most requests that one endpoint may have outstanding: bounds its queues (about 100 bytes each). Far more
/// than hides any network's latency with 4 KiB pages.
pub const MAX_WINDOW: usize = 4096;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The name means nothing here.
    #[error("cannot resolve {name}: {error}; check the name, or use a numeric address")]
    Resolve {
        /// HOST:PORT as given.
        name: String,
        /// What the resolver said.
        error: io::Error,
    },
    /// Nobody answered there.
    #[error(
        "cannot reach {address}: {error}; check that a memory node runs there and that no firewall is between"
    )]
    Unreachable {
        /// Whom we tried.
        address: String,
        /// What the kernel said.
        error: io::Error,
    },
    /// The deadline passed. Somebody may listen there who is no memory node, or a very busy one.
    #[error("no answer before the deadline; check that the address is a memory node's fabric port")]
    Deadline,
    /// The responder has no place left.
    #[error("the memory node has all its connections in use; raise its limit or try again later")]
    Busy,
    /// The responder does not let this user in.
    #[error(
        "the memory node refuses this user; run as its user or as root, or have it allow this one"
    )]
    Forbidden,
    /// The responder, or whatever it is, said something else.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The connection closed in the middle of the hellos.
    #[error(
        "the other end hung up during the handshake; check that the address is a memory node's fabric port"
    )]
    HungUp,
    /// Shared memory that could not be mapped, or a socket that could not be made.
    #[error("cannot set the connection up: {0}")]
    Setup(#[from] io::Error),
    /// The window is not in 1..=[`MAX_WINDOW`].
    #[error("a window of {0} requests is not between 1 and {MAX_WINDOW}")]
    Window(usize),
}

/// Connects to a memory node, whatever the transport. Blocks until `deadline` at most (resolving a host name that
/// is not numeric takes as long as the system's resolver does).
///
/// # Errors
/// [`ConnectError`], with what to do next.
pub fn connect(
    address: &FabricAddress,
    window: usize,
    deadline: Instant,
) -> Result<Box<dyn Endpoint>, ConnectError> {
    match address {
        FabricAddress::Tcp { host, port } => first_of(host, *port, |address| {
            Ok(Box::new(TcpEndpoint::connect(address, window, deadline)?))
        }),
        #[cfg(feature = "verbs")]
        FabricAddress::Rdma { host, port, choice } => first_of(host, *port, |address| {
            Ok(Box::new(VerbsEndpoint::connect(
                address, choice, window, deadline,
            )?))
        }),
        FabricAddress::Shm(address) => {
            Ok(Box::new(ShmEndpoint::connect(address, window, deadline)?))
        }
    }
}

/// Tries a name's addresses in turn.
fn first_of(
    host: &str,
    port: u16,
    try_one: impl Fn(SocketAddr) -> Result<Box<dyn Endpoint>, ConnectError>,
) -> Result<Box<dyn Endpoint>, ConnectError> {
    let name = format!("{host}:{port}");
    let addresses: Vec<SocketAddr> = (host, port)
        .to_socket_addrs()
        .map_err(|error| ConnectError::Resolve {
            name: name.clone(),
            error,
        })?
        .collect();
    let mut last = ConnectError::Resolve {
        name,
        error: io::ErrorKind::NotFound.into(),
    };
    for address in addresses {
        match try_one(address) {
            Ok(endpoint) => return Ok(endpoint),
            Err(error) => last = error,
        }
    }
    Err(last)
}

pub(crate) fn check_window(window: usize) -> Result<(), ConnectError> {
    if (1..=MAX_WINDOW).contains(&window) {
        Ok(())
    } else {
        Err(ConnectError::Window(window))
    }
}

/// Whether the responder lets us in, and to what.
pub(crate) fn welcome(hello: ServerHello) -> Result<(PoolGeometry, u32), ConnectError> {
    match hello {
        ServerHello::Welcome {
            geometry,
            max_transfer,
        } => Ok((geometry, max_transfer)),
        ServerHello::Busy => Err(ConnectError::Busy),
        ServerHello::Forbidden => Err(ConnectError::Forbidden),
        ServerHello::OtherVersion(version) if version == VERSION => Err(WireError::Reserved.into()),
        ServerHello::OtherVersion(version) => Err(WireError::Version(version).into()),
    }
}

/// Time left, or the error that there is none.
pub(crate) fn remaining(deadline: Instant) -> io::Result<Duration> {
    deadline
        .checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
        .ok_or_else(|| io::ErrorKind::TimedOut.into())
}

/// Waits until `fd` is ready for `what`, until the deadline.
pub(crate) fn wait_for(fd: impl AsFd, what: PollFlags, deadline: Instant) -> io::Result<()> {
    loop {
        let left = remaining(deadline)?;
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match poll(&mut [PollFd::new(&fd, what)], Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Calls a nonblocking operation until it does not ask to wait, or the deadline has passed.
pub(crate) fn until_ready<T>(
    fd: impl AsFd,
    what: PollFlags,
    deadline: Instant,
    mut operation: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    loop {
        match operation() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wait_for(&fd, what, deadline)?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Fills `bytes` from a nonblocking socket. `UnexpectedEof` when the peer closes before.
pub(crate) fn receive_exact(
    socket: impl AsFd,
    bytes: &mut [u8],
    deadline: Instant,
) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let got = until_ready(&socket, PollFlags::IN, deadline, || {
            Ok(rustix::net::recv(&socket, &mut *rest, rustix::net::RecvFlags::DONTWAIT)?.0)
        })?;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        rest = rest.get_mut(got..).unwrap_or_default();
    }
    Ok(())
}

/// Sends all of `bytes` to a socket.
pub(crate) fn send_all(socket: impl AsFd, bytes: &[u8], deadline: Instant) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
        let sent = until_ready(&socket, PollFlags::OUT, deadline, || {
            Ok(rustix::net::send(&socket, rest, flags)?)
        })?;
        rest = rest.get(sent..).unwrap_or_default();
    }
    Ok(())
}

/// An I/O error during the hellos, in a requester's words.
pub(crate) fn handshake_error(error: io::Error) -> ConnectError {
    match error.kind() {
        io::ErrorKind::TimedOut => ConnectError::Deadline,
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe => ConnectError::HungUp,
        _ => ConnectError::Setup(error),
    }
}
