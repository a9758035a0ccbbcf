//! A store that forgets.

use super::{Store, StoreError};
use crate::coordinator::state::Change;

/// Keeps nothing: nobody can open it a second time.
#[derive(Debug, Default)]
pub(super) struct MemoryStore;

impl Store for MemoryStore {
    fn load(&mut self) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        Ok(Vec::new())
    }

    fn apply(&mut self, _: &[Change]) -> Result<(), StoreError> {
        Ok(())
    }
}
