//! The helper: the process of ours inside a program's memory.
//!
//! It does what only that address space may do, `UFFDIO_MOVE` and, by a process beside it, `mremap`, on the agent's word, and it
//! is the dead-man switch: when the agent is gone for longer than it may be, the program is ended rather than
//! left waiting for pages that nobody will bring. It shares the program's memory, but none of its
//! descriptors, signals or locks, so nothing the program does to those reaches it.

use core::sync::atomic::Ordering;

use crate::control::{BATCH_PAGES, Batch, Control, method, outcome, staging_offset};
use crate::sys::{calls, memory};
use crate::{PAGE_BYTES, landing, unsharer};

/// Descriptor numbers in the helper.
pub(crate) mod fd {
    pub(crate) const UFFD: i32 = 0;
    pub(crate) const DRAIN_UFFD: i32 = 1;
    pub(crate) const EVENT: i32 = 2;
    pub(crate) const LIFELINE: i32 = 3;
    pub(crate) const PAGEMAP: i32 = 4;
    pub(crate) const FIRST_UNUSED: u32 = 5;
}

/// Between two looks at whether agent and program still live.
const HEARTBEAT_MS: u64 = 1000;
const ALLOW_HOLES: u64 = 2;
/// Tries at moving a page that something reads just now, before it is left in the holding range.
const DRAIN_TRIES: u32 = 1000;
pub(crate) const EAGAIN: u32 = 11;
pub(crate) const ENOENT: u32 = 2;
const EEXIST: u32 = 17;
pub(crate) const EINVAL: u32 = 22;

/// What the helper needs to know; lies in the upper half of the page at its thread pointer.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct HelperArgs {
    /// Where the shared memfd is mapped.
    pub shared: usize,
    /// The holding range.
    pub holding: usize,
    /// The drain range.
    pub drain: usize,
    /// The landing range.
    pub landing: usize,
    /// The program's uffd, as numbered in the program.
    pub uffd: i32,
    /// The drain range's uffd.
    pub drain_uffd: i32,
    /// The agent's eventfd.
    pub event: i32,
    /// The agent's lifeline socket.
    pub lifeline: i32,
    /// The program's pagemap as the agent opened it, or -1. A program that has become another user may not open its own.
    pub pagemap: i32,
    /// Where the stack of a process for one batch ends.
    pub batch_stack: usize,
    /// Where the stack of the process ends that moves to the landing range.
    pub landing_stack: usize,
    /// The thread pointer.
    pub tls: usize,
    /// The helper's own pid, once it runs.
    pub pid: i32,
}

/// Where the helper begins. `argument` is the address of its [`HelperArgs`].
pub extern "C" fn run(argument: usize) -> ! {
    let mut args = memory::args_at(argument);
    args.pid = calls::getpid();
    calls::set_name(b"farpage-helper\0\0");
    calls::setsid();
    calls::leave_directory();
    let program = calls::getppid();
    // First out of the way, above every number in use, then down to the fixed places.
    let mut high = [0i32; 4];
    for (slot, from) in high
        .iter_mut()
        .zip([args.uffd, args.drain_uffd, args.event, args.lifeline])
    {
        match calls::dup_above(from, 64) {
            Ok(fd) => *slot = fd,
            Err(_) => calls::exit(1),
        }
    }
    let pagemap = calls::dup_above(args.pagemap, 64);
    for (from, to) in high
        .into_iter()
        .zip([fd::UFFD, fd::DRAIN_UFFD, fd::EVENT, fd::LIFELINE])
    {
        if calls::dup_to(from, to).is_err() {
            calls::exit(1);
        }
    }
    if let Ok(pagemap) = pagemap.or_else(|_| calls::open_read(c"/proc/self/pagemap")) {
        let _ = calls::dup_to(pagemap, fd::PAGEMAP);
    }
    calls::close_from(fd::FIRST_UNUSED);
    serve(&args, memory::control_at(args.shared), program)
}

fn serve(args: &HelperArgs, control: &Control, program: i32) -> ! {
    // The agent may have left its mark there while it looked whose memory this is.
    empty_holding(args, 0, BATCH_PAGES);
    let mut lander = None;
    let mut last = 0u32;
    let mut told = 0u32;
    let mut alone_since = None;
    loop {
        let command = next_command(control, last, told);
        let news = control.news();
        if news != told {
            told = news;
            calls::signal_event(fd::EVENT);
        }
        match command {
            Some(command) => {
                if control.batch.method.load(Ordering::Relaxed) == method::REMAP {
                    lander = lander.or_else(|| land_batch(args, control, command));
                } else {
                    run_batch(args, control, command);
                }
                last = command;
            }
            None => {
                if control.quit.load(Ordering::Relaxed) != 0 || calls::getppid() != program {
                    calls::exit(0);
                }
                if lander.is_some_and(calls::has_ended) {
                    // With pages in hand, maybe.
                    calls::kill(program, calls::SIGKILL);
                    calls::exit(1);
                }
                if calls::peer_gone(fd::LIFELINE) {
                    let alone = calls::seconds() - *alone_since.get_or_insert_with(calls::seconds);
                    if alone >= i64::from(control.dead_man_seconds.load(Ordering::Relaxed)) {
                        calls::kill(program, calls::SIGKILL);
                        calls::exit(1);
                    }
                } else {
                    alone_since = None;
                }
            }
        }
    }
}

/// Sleeps until there is a batch or the program has news. `None` for news, and after a heartbeat without either.
fn next_command(control: &Control, last: u32, told: u32) -> Option<u32> {
    control.helper_sleeps.store(1, Ordering::SeqCst);
    let bell = control.bell.load(Ordering::SeqCst);
    if control.command.load(Ordering::SeqCst) == last && control.news() == told {
        calls::futex_wait(&control.bell, bell, HEARTBEAT_MS);
    }
    control.helper_sleeps.store(0, Ordering::SeqCst);
    let command = control.command.load(Ordering::Acquire);
    (command != last).then_some(command)
}

fn run_batch(args: &HelperArgs, control: &Control, command: u32) {
    let batch = &control.batch;
    let count = batch.count();
    if batch.method.load(Ordering::Relaxed) == method::UNSHARE_AND_MOVE {
        unsharer::run(args, control);
    }
    take_out(args, batch, count);
    taken(control, command);
    stage(args, batch, count);
    done(control, command);
}

/// From here on the agent may read events again: what was taken lies where the program cannot reach.
pub(crate) fn taken(control: &Control, command: u32) {
    control.taken.store(command, Ordering::Release);
    calls::futex_wake(&control.taken);
}

/// What was taken is in staging.
pub(crate) fn done(control: &Control, command: u32) {
    control.done.store(command, Ordering::SeqCst);
    if control.agent_sleeps.load(Ordering::SeqCst) != 0 {
        calls::signal_event(fd::EVENT);
    }
}

/// The first batch for a process beside this one, which is started for it.
fn land_batch(args: &HelperArgs, control: &Control, command: u32) -> Option<i32> {
    match landing::start(args, control, command) {
        Ok(pid) => Some(pid),
        Err(errno) => {
            set_all(&control.batch, 0, control.batch.count(), errno);
            taken(control, command);
            done(control, command);
            None
        }
    }
}

/// The first hop: out of the program's ranges, into the holding range, run by run.
fn take_out(args: &HelperArgs, batch: &Batch, count: usize) {
    if !is_holding_empty(args, count) {
        // A page left over would be taken for one that was moved.
        empty_holding(args, 0, count);
        if !is_holding_empty(args, count) {
            set_all(batch, 0, count, EAGAIN);
            return;
        }
    }
    let mut index = 0;
    while index < count {
        let start = page(batch, index);
        let len = run_len(batch, index, count);
        index += take_run(args, batch, index, start, len);
    }
}

/// Moves a run; returns how many of its pages now have an outcome (all of them, or up to and including the
/// first that would not move).
fn take_run(args: &HelperArgs, batch: &Batch, index: usize, start: usize, len: usize) -> usize {
    match why_unmanaged(start, len) {
        None => {}
        // It may cross from one mapping to the next.
        Some(ENOENT) if len > 1 => return take_run(args, batch, index, start, 1),
        Some(ENOENT) => {
            set(batch, index, outcome::UNMANAGED);
            return 1;
        }
        Some(errno) => {
            set_all(batch, index, len, errno);
            return len;
        }
    }
    let to = args.holding + index * PAGE_BYTES;
    let (moved, error) = move_pages(fd::UFFD, to, start, len, 0);
    set_all(batch, index, moved, outcome::TAKEN);
    let Some(errno) = error else { return len };
    if errno == EAGAIN {
        // An event waits to be read: nothing more will move until it is.
        set_all(batch, index + moved, len - moved, EAGAIN);
        return len;
    }
    let at = moved * PAGE_BYTES;
    set(
        batch,
        index + moved,
        take_refused(args, index + moved, start + at, errno),
    );
    moved + 1
}

/// Whether all of a run is under the program's uffd, which `UFFDIO_MOVE` does not ask: none if so, else ENOENT, or EAGAIN while an
/// event is unread. What the program maps anew where the agent is just registering something older may not be. The answer stays
/// true until the batch is over. It must be asked in a way that puts nothing there: what the kernel has moved already, without
/// having said so ([`has_moved`]), would have something in its place.
fn why_unmanaged(start: usize, len: usize) -> Option<u32> {
    memory::lift_protection(fd::UFFD, start, len * PAGE_BYTES).err()
}

/// What becomes of a page that the kernel says it did not move.
fn take_refused(args: &HelperArgs, index: usize, page: usize, errno: u32) -> u32 {
    if has_moved(args, index, page) {
        return outcome::TAKEN;
    }
    if !matches!(errno, EEXIST | EINVAL) {
        return errno;
    }
    // Somebody's mlockall has filled or locked our range: empty it and try once more. Or the run crosses from one
    // mapping to the next, which the kernel does not take; a page alone it does.
    empty_holding(args, index, 1);
    match move_pages(fd::UFFD, args.holding + index * PAGE_BYTES, page, 1, 0) {
        (_, None) => outcome::TAKEN,
        (_, Some(_)) if has_moved(args, index, page) => outcome::TAKEN,
        (_, Some(errno)) => errno,
    }
}

/// Whether a page that the kernel says it did not move has left its place and lies in the holding range. Kernels from
/// 6.17 on, until they forget the EAGAIN of a try that they repeat themselves, try to move such a page twice and say
/// EEXIST, of the page that they have just put there.
fn has_moved(args: &HelperArgs, index: usize, page: usize) -> bool {
    let (mut here, mut there) = ([0], [0]);
    calls::residency(page, &mut here);
    calls::residency(args.holding + index * PAGE_BYTES, &mut there);
    here == [0] && there != [0]
}

fn is_holding_empty(args: &HelperArgs, count: usize) -> bool {
    let mut resident = [0; BATCH_PAGES];
    let resident = resident.get_mut(..count).unwrap_or_default();
    calls::residency(args.holding, resident);
    resident.iter().all(|page| *page == 0)
}

/// Copies what was taken to staging and drops it by way of the drain range.
fn stage(args: &HelperArgs, batch: &Batch, count: usize) {
    let area = batch.area();
    for_each_taken(batch, count, |index, len| {
        let from = args.holding + index * PAGE_BYTES;
        memory::copy_to_staging(from, args.shared + staging_offset(area, index), len);
        empty_holding(args, index, len);
    });
}

/// Calls `with` for each run of places that were taken, with its first and how many.
pub(crate) fn for_each_taken(batch: &Batch, count: usize, mut with: impl FnMut(usize, usize)) {
    let mut index = 0;
    while index < count {
        let mut len = 0;
        while index + len < count && is_taken(batch, index + len) {
            len += 1;
        }
        if len > 0 {
            with(index, len);
        }
        index += len.max(1);
    }
}

/// Drops pages of the holding range by way of the drain range: a drop in the holding range itself would
/// raise an event of its own and stop every ioctl until that is read.
fn empty_holding(args: &HelperArgs, index: usize, len: usize) {
    let (from, to) = (
        args.holding + index * PAGE_BYTES,
        args.drain + index * PAGE_BYTES,
    );
    let mut done = 0;
    for _ in 0..DRAIN_TRIES {
        let (moved, error) = move_pages(
            fd::DRAIN_UFFD,
            to + done * PAGE_BYTES,
            from + done * PAGE_BYTES,
            len - done,
            ALLOW_HOLES,
        );
        done += moved;
        match error {
            None => break,
            Some(EINVAL | EEXIST) => {
                memory::unlock(from, len * PAGE_BYTES);
                memory::unlock(to, len * PAGE_BYTES);
                memory::drop_drained(to, len * PAGE_BYTES);
            }
            Some(_) => core::hint::spin_loop(),
        }
    }
    memory::drop_drained(to, len * PAGE_BYTES);
}

/// Moves pages; returns how many went and what stopped the next.
fn move_pages(uffd: i32, to: usize, from: usize, pages: usize, mode: u64) -> (usize, Option<u32>) {
    let mut moved = 0;
    while moved < pages {
        let at = moved * PAGE_BYTES;
        match memory::move_ioctl(uffd, to + at, from + at, (pages - moved) * PAGE_BYTES, mode) {
            (_, None) => return (pages, None),
            // After a part of the way the kernel says EAGAIN, whatever stopped it: the next call tells.
            (bytes, Some(_)) if bytes > 0 => moved += bytes / PAGE_BYTES,
            (_, Some(errno)) => return (moved, Some(errno)),
        }
    }
    (moved, None)
}

/// How many pages of a batch, from one on, lie one behind the other in the program's memory.
pub(crate) fn run_len(batch: &Batch, index: usize, count: usize) -> usize {
    let start = page(batch, index);
    let mut len = 1;
    while index + len < count && page(batch, index + len) == start + len * PAGE_BYTES {
        len += 1;
    }
    len
}

pub(crate) fn page(batch: &Batch, index: usize) -> usize {
    batch
        .pages
        .get(index)
        .map_or(0, |word| word.load(Ordering::Relaxed) as usize)
}

fn is_taken(batch: &Batch, index: usize) -> bool {
    batch
        .outcomes
        .get(index)
        .map(|word| word.load(Ordering::Relaxed))
        .is_some_and(|word| matches!(word, outcome::TAKEN | outcome::REPLACED))
}

pub(crate) fn set(batch: &Batch, index: usize, value: u32) {
    if let Some(word) = batch.outcomes.get(index) {
        word.store(value, Ordering::Relaxed);
    }
}

pub(crate) fn set_all(batch: &Batch, index: usize, len: usize, value: u32) {
    for i in index..index + len {
        set(batch, i, value);
    }
}
