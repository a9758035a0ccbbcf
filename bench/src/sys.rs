//! The unsafe rim: a bare userfaultfd and the idle scheduling class.

#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use linux_raw_sys::general as k;

const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_COPY: u64 = 0xc028_aa03;
/// Of `userfaultfd(2)`: faults of user code only, which needs no privilege.
const USER_MODE_ONLY: i32 = 1;

fn ioctl<T>(fd: BorrowedFd<'_>, request: u64, argument: &mut T) -> io::Result<()> {
    // SAFETY: each caller below pairs the request with the structure that the kernel defines for it; a
    // descriptor of another kind answers ENOTTY.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A userfaultfd of this process without any feature, answering faults in `range`.
pub(crate) fn new_uffd(range: &Range<u64>) -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
    // SAFETY: the call takes flags as an integer and returns a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that the kernel has just made for us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let borrowed = std::os::fd::AsFd::as_fd(&fd);
    let mut api = k::uffdio_api {
        api: 0xAA,
        features: 0,
        ioctls: 0,
    };
    ioctl(borrowed, UFFDIO_API, &mut api)?;
    let mut register = k::uffdio_register {
        range: k::uffdio_range {
            start: range.start,
            len: range.end - range.start,
        },
        mode: k::UFFDIO_REGISTER_MODE_MISSING as u64,
        ioctls: 0,
    };
    ioctl(borrowed, UFFDIO_REGISTER, &mut register)?;
    Ok(fd)
}

/// Installs a copy of `source` at `to` in the uffd's address space and wakes who waits there.
pub(crate) fn copy(uffd: BorrowedFd<'_>, to: u64, source: &[u8]) -> io::Result<()> {
    let mut request = k::uffdio_copy {
        dst: to,
        src: source.as_ptr().addr() as u64,
        len: source.len() as u64,
        mode: 0,
        copy: 0,
    };
    ioctl(uffd, UFFDIO_COPY, &mut request)
}

/// Lets this process have no huge pages from now on.
pub(crate) fn use_small_pages() -> io::Result<()> {
    // SAFETY: integers only.
    match unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Forks; the child runs `child` and ends. Returns its pid.
pub(crate) fn fork(child: impl FnOnce()) -> io::Result<i32> {
    // SAFETY: the measuring process has one thread, so that the child finds no lock held by another.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            child();
            // SAFETY: ends the child without running what belongs to the parent.
            unsafe { libc::_exit(0) }
        }
        pid => Ok(pid),
    }
}

/// Waits for a child's end.
pub(crate) fn reap(pid: i32) -> io::Result<()> {
    let mut status = 0;
    // SAFETY: the kernel writes one integer.
    match unsafe { libc::waitpid(pid, &raw mut status, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ if status == 0 => Ok(()),
        _ => Err(io::Error::other("a forked child failed")),
    }
}

/// Puts the calling thread into the idle scheduling class: it runs when nothing else wants to.
pub(crate) fn run_when_idle() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel reads one sched_param.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
