//! One-sided reads and writes of remote memory.
//!
//! The fabric moves bytes and knows nothing of pages, tables or leases. A *responder* owns a pool of
//! registered memory and grants access to extents of it by key; its CPU takes no part in deciding what is
//! read or written. A *requester* holds an [`Endpoint`]: it posts reads and writes that carry an id of its
//! choice, at most a window of them at a time, and polls completions. The vocabulary is the verbs manual's.
//!
//! | what | where |
//! |---|---|
//! | the contract between the two | [`endpoint`] |
//! | memory that both may touch | [`memory`], its shape in [`geometry`] |
//! | grants, and fences when they end | [`access`], [`gate`]; the lock-free part and its loom model in `fence.rs` |
//! | transports | [`tcp`] (frames in [`wire`]), [`shm`], `verbs` (RDMA, a cargo feature) |
//! | getting there | [`address`], [`connect()`] |
//! | misbehaviour for tests | [`faulty`] |
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::sync::Arc;
//! use std::time::{Duration, Instant};
//! use farpage_fabric::memory::MemoryOptions;
//! use farpage_fabric::tcp::{ResponderLimits, TcpResponder};
//! use farpage_fabric::{
//!     AccessTable, FabricAddress, LocalSlice, PoolGeometry, RegisteredMemory, RemoteSlice, WorkId, connect,
//! };
//!
//! // The memory node: one extent, granted under the key 7.
//! let geometry = PoolGeometry::new(2 << 20, 1)?;
//! let (pool, _) = RegisteredMemory::create("pool", 2 << 20, MemoryOptions::default())?;
//! pool.write(4096, b"far")?;
//! let access = AccessTable::new(geometry)?;
//! access.grant(0, 7)?;
//! let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
//! let responder = TcpResponder::start(listener, Arc::new(pool), access, ResponderLimits::default())?;
//!
//! // The agent: reads a page.
//! let address: FabricAddress = format!("tcp:{}", responder.local_addr()).parse()?;
//! let mut endpoint = connect(&address, 16, Instant::now() + Duration::from_secs(5))?;
//! let local = Arc::new(RegisteredMemory::create("local", 4096, MemoryOptions::default())?.0);
//! let region = endpoint.register(local.clone());
//! let slice = LocalSlice { region, offset: 0, len: 4096 };
//! endpoint.post_read(WorkId(1), slice, RemoteSlice { extent: 0, key: 7, offset: 4096 })?;
//! endpoint.flush();
//! let mut completions = Vec::new();
//! while endpoint.poll(&mut completions) == 0 {} // Or `arm`, and sleep on `wait_fd`.
//! completions[0].result?;
//! let mut bytes = [0; 3];
//! local.read(0, &mut bytes)?;
//! assert_eq!(&bytes, b"far");
//! # Ok(())
//! # }
//! ```

#![warn(missing_docs)]

mod acceptor;
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
#[cfg(feature = "verbs")]
pub mod verbs;
pub mod wire;

pub use access::AccessTable;
pub use address::{FabricAddress, OwnDevice, ShmAddress};
pub use connect::{ConnectError, MAX_WINDOW, connect};
pub use endpoint::{
    Completion, Endpoint, LocalSlice, PostError, RegionId, RemoteSlice, WorkError, WorkId,
};
pub use geometry::PoolGeometry;
pub use memory::RegisteredMemory;

/// The most bytes that one work request may move. Bounds every buffer that a peer can make us hold.
pub const MAX_TRANSFER: u32 = 1 << 20;
