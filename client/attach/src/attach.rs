//! Attaching the calling process to the agent: the handshake, the ranges, the helper.

// No heap to box the refusal's text in: an error may be large here, it is made once per process.
#![allow(clippy::result_large_err, clippy::large_enum_variant)]

use linux_raw_sys::general as k;

use crate::PAGE_BYTES;
use crate::control::{BATCH_PAGES, Control, SHARED_BYTES};
use crate::helper::HelperArgs;
use crate::landing;
use crate::message::{MAX_FDS, MAX_TEXT, Packet, tag};
use crate::sys::{Errno, calls, memory, socket};

/// Our ranges in the program: thread pointer page and arguments, stacks of the process for one batch, of the one that moves to
/// the landing range and of the helper, holding, drain, landing.
const TLS_BYTES: usize = PAGE_BYTES;
const STACK_BYTES: usize = 4 * PAGE_BYTES;
const BATCH_STACK_BYTES: usize = 4 * PAGE_BYTES;
const RANGE_BYTES: usize = BATCH_PAGES * PAGE_BYTES;
const LANDING_STACK_BYTES: usize = 4 * PAGE_BYTES;
const BEFORE_RANGES: usize = TLS_BYTES + BATCH_STACK_BYTES + LANDING_STACK_BYTES + STACK_BYTES;
const OWN_BYTES: usize = BEFORE_RANGES + 2 * RANGE_BYTES + landing::BYTES;

/// How an attempt to attach ended badly. The process is as it was before.
#[derive(Debug)]
pub enum AttachError {
    /// No agent at that socket.
    Unreachable(Errno),
    /// The agent said no; its reason, of the length given.
    Refused([u8; MAX_TEXT], usize),
    /// The agent went away or spoke something else.
    Handshake(Errno),
    /// A system call of the set-up failed; which.
    System(&'static str, Errno),
}

impl AttachError {
    /// Whether nobody listens on that socket any more though it was waited for: what a forked child inherited far has nobody who
    /// would bring it. Of a name in the abstract namespace that is not known: the process may have left its network namespace.
    #[must_use]
    pub fn is_of_a_dead_agent(&self, path: &[u8]) -> bool {
        !is_abstract(path) && matches!(self, Self::Unreachable(Errno(ECONNREFUSED)))
    }
}

fn is_abstract(path: &[u8]) -> bool {
    path.first() == Some(&b'@')
}

const EPIPE: u32 = 32;
const ECONNRESET: u32 = 104;
const ECONNREFUSED: u32 = 111;

/// A process that is attached.
#[derive(Clone, Copy, Debug)]
pub struct Attached {
    /// The control block, mapped for as long as the program image lives.
    pub control: &'static Control,
    /// The address space's number at the agent.
    pub space: u64,
    /// The handshake's socket where it was kept, else -1.
    pub socket: i32,
    shared: usize,
    own: usize,
    helper: i32,
}

impl Attached {
    /// Undoes the attachment once the agent has let go of this address space: ends and reaps the helper, unmaps
    /// what was ours. Neither this value nor a copy of it, nor its control block, may be used afterwards.
    pub fn detach(self) {
        calls::kill(self.helper, calls::SIGKILL);
        calls::reap_clone(self.helper);
        memory::unmap_own(self.own, OWN_BYTES);
        memory::unmap_own(self.shared, SHARED_BYTES);
        if self.socket >= 0 {
            calls::close(self.socket);
        }
    }

    /// Forgets the parent's attachment in a forked child. Its own ranges did not come along (DONTFORK), but what lay in the landing
    /// range just then; the shared block did.
    pub fn abandon_after_fork(self) {
        memory::unmap_own(landing_range(self.own), landing::BYTES);
        memory::unmap_own(self.shared, SHARED_BYTES);
    }
}

/// Attaches this process. `kind` is one of [`crate::message::kind`], `parent` the address space of the parent
/// after a fork, else 0. With `keep_socket` the connection stays open, for the library's requests.
///
/// # Errors
/// [`AttachError`]; whatever was mapped or opened is undone.
pub fn attach(
    path: &[u8],
    kind: u32,
    job: u64,
    parent: u64,
    keep_socket: bool,
) -> Result<Attached, AttachError> {
    let mut patience = Patience::of(path);
    loop {
        match attempt(path, kind, job, parent, keep_socket) {
            Err(error) if patience.waits_for_the_next_agent(&error) => {}
            result => return result,
        }
    }
}

fn attempt(
    path: &[u8],
    kind: u32,
    job: u64,
    parent: u64,
    keep_socket: bool,
) -> Result<Attached, AttachError> {
    let fd = socket::connect(path).map_err(AttachError::Unreachable)?;
    let result = handshake(path, fd, kind, job, parent);
    if !keep_socket || result.is_err() {
        calls::close(fd);
    }
    result.map(|attached| Attached {
        socket: if keep_socket { fd } else { -1 },
        ..attached
    })
}

/// How long the next agent is waited for yet.
struct Patience {
    left_ms: u64,
}

impl Patience {
    /// None comes to the name of a run's own agent. In another network namespace nobody listens on it either, and each fork
    /// would wait in vain.
    fn of(path: &[u8]) -> Self {
        let left_ms = match is_abstract(path) {
            true => 0,
            false => AGENT_DEADLINE_MS,
        };
        Self { left_ms }
    }

    /// Whether the agent was killed, as it seems, and another may come: waits a little if so.
    fn waits_for_the_next_agent(&mut self, error: &AttachError) -> bool {
        let is_gone = matches!(
            error,
            AttachError::Unreachable(Errno(ECONNREFUSED))
                | AttachError::Handshake(Errno(ECONNRESET | EPIPE))
        );
        if !is_gone || self.left_ms == 0 {
            return false;
        }
        calls::sleep_ms(AGENT_POLL_MS);
        self.left_ms = self.left_ms.saturating_sub(AGENT_POLL_MS);
        true
    }
}

/// How long a program that attaches waits for the next agent: longer than the agent's own default of how long it may take.
const AGENT_DEADLINE_MS: u64 = 15_000;
const AGENT_POLL_MS: u64 = 20;

/// The agent was killed before it said that we are attached, but after it told us what we are: the next one knows whether we are.
fn confirm(path: &[u8], job: u64, space: u64, helper: i32) -> Result<(), AttachError> {
    let mut hello = Packet::new(tag::HELLO);
    (hello.kind, hello.job, hello.parent) = (crate::message::kind::CONFIRM, job, space);
    hello.helper = helper as u64;
    let mut patience = Patience::of(path);
    loop {
        let asked = socket::connect(path)
            .map_err(AttachError::Unreachable)
            .and_then(|fd| {
                let sent = socket::send(fd, &hello, &[]).map_err(AttachError::Handshake);
                let done = sent.and_then(|()| expect(fd, tag::DONE).map(drop));
                calls::close(fd);
                done
            });
        match asked {
            Err(error) if patience.waits_for_the_next_agent(&error) => {}
            result => return result,
        }
    }
}

fn handshake(
    path: &[u8],
    fd: i32,
    kind: u32,
    job: u64,
    parent: u64,
) -> Result<Attached, AttachError> {
    let mut hello = Packet::new(tag::HELLO);
    (hello.kind, hello.job, hello.parent) = (kind, job, parent);
    socket::send(fd, &hello, &[]).map_err(AttachError::Handshake)?;
    let (_, fds) = expect(fd, tag::WELCOME)?;
    let open = OpenFds(fds);
    let [device, memfd, event, lifeline, pagemap] = fds;

    let shared = calls::mmap(
        SHARED_BYTES,
        k::PROT_READ | k::PROT_WRITE,
        k::MAP_SHARED,
        memfd,
    )
    .map_err(|errno| AttachError::System("mapping the control block", errno))?;
    let result = with_ranges(|own| {
        let uffd = calls::new_uffd(device)
            .map_err(|errno| AttachError::System("USERFAULTFD_IOC_NEW", errno))?;
        let uffds = OpenFds::one(uffd);
        let drain = calls::new_uffd(device)
            .map_err(|errno| AttachError::System("USERFAULTFD_IOC_NEW", errno))?;
        let drains = OpenFds::one(drain);
        let mut ready = Packet::new(tag::READY);
        ready.holding = holding(own) as u64;
        ready.drain = (holding(own) + RANGE_BYTES) as u64;
        socket::send(fd, &ready, &[uffd, drain]).map_err(AttachError::Handshake)?;
        let (go, given) = expect(fd, tag::GO)?;
        let given = OpenFds(given);
        let inherited = given.0.first().copied().filter(|fd| *fd >= 0);
        let args = HelperArgs {
            shared,
            holding: holding(own),
            drain: holding(own) + RANGE_BYTES,
            landing: landing_range(own),
            uffd: inherited.unwrap_or(uffd),
            drain_uffd: drain,
            event,
            lifeline,
            pagemap,
            batch_stack: own + TLS_BYTES + BATCH_STACK_BYTES,
            landing_stack: own + TLS_BYTES + BATCH_STACK_BYTES + LANDING_STACK_BYTES,
            tls: own,
            pid: 0,
        };
        let helper = start_helper(own, args)?;
        let mut up = Packet::new(tag::HELPER_UP);
        up.helper = helper as u64;
        let sent = socket::send(fd, &up, &[]).map_err(AttachError::Handshake);
        let done = sent.and_then(|()| expect(fd, tag::DONE).map(drop));
        drop((uffds, drains, given));
        let done = match done {
            Err(AttachError::Handshake(Errno(ECONNRESET | EPIPE))) => {
                match confirm(path, job, go.job, helper) {
                    // It does not know us: from the beginning.
                    Err(AttachError::Refused(..)) => Err(AttachError::Handshake(Errno(ECONNRESET))),
                    result => result,
                }
            }
            done => done,
        };
        if let Err(error) = done {
            calls::kill(helper, calls::SIGKILL);
            calls::reap_clone(helper);
            return Err(error);
        }
        Ok(Attached {
            control: memory::control_at(shared),
            space: go.job,
            socket: -1,
            shared,
            own,
            helper,
        })
    });
    drop(open);
    if result.is_err() {
        memory::unmap_own(shared, SHARED_BYTES);
    }
    result
}

fn with_ranges(
    body: impl FnOnce(usize) -> Result<Attached, AttachError>,
) -> Result<Attached, AttachError> {
    let own =
        map_ranges().map_err(|errno| AttachError::System("mapping the holding range", errno))?;
    for advice in [k::MADV_DONTFORK, k::MADV_DONTDUMP, k::MADV_NOHUGEPAGE] {
        memory::advise_own(own, OWN_BYTES, advice);
    }
    memory::clear_range(landing_range(own), landing::BYTES);
    let result = body(own);
    if result.is_err() {
        memory::unmap_own(own, OWN_BYTES);
    }
    result
}

/// Somewhere at random: the agent finds a forked child among its siblings by who has a mapping at these addresses, and
/// siblings' mappings are otherwise at the same.
fn map_ranges() -> Result<usize, Errno> {
    let map = |address: usize, fixed: u32| {
        let flags = k::MAP_PRIVATE | k::MAP_ANONYMOUS | k::MAP_NORESERVE | fixed;
        calls::mmap_at(address, OWN_BYTES, k::PROT_READ | k::PROT_WRITE, flags, -1)
    };
    let at_random = || {
        let random = calls::random()? as usize;
        let address = RANDOM_FROM + random % (RANDOM_TO - RANDOM_FROM);
        map(address & !(PAGE_BYTES - 1), k::MAP_FIXED_NOREPLACE).ok()
    };
    match (0..RANDOM_TRIES).find_map(|_| at_random()) {
        Some(own) => Ok(own),
        None => map(0, 0),
    }
}

/// Between where programs are linked to and where the kernel puts their mappings, without what sanitizers and runtimes
/// claim at fixed places below.
const RANDOM_FROM: usize = 0x2000_0000_0000;
const RANDOM_TO: usize = 0x5000_0000_0000;
const RANDOM_TRIES: usize = 4;

const fn holding(own: usize) -> usize {
    own + BEFORE_RANGES
}

const fn landing_range(own: usize) -> usize {
    holding(own) + 2 * RANGE_BYTES
}

fn start_helper(own: usize, args: HelperArgs) -> Result<i32, AttachError> {
    // The arguments lie in the upper half of the page whose start is the thread pointer.
    let args_address = own + PAGE_BYTES / 2;
    memory::write_args(args_address, args);
    let mask = calls::block_signals();
    let started = memory::start_helper(args_address, holding(own), own);
    calls::set_signal_mask(mask);
    started.map_err(|errno| AttachError::System("starting the helper", errno))
}

fn expect(fd: i32, tag: u32) -> Result<(Packet, [i32; MAX_FDS]), AttachError> {
    const EPROTO: u32 = 71;
    let received = socket::receive(fd).map_err(AttachError::Handshake)?;
    if received.packet.tag == tag {
        return Ok((received.packet, received.fds));
    }
    drop(OpenFds(received.fds));
    if received.packet.tag == crate::message::tag::REFUSAL {
        return Err(AttachError::Refused(received.text, received.text_len));
    }
    Err(AttachError::Handshake(Errno(EPROTO)))
}

/// Closes what it holds.
struct OpenFds([i32; MAX_FDS]);

impl OpenFds {
    fn one(fd: i32) -> Self {
        let mut all = [-1; MAX_FDS];
        all[0] = fd;
        Self(all)
    }
}

impl Drop for OpenFds {
    fn drop(&mut self) {
        for fd in self.0.into_iter().filter(|fd| *fd >= 0) {
            calls::close(fd);
        }
    }
}
