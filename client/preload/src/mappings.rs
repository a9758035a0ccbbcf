//! New mappings: made by the next `mmap` in line, then shown to the agent while memory is tight.

use core::ffi::{c_int, c_void};
use core::sync::atomic::Ordering;

use crate::lifecycle::control;

/// Mappings smaller than this are left to the agent's own looking.
const WORTH_A_REPORT: usize = 256 << 10;

/// After an anonymous mapping of `len` bytes was made (or grown).
pub(crate) fn made(address: *mut c_void, len: usize, anonymous: bool) {
    const MAP_FAILED: usize = usize::MAX;
    if address.addr() == MAP_FAILED || !anonymous || len < WORTH_A_REPORT {
        return;
    }
    if let Some(control) = control().filter(|control| control.armed.load(Ordering::Relaxed) != 0) {
        control.report_mapping();
    }
}

/// Whether `flags` of `mmap` ask for private anonymous memory.
pub(crate) fn is_anonymous(flags: c_int) -> bool {
    const MAP_PRIVATE: c_int = 0x02;
    const MAP_ANONYMOUS: c_int = 0x20;
    flags & (MAP_PRIVATE | MAP_ANONYMOUS) == MAP_PRIVATE | MAP_ANONYMOUS
}
