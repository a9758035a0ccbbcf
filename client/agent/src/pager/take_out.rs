//! Taking pages out: victims are chosen ahead of need, the helper moves them, what it got is staged.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use farpage_attach::control::{BATCH_PAGES, Control, method, outcome};
use smallvec::SmallVec;

use super::batch::{Batch, TakeOut};
use super::failure::{FAR_MEMORY_FULL, PAST_DEADLINE};
use super::{Moment, Noted, Pager};
use crate::entry::Entry;
use crate::sys::uffd::Uffd;
use crate::table::Page;

/// Frames kept free, as a share of the limit, and its bounds: so much may be installed before an eviction must
/// have finished.
const FREE_SHARE: u64 = 32;
pub(crate) const FREE_LEAST: u64 = 64;
const FREE_MOST: u64 = 1024;

/// Pages of a batch while faults come: short, since events are not read meanwhile.
const BUSY_BATCH: usize = 32;

/// How often the threads of the program are listed anew.
const PINNED_REFRESH: Duration = Duration::from_millis(20);

/// The pause when nothing of a batch would move, or no victim was found.
const REST: Duration = Duration::from_millis(2);

/// How long one that waits for a batch looks for its end all the time, and how it rests then.
const SETTLED_SOON: Duration = Duration::from_micros(200);
const SETTLE_REST: Duration = Duration::from_micros(100);

/// How long the helper may take over a batch before the program counts as broken, the time apart in which it is stopped or frozen.
/// It may be starved for a while on a loaded machine.
const HELPER_DEADLINE: Duration = Duration::from_secs(30);

impl Pager {
    /// Starts a batch if frames are short. Returns whether it did.
    pub(super) fn evict_ahead(&mut self) -> bool {
        if self.take_out.is_some() || !self.helper.as_ref().is_some_and(super::Helper::is_ready) {
            return false;
        }
        if !self.replaced.is_empty() {
            return false;
        }
        let need = self.pages_to_evict();
        if need == 0 && !self.hints.any_leaving() {
            return false;
        }
        if self.rest_until.is_some_and(|until| Instant::now() < until) {
            return false;
        }
        self.rest_until = None;
        let Some(area) = self.staging.free_area() else {
            return false;
        };
        for page in self.staging.take_stuck() {
            self.residents.arrived(page);
        }
        self.refresh_pinned();
        let busy = !self.waiting.is_empty()
            || self
                .last_fault
                .is_some_and(|at| at.elapsed() < super::BUSY_GAP);
        let most = if busy { BUSY_BATCH } else { BATCH_PAGES };
        let (pages, how) = self.choose_victims(most, most.min(need as usize));
        self.tidy_residents();
        if need == 0 && pages.is_empty() {
            return true;
        }
        self.no_victims = pages.is_empty();
        if pages.is_empty() {
            self.rest_until = Some(Instant::now() + REST);
            return false;
        }
        self.move_out(pages, area, how)
    }

    /// How many pages should go now: up to the free share, or what the sampler asked for.
    fn pages_to_evict(&mut self) -> u64 {
        if !self.job.is_armed() || self.table.local_pages() == 0 {
            self.shrink = 0;
            return 0;
        }
        // Two watermarks: begun at half of what is to be free, so that a batch is worth the helper's waking.
        let free = (self.job.local_pages() / FREE_SHARE).clamp(FREE_LEAST, FREE_MOST) as i64;
        let room = self.job.room();
        let short = if room < free / 2 { free - room } else { 0 };
        (short.max(0) as u64)
            .max(self.shrink)
            .min(self.table.local_pages())
    }

    /// Chooses so many pages as are needed, and up to `most` that the program wants to go.
    fn choose_victims(&mut self, most: usize, needed: usize) -> (Batch, u32) {
        let mut pages = Batch::new();
        // Some of what the program wants to go may be waiting here for another way to go.
        let others = if self.hints.any_leaving() {
            most
        } else {
            needed
        };
        while pages.len() < others {
            let Some(page) = self.staging.next_unmovable() else {
                break;
            };
            if self.table.change(page, Entry::claim_evict).is_some() {
                pages.push(page);
            }
        }
        if !pages.is_empty() {
            pages.sort_unstable();
            return (pages, method::REMAP);
        }
        while pages.len() < others {
            let Some(page) = self.staging.next_shared() else {
                break;
            };
            if self.table.change(page, Entry::claim_evict).is_some() {
                pages.push(page);
            }
        }
        let how = match (pages.is_empty(), self.shared.kernel.has_move) {
            (true, true) => method::MOVE,
            (false, true) => method::UNSHARE_AND_MOVE,
            (_, false) => method::REMAP,
        };
        while how != method::UNSHARE_AND_MOVE
            && pages.len() < most
            && let Some(page) = self.next_unneeded(pages.len() < needed)
        {
            if !self.pinned.contains(&page.0)
                && self.table.change(page, Entry::claim_evict).is_some()
            {
                pages.push(page);
            }
        }
        let mut looked_at = self.residents.len();
        while how != method::UNSHARE_AND_MOVE && pages.len() < needed && looked_at > 0 {
            looked_at -= 1;
            let Some(page) = self.residents.next_victim() else {
                break;
            };
            if self.pinned.contains(&page.0) {
                self.residents.stayed(page);
            } else if self.table.change(page, Entry::claim_evict).is_some() {
                pages.push(page);
            }
        }
        pages.sort_unstable();
        (pages, how)
    }

    fn move_out(&mut self, pages: Batch, area: usize, how: u32) -> bool {
        // Of a move by `mremap` only the pagemap tells when it is done.
        if how == method::REMAP && !self.open_pagemap() {
            self.turn_round(&pages);
            self.rest_until = Some(Instant::now() + REST);
            return false;
        }
        let Some(helper) = &self.helper else {
            return false;
        };
        let control = helper.control();
        let epoch = self.gate.epoch();
        let Some(command) = self.gate.take_out(epoch, &control.taken) else {
            self.turn_round(&pages);
            return false;
        };
        self.place.note_batch(command, how, area, &pages);
        write_batch(control, &pages, area, how);
        helper.publish(command, how);
        self.take_out = Some(TakeOut::new(
            command,
            how,
            area,
            pages,
            self.attention.moment(Instant::now()),
        ));
        true
    }

    /// Looks after the helper: takes over a batch that is done. Returns whether there was one.
    pub(super) fn poll_helper(&mut self) -> bool {
        let Some(helper) = &self.helper else {
            return false;
        };
        let Some(batch) = &self.take_out else {
            return false;
        };
        if helper.control().done.load(Ordering::Acquire) != batch.command {
            self.doubt_helper();
            return false;
        }
        let Some(batch) = self.take_out.take() else {
            return false;
        };
        let outcomes: SmallVec<[u32; BATCH_PAGES]> = batch
            .pages
            .iter()
            .zip(&helper.control().batch.outcomes)
            .map(|(_, outcome)| outcome.load(Ordering::Relaxed))
            .collect();
        tracing::trace!(space = self.handle.id, pages = ?batch.pages, ?outcomes, "batch done");
        let mut taken: SmallVec<[(usize, Page); BATCH_PAGES]> = SmallVec::new();
        // Those that another way takes need no rest.
        let unmovable = outcomes.contains(&libc::EINVAL.unsigned_abs());
        for (index, (page, outcome)) in batch.pages.iter().zip(outcomes).enumerate() {
            if outcome == outcome::REPLACED {
                self.keep_replaced(*page, batch.area, index);
            }
            if batch.settled >> index & 1 == 1 {
                continue;
            }
            if outcome == outcome::TAKEN {
                taken.push((index, *page));
                continue;
            }
            self.not_taken(*page, outcome, batch.method);
            self.place.left_staging(batch.area, index);
        }
        if taken.is_empty() && !unmovable {
            self.rest_until = Some(Instant::now() + REST);
        }
        self.job
            .counters
            .pages_evicted
            .fetch_add(taken.len() as u64, Ordering::Relaxed);
        if batch.method != method::MOVE {
            // What a move takes is nobody else's. Of what others take that is not known.
            self.job.sharing.went(taken.len() as u64);
        }
        self.shrink = self.shrink.saturating_sub(taken.len() as u64);
        self.residents.evicted(taken.len() as u64);
        self.stage(batch.area, &taken);
        true
    }

    /// The kernel kept a page: why decides when it is tried again.
    fn not_taken(&mut self, page: Page, errno: u32, how: u32) {
        tracing::debug!(
            space = self.handle.id,
            page = page.0,
            errno,
            how,
            "was not taken out"
        );
        if how == method::REMAP {
            let _ = self.uffd.lift_protection(&addresses(page));
        }
        if self.table.change(page, Entry::turned_round).is_none() {
            // Discarded while it was claimed.
            self.job.discharge(1);
            return;
        }
        if errno == outcome::UNMANAGED {
            // The next look at the mappings may find it worth managing.
            self.registered.remove(&addresses(page));
            self.discard_pages(page..page.plus(1));
            return;
        }
        if errno == outcome::REPLACED {
            // An event to come says what is there now.
            self.discard_pages(page..page.plus(1));
            return;
        }
        match i32::try_from(errno).unwrap_or(0) {
            // Shared since a fork, or pinned: the first can be made exclusive.
            libc::EBUSY if how == method::MOVE => self.staging.shared_page(page),
            // Not there any more; an event to come says why. The table forgets it if it was not replaced.
            libc::ENOENT => self.discard_to_zeros(page..page.plus(1)),
            // Not plain read-write any more: `mremap` moves it.
            libc::EINVAL if how != method::REMAP => self.staging.unmovable_page(page),
            // Nobody could read it where it is now.
            libc::EIO if how == method::REMAP => self.is_unreadable(page),
            // Locked: it is tried again after a while.
            libc::EINVAL => self.staging.stuck_page(page),
            _ => self.residents.stayed(page),
        }
    }

    /// A page that has failed, as memory does: who touches it is told so.
    fn is_unreadable(&mut self, page: Page) {
        tracing::error!(
            pid = self.pid(),
            page = page.0,
            "a page cannot be read any more"
        );
        if let Some((before, _)) = self.table.change(page, |entry| Some(entry.poisoned())) {
            self.release_slot_of(before);
            self.job.discharge(1);
        }
    }

    fn turn_round(&mut self, pages: &[Page]) {
        for page in pages {
            if self.table.change(*page, Entry::turned_round).is_some() {
                self.residents.stayed(*page);
            }
        }
    }

    /// A batch is not done yet. Whoever stops or freezes a program does that to its helper too: that time counts for nobody's deadline.
    fn doubt_helper(&mut self) {
        let (Some(helper), Some(batch)) = (&self.helper, &mut self.take_out) else {
            return;
        };
        let now = Instant::now();
        batch.doubt(&mut self.attention, now, || helper.is_held());
        if helper.is_dead() || self.attention.waited(batch.since, now) > HELPER_DEADLINE {
            self.helper_failed();
        }
    }

    /// The helper is dead, or stuck with pages in hand: the program cannot go on.
    pub(super) fn helper_failed(&mut self) {
        // A program's own end takes its helper along.
        if self.is_alive() {
            let dead = self.helper.as_ref().is_some_and(super::Helper::is_dead);
            let taking = self.take_out.as_ref().map(|batch| batch.since.at.elapsed());
            tracing::error!(
                pid = self.pid(),
                dead,
                ?taking,
                "the helper does not go on; the program is ended"
            );
            if let Some(process) = &self.process {
                process.signal(libc::SIGKILL);
            }
        }
        self.gate.helper_gone();
        self.take_out = None;
        self.closing = true;
    }

    /// Lists the program's threads: what the kernel writes at their end stays.
    fn refresh_pinned(&mut self) {
        if self
            .pinned_at
            .is_some_and(|at| at.elapsed() < PINNED_REFRESH)
        {
            return;
        }
        if let Some(process) = &self.process {
            self.pinned = process.thread_control_pages().into_iter().collect();
        }
        self.pinned_at = Some(Instant::now());
    }

    /// Waits until nothing is being taken out or written back, for as long as a fault would wait for its page. Events are read
    /// only as far as the helper waits for that, and what comes is returned, in order, to be handled afterwards. An heir is a
    /// child that is to have the same pages.
    pub(super) fn settle(&mut self, heir: Option<&Uffd>) -> Vec<Noted> {
        let began = self.attention.moment(Instant::now());
        let mut kept = Vec::new();
        self.job.settles(true);
        while (self.take_out.is_some() || self.staging.is_busy()) && !self.closing {
            self.attention.look(Instant::now());
            let mut worked = self.poll_links() | self.poll_helper() | self.retry_writes();
            if self.is_remapping() {
                worked |= matches!(self.read_uffd(&mut kept), Ok(1..));
            }
            if !worked {
                rest_while_settling(began.at);
            }
            if began.at.elapsed() > SETTLED_SOON {
                self.give_up_settling(began, heir);
            }
        }
        self.job.settles(false);
        kept
    }

    /// Nobody's pages are waited for when he is gone, unless a child of his has them too. Whose pages have had no place to go for
    /// too long is ended, and his user is told why.
    fn give_up_settling(&mut self, began: Moment, heir: Option<&Uffd>) {
        let full = self.shortage.is_lasting() && !self.shared.far.any_unreachable();
        let late = self.is_past_deadline(began);
        let is_alive = self.is_alive();
        if !is_alive && !heir.is_some_and(Uffd::is_alive) {
            self.closing = true;
        } else if full || late {
            let why = if full { FAR_MEMORY_FULL } else { PAST_DEADLINE };
            self.job.a_process_is_ended(why);
            tracing::error!(
                pid = self.pid(),
                why,
                nodes = %self.links.condition(),
                "a process is ended, whose pages on their way out had to be waited for"
            );
            if let Some(process) = self.process.as_ref().filter(|_| is_alive) {
                process.signal(libc::SIGKILL);
            }
            self.closing = true;
        }
    }
}

/// Lets others run who are to finish what is waited for: mostly it is a matter of microseconds. If it is not, who waits at
/// the highest precedence would keep the processor from those it waits for.
pub(super) fn rest_while_settling(began: Instant) {
    if began.elapsed() < SETTLED_SOON {
        std::thread::yield_now();
    } else {
        std::thread::sleep(SETTLE_REST);
    }
}

/// Where a page lies.
fn addresses(page: Page) -> Range<u64> {
    page.address()..page.plus(1).address()
}

fn write_batch(control: &Control, pages: &[Page], area: usize, how: u32) {
    let batch = &control.batch;
    for (index, page) in pages.iter().enumerate().take(BATCH_PAGES) {
        batch.pages[index].store(page.address(), Ordering::Relaxed);
        batch.outcomes[index].store(outcome::PENDING, Ordering::Relaxed);
    }
    batch
        .count
        .store(pages.len().min(BATCH_PAGES) as u32, Ordering::Relaxed);
    batch.area.store(area as u32, Ordering::Relaxed);
    batch.method.store(how, Ordering::Relaxed);
}
