//! One-sided operations over memory shared on one host: the requester's CPU copies, nobody else is asked.
//!
//! A Unix socket hands over three descriptors with the hello: the pool, the key words (sealed, so that only their
//! owner can write them) and a page with the connection's own gate (see [`crate::access`]). After that the socket
//! carries nothing; its end tells each side that the other is gone.
//!
//! Whoever is let in has the whole pool mapped. Keys and fences bind requesters that cooperate, and protect each from
//! the others' mistakes. Requesters that do not trust each other belong on TCP or RDMA.

mod endpoint;
mod handover;
mod responder;

pub use endpoint::ShmEndpoint;
pub use responder::{PeerPolicy, ShmLimits, ShmResponder, ShmStats};
