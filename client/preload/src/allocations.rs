//! Allocations: they wait while eviction catches up, so that no program outruns it through the heap.

use core::sync::atomic::Ordering;

use crate::lifecycle::control;

/// Before the next allocator in line is called.
#[inline]
pub(crate) fn before() {
    if let Some(control) = control().filter(|control| control.hold.load(Ordering::Relaxed) != 0) {
        control.wait_while_held();
    }
}

/// After an allocation of `len` bytes: a large one may be a mapping of its own.
#[inline]
pub(crate) fn after(len: usize) {
    const WORTH_A_REPORT: usize = 256 << 10;
    if len >= WORTH_A_REPORT
        && let Some(control) =
            control().filter(|control| control.armed.load(Ordering::Relaxed) != 0)
    {
        control.report_mapping();
    }
}
