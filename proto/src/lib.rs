//! The gRPC control plane's messages, generated code and checked types.
//!
//! - [`v1`]: what `tonic` and `prost` generate from `proto/farpage/v1/*.proto`. Nothing in there has been checked.
//! - [`ids`], [`address`], [`node`], [`lease`], [`report`]: the checked types. `TryFrom` turns a message into one and says
//!   which field is wrong; `From` turns it back. A service works on checked types only.
//! - [`client`]: the coordinator as its callers see it, in checked types.
//! - [`limits`]: every bound that the wire has, in one place.
//! - [`transport`]: endpoint URLs, connecting and listening over TCP and Unix sockets, for every client and server.

pub mod address;
pub mod client;
pub mod field;
pub mod ids;
pub mod lease;
pub mod limits;
pub mod node;
pub mod report;
pub mod transport;

pub use address::{DataAddress, FabricKind};
pub use field::FieldError;
pub use ids::{
    AccessKey, AgentId, ByteCount, Epoch, ExtentId, HostName, Incarnation, LeaseId, NodeId,
    RequestId, Tenant,
};

/// Generated messages, clients and servers of the package `farpage.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
#[allow(
    clippy::needless_pass_by_value,
    clippy::semicolon_if_nothing_returned,
    clippy::uninlined_format_args
)]
pub mod v1 {
    tonic::include_proto!("farpage.v1");
}

/// The encoded `FileDescriptorSet` of `farpage.v1`, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/farpage.v1.bin"));
