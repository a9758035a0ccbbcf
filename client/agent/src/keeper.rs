//! The keeper: a process that holds what must outlive the agent until the next one takes it over.
//!
//! The agent starts it as soon as it has its socket, before it opens anything that is to be kept. It shares the agent's table of descriptors, so that whatever the agent has, it has,
//! up to the descriptor of a forked child that the kernel has just put there. While the agent lives it sleeps. When the
//! agent dies it opens a socket of its own, closes all but what the state names, and waits: the next agent on the same socket is
//! handed everything, or the deadline passes and the keeper ends, and with it the programs' lifelines.
//!
//! Who holds the state is one word in it: whoever is not named there ends. So an agent may be killed at any point of taking over.
//!
//! What runs in the keeper takes no lock and allocates nothing: it begins as a copy of a process that may have threads.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with,
};
use rustix::time::Timespec;

use crate::state::State;
use crate::state::records::space;
use crate::sys::descriptors::{self, Numbers};
use crate::sys::keeper::{self as sys, SharedWord};
use crate::sys::state::StateMemory;
use crate::sys::uffd::Uffd;

/// How long the next agent may take over any step of the handover, and how long it waits for the keeper: that has to close what
/// the dead agent had, and both may be starved on a loaded machine.
const STEP_DEADLINE: Duration = Duration::from_secs(5);
const KEEPER_DEADLINE: Duration = Duration::from_secs(20);
/// How often the keeper looks whether the state is still its.
const LOOK_MS: u64 = 200;
/// The most of a lease's time that may pass without an agent: the rest is for the next one to renew it in.
const LEASE_SHARE: (u64, u64) = (4, 5);

/// The agent's end of it.
#[derive(Debug)]
pub(crate) struct Keeper {
    pid: i32,
    word: SharedWord,
    socket: String,
    /// To the keeper of the agent before, if one waits.
    before: Option<OwnedFd>,
    /// Shared with the keeper, which waits for it: closed with the agent.
    _agent: OwnedFd,
}

impl Keeper {
    /// Starts the keeper of the agent on this socket. From now on no descriptor that is opened has a low number.
    ///
    /// # Errors
    /// The kernel's errno.
    pub(crate) fn start(socket: &str, deadline: Duration) -> io::Result<Self> {
        let agent = sys::this_process()?;
        let address = address(socket)?;
        // Before low numbers are taken: what it hands over must find its numbers free.
        let before = new_socket()?;
        let before = connect(&before, &address).is_ok().then_some(before);
        descriptors::occupy_low_numbers(agent.as_fd())?;
        let word = SharedWord::new()?;
        let deadline = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
        let path = path(socket);
        let pid = sys::start(|| {
            sys::step_aside();
            keep(agent.as_fd(), &word, &address, path.as_deref(), deadline);
        })?;
        Ok(Self {
            pid,
            word,
            socket: socket.to_owned(),
            before,
            _agent: agent,
        })
    }

    /// Has the keeper hold this state from now on.
    pub(crate) fn hold(&self, state: &State) {
        let number = state.memory().number();
        self.word.get().state.store(number, Ordering::Release);
        state.header().keeper.store(self.pid, Ordering::Release);
    }

    /// What an agent left that died, if its keeper waits; it is this agent's from now on, and its keeper's.
    ///
    /// # Errors
    /// The kernel's errno, or `PermissionDenied` where another user listens there.
    pub(crate) fn take_over(&mut self) -> io::Result<Option<Arc<State>>> {
        let Some(peer) = self.before.take() else {
            return Ok(None);
        };
        let (_, uid, _) = crate::sys::socket::peer(peer.as_fd())?;
        if uid != rustix::process::geteuid().as_raw() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        crate::sys::socket::set_deadline(peer.as_fd(), KEEPER_DEADLINE)?;
        let mut number = [0u8; 4];
        rustix::net::recv(&peer, &mut number, rustix::net::RecvFlags::empty())?;
        descriptors::receive_all(peer.as_fd())?;
        let state = crate::sys::left_at(i32::from_ne_bytes(number));
        let state = Arc::new(State::adopt(state.ok_or(io::ErrorKind::InvalidData)?)?);
        self.hold(&state);
        // The keeper before this one sees that it is not named any more when it is hung up on.
        rustix::net::shutdown(&peer, rustix::net::Shutdown::Write)?;
        let _ = rustix::net::recv(&peer, &mut number, rustix::net::RecvFlags::empty());
        if let Some(path) = path(&self.socket) {
            let _ = rustix::fs::unlink(path);
        }
        Ok(Some(state))
    }

    /// The agent ends by itself: nothing is kept. An agent that fails does not say so, and what it has taken over is kept.
    pub(crate) fn end(&self) {
        self.word.get().ended.store(true, Ordering::Release);
        sys::end(self.pid);
    }
}

/// Where the keeper of the agent on this socket listens.
fn address(socket: &str) -> io::Result<SocketAddrUnix> {
    Ok(match socket.strip_prefix('@') {
        Some(name) => SocketAddrUnix::new_abstract_name(format!("{name}.keeper").as_bytes())?,
        None => SocketAddrUnix::new(format!("{socket}.keeper"))?,
    })
}

fn path(socket: &str) -> Option<std::ffi::CString> {
    let path = format!("{socket}.keeper");
    (!socket.starts_with('@'))
        .then(|| std::ffi::CString::new(path).ok())
        .flatten()
}

fn new_socket() -> rustix::io::Result<OwnedFd> {
    socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
}

/// The keeper's life.
fn keep(
    agent: BorrowedFd<'_>,
    word: &SharedWord,
    address: &SocketAddrUnix,
    path: Option<&std::ffi::CStr>,
    deadline_ms: u64,
) {
    while !is_readable(agent, None) {}
    let word = word.get();
    let number = word.state.load(Ordering::Acquire);
    if word.ended.load(Ordering::Acquire) || number <= 0 {
        return;
    }
    let Ok(state) = StateMemory::map_again(number) else {
        return;
    };
    let header = state.borrow_header();
    let is_mine = || header.keeper.load(Ordering::Acquire) == sys::own_pid();
    let mut kept = named(&state);
    let nothing = kept.iter().next().is_none() && !has_jobs(&state);
    if !is_mine() || nothing {
        return;
    }
    kept.add(number);
    let alone_since = match header.alone_since_ms.load(Ordering::Relaxed) {
        0 => sys::now_ms(),
        since => since,
    };
    header.alone_since_ms.store(alone_since, Ordering::Relaxed);
    let (share, of) = LEASE_SHARE;
    let lease_ms = header.lease_ttl_ms.load(Ordering::Relaxed) / of * share;
    let until = alone_since.saturating_add(deadline_ms.min(lease_ms));
    // Before the agent's own socket is closed: who finds nobody there finds the keeper here.
    let Ok(listener) = open(address, path) else {
        return;
    };
    let mut open = kept.clone();
    open.add(sys::number(&listener));
    descriptors::close_all_but(&open);
    loop {
        let left = until.saturating_sub(sys::now_ms());
        if !is_mine() {
            return;
        }
        if left == 0 {
            break;
        }
        if is_readable(listener.as_fd(), Some(left.min(LOOK_MS)))
            && let Ok(peer) = accept_with(&listener, SocketFlags::CLOEXEC)
        {
            let _ = hand_over(&peer, number, &kept);
        }
    }
    if let Some(path) = path {
        let _ = rustix::fs::unlink(path);
    }
}

/// The descriptors that the state names.
fn named(state: &StateMemory) -> Numbers {
    let mut kept = Numbers::default();
    for number in 0..state.borrow_header().spaces.load(Ordering::Acquire) {
        let record = state.borrow_space(number);
        if record.state.load(Ordering::Acquire) != space::LIVE {
            continue;
        }
        for field in [
            &record.uffd,
            &record.drain_uffd,
            &record.control,
            &record.event,
            &record.lifeline,
        ] {
            match field.load(Ordering::Acquire) {
                0 => {}
                number => kept.add(number),
            }
        }
        for child in record.journal.iter().filter_map(Uffd::fork_in) {
            kept.add(child);
        }
    }
    kept
}

/// Whether somebody will ask for a job's account.
fn has_jobs(state: &StateMemory) -> bool {
    let jobs = state.borrow_header().jobs.load(Ordering::Acquire);
    (0..jobs).any(|number| state.borrow_job(number).live.load(Ordering::Acquire))
}

/// Opens the keeper's socket. A file of that name is another keeper's that has handed over, or was killed.
fn open(address: &SocketAddrUnix, path: Option<&std::ffi::CStr>) -> rustix::io::Result<OwnedFd> {
    let listener = new_socket()?;
    if let Some(path) = path {
        let _ = rustix::fs::unlink(path);
    }
    bind(&listener, address)?;
    if let Some(path) = path {
        // Nobody can connect before `listen`, so there is no moment with other permissions.
        rustix::fs::chmod(path, rustix::fs::Mode::from_raw_mode(0o600))?;
    }
    listen(&listener, 1)?;
    Ok(listener)
}

/// Hands everything to an agent of the same user, and waits until it says so or hangs up.
fn hand_over(peer: &OwnedFd, state: i32, kept: &Numbers) -> io::Result<()> {
    let (_, uid, _) = crate::sys::socket::peer(peer.as_fd())?;
    if uid != rustix::process::geteuid().as_raw() {
        return Ok(());
    }
    crate::sys::socket::set_deadline(peer.as_fd(), STEP_DEADLINE)?;
    rustix::net::send(peer, &state.to_ne_bytes(), rustix::net::SendFlags::NOSIGNAL)?;
    descriptors::send_all(peer.as_fd(), kept)?;
    rustix::net::recv(peer, &mut [0u8; 4], rustix::net::RecvFlags::empty())?;
    Ok(())
}

fn is_readable(fd: BorrowedFd<'_>, within_ms: Option<u64>) -> bool {
    let timeout = within_ms.map(|ms| Timespec {
        tv_sec: i64::try_from(ms / 1000).unwrap_or(i64::MAX),
        tv_nsec: (ms % 1000 * 1_000_000) as _,
    });
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    poll(&mut fds, timeout.as_ref()).is_ok_and(|ready| ready > 0)
}

/// Whether an agent that lives listens on a socket. Where one has died, its keeper is about to close it.
pub(crate) fn is_of_a_living_agent(socket: &str) -> bool {
    let address = match socket.strip_prefix('@') {
        Some(name) => SocketAddrUnix::new_abstract_name(name.as_bytes()),
        None => SocketAddrUnix::new(socket),
    };
    let Ok(peer) = new_socket() else { return true };
    let connected = address.and_then(|address| connect(&peer, &address));
    connected.is_ok()
        && crate::sys::socket::peer(peer.as_fd())
            .is_ok_and(|(pid, _, _)| crate::sys::process::is_running(pid))
}
