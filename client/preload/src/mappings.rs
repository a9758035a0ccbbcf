//! New mappings: made by the next `mmap` in line, then shown to the agent before they can take a program past its limit.

use core::ffi::{c_int, c_void};
use core::sync::atomic::{AtomicUsize, Ordering};

use farpage_attach::hints::{self, Hint};
use farpage_attach::sys::memory;

use crate::lifecycle::control;
use crate::sys;

/// Mappings smaller than this are left to the agent's own looking.
pub(crate) const WORTH_A_REPORT: usize = 256 << 10;

const PROT_WRITE: c_int = 0x2;
const MAP_PRIVATE: c_int = 0x02;
const MAP_ANONYMOUS: c_int = 0x20;
const MAP_POPULATE: c_int = 0x8000;

/// The flags to make a mapping with, and whether it is to be populated once it is made. The kernel would fill it before
/// anybody could look, however much more it is than may stay here.
pub(crate) fn without_populate(flags: c_int, len: usize) -> (c_int, bool) {
    let large = len >= WORTH_A_REPORT && is_anonymous(flags) && control().is_some();
    (
        if large { flags & !MAP_POPULATE } else { flags },
        large && flags & MAP_POPULATE != 0,
    )
}

/// After an anonymous mapping of `len` bytes was made (or grown).
pub(crate) fn made(address: *mut c_void, len: usize, anonymous: bool) {
    if !has_failed(address) && anonymous && len >= WORTH_A_REPORT {
        grew(len);
    }
}

/// After `mmap`; `populate` says whether it was asked to fill the mapping and was not told so.
pub(crate) fn after(address: *mut c_void, len: usize, prot: c_int, flags: c_int, populate: bool) {
    made(address, len, is_anonymous(flags));
    if populate && !has_failed(address) {
        memory::populate(address.addr(), len, prot & PROT_WRITE != 0);
    }
}

/// The program may fill `len` bytes more than before.
pub(crate) fn grew(len: usize) {
    if let Some(control) = control().filter(|control| control.uses_up(len)) {
        control.report_mapping();
    }
}

/// After `madvise`. What guard pages replace is gone, and that raises no event; dropping what lay there does, and leaves the
/// guard pages in place. Of what the kernel does with a hint nobody is told: it has no far pages to do anything with.
pub(crate) fn advised(address: *mut c_void, len: usize, advice: c_int, result: c_int) {
    const MADV_GUARD_INSTALL: u32 = 102;
    let Some(control) = control().filter(|_| len > 0) else {
        return;
    };
    match advice.cast_unsigned() {
        MADV_GUARD_INSTALL if result == 0 => memory::discard(address.addr(), len),
        // The kernel refuses one for want of swap, or for a gap, and the agent has no need of either.
        advice @ (hints::WILLNEED | hints::COLD | hints::PAGEOUT) if control.is_managed() => {
            control.hint(Hint {
                advice,
                from: address.addr() as u64,
                bytes: len as u64,
            });
        }
        _ => {}
    }
}

/// Where the heap ended when that was last reported.
static REPORTED_END: AtomicUsize = AtomicUsize::new(0);

/// While memory is managed: what `brk` adds to the heap is not, until the agent has looked, and raises no event. libc's
/// allocator grows it by calls that nobody can stand before, so its end is looked at after each allocation.
pub(crate) fn heap_may_have_grown() {
    let end = sys::heap_end();
    let reported = REPORTED_END.load(Ordering::Relaxed);
    if end < reported {
        REPORTED_END.store(end, Ordering::Relaxed);
    } else if end - reported >= WORTH_A_REPORT {
        REPORTED_END.store(end, Ordering::Relaxed);
        if let Some(control) = control() {
            control.report_mapping();
        }
    }
}

/// Whether `flags` of `mmap` ask for private anonymous memory.
fn is_anonymous(flags: c_int) -> bool {
    flags & (MAP_PRIVATE | MAP_ANONYMOUS) == MAP_PRIVATE | MAP_ANONYMOUS
}

fn has_failed(address: *mut c_void) -> bool {
    const MAP_FAILED: usize = usize::MAX;
    address.addr() == MAP_FAILED
}
