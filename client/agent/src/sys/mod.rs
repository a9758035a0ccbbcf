//! The unsafe rim of the agent: ioctls, raw descriptors, the control block's mapping.

#![allow(unsafe_code)]

pub mod control;
pub mod pagemap;
pub mod process;
pub mod socket;
pub mod uffd;

use std::io;

/// The result of a libc call that returns -1 on failure.
pub(crate) fn check(result: i64) -> io::Result<u64> {
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}
