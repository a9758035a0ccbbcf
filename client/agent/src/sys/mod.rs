//! The unsafe rim of the agent: ioctls, raw descriptors, the control block's mapping.

#![allow(unsafe_code)]

pub mod control;
pub mod descriptors;
pub mod keeper;
pub mod pagemap;
pub mod process;
pub mod socket;
pub mod state;
pub mod uffd;

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// A descriptor that another agent had under this number, and that was put there again. None for 0, which no kept one has.
pub(crate) fn left_at(number: i32) -> Option<OwnedFd> {
    // SAFETY: `keeper` has put it there and closes nothing; the state names each number once, and each is asked for once.
    (number > 0).then(|| unsafe { OwnedFd::from_raw_fd(number) })
}

/// The result of a libc call that returns -1 on failure.
pub(crate) fn check(result: i64) -> io::Result<u64> {
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}
