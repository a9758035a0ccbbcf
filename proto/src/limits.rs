//! Bounds of the control plane, each with its reason.

use std::time::Duration;

/// Bytes of a page slot: the page size that the pager works in.
pub const SLOT_BYTES: u64 = 4096;
/// Bytes of an extent unless the node says otherwise: 4096 slots, so that a terabyte is 65536 grants.
pub const DEFAULT_EXTENT_BYTES: u64 = 16 << 20;
/// The smallest extent: below, grants would be as frequent as faults.
pub const MIN_EXTENT_BYTES: u64 = 1 << 20;
/// The largest extent: above, one lease's rounding loss and one scrub take too long.
pub const MAX_EXTENT_BYTES: u64 = 256 << 20;

/// Extents that one node may offer (2 TiB of default extents). With it the list of all its grants fits a message.
pub const MAX_EXTENTS_PER_NODE: u64 = 1 << 17;
/// Nodes that one coordinator keeps; its placement looks at each.
pub const MAX_NODES: usize = 1024;
/// Leases that one coordinator keeps.
pub const MAX_LEASES: usize = 4096;
/// Extents in one `GrantExtents`: what one answer can confirm at the nodes well within its deadline.
pub const MAX_GRANT_COUNT: u32 = 256;
/// Nodes that one grant may be asked to stay away from: those with a copy of the extent.
pub const MAX_AVOIDED: usize = 16;
/// Copies of a page: each is sent and kept, so that more cost more than the nodes they outlive are worth.
pub const MAX_REPLICAS: u8 = 4;
/// Extents in one `ReleaseExtents`.
pub const MAX_RELEASE_COUNT: usize = 4096;
/// Extents in one answer to `ListGrants`, `RenewLease`: all that a lease may hold.
pub const MAX_EXTENTS_PER_LEASE: usize = 1 << 15;
/// Processes in one `ReportAgent`.
pub const MAX_PROCESSES: usize = 1024;
/// Pages of one process: what 64 bits of address can name.
pub const MAX_PAGES: u64 = 1 << 52;
/// Named totals in one `ReportAgent`.
pub const MAX_TOTALS: usize = 128;
/// Labels on a node.
pub const MAX_LABELS: usize = 32;
/// Data addresses of a node: a few per fabric.
pub const MAX_DATA_ADDRESSES: usize = 8;
/// Characters in an identifier, a label or its value, the name of a total. A DNS label's length.
pub const MAX_NAME: usize = 63;
/// Characters in a host name (DNS).
pub const MAX_HOST: usize = 253;
/// Bytes of a process's name. The kernel's are 15; reports may carry a file name.
pub const MAX_COMM: usize = 64;
/// Characters in an address or URL. A Unix socket's path has 107.
pub const MAX_ADDRESS: usize = 280;
/// Bytes of a node's control token.
pub const CONTROL_TOKEN_BYTES: usize = 16;

/// The largest message that either side decodes or encodes, except a status.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// The largest status that a client decodes: every lease with a full report is beyond it, thousands are not.
pub const MAX_STATUS_BYTES: usize = 64 << 20;
/// Connections that one server holds; further ones are closed at once.
pub const MAX_CONNECTIONS: usize = 1024;
/// Requests that one connection may have in progress.
pub const MAX_STREAMS_PER_CONNECTION: u32 = 256;
/// Within this a new connection must have sent its HTTP/2 preface.
pub const PREFACE_DEADLINE: Duration = Duration::from_secs(5);
/// A connection that is silent for this long is pinged ...
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// ... and closed when it stays silent for this long.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest that a server works on one request.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a node is heard of.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);
/// A node that is silent for this long is unreachable.
pub const NODE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a lease lives without a renewal. Agents renew each second, or at a quarter of it if that is sooner.
pub const LEASE_TTL: Duration = Duration::from_secs(15);

const _: () = assert!(MIN_EXTENT_BYTES.is_multiple_of(SLOT_BYTES));
const _: () = assert!(DEFAULT_EXTENT_BYTES.is_power_of_two() && MAX_EXTENT_BYTES.is_power_of_two());
// Every extent of every node has an id of its own, with room left.
const _: () = assert!(MAX_EXTENTS_PER_NODE * (MAX_NODES as u64) < u32::MAX as u64);
// A granted extent takes at most 17 bytes on the wire (index 4, epoch up to 10, tags and length 3).
const _: () = assert!(MAX_EXTENTS_PER_NODE as usize * 17 <= MAX_MESSAGE_BYTES);
