//! The page-table entry: one word that says where a page's bytes are.
//!
//! ```text
//!  63            48 47                24 23              8 7      6      5          4          3..0
//! +----------------+--------------------+-----------------+------+------+----------+----------+-------+
//! | eviction age   | extent             | page in extent  | read | slot | not      | soft     | state |
//! |                |                    |                 | only |      | used     | dirty    |       |
//! +----------------+--------------------+-----------------+------+------+----------+----------+-------+
//! ```
//!
//! The names follow the kernel's device-private swap entries: a far entry is a tagged non-present entry, and
//! there is a readable and a writable kind. Every transition is a pure function from a word to a word, or to
//! nothing where the model has no such transition; the table applies them by compare-and-exchange.

/// Bits of an extent's number within one agent: 16 million extents, 256 TiB at 16 MiB each.
pub const EXTENT_BITS: u32 = 24;
/// Bits of a page's number within its extent: extents of at most 256 MiB.
pub const PAGE_IN_EXTENT_BITS: u32 = 16;
/// Bits of the eviction age.
pub const AGE_BITS: u32 = 16;

const STATE_BITS: u32 = 4;
const FLAG_BITS: u32 = 4;
const PAGE_SHIFT: u32 = STATE_BITS + FLAG_BITS;
const EXTENT_SHIFT: u32 = PAGE_SHIFT + PAGE_IN_EXTENT_BITS;
const AGE_SHIFT: u32 = EXTENT_SHIFT + EXTENT_BITS;

const _: () = assert!(
    AGE_SHIFT + AGE_BITS == u64::BITS,
    "the fields fill the word"
);

const STATE_MASK: u64 = (1 << STATE_BITS) - 1;
const SOFT_DIRTY: u64 = 1 << 4;
const HAS_SLOT: u64 = 1 << 6;
const READ_ONLY: u64 = 1 << 7;
const SLOT_FIELD: u64 = ((1 << (EXTENT_BITS + PAGE_IN_EXTENT_BITS)) - 1) << PAGE_SHIFT;
const AGE_FIELD: u64 = u64::MAX << AGE_SHIFT;

/// A page-sized place on a memory node: an extent of this agent's, and a page in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot {
    extent: u32,
    page: u16,
}

impl Slot {
    /// The slot of this extent and page; `None` where the extent's number does not fit the entry word.
    #[must_use]
    pub fn new(extent: u32, page: u16) -> Option<Self> {
        (extent < 1 << EXTENT_BITS).then_some(Self { extent, page })
    }

    /// The extent's number within this agent.
    #[must_use]
    pub fn extent(self) -> u32 {
        self.extent
    }

    /// The page's number within its extent.
    #[must_use]
    pub fn page(self) -> u16 {
        self.page
    }

    /// The slot behind this one in the same extent.
    #[must_use]
    pub fn next(self) -> Option<Self> {
        Some(Self {
            extent: self.extent,
            page: self.page.checked_add(1)?,
        })
    }

    fn bits(self) -> u64 {
        (u64::from(self.extent) << EXTENT_SHIFT) | (u64::from(self.page) << PAGE_SHIFT)
    }

    fn from_bits(word: u64) -> Self {
        Self {
            extent: ((word >> EXTENT_SHIFT) & ((1 << EXTENT_BITS) - 1)) as u32,
            page: (word >> PAGE_SHIFT) as u16,
        }
    }
}

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Never written: the first touch gets zeros.
    Untouched,
    /// Was taken out and was all zeros; holds no slot.
    Zero,
    /// In the program's memory; may own a clean copy in a slot.
    Local,
    /// Only in a slot that others may share.
    FarRead,
    /// Only in a slot that this table alone holds.
    FarWrite,
    /// On its way home from its slot.
    Fetching,
    /// Taken out of the program's memory, on its way to a slot; its bytes are in staging.
    Evicting,
    /// Its only copies are lost. Touching it raises SIGBUS.
    Poisoned,
}

impl State {
    /// How many there are.
    pub(crate) const COUNT: usize = 8;

    /// Its code in the entry word: a number below [`Self::COUNT`].
    pub(crate) const fn code(self) -> usize {
        code(self) as usize
    }
}

/// The entry word.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Entry(u64);

impl Entry {
    /// The entry of a page that was never touched: the zero word.
    pub const UNTOUCHED: Self = Self(0);

    /// The entry that this word is. Words whose state field is none of the model's come out as `None`: such
    /// an entry is corrupt.
    #[must_use]
    pub fn from_word(word: u64) -> Option<Self> {
        let entry = Self(word);
        entry.decoded()?;
        Some(entry)
    }

    /// Its word.
    #[must_use]
    pub fn word(self) -> u64 {
        self.0
    }

    /// A page found present in the program's memory.
    #[must_use]
    pub fn local() -> Self {
        Self(code(State::Local) | SOFT_DIRTY)
    }

    fn decoded(self) -> Option<State> {
        Some(match self.0 & STATE_MASK {
            0 => State::Untouched,
            1 => State::Zero,
            2 => State::Local,
            3 => State::FarRead,
            4 => State::FarWrite,
            5 => State::Fetching,
            6 => State::Evicting,
            7 => State::Poisoned,
            _ => return None,
        })
    }

    /// Where the page is. An entry made by this module always decodes; a corrupt one reads as poisoned, which
    /// is the one state that can give out neither stale nor wrong bytes.
    #[must_use]
    pub fn state(self) -> State {
        self.decoded().unwrap_or(State::Poisoned)
    }

    /// The slot that holds a copy of the page, if one does.
    #[must_use]
    pub fn slot(self) -> Option<Slot> {
        (self.0 & HAS_SLOT != 0).then(|| Slot::from_bits(self.0))
    }

    /// Whether other tables may hold its slot too, so that it must never be overwritten.
    #[must_use]
    pub fn is_read_only(self) -> bool {
        self.0 & READ_ONLY != 0
    }

    /// Whether this is a far entry of either kind.
    #[must_use]
    pub fn is_far(self) -> bool {
        matches!(self.state(), State::FarRead | State::FarWrite)
    }

    /// Whether the page is known to have been written since its soft-dirty bit was last cleared. No transition of a page that
    /// goes or comes changes the bit; [`Self::clean`], [`Self::soft_dirtied`], being found present and being discarded do; where it is clear, the pager compares the page's contents.
    #[must_use]
    pub fn is_soft_dirty(self) -> bool {
        self.0 & SOFT_DIRTY != 0
    }

    /// When it was last taken out, on the evictor's wrapping clock.
    #[must_use]
    pub fn age(self) -> u16 {
        (self.0 >> AGE_SHIFT) as u16
    }

    fn with_state(self, state: State) -> Self {
        Self((self.0 & !STATE_MASK) | code(state))
    }

    fn without_slot(self) -> Self {
        Self(self.0 & !(HAS_SLOT | READ_ONLY | SLOT_FIELD))
    }

    fn with_slot(self, slot: Slot, read_only: bool) -> Self {
        let shared = if read_only { READ_ONLY } else { 0 };
        Self(self.without_slot().0 | HAS_SLOT | shared | slot.bits())
    }

    fn far_state(self) -> State {
        if self.is_read_only() {
            State::FarRead
        } else {
            State::FarWrite
        }
    }

    /// Far to Fetching: this caller, and nobody else, brings the page home.
    #[must_use]
    pub fn claim_fetch(self) -> Option<Self> {
        self.is_far().then(|| self.with_state(State::Fetching))
    }

    /// Fetching to Local: the page was installed; its slot stays as a clean copy.
    #[must_use]
    pub fn fetched(self) -> Option<Self> {
        (self.state() == State::Fetching).then(|| self.with_state(State::Local))
    }

    /// Untouched, Zero or Far to Local: the page was found present, and nothing is known of what was done to it since. A slot
    /// that it has holds what it was.
    #[must_use]
    pub fn found_present(self) -> Option<Self> {
        match self.state() {
            State::FarRead | State::FarWrite => Some(self.with_state(State::Local).soft_dirtied()),
            _ => self.filled_with_zeros().map(Self::soft_dirtied),
        }
    }

    /// Fetching back to Far: the read was dropped or failed and may be tried again.
    #[must_use]
    pub fn fetch_dropped(self) -> Option<Self> {
        (self.state() == State::Fetching).then(|| self.with_state(self.far_state()))
    }

    /// Untouched or Zero to Local: zeros were installed.
    #[must_use]
    pub fn filled_with_zeros(self) -> Option<Self> {
        matches!(self.state(), State::Untouched | State::Zero)
            .then(|| self.without_slot().with_state(State::Local))
    }

    /// Local to Evicting: this caller, and nobody else, takes the page out.
    #[must_use]
    pub fn claim_evict(self) -> Option<Self> {
        (self.state() == State::Local).then(|| self.with_state(State::Evicting))
    }

    /// Evicting back to Local: the kernel would not give the page up, or a touch turned it round and it was
    /// installed from staging.
    #[must_use]
    pub fn turned_round(self) -> Option<Self> {
        (self.state() == State::Evicting).then(|| self.with_state(State::Local))
    }

    /// Evicting to Zero: the page was all zeros. A slot it had is the caller's to release.
    #[must_use]
    pub fn evicted_as_zero(self, age: u16) -> Option<Self> {
        (self.state() == State::Evicting)
            .then(|| self.without_slot().with_state(State::Zero).aged(age))
    }

    /// Evicting to Far with the clean copy it had: nothing was written.
    #[must_use]
    pub fn evicted_clean(self, age: u16) -> Option<Self> {
        (self.state() == State::Evicting && self.slot().is_some())
            .then(|| self.with_state(self.far_state()).aged(age))
    }

    /// Evicting to `FarWrite` in a slot newly written. A slot it had before is the caller's to release.
    #[must_use]
    pub fn evicted_to(self, slot: Slot, age: u16) -> Option<Self> {
        (self.state() == State::Evicting).then(|| {
            self.with_slot(slot, false)
                .with_state(State::FarWrite)
                .aged(age)
        })
    }

    /// Local with a clean copy in a slot just written: a page turned round whose write-back finished.
    #[must_use]
    pub fn gained_copy(self, slot: Slot) -> Option<Self> {
        (self.state() == State::Local && self.slot().is_none()).then(|| self.with_slot(slot, false))
    }

    /// Local or Evicting without the copy in its slot, which is the caller's to release: the copy is stale, or its slot is
    /// needed more than the copy.
    #[must_use]
    pub fn dropped_copy(self) -> Option<Self> {
        let has_another = matches!(self.state(), State::Local | State::Evicting);
        (has_another && self.slot().is_some()).then(|| self.without_slot())
    }

    /// The entries that parent and child have after a fork: one more reference where there is a slot, and
    /// what was writable becomes readable in both. Pages in transit are settled before a fork is answered,
    /// except those being fetched, which the child finds far.
    #[must_use]
    pub fn forked(self) -> Option<(Self, Self)> {
        let downgraded = if self.slot().is_some() {
            Self(self.0 | READ_ONLY)
        } else {
            self
        };
        Some(match self.state() {
            State::Evicting => return None,
            State::FarWrite | State::FarRead => {
                let far = downgraded.with_state(State::FarRead);
                (far, far)
            }
            State::Fetching => (downgraded, downgraded.with_state(State::FarRead)),
            _ => (downgraded, downgraded),
        })
    }

    /// Anything to Untouched: the program gave the page up. A slot it had is the caller's to release.
    #[must_use]
    pub fn discarded(self) -> Self {
        Self::UNTOUCHED
    }

    /// Anything to Poisoned. A slot it had is the caller's to release.
    #[must_use]
    pub fn poisoned(self) -> Self {
        self.without_slot().with_state(State::Poisoned)
    }

    /// The same with its soft-dirty bit cleared.
    #[must_use]
    pub fn clean(self) -> Self {
        Self(self.0 & !SOFT_DIRTY)
    }

    /// The same with its soft-dirty bit set.
    #[must_use]
    pub fn soft_dirtied(self) -> Self {
        Self(self.0 | SOFT_DIRTY)
    }

    fn aged(self, age: u16) -> Self {
        Self((self.0 & !AGE_FIELD) | (u64::from(age) << AGE_SHIFT))
    }
}

const fn code(state: State) -> u64 {
    match state {
        State::Untouched => 0,
        State::Zero => 1,
        State::Local => 2,
        State::FarRead => 3,
        State::FarWrite => 4,
        State::Fetching => 5,
        State::Evicting => 6,
        State::Poisoned => 7,
    }
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.decoded() {
            Some(state) => write!(f, "{state:?}")?,
            None => write!(f, "corrupt({:#x})", self.0)?,
        }
        if let Some(slot) = self.slot() {
            let shared = if self.is_read_only() { " shared" } else { "" };
            write!(f, " slot {}.{}{shared}", slot.extent, slot.page)?;
        }
        if self.is_soft_dirty() {
            f.write_str(" soft-dirty")
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_slot() -> impl Strategy<Value = Slot> {
        (0u32..1 << EXTENT_BITS, any::<u16>()).prop_filter_map("fits", |(e, p)| Slot::new(e, p))
    }

    /// Entries as the model makes them: by transitions from the untouched one.
    fn any_entry() -> impl Strategy<Value = Entry> {
        let paths = (any_slot(), any::<u16>(), 0u8..11);
        let entries = paths.prop_filter_map("reachable", |(slot, age, path)| {
            let local = Entry::UNTOUCHED.filled_with_zeros()?;
            let evicting = local.claim_evict()?;
            let far = evicting.evicted_to(slot, age)?;
            Some(match path {
                0 => Entry::UNTOUCHED,
                1 => local,
                2 => evicting,
                3 => far,
                4 => far.forked()?.0,
                5 => far.claim_fetch()?,
                6 => far.claim_fetch()?.fetched()?,
                7 => far.claim_fetch()?.fetched()?.claim_evict()?,
                8 => evicting.evicted_as_zero(age)?,
                9 => far.poisoned(),
                _ => far.forked()?.0.claim_fetch()?.fetched()?,
            })
        });
        (entries, any::<bool>()).prop_map(
            |(entry, dirty)| {
                if dirty { entry.soft_dirtied() } else { entry }
            },
        )
    }

    proptest! {
        #[test]
        fn every_word_decodes_or_is_refused(word: u64) {
            match Entry::from_word(word) {
                Some(entry) => prop_assert_eq!(entry.word(), word),
                None => prop_assert!(word & STATE_MASK > 7),
            }
            let _ = format!("{:?}", Entry(word));
        }

        #[test]
        fn a_slot_survives_the_word(slot in any_slot(), age: u16) {
            let far = Entry::local().claim_evict().and_then(|e| e.evicted_to(slot, age)).unwrap();
            prop_assert_eq!(far.slot(), Some(slot));
            prop_assert_eq!(far.age(), age);
            prop_assert_eq!(far.state(), State::FarWrite);
        }

        #[test]
        fn only_pages_with_a_place_hold_slots(entry in any_entry()) {
            match entry.state() {
                State::FarRead | State::FarWrite | State::Fetching => prop_assert!(entry.slot().is_some()),
                State::Untouched | State::Zero | State::Poisoned => prop_assert!(entry.slot().is_none()),
                State::Local | State::Evicting => {}
            }
            prop_assert_eq!(entry.state() == State::FarRead, entry.is_far() && entry.is_read_only());
        }

        #[test]
        fn a_fork_leaves_nothing_writable_in_either(entry in any_entry()) {
            if let Some((parent, child)) = entry.forked() {
                for side in [parent, child] {
                    prop_assert_eq!(side.slot(), entry.slot());
                    prop_assert!(side.state() != State::FarWrite);
                    prop_assert!(side.slot().is_none() || side.is_read_only());
                }
                prop_assert!(child.state() != State::Fetching);
            } else {
                prop_assert_eq!(entry.state(), State::Evicting);
            }
        }

        #[test]
        fn one_claim_excludes_the_others(entry in any_entry()) {
            if let Some(fetching) = entry.claim_fetch() {
                prop_assert!(fetching.claim_fetch().is_none());
                prop_assert!(fetching.claim_evict().is_none());
                prop_assert_eq!(fetching.fetch_dropped(), Some(entry));
            }
            if let Some(evicting) = entry.claim_evict() {
                prop_assert!(evicting.claim_evict().is_none());
                prop_assert!(evicting.claim_fetch().is_none());
                prop_assert_eq!(evicting.turned_round(), Some(entry));
            }
        }

        #[test]
        fn soft_dirty_survives_every_transition(entry in any_entry(), slot in any_slot(), age: u16) {
            let (parent, child) = entry.forked().unzip();
            let after = [
                entry.claim_fetch(),
                entry.fetched(),
                entry.fetch_dropped(),
                entry.filled_with_zeros(),
                entry.claim_evict(),
                entry.turned_round(),
                entry.evicted_as_zero(age),
                entry.evicted_clean(age),
                entry.evicted_to(slot, age),
                entry.gained_copy(slot),
                entry.dropped_copy(),
                parent,
                child,
                Some(entry.poisoned()),
            ];
            for entry_after in after.into_iter().flatten() {
                prop_assert_eq!(entry_after.is_soft_dirty(), entry.is_soft_dirty(), "{:?} to {:?}", entry, entry_after);
            }
        }

        #[test]
        fn marking_changes_nothing_else(entry in any_entry()) {
            let (clean, dirty) = (entry.clean(), entry.soft_dirtied());
            prop_assert!(!clean.is_soft_dirty() && dirty.is_soft_dirty());
            prop_assert_eq!((clean.soft_dirtied(), dirty.clean()), (dirty, clean));
            prop_assert_eq!((clean.state(), clean.slot(), clean.age()), (entry.state(), entry.slot(), entry.age()));
            prop_assert_eq!((dirty.state(), dirty.slot(), dirty.age()), (entry.state(), entry.slot(), entry.age()));
        }

        #[test]
        fn a_clean_round_trip_ends_where_it_began(slot in any_slot(), age: u16) {
            let far = Entry::local().claim_evict().and_then(|e| e.evicted_to(slot, age)).unwrap().clean();
            let back = far.claim_fetch().and_then(Entry::fetched).unwrap();
            prop_assert_eq!(back.claim_evict().and_then(|e| e.evicted_clean(age)), Some(far));
        }
    }
}
