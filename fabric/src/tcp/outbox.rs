//! What a requester still has to send.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::endpoint::LocalSlice;
use crate::memory::RegisteredMemory;
use crate::sys::stream::SendPieces;
use crate::wire::REQUEST_BYTES;

/// One send call takes no more than about this: socket buffers hold some megabytes at most, so more would only
/// be gathered in vain.
const SEND_TARGET: usize = 512 << 10;

/// A request's header and, for a write, where its payload is.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) header: [u8; REQUEST_BYTES],
    pub(super) payload: Option<LocalSlice>,
}

impl Frame {
    fn len(&self) -> usize {
        REQUEST_BYTES + self.payload.map_or(0, |slice| slice.len as usize)
    }
}

/// Frames in order; the window bounds how many.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    frames: VecDeque<Frame>,
    /// Bytes of the first frame that are sent already.
    sent: usize,
}

/// Whether all is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    All,
    /// The socket takes no more for now.
    Blocked,
}

impl Outbox {
    pub(super) fn push(&mut self, frame: Frame) {
        self.frames.push_back(frame);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.frames.clear();
        self.sent = 0;
    }

    /// Sends as much as the socket takes, straight from the registered memory.
    pub(super) fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        regions: &[Arc<RegisteredMemory>],
    ) -> io::Result<Sent> {
        while !self.frames.is_empty() {
            let (offered, taken) = self.send_once(socket, regions)?;
            self.advance(taken);
            if taken < offered {
                return Ok(Sent::Blocked);
            }
        }
        Ok(Sent::All)
    }

    /// One send call: how many bytes were offered, how many taken.
    fn send_once(
        &self,
        socket: BorrowedFd<'_>,
        regions: &[Arc<RegisteredMemory>],
    ) -> io::Result<(usize, usize)> {
        let mut pieces = SendPieces::new();
        let mut skip = self.sent;
        for frame in &self.frames {
            if pieces.room() < 2 || pieces.bytes() >= SEND_TARGET {
                break;
            }
            if let Some(header) = frame.header.get(skip..).filter(|header| !header.is_empty()) {
                pieces.push_bytes(header);
            }
            if let Some(slice) = frame.payload {
                let done = skip.saturating_sub(REQUEST_BYTES);
                // Both were checked when the request was posted.
                let region = regions
                    .get(slice.region.0 as usize)
                    .ok_or(io::ErrorKind::InvalidInput)?;
                pieces
                    .push_memory(
                        region,
                        slice.offset + done as u64,
                        slice.len as usize - done,
                    )
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
            }
            skip = 0;
        }
        loop {
            match pieces.send(socket) {
                Ok(taken) => return Ok((pieces.bytes(), taken)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok((pieces.bytes(), 0));
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn advance(&mut self, taken: usize) {
        self.sent += taken;
        while let Some(len) = self
            .frames
            .front()
            .map(Frame::len)
            .filter(|&len| len <= self.sent)
        {
            self.sent -= len;
            self.frames.pop_front();
        }
    }
}
