//! The agent's mapping of an address space's control block and staging.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use farpage_attach::control::{Control, SHARED_BYTES};
use farpage_fabric::memory::{MemoryOptions, RegisteredMemory};

/// The shared memfd: the control block in front, staging behind it, registered with the fabric as one.
#[derive(Clone, Debug)]
pub struct SharedBlock {
    memory: Arc<RegisteredMemory>,
}

impl SharedBlock {
    /// A fresh block for one address space.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn create() -> io::Result<Self> {
        let options = MemoryOptions::default();
        let (memory, _) = RegisteredMemory::create("farpage-staging", SHARED_BYTES, options)?;
        let block = Self {
            memory: Arc::new(memory),
        };
        let control = block.control();
        control.magic.store(
            farpage_attach::message::MAGIC,
            std::sync::atomic::Ordering::Relaxed,
        );
        Ok(block)
    }

    /// One that another agent had.
    ///
    /// # Errors
    /// The kernel's errno; `InvalidInput` where it is no such block.
    pub fn map(fd: std::os::fd::OwnedFd) -> io::Result<Self> {
        let memory = RegisteredMemory::from_memfd(fd, SHARED_BYTES)?;
        Ok(Self {
            memory: Arc::new(memory),
        })
    }

    /// The control block.
    #[must_use]
    pub fn control(&self) -> &Control {
        // SAFETY: the mapping is page-aligned, SHARED_BYTES long (which exceeds the block), and lives as long
        // as `memory`; every field is an atomic, for which all bit patterns are values, so other processes
        // may write it at any time.
        unsafe { &*self.memory.as_ptr().cast::<Control>() }
    }

    /// The whole block as fabric memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<RegisteredMemory> {
        &self.memory
    }

    /// Where `offset` bytes into the block lie in this process, for `UFFDIO_COPY`.
    #[must_use]
    pub fn address(&self, offset: usize) -> *const u8 {
        self.memory.as_ptr().wrapping_add(offset)
    }
}

impl AsFd for SharedBlock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.fd()
    }
}

/// Wakes whoever sleeps on a word of the block.
pub fn futex_wake(word: &std::sync::atomic::AtomicU32) {
    // SAFETY: FUTEX_WAKE takes the address of a live word and touches nothing.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

/// Sleeps while `word` holds `value`, at most `timeout`.
pub fn futex_wait(word: &std::sync::atomic::AtomicU32, value: u32, timeout: std::time::Duration) {
    let timeout = libc::timespec {
        tv_sec: timeout.as_secs() as i64,
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    // SAFETY: FUTEX_WAIT takes the address of a live word and of a live timespec.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            value,
            std::ptr::from_ref(&timeout),
        );
    }
}
