//! The control connection's frames: pure encoding and decoding, no sockets.
//!
//! All integers are little endian. Both sides open with a hello; after that each side sends frames.
//!
//! ```text
//! requester's hello, 64 bytes   magic u32 | version u16 | zero u16 | port 32 bytes | zero 24 bytes
//! responder's hello, 64 bytes   magic u32 | version u16 | verdict u16 | port 32 bytes |
//!                               extents u32 | max transfer u32 | extent bytes u64 | zero u64
//! port, 32 bytes                gid 16 bytes | lid u16 | mtu u8 | reads in u8 | reads out u8 | link u8 | zero 10 bytes
//! frame, 40 bytes               kind u8 | lane u8 | zero u16 | generation u32 | extent u32 | number u32 | key u64 |
//!                               address u64 | zero u64
//! ```
//!
//! | kind | from | number | means |
//! |---|---|---|---|
//! | 1 open | requester | queue | connect this lane's queue pair; the first packet number is in the key |
//! | 2 bind | requester | 0 | open this extent to this lane, by its key |
//! | 3 opened | responder | queue | done; the first packet number is in the key |
//! | 4 bound | responder | remote key | done; the extent starts at the address |
//! | 5 refused | responder | 0 | the key is not live |
//! | 6 gone | responder | 0 | this lane is no more; open it again in a new generation |

use crate::MAX_TRANSFER;
use crate::geometry::PoolGeometry;
use crate::wire::{Reader, WireError, Writer};

/// Opens each hello: "FRPV".
const MAGIC: u32 = u32::from_le_bytes(*b"FRPV");
/// The version of everything in this file. Both ends must have the same one.
pub(super) const VERSION: u16 = 1;

pub(super) const HELLO_BYTES: usize = 64;
pub(super) const FRAME_BYTES: usize = 40;

/// Queue pairs of a connection: demand reads, reads ahead, writes.
pub(super) const LANES: usize = 3;

/// Packet and queue numbers have 24 bits.
pub(super) const NUMBER_MASK: u32 = (1 << 24) - 1;

/// One end's port, for the other end's queue pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Port {
    pub(super) gid: [u8; 16],
    pub(super) lid: u16,
    /// The verbs' code, 1..=5.
    pub(super) mtu: u8,
    /// Reads that a queue pair can serve at a time.
    pub(super) reads_in: u8,
    /// Reads that a queue pair can have under way.
    pub(super) reads_out: u8,
    pub(super) ethernet: bool,
}

impl Port {
    /// The largest packets that both ends' ports carry.
    pub(super) fn mtu_with(&self, other: &Self) -> u8 {
        self.mtu.min(other.mtu)
    }

    /// Reads that a queue pair here may have under way at one there: each end says how many it makes and serves.
    pub(super) fn reads_from(&self, other: &Self) -> u8 {
        self.reads_out.min(other.reads_in).max(1)
    }
}

/// What a responder answers to a hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Welcome {
        port: Port,
        geometry: PoolGeometry,
        max_transfer: u32,
    },
    Busy,
    OtherVersion(u16),
}

/// What a requester sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    Open {
        lane: u8,
        generation: u32,
        queue: u32,
        packet: u32,
    },
    Bind {
        lane: u8,
        generation: u32,
        extent: u32,
        key: u64,
    },
}

/// What a responder sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tell {
    Opened {
        lane: u8,
        generation: u32,
        queue: u32,
        packet: u32,
    },
    Bound {
        lane: u8,
        generation: u32,
        extent: u32,
        key: u64,
        remote_key: u32,
        address: u64,
    },
    Refused {
        lane: u8,
        generation: u32,
        extent: u32,
        key: u64,
    },
    Gone {
        lane: u8,
        generation: u32,
    },
}

/// A frame's fields, whoever sent it.
#[derive(Clone, Copy, Debug, Default)]
struct Frame {
    kind: u8,
    lane: u8,
    generation: u32,
    extent: u32,
    number: u32,
    key: u64,
    address: u64,
}

impl Frame {
    fn encode(self) -> [u8; FRAME_BYTES] {
        Writer::new()
            .put([self.kind, self.lane, 0, 0])
            .u32(self.generation)
            .u32(self.extent)
            .u32(self.number)
            .u64(self.key)
            .u64(self.address)
            .finish()
    }

    fn decode(bytes: &[u8; FRAME_BYTES]) -> Result<Self, WireError> {
        let mut reader = Reader(bytes);
        let [kind, lane, zeros @ ..] = reader.take::<4>();
        let frame = Self {
            kind,
            lane,
            generation: reader.u32(),
            extent: reader.u32(),
            number: reader.u32(),
            key: reader.u64(),
            address: reader.u64(),
        };
        if zeros != [0; 2] || reader.u64() != 0 || usize::from(lane) >= LANES {
            return Err(WireError::Reserved);
        }
        Ok(frame)
    }

    /// The two numbers of an open or opened frame, within their 24 bits.
    fn queue_and_packet(&self) -> Result<(u32, u32), WireError> {
        let packet = u32::try_from(self.key).unwrap_or(u32::MAX);
        if self.number > NUMBER_MASK || packet > NUMBER_MASK {
            return Err(WireError::Reserved);
        }
        Ok((self.number, packet))
    }
}

impl Ask {
    pub(super) fn encode(self) -> [u8; FRAME_BYTES] {
        match self {
            Self::Open {
                lane,
                generation,
                queue,
                packet,
            } => Frame {
                kind: 1,
                lane,
                generation,
                number: queue,
                key: packet.into(),
                ..Frame::default()
            },
            Self::Bind {
                lane,
                generation,
                extent,
                key,
            } => Frame {
                kind: 2,
                lane,
                generation,
                extent,
                key,
                ..Frame::default()
            },
        }
        .encode()
    }

    pub(super) fn decode(bytes: &[u8; FRAME_BYTES]) -> Result<Self, WireError> {
        let frame = Frame::decode(bytes)?;
        let Frame {
            lane,
            generation,
            extent,
            key,
            ..
        } = frame;
        match frame.kind {
            1 => frame.queue_and_packet().map(|(queue, packet)| Self::Open {
                lane,
                generation,
                queue,
                packet,
            }),
            2 => Ok(Self::Bind {
                lane,
                generation,
                extent,
                key,
            }),
            other => Err(WireError::Operation(other)),
        }
    }
}

impl Tell {
    pub(super) fn encode(self) -> [u8; FRAME_BYTES] {
        match self {
            Self::Opened {
                lane,
                generation,
                queue,
                packet,
            } => Frame {
                kind: 3,
                lane,
                generation,
                number: queue,
                key: packet.into(),
                ..Frame::default()
            },
            Self::Bound {
                lane,
                generation,
                extent,
                key,
                remote_key,
                address,
            } => Frame {
                kind: 4,
                lane,
                generation,
                extent,
                number: remote_key,
                key,
                address,
            },
            Self::Refused {
                lane,
                generation,
                extent,
                key,
            } => Frame {
                kind: 5,
                lane,
                generation,
                extent,
                key,
                ..Frame::default()
            },
            Self::Gone { lane, generation } => Frame {
                kind: 6,
                lane,
                generation,
                ..Frame::default()
            },
        }
        .encode()
    }

    pub(super) fn decode(bytes: &[u8; FRAME_BYTES]) -> Result<Self, WireError> {
        let frame = Frame::decode(bytes)?;
        let Frame {
            lane,
            generation,
            extent,
            number,
            key,
            address,
            ..
        } = frame;
        match frame.kind {
            3 => frame
                .queue_and_packet()
                .map(|(queue, packet)| Self::Opened {
                    lane,
                    generation,
                    queue,
                    packet,
                }),
            4 => Ok(Self::Bound {
                lane,
                generation,
                extent,
                key,
                remote_key: number,
                address,
            }),
            5 => Ok(Self::Refused {
                lane,
                generation,
                extent,
                key,
            }),
            6 => Ok(Self::Gone { lane, generation }),
            other => Err(WireError::Operation(other)),
        }
    }
}

impl Port {
    fn encode<const N: usize>(self, writer: Writer<N>) -> Writer<N> {
        writer
            .put(self.gid)
            .u16(self.lid)
            .put([
                self.mtu,
                self.reads_in,
                self.reads_out,
                u8::from(self.ethernet),
            ])
            .put([0; 10])
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let (gid, lid) = (reader.take(), reader.u16());
        let [mtu, reads_in, reads_out, link] = reader.take();
        if reader.take() != [0; 10] || !(1..=5).contains(&mtu) || link > 1 {
            return Err(WireError::Reserved);
        }
        Ok(Self {
            gid,
            lid,
            mtu,
            reads_in,
            reads_out,
            ethernet: link == 1,
        })
    }
}

/// The requester's hello.
pub(super) fn encode_hello(port: Port) -> [u8; HELLO_BYTES] {
    port.encode(Writer::new().u32(MAGIC).u16(VERSION).u16(0))
        .finish()
}

/// The requester's version, and its port if the version is ours.
pub(super) fn decode_hello(bytes: &[u8; HELLO_BYTES]) -> Result<(u16, Option<Port>), WireError> {
    let mut reader = Reader(bytes);
    let magic = reader.u32();
    if magic != MAGIC {
        return Err(WireError::Magic(magic));
    }
    let version = reader.u16();
    if version != VERSION {
        return Ok((version, None));
    }
    if reader.u16() != 0 {
        return Err(WireError::Reserved);
    }
    Ok((version, Some(Port::decode(&mut reader)?)))
}

impl Answer {
    pub(super) fn encode(self) -> [u8; HELLO_BYTES] {
        let writer = Writer::new().u32(MAGIC);
        match self {
            Self::Welcome {
                port,
                geometry,
                max_transfer,
            } => port
                .encode(writer.u16(VERSION).u16(1))
                .u32(geometry.extents())
                .u32(max_transfer)
                .u64(geometry.extent_bytes()),
            Self::Busy => writer.u16(VERSION).u16(2),
            Self::OtherVersion(version) => writer.u16(version).u16(3),
        }
        .finish()
    }

    pub(super) fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Self, WireError> {
        let mut reader = Reader(bytes);
        let (magic, version, verdict) = (reader.u32(), reader.u16(), reader.u16());
        if magic != MAGIC {
            return Err(WireError::Magic(magic));
        }
        if version != VERSION {
            return Ok(Self::OtherVersion(version));
        }
        match verdict {
            1 => {
                let port = Port::decode(&mut reader)?;
                let (extents, max_transfer, extent_bytes) =
                    (reader.u32(), reader.u32(), reader.u64());
                if max_transfer == 0 || max_transfer > MAX_TRANSFER {
                    return Err(WireError::TooLong(max_transfer));
                }
                Ok(Self::Welcome {
                    port,
                    geometry: PoolGeometry::new(extent_bytes, extents)?,
                    max_transfer,
                })
            }
            2 => Ok(Self::Busy),
            3 => Ok(Self::OtherVersion(version)),
            other => Err(WireError::Verdict(other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PORT: Port = Port {
        gid: [7; 16],
        lid: 3,
        mtu: 5,
        reads_in: 16,
        reads_out: 128,
        ethernet: true,
    };

    #[test]
    fn hellos_arrive_as_they_were_sent() {
        assert_eq!(decode_hello(&encode_hello(PORT)), Ok((VERSION, Some(PORT))));
        let geometry = PoolGeometry::new(2 << 20, 4).unwrap();
        for answer in [
            Answer::Welcome {
                port: PORT,
                geometry,
                max_transfer: MAX_TRANSFER,
            },
            Answer::Busy,
            Answer::OtherVersion(9),
        ] {
            assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
        }
    }

    #[test]
    fn unequal_ports_meet_at_what_both_can() {
        let modest = Port {
            mtu: 3,
            reads_in: 4,
            reads_out: 1,
            ..PORT
        };
        assert_eq!(PORT.mtu_with(&modest), 3);
        assert_eq!(modest.mtu_with(&PORT), 3);
        assert_eq!(PORT.reads_from(&modest), 4);
        assert_eq!(modest.reads_from(&PORT), 1);
        assert_eq!(PORT.reads_from(&PORT), 16);
        // A device that says that it serves none: the least that a queue pair takes.
        let none = Port {
            reads_in: 0,
            ..PORT
        };
        assert_eq!(PORT.reads_from(&none), 1);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_frame_or_an_error(bytes: [u8; FRAME_BYTES], kind in 0u8..8, lane in 0u8..4) {
            let mut bytes = bytes;
            bytes[..4].copy_from_slice(&[kind, lane, 0, 0]);
            bytes[32..].fill(0);
            bytes[20..24].fill(0);
            if let Ok(ask) = Ask::decode(&bytes) {
                prop_assert_eq!(Ask::decode(&ask.encode()), Ok(ask));
            }
            if let Ok(tell) = Tell::decode(&bytes) {
                prop_assert_eq!(Tell::decode(&tell.encode()), Ok(tell));
            }
        }

        #[test]
        fn any_bytes_are_a_hello_or_an_error(tail: [u8; 32], head: [u8; 24]) {
            let mut bytes = encode_hello(PORT);
            bytes[6..30].copy_from_slice(&head);
            bytes[32..].copy_from_slice(&tail);
            let _ = decode_hello(&bytes);
            if let Ok(answer) = Answer::decode(&bytes) {
                prop_assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
            }
        }
    }
}
