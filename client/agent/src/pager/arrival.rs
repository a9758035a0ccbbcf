//! What was asked for has come: it is checked, and installed as soon as there is room.

use farpage_fabric::memory::RegisteredMemory;

use super::Pager;
use super::fetch::{MAX_FETCHES, frame_offset};
use super::install::Installed;
use crate::entry::{Entry, State};

impl Pager {
    /// A read has completed.
    pub(super) fn read_done(&mut self, place: usize, index: usize, ok: bool) {
        if let Some(fetch) = self.fetches.get(place) {
            fetch.outstanding = fetch.outstanding.saturating_sub(1);
            fetch.failed |= !ok;
            if !ok {
                fetch
                    .failed_copies
                    .extend(fetch.sources.get(index).copied());
            }
        }
        self.post_reads(place);
        self.try_install(place);
    }

    /// Tries what arrived and could not be installed at once.
    pub(super) fn install_arrived(&mut self) -> bool {
        let mut worked = false;
        for place in 0..MAX_FETCHES {
            let Some(fetch) = self.fetches.get(place) else {
                continue;
            };
            if fetch.posted() < fetch.slots.len() && !fetch.failed {
                self.post_reads(place);
            }
            // In this order: where this thread was kept from running for longer than a fault may wait, what it finds now still counts.
            worked |= self.try_install(place);
            worked |= self.give_up_late(place);
        }
        worked
    }

    /// Installs a fetch that is complete and wanted. Returns whether it is finished.
    pub(super) fn try_install(&mut self, place: usize) -> bool {
        let Some(fetch) = self.fetches.get(place) else {
            return false;
        };
        if !fetch.is_complete() || self.following {
            return false;
        }
        if fetch.failed {
            return self.retry_fetch(place);
        }
        if !fetch.checked && !self.check_hashes(place) {
            return self.retry_fetch(place);
        }
        let Some(fetch) = self.fetches.places.get(place) else {
            return false;
        };
        // Never more than there is room for; the frames keep it until eviction has made some.
        let (wanted, hinted, pages) = (fetch.wanted, fetch.hinted, fetch.slots.len() as i64);
        let room = if wanted {
            self.room()
        } else if hinted && self.waiting.is_empty() && !self.fetches.any_to_install() {
            self.job.room()
        } else {
            return false;
        };
        if room < pages {
            return false;
        }
        while let Some((index, len)) = self.next_run(place) {
            let Some(fetch) = self.fetches.get(place) else {
                break;
            };
            let first = fetch.first.plus(index as u64);
            let source = self.fetches.frame(place, index);
            let installed = self.install_copies(first, len as u64, source);
            let done = match installed {
                Installed::All => len as u64,
                Installed::UntilEvent(done) | Installed::NoMemory(done) | Installed::Gone(done) => {
                    done
                }
            };
            self.arrived_home(place, index, done as usize);
            match installed {
                Installed::All => {}
                Installed::UntilEvent(_) | Installed::NoMemory(_) => return done > 0,
                Installed::Gone(_) => {
                    self.table.change(first.plus(done), Entry::fetch_dropped);
                    self.wake(first.plus(done), 1);
                }
            }
        }
        self.fetches.places[place].active = false;
        for fault in &self.fetches.places[place].waiters {
            self.answered(fault);
        }
        true
    }

    /// The next run of pages of a fetch that are still to be installed.
    fn next_run(&mut self, place: usize) -> Option<(usize, usize)> {
        let fetch = &self.fetches.places[place];
        let still = |index: usize| {
            let page = fetch.first.plus(index as u64);
            let entry = self.table.get(page);
            fetch.dropped >> index & 1 == 0
                && entry.state() == State::Fetching
                && entry.slot() == Some(fetch.slots[index])
        };
        let start = (0..fetch.slots.len()).find(|index| still(*index))?;
        let len = (start..fetch.slots.len())
            .take_while(|index| still(*index))
            .count();
        Some((start, len))
    }

    fn arrived_home(&mut self, place: usize, index: usize, pages: usize) {
        let first = self.fetches.places[place].first.plus(index as u64);
        for i in 0..pages as u64 {
            if let Some((before, _)) = self.table.change(first.plus(i), Entry::fetched) {
                let resident = self.table.local_pages();
                self.residents
                    .refaulted(first.plus(i), before.age(), resident);
                self.job.charge(1);
            }
        }
    }

    /// Checks every page of a fetch against what its slot should hold.
    fn check_hashes(&mut self, place: usize) -> bool {
        let Some(frames) = self.fetches.memory() else {
            return false;
        };
        let fetch = &self.fetches.places[place];
        let good = (0..fetch.slots.len()).all(|index| self.is_good(&frames, place, index));
        self.fetches.places[place].checked = good;
        good
    }

    fn is_good(&self, frames: &RegisteredMemory, place: usize, index: usize) -> bool {
        let fetch = &self.fetches.places[place];
        fetch.dropped >> index & 1 == 1
            || frames.hash128(frame_offset(place, index), 4096).ok()
                == self.shared.far.hash(fetch.slots[index])
    }

    /// Of a fetch whose bytes do not pass their check: has the copies that gave wrong bytes be copied anew, and not be asked
    /// for them until that is done. Returns whether other copies have them.
    pub(super) fn doubt_sources(&self, place: usize) -> bool {
        let (fetch, frames) = (&self.fetches.places[place], self.fetches.memory());
        let Some(frames) = frames else { return false };
        let slots = fetch.slots.iter().zip(&fetch.sources).enumerate();
        let mut others = true;
        for (index, (slot, source)) in slots {
            if !self.is_good(&frames, place, index) {
                others &= self.shared.far.doubt(*slot, *source);
            }
        }
        others
    }

    /// Whether every page of a fetch is in some copy that has not failed to give it.
    pub(super) fn has_other_sources(&self, place: usize) -> bool {
        let fetch = &self.fetches.places[place];
        fetch.slots.iter().all(|slot| {
            let places = self.shared.far.places(*slot, 1);
            let mut copies = places.iter();
            copies.any(|it| !fetch.failed_copies.contains(&it.copy))
        })
    }
}
