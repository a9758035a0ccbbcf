//! System calls for tests.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Sends a signal. The process may be gone.
pub fn kill(pid: i32, signal: i32) {
    // SAFETY: kill takes any numbers.
    unsafe { libc::kill(pid, signal) };
}

/// True if the test may do what only root may.
pub fn is_root() -> bool {
    // SAFETY: geteuid cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// True if both processes have one and the same memory; none where this may not be asked.
pub fn same_memory(one: u32, other: u32) -> Option<bool> {
    const KCMP_VM: i32 = 1;
    // SAFETY: kcmp takes numbers.
    match unsafe { libc::syscall(libc::SYS_kcmp, one as i32, other as i32, KCMP_VM, 0, 0) } {
        -1 => None,
        order => Some(order == 0),
    }
}

/// Runs `prepare` in the child before exec. It may only do what is safe there.
pub fn before_exec(
    command: &mut Command,
    prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    // SAFETY: the tests' closures call async-signal-safe functions only.
    unsafe { command.pre_exec(prepare) };
}

/// In a child about to exec: locks no more than so many bytes in memory, unless it is privileged.
pub fn limit_locked_memory(bytes: u64) -> io::Result<()> {
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: bytes,
    };
    // SAFETY: the kernel reads one rlimit.
    match unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// In a child about to exec: ignores a signal.
pub fn ignore(signal: i32) {
    // SAFETY: SIG_IGN runs no code.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// In a child about to exec: gives a signal its default effect.
pub fn default(signal: i32) {
    // SAFETY: SIG_DFL runs no code.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

/// In a child about to exec: what a terminal sends has its default effect, as a shell has it. Whoever starts the tests in the
/// background of a script has them ignore it.
pub fn terminal_signals_as_usual() -> io::Result<()> {
    default(libc::SIGINT);
    default(libc::SIGQUIT);
    Ok(())
}

/// In a child about to exec: blocks a signal.
pub fn block(signal: i32) {
    // SAFETY: the set is initialised by sigemptyset before it is used.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
    }
}

/// In a child about to exec: puts a copy of a descriptor at a number, open across exec.
pub fn place(fd: i32, at: i32) {
    // SAFETY: dup2 takes numbers.
    unsafe { libc::dup2(fd, at) };
}

/// In a child about to exec: closes a descriptor.
pub fn close(fd: i32) {
    // SAFETY: in the child of a fork, just before exec, nothing else uses the descriptor.
    unsafe { libc::close(fd) };
}

/// A new terminal: its master side, and the path of the other.
pub fn open_terminal() -> io::Result<(File, String)> {
    // SAFETY: the descriptor is new and ours; ptsname_r writes at most the buffer's length.
    unsafe {
        let fd = libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let master = File::from_raw_fd(fd);
        let mut name = [0_u8; 64];
        if libc::grantpt(fd) != 0
            || libc::unlockpt(fd) != 0
            || libc::ptsname_r(fd, name.as_mut_ptr().cast(), 64) != 0
        {
            return Err(io::Error::last_os_error());
        }
        let path = name
            .iter()
            .take_while(|byte| **byte != 0)
            .map(|byte| char::from(*byte))
            .collect();
        Ok((master, path))
    }
}

/// In a child about to exec: a new session whose terminal is standard input.
pub fn take_terminal() -> io::Result<()> {
    // SAFETY: both calls take numbers.
    unsafe {
        if libc::setsid() == -1 || libc::ioctl(0, libc::TIOCSCTTY, 0) == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The descriptor of a file, for closures that run before exec.
pub fn number(file: &impl AsRawFd) -> i32 {
    file.as_raw_fd()
}

/// In a child about to exec: becomes this user, with these groups and no others.
pub fn become_user(uid: u32, groups: &[u32]) -> io::Result<()> {
    // SAFETY: the slice outlives the call; the others take numbers.
    unsafe {
        if libc::setgroups(groups.len(), groups.as_ptr()) == -1
            || libc::setresgid(uid, uid, uid) == -1
            || libc::setresuid(uid, uid, uid) == -1
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
