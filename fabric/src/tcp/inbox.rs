//! What a requester waits for.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::endpoint::{Completion, LocalSlice, WorkError, WorkId};
use crate::memory::RegisteredMemory;
use crate::sys::stream;
use crate::wire::{RESPONSE_BYTES, Response, Status, WireError};

/// One receive call takes up to this many bytes beyond a payload that is known to come: fifteen pages with their
/// headers, and still inside a second-level cache.
const BUFFER_BYTES: usize = 64 << 10;

/// A request whose response is due.
#[derive(Clone, Copy, Debug)]
pub(super) struct Expected {
    pub(super) id: WorkId,
    /// The id on the wire.
    pub(super) sequence: u64,
    /// Where the payload goes; `None` for a write.
    pub(super) read: Option<LocalSlice>,
}

impl Expected {
    fn payload(&self) -> usize {
        self.read.map_or(0, |slice| slice.len as usize)
    }
}

/// Why nothing more will arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    /// The connection ended or broke.
    Closed,
    /// The responder broke the protocol.
    Protocol,
}

impl From<WireError> for Lost {
    fn from(_: WireError) -> Self {
        Self::Protocol
    }
}

/// Whether the socket may hold more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    Drained,
    More,
}

/// Responses, which come in the order of the requests.
///
/// A payload goes straight to the registered memory as far as its header was seen before it; the rest of a receive
/// call goes to a private buffer and is copied, some 0.1 us a page. To guess where payloads will land and receive
/// whole batches in place was tried and given up: when a read is refused, what follows it lands in that read's
/// memory, and that may be shared with a process that has no business with the other responses.
#[derive(Debug)]
pub(super) struct Inbox {
    expected: VecDeque<Expected>,
    header: [u8; RESPONSE_BYTES],
    header_len: usize,
    /// The header is complete and announced the payload, of which so much has arrived.
    payload: Option<usize>,
    buffer: Box<[u8]>,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self {
            expected: VecDeque::new(),
            header: [0; RESPONSE_BYTES],
            header_len: 0,
            payload: None,
            buffer: vec![0; BUFFER_BYTES].into(),
        }
    }

    pub(super) fn expect(&mut self, expected: Expected) {
        self.expected.push_back(expected);
    }

    /// How many responses are due.
    pub(super) fn outstanding(&self) -> usize {
        self.expected.len()
    }

    /// Completes everything that is outstanding with `error`.
    pub(super) fn fail_all(&mut self, error: WorkError, out: &mut Vec<Completion>) {
        out.extend(self.expected.drain(..).map(|expected| Completion {
            id: expected.id,
            result: Err(error),
        }));
    }

    /// Receives once, without blocking.
    pub(super) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        regions: &[Arc<RegisteredMemory>],
        out: &mut Vec<Completion>,
    ) -> Result<Received, Lost> {
        let direct = self.announced(regions)?;
        let direct_len = direct.map_or(0, |(_, _, len)| len);
        let received = match stream::receive(socket, direct, &mut self.buffer) {
            Ok(0) => return Err(Lost::Closed),
            Ok(received) => received,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                return Ok(Received::Drained);
            }
            Err(_) => return Err(Lost::Closed),
        };
        if direct_len > 0 {
            self.progress(received.min(direct_len), out);
        }
        if let Some(buffered) = received.checked_sub(direct_len).filter(|&len| len > 0) {
            let buffer = std::mem::take(&mut self.buffer);
            let fed = self.feed(regions, buffer.get(..buffered).unwrap_or_default(), out);
            self.buffer = buffer;
            fed?;
        }
        Ok(if received < direct_len + BUFFER_BYTES {
            Received::Drained
        } else {
            Received::More
        })
    }

    /// Where the rest of a payload goes whose header has been seen.
    fn announced<'a>(
        &self,
        regions: &'a [Arc<RegisteredMemory>],
    ) -> Result<Option<(&'a RegisteredMemory, u64, usize)>, Lost> {
        let (Some(done), Some(expected)) = (self.payload, self.expected.front()) else {
            return Ok(None);
        };
        let Some(slice) = expected.read else {
            return Ok(None);
        };
        let region = regions.get(slice.region.0 as usize).ok_or(Lost::Protocol)?;
        Ok(Some((
            region,
            slice.offset + done as u64,
            slice.len as usize - done,
        )))
    }

    /// Takes in bytes by copying.
    fn feed(
        &mut self,
        regions: &[Arc<RegisteredMemory>],
        mut bytes: &[u8],
        out: &mut Vec<Completion>,
    ) -> Result<(), Lost> {
        while !bytes.is_empty() {
            if let Some((region, offset, rest)) = self.announced(regions)? {
                let (payload, tail) = bytes.split_at(bytes.len().min(rest));
                bytes = tail;
                region.write(offset, payload).map_err(|_| Lost::Protocol)?;
                self.progress(payload.len(), out);
                continue;
            }
            let (head, tail) = bytes.split_at(bytes.len().min(RESPONSE_BYTES - self.header_len));
            if let Some(to) = self
                .header
                .get_mut(self.header_len..self.header_len + head.len())
            {
                to.copy_from_slice(head);
            }
            self.header_len += head.len();
            bytes = tail;
            if self.header_len == RESPONSE_BYTES {
                self.open(out)?;
            }
        }
        Ok(())
    }

    /// Reads a complete header: of the oldest expected response, or the protocol is broken.
    fn open(&mut self, out: &mut Vec<Completion>) -> Result<(), WireError> {
        let expected = self.expected.front().ok_or(WireError::Order)?;
        let response = Response::decode(&self.header)?;
        if response.id != expected.sequence {
            return Err(WireError::Order);
        }
        if response.status == Status::Done {
            if response.len as usize != expected.payload() {
                return Err(WireError::PayloadLength(response.len));
            }
            self.payload = Some(0);
            self.progress(0, out);
        } else {
            self.complete(response.status.result(), out);
        }
        Ok(())
    }

    /// Notes that `more` bytes of the announced payload are in place, and completes it if those are all.
    fn progress(&mut self, more: usize, out: &mut Vec<Completion>) {
        let due = self.expected.front().map_or(0, Expected::payload);
        match self.payload {
            Some(done) if done + more < due => self.payload = Some(done + more),
            _ => self.complete(Ok(()), out),
        }
    }

    fn complete(&mut self, result: Result<(), WorkError>, out: &mut Vec<Completion>) {
        self.header_len = 0;
        self.payload = None;
        if let Some(expected) = self.expected.pop_front() {
            out.push(Completion {
                id: expected.id,
                result,
            });
        }
    }
}
