//! Attaching at the program's start and in forked children.

use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};

use farpage_attach::attach::{Attached, attach};
use farpage_attach::control::Control;
use farpage_attach::message::{JOB_VARIABLE, SOCKET_VARIABLE, kind};
use farpage_attach::sys::calls;

use crate::sys;

const SIGKILL: u32 = 9;

/// The control block of this process, null while it is not attached.
static CONTROL: AtomicPtr<Control> = AtomicPtr::new(core::ptr::null_mut());
static JOB: AtomicU64 = AtomicU64::new(0);
static ATTACHED: sys::Slot<Attached> = sys::Slot::new();
/// Whether the program has put a system call filter on itself since it attached.
static FILTERED: AtomicBool = AtomicBool::new(false);
static SOCKET: sys::Slot<SocketName> = sys::Slot::new();

/// The agent's address, copied: programs that set their title write over the environment's strings.
#[derive(Clone, Copy)]
struct SocketName {
    bytes: [u8; MAX_SOCKET_NAME],
    len: usize,
}

/// The longest name that a Unix socket's address holds.
const MAX_SOCKET_NAME: usize = 108;

impl SocketName {
    fn new(name: &[u8]) -> Option<Self> {
        let mut bytes = [0; MAX_SOCKET_NAME];
        bytes.get_mut(..name.len())?.copy_from_slice(name);
        Some(Self {
            bytes,
            len: name.len(),
        })
    }

    fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// This process's control block, while it is attached.
#[inline]
pub(crate) fn control() -> Option<&'static Control> {
    sys::control_ref(CONTROL.load(Ordering::Relaxed))
}

/// The constructor.
pub(crate) fn start() {
    let (Some(socket), Some(job)) = (
        sys::variable(SOCKET_VARIABLE.as_bytes()),
        sys::variable(JOB_VARIABLE.as_bytes()),
    ) else {
        return;
    };
    let (Some(job), Some(name)) = (parse_hex(job), SocketName::new(socket)) else {
        return;
    };
    JOB.store(job, Ordering::Relaxed);
    SOCKET.set(name);
    // A refusal is the agent's to report: it counts this process as unmanaged. The program runs on.
    if let Ok(attached) = attach(socket, kind::START, job, 0, false) {
        remember(attached);
    }
    sys::at_fork(child_after_fork);
}

/// In the child of a fork, before `fork` returns in it.
extern "C" fn child_after_fork() {
    let (Some(parent), Some(socket)) = (ATTACHED.get(), SOCKET.get()) else {
        return;
    };
    CONTROL.store(core::ptr::null_mut(), Ordering::Relaxed);
    ATTACHED.clear();
    if FILTERED.load(Ordering::Relaxed) {
        // The filter might kill whoever calls `socket`. What was far is served all the same, but stays once home.
        return;
    }
    let job = JOB.load(Ordering::Relaxed);
    match attach(socket.as_bytes(), kind::FORK, job, parent.space, false) {
        Ok(attached) => remember(attached),
        // Its parent is ended by its helper. This one has none yet, and would find zeros where pages are far.
        Err(error) if error.is_of_a_dead_agent(socket.as_bytes()) => {
            calls::kill(calls::getpid(), SIGKILL);
        }
        Err(_) => {}
    }
    parent.abandon_after_fork();
}

/// Before a call that may install a system call filter.
pub(crate) fn before_filter() {
    FILTERED.store(true, Ordering::Relaxed);
}

fn remember(attached: Attached) {
    ATTACHED.set(attached);
    CONTROL.store(
        core::ptr::from_ref(attached.control).cast_mut(),
        Ordering::Release,
    );
}

fn parse_hex(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 16 {
        return None;
    }
    text.iter().try_fold(0u64, |value, digit| {
        let digit = (*digit as char).to_digit(16)?;
        Some((value << 4) | u64::from(digit))
    })
}
