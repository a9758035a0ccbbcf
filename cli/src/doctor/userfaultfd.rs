//! userfaultfd: may this account have one that answers every fault, and what does this kernel's offer?

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use linux_raw_sys::general as uapi;

use crate::doctor::report::Report;
use crate::doctor::sys;

const DEVICE: &str = "/dev/userfaultfd";

/// What every managed program needs from the kernel.
const NEEDED: u64 = (uapi::UFFD_FEATURE_EVENT_FORK
    | uapi::UFFD_FEATURE_EVENT_REMAP
    | uapi::UFFD_FEATURE_EVENT_REMOVE
    | uapi::UFFD_FEATURE_EVENT_UNMAP
    | uapi::UFFD_FEATURE_THREAD_ID) as u64;

/// Why this account cannot manage memory, with what to do about it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UserfaultfdError {
    #[error(
        "this kernel has no userfaultfd; use one built with CONFIG_USERFAULTFD, as all distributions' are"
    )]
    Absent,
    #[error(
        "{DEVICE} is not there; use Linux 6.1 or newer with devtmpfs; in a container, pass the device in \
         (docker run --device {DEVICE} ...)"
    )]
    NoDevice,
    #[error(
        "this account may not use userfaultfd ({DEVICE}: {0}); run farpage as root \
         (sudo farpage ...), or have root start an agent (sudo farpage agent --coordinator URL --socket \
         /run/farpage/agent.sock --group farpage), join its group and use farpage run --agent \
         /run/farpage/agent.sock"
    )]
    Denied(io::Error),
    #[error(
        "this account may use userfaultfd but not follow a program's forks, which takes CAP_SYS_PTRACE; run farpage \
         as root (sudo farpage ...), or have root start an agent (sudo farpage agent --coordinator URL --socket \
         /run/farpage/agent.sock --group farpage), join its group and use farpage run --agent \
         /run/farpage/agent.sock"
    )]
    NoForkEvents,
    #[error(
        "this kernel's userfaultfd lacks a feature that farpage needs ({0}); use Linux 6.1 or newer"
    )]
    TooOld(io::Error),
}

/// Checks that this account can manage programs' memory, by really asking for all that it takes.
pub(crate) fn usable() -> Result<(), UserfaultfdError> {
    let fd = full()?;
    match sys::userfaultfd_api(&fd, NEEDED) {
        Ok(_) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            Err(UserfaultfdError::NoForkEvents)
        }
        Err(error) => Err(UserfaultfdError::TooOld(error)),
    }
}

/// A userfaultfd that also answers faults which the kernel takes on a program's behalf. The agent hands the open device on to
/// programs, which make their own from it: that root may do without it by the system call is of no use to them.
fn full() -> Result<OwnedFd, UserfaultfdError> {
    from_device().map_err(|device| {
        let call = sys::userfaultfd_for_user_mode().err();
        match (call.and_then(|call| call.raw_os_error()), device.kind()) {
            (Some(libc::ENOSYS), _) => UserfaultfdError::Absent,
            (_, io::ErrorKind::NotFound) => UserfaultfdError::NoDevice,
            _ => UserfaultfdError::Denied(device),
        }
    })
}

fn from_device() -> io::Result<OwnedFd> {
    sys::userfaultfd_from(&File::options().read(true).write(true).open(DEVICE)?)
}

/// A feature: its bit, the name scripts see, what it is for, the first kernel with it, and whether all depends on it.
type Feature = (u32, &'static str, &'static str, &'static str, bool);

const FEATURES: [Feature; 10] = [
    (
        uapi::UFFD_FEATURE_MOVE,
        "uffd_move",
        "taking pages out at once and safely, also while they are written or pinned for I/O",
        "6.8; until then pages are moved by mremap, which does not see pins",
        false,
    ),
    (
        uapi::UFFD_FEATURE_POISON,
        "uffd_poison",
        "SIGBUS on exactly the pages whose only copy was lost",
        "6.6; until then the signal is sent to the thread that touches one",
        false,
    ),
    (
        uapi::UFFD_FEATURE_WP_ASYNC,
        "uffd_wp_async",
        "learning which pages were written without a message for each",
        "6.7; until then a page's hash tells whether it changed",
        false,
    ),
    (
        uapi::UFFD_FEATURE_PAGEFAULT_FLAG_WP,
        "uffd_wp",
        "write protection of pages that are being taken out, where they cannot be moved",
        "5.7, built with CONFIG_HAVE_ARCH_USERFAULTFD_WP",
        false,
    ),
    (
        uapi::UFFD_FEATURE_EVENT_FORK,
        "uffd_event_fork",
        "following a program's children",
        "4.11",
        true,
    ),
    (
        uapi::UFFD_FEATURE_EVENT_REMAP,
        "uffd_event_remap",
        "following memory that is moved by mremap",
        "4.11",
        true,
    ),
    (
        uapi::UFFD_FEATURE_EVENT_REMOVE,
        "uffd_event_remove",
        "freeing far pages that are discarded",
        "4.11",
        true,
    ),
    (
        uapi::UFFD_FEATURE_EVENT_UNMAP,
        "uffd_event_unmap",
        "freeing far pages that are unmapped",
        "4.11",
        true,
    ),
    (
        uapi::UFFD_FEATURE_THREAD_ID,
        "uffd_thread_id",
        "knowing which thread waits, and which one forked",
        "4.14",
        true,
    ),
    (
        uapi::UFFD_FEATURE_EXACT_ADDRESS,
        "uffd_exact_address",
        "the exact address of a fault, for logs and prefetching",
        "5.18; until then the page's",
        false,
    ),
];

pub(crate) fn check(report: &mut Report) {
    access(report);
    // One for user-mode faults only may be had by everybody and knows the same features.
    let fd = full().or_else(|_| sys::userfaultfd_for_user_mode());
    let features = fd.and_then(|fd| sys::userfaultfd_api(&fd, 0));
    for (bit, id, purpose, since, needed) in FEATURES {
        match &features {
            Ok(features) if features & u64::from(bit) != 0 => report.ok(id, "there", purpose),
            Ok(_) if needed => {
                report.missing(id, "not in this kernel", purpose, format!("Linux {since}"));
            }
            Ok(_) => report.optional(id, "not in this kernel", purpose, format!("Linux {since}")),
            Err(error) => {
                let remedy = "in a container, a seccomp profile that allows userfaultfd; else run doctor as root";
                report.optional(id, format!("cannot be asked: {error}"), purpose, remedy);
            }
        }
    }
}

fn access(report: &mut Report) {
    let purpose = "managing memory: a descriptor that answers every fault, also those the kernel takes in read(2)";
    let forks =
        "following a program's children; only who asks for it needs this, and that is the agent";
    match usable() {
        Ok(()) => {
            report.ok("userfaultfd", "this account may use it", purpose);
            report.ok("fork_events", "this account may ask for them", forks);
        }
        Err(error @ UserfaultfdError::NoForkEvents) => {
            report.ok("userfaultfd", "this account may use it", purpose);
            report.missing(
                "fork_events",
                "needs CAP_SYS_PTRACE",
                forks,
                error.to_string(),
            );
        }
        Err(error) => {
            let found = if matches!(error, UserfaultfdError::Denied(_)) {
                "denied"
            } else {
                "unusable"
            };
            report.missing("userfaultfd", found, purpose, error.to_string());
        }
    }
}

impl From<UserfaultfdError> for io::Error {
    fn from(error: UserfaultfdError) -> Self {
        Self::other(error.to_string())
    }
}
