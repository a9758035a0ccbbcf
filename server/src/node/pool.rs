//! The pool: one registered mapping, cut into extents.

use std::io;
use std::sync::Arc;

use farpage_fabric::access::AccessTable;
use farpage_fabric::geometry::PoolGeometry;
use farpage_fabric::memory::{Lock, MemoryOptions, RegisteredMemory};
use farpage_proto::AccessKey;
use rustix::fs::{FallocateFlags, fallocate};

use super::config::{NodeConfig, Shape};

/// What the ledger asks of a pool.
pub(crate) trait Extents: Send + Sync {
    /// Lets whoever knows the key read and write.
    fn grant(&self, index: u32, key: AccessKey) -> Result<(), PoolError>;
    /// Lets nobody in any more, and waits until whoever is inside has left.
    fn fence(&self, index: u32) -> Result<(), PoolError>;
    /// Makes all bytes zero, and gives the memory back to the kernel unless it is locked or of huge pages.
    fn scrub(&self, index: u32) -> Result<(), PoolError>;
}

/// What went wrong with the pool.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// No memory.
    #[error("a pool of {bytes} bytes: {source}; lend less, or free memory first")]
    Create {
        /// How much was wanted.
        bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The fabric cannot have this shape.
    #[error("the pool's shape: {0}")]
    Shape(String),
    /// The fabric refuses.
    #[error("extent {index}: {cause}")]
    Access {
        /// Which extent.
        index: u32,
        /// Why.
        cause: String,
    },
    /// The kernel did not zero it. It stays closed.
    #[error("extent {index} cannot be scrubbed: {source}; it stays closed until that succeeds")]
    Scrub {
        /// Which extent.
        index: u32,
        /// What the system said.
        source: io::Error,
    },
    /// A helper thread failed.
    #[error("the pool's thread: {0}; start the node again")]
    Thread(String),
}

/// A node's memory.
#[derive(Debug)]
pub(crate) struct Pool {
    memory: Arc<RegisteredMemory>,
    access: Arc<AccessTable>,
    extent_bytes: u64,
    huge_pages: bool,
    locked: bool,
    /// Whether memory must not be given back to the kernel, since it might not be had again.
    keeps_memory: bool,
}

impl Pool {
    /// Maps it. Nothing is populated unless locking is asked for and allowed.
    pub(crate) fn create(shape: Shape, config: &NodeConfig) -> Result<Self, PoolError> {
        let bytes = shape.capacity().0;
        let created = |source| PoolError::Create { bytes, source };
        let geometry = PoolGeometry::new(shape.extent_bytes.0, shape.extents)
            .map_err(|error| PoolError::Shape(error.to_string()))?;
        let options = MemoryOptions {
            huge_pages: config.huge_pages,
            lock: config.lock,
        };
        let len = usize::try_from(bytes).map_err(|_| created(io::ErrorKind::OutOfMemory.into()))?;
        let (memory, report) =
            RegisteredMemory::create("farpage-pool", len, options).map_err(created)?;
        if config.huge_pages && !report.huge {
            tracing::warn!(
                "no reserved huge pages for the pool, it uses normal ones; see vm.nr_hugepages"
            );
        }
        if let Err(error) = &report.locked
            && config.lock != Lock::No
        {
            tracing::warn!(%error, "the pool is not locked in memory");
        }
        Ok(Self {
            memory: Arc::new(memory),
            access: AccessTable::new(geometry).map_err(created)?,
            extent_bytes: shape.extent_bytes.0,
            huge_pages: report.huge,
            locked: report.locked.is_ok(),
            keeps_memory: report.huge || config.lock == Lock::AtOnce && report.locked.is_ok(),
        })
    }

    pub(crate) fn memory(&self) -> &Arc<RegisteredMemory> {
        &self.memory
    }

    pub(crate) fn access(&self) -> &Arc<AccessTable> {
        &self.access
    }

    pub(crate) fn huge_pages(&self) -> bool {
        self.huge_pages
    }

    pub(crate) fn locked(&self) -> bool {
        self.locked
    }
}

impl Extents for Pool {
    fn grant(&self, index: u32, key: AccessKey) -> Result<(), PoolError> {
        self.access
            .grant(index, key.get())
            .map_err(|error| PoolError::Access {
                index,
                cause: error.to_string(),
            })
    }

    fn fence(&self, index: u32) -> Result<(), PoolError> {
        self.access
            .revoke(index)
            .map_err(|error| PoolError::Access {
                index,
                cause: error.to_string(),
            })
    }

    fn scrub(&self, index: u32) -> Result<(), PoolError> {
        let offset = u64::from(index) * self.extent_bytes;
        // Huge pages that are given back lose their reservation, and the next touch could find none left; memory locked at
        // once is meant to stay. Both are zeroed in place.
        if self.keeps_memory {
            return self
                .memory
                .zero(offset, self.extent_bytes as usize)
                .map_err(|error| PoolError::Scrub {
                    index,
                    source: io::Error::new(io::ErrorKind::InvalidInput, error),
                });
        }
        // The hole reads as zeros in every mapping of the file, ours and requesters'.
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match fallocate(self.memory.fd(), punch, offset, self.extent_bytes) {
                Ok(()) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    return Err(PoolError::Scrub {
                        index,
                        source: error.into(),
                    });
                }
            }
        }
    }
}
