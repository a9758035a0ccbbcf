//! The page table of one address space: entry words by page, in chunks of 512 pages.

use std::collections::BTreeMap;
use std::ops::{Deref, Range};

use crate::entry::{Entry, State};
use crate::page_cell::PageCell;

/// Pages of a chunk: as many as one page of the hardware's own table maps.
pub const CHUNK_PAGES: u64 = 512;
const CHUNK_SHIFT: u32 = CHUNK_PAGES.trailing_zeros();

/// A page of the program's address space: its address divided by the page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Page(pub u64);

impl Page {
    /// The page that holds this address.
    #[must_use]
    pub fn of(address: u64) -> Self {
        Self(address >> 12)
    }

    /// The page's first address.
    #[must_use]
    pub fn address(self) -> u64 {
        self.0 << 12
    }

    /// The page `count` pages on.
    #[must_use]
    pub fn plus(self, count: u64) -> Self {
        Self(self.0.saturating_add(count))
    }
}

/// The pages that cover a range of addresses.
#[must_use]
pub fn pages_of(addresses: Range<u64>) -> Range<Page> {
    Page::of(addresses.start)..Page::of(addresses.end.saturating_add(0xfff))
}

/// The cells of a chunk.
pub type Cells = [PageCell; CHUNK_PAGES as usize];

/// Where a table's chunks lie.
pub trait ChunkMemory {
    /// A chunk; dropped when its table has no use for it any more.
    type Chunk: Deref<Target = Cells>;

    /// A chunk of untouched pages for this part of the address space.
    fn chunk(&self, number: u64) -> Self::Chunk;
}

/// Chunks on the heap.
#[derive(Clone, Copy, Debug, Default)]
pub struct Heap;

impl ChunkMemory for Heap {
    type Chunk = Box<Cells>;

    fn chunk(&self, _number: u64) -> Box<Cells> {
        Box::new(std::array::from_fn(|_| PageCell::new(Entry::UNTOUCHED)))
    }
}

/// The page table of one address space. A page without an entry is untouched.
pub struct PageTable<M: ChunkMemory = Heap> {
    memory: M,
    chunks: BTreeMap<u64, M::Chunk>,
    /// Pages by the code of their state. Nobody asks for the first, of untouched pages, which goes below zero.
    counts: [u64; State::COUNT],
}

impl Default for PageTable {
    fn default() -> Self {
        Self::new(Heap)
    }
}

impl<M: ChunkMemory> PageTable<M> {
    /// A table without entries, whose chunks will lie there.
    pub fn new(memory: M) -> Self {
        Self {
            memory,
            chunks: BTreeMap::new(),
            counts: [0; State::COUNT],
        }
    }

    /// Takes over a chunk that another table of this address space had.
    pub fn adopt(&mut self, number: u64, chunk: M::Chunk) {
        for cell in chunk.iter() {
            self.count(cell.load(), u64::wrapping_add);
        }
        self.chunks.insert(number, chunk);
    }

    /// Where its chunks lie.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// The page's entry.
    #[must_use]
    pub fn get(&self, page: Page) -> Entry {
        self.chunks
            .get(&(page.0 >> CHUNK_SHIFT))
            .map_or(Entry::UNTOUCHED, |chunk| cell(chunk, page).load())
    }

    /// Applies a transition; returns the entry before and after, or `None` where the transition does not
    /// apply to what the page is now.
    pub fn change(
        &mut self,
        page: Page,
        transition: impl Fn(Entry) -> Option<Entry>,
    ) -> Option<(Entry, Entry)> {
        let number = page.0 >> CHUNK_SHIFT;
        let memory = &self.memory;
        let chunk = self
            .chunks
            .entry(number)
            .or_insert_with(|| memory.chunk(number));
        let (before, after) = cell(chunk, page).change(transition)?;
        self.count(before, u64::wrapping_sub);
        self.count(after, u64::wrapping_add);
        Some((before, after))
    }

    fn count(&mut self, entry: Entry, change: fn(u64, u64) -> u64) {
        if let Some(count) = self.counts.get_mut(entry.state().code()) {
            *count = change(*count, 1);
        }
    }

    /// Pages in this state, any but [`State::Untouched`].
    #[must_use]
    pub fn pages_in(&self, state: State) -> u64 {
        self.counts.get(state.code()).copied().unwrap_or(0)
    }

    /// Pages in the program's memory.
    #[must_use]
    pub fn local_pages(&self) -> u64 {
        self.pages_in(State::Local)
    }

    /// Pages that are only in a slot (or all zeros and held nowhere), and those on their way.
    #[must_use]
    pub fn far_pages(&self) -> u64 {
        let far = [
            State::FarRead,
            State::FarWrite,
            State::Fetching,
            State::Evicting,
            State::Zero,
        ];
        far.into_iter().map(|state| self.pages_in(state)).sum()
    }

    /// Every page of `range` that has an entry, in order. Of the untouched ones those have that are soft-dirty.
    pub fn touched(&self, range: Range<Page>) -> impl Iterator<Item = (Page, Entry)> + '_ {
        let first = range.start.0 >> CHUNK_SHIFT;
        let last = range.end.0.saturating_sub(1) >> CHUNK_SHIFT;
        self.chunks
            .range(first..=last.max(first))
            .flat_map(|(number, chunk)| {
                (0u64..)
                    .zip(chunk.iter())
                    .map(move |(i, cell)| (Page((number << CHUNK_SHIFT) + i), cell.load()))
            })
            .filter(move |(page, entry)| range.contains(page) && *entry != Entry::UNTOUCHED)
    }

    /// The front of `range` up to which so many chunks have entries, so that going through it takes no longer than that.
    #[must_use]
    pub fn slice(&self, range: Range<Page>, chunks: usize) -> Range<Page> {
        if range.is_empty() {
            return range;
        }
        let first = range.start.0 >> CHUNK_SHIFT;
        let last = (range.end.0 - 1) >> CHUNK_SHIFT;
        let next = self.chunks.range(first..=last).nth(chunks);
        let end = next.map_or(range.end, |(number, _)| Page(number << CHUNK_SHIFT));
        range.start..end
    }

    /// Forgets every entry of `range`, handing each to `released`. Chunks left empty are freed.
    pub fn discard(&mut self, range: Range<Page>, mut released: impl FnMut(Page, Entry)) {
        let touched: Vec<(Page, Entry)> = self.touched(range.clone()).collect();
        for (page, entry) in touched {
            self.change(page, |entry| Some(entry.discarded()));
            released(page, entry);
        }
        let inside = range.start.0.div_ceil(CHUNK_PAGES)..range.end.0 >> CHUNK_SHIFT;
        if inside.start < inside.end {
            let empty: Vec<u64> = self
                .chunks
                .range(inside)
                .map(|(number, _)| *number)
                .collect();
            for number in empty {
                self.chunks.remove(&number);
            }
        }
    }

    /// Moves the entries of `from..from+pages` to `to`, as the kernel moves page-table entries on `mremap`.
    /// What was at the target is handed to `released`. The two do not overlap, and the target has been discarded
    /// before: so a move that was broken off anywhere is finished by doing it again, and the page that had just been
    /// copied then is handed to `released` once.
    pub fn remap(
        &mut self,
        from: Page,
        to: Page,
        pages: u64,
        mut released: impl FnMut(Page, Entry),
    ) {
        let moving: Vec<(Page, Entry)> = self.touched(from..from.plus(pages)).collect();
        for (page, entry) in moving {
            let target = to.plus(page.0 - from.0);
            if let Some((before, _)) = self.change(target, |_| Some(entry))
                && before != Entry::UNTOUCHED
            {
                released(target, before);
            }
            self.change(page, |entry| Some(entry.discarded()));
        }
        self.discard(from..from.plus(pages), |_, _| {});
    }
}

fn cell(cells: &Cells, page: Page) -> &PageCell {
    // The remainder is always within the array.
    &cells[(page.0 % CHUNK_PAGES) as usize]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Op {
        Touch(u64),
        SoftDirty(u64),
        Discard(u64, u64),
        Remap(u64, u64, u64),
    }

    fn any_op() -> impl Strategy<Value = Op> {
        let page = 0u64..3000;
        prop_oneof![
            page.clone().prop_map(Op::Touch),
            page.clone().prop_map(Op::SoftDirty),
            (page.clone(), 0u64..1500).prop_map(|(p, n)| Op::Discard(p, n)),
            (page.clone(), page, 1u64..700).prop_map(|(a, b, n)| Op::Remap(a, b, n)),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_a_plain_map(ops in proptest::collection::vec(any_op(), 1..60)) {
            let mut table = PageTable::default();
            let mut model: BTreeMap<u64, Entry> = BTreeMap::new();
            for op in ops {
                match op {
                    Op::Touch(p) => {
                        if table.change(Page(p), Entry::filled_with_zeros).is_some() {
                            model.insert(p, table.get(Page(p)));
                        }
                    }
                    Op::SoftDirty(p) => {
                        table.change(Page(p), |entry| Some(entry.soft_dirtied()));
                        model.insert(p, table.get(Page(p)));
                    }
                    Op::Discard(p, n) => {
                        let mut seen = 0;
                        table.discard(Page(p)..Page(p + n), |_, _| seen += 1);
                        let before = model.len();
                        model.retain(|k, _| !(p..p + n).contains(k));
                        prop_assert_eq!(before - model.len(), seen);
                    }
                    Op::Remap(a, b, n) if a + n <= b || b + n <= a => {
                        table.discard(Page(b)..Page(b + n), |_, _| {});
                        table.remap(Page(a), Page(b), n, |_, _| {});
                        let moving: Vec<_> = model.range(a..a + n).map(|(k, v)| (*k, *v)).collect();
                        model.retain(|k, _| !(a..a + n).contains(k) && !(b..b + n).contains(k));
                        model.extend(moving.into_iter().map(|(k, v)| (b + k - a, v)));
                    }
                    Op::Remap(..) => {}
                }
            }
            let all: BTreeMap<u64, Entry> = table.touched(Page(0)..Page(1 << 20)).map(|(p, e)| (p.0, e)).collect();
            prop_assert_eq!(&all, &model);
            let local = model.values().filter(|entry| entry.state() == State::Local);
            prop_assert_eq!(table.local_pages(), local.count() as u64);
        }
    }
    proptest! {
        #[test]
        fn slices_make_up_the_range(
            touched in proptest::collection::vec(0u64..40_000, 0..40),
            (from, len) in (0u64..40_000, 0u64..40_000),
            chunks in 1usize..5,
        ) {
            let mut table = PageTable::default();
            for page in touched {
                table.change(Page(page), Entry::filled_with_zeros);
            }
            let whole = Page(from)..Page(from + len);
            let (mut left, mut found) = (whole.clone(), Vec::new());
            while !left.is_empty() {
                let slice = table.slice(left.clone(), chunks);
                prop_assert!(slice.start == left.start && slice.end > left.start && slice.end <= left.end);
                let chunks_of: std::collections::BTreeSet<u64> =
                    table.touched(slice.clone()).map(|(page, _)| page.0 >> CHUNK_SHIFT).collect();
                prop_assert!(chunks_of.len() <= chunks);
                found.extend(table.touched(slice.clone()));
                left.start = slice.end;
            }
            prop_assert_eq!(found, table.touched(whole).collect::<Vec<_>>());
        }
    }
}
