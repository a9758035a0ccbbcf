//! Memory registered with the fabric.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU64;

use rustix::fs::{self, MemfdFlags, SealFlags};

use crate::sys::mapping::{Mapping, Protection};

/// The huge page size that is asked for: the only one that x86-64 and arm64 (4 KiB granule) share.
const HUGE_PAGE: usize = 2 << 20;

/// Page sizes beyond 1 GiB do not exist; a file that claims one is not believed.
const MAX_PAGE: u64 = 1 << 30;

/// The access would leave the memory, or would write memory that is mapped read-only, or is not aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at offset {offset} are not an accessible part of the {size} registered bytes")]
pub struct OutOfBounds {
    /// Where the access starts, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub len: usize,
    /// Bytes that there are.
    pub size: usize,
}

/// How to create registered memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryOptions {
    /// Try 2 MiB pages from the reserved pool (`vm.nr_hugepages`); without them use normal pages, with a
    /// hint to the kernel that huge ones are welcome.
    pub huge_pages: bool,
    /// Whether to keep it from being swapped out, if `RLIMIT_MEMLOCK` or `CAP_IPC_LOCK` allows.
    pub lock: Lock,
}

/// How memory is kept from being swapped out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lock {
    /// Not at all.
    #[default]
    No,
    /// Each page from when this process first uses it.
    AsUsed,
    /// All of it at once, which populates it.
    AtOnce,
}

/// What the kernel granted of [`MemoryOptions`].
#[derive(Debug)]
pub struct MemoryReport {
    /// Whether the memory consists of reserved huge pages.
    pub huge: bool,
    /// Whether the memory is pinned.
    pub locked: Result<(), NotLocked>,
}

/// Why memory is not pinned.
#[derive(Debug, thiserror::Error)]
pub enum NotLocked {
    /// [`MemoryOptions::lock`] was not set.
    #[error("locking was not asked for")]
    NotAsked,
    /// The kernel refused.
    #[error(
        "mlock: {0}; raise RLIMIT_MEMLOCK (`ulimit -l`, or LimitMEMLOCK= in the unit) or grant CAP_IPC_LOCK"
    )]
    Refused(io::Error),
}

/// A shared mapping of a memfd that the fabric may read and write on behalf of work requests.
///
/// Other processes may map the same file and change the bytes at any time. So nothing here hands out
/// references to plain bytes: reads and writes copy. The file is sealed against resizing, so that no peer
/// can make an access fault. (With reserved huge pages a peer that holds the descriptor can still punch
/// holes that the reserve may fail to refill: hand such pools to trusted peers only.)
#[derive(Debug)]
pub struct RegisteredMemory {
    mapping: Mapping,
    fd: OwnedFd,
}

impl RegisteredMemory {
    /// Creates `len` bytes of zeros. `name` shows in `/proc/PID/maps`; up to 249 bytes.
    ///
    /// # Errors
    /// What the kernel said, with what to do about it. Huge pages or locking that cannot be had are no
    /// errors; the report tells.
    pub fn create(
        name: &str,
        len: usize,
        options: MemoryOptions,
    ) -> io::Result<(Self, MemoryReport)> {
        if len == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "registered memory needs at least one byte",
            ));
        }
        let huge = if options.huge_pages && len.is_multiple_of(HUGE_PAGE) {
            Self::create_with(
                name,
                len,
                MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
                HUGE_PAGE,
            )
            .ok()
        } else {
            None
        };
        let is_huge = huge.is_some();
        let memory = match huge {
            Some(memory) => memory,
            None => Self::create_with(name, len, MemfdFlags::empty(), rustix::param::page_size())
                .map_err(|error| explain(len, &error))?,
        };
        if options.huge_pages && !is_huge {
            // Only a hint: kernels without shmem huge pages refuse it, and normal pages do.
            let _ = memory.mapping.hint_huge();
        }
        let locked = match options.lock {
            Lock::No => Err(NotLocked::NotAsked),
            Lock::AsUsed => memory.mapping.lock_as_used().map_err(NotLocked::Refused),
            Lock::AtOnce => memory.mapping.lock().map_err(NotLocked::Refused),
        };
        Ok((
            memory,
            MemoryReport {
                huge: is_huge,
                locked,
            },
        ))
    }

    fn create_with(name: &str, len: usize, flags: MemfdFlags, page: usize) -> io::Result<Self> {
        let memory = Self::create_unsealed(name, len, flags, page)?;
        // No further seals: a peer could otherwise keep others from mapping it.
        fs::fcntl_add_seals(&memory.fd, SealFlags::SEAL)?;
        Ok(memory)
    }

    /// Creates memory that only this mapping can write: whoever is handed the descriptor can map it read-only.
    pub(crate) fn create_for_readers(name: &str, len: usize) -> io::Result<Self> {
        Self::create_unsealed(name, len, MemfdFlags::empty(), rustix::param::page_size())
            .and_then(|memory| {
                fs::fcntl_add_seals(&memory.fd, SealFlags::FUTURE_WRITE | SealFlags::SEAL)?;
                Ok(memory)
            })
            .map_err(|error| explain(len, &error))
    }

    /// Of fixed size, but open to more seals.
    fn create_unsealed(name: &str, len: usize, flags: MemfdFlags, page: usize) -> io::Result<Self> {
        let fd = fs::memfd_create(
            name,
            flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )?;
        fs::ftruncate(&fd, len as u64)?;
        fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW)?;
        let mapping = Mapping::new(fd.as_fd(), len, page, Protection::ReadWrite)?;
        Ok(Self { mapping, fd })
    }

    /// Maps the first `len` bytes of somebody else's memfd, to read and write.
    ///
    /// # Errors
    /// `InvalidInput` when the file is shorter than `len`, is no memfd, or is not sealed against shrinking
    /// (its owner could kill us by cutting it short); otherwise what `mmap` said.
    pub fn from_memfd(fd: OwnedFd, len: usize) -> io::Result<Self> {
        Self::map_foreign(fd, len, Protection::ReadWrite)
    }

    /// Like [`Self::from_memfd`], but maps it read-only: writes are refused as [`OutOfBounds`].
    ///
    /// # Errors
    /// As for [`Self::from_memfd`].
    pub fn from_memfd_read_only(fd: OwnedFd, len: usize) -> io::Result<Self> {
        Self::map_foreign(fd, len, Protection::ReadOnly)
    }

    fn map_foreign(fd: OwnedFd, len: usize, protection: Protection) -> io::Result<Self> {
        let refuse = |why: &str| {
            Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("refusing a peer's memory: {why}"),
            ))
        };
        let Ok(seals) = fs::fcntl_get_seals(&fd) else {
            return refuse("the descriptor is no memfd");
        };
        if !seals.contains(SealFlags::SHRINK) {
            return refuse("it is not sealed against shrinking (F_SEAL_SHRINK)");
        }
        // The seal is on, so the size that is read now can only grow.
        let stat = fs::fstat(&fd)?;
        if len == 0 || u64::try_from(stat.st_size).unwrap_or(0) < len as u64 {
            return refuse(&format!(
                "it has {} bytes and {len} are needed",
                stat.st_size
            ));
        }
        // For a hugetlb file this is its page size, which lengths of mappings are multiples of.
        let page = u64::try_from(stat.st_blksize).unwrap_or(0);
        if !page.is_power_of_two() || page > MAX_PAGE {
            return refuse("its block size makes no sense");
        }
        let mapping = Mapping::new(
            fd.as_fd(),
            len,
            (page as usize).max(rustix::param::page_size()),
            protection,
        )?;
        Ok(Self { mapping, fd })
    }

    /// Length in bytes; never zero.
    #[must_use]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.mapping.len()
    }

    /// The memfd, to hand to another process.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The mapping's first byte, for ioctls that take addresses (`UFFDIO_COPY`). Valid while `self` lives.
    #[must_use]
    pub fn as_ptr(&self) -> *const u8 {
        self.mapping.as_ptr()
    }

    /// Copies bytes out, `bytes.len()` of them, from `offset` on.
    ///
    /// # Errors
    /// [`OutOfBounds`]; nothing was copied.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), OutOfBounds> {
        let len = bytes.len();
        self.mapping
            .read(offset, bytes)
            .ok_or(self.out_of_bounds(offset, len))
    }

    /// Copies bytes in, from `offset` on.
    ///
    /// # Errors
    /// [`OutOfBounds`]; nothing was copied.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), OutOfBounds> {
        self.mapping
            .write(offset, bytes)
            .ok_or(self.out_of_bounds(offset, bytes.len()))
    }

    /// Copies `len` bytes at `offset` to `dst_offset` of `dst`, which may be this memory.
    ///
    /// # Errors
    /// [`OutOfBounds`], with the offset of the side that is outside; nothing was copied.
    pub fn copy_to(
        &self,
        offset: u64,
        dst: &Self,
        dst_offset: u64,
        len: usize,
    ) -> Result<(), OutOfBounds> {
        self.address(offset, len)?;
        self.mapping
            .copy_to(offset, &dst.mapping, dst_offset, len)
            .ok_or(dst.out_of_bounds(dst_offset, len))
    }

    /// Overwrites `len` bytes at `offset` with zeros.
    ///
    /// # Errors
    /// [`OutOfBounds`]; nothing was overwritten.
    pub fn zero(&self, offset: u64, len: usize) -> Result<(), OutOfBounds> {
        self.mapping
            .zero(offset, len)
            .ok_or(self.out_of_bounds(offset, len))
    }

    /// The 64-bit word at an 8-aligned offset, native byte order, shared with whoever else maps the file.
    ///
    /// # Errors
    /// [`OutOfBounds`] also when the offset is not 8-aligned or the memory is mapped read-only.
    pub fn word(&self, offset: u64) -> Result<&AtomicU64, OutOfBounds> {
        self.mapping
            .word(offset)
            .ok_or(self.out_of_bounds(offset, 8))
    }

    /// Loads the word at an 8-aligned offset with acquire ordering; works on read-only memory.
    ///
    /// # Errors
    /// [`OutOfBounds`] also when the offset is not 8-aligned.
    pub fn load_word(&self, offset: u64) -> Result<u64, OutOfBounds> {
        self.mapping
            .load_word(offset)
            .ok_or(self.out_of_bounds(offset, 8))
    }

    /// The xxh3-128 (seed 0) of `len` bytes at `offset`. Hashes a private copy, page by page.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    pub fn hash128(&self, offset: u64, len: usize) -> Result<u128, OutOfBounds> {
        self.mapping
            .hash128(offset, len)
            .ok_or(self.out_of_bounds(offset, len))
    }

    pub(crate) fn address(&self, offset: u64, len: usize) -> Result<*mut u8, OutOfBounds> {
        self.mapping
            .at(offset, len)
            .ok_or(self.out_of_bounds(offset, len))
    }

    pub(crate) fn writable_address(&self, offset: u64, len: usize) -> Result<*mut u8, OutOfBounds> {
        self.mapping
            .writable_at(offset, len)
            .ok_or(self.out_of_bounds(offset, len))
    }

    fn out_of_bounds(&self, offset: u64, len: usize) -> OutOfBounds {
        OutOfBounds {
            offset,
            len,
            size: self.len(),
        }
    }
}

/// The kernel's error with what to do about it.
fn explain(len: usize, error: &io::Error) -> io::Error {
    let advice = match error.raw_os_error() {
        Some(libc::ENOMEM) => {
            "the machine or an RLIMIT_AS has no room for it; lower the size, raise `ulimit -v`, or check vm.overcommit_memory \
             and vm.max_map_count"
        }
        Some(libc::EFBIG) => {
            "it exceeds RLIMIT_FSIZE; raise `ulimit -f` or LimitFSIZE= in the unit"
        }
        Some(libc::ENOSPC) => {
            "shared memory is exhausted; free /dev/shm and other shared memory, or lower the size"
        }
        Some(libc::EMFILE | libc::ENFILE) => {
            "too many open files; raise `ulimit -n` or LimitNOFILE= in the unit"
        }
        Some(libc::EINVAL) => {
            "the name is over 249 bytes, the size beyond what a file can have, or the kernel older than 5.1"
        }
        Some(libc::ENOSYS) => "this kernel lacks memfd_create; farpage needs Linux 5.1 or newer",
        _ => "unexpected; see dmesg",
    };
    io::Error::new(
        error.kind(),
        format!("cannot create {len} bytes of shared memory: {error}: {advice}"),
    )
}

/// The hash that [`RegisteredMemory::hash128`] tells, of bytes that lie elsewhere.
#[must_use]
pub fn hash128(bytes: &[u8]) -> u128 {
    twox_hash::XxHash3_128::oneshot(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(len: usize) -> RegisteredMemory {
        RegisteredMemory::create("test", len, MemoryOptions::default())
            .unwrap()
            .0
    }

    #[test]
    fn bytes_written_are_read_back_also_through_a_second_mapping() {
        let a = memory(8192);
        let b = RegisteredMemory::from_memfd(a.fd().try_clone_to_owned().unwrap(), 8192).unwrap();
        a.write(4000, b"hello").unwrap();
        let mut got = [0; 5];
        b.read(4000, &mut got).unwrap();
        assert_eq!(&got, b"hello");
        b.zero(4001, 3).unwrap();
        a.copy_to(4000, &a, 4002, 5).unwrap();
        a.read(4002, &mut got).unwrap();
        assert_eq!(&got, b"h\0\0\0o");
    }

    #[test]
    fn nothing_reaches_beyond_the_end() {
        let a = memory(5000);
        let b = memory(10000);
        let mut buf = [0; 16];
        assert!(a.read(4985, &mut buf).is_err());
        assert!(a.read(4984, &mut buf).is_ok());
        assert!(a.write(u64::MAX, &buf).is_err());
        assert!(a.zero(4999, 2).is_err());
        assert!(a.copy_to(0, &b, 9000, 1001).is_err());
        assert!(b.copy_to(0, &a, 0, 5001).is_err());
        assert!(a.hash128(1, 5000).is_err());
        assert!(a.word(4).is_err());
        assert!(a.word(5000).is_err());
        assert!(a.word(4984).is_ok());
    }

    #[test]
    fn a_file_that_could_shrink_is_refused() {
        let fd = fs::memfd_create("open", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        fs::ftruncate(&fd, 4096).unwrap();
        assert!(RegisteredMemory::from_memfd(fd.try_clone().unwrap(), 4096).is_err());
        fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
        assert!(RegisteredMemory::from_memfd(fd.try_clone().unwrap(), 8192).is_err());
        assert!(RegisteredMemory::from_memfd(fd, 4096).is_ok());
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        assert!(RegisteredMemory::from_memfd(file.into(), 4096).is_err());
    }

    #[test]
    fn our_own_memory_cannot_be_resized_and_sealed_memory_not_be_written_by_others() {
        let a = memory(8192);
        assert!(fs::ftruncate(a.fd(), 4096).is_err());
        assert!(fs::fcntl_add_seals(a.fd(), SealFlags::FUTURE_WRITE).is_err());
        let a = RegisteredMemory::create_for_readers("test", 8192).unwrap();
        assert!(RegisteredMemory::from_memfd(a.fd().try_clone_to_owned().unwrap(), 8192).is_err());
        let look =
            RegisteredMemory::from_memfd_read_only(a.fd().try_clone_to_owned().unwrap(), 8192)
                .unwrap();
        a.word(8)
            .unwrap()
            .store(7, std::sync::atomic::Ordering::Release);
        assert_eq!(look.load_word(8).unwrap(), 7);
        assert!(look.write(0, b"x").is_err());
        assert!(look.zero(0, 1).is_err());
        assert!(look.word(8).is_err());
        assert!(a.copy_to(0, &look, 0, 8).is_err());
    }

    #[test]
    fn the_hash_is_xxh3_128_whatever_the_length() {
        let a = memory(3 * 4096);
        let bytes: Vec<u8> = (0..3 * 4096u32).map(|i| ((i * 31) >> 3) as u8).collect();
        a.write(0, &bytes).unwrap();
        for (offset, len) in [(0, 0), (0, 4096), (5, 100), (1, 4097), (0, 3 * 4096)] {
            let expected = twox_hash::XxHash3_128::oneshot(&bytes[offset..offset + len]);
            assert_eq!(
                a.hash128(offset as u64, len).unwrap(),
                expected,
                "{offset} {len}"
            );
            assert_eq!(hash128(&bytes[offset..offset + len]), expected);
        }
    }

    #[test]
    fn options_that_the_kernel_refuses_are_reported_not_fatal() {
        let options = MemoryOptions {
            huge_pages: true,
            lock: Lock::AtOnce,
        };
        let (a, report) = RegisteredMemory::create("test", 4 << 20, options).unwrap();
        a.write((4 << 20) - 1, b"x").unwrap();
        if let Err(why) = report.locked {
            assert!(why.to_string().contains("RLIMIT_MEMLOCK"), "{why}");
        }
        let error =
            RegisteredMemory::create(&"x".repeat(300), 4096, MemoryOptions::default()).unwrap_err();
        assert!(error.to_string().contains("249"), "{error}");
    }
}
