//! The TCP transport's frames: pure encoding and decoding, no sockets.
//!
//! All integers are little endian. Both sides open with a hello; a requester then sends requests, and the
//! responder answers each one, in order (as a reliable queue pair would).
//!
//! ```text
//! client hello, 16 bytes        magic u32 | version u16 | zero u16 | zero u64
//! server hello, 32 bytes        magic u32 | version u16 | verdict u16 | extents u32 | max transfer u32 |
//!                               extent bytes u64 | zero u64
//! request, 32 bytes             id u64 | key u64 | offset u64 | extent u32 | op and len u32
//!                               a write's payload follows, len bytes
//! response, 16 bytes            id u64 | status and len u32 | magic u32
//!                               a successful read's payload follows, len bytes
//! ```
//!
//! "Op and len" and "status and len" have the length in the low 24 bits and the code in the high 8. No length
//! above [`MAX_TRANSFER`] is ever decoded, so no peer chooses how much is allocated.

use crate::MAX_TRANSFER;
use crate::endpoint::WorkError;
use crate::geometry::{GeometryError, PoolGeometry};

/// Opens each hello: "FRPG".
pub const HELLO_MAGIC: u32 = u32::from_le_bytes(*b"FRPG");
/// Closes each response header: "rsp\n". A stream that lost its place is noticed at the next header.
pub const RESPONSE_MAGIC: u32 = u32::from_le_bytes(*b"rsp\n");
/// The version of everything in this file. Both ends must have the same one.
pub const VERSION: u16 = 1;

/// Bytes of a [`ClientHello`].
pub const CLIENT_HELLO_BYTES: usize = 16;
/// Bytes of a [`ServerHello`].
pub const SERVER_HELLO_BYTES: usize = 32;
/// Bytes of a [`Request`], without payload.
pub const REQUEST_BYTES: usize = 32;
/// Bytes of a [`Response`], without payload.
pub const RESPONSE_BYTES: usize = 16;

const LEN_BITS: u32 = 24;
const LEN_MASK: u32 = (1 << LEN_BITS) - 1;
const _: () = assert!(MAX_TRANSFER <= LEN_MASK, "lengths must fit their 24 bits");

/// Why bytes are no frame. The connection that they came on is of no further use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The peer does not speak this protocol.
    #[error("the peer does not speak farpage's protocol (magic {0:#010x}); check the address")]
    Magic(u32),
    /// It speaks another version of it.
    #[error(
        "the peer speaks protocol version {0}, this build {VERSION}; run the same farpage release on both"
    )]
    Version(u16),
    /// Bits that must be zero are not.
    #[error("reserved bits are set")]
    Reserved,
    /// No such verdict in a server hello.
    #[error("unknown verdict {0}")]
    Verdict(u16),
    /// The pool's shape makes no sense.
    #[error("the peer's pool makes no sense: {0}")]
    Geometry(#[from] GeometryError),
    /// No such operation.
    #[error("unknown operation {0}")]
    Operation(u8),
    /// No such status.
    #[error("unknown status {0}")]
    Status(u8),
    /// Longer than [`MAX_TRANSFER`].
    #[error("a length of {0} bytes exceeds the maximum transfer")]
    TooLong(u32),
    /// A response that carries a payload which it must not, or of a wrong length.
    #[error("a response of {0} payload bytes does not fit its request")]
    PayloadLength(u32),
    /// A response to something else than the oldest unanswered request.
    #[error("a response out of order")]
    Order,
}

/// What a requester sends first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientHello {
    /// The sender's [`VERSION`].
    pub version: u16,
}

/// What a responder answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerHello {
    /// Requests may follow.
    Welcome {
        /// The pool's shape.
        geometry: PoolGeometry,
        /// The most bytes that one request may move here.
        max_transfer: u32,
    },
    /// As many connections as it takes are open; try again later.
    Busy,
    /// It speaks this version and not the requester's.
    OtherVersion(u16),
    /// The requester may not connect (shared memory: another user's process).
    Forbidden,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Extent to requester.
    Read,
    /// Requester to extent; the payload follows the header.
    Write,
}

/// The header of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Read or write.
    pub operation: Operation,
    /// The requester's name for it, returned in the response.
    pub id: u64,
    /// Which extent.
    pub extent: u32,
    /// Under which key.
    pub key: u64,
    /// Where in the extent, in bytes.
    pub offset: u64,
    /// How many bytes.
    pub len: u32,
}

/// The header of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// The request's id.
    pub id: u64,
    /// How it ended.
    pub status: Status,
    /// Bytes of payload that follow: a successful read's length, otherwise 0.
    pub len: u32,
}

/// How a request ended at the responder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Done,
    /// [`WorkError::AccessDenied`].
    AccessDenied,
    /// [`WorkError::RemoteBounds`].
    RemoteBounds,
}

impl Status {
    /// As a work request's result.
    ///
    /// # Errors
    /// Every status but [`Status::Done`] is one.
    pub fn result(self) -> Result<(), WorkError> {
        match self {
            Self::Done => Ok(()),
            Self::AccessDenied => Err(WorkError::AccessDenied),
            Self::RemoteBounds => Err(WorkError::RemoteBounds),
        }
    }
}

/// Takes little-endian integers from the front of bytes of known length.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl Reader<'_> {
    pub(crate) fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        if let Some((head, tail)) = self.0.split_first_chunk::<N>() {
            bytes = *head;
            self.0 = tail;
        }
        bytes
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

/// Fills a header of fixed size from its front.
pub(crate) struct Writer<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Writer<N> {
    pub(crate) fn new() -> Self {
        Self {
            bytes: [0; N],
            at: 0,
        }
    }

    /// The bytes; what was not put is zero.
    pub(crate) fn finish(self) -> [u8; N] {
        self.bytes
    }

    pub(crate) fn put<const M: usize>(mut self, value: [u8; M]) -> Self {
        if let Some(to) = self.bytes.get_mut(self.at..self.at + M) {
            to.copy_from_slice(&value);
            self.at += M;
        }
        self
    }

    pub(crate) fn u16(self, value: u16) -> Self {
        self.put(value.to_le_bytes())
    }

    pub(crate) fn u32(self, value: u32) -> Self {
        self.put(value.to_le_bytes())
    }

    pub(crate) fn u64(self, value: u64) -> Self {
        self.put(value.to_le_bytes())
    }
}

fn code_and_len(word: u32) -> Result<(u8, u32), WireError> {
    let len = word & LEN_MASK;
    if len > MAX_TRANSFER {
        Err(WireError::TooLong(len))
    } else {
        Ok(((word >> LEN_BITS) as u8, len))
    }
}

impl ClientHello {
    /// The bytes to send.
    #[must_use]
    pub fn encode(&self) -> [u8; CLIENT_HELLO_BYTES] {
        Writer::new()
            .u32(HELLO_MAGIC)
            .u16(self.version)
            .u16(0)
            .u64(0)
            .finish()
    }

    /// From received bytes. Another version is no error here: the responder says so before it hangs up.
    ///
    /// # Errors
    /// [`WireError::Magic`] or [`WireError::Reserved`].
    pub fn decode(bytes: &[u8; CLIENT_HELLO_BYTES]) -> Result<Self, WireError> {
        let mut reader = Reader(bytes);
        let magic = reader.u32();
        if magic != HELLO_MAGIC {
            return Err(WireError::Magic(magic));
        }
        let version = reader.u16();
        if version == VERSION && (reader.u16() != 0 || reader.u64() != 0) {
            return Err(WireError::Reserved);
        }
        Ok(Self { version })
    }
}

const WELCOME: u16 = 0;
const BUSY: u16 = 1;
const OTHER_VERSION: u16 = 2;
const FORBIDDEN: u16 = 3;

impl ServerHello {
    /// The bytes to send.
    #[must_use]
    pub fn encode(&self) -> [u8; SERVER_HELLO_BYTES] {
        let (version, verdict) = match *self {
            Self::Welcome { .. } => (VERSION, WELCOME),
            Self::Busy => (VERSION, BUSY),
            Self::OtherVersion(version) => (version, OTHER_VERSION),
            Self::Forbidden => (VERSION, FORBIDDEN),
        };
        let writer = Writer::new().u32(HELLO_MAGIC).u16(version).u16(verdict);
        match *self {
            Self::Welcome {
                geometry,
                max_transfer,
            } => writer
                .u32(geometry.extents())
                .u32(max_transfer)
                .u64(geometry.extent_bytes())
                .u64(0)
                .finish(),
            _ => writer.bytes,
        }
    }

    /// From received bytes.
    ///
    /// # Errors
    /// [`WireError`]: not a hello, another version, or a pool that makes no sense.
    pub fn decode(bytes: &[u8; SERVER_HELLO_BYTES]) -> Result<Self, WireError> {
        let mut reader = Reader(bytes);
        let magic = reader.u32();
        if magic != HELLO_MAGIC {
            return Err(WireError::Magic(magic));
        }
        let version = reader.u16();
        let verdict = reader.u16();
        if verdict == OTHER_VERSION {
            return Ok(Self::OtherVersion(version));
        }
        if version != VERSION {
            return Err(WireError::Version(version));
        }
        let (extents, max_transfer, extent_bytes, zero) =
            (reader.u32(), reader.u32(), reader.u64(), reader.u64());
        if zero != 0 {
            return Err(WireError::Reserved);
        }
        match verdict {
            WELCOME => {
                if max_transfer == 0 || max_transfer > MAX_TRANSFER {
                    return Err(WireError::TooLong(max_transfer));
                }
                Ok(Self::Welcome {
                    geometry: PoolGeometry::new(extent_bytes, extents)?,
                    max_transfer,
                })
            }
            _ if extents != 0 || max_transfer != 0 || extent_bytes != 0 => Err(WireError::Reserved),
            BUSY => Ok(Self::Busy),
            FORBIDDEN => Ok(Self::Forbidden),
            other => Err(WireError::Verdict(other)),
        }
    }
}

impl Request {
    /// The bytes to send. The caller keeps `len` within [`MAX_TRANSFER`].
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let operation: u32 = match self.operation {
            Operation::Read => 1,
            Operation::Write => 2,
        };
        let word = operation << LEN_BITS | self.len & LEN_MASK;
        Writer::new()
            .u64(self.id)
            .u64(self.key)
            .u64(self.offset)
            .u32(self.extent)
            .u32(word)
            .finish()
    }

    /// From received bytes.
    ///
    /// # Errors
    /// [`WireError::Operation`] or [`WireError::TooLong`].
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, WireError> {
        let mut reader = Reader(bytes);
        let (id, key, offset, extent) = (reader.u64(), reader.u64(), reader.u64(), reader.u32());
        let (code, len) = code_and_len(reader.u32())?;
        let operation = match code {
            1 => Operation::Read,
            2 => Operation::Write,
            other => return Err(WireError::Operation(other)),
        };
        Ok(Self {
            operation,
            id,
            extent,
            key,
            offset,
            len,
        })
    }
}

impl Response {
    /// The bytes to send. The caller keeps `len` within [`MAX_TRANSFER`].
    #[must_use]
    pub fn encode(&self) -> [u8; RESPONSE_BYTES] {
        let status: u32 = match self.status {
            Status::Done => 1,
            Status::AccessDenied => 2,
            Status::RemoteBounds => 3,
        };
        let word = status << LEN_BITS | self.len & LEN_MASK;
        Writer::new()
            .u64(self.id)
            .u32(word)
            .u32(RESPONSE_MAGIC)
            .finish()
    }

    /// From received bytes.
    ///
    /// # Errors
    /// [`WireError`]: lost its place, unknown status, or a payload where none may be.
    pub fn decode(bytes: &[u8; RESPONSE_BYTES]) -> Result<Self, WireError> {
        let mut reader = Reader(bytes);
        let (id, word, magic) = (reader.u64(), reader.u32(), reader.u32());
        if magic != RESPONSE_MAGIC {
            return Err(WireError::Magic(magic));
        }
        let (code, len) = code_and_len(word)?;
        let status = match code {
            1 => Status::Done,
            2 => Status::AccessDenied,
            3 => Status::RemoteBounds,
            other => return Err(WireError::Status(other)),
        };
        if status != Status::Done && len != 0 {
            return Err(WireError::PayloadLength(len));
        }
        Ok(Self { id, status, len })
    }
}
