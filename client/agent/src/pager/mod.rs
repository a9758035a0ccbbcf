//! The pager: one thread that owns one address space.
//!
//! Everything that happens to the space happens here, in turn: its uffd is read, pages are fetched and
//! installed, victims are taken out and written back, its table follows the program's own calls. So the hard
//! cases are ordinary ones: whatever an event finds half done is in a list of this struct, and the event marks
//! it there. Nothing blocks but a fork or a move of memory, which waits for pages on their way
//! out (`settle`), and a look at the mappings, which waits for the helper's batch: reads and writes of far memory and the helper's batches are under way while the
//! loop goes round, and a fault that cannot be answered yet waits in a queue with a deadline.
//!
//! A fault's way through the files: `mod` (read) → [`fault`] (what is the page?) → [`fetch`] (ask for it) →
//! [`arrival`] (check it) → [`install`] (put it there, wake); what cannot be answered yet goes to [`waiting`]. Memory's way out: [`take_out`]
//! (victims, helper) → [`write_back`] (hash, slot, write); [`shortage`] is of slots. [`event`], [`fork`] and [`hints`] follow
//! the program; [`register`] finds what to manage; [`soft_dirty`] says what was written. [`links`] has the connections ([`dial`] makes them,
//! [`patience`] and [`wakeups`] say how to wait), [`failure`] what becomes of a fault that cannot be answered and
//! [`attention`] what of the time counts. [`helper`], [`batch`] and
//! [`between`] are the helper's side, [`run`] is a write; [`journal`] and [`recovered`] are for the next agent, [`survey`] counts what is
//! shared.

mod arrival;
mod attention;
mod batch;
mod between;
pub(crate) mod dial;
mod event;
mod failure;
mod fault;
mod fetch;
mod fork;
mod helper;
mod hints;
mod install;
mod journal;
mod links;
mod patience;
mod recovered;
mod register;
mod run;
mod shortage;
mod soft_dirty;
mod survey;
mod take_out;
mod waiting;
mod wakeups;
mod write_back;

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::entry::State;
use crate::far::FarMemory;
use crate::gate::Gate;
use crate::job::Job;
use crate::mailbox::{Request, SpaceHandle};
use crate::prefetch::Prefetcher;
use crate::residents::Residents;
use crate::state::records::{space, undecided};
use crate::state::{SpaceChunks, SpacePlace};
use crate::sys::pagemap::Pagemap;
use crate::sys::process::Process;
use crate::sys::uffd::{MAX_MESSAGES, Message, Uffd};
use farpage_attach::control::method;
use farpage_fabric::{Completion, OwnDevice};

use attention::{Attention, Moment};
use between::Replaced;
use patience::Patience;
use waiting::Starved;
use wakeups::Source;

pub(crate) use batch::TakeOut;
pub(crate) use fault::Fault;
pub(crate) use fetch::Fetches;
pub(crate) use fork::Inheritance;
pub(crate) use helper::Helper;
pub(crate) use hints::Hints;
pub(crate) use journal::{Journal, Noted};
pub(crate) use links::Links;
pub(crate) use recovered::NotRecovered;
pub(crate) use register::Registered;
pub(crate) use shortage::Shortage;
pub use soft_dirty::Question;
pub(crate) use soft_dirty::SoftDirty;
pub(crate) use survey::Survey;
pub(crate) use take_out::FREE_LEAST;
pub(crate) use wakeups::Wakeups;
pub(crate) use write_back::Staging;

/// A fault sooner than this after the last one means that another is likely to be near.
const BUSY_GAP: Duration = Duration::from_micros(200);

/// The longest sleep: a bound for anything whose wake-up might be missed.
const MAX_SLEEP: Duration = Duration::from_millis(100);

/// How long the moves of a batch are waited for before everything else is looked at again.
const MOVES_WAIT: Duration = Duration::from_micros(500);

/// The same while the program's user has it stopped or frozen.
const HELD_WAIT: Duration = Duration::from_millis(10);

/// Between two looks whether the program has replaced itself by another.
const EXEC_CHECK: Duration = Duration::from_millis(20);

/// The sleep while something that has no descriptor to wait on is under way.
const SHORT_SLEEP: Duration = Duration::from_micros(500);

/// An address space's page table.
pub(crate) type Table = crate::table::PageTable<SpaceChunks>;

/// What all pagers of an agent share.
#[derive(Clone, Debug)]
pub struct Shared {
    /// Far memory.
    pub far: Arc<FarMemory>,
    /// The other address spaces; where a forked child's pager is started.
    pub spawner: Arc<crate::spaces::Spaces>,
    /// What this kernel offers.
    pub kernel: crate::kernel::Kernel,
    /// By which device memory is reached over RDMA.
    pub device: Arc<OwnDevice>,
}

/// An address space and all that is under way in it.
pub struct Pager {
    shared: Shared,
    job: Arc<Job>,
    handle: Arc<SpaceHandle>,
    process: Option<Process>,
    uffd: Uffd,
    wakeups: Wakeups,
    journal: Journal,
    /// Events that another agent read and did not follow.
    left: Vec<Noted>,
    /// Events that came while others that were read before them are being followed.
    later: Vec<Noted>,
    /// Whether another agent had it, and its table is still to be compared with what is present.
    is_recovered: bool,
    /// Whether events have been read that the table does not follow yet. Nothing is installed meanwhile: a fork that has
    /// happened already has not handed it on, though the table that is cloned for it would say so.
    following: bool,
    /// Whether there may be messages to read.
    uffd_has_news: bool,
    table: Table,
    registered: Registered,
    inheritance: Inheritance,
    /// Pages here that were here at the fork, until they are counted.
    uncharged: u64,
    residents: Residents,
    prefetcher: Prefetcher,
    hints: Hints,
    links: Links,
    attention: Attention,
    fetches: Fetches,
    waiting: VecDeque<Fault>,
    gate: Gate,
    helper: Option<Helper>,
    take_out: Option<TakeOut>,
    /// The program's memory as `/proc` shows it, once it was read there.
    memory: Option<File>,
    /// The program's pagemap, once it was looked at.
    pagemap: Option<Pagemap>,
    /// What the helper has taken from where the program had just put something else, to be put back.
    replaced: Vec<Replaced>,
    staging: Staging,
    shortage: Shortage,
    /// Pages that the kernel writes at thread exit: never taken out.
    pinned: HashSet<u64>,
    pinned_at: Option<Instant>,
    shrink: u64,
    last_fault: Option<Instant>,
    next_fault: Patience,
    messages: Vec<Noted>,
    arrived: Vec<Fault>,
    completions: Vec<Completion>,
    closing: bool,
    survey: Option<Survey>,
    soft_dirty: SoftDirty,
    /// When victims were last found to be unmovable throughout: eviction rests a little.
    rest_until: Option<Instant>,
    /// Whether the last look for victims found none at all.
    no_victims: bool,
    checked_exec_at: Option<Instant>,
    /// Since when threads wait for room while this count of evictions stands still.
    starved: Option<Starved>,
    /// Its place in the state, given up last: what it names is in no other.
    place: SpacePlace,
}

impl Pager {
    /// The pager of an address space that is not managed yet.
    ///
    /// # Errors
    /// The kernel's errno when there is nothing to sleep on.
    pub fn new(
        shared: Shared,
        job: Arc<Job>,
        handle: Arc<SpaceHandle>,
        process: Option<Process>,
        uffd: Uffd,
        place: SpacePlace,
    ) -> io::Result<Self> {
        let wakeups = Wakeups::new()?;
        wakeups.watch(&*handle, Source::Mailbox)?;
        wakeups.watch(&uffd, Source::Uffd)?;
        if let Some(process) = &process {
            wakeups.watch(process, Source::Process)?;
        }
        let links = Links::new(wakeups.clone(), Arc::clone(&shared.device))?;
        place.uffd.store(uffd.number(), Ordering::Release);
        Ok(Self {
            shared,
            job,
            handle,
            process,
            uffd,
            wakeups,
            following: false,
            uffd_has_news: true,
            table: Table::new(place.chunks()),
            journal: Journal::new(place.record().clone()),
            place,
            left: Vec::new(),
            later: Vec::new(),
            is_recovered: false,
            registered: Registered::default(),
            inheritance: Inheritance::Known,
            uncharged: 0,
            residents: Residents::default(),
            prefetcher: Prefetcher::default(),
            hints: Hints::default(),
            links,
            attention: Attention::since(Instant::now()),
            fetches: Fetches::default(),
            waiting: VecDeque::new(),
            gate: Gate::default(),
            helper: None,
            take_out: None,
            memory: None,
            pagemap: None,
            replaced: Vec::new(),
            staging: Staging::default(),
            shortage: Shortage::default(),
            pinned: HashSet::new(),
            pinned_at: None,
            shrink: 0,
            last_fault: None,
            next_fault: Patience::default(),
            messages: Vec::new(),
            arrived: Vec::new(),
            completions: Vec::new(),
            closing: false,
            survey: None,
            soft_dirty: SoftDirty::default(),
            rest_until: None,
            no_victims: false,
            checked_exec_at: None,
            starved: None,
        })
    }

    /// The job it belongs to.
    #[must_use]
    pub fn job(&self) -> Arc<Job> {
        Arc::clone(&self.job)
    }

    /// Its place in the state.
    #[must_use]
    pub(crate) fn place(&self) -> &SpacePlace {
        &self.place
    }

    /// Runs until the process is gone.
    pub fn run(mut self) {
        // Until memory is managed all that is asked of this thread is to do that at once.
        crate::sys::process::run_at_once(!self.job.is_armed());
        self.follow_what_was_left();
        while !self.closing {
            if !self.turn() && !self.wait_for_moves() && !self.looks_on() && !self.survey() {
                self.sleep();
            }
        }
        self.close();
    }

    /// One round: whatever can be done now is done. Returns whether there was anything.
    fn turn(&mut self) -> bool {
        self.all_is_followed();
        self.attention.look(Instant::now());
        let mut worked = self.poll_links();
        worked |= self.poll_helper();
        let read = self.uffd_has_news && self.read_messages();
        worked |= self.compare_with_memory();
        worked |= self.put_back_replaced();
        worked |= self.retry_waiting();
        worked |= self.bring_needed();
        worked |= self.evict_ahead();
        worked |= self.retry_writes();
        worked |= self.serve_requests();
        worked |= self.answer_soft_dirty();
        // Who works does not sleep, and so is not told that there are messages.
        self.uffd_has_news |= worked;
        worked | read
    }

    /// Reads the uffd, if the gate allows it, and handles what it says: events before faults, since the read
    /// has released the program already and a fault must find the table as the events left it.
    fn read_messages(&mut self) -> bool {
        if !self.may_read_events() && !self.is_remapping() {
            return false;
        }
        let mut messages = std::mem::take(&mut self.messages);
        let read = self.read_uffd(&mut messages);
        if read.is_err() {
            self.closing = true;
        }
        // Fewer than fit are all; if more come, the next sleep is none. Between moves not all that there is may be read.
        self.uffd_has_news = self.is_remapping() || matches!(read, Ok(MAX_MESSAGES..));
        let began = self.attention.moment(Instant::now());
        let mut faults = std::mem::take(&mut self.arrived);
        self.following = true;
        for noted in messages.drain(..) {
            match noted.message {
                Message::Fault {
                    address,
                    write,
                    protected,
                    thread,
                } => {
                    faults.push(Fault::new(address, write, protected, thread, began));
                }
                message => self.follow(Noted { message, ..noted }),
            }
        }
        self.follow_later();
        self.following = false;
        self.messages = messages;
        if !faults.is_empty() {
            self.next_fault.came(began.at);
        }
        for fault in faults.drain(..) {
            self.last_fault = Some(began.at);
            self.answer_or_keep(fault);
        }
        self.arrived = faults;
        // Where the fabric answers at once (shared memory), so is the fault.
        self.poll_links();
        self.publish();
        matches!(read, Ok(count) if count > 0)
    }

    /// Nothing that was read is still to be followed: what could not be handed on before can be now.
    fn all_is_followed(&self) {
        let transient = self.place.undecided.load(Ordering::Relaxed) & undecided::EVENTS != 0;
        if transient && self.journal.is_empty() && self.replaced.is_empty() {
            self.place
                .undecided
                .fetch_and(!undecided::EVENTS, Ordering::AcqRel);
        }
    }

    /// Leave to read events: no page is being moved, and a new epoch begins.
    fn may_read_events(&mut self) -> bool {
        match &self.helper {
            Some(helper) => self.gate.read_events(&helper.control().taken).is_ok(),
            None => {
                self.gate.helper_gone();
                true
            }
        }
    }

    fn serve_requests(&mut self) -> bool {
        self.shrink = self.shrink.max(self.handle.take_shrink());
        let mut worked = self.handle.take_rescan();
        if worked {
            self.rescan();
        }
        while let Some(request) = self.handle.next_request() {
            worked = true;
            match request {
                Request::Adopt(offer, answer) => {
                    let _ = answer.send(self.adopt(offer));
                }
                Request::Sync(done) => {
                    let _ = done.send(());
                }
                Request::HelperUp(helper) => self.helper_up(helper),
                Request::Region(range, answer) => {
                    let _ = answer.send(self.manage_region(range));
                }
                Request::CountShared => self.begin_survey(),
                Request::SoftDirty(question) => self.ask_soft_dirty(question),
                Request::Close => self.closing = true,
            }
        }
        self.answer_report();
        worked | self.take_hints()
    }

    /// While pages are being moved no event may be read, so there is little to look for: the helper gets the
    /// processor. Returns whether that was so.
    fn wait_for_moves(&self) -> bool {
        let (Some(helper), Some(batch)) = (&self.helper, &self.take_out) else {
            return false;
        };
        let control = helper.control();
        let taken = control.taken.load(Ordering::Acquire);
        if taken == batch.command {
            return false;
        }
        if batch.method == method::REMAP {
            // It waits for its events to be read, and what else there is may have to wait for that.
            take_out::rest_while_settling(batch.read);
            return true;
        }
        let limit = if batch.is_held { HELD_WAIT } else { MOVES_WAIT };
        crate::sys::control::futex_wait(&control.taken, taken, limit);
        true
    }

    /// Whether to look at everything once more rather than to sleep, since an answer or the next fault is near. Others may
    /// run meanwhile.
    fn looks_on(&mut self) -> bool {
        if !self.links.looks_on() && !self.next_fault.looks_on(Instant::now()) {
            return false;
        }
        self.uffd_has_news = true;
        std::thread::yield_now();
        true
    }

    /// Waits for a message, a completion, the helper or a request.
    fn sleep(&mut self) {
        self.publish();
        let control = self.helper.as_ref().map(Helper::control);
        if let Some(control) = control {
            control.agent_sleeps.store(1, Ordering::SeqCst);
        }
        let helper_done = self
            .take_out
            .as_ref()
            .zip(control)
            .is_some_and(|(batch, control)| control.done.load(Ordering::SeqCst) == batch.command);
        let mut due = false;
        if !helper_done && self.links.arm() {
            let short = !self.waiting.is_empty()
                || self.fetches.any_to_install()
                || self.rest_until.is_some();
            let limit = if short { SHORT_SLEEP } else { MAX_SLEEP };
            let woken = self.wakeups.wait(limit);
            if woken.by(Source::Mailbox) {
                self.handle.quiet();
            }
            if woken.by(Source::Helper) {
                self.quiet_helper();
            }
            if woken.by(Source::Link) {
                self.links.look_at_idle(&mut self.completions);
            }
            self.uffd_has_news |= woken.by(Source::Uffd);
            due = woken.by(Source::Process) || !woken.by(Source::Uffd);
        }
        if let Some(helper) = &self.helper {
            helper.control().agent_sleeps.store(0, Ordering::SeqCst);
        }
        if due && !self.is_alive() {
            self.closing = true;
        }
    }

    /// Whether the program still runs in this memory: it has neither ended nor replaced itself.
    pub(super) fn is_alive(&mut self) -> bool {
        let Some(process) = &self.process else {
            return self.uffd.is_alive();
        };
        if process.has_exited() {
            return false;
        }
        let due = self
            .checked_exec_at
            .is_none_or(|at| at.elapsed() > EXEC_CHECK);
        if due {
            self.checked_exec_at = Some(Instant::now());
            if let Some(helper) = self.helper.as_ref().and_then(Helper::pid) {
                return crate::sys::process::share_memory(process.pid(), helper) != Some(false);
            }
        }
        true
    }

    fn publish(&self) {
        let figures = &self.handle.figures;
        figures
            .local
            .store(self.table.local_pages(), Ordering::Relaxed);
        figures.far.store(self.table.far_pages(), Ordering::Relaxed);
        figures
            .zero
            .store(self.table.pages_in(State::Zero), Ordering::Relaxed);
    }

    fn pid(&self) -> i32 {
        self.process.as_ref().map_or(0, Process::pid)
    }

    /// The process is gone: every slot it named is given back, the helper ended.
    fn close(mut self) {
        // Before its descriptors are closed, whose numbers may be others' then.
        self.place.state.store(space::FREE, Ordering::Release);
        self.handle.close();
        self.charge_inherited();
        if let Some(helper) = &self.helper {
            helper.end();
        }
        self.finish_transfers();
        if let Some(batch) = self.take_out.take() {
            self.job.discharge(batch.pages.len() as u64);
        }
        self.discard_pages(crate::table::Page(0)..crate::table::Page(u64::MAX >> 12));
        self.publish();
        self.job.remove(self.handle.id);
        tracing::debug!(
            space = self.handle.id,
            pid = self.pid(),
            "address space closed"
        );
    }
}
