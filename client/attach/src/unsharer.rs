//! The unsharer: a process that lives for one batch, and makes pages exclusive which a fork has left shared.
//!
//! It has to write to them, so to say, and waits like anybody who touches a page that is not there. The agent answers nobody
//! before the batch's moves are over. A page that has just gone, moved by `mremap` or reclaimed after `MADV_FREE`, would thus
//! have the helper wait for the agent and the agent for the helper; so it is another process that touches it, and that is
//! ended if it does not come back soon.

use core::sync::atomic::Ordering;

use crate::PAGE_BYTES;
use crate::control::{BATCH_PAGES, Control};
use crate::helper::{HelperArgs, page, run_len};
use crate::sys::{calls, memory};

/// How long it may take over a batch: for copying 64 pages, on a busy machine, and under a debugger's eyes.
const DEADLINE_MS: u64 = 100;

/// Has an unsharer make the pages of the batch exclusive, as far as it can, and waits for its end.
pub(crate) fn run(args: &HelperArgs, control: &Control) {
    let command = control.command.load(Ordering::Relaxed);
    let unshared = control.unshared.load(Ordering::Relaxed);
    let Ok(pid) = memory::start_for_batch(main, args) else {
        return;
    };
    calls::futex_wait(&control.unshared, unshared, DEADLINE_MS);
    if control.unshared.load(Ordering::Acquire) != command {
        calls::kill(pid, calls::SIGKILL);
    }
    calls::reap_clone(pid);
}

/// Where it begins. `argument` is the address of the helper's [`HelperArgs`].
extern "C" fn main(argument: usize) -> ! {
    let args = memory::args_at(argument);
    calls::end_with_parent(args.pid);
    let control = memory::control_at(args.shared);
    let batch = &control.batch;
    let count = batch.count();
    let mut index = 0;
    while index < count {
        let (start, len) = (page(batch, index), run_len(batch, index, count));
        if is_resident(start, len) {
            memory::make_exclusive(start, len * PAGE_BYTES);
        }
        index += len;
    }
    let command = control.command.load(Ordering::Relaxed);
    control.unshared.store(command, Ordering::Release);
    calls::futex_wake(&control.unshared);
    calls::exit(0);
}

/// Whether all of a run is in its place. What is seen not to be there is not waited for.
fn is_resident(start: usize, len: usize) -> bool {
    let mut resident = [0; BATCH_PAGES];
    let resident = resident.get_mut(..len).unwrap_or_default();
    calls::residency(start, resident);
    resident.iter().all(|page| *page != 0)
}
