//! System calls, made directly: no libc, no errno, nothing of the program's touched.

use core::arch::asm;
use core::sync::atomic::AtomicU32;

use linux_raw_sys::general as k;

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("farpage-attach speaks to Linux on x86-64 only");

/// An error number of the kernel's, positive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub u32);

fn check(result: isize) -> Result<usize, Errno> {
    if (-4095..0).contains(&result) {
        Err(Errno(result.unsigned_abs() as u32))
    } else {
        Ok(result as usize)
    }
}

/// A system call of up to six arguments.
///
/// # Safety
/// The arguments must be valid for that call as the kernel's manual states; pointers must outlive it.
#[inline]
pub unsafe fn raw(number: u32, args: [usize; 6]) -> isize {
    let result: isize;
    // SAFETY: the x86-64 system call convention: number in rax, arguments in rdi rsi rdx r10 r8 r9, rcx and
    // r11 clobbered. What the call itself does is the caller's promise.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") args[0],
            in("rsi") args[1],
            in("rdx") args[2],
            in("r10") args[3],
            in("r8") args[4],
            in("r9") args[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

macro_rules! call {
    ($number:expr $(, $arg:expr)*) => {{
        let mut args = [0usize; 6];
        let given = [$($arg as usize),*];
        let mut i = 0;
        while i < given.len() { args[i] = given[i]; i += 1; }
        // SAFETY: every use below passes integers, or pointers to live values of the type that the kernel
        // expects at that place.
        check(unsafe { raw($number, args) })
    }};
}

/// Maps memory.
///
/// # Errors
/// The kernel's errno, ENOMEM when an address-space limit forbids it.
pub fn mmap(len: usize, prot: u32, flags: u32, fd: i32) -> Result<usize, Errno> {
    mmap_at(0, len, prot, flags, fd)
}

/// Maps memory at an address, or near it unless `flags` have it fixed.
///
/// # Errors
/// The kernel's errno, ENOMEM when an address-space limit forbids it.
pub fn mmap_at(address: usize, len: usize, prot: u32, flags: u32, fd: i32) -> Result<usize, Errno> {
    call!(k::__NR_mmap, address, len, prot, flags, fd as isize, 0usize)
}

/// A random number, `None` where the kernel gives none at once.
#[must_use]
pub fn random() -> Option<u64> {
    let mut bytes = [0u8; 8];
    let got = call!(
        k::__NR_getrandom,
        bytes.as_mut_ptr(),
        bytes.len(),
        k::GRND_NONBLOCK
    );
    matches!(got, Ok(8)).then(|| u64::from_ne_bytes(bytes))
}

/// `USERFAULTFD_IOC_NEW` on an open `/dev/userfaultfd`: a new uffd of the calling address space.
///
/// # Errors
/// The kernel's errno.
pub fn new_uffd(device: i32) -> Result<i32, Errno> {
    const USERFAULTFD_IOC_NEW: u32 = 0xaa00;
    call!(
        k::__NR_ioctl,
        device as isize,
        USERFAULTFD_IOC_NEW,
        k::O_CLOEXEC | k::O_NONBLOCK
    )
    .map(|fd| fd as i32)
}

/// Closes a descriptor.
pub fn close(fd: i32) {
    let _ = call!(k::__NR_close, fd as isize);
}

/// Duplicates `from` to exactly `to`.
///
/// # Errors
/// The kernel's errno.
pub fn dup_to(from: i32, to: i32) -> Result<(), Errno> {
    call!(k::__NR_dup3, from as isize, to as isize, k::O_CLOEXEC).map(drop)
}

/// Duplicates `from` to the lowest free number at or above `least`.
///
/// # Errors
/// The kernel's errno.
pub fn dup_above(from: i32, least: i32) -> Result<i32, Errno> {
    call!(
        k::__NR_fcntl,
        from as isize,
        k::F_DUPFD_CLOEXEC,
        least as isize
    )
    .map(|fd| fd as i32)
}

/// Closes every descriptor from `first` on.
pub fn close_from(first: u32) {
    let _ = call!(k::__NR_close_range, first, u32::MAX, 0usize);
}

/// The calling process's pid.
#[must_use]
pub fn getpid() -> i32 {
    call!(k::__NR_getpid).map_or(0, |pid| pid as i32)
}

/// The parent's pid; it changes when the parent dies.
#[must_use]
pub fn getppid() -> i32 {
    call!(k::__NR_getppid).map_or(0, |pid| pid as i32)
}

/// Makes the caller leader of a session of its own.
pub fn setsid() {
    let _ = call!(k::__NR_setsid);
}

/// Names the calling thread.
pub fn set_name(name: &[u8; 16]) {
    const PR_SET_NAME: usize = 15;
    let _ = call!(k::__NR_prctl, PR_SET_NAME, name.as_ptr());
}

/// Has the caller die with its parent, at once if that has died.
pub fn end_with_parent(parent: i32) {
    const PR_SET_PDEATHSIG: usize = 1;
    let _ = call!(k::__NR_prctl, PR_SET_PDEATHSIG, SIGKILL);
    if getppid() != parent {
        exit(1);
    }
}

/// Moves the caller to the root directory, so that it keeps no file system busy.
pub fn leave_directory() {
    let root = b"/\0";
    let _ = call!(k::__NR_chdir, root.as_ptr());
}

/// The signal that nothing stops.
pub const SIGKILL: u32 = 9;

/// Sends a signal.
pub fn kill(pid: i32, signal: u32) {
    let _ = call!(k::__NR_kill, pid as isize, signal);
}

/// Ends the calling process.
pub fn exit(status: i32) -> ! {
    loop {
        let _ = call!(k::__NR_exit_group, status as isize);
    }
}

/// Blocks every signal; returns the mask there was.
#[must_use]
pub fn block_signals() -> u64 {
    set_signal_mask(u64::MAX)
}

/// Sets the signal mask; returns the one there was.
pub fn set_signal_mask(mask: u64) -> u64 {
    let mut old = 0u64;
    let _ = call!(
        k::__NR_rt_sigprocmask,
        k::SIG_SETMASK,
        core::ptr::from_ref(&mask),
        core::ptr::from_mut(&mut old),
        8usize
    );
    old
}

/// Of `wait4`: of processes that were cloned without an exit signal.
const WCLONE: usize = 0x8000_0000;

/// Waits for a process that was cloned without an exit signal, and has been killed, to be gone.
pub fn reap_clone(pid: i32) {
    const EINTR: u32 = 4;
    while call!(k::__NR_wait4, pid as isize, 0usize, WCLONE, 0usize) == Err(Errno(EINTR)) {}
}

/// Whether such a process has ended; it is gone then.
#[must_use]
pub fn has_ended(pid: i32) -> bool {
    const WNOHANG: usize = 1;
    call!(
        k::__NR_wait4,
        pid as isize,
        0usize,
        WCLONE | WNOHANG,
        0usize
    )
    .is_ok_and(|it| it != 0)
}

/// Seconds on a clock that is never set.
#[must_use]
pub fn seconds() -> i64 {
    let mut now = k::__kernel_timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let _ = call!(
        k::__NR_clock_gettime,
        k::CLOCK_MONOTONIC,
        core::ptr::from_mut(&mut now)
    );
    now.tv_sec
}

/// Sleeps while `word` holds `value`, at most `milliseconds`.
pub fn futex_wait(word: &AtomicU32, value: u32, milliseconds: u64) {
    let timeout = k::__kernel_timespec {
        tv_sec: (milliseconds / 1000) as i64,
        tv_nsec: ((milliseconds % 1000) * 1_000_000) as i64,
    };
    let _ = call!(
        k::__NR_futex,
        word.as_ptr(),
        k::FUTEX_WAIT,
        value,
        core::ptr::from_ref(&timeout)
    );
}

/// Sleeps.
pub fn sleep_ms(milliseconds: u64) {
    let word = AtomicU32::new(0);
    futex_wait(&word, 0, milliseconds);
}

/// Wakes everybody who sleeps on `word`.
pub fn futex_wake(word: &AtomicU32) {
    let _ = call!(
        k::__NR_futex,
        word.as_ptr(),
        k::FUTEX_WAKE,
        i32::MAX as isize
    );
}

/// Adds one to an eventfd.
pub fn signal_event(fd: i32) {
    let one = 1u64;
    let _ = call!(
        k::__NR_write,
        fd as isize,
        core::ptr::from_ref(&one),
        8usize
    );
}

/// Reads what pagemap says of as many pages from `page_address` on as there are words; returns how many words it read.
///
/// # Errors
/// The kernel's errno.
pub fn pagemap_words(fd: i32, page_address: usize, words: &mut [u64]) -> Result<usize, Errno> {
    let bytes = call!(
        k::__NR_pread64,
        fd as isize,
        words.as_mut_ptr(),
        core::mem::size_of_val(words),
        page_address / 4096 * 8
    )?;
    Ok(bytes / 8)
}

/// Notes in `resident` which pages from `address` on are there, one byte each, not zero for yes. A place that is not
/// mapped has none.
pub fn residency(address: usize, resident: &mut [u8]) {
    resident.fill(0);
    let result = call!(
        k::__NR_mincore,
        address,
        resident.len() * 4096,
        resident.as_mut_ptr()
    );
    if result.is_err() {
        resident.fill(0);
    }
}

/// Opens a file for reading, the path NUL-terminated.
///
/// # Errors
/// The kernel's errno.
pub fn open_read(path: &core::ffi::CStr) -> Result<i32, Errno> {
    call!(
        k::__NR_openat,
        k::AT_FDCWD as isize,
        path.as_ptr(),
        k::O_RDONLY | k::O_CLOEXEC
    )
    .map(|fd| fd as i32)
}

/// Whether the other end of a socket has closed it.
#[must_use]
pub fn peer_gone(fd: i32) -> bool {
    const MSG_PEEK: usize = 2;
    const MSG_DONTWAIT: usize = 0x40;
    let mut byte = 0u8;
    matches!(
        call!(
            k::__NR_recvfrom,
            fd as isize,
            core::ptr::from_mut(&mut byte),
            1usize,
            MSG_PEEK | MSG_DONTWAIT,
            0usize,
            0usize
        ),
        Ok(0)
    )
}
