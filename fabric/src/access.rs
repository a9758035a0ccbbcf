//! Who may touch which extent: grants by key, and fences when they end.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::fence;
use crate::gate::{Gate, GatePlace, GateWord};
use crate::geometry::PoolGeometry;
use crate::memory::RegisteredMemory;

/// How long a revocation waits for operations that are under way. One is a copy of at most
/// [`crate::MAX_TRANSFER`] bytes, well under a millisecond; a thread inside may be preempted for some
/// scheduler slices. Whoever takes longer is stopped or hostile.
pub const FENCE_DEADLINE: Duration = Duration::from_secs(1);

/// The most connections that may hold a gate: a revocation looks at each one.
pub const MAX_GATES: usize = 4096;

/// How often a revocation looks at a gate before it sleeps between looks; a copy of one page ends sooner.
const FENCE_SPINS: u32 = 200;

/// How long it sleeps between looks after that.
const FENCE_NAP: Duration = Duration::from_micros(50);

/// The key memory's length in bytes.
pub(crate) fn key_memory_bytes(geometry: &PoolGeometry) -> usize {
    geometry.extents() as usize * 8
}

/// The key word of an extent, in bytes from the key memory's start.
pub(crate) fn key_offset(extent: u32) -> u64 {
    u64::from(extent) * 8
}

/// Why a grant was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    /// The pool has no such extent.
    #[error("the pool has no extent {0}")]
    NoSuchExtent(u32),
    /// Zero means "no key".
    #[error("zero is no key; draw another one")]
    ZeroKey,
    /// Somebody holds it; revoke first.
    #[error("extent {0} is granted already; revoke that grant first")]
    AlreadyGranted(u32),
    /// A revocation is under way, or one ended without its fence: revoke again.
    #[error("extent {0} is not fenced yet; revoke it again until that succeeds")]
    NotFenced(u32),
}

/// Why a revocation is not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RevokeError {
    /// The pool has no such extent.
    #[error("the pool has no extent {0}")]
    NoSuchExtent(u32),
    /// Another thread is revoking this extent.
    #[error("extent {0} is being revoked by another thread; wait for that one")]
    Busy(u32),
    /// New operations are refused, but `holders` connections have not left within [`FENCE_DEADLINE`]. The
    /// extent cannot be granted until a further revocation succeeds.
    #[error(
        "{holders} connections are still inside extent {extent}; close them, then revoke again"
    )]
    StillInside {
        /// Which extent.
        extent: u32,
        /// How many connections.
        holders: usize,
    },
}

/// What keeps an extent from being granted besides a live key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closing {
    /// A thread waits for the fence.
    Waiting,
    /// It gave up.
    Unfenced,
}

/// A way into extents that is not a gate: a device that lets requesters in by itself.
pub(crate) trait Door: Send + Sync + std::fmt::Debug {
    /// Lets nobody into `extent` any more. After `true` nothing that had been let in touches it either.
    fn shut(&self, extent: u32) -> bool;
}

/// A responder's grants. The key words live in a memfd that requesters on the same host can map, read-only.
///
/// Over TCP the responder enforces both checks and fences. Over shared memory the requester checks for
/// itself, with the same code, and shows where it is at a gate that it shares with the responder: that binds
/// agents that cooperate. One that does not can reach the whole pool, as it has mapped it.
#[derive(Debug)]
pub struct AccessTable {
    geometry: PoolGeometry,
    keys: RegisteredMemory,
    /// Every live connection's gate.
    gates: Mutex<Vec<Arc<GateWord>>>,
    /// Every live connection's door.
    doors: Mutex<Vec<Arc<dyn Door>>>,
    closing: Mutex<BTreeMap<u32, Closing>>,
}

impl AccessTable {
    /// A table for a pool of this shape, with nothing granted.
    ///
    /// # Errors
    /// As for [`RegisteredMemory::create`]; also when the kernel lacks `F_SEAL_FUTURE_WRITE` (Linux 5.1).
    pub fn new(geometry: PoolGeometry) -> io::Result<Arc<Self>> {
        let keys =
            RegisteredMemory::create_for_readers("farpage-keys", key_memory_bytes(&geometry))?;
        Ok(Arc::new(Self {
            geometry,
            keys,
            gates: Mutex::new(Vec::new()),
            doors: Mutex::new(Vec::new()),
            closing: Mutex::new(BTreeMap::new()),
        }))
    }

    /// The pool's shape.
    #[must_use]
    pub fn geometry(&self) -> PoolGeometry {
        self.geometry
    }

    /// The memory with the key words.
    pub(crate) fn keys(&self) -> &RegisteredMemory {
        &self.keys
    }

    pub(crate) fn key_word(&self, extent: u32) -> Option<&AtomicU64> {
        if extent >= self.geometry.extents() {
            return None;
        }
        self.keys.word(key_offset(extent)).ok()
    }

    /// Lets whoever knows `key` read and write `extent`.
    ///
    /// # Errors
    /// [`GrantError`]; nothing has changed.
    pub fn grant(&self, extent: u32, key: u64) -> Result<(), GrantError> {
        let word = self
            .key_word(extent)
            .ok_or(GrantError::NoSuchExtent(extent))?;
        if key == fence::NO_KEY {
            return Err(GrantError::ZeroKey);
        }
        // The lock orders grants and revocations; requests do not take it.
        let closing = lock(&self.closing);
        if closing.contains_key(&extent) {
            return Err(GrantError::NotFenced(extent));
        }
        if fence::Look::load(word) != fence::NO_KEY {
            return Err(GrantError::AlreadyGranted(extent));
        }
        fence::open(word, key);
        Ok(())
    }

    /// Whether a grant on `extent` is live.
    #[must_use]
    pub fn is_granted(&self, extent: u32) -> bool {
        self.key_word(extent)
            .is_some_and(|word| fence::Look::load(word) != fence::NO_KEY)
    }

    /// Ends the grant of `extent`, if there is one. From the start of this call no operation is admitted, and
    /// after `Ok` none that had been admitted touches memory any more: the extent may be scrubbed and granted
    /// again. Waits [`FENCE_DEADLINE`] at most.
    ///
    /// # Errors
    /// [`RevokeError`]; the grant has ended nevertheless (unless there is no such extent).
    pub fn revoke(&self, extent: u32) -> Result<(), RevokeError> {
        let word = self
            .key_word(extent)
            .ok_or(RevokeError::NoSuchExtent(extent))?;
        {
            let mut closing = lock(&self.closing);
            if closing.get(&extent) == Some(&Closing::Waiting) {
                return Err(RevokeError::Busy(extent));
            }
            closing.insert(extent, Closing::Waiting);
            fence::close(word);
        }
        // A gate that is opened later finds the key gone, and so does a door.
        let doors = lock(&self.doors).clone();
        let ajar = doors.iter().filter(|door| !door.shut(extent)).count();
        let mut holders = lock(&self.gates).clone();
        let deadline = Instant::now() + FENCE_DEADLINE;
        let mut looks = 0;
        loop {
            // A connection that ends takes its gate along: only shared gates can be left standing inside.
            holders.retain(|gate| gate.is_inside(extent) && !gate.is_gone());
            let mut closing = lock(&self.closing);
            if holders.is_empty() && ajar == 0 {
                closing.remove(&extent);
                return Ok(());
            }
            if holders.is_empty() || Instant::now() >= deadline {
                closing.insert(extent, Closing::Unfenced);
                return Err(RevokeError::StillInside {
                    extent,
                    holders: holders.len() + ajar,
                });
            }
            drop(closing);
            looks += 1;
            if looks < FENCE_SPINS {
                std::thread::yield_now();
            } else {
                std::thread::sleep(FENCE_NAP);
            }
        }
    }

    /// A gate for a connection whose requests this process carries out.
    ///
    /// # Errors
    /// [`TooManyGates`] when [`MAX_GATES`] are open.
    pub fn open_gate(self: &Arc<Self>) -> Result<Gate, TooManyGates> {
        self.admit_gate(GateWord::new(GatePlace::Private(AtomicU64::new(0))))
    }

    /// A gate in memory that a requester in another process shares.
    pub(crate) fn open_shared_gate(
        self: &Arc<Self>,
        memory: RegisteredMemory,
    ) -> Result<Gate, TooManyGates> {
        self.admit_gate(GateWord::new(GatePlace::Shared(memory)))
    }

    /// Has revocations shut this door too. It looks at keys only after this.
    #[cfg(feature = "verbs")]
    pub(crate) fn add_door(&self, door: Arc<dyn Door>) -> Result<(), TooManyGates> {
        let mut doors = lock(&self.doors);
        if doors.len() >= MAX_GATES {
            return Err(TooManyGates);
        }
        doors.push(door);
        Ok(())
    }

    /// Forgets a door that nobody can come through any more.
    #[cfg(feature = "verbs")]
    pub(crate) fn remove_door(&self, door: &Arc<dyn Door>) {
        lock(&self.doors).retain(|other| !Arc::ptr_eq(other, door));
    }

    /// Whether `key` is the live key of `extent`.
    #[cfg(feature = "verbs")]
    pub(crate) fn is_live(&self, extent: u32, key: u64) -> bool {
        key != fence::NO_KEY
            && self
                .key_word(extent)
                .is_some_and(|word| fence::Look::load(word) == key)
    }

    /// Forgets a gate: revocations pass it by from now on.
    pub(crate) fn forget_gate(&self, word: &Arc<GateWord>) {
        word.mark_gone();
        lock(&self.gates).retain(|gate| !Arc::ptr_eq(gate, word));
    }

    fn admit_gate(self: &Arc<Self>, word: GateWord) -> Result<Gate, TooManyGates> {
        let mut gates = lock(&self.gates);
        if gates.len() >= MAX_GATES {
            return Err(TooManyGates);
        }
        let word = Arc::new(word);
        gates.push(word.clone());
        Ok(Gate::new(self.clone(), word))
    }
}

/// [`MAX_GATES`] connections are open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_GATES} connections are open already")]
pub struct TooManyGates;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section leaves consistent data behind at each step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::WorkError;
    use crate::gate::GATE_BYTES;
    use crate::memory::MemoryOptions;

    fn table() -> Arc<AccessTable> {
        AccessTable::new(PoolGeometry::new(8192, 4).unwrap()).unwrap()
    }

    #[test]
    fn only_the_live_key_opens_its_extent() {
        let table = table();
        let mut gate = table.open_gate().unwrap();
        assert_eq!(gate.check(1, 7, 0, 8).unwrap_err(), WorkError::AccessDenied);
        assert_eq!(gate.check(1, 0, 0, 8).unwrap_err(), WorkError::AccessDenied);
        table.grant(1, 7).unwrap();
        assert_eq!(gate.check(1, 7, 16, 8).unwrap().pool_offset(), 8192 + 16);
        assert_eq!(gate.check(1, 8, 0, 8).unwrap_err(), WorkError::AccessDenied);
        assert_eq!(gate.check(2, 7, 0, 8).unwrap_err(), WorkError::AccessDenied);
        assert_eq!(gate.check(9, 7, 0, 8).unwrap_err(), WorkError::AccessDenied);
        assert_eq!(
            gate.check(1, 7, 8190, 8).unwrap_err(),
            WorkError::RemoteBounds
        );
        // A bounds error must have left the gate.
        table.revoke(1).unwrap();
        assert_eq!(gate.check(1, 7, 0, 8).unwrap_err(), WorkError::AccessDenied);
    }

    #[test]
    fn grants_do_not_replace_each_other() {
        let table = table();
        table.grant(0, 1).unwrap();
        assert_eq!(table.grant(0, 2), Err(GrantError::AlreadyGranted(0)));
        assert_eq!(table.grant(1, 0), Err(GrantError::ZeroKey));
        assert_eq!(table.grant(4, 1), Err(GrantError::NoSuchExtent(4)));
        table.revoke(0).unwrap();
        table.revoke(0).unwrap();
        table.grant(0, 2).unwrap();
        assert!(table.is_granted(0));
    }

    #[test]
    fn an_operation_under_way_holds_a_revocation_up_and_one_elsewhere_does_not() {
        let table = table();
        table.grant(0, 1).unwrap();
        table.grant(1, 1).unwrap();
        let mut gate = table.open_gate().unwrap();
        let guard = gate.check(0, 1, 0, 8).unwrap();
        table.revoke(1).unwrap();
        assert_eq!(
            table.revoke(0),
            Err(RevokeError::StillInside {
                extent: 0,
                holders: 1
            })
        );
        assert_eq!(table.grant(0, 2), Err(GrantError::NotFenced(0)));
        drop(guard);
        table.revoke(0).unwrap();
        table.grant(0, 2).unwrap();
    }

    #[test]
    fn a_gate_that_goes_away_frees_the_revocation() {
        let table = table();
        table.grant(0, 1).unwrap();
        let (memory, _) =
            RegisteredMemory::create("gate", GATE_BYTES, MemoryOptions::default()).unwrap();
        // What a requester leaves behind when it is killed inside.
        memory
            .word(0)
            .unwrap()
            .store(1, std::sync::atomic::Ordering::SeqCst);
        let gate = table.open_shared_gate(memory).unwrap();
        let revoking = std::thread::spawn({
            let table = table.clone();
            move || table.revoke(0)
        });
        drop(gate);
        revoking.join().unwrap().unwrap();
    }
}
