//! A connection's way into the extents that it holds keys of.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::access::{AccessTable, key_offset};
use crate::endpoint::WorkError;
use crate::fence;
use crate::geometry::PoolGeometry;
use crate::memory::{OutOfBounds, RegisteredMemory};

/// Bytes of a gate that is shared with another process: one page, as nothing smaller can be mapped. The gate word is
/// at its start.
pub(crate) const GATE_BYTES: usize = 4096;

/// Where in a shared gate the responder says that it is closed, in bytes: on a cache line that only it writes.
const CLOSED_AT: u64 = 64;

/// Where a gate word is.
#[derive(Debug)]
pub(crate) enum GatePlace {
    Private(AtomicU64),
    Shared(RegisteredMemory),
}

/// On a cache line of its own: each connection writes its gate at every request.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct GateWord {
    place: GatePlace,
    gone: AtomicBool,
}

impl GateWord {
    pub(crate) fn new(place: GatePlace) -> Self {
        Self {
            place,
            gone: false.into(),
        }
    }

    fn word(&self) -> Option<&AtomicU64> {
        match &self.place {
            GatePlace::Private(word) => Some(word),
            GatePlace::Shared(memory) => memory.word(0).ok(),
        }
    }

    pub(crate) fn is_inside(&self, extent: u32) -> bool {
        self.word()
            .is_some_and(|word| fence::is_inside(word, extent))
    }

    pub(crate) fn mark_gone(&self) {
        self.gone.store(true, Ordering::Release);
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }
}

/// One connection's way in. Dropping it says that the connection touches nothing any more.
#[derive(Debug)]
pub struct Gate {
    table: Arc<AccessTable>,
    word: Arc<GateWord>,
}

impl Gate {
    pub(crate) fn new(table: Arc<AccessTable>, word: Arc<GateWord>) -> Self {
        Self { table, word }
    }

    /// The table that this is a gate of.
    #[must_use]
    pub fn table(&self) -> &Arc<AccessTable> {
        &self.table
    }

    /// Admits an operation on `len` bytes at `offset` of `extent` if `key` is that extent's live key. The
    /// bytes may be touched while the guard lives; a revocation waits for it. One at a time.
    ///
    /// # Errors
    /// [`WorkError::AccessDenied`], or [`WorkError::RemoteBounds`] for a holder of the key who left the extent.
    pub fn check(
        &mut self,
        extent: u32,
        key: u64,
        offset: u64,
        len: u32,
    ) -> Result<AccessGuard<'_>, WorkError> {
        let key_word = self.table.key_word(extent).ok_or(WorkError::AccessDenied)?;
        let gate = self.word.word().ok_or(WorkError::AccessDenied)?;
        admit(
            &self.table.geometry(),
            key_word,
            gate,
            extent,
            key,
            offset,
            len,
        )
    }

    /// Lets nobody in any more through a shared gate (a private one closes by being dropped).
    pub(crate) fn close(&self) {
        if let GatePlace::Shared(memory) = &self.word.place
            && let Ok(closed) = memory.word(CLOSED_AT)
        {
            fence::Change::store(closed, 1);
            fence::Look::fence(closed);
        }
    }

    /// Whether somebody is inside any extent.
    pub(crate) fn is_occupied(&self) -> bool {
        self.word.word().is_some_and(fence::is_occupied)
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.table.forget_gate(&self.word);
    }
}

/// A requester's own way in, over memory that the responder shares with it.
#[derive(Debug)]
pub(crate) struct SharedGate {
    geometry: PoolGeometry,
    keys: RegisteredMemory,
    word: RegisteredMemory,
}

/// A key word in memory that is mapped read-only.
struct SharedKey<'a> {
    keys: &'a RegisteredMemory,
    offset: u64,
}

impl fence::Look for SharedKey<'_> {
    fn load(&self) -> u64 {
        self.keys.load_word(self.offset).unwrap_or(fence::NO_KEY)
    }

    fn fence(&self) {
        std::sync::atomic::fence(Ordering::SeqCst);
    }
}

impl SharedGate {
    /// Over key memory of [`key_memory_bytes`] and a gate page of [`GATE_BYTES`].
    pub(crate) fn new(
        geometry: PoolGeometry,
        keys: RegisteredMemory,
        word: RegisteredMemory,
    ) -> Result<Self, OutOfBounds> {
        word.word(0)?;
        word.word(CLOSED_AT)?;
        Ok(Self {
            geometry,
            keys,
            word,
        })
    }

    /// Whether the responder has ended this connection.
    pub(crate) fn is_closed(&self) -> bool {
        self.word.load_word(CLOSED_AT) != Ok(0)
    }

    /// As [`Gate::check`].
    pub(crate) fn check(
        &mut self,
        extent: u32,
        key: u64,
        offset: u64,
        len: u32,
    ) -> Result<AccessGuard<'_>, WorkError> {
        if extent >= self.geometry.extents() {
            return Err(WorkError::AccessDenied);
        }
        let key_word = SharedKey {
            keys: &self.keys,
            offset: key_offset(extent),
        };
        let gate = self.word.word(0).map_err(|_| WorkError::AccessDenied)?;
        let guard = admit(&self.geometry, &key_word, gate, extent, key, offset, len)?;
        // Looked at after the announcement, as the key is: the responder looks at the gate after it has closed it.
        if self.is_closed() {
            Err(WorkError::Disconnected)
        } else {
            Ok(guard)
        }
    }
}

fn admit<'a>(
    geometry: &PoolGeometry,
    key_word: &impl fence::Look,
    gate: &'a AtomicU64,
    extent: u32,
    key: u64,
    offset: u64,
    len: u32,
) -> Result<AccessGuard<'a>, WorkError> {
    if !fence::enter(key_word, gate, extent, key) {
        return Err(WorkError::AccessDenied);
    }
    // From here on the guard's drop leaves.
    let mut guard = AccessGuard {
        gate,
        pool_offset: 0,
    };
    guard.pool_offset = geometry
        .pool_offset(extent, offset, len)
        .ok_or(WorkError::RemoteBounds)?;
    Ok(guard)
}

/// Permission to touch a range of the pool, until it is dropped.
#[derive(Debug)]
#[must_use]
pub struct AccessGuard<'a> {
    gate: &'a AtomicU64,
    pool_offset: u64,
}

impl AccessGuard<'_> {
    /// Where the range starts in the pool, in bytes.
    #[must_use]
    pub fn pool_offset(&self) -> u64 {
        self.pool_offset
    }
}

impl Drop for AccessGuard<'_> {
    fn drop(&mut self) {
        fence::leave(self.gate);
    }
}
