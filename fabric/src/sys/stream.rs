//! Scatter and gather on a stream socket, with mapped memory among the pieces.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use crate::memory::{OutOfBounds, RegisteredMemory};

/// The most pieces of one call. Linux takes 1024 (`UIO_MAXIOV`); 64 fill a socket buffer with pages, and the
/// array stays in one kilobyte of stack.
pub(crate) const MAX_PIECES: usize = 64;

const EMPTY: libc::iovec = libc::iovec {
    iov_base: ptr::null_mut(),
    iov_len: 0,
};

/// Up to [`MAX_PIECES`] pieces to send, in order.
pub(crate) struct SendPieces<'a> {
    vec: [libc::iovec; MAX_PIECES],
    count: usize,
    bytes: usize,
    borrow: PhantomData<&'a [u8]>,
}

impl<'a> SendPieces<'a> {
    pub(crate) fn new() -> Self {
        Self {
            vec: [EMPTY; MAX_PIECES],
            count: 0,
            bytes: 0,
            borrow: PhantomData,
        }
    }

    pub(crate) fn room(&self) -> usize {
        MAX_PIECES - self.count
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    fn push(&mut self, base: *mut u8, len: usize) {
        if let Some(piece) = self.vec.get_mut(self.count) {
            *piece = libc::iovec {
                iov_base: base.cast(),
                iov_len: len,
            };
            self.count += 1;
            self.bytes += len;
        }
    }

    /// Adds bytes; ignored without [`Self::room`].
    pub(crate) fn push_bytes(&mut self, bytes: &'a [u8]) {
        self.push(bytes.as_ptr().cast_mut(), bytes.len());
    }

    /// Adds registered memory; ignored without [`Self::room`].
    pub(crate) fn push_memory(
        &mut self,
        memory: &'a RegisteredMemory,
        offset: u64,
        len: usize,
    ) -> Result<(), OutOfBounds> {
        let base = memory.address(offset, len)?;
        self.push(base, len);
        Ok(())
    }

    /// Sends without blocking and without SIGPIPE. Returns how many bytes the socket took.
    pub(crate) fn send(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let message = message(self.vec.get(..self.count).unwrap_or_default());
        // SAFETY: the first `count` pieces are slices or mapped ranges borrowed for 'a, which outlives `self`;
        // the kernel only reads them, and takes addresses that fault as an error.
        let sent = unsafe {
            libc::sendmsg(
                socket.as_raw_fd(),
                &raw const message,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

/// Receives without blocking: first `len` bytes into registered memory at `offset`, then into `bytes`. Returns
/// how many bytes came; zero means that the peer closed.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    memory: Option<(&RegisteredMemory, u64, usize)>,
    bytes: &mut [u8],
) -> io::Result<usize> {
    let mut vec = [EMPTY; 2];
    if let Some((memory, offset, len)) = memory {
        let base = memory
            .writable_address(offset, len)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        vec[0] = libc::iovec {
            iov_base: base.cast(),
            iov_len: len,
        };
    }
    vec[1] = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let mut message = message(&vec);
    // SAFETY: the pieces are a mapped range and a buffer, both borrowed for this call, the second exclusively; the
    // kernel writes inside their lengths only.
    let received =
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    usize::try_from(received).map_err(|_| io::Error::last_os_error())
}

fn message(vec: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeros is a valid msghdr: null pointers with zero lengths.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vec.as_ptr().cast_mut();
    message.msg_iovlen = vec.len() as _;
    message
}
