//! The lock-free part of fencing: who is inside an extent, and how its owner waits until nobody is.
//!
//! Each extent has a *key word* that its owner writes: the live key, or 0. Each connection has a *gate word*
//! that it alone writes: 0, or the extent (plus one) that it is touching right now. A connection announces
//! itself at its gate, then looks whether the key is still live; an owner takes the key away, then looks at
//! all gates. Between the two steps both have a sequentially consistent fence, so at least one sees the
//! other: either the connection sees the key gone and leaves, or the owner sees the gate and waits.
//!
//! The design before this one counted entries in a word per extent. It had two faults: a process that died
//! inside left the count up for ever, and requests with stale keys moved the count that a revocation was
//! waiting for. A gate goes away with its connection, and a stale key is turned away before it is announced.
//!
//! The functions are generic over the atomics, so that the loom model (below) runs this very code:
//! `RUSTFLAGS="--cfg loom" cargo test -p farpage-fabric --release loom_`.

use std::sync::atomic::{AtomicU64, Ordering, fence};

/// A key word or gate word that can be looked at.
pub(crate) trait Look {
    /// Loads with acquire ordering.
    fn load(&self) -> u64;
    /// A sequentially consistent fence.
    fn fence(&self);
}

/// One that can be changed too.
pub(crate) trait Change: Look {
    /// Stores with release ordering.
    fn store(&self, value: u64);
}

impl Look for AtomicU64 {
    fn load(&self) -> u64 {
        self.load(Ordering::Acquire)
    }

    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
}

impl Change for AtomicU64 {
    fn store(&self, value: u64) {
        self.store(value, Ordering::Release);
    }
}

/// No key: never granted, so never matched.
pub(crate) const NO_KEY: u64 = 0;

/// Nobody is inside.
const NOWHERE: u64 = 0;

fn inside(extent: u32) -> u64 {
    u64::from(extent) + 1
}

/// Enters `extent` through `gate` if `key` is its live key. After `true` the bytes may be touched until
/// [`leave`]; a gate admits to one extent at a time.
pub(crate) fn enter(key_word: &impl Look, gate: &impl Change, extent: u32, key: u64) -> bool {
    // Turned away before it is announced: stale requests must not hold up an owner who waits.
    if key == NO_KEY || key_word.load() != key {
        return false;
    }
    gate.store(inside(extent));
    gate.fence();
    if key_word.load() == key {
        return true;
    }
    gate.store(NOWHERE);
    false
}

/// Leaves the extent that [`enter`] admitted to.
pub(crate) fn leave(gate: &impl Change) {
    gate.store(NOWHERE);
}

/// Makes `key` the live key. The owner has seen to it that nobody is inside under an older one.
pub(crate) fn open(key_word: &impl Change, key: u64) {
    key_word.store(key);
}

/// Takes the live key away. Whoever is inside now shows in [`is_inside`] until they have left.
pub(crate) fn close(key_word: &impl Change) {
    key_word.store(NO_KEY);
    key_word.fence();
}

/// Whether somebody is, or may be, inside `extent` through `gate`.
pub(crate) fn is_inside(gate: &impl Look, extent: u32) -> bool {
    gate.load() == inside(extent)
}

/// Whether somebody is, or may be, inside any extent through `gate`.
pub(crate) fn is_occupied(gate: &impl Look) -> bool {
    gate.load() != NOWHERE
}

#[cfg(all(test, loom))]
mod loom_model {
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicU64, Ordering, fence};
    use loom::thread;

    use super::*;

    impl Look for AtomicU64 {
        fn load(&self) -> u64 {
            self.load(Ordering::Acquire)
        }

        fn fence(&self) {
            fence(Ordering::SeqCst);
        }
    }

    impl Change for AtomicU64 {
        fn store(&self, value: u64) {
            self.store(value, Ordering::Release);
        }
    }

    /// One extent; loom reports unsynchronised accesses to `bytes`.
    struct Extent {
        key: AtomicU64,
        gates: Vec<AtomicU64>,
        bytes: UnsafeCell<u64>,
    }

    fn extent(gates: usize) -> Arc<Extent> {
        Arc::new(Extent {
            key: AtomicU64::new(1),
            gates: (0..gates).map(|_| AtomicU64::new(0)).collect(),
            bytes: UnsafeCell::new(0),
        })
    }

    fn revoke(extent: &Extent) {
        close(&extent.key);
        for gate in &extent.gates {
            while is_inside(gate, 0) {
                thread::yield_now();
            }
        }
    }

    #[test]
    fn loom_scrubbing_after_a_revocation_races_with_nobody() {
        loom::model(|| {
            let extent = extent(2);
            let readers: Vec<_> = (0..2)
                .map(|gate| {
                    let extent = extent.clone();
                    thread::spawn(move || {
                        if enter(&extent.key, &extent.gates[gate], 0, 1) {
                            extent.bytes.with(|_| ());
                            leave(&extent.gates[gate]);
                        }
                    })
                })
                .collect();
            revoke(&extent);
            extent.bytes.with_mut(|_| ());
            for reader in readers {
                reader.join().unwrap();
            }
        });
    }

    #[test]
    fn loom_a_new_grant_sees_the_scrub_and_an_old_key_stays_out() {
        loom::model(|| {
            let extent = extent(1);
            let other = extent.clone();
            let reader = thread::spawn(move || {
                // The old key: in before the revocation or not at all.
                if enter(&other.key, &other.gates[0], 0, 1) {
                    other.bytes.with(|_| ());
                    leave(&other.gates[0]);
                }
                // The new one: after the scrub or not at all.
                if enter(&other.key, &other.gates[0], 0, 2) {
                    other.bytes.with(|_| ());
                    leave(&other.gates[0]);
                    assert!(!enter(&other.key, &other.gates[0], 0, 1));
                }
            });
            revoke(&extent);
            extent.bytes.with_mut(|_| ());
            open(&extent.key, 2);
            reader.join().unwrap();
        });
    }
}
