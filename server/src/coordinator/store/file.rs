//! A store in one file, by redb: copy-on-write pages, so that a crash at any moment leaves the last commit.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use redb::{Builder, Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};

use super::{Store, StoreError};
use crate::coordinator::state::Change;

const RECORDS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("records");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const FORMAT_KEY: &str = "format";
/// Raised when older versions could not read what is written.
const FORMAT: u64 = 1;
/// redb's cache: the whole state of a large cluster is smaller.
const CACHE_BYTES: usize = 32 << 20;

/// See the module.
#[derive(Debug)]
pub(super) struct FileStore {
    database: Database,
    path: PathBuf,
}

impl FileStore {
    /// Opens the file, or creates it, for this user alone: there are access keys in it.
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        let failed = |cause: String| StoreError::Io {
            path: path.to_owned(),
            cause,
        };
        let created = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path);
        if let Err(error) = created
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(failed(error.to_string()));
        }
        // An empty file becomes a new database.
        let database = Builder::new()
            .set_cache_size(CACHE_BYTES)
            .create(path)
            .map_err(|error| match error {
                DatabaseError::DatabaseAlreadyOpen => StoreError::InUse {
                    path: path.to_owned(),
                },
                other => failed(other.to_string()),
            })?;
        let store = Self {
            database,
            path: path.to_owned(),
        };
        let found = store
            .check_format()
            .map_err(|error| failed(error.to_string()))?;
        if found == FORMAT {
            Ok(store)
        } else {
            Err(StoreError::Format {
                path: path.to_owned(),
                found,
                known: FORMAT,
            })
        }
    }

    fn check_format(&self) -> Result<u64, redb::Error> {
        let transaction = self.database.begin_write()?;
        let found = {
            let mut meta = transaction.open_table(META)?;
            let found = meta.get(FORMAT_KEY)?.map(|value| value.value());
            if found.is_none() {
                meta.insert(FORMAT_KEY, FORMAT)?;
            }
            transaction.open_table(RECORDS)?;
            found.unwrap_or(FORMAT)
        };
        transaction.commit()?;
        Ok(found)
    }

    fn read(&self) -> Result<Vec<(String, Vec<u8>)>, redb::Error> {
        let transaction = self.database.begin_read()?;
        let table = transaction.open_table(RECORDS)?;
        let mut records = Vec::new();
        for entry in table.iter()? {
            let (key, value) = entry?;
            records.push((key.value().to_owned(), value.value().to_vec()));
        }
        Ok(records)
    }

    fn write(&self, changes: &[Change]) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        {
            let mut table = transaction.open_table(RECORDS)?;
            for (key, value) in changes {
                match value {
                    Some(value) => drop(table.insert(key.as_str(), value.as_slice())?),
                    None => drop(table.remove(key.as_str())?),
                }
            }
        }
        // The default durability: on disk when it returns.
        transaction.commit()?;
        Ok(())
    }

    fn failed(&self, error: &redb::Error) -> StoreError {
        StoreError::Io {
            path: self.path.clone(),
            cause: error.to_string(),
        }
    }
}

impl Store for FileStore {
    fn load(&mut self) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        self.read().map_err(|error| self.failed(&error))
    }

    fn apply(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        self.write(changes).map_err(|error| self.failed(&error))
    }
}
