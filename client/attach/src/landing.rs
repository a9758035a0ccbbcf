//! The landing range: where the helper moves what `UFFDIO_MOVE` cannot, by `mremap` with `MREMAP_DONTUNMAP`.
//!
//! That leaves the mapping in its place, empty, and takes what is in it just then, at once: nothing that is written later can be
//! lost by it, as with a copy and `MADV_DONTNEED`, which drops whatever is there when the agent has read its event. It asks
//! nothing, though. So each run is write-protected first, which the kernel refuses while an event of the program's is unread and
//! where the mapping is not managed, and which tells afterwards whether the pages that came are those. The call raises an event
//! and comes back when the agent has read it, which is when the agent knows that nothing else is being moved (the pager's
//! `between`).
//!
//! So it is not the helper itself that calls, which has to see when the agent is gone for good, but a process beside it: started
//! for the first batch of this kind, it ends with the helper.

use core::sync::atomic::Ordering;

use crate::PAGE_BYTES;
use crate::control::{BATCH_PAGES, Batch, Control, outcome, staging_offset};
use crate::helper::{
    EAGAIN, EINVAL, ENOENT, HelperArgs, done, fd, for_each_taken, page, run_len, set, set_all,
    taken,
};
use crate::sys::{calls, memory};

/// Bytes of the range.
pub const BYTES: usize = BATCH_PAGES * PAGE_BYTES;

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const PROTECTED: u64 = 1 << 57;

const EIO: u32 = 5;

/// Between two looks for a batch, when none was told of.
const LOOK_MS: u64 = 10_000;

/// Starts the process beside the helper, for its first batch. Returns its pid.
///
/// # Errors
/// The kernel's errno.
pub(crate) fn start(args: &HelperArgs, control: &Control, command: u32) -> Result<i32, u32> {
    control.landing_command.store(command, Ordering::Release);
    memory::start_for_landing(main, args).map_err(|errno| errno.0)
}

/// Where it begins. `argument` is the address of the helper's [`HelperArgs`].
extern "C" fn main(argument: usize) -> ! {
    let args = memory::args_at(argument);
    calls::end_with_parent(args.pid);
    let control = memory::control_at(args.shared);
    // It is started for a batch that is handed over and not done.
    let mut last = control.done.load(Ordering::Acquire);
    control.lander.store(1, Ordering::Release);
    loop {
        let command = control.landing_command.load(Ordering::Acquire);
        if command == last {
            calls::futex_wait(&control.landing_command, last, LOOK_MS);
            continue;
        }
        run_batch(&args, control, command);
        last = command;
    }
}

fn run_batch(args: &HelperArgs, control: &Control, command: u32) {
    let batch = &control.batch;
    let count = batch.count();
    take_out(args, control, command, count);
    taken(control, command);
    stage(args, batch, count);
    done(control, command);
}

/// Moves the pages of the batch to the landing range, run by run, and notes what became of each.
fn take_out(args: &HelperArgs, control: &Control, command: u32, count: usize) {
    let batch = &control.batch;
    if calls::pagemap_words(fd::PAGEMAP, args.landing, &mut [0]) != Ok(1) {
        // What comes could not be told from what was chosen.
        return set_all(batch, 0, count, EAGAIN);
    }
    let mut index = 0;
    while index < count {
        let len = run_len(batch, index, count);
        take_in_parts(args, control, command, index, len);
        index += len;
    }
}

/// Moves a run, in parts where it cannot be moved whole: it may cross from one mapping to the next. Page by page each would cost
/// a turn of the agent's.
fn take_in_parts(args: &HelperArgs, control: &Control, command: u32, index: usize, len: usize) {
    let (mut at, end, mut most) = (index, index + len, len);
    while at < end {
        let len = most.min(end - at);
        if take_run(args, control, command, at, len) {
            at += len;
            most = 2 * len;
        } else {
            most = len / 2;
        }
    }
}

/// Moves a run. Returns false where parts of it are to be tried; never of one page.
fn take_run(args: &HelperArgs, control: &Control, command: u32, index: usize, len: usize) -> bool {
    let batch = &control.batch;
    let (start, bytes) = (page(batch, index), len * PAGE_BYTES);
    let errno = if control.given_up.load(Ordering::Acquire) == command {
        EAGAIN
    } else if let Err(errno) = memory::protect(fd::UFFD, start, bytes) {
        match errno {
            ENOENT if len > 1 => return false,
            ENOENT => outcome::UNMANAGED,
            errno => errno,
        }
    } else if memory::is_locked(start, bytes) {
        match len {
            1 => EINVAL,
            _ => return false,
        }
    } else {
        match move_run(args, control, command, index, len) {
            Ok(()) => return true,
            Err(errno) if errno != EAGAIN && len > 1 => return false,
            Err(errno) => errno,
        }
    };
    set_all(batch, index, len, errno);
    true
}

/// The call itself, with the agent told of it. Notes what became of the pages if it did anything.
fn move_run(
    args: &HelperArgs,
    control: &Control,
    command: u32,
    index: usize,
    len: usize,
) -> Result<(), u32> {
    let (from, bytes) = (page(&control.batch, index), len * PAGE_BYTES);
    let to = args.landing + index * PAGE_BYTES;
    let run = index as u32 | (len as u32) << 16;
    control.remap_run.store(run, Ordering::Relaxed);
    let call = control.remaps_begun.fetch_add(1, Ordering::SeqCst);
    let call = call.wrapping_add(1);
    // Either this is seen here, or the agent sees that something is being moved.
    let moved = match control.given_up.load(Ordering::SeqCst) == command {
        true => Err(EAGAIN),
        false => memory::remap(from, bytes, to),
    };
    match moved {
        Err(_) => {
            // Some kernels move one mapping before they find the next to be another,
            move_back_what_came(to, from, len);
            // and some have unmapped it by then.
            memory::keep_range(to, bytes);
        }
        // No event was waited for: the program has put something there that is not managed, in a call that waits to be read of.
        Ok(()) if control.remap_read_in.load(Ordering::SeqCst) != call => {
            memory::move_back(to, bytes, from);
            memory::keep_range(to, bytes);
            set_all(&control.batch, index, len, outcome::UNMANAGED);
        }
        Ok(()) => note_what_came(&control.batch, to, index, len),
    }
    control.remaps_over.fetch_add(1, Ordering::SeqCst);
    moved
}

/// After a call that has failed.
fn move_back_what_came(at: usize, to: usize, len: usize) {
    let mut words = [0; BATCH_PAGES];
    let words = words.get_mut(..len).unwrap_or_default();
    let read = calls::pagemap_words(fd::PAGEMAP, at, words).unwrap_or(0);
    for (i, word) in words.iter().enumerate().take(read) {
        if word & (PRESENT | SWAPPED) != 0 {
            memory::move_back(at + i * PAGE_BYTES, PAGE_BYTES, to + i * PAGE_BYTES);
        }
    }
}

/// What is protected is what was chosen. What was not there any more has not come.
fn note_what_came(batch: &Batch, at: usize, index: usize, len: usize) {
    let mut words = [0; BATCH_PAGES];
    let words = words.get_mut(..len).unwrap_or_default();
    let read = calls::pagemap_words(fd::PAGEMAP, at, words);
    for (i, word) in words.iter().enumerate() {
        let what = match read {
            Ok(read) if i >= read || word & (PRESENT | SWAPPED) == 0 => ENOENT,
            Ok(_) if word & PROTECTED == 0 => outcome::REPLACED,
            _ => outcome::TAKEN,
        };
        set(batch, index + i, what);
    }
}

/// Copies what was taken to staging and clears the landing range. Its mappings are still under the program's uffd: nothing may
/// be touched or unmapped there before they are not.
fn stage(args: &HelperArgs, batch: &Batch, count: usize) {
    let (area, pid) = (batch.area(), calls::getpid());
    memory::unregister(fd::UFFD, args.landing, BYTES);
    for_each_taken(batch, count, |index, len| {
        let from = args.landing + index * PAGE_BYTES;
        let to = args.shared + staging_offset(area, index);
        memory::make_readable(from, len * PAGE_BYTES);
        let mut done = 0;
        while done < len {
            let at = done * PAGE_BYTES;
            done += memory::copy_as_the_kernel(pid, from + at, to + at, len - done);
            if done < len {
                // It has failed, as memory does.
                set(batch, index + done, EIO);
                done += 1;
            }
        }
    });
    memory::clear_range(args.landing, BYTES);
}
