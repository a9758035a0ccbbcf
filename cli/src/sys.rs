//! The system calls that std does not offer: signals with their sender, job control, exact inheritance.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Signals have numbers from 1 to this one.
const LAST_SIGNAL: i32 = 64;

/// The signals that were ignored when this process was started, bit N-1 for signal N.
static IGNORED_AT_START: AtomicU64 = AtomicU64::new(0);
/// The signals that were blocked then.
static BLOCKED_AT_START: AtomicU64 = AtomicU64::new(0);
/// Which of the descriptors 0, 1 and 2 were closed then.
static CLOSED_AT_START: AtomicU8 = AtomicU8::new(0);

// SAFETY: the loader calls every entry of this section once, with the C library ready, before `main`. That is early
// enough to see what std's start-up changes: it ignores SIGPIPE and opens /dev/null on closed descriptors.
#[used]
#[unsafe(link_section = ".init_array")]
static REMEMBER: extern "C" fn() = remember_inheritance;

extern "C" fn remember_inheritance() {
    let mut ignored = 0;
    for signal in 1..=LAST_SIGNAL {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: a null new action only asks; the result is written to `action`, which all zeros is valid for.
        let action = unsafe {
            libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
            action.assume_init()
        };
        if action.sa_sigaction == libc::SIG_IGN {
            ignored |= bit(signal);
        }
    }
    IGNORED_AT_START.store(ignored, Ordering::Relaxed);
    BLOCKED_AT_START.store(signal_mask(), Ordering::Relaxed);
    // SAFETY: F_GETFD of any number is answered or fails with EBADF.
    let closed = (0..3).filter(|fd| unsafe { libc::fcntl(*fd, libc::F_GETFD) } == -1);
    CLOSED_AT_START.store(closed.fold(0, |bits, fd| bits | 1 << fd), Ordering::Relaxed);
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// The calling thread's blocked signals.
fn signal_mask() -> u64 {
    let mut set = empty_set();
    // SAFETY: a null new set only asks; the old one is written to `set`.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut set) };
    // SAFETY: `set` is initialised; sigismember only reads it.
    (1..=LAST_SIGNAL)
        .filter(|s| unsafe { libc::sigismember(&raw const set, *s) } == 1)
        .fold(0, |m, s| m | bit(s))
}

fn empty_set() -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: sigemptyset initialises what it is given.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    }
}

fn set_of(mask: u64) -> libc::sigset_t {
    let mut set = empty_set();
    for signal in (1..=LAST_SIGNAL).filter(|signal| mask & bit(*signal) != 0) {
        // SAFETY: `set` is initialised and the number is in range; the C library's own two are refused harmlessly.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    set
}

/// Sets one signal's disposition. The numbers that cannot be changed are left as they are.
fn dispose(signal: i32, handler: libc::sighandler_t) {
    // SAFETY: the handlers given are SIG_DFL and SIG_IGN only, no code of ours.
    unsafe { libc::signal(signal, handler) };
}

/// True if the signal was ignored when this process was started, as SIGHUP is under nohup.
pub(crate) fn ignored_at_start(signal: i32) -> bool {
    (1..=LAST_SIGNAL).contains(&signal)
        && IGNORED_AT_START.load(Ordering::Relaxed) & bit(signal) != 0
}

/// Makes the rest of this process's life a matter of `next_signal`: everything is blocked, here and in later threads.
pub(crate) fn take_signals() {
    // An inherited "ignore" of SIGCHLD would have the kernel reap the program before its status could be read.
    dispose(libc::SIGCHLD, libc::SIG_DFL);
    let all = set_of(u64::MAX);
    // SAFETY: `all` is an initialised set; no old one is asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut()) };
}

/// A signal that this process received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) number: i32,
    /// The process that sent it; none if the kernel did, as for Ctrl-C.
    pub(crate) sender: Option<u32>,
}

/// Waits for the next signal; with `wait` false, returns at once when none is pending.
pub(crate) fn next_signal(wait: bool) -> Option<Received> {
    let all = set_of(u64::MAX);
    let now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    loop {
        let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
        // SAFETY: `all` and `now` are initialised; `info` is written by the call or stays all zeros, which is valid.
        let (number, info) = unsafe {
            let number = if wait {
                libc::sigwaitinfo(&raw const all, info.as_mut_ptr())
            } else {
                libc::sigtimedwait(&raw const all, info.as_mut_ptr(), &raw const now)
            };
            (number, info.assume_init())
        };
        if number > 0 {
            // SAFETY: signals sent by a process, the codes up to 0, carry its pid; timers' carry another number there.
            let sender = (info.si_code <= 0).then(|| unsafe { info.si_pid() }.unsigned_abs());
            return Some(Received { number, sender });
        }
        if !wait {
            return None;
        }
    }
}

/// What a child of ours has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChildState {
    Exited(i32),
    Killed(i32),
    Stopped(i32),
    Continued,
}

/// Asks, without waiting, whether this child changed its state. A child that ended is reaped.
pub(crate) fn child_state(pid: u32) -> io::Result<Option<ChildState>> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let options = libc::WEXITED | libc::WSTOPPED | libc::WCONTINUED | libc::WNOHANG;
    // SAFETY: `info` is zeroed, which is a valid siginfo, and the call writes to it.
    let (result, info) = unsafe {
        let result = libc::waitid(libc::P_PID, pid, info.as_mut_ptr(), options);
        (result, info.assume_init())
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: waitid fills the child's fields, or leaves the zeros when nothing happened.
    let (child, status) = unsafe { (info.si_pid(), info.si_status()) };
    if child == 0 {
        return Ok(None);
    }
    Ok(match info.si_code {
        libc::CLD_EXITED => Some(ChildState::Exited(status)),
        libc::CLD_KILLED | libc::CLD_DUMPED => Some(ChildState::Killed(status)),
        libc::CLD_STOPPED | libc::CLD_TRAPPED => Some(ChildState::Stopped(status)),
        libc::CLD_CONTINUED => Some(ChildState::Continued),
        _ => None,
    })
}

/// Sends a signal to a child that has not been reaped. It may have ended already, which is no error.
pub(crate) fn send(pid: u32, signal: i32) {
    // SAFETY: kill takes any numbers; the caller's child keeps its pid until it is reaped.
    unsafe { libc::kill(pid as i32, signal) };
}

/// Delivers a signal to this process with its default effect, and blocks it again if that lets the process live.
pub(crate) fn suffer(signal: i32) {
    dispose(signal, libc::SIG_DFL);
    let one = set_of(if (1..=LAST_SIGNAL).contains(&signal) {
        bit(signal)
    } else {
        0
    });
    // SAFETY: the set is initialised. The signal is raised while blocked and delivered by the unblocking.
    unsafe {
        libc::raise(signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const one, std::ptr::null_mut());
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const one, std::ptr::null_mut());
    }
}

/// Keeps this process from leaving a core file in the place of the program's.
pub(crate) fn forbid_core() {
    // SAFETY: this option takes plain numbers.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
}

/// True if this process is in the foreground group of a terminal, so that a shell waits to take the terminal back.
pub(crate) fn in_terminal_foreground() -> bool {
    let Ok(terminal) = File::open("/dev/tty") else {
        return false;
    };
    // SAFETY: tcgetpgrp of an open descriptor and getpgrp only ask.
    unsafe { libc::tcgetpgrp(terminal.as_raw_fd()) == libc::getpgrp() }
}

/// Makes the command start with the signals and standard descriptors that this process was itself started with.
pub(crate) fn inherit_exactly(command: &mut Command) {
    let restore = || {
        let ignored = IGNORED_AT_START.load(Ordering::Relaxed);
        for signal in 1..=LAST_SIGNAL {
            dispose(
                signal,
                if ignored & bit(signal) == 0 {
                    libc::SIG_DFL
                } else {
                    libc::SIG_IGN
                },
            );
        }
        let closed = CLOSED_AT_START.load(Ordering::Relaxed);
        for fd in (0..3).filter(|fd| closed & 1 << fd != 0) {
            // SAFETY: std opened /dev/null there in this process's copy; nothing of ours uses it after this.
            unsafe { libc::close(fd) };
        }
        let blocked = set_of(BLOCKED_AT_START.load(Ordering::Relaxed));
        // SAFETY: `blocked` is an initialised set.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const blocked, std::ptr::null_mut())
        };
        Ok(())
    };
    // SAFETY: between fork and exec `restore` reads atomics and calls only async-signal-safe functions.
    unsafe { command.pre_exec(restore) };
}

/// Makes the command start in a session of its own, holding no descriptor but the standard ones and `kept`.
pub(crate) fn inherit_nothing_but(command: &mut Command, kept: OwnedFd) {
    let detach = move || {
        let fd = kept.as_raw_fd();
        // SAFETY: plain numbers only; all four calls are async-signal-safe, and `kept` stays open as it is moved in here.
        unsafe {
            libc::setsid();
            // Everything closes at exec. On a kernel without this call what std opened does so anyway.
            libc::syscall(
                libc::SYS_close_range,
                3_u32,
                u32::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            );
            if libc::fcntl(fd, libc::F_SETFD, 0) == -1 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec `detach` calls only async-signal-safe functions and allocates nothing.
    unsafe { command.pre_exec(detach) };
}

/// Waits until there is something to read, or nothing ever will be. False if the time is over first.
pub(crate) fn readable_within(source: &impl AsRawFd, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline
            .saturating_duration_since(Instant::now())
            .as_millis();
        let mut wanted = libc::pollfd {
            fd: source.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one initialised entry, which outlives the call.
        let ready =
            unsafe { libc::poll(&raw mut wanted, 1, i32::try_from(left).unwrap_or(i32::MAX)) };
        if ready > 0 {
            return true;
        }
        if left == 0 {
            return false;
        }
    }
}

/// A file without a name, in memory, closed at exec.
pub(crate) fn memory_file(name: &str) -> io::Result<File> {
    let name = CString::new(name)?;
    // SAFETY: `name` is a C string that outlives the call; a descriptor returned is new and ours alone.
    unsafe {
        match libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(File::from(OwnedFd::from_raw_fd(fd))),
        }
    }
}

/// Asks whether this process may execute the file, as execve would.
pub(crate) fn may_execute(path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: `path` is a C string that outlives the call.
    match unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::X_OK, libc::AT_EACCESS) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// True if the file carries capabilities, which it would gain at exec.
pub(crate) fn has_file_capabilities(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else {
        return false;
    };
    // SAFETY: both names are C strings; a size of zero asks for the length and writes nothing.
    unsafe {
        libc::getxattr(
            path.as_ptr(),
            c"security.capability".as_ptr(),
            std::ptr::null_mut(),
            0,
        ) > 0
    }
}

/// The effective user of this process.
pub(crate) fn effective_user() -> u32 {
    // SAFETY: geteuid takes nothing and cannot fail.
    unsafe { libc::geteuid() }
}

/// Takes ownership of a descriptor that was inherited for us alone.
///
/// # Errors
/// EBADF where there is none of this number.
pub(crate) fn take_descriptor(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD takes no pointer.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and the launcher has passed it to this process for this use alone.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// The number of a group; a number stands for itself.
pub(crate) fn group_id(name: &str) -> Option<u32> {
    if let Ok(number) = name.parse() {
        return Some(number);
    }
    let text = std::fs::read_to_string("/etc/group").ok()?;
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?
    })
}

/// Gives the calling thread this nice value, and those that it starts, if this account may.
pub(crate) fn take_precedence(nice: i32) {
    // SAFETY: integers only.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
}
