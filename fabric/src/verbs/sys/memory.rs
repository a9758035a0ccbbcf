//! Protection domains, and the memory and windows in them.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use rdma_sys::{
    ibv_access_flags, ibv_alloc_mw, ibv_dealloc_mw, ibv_inc_rkey, ibv_mr, ibv_mw, ibv_mw_type,
    ibv_pd,
};

use super::Context;
use crate::memory::RegisteredMemory;

/// What belongs together: queue pairs reach only memory of their own domain.
pub(crate) struct ProtectionDomain {
    pub(super) context: Arc<Context>,
    pub(super) raw: NonNull<ibv_pd>,
}

// SAFETY: the verbs manual makes all verbs safe to call from any thread; nothing else is reached through the pointer.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as above.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    pub(crate) fn new(context: &Arc<Context>) -> io::Result<Arc<Self>> {
        // SAFETY: an open context.
        let raw = unsafe { (context.library.alloc_pd)(context.raw.as_ptr()) };
        let raw = NonNull::new(raw).ok_or_else(io::Error::last_os_error)?;
        Ok(Arc::new(Self {
            context: Arc::clone(context),
            raw,
        }))
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: allocated once, and every child holds the Arc, so that none is left.
        let _ = unsafe { (self.context.library.dealloc_pd)(self.raw.as_ptr()) };
    }
}

/// Who may touch a memory region, besides the queue pairs of its own process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Granted {
    /// Nobody.
    Local,
    /// Whoever has a window on it.
    ByWindow,
    /// Whoever is connected to its domain and knows its key.
    ByKey,
}

/// Registered memory, pinned by the kernel.
pub(crate) struct MemoryRegion {
    domain: Arc<ProtectionDomain>,
    raw: NonNull<ibv_mr>,
    /// Until it is deregistered.
    memory: Option<Arc<RegisteredMemory>>,
    address: u64,
    len: u64,
    local_key: u32,
    remote_key: u32,
}

// SAFETY: the verbs manual makes all verbs safe to call from any thread; the structure is not written after registration.
unsafe impl Send for MemoryRegion {}
// SAFETY: as above.
unsafe impl Sync for MemoryRegion {}

impl MemoryRegion {
    /// Registers `len` bytes at `offset`.
    pub(crate) fn new(
        domain: &Arc<ProtectionDomain>,
        memory: Arc<RegisteredMemory>,
        offset: u64,
        len: usize,
        granted: Granted,
    ) -> io::Result<Self> {
        let address = memory
            .writable_address(offset, len)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let access = ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0
            | match granted {
                Granted::Local => 0,
                Granted::ByWindow => ibv_access_flags::IBV_ACCESS_MW_BIND.0,
                Granted::ByKey => REMOTE_ACCESS,
            };
        // SAFETY: the range was checked to be mapped for writing and stays mapped while `memory` is held, which is until the
        // region is deregistered. Bytes of registered memory may be changed by others at any time.
        let raw = unsafe {
            (domain.context.library.reg_mr)(domain.raw.as_ptr(), address.cast(), len, access as i32)
        };
        let raw = NonNull::new(raw).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: just registered; the library's structure is only read.
        let (local_key, remote_key) = unsafe { ((*raw.as_ptr()).lkey, (*raw.as_ptr()).rkey) };
        Ok(Self {
            domain: Arc::clone(domain),
            raw,
            memory: Some(memory),
            address: address as u64,
            len: len as u64,
            local_key,
            remote_key,
        })
    }

    /// Takes the memory away from the device; it is of no further use. False while somebody still has a window on it.
    pub(crate) fn deregister(&mut self) -> bool {
        if self.memory.is_none() {
            return true;
        }
        // SAFETY: registered once, and deregistered successfully once at most. The device uses it no more after success.
        let done = unsafe { (self.domain.context.library.dereg_mr)(self.raw.as_ptr()) } == 0;
        if done {
            self.memory = None;
        }
        done
    }

    /// The first byte's address, as the device knows it.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The library's structure, while it is registered.
    pub(super) fn raw(&self) -> Option<NonNull<ibv_mr>> {
        self.memory.is_some().then_some(self.raw)
    }

    /// The key for our own work requests.
    pub(crate) fn local_key(&self) -> u32 {
        self.local_key
    }

    /// The key for a peer's, if the region is granted by key.
    pub(crate) fn remote_key(&self) -> u32 {
        self.remote_key
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        if self.memory.is_some() && !self.deregister() {
            // The device may still reach the memory: it must stay mapped.
            std::mem::forget(self.memory.take());
        }
    }
}

/// What a peer may do.
pub(super) const REMOTE_ACCESS: u32 =
    ibv_access_flags::IBV_ACCESS_REMOTE_READ.0 | ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0;

/// A window of type 2: once bound, one queue pair's peer may reach a part of one region through it.
pub(crate) struct MemoryWindow {
    /// Only dropped after the window.
    _domain: Arc<ProtectionDomain>,
    pub(super) raw: NonNull<ibv_mw>,
    key: u32,
}

// SAFETY: the verbs manual makes all verbs safe to call from any thread.
unsafe impl Send for MemoryWindow {}
// SAFETY: as above; the structure is not written after allocation.
unsafe impl Sync for MemoryWindow {}

impl MemoryWindow {
    /// Allocates one, to be bound once: the part of its key that a new binding changes has 8 bits and would repeat.
    pub(crate) fn new(domain: &Arc<ProtectionDomain>) -> io::Result<Self> {
        // SAFETY: a live domain.
        let raw = unsafe { ibv_alloc_mw(domain.raw.as_ptr(), ibv_mw_type::IBV_MW_TYPE_2) };
        let raw = raw
            .and_then(NonNull::new)
            .ok_or_else(io::Error::last_os_error)?;
        // SAFETY: just allocated, and `ibv_inc_rkey` only computes; a window's first key is not one to bind.
        let key = unsafe { ibv_inc_rkey((*raw.as_ptr()).rkey) };
        Ok(Self {
            _domain: Arc::clone(domain),
            raw,
            key,
        })
    }

    /// The key under which it is, or will be, bound.
    pub(crate) fn key(&self) -> u32 {
        self.key
    }
}

impl Drop for MemoryWindow {
    fn drop(&mut self) {
        // SAFETY: allocated once. Deallocation unbinds; should it fail, the queue pair's end makes the window useless.
        let _ = unsafe { ibv_dealloc_mw(self.raw.as_ptr()) };
    }
}
