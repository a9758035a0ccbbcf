//! The memory in which the agent's state lies: one memfd, mapped shared, sparse.
//!
//! It is much larger than what is ever used of it, so that every record has a fixed place and nothing is ever moved.

use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use farpage_core::table::Cells;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::entry::{PAGE_IN_EXTENT_BITS, Slot};
use crate::state::records::{
    BitsRecord, ChunkRecord, ExtentRecord, HashRecord, Header, JobRecord, SpaceRecord,
};

/// As many as the agent serves.
pub const MAX_JOBS: usize = 1024;
/// As many as the agent serves.
pub const MAX_SPACES: usize = 4096;
/// As many as a lease may have; an agent's numbers for extents are places in a list of those it holds, with room for those of
/// a lease that has ended.
pub const MAX_EXTENTS: usize = 2 * farpage_proto::limits::MAX_EXTENTS_PER_LEASE;
/// Chunks of page tables: 8 TiB of address space, forked children's counted each.
pub const MAX_CHUNKS: usize = 1 << 22;

const JOB_BYTES: usize = 4096;
const SPACE_BYTES: usize = 8192;
const EXTENT_BYTES: usize = 2048;
const HASHES_PER_EXTENT: usize = 1 << PAGE_IN_EXTENT_BITS;

const JOBS_AT: usize = 4096;
const SPACES_AT: usize = JOBS_AT + MAX_JOBS * JOB_BYTES;
const EXTENTS_AT: usize = SPACES_AT + MAX_SPACES * SPACE_BYTES;

/// Where what lies, of how many.
#[derive(Clone, Copy, Debug)]
struct Layout {
    extents: usize,
    chunks: usize,
    records_at: usize,
    chunks_at: usize,
    hashes_at: usize,
    bits_at: usize,
    bytes: usize,
}

impl Layout {
    /// The `halvings`th smaller one, with as much less of what there is most of.
    const fn of(halvings: u32) -> Self {
        let (extents, chunks) = (MAX_EXTENTS >> halvings, MAX_CHUNKS >> halvings);
        let records_at = EXTENTS_AT + extents * EXTENT_BYTES;
        let chunks_at = records_at + chunks * size_of::<ChunkRecord>();
        let hashes_at = chunks_at + chunks * size_of::<Cells>();
        let bits_at = hashes_at + extents * HASHES_PER_EXTENT * size_of::<HashRecord>();
        Self {
            extents,
            chunks,
            records_at,
            chunks_at,
            hashes_at,
            bits_at,
            bytes: bits_at + extents * size_of::<BitsRecord>(),
        }
    }

    fn all() -> impl Iterator<Item = Self> {
        (0..=MOST_HALVINGS).map(Self::of)
    }

    /// The largest that leaves room for everything else, where address space is limited.
    fn that_fits() -> Self {
        let limit = rustix::process::getrlimit(rustix::process::Resource::As).current;
        let fits = |layout: &Self| limit.is_none_or(|limit| layout.bytes as u64 <= limit / SHARE);
        Self::all().find(fits).unwrap_or(Self::of(MOST_HALVINGS))
    }
}

/// The smallest layout: for 512 MiB of far memory and 4 GiB of address space.
const MOST_HALVINGS: u32 = 11;
/// The part of its address space that an agent gives to its state, where that is limited.
const SHARE: u64 = 8;

const _: () = assert!(
    size_of::<Header>() <= JOBS_AT
        && size_of::<JobRecord>() <= JOB_BYTES
        && size_of::<SpaceRecord>() <= SPACE_BYTES
        && size_of::<ExtentRecord>() <= EXTENT_BYTES
        && size_of::<Cells>() == 4096
        && Layout::of(0).chunks_at.is_multiple_of(4096)
        && Layout::of(MOST_HALVINGS).chunks_at.is_multiple_of(4096),
    "every record fits its place"
);

/// The mapping.
#[derive(Debug)]
pub struct StateMemory {
    base: NonNull<u8>,
    layout: Layout,
    fd: OwnedFd,
}

// SAFETY: the mapping belongs to the process and not to a thread, and is unmapped only on drop.
unsafe impl Send for StateMemory {}
// SAFETY: all access is through atomics.
unsafe impl Sync for StateMemory {}

impl StateMemory {
    /// Fresh memory: nothing is in use.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn create() -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("farpage-state", flags)?;
        rustix::fs::ftruncate(&fd, Layout::that_fits().bytes as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::map(fd)
    }

    /// Memory that another agent left.
    ///
    /// # Errors
    /// The kernel's errno; `InvalidData` where it is not of our size and sealed against shrinking.
    pub fn map(fd: OwnedFd) -> io::Result<Self> {
        let seals = rustix::fs::fcntl_get_seals(&fd)?;
        let size = rustix::fs::fstat(&fd)?.st_size;
        let layout = Layout::all().find(|layout| usize::try_from(size) == Ok(layout.bytes));
        let layout = layout
            .filter(|_| seals.contains(SealFlags::SHRINK))
            .ok_or(io::ErrorKind::InvalidData)?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), layout.bytes, prot, flags, &fd, 0)? };
        // SAFETY: the range is this mapping, and the advice changes no contents.
        let _ = unsafe { rustix::mm::madvise(base, layout.bytes, Advice::LinuxDontDump) };
        let base = NonNull::new(base.cast::<u8>())
            .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self { base, layout, fd })
    }

    /// Another mapping of the memory behind a descriptor that stays its owner's.
    ///
    /// # Errors
    /// As for [`Self::map`].
    pub fn map_again(number: i32) -> io::Result<Self> {
        // SAFETY: the caller's number is of a descriptor that is open for as long as this is used.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        Self::map(rustix::io::fcntl_dupfd_cloexec(fd, 0)?)
    }

    /// How many chunks of page tables there is room for.
    #[must_use]
    pub fn chunks(&self) -> usize {
        self.layout.chunks
    }

    /// The descriptor's number.
    #[must_use]
    pub fn number(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    /// What there is one of.
    #[must_use]
    pub fn header(self: &Arc<Self>) -> Ref<Header> {
        self.at(0)
    }

    /// The same without a hold on the mapping beyond this borrow, for who may not allocate.
    #[must_use]
    pub fn borrow_header(&self) -> &Header {
        // SAFETY: inside the mapping, which the borrow keeps; nothing but atomics.
        unsafe { self.base.cast::<Header>().as_ref() }
    }

    /// An address space's record, likewise.
    #[must_use]
    pub fn borrow_space(&self, number: u32) -> &SpaceRecord {
        let at = SPACES_AT + (number as usize).min(MAX_SPACES - 1) * SPACE_BYTES;
        // SAFETY: as above.
        unsafe { self.base.add(at).cast::<SpaceRecord>().as_ref() }
    }

    /// A job's record, likewise.
    #[must_use]
    pub fn borrow_job(&self, number: u32) -> &JobRecord {
        let at = JOBS_AT + (number as usize).min(MAX_JOBS - 1) * JOB_BYTES;
        // SAFETY: as above.
        unsafe { self.base.add(at).cast::<JobRecord>().as_ref() }
    }

    /// A job's record; of a number beyond the last, the last.
    #[must_use]
    pub fn job(self: &Arc<Self>, number: u32) -> Ref<JobRecord> {
        self.at(JOBS_AT + (number as usize).min(MAX_JOBS - 1) * JOB_BYTES)
    }

    /// An address space's.
    #[must_use]
    pub fn space(self: &Arc<Self>, number: u32) -> Ref<SpaceRecord> {
        self.at(SPACES_AT + (number as usize).min(MAX_SPACES - 1) * SPACE_BYTES)
    }

    /// An extent's.
    #[must_use]
    pub fn extent(self: &Arc<Self>, number: u32) -> Option<Ref<ExtentRecord>> {
        let number = usize::try_from(number)
            .ok()
            .filter(|n| *n < self.layout.extents)?;
        Some(self.at(EXTENTS_AT + number * EXTENT_BYTES))
    }

    /// Bits for an extent's slots.
    #[must_use]
    pub fn bits(self: &Arc<Self>, extent: u32) -> Option<Ref<BitsRecord>> {
        let extent = usize::try_from(extent)
            .ok()
            .filter(|n| *n < self.layout.extents)?;
        Some(self.at(self.layout.bits_at + extent * size_of::<BitsRecord>()))
    }

    /// What a slot holds.
    #[must_use]
    pub fn hash(&self, slot: Slot) -> Option<&HashRecord> {
        let extent = usize::try_from(slot.extent())
            .ok()
            .filter(|n| *n < self.layout.extents)?;
        let at = extent * HASHES_PER_EXTENT + usize::from(slot.page());
        // SAFETY: the place is inside the mapping, aligned, and all of it atomics, which the borrow of self keeps mapped.
        Some(unsafe {
            self.base
                .add(self.layout.hashes_at + at * size_of::<HashRecord>())
                .cast::<HashRecord>()
                .as_ref()
        })
    }

    /// Whose a chunk is.
    #[must_use]
    pub fn chunk_record(self: &Arc<Self>, number: u32) -> Ref<ChunkRecord> {
        let number = (number as usize).min(self.layout.chunks - 1);
        self.at(self.layout.records_at + number * size_of::<ChunkRecord>())
    }

    /// A chunk.
    #[must_use]
    pub fn chunk(self: &Arc<Self>, number: u32) -> Ref<Cells> {
        self.at(self.layout.chunks_at
            + (number as usize).min(self.layout.chunks - 1) * size_of::<Cells>())
    }

    /// Empties a chunk, and gives its memory back.
    pub fn clear_chunk(&self, number: u32) {
        self.clear(
            self.layout.chunks_at
                + (number as usize).min(self.layout.chunks - 1) * size_of::<Cells>(),
            size_of::<Cells>(),
        );
    }

    /// Empties a job's record.
    pub fn clear_job(&self, number: u32) {
        let at = JOBS_AT + (number as usize).min(MAX_JOBS - 1) * JOB_BYTES;
        self.clear(at, JOB_BYTES);
    }

    /// Empties an address space's record.
    pub fn clear_space(&self, number: u32) {
        let at = SPACES_AT + (number as usize).min(MAX_SPACES - 1) * SPACE_BYTES;
        self.clear(at, SPACE_BYTES);
    }

    /// Whole pages become zeros.
    fn clear(&self, at: usize, len: usize) {
        // SAFETY: the range is inside this mapping, and whoever reads it meanwhile reads atomics: the old word or zero.
        let removed = unsafe {
            rustix::mm::madvise(self.base.add(at).as_ptr().cast(), len, Advice::LinuxRemove)
        };
        if removed.is_err() {
            for word in (0..len / 8).map(|i| at + i * 8) {
                // SAFETY: as above, one aligned word at a time.
                unsafe {
                    self.base
                        .add(word)
                        .cast::<std::sync::atomic::AtomicU64>()
                        .as_ref()
                }
                .store(0, std::sync::atomic::Ordering::Relaxed);
            }
        }
    }

    fn at<T>(self: &Arc<Self>, offset: usize) -> Ref<T> {
        // SAFETY: the callers' offsets are inside the mapping (asserted above and bounded by them).
        let at = unsafe { self.base.add(offset) }.cast::<T>();
        Ref {
            memory: Arc::clone(self),
            at,
        }
    }
}

impl AsFd for StateMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for StateMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and whoever borrowed from it held it.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.layout.bytes) };
    }
}

/// A record, or a part of one, which stays mapped for as long as this is held.
#[derive(Debug)]
pub struct Ref<T> {
    memory: Arc<StateMemory>,
    at: NonNull<T>,
}

// SAFETY: records consist of atomics.
unsafe impl<T: Sync> Send for Ref<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Ref<T> {}

impl<T> Clone for Ref<T> {
    fn clone(&self) -> Self {
        Self {
            memory: Arc::clone(&self.memory),
            at: self.at,
        }
    }
}

impl<T> Deref for Ref<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: made by `StateMemory::at` or `part` only, for records that consist of atomics, for which all bit patterns
        // that we store are values; mapped for as long as `memory` is held.
        unsafe { self.at.as_ref() }
    }
}

impl<T> Ref<T> {
    /// A part of it.
    #[must_use]
    pub fn part<U>(&self, part: impl FnOnce(&T) -> &U) -> Ref<U> {
        Ref {
            memory: Arc::clone(&self.memory),
            at: NonNull::from(part(self)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where address space was limited no agent could begin: its state takes 84 GiB of it.
    #[test]
    fn a_state_of_any_layout_is_told_by_its_size() {
        let layouts: Vec<_> = Layout::all().collect();
        assert!(layouts.is_sorted_by(|larger, smaller| larger.bytes > smaller.bytes));
        let smallest = Layout::of(MOST_HALVINGS);
        assert!(smallest.bytes < 128 << 20);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("small", flags).unwrap();
        rustix::fs::ftruncate(&fd, smallest.bytes as u64).unwrap();
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
        let memory = Arc::new(StateMemory::map(fd).unwrap());
        assert_eq!(memory.chunks(), smallest.chunks);
        let last = u32::try_from(smallest.extents).unwrap() - 1;
        assert!(memory.bits(last).is_some() && memory.extent(last + 1).is_none());
    }
}
