//! The pager's end of its helper: the control block, the eventfd, the lifeline.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use farpage_attach::control::{Control, method};
use farpage_attach::hints::Hint;

use super::wakeups::Source;
use super::{Pager, Wakeups};
use crate::mailbox::HelperOffer;
use crate::sys::control::{SharedBlock, futex_wake};
use crate::sys::process::Process;
use crate::sys::uffd::{MAX_MESSAGES, Message, Uffd};

/// Seconds without an agent, and without a keeper that waits for the next one, after which the helper ends the program: both
/// are gone for good then.
const DEAD_MAN_SECONDS: u32 = 1;

const LANDING_BYTES: u64 = farpage_attach::landing::BYTES as u64;

/// The helper of one address space.
#[derive(Debug)]
pub(crate) struct Helper {
    shared: SharedBlock,
    event: OwnedFd,
    /// Known once the helper has reported itself.
    process: Option<Process>,
    drain_uffd: Uffd,
    /// Holding, drain and landing range, kept apart from what the program owns.
    own: [Range<u64>; 3],
    _lifeline: OwnedFd,
    reported: u32,
    hints_seen: u32,
}

impl Helper {
    /// What a process offered at the door, before its helper runs.
    pub(crate) fn new(offer: HelperOffer) -> (Self, Process) {
        let control = offer.shared.control();
        control
            .dead_man_seconds
            .store(DEAD_MAN_SECONDS, Ordering::Relaxed);
        // What another agent was told is not said to this one.
        let hints_seen = control.hints.given.load(Ordering::Acquire);
        let helper = Self {
            shared: offer.shared,
            event: offer.event,
            process: None,
            drain_uffd: offer.drain_uffd,
            own: [
                offer.holding,
                offer.drain.clone(),
                landing_behind(&offer.drain),
            ],
            _lifeline: offer.lifeline,
            reported: 0,
            hints_seen,
        };
        (helper, offer.process)
    }

    pub(crate) fn control(&self) -> &Control {
        self.shared.control()
    }

    pub(crate) fn shared(&self) -> &SharedBlock {
        &self.shared
    }

    pub(crate) fn set_process(&mut self, process: Process, wakeups: &Wakeups) -> io::Result<()> {
        wakeups.watch(&process, Source::Helper)?;
        crate::sys::process::raise_priority(process.pid(), crate::sys::process::FIRST);
        if crate::sys::process::leads_session(process.pid()) {
            crate::sys::process::raise_session_priority(process.pid(), crate::sys::process::FIRST);
        }
        self.process = Some(process);
        Ok(())
    }

    pub(super) fn pid(&self) -> Option<i32> {
        self.process.as_ref().map(Process::pid)
    }

    /// What the program has said of pages to come since this was last asked.
    pub(super) fn new_hints(&mut self) -> impl Iterator<Item = Hint> + '_ {
        let control = self.shared.control();
        control.hints.since(&mut self.hints_seen)
    }

    pub(super) fn is_ready(&self) -> bool {
        self.process.is_some()
    }

    /// Whether it has died, which no part of a program does by itself.
    pub(super) fn is_dead(&self) -> bool {
        self.process.as_ref().is_some_and(Process::has_exited)
    }

    /// Whether it is kept from running, as its program is by whoever stops or freezes that.
    pub(super) fn is_held(&self) -> bool {
        let pid = self.process.as_ref().map(Process::pid);
        pid.is_some_and(|pid| crate::sys::process::is_held(pid) || crate::cgroup::is_frozen(pid))
    }

    /// Makes the eventfd quiet, and answers strays in the drain range with zeros.
    pub(super) fn quiet(&mut self) {
        let mut count = [0u8; 8];
        let _ = rustix::io::read(&self.event, &mut count);
        let mut messages = Vec::new();
        let _ = self.drain_uffd.read(MAX_MESSAGES, &mut messages);
        for message in messages {
            if let Message::Fault { address, .. } = message {
                let start = address & !0xfff;
                if self.drain_uffd.zero(&(start..start + 4096)).is_err() {
                    let _ = self.drain_uffd.wake(&(start..start + 4096));
                }
            }
        }
    }

    /// Has who waits in the drain range look again.
    pub(super) fn wake_all(&self) {
        self.drain_uffd.wake_all();
    }

    /// Where the helper's `mremap` puts what it takes.
    pub(super) fn landing(&self) -> &Range<u64> {
        let [_, _, landing] = &self.own;
        landing
    }

    pub(super) fn owns(&self, address: u64) -> bool {
        self.own.iter().any(|range| range.contains(&address))
    }

    /// Publishes a batch that lies ready in the control block.
    pub(super) fn publish(&self, command: u32, how: u32) {
        let control = self.control();
        if how == method::REMAP && control.lander.load(Ordering::Acquire) != 0 {
            // The helper is told nothing of it: it might see what is in the next batch only.
            control.landing_command.store(command, Ordering::SeqCst);
            futex_wake(&control.landing_command);
            return;
        }
        control.command.store(command, Ordering::SeqCst);
        control.bell.fetch_add(1, Ordering::SeqCst);
        if control.helper_sleeps.load(Ordering::SeqCst) != 0 {
            futex_wake(&control.bell);
        }
    }

    /// Whether an agent had come to publish this batch. Who is to take it out may not have been woken: it is now.
    pub(super) fn was_published(&self, command: u32) -> bool {
        let control = self.control();
        futex_wake(&control.landing_command);
        [&control.command, &control.landing_command]
            .iter()
            .any(|word| word.load(Ordering::Acquire) == command)
    }

    /// Ends it: the program is gone.
    pub(crate) fn end(&self) {
        self.control().quit.store(1, Ordering::Relaxed);
        if let Some(process) = &self.process {
            process.signal(libc::SIGKILL);
        }
    }
}

impl Pager {
    /// The program's memory as `/proc` shows it, where a page that is absent says EIO. Opened when it is first wanted.
    pub(super) fn program_memory(&mut self) -> Option<&File> {
        if self.memory.is_none() {
            let process = self.process.as_ref()?;
            self.memory = File::open(format!("/proc/{}/mem", process.pid())).ok();
        }
        self.memory.as_ref()
    }

    /// A process at the door offers ranges for a helper and says that it is this address space: a forked child.
    /// Returns the uffd for its helper once the ranges are registered and proven to be in this memory.
    pub(super) fn adopt(&mut self, offer: Box<HelperOffer>) -> Result<OwnedFd, Box<HelperOffer>> {
        if self.helper.is_some() || !self.is_my_memory(&offer) {
            return Err(offer);
        }
        let Ok(uffd) = self.uffd.as_fd().try_clone_to_owned() else {
            return Err(offer);
        };
        let pid = offer.process.pid();
        if let Err(error) = self.install_helper(*offer) {
            tracing::error!(%error, pid, "a helper cannot be waited for; its program is ended");
            self.closing = true;
        }
        self.charge_inherited();
        self.keep_only_inherited(pid);
        Ok(uffd)
    }

    /// Puts a page with a number nobody else has into the offered range by this space's uffd, and looks for it
    /// in the offering process.
    fn is_my_memory(&self, offer: &HelperOffer) -> bool {
        if self.uffd.register(&offer.holding, false).is_err() {
            return false;
        }
        let mark: u64 = rand_mark();
        let mut page = vec![0u8; 4096];
        page[..8].copy_from_slice(&mark.to_ne_bytes());
        let mut seen = [0u8; 8];
        let found = self
            .uffd
            .copy(offer.holding.start, page.as_ptr(), 4096, false)
            .is_ok()
            && crate::sys::process::read_present_memory(
                offer.process.pid(),
                offer.holding.start,
                &mut seen,
            )
            && seen == mark.to_ne_bytes();
        if !found {
            let _ = self.uffd.unregister(&offer.holding);
        }
        found
    }

    pub(crate) fn install_helper(&mut self, offer: HelperOffer) -> io::Result<()> {
        self.note_helper(&offer);
        self.links.set_staging(Arc::clone(offer.shared.memory()));
        let (helper, process) = Helper::new(offer);
        self.wakeups.watch(&helper.event, Source::Helper)?;
        self.wakeups.watch(&helper.drain_uffd, Source::Helper)?;
        self.wakeups.watch(&process, Source::Process)?;
        self.handle
            .pid
            .store(process.pid().unsigned_abs().into(), Ordering::Release);
        self.process = Some(process);
        self.handle.set_control(helper.shared().clone());
        self.helper = Some(helper);
        Ok(())
    }

    /// What the next agent needs to have of it.
    fn note_helper(&self, offer: &HelperOffer) {
        let place = &self.place;
        let numbers = [
            (&place.drain_uffd, offer.drain_uffd.number()),
            (&place.control, offer.shared.as_fd().as_raw_fd()),
            (&place.event, offer.event.as_raw_fd()),
            (&place.lifeline, offer.lifeline.as_raw_fd()),
        ];
        for (field, number) in numbers {
            field.store(number, Ordering::Relaxed);
        }
        place.holding.store(offer.holding.start, Ordering::Relaxed);
        place.drain.store(offer.drain.start, Ordering::Relaxed);
        let start = offer.process.start_time().unwrap_or(0);
        place.pid_start.store(start, Ordering::Relaxed);
        place.pid.store(offer.process.pid(), Ordering::Release);
        self.handle.set_record(place.record().clone());
    }

    /// The helper has news: a finished batch, a report or a hint, which the next turn finds, or its end.
    pub(super) fn quiet_helper(&mut self) {
        let Some(helper) = &mut self.helper else {
            return;
        };
        helper.quiet();
        if helper.is_dead() {
            self.helper_failed();
        }
    }

    pub(super) fn helper_up(&mut self, process: Process) {
        if let Some(helper) = &mut self.helper
            && let Err(error) = helper.set_process(process, &self.wakeups)
        {
            tracing::error!(%error, "a helper's end cannot be waited for");
        }
    }

    /// Whether an address is in a range of our own, which the program may touch only by touching everything.
    pub(super) fn is_own_range(&self, page: crate::table::Page) -> bool {
        self.helper
            .as_ref()
            .is_some_and(|helper| helper.owns(page.address()))
    }

    /// A report of the shim's: look at the mappings, then let it go on.
    pub(super) fn answer_report(&mut self) {
        let Some(helper) = &mut self.helper else {
            return;
        };
        let report = helper.control().report.load(Ordering::Acquire);
        if report == helper.reported {
            return;
        }
        helper.reported = report;
        if self.job.is_armed() {
            self.rescan();
        } else {
            self.look_ahead();
        }
        if let Some(helper) = &self.helper {
            helper.control().report_ack.store(report, Ordering::Release);
            futex_wake(&helper.control().report_ack);
        }
    }
}

/// The landing range that goes with a drain range.
pub(super) fn landing_behind(drain: &Range<u64>) -> Range<u64> {
    drain.end..drain.end.saturating_add(LANDING_BYTES)
}

/// A number that nobody can have put into a page by chance.
fn rand_mark() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish()
}
