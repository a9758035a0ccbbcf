//! Another process, by pidfd and by `/proc`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use super::check;

/// A process that cannot be mistaken for another of the same pid.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: OwnedFd,
    statm: File,
}

/// Sizes of a process, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Address space.
    pub total: u64,
    /// Resident anonymous pages.
    pub anonymous: u64,
}

impl Process {
    /// Takes hold of a process.
    ///
    /// # Errors
    /// The kernel's errno, ESRCH when it has gone.
    pub fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: plain integers; the result is checked and owned by us alone.
        let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
        // SAFETY: a descriptor that the kernel has just made for us.
        let pidfd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        Ok(Self {
            pid,
            pidfd,
            statm: File::open(format!("/proc/{pid}/statm"))?,
        })
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Takes hold of the process that had this pid and began then; none if that one is gone.
    #[must_use]
    pub fn reopen(pid: i32, start: u64) -> Option<Self> {
        let process = Self::open(pid).ok()?;
        (start != 0 && process.start_time() == Some(start)).then_some(process)
    }

    /// When it began, in the kernel's ticks since boot: with its pid this names it for good.
    #[must_use]
    pub fn start_time(&self) -> Option<u64> {
        start_time(self.pid)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: integers and a null pointer, which means default info.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                signal,
                0usize,
                0,
            )
        };
    }

    /// Whether it has exited (it may be a zombie yet).
    #[must_use]
    pub fn has_exited(&self) -> bool {
        let mut poll = [rustix::event::PollFd::new(
            &self.pidfd,
            rustix::event::PollFlags::IN,
        )];
        rustix::event::poll(
            &mut poll,
            Some(&rustix::time::Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            }),
        )
        .unwrap_or(0)
            > 0
    }

    /// Its sizes now.
    ///
    /// # Errors
    /// The kernel's errno, ESRCH when it has gone.
    pub fn sizes(&self) -> io::Result<Sizes> {
        let mut buffer = [0u8; 128];
        let got = self.statm.read_at(&mut buffer, 0)?;
        let text = std::str::from_utf8(&buffer[..got]).unwrap_or("");
        let mut fields = text
            .split_ascii_whitespace()
            .map(|field| field.parse::<u64>().unwrap_or(0));
        let (total, resident, shared) = (fields.next(), fields.next(), fields.next());
        match (total, resident, shared) {
            (Some(total), Some(resident), Some(shared)) => Ok(Sizes {
                total,
                anonymous: resident.saturating_sub(shared),
            }),
            _ => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> String {
        std::fs::read_to_string(format!("/proc/{}/comm", self.pid))
            .unwrap_or_default()
            .trim_end()
            .to_owned()
    }

    /// The pages that the kernel writes when a thread ends, for every thread there is: their thread control
    /// blocks, found through their robust lists.
    #[must_use]
    pub fn thread_control_pages(&self) -> Vec<u64> {
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{}/task", self.pid)) else {
            return Vec::new();
        };
        let mut pages = Vec::new();
        for task in tasks.flatten() {
            let Some(tid) = task
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<i32>().ok())
            else {
                continue;
            };
            let (mut head, mut len) = (0usize, 0usize);
            // SAFETY: the kernel writes a pointer and a size to two live words.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_get_robust_list,
                    tid,
                    std::ptr::from_mut(&mut head),
                    std::ptr::from_mut(&mut len),
                )
            };
            if result == 0 && head != 0 {
                // glibc keeps the tid that is cleared a few words before the list's head.
                pages.push((head as u64 - 64) >> 12);
                pages.push((head as u64) >> 12);
            }
        }
        pages.sort_unstable();
        pages.dedup();
        pages
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Whether two processes share their memory. `None` where the kernel cannot tell.
#[must_use]
pub fn share_memory(a: i32, b: i32) -> Option<bool> {
    const KCMP_VM: i32 = 1;
    // SAFETY: integers only.
    let result = unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0, 0) };
    match result {
        0 => Some(true),
        1..=3 => Some(false),
        _ => None,
    }
}

/// Reads a few bytes of another process that are present, without faulting anything in. Returns whether it
/// could.
#[must_use]
pub fn read_present_memory(pid: i32, address: u64, out: &mut [u8]) -> bool {
    File::open(format!("/proc/{pid}/mem"))
        .is_ok_and(|memory| memory.read_exact_at(out, address).is_ok())
}

/// Sends a signal to one thread.
pub fn signal_thread(process: i32, thread: u32, signal: i32) {
    // SAFETY: integers only.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) };
}

/// The kernel's flag of a task that is on its way out (`PF_EXITING`).
const EXITING: u64 = 4;

/// The state of a process of this pid, and its flags. None where there is no such process.
fn state_and_flags(pid: i32) -> Option<(char, u64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // State, parent, group, session, terminal, its group, flags.
    let mut fields = stat.rsplit(") ").next()?.split(' ');
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(5)?.parse().ok()?))
}

/// When the process that has this pid began.
#[must_use]
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the name the state is the third field of all, and this the twenty-second.
    stat.rsplit(") ").next()?.split(' ').nth(19)?.parse().ok()
}

/// Whether a process of this pid runs; a zombie does not.
#[must_use]
pub fn is_running(pid: i32) -> bool {
    state_and_flags(pid).is_some_and(|(state, _)| !matches!(state, 'Z' | 'X'))
}

/// Whether a process of this pid has ended, or will run no more and is about to have.
#[must_use]
pub fn is_ending(pid: i32) -> bool {
    !is_running(pid) || state_and_flags(pid).is_none_or(|(_, flags)| flags & EXITING != 0)
}

/// Whether a process is kept from running: stopped, traced, frozen (by a cgroup of version 1), or waiting for the kernel itself.
#[must_use]
pub fn is_held(pid: i32) -> bool {
    state_and_flags(pid).is_some_and(|(state, _)| matches!(state, 'T' | 't' | 'D'))
}

/// Whether somebody has stopped a process, or traces it.
#[must_use]
pub fn is_stopped(pid: i32) -> bool {
    state_and_flags(pid).is_some_and(|(state, _)| matches!(state, 'T' | 't'))
}

/// Ends a process.
pub fn kill(pid: i32) {
    // SAFETY: integers only.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

/// The precedence of pagers and helpers: everybody waits for them.
pub const FIRST: i32 = -19;

/// Gives a thread of ours (0: the caller), or a process, precedence over ordinary ones, as far as we may.
pub fn raise_priority(pid: i32, nice: i32) {
    // SAFETY: integers only.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, pid as libc::id_t, nice) };
}

/// Gives a whole session precedence: with automatic task groups a thread's own counts within its session only.
pub fn raise_session_priority(pid: i32, nice: i32) {
    let _ = std::fs::write(format!("/proc/{pid}/autogroup"), nice.to_string());
}

/// Whether a process leads a session: one that it was started in gives its precedence to others.
#[must_use]
pub fn leads_session(pid: i32) -> bool {
    // SAFETY: an integer only.
    let session = unsafe { libc::getsid(pid) };
    session == pid
}

/// Lets the calling thread run as soon as it wakes, if we may; for one that sleeps nearly always. Or ends that.
pub fn run_at_once(at_once: bool) {
    let (policy, sched_priority) = if at_once {
        (libc::SCHED_RR, 1)
    } else {
        (libc::SCHED_OTHER, 0)
    };
    let parameters = libc::sched_param { sched_priority };
    // SAFETY: the kernel reads a sched_param.
    unsafe { libc::sched_setscheduler(0, policy, &parameters) };
}

/// A mapping of a process, as `/proc/PID/maps` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its addresses.
    pub range: Range<u64>,
    /// Its permissions, as `rw-p`.
    pub permissions: [u8; 4],
    /// Inode, 0 for anonymous memory.
    pub inode: u64,
    /// What it is called: a path, `[stack]`, or nothing.
    pub name: String,
}

impl Mapping {
    /// Whether this is plain private anonymous memory that may be read and written.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        &self.permissions == b"rw-p"
            && self.inode == 0
            && (!self.name.starts_with('[') || self.is_nameable())
    }

    /// Whether this is private anonymous memory that nobody may touch yet.
    #[must_use]
    pub fn is_reserve(&self) -> bool {
        &self.permissions == b"---p" && self.inode == 0 && self.name.is_empty()
    }

    /// Whether `brk` made this.
    #[must_use]
    pub fn is_heap(&self) -> bool {
        self.name == "[heap]"
    }

    fn is_nameable(&self) -> bool {
        self.is_heap() || self.name.starts_with("[anon:")
    }
}

/// How many page faults a process has had.
#[derive(Debug)]
pub struct FaultCount(File);

impl FaultCount {
    /// Of this process.
    ///
    /// # Errors
    /// The kernel's errno, ESRCH when it has gone.
    pub fn open(pid: i32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/stat")).map(Self)
    }

    /// Minor ones, of all its threads; `None` when it has gone. Those that a uffd answers are major.
    #[must_use]
    pub fn minor(&self) -> Option<u64> {
        let mut buffer = [0u8; 512];
        let got = self.0.read_at(&mut buffer, 0).ok()?;
        let text = String::from_utf8_lossy(buffer.get(..got)?);
        // Behind the name: state, parent, group, session, terminal, its group, flags, minor faults.
        text.rsplit(") ").next()?.split(' ').nth(7)?.parse().ok()
    }
}

/// How many pages of a process's resident anonymous memory other processes account for: all of it less its share.
///
/// # Errors
/// The kernel's errno, ESRCH when the process has gone.
pub fn shared_pages(pid: i32) -> io::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let kib = |name: &str| {
        text.lines().find_map(|line| {
            line.strip_prefix(name)?
                .strip_suffix("kB")?
                .trim()
                .parse::<u64>()
                .ok()
        })
    };
    match (kib("Anonymous:"), kib("Pss_Anon:")) {
        (Some(all), Some(own)) => Ok(all.saturating_sub(own) / 4),
        _ => Err(io::Error::from_raw_os_error(libc::ESRCH)),
    }
}

/// The ranges that a fork does not hand on as they are: left out (DONTFORK) or wiped (WIPEONFORK).
///
/// # Errors
/// The kernel's errno.
pub fn ranges_not_inherited(pid: i32) -> io::Result<Vec<Range<u64>>> {
    let changed = |flags: &[&str]| {
        ["dc", "wf"]
            .iter()
            .any(|flag| flags.contains(flag))
            .then_some(())
    };
    Ok(ranges_with_flags(pid, changed)?
        .into_iter()
        .map(|(range, ())| range)
        .collect())
}

/// The ranges registered with a uffd, and of each whether a fork wipes it, as one has wiped it if this is a forked child.
///
/// # Errors
/// The kernel's errno.
pub fn registered_ranges(pid: i32) -> io::Result<Vec<(Range<u64>, bool)>> {
    ranges_with_flags(pid, |flags| {
        flags.contains(&"um").then(|| flags.contains(&"wf"))
    })
}

/// The mappings of whose two-letter flags in `/proc/PID/smaps` something can be said, with what is said.
fn ranges_with_flags<T>(
    pid: i32,
    say: impl Fn(&[&str]) -> Option<T>,
) -> io::Result<Vec<(Range<u64>, T)>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut current = None;
    let mut found = Vec::new();
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let flags: Vec<&str> = flags.split_ascii_whitespace().collect();
            found.extend(current.take().zip(say(&flags)));
        } else if let Some(mapping) = parse_mapping(line) {
            current = Some(mapping.range);
        }
    }
    Ok(found)
}

/// The mappings of a process.
///
/// # Errors
/// The kernel's errno.
pub fn mappings(pid: i32) -> io::Result<Vec<Mapping>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    Ok(text.lines().filter_map(parse_mapping).collect())
}

fn parse_mapping(line: &str) -> Option<Mapping> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?.as_bytes().try_into().ok()?;
    let inode = fields.nth(2)?.parse().ok()?;
    Some(Mapping {
        range: u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?,
        permissions,
        inode,
        name: fields.next().unwrap_or("").trim_start().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_mappings_parse() {
        let maps = mappings(std::process::id() as i32).unwrap();
        assert!(maps.iter().any(|m| m.name == "[stack]" && !m.is_plain()));
        assert!(maps.iter().any(Mapping::is_plain));
        assert!(
            maps.windows(2)
                .all(|pair| pair[0].range.end <= pair[1].range.start)
        );
    }

    #[test]
    fn our_own_sizes_are_not_zero() {
        let own = Process::open(std::process::id() as i32).unwrap();
        let sizes = own.sizes().unwrap();
        assert!(sizes.anonymous > 0 && sizes.total > sizes.anonymous);
        assert!(!own.has_exited());
        let faults = FaultCount::open(own.pid()).unwrap();
        let before = faults.minor().unwrap();
        std::hint::black_box(vec![1u8; 1 << 24]);
        assert!(faults.minor().unwrap() > before);
        assert_eq!(share_memory(own.pid(), own.pid()), Some(true));
    }
}
