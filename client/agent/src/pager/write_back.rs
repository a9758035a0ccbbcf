//! Write-back: what was taken out goes from staging to far memory, unless its bytes are there already.
//!
//! A run of pages is written to all copies of its extent that answer. It is far once each of them has it or has failed; one
//! that failed does not count as having it, and is filled later (`mover`).

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use farpage_attach::control::{STAGING_AREAS, staging_offset};
use farpage_fabric::LocalSlice;
use farpage_fabric::memory::RegisteredMemory;
use smallvec::SmallVec;

use super::install::Installed;
use super::links::{LinkError, Work};
use super::run::{Run, Staged, Write};
use super::{Fault, Pager};
use crate::entry::{Entry, Slot, State};
use crate::far::MAX_COPIES;
use crate::table::Page;

/// One batch's pages in staging.
#[derive(Debug, Default)]
struct Area {
    runs: Vec<Option<Run>>,
    /// Pages for which no slot was free yet.
    homeless: Vec<Staged>,
}

impl Area {
    fn is_empty(&self) -> bool {
        self.homeless.is_empty() && self.runs.iter().all(Option::is_none)
    }

    fn staged(&mut self, page: Page) -> Option<&mut Staged> {
        let in_runs = self
            .runs
            .iter_mut()
            .flatten()
            .flat_map(|run| run.pages.iter_mut());
        in_runs
            .chain(self.homeless.iter_mut())
            .find(|staged| staged.page == page && staged.live)
    }
}

/// The staging areas of one address space.
#[derive(Debug, Default)]
pub(crate) struct Staging {
    areas: [Area; STAGING_AREAS],
    /// Pages that a fork left shared, to be made exclusive before they can move.
    shared: VecDeque<Page>,
    /// Pages of mappings that are not plain read-write any more, which `mremap` takes.
    unmovable: VecDeque<Page>,
    /// Pages that the program has locked, and when one was last found to be.
    stuck: BTreeSet<Page>,
    stuck_found: Option<Instant>,
    /// What runs kept their pages in that are over, for the next ones.
    spare: Vec<Vec<Staged>>,
}

impl Staging {
    pub(super) fn free_area(&self) -> Option<usize> {
        self.areas.iter().position(Area::is_empty)
    }

    /// Whether pages wait for a slot, or for their write to be posted.
    fn has_unsent(&self) -> bool {
        self.areas
            .iter()
            .any(|area| !area.homeless.is_empty() || area.runs.iter().flatten().any(Run::is_unsent))
    }

    pub(super) fn is_busy(&self) -> bool {
        self.areas.iter().any(|area| !area.is_empty())
    }

    /// A page that another agent left in an area: it has no slot yet.
    pub(super) fn take_up(&mut self, area: usize, index: usize, page: Page, hash: u128) {
        if let Some(area) = self.areas.get_mut(area) {
            area.homeless.push(Staged {
                index,
                page,
                hash,
                live: true,
            });
        }
    }

    pub(super) fn shared_page(&mut self, page: Page) {
        self.shared.push_back(page);
    }

    pub(super) fn next_shared(&mut self) -> Option<Page> {
        self.shared.pop_front()
    }

    pub(super) fn unmovable_page(&mut self, page: Page) {
        self.unmovable.push_back(page);
    }

    pub(super) fn next_unmovable(&mut self) -> Option<Page> {
        self.unmovable.pop_front()
    }

    pub(super) fn stuck_page(&mut self, page: Page) {
        self.stuck.insert(page);
        self.stuck_found = Some(Instant::now());
    }

    /// The locked pages, to be tried again; none while others are being found to be locked. Trying all of them may take longer
    /// than any pause between two tries, and that nothing is left which could go is only seen once all have been tried.
    pub(super) fn take_stuck(&mut self) -> Vec<Page> {
        if self
            .stuck_found
            .is_some_and(|at| at.elapsed() < STUCK_RETRY)
        {
            return Vec::new();
        }
        std::mem::take(&mut self.stuck).into_iter().collect()
    }

    /// Whether nothing is left that could go: what is here is locked, as the program wanted.
    pub(super) fn is_all_stuck(&self) -> bool {
        !self.stuck.is_empty() && self.shared.is_empty() && self.unmovable.is_empty()
    }

    /// The hash of a page that is in staging.
    pub(super) fn hash(&mut self, page: Page) -> Option<u128> {
        self.find(page).map(|(_, staged)| staged.hash)
    }

    fn find(&mut self, page: Page) -> Option<(usize, &mut Staged)> {
        self.areas
            .iter_mut()
            .enumerate()
            .find_map(|(number, area)| Some((number, area.staged(page)?)))
    }
}

impl Pager {
    /// Pages have left the program's memory and lie in staging: decides for each where its bytes are to be.
    pub(super) fn stage(&mut self, area: usize, taken: &[(usize, Page)]) {
        let Some(helper) = &self.helper else { return };
        let memory = Arc::clone(helper.shared().memory());
        let age = self.residents.age();
        let mut changed = std::mem::take(&mut self.staging.areas[area].homeless);
        self.job.charge(-(taken.len() as i64));
        for (index, page) in taken {
            let entry = self.table.get(*page);
            if entry.state() != State::Evicting {
                self.place.left_staging(area, *index);
                continue; // Discarded or moved meanwhile.
            }
            let offset = staging_offset(area, *index) as u64;
            let Ok(hash) = memory.hash128(offset, 4096) else {
                continue;
            };
            self.note_taken_out(*page, entry, hash);
            if hash == self.fetches.zero_hash() && is_zero(&memory, offset) {
                self.table.change(*page, |entry| entry.evicted_as_zero(age));
                self.place.left_staging(area, *index);
                self.release_slot_of(entry);
                self.soft_dirty.forget(*page);
            } else if entry
                .slot()
                .is_some_and(|slot| self.is_good_copy(slot, hash))
            {
                self.table.change(*page, |entry| entry.evicted_clean(age));
                self.place.left_staging(area, *index);
                self.soft_dirty.forget(*page);
            } else {
                // A copy that it has is stale.
                self.drop_copy(*page);
                changed.push(Staged {
                    index: *index,
                    page: *page,
                    hash,
                    live: true,
                });
            }
        }
        self.staging.areas[area].homeless = changed;
        // Before any of them goes home again: up to here all of this could be done once more.
        self.place.batch_is_over();
        self.post_writes();
    }

    /// Whether a slot holds these bytes, on a node that can be asked for them as far as is known. A page that is here is not
    /// given up for a copy that may be gone.
    fn is_good_copy(&self, slot: Slot, hash: u128) -> bool {
        let far = &self.shared.far;
        far.hash(slot) == Some(hash) && far.is_usable(slot) && !self.links.is_away(far, slot)
    }

    /// Tries again what found no slot, or no node that answered. With all areas taken no batch comes that would.
    pub(super) fn retry_writes(&mut self) -> bool {
        let resting = self.rest_until.is_some_and(|until| Instant::now() < until);
        !resting && self.staging.has_unsent() && self.post_writes()
    }

    /// Finds slots for staged pages and posts their writes, as far as both can be had.
    pub(super) fn post_writes(&mut self) -> bool {
        let mut worked = false;
        for area in 0..STAGING_AREAS {
            worked |= self.find_slots(area);
            let runs = self.staging.areas[area].runs.len();
            for number in 0..runs {
                let run = self.staging.areas[area].runs[number].as_ref();
                if run.is_some_and(Run::is_unsent) {
                    worked |= self.post_run(area, number);
                }
            }
        }
        self.links.flush();
        worked
    }

    fn find_slots(&mut self, area: usize) -> bool {
        let (mut worked, copies) = (false, self.job.limits.copies);
        while let Some(first) = self.staging.areas[area].homeless.first().copied() {
            let homeless = &self.staging.areas[area].homeless;
            let neighbours = homeless
                .iter()
                .zip(first.index..)
                .take_while(|(staged, index)| staged.index == *index)
                .count();
            let room = self.job.far_room().min(neighbours as u64) as u16;
            let run = if room == 0 {
                None
            } else {
                self.shared.far.take_run(room, copies)
            };
            let (spawner, far) = (&self.shared.spawner, &self.shared.far);
            spawner.wanted_far_memory(far, copies);
            let Some(run) = run else {
                if self.give_up_copies() {
                    continue;
                }
                self.far_memory_full(area);
                return worked;
            };
            let mut pages = self.staging.spare.pop().unwrap_or_default();
            let homeless = &mut self.staging.areas[area].homeless;
            pages.extend(homeless.drain(..usize::from(run.len)));
            self.job.charge_far(i64::from(run.len));
            let targets = self.shared.far.targets(run);
            let run = Run::new(first.index, pages, run, targets);
            for (slot, staged) in run.slots().zip(&run.pages) {
                self.shared.far.set_hash(slot, staged.hash);
                self.place.is_written_to(area, staged.index, slot);
            }
            let run = Some(run);
            self.shortage.end();
            let runs = &mut self.staging.areas[area].runs;
            match runs.iter_mut().find(|place| place.is_none()) {
                Some(place) => *place = run,
                None => runs.push(run),
            }
            worked = true;
        }
        worked
    }

    /// No slot to be had: the pages go home again, so that no thread waits for far memory that is not there.
    fn far_memory_full(&mut self, area: usize) {
        self.rest_until = Some(Instant::now() + FULL_REST);
        let homeless = std::mem::take(&mut self.staging.areas[area].homeless);
        let mut left = Vec::new();
        for staged in homeless {
            if staged.live && !self.return_home(area, staged) {
                left.push(staged);
            }
        }
        self.staging.areas[area].homeless = left;
        self.shortage.go_on(self.shared.far.any_unreachable());
    }

    /// Posts what of a run's writes can be. A copy whose node cannot be reached is done without where there is another.
    fn post_run(&mut self, area: usize, number: usize) -> bool {
        let Some(run) = self.staging.areas[area].runs[number].as_mut() else {
            return false;
        };
        let Some(frames) = self.fetches.memory() else {
            return false;
        };
        let from = LocalSlice {
            region: self.links.staging_region(),
            offset: staging_offset(area, run.first) as u64,
            len: run.pages.len() as u32 * 4096,
        };
        let slots = run.slots;
        let is_new = run.targets.iter().all(|it| it.write == Write::Unsent);
        let mut away = SmallVec::<[usize; MAX_COPIES]>::new();
        for (index, target) in run.targets.iter_mut().enumerate() {
            if target.write != Write::Unsent {
                continue;
            }
            let work = Work::Write {
                area: area as u8,
                index: number as u8,
                target: index as u8,
            };
            match self.links.write(&frames, work, from, &target.place) {
                Ok(()) => target.write = Write::UnderWay,
                Err(LinkError::Busy) => {}
                Err(LinkError::Away) => away.push(index),
                Err(LinkError::Unreachable) => {
                    target.write = Write::Failed;
                    self.shared.far.written(slots, target.place.copy, false);
                }
            }
        }
        let others = run.targets.iter().enumerate();
        let mut others = others.filter(|(index, _)| !away.contains(index));
        if others.any(|(_, target)| target.write != Write::Failed) {
            for index in away {
                run.targets[index].write = Write::Failed;
                let copy = run.targets[index].place.copy;
                self.shared.far.written(slots, copy, false);
            }
        }
        let sent = is_new && run.has(Write::UnderWay);
        if sent {
            self.job
                .counters
                .pages_written_back
                .fetch_add(slots.len.into(), Relaxed);
        }
        self.finish_run(area, number);
        sent
    }

    /// A write to one of a run's targets has completed.
    pub(super) fn write_done(&mut self, area: usize, number: usize, target: usize, ok: bool) {
        if !ok {
            self.links.reconnect_later();
        }
        let runs = &mut self.staging.areas[area].runs;
        let run = runs.get_mut(number).and_then(Option::as_mut);
        let Some(run) = run else { return };
        if let Some(target) = run.targets.get_mut(target) {
            target.write = if ok { Write::Done } else { Write::Failed };
            self.shared.far.written(run.slots, target.place.copy, ok);
            if !ok {
                self.shared.far.may_still_arrive(run.slots);
            }
        }
        self.finish_run(area, number);
    }

    /// Where all of a run's writes are over, its pages are far if any copy has them.
    fn finish_run(&mut self, area: usize, number: usize) {
        let runs = &self.staging.areas[area].runs;
        let run = runs.get(number).and_then(Option::as_ref);
        match run.filter(|run| run.is_over()) {
            Some(run) if run.has(Write::Done) => self.run_is_far(area, number),
            Some(_) => self.write_failed(area, number),
            None => {}
        }
    }

    fn run_is_far(&mut self, area: usize, number: usize) {
        let Some(mut run) = self.staging.areas[area]
            .runs
            .get_mut(number)
            .and_then(Option::take)
        else {
            return;
        };
        let age = self.residents.age();
        for (here, staged) in run.slots().zip(&run.pages) {
            let before = self.table.get(staged.page);
            let kept = if staged.live {
                self.table
                    .change(staged.page, |entry| entry.evicted_to(here, age))
            } else {
                // Turned round: what was written is a copy of what it was; its hash will tell whether it still
                // is when the page is taken out again. One that is not soft-dirty might be compared with that copy later on
                // instead of with what it held when it was cleared.
                self.table.change(staged.page, |entry| {
                    entry.gained_copy(here).filter(|copy| copy.is_soft_dirty())
                })
            };
            match kept {
                Some(_) if staged.live => {
                    self.release_slot_of(before);
                    self.soft_dirty.forget(staged.page);
                }
                Some(_) => {}
                None => {
                    self.release_slot(here);
                }
            }
            self.place.left_staging(area, staged.index);
        }
        run.pages.clear();
        self.staging.spare.push(run.pages);
        self.tidy_area(area);
    }

    /// No copy has a run: its slots are given back and its pages look for others, on nodes that answer.
    fn write_failed(&mut self, area: usize, number: usize) {
        let Some(run) = self.staging.areas[area]
            .runs
            .get_mut(number)
            .and_then(Option::take)
        else {
            return;
        };
        for target in run.targets.iter().filter(|it| !it.write.is_over()) {
            let copy = target.place.copy;
            self.shared.far.written(run.slots, copy, false);
        }
        if run.has(Write::UnderWay) {
            self.shared.far.may_still_arrive(run.slots);
        }
        for staged in &run.pages {
            self.place.is_not_written(area, staged.index);
        }
        run.slots().for_each(|slot| self.release_slot(slot));
        self.staging.areas[area]
            .homeless
            .extend(run.pages.into_iter().filter(|staged| staged.live));
        self.tidy_area(area);
        self.rest_until = Some(Instant::now() + FULL_REST);
    }

    fn tidy_area(&mut self, area: usize) {
        let area = &mut self.staging.areas[area];
        if area.is_empty() {
            area.runs.clear();
        }
    }

    /// A touch of a page that was just taken out: its bytes are in staging, or will be in a moment.
    pub(super) fn answer_from_staging(&mut self, fault: Fault) -> Option<Fault> {
        let Some((area, staged)) = self.staging.find(fault.page) else {
            return Some(fault);
        };
        let staged = *staged;
        if !self.return_home(area, staged) {
            return Some(fault);
        }
        self.answered(&fault);
        None
    }

    fn return_home(&mut self, area: usize, staged: Staged) -> bool {
        let Some(helper) = self.helper.as_ref().filter(|_| !self.following) else {
            return false;
        };
        let source = helper.shared().address(staging_offset(area, staged.index));
        if self.install_copies(staged.page, 1, source) != Installed::All {
            return false;
        }
        if self
            .table
            .change(staged.page, Entry::turned_round)
            .is_some()
        {
            self.residents.stayed(staged.page);
            self.job.charge(1);
        }
        self.forget_staged(staged.page);
        true
    }

    /// A page in staging was discarded, moved or turned round: its write no longer decides where it is.
    pub(super) fn forget_staged(&mut self, page: Page) {
        if let Some((area, staged)) = self.staging.find(page) {
            staged.live = false;
            self.place.is_no_more_in_staging(area, staged.index);
        }
        for area in &mut self.staging.areas {
            area.homeless.retain(|staged| staged.live);
        }
    }

    /// At the end: nothing that the fabric still reads or writes may be freed under it.
    pub(super) fn finish_transfers(&mut self) {
        let began = Instant::now();
        while self.links.any_in_flight() && began.elapsed() < CLOSE_DEADLINE {
            if !self.poll_links() {
                super::take_out::rest_while_settling(began);
            }
        }
        for area in 0..STAGING_AREAS {
            for number in 0..self.staging.areas[area].runs.len() {
                self.write_failed(area, number);
            }
        }
    }
}

fn is_zero(memory: &RegisteredMemory, offset: u64) -> bool {
    let mut bytes = [0u8; 4096];
    memory.read(offset, &mut bytes).is_ok() && bytes.iter().all(|byte| *byte == 0)
}

/// How long locked pages are left alone before it is tried again whether they still are.
const STUCK_RETRY: Duration = Duration::from_secs(1);
/// How long eviction rests when no slot could be had, so that the control plane can grant another extent.
const FULL_REST: Duration = Duration::from_millis(5);
/// How long the end of an address space waits for its last transfers.
const CLOSE_DEADLINE: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    /// They were tried again by the clock alone. With thousands of them that was before all had been tried once, so that it was never
    /// seen that nothing could go, and who locked all of its memory waited for room until the fault's deadline.
    #[test]
    fn locked_pages_rest_while_more_are_found() {
        let mut staging = Staging::default();
        let long_ago = Instant::now().checked_sub(2 * STUCK_RETRY);
        staging.stuck_page(Page(1));
        staging.stuck_found = long_ago;
        staging.stuck_page(Page(2));
        assert!(staging.take_stuck().is_empty());
        staging.stuck_found = long_ago;
        assert_eq!(staging.take_stuck(), [Page(1), Page(2)]);
    }
}
