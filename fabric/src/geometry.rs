//! The shape of a responder's pool.

use crate::MAX_TRANSFER;

/// The most extents that a pool may have: a bound for what a peer's hello can make us map or allocate. With
/// the smallest sensible extent, 2 MiB, it is 32 TiB.
pub const MAX_EXTENTS: u32 = 1 << 24;

/// A pool of registered memory, cut into extents of one size. Extent `i` starts at byte `i * extent_bytes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolGeometry {
    extent_bytes: u64,
    extents: u32,
}

/// Why a pool cannot have this shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// Extents hold whole 4 KiB pages, at least one.
    #[error("an extent of {0} bytes is no whole number of 4 KiB pages; round it up")]
    ExtentBytes(u64),
    /// No extents, or more than [`MAX_EXTENTS`].
    #[error("a pool has between 1 and {MAX_EXTENTS} extents, not {0}; choose larger extents")]
    Extents(u32),
    /// The product does not fit an address.
    #[error("{extents} extents of {extent_bytes} bytes exceed the address space")]
    TooLarge {
        /// Bytes per extent.
        extent_bytes: u64,
        /// How many.
        extents: u32,
    },
}

impl PoolGeometry {
    /// A pool of `extents` extents of `extent_bytes` bytes each.
    pub fn new(extent_bytes: u64, extents: u32) -> Result<Self, GeometryError> {
        if extent_bytes == 0 || !extent_bytes.is_multiple_of(4096) {
            return Err(GeometryError::ExtentBytes(extent_bytes));
        }
        if extents == 0 || extents > MAX_EXTENTS {
            return Err(GeometryError::Extents(extents));
        }
        extent_bytes
            .checked_mul(u64::from(extents))
            .filter(|&bytes| bytes <= isize::MAX as u64)
            .ok_or(GeometryError::TooLarge {
                extent_bytes,
                extents,
            })?;
        Ok(Self {
            extent_bytes,
            extents,
        })
    }

    /// Bytes per extent.
    #[must_use]
    pub fn extent_bytes(&self) -> u64 {
        self.extent_bytes
    }

    /// How many extents there are.
    #[must_use]
    pub fn extents(&self) -> u32 {
        self.extents
    }

    /// Bytes of the whole pool.
    #[must_use]
    pub fn pool_bytes(&self) -> u64 {
        self.extent_bytes * u64::from(self.extents)
    }

    /// Where `len` bytes at `offset` of `extent` lie in the pool, if they lie inside that extent.
    #[must_use]
    pub fn pool_offset(&self, extent: u32, offset: u64, len: u32) -> Option<u64> {
        let end = offset.checked_add(u64::from(len))?;
        if extent >= self.extents || end > self.extent_bytes || len > MAX_TRANSFER {
            return None;
        }
        Some(u64::from(extent) * self.extent_bytes + offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_never_leaves_its_extent() {
        let pool = PoolGeometry::new(8192, 3).unwrap();
        assert_eq!(pool.pool_offset(2, 4096, 4096), Some(2 * 8192 + 4096));
        assert_eq!(pool.pool_offset(2, 4097, 4096), None);
        assert_eq!(pool.pool_offset(3, 0, 1), None);
        assert_eq!(pool.pool_offset(0, u64::MAX, 2), None);
        assert_eq!(pool.pool_offset(0, 8192, 0), Some(8192));
    }

    #[test]
    fn shapes_that_overflow_are_refused() {
        assert!(PoolGeometry::new(1 << 62, 4).is_err());
        assert!(PoolGeometry::new(0, 4).is_err());
        assert!(PoolGeometry::new(4095, 4).is_err());
        assert!(PoolGeometry::new(4096, 0).is_err());
        assert!(PoolGeometry::new(4096, MAX_EXTENTS + 1).is_err());
    }
}
