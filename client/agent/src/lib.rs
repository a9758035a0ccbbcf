//! The per-host pager.
//!
//! One process per host. Programs come to its [`door`]; each address space gets a thread of its own, its
//! [`pager`]; the [`sampler`] watches what the kernel says is resident and [`sharing`] what of it is counted more than
//! once, [`ceiling`] what memory cgroups leave to whom; [`control_plane`] holds the lease under which extents of far memory
//! are granted, and the [`mover`] fills the copies of extents that lack something. Nothing asynchronous is on the path of a fault.
//!
//! The pure parts are a crate of their own, `farpage_core`, whose modules appear here under the same names:
//! [`entry`] (where a page is, in one word), [`page_cell`] and [`table`] (entries where the next agent finds
//! them), [`gate`] (what excludes what), [`residents`] (who goes), [`prefetch`] (who comes along). Pure too,
//! but kept beside the grants that feed it: [`far`] (slots and their references).

pub mod ceiling;
pub mod cgroup;
pub mod client;
pub mod control_plane;
pub mod door;
pub mod far;
pub mod figures;
mod injection;
pub mod job;
mod keeper;
pub mod kernel;
pub mod latency;
pub mod mailbox;
pub mod mover;
pub mod pager;
pub mod protocol;
mod recovery;
pub mod sampler;
pub mod serve;
pub mod sharing;
pub mod spaces;
pub mod state;
pub mod sys;
pub mod tree;

pub use farpage_core::{entry, gate, page_cell, prefetch, residents, table};
pub use farpage_fabric::{OwnDevice, address::AddressError};
pub use figures::{AgentFigures, Observer};
pub use serve::{AgentConfig, AgentError, serve};
pub use spaces::{LEAST_LOCAL_BYTES, MAX_FAULT_DEADLINE};
