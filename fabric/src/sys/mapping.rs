//! A shared mapping of a memfd, accessed by raw copies only.
//!
//! Other processes may change the bytes at any time, so no Rust reference to them is ever made (except to
//! single words as atomics). A copy that races with a foreign write yields a mix of old and new bytes; the
//! layers above tell torn data by hash. The file is sealed against shrinking before it is mapped, so an
//! access inside the mapping's length cannot raise SIGBUS for lack of a file behind it.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use rustix::mm::{self, Advice, MapFlags, MlockFlags, ProtFlags};
use twox_hash::XxHash3_128;

/// Hashing goes through a stack copy of this many bytes, one page: the hasher wants a reference, and only
/// a private copy may have one.
const HASH_BLOCK: usize = 4096;

/// Whether the mapping may be written through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protection {
    ReadOnly,
    ReadWrite,
}

#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    /// Bytes that may be accessed.
    len: usize,
    /// Bytes that were mapped: `len`, rounded up to the file's page size.
    mapped: usize,
    protection: Protection,
}

// SAFETY: the mapping belongs to the process and not to a thread, and is unmapped only on drop, when no
// borrow of `Mapping` is left.
unsafe impl Send for Mapping {}
// SAFETY: all access through `&Mapping` is by raw copies or atomics and never through references to plain
// bytes, so that threads that race obtain torn bytes at worst, as with any other process that maps the file.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `fd` from its start. `page` is the file's page size (larger for hugetlb files).
    pub(crate) fn new(
        fd: BorrowedFd<'_>,
        len: usize,
        page: usize,
        protection: Protection,
    ) -> io::Result<Self> {
        let mapped = len
            .checked_next_multiple_of(page.max(1))
            .filter(|&m| m > 0 && isize::try_from(m).is_ok())
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let prot = match protection {
            Protection::ReadOnly => ProtFlags::READ,
            Protection::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
        let base = unsafe { mm::mmap(ptr::null_mut(), mapped, prot, MapFlags::SHARED, fd, 0)? };
        let base = NonNull::new(base.cast::<u8>())
            .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self {
            base,
            len,
            mapped,
            protection,
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.base.as_ptr()
    }

    /// Asks for transparent huge pages. A hint: the kernel may not take it.
    pub(crate) fn hint_huge(&self) -> io::Result<()> {
        // SAFETY: the range is this mapping, and MADV_HUGEPAGE changes no contents.
        unsafe {
            Ok(mm::madvise(
                self.base.as_ptr().cast(),
                self.mapped,
                Advice::LinuxHugepage,
            )?)
        }
    }

    /// Populates the mapping and pins it in memory until it is unmapped.
    pub(crate) fn lock(&self) -> io::Result<()> {
        // SAFETY: the range is this mapping, and mlock changes no contents.
        unsafe { Ok(mm::mlock(self.base.as_ptr().cast(), self.mapped)?) }
    }

    /// Pins each page in memory from when it is first touched until the mapping is unmapped.
    pub(crate) fn lock_as_used(&self) -> io::Result<()> {
        // SAFETY: the range is this mapping, and mlock2 changes no contents.
        unsafe {
            Ok(mm::mlock_with(
                self.base.as_ptr().cast(),
                self.mapped,
                MlockFlags::ONFAULT,
            )?)
        }
    }

    /// The address of `len` bytes at `offset`, if they lie inside.
    pub(crate) fn at(&self, offset: u64, len: usize) -> Option<*mut u8> {
        let offset = usize::try_from(offset).ok()?;
        if offset > self.len || len > self.len - offset {
            return None;
        }
        // SAFETY: offset <= len, both inside one mapping of at most isize::MAX bytes (checked in `new`).
        Some(unsafe { self.base.as_ptr().add(offset) })
    }

    pub(crate) fn writable_at(&self, offset: u64, len: usize) -> Option<*mut u8> {
        if self.protection == Protection::ReadOnly {
            return None;
        }
        self.at(offset, len)
    }

    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) -> Option<()> {
        let from = self.at(offset, bytes.len())?;
        // SAFETY: `at` checked the source; a `&mut` slice made by Rust cannot overlap a mapping to which no
        // reference exists.
        unsafe { ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
        Some(())
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Option<()> {
        let to = self.writable_at(offset, bytes.len())?;
        // SAFETY: `writable_at` checked the destination and that it is mapped for writing; the slice cannot
        // overlap a mapping to which no reference exists.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Some(())
    }

    pub(crate) fn copy_to(
        &self,
        offset: u64,
        to: &Mapping,
        to_offset: u64,
        len: usize,
    ) -> Option<()> {
        let from = self.at(offset, len)?;
        let to = to.writable_at(to_offset, len)?;
        // SAFETY: both ranges were checked against their mappings; `copy` allows them to overlap, as they
        // may when both are the same mapping.
        unsafe { ptr::copy(from, to, len) };
        Some(())
    }

    pub(crate) fn zero(&self, offset: u64, len: usize) -> Option<()> {
        let to = self.writable_at(offset, len)?;
        // SAFETY: `writable_at` checked the range and that it is mapped for writing.
        unsafe { ptr::write_bytes(to, 0, len) };
        Some(())
    }

    /// The 64-bit word at an 8-aligned offset. Storing to a word of a read-only mapping faults, so only
    /// writable mappings give it out; see [`Self::load_word`] for the others.
    pub(crate) fn word(&self, offset: u64) -> Option<&AtomicU64> {
        if !offset.is_multiple_of(8) {
            return None;
        }
        let word = self.writable_at(offset, 8)?;
        // SAFETY: in bounds, aligned (the base is page-aligned), mapped for as long as `self` is borrowed,
        // and shared with other processes only as memory that atomics may race on.
        Some(unsafe { AtomicU64::from_ptr(word.cast()) })
    }

    /// Loads the word at an 8-aligned offset, with acquire ordering.
    pub(crate) fn load_word(&self, offset: u64) -> Option<u64> {
        if !offset.is_multiple_of(8) {
            return None;
        }
        let word = self.at(offset, 8)?;
        // SAFETY: as in `word`; read-only memory allows relaxed loads of pointer size, and no other access is
        // made through this reference.
        let word = unsafe { AtomicU64::from_ptr(word.cast()) };
        let value = word.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        Some(value)
    }

    pub(crate) fn hash128(&self, offset: u64, len: usize) -> Option<u128> {
        self.at(offset, len)?;
        let mut block = [0u8; HASH_BLOCK];
        if len <= HASH_BLOCK {
            let block = block.get_mut(..len)?;
            self.read(offset, block)?;
            return Some(XxHash3_128::oneshot(block));
        }
        let mut hasher = XxHash3_128::new();
        let mut done = 0;
        while done < len {
            let take = HASH_BLOCK.min(len - done);
            let block = block.get_mut(..take)?;
            self.read(offset + done as u64, block)?;
            hasher.write(block);
            done += take;
        }
        Some(hasher.finish_128())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped in `new`, and dropping shows that nobody borrows it. A failure can
        // only mean wrong arguments, and leaks.
        let _ = unsafe { mm::munmap(self.base.as_ptr().cast(), self.mapped) };
    }
}
