//! A userfaultfd of another process: its messages, and what can be done to its address space.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use linux_raw_sys::general as k;

use super::check;
use crate::state::records::JournalSlot;

const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
const UFFDIO_WAKE: u64 = 0x8010_aa02;
const UFFDIO_COPY: u64 = 0xc028_aa03;
const UFFDIO_ZEROPAGE: u64 = 0xc020_aa04;
const UFFDIO_WRITEPROTECT: u64 = 0xc018_aa06;
const UFFDIO_POISON: u64 = 0xc020_aa08;

/// All that a program can map: above `vm.mmap_min_addr`, below the last page that the kernel keeps for itself.
const LOWEST_ADDRESS: u64 = 1 << 16;
const HIGHEST_ADDRESS: u64 = (1 << 47) - 4096;

/// Most messages taken by one read: bounds how long the oldest waits for the youngest.
pub const MAX_MESSAGES: usize = 16;

/// Features asked for; each is probed, none assumed from a version.
pub mod feature {
    use linux_raw_sys::general as k;

    /// Events of memory's life: fork, remap, discard, unmap.
    pub const EVENTS: u64 = (k::UFFD_FEATURE_EVENT_FORK
        | k::UFFD_FEATURE_EVENT_REMAP
        | k::UFFD_FEATURE_EVENT_REMOVE
        | k::UFFD_FEATURE_EVENT_UNMAP) as u64;
    /// The faulting thread's id in each message.
    pub const THREAD_ID: u64 = k::UFFD_FEATURE_THREAD_ID as u64;
    /// Write protection of anonymous memory.
    pub const WRITE_PROTECT: u64 = k::UFFD_FEATURE_PAGEFAULT_FLAG_WP as u64;
    /// `UFFDIO_MOVE`.
    pub const MOVE: u64 = k::UFFD_FEATURE_MOVE as u64;
    /// `UFFDIO_POISON`.
    pub const POISON: u64 = k::UFFD_FEATURE_POISON as u64;
}

/// What a uffd tells.
#[derive(Debug)]
pub enum Message {
    /// A thread waits for this address.
    Fault {
        /// The address, not rounded.
        address: u64,
        /// Whether it wants to write.
        write: bool,
        /// Whether the page is there but write-protected.
        protected: bool,
        /// The thread.
        thread: u32,
    },
    /// The program forks; here is the child's uffd. The parent waits until this is read.
    Fork(Uffd),
    /// Memory moved.
    Remap {
        /// From here
        from: u64,
        /// to here,
        to: u64,
        /// this many bytes.
        len: u64,
    },
    /// `madvise` discards this range (DONTNEED, FREE, REMOVE); it goes on once this is read.
    Remove(Range<u64>),
    /// This range is unmapped.
    Unmap(Range<u64>),
}

/// How an install into the address space ended short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstallError {
    /// An event must be read first; so many bytes had been done.
    EventsPending(u64),
    /// A page is there already; so many bytes before it had been done.
    Present(u64),
    /// The range is not registered (any more); so many bytes before it had been done.
    Gone(u64),
    /// The process is gone.
    NoProcess,
    /// No memory for the page; so many bytes before it had been done.
    NoMemory(u64),
    /// Anything else.
    Other(i32),
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd(File);

impl From<OwnedFd> for Uffd {
    fn from(fd: OwnedFd) -> Self {
        Self(File::from(fd))
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Uffd {
    fn ioctl<T>(&self, request: u64, argument: &mut T) -> io::Result<()> {
        // SAFETY: each caller in this file pairs the request with the structure that the kernel defines for
        // it; all are plain data that outlives the call. A descriptor of another kind answers ENOTTY.
        let result =
            unsafe { libc::ioctl(self.0.as_raw_fd(), request, std::ptr::from_mut(argument)) };
        check(i64::from(result)).map(drop)
    }

    /// The first call on a uffd: asks for features. Returns what the kernel has.
    ///
    /// # Errors
    /// The kernel's errno: EPERM without `CAP_SYS_PTRACE` where fork events are asked for.
    pub fn enable(&self, features: u64) -> io::Result<u64> {
        let mut api = k::uffdio_api {
            api: 0xAA,
            features,
            ioctls: 0,
        };
        self.ioctl(UFFDIO_API, &mut api)?;
        Ok(api.features)
    }

    /// Registers whole VMAs.
    ///
    /// # Errors
    /// EBUSY where another uffd has part of it, EINVAL where the mapping is of another kind or gone.
    pub fn register(&self, range: &Range<u64>, write_protect: bool) -> io::Result<()> {
        let mode = k::UFFDIO_REGISTER_MODE_MISSING
            | if write_protect {
                k::UFFDIO_REGISTER_MODE_WP
            } else {
                0
            };
        let mut request = k::uffdio_register {
            range: to_range(range),
            mode: mode as u64,
            ioctls: 0,
        };
        self.ioctl(UFFDIO_REGISTER, &mut request)
    }

    /// Gives a range back to the kernel's own fault handling.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn unregister(&self, range: &Range<u64>) -> io::Result<()> {
        self.ioctl(UFFDIO_UNREGISTER, &mut to_range(range))
    }

    /// Wakes whoever waits in a range.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn wake(&self, range: &Range<u64>) -> io::Result<()> {
        self.ioctl(UFFDIO_WAKE, &mut to_range(range))
    }

    /// Installs copies of `len` bytes at `source` (this process's memory) and wakes who waits there.
    ///
    /// # Errors
    /// [`InstallError`]. An unreadable source is `Other(EFAULT)`: the kernel checks it.
    pub fn copy(
        &self,
        to: u64,
        source: *const u8,
        len: u64,
        write_protect: bool,
    ) -> Result<(), InstallError> {
        let mode = if write_protect {
            u64::from(k::UFFDIO_COPY_MODE_WP)
        } else {
            0
        };
        let mut request = k::uffdio_copy {
            dst: to,
            src: source.addr() as u64,
            len,
            mode,
            copy: 0,
        };
        match self.ioctl(UFFDIO_COPY, &mut request) {
            Ok(()) => Ok(()),
            Err(error) => Err(install_error(&error, request.copy)),
        }
    }

    /// Installs zero pages and wakes who waits there.
    ///
    /// # Errors
    /// [`InstallError`].
    pub fn zero(&self, range: &Range<u64>) -> Result<(), InstallError> {
        let mut request = k::uffdio_zeropage {
            range: to_range(range),
            mode: 0,
            zeropage: 0,
        };
        match self.ioctl(UFFDIO_ZEROPAGE, &mut request) {
            Ok(()) => Ok(()),
            Err(error) => Err(install_error(&error, request.zeropage)),
        }
    }

    /// Marks a range so that touching it raises SIGBUS.
    ///
    /// # Errors
    /// The kernel's errno, ENOTTY or EINVAL before 6.6.
    pub fn poison(&self, range: &Range<u64>) -> io::Result<()> {
        let mut request = k::uffdio_poison {
            range: to_range(range),
            mode: 0,
            updated: 0,
        };
        self.ioctl(UFFDIO_POISON, &mut request)
    }

    /// Lifts write protection of the pages present in a range, and wakes who waits there.
    ///
    /// # Errors
    /// The kernel's errno; EAGAIN while an event is unread.
    pub fn lift_protection(&self, range: &Range<u64>) -> io::Result<()> {
        self.ioctl(
            UFFDIO_WRITEPROTECT,
            &mut k::uffdio_writeprotect {
                range: to_range(range),
                mode: 0,
            },
        )
    }

    /// Whether an event is on its way or unread: the kernel then refuses every install before it looks at
    /// anything else.
    #[must_use]
    pub fn is_changing(&self) -> bool {
        let nothing = Range { start: 1, end: 2 };
        matches!(self.zero(&nothing), Err(InstallError::EventsPending(_)))
    }

    /// Whether the address space still exists: asked by an install where nothing is ever mapped.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        !matches!(self.zero(&(4096..8192)), Err(InstallError::NoProcess))
    }

    /// Reads what there is, without waiting, into slots of a journal, which are empty. The kernel puts each message there
    /// before the call is over, and a process that is killed ends after the call: so no message is lost with it. Returns
    /// how many came.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn read_to(&self, slots: &[JournalSlot]) -> io::Result<usize> {
        for slot in slots {
            // Nor for want of a page to put it in.
            slot[0].store(0, std::sync::atomic::Ordering::Relaxed);
        }
        // SAFETY: the kernel writes within the slots, which are atomics: any bytes are values, and others may look on.
        let got = unsafe {
            libc::read(
                self.0.as_raw_fd(),
                slots.as_ptr().cast_mut().cast(),
                size_of_val(slots),
            )
        };
        match check(got as i64) {
            Ok(got) => Ok(got as usize / size_of::<JournalSlot>()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// The message in a slot. A fork's descriptor is taken out of it: ask once.
    #[must_use]
    pub fn message_in(slot: &JournalSlot) -> Option<Message> {
        let mut raw = [0u8; 32];
        for (bytes, word) in raw.chunks_exact_mut(8).zip(slot) {
            bytes.copy_from_slice(
                &word
                    .load(std::sync::atomic::Ordering::Acquire)
                    .to_ne_bytes(),
            );
        }
        parse(&raw)
    }

    /// The descriptor's number of the forked child that a slot tells of.
    #[must_use]
    pub fn fork_in(slot: &JournalSlot) -> Option<i32> {
        let [event, number, ..] = slot;
        let event = event.load(std::sync::atomic::Ordering::Acquire) as u8;
        (u32::from(event) == k::UFFD_EVENT_FORK)
            .then(|| number.load(std::sync::atomic::Ordering::Relaxed) as u32 as i32)
    }

    /// A descriptor that another agent had under this number.
    #[must_use]
    pub fn left_at(number: i32) -> Option<Self> {
        super::left_at(number).map(Self::from)
    }

    /// The descriptor's number.
    #[must_use]
    pub fn number(&self) -> i32 {
        self.0.as_raw_fd()
    }

    /// Has everybody who waits anywhere look again.
    pub fn wake_all(&self) {
        // What lies below is never mapped; above is the kernel's.
        let _ = self.wake(&(LOWEST_ADDRESS..HIGHEST_ADDRESS));
    }

    /// Reads what there is, at most so much and [`MAX_MESSAGES`], without waiting, to the end of `out`. Returns how many came.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn read(&self, most: usize, out: &mut Vec<Message>) -> io::Result<usize> {
        let mut buffer = [0u8; 32 * MAX_MESSAGES];
        let wanted = &mut buffer[..32 * most.min(MAX_MESSAGES)];
        let got = match rustix::io::read(&self.0, wanted) {
            Ok(got) => got,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(0),
            Err(error) => return Err(error.into()),
        };
        let before = out.len();
        out.extend(buffer[..got].chunks_exact(32).filter_map(parse));
        Ok(out.len() - before)
    }
}

/// One `struct uffd_msg`: an event code, seven bytes reserved, three words.
fn parse(raw: &[u8]) -> Option<Message> {
    let word = |at: usize| Some(u64::from_ne_bytes(raw.get(at..at + 8)?.try_into().ok()?));
    let (a, b, c) = (word(8)?, word(16)?, word(24)?);
    Some(match u32::from(*raw.first()?) {
        k::UFFD_EVENT_PAGEFAULT => Message::Fault {
            address: b,
            write: a & u64::from(k::UFFD_PAGEFAULT_FLAG_WRITE) != 0,
            protected: a & u64::from(k::UFFD_PAGEFAULT_FLAG_WP) != 0,
            thread: c as u32,
        },
        k::UFFD_EVENT_FORK => {
            // SAFETY: the kernel has just installed this descriptor for us alone; nobody else owns it.
            Message::Fork(Uffd::from(unsafe { OwnedFd::from_raw_fd(a as u32 as i32) }))
        }
        k::UFFD_EVENT_REMAP => Message::Remap {
            from: a,
            to: b,
            len: c,
        },
        k::UFFD_EVENT_REMOVE => Message::Remove(a..b),
        k::UFFD_EVENT_UNMAP => Message::Unmap(a..b),
        _ => return None,
    })
}

fn to_range(range: &Range<u64>) -> k::uffdio_range {
    k::uffdio_range {
        start: range.start,
        len: range.end.saturating_sub(range.start),
    }
}

fn install_error(error: &io::Error, done: i64) -> InstallError {
    let bytes = u64::try_from(done).unwrap_or(0);
    match error.raw_os_error().unwrap_or(libc::EIO) {
        libc::EAGAIN if bytes > 0 => InstallError::EventsPending(bytes),
        libc::EAGAIN => InstallError::EventsPending(0),
        libc::EEXIST => InstallError::Present(bytes),
        libc::ENOENT | libc::EINVAL => InstallError::Gone(bytes),
        libc::ESRCH => InstallError::NoProcess,
        libc::ENOMEM => InstallError::NoMemory(bytes),
        other => InstallError::Other(other),
    }
}

/// A new uffd of this process, from an open `/dev/userfaultfd`.
///
/// # Errors
/// The kernel's errno.
pub fn new_from_device(device: BorrowedFd<'_>) -> io::Result<Uffd> {
    const USERFAULTFD_IOC_NEW: u64 = 0xaa00;
    // SAFETY: the ioctl takes flags as an integer and returns a descriptor.
    let result = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            USERFAULTFD_IOC_NEW,
            libc::O_CLOEXEC | libc::O_NONBLOCK,
        )
    };
    let fd = check(i64::from(result))?;
    // SAFETY: a descriptor that the kernel has just made for us.
    Ok(Uffd::from(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
}
