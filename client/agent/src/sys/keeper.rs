//! The keeper's birth, and what it does before it is anybody: a process that shares the agent's descriptors, not its memory.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicI32};

use super::check;

/// What agent and keeper tell each other.
#[repr(C)]
#[derive(Debug)]
pub struct Word {
    /// The state's descriptor; 0 while there is none.
    pub state: AtomicI32,
    /// Whether the agent ends by itself, and nothing is to be kept.
    pub ended: AtomicBool,
}

/// The page in which the word lies, shared with the keeper.
#[derive(Debug)]
pub struct SharedWord(NonNull<Word>);

// SAFETY: the page belongs to the process, and all of it that is used is atomics.
unsafe impl Send for SharedWord {}
// SAFETY: as above.
unsafe impl Sync for SharedWord {}

impl SharedWord {
    /// A page for the life of the process.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn new() -> io::Result<Self> {
        let prot = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
        let page = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                4096,
                prot,
                rustix::mm::MapFlags::SHARED,
            )?
        };
        NonNull::new(page.cast())
            .map(Self)
            .ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// The word.
    #[must_use]
    pub fn get(&self) -> &Word {
        // SAFETY: a page of zeros, which are values of atomics, never unmapped.
        unsafe { self.0.as_ref() }
    }
}

/// This process, to be waited for.
///
/// # Errors
/// The kernel's errno.
pub fn this_process() -> io::Result<OwnedFd> {
    // SAFETY: plain integers; the result is checked and owned by us alone.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) })?;
    // SAFETY: a descriptor that the kernel has just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Starts a process that shares this one's table of descriptors (`CLONE_FILES`) and has a copy of its memory; in it `body` runs.
/// Returns its pid.
///
/// # Errors
/// The kernel's errno.
pub fn start(body: impl FnOnce()) -> io::Result<i32> {
    // SAFETY: a fork in all but the descriptors. The child goes on with this thread's stack, copied, and runs `body` alone, which
    // by its contract takes no lock and allocates nothing, so that it does not matter what other threads were doing.
    let pid = check(unsafe {
        libc::syscall(
            libc::SYS_clone,
            libc::CLONE_FILES as usize,
            0usize,
            0usize,
            0usize,
            0usize,
        )
    })?;
    if pid == 0 {
        body();
        exit();
    }
    Ok(pid as i32)
}

/// Ends this process at once.
pub fn exit() -> ! {
    // SAFETY: no handlers run, nothing is flushed: the agent's are not this process's to run.
    unsafe { libc::_exit(0) }
}

/// Sets this process apart: a name and a session of its own, no signal but those that nobody can keep off, no folder.
pub fn step_aside() {
    // SAFETY: a NUL-terminated name, a full set of signals that the calls fill and read, integers otherwise.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"farpage-keeper".as_ptr());
        libc::setsid();
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
        libc::chdir(c"/".as_ptr());
    }
}

/// Ends and reaps a keeper.
pub fn end(pid: i32) {
    // SAFETY: integers and a null pointer; it is a child of ours, so its pid is nobody else's.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
        libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL);
    }
}

/// This process's pid. Not libc's or the standard library's copy of it, which is the agent's.
#[must_use]
pub fn own_pid() -> i32 {
    // SAFETY: no arguments.
    unsafe { libc::syscall(libc::SYS_getpid) as i32 }
}

/// The number of a descriptor that is not this process's alone.
#[must_use]
pub fn number(fd: &OwnedFd) -> i32 {
    fd.as_raw_fd()
}

/// Milliseconds since boot, those asleep included.
#[must_use]
pub fn now_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    (now.tv_sec as u64) * 1000 + now.tv_nsec as u64 / 1_000_000
}
