//! The probes that need a system call of their own. None changes anything.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use linux_raw_sys::general::{pm_scan_arg, uffdio_api};
use linux_raw_sys::ioctl::UFFDIO_API;

/// `_IO(0xAA, 0)`: asks /dev/userfaultfd for a new descriptor.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xAA00;
/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xC060_6610;
/// The version of the userfaultfd interface.
const UFFD_API: u64 = 0xAA;
/// Asks for a userfaultfd that answers no faults of the kernel; everybody may have one.
const UFFD_USER_MODE_ONLY: libc::c_int = 1;

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: every caller passes what a system call just returned as a new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A userfaultfd from the device.
pub(crate) fn userfaultfd_from(device: &File) -> io::Result<OwnedFd> {
    // SAFETY: the request takes flags by value; on any other file it fails with ENOTTY.
    owned(unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC) }.into())
}

/// A userfaultfd from the system call, which everybody may have: it answers no faults that the kernel takes on the program's
/// behalf.
pub(crate) fn userfaultfd_for_user_mode() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | UFFD_USER_MODE_ONLY;
    // SAFETY: the call takes flags by value.
    owned(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })
}

/// Asks a fresh userfaultfd for `features` and returns all that the kernel has.
pub(crate) fn userfaultfd_api(fd: &OwnedFd, features: u64) -> io::Result<u64> {
    let mut api = uffdio_api {
        api: UFFD_API,
        features,
        ioctls: 0,
    };
    // SAFETY: the kernel reads and writes exactly this struct, which outlives the call.
    match unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API.into(), &raw mut api) } {
        0 => Ok(api.features),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Scans one page of this process with PAGEMAP_SCAN.
pub(crate) fn pagemap_scan() -> io::Result<()> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let here = [0_u8; 1];
    let start = here.as_ptr() as u64 & !4095;
    let mut scan = pm_scan_arg {
        size: size_of::<pm_scan_arg>() as u64,
        flags: 0,
        start,
        end: start + 4096,
        walk_end: 0,
        vec: 0,
        vec_len: 0,
        max_pages: 0,
        category_inverted: 0,
        category_mask: 1 << 3,
        category_anyof_mask: 0,
        return_mask: 1 << 3,
    };
    // SAFETY: the kernel reads and writes exactly this struct; without a vector it reports nothing, and without
    // flags it changes no page.
    match unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Opens a pidfd of this process.
pub(crate) fn pidfd() -> io::Result<()> {
    // SAFETY: the call takes numbers only.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) }).map(drop)
}

/// How much memory this process may lock, in bytes; none for no limit.
pub(crate) fn memlock_limit() -> io::Result<Option<u64>> {
    let mut limit = MaybeUninit::<libc::rlimit>::zeroed();
    // SAFETY: the kernel writes exactly this struct, which all zeros is valid for.
    let (result, limit) = unsafe {
        let result = libc::getrlimit(libc::RLIMIT_MEMLOCK, limit.as_mut_ptr());
        (result, limit.assume_init())
    };
    match result {
        0 => Ok((limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The kernel's release, such as `6.12.0-amd64`, and its machine.
pub(crate) fn kernel() -> io::Result<(String, String)> {
    let mut name = MaybeUninit::<libc::utsname>::zeroed();
    // SAFETY: the kernel writes exactly this struct, which all zeros is valid for.
    let (result, name) = unsafe {
        let result = libc::uname(name.as_mut_ptr());
        (result, name.assume_init())
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let text = |field: &[libc::c_char]| {
        field
            .iter()
            .take_while(|c| **c != 0)
            .map(|c| char::from(*c as u8))
            .collect::<String>()
    };
    Ok((text(&name.release), text(&name.machine)))
}
