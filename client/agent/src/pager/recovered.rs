//! An address space that another agent had: what it left is put together again.
//!
//! The table says where each page is, and the kernel which are present; where they differ, the agent died between the call
//! that put a page there and the store that said so, and the kernel is right. What was on its way in is far. What was on its
//! way out is with the helper, in staging, or where it was.

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use farpage_attach::control::{BATCH_PAGES, STAGING_AREAS, method, staging_offset};

use super::batch::{Batch, TakeOut};
use super::helper::landing_behind;
use super::{Inheritance, Journal, Pager, Registered, Shared, SoftDirty};
use crate::entry::{Entry, Slot, State};
use crate::gate::Gate;
use crate::job::Job;
use crate::mailbox::{HelperOffer, SpaceHandle};
use crate::state::records::{SpaceRecord, space};
use crate::state::{Chunk, SpacePlace};
use crate::sys::control::SharedBlock;
use crate::sys::pagemap::Pagemap;
use crate::sys::process::{self, Process};
use crate::sys::state::Ref;
use crate::sys::uffd::{Message, Uffd};
use crate::table::Page;

/// What an address space's record names.
#[derive(Debug)]
struct Descriptors {
    record: Ref<SpaceRecord>,
    /// Whether the address space goes on.
    are_used: bool,
    uffd: Option<Uffd>,
    drain_uffd: Option<Uffd>,
    control: Option<OwnedFd>,
    event: Option<OwnedFd>,
    lifeline: Option<OwnedFd>,
}

impl Descriptors {
    /// Takes them; ask once.
    fn of(record: &Ref<SpaceRecord>) -> Self {
        let number = |field: &std::sync::atomic::AtomicI32| field.load(Ordering::Acquire);
        Self {
            record: record.clone(),
            are_used: false,
            uffd: Uffd::left_at(number(&record.uffd)),
            drain_uffd: Uffd::left_at(number(&record.drain_uffd)),
            control: crate::sys::left_at(number(&record.control)),
            event: crate::sys::left_at(number(&record.event)),
            lifeline: crate::sys::left_at(number(&record.lifeline)),
        }
    }
}

impl Drop for Descriptors {
    /// Those that nobody took are closed. Before that no record may name them: their numbers may be others' then.
    fn drop(&mut self) {
        if !self.are_used {
            self.record.state.store(space::FREE, Ordering::Release);
        }
    }
}

/// Why an address space is not taken over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotRecovered {
    /// Its process has ended, or had not attached.
    #[error("its process is not there any more, or had not attached")]
    Gone,
    /// See [`SpaceRecord::undecided`].
    #[error(
        "the agent died while it could not note what it had read and what it knew, having too much of it"
    )]
    Undecided,
    /// Its helper ended without an agent.
    #[error("its helper ended while there was no agent")]
    NoHelper,
    /// Something of it cannot be had.
    #[error("it cannot be read: {0}")]
    System(#[from] io::Error),
}

impl Pager {
    /// The pager of an address space that another agent had, before it runs. `live` are the uffds of all of them.
    ///
    /// # Errors
    /// [`NotRecovered`]; a program that runs must be ended.
    pub(crate) fn recovered(
        shared: Shared,
        job: &Arc<Job>,
        handle: Arc<SpaceHandle>,
        place: SpacePlace,
        chunks: Vec<(u64, Chunk)>,
        live: &HashSet<i32>,
    ) -> Result<Self, NotRecovered> {
        let mut descriptors = Descriptors::of(place.record());
        let mut journal = Journal::new(place.record().clone());
        let left = journal.left(live);
        let has_forked = left
            .iter()
            .any(|noted| matches!(noted.message, Message::Fork(_)));
        let record = place.record().clone();
        // Before any uffd is closed: without it what is far would read as zeros.
        let end = |why: NotRecovered| {
            end_program(&record, &why, has_forked.then_some(&**job));
            why
        };
        if place.undecided.load(Ordering::Acquire) != 0 {
            return Err(end(NotRecovered::Undecided));
        }
        let helper = place.helper.load(Ordering::Acquire);
        let is_child = place.parent.load(Ordering::Relaxed) != 0;
        let soft_dirty = place.soft_dirty.load(Ordering::Relaxed);
        let parent_pid = place.parent_pid.load(Ordering::Relaxed);
        let inheritance = match place.inheritance_unknown.load(Ordering::Relaxed) {
            true => Inheritance::Unknown {
                parent: Some(parent_pid).filter(|pid| *pid > 0),
            },
            false => Inheritance::Known,
        };
        let offer = match helper {
            // It was not told that it is attached, and comes to the door again.
            0 if is_child => {
                forget_helper(&place);
                None
            }
            0 => return Err(end(NotRecovered::Gone)),
            _ => match offer_left(&place, &mut descriptors) {
                Ok(offer) => Some(offer),
                // Its children are not: they get what it had when they began.
                Err(NotRecovered::Gone) if has_forked => {
                    forget_helper(&place);
                    None
                }
                Err(why) => return Err(end(why)),
            },
        };
        if !has_forked && !descriptors.uffd.as_ref().is_some_and(Uffd::is_alive) {
            return Err(end(NotRecovered::Gone));
        }
        let uffd = descriptors.uffd.take().ok_or(NotRecovered::Gone)?;
        let registered = match &offer {
            Some((offer, _)) => ranges_left(offer).map_err(|error| end(error.into()))?,
            None => Registered::default(),
        };
        let mut pager = Self::new(shared, Arc::clone(job), handle, None, uffd, place)
            .map_err(|error| end(error.into()))?;
        for (number, chunk) in chunks {
            pager.table.adopt(number, chunk);
        }
        pager.is_recovered = true;
        pager.inheritance = inheritance;
        pager.soft_dirty = SoftDirty::recovered(soft_dirty);
        (pager.journal, pager.left) = (journal, left);
        if let Some((offer, helper)) = offer {
            pager.registered = registered;
            pager
                .install_helper(offer)
                .map_err(|error| end(error.into()))?;
            let start = helper.start_time().unwrap_or(0);
            pager.place.helper_start.store(start, Ordering::Relaxed);
            pager.helper_up(helper);
        }
        descriptors.are_used = true;
        pager.settle_what_was_left(soft_dirty);
        Ok(pager)
    }

    /// Brings every entry to a state that this pager can go on from.
    fn settle_what_was_left(&mut self, soft_dirty: bool) {
        let mut on_their_way = self.take_up_batch();
        for area in 0..STAGING_AREAS {
            on_their_way.extend(self.take_up_area(area));
        }
        let everything = Page(0)..Page(u64::MAX >> 12);
        for (page, entry) in self.table.touched(everything).collect::<Vec<_>>() {
            match entry.state() {
                State::Fetching => {
                    self.table.change(page, Entry::fetch_dropped);
                }
                // Of a program that has ended: what was on its way out then its children cannot have, unless it was here yet.
                State::Evicting if self.helper.is_none() => {
                    self.table.change(page, |entry| Some(entry.poisoned()));
                }
                // Chosen, and no more.
                State::Evicting if !on_their_way.contains(&page) => {
                    self.table.change(page, Entry::turned_round);
                    self.residents.arrived(page);
                }
                State::Local => self.residents.arrived(page),
                _ => {}
            }
            if soft_dirty {
                self.table.change(page, |entry| Some(entry.soft_dirtied()));
            }
        }
        let with_helper = self.take_out.as_ref().map_or(0, TakeOut::unsettled);
        let here = self.table.local_pages() + with_helper;
        if self.process.is_some() {
            self.job.charge(here as i64);
        } else {
            self.uncharged = here;
        }
    }

    /// The batch with the helper: it finishes it without an agent. Returns its pages. One that was not handed over yet has not
    /// touched any.
    fn take_up_batch(&mut self) -> HashSet<Page> {
        let command = self.place.command.load(Ordering::Acquire);
        let area = self.place.area.load(Ordering::Relaxed) as usize % STAGING_AREAS;
        let Some(helper) = &self.helper else {
            return HashSet::new();
        };
        let was_handed_over = helper.was_published(command);
        let is_under_way = self.place.batch.load(Ordering::Acquire);
        let how = self.place.method.load(Ordering::Relaxed);
        self.gate = Gate::resumed(command, is_under_way && was_handed_over);
        if how == method::REMAP {
            // Of which of its moves the event was read is not known.
            self.gate.give_up(&helper.control().given_up);
        }
        if !is_under_way {
            return HashSet::new();
        }
        let record = &self.place.areas[area];
        let live = record.live.load(Ordering::Acquire);
        if !was_handed_over {
            self.place.batch_is_over();
            record.live.store(0, Ordering::Release);
            return HashSet::new();
        }
        let count = self.place.batch_pages.load(Ordering::Relaxed) as usize;
        let pages: Batch = record
            .pages
            .iter()
            .take(count.min(BATCH_PAGES))
            .map(|page| Page(page.load(Ordering::Relaxed)))
            .collect();
        let mut settled = 0;
        for (index, page) in pages.iter().enumerate() {
            let is_out = live >> index & 1 == 1;
            if !is_out || self.table.get(*page).state() != State::Evicting {
                settled |= 1 << index;
            }
        }
        let unsettled = pages.iter().enumerate();
        let unsettled = unsettled.filter(|(index, _)| settled >> index & 1 == 0);
        let unsettled = unsettled.map(|(_, page)| *page).collect();
        tracing::debug!(
            space = self.handle.id,
            how,
            pages = pages.len(),
            settled,
            "a batch was under way"
        );
        let now = self.attention.moment(std::time::Instant::now());
        let batch = TakeOut::left(command, how, area, pages, settled, now);
        self.take_out = Some(batch);
        unsettled
    }

    /// A staging area whose batch is over: what of it is still nowhere else waits for a slot again.
    fn take_up_area(&mut self, area: usize) -> Vec<Page> {
        let with_helper = self.take_out.as_ref().map(|batch| batch.area);
        let Some(helper) = self.helper.as_ref().filter(|_| with_helper != Some(area)) else {
            return Vec::new();
        };
        let memory = Arc::clone(helper.shared().memory());
        let mut left = Vec::new();
        for (index, page) in self.place.areas[area].live_pages() {
            let hash = memory.hash128(staging_offset(area, index) as u64, 4096);
            match hash {
                Ok(hash) if self.table.get(page).state() == State::Evicting => {
                    self.staging.take_up(area, index, page, hash);
                    left.push(page);
                }
                _ => self.place.is_no_more_in_staging(area, index),
            }
        }
        left
    }

    /// Every slot that an entry names, once for each.
    pub(crate) fn named_slots(&self) -> impl Iterator<Item = Slot> + '_ {
        let everything = Page(0)..Page(u64::MAX >> 12);
        let entries = self.table.touched(everything);
        entries.filter_map(|(_, entry)| entry.slot())
    }

    /// What the agent before had read is followed before anything else, and who waited for it looks again.
    pub(super) fn follow_what_was_left(&mut self) {
        if !self.is_recovered {
            return;
        }
        let mut left = std::mem::take(&mut self.left);
        self.leave_out_own(&mut left);
        self.following = true;
        self.keep_messages(left);
        self.follow_later();
        self.following = false;
        self.uffd.wake_all();
        if let Some(helper) = &self.helper {
            helper.wake_all();
        }
        self.handle.forked();
        self.handle.ask_rescan();
    }

    /// Once no call of the program's is on its way any more: what is present is here, whatever the table says. Returns whether
    /// it was looked at.
    pub(super) fn compare_with_memory(&mut self) -> bool {
        let Some(process) = self.process.as_ref().filter(|_| self.is_recovered) else {
            return false;
        };
        if self.take_out.is_some() || self.uffd.is_changing() {
            return false;
        }
        let Ok(pagemap) = Pagemap::open(process.pid()) else {
            return false;
        };
        let mut present = Vec::new();
        for range in self.registered.ranges() {
            if pagemap
                .present(range, |page| present.push(Page(page)))
                .is_err()
            {
                return false;
            }
        }
        self.is_recovered = false;
        let mut found = 0;
        for page in present {
            // What is in staging of it is what it was before it was put back.
            if self.table.get(page).state() == State::Evicting {
                self.forget_staged(page);
            }
            let arrive = |entry: Entry| entry.found_present().or_else(|| entry.turned_round());
            if self.table.change(page, arrive).is_some() {
                self.residents.arrived(page);
                found += 1;
            }
        }
        self.job.charge(found);
        tracing::debug!(
            space = self.handle.id,
            found,
            "compared with what is present"
        );
        true
    }
}

/// The offer by which the helper came to be known, as it was.
fn offer_left(
    place: &SpacePlace,
    descriptors: &mut Descriptors,
) -> Result<(HelperOffer, Process), NotRecovered> {
    let number = |field: &std::sync::atomic::AtomicI32| field.load(Ordering::Acquire);
    let start = |field: &std::sync::atomic::AtomicU64| field.load(Ordering::Acquire);
    let process = Process::reopen(number(&place.pid), start(&place.pid_start))
        .filter(|process| !process.has_exited())
        .ok_or(NotRecovered::Gone)?;
    let helper = Process::reopen(number(&place.helper), start(&place.helper_start))
        .filter(|helper| !helper.has_exited())
        .ok_or(NotRecovered::NoHelper)?;
    // It may have replaced itself by another program.
    if process::share_memory(process.pid(), helper.pid()) == Some(false) {
        helper.signal(libc::SIGKILL);
        return Err(NotRecovered::Gone);
    }
    let missing = || NotRecovered::System(io::ErrorKind::NotFound.into());
    let range = |start: u64| start..start + (BATCH_PAGES * 4096) as u64;
    let offer = HelperOffer {
        process,
        holding: range(place.holding.load(Ordering::Relaxed)),
        drain: range(place.drain.load(Ordering::Relaxed)),
        drain_uffd: descriptors.drain_uffd.take().ok_or_else(missing)?,
        shared: SharedBlock::map(descriptors.control.take().ok_or_else(missing)?)?,
        event: descriptors.event.take().ok_or_else(missing)?,
        lifeline: descriptors.lifeline.take().ok_or_else(missing)?,
    };
    Ok((offer, helper))
}

/// What is registered of a program's memory, without its helper's ranges.
fn ranges_left(offer: &HelperOffer) -> io::Result<Registered> {
    let mut registered = Registered::default();
    let is_own = |range: &Range<u64>| {
        [&offer.holding, &offer.drain, &landing_behind(&offer.drain)]
            .iter()
            .any(|own| own.start < range.end && range.start < own.end)
    };
    for (range, _) in process::registered_ranges(offer.process.pid())? {
        if !is_own(&range) {
            registered.insert(range);
        }
    }
    Ok(registered)
}

/// What is not taken over ends, if it has not yet: the program, or all of the job where it has children that nobody knows yet;
/// and its helper, which may wait for what nobody will read.
fn end_program(record: &SpaceRecord, why: &NotRecovered, job_of_children: Option<&Job>) {
    if !matches!(why, NotRecovered::Gone) {
        if let Some(job) = job_of_children {
            job.fail(why.to_string());
        }
        let pid = record.pid.load(Ordering::Acquire);
        let program = Process::reopen(pid, record.pid_start.load(Ordering::Relaxed));
        if let Some(program) = program {
            program.signal(libc::SIGKILL);
        }
    }
    let helper = record.helper.load(Ordering::Acquire);
    let helper = Process::reopen(helper, record.helper_start.load(Ordering::Relaxed));
    if let Some(helper) = helper {
        helper.signal(libc::SIGKILL);
    }
    record.state.store(space::FREE, Ordering::Release);
}

/// A forked child's handshake was broken off: it is as it was before it came to the door.
fn forget_helper(place: &SpacePlace) {
    for field in [
        &place.pid,
        &place.drain_uffd,
        &place.control,
        &place.event,
        &place.lifeline,
    ] {
        field.store(0, Ordering::Release);
    }
}
