//! The dropper: a process that lives for one batch, and drops pages which the agent has write-protected and copied.
//!
//! `MADV_DONTNEED` tells the agent of it, waits until that has been read, and only then drops what is there by then. Had the
//! program been let go on meanwhile, it might have mapped something else in the same place, and written to it. So the agent
//! reads nothing before the dropper waits, and looks first whether the pages are what it has copied. Where they are not, the
//! program has done something that the agent would have to read before, and may not. Nothing takes such a call back, but
//! SIGKILL ends its waiting: it drops what is there while the program waits yet, when nothing of value can be. A dropper may be
//! lost in that way; the helper may not, and waits for it.

use core::sync::atomic::Ordering;

use crate::PAGE_BYTES;
use crate::control::{BATCH_PAGES, Batch, Control, outcome};
use crate::helper::{EAGAIN, HelperArgs, fd, page, run_len, set};
use crate::sys::{calls, memory};

const PAGEMAP_UFFD_WP: u64 = 1 << 57;
const ENOENT: u32 = 2;

/// Has a dropper drop the first pages of the batch, and waits for its end.
pub(crate) fn run(args: &HelperArgs, control: &Control, count: usize) {
    match memory::start_for_batch(main, args) {
        Ok(pid) => calls::reap_clone(pid),
        Err(errno) => give_back(&control.batch, count, errno.0),
    }
    // If it was ended while it waited.
    let begun = control.drops_begun.load(Ordering::Relaxed);
    control.drops_over.store(begun, Ordering::Release);
    give_back(&control.batch, count, EAGAIN);
}

/// What was not looked at stays.
fn give_back(batch: &Batch, count: usize, errno: u32) {
    for index in 0..count {
        if outcome_of(batch, index) == outcome::PENDING {
            set(batch, index, errno);
        }
    }
}

/// Where the dropper begins. `argument` is the address of the helper's [`HelperArgs`].
extern "C" fn main(argument: usize) -> ! {
    let args = memory::args_at(argument);
    calls::end_with_parent(args.pid);
    let control = memory::control_at(args.shared);
    control
        .dropper
        .store(calls::getpid().unsigned_abs(), Ordering::Release);
    drop_protected(control);
    calls::exit(0);
}

/// Drops what is still protected, run by run, since each drop waits for the agent to read its event.
fn drop_protected(control: &Control) {
    let batch = &control.batch;
    let count = (batch.count.load(Ordering::Relaxed) as usize).min(BATCH_PAGES);
    let mut index = 0;
    while index < count {
        let (start, len) = (page(batch, index), run_len(batch, index, count));
        if protected_pages(start, len) < len {
            for i in index..index + len {
                drop_run(control, i, 1);
            }
        } else if !drop_run(control, index, len) {
            // It came as far as the first mapping that the kernel keeps it out of.
            let dropped = unprotected_pages(start, len);
            for i in index..index + dropped {
                set(batch, i, outcome::TAKEN);
            }
            for i in index + dropped..index + len {
                drop_run(control, i, 1);
            }
        }
        index += len;
    }
}

/// Drops some pages of the batch if they are still protected and nothing that changes them has been read, and notes what became
/// of them. Returns whether it dropped them.
fn drop_run(control: &Control, index: usize, len: usize) -> bool {
    let batch = &control.batch;
    let start = page(batch, index);
    let command = control.command.load(Ordering::Relaxed);
    let dropped = if control.give_up.load(Ordering::Acquire) == command {
        Err(EAGAIN)
    } else if protected_pages(start, len) == len {
        set_all(batch, index, len, outcome::DROPPING);
        control.drops_begun.fetch_add(1, Ordering::AcqRel);
        let dropped = memory::drop_pages(start, len * PAGE_BYTES);
        control.drops_over.fetch_add(1, Ordering::AcqRel);
        dropped.map_err(|errno| errno.0)
    } else {
        Err(ENOENT)
    };
    set_all(batch, index, len, dropped.err().unwrap_or(outcome::TAKEN));
    dropped.is_ok()
}

fn set_all(batch: &Batch, index: usize, len: usize, value: u32) {
    for i in index..index + len {
        set(batch, i, value);
    }
}

/// How many pages from `start` on, of `len`, are write-protected, up to the first that is not.
fn protected_pages(start: usize, len: usize) -> usize {
    leading(start, len, |word| word & PAGEMAP_UFFD_WP != 0)
}

/// How many are not, up to the first that is.
fn unprotected_pages(start: usize, len: usize) -> usize {
    leading(start, len, |word| word & PAGEMAP_UFFD_WP == 0)
}

fn leading(start: usize, len: usize, holds: impl Fn(u64) -> bool) -> usize {
    let mut words = [0; BATCH_PAGES];
    let words = words.get_mut(..len).unwrap_or_default();
    let read = calls::pagemap_words(fd::PAGEMAP, start, words).unwrap_or(0);
    words
        .iter()
        .take(read)
        .take_while(|word| holds(**word))
        .count()
}

fn outcome_of(batch: &Batch, index: usize) -> u32 {
    batch
        .outcomes
        .get(index)
        .map_or(outcome::TAKEN, |word| word.load(Ordering::Relaxed))
}
