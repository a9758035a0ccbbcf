//! The door: the agent's Unix socket, where programs attach, [`launcher`]s open jobs, and programs ask about their [`pages`].

mod launcher;
mod pages;

use std::fs::Permissions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use farpage_attach::control::BATCH_PAGES;
use farpage_attach::message::{MAX_TEXT, Packet, kind, tag};
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen,
    send, socket_with, socketpair,
};

use crate::job::Job;
use crate::mailbox::{HelperOffer, Request, SpaceHandle};
use crate::pager::{Pager, Shared};
use crate::sys::control::SharedBlock;
use crate::sys::pagemap::Pagemap;
use crate::sys::process::{Process, leads_session, share_memory};
use crate::sys::socket;
use crate::sys::uffd::Uffd;

/// How long a peer may take over any step.
const STEP_DEADLINE: Duration = Duration::from_secs(5);
/// How long a forked child's parent's pager may take to be through with the fork, and each pager that might be the child's own to
/// say whether it is: longer than the child waits for it.
const ADOPTION_DEADLINE: Duration = Duration::from_secs(12);
/// How often a closing address space is looked at.
const CLOSE_POLL: Duration = Duration::from_millis(1);
/// How often a helper is looked at that has no session of its own yet. It is about to, and a program waits for it.
const SESSION_POLL: Duration = Duration::from_micros(50);
/// Most peers at the door at once; more are turned away.
const MAX_PEERS: usize = 512;
const BACKLOG: i32 = 128;
const RANGE_BYTES: u64 = (BATCH_PAGES * 4096) as u64;

/// Who may come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    /// The agent's own user, who always may, like root.
    pub own_uid: u32,
    /// Members of this group may.
    pub group: Option<u32>,
}

impl Admission {
    fn admits(self, peer: &OwnedFd, uid: u32, gid: u32) -> bool {
        uid == 0
            || uid == self.own_uid
            || self.group.is_some_and(|group| {
                gid == group
                    || socket::peer_groups(peer.as_fd()).is_ok_and(|groups| groups.contains(&group))
            })
    }
}

/// Everything that the door needs.
#[derive(Debug)]
pub struct Door {
    /// What pagers share.
    pub shared: Shared,
    /// The open `/dev/userfaultfd` that is handed to programs.
    pub device: OwnedFd,
    /// Who may come in.
    pub admission: Admission,
    /// The fabric's name, for accounts.
    pub fabric: String,
    /// How long a fault may wait in jobs that do not say.
    pub fault_deadline: Duration,
    /// Peers being served now.
    pub peers: AtomicUsize,
}

/// Opens the agent's socket: a path, or `@name` in the abstract namespace. A path may be connected to by its owner and
/// by `group`; an abstract name by anybody. Whoever connects is looked at again by [`Admission`].
///
/// # Errors
/// The kernel's errno; an existing path that nobody listens on is replaced.
pub fn open(path: &str, group: Option<u32>) -> io::Result<OwnedFd> {
    let address = match path.strip_prefix('@') {
        Some(name) => SocketAddrUnix::new_abstract_name(name.as_bytes())?,
        None => SocketAddrUnix::new(path)?,
    };
    let new = || {
        socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
    };
    let fd = new()?;
    if let Err(error) = bind(&fd, &address) {
        let stale = error == rustix::io::Errno::ADDRINUSE
            && !path.starts_with('@')
            && rustix::net::connect(&new()?, &address) == Err(rustix::io::Errno::CONNREFUSED);
        if !stale {
            return Err(error.into());
        }
        std::fs::remove_file(path)?;
        bind(&fd, &address)?;
    }
    if !path.starts_with('@') {
        // Nobody can connect before `listen`, so there is no moment with other permissions.
        let mode = if group.is_some() { 0o660 } else { 0o600 };
        std::os::unix::fs::chown(path, None, group)
            .and_then(|()| std::fs::set_permissions(path, Permissions::from_mode(mode)))
            .inspect_err(|_| drop(std::fs::remove_file(path)))?;
    }
    listen(&fd, BACKLOG)?;
    Ok(fd)
}

impl Door {
    /// Serves peers until `ended` says so. The listener is closed with the agent.
    pub fn serve(self: &Arc<Self>, listener: &OwnedFd, ended: &dyn Fn() -> bool) {
        while !ended() {
            let Ok(peer) = accept_with(listener, SocketFlags::CLOEXEC) else {
                std::thread::sleep(Duration::from_millis(10));
                continue;
            };
            if self.peers.fetch_add(1, Ordering::AcqRel) >= MAX_PEERS {
                self.peers.fetch_sub(1, Ordering::AcqRel);
                continue;
            }
            let door = Arc::clone(self);
            let started = std::thread::Builder::new()
                .name("door".into())
                .spawn(move || {
                    if let Err(error) = door.greet(&peer) {
                        tracing::debug!(%error, "a peer at the door left");
                    }
                    door.peers.fetch_sub(1, Ordering::AcqRel);
                });
            if started.is_err() {
                self.peers.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    fn greet(&self, peer: &OwnedFd) -> io::Result<()> {
        socket::set_deadline(peer.as_fd(), STEP_DEADLINE)?;
        let (pid, uid, gid) = socket::peer(peer.as_fd())?;
        let hello = socket::receive(peer.as_fd())?.packet;
        if hello.tag != tag::HELLO {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // Who knows a job's token was given it by a process that was admitted, and may since have become another
        // user.
        let joins = matches!(
            hello.kind,
            kind::START | kind::FORK | kind::PAGES | kind::CONFIRM
        ) && self.shared.spawner.job(hello.job).is_some();
        if !joins && !self.admission.admits(peer, uid, gid) {
            return refuse(
                peer,
                "this agent serves its own user and the members of its group; ask for membership",
            );
        }
        match hello.kind {
            kind::JOB => self.serve_launcher(peer, pid, uid),
            kind::START | kind::FORK | kind::LIBRARY | kind::PAGES => {
                match self.shared.spawner.job(hello.job) {
                    Some(job) if uid == 0 || uid == job.uid || job.uid == 0 => match hello.kind {
                        kind::PAGES => pages::serve(peer, &job, pid),
                        kind::LIBRARY => {
                            let handle = self.attach(peer, pid, &hello, &job)?;
                            self.serve_library(peer, &job, &handle)
                        }
                        _ => self.attach(peer, pid, &hello, &job).map(drop),
                    },
                    Some(_) => refuse(peer, "this job belongs to another user"),
                    None => refuse(peer, "there is no such job; it has ended"),
                }
            }
            kind::CONFIRM => {
                let confirmed = |job: Arc<Job>| is_attached(&job, pid, &hello);
                if self.shared.spawner.job(hello.job).is_some_and(confirmed) {
                    socket::send(peer.as_fd(), &Packet::new(tag::DONE), &[])
                } else {
                    refuse(peer, "its helper is not known")
                }
            }
            kind::STATUS => {
                let figures = crate::control_plane::figures(&self.shared.spawner);
                launcher::send_json(peer, &figures)
            }
            _ => refuse(
                peer,
                "unknown request; the program and the agent are of different versions",
            ),
        }
    }

    /// The handshake of a program, as `farpage_attach::message` draws it. Returns its address space.
    fn attach(
        &self,
        peer: &OwnedFd,
        pid: i32,
        hello: &Packet,
        job: &Arc<Job>,
    ) -> io::Result<Arc<SpaceHandle>> {
        let process = Process::open(pid)?;
        if hello.kind == kind::START {
            self.shared.spawner.close_previous(job, pid);
        }
        let handle = self.shared.spawner.new_handle(pid)?;
        if hello.kind == kind::LIBRARY {
            handle.manage_regions_only();
            job.for_regions();
        }
        let shared = SharedBlock::create()?;
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let event = rustix::event::eventfd(0, flags)?;
        let (lifeline, helpers_end) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // An agent of the program's own user may not open it either where the program hides itself.
        let pagemap = Pagemap::for_its_process(pid).ok();
        let mut fds = vec![
            self.device.as_fd(),
            shared.as_fd(),
            event.as_fd(),
            helpers_end.as_fd(),
        ];
        fds.extend(pagemap.as_ref().map(AsFd::as_fd));
        socket::send(peer.as_fd(), &Packet::new(tag::WELCOME), &fds)?;

        let ready = expect(peer, tag::READY)?;
        let mut fds = ready.fds.into_iter().map(Uffd::from);
        let (Some(uffd), Some(drain_uffd)) = (fds.next(), fds.next()) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let offer = HelperOffer {
            process,
            holding: ready.packet.holding..ready.packet.holding.saturating_add(RANGE_BYTES),
            drain: ready.packet.drain..ready.packet.drain.saturating_add(RANGE_BYTES),
            drain_uffd,
            shared,
            event,
            lifeline,
        };
        self.shared.kernel.enable_drain(&offer.drain_uffd)?;
        offer.drain_uffd.register(&offer.drain, false)?;

        let offer = match self.adopt(hello, job, Box::new(offer)) {
            Adoption::Adopted(child, uffd) => {
                send_go(peer, &child, &[uffd.as_fd()])?;
                finish(peer, pid, &child)?;
                return Ok(child);
            }
            Adoption::NotManagedYet(offer) => offer,
            Adoption::Gone => return Err(io::Error::from_raw_os_error(libc::ESRCH)),
        };
        self.shared.kernel.enable(&uffd)?;
        uffd.register(&offer.holding, false)?;
        let mut pager = Pager::new(
            self.shared.clone(),
            Arc::clone(job),
            Arc::clone(&handle),
            None,
            uffd,
            self.shared.spawner.new_place(&handle, job)?,
        )?;
        pager.install_helper(*offer)?;
        self.shared.spawner.start(job, pager, Arc::clone(&handle))?;
        // Whoever started it may have put it into another group than its launcher's.
        if job.ceiling.is_news(pid) {
            crate::ceiling::look(&self.shared.spawner);
        }
        send_go(peer, &handle, &[])?;
        finish(peer, pid, &handle)?;
        Ok(handle)
    }

    /// A library's requests. Where its connection ends without leave, whatever closed it, the memory is served on
    /// for as long as the process lives: given up, its far pages would read as zeros.
    fn serve_library(
        &self,
        peer: &OwnedFd,
        job: &Arc<Job>,
        handle: &Arc<SpaceHandle>,
    ) -> io::Result<()> {
        socket::set_deadline(peer.as_fd(), Duration::ZERO)?;
        loop {
            let request = socket::receive(peer.as_fd())?.packet;
            match request.tag {
                tag::REGION => {
                    let range = request.holding..request.holding.saturating_add(request.drain);
                    let (answer, answered) = mpsc::sync_channel(1);
                    let managed = handle.ask(Request::Region(range, answer))
                        && answered.recv_timeout(STEP_DEADLINE) == Ok(true);
                    if !managed {
                        refuse(
                            peer,
                            "the region cannot be managed; it must be private anonymous memory of whole pages",
                        )?;
                        continue;
                    }
                }
                tag::LEAVE => {
                    handle.ask(Request::Close);
                    wait_until_closed(job, handle);
                    return socket::send(peer.as_fd(), &Packet::new(tag::DONE), &[]);
                }
                _ => return Err(io::ErrorKind::InvalidData.into()),
            }
            socket::send(peer.as_fd(), &Packet::new(tag::DONE), &[])?;
        }
    }

    /// A forked child whose memory is managed already has a pager; it is found by its memory.
    fn adopt(&self, hello: &Packet, job: &Job, mut offer: Box<HelperOffer>) -> Adoption {
        if hello.kind != kind::FORK {
            return Adoption::NotManagedYet(offer);
        }
        wait_for_forks(job, hello.parent);
        for child in self.shared.spawner.forked_from(hello.parent) {
            let (answer, answered) = mpsc::sync_channel(1);
            match child.offer(Request::Adopt(offer, answer)) {
                Ok(()) => {}
                // A sibling that has ended.
                Err(Request::Adopt(back, _)) => {
                    offer = back;
                    continue;
                }
                Err(_) => return Adoption::Gone,
            }
            match answered.recv_timeout(ADOPTION_DEADLINE) {
                Ok(Ok(uffd)) => {
                    self.shared.spawner.adopted(child.id);
                    return Adoption::Adopted(child, uffd);
                }
                Ok(Err(back)) => offer = back,
                Err(_) => return Adoption::Gone,
            }
        }
        Adoption::NotManagedYet(offer)
    }
}

/// Waits until the parent's pager is through with the forks whose events it has read. It read this child's before the
/// child ran, and serves requests in their turn.
fn wait_for_forks(job: &Job, parent: u64) {
    let spaces = job.spaces();
    let Some(parent) = spaces.iter().find(|handle| handle.id == parent) else {
        return;
    };
    let (done, is_done) = mpsc::sync_channel(1);
    if parent.ask(Request::Sync(done)) {
        let _ = is_done.recv_timeout(ADOPTION_DEADLINE);
    }
}

/// What became of a forked child's offer.
enum Adoption {
    /// Its pager has it; this is the uffd for the helper.
    Adopted(Arc<SpaceHandle>, OwnedFd),
    /// It was forked before its memory was managed: it begins like any program.
    NotManagedYet(Box<HelperOffer>),
    /// The pager that was asked has ended, as its process has.
    Gone,
}

/// Lets a program start its helper, on another uffd than its own where one is given.
fn send_go(peer: &OwnedFd, handle: &SpaceHandle, uffd: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut go = Packet::new(tag::GO);
    go.job = handle.id;
    socket::send(peer.as_fd(), &go, uffd)
}

/// The last steps of a handshake: the helper has started, the program may run.
fn finish(peer: &OwnedFd, pid: i32, handle: &Arc<SpaceHandle>) -> io::Result<()> {
    let up = expect(peer, tag::HELPER_UP)?.packet;
    let helper = i32::try_from(up.helper).map_err(|_| io::ErrorKind::InvalidData)?;
    // It is ended with its program, so it must be what it says.
    if share_memory(pid, helper) != Some(true) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let helper = Process::open(helper)?;
    wait_for_session(&helper);
    // Before the program may run: whose helper is not known has not attached, and nothing of it is kept.
    handle.helper_runs(&helper);
    handle.ask(Request::HelperUp(helper));
    socket::send(peer.as_fd(), &Packet::new(tag::DONE), &[])
}

/// A helper begins with leaving its program's session. Before it has, its precedence would be the whole session's: of the
/// program, and of the terminal that it was started from.
fn wait_for_session(helper: &Process) {
    let began = Instant::now();
    while !leads_session(helper.pid()) && !helper.has_exited() && began.elapsed() < STEP_DEADLINE {
        std::thread::sleep(SESSION_POLL);
    }
}

/// Whether an address space of this number is this process's, and has this helper.
fn is_attached(job: &Job, pid: i32, hello: &Packet) -> bool {
    let spaces = job.spaces();
    let mut spaces = spaces.iter();
    let helper = i32::try_from(hello.helper).unwrap_or(0);
    spaces.any(|space| {
        space.id == hello.parent && space.pid() == Some(pid) && space.has_helper(helper)
    })
}

/// Waits until an address space has given back what it held; a pager that takes longer does so by itself.
fn wait_until_closed(job: &Job, handle: &SpaceHandle) {
    let began = Instant::now();
    let lives = || job.spaces().iter().any(|space| space.id == handle.id);
    while lives() && began.elapsed() < STEP_DEADLINE {
        std::thread::sleep(CLOSE_POLL);
    }
}

fn expect(peer: &OwnedFd, tag: u32) -> io::Result<socket::Arrived> {
    let arrived = socket::receive(peer.as_fd())?;
    if arrived.packet.tag == tag {
        Ok(arrived)
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}

fn refuse(peer: &OwnedFd, reason: &str) -> io::Result<()> {
    send_with(peer, tag::REFUSAL, reason.as_bytes())
}

/// Sends a packet of this tag with bytes behind it.
fn send_with(peer: &OwnedFd, tag: u32, behind: &[u8]) -> io::Result<()> {
    let behind = behind.get(..MAX_TEXT).unwrap_or(behind);
    let mut packet = Packet::new(tag);
    packet.text_len = behind.len() as u64;
    let bytes = [&packet.to_bytes(), behind].concat();
    send(peer, &bytes, SendFlags::NOSIGNAL)?;
    Ok(())
}
