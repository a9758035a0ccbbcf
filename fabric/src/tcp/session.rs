//! A responder's side of one connection, without the socket: request bytes in, response bytes out.

use crate::MAX_TRANSFER;
use crate::endpoint::WorkError;
use crate::gate::Gate;
use crate::memory::RegisteredMemory;
use crate::wire::{Operation, REQUEST_BYTES, RESPONSE_BYTES, Request, Response, Status, WireError};

/// Responses are gathered up to this many bytes before they are sent: a batch of small reads leaves in one
/// call, and a burst stays within a core's second-level cache.
const OUTPUT_TARGET: usize = 128 << 10;

/// The most output that is ever held: the target just missed, plus one response of the largest size.
pub const MAX_OUTPUT: usize = OUTPUT_TARGET + RESPONSE_BYTES + MAX_TRANSFER as usize;

/// What a session did, for statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionCounts {
    /// Reads carried out.
    pub reads: u64,
    /// Writes carried out.
    pub writes: u64,
    /// Requests refused, for their key or their bounds.
    pub refused: u64,
    /// Payload bytes moved either way.
    pub bytes: u64,
}

/// A write whose payload is arriving.
#[derive(Debug)]
struct Incoming {
    request: Request,
    done: u32,
    status: Status,
}

/// Carries out requests against a pool.
///
/// Bytes of the pool are touched only within [`Session::feed`], under a guard, and never while a socket is
/// waited for: a peer that stops reading or sending cannot hold up a revocation. A write whose grant ends
/// half-way is refused, with a part of it carried out.
#[derive(Debug)]
pub struct Session {
    header: [u8; REQUEST_BYTES],
    header_len: usize,
    incoming: Option<Incoming>,
    output: Vec<u8>,
    counts: SessionCounts,
}

impl Default for Session {
    fn default() -> Self {
        Self::new()
    }
}

impl Session {
    /// A session after the hellos.
    #[must_use]
    pub fn new() -> Self {
        Self {
            header: [0; REQUEST_BYTES],
            header_len: 0,
            incoming: None,
            output: Vec::new(),
            counts: SessionCounts::default(),
        }
    }

    /// What is to be sent.
    #[must_use]
    pub fn output(&self) -> &[u8] {
        &self.output
    }

    /// Forgets the output, once it was sent.
    pub fn clear_output(&mut self) {
        self.output.clear();
    }

    /// Returns and resets the counts.
    pub fn take_counts(&mut self) -> SessionCounts {
        std::mem::take(&mut self.counts)
    }

    /// Carries out what arrived. Returns how many of `bytes` were consumed: fewer than all once the output is
    /// full; send it, clear it, and feed the rest.
    ///
    /// # Errors
    /// [`WireError`]: the peer does not speak the protocol; close the connection.
    pub fn feed(
        &mut self,
        pool: &RegisteredMemory,
        gate: &mut Gate,
        bytes: &[u8],
    ) -> Result<usize, WireError> {
        let mut rest = bytes;
        while !rest.is_empty() && self.output.len() < OUTPUT_TARGET {
            if let Some(mut incoming) = self.incoming.take() {
                let take = rest
                    .len()
                    .min((incoming.request.len - incoming.done) as usize);
                let (payload, tail) = rest.split_at(take);
                rest = tail;
                store(pool, gate, &mut incoming, payload);
                self.incoming = Some(incoming);
                self.finish_write();
                continue;
            }
            let take = rest.len().min(REQUEST_BYTES - self.header_len);
            let (head, tail) = rest.split_at(take);
            if let Some(to) = self.header.get_mut(self.header_len..self.header_len + take) {
                to.copy_from_slice(head);
            }
            self.header_len += take;
            rest = tail;
            if self.header_len < REQUEST_BYTES {
                break;
            }
            self.header_len = 0;
            let request = Request::decode(&self.header)?;
            match request.operation {
                Operation::Read => self.read(pool, gate, &request),
                Operation::Write => {
                    // Checked before the payload comes, so that an empty write is checked too.
                    let status = match gate.check(
                        request.extent,
                        request.key,
                        request.offset,
                        request.len,
                    ) {
                        Ok(_guard) => Status::Done,
                        Err(error) => refusal(error),
                    };
                    self.incoming = Some(Incoming {
                        request,
                        done: 0,
                        status,
                    });
                    self.finish_write();
                }
            }
        }
        Ok(bytes.len() - rest.len())
    }

    fn read(&mut self, pool: &RegisteredMemory, gate: &mut Gate, request: &Request) {
        let start = self.output.len();
        let status = match gate.check(request.extent, request.key, request.offset, request.len) {
            Ok(guard) => {
                let header = Response {
                    id: request.id,
                    status: Status::Done,
                    len: request.len,
                };
                self.output.extend_from_slice(&header.encode());
                let payload = self.output.len();
                self.output.resize(payload + request.len as usize, 0);
                match self
                    .output
                    .get_mut(payload..)
                    .map(|to| pool.read(guard.pool_offset(), to))
                {
                    Some(Ok(())) => {
                        self.counts.reads += 1;
                        self.counts.bytes += u64::from(request.len);
                        return;
                    }
                    _ => Status::RemoteBounds,
                }
            }
            Err(error) => refusal(error),
        };
        self.output.truncate(start);
        self.answer(request.id, status);
    }

    /// Answers the write whose payload is complete, if there is one.
    fn finish_write(&mut self) {
        if let Some(incoming) = self
            .incoming
            .take_if(|incoming| incoming.done == incoming.request.len)
        {
            if incoming.status == Status::Done {
                self.counts.writes += 1;
                self.counts.bytes += u64::from(incoming.request.len);
            }
            self.answer(incoming.request.id, incoming.status);
        }
    }

    fn answer(&mut self, id: u64, status: Status) {
        if status != Status::Done {
            self.counts.refused += 1;
        }
        self.output
            .extend_from_slice(&Response { id, status, len: 0 }.encode());
    }
}

/// Stores a part of a write's payload, or drops it when the write is refused.
fn store(pool: &RegisteredMemory, gate: &mut Gate, incoming: &mut Incoming, payload: &[u8]) {
    let Request {
        extent,
        key,
        offset,
        len,
        ..
    } = incoming.request;
    if incoming.status == Status::Done {
        incoming.status = match gate.check(extent, key, offset, len) {
            Ok(guard) => {
                match pool.write(guard.pool_offset() + u64::from(incoming.done), payload) {
                    Ok(()) => Status::Done,
                    Err(_) => Status::RemoteBounds,
                }
            }
            Err(error) => refusal(error),
        };
    }
    incoming.done += payload.len() as u32;
}

fn refusal(error: WorkError) -> Status {
    match error {
        WorkError::RemoteBounds => Status::RemoteBounds,
        _ => Status::AccessDenied,
    }
}
