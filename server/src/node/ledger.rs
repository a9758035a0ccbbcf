//! Which extents are granted, under which epochs: the node's own view, which no coordinator can talk it out of.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use farpage_proto::node::{NodeGrant, NodeRevoke};
use farpage_proto::{AccessKey, Epoch};

use super::pool::{Extents, PoolError};

/// Why the node does not grant or revoke.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LedgerError {
    #[error("index: the pool has {extents} extents and none at {index}")]
    NoSuchExtent { index: u32, extents: u32 },
    #[error("epoch: {asked} is not newer than {last}, the last one of extent {index}")]
    StaleEpoch { index: u32, asked: Epoch, last: u64 },
    #[error("extent {index} is granted under epoch {last}; revoke that first")]
    Granted { index: u32, last: u64 },
    #[error("extent {index} is being fenced or scrubbed, or that failed; revoke it again")]
    NotScrubbed { index: u32 },
    #[error(transparent)]
    Pool(#[from] PoolError),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Holding {
    /// Nobody's, and all zeros.
    #[default]
    Clean,
    Granted(AccessKey),
    /// Its grant has ended, and it is not yet known to be fenced and zero.
    Dirty,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    last_epoch: u64,
    holding: Holding,
}

/// One entry per extent. An entry's lock is held while its extent is fenced and scrubbed, so nothing can be granted
/// in between.
pub(crate) struct Ledger {
    entries: Vec<Mutex<Entry>>,
    extents: Arc<dyn Extents>,
    last_epoch: AtomicU64,
    /// How many entries are granted, and how many are dirty: looking at their locks could make a grant fail.
    granted: AtomicU32,
    dirty: AtomicU32,
}

impl Ledger {
    pub(crate) fn new(extents: u32, pool: Arc<dyn Extents>) -> Self {
        let entries = (0..extents).map(|_| Mutex::default()).collect();
        Self {
            entries,
            extents: pool,
            last_epoch: AtomicU64::new(0),
            granted: AtomicU32::new(0),
            dirty: AtomicU32::new(0),
        }
    }

    /// Opens an extent under a key. Repeating a grant is fine. Does not wait.
    pub(crate) fn grant(&self, grant: NodeGrant) -> Result<(), LedgerError> {
        let NodeGrant { index, epoch, key } = grant;
        let mut entry = match self.entry(index)?.try_lock() {
            Ok(entry) => entry,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(LedgerError::NotScrubbed { index }),
        };
        let last = entry.last_epoch;
        if entry.holding == Holding::Granted(key) && epoch.get() == last {
            return Ok(());
        }
        if epoch.get() <= last {
            return Err(LedgerError::StaleEpoch {
                index,
                asked: epoch,
                last,
            });
        }
        match entry.holding {
            Holding::Clean => {}
            Holding::Granted(_) => return Err(LedgerError::Granted { index, last }),
            Holding::Dirty => return Err(LedgerError::NotScrubbed { index }),
        }
        self.extents.grant(index, key)?;
        *entry = Entry {
            last_epoch: epoch.get(),
            holding: Holding::Granted(key),
        };
        self.granted.fetch_add(1, Ordering::Relaxed);
        self.saw(epoch);
        Ok(())
    }

    /// Ends an extent's grant up to an epoch: after `Ok` nobody reaches it and it is all zeros. Blocks for the fence and
    /// the scrub. Repeating is fine, and so is revoking what was never granted: a grant that arrives late is then stale.
    pub(crate) fn revoke(&self, revoke: NodeRevoke) -> Result<(), LedgerError> {
        let NodeRevoke { index, epoch } = revoke;
        let mut entry = lock(self.entry(index)?);
        let last = entry.last_epoch;
        if epoch.get() < last {
            match entry.holding {
                Holding::Clean => return Ok(()),
                Holding::Granted(_) => return Err(LedgerError::Granted { index, last }),
                Holding::Dirty => {}
            }
        }
        entry.last_epoch = last.max(epoch.get());
        self.saw(epoch);
        if entry.holding != Holding::Clean {
            if matches!(entry.holding, Holding::Granted(_)) {
                self.granted.fetch_sub(1, Ordering::Relaxed);
                self.dirty.fetch_add(1, Ordering::Relaxed);
            }
            entry.holding = Holding::Dirty;
            self.extents.fence(index)?;
            self.extents.scrub(index)?;
            entry.holding = Holding::Clean;
            self.dirty.fetch_sub(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// What is not clean, positions ascending; and the highest epoch seen.
    pub(crate) fn inventory(&self) -> (Vec<(u32, Epoch)>, u64) {
        let held = (0u32..).zip(&self.entries).filter_map(|(index, entry)| {
            let entry = lock(entry);
            let epoch = Epoch::new(entry.last_epoch).ok()?;
            (entry.holding != Holding::Clean).then_some((index, epoch))
        });
        (held.collect(), self.last_epoch.load(Ordering::Acquire))
    }

    /// How many extents are granted, and how many were and are not yet scrubbed. Waits for nothing.
    pub(crate) fn counts(&self) -> (u32, u32) {
        let count = |count: &AtomicU32| count.load(Ordering::Relaxed);
        (count(&self.granted), count(&self.dirty))
    }

    /// How many extents are granted or not yet scrubbed.
    pub(crate) fn held(&self) -> u32 {
        self.entries
            .iter()
            .filter(|entry| lock(entry).holding != Holding::Clean)
            .count() as u32
    }

    fn entry(&self, index: u32) -> Result<&Mutex<Entry>, LedgerError> {
        let extents = self.entries.len() as u32;
        self.entries
            .get(index as usize)
            .ok_or(LedgerError::NoSuchExtent { index, extents })
    }

    fn saw(&self, epoch: Epoch) {
        self.last_epoch.fetch_max(epoch.get(), Ordering::AcqRel);
    }
}

/// An entry is only changed when a step has succeeded, so it is sound even after a panic.
fn lock(entry: &Mutex<Entry>) -> MutexGuard<'_, Entry> {
    entry.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[derive(Default)]
    struct Fake {
        open: Mutex<Vec<u32>>,
        scrubbed: Mutex<Vec<u32>>,
        fail: AtomicBool,
    }

    impl Extents for Fake {
        fn grant(&self, index: u32, _: AccessKey) -> Result<(), PoolError> {
            self.open.lock().unwrap().push(index);
            Ok(())
        }
        fn fence(&self, index: u32) -> Result<(), PoolError> {
            self.open.lock().unwrap().retain(|open| *open != index);
            if self.fail.load(Ordering::Relaxed) {
                Err(PoolError::Thread("stuck".to_owned()))
            } else {
                Ok(())
            }
        }
        fn scrub(&self, index: u32) -> Result<(), PoolError> {
            assert!(
                !self.open.lock().unwrap().contains(&index),
                "scrubbed while open"
            );
            self.scrubbed.lock().unwrap().push(index);
            Ok(())
        }
    }

    fn grant(index: u32, epoch: u64, key: u64) -> NodeGrant {
        NodeGrant {
            index,
            epoch: Epoch::new(epoch).unwrap(),
            key: AccessKey::new(key).unwrap(),
        }
    }

    fn revoke(index: u32, epoch: u64) -> NodeRevoke {
        NodeRevoke {
            index,
            epoch: Epoch::new(epoch).unwrap(),
        }
    }

    #[test]
    fn only_newer_epochs_are_granted_and_only_after_a_scrub() {
        let fake = Arc::new(Fake::default());
        let ledger = Ledger::new(2, fake.clone());
        ledger.grant(grant(0, 5, 1)).unwrap();
        ledger.grant(grant(0, 5, 1)).unwrap();
        assert!(matches!(
            ledger.grant(grant(0, 5, 2)),
            Err(LedgerError::StaleEpoch { .. })
        ));
        assert!(matches!(
            ledger.grant(grant(0, 4, 1)),
            Err(LedgerError::StaleEpoch { .. })
        ));
        assert!(matches!(
            ledger.grant(grant(0, 6, 2)),
            Err(LedgerError::Granted { .. })
        ));
        assert!(matches!(
            ledger.grant(grant(2, 6, 2)),
            Err(LedgerError::NoSuchExtent { .. })
        ));
        assert!(matches!(
            ledger.revoke(revoke(0, 4)),
            Err(LedgerError::Granted { .. })
        ));
        assert_eq!(ledger.inventory(), (vec![(0, Epoch::new(5).unwrap())], 5));

        ledger.revoke(revoke(0, 5)).unwrap();
        ledger.revoke(revoke(0, 5)).unwrap();
        assert_eq!(*fake.scrubbed.lock().unwrap(), [0]);
        assert!(matches!(
            ledger.grant(grant(0, 5, 1)),
            Err(LedgerError::StaleEpoch { .. })
        ));
        assert_eq!(ledger.counts(), (0, 0));
        ledger.grant(grant(0, 6, 2)).unwrap();
        assert_eq!((ledger.held(), ledger.counts()), (1, (1, 0)));
    }

    #[test]
    fn a_revocation_that_overtakes_its_grant_makes_it_stale() {
        let ledger = Ledger::new(1, Arc::new(Fake::default()));
        ledger.revoke(revoke(0, 9)).unwrap();
        assert!(matches!(
            ledger.grant(grant(0, 9, 1)),
            Err(LedgerError::StaleEpoch { .. })
        ));
        assert_eq!(ledger.inventory(), (vec![], 9));
    }

    #[test]
    fn what_could_not_be_fenced_stays_closed_until_it_is() {
        let fake = Arc::new(Fake::default());
        let ledger = Ledger::new(1, fake.clone());
        ledger.grant(grant(0, 1, 1)).unwrap();
        fake.fail.store(true, Ordering::Relaxed);
        assert!(matches!(
            ledger.revoke(revoke(0, 1)),
            Err(LedgerError::Pool(_))
        ));
        assert!(matches!(
            ledger.grant(grant(0, 2, 1)),
            Err(LedgerError::NotScrubbed { .. })
        ));
        assert!(ledger.revoke(revoke(0, 1)).is_err());
        assert_eq!((ledger.held(), ledger.counts()), (1, (0, 1)));
        fake.fail.store(false, Ordering::Relaxed);
        ledger.revoke(revoke(0, 1)).unwrap();
        ledger.grant(grant(0, 2, 1)).unwrap();
    }
}
