//! How the rest of the agent speaks to a pager: a handle per address space with a mailbox and a doorbell.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, mpsc};

use crate::pager::Question;
use crate::state::records::SpaceRecord;
use crate::sys::control::SharedBlock;
use crate::sys::process::Process;
use crate::sys::state::Ref;
use crate::sys::uffd::Uffd;

/// Most requests waiting for one pager; the sender is told when there are more.
const MAX_REQUESTS: usize = 64;

/// What a pager may be asked.
#[derive(Debug)]
pub enum Request {
    /// A forked child has come to the door with its own ranges: is it this address space? Answers with the
    /// uffd for its helper, or gives the offer back.
    Adopt(
        Box<HelperOffer>,
        mpsc::SyncSender<Result<OwnedFd, Box<HelperOffer>>>,
    ),
    /// Answers once whatever was read before is dealt with.
    Sync(mpsc::SyncSender<()>),
    /// The helper runs.
    HelperUp(Process),
    /// A region that a library user named: manage it now, within a resident limit of its own.
    Region(Range<u64>, mpsc::SyncSender<bool>),
    /// How many far pages lie in slots that others name too is wanted, some time soon, among the figures.
    CountShared,
    /// Which pages were written is to be answered.
    SoftDirty(Question),
    /// End: the process is gone, or must go.
    Close,
}

/// What a process brings that wants a helper.
#[derive(Debug)]
pub struct HelperOffer {
    /// Its pid.
    pub process: Process,
    /// Its holding range.
    pub holding: Range<u64>,
    /// Its drain range.
    pub drain: Range<u64>,
    /// The uffd of its drain range, enabled.
    pub drain_uffd: Uffd,
    /// Its control block.
    pub shared: SharedBlock,
    /// The eventfd by which the helper wakes its pager.
    pub event: OwnedFd,
    /// The helper's lifeline; closing it starts the dead-man switch.
    pub lifeline: OwnedFd,
}

/// Figures of one address space, published by its pager.
#[derive(Debug, Default)]
pub struct Figures {
    /// Pages resident as its table knows.
    pub local: AtomicU64,
    /// Pages only in slots or on their way, and zeros held nowhere.
    pub far: AtomicU64,
    /// Those of them that are zeros held nowhere.
    pub zero: AtomicU64,
    /// Those of them whose slot another entry names too, when last counted.
    pub shared_far: AtomicU64,
    /// Resident anonymous pages, managed or not, when last sampled; 0 before.
    pub anonymous: AtomicU64,
    /// The most at any sample.
    pub peaks: Peaks,
    /// Bytes that it could fill of the mappings it had when last looked at; kept until memory is managed.
    pub reach: AtomicU64,
    /// Faults answered.
    pub faults: AtomicU64,
    /// Resident pages of mappings that are not managed, when last counted.
    pub unmanaged: AtomicU64,
}

/// The most pages of an address space, each count at its own worst moment.
#[derive(Debug, Default)]
pub struct Peaks {
    /// Resident.
    pub local: AtomicU64,
    /// Far.
    pub far: AtomicU64,
    /// Far, in slots that another entry named too.
    pub shared_far: AtomicU64,
    /// Resident and far together.
    pub total: AtomicU64,
}

impl Figures {
    /// Notes what the sampler measured: resident anonymous pages.
    pub fn sampled(&self, anonymous: u64) {
        let far = self.far.load(Ordering::Relaxed);
        self.anonymous.store(anonymous, Ordering::Relaxed);
        self.peaks.local.fetch_max(anonymous, Ordering::Relaxed);
        self.peaks.far.fetch_max(far, Ordering::Relaxed);
        self.peaks
            .total
            .fetch_max(anonymous + far, Ordering::Relaxed);
    }

    /// Notes how many far pages lie in slots that others name too.
    pub fn counted_shared(&self, pages: u64) {
        self.shared_far.store(pages, Ordering::Relaxed);
        self.peaks.shared_far.fetch_max(pages, Ordering::Relaxed);
    }
}

/// An address space as the rest of the agent sees it.
#[derive(Debug)]
pub struct SpaceHandle {
    /// Its number.
    pub id: u64,
    /// What its program was called when it was first sampled.
    pub name: OnceLock<String>,
    /// Its process's pid; 0 for a forked child that has not shown itself yet.
    pub pid: AtomicU64,
    /// Its figures.
    pub figures: Figures,
    /// Whether the pager has ended.
    closed: AtomicBool,
    requests: Mutex<VecDeque<Request>>,
    rescan: AtomicBool,
    shrink: AtomicU64,
    regions_only: AtomicBool,
    /// Whether a fork has given it slots that others name too.
    has_forked: AtomicBool,
    control: OnceLock<SharedBlock>,
    record: OnceLock<Ref<SpaceRecord>>,
    doorbell: OwnedFd,
}

impl SpaceHandle {
    /// A handle with an empty mailbox.
    ///
    /// # Errors
    /// The kernel's errno when no eventfd can be made.
    pub fn new(id: u64, pid: i32) -> std::io::Result<Self> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        Ok(Self {
            id,
            name: OnceLock::new(),
            pid: AtomicU64::new(pid.unsigned_abs().into()),
            figures: Figures::default(),
            closed: AtomicBool::new(false),
            requests: Mutex::new(VecDeque::new()),
            rescan: AtomicBool::new(false),
            shrink: AtomicU64::new(0),
            regions_only: AtomicBool::new(false),
            has_forked: AtomicBool::new(false),
            control: OnceLock::new(),
            record: OnceLock::new(),
            doorbell: rustix::event::eventfd(0, flags)?,
        })
    }

    /// Puts a request into the mailbox and rings. Returns whether it was taken.
    pub fn ask(&self, request: Request) -> bool {
        self.offer(request).is_ok()
    }

    /// The same for a request that is of use to another if this one does not take it.
    ///
    /// # Errors
    /// The request, where it was not taken.
    pub fn offer(&self, request: Request) -> Result<(), Request> {
        let mut requests = self.lock_requests();
        if requests.len() >= MAX_REQUESTS || self.closed.load(Ordering::Acquire) {
            return Err(request);
        }
        requests.push_back(request);
        drop(requests);
        self.ring();
        Ok(())
    }

    /// The pager has ended: nothing is taken any more, and nobody waits for an answer to what was.
    pub fn close(&self) {
        let mut requests = self.lock_requests();
        self.closed.store(true, Ordering::Release);
        for request in requests.drain(..) {
            if let Request::Adopt(offer, answer) = request {
                let _ = answer.send(Err(offer));
            }
        }
    }

    fn lock_requests(&self) -> MutexGuard<'_, VecDeque<Request>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on nothing is managed but the regions that the program names: its mappings are not looked at.
    pub fn manage_regions_only(&self) {
        self.regions_only.store(true, Ordering::Release);
    }

    /// Whether it is so.
    #[must_use]
    pub fn manages_regions_only(&self) -> bool {
        self.regions_only.load(Ordering::Acquire)
    }

    /// From now on some of its slots may be others' too.
    pub fn forked(&self) {
        self.has_forked.store(true, Ordering::Relaxed);
    }

    /// Asks for its far pages that are others' too to be counted anew. Who never forked has none.
    pub fn ask_to_count_shared(&self) {
        if self.has_forked.load(Ordering::Relaxed) {
            self.ask(Request::CountShared);
        }
    }

    /// Asks for a look at the mappings; asking again before it was taken is the same request.
    pub fn ask_rescan(&self) {
        if !self.regions_only.load(Ordering::Acquire) && !self.rescan.swap(true, Ordering::AcqRel) {
            self.ring();
        }
    }

    /// Whether a look at the mappings is asked for; taking the request.
    pub fn take_rescan(&self) -> bool {
        self.rescan.swap(false, Ordering::AcqRel)
    }

    /// Asks for so many pages to be taken out although no fault asks for it; of several requests the largest counts.
    pub fn ask_to_shrink(&self, pages: u64) {
        if self.shrink.fetch_max(pages, Ordering::AcqRel) == 0 {
            self.ring();
        }
    }

    /// How many pages are to be taken out; taking the request.
    pub fn take_shrink(&self) -> u64 {
        self.shrink.swap(0, Ordering::AcqRel)
    }

    /// The program's control block, once it has one.
    pub fn set_control(&self, block: SharedBlock) {
        let _ = self.control.set(block);
    }

    /// Its place in the state.
    pub fn set_record(&self, record: Ref<SpaceRecord>) {
        let _ = self.record.set(record);
    }

    /// Notes for the next agent that its helper runs, and so that the handshake has come to its end.
    pub fn helper_runs(&self, helper: &Process) {
        if let Some(record) = self.record.get() {
            let start = helper.start_time().unwrap_or(0);
            record.helper_start.store(start, Ordering::Relaxed);
            record.helper.store(helper.pid(), Ordering::Release);
        }
    }

    /// Whether its helper is this process.
    #[must_use]
    pub fn has_helper(&self, pid: i32) -> bool {
        let helper = |record: &Ref<SpaceRecord>| record.helper.load(Ordering::Acquire);
        self.record.get().map(helper) == Some(pid)
    }

    /// Makes the program's allocations wait, or lets them go on.
    pub fn hold(&self, hold: bool) {
        let Some(block) = self.control.get() else {
            return;
        };
        let word = &block.control().hold;
        if word.swap(u32::from(hold), Ordering::AcqRel) != 0 && !hold {
            crate::sys::control::futex_wake(word);
        }
    }

    /// Wakes the pager.
    pub fn ring(&self) {
        let _ = rustix::io::write(&self.doorbell, &1u64.to_ne_bytes());
    }

    /// The next request.
    pub fn next_request(&self) -> Option<Request> {
        self.lock_requests().pop_front()
    }

    /// Makes the doorbell quiet again.
    pub fn quiet(&self) {
        let mut count = [0u8; 8];
        let _ = rustix::io::read(&self.doorbell, &mut count);
    }

    /// Its process's pid, if known.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        i32::try_from(self.pid.load(Ordering::Acquire))
            .ok()
            .filter(|pid| *pid > 0)
    }
}

impl AsFd for SpaceHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.doorbell.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A door thread waited half a minute for a forked child that had been killed, and a sibling with it.
    #[test]
    fn nobody_waits_for_a_pager_that_has_ended() {
        let handle = SpaceHandle::new(1, 0).unwrap();
        let (done, is_done) = mpsc::sync_channel(1);
        assert!(handle.ask(Request::Sync(done)));
        handle.close();
        assert_eq!(is_done.try_recv(), Err(mpsc::TryRecvError::Disconnected));
        let (late, _) = mpsc::sync_channel(1);
        assert!(matches!(
            handle.offer(Request::Sync(late)),
            Err(Request::Sync(_))
        ));
    }
}
