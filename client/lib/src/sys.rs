//! The unsafe rim: the mapping behind a region.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::region::Advice;

/// A private anonymous mapping of this process's, not inherited by its children. Empty once unmapped.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory that this value owns alone, like a `Box<[u8]>`.
unsafe impl Send for Mapping {}
// SAFETY: as above: shared access only reads.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of zeros, whole pages.
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a mapping wherever the kernel finds room replaces nothing.
        let start = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )
        }?;
        let start = NonNull::new(start.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mapping = Self { start, len };
        mapping.madvise(0..len, rustix::mm::Advice::LinuxDontFork)?;
        Ok(mapping)
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: `len` readable bytes that this value owns; borrowed as long as it is.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, writable, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    /// Passes advice on pages of it to the kernel.
    pub(crate) fn advise(&mut self, pages: Range<usize>, advice: Advice) -> io::Result<()> {
        let advice = match advice {
            Advice::WillNeed => rustix::mm::Advice::LinuxPopulateRead,
            Advice::Cold => rustix::mm::Advice::LinuxCold,
            Advice::DontNeed => rustix::mm::Advice::LinuxDontNeed,
        };
        self.madvise(pages, advice)
    }

    fn madvise(&self, pages: Range<usize>, advice: rustix::mm::Advice) -> io::Result<()> {
        let start = self.start.as_ptr().wrapping_add(pages.start);
        // SAFETY: the callers pass ranges within the mapping. DONTNEED changes its bytes to zeros, which its
        // caller does with the mapping borrowed mutably; the other advices change none.
        Ok(unsafe { madvise(start.cast::<c_void>(), pages.len(), advice) }?)
    }

    /// Unmaps it.
    pub(crate) fn unmap(&mut self) {
        let len = std::mem::take(&mut self.len);
        if len > 0 {
            // SAFETY: the mapping is this value's; with a length of zero nobody gets at it any more.
            let _ = unsafe { munmap(self.start.as_ptr().cast(), len) };
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.unmap();
    }
}

/// Takes ownership of a socket that the attach crate has just connected.
pub(crate) fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the caller has this descriptor from `socket::connect`, which gives it to nobody else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
