//! The helper's hands: what it does to memory, its own ranges' and the program's.

use core::arch::asm;

use linux_raw_sys::general as k;

use super::calls::{Errno, raw};
use crate::PAGE_BYTES;
use crate::control::Control;
use crate::helper::HelperArgs;

const UFFDIO_MOVE: usize = 0xc028_aa05;
const UFFDIO_WRITEPROTECT: usize = 0xc018_aa06;
const UFFDIO_UNREGISTER: usize = 0x8010_aa01;
const MADV_COLD: usize = 20;
const MADV_POPULATE_READ: usize = 22;
const MADV_POPULATE_WRITE: usize = 23;

fn call(number: u32, args: [usize; 6]) -> Result<usize, Errno> {
    // SAFETY: the uses in this file pass ranges that are ours, or that the agent has chosen under its gate,
    // and pointers to live locals.
    let result = unsafe { raw(number, args) };
    if result < 0 {
        Err(Errno(result.unsigned_abs() as u32))
    } else {
        Ok(result as usize)
    }
}

/// Copies out the helper's arguments from where [`write_args`] or [`start_for_batch`] have them.
#[must_use]
pub fn args_at(address: usize) -> HelperArgs {
    // SAFETY: a HelperArgs was there before the clone, and stays: in the page at the helper's thread pointer, or on the stack
    // of the helper, which its processes do not outlive.
    unsafe { core::ptr::read(address as *const HelperArgs) }
}

/// Puts the helper's arguments where it finds them.
pub fn write_args(address: usize, args: HelperArgs) {
    // SAFETY: `attach` passes an aligned place in the upper half of the page that it has just mapped for the thread pointer, which has
    // room for this.
    unsafe { core::ptr::write(address as *mut HelperArgs, args) }
}

/// The control block at the front of the shared mapping.
#[must_use]
pub fn control_at(address: usize) -> &'static Control {
    // SAFETY: `attach` passes the start of a mapping of SHARED_BYTES that stays for the life of the program
    // image; every field is an atomic, for which all bit patterns are values.
    unsafe { &*(address as *const Control) }
}

/// Copies pages to staging without calling `memcpy`, which might be somebody's interposed one.
pub fn copy_to_staging(from: usize, to: usize, pages: usize) {
    // SAFETY: `from` is in the holding or the landing range, where these pages have just been moved and only this process
    // takes them away; `to` is in the shared mapping; they do not overlap; the ABI keeps the direction clear.
    unsafe {
        asm!(
            "rep movsb",
            inout("rcx") pages * PAGE_BYTES => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags),
        );
    }
}

/// The same by the kernel, to which memory protection keys are nothing and bad memory is no signal; `pid` is the caller's. Returns
/// how many pages came before one that could not be read.
#[must_use]
pub fn copy_as_the_kernel(pid: i32, from: usize, to: usize, pages: usize) -> usize {
    const EPERM: u32 = 1;
    const ENOSYS: u32 = 38;
    let len = pages * PAGE_BYTES;
    let [local, remote] = [[to, len], [from, len]];
    let (local, remote) = (local.as_ptr() as usize, remote.as_ptr() as usize);
    match call(
        k::__NR_process_vm_readv,
        [pid as usize, local, 1, remote, 1, 0],
    ) {
        Ok(bytes) => bytes / PAGE_BYTES,
        // Where a container does not let anybody have it.
        Err(Errno(EPERM | ENOSYS)) => {
            copy_to_staging(from, to, pages);
            pages
        }
        Err(_) => 0,
    }
}

/// `UFFDIO_MOVE`: returns the bytes moved and, unless that is all of them, the errno.
pub fn move_ioctl(
    uffd: i32,
    to: usize,
    from: usize,
    len: usize,
    mode: u64,
) -> (usize, Option<u32>) {
    let mut request = k::uffdio_move {
        dst: to as u64,
        src: from as u64,
        len: len as u64,
        mode,
        move_: 0,
    };
    let pointer = core::ptr::from_mut(&mut request) as usize;
    match call(
        k::__NR_ioctl,
        [uffd as usize, UFFDIO_MOVE, pointer, 0, 0, 0],
    ) {
        Ok(_) => (len, None),
        Err(errno) => (usize::try_from(request.move_).unwrap_or(0), Some(errno.0)),
    }
}

/// `UFFDIO_WRITEPROTECT`, which lifts protection of pages that have none, and wakes nobody: asked for its answer.
///
/// # Errors
/// The kernel's errno: ENOENT where a mapping is not under that uffd, EAGAIN while an event is unread.
pub fn lift_protection(uffd: i32, at: usize, len: usize) -> Result<(), u32> {
    const DONTWAKE: u64 = 1 << 1;
    write_protect(uffd, at, len, DONTWAKE)
}

/// Write-protects pages.
///
/// # Errors
/// As [`lift_protection`].
pub fn protect(uffd: i32, at: usize, len: usize) -> Result<(), u32> {
    const PROTECT: u64 = 1;
    write_protect(uffd, at, len, PROTECT)
}

fn write_protect(uffd: i32, at: usize, len: usize, mode: u64) -> Result<(), u32> {
    let mut request = k::uffdio_writeprotect {
        range: uffd_range(at, len),
        mode,
    };
    let pointer = core::ptr::from_mut(&mut request) as usize;
    call(
        k::__NR_ioctl,
        [uffd as usize, UFFDIO_WRITEPROTECT, pointer, 0, 0, 0],
    )
    .map(drop)
    .map_err(|errno| errno.0)
}

fn uffd_range(at: usize, len: usize) -> k::uffdio_range {
    k::uffdio_range {
        start: at as u64,
        len: len as u64,
    }
}

/// Takes a range of ours from under a uffd.
pub fn unregister(uffd: i32, at: usize, len: usize) {
    let mut range = uffd_range(at, len);
    let pointer = core::ptr::from_mut(&mut range) as usize;
    let _ = call(
        k::__NR_ioctl,
        [uffd as usize, UFFDIO_UNREGISTER, pointer, 0, 0, 0],
    );
}

/// Whether memory is locked: the kernel then takes no advice that it is not needed soon.
#[must_use]
pub fn is_locked(at: usize, len: usize) -> bool {
    const EINVAL: u32 = 22;
    call(k::__NR_madvise, [at, len, MADV_COLD, 0, 0, 0]) == Err(Errno(EINVAL))
}

/// Moves pages of the program's to a range of ours, and leaves their mapping where it is. Blocks until the agent has read its
/// event.
///
/// # Errors
/// The kernel's errno; what was mapped at `to` may be gone.
pub fn remap(from: usize, len: usize, to: usize) -> Result<(), u32> {
    let flags = k::MREMAP_MAYMOVE | k::MREMAP_FIXED | k::MREMAP_DONTUNMAP;
    call(k::__NR_mremap, [from, len, len, flags as usize, to, 0])
        .map(drop)
        .map_err(|errno| errno.0)
}

/// Moves pages back to where they were taken from, and the mapping that they were in.
pub fn move_back(from: usize, len: usize, to: usize) {
    let flags = k::MREMAP_MAYMOVE | k::MREMAP_FIXED;
    let _ = call(k::__NR_mremap, [from, len, len, flags as usize, to, 0]);
}

/// Keeps a range of ours from others where nothing is mapped any more.
pub fn keep_range(at: usize, len: usize) {
    map_nothing(at, len, k::MAP_FIXED_NOREPLACE);
}

/// Unmaps what has come to a range of ours, and keeps it.
pub fn clear_range(at: usize, len: usize) {
    map_nothing(at, len, k::MAP_FIXED);
    // No child needs it.
    advise_own(at, len, k::MADV_DONTFORK);
}

fn map_nothing(at: usize, len: usize, fixed: u32) {
    let flags = k::MAP_PRIVATE | k::MAP_ANONYMOUS | k::MAP_NORESERVE | fixed;
    let _ = super::calls::mmap_at(at, len, k::PROT_NONE, flags, -1);
}

/// Makes what lies in a range of ours readable, whatever it was to the program.
pub fn make_readable(at: usize, len: usize) {
    let _ = call(k::__NR_mprotect, [at, len, k::PROT_READ as usize, 0, 0, 0]);
}

/// Makes pages that a fork left shared exclusive again, with their contents kept.
pub fn make_exclusive(address: usize, len: usize) {
    let _ = call(
        k::__NR_madvise,
        [address, len, MADV_POPULATE_WRITE, 0, 0, 0],
    );
}

/// Fills a mapping that the program has just made and asked to be filled, as far as the kernel can (5.14 or newer).
pub fn populate(address: usize, len: usize, write: bool) {
    let advice = if write {
        MADV_POPULATE_WRITE
    } else {
        MADV_POPULATE_READ
    };
    let _ = call(k::__NR_madvise, [address, len, advice, 0, 0, 0]);
}

/// Drops pages of the drain range.
pub fn drop_drained(address: usize, len: usize) {
    let _ = call(
        k::__NR_madvise,
        [address, len, k::MADV_DONTNEED as usize, 0, 0, 0],
    );
}

/// Discards pages of the program's for it. Blocks until the agent has read of it.
pub fn discard(address: usize, len: usize) {
    let _ = call(
        k::__NR_madvise,
        [address, len, k::MADV_DONTNEED as usize, 0, 0, 0],
    );
}

/// Undoes a lock that an `mlockall` of the program's put on a range of ours.
pub fn unlock(address: usize, len: usize) {
    let _ = call(k::__NR_munlock, [address, len, 0, 0, 0, 0]);
}

/// Advice for a range of ours: DONTFORK, DONTDUMP, NOHUGEPAGE.
pub fn advise_own(address: usize, len: usize, advice: u32) {
    let _ = call(k::__NR_madvise, [address, len, advice as usize, 0, 0, 0]);
}

/// Unmaps a mapping of ours that nothing uses any more.
pub fn unmap_own(address: usize, len: usize) {
    let _ = call(k::__NR_munmap, [address, len, 0, 0, 0, 0]);
}

/// Starts the helper on the stack that ends at `stack_top`, with the page at `tls` as its thread pointer.
///
/// # Errors
/// The kernel's errno.
pub fn start_helper(args_address: usize, stack_top: usize, tls: usize) -> Result<i32, Errno> {
    // SAFETY: `attach` has mapped stack and TLS page for this helper alone, and `helper::run` never returns
    // and uses only raw system calls.
    unsafe { super::clone::start(crate::helper::run, args_address, stack_top, tls) }
}

/// Starts a process for the batch under way, which the helper waits for.
///
/// # Errors
/// The kernel's errno.
pub fn start_for_batch(main: extern "C" fn(usize) -> !, args: &HelperArgs) -> Result<i32, Errno> {
    start_beside(main, args, args.batch_stack)
}

/// Starts the process that moves to the landing range, of which the helper has one.
///
/// # Errors
/// The kernel's errno.
pub fn start_for_landing(main: extern "C" fn(usize) -> !, args: &HelperArgs) -> Result<i32, Errno> {
    start_beside(main, args, args.landing_stack)
}

fn start_beside(
    main: extern "C" fn(usize) -> !,
    args: &HelperArgs,
    stack: usize,
) -> Result<i32, Errno> {
    let argument = core::ptr::from_ref(args) as usize;
    // SAFETY: `attach` has mapped that stack for the one such process at a time that there is. It dies with the helper, whose
    // thread pointer it shares and on whose stack the arguments stay. `unsharer::main` and `landing::main` never return, and use
    // only raw system calls.
    unsafe { super::clone::start(main, argument, stack, args.tls) }
}
