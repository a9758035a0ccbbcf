//! One-sided reads and writes of remote memory.
//!
//! The fabric moves bytes and knows nothing of pages, tables or leases. A *responder* owns a pool of
//! registered memory and grants access to extents of it by key; its CPU takes no part in deciding what is
//! read or written. A *requester* holds an [`Endpoint`]: it posts reads and writes that carry an id of its
//! choice, at most a window of them at a time, and polls completions. The vocabulary is the verbs manual's.

#![warn(missing_docs)]

pub mod access;
pub mod address;
pub mod connect;
pub mod endpoint;
pub mod faulty;
mod fence;
pub mod gate;
pub mod geometry;
pub mod memory;
mod regions;
pub mod shm;
mod sys;
pub mod tcp;
pub mod wire;

pub use access::AccessTable;
pub use address::{FabricAddress, ShmAddress};
pub use connect::{ConnectError, MAX_WINDOW, connect};
pub use endpoint::{Completion, Endpoint, LocalSlice, PostError, RegionId, RemoteSlice, WorkError, WorkId};
pub use geometry::PoolGeometry;
pub use memory::RegisteredMemory;

/// The most bytes that one work request may move. Bounds every buffer that a peer can make us hold.
pub const MAX_TRANSFER: u32 = 1 << 20;
