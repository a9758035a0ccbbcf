//! The coordinator and the memory node.
//!
//! - [`coordinator`]: who lends, who borrows, what belongs to whom. A pure core (`state` and what it is made of: time and
//!   randomness come in, changes and orders go out) owned by one thread (`owner`) that stores each batch of changes
//!   before any answer leaves; around it a thin asynchronous rim (`service`, `dispatch`).
//! - [`node`]: one pool of registered memory, cut into extents, granted and revoked under epochs (`ledger`), served to
//!   requesters by the fabric (`data_path`) and offered to the coordinator (`membership`).
//! - [`mod@embedded`]: both in one process, for `farpage run` without an agent.
//!
//! Neither takes part in reads and writes of pages.

pub mod coordinator;
pub mod embedded;
pub mod node;

mod grpc;
mod random;

pub use coordinator::{
    CoordinatorConfig, CoordinatorError, CoordinatorReady, StoreUrl, Timing, run_coordinator,
};
pub use embedded::{EmbeddedConfig, EmbeddedError, EmbeddedReady, embedded};
pub use node::{Lock, NodeConfig, NodeError, NodeReady, TcpListen, run_node};
