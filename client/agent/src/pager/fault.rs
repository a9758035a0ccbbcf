//! A fault: what its page is decides what is done.
//!
//! | the page is | done | ends in |
//! |---|---|---|
//! | untouched, zero | a run of zero pages, within the room there is | installed |
//! | local | someone else was faster, or it was discarded meanwhile | installed or woken |
//! | far | claimed and read, with the window that the prefetcher wants behind it | in flight |
//! | being fetched | the transfer under way is marked as wanted | in flight |
//! | being taken out | installed from staging, where its bytes are | installed |
//! | poisoned, corrupt | SIGBUS | poisoned |
//!
//! What cannot be answered now (no room, no free frame, an event unread) is kept and tried again until its
//! deadline.

use super::{Moment, Pager};
use crate::entry::{Entry, Slot, State};
use crate::table::Page;

/// A thread waits for a page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) page: Page,
    pub(crate) write: bool,
    pub(crate) protected: bool,
    pub(crate) thread: u32,
    pub(crate) began: Moment,
    /// Its fetch has failed once: its page is brought without others, whose nodes may be what failed.
    pub(crate) alone: bool,
}

impl Fault {
    pub(super) fn new(
        address: u64,
        write: bool,
        protected: bool,
        thread: u32,
        began: Moment,
    ) -> Self {
        Self {
            page: Page::of(address),
            write,
            protected,
            thread,
            began,
            alone: false,
        }
    }
}

/// The most zero pages granted at once: a granted page is written without a message, so this bounds what may
/// become resident unseen.
const MAX_ZERO_RUN: u64 = 64;

/// Pages granted at once, beyond the limit if need be, where nothing can go.
const ROOM_BEYOND: i64 = 256;

impl Pager {
    /// Answers a fault, or gives it back where that cannot be done now.
    pub(super) fn answer(&mut self, fault: Fault) -> Option<Fault> {
        if !self.is_inheritance_known() {
            self.leave_out_if_guessed(fault.page);
        }
        let entry = self.table.get(fault.page);
        match entry.state() {
            State::Untouched | State::Zero => self.answer_with_zeros(fault),
            State::Local => self.answer_local(fault),
            State::FarRead | State::FarWrite if fault.alone => self.fetch_again(fault),
            State::FarRead | State::FarWrite => self.start_fetch(fault),
            State::Fetching => self.join_fetch(fault),
            State::Evicting => self.answer_from_staging(fault),
            State::Poisoned => {
                self.deliver_sigbus(&fault);
                None
            }
        }
    }

    fn answer_with_zeros(&mut self, fault: Fault) -> Option<Fault> {
        let room = self.room();
        if self.is_own_range(fault.page) {
            // Something touches all memory there is (mlockall, a scanner): harmless zeros.
            return self.zero_uncounted(fault);
        }
        if room <= 0 {
            return Some(fault);
        }
        let window = self.prefetcher.fault(fault.page);
        let most = window.pages.min(MAX_ZERO_RUN).min((room as u64 / 4).max(1));
        let mut run = 1;
        while run < most
            && let Some(page) = window.way.step(fault.page, run)
            && self.registered.contains(page)
            && matches!(self.table.get(page).state(), State::Untouched | State::Zero)
        {
            run += 1;
        }
        let pages = window.way.pages(fault.page, run);
        match self.install_zeros(fault.page, pages, fault.write) {
            true => {
                self.prefetcher.covered(run);
                self.answered(&fault);
                None
            }
            false => Some(fault),
        }
    }

    /// The table says that the page is there. Mostly it is: two threads wanted it and one came later. If it is
    /// not, the program gave it up while a zero page was on its way, and zeros are what it must read.
    fn answer_local(&mut self, fault: Fault) -> Option<Fault> {
        if fault.protected {
            return self.lift_protection(fault);
        }
        if self.is_to_be_put_back(fault.page) {
            return Some(fault);
        }
        self.zero_uncounted(fault)
    }

    fn zero_uncounted(&mut self, fault: Fault) -> Option<Fault> {
        if self.zero_or_wake(fault.page) {
            self.answered(&fault);
            return None;
        }
        Some(fault)
    }

    /// Pages that may be installed now. Where nothing here can go (the program has locked it, or it forked under
    /// a filter that keeps a helper away), waiting would free nothing: that memory is outside the limit.
    pub(super) fn room(&self) -> i64 {
        let room = self.job.room();
        let nothing_can_go =
            self.helper.is_none() || (self.no_victims && self.staging.is_all_stuck());
        // Little room is too little for a fetch of many pages, which must not wait for the rest of it either.
        if nothing_can_go && self.take_out.is_none() {
            return room.max(ROOM_BEYOND);
        }
        room
    }

    /// Counts an answered fault.
    pub(super) fn answered(&self, fault: &Fault) {
        use std::sync::atomic::Ordering::Relaxed;
        self.job.counters.faults.fetch_add(1, Relaxed);
        self.handle.figures.faults.fetch_add(1, Relaxed);
        self.job.latencies.add(fault.began.at.elapsed());
    }

    /// Ends a fault with SIGBUS: by a poison marker where the kernel has one, else by a signal to the thread.
    pub(super) fn deliver_sigbus(&mut self, fault: &Fault) {
        self.job
            .counters
            .pages_poisoned
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if let Some((before, _)) = self
            .table
            .change(fault.page, |entry| Some(entry.poisoned()))
        {
            self.release_slot_of(before);
        }
        let range = fault.page.address()..fault.page.plus(1).address();
        if self.uffd.poison(&range).is_ok() {
            let _ = self.uffd.wake(&range);
            return;
        }
        if let Some(process) = &self.process {
            crate::sys::process::signal_thread(process.pid(), fault.thread, libc::SIGBUS);
        }
    }

    /// Gives back the slot that an entry named.
    pub(super) fn release_slot_of(&self, entry: Entry) {
        if let Some(slot) = entry.slot() {
            self.release_slot(slot);
        }
    }

    /// Gives back one reference to a slot. Only processes of one job share slots, and it holds each of them once.
    pub(super) fn release_slot(&self, slot: Slot) {
        if self.shared.far.release(slot) {
            self.job.charge_far(-1);
        }
    }
}
