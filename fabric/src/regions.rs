//! The local memory that an endpoint's work requests may name.

use std::sync::Arc;

use crate::endpoint::{LocalSlice, PostError, RegionId};
use crate::memory::RegisteredMemory;

/// Regions by their ids.
#[derive(Debug, Default)]
pub(crate) struct Regions(Vec<Arc<RegisteredMemory>>);

impl Regions {
    /// Gives a region its id; the same memory always has the same one.
    pub(crate) fn register(&mut self, memory: Arc<RegisteredMemory>) -> RegionId {
        let known = self
            .0
            .iter()
            .position(|region| Arc::ptr_eq(region, &memory));
        let index = known.unwrap_or_else(|| {
            self.0.push(memory);
            self.0.len() - 1
        });
        RegionId(index as u32)
    }

    pub(crate) fn all(&self) -> &[Arc<RegisteredMemory>] {
        &self.0
    }

    /// The region of a slice that lies inside it and is no longer than `max_transfer`.
    pub(crate) fn check(
        &self,
        slice: LocalSlice,
        max_transfer: u32,
    ) -> Result<&Arc<RegisteredMemory>, PostError> {
        if slice.len > max_transfer {
            return Err(PostError::TooLarge);
        }
        let region = self
            .0
            .get(slice.region.0 as usize)
            .ok_or(PostError::LocalBounds)?;
        region
            .writable_address(slice.offset, slice.len as usize)
            .map_err(|_| PostError::LocalBounds)?;
        Ok(region)
    }
}
