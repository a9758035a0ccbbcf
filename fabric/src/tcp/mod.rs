//! One-sided operations over TCP: the responder's CPU copies, and knows no more than an RDMA NIC would.

mod endpoint;
mod inbox;
mod outbox;
mod responder;
pub mod session;
mod spin;

pub use endpoint::TcpEndpoint;
pub use responder::{ResponderLimits, ResponderStats, TcpResponder};

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::sockopt;

/// A peer that acknowledges nothing for so long is gone (`TCP_USER_TIMEOUT`): unplugged cables and halted
/// machines send no FIN. Long enough for a few retransmissions, short against a fault's deadline.
pub const PEER_SILENCE_LIMIT: Duration = Duration::from_secs(10);

/// An idle connection is probed after this time, so that a dead peer is noticed without traffic.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEPALIVE_PROBES: u32 = 3;

/// What both ends want of their socket.
pub(crate) fn tune(socket: impl AsFd) -> std::io::Result<()> {
    let socket = socket.as_fd();
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(socket, KEEPALIVE_PROBES)?;
    sockopt::set_tcp_user_timeout(socket, PEER_SILENCE_LIMIT.as_millis() as u32)?;
    Ok(())
}
