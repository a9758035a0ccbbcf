//! Where the coordinator's state outlives its process.

mod file;
mod memory;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::record::{Record, Unreadable, decode};
use super::state::Change;

/// Which store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreUrl {
    /// `file:PATH`: one file, one coordinator.
    File(PathBuf),
    /// `memory:`: gone with the process. For `farpage run` without an agent, and tests.
    Memory,
}

/// A store's URL that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreUrlError {
    /// Not yet.
    #[error("--state etcd: is not supported by this version; use file:PATH")]
    Etcd,
    /// No such kind.
    #[error("--state {0}: use file:PATH, or memory: for a cluster that may forget")]
    Unknown(String),
}

impl FromStr for StoreUrl {
    type Err = StoreUrlError;
    fn from_str(text: &str) -> Result<Self, StoreUrlError> {
        match text.split_once(':') {
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("memory", "")) => Ok(Self::Memory),
            Some(("etcd", _)) => Err(StoreUrlError::Etcd),
            _ => Err(StoreUrlError::Unknown(text.to_owned())),
        }
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Memory => f.write_str("memory:"),
        }
    }
}

/// Why a store cannot be used (any more).
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has it open.
    #[error(
        "{path} is in use by another coordinator; stop that one, or give this one a file of its own"
    )]
    InUse {
        /// Which file.
        path: PathBuf,
    },
    /// It cannot be opened, read or written.
    #[error("{path}: {cause}; check the path, its permissions and the space on its disk")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        cause: String,
    },
    /// What is in it makes no sense here.
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
    /// A later version wrote it.
    #[error("{path} has format {found}, this version knows {known}; use the version that wrote it")]
    Format {
        /// Which file.
        path: PathBuf,
        /// Its format.
        found: u64,
        /// Ours.
        known: u64,
    },
}

/// Text keys and byte values, kept. Used by one thread, which may wait for the disk.
pub(crate) trait Store: Send {
    /// Everything that is stored.
    fn load(&mut self) -> Result<Vec<(String, Vec<u8>)>, StoreError>;

    /// Makes all changes or none, and returns once they are durable.
    fn apply(&mut self, changes: &[Change]) -> Result<(), StoreError>;
}

/// Opens a store.
pub(crate) fn open(url: &StoreUrl) -> Result<Box<dyn Store>, StoreError> {
    match url {
        StoreUrl::File(path) => Ok(Box::new(file::FileStore::open(path)?)),
        StoreUrl::Memory => Ok(Box::new(memory::MemoryStore)),
    }
}

/// Everything that is stored, decoded.
pub(crate) fn load(store: &mut dyn Store) -> Result<Vec<Record>, StoreError> {
    store
        .load()?
        .iter()
        .map(|(key, value)| Ok(decode(key, value)?))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        assert_eq!(
            "file:/var/lib/farpage".parse(),
            Ok(StoreUrl::File("/var/lib/farpage".into()))
        );
        assert_eq!("memory:".parse(), Ok(StoreUrl::Memory));
        assert_eq!(
            "etcd:http://h:2379".parse::<StoreUrl>(),
            Err(StoreUrlError::Etcd)
        );
        for bad in ["", "file:", "memory:x", "/path", "redis:x"] {
            assert_eq!(
                bad.parse::<StoreUrl>(),
                Err(StoreUrlError::Unknown(bad.to_owned()))
            );
        }
    }

    #[test]
    fn a_file_keeps_what_was_applied_and_has_one_user() {
        let dir = tempfile::tempdir().unwrap();
        let url = StoreUrl::File(dir.path().join("state"));
        let mut store = open(&url).unwrap();
        assert_eq!(store.load().unwrap(), vec![]);
        let put = |key: &str, value: &str| (key.to_owned(), Some(value.as_bytes().to_vec()));
        store.apply(&[put("a", "1"), put("b", "2")]).unwrap();
        store
            .apply(&[("a".to_owned(), None), put("b", "3")])
            .unwrap();

        let second = open(&url).err().unwrap();
        assert!(matches!(second, StoreError::InUse { .. }), "{second}");
        assert!(second.to_string().contains("another coordinator"));

        drop(store);
        let mut store = open(&url).unwrap();
        assert_eq!(store.load().unwrap(), vec![("b".to_owned(), b"3".to_vec())]);
    }

    #[test]
    fn a_file_that_is_no_store_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        std::fs::write(&path, vec![7; 10_000]).unwrap();
        assert!(matches!(
            open(&StoreUrl::File(path)).err(),
            Some(StoreError::Io { .. })
        ));
        let missing = dir.path().join("no/such/dir/state");
        assert!(matches!(
            open(&StoreUrl::File(missing)).err(),
            Some(StoreError::Io { .. })
        ));
    }
}
