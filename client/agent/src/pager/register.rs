//! What is managed: the program's large plain anonymous mappings, registered whole (the heap but for its last page), late, and
//! again as they grow.

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Pager;
use crate::entry::{Entry, State};
use crate::sys::pagemap::Pagemap;
use crate::sys::process::{self, Mapping};
use crate::table::Page;

/// The pause after a look that failed.
const LOOK_AGAIN: Duration = Duration::from_millis(1);
/// Smaller mappings stay the program's own: they are many, and hold little.
const LEAST_BYTES: u64 = 128 << 10;
/// A plain mapping right behind an inaccessible one of at most this size looks like a thread's stack behind
/// its guard, and is left alone if it is no larger than the other bound.
const GUARD_MOST_BYTES: u64 = 64 << 10;
const STACK_MOST_BYTES: u64 = 64 << 20;
/// Inaccessible memory of this size behind a plain mapping may be what an allocator's heap grows into: libc's are of 64 MiB
/// in all. Others reserve terabytes, and looking what is present in those takes time.
const RESERVE_BYTES: RangeInclusive<u64> = GUARD_MOST_BYTES + 1..=64 << 20;
/// The rest after a look at mappings that were just being changed.
const CHANGING_REST: Duration = Duration::from_micros(200);
/// How often a look at the mappings is begun anew because the program changed them meanwhile.
const LOOKS: usize = 8;
/// How long a look waits for the helper's batch to be over.
const SETTLE_BATCH: Duration = Duration::from_secs(5);

/// The ranges that are registered, as far as this pager has done it or was told.
#[derive(Clone, Debug, Default)]
pub(crate) struct Registered {
    ranges: BTreeMap<u64, u64>,
}

impl Registered {
    pub(super) fn contains(&self, page: Page) -> bool {
        let address = page.address();
        self.ranges
            .range(..=address)
            .next_back()
            .is_some_and(|(_, end)| address < *end)
    }

    pub(super) fn covers(&self, range: &Range<u64>) -> bool {
        self.ranges
            .range(..=range.start)
            .next_back()
            .is_some_and(|(_, end)| range.end <= *end)
    }

    /// The parts of a range that are not.
    fn gaps(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let before = self.ranges.range(..range.start).next_back();
        let within = self.ranges.range(range.start..range.end);
        let (mut gaps, mut from) = (Vec::new(), range.start);
        for (start, end) in before.into_iter().chain(within) {
            if from < *start {
                gaps.push(from..*start);
            }
            from = from.max(*end);
        }
        if from < range.end {
            gaps.push(from..range.end);
        }
        gaps
    }

    pub(super) fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ranges.iter().map(|(start, end)| *start..*end)
    }

    pub(super) fn insert(&mut self, range: Range<u64>) {
        self.remove(&range);
        let mut merged = range.clone();
        if let Some((start, end)) = self.ranges.range(..range.start).next_back()
            && *end == range.start
        {
            merged.start = *start;
        }
        if let Some(end) = self.ranges.get(&range.end).copied() {
            self.ranges.remove(&range.end);
            merged.end = end;
        }
        self.ranges.insert(merged.start, merged.end);
    }

    pub(super) fn remove(&mut self, range: &Range<u64>) {
        let overlapping: Vec<(u64, u64)> = self
            .ranges
            .range(..range.end)
            .rev()
            .take_while(|(_, end)| **end > range.start)
            .map(|(start, end)| (*start, *end))
            .collect();
        for (start, end) in overlapping {
            self.ranges.remove(&start);
            if start < range.start {
                self.ranges.insert(start, range.start);
            }
            if end > range.end {
                self.ranges.insert(range.end, end);
            }
        }
    }
}

/// What of a mapping is managed that has room behind it: of the heap, all but its last page.
///
/// What `brk` adds has been touched by the time it is registered. Were all before it registered too, it would be a mapping of its
/// own from then on, since the kernel joins none that have each been touched before they were alike; and a program may have some
/// 65530. To the last page it is added as to any heap, and joins what is managed as it is registered.
fn without_tail(mapping: &Mapping) -> Range<u64> {
    let tail = if mapping.is_heap() { 4096 } else { 0 };
    mapping.range.start..mapping.range.end - tail
}

impl Pager {
    /// Looks at the mappings and registers what is new, once memory is short. A look that the program's own
    /// calls have crossed is begun anew: registering what a stale look shows could manage a mapping that is
    /// another by now.
    pub(super) fn rescan(&mut self) {
        let Some(pid) = self.process.as_ref().map(process::Process::pid) else {
            return;
        };
        if !self.job.is_armed() {
            // The limit may have become another since it was last reckoned with.
            return self.look_ahead();
        }
        if let Some(helper) = &self.helper {
            helper.control().headroom.store(-1, Ordering::Release);
        }
        // Moves of our own look like changes of the program's.
        self.settle_batch();
        let mut fresh = Vec::new();
        let mut settled = None;
        for _ in 0..LOOKS {
            let Ok(mappings) = process::mappings(pid) else {
                return;
            };
            fresh = self.worth_managing(&mappings);
            fresh.extend(self.reserves(&mappings));
            fresh.retain(|range| self.uffd.register(range, true).is_ok());
            if !self.uffd.is_changing() {
                settled = Some(mappings);
                break;
            }
            self.settle_batch();
            self.read_messages();
            // The program's thread that has been told of takes its change back itself, and needs a processor for it: one
            // that this one, which goes before it, does not keep.
            std::thread::sleep(CHANGING_REST);
        }
        match settled {
            Some(mappings) => {
                self.take_in(pid, &fresh);
                // Only now: what has just been taken in is not unmanaged.
                self.count_unmanaged(pid, &mappings);
            }
            None => self.handle.ask_rescan(),
        }
        crate::sys::process::run_at_once(false);
        tracing::debug!(
            space = self.handle.id,
            ?fresh,
            local = self.table.local_pages(),
            "looked at the mappings"
        );
    }

    /// The program has mapped as much as it was given leave for. Memory is managed before it can be filled past the
    /// limit: to look only at what is filled would be too late for who fills gigabytes in a second.
    pub(super) fn look_ahead(&mut self) {
        let Some(pid) = self.process.as_ref().map(process::Process::pid) else {
            return;
        };
        let Ok(mappings) = process::mappings(pid) else {
            return;
        };
        let bytes = |range: &Range<u64>| range.end - range.start;
        let reach: u64 = self.worth_managing(&mappings).iter().map(bytes).sum();
        self.handle.figures.reach.store(reach, Ordering::Relaxed);
        let spaces = self.job.spaces();
        let of_all: u64 = spaces
            .iter()
            .map(|handle| handle.figures.reach.load(Ordering::Relaxed))
            .sum();
        let limit = self.job.local_pages() * 4096;
        if of_all >= limit {
            self.job.arm();
            for handle in &spaces {
                handle.ask_rescan();
            }
            self.rescan();
        } else if let Some(helper) = &self.helper {
            let share = (limit - of_all) / spaces.len().max(1) as u64;
            helper
                .control()
                .headroom
                .store(i64::try_from(share).unwrap_or(i64::MAX), Ordering::Release);
        }
    }

    fn worth_managing(&self, mappings: &[Mapping]) -> Vec<Range<u64>> {
        let mut found = Vec::new();
        let mut before: Option<&Mapping> = None;
        for (index, mapping) in mappings.iter().enumerate() {
            let size = mapping.range.end - mapping.range.start;
            let range = match mappings.get(index + 1) {
                Some(after) if after.range.start == mapping.range.end => mapping.range.clone(),
                _ => without_tail(mapping),
            };
            let guarded = before.is_some_and(|before| {
                &before.permissions[..3] == b"---"
                    && before.range.end == mapping.range.start
                    && before.range.end - before.range.start <= GUARD_MOST_BYTES
            });
            let like_a_stack = guarded && size <= STACK_MOST_BYTES && mapping.name.is_empty();
            let ours = self.is_own_range(Page::of(mapping.range.start))
                || self.is_own_range(Page::of(mapping.range.end - 1));
            if mapping.is_plain()
                && size >= LEAST_BYTES
                && !like_a_stack
                && !ours
                && !self.registered.covers(&range)
            {
                found.push(range);
            }
            before = Some(mapping);
        }
        found
    }

    /// Inaccessible memory right behind what is worth managing: the allocator's heaps of threads grow into it by making
    /// more of it accessible. That raises no event either, but what is registered already stays so.
    fn reserves(&self, mappings: &[Mapping]) -> Vec<Range<u64>> {
        let behind = |pair: &[Mapping]| match pair {
            [before, reserve]
                if before.is_plain()
                    && reserve.is_reserve()
                    && before.range.end == reserve.range.start
                    && !self.is_own_range(Page::of(reserve.range.start))
                    && RESERVE_BYTES.contains(&(reserve.range.end - reserve.range.start))
                    && !self.registered.covers(&reserve.range) =>
            {
                Some(reserve.range.clone())
            }
            _ => None,
        };
        mappings.windows(2).filter_map(behind).collect()
    }

    /// Takes ranges just registered, and what is present in them, into the tables. Only once no call of the
    /// program's has crossed the registering: a fork whose event is read before then has not handed them on, and an
    /// unmap may have put another mapping in their place.
    fn take_in(&mut self, pid: i32, ranges: &[Range<u64>]) {
        let Ok(pagemap) = Pagemap::open(pid) else {
            return self.look_again();
        };
        for range in ranges {
            let (table, residents) = (&mut self.table, &mut self.residents);
            let mut found = 0;
            let looked = pagemap.present(range.clone(), |number| {
                let page = Page(number);
                let adopt = |entry: Entry| (entry.state() == State::Untouched).then(Entry::local);
                if table.change(page, adopt).is_some() {
                    residents.arrived(page);
                    found += 1;
                }
            });
            self.job.charge(found);
            match looked {
                Ok(()) => self.registered.insert(range.clone()),
                // Else its pages would be in no table, and never go.
                Err(error) => {
                    tracing::debug!(%error, ?range, "what is present cannot be read; it is tried again");
                    return self.look_again();
                }
            }
        }
    }

    /// A look has failed: another soon, unless it did since the process has ended.
    fn look_again(&mut self) {
        self.closing |= self
            .process
            .as_ref()
            .is_some_and(process::Process::has_exited);
        std::thread::sleep(LOOK_AGAIN);
        self.handle.ask_rescan();
    }

    /// Manages one region that the program named.
    pub(super) fn manage_region(&mut self, range: Range<u64>) -> bool {
        let Some(pid) = self.process.as_ref().map(process::Process::pid) else {
            return false;
        };
        for _ in 0..LOOKS {
            if self.uffd.register(&range, true).is_err() {
                return false;
            }
            if !self.uffd.is_changing() {
                self.take_in(pid, &[range]);
                return true;
            }
            self.settle_batch();
            self.read_messages();
            std::thread::sleep(CHANGING_REST);
        }
        false
    }

    /// A forked child stands still at the door: what its memory really has registered, and was not wiped, decides what its
    /// table may say. The parent's calls may have crossed the fork, and a page that is not under this uffd must never be
    /// taken out.
    pub(super) fn keep_only_inherited(&mut self, pid: i32) {
        let Ok(ranges) = process::registered_ranges(pid) else {
            tracing::error!(
                pid,
                "a forked child's mappings cannot be read: nothing of it is taken out"
            );
            return;
        };
        let (mut real, mut inherited) = (Registered::default(), Registered::default());
        for (range, wiped) in ranges {
            if !wiped {
                inherited.insert(range.clone());
            }
            real.insert(range);
        }
        let everything = Page(0)..Page(u64::MAX >> 12);
        let strays: Vec<Page> = self
            .table
            .touched(everything)
            .map(|(page, _)| page)
            .filter(|page| !inherited.contains(*page))
            .collect();
        for page in strays {
            if real.contains(page) {
                self.discard_to_zeros(page..page.plus(1));
            } else {
                self.discard_pages(page..page.plus(1));
            }
        }
        self.registered = real;
        self.inheritance_is_known();
    }

    /// Resident anonymous pages that are not managed: stacks, small mappings, written pages of private files, our own.
    fn count_unmanaged(&self, pid: i32, mappings: &[Mapping]) {
        let Ok(pagemap) = Pagemap::open(pid) else {
            return;
        };
        let unmanaged = mappings
            .iter()
            .filter(|mapping| mapping.permissions[3] == b'p' && !mapping.name.starts_with("[v"))
            .flat_map(|mapping| self.registered.gaps(&mapping.range))
            .map(|range| pagemap.count_present(range).unwrap_or(0))
            .sum();
        self.handle
            .figures
            .unmanaged
            .store(unmanaged, Ordering::Relaxed);
    }

    /// Waits for the batch that is with the helper. One that moves pages by `mremap` goes on only as its events are read.
    fn settle_batch(&mut self) {
        let began = Instant::now();
        while self.take_out.is_some() && !self.closing && began.elapsed() < SETTLE_BATCH {
            self.attention.look(Instant::now());
            if !self.poll_helper() && !self.read_messages() {
                super::take_out::rest_while_settling(began);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranges_agree_with_a_set_of_pages(ops in proptest::collection::vec((any::<bool>(), 0u64..60, 1u64..20), 1..60)) {
            let mut registered = Registered::default();
            let mut model = std::collections::BTreeSet::new();
            for (insert, start, len) in ops {
                let range = start * 4096..(start + len) * 4096;
                if insert {
                    registered.insert(range);
                    model.extend(start..start + len);
                } else {
                    registered.remove(&range);
                    model.retain(|page| !(start..start + len).contains(page));
                }
                for page in 0..80 {
                    prop_assert_eq!(registered.contains(Page(page)), model.contains(&page));
                }
                let gaps = registered.gaps(&(10 * 4096..70 * 4096));
                prop_assert!(gaps.iter().all(|gap| !gap.is_empty()));
                let missing: Vec<u64> = gaps.into_iter().flatten().step_by(4096).map(|at| at / 4096).collect();
                let expected: Vec<u64> = (10..70).filter(|page| !model.contains(page)).collect();
                prop_assert_eq!(missing, expected);
            }
        }
    }
}
