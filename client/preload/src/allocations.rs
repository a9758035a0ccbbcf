//! Allocations: they wait while eviction catches up, so that no program outruns it through the heap.

use core::sync::atomic::Ordering;

use farpage_attach::control::Control;

use crate::lifecycle::control;
use crate::mappings;

/// Before the next allocator in line is called.
#[inline]
pub(crate) fn before() {
    if let Some(control) = control().filter(|control| control.hold.load(Ordering::Relaxed) != 0) {
        control.wait_while_held();
    }
}

/// After an allocation of `len` bytes: a large one may be a mapping of its own, any other may have made the heap grow.
#[inline]
pub(crate) fn after(len: usize) {
    if len >= mappings::WORTH_A_REPORT {
        mappings::grew(len);
    } else if control().is_some_and(Control::is_managed) {
        mappings::heap_may_have_grown();
    }
}
