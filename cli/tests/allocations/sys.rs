//! An allocator that counts, by thread.

#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

/// The system's allocator, and how often each thread has asked it for memory.
pub(crate) struct Counting;

/// Threads whose numbers are equal in their last bits share a count; a test has few.
const COUNTS: usize = 1 << 12;
static ASKED: [AtomicU64; COUNTS] = [const { AtomicU64::new(0) }; COUNTS];

fn count(thread: usize) -> &'static AtomicU64 {
    &ASKED[thread % COUNTS]
}

fn note() {
    // SAFETY: it takes and changes nothing.
    let thread = unsafe { libc::gettid() };
    count(thread.unsigned_abs() as usize).fetch_add(1, Ordering::Relaxed);
}

/// How often a thread has asked for memory.
pub(crate) fn asked(thread: u32) -> u64 {
    count(thread as usize).load(Ordering::Relaxed)
}

// SAFETY: everything is the system allocator's answer to the caller's own words; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, size) }
    }
}
